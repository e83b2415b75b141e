"""The layout in which a compiled network on channels-last maps hands gradients to convolutions."""

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table

from hf_diffusion import ADMUNet2DModel
from hf_diffusion.models import unet_adm


def network(**settings) -> ADMUNet2DModel:
    shape = {"model_channels": 16, "channel_mult": (1, 2), "num_res_blocks": 1, "attention_resolutions": (2,)}
    torch.manual_seed(0)
    made = ADMUNet2DModel(sample_size=8, in_channels=3, num_head_channels=16, norm_num_groups=8, **shape, **settings)
    # the layers that begin as zero would hide what lies behind them
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return made.to(memory_format=torch.channels_last)


def learn(made: ADMUNet2DModel) -> list[torch.Tensor]:
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)
    made(x, torch.tensor([3, 900])).sample.square().mean().backward()
    return [parameter.grad for parameter in made.parameters()]


def gradients_of_convolutions(**settings) -> list[torch.Tensor]:
    """What the backward pass of every convolution is given, by the compiler's graph."""
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    made = network(**settings)
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep, decompositions=select_decomp_table())
    torch._dynamo.reset()
    made.compile(backend=backend)
    learn(made)
    _, backward = graphs
    target = torch.ops.aten.convolution_backward.default
    return [node.args[0].meta["val"] for node in backward.graph.nodes if node.target is target]


@pytest.mark.parametrize("settings", [{}, {"resblock_updown": True}], ids=["plain", "resampling blocks"])
def test_every_convolution_gets_its_gradient_whole_and_channels_last(settings, monkeypatch):
    def strange() -> int:
        found = gradients_of_convolutions(**settings)
        assert len(found) > 15
        return sum(not gradient.is_contiguous(memory_format=torch.channels_last) for gradient in found)

    assert strange() == 0
    monkeypatch.setattr(unet_adm, "channels_last_gradient", lambda x: x)
    assert strange() > 3


def test_the_gradients_are_those_of_the_network_that_is_not_compiled():
    plain, compiled = network(), network()
    torch._dynamo.reset()
    compiled.compile(backend="aot_eager")
    for one, other in zip(learn(compiled), learn(plain), strict=True):
        torch.testing.assert_close(one, other)
