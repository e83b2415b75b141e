"""Draw and BatchOrder: what a step draws and reads depends on the seed and the step, not on how the work is divided."""

import pytest
import torch

from hf_diffusion.randomness import BatchOrder, Draw, derive_seed
from hf_diffusion.timestep_sampling import stratified_timesteps, uniform_timesteps


CPU = torch.device("cpu")


def drawn(rows: slice, step: int = 3, seed: int = 0):
    draw = Draw(seed, step, rows, 12, CPU)
    return draw.timesteps(stratified_timesteps, 1000), draw.normal(2, 3), draw.uniform()


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_divided_draws_are_rows_of_the_whole_draw(parts):
    whole, size = drawn(slice(0, 12)), 12 // parts
    pieces = [drawn(slice(i * size, (i + 1) * size)) for i in range(parts)]
    for k in range(3):
        assert torch.equal(torch.cat([piece[k] for piece in pieces]), whole[k])


def test_steps_and_seeds_draw_different_numbers():
    values = [drawn(slice(0, 12), step, seed)[1] for step, seed in [(3, 0), (4, 0), (3, 1)]]
    assert not torch.equal(values[0], values[1]) and not torch.equal(values[0], values[2])


def test_successive_calls_are_independent():
    draw = Draw(0, 0, slice(0, 4000), 4000, CPU)
    a, b = draw.normal(), draw.normal()
    assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.05


def test_derived_seeds_fit_a_generator_and_do_not_collide():
    seeds = {derive_seed(seed, "step", step) for seed in range(20) for step in range(500)}
    assert len(seeds) == 10_000 and all(0 <= seed < 2**63 for seed in seeds)


def test_every_epoch_of_the_order_is_a_permutation():
    order = BatchOrder(images=10, seed=0, batch_size=4, accumulation=1, rank=0, processes=1)
    stream = [pair for pairs in order.positions(0, 5) for pair in pairs]
    for epoch in (0, 1):
        assert sorted(index for e, index in stream if e == epoch) == list(range(10))
    assert [i for e, i in stream if e == 0] != [i for e, i in stream if e == 1]


def test_the_order_of_a_step_is_the_same_for_any_division_of_the_work():
    def step_images(step, batch_size, accumulation, processes):
        found = []
        for rank in range(processes):
            order = BatchOrder(50, 7, batch_size, accumulation, rank, processes)
            for micro, pairs in enumerate(order.positions(step, step + 1)):
                found += list(zip(range(50)[order.rows(micro)], pairs))
        return sorted(found)

    whole = step_images(9, 12, 1, 1)
    assert whole == step_images(9, 6, 1, 2) == step_images(9, 3, 2, 2) == step_images(9, 2, 6, 1)


def test_the_order_goes_on_in_the_middle_of_an_epoch_as_if_never_interrupted():
    order = BatchOrder(10, 0, 3, 2, 0, 1)
    assert list(order.positions(0, 8))[2 * 5 :] == list(order.positions(5, 8))


def test_a_batch_larger_than_the_data_spans_epochs():
    order = BatchOrder(images=3, seed=0, batch_size=7, accumulation=1, rank=0, processes=1)
    assert [epoch for epoch, _ in next(order.positions(0, 1))] == [0, 0, 0, 1, 1, 1, 2]


def test_uniform_timesteps_of_a_draw_cover_the_range():
    t = Draw(0, 0, slice(0, 5000), 5000, CPU).timesteps(uniform_timesteps, 10)
    assert torch.bincount(t, minlength=10).min() > 400
