"""Distribution matching: its gradient and levels, the features of the head, who computes what."""

import copy
import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from hf_diffusion import ADMUNet2DModel, ConsistencyScheduler, LinearDDPMScheduler, PixelTransformer2DModel
from hf_diffusion.losses import distribution_matching as losses
from hf_diffusion.losses.distribution_matching import FakeDenoiser
from hf_diffusion.losses.distribution_matching_objective import DistributionMatchingGame, DistributionMatchingOptions
from hf_diffusion.models.mlp_points import PointDenoiser
from hf_diffusion.randomness import Draw


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_weights(network: nn.Module) -> nn.Module:
    """The last layers of new networks are zero."""
    torch.manual_seed(1)
    for weight in network.parameters():
        if not weight.any():
            nn.init.normal_(weight, std=0.2)
    return network.eval()


NETWORKS = {
    "unet": lambda: ADMUNet2DModel(
        8, 1, model_channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(2,),
        num_head_channels=4, norm_num_groups=4, num_class_embeds=3, null_class=True,
    ),
    "transformer": lambda: PixelTransformer2DModel(
        (8, 4), 1, patch_size=2, hidden_size=8, num_layers=3, num_head_channels=4
    ),
    "points": lambda: PointDenoiser(model_channels=8, num_res_blocks=3),
}  # fmt: skip
INPUTS = {"unet": (1, 8, 8), "transformer": (1, 8, 4), "points": (2,)}


# --- the loss and its levels ----------------------------------------------------------------------


def test_the_gradient_is_the_difference_of_the_estimates_by_the_teachers_distance():
    x, real, fake = noise(3, 2, 4).requires_grad_(), noise(3, 2, 4, seed=1), noise(3, 2, 4, seed=2)
    losses.matching_loss(x, real, fake).sum().backward()
    for i in range(3):
        expected = (fake[i] - real[i]) / (x[i] - real[i]).abs().mean() / 8
        torch.testing.assert_close(x.grad[i], expected.detach())


def test_where_both_estimates_agree_there_is_nothing_to_learn():
    x, real = noise(3, 2).requires_grad_(), noise(3, 2, seed=1)
    loss = losses.matching_loss(x, real, real.clone())
    loss.sum().backward()
    assert loss.tolist() == [0, 0, 0] and not x.grad.any()
    # also for a sample that the teacher leaves as it is
    assert losses.matching_loss(x, x.detach(), x.detach() + 1e-7).isfinite().all()


def test_exact_denoisers_of_two_gaussians_pull_from_one_mean_to_the_other():
    def denoiser(mean: float):
        return lambda x_t, sigma: mean + 0.04 / (0.04 + sigma**2) * (x_t - mean)

    x, sigma = (1.0 + 0.2 * noise(4000, 1)).requires_grad_(), 0.7
    x_t = x.detach() + sigma * noise(4000, 1, seed=1)
    losses.matching_loss(x, denoiser(-0.5)(x_t, sigma), denoiser(1.0)(x_t, sigma)).sum().backward()
    # descent goes down, to -0.5, for every sample, whatever the noise
    assert bool((x.grad > 0).all())
    # and once the fake denoiser knows that the means agree, nowhere
    assert not losses.matching_loss(x, denoiser(1.0)(x_t, sigma), denoiser(1.0)(x_t, sigma)).any()


def test_levels_are_even_in_the_time_of_the_cosine_schedule_or_in_the_logarithm():
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    for spacing, even in (("time", torch.atan), ("log", torch.log)):
        found = losses.levels(u, 0.03, 30.0, spacing)
        gaps = even(found).diff()
        assert float(found[0]) == pytest.approx(0.03) and float(found[-1]) == pytest.approx(30)
        torch.testing.assert_close(gaps, gaps[:1].expand(100))


def test_four_calls_are_at_the_timesteps_of_the_paper():
    process = LinearDDPMScheduler(beta_schedule="squaredcos_cap_v2")
    alpha_bar = process.alphas_cumprod.double()
    sigmas = (1 / alpha_bar - 1).sqrt()
    nearest = [int((sigmas.log() - math.log(sigma)).abs().argmin()) for sigma in losses.even_levels(4, 1e9)]
    assert nearest[0] == 999 and nearest[1:] == pytest.approx([749, 499, 249], abs=8)
    assert losses.even_levels(1, 80.0) == (80.0,) and losses.even_levels(2, 80.0) == pytest.approx((80, 1))


