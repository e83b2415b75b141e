"""What a run that learns to read captions is made of: settings of its networks, and the network
and tokenizer of a saved run that it starts from."""

from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from diffusers import DiffusionPipeline, UNet2DConditionModel
from transformers import AutoTokenizer, CLIPTextModel

from hf_diffusion.data.caption_coders import TokenCoder, fitting_length, train_tokenizer
from hf_diffusion.data.captions import Captions, StreamedCaptions
from hf_diffusion.data.protocol import TrainingData
from hf_diffusion.hub.loading import load_pipeline
from hf_diffusion.loop.checkpoints import MANIFEST, read_manifest
from hf_diffusion.loop.fine_tuning import Trained, newest_checkpoint, open_trained
from hf_diffusion.losses.captioned import ReadingUNet
from hf_diffusion.models.clip_noisy import NoisyCLIP


@dataclass(frozen=True)
class Reader:
    """A trained network that reads `length` tokens, and its tokenizer.

    A checkpoint holds no tokenizer, but its fingerprint.
    """

    trained: Trained
    length: int
    tokenizer: Any = None
    fingerprint: str | None = None


def trained_unet_reader(source: str) -> Reader:
    """The U-Net and the text model of a pipeline or a checkpoint of train_text_to_image; ValueError
    for others."""
    folder = newest_checkpoint(source)
    if (folder / MANIFEST).is_file():
        trained = open_trained(str(folder), (ReadingUNet,))
        length = trained.network.text_encoder.config.max_position_embeddings
        return Reader(trained, length, fingerprint=read_manifest(folder).get("text"))
    pipe = load_pipeline(source)
    unet, encoder = getattr(pipe, "unet", None), getattr(pipe, "text_encoder", None)
    if not isinstance(unet, UNet2DConditionModel) or not isinstance(encoder, CLIPTextModel):
        raise ValueError(
            f"init_from {source} is a {type(pipe).__name__} with a {type(encoder).__name__}, and an encoder from "
            "scratch is a CLIPTextModel beside a UNet2DConditionModel; give a run of train_text_to_image.py with it, "
            "or name the encoder by --text_encoder"
        )
    network = ReadingUNet(unet_config=_settings(unet), text_config=encoder.config.to_dict())
    network.unet.load_state_dict(unet.state_dict())
    network.text_encoder.load_state_dict(encoder.state_dict())
    trained = Trained(network, None, _settings(pipe.scheduler))
    return Reader(trained, pipe.config.text_length, pipe.tokenizer)


def trained_unet(source: str) -> Trained:
    """The U-Net alone, for the embeddings of a frozen encoder; ValueError for one that knows others
    than such a run makes."""
    try:
        facts = DiffusionPipeline.load_config(str(newest_checkpoint(source)))
    except OSError:
        # It is a checkpoint, a network alone, or nothing, which is told where it is opened.
        facts = {}
    if facts.get("padding_id") is not None:
        raise ValueError(
            f"init_from {source} reads padding as a part of texts, as GLIDE does, and no training here does; start "
            "from a run of train_text_to_image.py"
        )
    return open_trained(source, (UNet2DConditionModel,), (ReadingUNet, "unet"))


def trained_clip_reader(source: str) -> Reader:
    """The CLIP of a run or a checkpoint of train_clip; ValueError for others."""
    folder = newest_checkpoint(source)
    is_checkpoint = (folder / MANIFEST).is_file()
    trained = open_trained(str(folder) if is_checkpoint else source, (NoisyCLIP,))
    length = trained.network.config.text_length
    if is_checkpoint:
        return Reader(trained, length, fingerprint=read_manifest(folder).get("text"))
    return Reader(trained, length, AutoTokenizer.from_pretrained(source))


def token_coder(
    config: Any, accelerator: Accelerator, captions: Captions | StreamedCaptions, former: Reader | None
) -> TokenCoder:
    """What makes tokens of captions: the tokenizer of a saved run, or one trained on the captions.

    ValueError for a checkpoint whose tokenizer the captions do not make.
    """
    if former is not None and former.tokenizer is not None:
        fitting_length(former.tokenizer, captions.texts, former.length)
        return TokenCoder(former.tokenizer, former.length)
    if not captions.whole:
        accelerator.print(f"the tokenizer is trained on captions of the stream's first {captions.rows:,} rows")
    tokenizer = train_tokenizer(captions.texts, config.text_vocabulary, config.text_length)
    length = fitting_length(tokenizer, captions.texts, config.text_length, captions.whole)
    coder = TokenCoder(tokenizer, length if former is None else former.length)
    tokenizer.model_max_length = coder.length
    if former is not None and former.fingerprint != coder.fingerprint:
        raise ValueError(
            f"init_from {config.init_from} is a checkpoint, which holds no tokenizer, and the captions of this run "
            "make another one; give the folder of a finished run"
        )
    return coder


def unet_settings(config: Any, data: TrainingData, text_width: int) -> dict[str, Any]:
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


def shape_of_unet(unet: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run that make a U-Net of this config."""
    first, *_ = widths = unet["block_out_channels"]
    attends = [kind.startswith("SimpleCrossAttn") for kind in unet["down_block_types"]]
    return {
        "model_channels": first,
        "channel_mult": [width / first for width in widths],
        "num_res_blocks": unet["layers_per_block"],
        "attention_resolutions": [2**level for level, here in enumerate(attends) if here],
        "num_head_channels": unet["attention_head_dim"],
        "norm_num_groups": unet["norm_num_groups"],
    }


def text_settings(config: Any, coder: TokenCoder) -> dict[str, Any]:
    """The settings of a CLIPTextModel from scratch."""
    tokenizer = coder.tokenizer
    return {
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


def shape_of_text_model(text: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run that make a text model of this config."""
    return {
        "text_width": text["hidden_size"],
        "text_layers": text["num_hidden_layers"],
        "text_heads": text["num_attention_heads"],
        "text_length": text["max_position_embeddings"],
    }


def _settings(part: Any) -> dict[str, Any]:
    return {name: value for name, value in part.config.items() if not name.startswith("_")}
