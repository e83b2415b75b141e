"""Train a (class-conditional) preconditioned denoiser, EDM, on your own images or on points.

    accelerate launch training/train_edm.py --config training/recipes/digits_edm.yaml
    accelerate launch training/train_edm.py --dataset_name swiss_roll --max_train_steps 1000

Settings come from `--config` files, then from flags; `--help` lists them, and `--dry_run` shows
what a run would do.
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
from hf_diffusion.loop.fine_tuning import started_from
from hf_diffusion.loop.generative import generative_trainer
from hf_diffusion.loop.start import run
from hf_diffusion.loop.trainer import Trainer
from hf_diffusion.losses.preconditioned import PreconditionedObjective, PreconditionedOptions
from hf_diffusion.models.mlp_points import PointDenoiser
from hf_diffusion.models.unet_adm import ADMUNet2DModel
from hf_diffusion.pipelines.pipeline_edm import EDMPipeline
from hf_diffusion.schedulers.scheduling_edm import EDMHeunScheduler


@dataclass(kw_only=True)
class EDMConfig(MeasureOptions, UNetOptions, PreconditionedOptions, ClassOptions, TrainingConfig, DataOptions):
    """Train a preconditioned denoiser, with or without classes."""

    method: ClassVar[str] = "edm"
    tags: ClassVar[tuple[str, ...]] = ("edm",)

    resblock_updown: bool = option(False, "resample inside residual blocks, as BigGAN and ADM do", group="network")
    # A step is two calls of the network, but for the last.
    num_inference_steps: int = option(
        18, "sampling steps of the grids and of eval_metrics", at_least=1, group="sampling", tied=None
    )
    guidance_scale: float = option(
        1.0, "classifier-free guidance of the grids and of eval_metrics; 1 is none", at_least=0, tied=None
    )
    s_churn: float = option(
        0.0, "noise added while sampling, in the exported pipeline, too; 0 is none", at_least=0, tied=None
    )

    def papers(self) -> tuple[str, ...]:
        used = {
            "karras2022elucidating": True,
            "karras2024analyzing": self.learned_weighting,
            "song2021score": self.preconditioning in ("vp", "ve"),
            "nichol2021improved": self.preconditioning == "iddpm",
            # The U-Net, which points do without.
            "dhariwal2021diffusion": self.dataset_name not in SHAPES,
            "ho2022classifier": self.class_conditional and self.label_dropout > 0,
        }
        return tuple(paper for paper, is_used in used.items() if is_used)

    def sampling_options(self) -> dict[str, Any]:
        guidance = {"guidance_scale": self.guidance_scale} if self.class_conditional else {}
        return {"num_inference_steps": self.num_inference_steps, **guidance}


def build_scheduler(config: EDMConfig) -> EDMHeunScheduler:
    """The sampler of the network that these settings train, over the noise levels that it knows."""
    low, high = config.make_preconditioning().sampling_range
    return EDMHeunScheduler(
        sigma_min=low,
        sigma_max=high,
        sigma_data=config.sigma_data,
        preconditioning=config.preconditioning,
        s_churn=config.s_churn,
    )


def build_network(config: EDMConfig, data: TrainingData) -> ADMUNet2DModel | PointDenoiser:
    """A network for the shape and the classes of the data."""
    classes = config.num_class_embeds(data)
    knowledge = {"num_class_embeds": classes, "null_class": classes is not None and config.label_dropout > 0}
    torch.manual_seed(config.seed)
    if data.kind == "points":
        return PointDenoiser(**config.mlp_shape(data.sample_shape), **knowledge)
    shape = config.unet_shape(data.sample_shape)
    channels = {"out_channels": data.sample_shape[0]}
    return ADMUNet2DModel(**shape, **channels, resblock_updown=config.resblock_updown, **knowledge)


def build(config: EDMConfig, accelerator: Accelerator, data: TrainingData) -> Trainer:
    """The trainer of a network, which users get with its sampler and the names of the classes."""
    network = started_from(config, data, build_network(config, data))
    objective = PreconditionedObjective(network, config, config.learning_rate)
    names = dict(enumerate(data.class_names)) if config.class_conditional else None

    def pipeline(network: nn.Module) -> EDMPipeline:
        return EDMPipeline(network, build_scheduler(config), names)

    return generative_trainer(config, accelerator, objective, data, pipeline, **config.sampling_options())


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says; returns the exit status."""
    return run(EDMConfig, build, argv, prog="train_edm.py")


if __name__ == "__main__":
    sys.exit(main())