# --- the head -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_head_sees_the_middle_of_the_network_and_nothing_more_is_computed_for_it(kind):
    denoiser = with_weights(NETWORKS[kind]())
    fake, seen, called = FakeDenoiser(denoiser).eval(), [], []
    middle = denoiser.mid_block if kind == "unet" else denoiser.blocks[1]
    last = {"unet": "conv_out", "transformer": "patch_out", "points": "linear_out"}[kind]
    assert fake.layer is middle
    middle.register_forward_hook(lambda layer, given, output: seen.append(output))
    getattr(denoiser, last).register_forward_hook(lambda *_: called.append(last))
    x, t = noise(3, *INPUTS[kind]), torch.tensor([1.0, 2.0, 3.0])
    labels = torch.tensor([0, 1, 3]) if kind == "unet" else None
    whole, part = fake(x, t, labels), fake(x, t, labels, rest="left out")
    assert called == [last] and "output" not in part
    torch.testing.assert_close(part["fake"], whole["fake"])
    assert whole["fake"].shape == (3,) and whole["fake"].std() > 1e-3
    maps = seen[0].transpose(1, 2).reshape(3, 8, 4, 2) if kind == "transformer" else seen[0]
    torch.testing.assert_close(whole["fake"], fake.head(maps.reshape(*maps.shape[:2], *maps.shape[2:] or (1, 1))))
    known = {} if labels is None else {"class_labels": labels}
    torch.testing.assert_close(whole["output"], denoiser(x, t, **known).sample)


def test_real_samples_have_the_timesteps_and_labels_of_the_generated_ones():
    fake = FakeDenoiser(with_weights(NETWORKS["unet"]())).eval()
    x, t, labels = noise(2, 1, 8, 8), torch.tensor([5.0, 700.0]), torch.tensor([1, 2])
    found = fake(x, t, labels, real=torch.cat([x, x]))
    torch.testing.assert_close(found["real"], found["fake"].repeat(2))
    assert FakeDenoiser(fake.denoiser, classifies=False)(x, t, labels).keys() == {"output"}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_of_the_logits_is_the_same_without_that_of_the_output(checkpointing):
    fake = FakeDenoiser(with_weights(NETWORKS["unet"]()))
    if checkpointing:
        fake.enable_gradient_checkpointing()
    found = {}
    for rest in ("with gradient", "without gradient", "left out"):
        x = noise(2, 1, 8, 8).requires_grad_()
        values = fake(x, torch.tensor([5.0, 700.0]), torch.tensor([1, 2]), rest=rest)
        assert torch.is_grad_enabled()
        assert ("output" in values and values["output"].requires_grad) == (rest == "with gradient")
        values["fake"].sum().backward()
        found[rest] = x.grad
    assert found["left out"].any()
    torch.testing.assert_close(found["without gradient"], found["with gradient"])
    torch.testing.assert_close(found["left out"], found["with gradient"])


def test_with_the_output_left_out_every_weight_has_a_gradient_that_several_processes_can_join():
    fake = FakeDenoiser(with_weights(NETWORKS["unet"]()))
    x = noise(2, 1, 8, 8)
    seen = fake(x, torch.tensor([5.0, 700.0]), torch.tensor([1, 2]), real=x, rest="left out")
    losses.real_and_fake_loss(seen["real"], seen["fake"]).mean().backward()
    assert all(weight.grad is not None for weight in fake.parameters())
    assert not fake.denoiser.conv_out.weight.grad.any() and fake.denoiser.conv_in.weight.grad.any()


# --- the game -------------------------------------------------------------------------------------


def game(kind="unet", steps=1, **settings) -> DistributionMatchingGame:
    teacher = with_weights(NETWORKS[kind]())
    defaults = {field.name: field.default for field in dataclasses.fields(DistributionMatchingOptions)}
    options = SimpleNamespace(**{**defaults, "label_dropout": 0.0, **settings})
    scheduler = ConsistencyScheduler(
        prediction_type="v_prediction",
        sigma_data=1.0,
        sampling_sigmas=losses.even_levels(steps, 80.0),
        clip_denoised=kind == "unet",
    )
    fake = FakeDenoiser(copy.deepcopy(teacher), options.adversarial_weight > 0)
    student = copy.deepcopy(teacher)
    made = DistributionMatchingGame(scheduler, student, fake, teacher, options, 1e-3, Accelerator(cpu=True))
    for player in made.players:
        player.network.train()
    return made


def batch(size: int = 8) -> dict[str, torch.Tensor]:
    return {"x_0": noise(size, 1, 8, 8).clamp(-1, 1), "labels": torch.arange(size) % 3}


def drawing(size: int = 8) -> Draw:
    return Draw(0, 0, slice(0, size), size, torch.device("cpu"))


def test_at_the_start_the_fake_denoiser_is_the_teacher_and_matching_asks_for_nothing():
    made = game(adversarial_weight=0)
    values = made.values(made.student, batch(), drawing())
    values["loss"].sum().backward()
    assert values["loss"].abs().max() < 1e-6
    assert max(float(p.grad.abs().max()) for p in made.student.parameters()) < 1e-4


def test_each_player_moves_its_own_network_only():
    made, given = game(), batch()
    with torch.no_grad():
        for weight in made.fake.denoiser.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    made.fake.requires_grad_(False)
    made.values(made.student, given, drawing())["loss"].mean().backward()
    made.fake.requires_grad_(True)
    moved = [p.grad.abs().max() > 0 for p in made.student.parameters()]
    assert sum(moved) > 0.9 * len(moved)
    assert all(p.grad is None for p in [*made.fake.parameters(), *made.teacher.parameters()])
    made.student.zero_grad(set_to_none=True)
    made.fake_values(made.fake, given, drawing())["loss"].mean().backward()
    assert all(p.grad is not None for p in made.fake.parameters())
    assert all(p.grad is None for p in [*made.student.parameters(), *made.teacher.parameters()])


