"""Train a (class-conditional) diffusion model on your own images.

    accelerate launch training/train_ddpm.py --config training/recipes/digits.yaml
    accelerate launch training/train_ddpm.py --train_data_dir my_images --resolution 64 --output_dir runs/mine

Settings come from `--config` files, then from flags; `--help` lists them and `--dry_run` shows what a run would do.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from hf_diffusion.config.training import GenerativeTrainingConfig, option, parse_config
from hf_diffusion.data.images import ImageData
from hf_diffusion.dry_run import dry_run
from hf_diffusion.evaluation.in_training import HeldOutLoss, Measurement
from hf_diffusion.figures import labelled_grid
from hf_diffusion.losses.gaussian import hybrid_loss, loss_weight, simple_loss, vlb_loss
from hf_diffusion.models.unet_adm import ADMUNet2DModel
from hf_diffusion.pipelines.pipeline_classifier_free_guidance import ClassifierFreeGuidancePipeline
from hf_diffusion.randomness import Draw
from hf_diffusion.run import (
    check_best_metric,
    load_training_data,
    load_unaugmented,
    one_sentence_errors,
    sample_measures,
    start_run,
    train_and_share,
)
from hf_diffusion.schedulers.scheduling_gaussian import DDIMEtaScheduler, GaussianScheduler, LinearDDPMScheduler
from hf_diffusion.timestep_sampling import (
    LossSecondMomentSampler,
    antithetic_timesteps,
    stratified_timesteps,
    uniform_timesteps,
)
from hf_diffusion.trainer import Loss, Trainer


PROG = "train_ddpm.py"
SAMPLERS = {"uniform": uniform_timesteps, "stratified": stratified_timesteps, "antithetic": antithetic_timesteps}


@dataclass(kw_only=True)
class DDPMConfig(GenerativeTrainingConfig):
    """Train a diffusion model with a U-Net on images, with or without classes."""

    class_conditional: bool = option(
        False, "learn the classes of the data, so that samples can be asked for by class", group="method"
    )
    # Without dropped labels there is no unconditional prediction, and so nothing to guide away from.
    label_dropout: float = option(
        0.1, "share of labels replaced by 'no class', for classifier-free guidance", at_least=0, below=1
    )
    # v keeps the target's scale at every noise level and, with it, few-step sampling works.
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = option("v_prediction", "what the network predicts")
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"] = option(
        "squaredcos_cap_v2", "noise schedule; squaredcos_cap_v2 is the cosine schedule"
    )
    beta_start: float = option(0.0001, "first beta of the linear schedules", above=0, below=1)
    beta_end: float = option(0.02, "last beta of the linear schedules", above=0, below=1)
    ddpm_num_steps: int = option(1000, "timesteps of the process, T", at_least=1)
    rescale_betas_zero_snr: bool = option(False, "end the schedule in pure noise; needs v_prediction or sample")
    # The strata cover all noise levels in every batch, which takes noise out of the gradient at no cost.
    # loss_second_moment visits the timesteps that contribute most to the variational bound, and is meant for objective vlb.
    timestep_sampling: Literal["uniform", "stratified", "antithetic", "loss_second_moment"] = option(
        "stratified", "how a batch's timesteps are drawn"
    )
    objective: Literal["simple", "hybrid", "vlb"] = option(
        "simple", "simple: error of the prediction; vlb: variational bound; hybrid: simple + vlb_weight * vlb"
    )
    variance_type: Literal["fixed_small", "fixed_large", "learned", "learned_range"] = option(
        "fixed_small", "variance of ancestral sampling; the learned ones need objective hybrid or vlb"
    )
    vlb_weight: float = option(0.001, "weight of the variational bound in objective hybrid", above=0)
    loss_weighting: Literal["uniform", "min_snr", "p2"] = option("uniform", "weight of the timesteps in the loss")
    min_snr_gamma: float = option(5.0, "cap on the signal-to-noise ratio of min_snr", above=0)
    p2_gamma: float = option(1.0, "exponent of p2", at_least=0)
    p2_k: float = option(1.0, "offset of p2", above=0)

    model_channels: int = option(64, "width of the U-Net's first level", at_least=1, group="network")
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
    resblock_updown: bool = option(False, "resample inside residual blocks, as BigGAN and ADM do")
    # 2x2 pixels become channels at the network's two ends: a quarter of the positions, several times the speed.
    patch_size: int = option(1, "side of the pixel patches that the network works on", at_least=1)

    sampler: Literal["ddim", "ddpm"] = option(
        "ddim", "scheduler of the sample grids and of the exported pipeline", group="sampling"
    )
    ddpm_num_inference_steps: int = option(50, "sampling steps of the grids and of eval_metrics", at_least=1)
    guidance_scale: float = option(
        1.0, "classifier-free guidance of the grids and of eval_metrics; 1 is none", at_least=0
    )
    # The training loss falls for a model that learns its images by heart, too; this one rises.
    eval_split: str | None = option(
        None, "split whose loss is measured at every eval_steps, such as train[90%:] or test", group="evaluation"
    )

    def validate(self) -> None:
        super().validate()
        learned = self.variance_type.startswith("learned")
        if learned and self.objective == "simple":
            raise ValueError(
                f"variance_type {self.variance_type} is trained by the variational bound only; give --objective hybrid or vlb"
            )
        if self.objective == "hybrid" and not learned:
            raise ValueError(
                f"objective hybrid trains a learned variance, got variance_type {self.variance_type}; give learned_range"
            )
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            raise ValueError(
                "rescale_betas_zero_snr needs prediction_type v_prediction or sample: pure noise tells nothing of x_0"
            )
        if self.ddpm_num_inference_steps > self.ddpm_num_steps:
            raise ValueError(
                f"ddpm_num_inference_steps {self.ddpm_num_inference_steps} is more than ddpm_num_steps {self.ddpm_num_steps}; give fewer"
            )


def build_scheduler(config: DDPMConfig) -> LinearDDPMScheduler:
    """The process that the network is trained on."""
    return LinearDDPMScheduler(
        num_train_timesteps=config.ddpm_num_steps,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule=config.beta_schedule,
        prediction_type=config.prediction_type,
        variance_type=config.variance_type,
        rescale_betas_zero_snr=config.rescale_betas_zero_snr,
        timestep_spacing="trailing",  # starts at the last timestep, as sampling from pure noise must
    )


def build_model(config: DDPMConfig, data: ImageData) -> ADMUNet2DModel:
    """A U-Net for the size, channels and classes of the data."""
    if config.class_conditional and not data.num_classes:
        raise ValueError(
            f"class_conditional is set, but {data.name} has no labels; leave it out, or name the column by --label_column"
        )
    positions = min(data.size) // config.patch_size
    channel_mult = config.channel_mult or levels_for(positions)
    torch.manual_seed(config.seed)
    return ADMUNet2DModel(
        sample_size=data.size,
        in_channels=data.channels,
        out_channels=data.channels * (2 if config.variance_type.startswith("learned") else 1),
        model_channels=config.model_channels,
        channel_mult=channel_mult,
        num_res_blocks=config.num_res_blocks,
        attention_resolutions=(2 ** (len(channel_mult) - 1),)
        if config.attention_resolutions is None
        else config.attention_resolutions,
        num_head_channels=config.num_head_channels,
        norm_num_groups=config.norm_num_groups,
        dropout=config.dropout,
        resblock_updown=config.resblock_updown,
        patch_size=config.patch_size,
        num_class_embeds=data.num_classes if config.class_conditional else None,
        null_class=config.class_conditional and config.label_dropout > 0,
    )


def levels_for(side: int) -> tuple[float, ...]:
    """Width multipliers for images of so many positions a side: levels down to 4 or 8 positions, as ADM has them."""
    for smallest, multipliers in (
        (192, (1, 1, 2, 2, 4, 4)),
        (96, (1, 1, 2, 3, 4)),
        (48, (1, 2, 3, 4)),
        (20, (1, 2, 2)),
    ):
        if side >= smallest:
            return multipliers
    return (1, 2)


def build_loss(
    config: DDPMConfig, scheduler: GaussianScheduler, null_class_id: int | None, accelerator: Accelerator
) -> Loss:
    """The objective at one random timestep an image; the state of importance sampling joins the checkpoints."""
    importance = None
    if config.timestep_sampling == "loss_second_moment":
        importance = LossSecondMomentSampler(config.ddpm_num_steps)
        accelerator.register_for_checkpointing(importance)

    def loss(model: nn.Module, batch: dict, draw: Draw) -> dict:
        x_0 = batch["pixels"]  # (B, C, H, W)
        factor = 1.0
        if importance is None:
            t = draw.timesteps(SAMPLERS[config.timestep_sampling], config.ddpm_num_steps)
        else:
            t, factor = importance.sample(draw.uniform())
        noise = draw.normal(*x_0.shape[1:])
        x_t = scheduler.add_noise(x_0, noise, t)
        labels = batch["labels"] if config.class_conditional else None
        if null_class_id is not None:
            labels = torch.where(draw.uniform() < config.label_dropout, null_class_id, labels)
        output = model(x_t, t, labels).sample
        losses = objective(config, scheduler, output, x_0, x_t, noise, t)  # (B,)
        if importance is not None:  # all processes keep the same history
            importance.update(accelerator.gather(t), accelerator.gather(losses.detach()))
        return {"loss": (losses * factor).float(), "level": t / config.ddpm_num_steps}

    return loss


def objective(
    config: DDPMConfig,
    scheduler: GaussianScheduler,
    output: Tensor,
    x_0: Tensor,
    x_t: Tensor,
    noise: Tensor,
    t: Tensor,
) -> Tensor:
    """The loss of each image (B,) for the network's output at timesteps t."""
    if config.objective == "vlb":
        return vlb_loss(scheduler, output, x_0, x_t, t)
    weight = loss_weight(scheduler, t, config.loss_weighting, config.min_snr_gamma, config.p2_gamma, config.p2_k)
    if config.objective == "hybrid":
        return hybrid_loss(scheduler, output, x_0, x_t, noise, t, config.vlb_weight, weight)
    return weight * simple_loss(scheduler, output, x_0, x_t, noise, t)


