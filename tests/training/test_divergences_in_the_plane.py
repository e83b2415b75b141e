"""Denoising diffusion GANs in the plane: every divergence finds the modes.

The loop, the game, the pipeline and the defaults are those of the package; the networks are plain
perceptrons, so that what is proved is proved of the losses.
"""

import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from hf_diffusion.data.protocol import TrainingData
from hf_diffusion.loop.trainer import Trainer
from hf_diffusion.losses.adversarial_game import R1_GAMMA, AdversarialGame
from hf_diffusion.pipelines.pipeline_ddgan import DDGANPipeline
from hf_diffusion.training.train_ddgan import DDGANConfig, build_scheduler


T, WIDTH, BATCH, LATENT, STEPS, POINTS, SAMPLES = 4, 128, 256, 4, 2500, 2**16, 4000
DEVIATION = 0.05
ANGLES = torch.arange(8) * math.pi / 4
CENTRES = torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1)  # (8, 2), radius 1


def gaussians(count: int, seed: int) -> Tensor:
    """Eight Gaussians on a ring, (count, 2)."""
    rng = torch.Generator().manual_seed(seed)
    return CENTRES[torch.randint(8, (count,), generator=rng)] + DEVIATION * torch.randn(count, 2, generator=rng)


def roll(u: Tensor) -> Tensor:
    """The curve of the swiss roll at u (N,) in [0, 1], one and a half turns, of about unit
    variance.
    """
    angle = 1.5 * math.pi * (1 + 2 * u)
    return angle[:, None] / (2.25 * math.pi) * torch.stack([angle.cos(), angle.sin()], dim=1)


def swiss_roll(count: int, seed: int) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return roll(torch.rand(count, generator=rng)) + 0.02 * torch.randn(count, 2, generator=rng)


class Points(TrainingData):
    """Points (N, 2) of about unit scale."""

    kind = "points"

    def __init__(self, points: Tensor):
        self.points, self.name, self.fingerprint = points, "points", str(float(points.sum()))
        self.num_samples, self.sample_shape = len(points), (2,)

    def fetch(self, indices, epoch):
        return {"x_0": self.points[list(indices)], "indices": torch.tensor(list(indices))}

    def picture(self, samples, columns=None, row_labels=None):
        raise AssertionError("nobody looks")


