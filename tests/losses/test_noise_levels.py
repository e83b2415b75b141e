"""Noise levels and timesteps: distribution, spread over a batch, importance sampling."""

import pytest
import torch

from hf_diffusion.losses.noise_levels import LossSecondMomentSampler, antithetic, stratified, timesteps
from hf_diffusion.randomness import BLOCK


def uniforms(n, seed=0, dtype=torch.float32):
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def frequencies(t, num_timesteps):
    return torch.bincount(t, minlength=num_timesteps).double() / len(t)


def warmed_up(num_timesteps=20, history_per_term=3):
    """A sampler whose timestep k has only losses near k + 1."""
    sampler = LossSecondMomentSampler(num_timesteps, history_per_term)
    t = torch.arange(num_timesteps).repeat(history_per_term)
    sampler.update(t, (t + 1) * (0.9 + 0.2 * uniforms(len(t))))
    return sampler


def independent(u, rows, total):
    return u


SPREADS = (independent, stratified, antithetic)


def spread(kind, u):
    """The levels of a whole batch."""
    return kind(u, torch.arange(len(u)), len(u))


@pytest.mark.parametrize("kind", SPREADS)
def test_every_timestep_is_equally_likely(kind):
    # 30 batches of 1000: 1000 is no multiple of 7, so strata and timesteps do not line up.
    t = torch.cat([timesteps(spread(kind, uniforms(1000, seed)), 7) for seed in range(30)])
    assert t.dtype == torch.int64
    torch.testing.assert_close(
        frequencies(t, 7), torch.full((7,), 1 / 7).double(), rtol=0, atol=4 * (1 / 7 / 30000) ** 0.5
    )


@pytest.mark.parametrize("kind", SPREADS)
def test_the_ends_of_the_unit_interval_stay_inside(kind):
    for dtype in (torch.float32, torch.float64):
        below_one = torch.nextafter(torch.ones(5, dtype=dtype), torch.zeros(5, dtype=dtype))
        for u in (torch.zeros(5, dtype=dtype), below_one):
            levels = spread(kind, u)
            # a stratum's upper end may round to that of [0, 1) itself
            assert levels.dtype in (dtype, torch.float64) and 0 <= levels.min()
            assert levels.max() < 1 or kind is stratified
            for num_timesteps in (1, 3, 4000):
                t = timesteps(levels, num_timesteps)
                assert 0 <= t.min() and t.max() < num_timesteps


