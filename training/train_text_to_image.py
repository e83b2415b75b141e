"""Train a text-to-image model on captioned images, or on captions made of class names.

    accelerate launch training/train_text_to_image.py --config training/recipes/digits_text.yaml
    accelerate launch training/train_text_to_image.py --train_data_dir my_images

The encoder of texts is trained along, or it is any text model of transformers, frozen.
Settings come from `--config` files, then from flags; `--help` lists them and `--dry_run` shows what
a run would do.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from accelerate import Accelerator
from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin, UNet2DConditionModel
from torch import nn

from hf_diffusion.config.caption_options import CaptionOptions
from hf_diffusion.config.options import option
from hf_diffusion.config.run_options import TrainingConfig
from hf_diffusion.config.shared_options import (
    DataOptions,
    LatentOptions,
    MeasureOptions,
    NoiseScheduleOptions,
    UNetOptions,
)
from hf_diffusion.data.caption_coders import (
    EmbeddingCoder,
    TokenCoder,
    fitting_length,
    load_text_encoder,
    train_tokenizer,
)
from hf_diffusion.data.protocol import TrainingData
from hf_diffusion.data.waiting import main_first
from hf_diffusion.loop.fine_tuning import started_from
from hf_diffusion.loop.generative import generative_trainer
from hf_diffusion.loop.start import run
from hf_diffusion.loop.trainer import Trainer
from hf_diffusion.losses.captioned import CaptionDenoisingObjective, CaptionFlowObjective, ReadingUNet
from hf_diffusion.losses.denoising import DenoisingOptions
from hf_diffusion.losses.flow import FlowMatchingOptions
from hf_diffusion.losses.objective import Objective
from hf_diffusion.pipelines.pipeline_text_to_image import TextToImagePipeline
from hf_diffusion.schedulers.scheduling_flow import FlowMatchingScheduler
from hf_diffusion.schedulers.scheduling_gaussian import DDIMEtaScheduler, LinearDDPMScheduler


SCRATCH = "scratch"
# Captions that the pipeline carries along as examples.
EXAMPLES = 8


@dataclass(kw_only=True)
class TextToImageConfig(
    MeasureOptions,
    UNetOptions,
    NoiseScheduleOptions,
    DenoisingOptions,
    LatentOptions,
    CaptionOptions,
    TrainingConfig,
    DataOptions,
):
    """Train a text-to-image model on captions."""

    method: ClassVar[str] = "text-to-image"
    kind: ClassVar[str] = "text-to-image model"
    tags: ClassVar[tuple[str, ...]] = ("text-to-image",)
    task: ClassVar[str | None] = "text-to-image"

    # The name that all families have.
    label_dropout: float = option(
        0.1, "share of captions replaced by the empty text, for classifier-free guidance", at_least=0, below=1
    )
    text_encoder: str = option(
        SCRATCH,
        "folder or Hub id of a text model of transformers (CLIP, T5, SigLIP, BERT, ...), frozen, its embeddings "
        "computed once; scratch trains a small one along",
        group="text encoder",
        is_path=True,
    )
    process: Literal["gaussian", "flow"] = option(
        "gaussian", "diffusion by a noise schedule, or flow matching with uniform levels of noise", group="method"
    )
    sampler: Literal["ddim", "ddpm"] = option(
        "ddim", "scheduler of the grids and of the pipeline of a gaussian process", group="sampling", tied=None
    )
    num_inference_steps: int = option(50, "sampling steps of the grids and of eval_metrics", at_least=1, tied=None)
    guidance_scale: float = option(
        2.0, "classifier-free guidance of the grids and of eval_metrics; 1 is none", at_least=0, tied=None
    )

    def check(self) -> None:
        """ValueError for settings of different groups that contradict each other."""
        if self.patch_size != 1:
            raise ValueError(f"patch_size {self.patch_size}: UNet2DConditionModel works on pixels; leave it out")
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            raise ValueError("rescale_betas_zero_snr needs prediction_type v_prediction or sample")

    @property
    def class_conditional(self) -> bool:
        """Whether samples can be asked for by class: their captions are made of the classes."""
        return bool(self.caption_template)

    def papers(self) -> tuple[str, ...]:
        used = {
            "nichol2022glide": True,
            "saharia2022photorealistic": self.text_encoder != SCRATCH,
            "ho2020denoising": self.process == "gaussian",
            "lipman2023flow": self.process == "flow",
            "song2021denoising": self.process == "gaussian" and self.sampler == "ddim",
            "ho2022classifier": self.label_dropout > 0,
            "rombach2022high": self.vae is not None,
        }
        return tuple(paper for paper, is_used in used.items() if is_used)

    def sampling_options(self) -> dict[str, Any]:
        return {"num_inference_steps": self.num_inference_steps, "guidance_scale": self.guidance_scale}

    def preset_settings(self, sample_shape: tuple[int, ...]) -> dict[str, Any]:
        return {**super().preset_settings(sample_shape), "patch_size": 1}


def unet_settings(config: TextToImageConfig, data: TrainingData, text_width: int) -> dict[str, Any]:
    """GLIDE's U-Net for the shape of the data: texts are added to the keys and values of its
    attention, their mean to the embedding of the timestep.
    """
    shape = config.unet_shape(data.sample_shape)
    attends = [2**level in shape["attention_resolutions"] for level in range(len(shape["channel_mult"]))]
    down = ["SimpleCrossAttnDownBlock2D" if here else "ResnetDownsampleBlock2D" for here in attends]
    up = ["SimpleCrossAttnUpBlock2D" if here else "ResnetUpsampleBlock2D" for here in reversed(attends)]
    learned = config.process == "gaussian" and config.learns_variance
    return {
        "sample_size": shape["sample_size"],
        "in_channels": shape["in_channels"],
        "out_channels": shape["in_channels"] * (2 if learned else 1),
        "block_out_channels": tuple(int(config.model_channels * m) for m in shape["channel_mult"]),
        "layers_per_block": config.num_res_blocks,
        "down_block_types": tuple(down),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": tuple(up),
        "resnet_time_scale_shift": "scale_shift",
        "attention_head_dim": config.num_head_channels,
        "norm_num_groups": config.norm_num_groups,
        "dropout": config.dropout,
        "cross_attention_dim": text_width,
        "class_embed_type": "simple_projection",
        "projection_class_embeddings_input_dim": text_width,
    }


def start_at_identity(unet: UNet2DConditionModel) -> None:
    """Set what ends residual branches to zero, as GLIDE does: a fresh block is the identity."""
    for name, module in unet.named_modules():
        if name.endswith((".conv2", ".to_out.0")) or name == "conv_out":
            for parameter in module.parameters():
                nn.init.zeros_(parameter)


def build_reading(config: TextToImageConfig, data: TrainingData) -> tuple[TokenCoder, ReadingUNet]:
    """A tokenizer of the captions, and a network with an encoder of their tokens."""
    texts = data.captions.texts
    tokenizer = train_tokenizer(texts, config.text_vocabulary, config.text_length)
    coder = TokenCoder(tokenizer, fitting_length(tokenizer, texts, config.text_length))
    tokenizer.model_max_length = coder.length
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": config.text_width,
        "intermediate_size": 4 * config.text_width,
        "projection_dim": config.text_width,
        "num_hidden_layers": config.text_layers,
        "num_attention_heads": config.text_heads,
        "max_position_embeddings": coder.length,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    torch.manual_seed(config.seed)
    # By name: diffusers takes positional settings for defaults, and leaves them out of copies.
    network = ReadingUNet(unet_config=unet_settings(config, data, config.text_width), text_config=text)
    start_at_identity(network.unet)
    return coder, network


def build_frozen(
    config: TextToImageConfig, data: TrainingData, device: torch.device
) -> tuple[EmbeddingCoder, UNet2DConditionModel]:
    """The encoder's embeddings of the captions, and a network that is given them."""
    coder = EmbeddingCoder(config.text_encoder, config.text_length, device)
    coder.length = fitting_length(coder.tokenizer, data.captions.texts, config.text_length)
    width = coder.rows_of([""])(torch.tensor([0]))["class_labels"].shape[1]
    torch.manual_seed(config.seed)
    network = UNet2DConditionModel(**unet_settings(config, data, width))
    start_at_identity(network)
    return coder, started_from(config, data, network)


