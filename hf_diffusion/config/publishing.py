"""What others may see of settings and command lines: no path of this machine, no name of its
user."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from hf_diffusion.config.options import RECIPES, config_to_yaml, find_config, settings


# The variable that holds the words before a script's flags, where `hf-diffusion train` started it.
STARTED_AS = "HF_DIFFUSION_STARTED_AS"


def published(value: Any) -> Any:
    """Settings, or anything made of dicts, lists and texts, with every path that leads out of the
    working folder cut.

    A path in the working folder becomes relative to it; of any other the last part stays.
    """
    if isinstance(value, dict):
        return {key: published(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [published(part) for part in value]
    if not isinstance(value, str) or not value.startswith(("~", "..", os.sep)) and not Path(value).is_absolute():
        return value
    path = Path(os.path.abspath(os.path.expanduser(value)))
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else path.name


def published_yaml(text: str) -> str:
    """The text of a file of settings, as others may see it; its comments on the first line stay."""
    comment = "".join(line for line in text.splitlines(keepends=True)[:1] if line.startswith("#"))
    return comment + config_to_yaml(published(yaml.safe_load(text) or {}))


def published_command(config_class: type, command: Sequence[str]) -> list[str]:
    """The words of a script and its flags with which others start the same run.

    What belongs to one start is left out. Files of settings that do not come with the package are
    replaced by the `config.yaml` that comes with the model, which holds all flags, too.
    """
    script, *words = command
    # What minutes came to on this machine is in that file alone.
    if any(word.partition("=")[0] == "--max_train_minutes" for word in words):
        return [script, "--config", "config.yaml"]
    once = _flags_of_one_start(config_class)
    kept, values = [], iter(words)
    for word in values:
        flag, equals, value = word.partition("=")
        if flag in once:
            if once[flag] and not equals:
                next(values, None)
        elif flag == "--config":
            file = find_config(value if equals else next(values))
            if RECIPES not in file.resolve().parents:
                return [script, "--config", "config.yaml"]
            kept += ["--config", f"training/recipes/{file.name}"]
        else:
            kept.append(f"{flag}={published(value)}" if equals else published(word))
    return [script, *kept]


def _flags_of_one_start(config_class: type) -> dict[str, bool]:
    """The flags of settings that belong to one start, and whether a value follows."""
    hints, found = get_type_hints(config_class), {}
    for name, field in settings(config_class).items():
        if field.metadata.get("once"):
            takes_value = hints[field.name] is not bool
            found |= {f"--{name}": takes_value} | ({} if takes_value else {f"--no-{name}": False})
    return found
