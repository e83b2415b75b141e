"""Which settings a checkpoint is tied to, and which may change when a run goes on from it."""

import dataclasses
from typing import Any

from hf_diffusion.config.options import config_to_dict


# groups whose change is sound, but makes it another run than the uninterrupted one
CHANGEABLE = ("optimization", "averaging")
# The batch and the length, which a checkpoint keeps as the global batch and the total of steps.
KEPT_AS_TOTALS = ("train_batch_size", "gradient_accumulation_steps", "max_train_steps", "num_epochs")


def tied_settings(config: Any) -> dict[str, Any]:
    """The settings that must agree with the checkpoint's: all that a script adds, unless one says
    otherwise.
    """
    values = config_to_dict(config)
    return {field.name: values[field.name] for field in dataclasses.fields(config) if _is_tied(config, field)}


def changeable_settings(config: Any) -> dict[str, Any]:
    """The settings whose change is worth a remark."""
    values, found, group = config_to_dict(config), {}, None
    for field in dataclasses.fields(config):
        # a group lasts to the next
        group = field.metadata.get("group") or group
        noted = group in CHANGEABLE or (_of_the_family(config, field) and field.metadata.get("tied") is False)
        if noted and not _is_tied(config, field) and field.name not in KEPT_AS_TOTALS:
            found[field.name] = values[field.name]
    return found


def _is_tied(config: Any, field: dataclasses.Field) -> bool:
    tied = field.metadata.get("tied", True)
    return tied == "state" or (tied is True and _of_the_family(config, field))


def _of_the_family(config: Any, field: dataclasses.Field) -> bool:
    """Whether the class that brought the setting leaves its settings tied.

    A later default changes nothing.
    """
    first = next(cls for cls in reversed(type(config).__mro__) if field.name in vars(cls).get("__annotations__", {}))
    return vars(first).get("settings_are_tied", True)


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """In words, what differs among the settings that both know: a checkpoint of an earlier version
    knows fewer.
    """
    return [
        f"{name} was {before[name]!r} and is {value!r}"
        for name, value in now.items()
        if name in before and before[name] != value
    ]
