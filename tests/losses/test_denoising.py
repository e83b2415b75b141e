"""What a denoising network is shown and trained by: each setting acts as its formula says."""

import pytest
import torch
from accelerate import Accelerator

from hf_diffusion.losses.denoising import DenoisingObjective, DenoisingOptions
from hf_diffusion.losses.gaussian import hybrid_loss, simple_loss, vlb_loss
from hf_diffusion.losses.noise_levels import antithetic, stratified
from hf_diffusion.schedulers.scheduling_gaussian import LinearDDPMScheduler
from tests.losses.scripted import Recorder, ScriptedDraw


T = 10
LEVELS = torch.tensor([0.0, 0.31, 0.55, 0.99], dtype=torch.float64)
TIMESTEPS = torch.tensor([0, 3, 5, 9])
generator = torch.Generator().manual_seed(0)
X_0 = torch.rand(4, 1, 2, 2, generator=generator) * 2 - 1
NOISE = torch.randn(4, 1, 2, 2, generator=generator)
BATCH = {"x_0": X_0, "labels": torch.tensor([0, 1, 2, 1]), "indices": torch.arange(4)}


def objective(num_class_embeds=None, null_class=False, answer=None, **options):
    options = DenoisingOptions(**options)
    kinds = {"prediction_type": options.prediction_type, "variance_type": options.variance_type}
    scheduler = LinearDDPMScheduler(T, beta_schedule="squaredcos_cap_v2", **kinds)
    network = Recorder(answer, num_class_embeds=num_class_embeds, null_class=null_class)
    return DenoisingObjective(scheduler, network, options, 1e-3, Accelerator(cpu=True))


def values(made, uniforms=(), levels=(LEVELS,)):
    draw = ScriptedDraw(levels, [NOISE], uniforms)
    result = made.values(made.players[0].network, BATCH, draw)
    draw.assert_empty()
    return result, made.players[0].network.calls[-1], draw


def test_the_network_sees_the_noisy_image_at_its_own_timestep_and_the_loss_is_that_of_its_output():
    made = objective()
    result, (x_t, t, labels), _ = values(made)
    assert torch.equal(t, TIMESTEPS) and labels is None
    assert torch.equal(x_t, made.scheduler.add_noise(X_0, NOISE, TIMESTEPS))
    assert torch.equal(result["loss"], simple_loss(made.scheduler, 0.5 * x_t, X_0, x_t, NOISE, TIMESTEPS))
    assert torch.equal(result["level"], TIMESTEPS / T)


def test_labels_are_dropped_below_the_share_in_training_and_never_in_evaluation():
    made = objective(num_class_embeds=3, null_class=True, label_dropout=0.3)
    chance = torch.tensor([0.29, 0.31, 0.0, 0.9])
    _, (_, _, labels), _ = values(made, uniforms=[chance])
    assert labels.tolist() == [3, 1, 3, 1]
    made.players[0].network.eval()
    _, (_, _, labels), _ = values(made)
    assert labels.tolist() == BATCH["labels"].tolist()


def test_a_model_without_a_null_class_sees_every_label():
    _, (_, _, labels), _ = values(objective(num_class_embeds=3))
    assert labels.tolist() == BATCH["labels"].tolist()


@pytest.mark.parametrize("name, spread", [("uniform", None), ("stratified", stratified), ("antithetic", antithetic)])
def test_the_levels_of_a_batch_are_spread_as_asked(name, spread):
    _, _, draw = values(objective(timestep_sampling=name))
    assert draw.spreads == [spread]


def test_the_weights_of_the_timesteps_are_those_of_their_papers():
    plain, (x_t, *_), _ = values(objective())
    alpha_bar = objective().scheduler.alphas_cumprod[TIMESTEPS].double()
    snr = alpha_bar / (1 - alpha_bar)
    # of a network that predicts v: min(SNR, gamma) / (SNR + 1), arXiv:2303.09556
    weighted, _, _ = values(objective(loss_weighting="min_snr", min_snr_gamma=2.0))
    torch.testing.assert_close(weighted["loss"] / plain["loss"], (snr.clamp(max=2.0) / (snr + 1)).float())
    # of one that predicts the noise: 1 / (k + SNR)^gamma, arXiv:2204.00227
    options = {"prediction_type": "epsilon", "p2_gamma": 0.5, "p2_k": 2.0}
    plain, _, _ = values(objective(prediction_type="epsilon"))
    weighted, _, _ = values(objective(loss_weighting="p2", **options))
    torch.testing.assert_close(weighted["loss"] / plain["loss"], ((2.0 + snr) ** -0.5).float())


