"""Flow matching on the linear path: the way from noise to data, and the steps along it.

x_sigma = (1 - sigma) x_0 + sigma noise: sigma 1 is the noise and sigma 0 the data, as in diffusers
and Stable Diffusion 3. Where a paper's time t runs from noise to data, t is 1 - sigma and its
velocity has the other sign. The velocity here is dx / dsigma = noise - x_0. Sampling follows it
from sigma 1 down to 0. Networks are told the timestep num_train_timesteps * sigma, a float.

Lipman et al. 2023 (arXiv:2210.02747), Liu et al. 2023 (arXiv:2209.03003). The shift: Esser et al.
2024 (arXiv:2403.03206), Eq. 23. Samples are tensors of any rank with the batch B in dimension 0.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import NamedTuple

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from torch import Tensor


# Velocity is noise - x_0, sample is x_0, epsilon is the noise.
PREDICTION_TYPES = ("velocity", "sample", "epsilon")
SOLVERS = ("euler", "heun")


@dataclass
class FlowMatchingSchedulerOutput(BaseOutput):
    """The sample after this call, and the x_0 that a straight line along this call leads to."""

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


class Call(NamedTuple):
    """What one call of the network is for: `euler`, or one of the two halves of a Heun step."""

    sigma: float
    dt: float
    kind: str


class FlowMatchingScheduler(SchedulerMixin, ConfigMixin):
    """Euler and Heun steps along a learned velocity, on a grid of noise levels that may be shifted.

    Args:
        num_train_timesteps: the timestep that a network sees at sigma 1.
        shift: moves levels towards noise, sigma -> shift sigma / (1 + (shift - 1) sigma); 1 leaves
            them as they are.
        solver: "euler", one call of the network a step, or "heun", two calls and second order.
        final_euler_step: end Heun's run in an Euler step. Otherwise the last call asks the network
            at sigma 0, where one that predicts x_0 knows no velocity.

    `sigmas` float64 (N + 1,) are the levels of N steps, from 1 to 0. `timesteps` has one entry for
    each call of the network. The configuration of diffusers' FlowMatchEulerDiscreteScheduler and
    FlowMatchHeunDiscreteScheduler has the same names, so these sample a saved model, too. They
    shift their own grid twice; levels that they are given, once.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        solver: str = "euler",
        final_euler_step: bool = True,
    ):
        if not isinstance(num_train_timesteps, int) or num_train_timesteps < 1:
            raise ValueError(f"num_train_timesteps must be an integer of at least 1, got {num_train_timesteps!r}")
        if not 0 < shift < math.inf:
            raise ValueError(f"shift must be above 0, got {shift!r}; 1 leaves the levels as they are")
        self.init_noise_sigma = 1.0
        self.set_timesteps(num_train_timesteps)

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    @property
    def order(self) -> int:
        """Order of the solver that this scheduler is configured with."""
        return 1 + SOLVERS.index(self.config.solver)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        sigmas: Sequence[float] | Tensor | None = None,
        solver: str | None = None,
    ) -> None:
        """Lay out the steps of a run: evenly before the shift, or at `sigmas` before the shift.

        `sigmas` fall within (0, 1]; the final 0 is appended. `solver` None is the configured one.
        """
        solver = self.config.solver if solver is None else solver
        if solver not in SOLVERS:
            raise ValueError(f"unknown solver {solver!r}; choose from {list(SOLVERS)}")
        if (num_inference_steps is None) == (sigmas is None):
            raise ValueError("give num_inference_steps or sigmas, one of them")
        if sigmas is None:
            if not isinstance(num_inference_steps, Integral) or num_inference_steps < 1:
                raise ValueError(f"num_inference_steps must be an integer of at least 1, got {num_inference_steps!r}")
            grid = torch.linspace(1, 0, num_inference_steps + 1, dtype=torch.float64)
        else:
            grid = torch.cat([torch.as_tensor(sigmas, dtype=torch.float64, device="cpu"), torch.zeros(1).double()])
            if len(grid) < 2 or grid[0] > 1 or not bool((grid[1:] < grid[:-1]).all()):
                raise ValueError(f"sigmas must fall from at most 1 and stay above 0, got {grid[:-1].tolist()}")
        self.sigmas = shift_sigmas(grid, self.config.shift)  # (N + 1,)
        self.num_inference_steps = len(self.sigmas) - 1
        self._calls = list(self._plan(solver))
        times = (
            torch.tensor([call.sigma for call in self._calls], dtype=torch.float64) * self.config.num_train_timesteps
        )
        # some accelerators have no float64
        keeps_double = device is None or torch.device(device).type != "mps"
        self.timesteps = (times if keeps_double else times.float()).to(device)
        self.set_begin_index(0)

    def _plan(self, solver: str):
        """What each call of the network is for, in their order."""
        sigmas = self.sigmas.tolist()
        for sigma, following in zip(sigmas, sigmas[1:]):
            corrected = solver == "heun" and (following > 0 or not self.config.final_euler_step)
            yield Call(sigma, following - sigma, "predict" if corrected else "euler")
            if corrected:
                yield Call(following, following - sigma, "correct")

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin at this entry of `timesteps`, with a sample of that noise level."""
        if self._calls[begin_index].kind == "correct":
            raise ValueError(f"begin_index {begin_index} is in the middle of a step; take {begin_index + 1}")
        self._next, self._start = begin_index, None

    def is_deterministic(self) -> bool:
        """True: a step draws nothing."""
        return True

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """Return the sample as it is: networks take x_sigma unscaled."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: float | Tensor) -> Tensor:
        """x_sigma (B, ...) of data and noise at any timesteps, a number, () or (B,)."""
        sigma = self.sigma_of(timesteps)
        data, share = broadcast(1 - sigma, original_samples), broadcast(sigma, original_samples)
        return (data * original_samples + share * noise).to(original_samples.dtype)

    def sigma_of(self, timesteps: float | Tensor) -> Tensor:
        """The noise levels that a network means by timesteps."""
        return torch.as_tensor(timesteps) / self.config.num_train_timesteps

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        return_dict: bool = True,
    ) -> FlowMatchingSchedulerOutput | tuple[Tensor, Tensor]:
        """Go on by one call of the network; `model_output` is the velocity at `sample` (B, ...).

        Calls follow `timesteps` in their order. After the first half of a Heun step the sample is
        the place at which the second half asks for the velocity.
        """
        sigma, dt, kind = self._this_call(timestep)
        x = sample.to(torch.promote_types(sample.dtype, torch.float32))
        velocity = model_output.to(x.dtype)
        pred_original_sample = x - sigma * velocity
        if kind == "predict":
            self._start = x, velocity
        elif kind == "correct":
            x, first = self._start
            velocity = (first + velocity) / 2
        prev_sample = (x + dt * velocity).to(sample.dtype)
        self._next += 1
        if not return_dict:
            return prev_sample, pred_original_sample
        return FlowMatchingSchedulerOutput(prev_sample=prev_sample, pred_original_sample=pred_original_sample)

    def _this_call(self, timestep: float | Tensor) -> Call:
        if self._next >= len(self._calls):
            raise ValueError(f"all {len(self._calls)} calls of this run are made; begin another by set_timesteps")
        call = self._calls[self._next]
        # on an accelerator looking at it makes the host wait
        if not isinstance(timestep, Tensor) or timestep.device.type == "cpu":
            expected = call.sigma * self.config.num_train_timesteps
            if not math.isclose(float(timestep), expected, rel_tol=1e-5, abs_tol=1e-6):
                raise ValueError(
                    f"timestep {float(timestep)} was given, but call {self._next + 1} of {len(self._calls)} is at "
                    f"{expected}; go through `timesteps` in their order, or begin elsewhere by set_begin_index"
                )
        return call


