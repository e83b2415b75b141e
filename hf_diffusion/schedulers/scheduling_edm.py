"""EDM (arXiv:2206.00364): preconditioning, noise levels, Heun's method with churn.

A noisy sample is x = x_0 + sigma * noise. A network F becomes a denoiser D, which knows x_0, by
D(x; sigma) = c_skip x + c_out F(c_in x; c_noise), Eq. 7; the four functions of sigma are a
preconditioning. Here are EDM's own and those of the models before it, Table 1. Batch is dimension
0, samples have any rank.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from typing import NamedTuple

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor


Generators = torch.Generator | list[torch.Generator] | None


# --- noise as a function of time -----------------------------------------------------------------


class LinearTime:
    """sigma(t) = t, which EDM chose because it makes the paths straight."""

    def sigma(self, t: Tensor) -> Tensor:
        """Noise levels of times."""
        return t

    def inverse(self, sigma: Tensor) -> Tensor:
        """Times of noise levels."""
        return sigma

    def derivative(self, t: Tensor) -> Tensor:
        """How fast the noise grows at times above 0."""
        return torch.ones_like(t)


class VETime(LinearTime):
    """sigma(t) = sqrt(t), a variance-exploding SDE."""

    def sigma(self, t: Tensor) -> Tensor:
        return t.sqrt()

    def inverse(self, sigma: Tensor) -> Tensor:
        return sigma**2

    def derivative(self, t: Tensor) -> Tensor:
        return 0.5 / t.sqrt()


class VPTime(LinearTime):
    """sigma(t) of a variance-preserving SDE with rates beta_min + beta_d t, once x is unscaled."""

    def __init__(self, beta_d: float = 19.9, beta_min: float = 0.1):
        self.beta_d, self.beta_min = beta_d, beta_min

    @classmethod
    def through(cls, sigma_min: float, sigma_max: float, first_time: float) -> "VPTime":
        """The one with `sigma_min` at `first_time` and `sigma_max` at time 1."""
        low, high = math.log1p(sigma_min**2), math.log1p(sigma_max**2)
        beta_d = 2 * (low / first_time - high) / (first_time - 1)
        return cls(beta_d, high - beta_d / 2)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.expm1(self.beta_d * t**2 / 2 + self.beta_min * t).sqrt()

    def inverse(self, sigma: Tensor) -> Tensor:
        root = (self.beta_min**2 + 2 * self.beta_d * torch.log1p(sigma**2)).sqrt()
        return (root - self.beta_min) / self.beta_d

    def derivative(self, t: Tensor) -> Tensor:
        sigma = self.sigma(t)
        return (self.beta_min + self.beta_d * t) * (sigma + 1 / sigma) / 2


# --- preconditioning -----------------------------------------------------------------------------


class Coefficients(NamedTuple):
    """The functions of a preconditioning at some noise levels, each float64 and shaped as those."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


