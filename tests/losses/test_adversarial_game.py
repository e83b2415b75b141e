"""Who sees what in the game of a denoising diffusion GAN, each half by itself."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from hf_diffusion.losses.adversarial_game import ADVICE, PATIENCE, AdversarialGame, AdversarialOptions
from hf_diffusion.losses.noise_levels import stratified
from hf_diffusion.schedulers.scheduling_ddgan import DDGANScheduler
from tests.losses.scripted import Recorder, ScriptedDraw


LEVELS = torch.tensor([0.1, 0.3, 0.6, 0.9], dtype=torch.float64)
TIMESTEPS = torch.tensor([0, 1, 2, 3])
SCHEDULER = DDGANScheduler(4)
source = torch.Generator().manual_seed(0)
X_0 = torch.rand(4, 1, 2, 2, generator=source) * 2 - 1
LABELS = torch.tensor([2, 0, 1, 1])
BATCH = {"x_0": X_0, "labels": LABELS, "indices": torch.arange(4)}
NOISE_TP1, NOISE_T, NOISE_POSTERIOR = torch.randn(3, 4, 1, 2, 2, generator=source)
LATENT = torch.randn(4, 5, generator=source)
X_T, X_TP1 = SCHEDULER.q_sample_pairs(X_0, TIMESTEPS, NOISE_T, NOISE_TP1)


def predicted(network, x_tp1, t, latent, labels):
    """A prediction of x_0 that depends on all that a generator is given."""
    return (network.weight * x_tp1 + 0.1 * latent.mean(1).reshape(-1, 1, 1, 1)).tanh()


def judged(network, x_t, t, x_tp1, labels):
    return network.weight * (x_t**2 + 0.3 * x_tp1 * x_t).sum((1, 2, 3)) - 0.5


def game(**options):
    made = {"num_class_embeds": 3, "latent_dim": 5}
    generator, discriminator = Recorder(predicted, **made), Recorder(judged)
    return AdversarialGame(SCHEDULER, generator, discriminator, AdversarialOptions(**options), (1e-3, 2e-3))


def script(mix=None):
    return ScriptedDraw([LEVELS], [NOISE_TP1, NOISE_T, LATENT, NOISE_POSTERIOR], [] if mix is None else [mix])


def generated():
    """The x_0 of the generator above and the x_t that is drawn for it."""
    x_0 = predicted(SimpleNamespace(weight=0.5), X_TP1, TIMESTEPS, LATENT, LABELS)
    return x_0, SCHEDULER.sample_posterior(x_0, X_TP1, TIMESTEPS, NOISE_POSTERIOR)


def seen_by(network, number=0):
    return dict(zip(("x_t", "t", "x_tp1", "labels"), network.calls[number]))


def assert_shown(network, number, x_t):
    shown = seen_by(network, number)
    torch.testing.assert_close(shown["x_t"], x_t)
    assert torch.equal(shown["t"], TIMESTEPS)
    torch.testing.assert_close(shown["x_tp1"], X_TP1)
    assert torch.equal(shown["labels"], LABELS)


def value_of(x_t):
    return judged(SimpleNamespace(weight=0.5), x_t, TIMESTEPS, X_TP1, LABELS)


def test_the_generator_is_judged_by_the_posterior_sample_of_its_prediction():
    made = game()
    result = made.generator_values(made.generator.network, BATCH, script())
    x_fake = generated()[1]
    assert_shown(made.discriminator, 0, x_fake)
    torch.testing.assert_close(result["loss"], F.softplus(-value_of(x_fake)))
    x_tp1, t, latent, labels = made.generator.network.calls[0]
    torch.testing.assert_close(x_tp1, X_TP1)
    assert torch.equal(t, TIMESTEPS) and torch.equal(latent, LATENT) and torch.equal(labels, LABELS)


def test_the_discriminator_tells_real_from_posterior_samples_at_one_condition():
    made = game(r1_gamma=0.0)
    result = made.discriminator_values(made.critic.network, BATCH, script())
    x_fake = generated()[1]
    assert_shown(made.discriminator, 0, X_T)
    assert_shown(made.discriminator, 1, x_fake)
    wanted = F.softplus(-value_of(X_T)) + F.softplus(value_of(x_fake))
    torch.testing.assert_close(result["loss"], wanted)
    # fakes are drawn for the labels of the reals
    x_tp1, t, latent, labels = made.generator.network.calls[0]
    torch.testing.assert_close(x_tp1, X_TP1)
    assert torch.equal(t, TIMESTEPS) and torch.equal(latent, LATENT) and torch.equal(labels, LABELS)
    assert torch.equal(result["penalty"], torch.zeros(4))
    torch.testing.assert_close(result["right"], (value_of(X_T) > value_of(x_fake)).float())


def test_no_gradient_of_the_discriminators_half_reaches_the_generator():
    made = game()
    made.discriminator_values(made.critic.network, BATCH, script())["loss"].sum().backward()
    assert made.generator.network.weight.grad is None and made.discriminator.weight.grad is not None


def test_the_generators_half_lowers_its_loss_along_its_gradient():
    made = game()
    network = made.generator.network
    first = made.generator_values(network, BATCH, script())["loss"].mean()
    first.backward()
    with torch.no_grad():
        network.weight -= 0.1 * network.weight.grad
    assert made.generator_values(network, BATCH, script())["loss"].mean() < first


def test_a_model_without_classes_gives_no_labels_to_anybody():
    made = game()
    made.class_conditional = False
    made.generator_values(made.generator.network, BATCH, script())
    assert made.generator.network.calls[0][3] is None and made.discriminator.calls[0][3] is None


@pytest.mark.parametrize("multiplied, factor", [(True, 2.0), (False, 1.0)])
def test_r1_acts_at_its_interval_with_its_weight(multiplied, factor):
    made = game(r1_gamma=0.5, r1_interval=2, r1_times_interval=multiplied)
    list(made.turns(0))
    x_t = X_T.clone().requires_grad_()
    gradient = torch.autograd.grad(value_of(x_t).sum(), x_t)[0]
    wanted = factor * 0.5 / 2 * gradient.square().sum((1, 2, 3))
    torch.testing.assert_close(made.discriminator_values(made.critic.network, BATCH, script())["penalty"], wanted)
    list(made.turns(1))
    assert not made.discriminator_values(made.critic.network, BATCH, script())["penalty"].any()


def test_the_gradient_penalty_is_taken_between_real_and_generated():
    made, mix = game(r1_gamma=0.0, wgan_gp=3.0), torch.tensor([0.0, 0.25, 0.5, 1.0])
    result = made.discriminator_values(made.critic.network, BATCH, script(mix))
    share = mix.reshape(-1, 1, 1, 1)
    between = (share * X_T + (1 - share) * generated()[1]).requires_grad_()
    norm = torch.autograd.grad(value_of(between).sum(), between)[0].flatten(1).norm(dim=1)
    torch.testing.assert_close(result["penalty"], 3.0 * (norm - 1) ** 2)


def test_the_distance_to_the_data_is_that_of_the_prediction_of_x_0():
    made = game(l1_weight=0.5)
    result = made.generator_values(made.generator.network, BATCH, script())
    x_0, x_fake = generated()
    distance = (x_0 - X_0).abs().mean((1, 2, 3))
    torch.testing.assert_close(result["l1"], distance)
    torch.testing.assert_close(result["loss"], F.softplus(-value_of(x_fake)) + 0.5 * distance)


def test_the_generator_plays_at_its_interval_after_the_warm_up():
    made = game(n_critic=2, discriminator_warmup_steps=4)
    played = [[player.name for player in made.turns(step)] for step in range(8)]
    alone, both = ["discriminator"], ["discriminator", "generator"]
    assert played == [alone, alone, alone, alone, alone, both, alone, both]


def test_the_timesteps_are_spread_as_asked():
    for name, spread in (("uniform", None), ("stratified", stratified)):
        made, draw = game(timestep_sampling=name), script()
        made.generator_values(made.generator.network, BATCH, draw)
        assert draw.spreads == [spread]


def test_the_saturating_loss_is_the_other_side_of_the_discriminators():
    made = game(generator_objective="minmax")
    result = made.generator_values(made.generator.network, BATCH, script())
    torch.testing.assert_close(result["loss"], -F.softplus(value_of(generated()[1])))


def test_who_has_won_is_said_once_after_some_reports_and_again_after_a_change():
    made = game()
    ahead = {"right": 1.0, "max_abs_v": 3.0, "grad_norm_g": 1.0}
    even = ahead | {"right": 0.6}
    said = [made.remark(values) for values in (*[ahead] * (PATIENCE + 2), even, *[ahead] * PATIENCE)]
    told = [place for place, sentence in enumerate(said) if sentence]
    assert told == [PATIENCE - 1, 2 * PATIENCE + 2]
    assert said[told[0]].startswith(next(iter(ADVICE))) and "raise r1_gamma" in said[told[0]]
    behind = game()
    assert [behind.remark(ahead | {"right": 0.0}) for _ in range(PATIENCE)][-1].startswith("the generator has won")
    stuck = game()
    assert "no gradient" in [stuck.remark(even | {"grad_norm_g": 1e-9}) for _ in range(PATIENCE)][-1]
