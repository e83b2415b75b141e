"""Which settings a checkpoint is tied to, and which may change when a run goes on from it."""

import dataclasses
from collections.abc import Collection
from typing import Any

from hf_diffusion.config.options import config_to_dict


TIED = ("method", "network", "generator", "discriminator")  # groups that say what the weights are and what they learn
CHANGEABLE = (
    "optimization",
    "averaging",
)  # groups whose change is sound, but makes it another run than the uninterrupted one
# The batch and the length, which a checkpoint keeps as the global batch and the total of steps.
KEPT_AS_TOTALS = ("train_batch_size", "gradient_accumulation_steps", "max_train_steps", "num_epochs")


def tied_settings(config: Any) -> dict[str, Any]:
    """The settings that must agree with the checkpoint's."""
    return _settings(config, TIED, tied=True)


def changeable_settings(config: Any) -> dict[str, Any]:
    """The settings whose change is worth a remark."""
    settings = _settings(config, CHANGEABLE, tied=True) | _settings(config, TIED, tied=False)
    return {name: value for name, value in settings.items() if name not in KEPT_AS_TOTALS}


def _settings(config: Any, groups: Collection[str], tied: bool) -> dict[str, Any]:
    values, found, group = config_to_dict(config), {}, None
    for field in dataclasses.fields(config):
        group = field.metadata.get("group") or group  # a group lasts to the next
        if group in groups and field.metadata.get("tied", True) == tied:
            found[field.name] = values[field.name]
    return found


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """In words, what differs among the settings that both know: a checkpoint of an earlier version knows fewer."""
    return [
        f"{name} was {before[name]!r} and is {value!r}"
        for name, value in now.items()
        if name in before and before[name] != value
    ]
