"""What every training script does around the loop: start, refuse bad settings in one sentence, load data, write the card."""

import logging
import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from hf_diffusion.checkpoints import list_checkpoints
from hf_diffusion.config.training import TrainingConfig, config_to_dict
from hf_diffusion.data.images import ImageData, load_images
from hf_diffusion.environment import environment
from hf_diffusion.hub.sharing import Sharing, newest_grid, prepare_sharing, step_tag
from hf_diffusion.model_card import write_model_card
from hf_diffusion.training_run import TrainingRun


@contextmanager
def one_sentence_errors(prog: str) -> Iterator[None]:
    """End the process with status 1 and the message alone, where a setting or the data turn out unusable before training."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise SystemExit(f"{prog}: {error}") from error


def start_run(config: TrainingConfig) -> Accelerator:
    """The accelerator of this process, with the output folder claimed; ValueError where it holds another run."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    project = ProjectConfiguration(project_dir=config.output_dir, logging_dir=str(Path(config.output_dir) / "logs"))
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision, log_with=list(config.report_to) or None, project_config=project
    )
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
    used = folder.is_dir() and any(folder.iterdir())
    if used and config.overwrite_output_dir:
        for checkpoint in list_checkpoints(folder):
            shutil.rmtree(checkpoint)
        (folder / "metrics.jsonl").unlink(missing_ok=True)
        for name in ("samples", "outbox"):
            shutil.rmtree(folder / name, ignore_errors=True)
    elif used and not config.resume_from_checkpoint:
        raise ValueError(
            f"output_dir {folder} is not empty; go on with its run by --resume_from_checkpoint latest, begin anew by "
            "--overwrite_output_dir, or give another folder"
        )
    folder.mkdir(parents=True, exist_ok=True)


def load_training_data(config: TrainingConfig, accelerator: Accelerator) -> ImageData:
    """The training images that the settings name; one process downloads or prepares them, the others find them in the cache."""
    with accelerator.main_process_first():
        return load_images(**config.data_arguments())


def train_and_share(trainer: TrainingRun, **about) -> None:
    """Train to the end or to a signal, write the card, and push what the settings ask for; `about`: see `write_run_card`."""
    sharing, finished = None, False
    if trainer.config.push_to_hub and trainer.accelerator.is_main_process:
        sharing = Sharing(trainer, partial(write_run_card, trainer, **about))
        trainer.after_save = sharing.after_save
    try:
        if trainer.train():
            finish_run(trainer, **about)
            finished = True
    finally:
        if sharing is not None:
            sharing.close(finished)


def finish_run(trainer: TrainingRun, **about) -> None:
    """Write the model card beside the exported pipeline or model and say where everything is; `about`: see `write_run_card`."""
    if trainer.accelerator.is_main_process:
        folder = trainer.output_dir
        write_run_card(trainer, folder, **about)
        print(
            f"trained {trainer.step} steps in {trainer.wall_time:.0f} s; the result, its card and its curve are in {folder}"
        )


def write_run_card(
    trainer: TrainingRun,
    folder: Path,
    method: str,
    command: Sequence[str],
    kind: str = "diffusion model",
    tags: Sequence[str] = ("ddpm",),
) -> None:
    """Write the model card of a run, as far as it has come, into a folder with its pipeline or model; kind, tags: see write_model_card."""
    pushed = trainer.config.push_to_hub
    write_model_card(
        folder,
        config=config_to_dict(trainer.config),
        data=trainer.data.describe(),
        training={
            "method": method,
            "command": "accelerate launch training/" + shlex.join(command),
            "steps": trainer.step,
            "images_seen": trainer.step * trainer.global_batch,
            "global_batch": trainer.global_batch,
            "processes": trainer.accelerator.num_processes,
            "wall_time_s": round(trainer.wall_time, 1),
            "parameters": trainer.parameters,
            "skipped_steps": trainer.skipped,
            **environment(),
        },
        metrics=trainer.evaluation or None,
        kind=kind,
        tags=tags,
        images=[path.relative_to(folder).as_posix() for path in newest_grid(folder)],
        repo_id=trainer.config.hub_model_id if pushed else None,
        revision=step_tag(trainer.step) if pushed else None,
    )
