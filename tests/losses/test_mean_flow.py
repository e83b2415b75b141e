"""MeanFlow's loss: its closed form for Gaussian data, its gradient, and the wrapper that reduces
gradients.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_diffusion.losses.mean_flow import (
    mean_flow_loss,
    mean_flow_sample,
    mean_flow_target,
    mean_flow_times,
    straight_path,
)
from hf_diffusion.losses.mean_flow_objective import MeanFlowObjective, MeanFlowOptions
from hf_diffusion.models.mlp_points import PointMeanFlowDenoiser
from hf_diffusion.models.unet_adm import ADMMeanFlowUNet2DModel
from hf_diffusion.randomness import Draw
from hf_diffusion.schedulers.scheduling_flow import FlowMatchingScheduler
from tests.losses.scripted import ScriptedDraw


class Wrapper(nn.Module):
    """Counts its calls, as DistributedDataParallel prepares its reducer in each."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module, self.calls = module, 0

    def forward(self, *inputs, **named):
        self.calls += 1
        return self.module(*inputs, **named)


class Velocity(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 16), nn.SiLU(), nn.Linear(16, 2))

    def forward(self, z, r, t):
        return self.layers(torch.cat([z, r[:, None], t[:, None]], dim=1))


def batch():
    generator = torch.Generator().manual_seed(0)
    z, v = torch.randn(2, 8, 2, generator=generator)
    r, t = torch.rand(8, 2, generator=generator).sort(dim=1).values.unbind(1)
    return z, r, t, v


def test_the_gradient_passes_through_the_wrapper_and_the_derivative_through_the_bare_network():
    torch.manual_seed(0)
    network = Velocity()
    wrapper = Wrapper(network)
    inputs = batch()
    mean_flow_loss(wrapper, *inputs, bare_network=network).sum().backward()
    assert wrapper.calls == 1
    found = [p.grad.clone() for p in network.parameters()]
    network.zero_grad()
    target, _ = mean_flow_target(network, *inputs)
    error = (network(*inputs[:3]) - target).square().sum(1)
    (error / (error.detach() + 0.01)).sum().backward()
    for ours, expected in zip(found, network.parameters()):
        torch.testing.assert_close(ours, expected.grad)


def test_the_derivative_is_that_along_the_path_by_finite_differences():
    torch.manual_seed(0)
    network, (z, r, t, v) = Velocity().double(), (value.double() for value in batch())
    _, derivative = mean_flow_target(network, z, r, t, v)
    h = 1e-5
    ahead, behind = (network(z + s * h * v, r, t + s * h) for s in (1, -1))
    torch.testing.assert_close(derivative, (ahead - behind).detach() / (2 * h), rtol=1e-6, atol=1e-8)


def test_one_step_of_the_exact_average_velocity_lands_on_the_data():
    mean, variance = 0.4, 0.25
    z = torch.randn(20000, 1, generator=torch.Generator().manual_seed(0)).double()

    def average(z, r, t):
        spread = lambda t: ((1 - t) ** 2 * variance + t**2).sqrt()  # noqa: E731
        r, t = r[:, None], t[:, None]
        reached = (1 - r) * mean + spread(r) / spread(t) * (z - (1 - t) * mean)
        return (z - reached) / (t - r)

    for steps in (1, 3):
        torch.testing.assert_close(mean_flow_sample(average, z, steps), mean + variance**0.5 * z)


# --- the objective --------------------------------------------------------------------------------

U = torch.tensor([[0.2, 0.7], [0.9, 0.4], [0.6, 0.6001], [0.35, 0.1]], dtype=torch.float64)
X_0, NOISE = torch.randn(2, 4, 2, generator=torch.Generator().manual_seed(1))
BATCH = {"x_0": X_0, "labels": torch.tensor([0, 1, 2, 1]), "indices": torch.arange(4)}
# r differs from t in rows 0 and 1
EQUAL, KEPT = torch.tensor([0.9, 0.8, 0.1, 0.3]), torch.tensor([0.9, 0.05, 0.9, 0.9])
WEIGHTS = torch.tensor([0.3, -0.2, 0.5, 0.1])  # of the labels 0 to 2, and of no class


class OfClasses(nn.Module):
    """A field that depends on z, both times and the label."""

    def __init__(self, **config):
        super().__init__()
        self.weight, self.config = nn.Parameter(torch.tensor(0.5)), SimpleNamespace(**config)
        self.null_class_id = config["num_class_embeds"]

    def forward(self, z, timestep, duration, class_labels=None, return_dict=True):
        shift = 0 if class_labels is None else WEIGHTS[class_labels][:, None]
        return (self.weight * z.sin() + 0.1 * timestep[:, None] * z.flip(1) + 0.2 * duration[:, None] + shift,)


def objective(num_class_embeds=None, unwrap=lambda network: network, network=None, **options):
    options = MeanFlowOptions(**options)
    options.class_conditional = num_class_embeds is not None
    network = network or OfClasses(num_class_embeds=num_class_embeds)
    return MeanFlowObjective(FlowMatchingScheduler(10), network, options, 1e-3, unwrap)


def values(made, network=None, dropped=True):
    draw = ScriptedDraw([U[:, 0]], [NOISE], [U[:, 1], EQUAL, *([KEPT] if dropped else [])])
    result = made.values(made.players[0].network if network is None else network, BATCH, draw)
    draw.assert_empty()
    return result