@pytest.mark.parametrize("prediction_type", ["sample", "epsilon", "v_prediction"])
def test_weighted_as_v_the_loss_is_the_error_of_v_whatever_is_predicted(prediction_type):
    made = objective(loss_weighting="v", prediction_type=prediction_type)
    result, (x_t, *_), _ = values(made)
    alpha_bar = made.scheduler.alphas_cumprod[TIMESTEPS].double()[:, None, None, None]
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    # the network halves what it sees
    output = 0.5 * x_t.double()
    v = {
        "sample": (alpha * x_t - output) / sigma,
        "epsilon": (output - sigma * x_t) / alpha,
        "v_prediction": output,
    }[prediction_type]
    error = (v - (alpha * NOISE - sigma * X_0)).square().flatten(1).mean(1)
    # of the levels, one is so near an end that its divisor is bounded
    inside = (torch.minimum(alpha, sigma) > 0.05).flatten()
    torch.testing.assert_close(result["loss"].double()[inside], error[inside], rtol=1e-4, atol=1e-5)
    assert inside.sum() >= 3 and result["loss"].max() < 400 * 4


def test_logit_normal_timesteps_have_their_density_in_training_and_not_in_evaluation():
    options = {"level_distribution": "logit_normal", "logit_mean": 0.8, "logit_std": 0.5}
    made = objective(**options)
    _, (_, t, _), _ = values(made)
    expected = torch.sigmoid(0.8 + 0.5 * torch.special.ndtri(LEVELS))
    assert t.tolist() == [int(level * T) for level in expected]
    made.players[0].network.eval()
    _, (_, t, _), _ = values(made)
    assert torch.equal(t, TIMESTEPS)
    with pytest.raises(ValueError, match="both say how often a timestep comes; give one"):
        DenoisingOptions(timestep_sampling="loss_second_moment", level_distribution="logit_normal").check()


def test_the_bound_and_the_hybrid_are_trained_where_they_are_asked_for():
    def answer(network, x_t, t, labels):
        return torch.cat([network.weight * x_t, 0.1 * x_t], dim=1)

    common = {"variance_type": "learned_range", "answer": answer}
    made = objective(objective="vlb", **common)
    result, (x_t, *_), _ = values(made)
    output = torch.cat([0.5 * x_t, 0.1 * x_t], dim=1)
    assert torch.equal(result["loss"], vlb_loss(made.scheduler, output, X_0, x_t, TIMESTEPS))
    made = objective(objective="hybrid", vlb_weight=0.25, **common)
    result, _, _ = values(made)
    weight = torch.ones(4)
    wanted = hybrid_loss(made.scheduler, output, X_0, x_t, NOISE, TIMESTEPS, 0.25, weight)
    torch.testing.assert_close(result["loss"], wanted)
    assert not torch.allclose(wanted, simple_loss(made.scheduler, output, X_0, x_t, NOISE, TIMESTEPS))


def test_importance_sampling_weighs_the_loss_by_its_factor_and_remembers_it_unweighted():
    made = objective(timestep_sampling="loss_second_moment")
    # timestep t has the losses t + 1, so that p(t) is nearly (t + 1) / 55
    every = torch.arange(T).repeat_interleave(10)
    made.importance.update(every, every.double() + 1)
    u = torch.tensor([0.001, 0.2, 0.5, 0.99])
    t, factor = made.importance.sample(u)
    assert factor.max() > 3 * factor.min()
    result, (x_t, seen, _), _ = values(made, uniforms=[u], levels=[])
    assert torch.equal(seen, t)
    unweighted = simple_loss(made.scheduler, 0.5 * x_t, X_0, x_t, NOISE, t)
    torch.testing.assert_close(result["loss"].double(), unweighted.double() * factor)
    torch.testing.assert_close(made.importance.history[t, -1], unweighted.double())
    assert made.state == (made.importance,)


def test_importance_sampling_leaves_held_out_images_alone():
    made = objective(timestep_sampling="loss_second_moment")
    made.players[0].network.eval()
    before = made.importance.history.clone()
    result, (x_t, t, _), _ = values(made)
    assert torch.equal(t, TIMESTEPS) and torch.equal(made.importance.history, before)
    assert torch.equal(result["loss"], simple_loss(made.scheduler, 0.5 * x_t, X_0, x_t, NOISE, TIMESTEPS))
