"""What a checkpoint of a run tells without the run: whether it is whole, and its network.

`loop.checkpoints` and `loop.states` write them.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hf_diffusion.files import sha256


MANIFEST = "manifest.json"
# The name of the averaged weights among the states.
AVERAGE = "average"
# Stands in the JSON where a tensor was.
TENSOR = "tensor"


class BadCheckpoint(ValueError):
    """A checkpoint that is incomplete, damaged, or of another run."""


def read_manifest(folder: Path) -> dict:
    """The manifest of a checkpoint after comparing every file with it.

    BadCheckpoint says what is missing or damaged.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = dict(manifest["files"])
        int(manifest["step"])
    except (OSError, ValueError, KeyError, TypeError):
        raise BadCheckpoint(
            f"{folder} is no whole checkpoint of this package: its {MANIFEST} is missing or damaged"
        ) from None
    for name, checksum in files.items():
        path = folder / name
        if not path.is_file() or sha256(path) != checksum:
            raise BadCheckpoint(
                f"{folder} is damaged: {name} is {'different from what was saved' if path.is_file() else 'missing'}"
            )
    return manifest


def read_state(folder: Path, name: str) -> dict[str, Any]:
    """What `write_state` has written."""
    tensors = load_file(folder / f"{name}.safetensors")
    return _with_tensors(json.loads((folder / f"{name}.json").read_text()), tensors)


def read_network(folder: Path, class_of: Callable[[str], type[nn.Module]]) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a checkpoint with its averaged weights, and the manifest.

    `class_of(name)` is the class of a network, by the name that the manifest has. BadCheckpoint for
    one that is not whole, or that an earlier version has written.
    """
    manifest = read_manifest(folder)
    described = manifest.get("network")
    if described is None:
        raise BadCheckpoint(
            f"{folder} is a checkpoint of an earlier version, which does not describe its network; give the pipeline "
            "that the run has saved"
        )
    network = class_of(described["class"]).from_config(described["config"])
    network.load_state_dict(load_file(folder / "model.safetensors"))
    if (folder / f"{AVERAGE}.json").is_file():
        averages = read_state(folder, AVERAGE)["shadow_params"]
        with torch.no_grad():
            for parameter, average in zip(network.parameters(), averages, strict=True):
                parameter.copy_(average)
    return network, manifest


def _with_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if set(value) == {TENSOR}:
            return tensors[value[TENSOR]]
        return {key: _with_tensors(part, tensors) for key, part in value.items()}
    if isinstance(value, list):
        return [_with_tensors(part, tensors) for part in value]
    return value
