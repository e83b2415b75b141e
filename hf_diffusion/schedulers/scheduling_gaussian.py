"""Gaussian diffusion in discrete time: ancestral sampling (DDPM) and DDIM with eta.

Papers: DDPM (Ho et al. 2020, arXiv:2006.11239), improved DDPM (Nichol & Dhariwal 2021,
arXiv:2102.09672), DDIM (Song et al. 2020, arXiv:2010.02502), progressive distillation for v
(Salimans & Ho 2022, arXiv:2202.00512), zero terminal SNR (Lin et al. 2023, arXiv:2305.08891),
guidance by a gradient (Dhariwal & Nichol 2021, arXiv:2105.05233, section 4).

Index convention: `t` counts from 0 (least noise) to T - 1. `s` is the timestep that follows t in a
run; s = -1 stands for clean data. `alpha_bar` is the product of (1 - beta). Every coefficient
follows from it in float64 and is cast when it is applied. A run over fewer steps is a diffusion
process of its own: its betas are 1 - alpha_bar[t] / alpha_bar[s] for its own timesteps.
"""

import math
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor


BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "const", "jsd")
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "previous_mean")
VARIANCE_TYPES = ("fixed_small", "fixed_large", "learned", "learned_range")
TIMESTEP_SPACINGS = ("leading", "trailing", "linspace")
LEARNED = ("learned", "learned_range")
# Values that define the process. `from_config` drops what is recorded as left at its default, and
# another class would put its own default there.
PROCESS_ARGUMENTS = {
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "sigma_max",
}
# Schedules that stock schedulers have no name for; the config gives them the betas themselves.
UNKNOWN_TO_DIFFUSERS = ("sigmoid", "const", "jsd")
# The noisiest level, sqrt(1 / alpha_bar - 1), from which the sigma spacings of stock solvers start:
# EDM's (arXiv:2206.00364). The cosine schedule ends at 20,291, and a spacing over that puts most of
# its levels between the same two timesteps, where the network sees nothing but noise.
HIGHEST_SIGMA = 80.0
NOT_IN_RUN = -2

Generators = torch.Generator | list[torch.Generator] | None
# an alpha_bar, or what follows from it: a number in `step`, a tensor that broadcasts elsewhere
Level = TypeVar("Level", float, Tensor)


@dataclass
class GaussianSchedulerOutput(BaseOutput):
    """The sample at the next timestep, and the x_0 (clipped as configured) that led to it."""

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


def beta_table(schedule: str, num_train_timesteps: int, beta_start: float, beta_end: float) -> Tensor:
    """The betas of a named schedule, float64 (T,)."""
    steps = num_train_timesteps
    if schedule == "linear":
        betas = np.linspace(beta_start, beta_end, steps, dtype=np.float64)
    elif schedule == "scaled_linear":
        betas = np.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=np.float64) ** 2
    elif schedule == "squaredcos_cap_v2":
        # Eq. 17 of improved DDPM; the cap keeps a last step finite whose alpha_bar would be 0
        f = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = np.minimum(1 - f[1:] / f[:-1], 0.999)
    elif schedule == "sigmoid":
        betas = beta_start + (beta_end - beta_start) / (1 + np.exp(-np.linspace(-6, 6, steps)))
    elif schedule == "const":
        betas = np.full(steps, beta_end, dtype=np.float64)
    elif schedule == "jsd":
        betas = 1.0 / np.linspace(steps, 1, steps, dtype=np.float64)
    else:
        raise ValueError(f"unknown beta_schedule {schedule!r}; choose from {list(BETA_SCHEDULES)}")
    return torch.from_numpy(betas)


def rescale_to_zero_terminal_snr(alpha_bar: Tensor) -> Tensor:
    """Make sqrt(alpha_bar) end at 0 and start where it was, Algorithm 1 of arXiv:2305.08891."""
    root = alpha_bar.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def space_timesteps(num_train_timesteps: int, sections: str | list[int]) -> list[int]:
    """The timesteps that improved DDPM keeps, ascending.

    "10,10,5" takes so many from equal sections, "ddimN" every k-th. Raises ValueError where no such
    choice exists.
    """
    total = num_train_timesteps
    if isinstance(sections, str) and sections.startswith("ddim"):
        count = _section_count(sections[4:], sections)
        for stride in range(1, total):
            if len(range(0, total, stride)) == count:
                return list(range(0, total, stride))
        raise ValueError(
            f"timesteps {sections!r}: no integer stride takes {count} of {total} steps; use '{count}' instead"
        )
    counts = [_section_count(c, sections) for c in (sections.split(",") if isinstance(sections, str) else sections)]
    kept, start = [], 0
    for i, count in enumerate(counts):
        size = total // len(counts) + (i < total % len(counts))
        if count > size:
            raise ValueError(
                f"timesteps {sections!r}: section {i + 1} has {size} steps, fewer than the {count} asked for"
            )
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        # added up and rounded half to even, as OpenAI's respacing does: round(i * stride) differs
        # from it for hundreds of step counts
        position = 0.0
        for _ in range(count):
            kept.append(start + round(position))
            position += stride
        start += size
    return kept


def _section_count(text: str | int, sections: str | list[int]) -> int:
    count = int(text) if str(text).strip().isdigit() else 0
    if count < 1:
        raise ValueError(f"timesteps {sections!r} is not understood; write counts as '10,10,5', or 'ddim25'")
    return count


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"unknown {name} {value!r}; choose from {list(allowed)}")


