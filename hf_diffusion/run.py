"""What every training script does around the loop: start, refuse bad settings in one sentence, load data, write the card."""

import logging
import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from hf_diffusion.checkpoints import list_checkpoints
from hf_diffusion.config import TrainingConfig, config_to_dict
from hf_diffusion.data import ImageData, load_images
from hf_diffusion.environment import environment
from hf_diffusion.model_card import write_model_card
from hf_diffusion.trainer import Trainer


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
        shutil.rmtree(folder / "samples", ignore_errors=True)
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


def finish_run(trainer: Trainer, method: str, command: Sequence[str]) -> None:
    """Write the model card beside the exported pipeline and say where everything is."""
    if not trainer.accelerator.is_main_process:
        return
    folder = trainer.output_dir
    samples = sorted((folder / "samples").glob("ema-*.png")) or sorted((folder / "samples").glob("raw-*.png"))
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
        metrics=None,
        images=[str(path.relative_to(folder)) for path in samples[-1:]],
    )
    print(
        f"trained {trainer.step} steps in {trainer.wall_time:.0f} s; the pipeline, its card and its samples are in {folder}"
    )
