"""Gaussian diffusion in discrete time: ancestral sampling (DDPM) and DDIM with eta, on linear and cosine schedules.

Papers: DDPM (Ho et al. 2020, arXiv:2006.11239), improved DDPM (Nichol & Dhariwal 2021, arXiv:2102.09672), DDIM (Song et al. 2020, arXiv:2010.02502),
progressive distillation for v (Salimans & Ho 2022, arXiv:2202.00512), zero terminal SNR (Lin et al. 2023, arXiv:2305.08891),
guidance by a gradient (Dhariwal & Nichol 2021, arXiv:2105.05233, section 4).

Index convention: `t` counts from 0 (least noise) to T - 1, and t = -1 stands for clean data wherever a "previous timestep" `s` is meant.
`alpha_bar` is the product of (1 - beta); every coefficient is derived from it in float64 and cast when it is applied.
A run over fewer steps is a diffusion process of its own: its betas follow from the kept timesteps (s, t) as 1 - alpha_bar[t] / alpha_bar[s].
"""

import math
from dataclasses import dataclass

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
# Values that define the process. Left at their defaults, `from_config` of another class would replace them by that class's own defaults.
PROCESS_ARGUMENTS = {
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
}


@dataclass
class GaussianSchedulerOutput(BaseOutput):
    """The sample at the next timestep of the run, and the prediction of x_0 (clipped as configured) that led to it."""

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


