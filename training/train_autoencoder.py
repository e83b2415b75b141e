"""Train an autoencoder on your own images, for diffusion in the space of its latents.

    accelerate launch training/train_autoencoder.py --config digits_autoencoder.yaml
    accelerate launch training/train_autoencoder.py --train_data_dir my_images --resolution 128

It leaves an `AutoencoderKL` of diffusers, or a `VQModel` with `--quantised`. Its latents' mean and
standard deviation are measured on the training images and stored in its config. A diffusion model
of the latents is trained by `--vae runs/autoencoder` of train_ddpm.py, train_flow.py and
train_edm.py.

Settings come from `--config` files, then from flags; `--help` lists them and `--dry_run` shows what
a run would do.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, VQModel
from diffusers.utils import CONFIG_NAME
from PIL import Image
from torch import nn

from hf_diffusion.config.options import option
from hf_diffusion.config.run_options import TrainingConfig
from hf_diffusion.config.shared_options import DataOptions
from hf_diffusion.data.protocol import TrainingData
from hf_diffusion.data.splits import load_unaugmented
from hf_diffusion.data.waiting import main_first
from hf_diffusion.evaluation.perceptual import perceptual_distance
from hf_diffusion.evaluation.reconstruction import ReconstructionEvaluator, measured_latents, reconstruction_grid
from hf_diffusion.files import write_folder
from hf_diffusion.loop.fine_tuning import started_from
from hf_diffusion.loop.generative import check_best_metric
from hf_diffusion.loop.start import run
from hf_diffusion.loop.trainer import Trainer
from hf_diffusion.losses.autoencoding import LatentStatistics
from hf_diffusion.losses.autoencoding_game import AutoencodingGame, AutoencodingOptions, Reconstructor
from hf_diffusion.models.discriminator_patch import PatchDiscriminator, halvings_for


@dataclass(kw_only=True)
class AutoencoderConfig(AutoencodingOptions, TrainingConfig, DataOptions):
    """Train an autoencoder of images, whose latents a diffusion model can be trained on."""

    method: ClassVar[str] = "autoencoder"
    kind: ClassVar[str] = "autoencoder"
    tags: ClassVar[tuple[str, ...]] = ("autoencoder",)
    grids: ClassVar[str] = "Images, each above its reconstruction"
    usage_template: ClassVar[str | None] = "use_autoencoder.md"

    model_channels: int = option(64, "width of the first level", at_least=1, group="network")
    channel_mult: tuple[int, ...] | None = option(
        None,
        "width of each level in units of model_channels; each level but the last halves the image; none goes by the "
        "size",
        at_least=1,
    )
    num_res_blocks: int = option(2, "residual blocks a level of the encoder; the decoder has one more", at_least=1)
    latent_channels: int = option(4, "channels of the latents", at_least=1)
    norm_num_groups: int = option(32, "groups of the group norms; must divide every width", at_least=1)
    mid_attention: bool = option(True, "attention over the smallest maps")
    num_codes: int = option(512, "codes of a quantised autoencoder", at_least=2)

    perceptual: str = option(
        "auto",
        "network whose features tell images from reconstructions: trained (a small classifier of the data), lpips, a "
        "file or folder of a classifier, or none; auto is trained where the data have classes",
        group="perceptual distance",
        is_path=True,
    )
    critic_channels: int = option(64, "width of the critic's first level, a multiple of 8", at_least=8, group="critic")
    critic_learning_rate: float | None = option(
        None, "highest learning rate of the critic; none takes learning_rate", above=0, tied=False
    )

    # Both conventions of diffusers: SDXL's pipelines read the lists, Stable Diffusion's the number.
    latent_scaling: Literal["per_channel", "scalar"] = option(
        "per_channel",
        "what the config gets to bring latents to mean 0 and deviation 1: latents_mean and latents_std, or "
        "scaling_factor and shift_factor",
        group="latents",
        tied=None,
    )
    scaling_images: int = option(
        10_000, "training images that latents are measured on at the end", at_least=2, tied=None
    )

    eval_metrics: tuple[Literal["psnr", "rfd"], ...] = option(
        ("psnr",),
        "measures of reconstructions at every eval_steps: signal-to-noise ratio, Frechet distance from the training "
        "data beside that of the originals",
        group="evaluation",
        tied=None,
    )
    eval_num_images: int = option(1000, "images that are given back for eval_metrics", at_least=2, tied=None)
    eval_features: str = option("auto", "network for rfd, as in hf-diffusion evaluate", is_path=True, tied=None)
    eval_batch_size: int = option(64, "images that a process measures at a time", at_least=1, tied=None)
    eval_split: str | None = option(
        None, "split whose images are given back, such as train[90%:] or test; none takes the training's", tied=None
    )

    # The values of the reference's code, where these differ from training one network.
    adam_beta1: float = option(0.5, "decay of AdamW's mean of the gradients", at_least=0, below=1)
    adam_beta2: float = option(0.9, "decay of AdamW's mean of the squared gradients", at_least=0, below=1)

    def check(self) -> None:
        """ValueError for settings that contradict each other."""
        if self.critic_channels % 8:
            raise ValueError(f"critic_channels {self.critic_channels} is no multiple of 8, the groups of its norms")
        if self.streaming and "rfd" in self.eval_metrics:
            raise ValueError("rfd compares with all training images, which a stream does not hold; leave one out")
        if self.quantised and self.gradient_checkpointing:
            raise ValueError("gradient_checkpointing is not in diffusers' VQModel; leave it out, or quantised")

    def preset_settings(self, sample_shape: tuple[int, ...]) -> dict[str, Any]:
        width, blocks = (16, 1) if self.preset == "fast" else (64, 2)
        groups = min(32, width)
        own = {"model_channels": width, "num_res_blocks": blocks, "norm_num_groups": groups, "critic_channels": width}
        return {**super().preset_settings(sample_shape), **own}

    def papers(self) -> tuple[str, ...]:
        used = {
            "rombach2022high": True,
            "kingma2014auto": not self.quantised,
            "oord2017neural": self.quantised,
            "esser2021taming": self.adversarial_weight > 0,
            "isola2017image": self.adversarial_weight > 0,
            "zhang2018unreasonable": self.perceptual != "none",
        }
        return tuple(paper for paper, is_used in used.items() if is_used)


def multipliers_for(side: int) -> tuple[int, ...]:
    """Width multipliers for images of so many pixels a side.

    Latents of 4 to 8 positions a side for small images, of 16 to 32 for others.
    """
    wanted = next(m for smallest, m in ((160, (1, 2, 4, 4)), (20, (1, 2, 4)), (1, (1, 2))) if side >= smallest)
    return wanted


def build_autoencoder(config: AutoencoderConfig, data: TrainingData) -> AutoencoderKL | VQModel:
    """An autoencoder for images of the data's shape; ValueError for sides that cannot be halved."""
    channels, *size = data.sample_shape
    multipliers = config.channel_mult or multipliers_for(min(size))
    factor, levels = 2 ** (len(multipliers) - 1), len(multipliers)
    if any(side % factor for side in size):
        raise ValueError(
            f"images of {size[0]}x{size[1]} pixels cannot be halved {levels - 1} times; give a --resolution whose "
            f"sides are multiples of {factor}, or fewer levels by --channel_mult"
        )
    widths = tuple(config.model_channels * multiplier for multiplier in multipliers)
    if any(width % config.norm_num_groups for width in widths):
        raise ValueError(
            f"norm_num_groups {config.norm_num_groups} does not divide the widths {list(widths)}; give one that does"
        )
    shape = {
        "in_channels": channels,
        "out_channels": channels,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": widths,
        "layers_per_block": config.num_res_blocks,
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.norm_num_groups,
        "mid_block_add_attention": config.mid_attention,
        "sample_size": min(size),
        "scaling_factor": 1.0,
    }
    torch.manual_seed(config.seed)
    if config.quantised:
        return VQModel(**shape, num_vq_embeddings=config.num_codes)
    # float16 holds what small networks compute; large ones are known to overflow.
    return AutoencoderKL(**shape, force_upcast=True)


