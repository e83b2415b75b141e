"""Score matching: what the losses are least at, how they weigh, and what they draw."""

import pytest
import torch
from torch import Tensor

from hf_diffusion.losses.noise_levels import stratified
from hf_diffusion.losses.score import ScoreObjective, ScoreOptions, denoising_loss, sliced_loss
from hf_diffusion.schedulers.scheduling_score import (
    AnnealedLangevinScheduler,
    ScoreSdeVEScheduler,
    ScoreSdeVPScheduler,
)
from tests.losses.scripted import Recorder, ScriptedDraw


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_denoising_and_sliced_loss_differ_by_a_constant():
    """In expectation, whatever the network: here scores -c x for data of variance 1.25."""
    count, scheduler, std = 200_000, ScoreSdeVEScheduler(sigma_min=0.1, sigma_max=2.5), 0.5
    t = torch.full((count,), 0.5, dtype=torch.float64)
    assert float(scheduler.marginal(t[0])[1]) == pytest.approx(std)
    x_0, noise, v = drawn(count, 2), drawn(count, 2, seed=1), drawn(1, count, 2, seed=2)
    x_t = scheduler.add_noise(x_0, noise, t)
    gaps = []
    for c in (0.2, 0.8, 1.5):
        denoising = denoising_loss(scheduler, -c * x_t, noise, t, reduce_mean=False).mean()
        sliced = sliced_loss(lambda x, c=c: -c * x, x_t, torch.full((count,), std), v, reduce_mean=False).mean()
        gaps.append((denoising - sliced).item())
    # E|noise|^2 / 2 of two dimensions
    assert gaps == pytest.approx([1.0, 1.0, 1.0], abs=0.01)


def test_the_exact_score_has_the_least_loss_of_its_neighbours():
    scheduler = ScoreSdeVPScheduler()
    t, x_0, noise = torch.full((50_000,), 0.3), drawn(50_000, 1), drawn(50_000, 1, seed=1)
    # data of unit variance stay so
    x_t = scheduler.add_noise(x_0, noise, t)
    losses = [float(denoising_loss(scheduler, -c * x_t, noise, t).mean()) for c in (0.9, 1.0, 1.1)]
    assert losses[1] < min(losses[0], losses[2])


def test_the_weights_are_those_of_the_papers():
    scheduler = ScoreSdeVEScheduler(sigma_min=0.1, sigma_max=2.5)
    t, noise, score = torch.tensor([0.2, 0.8]), drawn(2, 3), drawn(2, 3, seed=1)
    std, g = scheduler.marginal(t)[1], scheduler.sde.diffusion(t)
    errors = ((score + noise / std[:, None]) ** 2).sum(1)
    options = {"reduce_mean": False}
    torch.testing.assert_close(denoising_loss(scheduler, score, noise, t), errors * std**2 / 3)
    torch.testing.assert_close(denoising_loss(scheduler, score, noise, t, **options), errors * std**2 / 2)
    torch.testing.assert_close(
        denoising_loss(scheduler, score, noise, t, anneal_power=1.0, **options), errors * std / 2
    )
    torch.testing.assert_close(denoising_loss(scheduler, score, noise, t, True, False), errors * g**2 / 2)


def test_more_directions_lessen_the_noise_of_the_sliced_loss():
    x, matrix = drawn(1, 4).expand(2000, 4), drawn(4, 4, seed=1)
    losses = [
        sliced_loss(lambda x: x @ matrix, x, torch.ones(2000), drawn(k, 2000, 4, seed=2), False) for k in (1, 16)
    ]
    exact = matrix.trace().item() + ((x[0] @ matrix) ** 2).sum().item() / 2
    assert (losses[0].std() / losses[1].std()).item() == pytest.approx(4.0, rel=0.15)
    assert losses[1].mean().item() == pytest.approx(exact, abs=0.1)


def objective(scheduler, network, **options) -> ScoreObjective:
    return ScoreObjective(scheduler, network, ScoreOptions(**options), 1e-3)


def test_a_step_visits_the_times_of_its_levels_with_the_noise_that_it_draws():
    network = Recorder(num_class_embeds=None).train()
    scheduler = ScoreSdeVPScheduler()
    u, noise, x_0 = torch.tensor([0.0, 0.75]).double(), drawn(2, 2).float(), drawn(2, 2, seed=1).float()
    draw = ScriptedDraw(levels=[u], normals=[noise])
    values = objective(scheduler, network).values(network, {"x_0": x_0}, draw)
    draw.assert_empty()
    assert draw.spreads == [stratified] and torch.equal(values["level"], u)
    t = u * (1 - 1e-5) + 1e-5
    (x_t, time, labels), *_ = network.calls
    torch.testing.assert_close(x_t, scheduler.add_noise(x_0, noise, t))
    torch.testing.assert_close(time, (999 * t).float())
    assert labels is None
    # a network of the noise: the error of its prediction
    torch.testing.assert_close(values["loss"], ((0.5 * x_t - noise) ** 2).mean(1), rtol=1e-4, atol=1e-5)
    values["loss"].sum().backward()
    assert network.weight.grad.abs() > 0


@pytest.mark.parametrize(
    "scheduler, options, expected",
    [
        (ScoreSdeVEScheduler(5, conditioning="index"), {"discrete": True}, [4.0, 2.0, 0.0]),
        (ScoreSdeVPScheduler(5, conditioning="index"), {"discrete": True}, [0.0, 2.0, 4.0]),
        (AnnealedLangevinScheduler(5, conditioning="index"), {}, [4.0, 2.0, 0.0]),
    ],
)
def test_discrete_models_see_whole_levels_in_the_papers_numbers(scheduler, options, expected):
    network = Recorder(num_class_embeds=None)
    u = torch.tensor([0.0, 0.5, 0.999])
    draw = ScriptedDraw(levels=[u], normals=[torch.zeros(3, 1)])
    objective(scheduler, network, **options).values(network, {"x_0": torch.ones(3, 1)}, draw)
    assert network.calls[0][1].tolist() == expected


def test_labels_are_left_out_in_training_only():
    network = Recorder(num_class_embeds=4, null_class=True)
    batch = {"x_0": torch.zeros(3, 1), "labels": torch.tensor([0, 1, 2])}
    for training, expected in ((True, [4, 1, 4]), (False, [0, 1, 2])):
        network.train(training)
        uniforms = [torch.tensor([0.1, 0.9, 0.2])] if training else []
        draw = ScriptedDraw([torch.rand(3)], [torch.ones(3, 1)], uniforms)
        objective(ScoreSdeVPScheduler(), network, label_dropout=0.5).values(network, batch, draw)
        draw.assert_empty()
        assert network.calls[-1][2].tolist() == expected


def test_sliced_score_matching_is_measured_without_gradients_and_never_compiled():
    network = Recorder(num_class_embeds=None).eval()
    sliced = objective(ScoreSdeVEScheduler(), network, matching="sliced", num_slices=2)
    assert [player.compilable for player in sliced.players] == [False]
    draw = ScriptedDraw([torch.rand(3)], [torch.ones(3, 2) * i for i in (1, 2, 3)])
    with torch.no_grad():
        values = sliced.values(network, {"x_0": torch.zeros(3, 2)}, draw)
    draw.assert_empty()
    assert bool(values["loss"].isfinite().all())


def test_two_weights_at_once_are_refused():
    with pytest.raises(ValueError, match="likelihood_weighting and anneal_power 1.0 both weigh"):
        ScoreOptions(likelihood_weighting=True, anneal_power=1.0).check()
