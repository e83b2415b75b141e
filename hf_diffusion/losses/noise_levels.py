"""Which noise levels a training batch visits, as functions of uniform numbers that the caller drew.

A level is a number u in [0, 1), the least noise at 0; each family turns it into its t or sigma. A
spread arranges the levels of a global batch. It sees whole blocks of rows, each row's number in the
global batch and the size of that, so that a run is the same for any number of processes.
"""

import torch
from torch import Tensor


def timesteps(u: Tensor, num_timesteps: int) -> Tensor:
    """Timesteps int64 (B,) in [0, num_timesteps) for levels u (B,) in [0, 1)."""
    return (u.double() * num_timesteps).long().clamp(max=num_timesteps - 1)


def logit_normal(u: Tensor, mean: float, std: float) -> Tensor:
    """Levels (B,) for u (B,) in [0, 1), rising with u, whose logit is normal: Esser et al. 2024,
    arXiv:2403.03206, section 3.1.
    """
    return torch.sigmoid(mean + std * torch.special.ndtri(u))


def stratified(u: Tensor, rows: Tensor, total: int) -> Tensor:
    """Row i moves into the i-th of `total` equal strata of [0, 1); rows int64 (B,), as u.

    Every level is as likely as before, with less variance of the batch's loss. Rows from `total`
    on, which a last block may have, leave [0, 1); nobody uses them.
    """
    return (rows + u.double()) / total


def antithetic(u: Tensor, rows: Tensor, total: int) -> Tensor:
    """Row 2k + 1 takes the mirror 1 - u of row 2k, so that timesteps t and T - 1 - t pair up.

    `rows` begins with an even number and holds no gaps, as whole blocks of an even size do.
    """
    # ermongroup/ddim puts the mirrors into the second half of the batch; side by side they stay
    # together in micro-batches
    u = u.double().clone()
    mirror = 1 - u[0::2]
    # the next number below: 1 - u is 1 at u = 0, and elsewhere on a border between two timesteps it
    # would fall on the wrong side
    mirror = torch.nextafter(mirror, torch.zeros_like(mirror))
    u[1::2] = mirror[: len(u) // 2]
    return u


class LossSecondMomentSampler:
    """Importance sampling of timesteps by their root mean square loss, Eq. 18 of improved DDPM
    (arXiv:2102.09672).

    Uniform until every timestep has `history_per_term` losses. The state is one table, so all
    processes that are given the same losses draw alike: gather t and losses over the processes
    before `update`. No value is read back from a GPU.
    """

    def __init__(self, num_timesteps: int, history_per_term: int = 10, uniform_prob: float = 0.001):
        if num_timesteps < 1 or history_per_term < 1:
            raise ValueError(
                f"num_timesteps={num_timesteps} and history_per_term={history_per_term} must both be at least 1"
            )
        if not 0 < uniform_prob <= 1:
            raise ValueError(
                f"uniform_prob={uniform_prob} must be in (0, 1]: without it a timestep may never come again"
            )
        self.num_timesteps, self.history_per_term, self.uniform_prob = num_timesteps, history_per_term, uniform_prob
        self.history = torch.zeros(num_timesteps, history_per_term, dtype=torch.float64)  # a row's oldest loss first
        self.counts = torch.zeros(num_timesteps, dtype=torch.int64)

    def weights(self) -> Tensor:
        """Unnormalised probabilities of the timesteps, float64 (num_timesteps,)."""
        weights = self.history.square().mean(dim=1).sqrt()
        total = weights.sum()
        mixed = weights / total * (1 - self.uniform_prob) + self.uniform_prob / self.num_timesteps
        warm = (self.counts == self.history_per_term).all() & (total > 0)
        return torch.where(warm, mixed, torch.ones_like(mixed))

    def sample(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Timesteps int64 (B,) for u (B,) in [0, 1), and the factors float64 (B,) on their losses.

        With the factors, the mean loss estimates that of uniform timesteps. The sampler's state
        moves to u's device.
        """
        self.history, self.counts = self.history.to(u.device), self.counts.to(u.device)
        probabilities = self.weights()
        probabilities = probabilities / probabilities.sum()
        cumulative = probabilities.cumsum(0)
        t = torch.searchsorted(cumulative, u.double() * cumulative[-1], right=True).clamp(max=self.num_timesteps - 1)
        return t, 1 / (self.num_timesteps * probabilities[t])

    @torch.no_grad()
    def update(self, t: Tensor, losses: Tensor) -> None:
        """Append the unweighted losses (N,) of timesteps t (N,), first in first out.

        Losses that are not finite are left out: one would stay in the weights for the next
        `history_per_term` visits.
        """
        t, losses = t.to(self.counts.device), losses.to(self.history)
        finite = losses.isfinite()
        # Row num_timesteps and column history_per_term are a bin for what is not kept: masks would
        # make the GPU wait.
        t, order = torch.where(finite, t, self.num_timesteps).sort(stable=True)
        losses = torch.where(finite, losses, 0.0)[order]
        added = self.counts.new_zeros(self.num_timesteps + 1).index_add_(0, t, torch.ones_like(t))
        rank = torch.arange(len(t), device=t.device) - (added.cumsum(0) - added)[t]  # 0, 1, .. among the same timestep

        counts = torch.cat([self.counts, self.counts.new_zeros(1)])
        dropped = (counts + added - self.history_per_term).clamp(min=0)  # how far each row moves left
        columns = torch.arange(self.history_per_term + 1, device=t.device)
        history = torch.nn.functional.pad(self.history, (0, 1, 0, 1))
        history = history.gather(1, (columns + dropped[:, None]).clamp(max=self.history_per_term))
        place = counts[t] + rank - dropped[t]
        history[t, torch.where(place >= 0, place, self.history_per_term)] = losses
        self.history = history[:-1, :-1].contiguous()
        self.counts = (counts + added)[:-1].clamp(max=self.history_per_term)

    def state_dict(self) -> dict[str, Tensor]:
        """The loss history and its counts, copied to the CPU."""
        return {"history": self.history.cpu().clone(), "counts": self.counts.cpu().clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up the state of a sampler of the same sizes."""
        if state["history"].shape != self.history.shape:
            raise ValueError(
                f"the saved loss history is {tuple(state['history'].shape)} (timesteps, losses), this sampler's is "
                f"{tuple(self.history.shape)}: resume with the num_timesteps and history_per_term of the saved run"
            )
        self.history.copy_(state["history"])
        self.counts.copy_(state["counts"])
