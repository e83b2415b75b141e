"""A dataclass as configuration: every value of its annotated type and in its range.

Any dataclass whose fields are made with `option` can be parsed: `coercion` tells which annotations
are understood. A field `from_` is called `from` by users, since Python keeps the word for itself.
"""

import dataclasses
import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from hf_diffusion.config.coercion import allowed, coerce
from hf_diffusion.files import write_whole


RECIPES = (Path(__file__).resolve().parents[1] / "training" / "recipes").resolve()
# The samples of a run have this seed and those after it, and torch takes 64 bits.
HIGHEST_SEED = 2**63 - 1
HOLDS = {
    "above": lambda number, bound: number > bound,
    "at least": lambda number, bound: number >= bound,
    "below": lambda number, bound: number < bound,
    "at most": lambda number, bound: number <= bound,
}


class UsageError(ValueError):
    """The user asks for something that cannot be: the program ends with status 2."""


def option(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    group: str | None = None,
    positional: bool = False,
    repeatable: bool = False,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    tied: bool | str | None = True,
    once: bool = False,
    is_path: bool = False,
    often: bool = False,
    also: str | None = None,
) -> Any:
    """One field of a configuration; without a default it is required.

    group: opens a section of --help that lasts to the next.
    positional: on the command line the value stands alone, without a flag; in a file it has its
    name.
    repeatable: for a tuple; each use of the flag adds one element, in which commas are just commas.
    tied: False lets a resumed run change a setting of the method, and says so; None is of no
    concern to training. "state": a checkpoint holds something of it, so that it cannot change in
    any class. See `resuming`.
    once: the setting belongs to one start of a run; the file that repeats the run does not have it.
    is_path: the text may be the path of a local file or folder, in which ~ is the user's home.
    often: the plain --help shows it; where a configuration has such options, the others are left to
    `--help all`.
    also: a second, shorter name of the flag.
    """
    bounds = {"above": above, "at least": at_least, "below": below, "at most": at_most}
    metadata = {
        "help": help,
        "group": group,
        "positional": positional,
        "repeatable": repeatable,
        "bounds": {word: bound for word, bound in bounds.items() if bound is not None},
        "tied": tied,
        "once": once,
        "is_path": is_path,
        "often": often,
        "also": also,
    }
    return dataclasses.field(default=default, metadata=metadata)


def settings(cls: type) -> dict[str, dataclasses.Field]:
    """The fields of a configuration by the names that users give them."""
    return {field.name.rstrip("_"): field for field in dataclasses.fields(cls)}


def typed(cls: type, values: dict[str, Any], place: str) -> dict[str, Any]:
    """Texts by the names of settings, as values by the names of fields.

    `place` is a format for how a message names a setting, such as "--{}". ValueError for a setting
    that is not there, and for a text that its annotation does not take.
    """
    hints, known, result = get_type_hints(cls), settings(cls), {}
    for key, value in values.items():
        name = str(key).rstrip("_")
        if name not in known:
            raise ValueError(f"{place.format(key)}: there is no such setting{did_you_mean(name, list(known))}")
        result[known[name].name] = coerce(value, hints[known[name].name], place.format(key))
        if known[name].metadata.get("is_path") and isinstance(value, str) and result[known[name].name] is not None:
            result[known[name].name] = os.path.expanduser(value)
    return result


