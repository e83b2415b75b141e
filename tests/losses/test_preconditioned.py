"""What a preconditioned denoiser is shown and trained by, and how weights are learned."""

import pytest
import torch

from hf_diffusion.losses.noise_levels import antithetic, stratified
from hf_diffusion.losses.preconditioned import (
    LevelUncertainty,
    PreconditionedObjective,
    PreconditionedOptions,
    level_weight,
)
from hf_diffusion.schedulers.scheduling_edm import PRECONDITIONINGS, along
from tests.losses.scripted import Recorder, ScriptedDraw


LEVELS = torch.tensor([0.02, 0.31, 0.55, 0.99], dtype=torch.float64)
generator = torch.Generator().manual_seed(0)
X_0 = torch.rand(4, 1, 2, 2, generator=generator) * 2 - 1
NOISE = torch.randn(4, 1, 2, 2, generator=generator)
BATCH = {"x_0": X_0, "labels": torch.tensor([0, 1, 2, 1]), "indices": torch.arange(4)}


def objective(num_class_embeds=None, null_class=False, **options):
    network = Recorder(num_class_embeds=num_class_embeds, null_class=null_class)
    return PreconditionedObjective(network, PreconditionedOptions(**options), 1e-3)


def values(made, uniforms=()):
    draw = ScriptedDraw([LEVELS], [NOISE], uniforms)
    result = made.values(made.players[0].network, BATCH, draw)
    draw.assert_empty()
    return result, made.players[0].network.calls[-1], draw


@pytest.mark.parametrize("name", PRECONDITIONINGS)
def test_the_loss_is_lambda_times_the_error_of_the_denoised_sample(name):
    made = objective(preconditioning=name)
    result, (seen, c_noise, labels), _ = values(made)
    sigma = made.preconditioning.training_sigmas(LEVELS)
    at, x = made.preconditioning.coefficients(sigma), X_0 + along(sigma, X_0) * NOISE
    torch.testing.assert_close(seen, along(at.c_in, x) * x)
    assert torch.equal(c_noise, at.c_noise.float()) and labels is None
    # the network halves what it sees
    denoised = along(at.c_skip, x) * x.double() + along(at.c_out, x) * 0.5 * seen
    error = (denoised - X_0).square().flatten(1).mean(1) / at.c_out**2
    torch.testing.assert_close(result["loss"].double(), error, rtol=2e-4, atol=1e-6)
    assert torch.equal(result["level"], LEVELS)


def test_lambda_of_edm_is_that_of_its_table_and_its_levels_are_as_asked():
    made = objective(sigma_data=0.7, sigma_mean=0.3, sigma_std=0.5)
    sigma = made.preconditioning.training_sigmas(LEVELS)
    torch.testing.assert_close(sigma.log(), 0.3 + 0.5 * torch.special.ndtri(LEVELS))
    c_out = made.preconditioning.coefficients(sigma).c_out
    torch.testing.assert_close(1 / c_out**2, (sigma**2 + 0.49) / (sigma * 0.7) ** 2)


def test_weights_by_signal_to_noise_fall_with_the_noise_and_are_even_at_the_datas_own_level():
    sigma = torch.tensor([1e-3, 0.5, 1e3], dtype=torch.float64)
    torch.testing.assert_close(level_weight("snr", sigma, 0.5), torch.tensor([1, 0.5, 0]).double(), atol=1e-5, rtol=0)
    soft = level_weight("soft_min_snr", sigma, 0.5)
    torch.testing.assert_close(soft, torch.tensor([0, 0.25, 0]).double(), atol=1e-5, rtol=0)
    plain, weighted = values(objective())[0]["loss"], values(objective(loss_weighting="snr"))[0]["loss"]
    made = objective()
    wanted = level_weight("snr", made.preconditioning.training_sigmas(LEVELS), 0.5)
    torch.testing.assert_close(weighted / plain, wanted.float())


def test_labels_are_dropped_below_the_share_in_training_and_never_in_evaluation():
    made = objective(num_class_embeds=3, null_class=True, label_dropout=0.3)
    _, (_, _, labels), _ = values(made, uniforms=[torch.tensor([0.29, 0.31, 0.0, 0.9])])
    assert labels.tolist() == [3, 1, 3, 1]
    made.players[0].network.eval()
    _, (_, _, labels), _ = values(made)
    assert labels.tolist() == BATCH["labels"].tolist()


@pytest.mark.parametrize("name, spread", [("uniform", None), ("stratified", stratified), ("antithetic", antithetic)])
def test_the_levels_of_a_batch_are_spread_as_asked(name, spread):
    _, _, draw = values(objective(level_sampling=name))
    assert draw.spreads == [spread]


# --- learned weights ------------------------------------------------------------------------------


def test_both_players_minimise_one_loss_and_the_network_is_called_once():
    made = objective(learned_weighting=True)
    network, uncertainty = made.players
    assert network.is_averaged and not uncertainty.is_averaged
    torch.nn.init.normal_(uncertainty.network.linear.weight, generator=torch.Generator().manual_seed(3))
    turns = made.turns(0)
    assert next(turns) is network
    result, (_, c_noise, _), _ = values(made)
    u = uncertainty.network(c_noise)
    error = values(objective())[0]["loss"]
    torch.testing.assert_close(result["loss"], error / u.exp() + u)
    torch.testing.assert_close(result["error"], error)
    assert next(turns) is uncertainty
    other = made.uncertainty_values(uncertainty.network, BATCH, ScriptedDraw())["loss"]
    torch.testing.assert_close(other, result["loss"])
    assert len(network.network.calls) == 1 and not made.seen
    # each gradient goes to its own player
    for loss, own, foreign in ((result["loss"], network, uncertainty), (other, uncertainty, network)):
        loss.sum().backward()
        assert all(p.grad is not None for p in own.network.parameters())
        assert all(p.grad is None for p in foreign.network.parameters())
        own.network.zero_grad()


def test_held_out_samples_leave_the_second_player_alone_and_a_step_forgets_the_last_ones():
    made = objective(learned_weighting=True)
    values(made)
    assert len(made.seen) == 1
    made.players[0].network.eval()
    values(made)
    assert len(made.seen) == 1
    next(made.turns(1))
    assert not made.seen


def test_what_is_learned_is_the_logarithm_of_the_loss_at_each_level():
    """The minimum of e^-u error + u over u is at e^u = E[error]."""
    torch.manual_seed(0)
    network = LevelUncertainty()
    assert torch.equal(network(torch.tensor([-1.0, 0.5])), torch.zeros(2))
    optimizer = torch.optim.Adam(network.parameters(), lr=0.05)
    for _ in range(400):
        c_noise = torch.rand(256) * 2 - 1.5
        # of random size, and expected to be exp(sin(2 c))
        error = (2 * c_noise).sin().exp() * -torch.log(torch.rand(256))
        loss = (error / network(c_noise).exp() + network(c_noise)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    c_noise = torch.linspace(-1.3, 0.3, 9)
    found = network(c_noise).detach()
    assert float((found - (2 * c_noise).sin()).abs().max()) < 0.3, found