def start_network(config: AutoencoderConfig, data: TrainingData) -> AutoencoderKL | VQModel:
    """A new autoencoder, or that of `init_from`, which checkpoints hold in a `Reconstructor`."""
    return started_from(config, data, build_autoencoder(config, data), wrapper=(Reconstructor, "autoencoder"))


def build_critic(config: AutoencoderConfig, data: TrainingData) -> PatchDiscriminator | None:
    """A critic of images of the data's shape, where one has a weight."""
    if not config.adversarial_weight:
        return None
    channels, *size = data.sample_shape
    torch.manual_seed(config.seed + 1)
    return PatchDiscriminator(channels, config.critic_channels, halvings_for(min(size)))


def scaling(found: LatentStatistics, kind: str, quantised: bool) -> dict[str, Any]:
    """The entries of a config that bring latents of these statistics to mean 0 and deviation 1."""
    if quantised:
        # A VQModel's config holds nothing else.
        return {"scaling_factor": 1 / found.std}
    if kind == "scalar":
        return {"scaling_factor": 1 / found.std, "shift_factor": found.mean}
    return {"scaling_factor": 1.0, "latents_mean": list(found.channel_means), "latents_std": list(found.channel_stds)}


def build(config: AutoencoderConfig, accelerator: Accelerator, data: TrainingData) -> Trainer:
    """The trainer of an autoencoder and its critic; users get the autoencoder."""
    if data.kind != "images":
        raise ValueError(f"{data.name} holds {data.kind}, and this autoencoder is one of images; give images")
    autoencoder = start_network(config, data)
    reconstructor = Reconstructor(autoencoder, config.learned_logvar, config.commitment)
    evaluators, originals = build_evaluators(config, accelerator, data)
    check_best_metric(config, evaluators)
    distance, described = None, "no perceptual distance"
    if config.perceptual_weight:
        distance, described = perceptual_distance(config.perceptual, data)
    accelerator.print(f"reconstructions are compared by |x - r| and {described}")
    distance = None if distance is None else distance.to(accelerator.device)
    rates = config.learning_rate, config.critic_learning_rate or config.learning_rate
    schedule = config.critic_schedule(config.total_steps(data.num_samples, accelerator.num_processes))
    critic = build_critic(config, data)
    game = AutoencodingGame(reconstructor, critic, config, rates, schedule, accelerator, distance)

    def export(network: Reconstructor, folder: Path) -> None:
        found = measured_latents(network, data, config.scaling_images, config.eval_batch_size)
        network.autoencoder.register_to_config(**scaling(found, config.latent_scaling, config.quantised))
        write_folder(folder, network.autoencoder.save_pretrained, last=CONFIG_NAME)

    def preview(network: nn.Module) -> Image.Image:
        return reconstruction_grid(network, originals, max(2, config.num_sample_images // 2))

    return Trainer(config, accelerator, game, data, export, preview, evaluators)


def build_evaluators(
    config: AutoencoderConfig, accelerator: Accelerator, data: TrainingData
) -> tuple[list[ReconstructionEvaluator], TrainingData]:
    """What is measured, and the images that are given back: held out, where a split is named."""
    plain = originals = data
    with main_first(accelerator):
        if config.random_flip or not config.center_crop:
            plain = originals = load_unaugmented(config.data_arguments(), data)
        if config.eval_split is not None:
            originals = load_unaugmented(config.data_arguments(), data, config.eval_split)
    if not config.eval_metrics:
        return [], originals
    options = {name: getattr(config, f"eval_{name}") for name in ("features", "batch_size")}
    evaluator = ReconstructionEvaluator(
        accelerator, config.eval_metrics, originals, plain, count=config.eval_num_images, **options
    )
    if not config.dry_run:
        # now, since nothing between two steps should take that long
        evaluator.prepare()
    return [evaluator], originals


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says; returns the exit status."""
    return run(AutoencoderConfig, build, argv, prog="train_autoencoder.py")


if __name__ == "__main__":
    sys.exit(main())
