"""Flow matching's loss: what the network is shown, whose error counts, levels and pairs."""

import itertools
import math

import pytest
import torch

from hf_diffusion.losses.flow import FlowMatchingObjective, FlowMatchingOptions, assigned, levels, loss_weight, nearest
from hf_diffusion.losses.noise_levels import antithetic, stratified
from hf_diffusion.randomness import Draw
from hf_diffusion.schedulers.scheduling_flow import PREDICTION_TYPES, FlowMatchingScheduler
from tests.losses.scripted import Recorder, ScriptedDraw
from tests.schedulers.gaussian_flow import GaussianFlow


LEVELS = torch.tensor([0.1, 0.31, 0.55, 0.9], dtype=torch.float64)
generator = torch.Generator().manual_seed(0)
X_0 = torch.rand(4, 1, 2, 2, generator=generator) * 2 - 1
NOISE = torch.randn(4, 1, 2, 2, generator=generator)
X = (1 - LEVELS).view(-1, 1, 1, 1).float() * X_0 + LEVELS.view(-1, 1, 1, 1).float() * NOISE
BATCH = {"x_0": X_0, "labels": torch.tensor([0, 1, 2, 1]), "indices": torch.arange(4)}
TRUTH = {"velocity": NOISE - X_0, "sample": X_0, "epsilon": NOISE}


def objective(num_class_embeds=None, null_class=False, answer=None, shift=1.0, **options):
    network = Recorder(answer, num_class_embeds=num_class_embeds, null_class=null_class)
    return FlowMatchingObjective(FlowMatchingScheduler(shift=shift), network, FlowMatchingOptions(**options), 1e-3)


def values(made, uniforms=(), normals=(NOISE,)):
    draw = ScriptedDraw([LEVELS], normals, uniforms)
    result = made.values(made.players[0].network, BATCH, draw)
    draw.assert_empty()
    return result, made.players[0].network.calls[-1], draw


def test_the_network_sees_the_straight_path_at_a_thousand_sigma_and_the_loss_is_the_error_of_the_velocity():
    result, (x, t, labels), draw = values(objective())
    assert labels is None and draw.spreads == [stratified] and t.dtype == torch.float32
    torch.testing.assert_close(x, X)
    torch.testing.assert_close(t, 1000 * LEVELS.float())
    torch.testing.assert_close(result["loss"], (0.5 * X - NOISE + X_0).square().mean((1, 2, 3)))
    assert torch.equal(result["level"], LEVELS)


# What an error of each prediction is multiplied by in the error of each kind.
FACTOR = {
    ("velocity", "sample"): LEVELS,
    ("velocity", "epsilon"): 1 - LEVELS,
    ("sample", "velocity"): 1 / LEVELS,
    ("sample", "epsilon"): (1 - LEVELS) / LEVELS,
    ("epsilon", "velocity"): 1 / (1 - LEVELS),
    ("epsilon", "sample"): LEVELS / (1 - LEVELS),
}


@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
@pytest.mark.parametrize("space", PREDICTION_TYPES)
def test_any_of_three_predictions_is_trained_by_the_error_of_any_of_three(prediction, space):
    def answer(network, x, t, labels):
        return TRUTH[prediction] + 0.1

    result, *_ = values(objective(answer=answer, prediction_type=prediction, loss_space=space))
    factor = FACTOR.get((prediction, space), torch.ones(4))
    torch.testing.assert_close(result["loss"].double(), 0.01 * factor.double() ** 2, rtol=1e-4, atol=1e-6)


def test_the_floor_bounds_the_weight_of_an_error_of_the_data_near_them():
    def answer(network, x, t, labels):
        return X_0 + 0.1

    result, *_ = values(objective(answer=answer, prediction_type="sample", sigma_floor=0.4))
    torch.testing.assert_close(result["loss"].double(), 0.01 / LEVELS.clamp(min=0.4) ** 2, rtol=1e-4, atol=1e-6)


def test_the_velocity_of_gaussian_data_leaves_no_gradient():
    """The error of E[noise - x_0 | x] is uncorrelated with x, within four standard errors."""
    flow, count = GaussianFlow(0.4, 0.3), 40_000
    x_0 = 0.4 + math.sqrt(0.3) * torch.randn(count, 1, generator=torch.Generator().manual_seed(1))

    def answer(network, x, t, labels):
        sigma = (t / 1000).double()
        return network.weight * 2 * flow.velocity(x, sigma) + network.weight - 0.5

    for options in ({}, {"level_distribution": "logit_normal"}, {"loss_weighting": "cosmap"}):
        made = objective(answer=answer, **options)
        draw = Draw(0, 0, slice(0, count), count, torch.device("cpu"), block=None)
        loss = made.values(made.players[0].network, {"x_0": x_0}, draw)["loss"]
        weight = made.players[0].network.weight
        parts = [torch.autograd.grad(part.mean(), weight, retain_graph=True)[0] for part in loss.split(1000)]
        gradients = torch.stack(parts)
        assert gradients.mean().abs() < 4 * gradients.std() / math.sqrt(len(parts)), options
        with torch.no_grad():
            weight += 0.2
        draw = Draw(0, 0, slice(0, count), count, torch.device("cpu"), block=None)
        assert made.values(made.players[0].network, {"x_0": x_0}, draw)["loss"].mean() > loss.mean()


# --- levels ---------------------------------------------------------------------------------------


