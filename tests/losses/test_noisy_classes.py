"""What a classifier of noisy images is shown and trained by."""

import torch
import torch.nn.functional as F

from hf_diffusion.losses.noise_levels import stratified
from hf_diffusion.losses.noisy_classes import NoisyClassObjective, crop_at_random, hits
from hf_diffusion.schedulers.scheduling_gaussian import LinearDDPMScheduler
from tests.losses.scripted import Recorder, ScriptedDraw


T = 10
LEVELS = torch.tensor([0.0, 0.31, 0.55, 0.99], dtype=torch.float64)
TIMESTEPS = torch.tensor([0, 3, 5, 9])
source = torch.Generator().manual_seed(0)
X_0 = torch.rand(4, 1, 8, 8, generator=source) * 2 - 1
NOISE = torch.randn(4, 1, 8, 8, generator=source)
LABELS = torch.tensor([0, 1, 2, 1])
CHANCES = [torch.tensor([0.1, 0.4, 0.7, 0.9]) for _ in range(3)]


def logits_of(network, x_t, t):
    return network.weight * x_t.flatten(1)[:, :3]


def values(training=True, uniforms=(), **options):
    scheduler = LinearDDPMScheduler(T, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    objective = NoisyClassObjective(scheduler, Recorder(logits_of), 1e-3, **options)
    network = objective.players[0].network.train(training)
    draw = ScriptedDraw([LEVELS], [NOISE], uniforms)
    result = objective.values(network, {"x_0": X_0, "labels": LABELS}, draw)
    draw.assert_empty()
    assert draw.spreads == [stratified]
    return result, network.calls[-1], scheduler


def test_the_network_is_trained_at_the_timesteps_that_the_noise_was_drawn_for():
    result, (x_t, t), scheduler = values()
    assert torch.equal(t, TIMESTEPS) and torch.equal(x_t, scheduler.add_noise(X_0, NOISE, TIMESTEPS))
    logits = 0.5 * x_t.flatten(1)[:, :3]
    torch.testing.assert_close(result["loss"], F.cross_entropy(logits, LABELS, reduction="none"))
    assert torch.equal(result["top1"], (logits.argmax(1) == LABELS).float())
    assert torch.equal(result["level"], TIMESTEPS / T)


def test_images_are_cropped_in_training_and_whole_in_evaluation():
    _, (x_t, _), scheduler = values(uniforms=CHANCES, random_crop=0.5)
    cropped = crop_at_random(X_0, 0.5, *CHANCES)
    torch.testing.assert_close(x_t, scheduler.add_noise(cropped, NOISE, TIMESTEPS))
    _, (x_t, _), _ = values(training=False, random_crop=0.5)
    assert torch.equal(x_t, scheduler.add_noise(X_0, NOISE, TIMESTEPS))


def test_hits_count_the_label_among_the_first_and_the_first_five():
    logits = torch.tensor([[3.0, 2, 1, 0, -1, -2], [3.0, 2, 1, 0, -1, -2], [3.0, 2, 1, 0, -1, -2]])
    found = hits(logits, torch.tensor([0, 4, 5]))
    assert found["top1"].tolist() == [1, 0, 0] and found["top5"].tolist() == [1, 1, 0]
    assert "top5" not in hits(logits[:, :5], torch.tensor([0, 1, 2]))


def test_a_crop_at_random_is_a_part_of_the_image_enlarged():
    ramp = torch.linspace(-1, 1, 16).expand(3, 1, 16, 16).contiguous()
    scale, across = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.3, 0.0, 1.0 - 1e-7])
    cropped = crop_at_random(ramp, 0.5, scale, across, across)
    # the whole image
    torch.testing.assert_close(cropped[0], ramp[0])
    # the left half, the right half
    inside = cropped[:, 0, 8, 1:-1]
    assert inside[1].max() < 0.05 and inside[2].min() > -0.05
    assert (inside[1].diff() > 0).all() and inside[1].min() < -0.9
