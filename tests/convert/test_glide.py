"""GLIDE's checkpoints into stock classes, beside its formulas, and by the command.

tests/golden/replays_glide.py replays the reference's own vectors.
"""

import gzip
import json
import math
import re

import pytest
import torch
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from torch.nn import functional as F

from hf_diffusion import TextToImagePipeline, cli
from hf_diffusion.convert.glide import networks_from_glide, scheduler_from_glide
from hf_diffusion.convert.glide_text import tokenizer_from_glide
from tests.launching import run_claims


SMALL = {"channels": 32, "mult": (1, 2, 3), "res_blocks": 2, "attends": (False, True, False), "width": 24}
SMALL |= {"layers": 2, "vocabulary": 260, "length": 6, "inputs": 3}
HEAD, TEXT_HEADS = 16, 3
FLAGS = "--image_size 8 --num_head_channels 16 --xf_heads 3"
RELEASED = {"channels": 192, "mult": (1, 2, 3, 4), "res_blocks": 3, "attends": (False, True, True, True), "width": 512}
RELEASED |= {"layers": 16, "vocabulary": 50257, "length": 128, "inputs": 3}


def plan(channels, mult, res_blocks, attends, **_):
    """Their blocks in order: name, kind, channels in and out; and where a skip leaves or joins."""
    blocks, skips, width = [], [channels], channels
    for level, factor in enumerate(mult):
        for _ in range(res_blocks):
            name, out = f"input_blocks.{len(skips)}", factor * channels
            blocks += [(f"{name}.0", "same", width, out)] + [(f"{name}.1", "attn", out, out)] * attends[level]
            blocks.append((None, "leave", out, out))
            width = out
            skips.append(width)
        if level < len(mult) - 1:
            blocks += [(f"input_blocks.{len(skips)}.0", "down", width, width), (None, "leave", width, width)]
            skips.append(width)
    blocks += [(f"middle_block.{i}", kind, width, width) for i, kind in enumerate(("same", "attn", "same"))]
    count = 0
    for level, factor in reversed(list(enumerate(mult))):
        for place in range(res_blocks + 1):
            name, out = f"output_blocks.{count}", factor * channels
            blocks.append((None, "join", width, width + skips[-1]))
            blocks.append((f"{name}.0", "same", width + skips.pop(), out))
            blocks += [(f"{name}.1", "attn", out, out)] * attends[level]
            width, count = out, count + 1
            if level and place == res_blocks:
                blocks.append((f"{name}.{1 + attends[level]}", "up", width, width))
    return blocks


def checkpoint(**settings) -> dict[str, Tensor]:
    """A random state dict of a Text2ImUNet, by their names."""
    shapes, channels, width = {}, settings["channels"], settings["width"]
    length, vocabulary = settings["length"], settings["vocabulary"]

    def layer(name, out, *inputs):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, *inputs), (out,)

    layer("time_embed.0", 4 * channels, channels)
    layer("time_embed.2", 4 * channels, 4 * channels)
    layer("input_blocks.0.0", channels, settings["inputs"], 3, 3)
    for name, kind, inner, out in plan(**settings):
        if kind == "attn":
            layer(f"{name}.norm", out)
            for part, rows, columns in (("qkv", 3 * out, out), ("encoder_kv", 2 * out, width), ("proj_out", out, out)):
                layer(f"{name}.{part}", rows, columns, 1)
        elif name is not None:
            layer(f"{name}.in_layers.0", inner)
            layer(f"{name}.in_layers.2", out, inner, 3, 3)
            layer(f"{name}.emb_layers.1", 2 * out, 4 * channels)
            layer(f"{name}.out_layers.0", out)
            layer(f"{name}.out_layers.3", out, out, 3, 3)
            if inner != out:
                layer(f"{name}.skip_connection", out, inner, 1, 1)
    layer("out.0", channels)
    layer("out.2", 6, channels, 3, 3)
    for block in range(settings["layers"]):
        name = f"transformer.resblocks.{block}"
        parts = {"attn.c_qkv": (3, 1), "attn.c_proj": (1, 1), "mlp.c_fc": (4, 1), "mlp.c_proj": (1, 4)}
        for part, (rows, columns) in parts.items():
            layer(f"{name}.{part}", rows * width, columns * width)
        layer(f"{name}.ln_1", width)
        layer(f"{name}.ln_2", width)
    layer("final_ln", width)
    layer("transformer_proj", 4 * channels, width)
    shapes |= {"token_embedding.weight": (vocabulary, width), "positional_embedding": (length, width)}
    shapes["padding_embedding"] = (length, width)
    torch.manual_seed(0)
    return {name: torch.randn(shape) / math.sqrt(math.prod(shape[1:])) for name, shape in shapes.items()}


