"""Training a network to know average velocities, as an objective.

The loss of one pair of times is in `losses.mean_flow`.
B samples of shape (...). Time 1 is the noise, as in `schedulers.scheduling_flow`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_diffusion.config.options import option
from hf_diffusion.losses.mean_flow import Velocity, guided_velocity, mean_flow_loss, mean_flow_times, straight_path
from hf_diffusion.losses.objective import Objective, Player, Values
from hf_diffusion.randomness import Draw, FixedDraw
from hf_diffusion.schedulers.scheduling_flow import FlowMatchingScheduler


@dataclass(kw_only=True)
class MeanFlowOptions:
    """What an average velocity is trained by."""

    # Without dropped labels there is no velocity without a label to guide away from.
    label_dropout: float = option(
        0.1, "share of labels replaced by 'no class', for guidance", group="method", at_least=0, below=1
    )
    interval_share: float = option(
        0.25, "share of samples whose two times differ; the others learn the path's own velocity", above=0, at_most=1
    )
    time_mean: float = option(-0.4, "mean of the normal variable whose sigmoid a time is; above 0 is more noise")
    time_std: float = option(1.0, "its standard deviation", above=0)
    # The velocity is a mean, which the power 1 leads away from where a sample has few values.
    loss_power: float | None = option(
        None,
        "p of the weight 1 / (s + loss_offset)^p of a squared error s; none is 1, as in the paper, and 0 for points",
        at_least=0,
    )
    loss_offset: float = option(0.01, "the same weight's offset", above=0)
    # Learned once and for all: sampling costs one call a step.
    guidance_omega: float = option(
        1.0, "weight of a sample's own velocity in the guided one; 1 with kappa 0 learns no guidance", above=0
    )
    guidance_kappa: float = option(
        0.0, "weight of the network's velocity with the label; 1 - omega - kappa is that without", at_least=0, below=1
    )
    guidance_start: float = option(0.0, "guide at times from here on", at_least=0, below=1)
    guidance_end: float = option(1.0, "and up to here", above=0, at_most=1)

    def check(self) -> None:
        """ValueError for settings that contradict each other."""
        if getattr(self, "dropout", 0):
            raise ValueError(
                f"dropout {self.dropout}: the network and its derivative would drop different units; give 0"
            )
        if self.is_guided and not (self.class_conditional and self.label_dropout > 0):
            raise ValueError(
                f"guidance_omega {self.guidance_omega}, guidance_kappa {self.guidance_kappa}: guidance is to classes; "
                "give --class_conditional and a label_dropout above 0, or omega 1 and kappa 0"
            )
        if self.guidance_start >= self.guidance_end:
            raise ValueError(
                f"guidance_start {self.guidance_start} must be below guidance_end {self.guidance_end}; time 1 is noise"
            )

    @property
    def is_guided(self) -> bool:
        """Whether the network learns a guided velocity."""
        return (self.guidance_omega, self.guidance_kappa) != (1, 0)


class MeanFlowObjective(Objective):
    """One network, at two times r <= t a sample.

    The network is called with timestep and duration, as ADMMeanFlowUNet2DModel is. `unwrap` gives
    the network without what several processes wrap it in: a derivative must not pass their hooks.
    Dropped labels and guidance are for training alone, so held-out losses compare.
    """

    def __init__(
        self,
        scheduler: FlowMatchingScheduler,
        network: nn.Module,
        options: MeanFlowOptions,
        learning_rate: float,
        unwrap: Callable[[nn.Module], nn.Module],
    ):
        self.scheduler, self.options, self.unwrap = scheduler, options, unwrap
        self.class_conditional = network.config.num_class_embeds is not None
        self.null_class_id = network.null_class_id
        # compiled graphs have no forward derivative
        super().__init__(Player(network, self.values, learning_rate, compilable=False))

    def values(self, network: nn.Module, batch: dict[str, Tensor], draw: Draw | FixedDraw) -> Values:
        """The loss (B,) of a micro-batch; with loss_power 1 its value hardly falls."""
        options, x_0 = self.options, batch["x_0"]
        labels = batch["labels"] if self.class_conditional else None
        normal = torch.special.ndtri(torch.stack([draw.level(), draw.uniform().double()], dim=1).clamp(min=1e-9))
        times = torch.sigmoid(options.time_mean + options.time_std * normal)  # (B, 2)
        r, t = mean_flow_times(times.to(x_0.dtype), draw.uniform(), options.interval_share)
        z, v = straight_path(x_0, draw.normal(*x_0.shape[1:]), t)
        is_dropped = torch.zeros_like(t, dtype=torch.bool)
        if self.null_class_id is not None and network.training:
            is_dropped = draw.uniform() < options.label_dropout
            labels = torch.where(is_dropped, self.null_class_id, labels)
        bare, power = self.unwrap(network), options.loss_power
        if options.is_guided and network.training:
            v = self.guided(bare, z, t, v, labels, is_dropped)
        if power is None:
            power = 0.0 if x_0.ndim == 2 else 1.0
        # the other kernels of attention have no forward derivative
        with sdpa_kernel(SDPBackend.MATH):
            velocity, of_bare = self.velocity(network, labels), self.velocity(bare, labels)
            loss = mean_flow_loss(velocity, z, r, t, v, of_bare, power, options.loss_offset)
        return {"loss": loss.float(), "level": t.double().clamp(max=1 - 1e-9)}

    def velocity(self, network: nn.Module, labels: Tensor | None) -> Velocity:
        """u(z, r, t) of a network and labels."""
        scale = self.scheduler.config.num_train_timesteps
        conditions = {} if labels is None else {"class_labels": labels}
        return lambda z, r, t: network(z, scale * t, scale * (t - r), **conditions, return_dict=False)[0].to(z.dtype)

    @torch.no_grad()
    def guided(self, bare: nn.Module, z: Tensor, t: Tensor, v: Tensor, labels: Tensor, is_dropped: Tensor) -> Tensor:
        """The velocity (B, ...) that a sample's label, where it was not dropped, is to lead to."""
        options = self.options
        cond = self.velocity(bare, labels)(z, t, t)
        uncond = self.velocity(bare, torch.full_like(labels, self.null_class_id))(z, t, t)
        is_guided = (t >= options.guidance_start) & (t <= options.guidance_end) & ~is_dropped
        return guided_velocity(v, cond, uncond, options.guidance_omega, options.guidance_kappa, is_guided)
