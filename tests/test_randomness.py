"""Draw, FixedDraw and BatchOrder: seed, step and row say what is drawn, however work is divided."""

import pytest
import torch

from hf_diffusion import randomness
from hf_diffusion.losses.noise_levels import antithetic, stratified
from hf_diffusion.randomness import BLOCK, BatchOrder, Draw, FixedDraw, derive_seed


CPU = torch.device("cpu")


def drawn(rows: slice, step: int = 3, seed: int = 0, total: int = 48, **options):
    draw = Draw(seed, step, rows, total, CPU, **options)
    return draw.level(stratified), draw.normal(2, 3), draw.uniform(2), draw.level(antithetic)


@pytest.mark.parametrize("block", [BLOCK, None])
@pytest.mark.parametrize("parts", [2, 3, 4, 16])
def test_divided_draws_are_rows_of_the_whole_draw(parts, block):
    whole, size = drawn(slice(0, 48), block=block), 48 // parts
    pieces = [drawn(slice(i * size, (i + 1) * size), block=block) for i in range(parts)]
    for k in range(4):
        assert torch.equal(torch.cat([piece[k] for piece in pieces]), whole[k])


def test_a_process_of_eight_draws_its_own_rows_and_at_most_the_rest_of_two_blocks(monkeypatch):
    """Batch 20, 8 processes, accumulation 4: a micro-batch needs 20 of 640 rows."""
    counted, order = [], BatchOrder(None, 0, batch_size=20, accumulation=4, rank=5, processes=8)
    for name in ("rand", "randn"):
        original = getattr(torch, name)
        monkeypatch.setattr(
            randomness.torch,
            name,
            lambda rows, *shape, original=original, **how: counted.append(rows) or original(rows, *shape, **how),
        )
    for micro in range(4):
        draw = Draw(0, 0, order.rows(micro), order.total, CPU)
        counted.clear()
        assert len(draw.normal(3, 8, 8)) == 20
        assert 20 <= sum(counted) <= 20 + 2 * (BLOCK - 1)


def test_a_run_from_before_blocks_goes_on_with_one_generator_for_all_rows():
    generator = torch.Generator().manual_seed(derive_seed(4, "step", 9))
    u, noise = torch.rand(12, generator=generator), torch.randn(12, 2, generator=generator)
    draw = Draw(4, 9, slice(3, 6), 12, CPU, block=None)
    assert torch.equal(draw.level(stratified), ((torch.arange(12) + u.double()) / 12)[3:6])
    assert torch.equal(draw.normal(2), noise[3:6])


def test_steps_and_seeds_draw_different_numbers():
    values = [drawn(slice(0, 12), step, seed)[1] for step, seed in [(3, 0), (4, 0), (3, 1)]]
    assert not torch.equal(values[0], values[1]) and not torch.equal(values[0], values[2])


def test_successive_calls_and_blocks_are_independent():
    draw = Draw(0, 0, slice(0, 4000), 4000, CPU)
    a, b = draw.normal(), draw.normal()
    assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.05
    assert abs(torch.corrcoef(torch.stack([a[:-BLOCK], a[BLOCK:]]))[0, 1]) < 0.05
    assert abs(a.mean()) < 0.05 and abs(a.std() - 1) < 0.05


def test_levels_cover_the_unit_interval_and_fill_each_stratum_once():
    u = Draw(0, 0, slice(0, 5000), 5000, CPU).level()
    assert torch.bincount((u * 10).long(), minlength=10).min() > 400
    spread = Draw(0, 0, slice(0, 64), 64, CPU).level(stratified)
    assert torch.equal((spread * 64).long(), torch.arange(64))


def test_fixed_numbers_belong_to_the_row_and_their_levels_to_the_part():
    def of(rows, part):
        draw = FixedDraw(7, rows, part, 4, CPU)
        return draw.level(stratified), draw.normal(3), draw.uniform()

    whole = of(range(10), 2)
    assert all(2 / 4 <= u < 3 / 4 for u in whole[0])
    for k, value in enumerate(of([8, 3], 2)):
        assert torch.equal(value, whole[k][[8, 3]])
    assert not torch.equal(of(range(10), 1)[1], whole[1])


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
