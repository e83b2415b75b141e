"""What every training script does around the loop: start, refuse bad settings in one sentence, load data, write the card."""

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from diffusers import DiffusionPipeline
from torch import nn

from hf_diffusion.bad_steps import TrainingDiverged
from hf_diffusion.checkpoints import SaveFailed, list_checkpoints
from hf_diffusion.config.training import GenerativeTrainingConfig, TrainingConfig, config_to_dict
from hf_diffusion.data.decoding import BadData
from hf_diffusion.data.images import ImageData, load_images
from hf_diffusion.evaluation.in_training import Measurement, SampleMeasures
from hf_diffusion.hub.dataset_card import data_set_facts
from hf_diffusion.hub.sharing import Sharing, prepare_sharing
from hf_diffusion.run_card import draw_run_pictures, write_run_card
from hf_diffusion.sharding import check_engine
from hf_diffusion.training_run import TrainingRun


@contextmanager
def one_sentence_errors(prog: str) -> Iterator[None]:
    """End the process with status 1 and the message alone, where a setting or the data turn out unusable before training."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"{prog}: {error}") from error


@contextmanager
def one_sentence_failures(prog: str, output_dir: Path) -> Iterator[None]:
    """The same for what goes wrong in the middle of a run, with what is left; any other exception is a mistake of ours."""
    try:
        yield
    except (SaveFailed, TrainingDiverged) as error:
        raise SystemExit(f"{prog}: {error}") from error
    except (OSError, BadData) as error:
        newest = [folder.name for folder in list_checkpoints(output_dir)[-1:]]
        left = (
            f"{newest[0]} is untouched, go on with --resume_from_checkpoint latest"
            if newest
            else "there is no checkpoint yet"
        )
        raise SystemExit(f"{prog}: {error}; {left}") from error


def start_run(config: TrainingConfig) -> Accelerator:
    """The accelerator of this process, with the output folder claimed; ValueError where it holds another run."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    project = ProjectConfiguration(project_dir=config.output_dir, logging_dir=str(Path(config.output_dir) / "logs"))
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision, log_with=list(config.report_to) or None, project_config=project
    )
    if (
        config.mixed_precision == "fp16" and accelerator.device.type == "cpu"
    ):  # accelerate would compute in float32 without a word
        raise ValueError("mixed_precision fp16 needs a GPU; on the CPU give bf16 or no")
    check_engine(accelerator, config)
    accelerator.gradient_accumulation_steps = (
        1  # a launch configuration may set it, and the trainers divide by their own
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


def load_training_data(config: TrainingConfig, accelerator: Accelerator) -> ImageData:
    """The training images that the settings name; one process downloads or prepares them, the others find them in the cache."""
    with accelerator.main_process_first():
        return load_images(**config.data_arguments())


def load_unaugmented(
    config: TrainingConfig, accelerator: Accelerator, data: ImageData, split: str | None = None
) -> ImageData:
    """The images of `data`, or of another split in the form of `data`, neither flipped nor cropped at random.

    ValueError where the split has other classes.
    """
    plain = {"split": split or config.split, "channels": data.channels, "random_flip": False, "center_crop": True}
    plain |= {"streaming": False} | ({} if split is None else {"max_train_samples": None})
    arguments = config.data_arguments() | plain
    with accelerator.main_process_first():
        try:
            images = load_images(**arguments)
        except ValueError:  # perhaps only because the images differ in size; any other reason shows again
            images = load_images(**arguments | {"resolution": data.size})
        if tuple(images.size) != tuple(data.size):
            images = load_images(**arguments | {"resolution": data.size})
    if images.class_names != data.class_names:
        raise ValueError(
            f"eval_split {split!r} has the classes {images.class_names} and the training {data.class_names}; "
            "give a split of the same classes"
        )
    return images


def sample_measures(
    config: GenerativeTrainingConfig,
    accelerator: Accelerator,
    data: ImageData,
    build_pipeline: Callable[[nn.Module], DiffusionPipeline],
    model: nn.Module,
    **options,
) -> list[Measurement]:
    """What `--eval_metrics` asks for, with the statistics of the real images ready; `options` are those of the pipeline's call."""
    if not config.eval_metrics:
        return []
    plain = data
    if config.random_flip or not config.center_crop:
        plain = load_unaugmented(config, accelerator, data)
    measures = SampleMeasures(
        accelerator,
        config.eval_metrics,
        plain,
        build_pipeline,
        model,
        class_conditional=config.class_conditional,
        num_images=config.eval_num_images,
        features=config.eval_features,
        batch_size=config.eval_batch_size,
        seed=config.seed,
        **options,
    )
    if not config.dry_run:
        measures.prepare()  # now, since nothing between two steps should take that long
    return [measures]


def check_best_metric(config: TrainingConfig, measurements: Sequence[Measurement]) -> None:
    """ValueError for a best_metric that nothing measures."""
    keys = [key for measurement in measurements for key in measurement.keys]
    if config.best_metric is not None and config.best_metric not in keys:
        measured = f"is none of what is measured: {', '.join(keys)}" if keys else "needs something that is measured"
        raise ValueError(f"best_metric {config.best_metric} {measured}; see --help for eval_metrics and eval_split")


def train_and_share(trainer: TrainingRun, **about) -> None:
    """Train to the end or to a signal, write the card, and push what the settings ask for; `about`: see `write_run_card`."""
    sharing, finished = None, False
    if trainer.accelerator.is_main_process:
        about["facts"] = data_set_facts(config_to_dict(trainer.config))  # now: later the network may be gone
    if trainer.config.push_to_hub and trainer.accelerator.is_main_process:
        sharing = Sharing(trainer, partial(write_run_card, trainer, **about))
        trainer.after_save = sharing.after_save
    try:
        with one_sentence_failures(about["command"][0], trainer.output_dir):
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
        write_run_card(trainer, folder, pictures=draw_run_pictures(trainer), **about)
        print(
            f"trained {trainer.step} steps in {trainer.wall_time:.0f} s; the result, its card and its curve are in {folder}"
        )