class DeviceTable:
    """A table on the CPU, with a copy on each device that has asked for one."""

    def __init__(self, values: Tensor):
        self._on = {values.device: values}

    def on(self, device: torch.device) -> Tensor:
        if device not in self._on:
            values = self._on[torch.device("cpu")]
            # Apple's GPUs have no float64
            narrow = device.type == "mps" and values.is_floating_point()
            self._on[device] = values.to(device, torch.float32 if narrow else values.dtype)
        return self._on[device]


@dataclass(frozen=True)
class Run:
    """The N timesteps of a run, descending, and the levels between which each of its steps leads.

    Numbers and not tensors: `step` then computes its coefficients without one tensor operation.
    """

    timesteps: Tensor  # int64 (N,), on the device that was asked for
    place: dict[int, int]  # of each timestep in `timesteps`
    following: DeviceTable  # int64 (T,): s for each t, NOT_IN_RUN where t is not of this run
    alpha_bar_t: list[float]
    alpha_bar_s: list[float]

    @property
    def last_variance(self) -> float:
        """What OpenAI's code takes for the last step's posterior variance, 0, where it needs more.

        It repeats the last but one. A run of one step has none: its beta stands in.
        """
        if len(self.alpha_bar_t) == 1:
            return 1 - self.alpha_bar_t[0] / self.alpha_bar_s[0]
        return _posterior_variance(self.alpha_bar_t[-2], self.alpha_bar_s[-2])


