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
from hf_diffusion.losses.preconditioned import PreconditionedObjective, PreconditionedOptions
from hf_diffusion.pipelines.pipeline_edm import EDMPipeline
from hf_diffusion.schedulers.scheduling_edm import EDMHeunScheduler


@dataclass(kw_only=True)
class EDMConfig(
    MeasureOptions,
    DenoiserOptions,
    PreconditionedOptions,
    ClassOptions,
    AugmentationOptions,
    LatentOptions,
    TrainingConfig,
    DataOptions,
):
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
            "dhariwal2021diffusion": self.network == "adm" and self.dataset_name not in SHAPES,
            "li2025back": self.network == "transformer",
            "ho2022classifier": self.class_conditional and self.label_dropout > 0,
            "rombach2022high": self.vae is not None,
        }
        return tuple(paper for paper, is_used in used.items() if is_used)

    def settle(self, sample_shape: tuple[int, ...]) -> None:
        super().settle(sample_shape)
        # Of images it is about 0.5, of scaled latents 1.
        if self.vae is not None and "sigma_data" not in self.given:
            self.sigma_data = 1.0

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


def build_network(config: EDMConfig, data: TrainingData) -> nn.Module:
    """A network for the shape and the classes of the data."""
    return new_denoiser(config, data, data.sample_shape[0], resblock_updown=config.resblock_updown)


def build(config: EDMConfig, accelerator: Accelerator, data: TrainingData) -> Trainer:
    """The trainer of a network, which users get with its sampler and the names of the classes."""
    network = started_from(config, data, build_network(config, data))
    objective = with_augmentation(PreconditionedObjective(network, config, config.learning_rate), config)
    names = dict(enumerate(data.class_names)) if config.class_conditional else None

    def pipeline(network: nn.Module) -> EDMPipeline:
        return EDMPipeline(network, build_scheduler(config), names, data.autoencoder)

    return generative_trainer(config, accelerator, objective, data, pipeline, **config.sampling_options())


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says; returns the exit status."""
    return run(EDMConfig, build, argv, prog="train_edm.py")


if __name__ == "__main__":
    sys.exit(main())
