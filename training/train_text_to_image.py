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
from hf_diffusion.data.caption_coders import EmbeddingCoder, TokenCoder, fitting_length, load_text_encoder
from hf_diffusion.data.captions import with_article
from hf_diffusion.data.protocol import TrainingData
from hf_diffusion.data.waiting import main_first
from hf_diffusion.loop.fine_tuning import Trained, check_process, fitted, take_shape
from hf_diffusion.loop.generative import generative_trainer
from hf_diffusion.loop.readers import (
    shape_of_text_model,
    shape_of_unet,
    text_settings,
    token_coder,
    trained_unet,
    trained_unet_reader,
    unet_settings,
)
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
    guidance_scale: float | None = option(
        None,
        "classifier-free guidance of the grids and of eval_metrics; 1 is none, none is 2 where the network learns the "
        "empty text",
        at_least=0,
        tied=None,
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
        guidance = {} if self.guidance_scale is None else {"guidance_scale": self.guidance_scale}
        return {"num_inference_steps": self.num_inference_steps, **guidance}

    def preset_settings(self, sample_shape: tuple[int, ...]) -> dict[str, Any]:
        return {**super().preset_settings(sample_shape), "patch_size": 1}


def start_at_identity(unet: UNet2DConditionModel) -> None:
    """Set what ends residual branches to zero, as GLIDE does: a fresh block is the identity."""
    for name, module in unet.named_modules():
        if name.endswith((".conv2", ".to_out.0")) or name == "conv_out":
            for parameter in module.parameters():
                nn.init.zeros_(parameter)


def build_reading(
    config: TextToImageConfig, data: TrainingData, accelerator: Accelerator
) -> tuple[TokenCoder, ReadingUNet]:
    """A tokenizer of the captions, and a network with an encoder of their tokens; of `init_from`,
    where it names a run."""
    former = None if config.init_from is None else trained_unet_reader(config.init_from)
    coder = token_coder(config, accelerator, data.captions, former)
    if former is not None:
        network = former.trained.network
        text = network.text_encoder.config.to_dict()
        follow(config, former.trained, shape_of_unet(network.unet.config) | shape_of_text_model(text))
        bound = {"unet_config": unet_settings(config, data, config.text_width), "text_config": text}
        return coder, fitted(config.init_from, former.trained, bound, None)
    text = text_settings(config, coder)
    torch.manual_seed(config.seed)
    # By name: diffusers takes positional settings for defaults, and leaves them out of copies.
    network = ReadingUNet(unet_config=unet_settings(config, data, config.text_width), text_config=text)
    start_at_identity(network.unet)
    return coder, network


def follow(config: TextToImageConfig, trained: Trained, shape: dict[str, Any]) -> None:
    """Let the run have the shape of the network that it starts from; ValueError where that was
    trained on another process."""
    config.is_started = True
    wanted = {**config.noise_schedule(), "prediction_type": config.prediction_type}
    check_process(config.init_from, trained.process, {} if config.process == "flow" else wanted)
    take_shape(config, shape)
    torch.manual_seed(config.seed)


def build_frozen(
    config: TextToImageConfig, data: TrainingData, accelerator: Accelerator
) -> tuple[EmbeddingCoder, UNet2DConditionModel]:
    """The encoder's embeddings of the captions, and a network that is given them."""
    captions, coder = data.captions, EmbeddingCoder(config.text_encoder, config.text_length, accelerator.device)
    coder.length = fitting_length(coder.tokenizer, captions.texts, config.text_length, captions.whole)
    if not captions.whole:
        accelerator.print(
            "the embeddings of a stream's captions are not cached: the encoder stays in memory and reads each batch"
        )
    width = coder.rows_of([""])(torch.tensor([0]))["class_labels"].shape[1]
    if config.init_from is not None:
        trained = trained_unet(config.init_from)
        follow(config, trained, shape_of_unet(trained.network.config))
        return coder, fitted(config.init_from, trained, unet_settings(config, data, width), None)
    torch.manual_seed(config.seed)
    network = UNet2DConditionModel(**unet_settings(config, data, width))
    start_at_identity(network)
    return coder, network


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
    empty_text = config.label_dropout > 0 or data.captions.has_empty
    if not empty_text and config.guidance_scale not in (None, 1):
        raise ValueError(
            f"guidance_scale {config.guidance_scale} leads away from the empty text, which a network with "
            "label_dropout 0 never sees; give guidance_scale 1, or a label_dropout"
        )
    # One process computes the embeddings, the others find them in the cache.
    with main_first(accelerator):
        coder, network = (build_frozen if is_frozen else build_reading)(config, data, accelerator)
        data.encode_captions(coder)
    objective = build_objective(config, accelerator, network, coder)
    names = dict(enumerate(data.class_names)) if config.caption_template else None
    texts = {
        "text_length": coder.length,
        "id2label": names,
        "caption_template": with_article(config.caption_template[0]) if config.caption_template else "{}",
        "examples": data.captions.examples(EXAMPLES),
        "vae": data.autoencoder,
        "empty_text": empty_text,
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