def reference(state: dict[str, Tensor], x: Tensor, t: Tensor, tokens: Tensor, mask: Tensor, settings) -> tuple:
    """Output, and states of the texts, from the formulas of GLIDE."""

    def get(name):
        return state[f"{name}.weight"], state[f"{name}.bias"]

    def attend(qkv, more, heads):
        """[q_0, k_0, v_0, q_1, ...] (B, 3 C, N) to (B, C, N); more keys and values come first."""
        q, k, v = qkv.unflatten(1, (heads, 3, -1)).unbind(2)
        if more is not None:
            k, v = (torch.cat(pair, -1) for pair in zip(more.unflatten(1, (heads, 2, -1)).unbind(2), (k, v)))
        weights = (q.mT @ k / math.sqrt(q.shape[2])).softmax(-1)
        return (v @ weights.mT).flatten(1, 2)

    h = torch.where(
        mask[..., None],
        state["token_embedding.weight"][tokens] + state["positional_embedding"],
        state["padding_embedding"],
    )
    for block in range(settings["layers"]):
        name = f"transformer.resblocks.{block}"
        qkv = F.linear(F.layer_norm(h, h.shape[-1:], *get(f"{name}.ln_1")), *get(f"{name}.attn.c_qkv"))
        h = h + F.linear(attend(qkv.mT, None, TEXT_HEADS).mT, *get(f"{name}.attn.c_proj"))
        inner = F.gelu(F.linear(F.layer_norm(h, h.shape[-1:], *get(f"{name}.ln_2")), *get(f"{name}.mlp.c_fc")))
        h = h + F.linear(inner, *get(f"{name}.mlp.c_proj"))
    texts = F.layer_norm(h, h.shape[-1:], *get("final_ln"))

    half = settings["channels"] // 2
    angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(half) / half)
    emb = F.silu(F.linear(torch.cat([angles.cos(), angles.sin()], 1), *get("time_embed.0")))
    emb = F.linear(emb, *get("time_embed.2")) + F.linear(texts[:, -1], *get("transformer_proj"))
    h = F.conv2d(x, *get("input_blocks.0.0"), padding=1)
    skips = [h]
    for name, kind, *_ in plan(**settings):
        if kind == "leave":
            skips.append(h)
        elif kind == "join":
            h = torch.cat([h, skips.pop()], 1)
        elif kind == "attn":
            flat, heads = h.flatten(2), h.shape[1] // HEAD
            more = F.conv1d(texts.mT, *get(f"{name}.encoder_kv"))
            flat = attend(F.conv1d(F.group_norm(flat, 32, *get(f"{name}.norm")), *get(f"{name}.qkv")), more, heads)
            h = h + F.conv1d(flat, *get(f"{name}.proj_out")).view_as(h)
        else:
            inner = F.silu(F.group_norm(h, 32, *get(f"{name}.in_layers.0")))
            if kind != "same":
                h, inner = (
                    F.avg_pool2d(y, 2) if kind == "down" else F.interpolate(y, scale_factor=2) for y in (h, inner)
                )
            inner = F.conv2d(inner, *get(f"{name}.in_layers.2"), padding=1)
            scale, shift = F.linear(F.silu(emb), *get(f"{name}.emb_layers.1"))[..., None, None].chunk(2, 1)
            inner = F.silu(F.group_norm(inner, 32, *get(f"{name}.out_layers.0")) * (1 + scale) + shift)
            inner = F.conv2d(inner, *get(f"{name}.out_layers.3"), padding=1)
            if f"{name}.skip_connection.weight" in state:
                h = F.conv2d(h, *get(f"{name}.skip_connection"))
            h = h + inner
    return F.conv2d(F.silu(F.group_norm(h, 32, *get("out.0"))), *get("out.2"), padding=1), texts