class GaussianScheduler(SchedulerMixin, ConfigMixin):
    """What the three schedulers of this file share: process, timesteps, and reverse distribution.

    Shapes: samples are (B, ...) of any rank; `t` and `s` are an int or int64 tensors () or (B,).
    """

    # Those that draw from a known distribution what they should, in 4 to 50 steps, on every
    # schedule and with every spacing of sigmas that is not refused: see
    # tests/schedulers/test_stock_solvers.py.
    _compatibles = [
        "DDIMScheduler",
        "DDPMScheduler",
        "DEISMultistepScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "EulerDiscreteScheduler",
        "UniPCMultistepScheduler",
    ]
    order = 1
    init_noise_sigma = 1.0

    @classmethod
    def _get_compatibles(cls) -> list[type[SchedulerMixin]]:
        """`compatibles`: the classes that take over this process by `from_config`."""
        # diffusers looks the names up in its own package, where the classes of this file are not
        own = {LinearDDPMScheduler, CosineDDPMScheduler, DDIMEtaScheduler, ImprovedPNDMScheduler}
        return list(own.union(super()._get_compatibles()))

    def is_deterministic(self, eta: float | None = None) -> bool:
        """Whether `step` draws no noise; only DDIMEtaScheduler takes an `eta`."""
        return False

    def _build(self) -> None:
        """Check the configuration and make the tables; called by every constructor."""
        self._fold_options_into_config()
        config = self.config
        _one_of("prediction_type", config.prediction_type, PREDICTION_TYPES)
        _one_of("variance_type", config.variance_type, VARIANCE_TYPES)
        _one_of("timestep_spacing", config.timestep_spacing, TIMESTEP_SPACINGS)
        betas = self._checked_betas()
        alpha_bar = torch.cumprod(1 - betas, dim=0)
        if config.rescale_betas_zero_snr:
            alpha_bar = rescale_to_zero_terminal_snr(alpha_bar)
            betas = 1 - alpha_bar / torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
        if alpha_bar[-1] == 0 and config.prediction_type in ("epsilon", "previous_mean"):
            raise ValueError(
                "at the last timestep no signal is left (rescale_betas_zero_snr or a last beta of 1), so "
                f"prediction_type {config.prediction_type!r} cannot give x_0 there; use 'v_prediction' or 'sample'"
            )
        self.betas, self.alpha_bar = betas, alpha_bar
        self._say_to_stock_solvers(alpha_bar)
        # under the name and in the dtype that stock diffusers code reads
        self.alphas_cumprod = alpha_bar.float()
        # entry t + 1 belongs to t, so that s = -1 finds the level of clean data
        self._levels = DeviceTable(torch.cat([alpha_bar.new_ones(1), alpha_bar]))
        self._start(np.arange(len(betas))[::-1], device=None)
        self.num_inference_steps = None

    def _fold_options_into_config(self) -> None:
        """Make the config say the process in terms that every diffusers scheduler understands."""
        config, changes = self.config, {}
        # written by multistep schedulers, which have no variance
        if config.variance_type is None:
            changes["variance_type"] = "fixed_small"
        if config.rescale_betas_by_steps:
            if config.beta_schedule != "linear" or config.trained_betas is not None:
                raise ValueError("rescale_betas_by_steps applies to beta_schedule 'linear' without trained_betas only")
            scale = 1000 / config.num_train_timesteps
            if config.beta_end * scale >= 1:
                raise ValueError(
                    f"num_train_timesteps={config.num_train_timesteps} is too small for the linear schedule rescaled "
                    f"by 1000/T: its last beta would be {config.beta_end * scale:.3g}, and must stay below 1; use "
                    f"{math.floor(1000 * config.beta_end) + 1} steps or more"
                )
            changes |= {"beta_start": config.beta_start * scale, "beta_end": config.beta_end * scale}
            changes["rescale_betas_by_steps"] = False
        if "_use_default_values" in config:
            changes["_use_default_values"] = sorted(set(config["_use_default_values"]) - PROCESS_ARGUMENTS)
        self.register_to_config(**changes)

    def _say_to_stock_solvers(self, alpha_bar: Tensor) -> None:
        """Put into the config what stock solvers need besides: betas without a name, sigma_max."""
        config, changes = self.config, {}
        if config.beta_schedule in UNKNOWN_TO_DIFFUSERS and config.trained_betas is None:
            changes["trained_betas"] = beta_table(
                config.beta_schedule, config.num_train_timesteps, config.beta_start, config.beta_end
            ).tolist()
        if config.sigma_max is None and alpha_bar[-1] < 1 / (1 + HIGHEST_SIGMA**2):
            changes["sigma_max"] = HIGHEST_SIGMA
        if config.sigma_max is not None and not config.sigma_max > 0:
            raise ValueError(f"sigma_max must be above 0, or None, not {config.sigma_max!r}")
        self.register_to_config(**changes)

    def _checked_betas(self) -> Tensor:
        config = self.config
        if config.trained_betas is not None:
            betas = torch.as_tensor(np.asarray(config.trained_betas, dtype=np.float64))
            if betas.ndim != 1 or len(betas) != config.num_train_timesteps:
                self.register_to_config(num_train_timesteps=betas.numel())
        else:
            steps = config.num_train_timesteps
            if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
                raise ValueError(f"num_train_timesteps must be a whole number of at least 1, not {steps!r}")
            betas = beta_table(config.beta_schedule, steps, config.beta_start, config.beta_end)
        alpha_bar = torch.cumprod(torch.cat([torch.ones(1).double(), 1 - betas.flatten()]), dim=0)
        # where alpha_bar stands still or is 0 too early, by rounding too, a step would divide by 0
        falls = (alpha_bar.diff() < 0).all() and (alpha_bar[:-1] > 0).all() and alpha_bar[-1] >= 0
        if betas.ndim != 1 or not falls:
            source = "trained_betas" if config.trained_betas is not None else f"beta_schedule {config.beta_schedule!r}"
            raise ValueError(
                f"{source} gives betas between {betas.min().item():.3g} and {betas.max().item():.3g}; they must be "
                "one list of numbers between 0 and 1, of which only the last may be 1, with signal left before it"
            )
        return betas

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | str | None = None,
    ) -> None:
        """Choose the timesteps of the next run.

        num_inference_steps: a count N, spread by `timestep_spacing`. "leading" takes the first
            timestep of each of N equal sections of the training steps, "trailing" the last, and
            "linspace" N equally spaced ones from T - 1 to 0. Where N does not divide T, "leading"
            spreads over all of T; the stock schedulers stop at N * (T // N).
        timesteps: instead a descending list, or "10,10,5" or "ddim25" (see `space_timesteps`).

        Raises ValueError for more steps than T, and for a list that does not descend within T.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("pass either num_inference_steps or timesteps, and not both")
        total = self.config.num_train_timesteps
        if isinstance(timesteps, str):
            chosen = np.array(space_timesteps(total, timesteps)[::-1])
        elif timesteps is not None:
            chosen = np.asarray(timesteps.cpu() if isinstance(timesteps, Tensor) else timesteps)
        else:
            chosen = self._spaced(num_inference_steps)
        is_list = chosen.ndim == 1 and len(chosen) > 0 and (chosen == chosen.astype(np.int64)).all()
        if not is_list or (np.diff(chosen) >= 0).any():
            raise ValueError(f"timesteps must be whole numbers in strictly descending order, not {timesteps!r}")
        if chosen[0] >= total or chosen[-1] < 0:
            raise ValueError(f"timesteps must lie between 0 and {total - 1}, not between {chosen[-1]} and {chosen[0]}")
        self._start(chosen, device)
        self.num_inference_steps = len(chosen)

    def _spaced(self, count: int) -> np.ndarray:
        total, spacing = self.config.num_train_timesteps, self.config.timestep_spacing
        if not isinstance(count, (int, np.integer)) or not 1 <= count <= total:
            raise ValueError(f"num_inference_steps must be between 1 and num_train_timesteps={total}, not {count!r}")
        if spacing == "leading":
            # The offset of a full-length run would leave the table, which stock schedulers index
            # without a check.
            ascending = np.arange(count) * total // count
            return (ascending + min(self.config.steps_offset, total - 1 - ascending[-1]))[::-1]
        if spacing == "trailing":
            return np.round(np.arange(count, 0, -1) * (total / count)).astype(np.int64) - 1
        return np.linspace(total - 1, 0, count).round().astype(np.int64)

    def _start(self, chosen: np.ndarray, device: str | torch.device | None) -> None:
        t = torch.from_numpy(chosen.astype(np.int64))  # (N,)
        s = torch.cat([t[1:], t.new_tensor([-1])])  # (N,)
        following = torch.full((len(self),), NOT_IN_RUN)
        following[t] = s
        levels = self._levels.on(t.device)
        self._run = Run(
            timesteps=t.to(device),
            place={t: i for i, t in enumerate(t.tolist())},
            following=DeviceTable(following),
            alpha_bar_t=levels[t + 1].tolist(),
            alpha_bar_s=levels[s + 1].tolist(),
        )
        self.timesteps = self._run.timesteps

    def index_for_timestep(self, timestep: int | Tensor) -> int:
        """The place of a timestep in the run; raises ValueError for one that is not there."""
        run = self._run
        if isinstance(timestep, Tensor) and timestep.device.type != "cpu" and timestep.ndim == 0:
            # An entry of our own list is known by where it lies: its value would be the only thing
            # in a step that the host waits for.
            if timestep.untyped_storage().data_ptr() == run.timesteps.untyped_storage().data_ptr():
                return timestep.storage_offset()
        place = run.place.get(int(timestep))
        if place is None:
            head = ", ".join(str(t) for t in list(run.place)[:4])
            raise ValueError(
                f"timestep {int(timestep)} is not one of this run's {len(run.place)} timesteps ({head}, ...); pass an "
                "entry of scheduler.timesteps, or choose them by set_timesteps"
            )
        return place

    def previous_timestep(self, timestep: int | Tensor) -> int | Tensor:
        """The timestep that follows in the run (less noise); -1, clean data, after the last."""
        following = self._run.following
        if not isinstance(timestep, Tensor):
            self.index_for_timestep(timestep)
            return int(following.on(torch.device("cpu"))[timestep])
        previous = following.on(timestep.device)[timestep]
        if timestep.device.type == "cpu" and (previous == NOT_IN_RUN).any():
            # raises the error that names it
            self.index_for_timestep(timestep[previous == NOT_IN_RUN].flatten()[0])
        return previous

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """The sample itself: the network of this process takes x_t as it is."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: int | Tensor) -> Tensor:
        """Draw x_t ~ q(x_t | x_0) with the given unit noise, Eq. 4 of DDPM."""
        alpha_bar = self._alpha_bar_at(timesteps, original_samples, noise)
        return _blend(alpha_bar.sqrt(), original_samples, (1 - alpha_bar).sqrt(), noise)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: int | Tensor) -> Tensor:
        """v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x_0, appendix D of arXiv:2202.00512."""
        alpha_bar = self._alpha_bar_at(timesteps, sample, noise)
        return _blend(alpha_bar.sqrt(), noise, -(1 - alpha_bar).sqrt(), sample)

    def posterior(self, x_0: Tensor, x_t: Tensor, t: int | Tensor, s: int | Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance (B, 1, ..., 1) of q(x_s | x_t, x_0) for s < t.

        Eqs. 6-7 of DDPM for s = t - 1.
        """
        alpha_bar_t, alpha_bar_s = self._alpha_bar_at(t, x_0, x_t), self._alpha_bar_at(s, x_0, low=-1)
        on_x_0, on_x_t = _posterior_mean(alpha_bar_t, alpha_bar_s)
        return _blend(on_x_0, x_0, on_x_t, x_t), _posterior_variance(alpha_bar_t, alpha_bar_s).to(x_0.dtype)

    def predict_x_0(self, model_output: Tensor, t: int | Tensor, x_t: Tensor, clip: bool | None = None) -> Tensor:
        """x_0 from the network's output (B, C or 2C, ...); `clip` overrides `clip_sample`."""
        output, _ = self._split(model_output, x_t)
        s = self.previous_timestep(t) if self.config.prediction_type == "previous_mean" else -1
        alpha_bar_t, alpha_bar_s = self._alpha_bar_at(t, x_t, output), self._alpha_bar_at(s, x_t, low=-1)
        on_x_t, on_output = self._x_0_coefficients(alpha_bar_t, alpha_bar_s)
        return self._clip(_blend(on_x_t, x_t, on_output, output), clip)

    def predict_noise(self, x_0: Tensor, t: int | Tensor, x_t: Tensor) -> Tensor:
        """The noise between x_0 and x_t, (x_t - sqrt(alpha_bar) x_0) / sqrt(1 - alpha_bar)."""
        alpha_bar = self._alpha_bar_at(t, x_0, x_t)
        sigma = (1 - alpha_bar).sqrt()
        return _blend(1 / sigma, x_t, -alpha_bar.sqrt() / sigma, x_0)

    def posterior_log_variance_clipped(self, t: int | Tensor) -> Tensor:
        """log of the posterior variance, float64 like t; the last step repeats the last but one."""
        t = torch.as_tensor(t)
        like = torch.empty(t.shape, device=t.device)
        s = torch.as_tensor(self.previous_timestep(t))
        variance = _posterior_variance(self._alpha_bar_at(t, like), self._alpha_bar_at(s, like, low=-1))
        return torch.where(s == -1, torch.full_like(variance, self._run.last_variance), variance).log()

    def p_mean_variance(
        self, model_output: Tensor, t: int | Tensor, x_t: Tensor, clip: bool | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(mean, variance, log variance, x_0) of p(x_s | x_t), each like x_t, for t of the run.

        At the last step of "fixed_small" the variance is 0, and the log variance repeats the last
        but one, as in improved DDPM.
        """
        t = torch.as_tensor(t, device=x_t.device)
        s = self.previous_timestep(t)
        output, values = self._split(model_output, x_t)
        alpha_bar_t, alpha_bar_s = self._alpha_bar_at(t, x_t, output), self._alpha_bar_at(s, x_t, low=-1)
        x_0 = self.predict_x_0(model_output, t, x_t, clip)
        on_x_0, on_x_t = _posterior_mean(alpha_bar_t, alpha_bar_s)
        mean = output if self.config.prediction_type == "previous_mean" else _blend(on_x_0, x_0, on_x_t, x_t)
        small = self.posterior_log_variance_clipped(t).reshape(alpha_bar_t.shape)
        beta = 1 - alpha_bar_t / alpha_bar_s
        if values is not None:
            log_variance = self._learned_log_variance(values, small, beta.log())
            return mean, log_variance.exp(), log_variance, x_0
        if self.config.variance_type == "fixed_small":
            variance, log_variance = _posterior_variance(alpha_bar_t, alpha_bar_s), small
        else:
            is_last = (s == -1).reshape(alpha_bar_t.shape)
            variance = torch.where(is_last, torch.full_like(beta, self._run.last_variance), beta)
            log_variance = variance.log()
        shape, dtype = x_t.shape, x_t.dtype
        return mean, variance.to(dtype).expand(shape), log_variance.to(dtype).expand(shape), x_0

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
        gradient: Tensor | None = None,
    ) -> GaussianSchedulerOutput | tuple[Tensor, Tensor]:
        """Draw x_s = mean(x_0, x_t) + sigma * noise from x_t, Eq. 7 and Algorithm 2 of DDPM.

        s is the timestep that follows in the run. The last step adds no noise.

        model_output: (B, C, ...), or (B, 2C, ...) with a learned variance.
        sample: x_t (B, C, ...).
        variance_noise: unit noise of the sample's shape instead of a generator's.
        gradient: of log p(y | x_t) by x_t, which shifts x_s, see `guidance_weight`. The returned
            x_0 is the unguided one.

        Raises ValueError for a timestep that is not of the run and for shapes that do not match.
        """
        i = self.index_for_timestep(timestep)
        alpha_bar_t, alpha_bar_s = self._run.alpha_bar_t[i], self._run.alpha_bar_s[i]
        output, values = self._split(model_output, sample)
        x_0 = self._step_x_0(output, sample, alpha_bar_t, alpha_bar_s)
        if alpha_bar_s < 1:
            sigma = _sqrt(self._fixed_variance(i)) if values is None else (0.5 * self._log_variance(i, values)).exp()
            noise = _noise(sample, generator, variance_noise)
            # Noise drawn here becomes x_s in place: on a CPU a fresh tensor costs more than the
            # arithmetic on it.
            x_s = noise.mul_(sigma) if variance_noise is None else noise * sigma
        else:
            x_s = torch.zeros_like(sample)
        if self.config.prediction_type == "previous_mean":
            # the network gives the mean itself; clipping x_0 does not touch it
            x_s.add_(output)
        else:
            on_x_0, on_x_t = _posterior_mean(alpha_bar_t, alpha_bar_s)
            x_s.add_(x_0, alpha=on_x_0).add_(sample, alpha=on_x_t)
        if gradient is not None:
            x_s = x_s + self.guidance_weight(model_output, timestep, sample) * _same_shape(gradient, sample)
        return GaussianSchedulerOutput(prev_sample=x_s, pred_original_sample=x_0) if return_dict else (x_s, x_0)

    def guidance_weight(self, model_output: Tensor, timestep: int | Tensor, sample: Tensor) -> Tensor | float:
        """The variance of x_s, by which a gradient shifts it: Algorithm 1 of arXiv:2105.05233.

        A number, or a tensor of the sample's shape with a learned variance. Arguments as in `step`.
        """
        i = self.index_for_timestep(timestep)
        _, values = self._split(model_output, sample)
        return self._fixed_variance(i) if values is None else self._log_variance(i, values).exp()

    def _fixed_variance(self, i: int) -> float:
        alpha_bar_t, alpha_bar_s = self._run.alpha_bar_t[i], self._run.alpha_bar_s[i]
        if self.config.variance_type != "fixed_large":
            return _posterior_variance(alpha_bar_t, alpha_bar_s)
        return 1 - alpha_bar_t / alpha_bar_s if alpha_bar_s < 1 else self._run.last_variance

    def _log_variance(self, i: int, values: Tensor) -> Tensor:
        alpha_bar_t, alpha_bar_s = self._run.alpha_bar_t[i], self._run.alpha_bar_s[i]
        small = _posterior_variance(alpha_bar_t, alpha_bar_s) if alpha_bar_s < 1 else self._run.last_variance
        return self._learned_log_variance(values, math.log(small), math.log(1 - alpha_bar_t / alpha_bar_s))

    def _learned_log_variance(self, values: Tensor, small: Level, large: Level) -> Tensor:
        """What the network asks for: itself, or between the two bounds, Eq. 15 of improved DDPM."""
        if self.config.variance_type == "learned":
            return values
        fraction = (values + 1) / 2
        if isinstance(small, Tensor):
            small, large = small.to(values.dtype), large.to(values.dtype)
        return fraction * large + (1 - fraction) * small

    def _x_0_coefficients(self, alpha_bar_t: Level, alpha_bar_s: Level) -> tuple[Level, Level]:
        """(a, b) of x_0 = a * x_t + b * output for the configured prediction type."""
        match self.config.prediction_type:
            case "epsilon":
                return 1 / _sqrt(alpha_bar_t), -_sqrt((1 - alpha_bar_t) / alpha_bar_t)
            case "sample":
                return 0 * alpha_bar_t, 0 * alpha_bar_t + 1
            case "v_prediction":
                return _sqrt(alpha_bar_t), -_sqrt(1 - alpha_bar_t)
        on_x_0, on_x_t = _posterior_mean(alpha_bar_t, alpha_bar_s)
        return -on_x_t / on_x_0, 1 / on_x_0

    def _step_x_0(self, output: Tensor, x_t: Tensor, alpha_bar_t: float, alpha_bar_s: float) -> Tensor:
        if self.config.prediction_type == "sample":
            return self._clip(output, None)
        on_x_t, on_output = self._x_0_coefficients(alpha_bar_t, alpha_bar_s)
        x_0 = (x_t * on_x_t).add_(output, alpha=on_output)
        if self.config.clip_sample and not self.config.thresholding:
            # in place: a fresh tensor costs more than the clamp
            return x_0.clamp_(-self.config.clip_sample_range, self.config.clip_sample_range)
        return self._clip(x_0, None)

    def _clip(self, x_0: Tensor, clip: bool | None) -> Tensor:
        config = self.config
        if clip is None and config.thresholding:
            return self._dynamic_threshold(x_0)
        if config.clip_sample if clip is None else clip:
            return x_0.clamp(-config.clip_sample_range, config.clip_sample_range)
        return x_0

    def _dynamic_threshold(self, x_0: Tensor) -> Tensor:
        """Scale samples whose quantile of |x_0| exceeds 1 back to it, section 2.3 of Imagen."""
        # quantile has no half precision
        wide = x_0.float() if x_0.dtype in (torch.float16, torch.bfloat16) else x_0
        bound = torch.quantile(wide.abs().flatten(1), self.config.dynamic_thresholding_ratio, dim=1)
        bound = bound.clamp(1, max(1, self.config.sample_max_value)).reshape(-1, *[1] * (x_0.ndim - 1))
        return (wide.clamp(-bound, bound) / bound).to(x_0.dtype)

    def _split(self, model_output: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor | None]:
        """The prediction and, with a learned variance, the values that follow it in dimension 1."""
        is_learned, shape = self.config.variance_type in LEARNED, x_t.shape
        if is_learned and x_t.ndim > 1:
            shape = torch.Size([shape[0], 2 * shape[1], *shape[2:]])
        if model_output.shape != shape or (is_learned and x_t.ndim < 2):
            wanted = "twice as many channels as the sample" if is_learned else "the sample's shape"
            raise ValueError(
                f"model_output has shape {tuple(model_output.shape)} and sample {tuple(x_t.shape)}, but variance_type "
                f"{self.config.variance_type!r} needs a model_output of {wanted}"
            )
        return model_output.chunk(2, dim=1) if is_learned else (model_output, None)

    def _alpha_bar_at(self, t: int | Tensor, like: Tensor, other: Tensor | None = None, low: int = 0) -> Tensor:
        """alpha_bar of each t in float64, to broadcast over `like`, whose shape `other` must have.

        The values of t are looked at on the CPU only: elsewhere the host would wait for the device.
        """
        if other is not None and other.shape != like.shape:
            raise ValueError(
                f"the shapes {tuple(like.shape)} and {tuple(other.shape)} of the two tensors differ; they must be the "
                "same"
            )
        t = torch.as_tensor(t)
        if t.ndim > 1 or (t.ndim == 1 and like.ndim > 0 and t.shape[0] not in (1, like.shape[0])):
            raise ValueError(
                f"timesteps have shape {tuple(t.shape)}; for samples {tuple(like.shape)} give one number or one per "
                "sample"
            )
        is_seen = t.device.type == "cpu" and t.numel() > 0
        if t.is_floating_point() or (is_seen and not low <= int(t.min()) <= int(t.max()) < len(self)):
            raise ValueError(f"timesteps must be whole numbers between {low} and {len(self) - 1}, not {t.tolist()}")
        # a single number, which is on the CPU nearly always, indexes from the host
        index = int(t) if is_seen and t.ndim == 0 else t.to(like.device)
        values = self._levels.on(like.device)[index + 1]
        return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))


def _sqrt(x: Level) -> Level:
    return x.sqrt() if isinstance(x, Tensor) else math.sqrt(x)


def _blend(a: Tensor, x: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return a.to(x.dtype) * x + b.to(y.dtype) * y


def _posterior_mean(alpha_bar_t: Level, alpha_bar_s: Level) -> tuple[Level, Level]:
    """Weights of x_0 and x_t in the mean of q(x_s | x_t, x_0), Eq. 7 of DDPM."""
    alpha = alpha_bar_t / alpha_bar_s  # signal kept between s and t
    on_x_0 = _sqrt(alpha_bar_s) * (1 - alpha) / (1 - alpha_bar_t)
    on_x_t = _sqrt(alpha) * (1 - alpha_bar_s) / (1 - alpha_bar_t)
    return on_x_0, on_x_t


def _posterior_variance(alpha_bar_t: Level, alpha_bar_s: Level) -> Level:
    """Variance of q(x_s | x_t, x_0), Eq. 7 of DDPM."""
    return (1 - alpha_bar_t / alpha_bar_s) * (1 - alpha_bar_s) / (1 - alpha_bar_t)


def _same_shape(gradient: Tensor, sample: Tensor) -> Tensor:
    if gradient.shape != sample.shape:
        raise ValueError(f"gradient has shape {tuple(gradient.shape)}; it must be the sample's, {tuple(sample.shape)}")
    return gradient


def _noise(like: Tensor, generator: Generators, given: Tensor | None) -> Tensor:
    if given is None:
        return randn_tensor(like.shape, generator=generator, device=like.device, dtype=like.dtype)
    if generator is not None:
        raise ValueError("pass either generator or variance_noise, and not both")
    if given.shape != like.shape:
        raise ValueError(
            f"variance_noise has shape {tuple(given.shape)}; it must be the sample's, {tuple(like.shape)}"
        )
    return given


class LinearDDPMScheduler(GaussianScheduler, SchedulerMixin):
    """Ancestral sampling (DDPM) on any schedule; train_ddpm makes it with "squaredcos_cap_v2".

    The name tells the default of `beta_schedule`. Arguments carry diffusers' names and meanings, so
    that `from_config` exchanges this scheduler with a stock one. Values of our own:

    prediction_type: also "previous_mean", the mean of p(x_s | x_t).
    variance_type: "learned" and "learned_range" take 2C channels.
    timestep_spacing: see `set_timesteps`.
    rescale_betas_by_steps: multiply beta_start and beta_end by 1000 / T, once; the config then
        holds the products.
    sigma_max: where stock solvers with use_karras_sigmas or use_exponential_sigmas start; None is
        80, or the schedule's own where that is lower. Our own schedulers do not use it.

    Raises ValueError for a value outside what is allowed.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        variance_type: str | None = "fixed_small",
        clip_sample: bool = True,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        rescale_betas_by_steps: bool = False,
        sigma_max: float | None = None,
    ):
        self._build()


class CosineDDPMScheduler(GaussianScheduler, SchedulerMixin):
    """LinearDDPMScheduler with another default: the cosine schedule of improved DDPM."""

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "squaredcos_cap_v2",
        trained_betas: np.ndarray | list[float] | None = None,
        variance_type: str | None = "fixed_small",
        clip_sample: bool = True,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        rescale_betas_by_steps: bool = False,
        sigma_max: float | None = None,
    ):
        self._build()


