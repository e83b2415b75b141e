"""NoisyCLIP: GLIDE's towers, number for number, and what its parts promise."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hf_diffusion import NoisyCLIP
from tests.golden.manifests import FULL_SET


TINY = {"num_timesteps": 50, "sample_size": 8, "patch_size": 4, "width": 16, "num_layers": 2, "num_heads": 2}
TINY |= {"embed_dim": 12, "vocab_size": 40, "text_length": 10, "text_width": 16, "text_layers": 2, "text_heads": 2}
LINEAR = {"f_attn.f_q": "query", "f_attn.f_k": "key", "f_attn.f_v": "value", "f_attn.f_c": "out"}
LINEAR |= {"f_mlp.f_1": "widen", "f_mlp.f_2": "narrow"}
OUTSIDE = {
    "image_encoder.blocks.input.patch_proj": "patches.weight",
    "image_encoder.blocks.input.w_t": "timesteps.weight",
    "image_encoder.blocks.input.w_pos": "image_positions",
    "image_encoder.blocks.input.ln.g": "image_norm.weight",
    "image_encoder.blocks.input.ln.b": "image_norm.bias",
    "text_encoder.blocks.input.w_voc": "tokens.weight",
    "text_encoder.blocks.input.w_pos": "text_positions",
}


def ours(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """GLIDE's weights by our names."""
    names = dict(OUTSIDE)
    for side in ("image", "text"):
        for block in range(2):
            there, here = f"{side}_encoder.blocks.block_{block}.", f"{side}_tower.blocks.{block}."
            names |= {
                f"{there}{a}.{x}": f"{here}{b}.{y}"
                for a, b in LINEAR.items()
                for x, y in (("w", "weight"), ("b", "bias"))
            }
            for a, b in (("f_attn.ln", "norm_1"), ("f_mlp.ln", "norm_2")):
                names |= {f"{there}{a}.g": f"{here}{b}.weight", f"{there}{a}.b": f"{here}{b}.bias"}
        there, here = f"{side}_encoder.blocks.output.", f"{side}_tower."
        names |= {f"{there}f.w": f"{here}project.weight", f"{there}ln.g": f"{here}norm_out.weight"}
        names |= {f"{there}ln.b": f"{here}norm_out.bias"}
    return {names[name]: value.double() for name, value in theirs.items()} | {
        "logit_scale": torch.tensor(math.log(100))
    }


@pytest.mark.skipif(not (FULL_SET / "glide").is_dir(), reason="the vectors of GLIDE are not here")
def test_embeddings_and_gradient_are_those_of_glide():
    vectors = np.load(FULL_SET / "glide" / "clip.npz")
    case = {
        key.split("/")[1]: torch.from_numpy(value) for key, value in vectors.items() if key.startswith("embeddings/")
    }
    pixels = (122.77093945, 116.74601272, 104.09373519), (68.50053285, 66.63215831, 70.32316309)
    normalised = {
        "image_mean": [mean / 127.5 - 1 for mean in pixels[0]],
        "image_std": [std / 127.5 for std in pixels[1]],
    }
    clip = NoisyCLIP(**TINY, **normalised).double()
    clip.load_state_dict(ours(load_file(FULL_SET / "glide" / "clip.safetensors")))
    mask = (torch.arange(10) < case["lens"][:, None]).long()
    x = case["x"].requires_grad_()
    images, texts, scale = clip(x, case["t"], case["tokens"], mask)
    # the reference keeps the pixels' means in float32
    close = {"rtol": 1e-6, "atol": 1e-7}
    torch.testing.assert_close(images, case["image"], **close)
    torch.testing.assert_close(texts, case["text"], **close)
    torch.testing.assert_close(scale * texts @ images.T, case["logits"], **close)
    gradient = torch.autograd.grad(2.5 * scale * (texts * images).sum(), x)[0]
    torch.testing.assert_close(gradient, case["gradient"], rtol=1e-5, atol=1e-6)


def test_what_follows_the_end_of_a_text_does_not_matter_and_the_timestep_does():
    torch.manual_seed(0)
    clip = NoisyCLIP(**TINY).eval()
    tokens, mask = torch.randint(3, 40, (2, 10)), torch.ones(2, 10, dtype=torch.int64)
    mask[:, 6:] = 0
    changed = torch.where(mask == 1, tokens, 5)
    assert torch.equal(clip.text_embeddings(tokens, mask), clip.text_embeddings(changed, mask))
    x = torch.randn(2, 3, 8, 8)
    one, other = clip.image_embeddings(x, 3), clip.image_embeddings(x, torch.tensor([3, 40]))
    assert torch.equal(one[0], other[0]) and not torch.allclose(one[1], other[1])
    torch.testing.assert_close(one.norm(dim=1), torch.ones(2))


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"patch_size": 3}, "patch_size 3 does not divide the sides \\(8, 8\\); give one that does"),
        ({"num_heads": 3}, "num_heads 3 does not divide the width 16"),
        ({"text_heads": 5}, "text_heads 5 does not divide the width 16"),
    ],
)
def test_sizes_that_do_not_divide_are_met_by_a_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        NoisyCLIP(**{**TINY, **options})
