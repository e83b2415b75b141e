"""Train a score network: of VE, VP or sub-VP equations, or at the noise levels of NCSN.

    accelerate launch training/train_score.py --config training/recipes/digits_score_vp.yaml
    accelerate launch training/train_score.py --dataset_name swiss_roll --output_dir runs/roll

Settings come from `--config` files, then from flags; `--help` lists them and `--dry_run` shows what
a run would do.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from accelerate import Accelerator
from diffusers import UNet2DModel
from torch import nn

from hf_diffusion.config.denoiser_options import DenoiserOptions
from hf_diffusion.config.options import option
from hf_diffusion.config.preset import Choice, Circumstances
from hf_diffusion.config.run_options import TrainingConfig
from hf_diffusion.config.shared_options import ClassOptions, DataOptions, MeasureOptions
from hf_diffusion.data.points import SHAPES
from hf_diffusion.data.protocol import TrainingData
from hf_diffusion.data.selection import evenly_spaced
from hf_diffusion.loop.fine_tuning import started_from
from hf_diffusion.loop.generative import generative_trainer
from hf_diffusion.loop.networks import new_denoiser
from hf_diffusion.loop.start import run
from hf_diffusion.loop.trainer import Trainer
from hf_diffusion.losses.score import ScoreObjective, ScoreOptions
from hf_diffusion.pipelines.pipeline_score_sde import ScoreSdePipeline
from hf_diffusion.schedulers.scheduling_score import (
    AnnealedLangevinScheduler,
    ScoreScheduler,
    ScoreSdeSubVPScheduler,
    ScoreSdeVEScheduler,
    ScoreSdeVPScheduler,
    langevin_step_size,
    largest_distance,
    level_count,
)


# Enough to find the largest distance of nearly any two.
COMPARED_SAMPLES = 2000


# Of the probability flow, for the grids of a run that chooses itself.
FLOW_STEPS = 50


@dataclass(kw_only=True)
class ScoreConfig(MeasureOptions, DenoiserOptions, ScoreOptions, ClassOptions, TrainingConfig, DataOptions):
    """Train a score network on images or points, with or without classes."""

    method: ClassVar[str] = "score"
    kind: ClassVar[str] = "score-based diffusion model"
    tags: ClassVar[tuple[str, ...]] = ("score-sde",)

    process: Literal["ve", "vp", "subvp", "ncsn"] = option("vp", "what turns data into noise", group="method")
    sigma_min: float = option(0.01, "least noise of ve and ncsn", above=0)
    # Technique 1 of NCSNv2: then the noisiest level joins any two samples.
    sigma_max: float | None = option(
        None, "most noise of ve and ncsn; none is the largest distance of two samples", above=0
    )
    beta_min: float = option(0.1, "first rate of vp and subvp", above=0)
    beta_max: float = option(20.0, "last rate of vp and subvp", above=0)
    num_scales: int | None = option(
        None, "steps of the chain; none is 1000, or for ncsn as many as make neighbours overlap by half", at_least=2
    )
    n_steps_each: int = option(5, "Langevin steps at each level of ncsn", at_least=1)
    step_lr: float | None = option(
        None, "size of ncsn's steps at the last level; none keeps its variance best", above=0
    )
    network: Literal["adm", "ncsnpp", "transformer"] = option(
        "adm",
        "network of images: the U-Net of ADM, NCSN++ of diffusers (told sigma, divides by it), or a transformer on "
        "patches",
        group="network",
    )

    sampler: Literal["pc", "ode"] = option(
        "pc", "of the grids and of eval_metrics: predictor and corrector, or the flow", group="sampling", tied=None
    )
    score_num_inference_steps: int | None = option(
        None, "times that pc visits, or steps of ode; none is num_scales, or what ode needs", at_least=2, tied=None
    )
    guidance_scale: float = option(
        1.0, "classifier-free guidance of the grids and of eval_metrics; 1 is none", at_least=0, tied=None
    )

    def check(self) -> None:
        """ValueError for settings of different groups that contradict each other."""
        if self.discrete and self.process == "subvp":
            raise ValueError("discrete: the sub-VP equation has no discrete models; give another process")
        if self.discrete and self.likelihood_weighting:
            raise ValueError("likelihood_weighting is of continuous time; leave discrete out")
        if self.network == "ncsnpp" and self.class_conditional and self.guidance_scale != 1:
            raise ValueError("network ncsnpp has no null class to guide away from; give guidance_scale 1")

    def auto_settings(self, circumstances: Circumstances) -> dict[str, Choice]:
        """Grids along the probability flow where there is one: 1000 steps take a CPU minutes."""
        flow = {"sampler": "ode", "score_num_inference_steps": FLOW_STEPS}
        grids = {"grids": Choice(flow, "the probability flow needs few calls")}
        has_flow = circumstances.on_cpu and self.process != "ncsn"
        return super().auto_settings(circumstances) | (grids if has_flow else {})

    def papers(self) -> tuple[str, ...]:
        is_langevin = self.process == "ncsn"
        used = {
            "song2019generative": is_langevin,
            "song2020improved": self.process in ("ncsn", "ve") and self.sigma_max is None,
            "song2021score": not is_langevin or self.network == "ncsnpp",
            "song2019sliced": self.matching == "sliced",
            "song2021maximum": self.likelihood_weighting,
            "dhariwal2021diffusion": self.network == "adm" and self.dataset_name not in SHAPES,
            "li2025back": self.network == "transformer",
            "ho2022classifier": self.class_conditional and self.label_dropout > 0 and self.network != "ncsnpp",
        }
        return tuple(paper for paper, is_used in used.items() if is_used)

    def sampling_options(self) -> dict[str, Any]:
        guidance = {"guidance_scale": self.guidance_scale} if self.class_conditional else {}
        return {"sampler": self.sampler, "num_inference_steps": self.score_num_inference_steps, **guidance}


def build_scheduler(config: ScoreConfig, data: TrainingData) -> ScoreScheduler:
    """The process that the network is trained on, with what NCSNv2 takes from the data."""
    is_ncsnpp = config.network == "ncsnpp" and data.kind != "points"
    form = {"conditioning": "index" if config.discrete and config.process != "ncsn" else "time"}
    if is_ncsnpp:
        form = {"prediction_type": "score", "conditioning": "sigma", "scale_input": False}
    # All by name: diffusers' from_config takes what was given by place for a default, and drops it.
    if config.process in ("vp", "subvp"):
        cls = ScoreSdeVPScheduler if config.process == "vp" else ScoreSdeSubVPScheduler
        betas = {"beta_min": config.beta_min, "beta_max": config.beta_max}
        return cls(num_train_timesteps=config.num_scales or 1000, **betas, **form)
    sigma_max = config.sigma_max
    if sigma_max is None:
        if data.num_samples is None:
            raise ValueError("sigma_max follows from distances between samples, which a stream does not tell; give it")
        sigma_max = largest_distance(data.fetch(evenly_spaced(len(data), COMPARED_SAMPLES), epoch=0)["x_0"])
    if config.process == "ve":
        # the norms of two numbers are no measure of a step
        form |= {"corrector": "annealed"} if data.kind == "points" else {}
        sigmas = {"sigma_min": config.sigma_min, "sigma_max": sigma_max}
        return ScoreSdeVEScheduler(num_train_timesteps=config.num_scales or 1000, **sigmas, **form)
    dims = torch.Size(data.sample_shape).numel()
    levels = config.num_scales or level_count(dims, sigma_max, config.sigma_min)
    size = config.step_lr or langevin_step_size(sigma_max, config.sigma_min, levels, config.n_steps_each)
    form |= {"num_levels": levels, "sigma_begin": sigma_max, "sigma_end": config.sigma_min}
    return AnnealedLangevinScheduler(step_lr=size, n_steps_each=config.n_steps_each, **form)


def build_network(config: ScoreConfig, data: TrainingData) -> nn.Module:
    """A network for the shape and the classes of the data."""
    channels = data.sample_shape[0]
    if config.network != "ncsnpp" or data.kind == "points":
        return new_denoiser(config, data, channels)
    shape = config.unet_shape(data.sample_shape)
    torch.manual_seed(config.seed)
    # diffusers' blocks with a pyramid of images beside them know images of three channels only
    levels, skip = len(shape["channel_mult"]), "Skip" if channels == 3 else ""
    widths = tuple(int(config.model_channels * width) for width in shape["channel_mult"])
    if any(width % 32 for width in widths):
        raise ValueError(
            f"network ncsnpp normalises in 32 groups, but its levels are {widths} channels wide; give a "
            "model_channels that makes them multiples of 32"
        )
    return UNet2DModel(
        sample_size=shape["sample_size"],
        in_channels=channels,
        out_channels=channels,
        time_embedding_type="fourier",
        block_out_channels=widths,
        layers_per_block=config.num_res_blocks,
        down_block_types=(f"{skip}DownBlock2D",) * (levels - 1) + (f"Attn{skip}DownBlock2D",),
        up_block_types=(f"Attn{skip}UpBlock2D",) + (f"{skip}UpBlock2D",) * (levels - 1),
        attention_head_dim=config.num_head_channels,
        mid_block_scale_factor=2**0.5,
        norm_num_groups=config.norm_num_groups,
        norm_eps=1e-6,
        dropout=config.dropout,
        num_class_embeds=config.num_class_embeds(data),
    )


def build(config: ScoreConfig, accelerator: Accelerator, data: TrainingData) -> Trainer:
    """The trainer of a network, which users get with a scheduler and the names of the classes."""
    scheduler, network = build_scheduler(config, data), started_from(config, data, build_network(config, data))
    objective = ScoreObjective(scheduler, network, config, config.learning_rate)
    names = dict(enumerate(data.class_names)) if config.class_conditional else None

    def pipeline(network: nn.Module) -> ScoreSdePipeline:
        # a scheduler of its own: sampling chooses times
        return ScoreSdePipeline(network, type(scheduler).from_config(scheduler.config), names)

    return generative_trainer(config, accelerator, objective, data, pipeline, **config.sampling_options())


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says; returns the exit status."""
    return run(ScoreConfig, build, argv, prog="train_score.py")


if __name__ == "__main__":
    sys.exit(main())