def build_scheduler(
    config: TextToImageConfig, clip_sample: bool = True
) -> LinearDDPMScheduler | FlowMatchingScheduler:
    """The process that the network is trained on; predictions of bounded data are clipped."""
    if config.process == "flow":
        return FlowMatchingScheduler(config.ddpm_num_steps)
    kinds = {"prediction_type": config.prediction_type, "variance_type": config.variance_type}
    options = {"clip_sample": clip_sample, "timestep_spacing": "trailing"}
    return LinearDDPMScheduler(**config.noise_schedule(), **kinds, **options)


def build_sampler(config: TextToImageConfig, clip_sample: bool) -> SchedulerMixin:
    """What users sample with; of flow matching the stock one."""
    if config.process == "flow":
        return FlowMatchEulerDiscreteScheduler(config.ddpm_num_steps)
    cls = DDIMEtaScheduler if config.sampler == "ddim" else LinearDDPMScheduler
    return cls.from_config(build_scheduler(config, clip_sample).config)


def build_objective(
    config: TextToImageConfig, accelerator: Accelerator, network: nn.Module, coder: TokenCoder | EmbeddingCoder
) -> Objective:
    """What the network is trained by."""
    text = {"empty": coder.rows_of([""])(torch.tensor([0])), "fingerprint": coder.fingerprint}
    scheduler, rate = build_scheduler(config), config.learning_rate
    if config.process == "flow":
        options = FlowMatchingOptions(label_dropout=config.label_dropout)
        return CaptionFlowObjective(scheduler, network, options, rate, **text)
    return CaptionDenoisingObjective(scheduler, network, config, rate, accelerator, **text)


def build(config: TextToImageConfig, accelerator: Accelerator, data: TrainingData) -> Trainer:
    """The trainer of a network, which users get with the encoder of texts and its tokenizer."""
    is_frozen = config.text_encoder != SCRATCH
    # One process computes the embeddings, the others find them in the cache.
    with main_first(accelerator):
        coder, network = build_frozen(config, data, accelerator.device) if is_frozen else build_reading(config, data)
        data.encode_captions(coder)
    objective = build_objective(config, accelerator, network, coder)
    names = dict(enumerate(data.class_names)) if config.caption_template else None
    texts = {
        "text_length": coder.length,
        "id2label": names,
        "caption_template": config.caption_template[0] if config.caption_template else "{}",
        "examples": data.captions.examples(EXAMPLES),
        "vae": data.autoencoder,
    }

    def pipeline(network: nn.Module) -> TextToImagePipeline:
        # A frozen encoder is in memory only while something is drawn or saved.
        encoder = load_text_encoder(coder.source).to(network.device) if is_frozen else network.text_encoder
        unet = network if is_frozen else network.unet
        sampler = build_sampler(config, data.is_bounded)
        return TextToImagePipeline(unet, encoder, coder.tokenizer, sampler, **texts)

    return generative_trainer(config, accelerator, objective, data, pipeline, **config.sampling_options())


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says; returns the exit status."""
    return run(TextToImageConfig, build, argv, prog="train_text_to_image.py")


if __name__ == "__main__":
    sys.exit(main())