def small_networks(state):
    return networks_from_glide(state, image_size=8, num_head_channels=HEAD, xf_heads=TEXT_HEADS)


CHANGES = [{}, {"attends": (True, False, True), "res_blocks": 1}, {"mult": (1, 1), "attends": (False, False)}]


@pytest.mark.parametrize("changes", [*CHANGES, {"mult": (1,), "attends": (True,)}, {"inputs": 7}], ids=str)
@torch.no_grad()
def test_the_stock_networks_compute_what_the_formulas_say(changes):
    settings = {**SMALL, **changes}
    state = checkpoint(**settings)
    unet, encoder = small_networks(state)
    x, t = torch.randn(2, settings["inputs"], 8, 8), torch.tensor([3.0, 700.0])
    tokens, mask = torch.randint(0, 260, (2, 6)), torch.tensor([[True] * 4 + [False] * 2, [False] * 6])
    expected, texts = reference(state, x, t, tokens, mask, settings)
    found = encoder(input_ids=torch.where(mask, tokens, 260 + torch.arange(6)))
    torch.testing.assert_close(found.last_hidden_state, texts, rtol=1e-4, atol=2e-5)
    assert torch.equal(found.pooler_output, found.last_hidden_state[:, -1])
    output = unet(x, t, encoder_hidden_states=texts, class_labels=texts[:, -1]).sample
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


