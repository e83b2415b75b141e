"""Train a MeanFlow model, which samples in one step or a few, on your own images or points.

    accelerate launch training/train_mean_flow.py \\
        --config training/recipes/digits_mean_flow.yaml
    accelerate launch training/train_mean_flow.py --dataset_name swiss_roll --max_train_steps 4000

Settings come from `--config` files, then from flags. `--help` lists them, and `--dry_run` shows
what a run would do. It needs no trained model to start from. Where you have one, `--objective
tuning` of train_consistency.py is shorter.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from torch import nn

from hf_diffusion.config.options import option
from hf_diffusion.config.run_options import TrainingConfig
from hf_diffusion.config.shared_options import ClassOptions, DataOptions, MeasureOptions, UNetOptions
from hf_diffusion.data.points import SHAPES
from hf_diffusion.data.protocol import TrainingData
from hf_diffusion.loop.engines import DATA_PARALLEL, parallelism
from hf_diffusion.loop.fine_tuning import started_from
from hf_diffusion.loop.generative import generative_trainer
from hf_diffusion.loop.start import run
from hf_diffusion.loop.trainer import Trainer
from hf_diffusion.losses.mean_flow_objective import MeanFlowObjective, MeanFlowOptions
from hf_diffusion.models.mlp_points import PointMeanFlowDenoiser
from hf_diffusion.models.unet_adm import ADMMeanFlowUNet2DModel
from hf_diffusion.pipelines.pipeline_mean_flow import MeanFlowPipeline
from hf_diffusion.schedulers.scheduling_flow import FlowMatchingScheduler


@dataclass(kw_only=True)
class MeanFlowConfig(MeasureOptions, UNetOptions, MeanFlowOptions, ClassOptions, TrainingConfig, DataOptions):
    """Train a MeanFlow model on images or points, with or without classes."""

    method: ClassVar[str] = "mean-flow"
    kind: ClassVar[str] = "MeanFlow model"
    tags: ClassVar[tuple[str, ...]] = ("mean-flow",)

    # The loss has the network's derivative in time, which is as large as the embedding is fine.
    num_train_timesteps: int = option(1, "timestep that the network sees at time 1", at_least=1, group="network")
    resblock_updown: bool = option(False, "resample inside residual blocks, as BigGAN and ADM do")
    num_inference_steps: int = option(
        1, "steps of the sample grids and of eval_metrics", at_least=1, group="sampling", tied=None
    )
    guidance_scale: float = option(
        1.0,
        "classifier-free guidance of the grids and of eval_metrics, beside the learned one; 1 is none",
        at_least=0,
        tied=None,
    )

    def papers(self) -> tuple[str, ...]:
        used = {
            "geng2025mean": True,
            "lipman2023flow": True,
            # The U-Net, which points do without.
            "dhariwal2021diffusion": self.dataset_name not in SHAPES,
            "ho2022classifier": self.is_guided,
        }
        return tuple(paper for paper, is_used in used.items() if is_used)

    def sampling_options(self) -> dict[str, Any]:
        guidance = {"guidance_scale": self.guidance_scale} if self.class_conditional else {}
        return {"num_inference_steps": self.num_inference_steps, **guidance}


def build_network(config: MeanFlowConfig, data: TrainingData) -> ADMMeanFlowUNet2DModel | PointMeanFlowDenoiser:
    """A network for the shape and the classes of the data."""
    classes = config.num_class_embeds(data)
    knowledge = {"num_class_embeds": classes, "null_class": classes is not None and config.label_dropout > 0}
    torch.manual_seed(config.seed)
    if data.kind == "points":
        return PointMeanFlowDenoiser(**config.mlp_shape(data.sample_shape), **knowledge)
    shape = config.unet_shape(data.sample_shape)
    return ADMMeanFlowUNet2DModel(**shape, resblock_updown=config.resblock_updown, **knowledge)


def build(config: MeanFlowConfig, accelerator: Accelerator, data: TrainingData) -> Trainer:
    """The trainer of a network, which users get with a scheduler and the names of the classes."""
    if parallelism(accelerator) != DATA_PARALLEL:
        raise ValueError(
            f"{parallelism(accelerator)} divides the network, and MeanFlow differentiates it whole; launch without"
        )
    network = started_from(config, data, build_network(config, data))
    scheduler = FlowMatchingScheduler(num_train_timesteps=config.num_train_timesteps)
    rate = config.learning_rate
    objective = MeanFlowObjective(scheduler, network, config, rate, accelerator.unwrap_model)
    names = dict(enumerate(data.class_names)) if config.class_conditional else None

    def pipeline(network: nn.Module) -> MeanFlowPipeline:
        # a scheduler of its own: sampling has its own steps
        return MeanFlowPipeline(network, FlowMatchingScheduler.from_config(scheduler.config), names)

    return generative_trainer(config, accelerator, objective, data, pipeline, **config.sampling_options())


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says; returns the exit status."""
    return run(MeanFlowConfig, build, argv, prog="train_mean_flow.py")


if __name__ == "__main__":
    sys.exit(main())