def forwards(made: DistributionMatchingGame) -> dict[str, int]:
    """Calls of each network in one step: whole ones, and the halves of the fake one."""
    counts = dict.fromkeys(("student", "teacher", "encoder", "decoder"), 0)
    watched = {"student": made.student, "teacher": made.teacher}
    watched |= {"encoder": made.fake.denoiser.mid_block, "decoder": made.fake.denoiser.conv_out}

    def count(name):
        return lambda *_: counts.update({name: counts[name] + 1})

    for name, module in watched.items():
        module.register_forward_hook(count(name))
    given, draw = batch(), drawing()
    for player in made.turns(0):
        player.loss(player.network, given, draw)
    return counts


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, (1, 1, 1 + 2 * 2, 1 + 2)),
        ({"fake_updates": 1, "teacher_guidance_scale": 2.0}, (1, 2, 1 + 2, 1 + 1)),
        ({"reuse_samples": False}, (1 + 2, 1, 1 + 2 * 2, 1 + 2)),
        ({"distribution_matching_weight": 0}, (1, 0, 1 + 2 * 2, 0)),
        ({"adversarial_weight": 0}, (1, 1, 1 + 2, 1 + 2)),
        ({"fake_warmup_steps": 1}, (1, 0, 2 * 2, 2)),
    ],
)
def test_a_step_computes_nothing_twice_and_nothing_for_nothing(settings, expected):
    assert tuple(forwards(game(**settings)).values()) == expected


def test_a_guided_teacher_is_led_away_from_no_class():
    made = game(teacher_guidance_scale=3.0)
    x, sigma, labels = noise(2, 1, 8, 8), torch.tensor([0.5, 5.0]).double(), torch.tensor([0, 2])
    of = lambda labels: made.scheduler.denoise(made.teacher, x, sigma, 0.0, class_labels=labels)  # noqa: E731
    cond, free = of(labels), of(torch.tensor([3, 3]))
    torch.testing.assert_close(made.guided_teacher(x, sigma, labels), free + 3 * (cond - free))
    assert not torch.allclose(cond, free)


def test_later_calls_are_trained_on_what_sampling_shows_them():
    made = game(steps=3)
    x, noises, labels = 80 * noise(4, 1, 8, 8), [noise(4, 1, 8, 8, seed=i) for i in (1, 2)], torch.tensor([0, 1, 2, 0])
    found, call = x.clone(), torch.tensor([0, 1, 2, 2])
    made.simulate(made.student, found, noises, call, labels)
    scheduler = ConsistencyScheduler.from_config(made.scheduler.config)
    scheduler.set_timesteps(3)
    shown = [x]
    for t, z in zip(scheduler.timesteps, noises):
        output = made.student(scheduler.scale_model_input(shown[-1], t), t, labels).sample
        shown.append(scheduler.step(output, t, shown[-1], noise=z).prev_sample.detach())
    expected = torch.stack([shown[k][i] for i, k in enumerate(call.tolist())])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert shown[2].std() < 1.3 < shown[1].std()


def test_noised_data_stand_for_the_samples_of_earlier_calls_but_not_for_the_first_noise():
    made, seen = game(steps=2, student_inputs="noised"), []
    made.scheduler.denoise = lambda network, x, sigma, **_: seen.append((x, sigma)) or x
    given = batch(64)
    given["x_0"] = torch.full_like(given["x_0"], 0.5)
    made.sample(made.student, given, drawing(64))
    x, sigma = seen[0]
    later = sigma < 80
    assert len(seen) == 1 and 16 < int(later.sum()) < 48
    assert float(x[later].mean()) == pytest.approx(0.5, abs=0.1) and float(x[~later].std()) == pytest.approx(
        80, rel=0.1
    )
    assert float(x[later].std()) == pytest.approx(1, rel=0.1)


def test_labels_are_dropped_in_training_only_and_the_fake_denoiser_gets_the_same():
    made, given = game(label_dropout=0.999999), batch()
    made.values(made.student.train(), given, drawing())
    assert given["generated_labels"].tolist() == [3] * 8
    given = batch()
    assert made.sample(made.student.eval(), given, drawing())[1].tolist() == given["labels"].tolist()


def test_the_smoothing_penalty_is_that_of_a_little_noise():
    made, seen = game(r1_gamma=10.0, r1_noise=0.5), []
    head = made.fake.head.forward
    made.fake.head.forward = lambda features: seen.append(head(features)) or seen[-1]
    values = made.fake_values(made.fake, batch(), drawing())
    fake, (real, rough) = seen[0], seen[1].chunk(2)
    expected = losses.real_and_fake_loss(real, fake) + 10 * (real - rough).square()
    torch.testing.assert_close(values["telling"], expected.detach())
    assert bool(((real - rough).abs() > 0).all())
    assert values["right"].tolist() == (real > fake).float().tolist()
