"""Train a (class-conditional) diffusion model on your own images.

    accelerate launch training/train_ddpm.py --config training/recipes/digits.yaml
    accelerate launch training/train_ddpm.py --train_data_dir my_images --resolution 64

Settings come from `--config` files, then from flags; `--help` lists them and `--dry_run` shows what
a run would do.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from accelerate import Accelerator
from torch import nn

from hf_diffusion.config.denoiser_options import DenoiserOptions
from hf_diffusion.config.options import option
from hf_diffusion.config.run_options import TrainingConfig
from hf_diffusion.config.shared_options import (
    ClassOptions,
    DataOptions,
    LatentOptions,
    MeasureOptions,
    NoiseScheduleOptions,
)
from hf_diffusion.data.points import SHAPES
from hf_diffusion.data.protocol import TrainingData
from hf_diffusion.loop.fine_tuning import started_from
from hf_diffusion.loop.generative import generative_trainer
from hf_diffusion.loop.networks import new_denoiser
from hf_diffusion.loop.start import run
from hf_diffusion.loop.trainer import Trainer
from hf_diffusion.losses.augmentation import AugmentationOptions, with_augmentation
from hf_diffusion.losses.denoising import DenoisingObjective, DenoisingOptions
from hf_diffusion.pipelines.pipeline_classifier_free_guidance import ClassifierFreeGuidancePipeline
from hf_diffusion.schedulers.scheduling_gaussian import DDIMEtaScheduler, LinearDDPMScheduler


@dataclass(kw_only=True)
class DDPMConfig(
    MeasureOptions,
    DenoiserOptions,
    NoiseScheduleOptions,
    DenoisingOptions,
    ClassOptions,
    AugmentationOptions,
    LatentOptions,
    TrainingConfig,
    DataOptions,
):
    """Train a diffusion model on images, with or without classes."""

    method: ClassVar[str] = "ddpm"
    tags: ClassVar[tuple[str, ...]] = ("ddpm",)

    resblock_updown: bool = option(False, "resample inside residual blocks, as BigGAN and ADM do", group="network")
    sampler: Literal["ddim", "ddpm"] = option(
        "ddim", "scheduler of the sample grids and of the exported pipeline", group="sampling", tied=None
    )
    ddpm_num_inference_steps: int = option(
        50, "sampling steps of the grids and of eval_metrics", at_least=1, tied=None
    )
    guidance_scale: float = option(
        1.0, "classifier-free guidance of the grids and of eval_metrics; 1 is none", at_least=0, tied=None
    )

    def check(self) -> None:
        """ValueError for settings of different groups that contradict each other."""
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            raise ValueError(
                "rescale_betas_zero_snr needs prediction_type v_prediction or sample: pure noise tells nothing of x_0"
            )
        if self.ddpm_num_inference_steps > self.ddpm_num_steps:
            raise ValueError(
                f"ddpm_num_inference_steps {self.ddpm_num_inference_steps} is more than ddpm_num_steps "
                f"{self.ddpm_num_steps}; give fewer"
            )

    def papers(self) -> tuple[str, ...]:
        improved = self.beta_schedule == "squaredcos_cap_v2" or self.objective in ("hybrid", "vlb")
        used = {
            "ho2020denoising": True,
            "song2021denoising": self.sampler == "ddim",
            "nichol2021improved": improved or self.timestep_sampling == "loss_second_moment",
            # The U-Net, which points do without.
            "dhariwal2021diffusion": self.network == "adm" and self.dataset_name not in SHAPES,
            "li2025back": self.network == "transformer"
            or (self.prediction_type == "sample" and self.loss_weighting == "v"),
            "ho2022classifier": self.class_conditional and self.label_dropout > 0,
            "rombach2022high": self.vae is not None,
            "karras2022elucidating": self.augment_probability > 0,
            "salimans2022progressive": self.prediction_type == "v_prediction",
            "esser2024scaling": self.level_distribution == "logit_normal",
            "hang2023efficient": self.loss_weighting == "min_snr",
            "choi2022perception": self.loss_weighting == "p2",
            "lin2024common": self.rescale_betas_zero_snr,
        }
        return tuple(paper for paper, is_used in used.items() if is_used)

    def sampling_options(self) -> dict[str, Any]:
        guidance = {"guidance_scale": self.guidance_scale} if self.class_conditional else {}
        return {"num_inference_steps": self.ddpm_num_inference_steps, **guidance}


def build_scheduler(config: DDPMConfig, clip_sample: bool = True) -> LinearDDPMScheduler:
    """The process that the network is trained on; predictions of bounded data are clipped."""
    return LinearDDPMScheduler(
        **config.noise_schedule(),
        prediction_type=config.prediction_type,
        variance_type=config.variance_type,
        # starts at the last timestep, as sampling from pure noise must
        timestep_spacing="trailing",
        clip_sample=clip_sample,
    )


def build_network(config: DDPMConfig, data: TrainingData) -> nn.Module:
    """A network for the shape and the classes of the data."""
    return new_denoiser(
        config,
        data,
        data.sample_shape[0] * (2 if config.learns_variance else 1),
        resblock_updown=config.resblock_updown,
    )


def build(config: DDPMConfig, accelerator: Accelerator, data: TrainingData) -> Trainer:
    """The trainer of a network, which users get with a scheduler for sampling and the names of the
    classes.
    """
    process = {**config.noise_schedule(), "prediction_type": config.prediction_type}
    network = started_from(config, data, build_network(config, data), process)
    scheduler = build_scheduler(config, data.is_bounded)
    objective = with_augmentation(
        DenoisingObjective(scheduler, network, config, config.learning_rate, accelerator), config
    )
    names = dict(enumerate(data.class_names)) if config.class_conditional else None

    def pipeline(network: nn.Module) -> ClassifierFreeGuidancePipeline:
        # a scheduler of its own: sampling chooses timesteps, training needs all
        cls = DDIMEtaScheduler if config.sampler == "ddim" else LinearDDPMScheduler
        return ClassifierFreeGuidancePipeline(network, cls.from_config(scheduler.config), names, data.autoencoder)

    return generative_trainer(config, accelerator, objective, data, pipeline, **config.sampling_options())


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says; returns the exit status."""
    return run(DDPMConfig, build, argv, prog="train_ddpm.py")


if __name__ == "__main__":
    sys.exit(main())
