"""Train a (class-conditional) flow matching model on your own images, or on points of the plane.

    accelerate launch training/train_flow.py --config training/recipes/digits_flow.yaml
    accelerate launch training/train_flow.py --dataset_name swiss_roll --max_train_steps 1000

Settings come from `--config` files, then from flags. `--help` lists them, and `--dry_run` shows
what a run would do.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from accelerate import Accelerator
from torch import nn

from hf_diffusion.config.denoiser_options import DenoiserOptions
from hf_diffusion.config.options import option
from hf_diffusion.config.run_options import TrainingConfig
from hf_diffusion.config.shared_options import ClassOptions, DataOptions, LatentOptions, MeasureOptions
from hf_diffusion.data.points import SHAPES
from hf_diffusion.data.protocol import TrainingData
from hf_diffusion.loop.fine_tuning import started_from
from hf_diffusion.loop.generative import generative_trainer
from hf_diffusion.loop.networks import new_denoiser
from hf_diffusion.loop.start import run
from hf_diffusion.loop.trainer import Trainer
from hf_diffusion.losses.augmentation import AugmentationOptions, with_augmentation
from hf_diffusion.losses.flow import FlowMatchingObjective, FlowMatchingOptions
from hf_diffusion.pipelines.pipeline_flow_matching import FlowMatchingPipeline
from hf_diffusion.schedulers.scheduling_flow import FlowMatchingScheduler, resolution_shift


@dataclass(kw_only=True)
class FlowConfig(
    MeasureOptions,
    DenoiserOptions,
    FlowMatchingOptions,
    ClassOptions,
    AugmentationOptions,
    LatentOptions,
    TrainingConfig,
    DataOptions,
):
    """Train a flow matching model on images or points, with or without classes."""

    method: ClassVar[str] = "flow-matching"
    kind: ClassVar[str] = "flow matching model"
    tags: ClassVar[tuple[str, ...]] = ("flow-matching",)

    # The networks' sinusoids tell timesteps of 0 to 1,000 apart, not levels of 0 to 1.
    num_train_timesteps: int = option(1000, "timestep that the network sees at sigma 1", at_least=1, group="network")
    resblock_updown: bool = option(False, "resample inside residual blocks, as BigGAN and ADM do")
    solver: Literal["euler", "heun"] = option(
        "heun", "solver of the sample grids and of the exported pipeline", group="sampling", tied=None
    )
    # 50 calls of the network with Heun.
    num_inference_steps: int = option(
        25, "sampling steps of the grids and of eval_metrics; Heun takes two calls for each", at_least=1, tied=None
    )
    guidance_scale: float = option(
        1.0, "classifier-free guidance of the grids and of eval_metrics; 1 is none", at_least=0, tied=None
    )

    def papers(self) -> tuple[str, ...]:
        sd3 = self.level_distribution != "uniform" or self.time_shift != 1
        used = {
            "lipman2023flow": True,
            "liu2023flow": True,
            # The U-Net, which points do without.
            "dhariwal2021diffusion": self.network == "adm" and self.dataset_name not in SHAPES,
            "ho2022classifier": self.class_conditional and self.label_dropout > 0,
            "rombach2022high": self.vae is not None,
            "karras2022elucidating": self.augment_probability > 0,
            "esser2024scaling": sd3 or self.loss_weighting != "uniform",
            "li2025back": self.prediction_type == "sample" or self.network == "transformer",
            "li2025improved": self.pairing == "knn",
            "tong2024improving": self.pairing == "assignment",
            "stoica2025contrastive": self.contrastive_weight > 0,
        }
        return tuple(paper for paper, is_used in used.items() if is_used)

    def sampling_options(self) -> dict[str, Any]:
        guidance = {"guidance_scale": self.guidance_scale} if self.class_conditional else {}
        return {"num_inference_steps": self.num_inference_steps, **guidance}


def build_scheduler(config: FlowConfig, data: TrainingData) -> FlowMatchingScheduler:
    """The path that the network is trained on, and the solver that follows it."""
    shift = config.time_shift
    if shift is None:
        shift = resolution_shift(math.prod(data.sample_shape[1:]) // config.patch_size**2)
    # By name: diffusers' from_config takes what was given by place for a default, and drops it.
    return FlowMatchingScheduler(num_train_timesteps=config.num_train_timesteps, shift=shift, solver=config.solver)


def build_network(config: FlowConfig, data: TrainingData) -> nn.Module:
    """A network for the shape and the classes of the data."""
    return new_denoiser(config, data, data.sample_shape[0], resblock_updown=config.resblock_updown)


def build(config: FlowConfig, accelerator: Accelerator, data: TrainingData) -> Trainer:
    """The trainer of a network, which users get with a scheduler and the names of the classes."""
    if data.kind == "points" and config.pairing == "knn":
        raise ValueError(
            "pairing knn leans the noise towards the data, which in so few dimensions leaves no Gaussian to sample "
            "from; give assignment or independent"
        )
    network = started_from(config, data, build_network(config, data))
    scheduler = build_scheduler(config, data)
    objective = with_augmentation(FlowMatchingObjective(scheduler, network, config, config.learning_rate), config)
    names = dict(enumerate(data.class_names)) if config.class_conditional else None
    training = {name: getattr(config, name) for name in ("prediction_type", "sigma_floor", "noise_scale")}

    def pipeline(network: nn.Module) -> FlowMatchingPipeline:
        # a scheduler of its own: sampling has its own steps
        own = FlowMatchingScheduler.from_config(scheduler.config)
        return FlowMatchingPipeline(network, own, names, vae=data.autoencoder, **training)

    return generative_trainer(config, accelerator, objective, data, pipeline, **config.sampling_options())


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says; returns the exit status."""
    return run(FlowConfig, build, argv, prog="train_flow.py")


if __name__ == "__main__":
    sys.exit(main())
