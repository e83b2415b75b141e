"""Train a denoising diffusion GAN on your own images (arXiv:2112.07804).

    accelerate launch training/train_ddgan.py --config training/recipes/digits_ddgan.yaml
    accelerate launch training/train_ddgan.py --train_data_dir my_images --resolution 64

Settings come from `--config` files, then from flags; `--help` lists them and `--dry_run` shows what
a run would do.

`--init_from runs/my_ddpm` takes the U-Net of a trained DDPM as generator (`ADMGenerator`): it knows
how to denoise, and the game only has to teach it steps that are large. That is by far the shortest
way to a good few-step model; give the discriminator a head start (`--discriminator_warmup_steps
200`) and the generator a low `--learning_rate`, as recipes/fashion_mnist_ddgan_cpu.yaml does.

The divergence between q(x_t | x_{t+1}) and the generator's distribution is a flag. What else
depends on it, by default:

| divergence      | generator's loss | r1_gamma | note                                             |
|-----------------|------------------|----------|--------------------------------------------------|
| js              | -log sigmoid(V)  | 0.05     | the one of the paper; trains without R1, too     |
| hellinger       | 1 - exp(V)       | 0.05     | exp goes on as its tangent from |V| = 10         |
| reverse_kl      | 1 - V            | 0.05     | as above                                         |
| total_variation | -tanh(V) / 2     | 0.5      | a weaker R1 lets |V| grow until tanh is flat     |
| wasserstein     | -V               | 1        | R1 converges; WGAN-GP, spectral norm circle      |

These were found with points in the plane (tests/training/test_divergences_in_the_plane.py). In
metrics.jsonl watch `right`, the share of pairs in which the real one has the larger value, and
real_t*, fake_t*: where they agree at the noisy timesteps from early on, the discriminator has
fallen behind, which no warning can tell from success. A lower learning_rate for the generator,
n_critic 2 or a wider discriminator bring it back (digits: with 1e-3 for both it fell behind within
400 steps). Small images have little signal in x_2 and later of the default schedule; a lower
beta_max, or the geometric schedule, gives the discriminator something to see there.
"""

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from accelerate import Accelerator
from torch import nn

from hf_diffusion.config.options import option
from hf_diffusion.config.run_options import TrainingConfig
from hf_diffusion.config.shared_options import ClassOptions, DataOptions, MeasureOptions
from hf_diffusion.data.points import SHAPES
from hf_diffusion.data.protocol import TrainingData
from hf_diffusion.loop.generative import generative_trainer
from hf_diffusion.loop.init_from import trained_generator
from hf_diffusion.loop.start import run
from hf_diffusion.loop.trainer import Trainer
from hf_diffusion.losses.adversarial import normalise_spectrally
from hf_diffusion.losses.adversarial_game import AdversarialGame, AdversarialOptions
from hf_diffusion.losses.denoiser_critic import DenoiserCritic
from hf_diffusion.models.mlp_points import PointDiscriminator, PointGenerator
from hf_diffusion.models.ncsnpp_ddgan import DDGANDiscriminator, DDGANGenerator
from hf_diffusion.models.unet_adm import ADMGenerator
from hf_diffusion.pipelines.pipeline_ddgan import DDGANPipeline
from hf_diffusion.schedulers.scheduling_ddgan import DDGANScheduler


STDDEV_GROUP = 4  # consecutive images whose deviation the discriminator sees


