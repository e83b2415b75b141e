"""Drawing a teacher's trajectories: once for all processes, runs and resumptions, kept in a cache.

Shapes: N trajectories of samples (...), n calls of the student.
"""

import copy
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_diffusion.data.waiting import main_first
from hf_diffusion.files import cache_folder, remove_partials, write_whole
from hf_diffusion.loop.rehearsal import in_time
from hf_diffusion.losses.consistency_objective import digest
from hf_diffusion.losses.trajectory import finer, follow
from hf_diffusion.losses.trajectory_objective import Trajectories, TrajectoryOptions
from hf_diffusion.randomness import derive_seed
from hf_diffusion.schedulers.scheduling_consistency import ConsistencyScheduler


VERSION = 1
# Trajectories that are drawn together, by one generator.
PART = 128


def kept_trajectories(
    accelerator: Accelerator,
    teacher: nn.Module,
    scheduler: ConsistencyScheduler,
    options: TrajectoryOptions,
    seed: int,
    sample_shape: tuple[int, ...],
    is_trial: bool = False,
) -> Trajectories:
    """Those on disk, or else drawn now, in half precision, in the precision of the run.

    A trial draws a part of them, keeps none and says how long all will take.
    """
    # what the student aims at changes no state of the teacher
    ours = (item for item in scheduler.config.items() if not item[0].startswith("_") and item[0] != "predicts_end")
    process = sorted(ours)
    how = (options.trajectories, options.teacher_steps, options.teacher_guidance_scale, options.label_dropout)
    identity = json.dumps([VERSION, digest(teacher), repr(process), how, seed, accelerator.mixed_precision])
    file = cache_folder("trajectories") / f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}.safetensors"
    if is_trial and not file.is_file():
        return tried(accelerator, teacher, scheduler, options, seed, sample_shape)
    with main_first(accelerator):
        if not file.is_file():
            remove_partials(file.parent)
            drawn = draw(accelerator, teacher, scheduler, options, seed, sample_shape)
            write(file, {name: value for name, value in drawn._asdict().items() if value is not None})
    found = {name: value.to(accelerator.device) for name, value in load_file(file).items()}
    return Trajectories(found["states"], found.get("labels"))


def tried(
    accelerator: Accelerator,
    teacher: nn.Module,
    scheduler: ConsistencyScheduler,
    options: TrajectoryOptions,
    seed: int,
    sample_shape: tuple[int, ...],
) -> Trajectories:
    """Some trajectories, and a sentence about the time of all."""
    fewer = copy.copy(options)
    fewer.trajectories, began = min(PART, options.trajectories), time.perf_counter()
    drawn = draw(accelerator, teacher, scheduler, fewer, seed, sample_shape)
    seconds = (time.perf_counter() - began) * options.trajectories / fewer.trajectories
    accelerator.print(
        f"expected: {in_time(seconds)} for the teacher's {options.trajectories:,} trajectories, which are drawn first"
    )
    return Trajectories(*(None if value is None else value.to(accelerator.device) for value in drawn))


def write(file: Path, tensors: dict[str, Tensor]) -> None:
    """Write a file of tensors, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, lambda opened: save_file(tensors, opened.name))


@torch.no_grad()
def draw(
    accelerator: Accelerator,
    teacher: nn.Module,
    scheduler: ConsistencyScheduler,
    options: TrajectoryOptions,
    seed: int,
    sample_shape: tuple[int, ...],
) -> Trajectories:
    """Trajectories of the teacher from noises of `seed`, with the classes in turn."""
    sigmas, count, device = scheduler.config.sampling_sigmas, options.trajectories, accelerator.device
    parts = -(-options.teacher_steps // len(sigmas))
    levels, states, all_labels = finer(sigmas, parts), [], []
    teacher = teacher.to(device).eval()
    with tqdm(total=count, desc="trajectories of the teacher", unit="sample") as bar, accelerator.autocast():
        for start in range(0, count, PART):
            size = min(PART, count - start)
            generator = torch.Generator().manual_seed(derive_seed(seed, "trajectories", start))
            noise = torch.randn(size, *sample_shape, generator=generator).to(device)
            labels = labels_of(teacher, start, size, options.label_dropout, generator)
            denoise = denoiser(scheduler, teacher, labels, options.teacher_guidance_scale)
            found = follow(denoise, sigmas[0] * noise, levels, parts)
            if scheduler.config.clip_denoised:
                found[-1] = found[-1].clamp(-1, 1)
            states.append(torch.stack(found).cpu())
            all_labels.append(labels)
            bar.update(size)
    # autocast does not join halves
    return Trajectories(torch.cat(states, dim=1).half(), None if labels is None else torch.cat(all_labels).cpu())


def labels_of(teacher: nn.Module, start: int, size: int, dropout: float, generator: torch.Generator) -> Tensor | None:
    """Classes in turn (size,), of which a share is none where the teacher knows such samples."""
    classes, device = teacher.config.num_class_embeds, next(teacher.parameters()).device
    if classes is None:
        return None
    labels = torch.arange(start, start + size) % classes
    dropped = torch.rand(size, generator=generator) < dropout
    return (labels.where(~dropped, classes) if teacher.config.get("null_class") else labels).to(device)


def denoiser(
    scheduler: ConsistencyScheduler, teacher: nn.Module, labels: Tensor | None, scale: float
) -> Callable[[Tensor, float], Tensor]:
    """The teacher's estimate of x_0, with guidance where its scale is not 1."""

    def asked(x: Tensor, sigma: float, known: Tensor | None) -> Tensor:
        conditions = {} if known is None else {"class_labels": known}
        level = torch.full((len(x),), sigma, dtype=torch.float64, device=x.device)
        # without the shift of consistency models, which the teacher is not
        return scheduler.denoise(teacher, x, level, 0.0, **conditions)

    def guided(x: Tensor, sigma: float) -> Tensor:
        cond = asked(x, sigma, labels)
        if scale == 1:
            return cond
        uncond = asked(x, sigma, torch.full_like(labels, teacher.config.num_class_embeds))
        return uncond + scale * (cond - uncond)

    return guided
