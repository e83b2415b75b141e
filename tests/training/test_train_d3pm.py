"""train_d3pm.py: images and points as levels, resumed bit for bit, measured by its own bound."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hf_diffusion.cli import main as command_line
from hf_diffusion.hub.loading import load_pipeline
from hf_diffusion.sampling.drawing import draw
from hf_diffusion.training import train_d3pm
from tests.training.interruptions import stop_after


TINY = """
    --num_levels 17 --d3pm_num_steps 6 --train_batch_size 16 --max_train_steps 4 --lr_warmup_steps 0
    --sample_steps none --num_sample_images 4 --logging_steps 1 --model_channels 8 --channel_mult 1,2
    --num_res_blocks 1 --norm_num_groups 8 --num_head_channels 8 --checkpointing_steps 1
""".split()
DIGITS = ["--dataset_name", "digits", "--class_conditional"]


def trained(folder: Path, *flags: str) -> Path:
    assert train_d3pm.main([*TINY, *flags, "--output_dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    return trained(tmp_path_factory.mktemp("digits"), *DIGITS)


def test_an_interrupted_run_ends_with_the_very_weights_of_an_uninterrupted_one(digits, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2)
        train_d3pm.main([*TINY, *DIGITS, "--output_dir", str(tmp_path)])
    assert not (tmp_path / "model_index.json").exists()
    trained(tmp_path, *DIGITS, "--resume_from_checkpoint", "latest")
    a, b = (load_file(folder / "unet" / "diffusion_pytorch_model.safetensors") for folder in (digits, tmp_path))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_result_draws_levels_by_class_and_keeps_its_process(digits):
    pipeline = load_pipeline(digits)
    assert pipeline.scheduler.config.num_classes == 17 and pipeline.scheduler.config.transition_type == "gaussian"
    images = draw(pipeline, [0, 1, 2], [3, 3, 7], num_inference_steps=6)
    assert images.shape == (3, 8, 8, 1)
    levels = images / 255 * 16
    assert np.abs(levels - levels.round()).max() < 0.05
    card = (digits / "README.md").read_text()
    assert "Structured Denoising Diffusion Models" in card or "austin2021structured" in card
    assert "D3PM" in card or "d3pm" in card


def test_its_bits_per_dimension_say_how_many_levels_images_and_timesteps_they_hold_for(digits, tmp_path):
    flags = ["evaluate", str(digits), "--dataset_name", "digits", "--metrics", "bpd", "--num_images", "8"]
    assert command_line([*flags, "--output_dir", str(tmp_path)]) == 0
    written = json.loads(next(tmp_path.rglob("metrics.json")).read_text())
    text = json.dumps(written)
    assert "bits per dimension of 17 levels" in text and "6 timesteps" in text and '"levels": 17' in text


@pytest.mark.parametrize("kind", ["uniform", "absorbing"])
def test_every_noise_and_head_trains_with_and_without_classes(tmp_path, kind):
    flags = ["--transition_type", kind, "--max_train_steps", "1", "--posterior_form", "mixture"]
    head = ["--d3pm_prediction", "logistic"] if kind == "uniform" else []
    pipeline = load_pipeline(trained(tmp_path, *flags, *head, "--dataset_name", "digits"))
    assert pipeline.unet.config.out_channels == (2 if head else 17)
    assert draw(pipeline, [0], None, num_inference_steps=3).shape == (1, 8, 8, 1)


def test_points_become_levels_of_the_plane(tmp_path):
    flags = [
        "--dataset_name",
        "eight_gaussians",
        "--class_conditional",
        "--max_train_samples",
        "500",
        "--num_levels",
        "33",
    ]
    pipeline = load_pipeline(trained(tmp_path, *flags))
    points = draw(pipeline, [0, 1], [3, 3], num_inference_steps=3)
    assert points.shape == (2, 2) and np.allclose((points + 1) * 16, ((points + 1) * 16).round())
