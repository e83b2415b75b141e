"""A dataclass as configuration: defaults, then YAML files, then the command line, every value checked against its annotation.

Any dataclass whose fields are made with `option` can be parsed; `coercion` tells which annotations are understood.
"""

import argparse
import dataclasses
import difflib
import os
import sys
import textwrap
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from hf_diffusion.config.coercion import allowed, coerce


Config = TypeVar("Config")


def option(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    group: str | None = None,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    tied: bool = True,
) -> Any:
    """One field of a configuration with its help text and its range.

    `group` opens a section of --help that lasts to the next; `tied` False lets a resumed run change a setting of the method (see `resuming`).
    """
    bounds = {"above": above, "at least": at_least, "below": below, "at most": at_most}
    bounds = {word: bound for word, bound in bounds.items() if bound is not None}
    return dataclasses.field(default=default, metadata={"help": help, "group": group, "bounds": bounds, "tied": tied})


def parse_config(cls: type[Config], argv: Sequence[str] | None = None, *, prog: str | None = None) -> Config:
    """The configuration that `--config` files (later ones win) and, above them, the flags in `argv` describe.

    Calls `validate()` of the class where there is one. A mistake ends the process with status 2 and one sentence on stderr.
    """
    parser = _parser(cls, prog)
    given, extra = parser.parse_known_args(argv)
    given = vars(given)
    files = given.pop("config", [])
    try:
        if extra:
            raise ValueError(_unexpected_argument(extra[0], cls))
        values: dict[str, Any] = {}
        for file in files:
            values |= read_config(cls, file)
        values |= _typed(cls, given, place="--{}")
        missing = [
            field.name
            for field in dataclasses.fields(cls)
            if field.default is dataclasses.MISSING and field.name not in values
        ]
        if missing:
            raise ValueError(f"--{missing[0]} is required; give it on the command line or in a --config file")
        config = cls(**values)
        if hasattr(config, "validate"):
            config.validate()
    except ValueError as error:
        parser.error(str(error))
    return config


def read_config(cls: type, path: str | os.PathLike) -> dict[str, Any]:
    """The values that a YAML file gives to fields of `cls`, each of its annotated type; ValueError names the file and the key."""
    try:
        # BaseLoader leaves every scalar as text: YAML 1.1 would read 1e-4 as a string, `no` as False and 010 as 8.
        values = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except OSError as error:
        raise ValueError(f"cannot read the configuration file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"the configuration file {path} is not text in UTF-8") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "unknown place"
        raise ValueError(f"{path} is not valid YAML ({where}): {getattr(error, 'problem', None) or error}") from error
    if values is None or values == "":  # an empty file, or one of comments only, changes nothing
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold `key: value` lines, got a {type(values).__name__}")
    return _typed(cls, values, place=f"{path}: {{}}")


def config_to_dict(config: Any) -> dict[str, Any]:
    """The fields as plain numbers, texts, None and lists, as YAML, JSON and experiment trackers take them."""
    return {
        field.name: list(value) if isinstance(value := getattr(config, field.name), tuple) else value
        for field in dataclasses.fields(config)
    }


def config_to_yaml(config: Any | dict[str, Any]) -> str:
    """The text of a `--config` file that gives this configuration again."""
    values = config if isinstance(config, dict) else config_to_dict(config)
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=115)