class Preconditioning:
    """What turns a network into a denoiser, and the noise levels that it is trained at."""

    # Lowest and highest noise level that one samples from.
    sampling_range: tuple[float, float]

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """The four functions at noise levels of any shape, above 0."""
        raise NotImplementedError

    def training_sigmas(self, level: Tensor) -> Tensor:
        """Noise levels float64 (B,) for uniform numbers (B,) in [0, 1), the least noise at 0."""
        raise NotImplementedError

    def round_sigmas(self, sigma: Tensor) -> Tensor:
        """The nearest of the noise levels that the network knows; most know all."""
        return sigma

    def inputs(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """What the network sees of x (B, ...) at noise levels () or (B,): c_in x and c_noise."""
        at = self.coefficients(sigma)
        return along(at.c_in, x) * x, at.c_noise.float()

    def denoised(self, output: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """D (B, ...) for the network's output."""
        at = self.coefficients(sigma)
        return along(at.c_skip, x) * x + along(at.c_out, x) * output.to(x)

    def target(self, x_0: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """The output (B, ...) whose denoised sample is x_0."""
        at = self.coefficients(sigma)
        return (x_0 - along(at.c_skip, x) * x) / along(at.c_out, x)


@dataclass(frozen=True)
class EDMPreconditioning(Preconditioning):
    """Inputs and targets of unit variance, for data of deviation `sigma_data`.

    Training draws ln(sigma) from N(sigma_mean, sigma_std^2).
    """

    sigma_data: float = 0.5
    sigma_mean: float = -1.2
    sigma_std: float = 1.2
    sampling_range: tuple[float, float] = (0.002, 80.0)

    def coefficients(self, sigma: Tensor) -> Coefficients:
        sigma, data = sigma.double(), self.sigma_data
        total = (sigma**2 + data**2).sqrt()
        return Coefficients((data / total) ** 2, sigma * data / total, 1 / total, sigma.log() / 4)

    def training_sigmas(self, level: Tensor) -> Tensor:
        # 0, which would be no noise at all, is the only float32 number that this bound changes
        level = level.double().clamp(2.0**-25, 1 - 2.0**-25)
        return (self.sigma_mean + self.sigma_std * torch.special.ndtri(level)).exp()


@dataclass(frozen=True)
class VPPreconditioning(Preconditioning):
    """A network that predicts noise at times of a variance-preserving SDE (arXiv:2011.13456).

    Training draws times uniformly.
    """

    beta_d: float = 19.9
    beta_min: float = 0.1
    num_train_timesteps: int = 1000
    first_time: float = 1e-5
    first_sampling_time: float = 1e-3

    @cached_property
    def time(self) -> VPTime:
        """The noise levels of times."""
        return VPTime(self.beta_d, self.beta_min)

    @property
    def sampling_range(self) -> tuple[float, float]:
        low, high = self.time.sigma(torch.tensor([self.first_sampling_time, 1.0], dtype=torch.float64)).tolist()
        return low, high

    def coefficients(self, sigma: Tensor) -> Coefficients:
        sigma = sigma.double()
        c_noise = (self.num_train_timesteps - 1) * self.time.inverse(sigma)
        return Coefficients(torch.ones_like(sigma), -sigma, 1 / (sigma**2 + 1).sqrt(), c_noise)

    def training_sigmas(self, level: Tensor) -> Tensor:
        return self.time.sigma(self.first_time + (1 - self.first_time) * level.double())


@dataclass(frozen=True)
class VEPreconditioning(Preconditioning):
    """A network that predicts noise, with its sign turned, in a variance-exploding SDE.

    Training draws ln(sigma) uniformly.
    """

    sampling_range: tuple[float, float] = (0.02, 100.0)

    def coefficients(self, sigma: Tensor) -> Coefficients:
        sigma = sigma.double()
        return Coefficients(torch.ones_like(sigma), sigma, torch.ones_like(sigma), (sigma / 2).log())

    def training_sigmas(self, level: Tensor) -> Tensor:
        low, high = self.sampling_range
        return low * (high / low) ** level.double()


@dataclass(frozen=True)
class IDDPMPreconditioning(Preconditioning):
    """A network that predicts noise at the timesteps of improved DDPM (arXiv:2102.09672).

    Training draws timesteps uniformly.
    """

    c_1: float = 0.001
    c_2: float = 0.008
    num_train_timesteps: int = 1000
    sampling_range: tuple[float, float] = (0.002, 81.0)

    @cached_property
    def table(self) -> Tensor:
        """Noise levels of the timesteps, float64 (T + 1,), the highest first and 0 at last."""
        count = self.num_train_timesteps
        time = torch.arange(count + 1, dtype=torch.float64) / count
        signal = ((math.pi / 2) * time / (self.c_2 + 1)).sin() ** 2
        sigmas = [0.0]
        for j in range(count, 0, -1):
            kept = max(float(signal[j - 1] / signal[j]), self.c_1)
            sigmas.append(math.sqrt((sigmas[-1] ** 2 + 1) / kept - 1))
        return torch.tensor(sigmas[::-1], dtype=torch.float64)

    def coefficients(self, sigma: Tensor) -> Coefficients:
        sigma = sigma.double()
        c_noise = (self.num_train_timesteps - 1 - self._nearest(sigma)).double()
        return Coefficients(torch.ones_like(sigma), -sigma, 1 / (sigma**2 + 1).sqrt(), c_noise)

    def training_sigmas(self, level: Tensor) -> Tensor:
        count = self.num_train_timesteps
        timestep = (level.double() * count).long().clamp(max=count - 1)
        return self.table.to(level.device)[count - 1 - timestep]

    def round_sigmas(self, sigma: Tensor) -> Tensor:
        return self.table.to(sigma.device)[self._nearest(sigma)]

    def _nearest(self, sigma: Tensor) -> Tensor:
        # 0 is no level that a network is called at
        return (sigma.double()[..., None] - self.table[:-1].to(sigma.device)).abs().argmin(dim=-1)


PRECONDITIONINGS: dict[str, type[Preconditioning]] = {
    "edm": EDMPreconditioning,
    "vp": VPPreconditioning,
    "ve": VEPreconditioning,
    "iddpm": IDDPMPreconditioning,
}


# --- noise levels of a run -----------------------------------------------------------------------


def noise_levels(
    schedule: str, count: int, sigma_min: float, sigma_max: float, rho: float = 7.0, first_time: float = 1e-3
) -> Tensor:
    """`count` noise levels, float64, that fall from `sigma_max` to `sigma_min`.

    Args:
        schedule: "karras" (even in sigma^(1/rho), Eq. 5), "exponential" (even in the logarithm, as
            VE models have them), "polyexponential" (even in the logarithm's root of degree rho),
            "vp" (even in the time of a VP process, from `first_time` to 1) or "iddpm" (even in the
            timesteps of improved DDPM, and within the bounds).

    Raises ValueError for an unknown schedule.
    """
    ramp = torch.linspace(0, 1, count, dtype=torch.float64)
    low, high = math.log(sigma_min), math.log(sigma_max)
    match schedule:
        case "karras":
            first, last = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
            return (first + ramp * (last - first)) ** rho
        case "exponential":
            return (high + ramp * (low - high)).exp()
        case "polyexponential":
            return ((1 - ramp) ** rho * (high - low) + low).exp()
        case "vp":
            time = VPTime.through(sigma_min, sigma_max, first_time)
            return time.sigma(1 + ramp * (first_time - 1))
        case "iddpm":
            table = IDDPMPreconditioning().table
            table = table[(table >= sigma_min) & (table <= sigma_max)]
            return table[((len(table) - 1) * ramp).round().long()]
    raise ValueError(f"unknown sigma_schedule {schedule!r}; choose from {list(SIGMA_SCHEDULES)}")


SIGMA_SCHEDULES = ("karras", "exponential", "polyexponential", "vp", "iddpm")
TIME_SCHEDULES = ("linear", "vp", "ve")
SIGNAL_SCALINGS = ("none", "vp")


def along(values: Tensor, x: Tensor) -> Tensor:
    """Values () or (B,) in the precision of x, to broadcast over x (B, ...)."""
    return values.to(x).reshape(-1, *(1,) * (x.ndim - 1))


# --- the scheduler -------------------------------------------------------------------------------


@dataclass
class EDMHeunSchedulerOutput(BaseOutput):
    """What the next call of the network gets, and the D that led to it."""

    prev_sample: Tensor
    pred_original_sample: Tensor


class Call(NamedTuple):
    """A call of the network at one time: plain numbers, so that no step waits for a device."""

    time: float
    sigma: float
    scale: float
    c_skip: float
    c_out: float
    c_in: float
    # dx/dt = slope_x * x - slope_d * D, Eq. 4
    slope_x: float
    slope_d: float


class EDMHeunScheduler(SchedulerMixin, ConfigMixin):
    """Heun's method from noise to data, with churn between `s_min` and `s_max`, Algorithm 2.

    It is called as diffusers' schedulers are. A step of second order makes two calls of the
    network, the last step one: `timesteps` holds c_noise of every call, and `sigmas` the noise
    level of every call, and 0. Churn is noise that is added between two steps. The paper adds it
    at the beginning of a step; here the end of the step before does, and `init_noise_sigma` counts
    that of the first. So the sample always has the noise of the next call.

    `EDMEulerScheduler` and `EDMDPMSolverMultistepScheduler` of diffusers sample the same networks,
    if preconditioning is "edm": `EDMEulerScheduler.from_config(scheduler.config)`.

    Args:
        sigma_min, sigma_max, rho, sigma_schedule: see `noise_levels`.
        sigma_data: deviation of the data, for preconditioning "edm".
        preconditioning: what the network was trained with: "edm", "vp", "ve" or "iddpm".
        solver_order: 2 is Heun's method, 1 is Euler's.
        alpha: where in a step the second slope is taken, in (0, 1]: 1 is Heun, 1/2 the midpoint.
        log_midpoint: take it at the geometric mean of the step's noise levels instead, and go by it
            alone, as DPM-Solver-2 of k-diffusion does.
        time_schedule: sigma(t) of the equation that is solved: "linear", "vp" or "ve".
        signal_scaling: s(t) of that equation, x = s (x_0 + sigma noise): "none" is 1, "vp" keeps
            the variance of x.
        eta: 1 is ancestral sampling: each step takes out more noise, and puts that back afresh.
        s_churn, s_min, s_max, s_noise: how much noise is added (at most s_churn / steps of
            sigma), between which noise levels (s_max None: all), and its deviation.

    Raises ValueError for values outside these.
    """

    _compatibles = ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"]

    @register_to_config
    def __init__(
        self,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        sigma_schedule: str = "karras",
        rho: float = 7.0,
        preconditioning: str = "edm",
        solver_order: int = 2,
        alpha: float = 1.0,
        log_midpoint: bool = False,
        time_schedule: str = "linear",
        signal_scaling: str = "none",
        eta: float = 0.0,
        s_churn: float = 0.0,
        s_min: float = 0.0,
        s_max: float | None = None,
        s_noise: float = 1.0,
    ):
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"sigma_min={sigma_min} and sigma_max={sigma_max} must be positive and rise")
        if sigma_data <= 0 or rho <= 0 or not 0 < alpha <= 1 or eta < 0:
            raise ValueError(
                f"sigma_data={sigma_data} and rho={rho} must be above 0, alpha={alpha} above 0 and at most 1, and "
                f"eta={eta} at least 0"
            )
        for name, allowed in {
            "sigma_schedule": SIGMA_SCHEDULES,
            "preconditioning": tuple(PRECONDITIONINGS),
            "solver_order": (1, 2),
            "time_schedule": TIME_SCHEDULES,
            "signal_scaling": SIGNAL_SCALINGS,
        }.items():
            if self.config[name] not in allowed:
                raise ValueError(f"{name} is {self.config[name]!r}; choose from {list(allowed)}")
        own = {"sigma_data": sigma_data} if preconditioning == "edm" else {}
        self.preconditioning = PRECONDITIONINGS[preconditioning](**own)
        times = {"linear": LinearTime(), "ve": VETime(), "vp": VPTime.through(sigma_min, sigma_max, 1e-3)}
        self.time = times[time_schedule]
        self.set_timesteps(18)

    @property
    def order(self) -> int:
        """Calls of the network that a step makes, but for the last step."""
        return self.config.solver_order

    # --- the run ---------------------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        sigmas: list[float] | Tensor | None = None,
        s_churn: float | None = None,
        s_min: float | None = None,
        s_max: float | None = None,
        s_noise: float | None = None,
    ) -> None:
        """Begin a run of so many steps, or at `sigmas` of one's own, which fall and are above 0.

        Those of churn that are given stand in for the configuration's. Raises ValueError for steps
        or levels that are not so.
        """
        given = {"s_churn": s_churn, "s_min": s_min, "s_max": s_max, "s_noise": s_noise}
        churn = {name: self.config[name] if value is None else value for name, value in given.items()}
        negative = {name: value for name, value in churn.items() if value is not None and value < 0}
        if negative:
            raise ValueError(f"churn is {negative}; each must be at least 0")
        levels = self.preconditioning.round_sigmas(self._levels(num_inference_steps, sigmas))
        self.num_inference_steps = steps = len(levels)
        within = (levels >= churn["s_min"]) & (levels <= (math.inf if churn["s_max"] is None else churn["s_max"]))
        gamma = within * min(churn["s_churn"] / steps, math.sqrt(2) - 1)
        # where steps begin, and where they end
        raised = torch.where(gamma > 0, self.preconditioning.round_sigmas(levels * (1 + gamma)), levels)
        lowered = torch.cat([self.ancestral_sigmas(raised[:-1], levels[1:]), torch.zeros(1, dtype=torch.float64)])
        starts = self.time.inverse(raised)
        ends = torch.cat([self.time.inverse(lowered[:-1]), lowered[-1:]])

        times = starts[:, None]
        if self.order == 2:
            between = starts + self.config.alpha * (ends - starts)
            if self.config.log_midpoint:
                between = self.time.inverse((raised * lowered).sqrt())
            times = torch.stack([starts, between], dim=1)
        # the last step ends without noise, where the slope is not defined
        times = times.flatten()[: steps * self.order - (self.order - 1)]
        called = self.time.sigma(times)
        self.sigmas = torch.cat([called, torch.zeros(1, dtype=torch.float64)])
        at = self.preconditioning.coefficients(called)
        self.timesteps = at.c_noise.float().to(device)
        self._calls, self._lengths = self._tabulate(times, called, at), (ends - starts).tolist()

        before = torch.cat([levels[:1], lowered[:-1]])
        scale = self.signal_scale(raised)
        self._added = (scale * churn["s_noise"] * (raised**2 - before**2).clamp(min=0).sqrt()).tolist()
        self._rescale = (scale / self.signal_scale(before)).tolist()
        self.init_noise_sigma = math.hypot(float(scale[0] * levels[0]), self._added[0])
        self._index, self._start = 0, None

    def _levels(self, steps: int | None, sigmas: list[float] | Tensor | None) -> Tensor:
        config = self.config
        if sigmas is None:
            if not isinstance(steps, Integral) or steps < 1:
                raise ValueError(f"num_inference_steps must be a whole number of at least 1, not {steps!r}")
            return noise_levels(config.sigma_schedule, steps, config.sigma_min, config.sigma_max, config.rho)
        levels = torch.as_tensor(sigmas, dtype=torch.float64).cpu()
        if levels.ndim != 1 or len(levels) < 1 or bool((levels <= 0).any()) or bool((levels.diff() >= 0).any()):
            raise ValueError(f"sigmas must be noise levels above 0 that fall, without a 0 at the end, not {sigmas}")
        return levels

    def ancestral_sigmas(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """How far down steps go whose end is then raised to `sigma_next` by fresh noise."""
        if self.config.eta == 0:
            # to the last bit, or noise of that size would be added
            return sigma_next
        fresh = self.config.eta * sigma_next * (1 - (sigma_next / sigma) ** 2).sqrt()
        return (sigma_next**2 - fresh.minimum(sigma_next) ** 2).sqrt()

    def signal_scale(self, sigma: Tensor) -> Tensor:
        """s at noise levels."""
        return torch.ones_like(sigma) if self.config.signal_scaling == "none" else 1 / (1 + sigma**2).sqrt()

    def _tabulate(self, times: Tensor, sigma: Tensor, at: Coefficients) -> list[Call]:
        scale, rate = self.signal_scale(sigma), self.time.derivative(times)
        # s' / s; of s = (1 + sigma^2)^(-1/2) it is -sigma sigma' s^2
        growth = torch.zeros_like(sigma) if self.config.signal_scaling == "none" else -sigma * rate * scale**2
        columns = (times, sigma, scale, at.c_skip, at.c_out, at.c_in, rate / sigma + growth, rate / sigma * scale)
        return [Call(*row) for row in torch.stack(columns, dim=1).tolist()]

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float | None = None) -> Tensor:
        """c_in x of the next call, whatever `timestep` says."""
        call = self._next_call()
        return sample * (call.c_in / call.scale)

    def _next_call(self) -> Call:
        if self._index >= len(self._calls):
            raise ValueError("the run has come to its end; begin another by set_timesteps")
        return self._calls[self._index]

    def add_fresh_noise(
        self, sample: Tensor, step: int, generator: Generators = None, noise: Tensor | None = None
    ) -> Tensor:
        """The sample with the churn of step `step`: by `noise` (B, ...), which is drawn if None."""
        std = self._added[step]
        if std == 0:
            return sample
        if noise is None:
            noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
        return self._rescale[step] * sample + std * noise

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        generator: Generators = None,
        noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> EDMHeunSchedulerOutput | tuple[Tensor]:
        """What follows from the network's output for `sample` (B, ...) at the next call.

        After the first call of two that is where the second call looks; after the second it is the
        sample at the end of the step, churned by `noise` (B, ...) or by what `generator` draws.
        """
        call, step = self._next_call(), self._index // self.order
        x = sample.to(torch.promote_types(sample.dtype, torch.float32))
        denoised = call.c_skip / call.scale * x + call.c_out * model_output.to(x)
        slope = call.slope_x * x - call.slope_d * denoised
        is_last, length = step + 1 == self.num_inference_steps, self._lengths[step]
        self._index += 1
        if self._start is not None:
            (x, first), self._start = self._start, None
            weight = 1.0 if self.config.log_midpoint else 0.5 / self.config.alpha
            slope = (1 - weight) * first + weight * slope
        elif self.order == 2 and not is_last:
            self._start = (x, slope)
            return self._output(x + (self._next_call().time - call.time) * slope, denoised, sample, return_dict)
        x = x + length * slope
        if not is_last:
            x = self.add_fresh_noise(x, step + 1, generator, noise)
        return self._output(x, denoised, sample, return_dict)

    def _output(
        self, x: Tensor, denoised: Tensor, sample: Tensor, return_dict: bool
    ) -> EDMHeunSchedulerOutput | tuple[Tensor]:
        x, denoised = x.to(sample.dtype), denoised.to(sample.dtype)
        return EDMHeunSchedulerOutput(x, denoised) if return_dict else (x, denoised)