def beta_table(schedule: str, num_train_timesteps: int, beta_start: float, beta_end: float) -> Tensor:
    """The betas of a named schedule, float64 of shape (T,); the cosine schedule is Eq. 17 of improved DDPM, capped at 0.999."""
    steps = num_train_timesteps
    if schedule == "linear":
        betas = np.linspace(beta_start, beta_end, steps, dtype=np.float64)
    elif schedule == "scaled_linear":
        betas = np.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=np.float64) ** 2
    elif schedule == "squaredcos_cap_v2":
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
    """Shift and scale sqrt(alpha_bar) so that it ends at exactly 0 and starts where it was (Algorithm 1 of arXiv:2305.08891)."""
    root = alpha_bar.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def space_timesteps(num_train_timesteps: int, sections: str | list[int]) -> list[int]:
    """The timesteps that improved DDPM keeps, ascending: "10,10,5" takes so many from equal sections, "ddimN" every k-th.

    Within a section the stride is added up in float64 and rounded half to even, as in OpenAI's respacing, because
    `round(i * stride)` differs from it for hundreds of step counts. Raises ValueError where no such choice exists.
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


class GaussianScheduler(SchedulerMixin, ConfigMixin):
    """What the three schedulers of this file share: tables, timesteps, the forward process, and the reverse distribution.

    Shapes: samples are (B, ...) of any rank; `t` and `s` are an int or int64 tensors of shape () or (B,).
    """

    _compatibles = [
        "DDIMScheduler",
        "DDPMScheduler",
        "DEISMultistepScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "EulerAncestralDiscreteScheduler",
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "LMSDiscreteScheduler",
        "PNDMScheduler",
        "UniPCMultistepScheduler",
    ]
    order = 1
    init_noise_sigma = 1.0

    # --- construction ---------------------------------------------------------------------------------------------------

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
            if config.prediction_type in ("epsilon", "previous_mean"):
                raise ValueError(
                    f"rescale_betas_zero_snr needs prediction_type 'v_prediction' or 'sample', not {config.prediction_type!r}: "
                    "at zero SNR the input holds no x_0 that could be recovered from a predicted noise"
                )
            alpha_bar = rescale_to_zero_terminal_snr(alpha_bar)
            betas = 1 - alpha_bar / torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
        self.betas, self.alpha_bar = betas, alpha_bar
        self.alphas_cumprod = alpha_bar.float()  # under the name and in the dtype that stock diffusers code reads
        self._levels = {}  # device -> (T + 1,) alpha_bar with the level of clean data in front
        self._set_timesteps(np.arange(len(betas))[::-1], device=None)
        self.num_inference_steps = None

    def _fold_options_into_config(self) -> None:
        """Make the config say the process in terms that every diffusers scheduler understands, also at default values."""
        config, changes = self.config, {}
        if config.variance_type is None:  # written by multistep schedulers, which have no variance
            changes["variance_type"] = "fixed_small"
        if config.rescale_betas_by_steps:
            if config.beta_schedule != "linear" or config.trained_betas is not None:
                raise ValueError("rescale_betas_by_steps applies to beta_schedule 'linear' without trained_betas only")
            scale = 1000 / config.num_train_timesteps
            if config.beta_end * scale >= 1:
                raise ValueError(
                    f"num_train_timesteps={config.num_train_timesteps} is too small for the linear schedule rescaled by 1000/T: "
                    f"its last beta would be {config.beta_end * scale:.3g}, and must stay below 1; use "
                    f"{math.floor(1000 * config.beta_end) + 1} steps or more"
                )
            changes |= {"beta_start": config.beta_start * scale, "beta_end": config.beta_end * scale}
            changes["rescale_betas_by_steps"] = False
        if "_use_default_values" in config:
            changes["_use_default_values"] = sorted(set(config["_use_default_values"]) - PROCESS_ARGUMENTS)
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
        inside = (betas > 0) & (betas < 1)
        if betas.ndim != 1 or not (inside[:-1].all() and 0 < betas[-1] <= 1):
            source = "trained_betas" if config.trained_betas is not None else f"beta_schedule {config.beta_schedule!r}"
            raise ValueError(
                f"{source} gives betas between {betas.min().item():.3g} and {betas.max().item():.3g}; they must be one list of numbers "
                "between 0 and 1, of which only the last may be 1"
            )
        if betas[-1] == 1 and config.prediction_type in ("epsilon", "previous_mean"):
            raise ValueError(
                f"the last beta is 1 (no signal left), so prediction_type {config.prediction_type!r} cannot give x_0 there; "
                "use 'v_prediction' or 'sample'"
            )
        return betas

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    # --- timesteps of a run ---------------------------------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | str | None = None,
    ) -> None:
        """Choose the timesteps of the next run: a count (spread by `timestep_spacing`), a descending list, or "10,10,5" / "ddim25".

        "leading" takes the first timestep of each of N equal sections of the training steps, "trailing" the last, and "linspace"
        N equally spaced ones from T - 1 to 0 (one step: T - 1). Where N does not divide T, "leading" spreads over all of T, where the stock
        schedulers stop at N * (T // N). Raises ValueError for more steps than T or a list that is not strictly descending within it.
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
        if (
            chosen.ndim != 1
            or len(chosen) == 0
            or (chosen != chosen.astype(np.int64)).any()
            or (np.diff(chosen) >= 0).any()
        ):
            raise ValueError(f"timesteps must be whole numbers in strictly descending order, not {timesteps!r}")
        if chosen[0] >= total or chosen[-1] < 0:
            raise ValueError(f"timesteps must lie between 0 and {total - 1}, not between {chosen[-1]} and {chosen[0]}")
        self._set_timesteps(chosen, device)
        self.num_inference_steps = len(chosen)

    def _spaced(self, count: int) -> np.ndarray:
        total, spacing = self.config.num_train_timesteps, self.config.timestep_spacing
        if not isinstance(count, (int, np.integer)) or not 1 <= count <= total:
            raise ValueError(f"num_inference_steps must be between 1 and num_train_timesteps={total}, not {count!r}")
        if spacing == "leading":
            # The offset of a full-length run would leave the table, which stock schedulers index without a check.
            ascending = np.arange(count) * total // count
            return (ascending + min(self.config.steps_offset, total - 1 - ascending[-1]))[::-1]
        if spacing == "trailing":
            return np.round(np.arange(count, 0, -1) * (total / count)).astype(np.int64) - 1
        return np.linspace(total - 1, 0, count).round().astype(np.int64)

    def _set_timesteps(self, chosen: np.ndarray, device: str | torch.device | None) -> None:
        descending = [int(t) for t in chosen]
        self.timesteps = torch.tensor(descending, dtype=torch.int64, device=device)
        self._index = {t: i for i, t in enumerate(descending)}
        self._previous = torch.full((self.config.num_train_timesteps,), -2)  # -2: not a timestep of this run
        self._previous[descending] = torch.tensor(descending[1:] + [-1])
        self._previous_on = {}
        t, s = torch.tensor(descending), torch.tensor(descending[1:] + [-1])
        levels = self._levels_on(torch.device("cpu"))
        alpha_bar_t, alpha_bar_s = levels[t + 1], levels[s + 1]
        self._alpha_bar_t, self._alpha_bar_s = alpha_bar_t.tolist(), alpha_bar_s.tolist()
        self._x_0_from = torch.stack(self._x_0_coefficients(alpha_bar_t, alpha_bar_s), dim=-1).tolist()
        variance, beta = _posterior_variance(alpha_bar_t, alpha_bar_s), 1 - alpha_bar_t / alpha_bar_s
        # The last step's posterior variance is 0; OpenAI's tables repeat the last but one where a logarithm is needed, and for
        # fixed_large. A run of one step has no last but one: its beta stands in.
        self._last_variance = float(variance[-2] if len(descending) > 1 else beta[-1])
        small = torch.cat([variance[:-1], variance.new_tensor([self._last_variance])])
        self._log_variance_bounds = torch.stack([small.log(), beta.log()], dim=-1).tolist()
        sigma = (variance if self.config.variance_type == "fixed_small" else beta).sqrt()
        self._ancestral = torch.stack([*_posterior_coefficients(alpha_bar_t, alpha_bar_s), sigma], dim=-1).tolist()

    def index_for_timestep(self, timestep: int | Tensor) -> int:
        """The place of a timestep in `self.timesteps`; raises ValueError for one that is not there."""
        if isinstance(timestep, Tensor) and timestep.device.type != "cpu" and _is_view(timestep, self.timesteps):
            return (
                timestep.storage_offset()
            )  # a view of our own list: reading its value would make the host wait for the device
        try:
            return self._index[int(timestep)]
        except KeyError:
            head = ", ".join(str(t) for t in list(self._index)[:4])
            raise ValueError(
                f"timestep {int(timestep)} is not one of this run's {len(self._index)} timesteps ({head}, ...); pass an entry of "
                "scheduler.timesteps, or choose them by set_timesteps"
            ) from None

    def previous_timestep(self, timestep: int | Tensor) -> int | Tensor:
        """The timestep that follows in the run (less noise); -1, clean data, after the last."""
        if not isinstance(timestep, Tensor):
            index = self.index_for_timestep(timestep) + 1
            return int(self.timesteps[index]) if index < len(self.timesteps) else -1
        device = timestep.device
        if device not in self._previous_on:
            self._previous_on[device] = self._previous.to(device)
        previous = self._previous_on[device][timestep]
        if device.type == "cpu" and (previous == -2).any():
            self.index_for_timestep(timestep[previous == -2].flatten()[0])  # raises the error that names it
        return previous

    # --- the forward process --------------------------------------------------------------------------------------------

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """The sample itself: the network of this process takes x_t as it is."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: int | Tensor) -> Tensor:
        """Draw x_t ~ q(x_t | x_0) with the given unit noise, Eq. 4 of DDPM."""
        alpha_bar = self._alpha_bar_at(timesteps, original_samples, noise)
        return _blend(alpha_bar.sqrt(), original_samples, (1 - alpha_bar).sqrt(), noise)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: int | Tensor) -> Tensor:
        """The target of v-prediction, sqrt(alpha_bar) * noise - sqrt(1 - alpha_bar) * x_0 (arXiv:2202.00512, appendix D)."""
        alpha_bar = self._alpha_bar_at(timesteps, sample, noise)
        return _blend(alpha_bar.sqrt(), noise, -(1 - alpha_bar).sqrt(), sample)

    def posterior(self, x_0: Tensor, x_t: Tensor, t: int | Tensor, s: int | Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of q(x_s | x_t, x_0) for s < t, Eqs. 6-7 of DDPM for s = t - 1; the variance has shape (B, 1, ..., 1)."""
        alpha_bar_t, alpha_bar_s = self._alpha_bar_at(t, x_0, x_t), self._alpha_bar_at(s, x_0, low=-1)
        on_x_0, on_x_t = _posterior_coefficients(alpha_bar_t, alpha_bar_s)
        return _blend(on_x_0, x_0, on_x_t, x_t), _posterior_variance(alpha_bar_t, alpha_bar_s).to(x_0.dtype)

    # --- the reverse process --------------------------------------------------------------------------------------------

    def predict_x_0(self, model_output: Tensor, t: int | Tensor, x_t: Tensor, clip: bool | None = None) -> Tensor:
        """x_0 from the network's output (B, C or 2C, ...) by `prediction_type`; `clip` overrides `clip_sample`."""
        output, _ = self._split(model_output, x_t)
        s = self.previous_timestep(t) if self.config.prediction_type == "previous_mean" else -1
        on_x_t, on_output = self._x_0_coefficients(
            self._alpha_bar_at(t, x_t, output), self._alpha_bar_at(s, x_t, low=-1)
        )
        return self._clip(_blend(on_x_t, x_t, on_output, output), clip)

    def predict_noise(self, x_0: Tensor, t: int | Tensor, x_t: Tensor) -> Tensor:
        """The noise that leads from x_0 to x_t, (x_t - sqrt(alpha_bar) * x_0) / sqrt(1 - alpha_bar)."""
        alpha_bar = self._alpha_bar_at(t, x_0, x_t)
        sigma = (1 - alpha_bar).sqrt()
        return _blend(1 / sigma, x_t, -alpha_bar.sqrt() / sigma, x_0)

    def posterior_log_variance_clipped(self, t: int | Tensor) -> Tensor:
        """log of the posterior variance for this run's timesteps, float64 of t's shape; the last step repeats the last but one."""
        t = torch.as_tensor(t)
        like = torch.empty(t.shape, device=t.device)
        s = torch.as_tensor(self.previous_timestep(t))
        variance = _posterior_variance(self._alpha_bar_at(t, like), self._alpha_bar_at(s, like, low=-1))
        return torch.where(s == -1, torch.full_like(variance, self._last_variance), variance).log()

    def p_mean_variance(
        self, model_output: Tensor, t: int | Tensor, x_t: Tensor, clip: bool | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(mean, variance, log variance, x_0) of p(x_s | x_t), each of x_t's shape; t must be timesteps of the current run.

        At the last step the log variance of "fixed_small" repeats the last but one, while the variance is 0 (as in improved DDPM).
        """
        t = torch.as_tensor(t, device=x_t.device)
        s = self.previous_timestep(t)
        output, values = self._split(model_output, x_t)
        alpha_bar_t, alpha_bar_s = self._alpha_bar_at(t, x_t, output), self._alpha_bar_at(s, x_t, low=-1)
        x_0 = self.predict_x_0(model_output, t, x_t, clip)
        on_x_0, on_x_t = _posterior_coefficients(alpha_bar_t, alpha_bar_s)
        mean = output if self.config.prediction_type == "previous_mean" else _blend(on_x_0, x_0, on_x_t, x_t)
        small = self.posterior_log_variance_clipped(t).reshape(alpha_bar_t.shape)
        beta = 1 - alpha_bar_t / alpha_bar_s
        if values is not None:
            log_variance = self._learned_log_variance(values, small, beta.log())
            return mean, log_variance.exp(), log_variance, x_0
        if self.config.variance_type == "fixed_small":
            variance, log_variance = _posterior_variance(alpha_bar_t, alpha_bar_s), small
        else:
            last = (s == -1).reshape(alpha_bar_t.shape)
            variance = torch.where(last, torch.full_like(beta, self._last_variance), beta)
            log_variance = variance.log()
        shape, dtype = x_t.shape, x_t.dtype
        return mean, variance.to(dtype).expand(shape), log_variance.to(dtype).expand(shape), x_0

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
        gradient: Tensor | None = None,
    ) -> GaussianSchedulerOutput | tuple[Tensor, Tensor]:
        """Draw x_s from p(x_s | x_t), Algorithm 2 of DDPM, for the timestep s that follows in the run; the last step adds no noise.

        model_output: (B, C, ...), or (B, 2C, ...) with a learned variance; sample: x_t (B, C, ...); variance_noise: unit noise of the sample's shape instead
        of a generator's; gradient: of log p(y | x_t) by x_t, which guides the step (see `guidance_weight`; the returned x_0 is the unguided one).
        Raises ValueError for a timestep that is not in `self.timesteps` and for shapes that do not match.
        """
        index = self.index_for_timestep(timestep)
        output, values = self._split(model_output, sample)
        x_0 = self._step_x_0(index, output, sample)
        on_x_0, on_x_t, sigma = self._ancestral[index]
        if index + 1 < len(self.timesteps):
            noise = _noise(sample, generator, variance_noise)
            if values is not None:
                sigma = (0.5 * self._learned_log_variance(values, *self._log_variance_bounds[index])).exp()
            # Noise drawn here becomes x_s in place: on a CPU a fresh tensor costs more than the arithmetic on it.
            x_s = noise.mul_(sigma) if variance_noise is None else noise * sigma
        else:
            x_s = torch.zeros_like(sample)
        if self.config.prediction_type == "previous_mean":
            x_s.add_(output)  # the network gives the mean itself; clipping x_0 does not touch it
        else:
            x_s.add_(x_0, alpha=on_x_0).add_(sample, alpha=on_x_t)
        if gradient is not None:
            x_s = x_s + self.guidance_weight(model_output, timestep, sample) * _same_shape(gradient, sample)
        return GaussianSchedulerOutput(prev_sample=x_s, pred_original_sample=x_0) if return_dict else (x_s, x_0)

    def guidance_weight(self, model_output: Tensor, timestep: int | Tensor, sample: Tensor) -> Tensor | float:
        """What a gradient of log p(y | x_t) is multiplied by in the mean of x_s: its variance, Algorithm 1 of arXiv:2105.05233.

        A number, or a tensor of the sample's shape with a learned variance. Arguments and errors as in `step`.
        """
        index = self.index_for_timestep(timestep)
        _, values = self._split(model_output, sample)
        if values is not None:
            return self._learned_log_variance(values, *self._log_variance_bounds[index]).exp()
        if self.config.variance_type == "fixed_large" and index + 1 == len(self.timesteps):
            return self._last_variance
        return self._ancestral[index][2] ** 2

    def guided_x_0(self, x_0: Tensor, t: int | Tensor, gradient: Tensor) -> Tensor:
        """x_0 for the noise prediction shifted by -sqrt(1 - alpha_bar) * gradient, Algorithm 2 of arXiv:2105.05233; it is not clipped."""
        alpha_bar = self._alpha_bar_at(t, x_0, gradient)
        return x_0 + ((1 - alpha_bar) / alpha_bar.sqrt()).to(x_0.dtype) * gradient

    def _learned_log_variance(self, values: Tensor, small: Tensor | float, large: Tensor | float) -> Tensor:
        """The log variance that the network asks for: itself, or between the two bounds, Eq. 15 of improved DDPM."""
        if self.config.variance_type == "learned":
            return values
        fraction = (values + 1) / 2
        if isinstance(small, Tensor):
            small, large = small.to(values.dtype), large.to(values.dtype)
        return fraction * large + (1 - fraction) * small

    def _x_0_coefficients(self, alpha_bar_t: Tensor, alpha_bar_s: Tensor) -> tuple[Tensor, Tensor]:
        """x_0 = a * x_t + b * output for the configured prediction type."""
        kind = self.config.prediction_type
        if kind == "epsilon":
            return alpha_bar_t.rsqrt(), -((1 - alpha_bar_t) / alpha_bar_t).sqrt()
        if kind == "sample":
            return torch.zeros_like(alpha_bar_t), torch.ones_like(alpha_bar_t)
        if kind == "v_prediction":
            return alpha_bar_t.sqrt(), -(1 - alpha_bar_t).sqrt()
        on_x_0, on_x_t = _posterior_coefficients(alpha_bar_t, alpha_bar_s)
        return -on_x_t / on_x_0, 1 / on_x_0

    def _step_x_0(self, index: int, output: Tensor, x_t: Tensor) -> Tensor:
        on_x_t, on_output = self._x_0_from[index]
        if self.config.prediction_type == "sample":
            return self._clip(output, None)
        x_0 = (x_t * on_x_t).add_(output, alpha=on_output)
        if (
            self.config.clip_sample and not self.config.thresholding
        ):  # in place: a fresh tensor costs more than the clamp
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
        """Scale each sample whose quantile of |x_0| exceeds 1 back to it (Imagen, arXiv:2205.11487, section 2.3)."""
        wide = x_0.float() if x_0.dtype in (torch.float16, torch.bfloat16) else x_0  # quantile has no half precision
        bound = torch.quantile(wide.abs().flatten(1), self.config.dynamic_thresholding_ratio, dim=1)
        bound = bound.clamp(1, max(1, self.config.sample_max_value)).reshape(-1, *[1] * (x_0.ndim - 1))
        return (wide.clamp(-bound, bound) / bound).to(x_0.dtype)

    def _split(self, model_output: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor | None]:
        """The prediction and, with a learned variance, the variance values that follow it in dimension 1."""
        if self.config.variance_type in LEARNED and _doubles(model_output.shape, x_t.shape):
            return model_output.chunk(2, dim=1)
        if model_output.shape != x_t.shape or self.config.variance_type in LEARNED:
            wanted = (
                "twice as many channels as the sample"
                if self.config.variance_type in LEARNED
                else "the sample's shape"
            )
            raise ValueError(
                f"model_output has shape {tuple(model_output.shape)} and sample {tuple(x_t.shape)}, but variance_type "
                f"{self.config.variance_type!r} needs a model_output of {wanted}"
            )
        return model_output, None

    # --- table look-ups -------------------------------------------------------------------------------------------------

    def _levels_on(self, device: torch.device) -> Tensor:
        if device not in self._levels:
            dtype = torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64
            self._levels[device] = torch.cat([self.alpha_bar.new_ones(1), self.alpha_bar]).to(device, dtype)
        return self._levels[device]

    def _alpha_bar_at(self, t: int | Tensor, like: Tensor, other: Tensor | None = None, low: int = 0) -> Tensor:
        """alpha_bar of each t in float64, shaped to broadcast against `like`; values are checked where they lie on the CPU."""
        if other is not None and other.shape != like.shape:
            raise ValueError(
                f"the shapes {tuple(like.shape)} and {tuple(other.shape)} of the two tensors differ; they must be the same"
            )
        t = torch.as_tensor(t)
        if t.ndim > 1 or (t.ndim == 1 and like.ndim > 0 and t.shape[0] not in (1, like.shape[0])):
            raise ValueError(
                f"timesteps have shape {tuple(t.shape)}; for samples {tuple(like.shape)} give one number or one per sample"
            )
        if (
            t.is_floating_point()
            or t.device.type == "cpu"
            and t.numel()
            and not low <= int(t.min()) <= int(t.max()) < len(self)
        ):
            raise ValueError(f"timesteps must be whole numbers between {low} and {len(self) - 1}, not {t.tolist()}")
        values = self._levels_on(like.device)[t.to(like.device) + 1]
        return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))


def _blend(a: Tensor, x: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return a.to(x.dtype) * x + b.to(y.dtype) * y


def _posterior_coefficients(alpha_bar_t: Tensor, alpha_bar_s: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of x_0 and x_t in the mean of q(x_s | x_t, x_0), Eq. 7 of DDPM."""
    alpha = alpha_bar_t / alpha_bar_s  # signal kept between s and t
    return alpha_bar_s.sqrt() * (1 - alpha) / (1 - alpha_bar_t), alpha.sqrt() * (1 - alpha_bar_s) / (1 - alpha_bar_t)


def _posterior_variance(alpha_bar_t: Tensor, alpha_bar_s: Tensor) -> Tensor:
    return (1 - alpha_bar_t / alpha_bar_s) * (1 - alpha_bar_s) / (1 - alpha_bar_t)


def _doubles(output: torch.Size, sample: torch.Size) -> bool:
    return (
        len(output) == len(sample) > 1
        and output[1] == 2 * sample[1]
        and output[:1] + output[2:] == sample[:1] + sample[2:]
    )


def _is_view(entry: Tensor, of: Tensor) -> bool:
    return (
        entry.ndim == 0
        and entry.dtype == of.dtype
        and entry.untyped_storage().data_ptr() == of.untyped_storage().data_ptr()
    )


def _same_shape(gradient: Tensor, sample: Tensor) -> Tensor:
    if gradient.shape != sample.shape:
        raise ValueError(f"gradient has shape {tuple(gradient.shape)}; it must be the sample's, {tuple(sample.shape)}")
    return gradient


def _noise(like: Tensor, generator: torch.Generator | list[torch.Generator] | None, given: Tensor | None) -> Tensor:
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
    """Ancestral sampling (DDPM); by default on the linear schedule.

    Arguments carry diffusers' names, so that `from_config` exchanges this scheduler with a stock one. `rescale_betas_by_steps` multiplies
    beta_start and beta_end by 1000 / T once (the config then holds the products). `prediction_type` "previous_mean" predicts the mean of
    p(x_s | x_t); `variance_type` "learned" and "learned_range" take 2C channels. Raises ValueError for any value outside what is listed.
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
    ):
        self._build()


class CosineDDPMScheduler(GaussianScheduler, SchedulerMixin):
    """Ancestral sampling (DDPM); by default on the cosine schedule of improved DDPM. Arguments as for LinearDDPMScheduler."""

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
    ):
        self._build()


class DDIMEtaScheduler(GaussianScheduler, SchedulerMixin):
    """DDIM with `eta` between 0 (deterministic) and 1 (the variance of "fixed_small" DDPM), on any of the schedules.

    Arguments as for LinearDDPMScheduler, and `eta`, which `step` takes, too. Where x_0 is clipped, the noise is derived anew from the clipped x_0.
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
        eta: float = 0.0,
    ):
        self._checked_eta(eta)
        self._build()

    def _checked_eta(self, eta: float | None) -> float:
        eta = self.config.eta if eta is None else eta
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must be between 0 and 1, not {eta!r}")
        return eta

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
        gradient: Tensor | None = None,
    ) -> GaussianSchedulerOutput | tuple[Tensor, Tensor]:
        """x_s from x_t for the timestep s that follows in the run, Eqs. 12 and 16 of DDIM; `eta` overrides the configured one.

        Shapes and errors as in LinearDDPMScheduler.step; the variance half of a 2C-channel output is not used. A `gradient` of log p(y | x_t)
        shifts the predicted noise by -sqrt(1 - alpha_bar) * gradient, and the returned x_0 with it, which is not clipped again.
        """
        index, eta = self.index_for_timestep(timestep), self._checked_eta(eta)
        output, _ = self._split(model_output, sample)
        x_0 = self._step_x_0(index, output, sample)
        alpha_bar_t, alpha_bar_s = self._alpha_bar_t[index], self._alpha_bar_s[index]
        variance = _ddim_variance(alpha_bar_t, alpha_bar_s, eta)
        x_s = _ddim_blend(x_0, sample, alpha_bar_t, alpha_bar_s, variance)
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
        """What a gradient of log p(y | x_t) is multiplied by in x_s, when it shifts the noise by Algorithm 2 of arXiv:2105.05233.

        Raises ValueError at zero signal (alpha_bar = 0), where a shift of the noise has no finite effect on x_0.
        """
        index, eta = self.index_for_timestep(timestep), self._checked_eta(eta)
        alpha_bar_t, alpha_bar_s = self._alpha_bar_t[index], self._alpha_bar_s[index]
        if alpha_bar_t == 0:
            raise ValueError(
                f"timestep {int(timestep)} has no signal (alpha_bar is 0), so its noise cannot be guided; leave its gradient out"
            )
        kept = max(1 - alpha_bar_s - _ddim_variance(alpha_bar_t, alpha_bar_s, eta), 0.0)
        on_noise = math.sqrt(kept) - math.sqrt(alpha_bar_s) * math.sqrt((1 - alpha_bar_t) / alpha_bar_t)
        return -math.sqrt(1 - alpha_bar_t) * on_noise

    def inverse_step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> GaussianSchedulerOutput | tuple[Tensor, Tensor]:
        """DDIM inversion: from x_t to the next noisier timestep of the run, deterministic (eta 0); walk `timesteps` from the end.

        From the noisiest timestep it goes to alpha_bar = 0, where the sample is the predicted noise. Shapes and errors as in `step`.
        """
        index = self.index_for_timestep(timestep)
        output, _ = self._split(model_output, sample)
        x_0 = self._step_x_0(index, output, sample)
        alpha_bar_next = self._alpha_bar_t[index - 1] if index > 0 else 0.0
        x_next = _ddim_blend(x_0, sample, self._alpha_bar_t[index], alpha_bar_next, variance=0.0)
        return GaussianSchedulerOutput(prev_sample=x_next, pred_original_sample=x_0) if return_dict else (x_next, x_0)


def _ddim_variance(alpha_bar_t: float, alpha_bar_s: float, eta: float) -> float:
    return eta**2 * (1 - alpha_bar_t / alpha_bar_s) * (1 - alpha_bar_s) / (1 - alpha_bar_t)


def _ddim_blend(x_0: Tensor, x_t: Tensor, alpha_bar_t: float, alpha_bar_s: float, variance: float) -> Tensor:
    """sqrt(alpha_bar_s) * x_0 + sqrt(1 - alpha_bar_s - variance) * noise, with the noise between x_0 and x_t written out."""
    # The radicand is 0 in exact arithmetic for eta = 1 at the largest t, and may round below it.
    on_x_t = math.sqrt(max(1 - alpha_bar_s - variance, 0.0) / (1 - alpha_bar_t))
    on_x_0 = math.sqrt(alpha_bar_s) - math.sqrt(alpha_bar_t) * on_x_t
    return (x_0 * on_x_0).add_(x_t, alpha=on_x_t)
