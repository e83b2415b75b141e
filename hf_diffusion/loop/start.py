"""From a command line to a trainer that is ready: settings, processes, output folder, data, measures.

What is wrong with a setting or the data ends the script here, in one sentence.
"""

import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from hf_diffusion.config.command_line import parse_config
from hf_diffusion.config.run_options import TrainingConfig
from hf_diffusion.data.loading import load_data
from hf_diffusion.data.protocol import TrainingData
from hf_diffusion.loop.checkpoints import list_checkpoints
from hf_diffusion.loop.dry_run import dry_run
from hf_diffusion.loop.engines import check_engine
from hf_diffusion.loop.finish import train_and_share
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
    """A whole training script: settings from `argv`, data, then `build(config, accelerator, data)` trained and shared.

    `load(**config.data_arguments())` opens the data. Returns the exit status; a bad setting ends the process.
    """
    prog = prog or Path(sys.argv[0]).name
    config = parse_config(config_class, argv, prog=prog)
    with one_sentence_errors(prog, config.traceback):
        accelerator = start(config)
        # one process downloads or prepares them, the others find them in the cache
        with accelerator.main_process_first():
            data = load(**config.data_arguments())
        trainer = build(config, accelerator, data)
        if config.dry_run:
            dry_run(trainer)
            return 0
    train_and_share(trainer, command=[prog, *(sys.argv[1:] if argv is None else argv)])
    return 0


@contextmanager
def one_sentence_errors(prog: str, traceback: bool = False) -> Iterator[None]:
    """End the process with status 1 and the message alone, where something turns out unusable before training."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        if traceback:
            raise
        raise SystemExit(f"{prog}: {error}") from error


def start(config: TrainingConfig) -> Accelerator:
    """The accelerator of this process, with the output folder claimed; ValueError where it holds another run."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    project = ProjectConfiguration(project_dir=config.output_dir, logging_dir=str(Path(config.output_dir) / "logs"))
    trackers = list(config.report_to) or None
    accelerator = Accelerator(mixed_precision=config.mixed_precision, log_with=trackers, project_config=project)
    # accelerate would compute in float32 without a word
    if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("mixed_precision fp16 needs a GPU; on the CPU give bf16 or no")
    check_engine(accelerator, config)
    # a launch configuration may set it, and the loop divides by its own
    accelerator.gradient_accumulation_steps = 1
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.allow_tf32
    if accelerator.is_main_process and not config.dry_run:
        claim_output_dir(config)
        prepare_sharing(config)
    accelerator.wait_for_everyone()
    return accelerator


def claim_output_dir(config: TrainingConfig) -> None:
    """Make sure that nothing of another run in `output_dir` gets mixed with this one's files, or lost."""
    folder = Path(config.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir {folder} is a file; give a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"output_dir {folder} cannot be written ({error.strerror}); give another folder") from error
    used = any(folder.iterdir())
    if used and config.overwrite_output_dir:
        for checkpoint in list_checkpoints(folder):
            shutil.rmtree(checkpoint)
        (folder / "metrics.jsonl").unlink(missing_ok=True)
        for name in ("samples", "outbox", "best"):
            shutil.rmtree(folder / name, ignore_errors=True)
    elif used and not config.resume_from_checkpoint:
        raise ValueError(
            f"output_dir {folder} is not empty; go on with its run by --resume_from_checkpoint latest, begin anew by "
            "--overwrite_output_dir, or give another folder"
        )