def broadcast(values: float | Tensor, x: Tensor) -> Tensor:
    """Values () or (B,), in the precision of x (B, ...) and to broadcast over it."""
    values = torch.as_tensor(values)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return values.to(dtype).to(x.device).reshape(-1, *(1,) * (x.ndim - 1))


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """Levels moved towards noise by a shift above 1; the shift 1 / k undoes the shift k."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def resolution_shift(
    positions: int,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
    base_positions: int = 256,
    max_positions: int = 4096,
) -> float:
    """The shift for a network of so many positions, whose logarithm is linear in them.

    More positions need more noise before they hide the same image. The names and defaults are
    those of Flux and diffusers' dynamic shifting, where the logarithm is called mu.
    """
    slope = (max_shift - base_shift) / (max_positions - base_positions)
    return math.exp(base_shift + slope * (positions - base_positions))


def convert_prediction(
    prediction: Tensor, x: Tensor, sigma: float | Tensor, source: str, target: str, floor: float = 0.0
) -> Tensor:
    """What a prediction (B, ...) at x (B, ...) says in another of PREDICTION_TYPES.

    sigma: noise levels, () or (B,). floor: the least that is divided by, since x_0 tells no
    velocity at sigma 0 and the noise none at sigma 1.
    """
    for kind in (source, target):
        if kind not in PREDICTION_TYPES:
            raise ValueError(f"unknown prediction type {kind!r}; choose from {list(PREDICTION_TYPES)}")
    if source == target:
        return prediction
    sigma = torch.as_tensor(sigma)
    level, rest = broadcast(sigma, x), broadcast(1 - sigma, x)
    if source == "sample":
        velocity = (x - prediction) / level.clamp(min=floor)
    elif source == "epsilon":
        velocity = (prediction - x) / rest.clamp(min=floor)
    else:
        velocity = prediction
    return {"velocity": velocity, "sample": x - level * velocity, "epsilon": x + rest * velocity}[target]
