import pytest
import torch
from diffusers.optimization import get_scheduler

from hf_diffusion.loop.learning_rate import lr_factor


@pytest.mark.parametrize("warmup_steps", [0, 1, 7])
@pytest.mark.parametrize(
    ("schedule", "theirs"), [("constant", "constant_with_warmup"), ("linear", "linear"), ("cosine", "cosine")]
)
def test_factors_are_those_of_diffusers(schedule, theirs, warmup_steps):
    total_steps = 40
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = get_scheduler(theirs, optimizer, num_warmup_steps=warmup_steps, num_training_steps=total_steps)
    for step in range(total_steps):
        assert lr_factor(step, total_steps, schedule, warmup_steps) == pytest.approx(
            optimizer.param_groups[0]["lr"], abs=1e-12
        )
        optimizer.step()
        reference.step()


def test_trapezoid_rises_stays_and_falls_linearly_to_zero_at_the_end():
    factors = [lr_factor(step, 100, "trapezoid", warmup_steps=10, decay_steps=20) for step in range(101)]
    assert factors[:11] == pytest.approx([step / 10 for step in range(11)])
    assert set(factors[10:81]) == {1.0}
    assert factors[80:] == pytest.approx([(100 - step) / 20 for step in range(80, 101)])


def test_a_decay_that_is_planned_anew_bends_where_it_is_and_ends_at_zero():
    ends = (80, 100, 90, 94, 92, 95)
    factors = [lr_factor(step, 95, "trapezoid", 10, 15, ends) for step in range(97)]
    assert set(factors[10:81]) == {1.0} and factors[90] == 0.5 and factors[91:93] == [0.375, 0.25]
    assert factors[93:] == pytest.approx([0.25 * 2 / 3, 0.25 / 3, 0.0, 0.0])
    # bit for bit what was done before it was bent
    for known, total in ((2, 100), (4, 94)):
        before = [lr_factor(step, total, "trapezoid", 10, total - 80, ends[:known]) for step in range(97)]
        assert before[: ends[known] + 1] == factors[: ends[known] + 1]
    assert before[:91] == [lr_factor(step, 100, "trapezoid", 10, 20) for step in range(91)]
    # of another length it is no longer that decay
    assert lr_factor(85, 100, "trapezoid", 10, 20, ends) == 0.75


def test_defaults_are_five_percent_of_warmup_and_thirty_percent_of_decay():
    assert [lr_factor(step, 1000) for step in (25, 50, 700, 850, 1000)] == pytest.approx([0.5, 1.0, 1.0, 0.5, 0.0])
    assert lr_factor(499, 10**6) < 1.0 == lr_factor(500, 10**6)  # the warm-up of a long run is not 5 % long


def test_a_decay_as_long_as_the_run_overlaps_the_warmup_without_a_jump():
    factors = [lr_factor(step, 20, "trapezoid", warmup_steps=10, decay_steps=20) for step in range(21)]
    assert max(abs(after - before) for before, after in zip(factors, factors[1:])) <= 0.1 + 1e-12
    assert factors[0] == factors[-1] == 0.0


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "trapezoid"])
@pytest.mark.parametrize("total_steps", [1, 2, 10])
def test_the_factor_is_in_the_unit_interval_also_past_the_end_and_in_runs_of_one_step(schedule, total_steps):
    factors = [lr_factor(step, total_steps, schedule) for step in range(total_steps + 3)]
    assert all(0.0 <= factor <= 1.0 for factor in factors)
    assert factors[0] == 1.0  # a run too short for a warm-up does not waste its first step
    assert factors[-1] == (1.0 if schedule == "constant" else pytest.approx(0.0))


def test_an_unknown_schedule_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="'cosin'; choose from constant, linear, cosine, trapezoid"):
        lr_factor(0, 10, "cosin")