def test_stratified_levels_cover_each_stratum_once():
    t = timesteps(spread(stratified, uniforms(64)), 640)
    assert torch.equal(t // 10, torch.arange(64))
    assert len((t % 10).unique()) > 5  # and are random within it


def test_stratified_levels_reduce_the_variance_of_a_batch_mean():
    loss = torch.linspace(1, 0, 1000) ** 2
    variance = {}
    for kind in (independent, stratified):
        means = [loss[timesteps(spread(kind, uniforms(32, seed)), 1000)].mean() for seed in range(200)]
        variance[kind] = torch.stack(means).var()
    assert variance[stratified] < 0.02 * variance[independent]


def test_antithetic_neighbours_mirror_each_other_at_the_borders_between_timesteps_too():
    borders = torch.arange(64).repeat_interleave(2) / 64
    for u in (uniforms(512), uniforms(9), uniforms(1), borders, uniforms(512, dtype=torch.float64)):
        pairs = len(u) // 2
        levels = spread(antithetic, u)
        torch.testing.assert_close(levels[0::2], u[0::2].double(), rtol=0, atol=0)
        torch.testing.assert_close(levels[0::2][:pairs] + levels[1::2], torch.ones(pairs).double())
        for num_timesteps in (1, 2, 3, 8, 64, 1000, 4000):
            t = timesteps(levels, num_timesteps)
            assert torch.equal(t[0::2][:pairs] + t[1::2], torch.full((pairs,), num_timesteps - 1))


@pytest.mark.parametrize("kind", SPREADS)
def test_blocks_of_rows_get_the_levels_of_the_whole_batch(kind):
    """A process that holds some blocks meets what it would with all; the last is half full."""
    total = 5 * BLOCK + BLOCK // 2
    u, rows = uniforms(6 * BLOCK), torch.arange(6 * BLOCK)
    whole = kind(u[:total], rows[:total], total)
    for first, last in ((0, 1), (1, 3), (2, 6)):
        part = slice(first * BLOCK, last * BLOCK)
        levels = kind(u[part], rows[part], total)[: max(0, total - first * BLOCK)]
        assert torch.equal(levels, whole[first * BLOCK : last * BLOCK])


def test_sampling_is_uniform_until_every_timestep_has_a_full_history():
    sampler = LossSecondMomentSampler(4, history_per_term=2)
    sampler.update(torch.tensor([0, 0, 1, 1, 2, 2, 3]), torch.tensor([1.0, 2, 3, 4, 5, 6, 7]))
    t, importance = sampler.sample(uniforms(1000))
    assert torch.equal(sampler.weights(), torch.ones(4).double())
    assert torch.equal(t, timesteps(uniforms(1000), 4)) and torch.equal(importance, torch.ones(1000).double())
    assert sampler.sample(torch.tensor([0.0, 0.25, 0.5, 0.75]))[0].tolist() == [0, 1, 2, 3]
    sampler.update(torch.tensor([3]), torch.tensor([8.0]))
    assert sampler.weights().argmax() == 3


def test_timesteps_are_drawn_in_proportion_to_the_root_mean_square_loss():
    sampler = warmed_up()
    t, _ = sampler.sample(uniforms(100_000))
    expected = sampler.history.square().mean(dim=1).sqrt()
    expected = 0.999 * expected / expected.sum() + 0.001 / 20
    torch.testing.assert_close(frequencies(t, 20), expected, rtol=0, atol=0.004)


def test_importance_weighted_losses_estimate_the_plain_mean_without_bias():
    sampler, loss = warmed_up(), torch.arange(20).double() ** 2
    u = (torch.arange(200_000).double() + 0.5) / 200_000  # a grid in place of draws: the estimate's expectation
    t, importance = sampler.sample(u)
    assert (loss[t] * importance).mean().item() == pytest.approx(loss.mean().item(), rel=1e-3)


def test_importance_weights_reduce_the_variance_of_the_loss_they_were_made_for():
    sampler, loss = warmed_up(), torch.arange(20).double() + 1
    t, importance = sampler.sample(uniforms(2000))
    plain = loss[timesteps(uniforms(2000), 20)]
    assert (loss[t] * importance).var() < 0.1 * plain.var()


def test_updates_in_any_portions_keep_the_same_history_as_one_loss_at_a_time():
    t = torch.randint(0, 5, (300,), generator=torch.Generator().manual_seed(0))
    losses = uniforms(300, dtype=torch.float64)
    one_by_one = [[] for _ in range(5)]
    for timestep, loss in zip(t.tolist(), losses.tolist()):
        one_by_one[timestep] = (one_by_one[timestep] + [loss])[-4:]
    for portion in (1, 2, 7, 64, 300):
        sampler = LossSecondMomentSampler(5, history_per_term=4)
        for start in range(0, 300, portion):
            sampler.update(t[start : start + portion], losses[start : start + portion])
            assert sampler.counts.max() <= 4
        assert sampler.history.tolist() == one_by_one
        assert sampler.counts.tolist() == [4] * 5


def test_a_loss_that_is_not_finite_never_enters_the_history():
    sampler, clean = LossSecondMomentSampler(3, 2), LossSecondMomentSampler(3, 2)
    sampler.update(torch.tensor([0, 1, 0, 2, 0]), torch.tensor([1.0, torch.nan, 2.0, torch.inf, -torch.inf]))
    clean.update(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))
    assert torch.equal(sampler.history, clean.history) and torch.equal(sampler.counts, clean.counts)


def test_sampling_and_updating_read_no_value_back_from_the_device():
    """Tensors on "meta" have no values: whatever would make the host wait for a GPU raises here."""
    sampler = LossSecondMomentSampler(20, 3)
    t, importance = sampler.sample(torch.empty(8, device="meta"))
    sampler.update(t, importance.float())
    assert t.shape == importance.shape == (8,) and sampler.history.is_meta


def test_losses_that_are_all_zero_leave_the_sampling_uniform():
    sampler = LossSecondMomentSampler(3, 1)
    sampler.update(torch.arange(3), torch.zeros(3))
    assert torch.equal(sampler.weights(), torch.ones(3).double())


def test_a_sampler_continues_from_its_saved_state():
    sampler, resumed = warmed_up(), LossSecondMomentSampler(20, 3)
    state = sampler.state_dict()
    resumed.load_state_dict(state)
    for each in (sampler, resumed):
        each.update(torch.tensor([3, 3, 5]), torch.tensor([9.0, 8.0, 7.0]))
    for ours, theirs in zip(sampler.sample(uniforms(100)), resumed.sample(uniforms(100))):
        assert torch.equal(ours, theirs)
    assert not torch.equal(state["history"], sampler.history)  # the saved state is a copy


def test_wrong_input_is_refused_with_what_to_do():
    with pytest.raises(ValueError, match="num_timesteps=0"):
        LossSecondMomentSampler(0)
    with pytest.raises(ValueError, match="uniform_prob=0"):
        LossSecondMomentSampler(10, uniform_prob=0)
    with pytest.raises(ValueError, match="num_timesteps and history_per_term of the saved run"):
        LossSecondMomentSampler(10).load_state_dict(warmed_up().state_dict())
