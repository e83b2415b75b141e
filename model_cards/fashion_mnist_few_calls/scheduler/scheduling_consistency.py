"""Scheduler of consistency models (arXiv:2303.01469): from any noise level to the data in one call.

The process adds noise to the data, x = x_0 + sigma z. The network's raw output F becomes an
estimate of the trajectory's end, f(x, sigma) = c_skip x + c_out F(c_in x, t), and the coefficients
are such that f(x, sigma_min) = x. Shapes: B samples of any rank, (B, ...).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_consistency_models import CMStochasticIterativeScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor


Generators = torch.Generator | list[torch.Generator] | None
Coefficients = tuple[Tensor, Tensor, Tensor]

# What a network was trained to predict, as (c_in, c_skip, c_out / sigma) of its estimate of x_0 at
# sigma (B,), with r = sqrt(sigma^2 + sigma_data^2). A network of another family needs a line here.
PARAMETRISATIONS: dict[str, Callable[[Tensor, Tensor, float], Coefficients]] = {
    # EDM's, arXiv:2206.00364, and that of consistency models
    "preconditioned": lambda sigma, r, sd: (1 / r, sd**2 / r**2, sd / r),
    # the variance-preserving ones take x / r, where sigma_data is 1
    "v_prediction": lambda sigma, r, sd: (1 / r, sd**2 / r**2, -sd / r),
    "epsilon": lambda sigma, r, sd: (1 / r, torch.ones_like(r), -torch.ones_like(r)),
    "sample": lambda sigma, r, sd: (1 / r, torch.zeros_like(r), 1 / sigma),
    # of the straight path (1 - s) x_0 + s noise, where sigma = s / (1 - s); velocity is noise - x_0
    "flow_velocity": lambda sigma, r, sd: (1 / (1 + sigma), 1 / (1 + sigma), -1 / (1 + sigma)),
    "flow_epsilon": lambda sigma, r, sd: (1 / (1 + sigma), torch.ones_like(r), -torch.ones_like(r)),
    "flow_sample": lambda sigma, r, sd: (1 / (1 + sigma), torch.zeros_like(r), 1 / sigma),
}


@dataclass
class ConsistencySchedulerOutput(BaseOutput):
    """The sample at the next noise level, and the estimate of x_0 that led to it."""

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


class ConsistencyScheduler(CMStochasticIterativeScheduler, SchedulerMixin, ConfigMixin):
    """Multistep sampling and the scalings of a consistency model, whatever its network predicts.

    It is the stock class with these differences: noise levels are float64; the last step is exact,
    where the stock one takes the root of a negative number for some `sigma_min` (0.009 for one);
    levels can be named; noise can be given. With the defaults of the last seven arguments the stock
    class loads its configuration and draws the same. With another prediction_type, trained_sigmas,
    time_scale or renoise it must not: it would tell the network other timesteps, or go other ways,
    without a word.

    Args:
        num_train_timesteps: N of the grid of levels that sampling chooses from; a grid of training
            may be finer or coarser.
        sigma_min, sigma_max, rho: the grid of Karras et al., from sigma_max (index 0) to sigma_min.
        sigma_data: standard deviation of the data; 1 for a network of a process that preserves the
            variance.
        s_noise: factor on the noise of sampling.
        clip_denoised: clip the estimates of x_0 to [-1, 1], which is for images.
        prediction_type: a key of PARAMETRISATIONS.
        trained_sigmas: noise levels of the timesteps 0, 1, ... of the process that the network was
            first trained on, rising; a level between two of them has a timestep between. None:
            the timestep is time_scale ln(sigma), or time_scale sigma / (1 + sigma) of the straight
            path.
        time_scale: 250 for consistency models, 1/4 for EDM, num_train_timesteps for flow matching.
        sampling_sigma_min: the level of the last of several steps. None leaves it to the grid, as
            in the stock class, where it is higher than is good for two steps.
        sampling_sigmas: the only levels, falling, at which the network was trained to be called.
            Runs of as many steps visit them, runs of fewer some of them.
        renoise: False keeps the noise of a level for the next one, which is a step of Euler's
            along the probability flow. So do students of a teacher's trajectories; a run of theirs
            visits all of `sampling_sigmas`.
        predicts_end: with renoise False, the network was trained to estimate the end of the way at
            each of its levels, so that runs of fewer steps visit the first of them.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 40,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        s_noise: float = 1.0,
        rho: float = 7.0,
        clip_denoised: bool = True,
        prediction_type: str = "preconditioned",
        trained_sigmas: Sequence[float] | None = None,
        time_scale: float = 250.0,
        sampling_sigma_min: float | None = None,
        sampling_sigmas: Sequence[float] | None = None,
        renoise: bool = True,
        predicts_end: bool = False,
    ):
        if not isinstance(num_train_timesteps, int) or num_train_timesteps < 2:
            raise ValueError(f"num_train_timesteps must be a whole number of at least 2, got {num_train_timesteps!r}")
        if not 0 <= sigma_min < sigma_max or not sigma_data > 0 or not rho > 0:
            raise ValueError(
                f"sigma_min={sigma_min}, sigma_max={sigma_max}, sigma_data={sigma_data}, rho={rho} do not fit; needed "
                "are 0 <= sigma_min < sigma_max, and the others above 0"
            )
        if sampling_sigma_min is not None and not sigma_min < sampling_sigma_min < sigma_max:
            raise ValueError(
                f"sampling_sigma_min={sampling_sigma_min} must lie between sigma_min={sigma_min} and "
                f"sigma_max={sigma_max}"
            )
        if prediction_type not in PARAMETRISATIONS:
            raise ValueError(f"unknown prediction_type {prediction_type!r}; choose from {list(PARAMETRISATIONS)}")
        self._log_sigmas = None
        if trained_sigmas is not None:
            self._log_sigmas = torch.tensor(list(trained_sigmas), dtype=torch.float64).log()
            if len(self._log_sigmas) < 2 or not bool((self._log_sigmas.diff() > 0).all()):
                raise ValueError(f"trained_sigmas must rise from above 0, got {len(self._log_sigmas)} that do not")
        if sampling_sigmas is not None:
            self._checked(sampling_sigmas)
        if not renoise and not sampling_sigmas:
            raise ValueError("renoise False is for a network with levels of its own; name sampling_sigmas")
        if predicts_end and renoise:
            raise ValueError("predicts_end is for a network that keeps its noise; give renoise False")
        self.num_inference_steps: int | None = None
        self.custom_timesteps = self.is_scale_input_called = False
        self._start(karras_sigmas(num_train_timesteps, sigma_min, sigma_max, rho), None)

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    # --- the function ---------------------------------------------------------------------------

    def grid(self, count: int) -> Tensor:
        """Noise levels float64 (count,), falling from sigma_max to sigma_min."""
        config = self.config
        return karras_sigmas(count, config.sigma_min, config.sigma_max, config.rho)

    def network_timestep(self, sigma: Tensor) -> Tensor:
        """What the network is told of the noise levels sigma (B,), in float64."""
        # cast on the CPU where a device has no float64
        sigma = sigma if sigma.device.type == "mps" else sigma.double()
        if self._log_sigmas is None and self.config.prediction_type.startswith("flow_"):
            return self.config.time_scale * sigma / (1 + sigma)
        if self._log_sigmas is None:
            # the stock class adds 1e-44, which makes a number of sigma 0
            return self.config.time_scale * (sigma + 1e-44).log()
        table = self._log_sigmas.to(sigma)
        log_sigma = (sigma + 1e-44).log().clamp(table[0], table[-1])
        above = torch.searchsorted(table, log_sigma.contiguous()).clamp(1, len(table) - 1)
        low, high = table[above - 1], table[above]
        return above - 1 + (log_sigma - low) / (high - low)

    def scalings(self, sigma: Tensor, shift: float | None = None) -> Coefficients:
        """c_in, c_skip, c_out (B,) at noise levels sigma (B,), in sigma's precision.

        `shift` is the level at which f is the identity: None takes sigma_min. With 0 the estimate
        is that of the network as it was trained to denoise.
        """
        shift, sd = self.config.sigma_min if shift is None else shift, self.config.sigma_data
        r = (sigma**2 + sd**2).sqrt()
        c_in, c_skip, slope = PARAMETRISATIONS[self.config.prediction_type](sigma, r, sd)
        # The denoiser, written as that of EDM, gets the shifted coefficients of appendix C: c_skip
        # and the numerator of c_out are shifted, its denominator is not.
        rest = c_skip - sd**2 / r**2
        if shift:
            rest = rest * (1 - shift / sigma)
        return c_in, sd**2 / ((sigma - shift) ** 2 + sd**2) + rest, (sigma - shift) * slope

    def denoise(self, network: Callable, x: Tensor, sigma: Tensor, shift: float | None = None, **conditions) -> Tensor:
        """f(x, sigma) (B, ...) of x (B, ...) at levels sigma (B,); see `scalings` for `shift`.

        `network(c_in x, timestep, **conditions, return_dict=False)[0]` is F, of which channels
        beyond those of x, a learned variance, are left out.
        """
        precise = torch.promote_types(x.dtype, torch.float32)
        sigma = sigma.to(x.device)
        c_in, c_skip, c_out = (_column(c, x) for c in self.scalings(sigma, shift))
        output = network((c_in * x).to(x.dtype), self.network_timestep(sigma), **conditions, return_dict=False)[0]
        output = output[:, : x.shape[1]].to(precise)
        return c_skip * x + c_out * output

    def add_noise(self, original_samples: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
        """x = x_0 + sigma z (B, ...) at levels sigma (B,)."""
        return original_samples + _column(sigmas, original_samples) * noise

    # --- sampling -------------------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        """Choose the noise levels of a run by their number, their indices or themselves.

        Args:
            num_inference_steps: so many of `sampling_sigmas`, the first among them, where there
                are as many. Else so many levels from sigma_max to `sampling_sigma_min`, spaced as
                the grid is. Where that is None, every (N // number)-th level of the grid.
            timesteps: indices of the grid in falling order, as the stock class takes them; 0 is
                sigma_max, so that [22, 0] means 0, then 22.
            sigmas: the levels, falling; the first should be sigma_max.
        """
        given = [value for value in (num_inference_steps, timesteps, sigmas) if value is not None]
        if len(given) != 1:
            raise ValueError(f"give one of num_inference_steps, timesteps and sigmas, not {len(given)} of them")
        if sigmas is not None:
            chosen = self._checked(sigmas)
        else:
            chosen = self._spaced(num_inference_steps) if timesteps is None else self._of_grid(list(timesteps))
        self.num_inference_steps, self.custom_timesteps = len(chosen), num_inference_steps is None
        self._start(chosen, device)

    def _checked(self, sigmas: Sequence[float]) -> Tensor:
        """Levels of one's own, float64; ValueError where they do not fall within the range."""
        chosen = torch.tensor(list(sigmas), dtype=torch.float64)
        low, high = self.config.sigma_min, self.config.sigma_max
        if len(chosen) < 1 or bool((chosen.diff() >= 0).any()) or chosen[0] > high or chosen[-1] <= low:
            raise ValueError(f"sigmas must fall, from at most {high} to above {low}, got {list(sigmas)}")
        return chosen

    def _spaced(self, steps: int) -> Tensor:
        """The levels of so many steps, float64."""
        config, count = self.config, self.config.num_train_timesteps
        if not isinstance(steps, int) or not 1 <= steps <= count:
            raise ValueError(
                f"num_inference_steps={steps!r} must be a whole number from 1 to {count}, the num_train_timesteps of "
                "the grid"
            )
        trained = config.sampling_sigmas or ()
        if not config.renoise and (steps > len(trained) or steps < len(trained) and not config.predicts_end):
            most = "at most " if config.predicts_end else ""
            raise ValueError(
                f"num_inference_steps={steps} must be {most}{len(trained)}: this model was trained for so many"
            )
        if config.predicts_end:
            return self._checked(trained[:steps])
        if steps <= len(trained):
            return self._checked([trained[i * len(trained) // steps] for i in range(steps)])
        if config.sampling_sigma_min is None:
            return self._of_grid([i * (count // steps) for i in reversed(range(steps))])
        return karras_sigmas(max(steps, 2), config.sampling_sigma_min, config.sigma_max, config.rho)[:steps]

    def _of_grid(self, indices: list[int]) -> Tensor:
        """The levels at falling indices of the grid, float64."""
        rising, count = indices[::-1], self.config.num_train_timesteps
        falls = all(a < b for a, b in zip(rising, rising[1:]))
        if not rising or not falls or not 0 <= rising[0] <= rising[-1] < count:
            raise ValueError(f"timesteps must fall and lie in 0..{count - 1}, got {indices}; 0 is sigma_max")
        return self.grid(count)[rising]

    def _start(self, chosen: Tensor, device: torch.device | str | None) -> None:
        """Begin a run over these levels, float64 and falling."""
        self.sigmas = torch.cat([chosen, chosen.new_tensor([self.config.sigma_min])])
        self.timesteps = self.network_timestep(chosen).to(
            device, torch.float32 if str(device).startswith("mps") else torch.float64
        )
        self.init_noise_sigma = float(chosen[0])
        self._step_index = self._begin_index = None

    def is_deterministic(self) -> bool:
        """Whether the first noise decides the sample, as it does in a run of one step."""
        return self.num_inference_steps == 1 or not self.config.renoise

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        """What the network is shown: c_in x."""
        if self.step_index is None:
            self._init_step_index(timestep)
        self.is_scale_input_called = True
        return sample * float(self.scalings(self.sigmas[self.step_index])[0])

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
        noise: Tensor | None = None,
    ) -> ConsistencySchedulerOutput | tuple[Tensor, Tensor]:
        """Estimate x_0 from the network's output, and go to the next level.

        Args:
            model_output: F at `timestep`, one of `timesteps`, for `sample`.
            noise: unit noise instead of a draw from `generator`. In a run of several steps the
                last one draws, too, as in the stock class, with weight 0.
        """
        if self.step_index is None:
            self._init_step_index(timestep)
        sigma, following = self.sigmas[self.step_index], float(self.sigmas[self.step_index + 1])
        _, c_skip, c_out = (float(c) for c in self.scalings(sigma))
        x_0 = c_out * model_output[:, : sample.shape[1]] + c_skip * sample
        is_last = self.step_index + 1 == len(self.timesteps)
        # what a step of Euler's leads to need not lie between samples and noise
        if self.config.clip_denoised and (self.config.renoise or is_last):
            x_0 = x_0.clamp(-1, 1)
        if not self.config.renoise:
            kept = 0.0 if is_last else following / float(sigma)
            return self._stepped(x_0 + kept * (sample - x_0), x_0, return_dict)
        if noise is None and len(self.timesteps) > 1:
            noise = randn_tensor(x_0.shape, generator=generator, device=x_0.device, dtype=x_0.dtype)
        # of levels that rounding has brought below sigma_min, the root would be NaN
        scale = self.config.s_noise * math.sqrt(max(following**2 - self.config.sigma_min**2, 0.0))
        prev_sample = x_0 if noise is None or scale == 0 else x_0 + scale * noise
        return self._stepped(prev_sample, x_0, return_dict)

    def _stepped(self, prev_sample: Tensor, x_0: Tensor, return_dict: bool) -> ConsistencySchedulerOutput | tuple:
        self._step_index += 1
        if not return_dict:
            return prev_sample, x_0
        return ConsistencySchedulerOutput(prev_sample=prev_sample, pred_original_sample=x_0)


def karras_sigmas(count: int, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    """Noise levels float64 (count,) from sigma_max down to sigma_min, even in sigma^(1 / rho)."""
    ramp = torch.from_numpy(np.linspace(0, 1, count))
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (high + ramp * (low - high)) ** rho


def _column(values: Tensor, x: Tensor) -> Tensor:
    """Values (B,) or () in float32 or x's higher precision, to broadcast over x (B, ...)."""
    values = values.to(x.device, torch.promote_types(x.dtype, torch.float32))
    return values.reshape(-1, *(1,) * (x.ndim - 1))
