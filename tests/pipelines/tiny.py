"""A tiny instance of every public pipeline; a new pipeline registers its own here."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

import hf_diffusion
from hf_diffusion import (
    ADMClassifier,
    ADMMeanFlowUNet2DModel,
    ADMUNet2DModel,
    ClassifierFreeGuidancePipeline,
    ClassifierGuidancePipeline,
    ConsistencyPipeline,
    ConsistencyScheduler,
    D3PMScheduler,
    DDGANGenerator,
    DDGANPipeline,
    DDGANScheduler,
    DiscreteImagePipeline,
    EDMHeunScheduler,
    EDMPipeline,
    FlowMatchingPipeline,
    FlowMatchingScheduler,
    LinearDDPMScheduler,
    MeanFlowPipeline,
    ScoreSdePipeline,
    ScoreSdeVPScheduler,
    TextToImagePipeline,
)
from hf_diffusion.data.caption_coders import train_tokenizer
from hf_diffusion.models.mlp_points import PointDenoiser, PointGenerator


NAMES = {0: "cat", 1: "dog", 2: "crane", 3: "crane"}
IMAGE = {"sample_size": 8, "in_channels": 1, "model_channels": 8, "channel_mult": (1, 2), "num_res_blocks": 1}
ATTENTION = {"attention_resolutions": (2,), "num_heads": 2, "norm_num_groups": 4}


@dataclass(frozen=True)
class Tiny:
    """How to make a tiny pipeline, and `options` of a call of 3 steps that use what is its own."""

    make: Callable[..., DiffusionPipeline]
    options: dict[str, Any]


TINY: dict[type[DiffusionPipeline], Tiny] = {}


def public_pipelines() -> list[type[DiffusionPipeline]]:
    """Every pipeline class of the package's public list, but for those of texts."""
    public = [getattr(hf_diffusion, name) for name in hf_diffusion.__all__]
    pipelines = [cls for cls in public if issubclass(cls, DiffusionPipeline)]
    return [cls for cls in pipelines if getattr(cls, "output_name", "images") == "images"]


def tiny(cls: type[DiffusionPipeline], **options: Any) -> Callable:
    """Register what makes a tiny `cls` with 4 classes of NAMES; it takes `classes=None`, too."""

    def register(make: Callable[..., DiffusionPipeline]) -> Callable[..., DiffusionPipeline]:
        TINY[cls] = Tiny(make, {"num_inference_steps": 3, **options})
        return make

    return register