def build_measurements(
    config: DDPMConfig, accelerator: Accelerator, model: nn.Module, scheduler: GaussianScheduler, data: ImageData
) -> list[Measurement]:
    """The objective on held-out images, with their true classes, and measures of samples, as far as the settings ask for them."""
    measurements = []
    if config.eval_split is not None:

        def loss(model: nn.Module, batch: dict, t: Tensor, noise: Tensor) -> dict:
            x_0, labels = batch["pixels"], batch["labels"] if config.class_conditional else None
            x_t = scheduler.add_noise(x_0, noise, t)
            return {"loss": objective(config, scheduler, model(x_t, t, labels).sample, x_0, x_t, noise, t)}

        held_out = load_unaugmented(config, accelerator, data, config.eval_split)
        measurements.append(
            HeldOutLoss(
                accelerator, held_out, loss, config.ddpm_num_steps, batch_size=config.eval_batch_size, seed=config.seed
            )
        )
    guidance = {"guidance_scale": config.guidance_scale} if config.class_conditional else {}
    measurements += sample_measures(
        config,
        accelerator,
        data,
        lambda network: build_pipeline(config, network, scheduler, data),
        model,
        num_inference_steps=config.ddpm_num_inference_steps,
        **guidance,
    )
    check_best_metric(config, measurements)
    return measurements