class DDIMEtaScheduler(GaussianScheduler, SchedulerMixin):
    """DDIM with `eta` from 0 (deterministic) to 1 (the variance of "fixed_small" DDPM).

    Arguments as for LinearDDPMScheduler, and `eta`, which `step` takes, too. Where x_0 is clipped,
    the noise is derived anew from it. The last step ends at clean data: stock DDIM's
    `set_alpha_to_one` has no counterpart, since with False it would stop at alpha_bar[0].
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        variance_type: str | None = "fixed_small",
        clip_sample: bool = True,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        rescale_betas_by_steps: bool = False,
        sigma_max: float | None = None,
        eta: float = 0.0,
    ):
        self._checked_eta(eta)
        self._build()

    def _checked_eta(self, eta: float | None) -> float:
        eta = self.config.eta if eta is None else eta
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must be between 0 and 1, not {eta!r}")
        return eta

    def is_deterministic(self, eta: float | None = None) -> bool:
        """Whether `step` draws no noise with this `eta`, None being the configured one."""
        return self._checked_eta(eta) == 0

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float | None = None,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
        gradient: Tensor | None = None,
    ) -> GaussianSchedulerOutput | tuple[Tensor, Tensor]:
        """x_s from x_t for the timestep s that follows in the run, Eqs. 12 and 16 of DDIM.

        Arguments and errors as in LinearDDPMScheduler.step, but for these: `eta` overrides the
        configured one, and the variance half of a 2C-channel output is not used.

        gradient: of log p(y | x_t), shifts the predicted noise by -sqrt(1 - alpha_bar) * gradient,
            Algorithm 2 of arXiv:2105.05233. The returned x_0 shifts, too, and is not clipped again.
        """
        i, eta = self.index_for_timestep(timestep), self._checked_eta(eta)
        alpha_bar_t, alpha_bar_s = self._run.alpha_bar_t[i], self._run.alpha_bar_s[i]
        output, _ = self._split(model_output, sample)
        x_0 = self._step_x_0(output, sample, alpha_bar_t, alpha_bar_s)
        variance = eta**2 * _posterior_variance(alpha_bar_t, alpha_bar_s)  # Eq. 16
        on_x_0, on_x_t = _ddim_mean(alpha_bar_t, alpha_bar_s, variance)
        x_s = (x_0 * on_x_0).add_(sample, alpha=on_x_t)
        if variance > 0:
            x_s.add_(_noise(sample, generator, variance_noise), alpha=math.sqrt(variance))
        if gradient is not None:
            weight = self.guidance_weight(model_output, timestep, sample, eta)
            x_s.add_(_same_shape(gradient, sample), alpha=weight)
            x_0 = torch.add(x_0, gradient, alpha=(1 - alpha_bar_t) / math.sqrt(alpha_bar_t))
        return GaussianSchedulerOutput(prev_sample=x_s, pred_original_sample=x_0) if return_dict else (x_s, x_0)

    def guidance_weight(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, eta: float | None = None
    ) -> float:
        """The factor of a gradient in x_s, which follows from its shift of the noise.

        Raises ValueError at zero signal (alpha_bar = 0), where x_0 would shift without bound.
        """
        i, eta = self.index_for_timestep(timestep), self._checked_eta(eta)
        alpha_bar_t, alpha_bar_s = self._run.alpha_bar_t[i], self._run.alpha_bar_s[i]
        if alpha_bar_t == 0:
            raise ValueError(
                f"timestep {int(timestep)} has no signal (alpha_bar is 0), so its noise cannot be guided; leave its "
                "gradient out"
            )
        kept = max(1 - alpha_bar_s - eta**2 * _posterior_variance(alpha_bar_t, alpha_bar_s), 0.0)
        on_noise = math.sqrt(kept) - math.sqrt(alpha_bar_s) * math.sqrt((1 - alpha_bar_t) / alpha_bar_t)
        return -math.sqrt(1 - alpha_bar_t) * on_noise

    def inverse_step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> GaussianSchedulerOutput | tuple[Tensor, Tensor]:
        """DDIM inversion: from x_t to the next noisier timestep of the run, with eta 0.

        Walk `timesteps` from the end. From the noisiest timestep it goes to alpha_bar = 0, where
        the sample is the predicted noise. Shapes and errors as in `step`.
        """
        i = self.index_for_timestep(timestep)
        alpha_bar_t, alpha_bar_s = self._run.alpha_bar_t[i], self._run.alpha_bar_s[i]
        output, _ = self._split(model_output, sample)
        x_0 = self._step_x_0(output, sample, alpha_bar_t, alpha_bar_s)
        on_x_0, on_x_t = _ddim_mean(alpha_bar_t, self._run.alpha_bar_t[i - 1] if i > 0 else 0.0, variance=0.0)
        x_next = (x_0 * on_x_0).add_(sample, alpha=on_x_t)
        return GaussianSchedulerOutput(prev_sample=x_next, pred_original_sample=x_0) if return_dict else (x_next, x_0)


class ImprovedPNDMScheduler(GaussianScheduler, SchedulerMixin):
    """DDIM steps along a noise extrapolated from up to four predictions, one call a step (iPNDM).

    PNDM: Liu et al. 2022, arXiv:2202.09778; without its warm-up: Zhang and Chen 2022,
    arXiv:2204.13902. Arguments as for LinearDDPMScheduler. diffusers' IPNDMScheduler has noise
    levels of its own whatever the config says, which a network of this process does not know.
    """

    # Of the newest prediction first: Adams-Bashforth of orders 1 to 4.
    WEIGHTS = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        variance_type: str | None = "fixed_small",
        clip_sample: bool = True,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        rescale_betas_by_steps: bool = False,
        sigma_max: float | None = None,
    ):
        self._build()

    def is_deterministic(self, eta: float | None = None) -> bool:
        """Always: nothing is drawn."""
        return True

    def _start(self, chosen: np.ndarray, device: str | torch.device | None) -> None:
        super()._start(chosen, device)
        self._noises: list[Tensor] = []  # of the run's last steps, the newest first

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> GaussianSchedulerOutput | tuple[Tensor, Tensor]:
        """x_s from x_t for the timestep s that follows; the timesteps of a run come in their order.

        The first step starts a run anew. Nothing is drawn, so a generator has no effect. Errors as
        in LinearDDPMScheduler.step.
        """
        i = self.index_for_timestep(timestep)
        alpha_bar_t, alpha_bar_s = self._run.alpha_bar_t[i], self._run.alpha_bar_s[i]
        output, _ = self._split(model_output, sample)
        x_0 = self._step_x_0(output, sample, alpha_bar_t, alpha_bar_s)
        noise = (sample - math.sqrt(alpha_bar_t) * x_0) / math.sqrt(1 - alpha_bar_t)
        self._noises = [noise, *(self._noises[:3] if i > 0 else [])]
        weights = self.WEIGHTS[len(self._noises) - 1]
        mean_noise = sum(weight * noise for weight, noise in zip(weights, self._noises))
        # x_s = sqrt(alpha_bar_s / alpha_bar_t) x_t + (...) mean_noise, written without a division
        # by alpha_bar_t, which may be 0 at the first step
        on_change = math.sqrt(1 - alpha_bar_s)
        if len(self._noises) > 1:
            on_change -= math.sqrt(alpha_bar_s * (1 - alpha_bar_t) / alpha_bar_t)
        x_s = math.sqrt(alpha_bar_s) * x_0 + math.sqrt(1 - alpha_bar_s) * noise + on_change * (mean_noise - noise)
        return GaussianSchedulerOutput(prev_sample=x_s, pred_original_sample=x_0) if return_dict else (x_s, x_0)


def _ddim_mean(alpha_bar_t: float, alpha_bar_s: float, variance: float) -> tuple[float, float]:
    """Weights of x_0 and x_t in Eq. 12 of DDIM.

    sqrt(alpha_bar_s) x_0 + sqrt(1 - alpha_bar_s - variance) noise, the noise being that between x_0
    and x_t, (x_t - sqrt(alpha_bar_t) x_0) / sqrt(1 - alpha_bar_t).
    """
    # The radicand is 0 in exact arithmetic for eta = 1 at the largest t, and may round below it.
    on_x_t = math.sqrt(max(1 - alpha_bar_s - variance, 0.0) / (1 - alpha_bar_t))
    return math.sqrt(alpha_bar_s) - math.sqrt(alpha_bar_t) * on_x_t, on_x_t
