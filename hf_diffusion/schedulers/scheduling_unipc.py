"""UniPC (arXiv:2302.04867) at timesteps of one's own."""

from collections.abc import Sequence

import torch
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin


# Options of the stock class that choose the levels, too.
SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_flow_sigmas")


class UniPCTimestepsScheduler(UniPCMultistepScheduler, SchedulerMixin):
    """The stock solver, which also takes the timesteps of a run themselves.

    At so few steps as four it matters where they lie; `hf-diffusion tune-steps --save` searches for
    them, and writes them into the config as "_tuned_timesteps", {"4": [999, ...]}. Every scheduler
    hands such an entry on without knowing it. The arguments are those of the stock class.
    """

    _compatibles = [
        *UniPCMultistepScheduler._compatibles,
        "LinearDDPMScheduler",
        "CosineDDPMScheduler",
        "DDIMEtaScheduler",
        "ImprovedPNDMScheduler",
    ]

    def tuned_timesteps(self, num_inference_steps: int | None) -> Sequence[int] | None:
        """What a search has found for so many steps; None for nothing."""
        return (self.config.get("_tuned_timesteps") or {}).get(str(num_inference_steps))

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Choose the levels of a run: at `timesteps`, falling whole numbers; else at those tuned
        for `num_inference_steps`, if there are any; else as the stock class.

        ValueError for timesteps that do not fall within the process, or beside an option that
        chooses levels, too.
        """
        if timesteps is None and sigmas is None:
            timesteps = self.tuned_timesteps(num_inference_steps)
        if timesteps is None:
            return super().set_timesteps(num_inference_steps, device, sigmas, mu)
        total, chosen = self.config.num_train_timesteps, [int(t) for t in timesteps]
        falls = all(a > b for a, b in zip(chosen, chosen[1:]))
        if not chosen or not falls or chosen[0] >= total or chosen[-1] < 0:
            raise ValueError(f"timesteps must fall and lie between 0 and {total - 1}, not be {list(timesteps)}")
        for option in SPACINGS:
            if self.config.get(option):
                raise ValueError(f"timesteps and {option} both choose the levels of the run; give one of them")
        super().set_timesteps(len(chosen), device)
        table = ((1 - self.alphas_cumprod) / self.alphas_cumprod) ** 0.5
        self.sigmas = torch.cat([table[chosen].to(self.sigmas), self.sigmas[-1:]])
        self.timesteps = torch.tensor(chosen, dtype=torch.int64, device=device)
