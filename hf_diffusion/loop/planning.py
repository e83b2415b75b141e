"""What a run chooses itself: settings by `--preset auto`, and a length by `--max_train_minutes`.

What was chosen stands in config.yaml, and a run that goes on takes it from there.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from hf_diffusion.config.options import read_config
from hf_diffusion.config.preset import LEAST_SEEN, MINUTES, Circumstances
from hf_diffusion.config.run_options import LENGTHS, TrainingConfig
from hf_diffusion.data.protocol import PREVIEWED, TrainingData
from hf_diffusion.environment import cpu_cores, cpu_multiplies_bf16
from hf_diffusion.loop.deadline import DECAY_SHARE
from hf_diffusion.loop.learning_rate import LONGEST_WARMUP, WARMUP_SHARE
from hf_diffusion.loop.output_folder import CONFIG
from hf_diffusion.loop.rehearsal import in_bytes, in_time, measure, state_bytes
from hf_diffusion.loop.trainer import Trainer


# Grids of samples in the middle of a run, and the share of its time that they may take.
GRIDS, GRIDS_SHARE = 4, 0.1
# Of the network for a sample, where a family takes all of its steps.
MOST_CALLS = 1000
# Within two of 255 levels.
AT_AN_END = 0.984
# A step without its backward pass.
FORWARD_SHARE = 1 / 3
# Checkpoints of a planned run, and reports.
CHECKPOINTS, REPORTS = 5, 60


def is_open(config: TrainingConfig) -> bool:
    """Whether the run chooses something itself."""
    return config.preset == "auto" or config.max_train_minutes is not None


def take_former(config: TrainingConfig) -> bool:
    """Take what the run that is gone on with has chosen; False where there is none.

    Settings that are given now stand above it. Paths are never chosen, and the file may come from
    another machine.
    """
    file = Path(config.output_dir) / CONFIG
    if config.resume_from_checkpoint is None or not file.is_file():
        return False
    paths = {field.name for field in fields(config) if field.metadata.get("is_path")}
    is_length = {name for name in LENGTHS if getattr(config, name) is not None and name != "max_train_minutes"}
    for name, value in read_config(type(config), file).items():
        if name not in config.given | paths and not (is_length and name in LENGTHS):
            setattr(config, name, value)
    return True


def choose(config: TrainingConfig, accelerator: Accelerator, data: TrainingData) -> None:
    """Settings by the images and the machine, and a line for each choice."""
    found = circumstances(accelerator, data)
    accelerator.print(f"preset auto, by {_in_words(found, data)}:")
    known = {field.name for field in fields(config)} - own_defaults(type(config))
    for topic, choice in config.auto_settings(found).items():
        chosen = {name: value for name, value in choice.settings.items() if name in known}
        taken = {name: value for name, value in chosen.items() if name not in config.given}
        for name, value in taken.items():
            setattr(config, name, value)
        shown = [f"{name} {_short(value)}" for name, value in taken.items()]
        shown += [f"{name} {_short(getattr(config, name))} as given" for name in chosen if name not in taken]
        accelerator.print(f"  {topic}: {', '.join(shown)} ({choice.reason})")
    if all(getattr(config, name) is None for name in LENGTHS):
        config.max_train_minutes = MINUTES
        accelerator.print(f"  length: {MINUTES:g} minutes (none was given; --max_train_minutes or --max_train_steps)")


def own_defaults(cls: type) -> set[str]:
    """The settings to which a family gives another default than their group: it knows better."""
    own = set()
    for field in fields(cls):
        first = next(base for base in reversed(cls.__mro__) if field.name in getattr(base, "__dataclass_fields__", {}))
        if first.__dataclass_fields__[field.name].default != field.default:
            own.add(field.name)
    return own


def circumstances(accelerator: Accelerator, data: TrainingData) -> Circumstances:
    """What settings are chosen by, the same on every process."""
    counts = data.class_counts
    on_cpu = accelerator.device.type == "cpu"
    bf16 = cpu_multiplies_bf16() if on_cpu else _gpu_multiplies_bf16(accelerator)
    return Circumstances(
        sample_shape=tuple(data.sample_shape),
        samples=data.num_samples,
        classes=data.num_classes or 0,
        of_a_class=min((count for count in counts.values() if count), default=0) if counts else None,
        device=accelerator.device.type,
        cores=min(cpu_cores(), torch.get_num_threads()),
        bf16=bf16,
        ground=_ground(data),
        processes=accelerator.num_processes,
    )


def fit_length(config: TrainingConfig, accelerator: Accelerator, build: Callable[[TrainingConfig], Trainer]) -> None:
    """Steps for the minutes, by what a few of them cost now; the loop plans anew by what they take.

    Also how often to draw, save and report, where that is not given. `build(config)` makes the
    trainer of a configuration, of which some steps are measured.
    """
    trainer, pace, activations = _rehearsed(config, build)
    steps = trainer.total_steps
    if config.max_train_minutes is not None:
        budget = 60 * config.max_train_minutes
        shape = trainer.data.sample_shape
        while budget / pace * trainer.global_batch < LEAST_SEEN and config.preset == "auto":
            if (less := config.reduce(shape)) is None:
                break
            accelerator.print(f"  network: {less}, since the time is short for this machine")
            trainer, pace, activations = _rehearsed(config, build)
        config.max_train_steps = steps = max(1, round(budget / pace))
    for name, value in _intervals(config, trainer, steps, pace):
        if name not in config.given:
            setattr(config, name, value)
    images = trainer.data.num_samples
    passes = f", {steps * trainer.global_batch / images:.1f} passes over the data" if images else ""
    memory = f"{in_bytes(state_bytes(trainer))} + {in_bytes(activations)} of activations"
    accelerator.print(
        f"expected: {in_time(steps * pace)} of training at {pace:.3f} s a step, about {steps:,} steps{passes}; "
        f"{trainer.shared.parameters:,} weights, memory {memory}"
    )
    accelerator.free_memory()


def _rehearsed(config: TrainingConfig, build: Callable[[TrainingConfig], Trainer]) -> tuple[Trainer, float, int]:
    """A trainer that will not train, seconds of its steps by the first process, and bytes of
    activations."""
    trial = copy.copy(config)
    # Neither a folder nor the real samples are touched.
    trial.dry_run = True
    if config.max_train_minutes is not None:
        trial.max_train_minutes, trial.max_train_steps = None, LONGEST_WARMUP
    trainer = build(trial)
    seconds, activations = measure(trainer)
    return trainer, broadcast_object_list([seconds])[0], activations


def _intervals(config: TrainingConfig, trainer: Trainer, steps: int, pace: float) -> Iterator[tuple[str, Any]]:
    """Settings that go by the length of the run."""
    if config.max_train_minutes is not None:
        yield "lr_warmup_steps", min(round(WARMUP_SHARE * steps), LONGEST_WARMUP)
        if config.lr_scheduler == "trapezoid":
            yield "lr_decay_steps", max(1, round(DECAY_SHARE * steps))
    if config.preset != "auto":
        return
    calls = config.sampling_options().get("num_inference_steps") or MOST_CALLS
    calls *= 2 if getattr(config, "guidance_scale", 1) != 1 else 1
    # With the averaged and with the last weights.
    grid = 2 * config.num_sample_images * calls * FORWARD_SHARE * pace / config.train_batch_size
    grids = min(GRIDS, int(GRIDS_SHARE * steps * pace / grid))
    yield "sample_steps", max(1, steps // (grids + 1)) if grids else None
    yield "eval_steps", max(1, steps // (GRIDS + 1))
    yield "checkpointing_steps", max(1, steps // CHECKPOINTS)
    yield "logging_steps", min(50, max(1, steps // REPORTS))


def _gpu_multiplies_bf16(accelerator: Accelerator) -> bool:
    return accelerator.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def _ground(data: TrainingData) -> float:
    """The share of the values of some samples that lie at an end of [-1, 1]."""
    return float((next(iter(data.once(PREVIEWED, PREVIEWED)))["x_0"].abs() > AT_AN_END).float().mean())


def _in_words(found: Circumstances, data: TrainingData) -> str:
    count = "a stream of" if found.samples is None else f"{found.samples:,}"
    shape = "x".join(map(str, found.sample_shape))
    machine = f"{found.cores} CPU cores" if found.on_cpu else f"{found.processes} {found.device} device(s)"
    return f"{count} {data.kind} of {shape} in {found.classes or 'no'} classes, on {machine}"


def _short(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
