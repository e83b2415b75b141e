"""The three bounds of text against exact networks: they are the entropy where theory says so."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hf_diffusion.losses.masked import masked_loss, nll
from hf_diffusion.losses.tokens import BOUNDS, TokenObjective, TokenOptions, bound_of_prior
from hf_diffusion.models.transformer_tokens import TokenTransformerModel
from hf_diffusion.randomness import Draw, FixedDraw
from hf_diffusion.schedulers.scheduling_discrete import D3PMScheduler
from hf_diffusion.schedulers.scheduling_masked import MDLMScheduler, UDLMScheduler, over_tokens


K, MASK, DRAWS = 3, 3, 100_000
# p(x_0) of two tokens that hang together, and of one.
PAIRS = torch.tensor([[0.30, 0.05, 0.02], [0.03, 0.25, 0.05], [0.10, 0.05, 0.15]], dtype=torch.float64)
ONE = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)


def entropy(p: Tensor) -> float:
    return -float((p * p.log()).sum())


def exact_network(x_t: Tensor, level: Tensor) -> Tensor:
    """log p(x_0 | x_t) (B, 2, 4) of each of two tokens, whatever is masked of them."""
    known = x_t.flip(1)
    conditional = torch.stack([PAIRS.T, PAIRS])  # of the first by the second, of the second by the first
    conditional = conditional / conditional.sum(-1, keepdim=True)
    marginal = torch.stack([PAIRS.sum(1), PAIRS.sum(0)])
    sides = torch.arange(2).expand_as(x_t)
    by_other = conditional[sides, known.clamp(max=K - 1)]
    p = torch.where((known == MASK)[..., None], marginal[sides], by_other)
    return torch.nn.functional.pad(p, (0, 1)).clamp(min=1e-30).log()


def mean_bound(scheduler, predict: Callable, joint: Tensor) -> tuple[float, float]:
    """The bound in nats of all tokens by many draws, and its standard error."""
    generator = torch.Generator().manual_seed(0)
    x_0 = joint.flatten().multinomial(DRAWS, replacement=True, generator=generator)
    x_0 = torch.stack([x_0 // K, x_0 % K], dim=1) if joint.ndim == 2 else x_0[:, None]
    u = (torch.arange(DRAWS) + torch.rand(DRAWS, generator=generator, dtype=torch.float64)) / DRAWS
    u = u[torch.randperm(DRAWS, generator=generator)]

    def draw(*shape: int) -> Tensor:
        return torch.rand(DRAWS, *shape, generator=generator, dtype=torch.float64)

    found = BOUNDS[type(scheduler)](scheduler, predict, x_0, u, draw).bound.double().sum(1)
    found = found + bound_of_prior(scheduler, x_0).sum(1)
    return float(found.mean()), float(found.std() / math.sqrt(DRAWS))


def test_the_bound_of_masks_in_continuous_time_is_the_entropy_of_tokens_that_hang_together():
    bound, error = mean_bound(MDLMScheduler(4, MASK, noise_eps=0.0), exact_network, PAIRS)
    assert error < 0.04 and abs(bound - entropy(PAIRS)) < 3.5 * error


def test_in_steps_it_is_more_since_two_tokens_may_be_set_at_once():
    process = {"num_classes": 4, "transition_type": "absorbing", "beta_schedule": "jsd", "mask_token_id": MASK}
    bounds = [
        mean_bound(D3PMScheduler(num_train_timesteps=steps, decoder="posterior", **process), exact_network, PAIRS)
        for steps in (1, 200)
    ]
    # in one step both are set by their marginals
    alone = entropy(PAIRS.sum(1)) + entropy(PAIRS.sum(0))
    assert abs(bounds[0][0] - alone) < 3.5 * bounds[0][1] and alone > entropy(PAIRS) + 0.2
    assert abs(bounds[1][0] - entropy(PAIRS)) < 3.5 * bounds[1][1] + (alone - entropy(PAIRS)) / 200


def test_the_bound_of_uniform_noise_is_the_entropy_for_what_the_other_tokens_say():
    """Its posterior is of the joint form, whose best network leaves out the token itself."""
    scheduler = UDLMScheduler(K, noise_eps=0.0)

    def of_others(x_t: Tensor, t: Tensor) -> Tensor:
        return ONE.log().expand(*x_t.shape, K)

    def bayes(x_t: Tensor, t: Tensor) -> Tensor:
        alpha = over_tokens(scheduler.alpha(t), x_t)[..., None]
        likelihood = alpha * torch.nn.functional.one_hot(x_t, K) + (1 - alpha) / K
        return (likelihood * ONE).log()

    bound, error = mean_bound(scheduler, of_others, ONE)
    assert error < 0.04 and abs(bound - entropy(ONE)) < 3.5 * error
    for worse in (bayes, lambda x_t, t: torch.zeros(*x_t.shape, K)):
        assert mean_bound(scheduler, worse, ONE)[0] > bound + 0.1


def test_the_masked_loss_is_the_cross_entropy_of_what_is_masked_by_its_weight():
    generator, scheduler = torch.Generator().manual_seed(1), MDLMScheduler(5)
    x_0 = torch.randint(0, 4, (6, 9), generator=generator)
    logits, t = torch.randn(6, 9, 5, generator=generator), torch.rand(6, generator=generator).double()
    x_t = scheduler.add_noise(x_0, torch.rand(6, 9, generator=generator), t)
    by_definition = over_tokens(scheduler.loss_weight(t), x_0) * nll(scheduler.x_0_log_probs(logits, x_t), x_0)
    torch.testing.assert_close(
        masked_loss(scheduler, logits, x_0, x_t, t), by_definition.float(), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("noise", ["absorbing", "uniform"])
@pytest.mark.parametrize("objective", ["continuous", "hybrid", "vlb", "cross_entropy"])
def test_every_objective_of_every_noise_has_its_loss_and_a_bound(noise, objective):
    options = TokenOptions(noise=noise, objective=objective, d3pm_num_steps=20, posterior_form="mixture")
    scheduler = options.process(8, 7 if noise == "absorbing" else None)
    torch.manual_seed(0)
    network = TokenTransformerModel(8, 6, 8, 1, 2, time_conditioning=options.is_told_time, condition_size=4)
    trained = TokenObjective(scheduler, network, options, 1e-3)
    batch = {"x_0": torch.arange(24).reshape(4, 6) % 7}
    values = trained.values(network, batch, Draw(0, 0, slice(0, 4), 4, torch.device("cpu")))
    assert values["loss"].shape == values["bits_per_token"].shape == (4,) and values["loss"].isfinite().all()
    assert values["loss"].requires_grad and not values["bits_per_token"].requires_grad
    if objective == "continuous":
        assert torch.equal(values["loss"], values["bits_per_token"])
    elif objective == "vlb":
        torch.testing.assert_close(values["loss"] * 20, values["bits_per_token"])
    assert options.is_told_time == (noise == "uniform" or objective != "continuous")


def test_in_continuous_time_the_cross_entropy_of_all_tokens_is_added_and_the_bound_stays():
    torch.manual_seed(0)
    network = TokenTransformerModel(8, 6, 8, 1, 2)
    torch.nn.init.normal_(network.linear_out.weight)
    batch, seen = {"x_0": torch.arange(24).reshape(4, 6) % 7}, {}
    network.register_forward_hook(lambda layer, given, output: seen.update(logits=output[0]))

    def values(weight: float | None) -> dict[str, Tensor]:
        options = TokenOptions(cross_entropy_weight=weight)
        trained = TokenObjective(options.process(8, 7), network, options, 1e-3)
        return trained.values(network, batch, Draw(0, 0, slice(0, 4), 4, torch.device("cpu")))

    published, ours = values(None), values(2.0)
    # the mask is no answer
    log_p = seen["logits"][..., :7].log_softmax(dim=-1)
    of_all = nll(log_p, batch["x_0"]).mean(1) / math.log(2)
    torch.testing.assert_close(ours["loss"], published["loss"] + 2 * of_all)
    assert torch.equal(ours["bits_per_token"], published["bits_per_token"])


def test_held_out_texts_keep_their_classes_and_see_every_level():
    options = TokenOptions(label_dropout=0.999)
    torch.manual_seed(0)
    network = TokenTransformerModel(8, 6, 8, 1, 2, num_class_embeds=2, null_class=True, condition_size=4)
    torch.nn.init.normal_(network.linear_out.weight)
    torch.nn.init.normal_(network.modulation_out.weight, std=3.0)
    torch.nn.init.normal_(network.class_embedding.weight, std=3.0)
    trained = TokenObjective(options.process(8, 7), network, options, 1e-3)
    batch = {"x_0": torch.arange(24).reshape(4, 6) % 7, "labels": torch.tensor([0, 1, 0, 1])}

    def values(labels: Tensor, training: bool) -> Tensor:
        network.train(training)
        draw = FixedDraw(0, range(4), 0, 1, torch.device("cpu"))
        return trained.values(network, {**batch, "labels": labels}, draw)["loss"]

    zeros = torch.zeros(4, dtype=torch.int64)
    assert not torch.allclose(values(batch["labels"], False), values(zeros, False))
    # in training nearly all labels are dropped
    torch.testing.assert_close(values(batch["labels"], True), values(zeros, True))


def test_a_bias_is_refused():
    with pytest.raises(ValueError, match="give --posterior_form mixture"):
        TokenOptions(noise="uniform", objective="cross_entropy").check()