def save_config(config: Any, path: str | os.PathLike) -> None:
    """Write `config` as YAML by an atomic rename, such that `--config path` reads exactly the same values."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    half_written = path.with_name(f".{path.name}.{os.getpid()}")
    half_written.write_text(f"# {type(config).__name__}, all fields\n{config_to_yaml(config)}", encoding="utf-8")
    os.replace(half_written, path)


def check_fields(config: Any) -> None:
    """ValueError at the first field whose value is not of its annotated type or not in its range."""
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        value = tuple(value) if isinstance(value, list) else value
        if coerce(value, hints[field.name], field.name) != value:  # e.g. the text "1e-4" where a number belongs
            raise ValueError(f"{field.name}: got {value!r}; allowed: {allowed(hints[field.name])}")
        _check_bounds(field, value)


def _typed(cls: type, values: dict[str, Any], place: str) -> dict[str, Any]:
    """The values by annotation; `place` is a format for how a message names a key."""
    hints = get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    for key in values:
        if key not in names:
            raise ValueError(f"{place.format(key)}: there is no such setting{_did_you_mean(str(key), names)}")
    return {key: coerce(value, hints[key], place.format(key)) for key, value in values.items()}


def _check_bounds(field: dataclasses.Field, value: Any) -> None:
    holds = {
        "above": lambda number, bound: number > bound,
        "at least": lambda number, bound: number >= bound,
        "below": lambda number, bound: number < bound,
        "at most": lambda number, bound: number <= bound,
    }
    for number in value if isinstance(value, tuple) else () if value is None else (value,):
        bounds = field.metadata.get("bounds", {})
        if not all(holds[word](number, bound) for word, bound in bounds.items()):
            raise ValueError(f"{field.name}: got {value!r}; allowed: {_in_words(bounds)}")


def _in_words(bounds: dict[str, float]) -> str:
    return " and ".join(f"{word} {bound:g}" for word, bound in bounds.items())


def _did_you_mean(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name.replace("-", "_"), names, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else "; --help lists all of them"


def _unexpected_argument(argument: str, cls: type) -> str:
    if not argument.startswith("--"):
        return f"unexpected argument {argument!r}; every value follows its --flag, a list is one value a,b,c, a switch takes none"
    hints = get_type_hints(cls)
    flags = {name: f"--{name}" for name in ["config", *hints]}
    flags |= {f"no_{name}": f"--no-{name}" for name, hint in hints.items() if hint is bool}
    close = difflib.get_close_matches(argument[2:].split("=")[0].replace("-", "_"), flags, n=1, cutoff=0.6)
    return f"unknown flag {argument.split('=')[0]}" + (
        f"; did you mean {flags[close[0]]}?" if close else "; --help lists all of them"
    )


class _Dumper(yaml.SafeDumper):
    """Settings one a line, lists within the line."""


_Dumper.add_representer(
    list, lambda dumper, values: dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=True)
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """End with status 2 and the one sentence; a usage text of fifty flags would bury it."""
        self.exit(2, f"{self.prog}: {message}\n")


def _parser(cls: type, prog: str | None) -> argparse.ArgumentParser:
    documented = cls.__doc__ and not cls.__doc__.startswith(
        f"{cls.__name__}("
    )  # dataclass() writes the signature there
    parser = _Parser(
        prog=prog or Path(sys.argv[0]).name,
        description=textwrap.dedent(cls.__doc__).strip() if documented else None,
        allow_abbrev=False,  # an abbreviation that is unique today is ambiguous after the next release
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=38, width=115),
    )
    parser.add_argument(
        "--config", action="append", metavar="FILE", help="YAML file of settings; may be repeated, later ones win"
    )
    group, groups, hints = parser, {}, get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.metadata.get("group"):
            title = field.metadata["group"]  # a subclass may go on with a group of its base
            group = groups[title] = groups.get(title) or parser.add_argument_group(title)
        words = [_in_words(field.metadata["bounds"])] if field.metadata.get("bounds") else []
        words += ["required" if field.default is dataclasses.MISSING else f"default: {_shown(field.default)}"]
        help = f"{field.metadata.get('help', '')} ({'; '.join(words)})".replace("%", "%%")
        if hints[field.name] is bool:
            group.add_argument(f"--{field.name}", action=argparse.BooleanOptionalAction, help=help)
        else:
            group.add_argument(f"--{field.name}", metavar=_metavar(hints[field.name]), help=help)
    return parser


def _shown(value: Any) -> str:
    return (
        (",".join(map(str, value)) or "none")
        if isinstance(value, tuple)
        else str(value).lower()
        if value is None
        else str(value)
    )


def _metavar(annotation: Any) -> str:
    """The choices of a Literal, else a short word for the kind of value."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "{" + ",".join(map(str, arguments)) + "}"
    if origin in (Union, types.UnionType):
        return "|".join(_metavar(part) for part in arguments if part is not types.NoneType)
    if origin is tuple:
        shown = _metavar(arguments[0])
        return f"{shown},..." if arguments[-1] is Ellipsis else ",".join(map(_metavar, arguments))
    return {str: "TEXT", int: "INT", float: "FLOAT"}.get(annotation, "VALUE")
