"""The trainer of a model that draws samples: what it exports, previews and is measured by follows
from its pipeline.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from diffusers import DiffusionPipeline
from PIL import Image
from torch import nn

from hf_diffusion.config.run_options import TrainingConfig
from hf_diffusion.data.protocol import TrainingData
from hf_diffusion.data.splits import load_unaugmented
from hf_diffusion.data.waiting import main_first
from hf_diffusion.evaluation.held_out import HeldOutLoss
from hf_diffusion.evaluation.in_training import Evaluator, SampleEvaluator
from hf_diffusion.loop.trainer import Trainer
from hf_diffusion.losses.objective import Objective, Player
from hf_diffusion.sampling.drawing import draw


BuildPipeline = Callable[[nn.Module], DiffusionPipeline]


def generative_trainer(
    config: TrainingConfig,
    accelerator: Accelerator,
    objective: Objective,
    data: TrainingData,
    build_pipeline: BuildPipeline,
    **sampling: Any,
) -> Trainer:
    """A trainer that exports `build_pipeline(network)`.

    `sampling` are the options of the pipeline's call.
    """
    player = next(player for player in objective.players if player.is_averaged)
    evaluators = held_out_loss(config, accelerator, data, player)
    evaluators += sample_evaluators(config, accelerator, data, build_pipeline, player.network, sampling)
    check_best_metric(config, evaluators)

    def export(network: nn.Module, folder: Path) -> None:
        build_pipeline(network).save_pretrained(folder)

    def preview(network: nn.Module) -> Image.Image | str:
        return sample_grid(build_pipeline(network), data, config.num_sample_images, config.seed, sampling)

    return Trainer(config, accelerator, objective, data, export, preview, evaluators)


def held_out_loss(
    config: TrainingConfig, accelerator: Accelerator, data: TrainingData, player: Player
) -> list[Evaluator]:
    """The player's own loss on the split that `eval_split` names, if it names one."""
    if config.eval_split is None:
        return []
    with main_first(accelerator):
        held_out = load_unaugmented(config.data_arguments(), data, config.eval_split)
    batch_size = getattr(config, "eval_batch_size", config.train_batch_size)
    return [HeldOutLoss(accelerator, held_out, player, batch_size, config.seed)]


def sample_evaluators(
    config: TrainingConfig,
    accelerator: Accelerator,
    data: TrainingData,
    build_pipeline: BuildPipeline,
    network: nn.Module,
    sampling: dict[str, Any],
) -> list[Evaluator]:
    """What `eval_metrics` asks for, with the statistics of the real samples ready."""
    if not config.eval_metrics:
        return []
    plain = data
    if plain.as_drawn is data and (config.random_flip or not config.center_crop):
        with main_first(accelerator):
            plain = load_unaugmented(config.data_arguments(), data)
    evaluator = SampleEvaluator(
        accelerator,
        config.eval_metrics,
        plain.as_drawn,
        build_pipeline,
        network,
        class_conditional=config.class_conditional,
        num_images=config.eval_num_images,
        features=config.eval_features,
        batch_size=config.eval_batch_size,
        seed=config.seed,
        **sampling,
    )
    if not config.dry_run:
        # now, since nothing between two steps should take that long
        evaluator.prepare()
    return [evaluator]


def check_best_metric(config: TrainingConfig, evaluators: Sequence[Evaluator]) -> None:
    """ValueError for a best_metric, or an ema_metric that has to choose, that nothing measures."""
    keys = [key for evaluator in evaluators for key in evaluator.keys]
    measured = f"is none of what is measured: {', '.join(keys)}" if keys else "needs something that is measured"
    wanted = {"best_metric": config.best_metric, "ema_metric": config.ema_metric if config.ema_max_decays else None}
    for setting, name in wanted.items():
        if name is not None and name not in keys:
            raise ValueError(f"{setting} {name} {measured}; see --help for eval_metrics and eval_split")


def sample_grid(
    pipeline: DiffusionPipeline, data: TrainingData, count: int, seed: int, sampling: dict[str, Any]
) -> Image.Image | str:
    """Samples from fixed seeds, as a picture with a row for each text or class, or as text."""
    names = getattr(pipeline, "id2label", None) or {}
    asked = getattr(pipeline, "example_prompts", None) or sorted(names)
    columns = max(1, count // len(asked) if asked else round(count**0.5))
    labels = [label for label in asked for _ in range(columns)][:count] or None
    samples = draw(pipeline, [seed + i for i in range(len(labels or range(count)))], labels, **sampling)
    rows = [names.get(label, label) for label in labels[::columns]] if labels else None
    return data.picture(samples, columns, rows)
