"""Train a denoising diffusion GAN, which samples in a handful of steps, on your own images (arXiv:2112.07804).

    accelerate launch training/train_ddgan.py --config training/recipes/digits_ddgan.yaml
    accelerate launch training/train_ddgan.py --train_data_dir my_images --resolution 64 --output_dir runs/mine

Settings come from `--config` files, then from flags; `--help` lists them and `--dry_run` shows what a run would do.

`--init_from runs/my_ddpm` takes the U-Net of a trained DDPM as generator (`ADMGenerator`): it knows how to denoise, and the
game only has to teach it steps that are large. That is by far the shortest way to a good few-step model; give the
discriminator a head start (`--discriminator_warmup_steps 200`) and the generator a low `--learning_rate`, as
recipes/fashion_mnist_ddgan_cpu.yaml does.

The divergence between q(x_t | x_{t+1}) and the generator's distribution is a flag. What else depends on it, by default:

| divergence      | generator's loss | r1_gamma | note                                                             |
|-----------------|------------------|----------|------------------------------------------------------------------|
| js              | -log sigmoid(V)  | 0.05     | the one of the paper; trains without R1, too                     |
| hellinger       | 1 - exp(V)       | 0.05     | exp is continued by its tangent from |V| = 10                    |
| reverse_kl      | 1 - V            | 0.05     | as above                                                         |
| total_variation | -tanh(V) / 2     | 0.5      | a weaker R1 lets |V| grow until tanh is flat                     |
| wasserstein     | -V               | 1        | R1 converges; WGAN-GP and spectral norm circle round the optimum |

These were found with points in the plane (tests/training/test_ddgan_2d.py). In metrics.jsonl watch `right`, the share
of pairs in which the real one has the larger value, and real_t*, fake_t*: where they agree at the noisy timesteps from
early on, the discriminator has fallen behind, which no warning can tell from success. A lower learning_rate for the
generator, n_critic 2 or a wider discriminator bring it back (digits: with 1e-3 for both it fell behind within 400
steps). Small images have little signal in x_2 and later of the default schedule; a lower beta_max, or the geometric
schedule, gives the discriminator something to see there.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn

from hf_diffusion.config.training import GenerativeTrainingConfig, option, parse_config
from hf_diffusion.data.images import ImageData
from hf_diffusion.ddgan_trainer import R1_GAMMA, AdversarialObjective, DDGANTrainer
from hf_diffusion.dry_run import dry_run
from hf_diffusion.figures import labelled_grid
from hf_diffusion.hub.loading import load_pipeline
from hf_diffusion.losses.adversarial import normalise_spectrally
from hf_diffusion.models.ncsnpp_ddgan import DDGANDiscriminator, DDGANGenerator
from hf_diffusion.models.unet_adm import ADMGenerator, ADMUNet2DModel
from hf_diffusion.pipelines.pipeline_ddgan import DDGANPipeline
from hf_diffusion.run import (
    check_best_metric,
    load_training_data,
    one_sentence_errors,
    sample_measures,
    start_run,
    train_and_share,
)
from hf_diffusion.schedulers.scheduling_ddgan import DDGANScheduler
from hf_diffusion.timestep_sampling import stratified_timesteps, uniform_timesteps


PROG = "train_ddgan.py"
SAMPLERS = {"uniform": uniform_timesteps, "stratified": stratified_timesteps}
SATURATING = {"default": None, "minmax": True, "non_saturating": False}
STDDEV_GROUP = 4  # consecutive images whose deviation the discriminator sees


@dataclass(kw_only=True)
class DDGANConfig(GenerativeTrainingConfig):
    """Train a denoising diffusion GAN on images, with or without classes."""

    class_conditional: bool = option(
        False, "learn the classes of the data, so that samples can be asked for by class", group="method"
    )
    num_timesteps: int = option(4, "steps of the process and of sampling, T", at_least=1, at_most=16)
    divergence: Literal["js", "hellinger", "reverse_kl", "total_variation", "wasserstein"] = option(
        "js", "divergence that the generator minimises"
    )
    generator_objective: Literal["default", "minmax", "non_saturating"] = option(
        "default", "the generator's side of the game; default is non_saturating for js and minmax for the others"
    )
    # R1 sums over pixels, so a good gamma grows with neither size nor batch by any rule; the defaults are a start.
    r1_gamma: float | None = option(
        None,
        "weight of R1, the squared gradient of the discriminator at real images; none goes by the divergence",
        at_least=0,
        tied=False,
    )
    r1_interval: int = option(1, "apply R1 at every so many steps", at_least=1, tied=False)
    # The paper's code does not multiply; without it a longer interval is a weaker penalty.
    r1_times_interval: bool = option(
        True, "multiply r1_gamma by the interval, so that the mean penalty stays the same"
    )
    wgan_gp: float = option(
        0.0, "weight of WGAN-GP, a gradient of norm 1 between real and generated; 0 is none", at_least=0
    )
    spectral_norm: bool = option(False, "divide the discriminator's weights by their spectral norms")
    # A generator that is good already must not follow a discriminator that knows nothing yet.
    discriminator_warmup_steps: int = option(
        0, "first steps, in which the discriminator alone is updated", at_least=0, tied=False
    )
    n_critic: int = option(
        1, "update the generator at every so many steps; every step updates the discriminator", at_least=1, tied=False
    )
    l1_weight: float = option(0.0, "weight of the distance |prediction - x_0| in the generator's loss", at_least=0)
    schedule: Literal["vp", "geometric"] = option("vp", "noise schedule")
    beta_min: float = option(0.1, "first rate of vp; first variance of geometric, such as 0.01", above=0)
    beta_max: float = option(20.0, "last rate of vp; last variance of geometric, such as 0.99", above=0)
    timestep_sampling: Literal["uniform", "stratified"] = option(
        "uniform", "how a batch's timesteps are drawn; the paper's code draws them uniformly"
    )

    init_from: str | None = option(
        None,
        "start from the generator of this DDGAN pipeline, or from the U-Net of this DDPM pipeline, a folder or Hub id: its shape then "
        "replaces the options of the generator but latent_dim",
        group="generator",
        tied=False,
    )
    model_channels: int = option(64, "width of the generator's first level", at_least=4)
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
    # 2x2 pixels become channels at the network's two ends: a quarter of the positions, several times the speed.
    patch_size: int = option(1, "side of the pixel patches that the generator works on", at_least=1)

    discriminator: Literal["auto", "small", "large"] = option(
        "auto",
        "small halves the image three times, large six times; auto takes large from 128 pixels on",
        group="discriminator",
    )
    discriminator_channels: int = option(64, "width of the discriminator", at_least=1)
    time_embed_dim: int = option(128, "width of its time embedding", at_least=4)
    discriminator_patch_size: int | None = option(
        None, "side of the pixel patches that the discriminator works on; none takes patch_size", at_least=1
    )
    discriminator_full_precision: bool = option(
        False, "compute the discriminator in float32, whatever mixed_precision says of the generator", tied=False
    )
    discriminator_learning_rate: float | None = option(
        None, "highest learning rate of the discriminator; none takes learning_rate", above=0, tied=False
    )

    # Where these differ from training one network: the values of the paper's code.
    learning_rate: float = option(1.6e-4, "highest learning rate of the generator", above=0)
    adam_beta1: float = option(0.5, "decay of AdamW's mean of the gradients", at_least=0, below=1)
    adam_beta2: float = option(0.9, "decay of AdamW's mean of the squared gradients", at_least=0, below=1)
    max_grad_norm: float | None = option(None, "norm to which gradients are clipped; none does not clip", above=0)

    def validate(self) -> None:
        super().validate()
        if self.train_batch_size % STDDEV_GROUP:
            raise ValueError(
                f"train_batch_size {self.train_batch_size} is no multiple of {STDDEV_GROUP}, the images that the discriminator "
                "compares with each other; give one"
            )
        if self.gradient_checkpointing and (self.gamma > 0 or self.wgan_gp > 0):
            raise ValueError(
                "gradient_checkpointing and a penalty on the discriminator's gradient exclude each other; leave the former out, "
                "or set r1_gamma 0 and wgan_gp 0"
            )

    @property
    def gamma(self) -> float:
        """The weight of R1 that is used."""
        return R1_GAMMA[self.divergence] if self.r1_gamma is None else self.r1_gamma

    def objective(self) -> AdversarialObjective:
        """What the two networks play for."""
        return AdversarialObjective(
            divergence=self.divergence,
            saturating=SATURATING[self.generator_objective],
            r1_gamma=self.gamma,
            r1_interval=self.r1_interval,
            r1_times_interval=self.r1_times_interval,
            wgan_gp=self.wgan_gp,
            l1_weight=self.l1_weight,
            n_critic=self.n_critic,
            warmup_steps=self.discriminator_warmup_steps,
            full_precision=self.discriminator_full_precision,
        )


def build_scheduler(config: DDGANConfig) -> DDGANScheduler:
    """The process of training and sampling."""
    return DDGANScheduler(config.num_timesteps, config.beta_min, config.beta_max, config.schedule)


def build_generator(config: DDGANConfig, data: ImageData) -> DDGANGenerator | ADMGenerator:
    """A generator for the size, channels and classes of the data."""
    if config.class_conditional and not data.num_classes:
        raise ValueError(
            f"class_conditional is set, but {data.name} has no labels; leave it out, or name the column by --label_column"
        )
    if config.init_from is not None:
        return trained_generator(config, data)
    channel_mult = config.channel_mult or levels_for(min(data.size) // config.patch_size)
    heights = [data.size[0] // config.patch_size // 2**level for level in range(len(channel_mult))]
    torch.manual_seed(config.seed)
    return DDGANGenerator(
        sample_size=data.size,
        in_channels=data.channels,
        model_channels=config.model_channels,
        channel_mult=channel_mult,
        num_res_blocks=config.num_res_blocks,
        attention_sizes=((16,) if 16 in heights else (heights[-1],))
        if config.attention_sizes is None
        else config.attention_sizes,
        latent_dim=config.latent_dim,
        latent_embed_dim=config.latent_embed_dim,
        num_latent_layers=config.num_latent_layers,
        dropout=config.dropout,
        num_class_embeds=data.num_classes if config.class_conditional else None,
        patch_size=config.patch_size,
    )


def trained_generator(config: DDGANConfig, data: ImageData) -> DDGANGenerator | ADMGenerator:
    """The generator to start from that `init_from` names; ValueError where it does not fit the data or the process."""
    pipe, process = load_pipeline(config.init_from), build_scheduler(config)
    torch.manual_seed(config.seed)  # of the latent's embedding, which is new
    if isinstance(pipe, DDGANPipeline):
        wanted = {name: value for name, value in process.config.items() if not name.startswith("_")}
        differing = [name for name, value in wanted.items() if pipe.scheduler.config.get(name) != value]
        if differing:
            name = differing[0]
            raise ValueError(
                f"init_from {config.init_from} was trained with {name} {pipe.scheduler.config.get(name)}, and this run has "
                f"{process.config[name]}; give what it was trained with"
            )
        generator = pipe.generator
    elif isinstance(getattr(pipe, "unet", None), ADMUNet2DModel):
        generator = ADMGenerator.from_denoiser(
            pipe.unet,
            pipe.scheduler.alphas_cumprod,
            pipe.scheduler.config.prediction_type,
            process.alpha_bar[1:],
            config.latent_dim,
        )
    else:
        raise ValueError(
            f"init_from {config.init_from} is a {type(pipe).__name__}; a DDGANPipeline or a pipeline with an ADMUNet2DModel is needed"
        )
    shape = generator.config
    size = (shape.sample_size,) * 2 if isinstance(shape.sample_size, int) else tuple(shape.sample_size)
    classes = data.num_classes if config.class_conditional else None
    if (shape.in_channels, size, shape.num_class_embeds) != (data.channels, tuple(data.size), classes):
        raise ValueError(
            f"init_from {config.init_from} makes images of {size[0]}x{size[1]} with {shape.in_channels} channels and "
            f"{shape.num_class_embeds or 'no'} classes, the training {data.size[0]}x{data.size[1]}, {data.channels} and "
            f"{classes or 'none'}; choose resolution, channels and class_conditional to agree"
        )
    return generator


def levels_for(side: int) -> tuple[int, ...]:
    """Width multipliers for maps of so many positions a side, of levels that halve exactly; those of the paper at 32 and 256."""
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


def build_discriminator(config: DDGANConfig, data: ImageData) -> DDGANDiscriminator:
    """A discriminator for the size, channels and classes of the data, with groups that any number of processes shares alike."""
    variant = config.discriminator
    if variant == "auto":
        variant = "large" if min(data.size) >= 128 else "small"
    torch.manual_seed(config.seed + 1)
    discriminator = DDGANDiscriminator(
        sample_size=data.size,
        in_channels=data.channels,
        base_channels=config.discriminator_channels,
        time_embed_dim=config.time_embed_dim,
        variant=variant,
        stddev_group_size=STDDEV_GROUP,
        stddev_contiguous_groups=True,
        num_class_embeds=data.num_classes if config.class_conditional else None,
        patch_size=config.discriminator_patch_size or config.patch_size,
    )
    return normalise_spectrally(discriminator) if config.spectral_norm else discriminator


def build_pipeline(config: DDGANConfig, generator: nn.Module, data: ImageData) -> DDGANPipeline:
    """What users load: the generator with its scheduler and the names of the classes."""
    names = dict(enumerate(data.class_names)) if config.class_conditional else None
    return DDGANPipeline(generator=generator, scheduler=build_scheduler(config), id2label=names)


def draw_grid(config: DDGANConfig, pipeline: DDGANPipeline) -> Image.Image:
    """A grid from fixed seeds, a row for each class where there are classes."""
    count = config.num_sample_images
    classes = sorted(pipeline.id2label) if pipeline.id2label else None
    columns = max(1, count // len(classes)) if classes else max(1, round(count**0.5))
    labels = [label for label in classes for _ in range(columns)][:count] if classes else None
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        class_labels=labels,
        **({} if labels else {"batch_size": count}),
        generator=[torch.Generator().manual_seed(config.seed + i) for i in range(len(labels) if labels else count)],
    ).images
    rows = [pipeline.id2label[label] for label in labels[::columns]] if labels else None
    return labelled_grid(images, columns, rows)


def build_trainer(config: DDGANConfig, accelerator: Accelerator, data: ImageData) -> DDGANTrainer:
    """Both networks with all that the settings say about training them."""
    generator = build_generator(config, data)
    measurements = sample_measures(config, accelerator, data, lambda net: build_pipeline(config, net, data), generator)
    check_best_metric(config, measurements)
    return DDGANTrainer(
        config,
        accelerator,
        generator,
        build_discriminator(config, data),
        build_scheduler(config),
        data,
        config.objective(),
        SAMPLERS[config.timestep_sampling],
        config.discriminator_learning_rate or config.learning_rate,
        export=lambda averaged, folder: build_pipeline(config, averaged, data).save_pretrained(folder),
        preview=lambda network: draw_grid(config, build_pipeline(config, network, data)),
        measurements=measurements,
    )


def main(argv: Sequence[str] | None = None) -> int:
    config = parse_config(DDGANConfig, argv, prog=PROG)
    with one_sentence_errors(PROG):
        accelerator = start_run(config)
        data = load_training_data(config, accelerator)
        trainer = build_trainer(config, accelerator, data)
        if config.dry_run:
            dry_run(trainer)
            return 0
    train_and_share(
        trainer,
        method="ddgan",
        command=[PROG, *(sys.argv[1:] if argv is None else argv)],
        kind="denoising diffusion GAN",
        tags=["ddgan"],
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
