"""Score-based diffusion: the VE, VP and sub-VP equations, and annealed Langevin dynamics.

Papers: NCSN (Song & Ermon 2019, arXiv:1907.05600), NCSNv2 (Song & Ermon 2020, arXiv:2006.09011),
score SDEs (Song et al. 2021, arXiv:2011.13456).

Time t runs from 0 (data) to 1 (noise). x_t = scale(t) x_0 + std(t) noise. Every coefficient is
float64 and is cast when it is applied. B samples of any shape (B, ...); times are () or (B,).
A chain of N steps has the indices 0 (least noise) to N - 1.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor


Generators = torch.Generator | list[torch.Generator] | None
# (x (B, ...), times (B,), rows (B,) of the whole batch) -> dx/dt (B, ...)
Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]

PREDICTORS = ("euler_maruyama", "reverse_diffusion", "ancestral", "none")
CORRECTORS = ("langevin", "annealed", "none")
PREDICTION_TYPES = ("epsilon", "score")
CONDITIONINGS = ("time", "sigma", "index")
# Training and likelihood begin at this time, earlier than sampling ends.
TRAINING_EPS = 1e-5
# The product of a time in float32 and N - 1 may fall short of a whole number by so much.
ROUNDING = 1e-3


@dataclass
class ScoreSchedulerOutput(BaseOutput):
    """The next sample, and the same without the noise that was added last."""

    prev_sample: Tensor
    prev_sample_mean: Tensor


def over(coefficient: Tensor, x: Tensor) -> Tensor:
    """A coefficient () or (B,) in the precision of x (B, ...), to broadcast over it."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return coefficient.to(dtype).to(x.device).reshape(-1, *(1,) * (x.ndim - 1))


# --- the equations ------------------------------------------------------------------------------


