"""Flow matching of Gaussian data N(mu, s2), where everything is known in closed form."""

import torch
from torch import Tensor

from hf_diffusion.schedulers.scheduling_flow import broadcast


class GaussianFlow:
    """The velocity of Gaussian data, and where it leads."""

    def __init__(self, mu: float, s2: float):
        self.mu, self.s2 = mu, s2

    def variance(self, sigma: Tensor) -> Tensor:
        """Of x_sigma."""
        return (1 - sigma) ** 2 * self.s2 + sigma**2

    def velocity(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """E[noise - x_0 | x] at x (B, ...) and sigma, () or (B,)."""
        sigma = broadcast(sigma, x)
        slope = (sigma - (1 - sigma) * self.s2) / self.variance(sigma)
        return slope * (x - (1 - sigma) * self.mu) - self.mu

    def x_0(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """E[x_0 | x]."""
        return x - broadcast(sigma, x) * self.velocity(x, sigma)

    def follow(self, x: Tensor, sigma: float | Tensor, to: float) -> Tensor:
        """Where the velocity leads from x (B, ...) at sigma."""
        sigma, to = broadcast(sigma, x), broadcast(to, x)
        scale = (self.variance(to) / self.variance(sigma)).sqrt()
        return (1 - to) * self.mu + scale * (x - (1 - sigma) * self.mu)


def walk(scheduler, velocity, x: Tensor) -> Tensor:
    """The end of a run of a flow matching scheduler whose timesteps are set; velocity(x, sigma)."""
    for t in scheduler.timesteps:
        sigma = float(t) / scheduler.config.num_train_timesteps
        x = scheduler.step(velocity(x, torch.tensor(sigma, dtype=torch.float64)), t, x, return_dict=False)[0]
    return x