def with_random_weights(network: ModelMixin, std: float) -> ModelMixin:
    """Weights from a normal distribution; layers that start at zero hide labels and steps."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=std)
    return network.eval()


def make_unet(
    classes: int | None = 4, null_class: bool = True, learned_variance: bool = False, cls=ADMUNet2DModel, **options
):
    torch.manual_seed(0)
    knowledge = {"num_class_embeds": classes, "null_class": null_class and classes is not None}
    channels = {"out_channels": 2 if learned_variance else 1}
    unet = with_random_weights(cls(**IMAGE | ATTENTION | channels | knowledge | options), std=0.15)
    if classes is not None:
        torch.nn.init.normal_(unet.class_embedding.weight, std=2.0)
    return unet


def make_classifier(**options) -> ADMClassifier:
    torch.manual_seed(1)
    classes = {"num_classes": 4, "id2label": NAMES}
    return with_random_weights(ADMClassifier(**IMAGE | ATTENTION | classes | options), std=0.3)


@tiny(ClassifierFreeGuidancePipeline, guidance_scale=2.0)
def make_classifier_free(scheduler=None, classes: int | None = 4, id2label=NAMES, **options):
    unet = make_unet(classes, **options)
    scheduler = LinearDDPMScheduler() if scheduler is None else scheduler
    return quiet(ClassifierFreeGuidancePipeline(unet, scheduler, id2label=id2label if classes else None))


@tiny(ClassifierGuidancePipeline, guidance_scale=2.0)
def make_guided(scheduler=None, classes: int | None = None, classifier="default", id2label=None, **options):
    """Guided by a classifier of 4 classes; `classes` are those of the U-Net."""
    images = {name: options[name] for name in ("sample_size", "in_channels") if name in options}
    classifier = make_classifier(**images) if classifier == "default" else classifier
    scheduler = LinearDDPMScheduler() if scheduler is None else scheduler
    return quiet(ClassifierGuidancePipeline(make_unet(classes, **options), classifier, scheduler, id2label))


@tiny(ConsistencyPipeline, guidance_scale=2.0)
def make_consistency(scheduler=None, classes: int | None = 4, id2label=NAMES, **options):
    scheduler = ConsistencyScheduler() if scheduler is None else scheduler
    unet = make_unet(classes, **options)
    return quiet(ConsistencyPipeline(unet, scheduler, id2label=id2label if classes else None))


@tiny(DDGANPipeline)
def make_ddgan(steps: int = 3, classes: int | None = 4, id2label=NAMES, **options):
    torch.manual_seed(0)
    latent = {"latent_dim": 5, "latent_embed_dim": 8, "num_latent_layers": 1, "attention_sizes": (4,)}
    network = with_random_weights(DDGANGenerator(**IMAGE | latent | {"num_class_embeds": classes} | options), std=0.2)
    return quiet(DDGANPipeline(network, DDGANScheduler(steps), id2label=id2label if classes else None))


@tiny(EDMPipeline, guidance_scale=2.0, s_churn=1.0)
def make_edm(scheduler=None, classes: int | None = 4, id2label=NAMES, **options):
    """The last two of three steps are churned.

    A power of 2 as sigma_max can be divided out exactly.
    """
    scheduler = EDMHeunScheduler(sigma_max=16.0, s_max=8.0) if scheduler is None else scheduler
    return quiet(EDMPipeline(make_unet(classes, **options), scheduler, id2label if classes else None))


@tiny(FlowMatchingPipeline, guidance_scale=2.0)
def make_flow(scheduler=None, classes: int | None = 4, id2label=NAMES, prediction_type="velocity", **options):
    unet = make_unet(classes, **options)
    scheduler = FlowMatchingScheduler() if scheduler is None else scheduler
    names = id2label if classes else None
    return quiet(FlowMatchingPipeline(unet, scheduler, names, prediction_type=prediction_type))


@tiny(MeanFlowPipeline, guidance_scale=2.0)
def make_mean_flow(scheduler=None, classes: int | None = 4, id2label=NAMES, **options):
    unet = make_unet(classes, cls=ADMMeanFlowUNet2DModel, **options)
    scheduler = FlowMatchingScheduler(10) if scheduler is None else scheduler
    return quiet(MeanFlowPipeline(unet, scheduler, id2label=id2label if classes else None))


@tiny(DiscreteImagePipeline, guidance_scale=2.0)
def make_discrete(scheduler=None, classes: int | None = 4, id2label=NAMES, levels: int = 17, **options):
    channels = {"in_channels": 1, **options}["in_channels"]
    unet = make_unet(classes, **{"out_channels": levels * channels, **options})
    with torch.no_grad():
        # half precision shows in categories only where it changes which is drawn
        unet.conv_out.weight.mul_(8)
    scheduler = D3PMScheduler(levels, 20) if scheduler is None else scheduler
    return quiet(DiscreteImagePipeline(unet, scheduler, id2label=id2label if classes else None))


@tiny(ScoreSdePipeline, guidance_scale=1.5, corrector="langevin")
def make_score(scheduler=None, classes: int | None = 4, id2label=NAMES, **options):
    scheduler = ScoreSdeVPScheduler(beta_max=4.0) if scheduler is None else scheduler
    return quiet(ScoreSdePipeline(make_unet(classes, **options), scheduler, id2label if classes else None))


@tiny(TextToImagePipeline, guidance_scale=2.0)
def make_text_to_image(scheduler=None, classes: int | None = 4, id2label=NAMES, **options):
    torch.manual_seed(0)
    tokenizer = train_tokenizer([f"a {name}" for name in NAMES.values()], 300, length=8)
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    sizes = {"hidden_size": 12, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=8, **sizes, **ends)
    encoder = with_random_weights(CLIPTextModel(text), std=0.5)
    channels = {"out_channels": 2 if options.pop("learned_variance", False) else options.get("in_channels", 1)}
    shape = {"sample_size": 8, "in_channels": 1, "block_out_channels": (8, 16), "layers_per_block": 1, **channels}
    blocks = {
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "resnet_time_scale_shift": "scale_shift",
        "class_embed_type": "simple_projection",
        "projection_class_embeddings_input_dim": 12,
    }
    heads = {"cross_attention_dim": 12, "norm_num_groups": 4, "attention_head_dim": 8}
    unet = with_random_weights(UNet2DConditionModel(**{**shape, **blocks, **heads, **options}), std=0.15)
    torch.nn.init.normal_(unet.class_embedding.weight, std=1.0)
    scheduler = LinearDDPMScheduler() if scheduler is None else scheduler
    texts = {"text_length": 8, "id2label": id2label if classes else None, "caption_template": "a {}"}
    return quiet(TextToImagePipeline(unet, encoder, tokenizer, scheduler, **texts))


def make_points(classes: int | None = 4, **options) -> ClassifierFreeGuidancePipeline:
    """The same for points of the plane, (B, 2)."""
    torch.manual_seed(0)
    knowledge = {"num_class_embeds": classes, "null_class": classes is not None}
    network = with_random_weights(PointDenoiser(model_channels=8, num_res_blocks=1, **knowledge), std=0.3)
    return quiet(ClassifierFreeGuidancePipeline(network, LinearDDPMScheduler(), NAMES if classes else None))


def make_points_in_few_steps(classes: int | None = 4) -> DDGANPipeline:
    torch.manual_seed(0)
    sizes = {"model_channels": 8, "num_res_blocks": 1, "num_class_embeds": classes}
    network = with_random_weights(PointGenerator(**sizes), std=0.3)
    return quiet(DDGANPipeline(network, DDGANScheduler(3), NAMES if classes else None))


def quiet(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """The pipeline without its progress bar."""
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


def sample(pipe: DiffusionPipeline, labels=None, **options) -> Tensor:
    """Samples as the scheduler leaves them, in 3 steps unless told otherwise, one seed each."""
    options = {"num_inference_steps": 3, "output_type": "latent", **options}
    if labels is not None:
        options.setdefault("generator", seeds(*range(len(labels))))
    return pipe(labels, **options).images


class Recorder:
    """Keeps the rows, the arguments and the keyword arguments of every call of a network."""

    def __init__(self, network: ModelMixin):
        self.calls: list[tuple] = []
        network.register_forward_pre_hook(self.record, with_kwargs=True)

    def record(self, network, args, kwargs) -> None:
        self.calls.append((len(args[0]), args, kwargs))

    @property
    def rows(self) -> list[int]:
        return [rows for rows, *_ in self.calls]

    @property
    def labels(self) -> list[list[int] | None]:
        given = [kwargs.get("class_labels") for *_, kwargs in self.calls]
        return [None if labels is None else labels.tolist() for labels in given]