def build_pipeline(
    config: DDPMConfig, model: nn.Module, scheduler: GaussianScheduler, data: ImageData
) -> ClassifierFreeGuidancePipeline:
    """What users load: the network with a scheduler for sampling and the names of the classes."""
    cls = DDIMEtaScheduler if config.sampler == "ddim" else type(scheduler)
    sampler = cls.from_config(scheduler.config)  # one of its own: sampling chooses timesteps, training needs all
    names = dict(enumerate(data.class_names)) if config.class_conditional else None
    return ClassifierFreeGuidancePipeline(unet=model, scheduler=sampler, id2label=names)


def draw_grid(config: DDPMConfig, pipeline: ClassifierFreeGuidancePipeline) -> Image.Image:
    """A grid from fixed seeds, a row for each class where there are classes."""
    count = config.num_sample_images
    classes = sorted(pipeline.id2label) if pipeline.id2label else None
    columns = max(1, count // len(classes)) if classes else max(1, round(count**0.5))
    labels = [label for label in classes for _ in range(columns)][:count] if classes else None
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        class_labels=labels,
        **({} if labels else {"batch_size": count}),
        num_inference_steps=config.ddpm_num_inference_steps,
        guidance_scale=config.guidance_scale if labels else 1.0,
        generator=[torch.Generator().manual_seed(config.seed + i) for i in range(len(labels) if labels else count)],
    ).images
    rows = [pipeline.id2label[label] for label in labels[::columns]] if labels else None
    return labelled_grid(images, columns, rows)


def main(argv: Sequence[str] | None = None) -> int:
    config = parse_config(DDPMConfig, argv, prog=PROG)
    with one_sentence_errors(PROG):
        accelerator = start_run(config)
        data = load_training_data(config, accelerator)
        scheduler = build_scheduler(config)
        model = build_model(config, data)
        trainer = Trainer(
            config,
            accelerator,
            model,
            data,
            loss=build_loss(config, scheduler, model.null_class_id, accelerator),
            export=lambda averaged, folder: build_pipeline(config, averaged, scheduler, data).save_pretrained(folder),
            preview=lambda network: draw_grid(config, build_pipeline(config, network, scheduler, data)),
            measurements=build_measurements(config, accelerator, model, scheduler, data),
        )
        if config.dry_run:
            dry_run(trainer)
            return 0
    train_and_share(trainer, method="ddpm", command=[PROG, *(sys.argv[1:] if argv is None else argv)])
    return 0


if __name__ == "__main__":
    sys.exit(main())
