"""Networks in files that others wrote: opened without running their code, and hashed."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor


def torch_script(path: Path, device: torch.device) -> torch.jit.ScriptModule:
    """The TorchScript module in a file, in evaluation mode; ValueError for any other file."""
    try:
        return torch.jit.load(str(path), map_location=device).eval()
    except RuntimeError as error:
        raise ValueError(
            f"{path} is not TorchScript; save the network with torch.jit.script(net).save(...), since a pickled "
            "file could run code when it is opened"
        ) from error


def refuse_code(path: Path) -> None:
    """ValueError for a pickle with more than tensors: torch-fidelity would run what is in it."""
    try:
        torch.load(path, weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path} does not hold tensors alone, so it is not opened: give the weights as published"
        ) from error


def hash_tensors(tensors: dict[str, Tensor]) -> str:
    """sha256 of names, dtypes, shapes and bytes, the same on every device."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
