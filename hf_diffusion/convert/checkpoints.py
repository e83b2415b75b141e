"""Checkpoint files of other code bases, read without running code from them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def read_checkpoint(path: Path, allowed: Sequence[type] = ()) -> dict[str, Any]:
    """What a .pt, .pth or .safetensors file holds by name: tensors and plain values.

    `allowed` are further classes that its pickle may name. Raises ValueError for what cannot be
    read so, and for what is no dictionary.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}; give a .pt, .pth or .safetensors file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(list(allowed)):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # what is no checkpoint raises nearly anything
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"{path} cannot be read as tensors alone, without running code from it: {reason[0]}; give a checkpoint as "
            "its authors publish it"
        ) from error
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path} holds a {type(content).__name__}, not the tensors of a network by name")
    return content