def take_over(cls: type, values: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """`values` with those of a later source above them.

    A later source that chooses one of the class's `alternatives` takes back the others: a flag that
    names a folder of images replaces the data set that a file names.
    """
    kept = dict(values)
    for base in cls.__mro__:
        for alternatives in vars(base).get("alternatives", ()):
            chosen = [names for names in alternatives if later.get(names[0]) not in (None, ())]
            former = [names for names in alternatives if names not in chosen and kept.get(names[0]) is not None]
            if len(chosen) == 1 and former:
                others = {name for names in former for name in names}
                kept = {name: value for name, value in kept.items() if name not in others}
    return kept | later


def find_config(path: str | os.PathLike) -> Path:
    """The file of this path, or the recipe of this name that comes with the package.

    ValueError lists the recipes for a name that is neither.
    """
    path = Path(path).expanduser()
    if path.exists():
        return path
    recipe = RECIPES / (path.name if path.suffix else f"{path.name}.yaml")
    # Also by its place in the repository, as the documentation has it.
    if recipe.is_file() and str(path.parent) in (".", "recipes", "training/recipes"):
        return recipe
    names = ", ".join(sorted(recipe.name for recipe in RECIPES.glob("*.yaml")))
    raise ValueError(f"cannot read the configuration file {path}: No such file or directory; recipes by name: {names}")


def read_config(cls: type, path: str | os.PathLike) -> dict[str, Any]:
    """The values that a YAML file gives to fields of `cls`, each of its annotated type.

    ValueError names the file and the key.
    """
    path = find_config(path)
    try:
        # BaseLoader leaves every scalar as text. YAML 1.1 reads 1e-4 as a string, `no` as False and
        # 010 as 8.
        values = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except OSError as error:
        raise ValueError(f"cannot read the configuration file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"the configuration file {path} is not text in UTF-8") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "unknown place"
        raise ValueError(f"{path} is not valid YAML ({where}): {getattr(error, 'problem', None) or error}") from error
    # An empty file, or one of comments only, changes nothing.
    if values is None or values == "":
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold `key: value` lines, got a {type(values).__name__}")
    return typed(cls, values, place=f"{path}: {{}}")


def config_to_dict(config: Any) -> dict[str, Any]:
    """The fields as plain numbers, texts, None and lists, as YAML and JSON take them."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def lasting_settings(config: Any) -> dict[str, Any]:
    """`config_to_dict` without what belongs to one start of a run: what repeats the run, and
    nothing else."""
    once = {field.name for field in dataclasses.fields(config) if field.metadata.get("once")}
    return {name: value for name, value in config_to_dict(config).items() if name not in once}


def config_to_yaml(config: Any | dict[str, Any]) -> str:
    """The text of a `--config` file that gives this configuration again."""
    values = config if isinstance(config, dict) else config_to_dict(config)
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=115)


def save_config(config: Any, path: str | os.PathLike) -> None:
    """Write `config` as YAML, such that `--config path` reads the same values of all that lasts."""
    write_whole(path, f"# {type(config).__name__}\n{config_to_yaml(lasting_settings(config))}")


def check_fields(config: Any) -> None:
    """ValueError at the first value that is not of its annotated type or not in its range."""
    hints = get_type_hints(type(config))
    for name, field in settings(type(config)).items():
        value = getattr(config, field.name)
        value = tuple(value) if isinstance(value, list) else value
        # For example the text "1e-4" where a number belongs.
        if coerce(value, hints[field.name], name) != value:
            raise ValueError(f"{name}: got {value!r}; allowed: {allowed(hints[field.name])}")
        _check_bounds(name, field.metadata.get("bounds", {}), value)


def bounds_in_words(bounds: dict[str, float]) -> str:
    """The range of an option: "at least 0 and below 1"."""
    return " and ".join(
        f"{word} {bound if isinstance(bound, int) else f'{bound:g}'}" for word, bound in bounds.items()
    )


def did_you_mean(name: str, known: Sequence[str] | dict[str, str]) -> str:
    """The end of a sentence about an unknown name.

    known: the names, or how each is written by its name.
    """
    close = difflib.get_close_matches(name.replace("-", "_"), known, n=1, cutoff=0.6)
    if not close:
        return "; --help lists all of them"
    return f"; did you mean {known[close[0]] if isinstance(known, dict) else close[0]}?"


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, Path) else value


def _check_bounds(name: str, bounds: dict[str, float], value: Any) -> None:
    for number in value if isinstance(value, tuple) else () if value is None else (value,):
        if not all(HOLDS[word](number, bound) for word, bound in bounds.items()):
            raise ValueError(f"{name}: got {value!r}; allowed: {bounds_in_words(bounds)}")


class _Dumper(yaml.SafeDumper):
    """Settings one a line, lists within the line."""


_Dumper.add_representer(
    list, lambda dumper, values: dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=True)
)
