"""The card of a training run: all that is known about it, and pictures of what it can do."""

import logging
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from hf_diffusion.cards.model_card import write_model_card
from hf_diffusion.cards.papers import bibtex
from hf_diffusion.cards.pictures import Pictures, draw_pictures
from hf_diffusion.cards.tables import kind_of
from hf_diffusion.config.options import lasting_settings
from hf_diffusion.config.publishing import STARTED_AS
from hf_diffusion.config.run_options import TrainingConfig
from hf_diffusion.data.protocol import TrainingData
from hf_diffusion.environment import environment
from hf_diffusion.evaluation.measures import Evaluation
from hf_diffusion.evaluation.report import card_results
from hf_diffusion.hub.files import newest_grid, step_tag
from hf_diffusion.hub.loading import load_pipeline


logger = logging.getLogger(__name__)
CURVE = "loss_curve.png"
# How the caption of a grid calls an option of sampling.
SPOKEN = {"num_inference_steps": "steps"}


@dataclass(frozen=True)
class RunFacts:
    """What a training run tells about itself, as far as it has come.

    config: all its settings, which also say what the family calls itself and which papers it uses.
    data: `describe()` of the data, and what `data_set_facts` found.
    command: the command line that starts the same run.
    global_batch: samples of one optimizer step.
    wall_time_s, joules: of the whole run, resumed parts included; energy by source.
    parameters: of the network that users get.
    skipped: steps without an update.
    evaluations: of the weights that the card is about; None where they were not measured.
    of_averages: those of the averages that were compared, by their decays. decay: of the average
    that the card is about, where several were kept.
    started_from: the trained model that the run began with.
    """

    config: TrainingConfig
    data: dict[str, Any]
    command: str
    steps: int
    global_batch: int
    processes: int
    wall_time_s: float
    parameters: int
    joules: Mapping[str, float] = field(default_factory=dict)
    skipped: int = 0
    evaluations: Sequence[Evaluation] | None = None
    of_averages: Mapping[float, Evaluation] = field(default_factory=dict)
    decay: float | None = None
    started_from: str | None = None


def write_run_card(
    facts: RunFacts, folder: Path, pipeline: DiffusionPipeline | None = None, pictures: Pictures | None = None
) -> Path:
    """Write the model card of a run into a folder with its pipeline or model.

    pipeline: what the folder holds; None loads it, where it holds one.
    pictures: those in the folder, beside the newest grid of samples.
    """
    config, settings = facts.config, lasting_settings(facts.config)
    pipeline = pipeline or saved_pipeline(folder)
    repo_id, revision = (config.hub_model_id, step_tag(facts.steps)) if config.push_to_hub else (None, None)
    captions = {path.relative_to(folder).as_posix(): _grid_caption(facts, pipeline) for path in newest_grid(folder)}
    return write_model_card(
        folder,
        config=settings,
        data=facts.data,
        training=_training(facts),
        pipeline=pipeline,
        metrics=_metrics(facts),
        images=captions | (pictures.captions if pictures else {}),
        curve=CURVE if (folder / CURVE).is_file() else None,
        nearest=pictures.nearest if pictures else None,
        citations=bibtex(config.papers()),
        kind=config.kind,
        tags=config.tags,
        task=config.task,
        usage_template=config.usage_template,
        license=config.hub_license,
        repo_id=repo_id,
        revision=revision,
    )


def draw_run_pictures(
    facts: RunFacts, folder: Path, data: TrainingData, pipeline: DiffusionPipeline
) -> Pictures | None:
    """The pictures of a finished run's pipeline, drawn on its device into its folder.

    None, with a warning, where drawing fails.
    """
    config = facts.config
    try:
        return draw_pictures(
            folder,
            pipeline,
            data,
            config.num_sample_images,
            config.seed,
            config.sampling_options(),
            config.dataloader_num_workers,
        )
    # The model is there: a full disk or GPU, or a data set gone, must not take its card away.
    except Exception as error:
        logger.warning("the card does without pictures of what the model draws: %s", error)
        return None


def saved_pipeline(folder: Path) -> DiffusionPipeline | None:
    """The pipeline that a run has saved in a folder; None where it saves a network alone."""
    return load_pipeline(folder) if (folder / DiffusionPipeline.config_name).is_file() else None


def launch_command(command: Sequence[str], processes: int = 1, on_cpu: bool = False) -> str:
    """The command line that starts the script, `command`, with its flags on as many processes."""
    if command[0] == os.environ.get(STARTED_AS):
        return f"{command[0]} {shlex.join(command[1:])}"
    launch = "accelerate launch "
    if processes > 1:
        launch += f"--multi_gpu --num_processes {processes} "
        # With --cpu, accelerate starts one process, whatever their number.
        if on_cpu:
            launch = f"ACCELERATE_USE_CPU=true {launch}"
    return f"{launch}training/{shlex.join(command)}"


def _training(facts: RunFacts) -> dict[str, Any]:
    return {
        "method": facts.config.method,
        "command": facts.command,
        "started_from": facts.started_from,
        "steps": facts.steps,
        f"{facts.config.learns_from or kind_of(facts.data)}_seen": facts.steps * facts.global_batch,
        "global_batch": facts.global_batch,
        "processes": facts.processes,
        "wall_time_s": round(facts.wall_time_s, 1),
        "energy": dict(facts.joules),
        "parameters": facts.parameters,
        "decay_of_the_average": facts.decay,
        "skipped_steps": facts.skipped,
        **environment(),
    }


def _grid_caption(facts: RunFacts, pipeline: DiffusionPipeline | None) -> str:
    config, prompts = facts.config, getattr(pipeline, "example_prompts", None)
    each = ", a row for each class" if kind_of(facts.data) == "images" else " of each class"
    if prompts:
        each = f", a row for each of the prompts {', '.join(map(repr, prompts))}"
    drawn = [
        f"{SPOKEN.get(name, name)} {_short(value)}"
        for name, value in config.sampling_options().items()
        if value is not None
    ]
    drawn.append("averaged weights" if config.use_ema else "weights of the last step")
    drawn += [f"seeds from {config.seed} on"] if pipeline is not None else []
    return f"{config.grids}{each if prompts or getattr(pipeline, 'num_classes', None) else ''}: {', '.join(drawn)}"


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _metrics(facts: RunFacts) -> dict[str, dict] | None:
    if not facts.evaluations:
        return None
    by_setting = [({}, evaluation) for evaluation in facts.evaluations]
    # of the others the measure alone that has chosen
    for decay, evaluation in facts.of_averages.items():
        chosen_by = {facts.config.ema_metric: evaluation.measures[facts.config.ema_metric]}
        by_setting.append(({"average_of_decay": decay}, replace(evaluation, measures=chosen_by)))
    return card_results([{"settings": s, "measures": e.measures, "protocol": e.protocol} for s, e in by_setting])
