"""What a run would do, before it costs anything: settings, sizes, memory, time, and the data as
networks see them."""

import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from hf_diffusion.config.options import config_to_yaml, lasting_settings
from hf_diffusion.files import write_whole
from hf_diffusion.loop.output_folder import PREVIEW
from hf_diffusion.loop.trainer import Trainer


TIMED_STEPS = 3


# Above so many seconds a step on a CPU, the dry run looks for something faster.
SLOW = 1.0


def dry_run(trainer: Trainer, build_faster: Callable[[], Trainer] | None = None) -> None:
    """Print the resolved settings and measured costs of one micro step; write `data_preview.png`
    to the output folder.

    `build_faster` makes the trainer of the same run with preset fast, which is measured where the
    run is slow on a CPU.
    """
    config, data, device = trainer.config, trainer.data, trainer.accelerator.device
    trainer.accelerator.print(config_to_yaml(lasting_settings(config)))
    trainer.accelerator.print(f"measuring {1 + TIMED_STEPS} steps, of which no weight changes", flush=True)
    seconds, activations = _measure(trainer)
    if not trainer.accelerator.is_main_process:
        return
    preview = Path(config.output_dir) / PREVIEW
    picture = data.preview()
    write_whole(preview, lambda file: picture.save(file, format="PNG"))
    trained = sum(p.numel() for player in trainer.objective.players for p in player.network.parameters())
    # weights, gradients, two moments of AdamW; average
    state = 4 * (4 * trained + (trainer.shared.parameters if trainer.shared.average is not None else 0))
    facts = {
        **data.summary(),
        "parameters": f"{trainer.shared.parameters:,}",
        "steps": f"{trainer.total_steps} of {trainer.global_batch} {data.kind}{_passes(trainer)}",
        "memory a process": f"{_size(state)} for weights, gradients, AdamW and average + "
        f"{_size(activations)} activations",
        "time": f"{_duration(seconds * trainer.total_steps)} at {seconds:.3f} s a step ({TIMED_STEPS} steps measured "
        f"on this {device.type}; sampling and checkpoints not counted)",
        "data as the network sees them": preview,
    }
    if device.type == "cpu" and seconds > SLOW and config.preset is None and build_faster is not None:
        fast, _ = _measure(build_faster())
        facts["a better choice"] = (
            f"--preset fast takes {fast:.3f} s a step here, {_duration(fast * trainer.total_steps)} for as many steps"
        )
    width = max(map(len, facts))
    print("\n".join(f"{name:<{width}}  {value}" for name, value in facts.items()))


def _measure(trainer: Trainer) -> tuple[float, int]:
    """Seconds of an optimizer step and bytes that autograd keeps for one micro step; no weight is
    changed."""
    device, batch = trainer.accelerator.device, trainer.to_device(next(trainer.batches()))
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


def _passes(trainer: Trainer) -> str:
    images, seen = trainer.data.num_samples, trainer.total_steps * trainer.global_batch
    return f", {seen / images:.1f} passes over the data" if images else ""


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds / 60:.1f} minutes"


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.1f} {unit}"
        count /= 1024