def mlp(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in (inputs, WIDTH, WIDTH):
        layers += [nn.Linear(width, WIDTH), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Linear(WIDTH, outputs))


def one_hot(t: Tensor, rows: int) -> Tensor:
    return nn.functional.one_hot(t, T).float().expand(rows, T)


class PointGenerator(ModelMixin, ConfigMixin):
    """x_0 from (x_{t+1}, t, latent) by a multilayer perceptron."""

    @register_to_config
    def __init__(self, latent_dim=LATENT, in_channels=2, sample_size=(), num_class_embeds=None, model_channels=WIDTH):
        super().__init__()
        self.net = mlp(2 + T + latent_dim, 2)

    def forward(self, x_tp1, t, latent, labels=None, return_dict=False):
        return (self.net(torch.cat([x_tp1, one_hot(t, len(x_tp1)), latent], dim=1)),)


class PointCritic(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp(4 + T, 1)

    def forward(self, x_t, t, x_tp1, labels, return_dict):
        return (self.net(torch.cat([x_t, x_tp1, one_hot(t, len(x_t))], dim=1))[:, 0],)


def train_and_sample(points: Tensor, divergence: str, folder: Path) -> Tensor:
    """Points (SAMPLES, 2) in four steps of the pipeline, from the averaged generator after STEPS
    steps of the trainer.

    What is not named here is the default of train_ddgan.py, R1's weight among them. Adam without
    momentum and a second moment over 100 steps bring the weakest two, total_variation and
    wasserstein, from 0.57 and 0.61 of the samples near a mode to 0.77 and 0.75.
    """
    config = DDGANConfig(
        dataset_name="points",
        output_dir=str(folder),
        divergence=divergence,
        num_timesteps=T,
        train_batch_size=BATCH,
        max_train_steps=STEPS,
        learning_rate=2e-3,
        lr_warmup_steps=0,
        adam_beta1=0.0,
        adam_beta2=0.99,
        ema_max_decay=0.995,
        logging_steps=500,
        checkpointing_steps=STEPS,
    )
    config.validate()
    torch.manual_seed(config.seed)
    exported: list[nn.Module] = []
    rates = (config.learning_rate, config.learning_rate)
    game = AdversarialGame(build_scheduler(config), PointGenerator(), PointCritic(), config, rates)
    trainer = Trainer(
        config, Accelerator(cpu=True), game, Points(points), export=lambda averaged, target: exported.append(averaged)
    )
    assert trainer.train()
    pipe = DDGANPipeline(exported[0], build_scheduler(config))
    pipe.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(config.seed)
    return pipe(batch_size=SAMPLES, generator=noise, output_type="latent").images


def nearest(samples: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Distance to and index of the nearest of `points`, each (N,)."""
    return torch.cdist(samples, points).min(dim=1)


def mode_shares(samples: Tensor) -> Tensor:
    """Share of the samples (8,) within 4 standard deviations of each centre."""
    distance, mode = nearest(samples, CENTRES)
    return torch.bincount(mode[distance < 4 * DEVIATION], minlength=8) / len(samples)


def curve_shares(samples: Tensor) -> Tensor:
    """Share of the samples (8,) within 0.15 of each eighth of the swiss roll, whose windings are
    0.9 apart.
    """
    distance, place = nearest(samples, roll(torch.linspace(0, 1, 400)))
    return torch.bincount(place[distance < 0.15] * 8 // 400, minlength=8) / len(samples)


def test_the_criteria_hold_for_data_and_not_for_noise_or_for_half_of_the_modes():
    noise = torch.randn(SAMPLES, 2, generator=torch.Generator().manual_seed(0))
    for draw, shares in ((gaussians, mode_shares), (swiss_roll, curve_shares)):
        assert shares(draw(SAMPLES, 1)).sum() > 0.99 and shares(draw(SAMPLES, 1)).min() > 0.1
        assert shares(noise).sum() < 0.35
    half = gaussians(SAMPLES, 1)
    assert int((mode_shares(torch.where(half[:, :1] > 0, half, -half)) > 0.04).sum()) < 7


@pytest.mark.slow
@pytest.mark.parametrize("divergence", R1_GAMMA)
def test_every_divergence_finds_at_least_seven_of_eight_gaussians_in_four_steps(tmp_path, divergence):
    """A mode is found if 4 % of the samples lie within 4 standard deviations of it (a share of 12.5
    % would be right).

    Measured with 2,500 steps on one core (18 to 20 s each), seeds 0, 1 and 2; all 24 shares of
    modes were above 0.04 every time:

    | divergence      | R1 gamma | least share of a mode | within 4 deviations |
    |-----------------|----------|-----------------------|---------------------|
    | js              | 0.05     | 0.091  0.093  0.096   | 0.83  0.84  0.83    |
    | hellinger       | 0.05     | 0.091  0.083  0.094   | 0.83  0.82  0.83    |
    | reverse_kl      | 0.05     | 0.098  0.093  0.090   | 0.84  0.84  0.83    |
    | total_variation | 0.5      | 0.084  0.085  0.083   | 0.77  0.75  0.74    |
    | wasserstein     | 1        | 0.086  0.086  0.083   | 0.75  0.77  0.76    |
    """
    share = mode_shares(train_and_sample(gaussians(POINTS, 12345), divergence, tmp_path))
    assert int((share > 0.04).sum()) >= 7, share
    assert share.sum() > 0.6, share  # unit noise: 0.10


@pytest.mark.slow
@pytest.mark.parametrize("divergence", ["js", "wasserstein"])
def test_samples_cover_the_swiss_roll_from_end_to_end_in_four_steps(tmp_path, divergence):
    """Within 0.15 of the curve, seed 1: js 0.88, hellinger 0.85, reverse_kl 0.87, total_variation
    0.81, wasserstein 0.79.

    The least share of an eighth, which is 0.125 in the data: 0.092, 0.079, 0.086, 0.084, 0.082.
    """
    share = curve_shares(train_and_sample(swiss_roll(POINTS, 12345), divergence, tmp_path))
    assert share.min() > 0.04 and share.sum() > 0.65, share  # unit noise: 0.22