def times(ratio=0.25):
    levels = torch.sigmoid(-0.4 + torch.special.ndtri(U)).float()
    return mean_flow_times(levels, EQUAL, ratio)


def test_the_objective_is_the_loss_of_the_paper_at_its_times_with_the_network_told_time_and_duration():
    made = objective()
    network = made.players[0].network
    r, t = times()
    assert (r < t).tolist() == [True, True, False, False]
    z, v = straight_path(X_0, NOISE, t)
    velocity = lambda z, r, t: network(z, 10 * t, 10 * (t - r))[0]  # noqa: E731
    # of points the mean of the velocity is learned, of images the weighted one
    expected = mean_flow_loss(velocity, z, r, t, v, power=0.0)
    found = values(made, dropped=False)
    torch.testing.assert_close(found["loss"], expected)
    torch.testing.assert_close(found["level"], t.double())
    weighted = mean_flow_loss(velocity, z, r, t, v, power=0.5, offset=0.1)
    other = objective(loss_power=0.5, loss_offset=0.1, network=network)
    torch.testing.assert_close(values(other, dropped=False)["loss"], weighted)
    all_differ = objective(interval_share=1.0, network=network)
    r, t = times(1.0)
    torch.testing.assert_close(
        values(all_differ, dropped=False)["loss"], mean_flow_loss(velocity, z, r, t, v, power=0.0)
    )


def test_what_several_processes_wrap_the_network_in_is_called_once_and_its_gradient_is_the_bare_ones():
    network = OfClasses(num_class_embeds=3)
    wrapper = Wrapper(network)
    made = objective(3, lambda module: getattr(module, "module", module), network, guidance_omega=2.0)
    values(made, wrapper)["loss"].sum().backward()
    assert wrapper.calls == 1
    found, network.weight.grad = network.weight.grad, None
    values(made)["loss"].sum().backward()
    torch.testing.assert_close(found, network.weight.grad)


def test_guidance_is_learned_within_its_times_where_the_label_is_kept_and_in_training_alone():
    made = objective(3, guidance_omega=1.5, guidance_kappa=0.3, guidance_start=0.3, guidance_end=0.65)
    network = made.players[0].network
    r, t = times()
    inside = (t >= 0.3) & (t <= 0.65)
    assert inside.tolist() != [True] * 4 and inside[1:].any()
    z, v = straight_path(X_0, NOISE, t)
    labels = torch.tensor([0, 3, 2, 1])  # the second is dropped
    velocity = lambda labels: lambda z, r, t: network(z, 10 * t, 10 * (t - r), labels)[0]  # noqa: E731
    with torch.no_grad():
        cond, uncond = velocity(labels)(z, t, t), velocity(torch.full((4,), 3))(z, t, t)
    guided = torch.where((inside & (labels != 3))[:, None], 1.5 * v + 0.3 * cond - 0.8 * uncond, v)
    assert not torch.equal(guided, v)
    expected = mean_flow_loss(velocity(labels), z, r, t, guided, power=0.0)
    torch.testing.assert_close(values(made)["loss"], expected)
    network.eval()
    plain = mean_flow_loss(velocity(BATCH["labels"]), z, r, t, v, power=0.0)
    torch.testing.assert_close(values(made, dropped=False)["loss"], plain)


def test_the_networks_of_images_with_attention_and_of_points_have_the_derivative_that_the_loss_needs():
    shape = {"model_channels": 8, "num_res_blocks": 1, "num_class_embeds": 3, "null_class": True}
    image = {"sample_size": 8, "in_channels": 1, "channel_mult": (1, 2), "attention_resolutions": (2,)}
    cases = (
        (PointMeanFlowDenoiser(**shape), torch.randn(4, 2)),
        (ADMMeanFlowUNet2DModel(**shape, **image, num_heads=2, norm_num_groups=4), torch.randn(4, 1, 8, 8)),
    )
    for network, x_0 in cases:
        for parameter in network.double().parameters():
            nn.init.normal_(parameter, std=0.2)
        made = objective(3, network=network)
        velocity = made.velocity(network, BATCH["labels"])
        r, t = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.3, 0.9]]).double()
        z, v = straight_path(x_0.double(), torch.randn_like(x_0).double(), t)
        with sdpa_kernel(SDPBackend.MATH):
            _, derivative = mean_flow_target(velocity, z, r, t, v)
        h = 1e-3
        with torch.no_grad():
            ahead, behind = (velocity(z + s * h * v, r, t + s * h) for s in (1, -1))
        # the sinusoids of times are float32
        torch.testing.assert_close(derivative, (ahead - behind) / (2 * h), rtol=2e-3, atol=2e-3)
        # all of its weights are reached
        result = made.values(network, {**BATCH, "x_0": x_0.double()}, Draw(0, 1, slice(0, 4), 4, torch.device("cpu")))
        result["loss"].sum().backward()
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in network.parameters())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"guidance_omega": 2.0}, "guidance is to classes"),
        ({"guidance_start": 0.5, "guidance_end": 0.5}, "guidance_start 0.5 must be below guidance_end 0.5"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(options, message):
    options = MeanFlowOptions(**options)
    options.class_conditional = False
    with pytest.raises(ValueError, match=message):
        options.check()
