"""One word for speed: what it does on a device, and that the samples stay."""

import numpy as np
import pytest
import torch

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


def test_the_command_says_what_it_did(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(speed, "cpu_multiplies_bf16", lambda: True)
    tiny().save_pretrained(tmp_path)
    pipe = load_for_sampling(SampleCommand(pipeline=str(tmp_path), fast=True, device="cpu"))
    assert "fast: bfloat16" in capsys.readouterr().out and pipe.unet.dtype == torch.bfloat16
