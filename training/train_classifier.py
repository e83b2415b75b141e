"""Train a classifier of noisy images, whose gradient guides a diffusion model (classifier guidance).

    accelerate launch training/train_classifier.py --config training/recipes/digits_classifier.yaml
    accelerate launch training/train_classifier.py --train_data_dir my_images --resolution 64 --output_dir runs/classifier

The noise schedule must be that of the diffusion model; it is saved in the classifier's config, and the pipeline compares them:
`ClassifierGuidancePipeline.from_pretrained("runs/model", classifier=ADMClassifier.from_pretrained("runs/classifier"))`.
Settings come from `--config` files, then from flags; `--help` lists them and `--dry_run` shows what a run would do.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from hf_diffusion.config.training import TrainingConfig, option, parse_config
from hf_diffusion.data.images import ImageData
from hf_diffusion.dry_run import dry_run
from hf_diffusion.evaluation.in_training import HeldOutLoss, Measurement
from hf_diffusion.models.unet_adm import ADMClassifier
from hf_diffusion.run import (
    check_best_metric,
    load_training_data,
    load_unaugmented,
    one_sentence_errors,
    start_run,
    train_and_share,
)
from hf_diffusion.schedulers.scheduling_gaussian import GaussianScheduler, LinearDDPMScheduler
from hf_diffusion.timestep_sampling import stratified_timesteps
from hf_diffusion.trainer import Loss, Trainer
from hf_diffusion.training.train_ddpm import levels_for


PROG = "train_classifier.py"


@dataclass(kw_only=True)
class ClassifierConfig(TrainingConfig):
    """Train a classifier on noisy images, for classifier guidance."""

    random_crop: float = option(
        1.0,
        "smallest side of a crop at random, as a share of the image; 1 crops nothing, 0.8 suits photographs",
        group="method",
        above=0,
        at_most=1,
    )
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"] = option(
        "squaredcos_cap_v2", "noise schedule of the diffusion model; squaredcos_cap_v2 is the cosine schedule"
    )
    beta_start: float = option(0.0001, "first beta of the linear schedules", above=0, below=1)
    beta_end: float = option(0.02, "last beta of the linear schedules", above=0, below=1)
    ddpm_num_steps: int = option(1000, "timesteps of the diffusion model, T", at_least=1)
    rescale_betas_zero_snr: bool = option(False, "whether the diffusion model's schedule ends in pure noise")

    model_channels: int = option(64, "width of the network's first level", at_least=1, group="network")
    channel_mult: tuple[float, ...] | None = option(
        None, "width of each level in units of model_channels; none goes by the size", above=0
    )
    num_res_blocks: int = option(2, "residual blocks a level", at_least=1)
    attention_resolutions: tuple[int, ...] | None = option(
        None, "downsampling factors with attention; none takes the lowest level", at_least=1
    )
    num_head_channels: int = option(32, "width of an attention head", at_least=1)
    norm_num_groups: int = option(32, "groups of the group norms; must divide every width", at_least=1)
    dropout: float = option(0.0, "dropout in the residual blocks", at_least=0, below=1)
    patch_size: int = option(1, "side of the pixel patches that the network works on", at_least=1)
    pool: Literal["adaptive", "attention", "spatial", "spatial_v2"] = option(
        "attention", "how pixels become one answer; attention is the one of ADM"
    )

    # Without images that the training does not see, a classifier that has learned them by heart looks perfect.
    eval_split: str | None = option(
        None,
        "split that loss and accuracy are measured on at every eval_steps, such as train[90%:] or test",
        group="evaluation",
    )


def noise_schedule(config: ClassifierConfig) -> dict[str, int | float | str | bool]:
    """The scheduler arguments that say what a timestep means, as the classifier records them."""
    schedule = {
        "num_train_timesteps": config.ddpm_num_steps,
        "beta_schedule": config.beta_schedule,
        "rescale_betas_zero_snr": config.rescale_betas_zero_snr,
    }
    if config.beta_schedule != "squaredcos_cap_v2":
        schedule |= {"beta_start": config.beta_start, "beta_end": config.beta_end}
    return schedule


def build_model(config: ClassifierConfig, data: ImageData) -> ADMClassifier:
    """A classifier for the size, channels and classes of the data, which records class names and noise schedule."""
    if not data.num_classes:
        raise ValueError(f"{data.name} has no labels to learn; name their column by --label_column")
    channel_mult = config.channel_mult or levels_for(min(data.size) // config.patch_size)
    torch.manual_seed(config.seed)
    return ADMClassifier(
        sample_size=data.size,
        in_channels=data.channels,
        num_classes=data.num_classes,
        model_channels=config.model_channels,
        channel_mult=channel_mult,
        num_res_blocks=config.num_res_blocks,
        attention_resolutions=(2 ** (len(channel_mult) - 1),)
        if config.attention_resolutions is None
        else config.attention_resolutions,
        num_head_channels=config.num_head_channels,
        norm_num_groups=config.norm_num_groups,
        dropout=config.dropout,
        pool=config.pool,
        patch_size=config.patch_size,
        id2label=dict(enumerate(data.class_names)),
        noise_schedule=noise_schedule(config),
    )


def crop_at_random(x: Tensor, smallest: float, scale: Tensor, across: Tensor, down: Tensor) -> Tensor:
    """Crops of (B, C, H, W) whose sides are `smallest` to 1 of the image's, enlarged to its size; the rest (B,) in [0, 1)."""
    side = smallest + (1 - smallest) * scale
    theta = torch.zeros(len(x), 2, 3, device=x.device, dtype=x.dtype)
    theta[:, 0, 0] = theta[:, 1, 1] = side
    theta[:, 0, 2], theta[:, 1, 2] = (1 - side) * (2 * across - 1), (1 - side) * (2 * down - 1)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


