"""The card of a training run: everything that is known about it, and the pictures of what it can do."""

import logging
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from hf_diffusion.card_pictures import Pictures, draw_pictures
from hf_diffusion.citations import citations
from hf_diffusion.config.training import TrainingConfig, config_to_dict
from hf_diffusion.environment import environment
from hf_diffusion.evaluation.report import card_results
from hf_diffusion.hub.sharing import newest_grid, step_tag
from hf_diffusion.model_card import write_model_card
from hf_diffusion.training_run import TrainingRun


logger = logging.getLogger(__name__)
CURVE = "loss_curve.png"


def write_run_card(
    trainer: TrainingRun,
    folder: Path,
    method: str,
    command: Sequence[str],
    kind: str = "diffusion model",
    tags: Sequence[str] = ("ddpm",),
    facts: dict[str, Any] | None = None,
    pictures: Pictures | None = None,
) -> None:
    """Write the model card of a run, as far as it has come, into a folder with its pipeline or model; kind, tags: see write_model_card.

    facts: what `data_set_facts` found about the data. pictures: those in the folder, beside the newest grid of samples.
    """
    config, pushed = trainer.config, trainer.config.push_to_hub
    captions = {path.relative_to(folder).as_posix(): _grid_caption(config) for path in newest_grid(folder)}
    write_model_card(
        folder,
        config=config_to_dict(config),
        data={**trainer.data.describe(), **(facts or {})},
        training={
            "method": method,
            "command": launch_command(trainer.accelerator, command),
            "started_from": getattr(config, "init_from", None),
            "steps": trainer.step,
            "images_seen": trainer.step * trainer.global_batch,
            "global_batch": trainer.global_batch,
            "processes": trainer.accelerator.num_processes,
            "wall_time_s": round(trainer.wall_time, 1),
            "energy": trainer.joules,
            "parameters": trainer.parameters,
            "skipped_steps": trainer.skipped,
            **environment(),
        },
        metrics=_measured(trainer),
        kind=kind,
        tags=tags,
        images=captions | (pictures.captions if pictures else {}),
        curve=CURVE if (folder / CURVE).is_file() else None,
        nearest=pictures.nearest if pictures else None,
        citations=citations(method, config_to_dict(config)),
        license=config.hub_license,
        repo_id=config.hub_model_id if pushed else None,
        revision=step_tag(trainer.step) if pushed else None,
    )


def draw_run_pictures(trainer: TrainingRun) -> Pictures | None:
    """The pictures of a finished run's pipeline; None for a model that draws nothing, and, with a warning, where drawing fails."""
    config, folder = trainer.config, trainer.output_dir
    if not (folder / "model_index.json").is_file():
        return None
    try:
        return draw_pictures(
            folder,
            trainer.data,
            config.num_sample_images,
            config.seed,
            _sampling_options(config),
            trainer.accelerator.device,
            config.dataloader_num_workers,
        )
    except (
        Exception
    ) as error:  # the model is there: a full disk or GPU, or a data set gone, must not take its card away
        logger.warning("the card does without pictures of guidance, steps and nearest training images: %s", error)
        return None


def launch_command(accelerator: Accelerator, command: Sequence[str]) -> str:
    """The command line that starts the same run on as many processes."""
    launch = "accelerate launch "
    if accelerator.num_processes > 1:
        launch += f"--multi_gpu --num_processes {accelerator.num_processes} "
        if accelerator.device.type == "cpu":  # with --cpu, accelerate starts one process, whatever their number
            launch = f"ACCELERATE_USE_CPU=true {launch}"
    return f"{launch}training/{shlex.join(command)}"


def _sampling_options(config: TrainingConfig) -> dict[str, Any]:
    """The arguments of the pipeline's call with which the grids of the run were drawn."""
    options = {}
    if hasattr(config, "ddpm_num_inference_steps"):
        options["num_inference_steps"] = config.ddpm_num_inference_steps
        if config.class_conditional:
            options["guidance_scale"] = config.guidance_scale
    return options


def _grid_caption(config: TrainingConfig) -> str:
    options = {"num_inference_steps": "steps", "guidance_scale": "guidance_scale"}
    drawn = [f"{options[name]} {value:g}" for name, value in _sampling_options(config).items()]
    drawn += ["averaged weights" if config.use_ema else "weights of the last step", f"seeds from {config.seed} on"]
    rows = ", a row for each class" if getattr(config, "class_conditional", False) else ""
    return f"Samples{rows}: {', '.join(drawn)}"


def _measured(trainer: TrainingRun) -> dict[str, dict] | None:
    """What is known about the weights of now, for their card."""
    if trainer.evaluated_step != trainer.step:
        return None
    return card_results(
        [{"settings": {}, "measures": e.measures, "protocol": e.protocol} for e in trainer.evaluations]
    )
