"""States beside the network and its optimizer, as files that cannot run code: tensors in
safetensors, the rest in JSON."""

import json
import pickle
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from hf_diffusion.hub.checkpoint_files import TENSOR, read_state


# What versions before 0.3 wrote by accelerate, which would unpickle it without a look.
PICKLED = re.compile(r"custom_checkpoint_(\d+)\.pkl")


class Stateful(Protocol):
    """Anything whose state joins the checkpoints."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, texts and None, in lists and dicts."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up such a state."""


def write_state(folder: Path, name: str, state: dict[str, Any]) -> None:
    """Write `name.safetensors` and `name.json`."""
    tensors: dict[str, Tensor] = {}
    plain = _without_tensors(state, "", tensors)
    save_file(tensors, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps(plain, indent=1))


def read_states(folder: Path, states: Mapping[str, Stateful]) -> None:
    """Give every one of `states` what a checkpoint holds of it, by name, or by its place in older
    checkpoints."""
    pickled = pickled_states(folder)
    for place, (name, stateful) in enumerate(states.items()):
        if pickled:
            stateful.load_state_dict(_read_pickled(pickled[place]))
        else:
            stateful.load_state_dict(read_state(folder, name))


def _read_pickled(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path.name} of {path.parent} holds more than tensors and numbers, which could run code; it is not read"
        ) from error


def pickled_states(folder: Path) -> list[Path]:
    """The states in the form of versions before 0.3, by their places."""
    found = [path for path in folder.iterdir() if PICKLED.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(PICKLED.fullmatch(path.name)[1]))


def load_the_rest(accelerator: Any, folder: Path) -> None:
    """Let accelerate load what it has saved, without the states that it would unpickle."""
    pickled = pickled_states(folder)
    if not pickled:
        accelerator.load_state(str(folder))
        return
    with tempfile.TemporaryDirectory() as scratch:
        for path in folder.iterdir():
            if path not in pickled:
                (Path(scratch) / path.name).symlink_to(path.resolve())
        accelerator.load_state(scratch)


def _without_tensors(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        # of its own: safetensors refuses memory that two tensors share
        tensors[place] = value.detach().cpu().clone().contiguous()
        return {TENSOR: place}
    if isinstance(value, dict):
        return {key: _without_tensors(part, f"{place}.{key}".strip("."), tensors) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_tensors(part, f"{place}.{i}", tensors) for i, part in enumerate(value)]
    return value
