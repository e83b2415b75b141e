"""GLIDE's text transformer and its tokenizer, in classes of transformers; see `convert.glide`."""

import gzip
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, SiglipTextConfig, SiglipTextModel


# transformers' name -> theirs, inside a layer of the text transformer
TEXT_LAYER = {
    "layer_norm1": "ln_1",
    "self_attn.out_proj": "attn.c_proj",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
TOKENIZER_FILES = ("encoder.json", "vocab.bpe")


@torch.no_grad()
def text_model_from_glide(left: dict[str, Tensor], heads: int) -> SiglipTextModel:
    """The text transformer, whose tensors are taken from `left`."""
    tokens, positions = take(left, "token_embedding.weight"), take(left, "positional_embedding")
    padding = take(left, "padding_embedding")
    (length, width), vocab_size = positions.shape, len(tokens)
    if heads < 1 or width % heads:
        raise ValueError(
            f"xf_heads {heads} does not divide the {width} features of the text transformer; give the one that it was "
            "trained with"
        )
    layers = 1 + max(int(name.split(".")[2]) for name in left if name.startswith("transformer.resblocks."))
    config = SiglipTextConfig(
        vocab_size=vocab_size + length,
        hidden_size=width,
        intermediate_size=len(known(left, "transformer.resblocks.0.mlp.c_fc.weight")),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=length,
        hidden_act="gelu",
        layer_norm_eps=1e-5,
        projection_size=width,
        pad_token_id=vocab_size,
        bos_token_id=None,
        eos_token_id=vocab_size - 1,
    )
    model = SiglipTextModel(config)
    state = {
        # The model adds the position's embedding, which the padding of theirs does not have.
        "embeddings.token_embedding.weight": torch.cat([tokens, padding - positions]),
        "embeddings.position_embedding.weight": positions,
        # `pooler_output` is the last state itself.
        "head.weight": torch.eye(width),
        "head.bias": torch.zeros(width),
    } | take_layer(left, "final_layer_norm", "final_ln")
    for layer in range(layers):
        ours, theirs = f"encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        names = tuple(f"{ours}.self_attn.{name}_proj" for name in "qkv")
        state |= take_stacked(left, f"{theirs}.attn.c_qkv", names, heads)
        for name, other in TEXT_LAYER.items():
            state |= take_layer(left, f"{ours}.{name}", f"{theirs}.{other}")
    # Versions of transformers differ in whether the model has this part.
    prefix = "text_model." if next(iter(model.state_dict())).startswith("text_model.") else ""
    fill(model, {prefix + name: tensor for name, tensor in state.items()})
    return model.eval()


def tokenizer_from_glide(folder: Path, vocab_size: int, length: int) -> PreTrainedTokenizerFast:
    """The byte-pair encoding of glide_text2im/tokenizer, of lower-case texts.

    `folder` holds encoder.json and vocab.bpe, gzipped (.gz) or not. Raises ValueError where they
    are not, or not for `vocab_size` tokens.
    """
    try:
        vocabulary = json.loads(_read_text(folder, TOKENIZER_FILES[0]))
        # The first line is a version.
        lines = _read_text(folder, TOKENIZER_FILES[1]).split("\n")[1:]
        if len(vocabulary) != vocab_size:
            raise ValueError(f"it has {len(vocabulary)} tokens, and the checkpoint {vocab_size}")
        model = models.BPE(vocabulary, [tuple(line.split()) for line in lines if line])
    except Exception as error:  # BPE raises Exception itself
        raise ValueError(
            f"--tokenizer {folder} must be the folder glide_text2im/tokenizer of glide-text2im, with "
            f"{' and '.join(TOKENIZER_FILES)}, or those with .gz: {error}"
        ) from error
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = max(vocabulary, key=vocabulary.get)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=end, eos_token=end, model_max_length=length, padding_side="right"
    )


def _read_text(folder: Path, name: str) -> str:
    packed = folder / f"{name}.gz"
    content = gzip.decompress(packed.read_bytes()) if packed.is_file() else (folder / name).read_bytes()
    return content.decode("utf-8")


# --- tensors of a checkpoint --------------------------------------------------------------------


def take(left: dict[str, Tensor], name: str) -> Tensor:
    """A tensor of the checkpoint, which then is no longer left."""
    if name not in left:
        raise ValueError(
            f"the checkpoint has no {name}, which a Text2ImUNet of glide-text2im has (with xf_padding, xf_final_ln "
            "and resblock_updown)"
        )
    return left.pop(name)


def take_layer(left: dict[str, Tensor], ours: str, theirs: str) -> dict[str, Tensor]:
    """Weight and bias of a layer, by our name."""
    return {f"{ours}.{kind}": take(left, f"{theirs}.{kind}") for kind in ("weight", "bias")}


def take_stacked(left: dict[str, Tensor], theirs: str, names: tuple[str, ...], heads: int) -> dict[str, Tensor]:
    """Parts of a linear map whose rows are interleaved, [q_0, k_0, v_0, q_1, ...] by heads."""
    state = {}
    for kind in ("weight", "bias"):
        # of a convolution over positions (O, I, 1), or of a linear map (O, I)
        rows = take(left, f"{theirs}.{kind}")
        rows = rows.reshape(len(rows), -1) if kind == "weight" else rows
        parts = rows.reshape(heads, len(names), -1, *rows.shape[1:]).unbind(1)  # each (heads, C / heads, ...)
        state |= {f"{name}.{kind}": part.flatten(0, 1) for name, part in zip(names, parts)}
    return state


def known(state: Mapping[str, Tensor], name: str) -> Tensor:
    """A tensor that stays in the checkpoint."""
    return take(dict(state), name)


def fill(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a model its tensors; ValueError where they are not all of it."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the checkpoint does not fit the network that its sizes tell of: {reason[:300]}") from error
