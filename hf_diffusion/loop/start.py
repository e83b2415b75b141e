"""From a command line to a trainer that is ready: settings, processes, output folder, data,
measures.

What is wrong with a setting or the data ends the script here, in one sentence.
"""

import copy
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration

from hf_diffusion.config.closed_output import ending_with_its_reader, nobody_reads
from hf_diffusion.config.command_line import parse_config
from hf_diffusion.config.publishing import STARTED_AS
from hf_diffusion.config.run_options import TrainingConfig
from hf_diffusion.data.loading import load_data
from hf_diffusion.data.protocol import TrainingData
from hf_diffusion.data.waiting import LONGEST_WAIT, main_first
from hf_diffusion.loop.dry_run import dry_run
from hf_diffusion.loop.engines import check_engine, take_launch_settings
from hf_diffusion.loop.finish import train_and_share
from hf_diffusion.loop.output_folder import check_content, claimed, move_former_run
from hf_diffusion.loop.planning import choose, fit_length, is_open, take_former
from hf_diffusion.loop.sharing import prepare_sharing
from hf_diffusion.loop.trainer import Trainer


Build = Callable[[Any, Accelerator, TrainingData], Trainer]


def run(
    config_class: type[TrainingConfig],
    build: Build,
    argv: Sequence[str] | None = None,
    prog: str | None = None,
    load: Callable[..., TrainingData] = load_data,
) -> int:
    """A whole training script: settings from `argv`, data, then `build(config, accelerator, data)`
    trained and shared.

    `load(**config.data_arguments())` opens the data. Returns the exit status; a bad setting ends
    the process.
    """
    prog = os.environ.get(STARTED_AS) or prog or Path(sys.argv[0]).name
    with ending_with_its_reader():
        _run(config_class, build, argv, prog, load)
    return 0


def _run(
    config_class: type[TrainingConfig],
    build: Build,
    argv: Sequence[str] | None,
    prog: str,
    load: Callable[..., TrainingData],
) -> None:
    config = parse_config(config_class, argv, prog=prog)
    with ExitStack() as until_the_end, one_sentence_errors(prog, config.traceback):
        accelerator = start(config)
        if not config.dry_run:
            claim(config, accelerator, until_the_end)
        # one process downloads or prepares them, the others find them in the cache
        with main_first(accelerator):
            data = load(**config.data_arguments())
        accelerator = settle(config, accelerator, data, build)
        trainer = build(config, accelerator, data)
        if config.init_from is not None and not config.is_started:
            raise ValueError(f"init_from {config.init_from}: {prog} begins with new weights only; leave it out")
        if config.dry_run:
            dry_run(trainer, lambda: build(faster(config, data), accelerator, data))
            return
        # only now: all that can be checked is checked and built
        if accelerator.is_main_process and config.overwrites:
            move_former_run(trainer.output_dir)
        accelerator.wait_for_everyone()
        # what goes wrong from here on has sentences of its own
        held = until_the_end.pop_all()
    with held:
        train_and_share(trainer, command=[prog, *(sys.argv[1:] if argv is None else argv)])


def settle(config: TrainingConfig, accelerator: Accelerator, data: TrainingData, build: Build) -> Accelerator:
    """Give the settings their values that the run leaves open: by the run that it goes on with, by
    the data and the machine, by the time.

    Returns the accelerator, a new one where another precision was chosen.
    """
    goes_on = is_open(config) and take_former(config)
    if config.preset == "auto" and not goes_on:
        choose(config, accelerator, data)
    if config.mixed_precision != accelerator.mixed_precision:
        accelerator = start_anew(config)
    config.settle(data.sample_shape)
    if is_open(config) and not goes_on:
        fit_length(config, accelerator, lambda trial: build(trial, accelerator, data))
    return accelerator


def faster(config: TrainingConfig, data: TrainingData) -> TrainingConfig:
    """The same run with preset fast in all that nobody has given."""
    other = copy.copy(config)
    other.preset = "fast"
    other.settle(data.sample_shape)
    return other


def claim(config: TrainingConfig, accelerator: Accelerator, until_the_end: ExitStack) -> None:
    """Take the output folder for this run; ValueError where another one has it, or has left
    something in it."""
    with main_first(accelerator):
        if accelerator.is_main_process:
            folder = Path(config.output_dir)
            until_the_end.enter_context(claimed(folder))
            check_content(folder, config.overwrite_output_dir, config.resume_from_checkpoint is not None)
            prepare_sharing(config)


@contextmanager
def one_sentence_errors(prog: str, traceback: bool = False) -> Iterator[None]:
    """End the process with status 1 and the message alone, where something turns out unusable
    before training."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        if traceback or nobody_reads(error):
            raise
        raise SystemExit(f"{prog}: {error}") from error


def start_anew(config: TrainingConfig) -> Accelerator:
    """The accelerator with another precision than that of the launch; the processes stay joined."""
    AcceleratorState._reset_state()
    return start(config)


def start(config: TrainingConfig) -> Accelerator:
    """The accelerator of this process, set up as the settings say; ValueError where it cannot do
    so."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    project = ProjectConfiguration(project_dir=config.output_dir, logging_dir=str(Path(config.output_dir) / "logs"))
    trackers = list(config.report_to) or None
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=trackers,
        project_config=project,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)],
    )
    take_launch_settings(config, accelerator)
    # accelerate would compute in float32 without a word
    if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("mixed_precision fp16 needs a GPU; on the CPU give bf16 or no")
    check_engine(accelerator, config)
    # the loop divides by its own
    accelerator.gradient_accumulation_steps = 1
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.allow_tf32
    choose_attention(accelerator)
    return accelerator


def choose_attention(accelerator: Accelerator) -> None:
    """Attention by plain products where a CPU computes in bfloat16, for networks of other packages.

    torch's fused kernel takes 2 to 4 times as long there, up to some 500 places (measured on an
    EPYC with AVX512-BF16, forward and backward). torch.compile does not look at these switches, so
    our U-Net and transformers choose for themselves.
    """
    is_plain = accelerator.device.type == "cpu" and accelerator.mixed_precision == "bf16"
    torch.backends.cuda.enable_flash_sdp(not is_plain)
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(is_plain)