@dataclass(frozen=True)
class SDE:
    """dx = drift dt + diffusion dw, with Gaussian p(x_t | x_0), and its chain of `num_steps` steps.

    The drift is `rate(t) x`. A subclass has `scale_and_std`, `rate`, `diffusion`, `chain`, the
    standard deviation `prior_std` of x_1, and `langevin_alpha`, the size of Langevin's steps.
    """

    num_steps: int = 1000
    prior_std: ClassVar[float] = 1.0

    def index(self, t: Tensor) -> Tensor:
        """floor(t (N - 1)): the step of the chain for times on no grid of its own."""
        return (t.double() * (self.num_steps - 1) + ROUNDING).floor().long()

    def marginal_prob(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (B, ...) and standard deviation (B,) of p(x_t | x_0 = x)."""
        scale, std = self.scale_and_std(t)
        return over(scale, x) * x, std

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        """Drift of the forward equation (B, ...)."""
        return over(self.rate(t), x) * x

    def discretize(self, x: Tensor, t: Tensor, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """f (B, ...) and G (B,) of the chain x_{i+1} = x_i + f + G noise."""
        f, g = self.chain(t, self.index(t) if index is None else index)
        return over(f, x) * x, g

    def prior_logp(self, z: Tensor) -> Tensor:
        """Log density (B,) of z (B, ...) where the process ends."""
        dims = z[0].numel()
        energy = (z.double().flatten(1) ** 2).sum(1) / (2 * self.prior_std**2)
        return -dims / 2 * math.log(2 * math.pi * self.prior_std**2) - energy

    def reverse_drift(self, x: Tensor, t: Tensor, score: Tensor, probability_flow: bool = False) -> Tensor:
        """Drift f - g^2 score of the equation in reverse, or of the flow, f - g^2 score / 2."""
        return self.drift(x, t) - over(self.diffusion(t) ** 2 * (0.5 if probability_flow else 1), x) * score

    def reverse_discretize(
        self, x: Tensor, t: Tensor, score: Tensor, index: Tensor | None = None, probability_flow: bool = False
    ) -> tuple[Tensor, Tensor]:
        """f - G^2 score and G of the chain in reverse, or f - G^2 score / 2 and 0 of the flow."""
        f, g = self.discretize(x, t, index)
        f = f - over(g**2 * (0.5 if probability_flow else 1), x) * score
        return f, torch.zeros_like(g) if probability_flow else g

    # Updates: each gives the next sample and its mean, from the score (B, ...) at x and t.

    def euler_maruyama(
        self, x: Tensor, t: Tensor, score: Tensor, noise: Tensor, index=None, probability_flow: bool = False
    ) -> tuple[Tensor, Tensor]:
        """A step of -1 / N of the equation in reverse time."""
        mean = x - self.reverse_drift(x, t, score, probability_flow) / self.num_steps
        if probability_flow:
            return mean, mean
        return mean + over(self.diffusion(t) / math.sqrt(self.num_steps), x) * noise, mean

    def reverse_diffusion(
        self, x: Tensor, t: Tensor, score: Tensor, noise: Tensor, index=None, probability_flow: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The chain in reverse, Eq. 46 of arXiv:2011.13456."""
        f, g = self.reverse_discretize(x, t, score, index, probability_flow)
        return x - f + over(g, x) * noise, x - f

    def ancestral(
        self, x: Tensor, t: Tensor, score: Tensor, noise: Tensor, index=None, probability_flow: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Ancestral sampling of the chain; of the equations that have one."""
        if probability_flow:
            raise ValueError("ancestral sampling has no probability flow; use reverse_diffusion or euler_maruyama")
        on_x, on_score, std = self.ancestral_chain(self.index(t) if index is None else index)
        mean = over(on_x, x) * (x + over(on_score, x) * score)
        return mean + over(std, x) * noise, mean

    def langevin(
        self, x: Tensor, t: Tensor, score: Tensor, noise: Tensor, snr: float, index=None, per_sample: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Langevin's step of a given signal-to-noise ratio, Algorithms 4 and 5 of arXiv:2011.13456.

        The norms are each sample's own, or with `per_sample` False means over the batch, as in the
        paper. A score of few dimensions may vanish, and the step with it be infinite; so one's own
        counts as at least half of what the noise alone has in the mean.
        """
        noise_norm, score_norm = noise.flatten(1).norm(dim=1), score.flatten(1).norm(dim=1)
        if per_sample:
            expected = math.sqrt(x[0].numel()) / self.scale_and_std(t)[1]
            score_norm = torch.maximum(score_norm, expected.to(score_norm) / 2)
        else:
            noise_norm, score_norm = noise_norm.mean(), score_norm.mean()
        ratio = (snr * noise_norm / score_norm.clamp(min=torch.finfo(x.dtype).tiny)).double()
        alpha = self.langevin_alpha(self.index(t) if index is None else index)
        return _langevin(x, score, noise, 2 * alpha * ratio**2)

    def annealed(
        self, x: Tensor, t: Tensor, score: Tensor, noise: Tensor, snr: float, index=None, per_sample: bool = True
    ) -> tuple[Tensor, Tensor]:
        """The same, with steps that follow from the noise level instead of the norms."""
        alpha = self.langevin_alpha(self.index(t) if index is None else index)
        return _langevin(x, score, noise, 2 * alpha * (snr * self.scale_and_std(t)[1]) ** 2)


def _langevin(x: Tensor, score: Tensor, noise: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """x + step score + sqrt(2 step) noise, and the same without noise."""
    mean = x + over(step, x) * score
    return mean + over((2 * step).sqrt(), x) * noise, mean


@dataclass(frozen=True)
class VESDE(SDE):
    """Variance exploding: x_t = x_0 + sigma(t) noise, geometric from sigma_min to sigma_max."""

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    @property
    def prior_std(self) -> float:
        return self.sigma_max

    def sigma(self, t: Tensor) -> Tensor:
        """Standard deviation of the noise."""
        return self.sigma_min * torch.exp(t.double() * math.log(self.sigma_max / self.sigma_min))

    def discrete_sigmas(self) -> Tensor:
        """Levels of the chain, ascending (N,)."""
        return self.sigma(torch.linspace(0, 1, self.num_steps, dtype=torch.float64))

    def scale_and_std(self, t: Tensor) -> tuple[Tensor, Tensor]:
        sigma = self.sigma(t)
        return torch.ones_like(sigma), sigma

    def rate(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t, dtype=torch.float64)

    def diffusion(self, t: Tensor) -> Tensor:
        return self.sigma(t) * math.sqrt(2 * math.log(self.sigma_max / self.sigma_min))

    def chain(self, t: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        sigma, below = self._levels(index)
        return torch.zeros_like(sigma), (sigma**2 - below**2).sqrt()

    def ancestral_chain(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sigma, below = self._levels(index)
        gap = sigma**2 - below**2
        return torch.ones_like(gap), gap, below * gap.sqrt() / sigma

    def langevin_alpha(self, index: Tensor) -> Tensor:
        return torch.ones_like(index, dtype=torch.float64)

    def _levels(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """sigma_i and sigma_{i-1}, where that before the first is 0."""
        last = max(self.num_steps - 1, 1)
        sigma, below = self.sigma(index / last), self.sigma((index - 1) / last)
        return sigma, torch.where(index == 0, torch.zeros_like(below), below)


@dataclass(frozen=True)
class VPSDE(SDE):
    """Variance preserving: the limit of DDPM, with rates from beta_min to beta_max."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def beta(self, t: Tensor) -> Tensor:
        """Rate of the noise."""
        return self.beta_min + t.double() * (self.beta_max - self.beta_min)

    def log_scale(self, t: Tensor) -> Tensor:
        """Logarithm of what is left of x_0, Eq. 33 of arXiv:2011.13456."""
        t = t.double()
        return -(t**2) * (self.beta_max - self.beta_min) / 4 - t * self.beta_min / 2

    def discrete_betas(self, index: Tensor | None = None) -> Tensor:
        """Betas of the chain, ascending (N,), or those of the given steps.

        They are linear in i and at most beta_max / N. Where that reaches 1, a step would leave
        nothing, or less; then a beta b becomes 1 - exp(-b), which has the same limit.
        """
        index = torch.arange(self.num_steps) if index is None else index
        share = index.double() / max(self.num_steps - 1, 1)
        betas = (self.beta_min + share * (self.beta_max - self.beta_min)) / self.num_steps
        return betas if self.beta_max < self.num_steps else -torch.expm1(-betas)

    def alpha_bar(self) -> Tensor:
        """Squared scale of the chain's steps (N,)."""
        return torch.cumprod(1 - self.discrete_betas(), 0)

    def scale_and_std(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_scale = self.log_scale(t)
        # expm1: near t = 0 nothing of 1 - exp(...) would be left but rounding
        return log_scale.exp(), (-torch.expm1(2 * log_scale)).sqrt()

    def rate(self, t: Tensor) -> Tensor:
        return -self.beta(t) / 2

    def diffusion(self, t: Tensor) -> Tensor:
        return self.beta(t).sqrt()

    def chain(self, t: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        betas = self.discrete_betas(index)
        return (1 - betas).sqrt() - 1, betas.sqrt()

    def ancestral_chain(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        betas = self.discrete_betas(index)
        return (1 - betas).rsqrt(), betas, betas.sqrt()

    def langevin_alpha(self, index: Tensor) -> Tensor:
        return 1 - self.discrete_betas(index)


@dataclass(frozen=True)
class SubVPSDE(VPSDE):
    """Sub-VP: the scale of VP with less noise. Correctors take the step sizes of VP."""

    def scale_and_std(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_scale = self.log_scale(t)
        return log_scale.exp(), -torch.expm1(2 * log_scale)

    def diffusion(self, t: Tensor) -> Tensor:
        return (self.beta(t) * -torch.expm1(4 * self.log_scale(t))).sqrt()

    def chain(self, t: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        return self.rate(t) / self.num_steps, self.diffusion(t) / math.sqrt(self.num_steps)

    def ancestral_chain(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        raise ValueError("the sub-VP equation has no ancestral sampling; use euler_maruyama or reverse_diffusion")


# --- an ordinary differential equation, one step size a sample ----------------------------------

# Dormand & Prince 1980: places of the stages 2 to 7 and their weights; the last row is the solution
# of order 5. ERROR is what it differs from the solution of order 4.
PLACES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
ERROR = (-71 / 57600, 0, 71 / 16695, -71 / 1920, 17253 / 339200, -22 / 525, 1 / 40)


def dormand_prince(
    velocity: Velocity, x: Tensor, start: float, end: float, rtol: float = 1e-5, atol: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """x (B, ...) carried from time `start` to `end`, and each sample's calls of `velocity` (B,).

    Every sample has step sizes of its own, as scipy's RK45 chooses them, so that a sample does not
    depend on the rest of its batch. Samples that have arrived are not computed any more.
    ValueError where a step becomes too small, as for a velocity that is not finite.
    """
    sign, span = math.copysign(1.0, end - start), abs(end - start)
    rows, arrived = torch.arange(len(x), device=x.device), x.clone()
    calls = torch.full((len(x),), 2, device=x.device)
    done = torch.zeros(len(x), dtype=torch.float64, device=x.device)  # the way behind, 0 to span
    k = velocity(x, start + sign * done, rows)
    step = _first_step(velocity, x, k, start, end, rows, rtol, atol)
    grow = torch.ones_like(done)
    while len(rows) > 0:
        is_last = step >= span - done
        step = torch.minimum(step, span - done)
        if bool((step < 1e-14 * span).any()) or not bool(step.isfinite().all()):
            raise ValueError(
                f"the step of the probability flow became {float(step.min()):.3g}; the network's output is not "
                "finite, or rtol and atol are smaller than its precision allows"
            )
        stages, y = [k], x
        for place, weights in zip(PLACES, STAGES):
            move = sum(w * stage for w, stage in zip(weights, stages) if w)
            y = x + over(sign * step, x) * move
            stages.append(velocity(y, start + sign * (done + place * step), rows))
        error = over(step, x) * sum(w * stage for w, stage in zip(ERROR, stages) if w)
        norm = _rms(error / (atol + rtol * torch.maximum(x.abs(), y.abs())))
        accepted = norm <= 1
        calls[rows] += len(PLACES)
        keep = over(accepted, x).bool()
        x, k = torch.where(keep, y, x), torch.where(keep, stages[-1], k)
        done = torch.where(accepted, torch.where(is_last, span, done + step), done)
        factor = (0.9 * norm.clamp(min=1e-10) ** -0.2).clamp(0.2, 10)
        # not larger right after a step that was refused
        step = step * torch.where(grow > 0, factor, factor.clamp(max=1))
        grow = accepted.double()
        going = done < span
        if not bool(going.all()):
            arrived[rows[~going]] = x[~going]
            rows, x, k, done, step, grow = (part[going] for part in (rows, x, k, done, step, grow))
    return arrived, calls


def _first_step(velocity, x, k, start, end, rows, rtol, atol) -> Tensor:
    """Sizes (B,) of the first steps; Hairer, Norsett & Wanner, section II.4."""
    sign, span = math.copysign(1.0, end - start), abs(end - start)
    scale = atol + rtol * x.abs()
    size, speed = _rms(x / scale), _rms(k / scale)
    guess = torch.where((size < 1e-5) | (speed < 1e-5), torch.full_like(size, 1e-6), 0.01 * size / speed)
    # no time outside of the interval: an equation may not be defined there
    guess = guess.clamp(max=span)
    ahead = velocity(x + over(sign * guess, x) * k, start + sign * guess, rows)
    most = torch.maximum(speed, _rms((ahead - k) / scale) / guess)
    fine = torch.where(most <= 1e-15, (guess * 1e-3).clamp(min=1e-6), (0.01 / most) ** 0.2)
    return torch.minimum(100 * guess, fine).clamp(max=span)


def _rms(x: Tensor) -> Tensor:
    return x.double().flatten(1).pow(2).mean(1).sqrt()


def heun(velocity: Velocity, x: Tensor, times: Tensor) -> Tensor:
    """x (B, ...) carried along `times` (n + 1,) by Heun's method, of order 2."""
    rows = torch.arange(len(x), device=x.device)
    for now, then in zip(times[:-1].double(), times[1:].double()):
        step = over(then - now, x)
        k = velocity(x, now.expand(len(x)), rows)
        x = x + step * (k + velocity(x + step * k, then.expand(len(x)), rows)) / 2
    return x


# --- levels of NCSNv2 ---------------------------------------------------------------------------


def largest_distance(data: Tensor) -> float:
    """The largest distance between two of N samples (N, ...): sigma_1, Technique 1 of NCSNv2."""
    return float(torch.cdist(data.flatten(1).double(), data.flatten(1).double()).max())


def level_ratio(dims: int) -> float:
    """gamma = sigma_{i-1} / sigma_i such that neighbours overlap by half, Technique 2 of NCSNv2.

    At most 2: in four dimensions and fewer, levels of any ratio overlap by more.
    """

    def overlap(gamma: float) -> float:
        centre = math.sqrt(2 * dims) * (gamma - 1)
        return (math.erf((centre + 3 * gamma) / math.sqrt(2)) - math.erf((centre - 3 * gamma) / math.sqrt(2))) / 2

    # the overlap falls from nearly 1 at gamma = 1
    low, high = 1.0, 2.0
    if overlap(high) > 0.5:
        return high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if overlap(middle) > 0.5 else (low, middle)
    return low


def level_count(dims: int, sigma_begin: float, sigma_end: float) -> int:
    """So many geometric levels have about the ratio `level_ratio(dims)`; at least 2."""
    return max(2, round(math.log(sigma_begin / sigma_end) / math.log(level_ratio(dims))) + 1)


def langevin_step_size(sigma_begin: float, sigma_end: float, num_levels: int, n_steps_each: int) -> float:
    """step_lr that leaves the variance nearest to a level's own after its steps.

    Technique 4 of NCSNv2.
    """
    gamma = (sigma_begin / sigma_end) ** (1 / (num_levels - 1))

    def variance_ratio(r: float) -> float:
        stationary = 2 / (2 - r)
        return (1 - r) ** (2 * n_steps_each) * (gamma**2 - stationary) + stationary

    # it falls to one minimum, always above 1, and rises again
    low, high = 0.0, 1.0
    for _ in range(200):
        a, b = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, b) if variance_ratio(a) < variance_ratio(b) else (a, high)
    return low * sigma_end**2


# --- schedulers ---------------------------------------------------------------------------------


class ScoreScheduler:
    """What the four schedulers share; a subclass makes its `sde` and registers its settings.

    Settings of the network: `prediction_type` "epsilon" (the network predicts the noise) or
    "score"; `conditioning` "time" (it is told 999 t), "sigma" (the standard deviation of the noise)
    or "index" (a step of the chain as the papers' discrete models count: of VE from the noisiest).
    With "index" of VP the network lives on the levels of the chain, as DDPM does. `scale_input`
    divides its input by sqrt(1 + std^2).
    """

    order = 1
    # Whether the last step leaves noise that only one more call of the network takes away.
    denoises_apart = False
    # A given number of steps along the flow is even in this root of the time.
    flow_power = 1

    def _start(self, sde: SDE, **fixed) -> None:
        """Check the settings and begin with a run over the chain of the training.

        `fixed` are settings that this scheduler has instead of asking for them.
        """
        config = self.config
        self.predictor, self.corrector, self.correct_steps, self.sampling_eps = (
            fixed[name] if name in fixed else config[name]
            for name in ("predictor", "corrector", "correct_steps", "sampling_eps")
        )
        for name, allowed in (("prediction_type", PREDICTION_TYPES), ("conditioning", CONDITIONINGS)):
            if config[name] not in allowed:
                raise ValueError(f"unknown {name} {config[name]!r}; choose from {list(allowed)}")
        self.sde = self.trained_sde = sde
        self.set_timesteps()

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the noise that sampling starts from."""
        return self.sde.prior_std

    def __len__(self) -> int:
        return self.trained_sde.num_steps

    def set_timesteps(self, num_inference_steps: int | None = None, device: torch.device | str | None = None) -> None:
        """Set `timesteps`, float64, to N times from 1 to `sampling_eps`; None: the training's N."""
        steps = self.trained_sde.num_steps if num_inference_steps is None else num_inference_steps
        if not isinstance(steps, int) or steps < 2:
            raise ValueError(f"num_inference_steps must be a whole number of at least 2, not {steps!r}")
        self.num_inference_steps, self.sde = steps, replace(self.trained_sde, num_steps=steps)
        self.timesteps = torch.linspace(1, self.sampling_eps, steps, dtype=torch.float64, device=device)

    def is_deterministic(self) -> bool:
        """False: predictors and correctors draw noise."""
        return False

    def times(self, timestep: Tensor) -> Tensor:
        """Times in [0, 1] of timesteps, which are the same thing here."""
        return torch.as_tensor(timestep).double()

    def timestep_of(self, time: Tensor) -> Tensor:
        """The timestep, a fraction where needed, of times in [0, 1]: the other way round."""
        return time

    def chain_index(self, timestep: Tensor) -> Tensor:
        """The step of the run's chain at a timestep, by its place in the run.

        floor(t (N - 1)) leaves steps out, and takes others twice, where the run ends above 1 / N.
        """
        eps = self.sampling_eps
        return ((self.times(timestep) - eps) / (1 - eps) * (self.sde.num_steps - 1)).round().long()

    # --- the network ---

    def marginal(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and standard deviation, float64, of x_t as the network knows it."""
        return self.trained_sde.scale_and_std(self.times(timestep))

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Draw x_t (B, ...) for x_0 (B, ...) and unit noise."""
        scale, std = self.marginal(timesteps)
        x_t = over(scale, original_samples) * original_samples + over(std, original_samples) * noise
        return x_t.to(original_samples.dtype)

    def network_time(self, timestep: Tensor) -> Tensor:
        """What the network is told of the noise, float32 () or (B,)."""
        t, kind = self.times(timestep), self.config.conditioning
        if kind == "time":
            return (999 * t).float()
        return (self.trained_sde.scale_and_std(t)[1] if kind == "sigma" else self.label(t)).float()

    def label(self, t: Tensor) -> Tensor:
        """The discrete models' number of a time, a fraction between two steps."""
        return t * (self.trained_sde.num_steps - 1)

    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """x_t as the network takes it."""
        if not self.config.scale_input:
            return sample
        return sample / over((1 + self.marginal(timestep)[1] ** 2).sqrt(), sample)

    def to_score(self, model_output: Tensor, timestep: Tensor) -> Tensor:
        """The score grad log p_t(x_t) that the network's output means."""
        if self.config.prediction_type == "score":
            return model_output
        return -model_output / over(self.marginal(timestep)[1], model_output)

    # --- sampling ---

    def step_pred(
        self,
        score: Tensor,
        timestep: Tensor,
        sample: Tensor,
        generator: Generators = None,
        predictor: str | None = None,
        probability_flow: bool = False,
        noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> ScoreSchedulerOutput | tuple[Tensor, Tensor]:
        """The sample at the next time, from the score at this one; `noise` replaces a draw."""
        predictor = self._choice("predictor", predictor, PREDICTORS)
        if predictor == "none":
            result = sample, sample
        else:
            noise = _noise(sample, generator, noise)
            update, index = getattr(self.sde, predictor), self.chain_index(timestep)
            result = update(sample, self.times(timestep), score, noise, index, probability_flow)
        return ScoreSchedulerOutput(*result) if return_dict else result

    def step_correct(
        self,
        score: Tensor,
        timestep: Tensor,
        sample: Tensor,
        generator: Generators = None,
        corrector: str | None = None,
        snr: float | None = None,
        noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> ScoreSchedulerOutput | tuple[Tensor, Tensor]:
        """The sample at the same time, nearer to its distribution; `noise` replaces a draw."""
        corrector = self._choice("corrector", corrector, CORRECTORS)
        if corrector == "none":
            result = sample, sample
        else:
            noise = _noise(sample, generator, noise)
            update, index = getattr(self.sde, corrector), self.chain_index(timestep)
            snr = self.config.snr if snr is None else snr
            result = update(sample, self.times(timestep), score, noise, snr, index)
        return ScoreSchedulerOutput(*result) if return_dict else result

    def denoise(self, score: Tensor, timestep: Tensor, sample: Tensor) -> Tensor:
        """The mean of x_0 for x_t and its score, by Tweedie's formula."""
        scale, std = self.marginal(timestep)
        return (sample + over(std**2, sample) * score) / over(scale, sample)

    def velocity(self, score: Tensor, timestep: Tensor, sample: Tensor) -> Tensor:
        """dx/dt of the probability flow."""
        return self.trained_sde.reverse_drift(sample, self.times(timestep), score, probability_flow=True)

    def solve_flow(
        self,
        velocity: Velocity,
        sample: Tensor,
        num_inference_steps: int | None = None,
        rtol: float = 1e-5,
        atol: float = 1e-5,
        backward: bool = True,
        eps: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Carry noise to data, or data to noise, along `velocity`; the sample and each one's calls.

        num_inference_steps: so many steps of Heun's method, even in time ** (1 / flow_power); None:
        as many of order 5 as rtol and atol need. eps: the time of the data, `sampling_eps` where it
        is not given.
        """
        eps = self.sampling_eps if eps is None else eps
        start, end = (1.0, eps) if backward else (eps, 1.0)
        if num_inference_steps is None:
            return dormand_prince(velocity, sample, start, end, rtol, atol)
        root, count = 1 / self.flow_power, num_inference_steps + 1
        roots = torch.linspace(start**root, end**root, count, dtype=torch.float64, device=sample.device)
        return heun(velocity, sample, roots**self.flow_power), torch.full((len(sample),), 2 * num_inference_steps)

    def _choice(self, what: str, name: str | None, allowed: tuple[str, ...]) -> str:
        name = getattr(self, what) if name is None else name
        if name not in allowed:
            raise ValueError(f"unknown {what} {name!r}; choose from {list(allowed)}")
        return name


def _noise(like: Tensor, generator: Generators, given: Tensor | None) -> Tensor:
    if given is not None:
        return given
    return randn_tensor(like.shape, generator=generator, device=like.device, dtype=like.dtype)


class ScoreSdeVEScheduler(ScoreScheduler, SchedulerMixin, ConfigMixin):
    """The variance-exploding equation; see `ScoreScheduler` for what the settings mean.

    The network's own form in the papers is prediction_type "score", conditioning "sigma" and
    scale_input False.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        sigma_min: float = 0.01,
        sigma_max: float = 50.0,
        sampling_eps: float = 1e-5,
        predictor: str = "reverse_diffusion",
        corrector: str = "langevin",
        correct_steps: int = 1,
        snr: float = 0.16,
        prediction_type: str = "epsilon",
        conditioning: str = "time",
        scale_input: bool = True,
    ):
        _check_sigmas(sigma_min, sigma_max)
        self._start(VESDE(num_train_timesteps, sigma_min, sigma_max))

    def label(self, t: Tensor) -> Tensor:
        """Of VE the number 0 is the noisiest level."""
        return ((1 - t) * (self.trained_sde.num_steps - 1)).round()


class ScoreSdeVPScheduler(ScoreScheduler, SchedulerMixin, ConfigMixin):
    """The variance-preserving equation; see `ScoreScheduler` for what the settings mean."""

    # The signal-to-noise ratio changes fastest near the data. FD of a garments model in 10 calls,
    # N 300: 7 by 4, 12 by 2, about 35 by even times.
    flow_power = 4

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_min: float = 0.1,
        beta_max: float = 20.0,
        sampling_eps: float = 1e-3,
        predictor: str = "euler_maruyama",
        corrector: str = "none",
        correct_steps: int = 1,
        snr: float = 0.16,
        prediction_type: str = "epsilon",
        conditioning: str = "time",
        scale_input: bool = False,
    ):
        _check_betas(beta_min, beta_max)
        sde = VPSDE(num_train_timesteps, beta_min, beta_max)
        self._alpha_bar = sde.alpha_bar()
        self._start(sde)

    def marginal(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        if self.config.conditioning != "index":
            return super().marginal(timestep)
        t = self.times(timestep)
        alpha_bar = self._alpha_bar.to(t.device)[self.trained_sde.index(t)]
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


class ScoreSdeSubVPScheduler(ScoreScheduler, SchedulerMixin, ConfigMixin):
    """The sub-VP equation; see `ScoreScheduler` for what the settings mean."""

    # The signal-to-noise ratio changes fastest near the data. FD of a garments model in 10 calls,
    # N 300: 7 by 4, 12 by 2, about 35 by even times.
    flow_power = 4

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_min: float = 0.1,
        beta_max: float = 20.0,
        sampling_eps: float = 1e-3,
        predictor: str = "euler_maruyama",
        corrector: str = "none",
        correct_steps: int = 1,
        snr: float = 0.16,
        prediction_type: str = "epsilon",
        conditioning: str = "time",
        scale_input: bool = False,
    ):
        _check_betas(beta_min, beta_max)
        if conditioning == "index":
            raise ValueError("the sub-VP equation has no discrete models; give conditioning 'time' or 'sigma'")
        self._start(SubVPSDE(num_train_timesteps, beta_min, beta_max))


class AnnealedLangevinScheduler(ScoreScheduler, SchedulerMixin, ConfigMixin):
    """Langevin dynamics at geometric noise levels, from the noisiest down: NCSN and NCSNv2.

    A timestep is the index of a level, 0 is the noisiest. `n_steps_each` steps of
    step_lr (sigma_i / sigma_end)^2 are taken at each. With `denoise` one more call of the network
    removes what noise the last level leaves. The levels are those of a VE equation.
    """

    @register_to_config
    def __init__(
        self,
        num_levels: int = 10,
        sigma_begin: float = 1.0,
        sigma_end: float = 0.01,
        step_lr: float = 2e-5,
        n_steps_each: int = 100,
        denoise: bool = True,
        prediction_type: str = "epsilon",
        conditioning: str = "time",
        scale_input: bool = True,
    ):
        _check_sigmas(sigma_end, sigma_begin, names=("sigma_end", "sigma_begin"))
        if num_levels < 2 or n_steps_each < 1 or step_lr <= 0:
            raise ValueError(
                f"num_levels={num_levels}, n_steps_each={n_steps_each} and step_lr={step_lr} must be at least 2, at "
                "least 1, and above 0"
            )
        self.denoises_apart = denoise
        sde = VESDE(num_levels, sigma_end, sigma_begin)
        self._start(sde, predictor="none", corrector="annealed", correct_steps=n_steps_each, sampling_eps=0.0)

    @property
    def sigmas(self) -> Tensor:
        """The levels, descending (L,)."""
        return self.trained_sde.discrete_sigmas().flip(0)

    @property
    def step_sizes(self) -> Tensor:
        """Size of Langevin's steps at each level (L,)."""
        return self.config.step_lr * (self.sigmas / self.config.sigma_end) ** 2

    def set_timesteps(self, num_inference_steps: int | None = None, device: torch.device | str | None = None) -> None:
        """Set `timesteps`, int64, to the L levels; another number is spread over the range."""
        steps = self.trained_sde.num_steps if num_inference_steps is None else num_inference_steps
        if not isinstance(steps, int) or steps < 2:
            raise ValueError(f"num_inference_steps must be a whole number of at least 2, not {steps!r}")
        self.num_inference_steps, self.sde = steps, replace(self.trained_sde, num_steps=steps)
        self.timesteps = torch.arange(steps, device=device)

    def times(self, timestep: Tensor) -> Tensor:
        """Times in [0, 1] of levels of the current run."""
        return 1 - torch.as_tensor(timestep).double() / (self.sde.num_steps - 1)

    def timestep_of(self, time: Tensor) -> Tensor:
        return (1 - time) * (self.sde.num_steps - 1)

    def label(self, t: Tensor) -> Tensor:
        return ((1 - t) * (self.trained_sde.num_steps - 1)).round()

    def step(
        self,
        score: Tensor,
        timestep: Tensor | int,
        sample: Tensor,
        generator: Generators = None,
        noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> ScoreSchedulerOutput | tuple[Tensor, Tensor]:
        """One step of Langevin's at a level; `noise` replaces a draw."""
        timestep = torch.as_tensor(timestep, device=sample.device)
        # sigma_i / sigma_end counts, so that this holds for a run over other levels, too
        sigma = self.marginal(timestep)[1]
        step = self.config.step_lr * (sigma / self.config.sigma_end) ** 2
        result = _langevin(sample, score, _noise(sample, generator, noise), step)
        return ScoreSchedulerOutput(*result) if return_dict else result

    def step_correct(
        self, score, timestep, sample, generator=None, corrector=None, snr=None, noise=None, return_dict=True
    ) -> ScoreSchedulerOutput | tuple[Tensor, Tensor]:
        """`step`, unless another corrector or snr is asked for: step_lr is 2 (snr sigma_end)^2."""
        if corrector in (None, "annealed") and snr is None:
            return self.step(score, timestep, sample, generator, noise, return_dict)
        snr = math.sqrt(self.config.step_lr / 2) / self.config.sigma_end if snr is None else snr
        return super().step_correct(score, timestep, sample, generator, corrector, snr, noise, return_dict)


def _check_sigmas(low: float, high: float, names: tuple[str, str] = ("sigma_min", "sigma_max")) -> None:
    if not 0 < low < high < math.inf:
        raise ValueError(f"{names[0]}={low} and {names[1]}={high} must be 0 < {names[0]} < {names[1]}")


def _check_betas(beta_min: float, beta_max: float) -> None:
    if not 0 <= beta_min <= beta_max < math.inf or beta_max == 0:
        raise ValueError(f"beta_min={beta_min} and beta_max={beta_max} must be 0 <= beta_min <= beta_max, not both 0")
