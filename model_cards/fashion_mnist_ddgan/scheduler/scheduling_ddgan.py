"""Scheduler of denoising diffusion GANs (arXiv:2112.07804): few steps, an implicit denoiser.

There are T + 1 noise levels, 0 (clean data) to T (close to unit Gaussian noise). The integer t in
0..T-1 names the transition from level t + 1 to level t, and is what generator and discriminator are
conditioned on. The generator predicts x_0 from (x_{t+1}, t, latent); x_t is then drawn from the
Gaussian q(x_t | x_{t+1}, x_0).
"""

import math
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor


Generators = torch.Generator | list[torch.Generator] | None


@dataclass
class DDGANSchedulerOutput(BaseOutput):
    """The sample at level t, and the prediction of x_0 that led to it."""

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


class Table:
    """A float64 table, with a copy in each precision and on each device that has asked for one."""

    def __init__(self, values: Tensor):
        self.values = values
        self._copies: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def at(self, t: int | Tensor, x: Tensor) -> Tensor:
        """Entries t in the precision of x (float32 for half precisions), to broadcast over x."""
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        if (dtype, x.device) not in self._copies:
            # cast on the CPU: some accelerators have no float64
            self._copies[dtype, x.device] = self.values.to(dtype).to(x.device)
        # indexing with a tensor of no dimensions would read it on the host
        index = t.to(x.device).reshape(-1) if isinstance(t, Tensor) else t
        return self._copies[dtype, x.device][index].reshape(-1, *(1,) * (x.ndim - 1))


