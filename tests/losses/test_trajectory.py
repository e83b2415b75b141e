"""A teacher's ways against an exact flow, and the student's calls against its sampling."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from hf_diffusion.losses.trajectory import euler, finer, follow
from hf_diffusion.losses.trajectory_objective import Trajectories, TrajectoryObjective, TrajectoryOptions
from hf_diffusion.models.mlp_points import PointDenoiser
from hf_diffusion.pipelines.pipeline_consistency import ConsistencyPipeline
from hf_diffusion.randomness import Draw
from hf_diffusion.schedulers.scheduling_consistency import ConsistencyScheduler


SIGMAS = (80.0, 3.0, 0.5)


def test_levels_are_cut_evenly_in_time_and_hold_those_of_the_student():
    levels = finer(SIGMAS, 4)
    assert len(levels) == 12 and tuple(levels[::4]) == SIGMAS
    assert all(a > b > 0 for a, b in zip(levels, levels[1:]))
    first = torch.tensor([math.atan(level) for level in levels[:5]]).diff()
    torch.testing.assert_close(first, first.mean().expand(4), rtol=1e-4, atol=1e-6)


def exact_denoiser(x: Tensor, sigma: float) -> Tensor:
    """x_0 of data that are normal with deviation 0.5."""
    return x * 0.25 / (0.25 + sigma**2)


def test_the_way_of_gaussian_data_is_the_exact_one_by_second_order():
    x = torch.linspace(-80, 80, 9, dtype=torch.float64)
    scale = lambda sigma: math.sqrt((0.25 + sigma**2) / (0.25 + 80.0**2))  # noqa: E731
    errors = []
    for parts in (8, 16, 32):
        states = follow(exact_denoiser, x, finer(SIGMAS, parts), parts)
        assert len(states) == 4 and torch.equal(states[0], x)
        errors.append(float((states[2] - x * scale(0.5)).abs().max()))
    # halved steps leave a quarter of the error, once they are small
    assert errors[1] < errors[0] / 3 and errors[2] < errors[1] / 3
    torch.testing.assert_close(states[-1], x * scale(0.0), rtol=2e-3, atol=1e-6)


@pytest.fixture(scope="module")
def student() -> PointDenoiser:
    torch.manual_seed(0)
    network = PointDenoiser(num_class_embeds=3, null_class=True, model_channels=8)
    nn.init.normal_(network.linear_out.weight, std=0.3)
    return network


@pytest.fixture(scope="module")
def scheduler() -> ConsistencyScheduler:
    return ConsistencyScheduler(sampling_sigmas=SIGMAS, renoise=False, clip_denoised=False)


def objective_of(
    student: nn.Module, scheduler: ConsistencyScheduler, states: Tensor, labels: Tensor, **options
) -> TrajectoryObjective:
    options = TrajectoryOptions(distill_steps=3, **options)
    return TrajectoryObjective(scheduler, student, lambda: Trajectories(states, labels), options, 1e-3, 10)


def test_the_students_calls_are_the_steps_of_its_sampling(student, scheduler):
    noise, labels = torch.randn(5, 2, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 3, 0])
    seen = []
    pipe = ConsistencyPipeline(student, scheduler, {0: "a", 1: "b", 2: "c"})

    def look(pipe, i, t, tensors):
        seen.append(tensors["latents"].clone())
        return {}

    # label 3 is the null class, which a pipeline is not asked for by number
    named = torch.tensor([0, 1, 2])
    pipe(named, latents=noise[:3], output_type="latent", callback_on_step_end=look, num_inference_steps=3)
    objective = objective_of(student, scheduler, torch.zeros(4, 1, 2), labels)
    start = 80.0 * noise[:3]
    for call in range(3):
        calls = torch.full((3,), call + 1)
        if call < 2:
            torch.testing.assert_close(objective.own_states(start.clone(), calls, named), seen[call])
        before = start if call == 0 else seen[call - 1]
        after = objective.stepped(student, before, torch.full((3,), call), named)
        torch.testing.assert_close(after, seen[call], rtol=1e-4, atol=1e-4)


def test_the_loss_is_the_distance_at_the_end_of_a_call_and_own_states_come_late(student, scheduler):
    generator = torch.Generator().manual_seed(2)
    states, labels = torch.randn(4, 6, 2, generator=generator), torch.arange(6) % 3
    objective = objective_of(student, scheduler, states, labels, own_inputs_from=0.5)
    batch, given = {"x_0": torch.zeros(64, 2)}, []
    stepped = objective.stepped

    def spy(network: nn.Module, x: Tensor, call: Tensor, known: Tensor) -> Tensor:
        given.append((x, call, known))
        return stepped(network, x, call, known)

    objective.stepped = spy

    def values(step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        list(objective.turns(step))
        given.clear()
        found = objective.values(student.train(), batch, Draw(0, 3, slice(0, 64), 64, torch.device("cpu")))
        return found["loss"], *given[-1]

    loss, x, call, known = values(4)
    assert set(call.tolist()) == {0, 1, 2} and len(given) == 1
    # every input is a state at its level, with the label of its trajectory
    rows = [(states[k] == value).all(1).nonzero().item() for k, value in zip(call, x)]
    assert torch.equal(labels[rows], known)
    ends = stepped(student, x, call, known)
    torch.testing.assert_close(loss, (ends - states[call + 1, rows]).abs().mean(1))
    late, own, same_call, _ = values(5)
    assert torch.equal(call, same_call) and torch.equal(own[call == 0], x[call == 0])
    # the second call of one noise begins where the student's first leads
    first = stepped(student, states[0, rows], torch.zeros_like(call), known)
    torch.testing.assert_close(own[call == 1], first[call == 1])
    assert late.requires_grad and not own.requires_grad


def test_a_student_that_aims_at_the_end_draws_in_fewer_calls_what_it_was_trained_for(student):
    scheduler = ConsistencyScheduler(
        sampling_sigmas=SIGMAS, renoise=False, predicts_end=True, clip_denoised=False, sigma_min=0.0
    )
    generator = torch.Generator().manual_seed(3)
    states, labels = torch.randn(4, 6, 2, generator=generator), torch.arange(6) % 3
    states[0] *= SIGMAS[0]
    objective = objective_of(student, scheduler, states, labels, own_inputs_from=0.5)
    list(objective.turns(9))
    draw = Draw(0, 3, slice(0, 64), 64, torch.device("cpu"))
    found = objective.values(student.train(), {"x_0": torch.zeros(64, 2)}, draw)
    errors = []
    for calls in (1, 2, 3):
        pipe = ConsistencyPipeline(student.eval(), scheduler, {0: "a", 1: "b", 2: "c"})
        given = {"latents": states[0] / SIGMAS[0], "num_inference_steps": calls}
        ends = pipe(labels, **given, output_type="latent").images
        errors.append((ends - states[-1]).abs().mean(1))
    expected = torch.stack(errors)
    # each of the losses is the error of a run of one, two or three calls
    distances = (found["loss"].detach()[:, None] - expected.flatten()).abs().min(1).values
    assert float(distances.max()) < 1e-4
    scheduler.set_timesteps(1)
    assert scheduler.sigmas.tolist() == [80.0, 0.0]
    with pytest.raises(ValueError, match="num_inference_steps=4 must be at most 3"):
        scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="give renoise False"):
        ConsistencyScheduler(sampling_sigmas=SIGMAS, predicts_end=True)


def test_a_step_along_the_flow_keeps_a_share_of_the_noise(scheduler):
    x_0, noise = torch.tensor([[0.2, -0.4]]), torch.tensor([[1.0, 2.0]])
    torch.testing.assert_close(euler(x_0, x_0 + 3.0 * noise, 0.5 / 3.0), x_0 + 0.5 * noise)
    with pytest.raises(ValueError, match="num_inference_steps=2 must be 3"):
        scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match="name sampling_sigmas"):
        ConsistencyScheduler(renoise=False)


def test_fewer_calls_of_the_teacher_than_of_the_student_are_refused():
    options = TrajectoryOptions(distill_steps=4, teacher_steps=3)
    with pytest.raises(ValueError, match="teacher_steps 3 must be at least distill_steps, 4"):
        TrajectoryOptions.check(SimpleNamespace(**vars(options), init_from="a", class_conditional=False))
