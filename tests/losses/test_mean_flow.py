"""MeanFlow's loss: its closed form for Gaussian data, its gradient, and the wrapper that reduces
gradients.
"""

import torch
from torch import nn

from hf_diffusion.losses.mean_flow import mean_flow_loss, mean_flow_sample, mean_flow_target


class Wrapper(nn.Module):
    """Counts its calls, as DistributedDataParallel prepares its reducer in each."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module, self.calls = module, 0

    def forward(self, *inputs):
        self.calls += 1
        return self.module(*inputs)


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