def build_loss(config: ClassifierConfig, scheduler: GaussianScheduler) -> Loss:
    """Cross-entropy at one random timestep an image; t is the scheduler's own index, as the pipeline gives it to the classifier."""

    def loss(model: nn.Module, batch: dict, draw) -> dict:
        x_0, labels = batch["pixels"], batch["labels"]  # (B, C, H, W), (B,)
        t = draw.timesteps(stratified_timesteps, config.ddpm_num_steps)
        noise = draw.normal(*x_0.shape[1:])
        if config.random_crop < 1:
            x_0 = crop_at_random(x_0, config.random_crop, draw.uniform(), draw.uniform(), draw.uniform())
        logits = model(scheduler.add_noise(x_0, noise, t), t).logits.float()
        return {
            "loss": F.cross_entropy(logits, labels, reduction="none"),
            "level": t / config.ddpm_num_steps,
            **hits(logits, labels),
        }

    return loss


def hits(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """1.0 where the label is the first, or among the first five, of the logits (B, K), else 0.0; no top5 for up to five classes."""
    ranks = (logits > logits.gather(1, labels[:, None])).sum(dim=1)  # (B,), classes that are ahead of the label
    return {f"top{k}": (ranks < k).float() for k in (1, 5) if k < logits.shape[1]}


def build_measurements(
    config: ClassifierConfig, accelerator: Accelerator, scheduler: GaussianScheduler, data: ImageData
) -> list[Measurement]:
    """Cross-entropy and accuracy on the held-out images, if the settings name any."""
    measurements = []
    if config.eval_split is not None:

        def values(model: nn.Module, batch: dict, t: Tensor, noise: Tensor) -> dict:
            logits = model(scheduler.add_noise(batch["pixels"], noise, t), t).logits.float()
            loss = F.cross_entropy(logits, batch["labels"], reduction="none")
            return {"loss": loss, **hits(logits, batch["labels"])}

        held_out = load_unaugmented(config, accelerator, data, config.eval_split)
        names = ("loss", "top1", "top5") if data.num_classes > 5 else ("loss", "top1")
        measurements.append(
            HeldOutLoss(
                accelerator, held_out, values, config.ddpm_num_steps, names, config.train_batch_size, config.seed
            )
        )
    check_best_metric(config, measurements)
    return measurements


def main(argv: Sequence[str] | None = None) -> int:
    config = parse_config(ClassifierConfig, argv, prog=PROG)
    with one_sentence_errors(PROG):
        accelerator = start_run(config)
        data = load_training_data(config, accelerator)
        # v_prediction, because nothing is predicted here and zero SNR is refused with the default.
        scheduler = LinearDDPMScheduler(**noise_schedule(config), prediction_type="v_prediction")
        trainer = Trainer(
            config,
            accelerator,
            build_model(config, data),
            data,
            loss=build_loss(config, scheduler),
            export=lambda averaged, folder: averaged.save_pretrained(folder),
            measurements=build_measurements(config, accelerator, scheduler, data),
        )
        if config.dry_run:
            dry_run(trainer)
            return 0
    command = [PROG, *(sys.argv[1:] if argv is None else argv)]
    train_and_share(
        trainer, method="classifier", command=command, kind="classifier of noisy images", tags=["adm-classifier"]
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
