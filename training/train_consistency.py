"""Train a consistency model, which samples in one step or a few, on your own images or points.

    accelerate launch training/train_consistency.py \\
        --config training/recipes/digits_consistency.yaml
    accelerate launch training/train_consistency.py --train_data_dir my_images \\
        --objective tuning --init_from runs/my_ddpm --output_dir runs/mine

Settings come from `--config` files, then from flags. `--help` lists them, and `--dry_run` shows
what a run would do.

By far the shortest way is `--objective tuning` of a trained denoiser, such as one of train_ddpm.py.
From scratch take `improved`. `distillation` needs a denoiser, too, and learns its guidance with
`--teacher_guidance_scale`.
"""

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from accelerate import Accelerator
from torch import nn

from hf_diffusion.config.denoiser_options import DenoiserOptions
from hf_diffusion.config.options import option
from hf_diffusion.config.run_options import TrainingConfig
from hf_diffusion.config.shared_options import ClassOptions, DataOptions, MeasureOptions
from hf_diffusion.data.points import SHAPES
from hf_diffusion.data.protocol import TrainingData
from hf_diffusion.loop.engines import DATA_PARALLEL, parallelism
from hf_diffusion.loop.generative import generative_trainer
from hf_diffusion.loop.networks import new_denoiser
from hf_diffusion.loop.start import run
from hf_diffusion.loop.trained_denoiser import trained_denoiser
from hf_diffusion.loop.trainer import Trainer
from hf_diffusion.losses.consistency_objective import ConsistencyObjective, ConsistencyOptions
from hf_diffusion.pipelines.pipeline_consistency import ConsistencyPipeline
from hf_diffusion.schedulers.scheduling_consistency import ConsistencyScheduler


@dataclass(kw_only=True)
class ConsistencyConfig(
    MeasureOptions, DenoiserOptions, ConsistencyOptions, ClassOptions, TrainingConfig, DataOptions
):
    """Train a consistency model on images or points, with or without classes."""

    method: ClassVar[str] = "consistency"
    kind: ClassVar[str] = "consistency model"
    tags: ClassVar[tuple[str, ...]] = ("consistency-model",)

    init_from: str | None = option(
        None,
        "start from the network of this pipeline, a folder or Hub id: its shape then replaces the network's options",
        tied=False,
        often=True,
    )
    num_inference_steps: int = option(
        2, "steps of the sample grids and of eval_metrics", at_least=1, group="sampling", tied=None
    )

    # Of 0.4, 0.8, 1.5, and 2.2 as diffusers spaces, 0.8 was best in two steps: FD-500 of digits
    # 1.34, 1.05, 1.34, 1.57 (+- 0.11, one model of 100 steps).
    sampling_sigma_min: float | None = option(
        0.8, "noise level of the last of several steps; none spaces levels as diffusers does", above=0, tied=None
    )

    def papers(self) -> tuple[str, ...]:
        used = {
            "song2023consistency": True,
            "song2024improved": self.objective == "improved",
            "geng2025consistency": self.objective == "tuning",
            "karras2022elucidating": True,
            # The U-Net, which points do without.
            "dhariwal2021diffusion": self.network == "adm" and self.dataset_name not in SHAPES,
            "li2025back": self.network == "transformer",
            "ho2022classifier": self.class_conditional and self.label_dropout > 0,
        }
        return tuple(paper for paper, is_used in used.items() if is_used)

    def sampling_options(self) -> dict[str, Any]:
        return {"num_inference_steps": self.num_inference_steps}


def build_network(config: ConsistencyConfig, data: TrainingData) -> tuple[nn.Module, dict[str, Any]]:
    """The network, and what its scheduler must know of it: a trained one, or a new one for the
    shape of the data.
    """
    if config.init_from is not None:
        return trained_denoiser(config, data)
    return new_denoiser(config, data, data.sample_shape[0]), {"sigma_data": config.sigma_data}


def build_scheduler(config: ConsistencyConfig, data: TrainingData, process: dict[str, Any]) -> ConsistencyScheduler:
    """The noise levels of training and sampling."""
    highest = min(80.0, *(process.get("trained_sigmas") or (80.0,))[-1:])
    return ConsistencyScheduler(
        sigma_min=config.sigma_min,
        sigma_max=highest if config.sigma_max is None else config.sigma_max,
        rho=config.rho,
        sampling_sigma_min=config.sampling_sigma_min,
        # points know no bounds
        clip_denoised=data.kind == "images",
        **process,
    )


def build(config: ConsistencyConfig, accelerator: Accelerator, data: TrainingData) -> Trainer:
    """The trainer of a network, which users get with its scheduler and the names of the classes."""
    network, process = build_network(config, data)
    scheduler = build_scheduler(config, data, process)
    objective = ConsistencyObjective(
        scheduler,
        network,
        config,
        config.learning_rate,
        config.total_steps(data.num_samples, accelerator.num_processes),
        accelerator,
        teacher=copy.deepcopy(network) if config.objective == "distillation" else None,
    )
    if objective.target is not None and parallelism(accelerator) != DATA_PARALLEL:
        raise ValueError(
            f"{parallelism(accelerator)} divides the network, and a target network is kept whole; give --target_ema 0"
        )
    names = dict(enumerate(data.class_names)) if config.class_conditional else None

    def pipeline(network: nn.Module) -> ConsistencyPipeline:
        # a scheduler of its own: sampling chooses levels
        return ConsistencyPipeline(network, ConsistencyScheduler.from_config(scheduler.config), names)

    return generative_trainer(config, accelerator, objective, data, pipeline, **config.sampling_options())


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says; returns the exit status."""
    return run(ConsistencyConfig, build, argv, prog="train_consistency.py")


if __name__ == "__main__":
    sys.exit(main())
