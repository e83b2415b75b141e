"""Points of the plane through the ordinary scripts: a DDPM and a denoising diffusion GAN find the
data.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from hf_diffusion.data.points import load_points
from hf_diffusion.hub.loading import load_pipeline
from hf_diffusion.sampling.drawing import draw
from hf_diffusion.training import train_ddgan, train_ddpm


SAMPLES, DEVIATION = 4000, 0.05
ANGLES = torch.arange(8) * torch.pi / 4
CENTRES = 0.75 * torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1)
QUICK = """
    --train_batch_size 256 --lr_warmup_steps 0 --ema_max_decay 0.995 --logging_steps 500 --sample_steps none
    --num_sample_images 200 --model_channels 128
""".split()
DDPM = [*QUICK, "--max_train_steps", "1000", "--learning_rate", "0.002", "--ddpm_num_inference_steps", "50"]
# Other divergences are in test_divergences_in_the_plane.py.
DDGAN = """
    --max_train_steps 2500 --learning_rate 0.001 --adam_beta1 0 --adam_beta2 0.99 --latent_dim 4
    --discriminator_channels 128 --num_timesteps 4
""".split()


def trained(script, folder: Path, *flags: str) -> Path:
    assert script.main([*flags, "--output_dir", str(folder)]) == 0
    return folder


def samples_of(folder: Path, labels: list[int] | None = None, **options) -> Tensor:
    seeds = range(SAMPLES if labels is None else len(labels))
    return torch.from_numpy(draw(load_pipeline(folder), seeds, labels, **options))


def real(name: str) -> Tensor:
    return load_points(name, split="test").fetch(range(SAMPLES), 0)["x_0"]


def mode_shares(samples: Tensor) -> Tensor:
    """Share of the samples (8,) within 4 standard deviations of each centre."""
    distance, mode = torch.cdist(samples, CENTRES).min(dim=1)
    return torch.bincount(mode[distance < 4 * DEVIATION], minlength=8) / len(samples)


def curve_shares(samples: Tensor) -> Tensor:
    """Share of the samples (8,) within 0.06 of each eighth of the swiss roll, whose windings are
    0.4 apart.
    """
    angle = 1.5 * torch.pi * (1 + 2 * torch.linspace(0, 1, 400))
    curve = torch.stack([angle.cos(), angle.sin()], dim=1) * (0.9 * angle / (4.5 * torch.pi))[:, None]
    distance, place = torch.cdist(samples, curve).min(dim=1)
    return torch.bincount(place[distance < 0.06] * 8 // 400, minlength=8) / len(samples)


def board_share(samples: Tensor) -> float:
    """Share of the samples on the dark squares of the board, half of the plane."""
    column, row = ((samples + 1) * 2).floor().long().clamp(0, 3).unbind(1)
    return float(((column + row) % 2 == 0).float().mean())


def test_the_criteria_hold_for_data_and_not_for_noise_or_for_half_of_the_modes():
    noise = 0.6 * torch.randn(SAMPLES, 2, generator=torch.Generator().manual_seed(0))
    for name, shares in (("eight_gaussians", mode_shares), ("swiss_roll", curve_shares)):
        assert shares(real(name)).sum() > 0.98 and shares(real(name)).min() > 0.09
        assert shares(noise).sum() < 0.4
    half = real("eight_gaussians")
    assert int((mode_shares(torch.where(half[:, :1] > 0, half, -half)) > 0.04).sum()) < 7
    assert board_share(real("checkerboard")) > 0.99 and board_share(noise) < 0.6


@pytest.mark.parametrize("script, options", [(train_ddpm, {"num_inference_steps": 3}), (train_ddgan, {})])
def test_a_run_on_points_leaves_scatter_plots_a_card_of_points_and_a_pipeline_that_draws_them(
    tmp_path, script, options
):
    flags = [*QUICK, "--dataset_name", "eight_gaussians", "--class_conditional", "--max_train_steps", "2"]
    flags += ["--model_channels", "8", "--eval_split", "test[:100]", "--eval_metrics", "fd,pr"]
    flags += ["--eval_num_images", "50", "--max_train_samples", "500"]
    if script is train_ddpm:
        flags += ["--ddpm_num_inference_steps", "3"]
    folder = trained(script, tmp_path / "run", *flags)
    picture = np.asarray(Image.open(folder / "samples" / "ema-00000002.png").convert("RGB"))
    # a plot of coloured points on white with a legend, wider than high
    assert picture.shape[1] > picture.shape[0] > 300 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 20
    card = (folder / "README.md").read_text()
    assert "eight_gaussians" in card and "north-east" in card and "image-generation" not in card
    points = samples_of(folder, [0, 3, 3], **options)
    assert points.shape == (3, 2) and points.dtype == torch.float32
    assert torch.equal(samples_of(folder, [0, 3, 3], **options), points)


def test_a_dry_run_on_points_shows_them_and_trains_nothing(tmp_path, capsys):
    flags = [*QUICK, "--dataset_name", "swiss_roll", "--max_train_steps", "5", "--dry_run"]
    folder = trained(train_ddpm, tmp_path, *flags)
    said = capsys.readouterr().out
    assert "65536 points, 2, no classes" in said and [f.name for f in folder.iterdir()] == ["data_preview.png"]


@pytest.mark.slow
def test_a_ddpm_finds_the_modes_by_class_and_the_roll_and_the_board(tmp_path):
    folder = trained(train_ddpm, tmp_path / "modes", *DDPM, "--dataset_name", "eight_gaussians", "--class_conditional")
    labels = [i % 8 for i in range(800)]
    points = samples_of(folder, labels, num_inference_steps=50)
    distance, mode = torch.cdist(points, CENTRES).min(dim=1)
    right = (mode == torch.tensor(labels)) & (distance < 4 * DEVIATION)
    assert right.float().mean() > 0.9, right.float().mean()
    roll = samples_of(trained(train_ddpm, tmp_path / "roll", *DDPM, "--dataset_name", "swiss_roll"))
    assert curve_shares(roll).min() > 0.015 and curve_shares(roll).sum() > 0.45, curve_shares(roll)
    # The board has edges: 0.59 after 1,000 steps, 0.84 after 4,000.
    longer = [*DDPM, "--max_train_steps", "4000", "--dataset_name", "checkerboard"]
    board = samples_of(trained(train_ddpm, tmp_path / "board", *longer))
    assert board_share(board) > 0.75, board_share(board)


@pytest.mark.slow
def test_a_gan_finds_the_modes_in_four_steps(tmp_path):
    """A mode is found if 4 % of the samples lie within 4 standard deviations of it.

    12.5 % would be right.
    """
    share = mode_shares(
        samples_of(trained(train_ddgan, tmp_path, *QUICK, *DDGAN, "--dataset_name", "eight_gaussians"))
    )
    assert int((share > 0.04).sum()) >= 7, share
    assert share.sum() > 0.6, share
