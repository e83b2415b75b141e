"""What a run would do, before it costs anything: settings, sizes, memory, time, and the images as the network will see them."""

import math
import time
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from hf_diffusion.config.training import config_to_yaml
from hf_diffusion.data.decoding import from_network_range
from hf_diffusion.figures import labelled_grid
from hf_diffusion.randomness import Draw
from hf_diffusion.training_run import TrainingRun


TIMED_STEPS = 3


def dry_run(trainer: TrainingRun) -> None:
    """Print the resolved settings and measured costs of one micro step, and write `data_preview.png` to the output folder."""
    accelerator, config = trainer.accelerator, trainer.config
    seconds, activations = _measure(trainer)
    if not accelerator.is_main_process:
        return
    print(config_to_yaml(config))
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    _data_grid(trainer).save(folder / "data_preview.png")
    trained = sum(p.numel() for network in trainer.networks for p in network.parameters())
    # weights, gradients, two moments of AdamW; average
    state = 4 * (4 * trained + (trainer.parameters if trainer.ema is not None else 0))
    facts = {
        "data": f"{trainer.images or 'a stream of'} images, {trainer.data.channels} x {trainer.data.size[0]} x {trainer.data.size[1]}, "
        f"{trainer.data.num_classes or 'no'} classes",
        "parameters": f"{trainer.parameters:,}",
        "steps": f"{trainer.total_steps} of {trainer.global_batch} images{_passes(trainer)}",
        "memory a process": f"{_size(state)} for weights, gradients, AdamW and average + {_size(activations)} activations",
        "time": f"{seconds * trainer.total_steps / 60:.1f} minutes at {seconds:.3f} s a step ({TIMED_STEPS} steps measured "
        f"on this {accelerator.device.type}; sampling and checkpoints not counted)",
        "data as the network sees them": folder / "data_preview.png",
    }
    width = max(map(len, facts))
    print("\n".join(f"{name:<{width}}  {value}" for name, value in facts.items()))


def _measure(trainer: TrainingRun) -> tuple[float, int]:
    """Seconds of an optimizer step and bytes that autograd keeps for one micro step; no weight is changed."""
    config, device = trainer.config, trainer.accelerator.device
    batch = {name: value.to(device) for name, value in next(trainer.batches()).items()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def micro_step() -> None:
        draw = Draw(config.seed, 0, slice(0, config.train_batch_size), config.train_batch_size, device)
        trainer.rehearse(batch, draw)

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        micro_step()
    began = time.perf_counter()
    for _ in range(TIMED_STEPS):
        micro_step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / TIMED_STEPS
    parameters = {p.untyped_storage().data_ptr() for network in trainer.networks for p in network.parameters()}
    return seconds * config.gradient_accumulation_steps, sum(
        b for pointer, b in kept.items() if pointer not in parameters
    )


def _data_grid(trainer: TrainingRun) -> Image.Image:
    """The first images of the run, at most 64."""
    stream, images = trainer.batches(), []
    while sum(map(len, images)) < 64 and len(images) < trainer.total_steps:
        images.append(from_network_range(next(stream)["pixels"]))
    pixels = torch.cat(images)[:64].permute(0, 2, 3, 1).numpy()  # (N, H, W, C)
    return labelled_grid(pixels, columns=math.ceil(len(pixels) ** 0.5))


def _passes(trainer: TrainingRun) -> str:
    seen = trainer.total_steps * trainer.global_batch
    return f", {seen / trainer.images:.1f} passes over the data" if trainer.images else ""


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.1f} {unit}"
        count /= 1024
