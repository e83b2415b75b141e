"""One word for speed: what it does on a device, and that the samples stay."""

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn
from torch._dynamo.utils import counters

from hf_diffusion import ClassifierFreeGuidancePipeline
from hf_diffusion.commands.sample import SampleCommand
from hf_diffusion.sampling import speed
from hf_diffusion.sampling.drawing import draw
from hf_diffusion.sampling.loading import load_for_sampling
from tests.pipelines.tiny import make_classifier_free


def tiny() -> ClassifierFreeGuidancePipeline:
    return make_classifier_free()


@pytest.mark.parametrize("is_native", [True, False])
def test_a_cpu_takes_bfloat16_where_it_multiplies_it_and_draws_the_same_but_for_rounding(monkeypatch, is_native):
    monkeypatch.setattr(speed, "cpu_multiplies_bf16", lambda: is_native)
    pipe = tiny()
    exact = draw(pipe, range(4), [0, 1, 2, 3], num_inference_steps=3).astype(float)
    said = speed.speed_up(pipe)
    near = draw(pipe, range(4), [0, 1, 2, 3], num_inference_steps=3).astype(float)
    if not is_native:
        assert said == "nothing: this cpu computes fastest as it is" and np.array_equal(near, exact)
        return
    assert said == "bfloat16" and pipe.unet.dtype == torch.bfloat16
    assert 0 < np.abs(near - exact).mean() < 2 < np.abs(exact[0] - exact[1]).mean()


def test_a_precision_that_was_chosen_stays(monkeypatch):
    monkeypatch.setattr(speed, "cpu_multiplies_bf16", lambda: True)
    pipe = tiny()
    pipe.unet.to(torch.float16)
    assert speed.speed_up(pipe).startswith("nothing") and pipe.unet.dtype == torch.float16


@pytest.mark.gpu
def test_a_gpu_computes_in_bfloat16_compiled_and_in_its_layout():
    pipe = tiny()
    exact = draw(pipe, range(4), [0, 1, 2, 3], num_inference_steps=3).astype(float)
    pipe.to("cuda")
    assert speed.speed_up(pipe).startswith("bfloat16, channels_last, compiled")
    assert np.abs(draw(pipe, range(4), [0, 1, 2, 3], num_inference_steps=3) - exact).mean() < 2


def writes_over_its_results(network: nn.Module, mode: str | None = None) -> None:
    """Stands for `compile` with captured graphs: every call gives the same memory."""
    memory = {}

    def call(*inputs, **options):
        sample = network._call_impl(*inputs, **options).sample
        return UNet2DOutput(sample=memory.setdefault("sample", torch.empty_like(sample)).copy_(sample))

    network._compiled_call_impl = call


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune", None])
def test_what_a_captured_graph_gave_stays_when_it_runs_again(monkeypatch, mode):
    monkeypatch.setattr(nn.Module, "compile", writes_over_its_results)
    unet = tiny().unet
    inputs = [(torch.full((1, 1, 8, 8), value), torch.tensor([3]), torch.tensor([1])) for value in (0.5, -0.5)]
    with torch.no_grad():
        expected = unet(*inputs[0]).sample
        speed.compile_for_drawing(unet, mode)
        first = unet(*inputs[0])
        unet(*inputs[1])
    assert type(first) is UNet2DOutput and torch.equal(first.sample, expected) is (mode is not None)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_captured_graphs_draw_the_images_of_the_compiled_network_within_rounding(mode):
    pipes = [tiny().to("cuda") for _ in range(2)]
    speed.speed_up(pipes[0])
    speed.speed_up(pipes[1], mode)
    for pipe in pipes:
        # keeps what the network said at earlier steps
        pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    skipped = counters["inductor"]["cudagraph_skips"]
    for seeds in (range(4), range(4, 8)):
        plain, captured = (draw(pipe, seeds, [0, 1, 2, 3], num_inference_steps=6).astype(float) for pipe in pipes)
        assert np.abs(plain - captured).mean() < 1
    assert counters["inductor"]["cudagraph_skips"] == skipped


def test_a_mode_of_compilation_is_part_of_fast(tmp_path):
    tiny().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="compile_mode reduce-overhead says how --fast compiles; add --fast"):
        load_for_sampling(SampleCommand(pipeline=str(tmp_path), compile_mode="reduce-overhead", device="cpu"))


def test_the_command_says_what_it_did(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(speed, "cpu_multiplies_bf16", lambda: True)
    tiny().save_pretrained(tmp_path)
    pipe = load_for_sampling(SampleCommand(pipeline=str(tmp_path), fast=True, device="cpu"))
    assert "fast: bfloat16" in capsys.readouterr().out and pipe.unet.dtype == torch.bfloat16