class DDGANScheduler(SchedulerMixin, ConfigMixin):
    """Forward process and posterior of a denoising diffusion GAN, T = `num_train_timesteps` steps.

    Variances of the noise are those of a continuous process at T + 1 times from 0.001 to 1:

    - `schedule="vp"`: the variance-preserving SDE with rates `beta_min` to `beta_max`;
    - `"geometric"`: `beta_min (beta_max / beta_min)^time`, for 0 < beta_min < beta_max < 1.

    The tables are float64 tensors on the CPU and are cast when applied:

    - `betas` (T,): variance added by the transition t -> t + 1;
    - `alpha_bar` (T + 1,): squared signal coefficient of each level, exactly 1 at level 0;
    - `posterior_x_0_coefficient`, `posterior_x_tp1_coefficient`, `posterior_variance` (T,): of
      q(x_t | x_{t+1}, x_0).

    Samples are tensors of any rank with the batch in dimension 0. The transitions are learned, so a
    network of T steps is sampled in T steps, and fewer are refused.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 4,
        beta_min: float = 0.1,
        beta_max: float = 20.0,
        schedule: str = "vp",
    ):
        if not isinstance(num_train_timesteps, int) or num_train_timesteps < 1:
            raise ValueError(f"num_train_timesteps must be an integer of at least 1, got {num_train_timesteps!r}")
        variance = noise_variances(num_train_timesteps, beta_min, beta_max, schedule)
        signal = 1 - variance
        # the reference rounds these to float32, which shows in 1 - beta: by 3e-4 of it for T = 1
        self.betas = (1 - signal[1:] / signal[:-1]).float().double()  # (T,)
        if not bool(((self.betas > 0) & (self.betas < 1)).all()):
            raise ValueError(
                f"beta_min={beta_min}, beta_max={beta_max} give step variances {self.betas.tolist()}, which must lie"
                " strictly between 0 and 1; bring beta_min and beta_max closer to the defaults 0.1 and 20"
            )
        # level 0 is the data itself: the process starts at time 0.001 and its first variance is
        # left out, as in the paper's code, so the last entry is signal(1) / signal(0.001)
        self.alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - self.betas, 0)])  # (T + 1,)
        alpha_bar_t, alpha_bar_tp1 = self.alpha_bar[:-1], self.alpha_bar[1:]
        # Eqs. 6-7 of DDPM (arXiv:2006.11239) for the transition t + 1 -> t
        self.posterior_variance = self.betas * (1 - alpha_bar_t) / (1 - alpha_bar_tp1)
        self.posterior_x_0_coefficient = self.betas * alpha_bar_t.sqrt() / (1 - alpha_bar_tp1)
        self.posterior_x_tp1_coefficient = (1 - alpha_bar_t) * (1 - self.betas).sqrt() / (1 - alpha_bar_tp1)
        self._signal, self._noise = Table(self.alpha_bar.sqrt()), Table((1 - self.alpha_bar).sqrt())
        self._step_signal, self._step_noise = Table((1 - self.betas).sqrt()), Table(self.betas.sqrt())
        self._on_x_0 = Table(self.posterior_x_0_coefficient)
        self._on_x_tp1 = Table(self.posterior_x_tp1_coefficient)
        self._log_posterior_variance = Table(self.posterior_variance.clamp(min=1e-20).log())
        # exactly 0 at t = 0
        self._posterior_std = Table(self.posterior_variance.sqrt())

        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1)

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def set_timesteps(self, num_inference_steps: int | None = None, device: torch.device | str | None = None) -> None:
        """Set `timesteps` to T-1, ..., 0; ValueError for a number of steps other than T or None."""
        steps = self.config.num_train_timesteps
        if num_inference_steps not in (None, steps):
            raise ValueError(
                f"num_inference_steps={num_inference_steps}, but this generator has learned {steps} transitions and"
                f" can only be sampled in {steps} steps; pass {steps} or None, or use a model trained with another"
                " num_train_timesteps"
            )
        self.num_inference_steps = steps
        self.timesteps = torch.arange(steps - 1, -1, -1, device=device)

    def is_deterministic(self) -> bool:
        """False: every transition draws noise, and so does the generator's latent."""
        return False

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """Return the sample as it is: the generator takes x_{t+1} unscaled."""
        return sample

    def q_sample(
        self, x_0: Tensor, t: int | Tensor, noise: Tensor | None = None, generator: Generators = None
    ) -> Tensor:
        """Draw x_t ~ q(x_t | x_0) at the levels t in 0..T, () or (B,); level 0 is x_0 itself."""
        self._check(t, self.config.num_train_timesteps, "noise level")
        noise = _draw_like(x_0, generator) if noise is None else noise
        return (self._signal.at(t, x_0) * x_0 + self._noise.at(t, x_0) * noise).to(x_0.dtype)

    def q_sample_pairs(
        self,
        x_0: Tensor,
        t: int | Tensor,
        noise_t: Tensor | None = None,
        noise_tp1: Tensor | None = None,
        generator: Generators = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw (x_t, x_{t+1}) ~ q(x_t | x_0) q(x_{t+1} | x_t) for the transition t in 0..T-1.

        Noise that is not given is drawn from `generator`, that of x_{t+1} first, as in the
        reference.
        """
        self._check(t, self.config.num_train_timesteps - 1, "transition")
        noise_tp1 = _draw_like(x_0, generator) if noise_tp1 is None else noise_tp1
        x_t = self.q_sample(x_0, t, noise_t, generator)
        x_tp1 = self._step_signal.at(t, x_0) * x_t + self._step_noise.at(t, x_0) * noise_tp1
        return x_t, x_tp1.to(x_0.dtype)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: int | Tensor) -> Tensor:
        """Noise data to level t + 1, at which the generator is called with timestep t."""
        self._check(timesteps, self.config.num_train_timesteps - 1, "timestep")
        return self.q_sample(original_samples, timesteps + 1, noise)

    def posterior(self, x_0: Tensor, x_tp1: Tensor, t: int | Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of q(x_t | x_{t+1}, x_0) for t in 0..T-1; the log variance has
        shape (B or 1, 1, ...).

        The variance is 0 at t = 0; its logarithm is floored at log(1e-20), as in the reference.
        """
        self._check(t, self.config.num_train_timesteps - 1, "transition")
        mean = self._on_x_0.at(t, x_0) * x_0 + self._on_x_tp1.at(t, x_0) * x_tp1
        return mean.to(x_0.dtype), self._log_posterior_variance.at(t, x_0)

    def sample_posterior(
        self,
        x_0: Tensor,
        x_tp1: Tensor,
        t: int | Tensor,
        noise: Tensor | None = None,
        generator: Generators = None,
    ) -> Tensor:
        """Draw x_t ~ q(x_t | x_{t+1}, x_0); differentiable in x_0, and x_0 itself at t = 0.

        Noise is drawn at t = 0 too, where it has no weight, so that the generator advances equally
        at every step.
        """
        mean, _ = self.posterior(x_0, x_tp1, t)
        noise = _draw_like(x_tp1, generator) if noise is None else noise
        return (mean + self._posterior_std.at(t, x_0) * noise).to(x_0.dtype)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDGANSchedulerOutput | tuple[Tensor, Tensor]:
        """Draw the sample at level t from the one at level t + 1 and the generator's x_0
        (`model_output`).

        `variance_noise` replaces the draw from `generator`.
        """
        prev_sample = self.sample_posterior(model_output, sample, timestep, variance_noise, generator)
        if not return_dict:
            return prev_sample, model_output
        return DDGANSchedulerOutput(prev_sample=prev_sample, pred_original_sample=model_output)

    def _check(self, t: int | Tensor, last: int, what: str) -> None:
        """Refuse t outside 0..last, but on an accelerator, where looking makes the host wait."""
        if isinstance(t, Tensor):
            if t.is_floating_point():
                raise ValueError(f"the {what} t must be an integer tensor, got {t.dtype}")
            if t.device.type != "cpu" or t.numel() == 0:
                return
            low, high = int(t.min()), int(t.max())
        else:
            low = high = int(t)
        if low < 0 or high > last:
            raise ValueError(f"the {what} t must lie in 0..{last}, got {low if low < 0 else high}")


def noise_times(steps: int) -> Tensor:
    """The T + 1 times of the noise levels, evenly spaced from 0.001 to 1, float64."""
    return torch.arange(steps + 1, dtype=torch.float64) / steps * (1 - 1e-3) + 1e-3


def noise_variances(steps: int, beta_min: float, beta_max: float, schedule: str) -> Tensor:
    """Variance of the noise at the T + 1 levels, float64 (T + 1,)."""
    time = noise_times(steps)
    if schedule == "vp":
        if not 0 <= beta_min <= beta_max:
            raise ValueError(
                f"the vp schedule needs 0 <= beta_min <= beta_max, got beta_min={beta_min}, beta_max={beta_max}"
            )
        # Eq. 33 of score SDE (arXiv:2011.13456): 1 - exp(-integral of the rate)
        return -torch.expm1(-0.5 * time**2 * (beta_max - beta_min) - time * beta_min)
    if schedule == "geometric":
        if not 0 < beta_min < beta_max < 1:
            raise ValueError(
                "the geometric schedule interpolates between the variances beta_min and beta_max, which need"
                f" 0 < beta_min < beta_max < 1; got beta_min={beta_min}, beta_max={beta_max} (try 0.01 and 0.99)"
            )
        return beta_min * torch.exp(time * math.log(beta_max / beta_min))
    raise ValueError(f"unknown schedule {schedule!r}; choose 'vp' or 'geometric'")


def _draw_like(x: Tensor, generator: Generators) -> Tensor:
    return randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
