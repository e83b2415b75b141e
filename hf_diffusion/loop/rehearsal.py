"""What a run costs, measured on steps that change nothing."""

import time

import torch
from torch import Tensor

from hf_diffusion.loop.trainer import Trainer


TIMED_STEPS = 3


def measure(trainer: Trainer) -> tuple[float, int]:
    """Seconds of an optimizer step and bytes that autograd keeps for one micro step; no weight is
    changed."""
    device, batch = trainer.accelerator.device, trainer.in_layout(next(trainer.batches()))
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        trainer.updater.rehearse(batch, trainer.draw(0))
    began = time.perf_counter()
    for _ in range(TIMED_STEPS):
        trainer.updater.rehearse(batch, trainer.draw(0))
        if device.type == "cuda":
            torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / TIMED_STEPS
    networks = [player.network for player in trainer.objective.players]
    parameters = {p.untyped_storage().data_ptr() for network in networks for p in network.parameters()}
    activations = sum(size for pointer, size in kept.items() if pointer not in parameters)
    return seconds * trainer.config.gradient_accumulation_steps, activations


def state_bytes(trainer: Trainer) -> int:
    """Bytes of weights, gradients, the optimizer's means, and the averages."""
    groups = [group for player in trainer.objective.players for group in player.optimizer.param_groups]
    # Muon keeps one mean of a matrix, all else two of a number.
    trained = sum((3 if "momentum" in group else 4) * p.numel() for group in groups for p in group["params"])
    return 4 * (trained + len(trainer.shared.averages) * trainer.shared.parameters)


def in_time(seconds: float) -> str:
    """A duration in words: 3.2 minutes."""
    for unit, length in (("days", 86400), ("hours", 3600)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds / 60:.1f} minutes" if seconds >= 60 else f"{seconds:.1f} seconds"


def in_bytes(count: float) -> str:
    """A size in words: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.1f} {unit}"
        count /= 1024