def test_the_released_base_model_is_recognised_by_its_sizes():
    with torch.device("meta"):
        unet, encoder = networks_from_glide(checkpoint(**RELEASED))
    attends = ("ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * 3)
    assert unet.config.down_block_types == attends and unet.config.layers_per_block == 3
    assert unet.config.block_out_channels == (192, 384, 576, 768)
    config = encoder.config
    assert (config.num_hidden_layers, config.num_attention_heads, config.vocab_size) == (16, 8, 50257 + 128)
    process = scheduler_from_glide()
    process.set_timesteps(100)
    ours = process.timesteps.tolist()
    process.set_timesteps(timesteps="100")
    assert ours == process.timesteps.tolist() and ours[0] == 999 and ours[-1] == 0


# --- by the command -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """base.pt and the folder of its tokenizer: bytes, three merges, and the end."""
    folder = tmp_path_factory.mktemp("glide")
    state = checkpoint(**SMALL)
    torch.save(state, folder / "base.pt")
    write_tokenizer(folder / "tokenizer")
    return folder


def write_tokenizer(folder, end="<|endoftext|>"):
    words = [*sorted(ByteLevel.alphabet()), "ca", "cat", "\u0120d", end]
    folder.mkdir()
    vocabulary = {word: number for number, word in enumerate(words)}
    (folder / "encoder.json.gz").write_bytes(gzip.compress(json.dumps(vocabulary).encode()))
    merges = "#version: 0.2\nc a\nca t\n\u0120 d\n"
    (folder / "vocab.bpe.gz").write_bytes(gzip.compress(merges.encode()))
    return folder


def convert(source, output, *words) -> int:
    return cli.main(["convert", str(source), str(output), "--from", "glide", *map(str, words)])


def test_texts_are_lowered_merged_cut_and_padded_by_position(given):
    tokenizer = tokenizer_from_glide(given / "tokenizer", 260, 6)
    assert tokenizer.convert_ids_to_tokens(tokenizer("Cat do")["input_ids"]) == ["cat", "\u0120d", "o"]
    assert tokenizer("")["input_ids"] == [] and tokenizer.pad_token_id == 259
    assert tokenizer.decode(tokenizer("a cat, \u00e9")["input_ids"]) == "a cat, \u00e9"


def test_the_command_makes_a_pipeline_that_stock_classes_load_and_whose_step_is_glides(given, tmp_path, capsys):
    assert convert(given / "base.pt", tmp_path / "out", "--tokenizer", given / "tokenizer", "--flags", FLAGS) == 0
    assert "TextToImagePipeline of a UNet2DConditionModel and a SiglipTextModel" in capsys.readouterr().out
    pipe = TextToImagePipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    latents = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    call = {"prompt": ["cat do", ""], "timesteps": [700], "guidance_scale": 1.0, "output_type": "latent"}
    found = pipe(**call, latents=latents).images
    tokens = pipe.tokenizer(["cat do", ""], padding="max_length", max_length=6, return_tensors="pt")
    mask = tokens["attention_mask"] == 1
    assert mask.sum(1).tolist() == [3, 0]
    times = torch.full((2,), 700.0)
    output, _ = reference(torch.load(given / "base.pt"), latents, times, tokens["input_ids"], mask, SMALL)
    alpha_bar = pipe.scheduler.alpha_bar[700].float()
    x_0 = ((latents - (1 - alpha_bar).sqrt() * output[:, :3]) / alpha_bar.sqrt()).clamp(-1, 1)
    torch.testing.assert_close(found, x_0, rtol=1e-4, atol=1e-3)
    claims = run_claims(
        f"""
from diffusers import UNet2DConditionModel
from transformers import AutoTokenizer, SiglipTextModel
folder = {str(tmp_path / "out")!r}
claims["unet"] = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").config.out_channels
tokenizer = AutoTokenizer.from_pretrained(folder, subfolder="tokenizer")
encoder = SiglipTextModel.from_pretrained(folder, subfolder="text_encoder")
states = encoder(tokenizer("cat do", return_tensors="pt")["input_ids"]).last_hidden_state
claims["states"] = list(states.shape)
""",
        with_package=False,
    )
    assert claims == {"unet": 6, "states": [1, 3, 24]}


def without(name):
    return lambda state: {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    "change, sentence",
    [
        (without("padding_embedding"), "the checkpoint has no padding_embedding, which a Text2ImUNet"),
        (without("token_embedding.weight"), "is no Text2ImUNet of glide-text2im: it lacks a text transformer"),
        (lambda state: {**state, "label_emb.weight": torch.zeros(1)}, "holds 1 tensors that GLIDE does not have"),
        (lambda state: {**state, "out.2.weight": torch.zeros(6, 32, 1, 1)}, "does not fit the network"),
    ],
)
def test_a_checkpoint_of_another_network_is_refused(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        small_networks(change(checkpoint(**SMALL)))


def test_what_cannot_be_converted_is_met_by_a_sentence_and_nothing_is_written(given, tmp_path, capsys):
    torch.save(checkpoint(**{**SMALL, "inputs": 6}), tmp_path / "upsample.pt")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    other = write_tokenizer(tmp_path / "other")
    (other / "encoder.json").write_text('{"a": 0}')
    (other / "encoder.json.gz").unlink()
    ours, flags = ("--tokenizer", given / "tokenizer"), ("--flags", FLAGS)
    for words, sentence in (
        ((tmp_path / "upsample.pt", *ours, *flags), "takes 6 channels, as GLIDE's model for upsampling does"),
        ((tmp_path / "other.safetensors", *ours), "is no Text2ImUNet"),
        ((given / "base.pt", *ours), "num_head_channels 64 does not divide"),
        ((given / "base.pt", *ours, "--flags", "--num_head_channels 16 --xf_heads 5"), "xf_heads 5 does not divide"),
        ((given / "base.pt", *ours, "--flags", "--image_size x"), "--flags: image_size must be a number, not 'x'"),
        ((given / "base.pt", *ours, "--flags", FLAGS + " --noise_schedule cosine"), "noise_schedule 'cosine'"),
        (
            (given / "base.pt", "--tokenizer", tmp_path, *flags),
            "must be the folder glide_text2im/tokenizer .* No such file",
        ),
        (
            (given / "base.pt", "--tokenizer", other, *flags),
            "must be the folder .* it has 1 tokens, and the checkpoint 260",
        ),
    ):
        source, *rest = words
        assert convert(source, tmp_path / "out", *rest) == 1
        said = capsys.readouterr().err.splitlines()[-1]
        assert re.search(sentence, said), said
    assert not (tmp_path / "out").exists()
    for words, sentence in (
        (
            (given / "base.pt", tmp_path / "out", "--from", "glide"),
            "no way to read a prompt, since the checkpoint holds",
        ),
        ((tmp_path, tmp_path / "out", "--to", "openai", *ours), "goes with --from glide only; leave it out"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["convert", *map(str, words)])
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
