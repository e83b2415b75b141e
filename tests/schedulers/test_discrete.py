"""Diffusion of categories: matrices, posteriors, bounds that can be counted, memory, draws."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hf_diffusion.losses.discrete import bound_term, prior_term
from hf_diffusion.schedulers.scheduling_discrete import (
    D3PMScheduler,
    gumbel_argmax,
    information_removed,
    jsd_betas,
    nearest_neighbors,
)


K, T = 6, 7
RING = [[(i - 1) % K, (i + 1) % K] for i in range(K)]
FREQUENCIES = [0.3, 0.25, 0.2, 0.1, 0.1, 0.05]
PROCESSES = {
    "uniform": {},
    "uniform in bands": {"transition_bands": 2, "beta_schedule": "linear", "beta_start": 0.1, "beta_end": 0.9},
    "absorbing": {"transition_type": "absorbing", "beta_schedule": "jsd"},
    "gaussian": {"transition_type": "gaussian", "beta_schedule": "linear", "beta_start": 0.05, "beta_end": 0.5},
    "gaussian in bands": {"transition_type": "gaussian", "transition_bands": 1},
    "absorbing gaussian": {"transition_type": "absorbing_gaussian"},
    "band diagonal": {"transition_type": "band_diagonal", "transition_bands": 1},
    "nearest neighbour": {"transition_type": "nearest_neighbor", "neighbors": RING},
    "equal information": {"beta_schedule": "mutual_information", "frequencies": FREQUENCIES},
}
every_process = pytest.mark.parametrize("options", PROCESSES.values(), ids=PROCESSES)


def one_step_matrices(scheduler: D3PMScheduler) -> list[Tensor]:
    return [scheduler.transition_matrix(t) for t in range(scheduler.config.num_train_timesteps)]


@every_process
def test_products_of_steps_are_the_cumulative_and_the_skipping_matrices(options):
    scheduler = D3PMScheduler(K, T, **options)
    steps, product = one_step_matrices(scheduler), torch.eye(K, dtype=torch.float64)
    for t, step in enumerate(steps):
        assert step.min() >= 0
        torch.testing.assert_close(step.sum(1), torch.ones(K).double())
        product = product @ step
        torch.testing.assert_close(scheduler.cumulative_matrix(t), product)
        torch.testing.assert_close(scheduler.transition_matrix(t, -1), product)
    skip = steps[2] @ steps[3] @ steps[4]
    torch.testing.assert_close(scheduler.transition_matrix(4, 1), skip)


@every_process
def test_posteriors_are_those_of_bayes_rule_for_steps_and_skips(options):
    scheduler, steps = D3PMScheduler(K, T, **options, decoder="posterior"), None
    steps = one_step_matrices(scheduler)
    # not the last level, which some x_t cannot reach
    t, s = 5, 3
    everything = torch.arange(K)
    x_0, x_t = everything[:, None].expand(K, K), everything.expand(K, K)
    jumps = steps[4] @ steps[5]
    joint = scheduler.cumulative_matrix(s)[:, None, :] * jumps.T
    possible = joint.sum(-1) > 0
    exact = joint[possible] / joint[possible].sum(-1, keepdim=True)
    times = [torch.full((K,), time) for time in (t, s)]
    torch.testing.assert_close(scheduler.posterior_logits(x_0, x_t, *times).softmax(-1)[possible], exact)


@every_process
def test_one_number_a_value_draws_x_t_as_often_as_the_matrix_says(options):
    scheduler, count = D3PMScheduler(K, T, **options), 40_000
    generator = torch.Generator().manual_seed(0)
    x_0, t = torch.arange(K)[:, None].expand(K, count), torch.full((K,), 3)
    drawn = scheduler.add_noise(x_0, torch.rand(K, count, generator=generator), t)
    found = torch.stack([torch.bincount(row, minlength=K) for row in drawn]) / count
    # five standard errors
    assert (found - scheduler.cumulative_matrix(3)).abs().max() < 5 * 0.5 / math.sqrt(count)


# --- a problem that can be counted ----------------------------------------------------------------


P_DATA = torch.tensor([0.4, 0.3, 0.1, 0.15, 0.05], dtype=torch.float64)


def expected_bound(scheduler: D3PMScheduler, network: Tensor) -> float:
    """The bound in nats of probabilities of x_0 (T, x_t, x_0), over p(x_0) q(x_t | x_0)."""
    steps, classes = network.shape[:2]
    everything, total = torch.arange(classes), 0.0
    for t in range(steps):
        x_0, x_t = everything[:, None].expand(-1, classes), everything.expand(classes, -1)
        logits = network[t].clamp(min=1e-300).log().expand(classes, -1, -1)
        terms = bound_term(scheduler, logits, x_0, x_t, torch.full((classes,), t))
        weights = P_DATA[:, None] * scheduler.cumulative_matrix(t)
        total += float(torch.where(weights > 0, weights * terms, 0.0).sum())
    return total + float(P_DATA @ prior_term(scheduler, everything[:, None])[:, 0])


def bayes(scheduler: D3PMScheduler) -> Tensor:
    joint = torch.stack([P_DATA[:, None] * scheduler.cumulative_matrix(t) for t in range(T)]).transpose(1, 2)
    return joint / joint.sum(-1, keepdim=True)


def test_the_bound_is_the_entropy_where_theory_says_so_and_above_it_elsewhere():
    entropy = -float((P_DATA * P_DATA.log()).sum())
    # so much noise that the prior's term is nothing
    process = {"transition_type": "gaussian", "beta_schedule": "linear", "beta_start": 0.3, "beta_end": 40.0}
    joint, mixture = (D3PMScheduler(5, T, **process, posterior_form=form) for form in ("joint", "mixture"))
    # one variable: what the others say of x_0 is p(x_0); the last step takes p(x_0 | x_t) itself
    of_others = bayes(joint).clone()
    of_others[1:] = P_DATA
    assert expected_bound(mixture, bayes(mixture)) == pytest.approx(entropy, abs=2e-3)
    assert expected_bound(joint, of_others) == pytest.approx(entropy, abs=2e-3)
    assert expected_bound(joint, bayes(joint)) > entropy + 0.05


def test_every_term_of_the_absorbing_bound_is_the_cross_entropy_of_masked_values_over_t():
    scheduler = D3PMScheduler(5, T, "absorbing", beta_schedule="jsd", mask_token_id=4, decoder="posterior")
    everything = torch.arange(4)
    logits = torch.randn(4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # the network gives the mask no probability
    logits = torch.cat([logits, torch.tensor([-math.inf]).double()])
    x_0, x_t = everything[:, None].expand(4, 5), torch.arange(5).expand(4, 5)
    for t in range(T):
        terms = bound_term(scheduler, logits.expand(4, 5, 5), x_0, x_t, torch.full((4,), t))
        weights = scheduler.cumulative_matrix(t)[:4]
        mean = torch.where(weights > 0, weights * terms, 0.0).sum(1)
        torch.testing.assert_close(mean, -logits.log_softmax(0)[:4] / T)


def test_sampling_in_fewer_steps_draws_what_the_skipping_chain_generates():
    process = {"transition_type": "gaussian", "beta_schedule": "linear", "beta_start": 0.3, "beta_end": 3.0}
    scheduler = D3PMScheduler(5, T, **process, posterior_form="mixture", decoder="posterior")
    network, count = bayes(scheduler).log(), 100_000
    scheduler.set_timesteps(3)
    assert scheduler.timesteps.tolist() == [6, 3, 0]
    expected, everything = torch.full((5,), 0.2).double(), torch.arange(5)[None]
    x = scheduler.sample_prior(torch.rand(1, count, generator=torch.Generator().manual_seed(0)))
    for i, t in enumerate(scheduler.timesteps):
        if i < 2:
            s = scheduler.previous_timestep(t[None])
            expected = expected @ scheduler.predicted_logits(network[t][None], everything, t[None], s).softmax(-1)[0]
            x = scheduler.step(network[t][x], t, x, generator=torch.Generator().manual_seed(i + 1)).prev_sample
    found = torch.bincount(x[0], minlength=5) / count
    assert (found - expected).abs().max() < 5 * 0.5 / math.sqrt(count)
    # and the exact posterior leads to q(x_0) at the level of the last timestep
    torch.testing.assert_close(expected, P_DATA @ scheduler.cumulative_matrix(0), atol=2e-2, rtol=0)


# --- schedules and graphs -------------------------------------------------------------------------


def test_equal_information_is_removed_in_each_step_which_for_absorbing_is_jsd():
    options = {"beta_schedule": "mutual_information", "frequencies": FREQUENCIES}
    for kind in ({}, {"transition_type": "nearest_neighbor", "neighbors": RING}):
        scheduler = D3PMScheduler(K, T, **options, **kind)
        removed = [
            information_removed(scheduler.cumulative_matrix(t), torch.tensor(FREQUENCIES).double()) for t in range(T)
        ]
        torch.testing.assert_close(torch.stack(removed), torch.arange(1, T + 1).double() / T, atol=1e-3, rtol=0)
    # the mask itself is no word of the data
    words = [*FREQUENCIES[:-2], 0.15, 0.0]
    absorbing = D3PMScheduler(K, T, "absorbing", mask_token_id=K - 1, **{**options, "frequencies": words})
    torch.testing.assert_close(absorbing.betas, jsd_betas(T), atol=1e-3, rtol=0)


@pytest.mark.parametrize("rounding", [-1e-16, 1e-16])
def test_the_eigenvalue_0_of_a_graph_keeps_probability_however_it_is_rounded(monkeypatch, rounding):
    eigh = torch.linalg.eigh

    def rounded(matrix):
        values, vectors = eigh(matrix)
        return torch.cat([values[:-1], torch.tensor([rounding]).double()]), vectors

    monkeypatch.setattr(torch.linalg, "eigh", rounded)
    scheduler = D3PMScheduler(K, T, "nearest_neighbor", neighbors=RING, trained_betas=[0.1] * (T - 1) + [1.0])
    torch.testing.assert_close(scheduler.cumulative_matrix(T - 1), torch.full((K, K), 1 / K).double())


def test_neighbours_are_near_and_noise_moves_along_their_graph():
    places = torch.tensor([0.0, 1.0, 2.1, 7.0, 8.0, 9.1])[:, None]
    neighbors = nearest_neighbors(places, 2)
    assert [sorted(row) for row in neighbors] == [[1, 2], [0, 2], [0, 1], [4, 5], [3, 5], [3, 4]]
    scheduler = D3PMScheduler(K, T, "nearest_neighbor", neighbors=neighbors)
    matrix = scheduler.cumulative_matrix(T - 1)
    torch.testing.assert_close(matrix, matrix.T)
    assert matrix[:3, 3:].abs().max() < 1e-12 and matrix[:3, :3].min() > 0.1


# --- numbers --------------------------------------------------------------------------------------


class Allocations(TorchDispatchMode):
    """Bytes of all tensors that are made."""

    def __init__(self):
        super().__init__()
        self.largest = self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for made in result if isinstance(result, tuple | list) else [result]:
            # a view is no memory of its own
            if isinstance(made, Tensor) and made._base is None:
                size = made.untyped_storage().nbytes()
                self.largest, self.total = max(self.largest, size), self.total + size
        return result


@pytest.mark.parametrize("kind", [{}, {"transition_type": "absorbing", "beta_schedule": "jsd"}])
def test_a_vocabulary_of_8000_and_1000_timesteps_need_no_matrix(kind):
    words, length = 8000, 8
    with Allocations() as allocated:
        scheduler = D3PMScheduler(words, 1000, **kind)
        x_0, t = torch.randint(0, words, (1, length)), torch.tensor([500])
        logits = torch.zeros(1, length, words)
        x_t = scheduler.add_noise(x_0, torch.rand(1, length), t)
        bound_term(scheduler, logits, x_0, x_t, t)
        scheduler.step(logits, 500, x_t, generator=torch.Generator().manual_seed(0))
    # a float64 for each word of each token; all that was ever made, kept or not, is under 1 GB
    assert allocated.largest <= 8 * words * length and allocated.total < 1e9


def test_a_gaussian_table_is_made_once_and_only_when_it_is_needed():
    scheduler = D3PMScheduler(256, 1000, "gaussian", beta_schedule="linear")
    with Allocations() as allocated:
        assert scheduler.kernel.by_distance.shape == (1000, 256)
        scheduler.kernel.columns(torch.randint(0, 256, (2, 4)), torch.tensor([1, 1000]))
    assert allocated.largest <= 8 * 1000 * (2 * 256 - 1)


def test_gumbel_noise_of_float32_hardly_draws_rare_categories():
    """A mask that stays with 0.99, and a million words of 1e-8 each."""
    words, chance, draws = 10**6, 0.01, 200_000
    logits = torch.tensor([1 - chance, chance / words], dtype=torch.float64).log()
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(draws, 2, generator=generator, dtype=torch.float64)
    # the largest of a million uniform numbers has the distribution of u^(1 / million)
    largest = u[:, 1] ** (1 / words)
    for precision, share in ((torch.float64, chance), (torch.float32, 0.0)):
        # torch draws whole multiples of 2^-24 in float32
        grid = (largest * 2**24).floor() / 2**24 if precision == torch.float32 else largest
        uniform = torch.stack([u[:, 0], grid], dim=1).to(precision)
        found = gumbel_argmax(logits.to(precision), uniform).double().mean()
        error = math.sqrt(chance / draws)
        if precision == torch.float64:
            assert abs(found - share) < 5 * error
        else:
            assert found < chance / 2


@pytest.mark.parametrize("levels", [2, 16, 17, 255, 256])
def test_levels_survive_values_in_half_precision_range_and_eight_bits(levels):
    scheduler = D3PMScheduler(levels, 2)
    categories = torch.arange(levels)
    values = scheduler.to_values(categories)
    assert values.dtype == torch.float32 and values[0] == -1 and values[-1] == 1
    assert torch.equal(scheduler.to_categories(values), categories)
    eight_bits = ((values + 1) * 127.5).round() / 127.5 - 1
    assert torch.equal(scheduler.to_categories(eight_bits), categories)


def test_heads_give_logits_of_each_channel():
    x_t = torch.tensor([[[1]], [[3]]]).repeat(1, 2, 1)[..., None]
    output = torch.arange(2 * 8, dtype=torch.float32).reshape(2, 8, 1, 1)
    logits = D3PMScheduler(4, 3).x_0_logits(output, x_t)
    assert logits.shape == (2, 2, 1, 1, 4)
    assert torch.equal(logits[0, 1, 0, 0], torch.tensor([4.0, 5, 6, 7]) + torch.tensor([0, 1, 0, 0]))
    # a narrow logistic distribution at x_t, since its location is added to that
    narrow = D3PMScheduler(4, 3, prediction_type="logistic").x_0_logits(torch.zeros(2, 4, 1, 1), x_t)
    assert torch.equal(narrow.argmax(-1), x_t)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transition_type": "blur"}, "unknown transition_type 'blur'; choose from"),
        ({"num_classes": 1}, "num_classes=1 must be at least 2"),
        ({"mask_token_id": 9}, "mask_token_id=9 is no category; give 0 to 5"),
        ({"transition_type": "band_diagonal"}, "needs transition_bands"),
        ({"transition_type": "nearest_neighbor"}, "a list for each of the 6 categories"),
        ({"beta_schedule": "mutual_information"}, "needs frequencies"),
        ({"trained_betas": [0.1]}, "1 trained_betas were given for num_train_timesteps=7"),
    ],
)
def test_a_process_that_cannot_be_is_refused_in_a_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        D3PMScheduler(**{"num_classes": K, "num_train_timesteps": T} | options)


@pytest.mark.parametrize(
    "wrong", [{"num_inference_steps": 8}, {"num_inference_steps": 0}, {"timesteps": [1, 2]}, {"timesteps": [7]}, {}]
)
def test_a_run_must_descend_within_the_training_steps(wrong):
    with pytest.raises(ValueError, match="num_inference_steps|descend|either"):
        D3PMScheduler(K, T).set_timesteps(**wrong)


def test_a_process_is_what_its_config_says():
    scheduler = D3PMScheduler(K, T, "nearest_neighbor", neighbors=RING, eps=1e-6)
    again = D3PMScheduler.from_config(scheduler.config)
    torch.testing.assert_close(again.cumulative_matrix(3), scheduler.cumulative_matrix(3), rtol=0, atol=0)