def test_levels_have_the_distribution_that_is_asked_for_and_rise_with_u():
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    logits = levels(u, FlowMatchingOptions(level_distribution="logit_normal", logit_mean=0.8, logit_std=0.5)).logit()
    assert float(logits.mean()) == pytest.approx(0.8, abs=1e-3) and float(logits.std()) == pytest.approx(0.5, abs=1e-3)
    assert torch.equal(levels(u, FlowMatchingOptions()), u)
    for scale in (-1.0, 1.29, 1.75):
        mode = levels(u, FlowMatchingOptions(level_distribution="mode", mode_scale=scale))
        assert bool((mode.diff() > 0).all()) and 0 <= mode.min() and mode.max() <= 1
    ends = levels(torch.tensor([0.0]).double(), FlowMatchingOptions(level_distribution="logit_normal"))
    assert ends.tolist() == [0.0]


def test_the_scheduler_s_shift_holds_in_training_too():
    _, (x, t, _), _ = values(objective(shift=3.0))
    shifted = 3 * LEVELS / (1 + 2 * LEVELS)
    torch.testing.assert_close(t.double(), 1000 * shifted, rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize(
    "name, spread", [("independent", None), ("stratified", stratified), ("antithetic", antithetic)]
)
def test_the_levels_of_a_batch_are_spread_as_asked(name, spread):
    _, _, draw = values(objective(level_spread=name))
    assert draw.spreads == [spread]


@pytest.mark.parametrize("weighting", ["sigma_sqrt", "cosmap"])
def test_weights_multiply_the_loss(weighting):
    plain, *_ = values(objective())
    weighted, *_ = values(objective(loss_weighting=weighting, sigma_floor=0.2))
    expected = loss_weight(LEVELS.clamp(min=0.2), weighting)
    torch.testing.assert_close((weighted["loss"] / plain["loss"]).double(), expected, rtol=1e-5, atol=1e-6)


# --- labels ---------------------------------------------------------------------------------------


def test_labels_are_dropped_below_the_share_in_training_and_never_in_evaluation():
    made = objective(num_class_embeds=3, null_class=True, label_dropout=0.3)
    _, (_, _, labels), _ = values(made, uniforms=[torch.tensor([0.29, 0.31, 0.0, 0.9])])
    assert labels.tolist() == [3, 1, 3, 1]
    made.players[0].network.eval()
    _, (_, _, labels), _ = values(made)
    assert labels.tolist() == BATCH["labels"].tolist()


# --- pairs ----------------------------------------------------------------------------------------


def test_of_several_noises_an_image_meets_the_nearest():
    noises = torch.randn(4, 3, 1, 2, 2, generator=torch.Generator().manual_seed(2))
    found = nearest(noises, X_0)
    distance = (noises - X_0[:, None]).square().sum((2, 3, 4))
    torch.testing.assert_close((found - X_0).square().sum((1, 2, 3)), distance.min(1).values)
    _, (x, _, _), _ = values(objective(pairing="knn", knn_candidates=3), normals=[noises])
    sigma = LEVELS.float().view(-1, 1, 1, 1)
    torch.testing.assert_close(x, (1 - sigma) * X_0 + sigma * found)


def test_assignment_gives_each_noise_to_one_image_with_the_least_total_distance_in_its_group():
    x_0, noise = torch.randn(2, 8, 1, 2, 2, generator=torch.Generator().manual_seed(3))
    found = assigned(noise, x_0, group_size=4)
    for group in (slice(0, 4), slice(4, 8)):
        totals = {
            order: float((x_0[group] - noise[group][list(order)]).square().sum())
            for order in itertools.permutations(range(4))
        }
        best = min(totals, key=totals.get)
        assert torch.equal(found[group], noise[group][list(best)])


def test_held_out_images_are_neither_paired_nor_compared_with_others():
    plain = objective()
    made = objective(pairing="assignment", contrastive_weight=0.5, group_size=2)
    for each in (plain, made):
        each.players[0].network.eval()
    assert torch.equal(values(made)[0]["loss"], values(plain)[0]["loss"])


def test_the_contrastive_term_is_the_distance_to_the_velocity_of_another_row_of_the_group():
    plain, *_ = values(objective())
    result, *_ = values(objective(contrastive_weight=0.05, group_size=2))
    other = TRUTH["velocity"][[1, 0, 3, 2]]
    expected = plain["loss"] - 0.05 * (0.5 * X - other).square().mean((1, 2, 3))
    torch.testing.assert_close(result["loss"], expected)


def test_groups_do_not_change_with_the_micro_batches():
    x_0 = torch.randn(64, 2, generator=torch.Generator().manual_seed(4))
    made = objective(pairing="assignment", contrastive_weight=0.05, group_size=16)

    def losses(rows: slice):
        draw = Draw(0, 7, rows, 64, torch.device("cpu"))
        return made.values(made.players[0].network, {"x_0": x_0[rows]}, draw)["loss"]

    torch.testing.assert_close(torch.cat([losses(slice(0, 32)), losses(slice(32, 64))]), losses(slice(0, 64)))


def test_noise_has_the_deviation_that_is_asked_for():
    _, (x, _, _), _ = values(objective(noise_scale=2.0))
    sigma = LEVELS.float().view(-1, 1, 1, 1)
    torch.testing.assert_close(x, (1 - sigma) * X_0 + sigma * 2 * NOISE)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"contrastive_weight": 0.1, "loss_space": "sample"}, "compares velocities, got loss_space sample"),
        ({"pairing": "assignment", "train_batch_size": 24}, "group_size 16 does not divide train_batch_size 24"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(options, message):
    made = FlowMatchingOptions(**{name: value for name, value in options.items() if name != "train_batch_size"})
    made.train_batch_size = options.get("train_batch_size", 16)
    with pytest.raises(ValueError, match=message):
        made.check()
