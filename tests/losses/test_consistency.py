"""Losses, curricula and levels of consistency models, and the objective that uses them."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from hf_diffusion import ConsistencyScheduler
from hf_diffusion.config.run_options import TrainingConfig
from hf_diffusion.loop.update import build_optimizer
from hf_diffusion.losses import consistency as losses
from hf_diffusion.losses.consistency_objective import ConsistencyObjective, ConsistencyOptions
from hf_diffusion.models.mlp_points import PointDenoiser
from tests.losses.scripted import ScriptedDraw


MEAN, VARIANCE, LOWEST = 0.2, 0.3, 0.002


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def column(sigma: torch.Tensor) -> torch.Tensor:
    return sigma[:, None]


def exact_denoiser(x, sigma):
    return MEAN + VARIANCE / (VARIANCE + column(sigma) ** 2) * (x - MEAN)


def exact_function(x, sigma):
    return MEAN + (x - MEAN) * ((VARIANCE + LOWEST**2) / (VARIANCE + column(sigma) ** 2)).sqrt()


# --- losses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2), ("midpoint", 2)])
def test_distillation_of_the_exact_student_leaves_the_local_error_of_the_solver(solver, order):
    x_0, z, t = noise(64, 2), noise(64, 2, seed=1), torch.full((64,), 1.5, dtype=torch.float64)

    def root_loss(h: float) -> float:
        distance = losses.l2
        loss = losses.consistency_loss(
            exact_function, exact_function, x_0, z, t, t - h, distance, exact_denoiser, solver
        )
        return float(loss.mean().sqrt())

    assert root_loss(0.04) / root_loss(0.02) == pytest.approx(2 ** (order + 1), rel=0.1)


def test_consistency_training_leaves_an_error_that_vanishes_with_the_distance():
    x_0, z, t = noise(64, 2), noise(64, 2, seed=1), torch.full((64,), 1.5, dtype=torch.float64)
    found = [
        losses.consistency_loss(exact_function, exact_function, x_0, z, t, t - h, losses.l2).mean() for h in (0.2, 0.1)
    ]
    assert float(found[0] / found[1]) == pytest.approx(4, rel=0.2) and found[1] > 1e-4


def test_both_networks_drop_the_same_units_and_only_the_student_learns():
    network, target = (nn.Sequential(nn.Linear(8, 64), nn.Dropout(0.5), nn.Linear(64, 8)) for _ in range(2))
    target.load_state_dict(network.state_dict())
    x = torch.ones(16, 8)
    student, aim = losses.estimates(lambda x, _: network(x), lambda x, _: target(x), x, x[:, 0], x, x[:, 0])
    assert torch.equal(student, aim) and not torch.equal(student[0], student[1])
    assert student.requires_grad and not aim.requires_grad
    again, _ = losses.estimates(lambda x, _: network(x), lambda x, _: target(x), x, x[:, 0], x, x[:, 0])
    assert not torch.equal(again, student)


def test_where_the_lower_level_is_clean_the_target_is_the_image():
    x_0, z = noise(3, 2), noise(3, 2, seed=1)
    t, r = torch.tensor([2.0, 3.0, 4.0]).double(), torch.tensor([0.0, 1.0, 0.0]).double()
    aims = []
    losses.tuning_loss(
        exact_function, lambda x, s: x * 0 + 7, x_0, z, t, r, lambda a, b: aims.append(b) or losses.l2(a, b)
    )
    assert torch.equal(aims[0][[0, 2]], x_0[[0, 2]]) and aims[0][1].tolist() == [7, 7]


def test_the_gradient_of_the_root_distance_is_finite_where_two_estimates_agree():
    a = torch.ones(2, 3, requires_grad=True)
    losses.pseudo_huber(a, torch.tensor([[1.0, 1, 1], [1, 1, 3]]), 0.0).sum().backward()
    assert a.grad.tolist() == [[0, 0, 0], [0, 0, -1]]


# --- curricula and levels -------------------------------------------------------------------------


def test_curricula_begin_and_end_where_the_papers_say():
    assert losses.growing_levels(0, 1000, 2, 150) == 1 and losses.growing_levels(1000, 1000, 2, 150) == 150
    counts = [losses.doubling_levels(k, 800, 10, 1280) for k in range(0, 800, 100)]
    assert counts == [10, 20, 40, 80, 160, 320, 640, 1280]
    assert losses.growing_target_ema(2, 2, 0.9) == pytest.approx(0.9)
    assert losses.growing_target_ema(150, 2, 0.9) == pytest.approx(0.9 ** (2 / 150))


def test_a_batch_visits_every_pair_alike_or_by_the_lognormal_share():
    grid, u = ConsistencyScheduler().grid(11), (torch.arange(100000).double() + 0.5) / 100000
    t, r = losses.neighbours(u, grid)
    levels, counts = t.unique(return_counts=True)
    assert counts.tolist() == [10000] * 10 and torch.equal(levels, grid.flip(0)[1:])
    assert t[0] < t[-1] and bool((r < t).all()) and r[0] == grid[-1]
    t, _ = losses.lognormal_neighbours(u, grid, -1.1, 2.0)
    bell = torch.distributions.Normal(-1.1, 2.0)
    inside = bell.cdf(grid[[0]].log()) - bell.cdf(grid[[-1]].log())
    for high, low in zip(grid[:-1], grid[1:]):
        expected = (bell.cdf(high.log()) - bell.cdf(low.log())) / inside
        assert float((t == high).double().mean()) == pytest.approx(float(expected), abs=2e-5)
    log = losses.lognormal_levels(u, -1.1, 2.0).log()
    assert float(log.mean()) == pytest.approx(-1.1, abs=1e-3) and float(log.std()) == pytest.approx(2.0, rel=1e-3)


# --- the objective --------------------------------------------------------------------------------


def objective(classes=None, total=100, teacher=None, scheduler=None, distance=None, **settings):
    torch.manual_seed(0)
    network = PointDenoiser(model_channels=8, num_class_embeds=classes, null_class=classes is not None)
    nn.init.normal_(network.linear_out.weight)
    options = ConsistencyOptions(**settings)
    scheduler = scheduler or ConsistencyScheduler(clip_denoised=False)
    return ConsistencyObjective(scheduler, network, options, 1e-3, total, Accelerator(cpu=True), teacher, distance)


def draws(levels: torch.Tensor, z: torch.Tensor, uniforms=()) -> ScriptedDraw:
    return ScriptedDraw([levels], [z], list(uniforms))


@pytest.mark.parametrize("name, weighs", [("training", False), ("improved", True)])
def test_the_loss_is_that_of_a_pair_from_the_grid_of_this_step(name, weighs):
    o = objective(objective=name, start_scales=4, end_scales=8)
    next(o.turns(60))
    intervals = losses.growing_levels(60, 100, 4, 8) if name == "training" else 8
    assert o.curriculum.intervals() == intervals
    u, x_0, z = torch.tensor([0.05, 0.5, 0.95]).double(), noise(3, 2).float(), noise(3, 2, seed=1).float()
    grid = o.scheduler.grid(intervals + 1)
    pick = losses.lognormal_neighbours if weighs else losses.neighbours
    t, r = pick(u, grid, -1.1, 2.0) if weighs else pick(u, grid)
    f = lambda x, s: o.scheduler.denoise(o.player.network, x.float(), s)  # noqa: E731
    a, b = f(x_0 + column(t).float() * z, t), f(x_0 + column(r).float() * z, r)
    total = (a - b).square().sum(1)
    c = 0.00054 * 2**0.5
    expected = ((total + c**2).sqrt() - c) / (t - r) if weighs else total / 2
    values = o.values(o.player.network, {"x_0": x_0}, draws(u, z))
    torch.testing.assert_close(values["loss"], expected.float(), rtol=1e-3, atol=1e-6)
    assert torch.equal(values["level"], u)


def test_the_target_moves_by_the_decay_of_the_step_and_is_part_of_the_checkpoint():
    o = objective(objective="training", target_ema=0.9)
    network, before = o.player.network, [p.clone() for p in o.target.parameters()]
    with torch.no_grad():
        [p.add_(1) for p in network.parameters()]
    for player in o.turns(50):
        o.after_update(player, 50)
    mu = losses.growing_target_ema(o.curriculum.intervals(), 2, 0.9)
    assert 0.9 < mu < 1
    for moved, start in zip(o.target.parameters(), before):
        torch.testing.assert_close(moved, start + (1 - mu), rtol=1e-4, atol=1e-6)
    assert o.state == (o.curriculum, o.target) and o.curriculum.state_dict() == {"step": 50}
    assert objective(objective="improved").target is None


def test_tuning_brings_the_levels_nearer_stage_by_stage():
    o = objective(objective="tuning", tuning_stages=4)
    u, stages, gaps = torch.tensor([0.9]).double(), [], []
    for step in (0, 24, 25, 60, 99, 100):
        next(o.turns(step))
        t, r = o.curriculum.levels(u)
        stages.append(o.curriculum.stage())
        gaps.append(float((t - r) / t))
    assert stages == [0, 0, 1, 2, 3, 3] and gaps[0] > gaps[2] > gaps[3] > gaps[4]
    # n(t) / q^(stage + 1)
    widening = 1 + 8 * float(torch.sigmoid(-t))
    assert gaps[-1] == pytest.approx(widening / 16)


def test_a_guided_teacher_leads_the_trajectory_where_guidance_does():
    teacher = PointDenoiser(model_channels=8, num_class_embeds=3, null_class=True)
    nn.init.normal_(teacher.linear_out.weight)
    nn.init.normal_(teacher.class_embedding.weight)
    o = objective(3, objective="distillation", teacher=teacher, teacher_guidance_scale=3.0)
    x, sigma, labels = noise(2, 2).float(), torch.tensor([0.5, 5.0]).double(), torch.tensor([0, 2])
    guided = o.guided_teacher(labels)(x, sigma)
    of = lambda labels: o.scheduler.denoise(o.teacher, x, sigma, 0.0, class_labels=labels)  # noqa: E731
    cond, free = of(labels), of(torch.tensor([3, 3]))
    torch.testing.assert_close(guided, free + 3 * (cond - free))
    assert not torch.allclose(guided, cond) and not any(p.requires_grad for p in o.teacher.parameters())
    assert (
        o.identity()["teacher"]
        != objective(3, objective="distillation", teacher=o.player.network).identity()["teacher"]
    )


def test_a_checkpoint_of_a_version_without_levels_of_sampling_belongs_to_its_process_still():
    o = objective(3, objective="improved")
    o.scheduler = ConsistencyScheduler()
    # found by the version that had no such settings
    assert o.identity()["process"].startswith("8c313ad49c745d9f")
    o.scheduler = ConsistencyScheduler(sigma_max=70.0)
    assert not o.identity()["process"].startswith("8c313ad49c745d9f")


def test_labels_are_dropped_in_training_only():
    o, seen = objective(3, objective="improved", label_dropout=0.5), []
    o.scheduler = SimpleNamespace(
        config=o.scheduler.config,
        denoise=lambda network, x, sigma, shift, class_labels: seen.append(class_labels.tolist()) or x,
    )
    batch = {"x_0": noise(2, 2).float(), "labels": torch.tensor([1, 2])}
    u, z = torch.tensor([0.2, 0.7]).double(), noise(2, 2).float()
    o.values(o.player.network.train(), batch, draws(u, z, [torch.tensor([0.4, 0.6])]))
    o.values(o.player.network.eval(), batch, draws(u, z))
    # the target's call, and the network's
    assert seen == [[3, 2], [3, 2], [1, 2], [1, 2]]


@pytest.mark.parametrize("name, cls", [("radam", torch.optim.RAdam), ("adamw", torch.optim.AdamW)])
def test_the_loop_builds_the_optimizer_that_the_options_name(name, cls):
    player, config = objective(objective="improved").player, TrainingConfig(adam_weight_decay=0.1, optimizer=name)
    built = build_optimizer(config, player)
    group = built.param_groups[0]
    assert type(built) is cls and (group["lr"], group["weight_decay"]) == (1e-3, 0.1)
    # decoupled: a parameter without a gradient's pull shrinks by lr * decay
    weight = player.network.linear_out.weight
    before = weight.detach().clone()
    weight.grad = torch.zeros_like(weight)
    built.step()
    torch.testing.assert_close(weight.detach(), before * (1 - 1e-4))


def test_a_distance_of_features_takes_the_place_of_the_options():
    o = objective(objective="improved", distance=lambda a, b: (a - b).abs().sum(1) * 0 + 5)
    next(o.turns(0))
    u, batch = torch.tensor([0.5]).double(), {"x_0": noise(1, 2).float()}
    t, r = o.curriculum.levels(u)
    values = o.values(o.player.network, batch, draws(u, noise(1, 2).float()))
    assert float(values["loss"].detach()) == pytest.approx(float(5 / (t - r)))
