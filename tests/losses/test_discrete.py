"""What a network of categories is shown and trained by, and its bound of data that are known."""

import math

import pytest
import torch

from hf_diffusion.losses.discrete import (
    DiscreteObjective,
    DiscreteOptions,
    bits_per_dim,
    bound_term,
    cross_entropy,
    mean_bits,
)
from hf_diffusion.schedulers.scheduling_discrete import D3PMScheduler
from tests.losses.scripted import Recorder, ScriptedDraw


K, T = 5, 10
LEVELS = torch.tensor([0.0, 0.31, 0.55, 0.99], dtype=torch.float64)
TIMESTEPS = torch.tensor([0, 3, 5, 9])
generator = torch.Generator().manual_seed(0)
VALUES = torch.rand(4, 2, 3, 3, generator=generator) * 2 - 1
UNIFORM = torch.rand(4, 2, 3, 3, generator=generator)
LOGITS = torch.randn(4, 2 * K, 3, 3, generator=generator)
BATCH = {"x_0": VALUES, "labels": torch.tensor([0, 1, 2, 1]), "indices": torch.arange(4)}


def objective(num_class_embeds=None, null_class=False, **options):
    options = DiscreteOptions(num_levels=K, d3pm_num_steps=T, **{"beta_start": 0.1, "beta_end": 1.0} | options)
    network = Recorder(lambda *_: LOGITS, num_class_embeds=num_class_embeds, null_class=null_class)
    return DiscreteObjective(D3PMScheduler(**options.process()), network, options, 1e-3)


def values(made, *uniforms):
    draw = ScriptedDraw([LEVELS], uniforms=[UNIFORM, *uniforms])
    result = made.values(made.players[0].network, BATCH, draw)
    draw.assert_empty()
    return result, made.players[0].network.calls[-1]


@pytest.mark.parametrize("kind", ["uniform", "absorbing", "gaussian"])
def test_the_network_sees_noisy_levels_at_their_own_timestep_and_each_objective_is_its_formula(kind):
    made = objective(transition_type=kind)
    scheduler = made.scheduler
    result, (shown, t, labels) = values(made)
    x_0 = ((VALUES + 1) / 2 * (K - 1)).round().long()
    x_t = scheduler.add_noise(x_0, UNIFORM, TIMESTEPS)
    assert labels is None and torch.equal(t, TIMESTEPS) and torch.equal(shown, scheduler.to_values(x_t))
    logits = scheduler.x_0_logits(LOGITS, x_t)
    bound = mean_bits(bound_term(scheduler, logits, x_0, x_t, TIMESTEPS))
    entropy = mean_bits(cross_entropy(logits, x_0))
    torch.testing.assert_close(result["loss"], bound + 0.001 * entropy)
    torch.testing.assert_close(result["bits_per_dim"], T * bound)
    torch.testing.assert_close(result["cross_entropy"], entropy)
    torch.testing.assert_close(values(objective(transition_type=kind, objective="vlb"))[0]["loss"], bound)
    alone = objective(transition_type=kind, objective="cross_entropy", posterior_form="mixture")
    torch.testing.assert_close(values(alone)[0]["loss"], entropy)


def test_labels_are_dropped_below_the_share_in_training_and_never_in_evaluation():
    made = objective(num_class_embeds=3, null_class=True, label_dropout=0.3)
    _, (_, _, labels) = values(made, torch.tensor([0.29, 0.31, 0.0, 0.9]))
    assert labels.tolist() == [3, 1, 3, 1]
    made.players[0].network.eval()
    assert torch.equal(values(made)[1][2], BATCH["labels"])


def test_the_gradient_is_finite_where_a_level_is_impossible():
    made = objective(transition_type="absorbing", objective="vlb")
    output = (LOGITS * 1e4).requires_grad_()
    made.players[0].network.answer = lambda *_: output
    values(made)[0]["loss"].sum().backward()
    assert output.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["uniform", "gaussian"])
@pytest.mark.parametrize("steps", [T, 4])
def test_levels_without_a_pattern_take_all_their_bits_by_the_model_that_knows_so(kind, steps):
    process = {"transition_type": kind, "beta_schedule": "linear", "beta_start": 0.5, "beta_end": 20.0}
    if kind == "uniform":
        process = {"beta_schedule": "jsd"}
    scheduler = D3PMScheduler(K, T, **process)
    scheduler.set_timesteps(steps)
    draws = torch.Generator().manual_seed(0)
    x_0 = torch.randint(0, K, (200, 100), generator=draws)

    def network(x_t, t):
        # the others say nothing of a value; the last step may use the value itself
        known = scheduler.kernel.likelihood(x_t, t + 1).log()
        return torch.where((t == 0)[:, None, None], known, torch.zeros_like(known))

    terms, prior = bits_per_dim(network, scheduler, x_0, lambda shape: torch.rand(shape, generator=draws).double())
    assert terms.shape == (200, steps) and prior.max() < 0.01
    total = terms.sum(1) + prior
    error = float(total.std() / math.sqrt(len(total)))
    assert error < 0.02 and abs(float(total.mean()) - math.log2(K)) < 4 * error + 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transition_type": "absorbing", "transition_bands": 2}, "leave them out for absorbing"),
        ({"objective": "cross_entropy"}, "give --posterior_form mixture"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DiscreteOptions(**options).check()


def test_the_schedule_is_the_papers_unless_it_is_named():
    schedules = {
        kind: DiscreteOptions(transition_type=kind).process()["beta_schedule"]
        for kind in ("gaussian", "uniform", "absorbing")
    }
    assert schedules == {"gaussian": "linear", "uniform": "cosine", "absorbing": "jsd"}
    assert DiscreteOptions(d3pm_schedule="cosine").process()["beta_schedule"] == "cosine"
    assert DiscreteOptions(num_levels=7).output_channels(3) == 21
    assert DiscreteOptions(num_levels=7, d3pm_prediction="logistic").output_channels(3) == 6