@dataclass(kw_only=True)
class DDGANConfig(MeasureOptions, AdversarialOptions, ClassOptions, TrainingConfig, DataOptions):
    """Train a denoising diffusion GAN on images, with or without classes."""

    method: ClassVar[str] = "ddgan"
    kind: ClassVar[str] = "denoising diffusion GAN"
    tags: ClassVar[tuple[str, ...]] = ("ddgan",)

    num_timesteps: int = option(4, "steps of the process and of sampling, T", group="method", at_least=1, at_most=16)
    schedule: Literal["vp", "geometric"] = option("vp", "noise schedule")
    beta_min: float = option(0.1, "first rate of vp; first variance of geometric, such as 0.01", above=0)
    beta_max: float = option(20.0, "last rate of vp; last variance of geometric, such as 0.99", above=0)

    model_channels: int = option(64, "width of the generator's first level", group="generator", at_least=4)
    channel_mult: tuple[int, ...] | None = option(
        None, "width of each level in units of model_channels; none goes by the size", at_least=1
    )
    num_res_blocks: int = option(2, "residual blocks a level", at_least=1)
    attention_sizes: tuple[int, ...] | None = option(
        None, "heights of the feature maps with attention; none takes 16, or the lowest level", at_least=1
    )
    latent_dim: int = option(64, "width of the latent, the randomness of a step", at_least=1)
    latent_embed_dim: int = option(128, "width of the latent's mapping", at_least=1)
    num_latent_layers: int = option(3, "layers of the latent's mapping", at_least=0)
    dropout: float = option(0.0, "dropout in the residual blocks", at_least=0, below=1)
    # 2x2 pixels become channels at the network's two ends: a quarter of the positions, several
    # times the speed.
    patch_size: int = option(1, "side of the pixel patches that the generator works on", at_least=1)

    discriminator: Literal["auto", "small", "large", "denoiser"] = option(
        "auto",
        "small halves the image three times, large six times; auto takes large from 128 pixels on; denoiser puts "
        "heads on the features of the network that init_from names, which stay as they are",
        group="discriminator",
    )
    discriminator_channels: int = option(64, "width of the discriminator", at_least=1)
    time_embed_dim: int = option(128, "width of its time embedding", at_least=4)
    discriminator_patch_size: int | None = option(
        None, "side of the pixel patches that the discriminator works on; none takes patch_size", at_least=1
    )
    spectral_norm: bool = option(False, "divide the discriminator's weights by their spectral norms")
    discriminator_learning_rate: float | None = option(
        None, "highest learning rate of the discriminator; none takes learning_rate", above=0, tied=False
    )

    init_from: str | None = option(
        None,
        "start from the generator of this DDGAN pipeline or checkpoint, or from the U-Net of this DDPM pipeline, a "
        "folder or Hub id: its shape then replaces the options of the generator but latent_dim",
        is_path=True,
        tied=False,
        often=True,
    )
    # Where these differ from training one network: the values of the paper's code.
    learning_rate: float = option(1.6e-4, "highest learning rate of the generator", above=0)
    adam_beta1: float = option(0.5, "decay of AdamW's mean of the gradients", at_least=0, below=1)
    adam_beta2: float = option(0.9, "decay of AdamW's mean of the squared gradients", at_least=0, below=1)
    max_grad_norm: float | None = option(None, "norm to which gradients are clipped; none does not clip", above=0)

    def check(self) -> None:
        """ValueError for settings of the two networks that contradict each other."""
        if self.train_batch_size % STDDEV_GROUP:
            raise ValueError(
                f"train_batch_size {self.train_batch_size} is no multiple of {STDDEV_GROUP}, the images that the "
                "discriminator compares with each other; give one"
            )
        if self.discriminator == "denoiser" and self.init_from is None:
            raise ValueError(
                "discriminator denoiser looks by a trained denoiser; name it by --init_from, or choose small or large"
            )
        if self.discriminator == "denoiser" and self.spectral_norm:
            raise ValueError("spectral_norm is for the discriminators small and large; leave it out")
        if self.gradient_checkpointing and (self.gamma > 0 or self.wgan_gp > 0):
            raise ValueError(
                "gradient_checkpointing and a penalty on the discriminator's gradient exclude each other; leave the "
                "former out, or set r1_gamma 0 and wgan_gp 0"
            )

    def generator_shape(self, sample_shape: tuple[int, ...]) -> dict[str, Any]:
        """The arguments of a DDGANGenerator for images of a shape (C, H, W)."""
        channels, height, width = sample_shape
        channel_mult = self.channel_mult or levels_for(min(height, width) // self.patch_size)
        heights = [height // self.patch_size // 2**level for level in range(len(channel_mult))]
        attention = (16,) if 16 in heights else (heights[-1],)
        return {
            "sample_size": (height, width),
            "in_channels": channels,
            "model_channels": self.model_channels,
            "channel_mult": channel_mult,
            "num_res_blocks": self.num_res_blocks,
            "attention_sizes": attention if self.attention_sizes is None else self.attention_sizes,
            "latent_dim": self.latent_dim,
            "latent_embed_dim": self.latent_embed_dim,
            "num_latent_layers": self.num_latent_layers,
            "dropout": self.dropout,
            "patch_size": self.patch_size,
        }

    def papers(self) -> tuple[str, ...]:
        used = {
            "xiao2022tackling": True,
            # NCSN++, the generator of images.
            "song2021score": self.dataset_name not in SHAPES,
            "nowozin2016fgan": self.divergence in ("hellinger", "reverse_kl", "total_variation"),
            "arjovsky2017wasserstein": self.divergence == "wasserstein",
            "sauer2021projected": self.discriminator == "denoiser",
            "mescheder2018which": self.r1_gamma != 0,
            "gulrajani2017improved": self.wgan_gp > 0,
            "miyato2018spectral": self.spectral_norm,
        }
        return tuple(paper for paper, is_used in used.items() if is_used)


def levels_for(side: int) -> tuple[int, ...]:
    """Width multipliers for maps of so many positions a side, of levels that halve exactly.

    Those of the paper at 32 and 256.
    """
    wanted = next(
        multipliers
        for smallest, multipliers in (
            (192, (1, 1, 2, 2, 4, 4)),
            (96, (1, 1, 2, 2, 4)),
            (32, (1, 2, 2, 2)),
            (14, (1, 2, 2)),
            (1, (1, 2)),
        )
        if side >= smallest
    )
    halvings = next((n for n in range(len(wanted) - 1, 0, -1) if side % 2**n == 0), 0)
    return wanted[: halvings + 1]


def build_scheduler(config: DDGANConfig) -> DDGANScheduler:
    """The process of training and sampling."""
    return DDGANScheduler(config.num_timesteps, config.beta_min, config.beta_max, config.schedule)


def build_generator(config: DDGANConfig, data: TrainingData) -> nn.Module:
    """A generator for the shape and the classes of the data, or the trained one that `init_from`
    names.
    """
    classes = config.num_class_embeds(data)
    if config.init_from is not None:
        return trained_generator(config, data, build_scheduler(config))
    torch.manual_seed(config.seed)
    if data.kind == "points":
        return PointGenerator(
            in_channels=data.sample_shape[0],
            model_channels=config.model_channels,
            num_res_blocks=config.num_res_blocks,
            latent_dim=config.latent_dim,
            dropout=config.dropout,
            num_class_embeds=classes,
        )
    return DDGANGenerator(**config.generator_shape(data.sample_shape), num_class_embeds=classes)


def build_discriminator(config: DDGANConfig, data: TrainingData) -> nn.Module:
    """A discriminator for the shape and the classes of the data.

    Its groups are such that any number of processes shares them alike.
    """
    classes, (channels, *size) = config.num_class_embeds(data), data.sample_shape
    torch.manual_seed(config.seed + 1)
    if data.kind == "points":
        discriminator = PointDiscriminator(
            in_channels=channels, model_channels=config.discriminator_channels, num_class_embeds=classes
        )
    else:
        by_size = "large" if min(size) >= 128 else "small"
        discriminator = DDGANDiscriminator(
            sample_size=tuple(size),
            in_channels=channels,
            base_channels=config.discriminator_channels,
            time_embed_dim=config.time_embed_dim,
            variant=by_size if config.discriminator == "auto" else config.discriminator,
            stddev_group_size=STDDEV_GROUP,
            stddev_contiguous_groups=True,
            num_class_embeds=classes,
            patch_size=config.discriminator_patch_size or config.patch_size,
        )
    return normalise_spectrally(discriminator) if config.spectral_norm else discriminator


def critic_by_features(config: DDGANConfig, generator: nn.Module) -> DenoiserCritic:
    """Heads on the features of the generator as `init_from` has it; ValueError for one that is no
    denoiser.
    """
    if not isinstance(generator, ADMGenerator):
        raise ValueError(
            f"discriminator denoiser needs the U-Net of a DDPM, and init_from {config.init_from} has a "
            f"{type(generator).__name__}; choose small or large"
        )
    torch.manual_seed(config.seed + 1)
    timesteps = (0.0, *generator.config.timesteps)
    return DenoiserCritic(copy.deepcopy(generator), timesteps, config.discriminator_channels)


def build(config: DDGANConfig, accelerator: Accelerator, data: TrainingData) -> Trainer:
    """The trainer of both networks.

    Users get the generator with its scheduler and the names of the classes.
    """
    generator = build_generator(config, data)
    by_features = config.discriminator == "denoiser"
    discriminator = critic_by_features(config, generator) if by_features else build_discriminator(config, data)
    rates = (config.learning_rate, config.discriminator_learning_rate or config.learning_rate)
    game = AdversarialGame(build_scheduler(config), generator, discriminator, config, rates)
    names = dict(enumerate(data.class_names)) if config.class_conditional else None

    def pipeline(network: nn.Module) -> DDGANPipeline:
        return DDGANPipeline(network, build_scheduler(config), names)

    return generative_trainer(config, accelerator, game, data, pipeline)


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says; returns the exit status."""
    return run(DDGANConfig, build, argv, prog="train_ddgan.py")


if __name__ == "__main__":
    sys.exit(main())
