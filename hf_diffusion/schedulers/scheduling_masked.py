"""Diffusion of tokens in continuous time: into a mask (MDLM) or into any token (UDLM).

MDLM: Sahoo et al. 2024, arXiv:2406.07524. ReMDM, which masks tokens again: Wang et al. 2025,
arXiv:2503.00307. UDLM and guidance of discrete states: Schiff et al. 2024, arXiv:2412.10193.

Time goes from 0 (clean) to 1. alpha(t) is the probability that a token is still itself; the chance
is 1 - alpha(t). Shapes: B sequences of L tokens out of V, a mask among them; tokens int64 (B, L),
probabilities (B, L, V), times (B,).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from torch import Tensor


Generators = torch.Generator | list[torch.Generator] | None
NOISE_SCHEDULES = ("loglinear", "cosine", "cosine_squared", "linear")
REMASKING = ("none", "cap", "rescale", "confidence", "forward_backward", "loop")
TINY = 1e-300


@dataclass
class MDLMSchedulerOutput(BaseOutput):
    """The tokens at the next time, and how unsure each was when it was set (-inf where masked)."""

    prev_sample: Tensor
    doubt: Tensor | None = None


def over_tokens(values: Tensor | float, like: Tensor) -> Tensor:
    """Values (B,), or one, in float64, to broadcast over `like` (B, ...)."""
    values = torch.as_tensor(values, dtype=torch.float64, device=like.device)
    return values.reshape(-1, *(1,) * (like.ndim - 1))


def draw_tokens(weights: Tensor, uniform: Tensor) -> Tensor:
    """Tokens (B, L) by weights (B, L, V), which need no sum of 1, and uniform numbers (B, L, V).

    In float64: float32 hardly draws tokens rarer than exp(-16.6), which lowers the entropy of
    samples in many steps.
    """
    exponential = -(uniform.double() + 1e-10).log() + 1e-10
    return (weights.double() / exponential).argmax(dim=-1)


def uniform_posterior(p: Tensor, x_t: Tensor, alpha_t: Tensor | float, alpha_s: Tensor | float) -> Tensor:
    """p(x_s | x_t) (B, L, V) of UDLM for probabilities of x_0 (B, L, V).

    With a one-hot p it is q(x_s | x_t, x_0).
    """
    classes, alpha_t, alpha_s = p.shape[-1], over_tokens(alpha_t, p), over_tokens(alpha_s, p)
    step, now = alpha_t / alpha_s, F.one_hot(x_t, p.shape[-1]).to(p)
    fresh = (1 - step) * (1 - alpha_s) / classes
    same = alpha_t * classes * p * now + (step - alpha_t) * now
    of_x_t = p.gather(-1, x_t[..., None])
    return (same + (alpha_s - alpha_t) * p + fresh) / (alpha_t * classes * of_x_t + 1 - alpha_t)


def guided(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """p_c^scale p_u^(1 - scale), normalised over the last dimension.

    For a mask it is applied to p(x_0), for uniform states to the posterior; the two are not the
    same.
    """
    log_p = scale * conditional.clamp(min=TINY).log() + (1 - scale) * unconditional.clamp(min=TINY).log()
    return torch.where(conditional > 0, log_p, -math.inf).softmax(dim=-1)


class MDLMScheduler(SchedulerMixin, ConfigMixin):
    """The process of masked (or uniform) tokens in continuous time, and its samplers.

    Args:
        num_classes: V, the mask included.
        mask_token_id: None is the last one.
        noise_schedule: alpha(t): "loglinear" 1 - (1 - eps) t, "cosine" eps + (1 - eps) cos(pi t/2),
            "cosine_squared" with its square, "linear" exp(-sigma_max t).
        noise_eps: eps of them.
        sigma_max: of "linear".
        remasking: which tokens are masked again (ReMDM): "none"; "cap", at most `eta` of them;
            "rescale", `eta` of what is allowed; "confidence", those first that were unsure;
            "forward_backward"; "loop", `eta` between `t_on` and `t_off`, where alpha stays at
            `alpha_on`.
        last_time: where sampling ends and takes the most probable tokens.
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_classes: int = 50258,
        mask_token_id: int | None = None,
        noise_schedule: str = "loglinear",
        noise_eps: float = 1e-3,
        sigma_max: float = 10.0,
        remasking: str = "none",
        eta: float = 0.0,
        t_on: float = 0.55,
        t_off: float = 0.05,
        alpha_on: float = 0.9,
        last_time: float = 1e-5,
    ):
        for name, allowed in (("noise_schedule", NOISE_SCHEDULES), ("remasking", REMASKING)):
            if self.config[name] not in allowed:
                raise ValueError(f"unknown {name} {self.config[name]!r}; choose from {list(allowed)}")
        self.mask_token_id = num_classes - 1 if mask_token_id is None else mask_token_id
        if not 0 <= self.mask_token_id < num_classes:
            raise ValueError(f"mask_token_id={mask_token_id} is no token; give 0 to {num_classes - 1}")
        if "_use_default_values" in self.config:
            # diffusers counts positional arguments as defaults, which from_config drops
            self.register_to_config(_use_default_values=[])
        self.set_timesteps(128)

    # --- the process ----------------------------------------------------------------------------

    def alpha(self, t: Tensor) -> Tensor:
        """The probability that a token is itself at times t, float64."""
        t, eps = t.double(), self.config.noise_eps
        if self.config.noise_schedule == "loglinear":
            return 1 - (1 - eps) * t
        if self.config.noise_schedule == "linear":
            return (-self.config.sigma_max * t).exp()
        power = 2 if self.config.noise_schedule == "cosine_squared" else 1
        return eps + (1 - eps) * (t * math.pi / 2).cos() ** power

    def total_noise(self, t: Tensor) -> Tensor:
        """sigma(t) = -log alpha(t), which a network with time conditioning is given."""
        return -self.alpha(t).log()

    def rate(self, t: Tensor) -> Tensor:
        """d sigma / dt."""
        t, eps, alpha = t.double(), self.config.noise_eps, self.alpha(t)
        if self.config.noise_schedule == "loglinear":
            return (1 - eps) / alpha
        if self.config.noise_schedule == "linear":
            return torch.full_like(t, self.config.sigma_max)
        angle = t * math.pi / 2
        slope = angle.sin() if self.config.noise_schedule == "cosine" else (2 * angle).sin()
        return (1 - eps) * slope * math.pi / 2 / alpha

    def loss_weight(self, t: Tensor) -> Tensor:
        """-alpha'(t) / (1 - alpha(t)), the weight of the cross entropy; 1/t for loglinear."""
        return self.rate(t) / torch.expm1(self.total_noise(t))

    def importance_times(self, u: Tensor) -> Tensor:
        """Times for u in [0, 1) at which the weight is constant; for loglinear noise."""
        eps = self.config.noise_eps
        nearly, most = math.log1p(-math.exp(-eps)), math.log1p(-math.exp(math.log(eps)))
        sigma = -torch.log1p(-(u.double() * most + (1 - u.double()) * nearly).exp())
        return -torch.expm1(-sigma) / (1 - eps)

    @property
    def importance_weight(self) -> float:
        """The constant weight of the loss at `importance_times`."""
        return -math.log1p(-math.exp(-self.config.noise_eps))

    def add_noise(self, x_0: Tensor, uniform: Tensor, t: Tensor, tokens: Tensor | None = None) -> Tensor:
        """x_t (B, L): the mask, or `tokens` (B, L), where `uniform` (B, L) < 1 - alpha."""
        moved = uniform < over_tokens(1 - self.alpha(t), x_0)
        return torch.where(moved, self.mask_token_id if tokens is None else tokens, x_0)

    def x_0_log_probs(self, logits: Tensor, x_t: Tensor) -> Tensor:
        """log p(x_0 | x_t) (B, L, V): never the mask, and what is not masked stays as it is."""
        mask = torch.arange(logits.shape[-1], device=logits.device) == self.mask_token_id
        log_p = logits.masked_fill(mask, -math.inf).log_softmax(dim=-1)
        known = torch.where(F.one_hot(x_t, logits.shape[-1]).bool(), 0.0, -math.inf).to(log_p)
        return torch.where((x_t == self.mask_token_id)[..., None], log_p, known)

    def posterior(
        self,
        p: Tensor,
        x_t: Tensor,
        chance_t: Tensor | float,
        chance_s: Tensor | float,
        remask: Tensor | float = 0.0,
    ) -> Tensor:
        """p(x_s | x_t) (B, L, V) for p(x_0 | x_t) and the chances of the mask at t and at s < t.

        remask: the probability (B, L) that a token that is set is masked again; the chance at s is
        kept.
        """
        chance_t, chance_s = over_tokens(chance_t, p), over_tokens(chance_s, p)
        remask = torch.as_tensor(remask, dtype=torch.float64, device=p.device)
        remask = remask if remask.ndim == 0 else remask[..., None]
        mask = (torch.arange(p.shape[-1], device=p.device) == self.mask_token_id).to(p)
        alpha_t, alpha_s = 1 - chance_t, 1 - chance_s
        set_now = (alpha_s - (1 - remask) * alpha_t) / chance_t * p
        masked = set_now + (chance_s - remask * alpha_t) / chance_t * mask
        kept = (1 - remask) * F.one_hot(x_t, p.shape[-1]).to(p) + remask * mask
        return torch.where((x_t == self.mask_token_id)[..., None], masked, kept)

    def remasking(self, x_t: Tensor, chance_t: float, chance_s: float, doubt: Tensor | None = None) -> Tensor:
        """The probability (B, L) that each token that is set is masked again, by `remasking`."""
        kind, eta = self.config.remasking, self.config.eta
        alpha_t, alpha_s = 1 - chance_t, 1 - chance_s
        allowed = min(1.0, chance_s / alpha_t) if alpha_t > 0 else 1.0
        share = {
            "none": 0.0,
            "cap": min(eta, allowed),
            "rescale": eta * allowed,
            "confidence": allowed,
            # the published code does not limit it, and draws from negative weights in the last step
            "forward_backward": min(allowed, (alpha_s - alpha_t) / alpha_t) if alpha_t > 0 else 0.0,
            "loop": eta,
        }[kind]
        sigma = torch.full(x_t.shape, share, dtype=torch.float64, device=x_t.device)
        if kind == "confidence":
            sigma = sigma * doubt.double().softmax(dim=-1).nan_to_num()
            sigma = torch.where(x_t == self.mask_token_id, 0.0, sigma)
        return sigma

    # --- sampling -------------------------------------------------------------------------------

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Choose N steps from time 1 to `last_time`; `timesteps` are where they start."""
        if not isinstance(num_inference_steps, int) or num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be a whole number of at least 1, not {num_inference_steps!r}")
        grid = torch.linspace(1, self.config.last_time, num_inference_steps + 1, dtype=torch.float64)
        self.step_size = (1 - self.config.last_time) / num_inference_steps
        self.timesteps, self.num_inference_steps = grid[:-1].to(device), num_inference_steps

    def chances(self, t: float) -> tuple[float, float, bool]:
        """The chances of the mask at t and after a step, and whether tokens may be masked again."""
        config, s = self.config, t - self.step_size
        if config.remasking == "none":
            chance_t, chance_s = (1 - self.alpha(torch.tensor([t, s]).double())).tolist()
            return chance_t, chance_s, False
        if config.remasking != "loop":
            return t, s, True
        if t > config.t_on:
            slope = config.alpha_on / (1 - config.t_on)
            return 1 - (1 - t) * slope, 1 - (1 - s) * slope, False
        if t <= config.t_off:
            slope = (1 - config.alpha_on) / config.t_off
            return t * slope, s * slope, False
        return 1 - config.alpha_on, 1 - config.alpha_on, True

    def step(
        self,
        model_output: Tensor,
        timestep: float,
        sample: Tensor,
        generator: Generators = None,
        noise: Tensor | None = None,
        doubt: Tensor | None = None,
        fixed: Tensor | None = None,
        return_dict: bool = True,
    ) -> MDLMSchedulerOutput | tuple[Tensor, Tensor]:
        """The tokens one step later, from the network's logits (B, L, V) of x_0.

        noise: uniform numbers (B, L, V) instead of those that `generator` draws. doubt: what the
        step before returned, for "confidence". fixed: tokens (B, L) of a prompt, by True, that are
        never masked again; what is masked elsewhere is filled in.
        """
        p = self.x_0_log_probs(model_output.double(), sample).exp()
        chance_t, chance_s, remasks = self.chances(float(timestep))
        if doubt is None:
            doubt = torch.full(sample.shape, -math.inf, dtype=torch.float64, device=sample.device)
        sigma = self.remasking(sample, chance_t, chance_s, doubt) if remasks else 0.0
        weights = self.posterior(p, sample, chance_t, chance_s, sigma)
        if noise is None:
            noise = uniform_numbers(weights.shape, generator, weights.device)
        drawn = draw_tokens(weights, noise)
        if fixed is not None:
            drawn = torch.where(fixed, sample, drawn)
        # tokens that are set now remember how probable they were
        is_set = (sample == self.mask_token_id) & (drawn != self.mask_token_id)
        chosen = -p.gather(-1, drawn[..., None])[..., 0]
        doubt = torch.where(is_set, chosen, doubt).masked_fill(drawn == self.mask_token_id, -math.inf)
        return MDLMSchedulerOutput(drawn, doubt) if return_dict else (drawn, doubt)

    def finish(self, model_output: Tensor, sample: Tensor) -> Tensor:
        """The most probable tokens (B, L) for what is still masked after the last step."""
        return self.x_0_log_probs(model_output, sample).argmax(dim=-1)

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float | None = None) -> Tensor:
        """The sample as it is: every scheduler of diffusers has this method."""
        return sample


class UDLMScheduler(MDLMScheduler, SchedulerMixin):
    """The process of tokens that become any others in continuous time, and its sampler (UDLM).

    Of the arguments, those of the mask have no part in it: `num_classes` are the tokens alone.
    """

    def sample_prior(self, uniform: Tensor) -> Tensor:
        """Tokens (B, L) at time 1 by uniform numbers (B, L) in [0, 1)."""
        return (uniform.double() * self.config.num_classes).long().clamp(max=self.config.num_classes - 1)

    def step(
        self,
        model_output: Tensor,
        timestep: float,
        sample: Tensor,
        generator: Generators = None,
        noise: Tensor | None = None,
        unconditional: Tensor | None = None,
        guidance_scale: float = 1.0,
        fixed: Tensor | None = None,
        return_dict: bool = True,
    ) -> MDLMSchedulerOutput | tuple[Tensor, Tensor | None]:
        """The tokens one step later, from the network's logits (B, L, V) of x_0.

        unconditional: logits without the class, which `guidance_scale` leads away from, by the
        posteriors of the two. noise and fixed: as for MDLM.
        """
        t = float(timestep)
        alpha_t, alpha_s = self.alpha(torch.tensor([t, t - self.step_size])).tolist()
        weights = uniform_posterior(model_output.double().softmax(dim=-1), sample, alpha_t, alpha_s)
        if unconditional is not None:
            without = uniform_posterior(unconditional.double().softmax(dim=-1), sample, alpha_t, alpha_s)
            weights = guided(weights, without, guidance_scale)
        if noise is None:
            noise = uniform_numbers(weights.shape, generator, weights.device)
        drawn = draw_tokens(weights, noise)
        drawn = drawn if fixed is None else torch.where(fixed, sample, drawn)
        return MDLMSchedulerOutput(drawn) if return_dict else (drawn, None)

    def finish(self, model_output: Tensor, sample: Tensor) -> Tensor:
        """The tokens as they are: at the last time none is noise."""
        return sample


def uniform_numbers(shape: Sequence[int], generator: Generators, device: torch.device) -> Tensor:
    """Numbers float64 in [0, 1) on a device; with a list, each generator draws one row."""
    if isinstance(generator, list):
        rows = [torch.rand(tuple(shape[1:]), generator=g, dtype=torch.float64, device=g.device) for g in generator]
        return torch.stack(rows).to(device)
    source = device if generator is None else generator.device
    return torch.rand(tuple(shape), generator=generator, dtype=torch.float64, device=source).to(device)
