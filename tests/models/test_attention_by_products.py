"""Attention that is trained in bfloat16 on a CPU goes by products of matrices: it computes what
torch's kernel computes, and that kernel serves everything else.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_diffusion.models import transformer_pixel, transformer_tokens, unet_adm


B, HEADS, L, D = 2, 3, 40, 16
kernel = F.scaled_dot_product_attention


def adm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return unet_adm.attention(q, k, v)


def tokens(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return transformer_tokens.TokenAttention(HEADS * D, HEADS, qk_norm=False).attend(q, k, v)


def pixels(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The processor between layers that change nothing."""
    layer = transformer_pixel.PixelAttention(HEADS * D, HEADS)
    layer.qkv = layer.proj = layer.norm_q = layer.norm_k = torch.nn.Identity()
    turns = torch.ones(v.shape[-2], D // 2), torch.zeros(v.shape[-2], D // 2)
    stacked = torch.cat([x.transpose(1, 2).flatten(2) for x in (q, k, v)], dim=2)
    return layer(stacked, *turns).unflatten(2, (HEADS, D)).transpose(1, 2)


def heads(length: int = L) -> list[Tensor]:
    """q, k, v (B, HEADS, L, D) in bfloat16, which ask for gradients."""
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(B, HEADS, length, D, generator=rng).bfloat16().requires_grad_() for _ in range(3)]


def with_gradients(function, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    out = function(q, k, v)
    pull = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out, *torch.autograd.grad(out, (q, k, v), pull)]


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """Lengths that torch's kernel was called with."""
    seen = []

    def counted(query, key, value, **kwargs):
        seen.append(query.shape[-2])
        return kernel(query, key, value, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    return seen


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("function", [adm, tokens, pixels])
def test_values_and_gradients_are_those_of_float32(function, autocast, calls):
    q, k, v = heads()
    exact = with_gradients(kernel, *(x.detach().float().requires_grad_() for x in (q, k, v)))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = with_gradients(function, q, k, v)
    assert not calls
    for near, right in zip(found, exact):
        assert near.dtype == torch.bfloat16
        # the kernel's own error in bfloat16 is 0.2 to 0.35 % here
        assert (near.float() - right).norm() < 0.008 * right.norm()


@pytest.mark.parametrize("function", [adm, tokens, pixels])
def test_what_learns_nothing_float32_and_long_sequences_go_by_the_kernel(function, calls):
    q, k, v = heads()
    function(*(x.detach() for x in (q, k, v)))
    function(*(x.float() for x in (q, k, v)))
    function(*heads(unet_adm.SHORT + 8))
    assert calls == [L, L, unet_adm.SHORT + 8]
    assert unet_adm.SHORT == transformer_tokens.SHORT == transformer_pixel.SHORT
