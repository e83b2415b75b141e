"""The game of a denoising diffusion GAN (arXiv:2112.07804, Eqs. 4 to 6), with two players.

The losses of values are in `losses.adversarial`; here is who sees what. B images, t is the
transition t + 1 -> t.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hf_diffusion.config.options import option
from hf_diffusion.figures.curves import adversarial_curve
from hf_diffusion.losses.adversarial import (
    fake_loss,
    generator_loss,
    gradient_penalty,
    r1_penalty,
    r1_weight,
    real_loss,
)
from hf_diffusion.losses.noise_levels import stratified, timesteps
from hf_diffusion.losses.objective import Objective, Player, Values
from hf_diffusion.randomness import Draw, FixedDraw


# The weakest R1 that trained in 2-D with data of unit scale, see the table in train_ddgan.py.
R1_GAMMA = {"js": 0.05, "hellinger": 0.05, "reverse_kl": 0.05, "total_variation": 0.5, "wasserstein": 1.0}
# Share of pairs in which real beats fake, from which on the discriminator has little to teach.
CERTAIN = 0.98
# Norm below which the generator stands still.
NO_GRADIENT = 1e-7
# Reports in a row until a side is said to have won; at the start it is normal to be ahead.
PATIENCE = 3
ADVICE = {
    "the discriminator has won: it tells nearly every generated image from a real one": (
        "raise r1_gamma, lower discriminator_learning_rate, or train with fewer timesteps"
    ),
    "the generator has won: the discriminator takes generated images for the real ones": (
        "raise discriminator_learning_rate or discriminator_channels, or lower r1_gamma"
    ),
    "no gradient reaches the generator, the discriminator is saturated": (
        "raise r1_gamma, or choose another divergence"
    ),
}


@dataclass(kw_only=True)
class AdversarialOptions:
    """What the two networks play for; `losses.adversarial` has the divergences and penalties."""

    divergence: Literal["js", "hellinger", "reverse_kl", "total_variation", "wasserstein"] = option(
        "js", "divergence that the generator minimises", group="method"
    )
    generator_objective: Literal["default", "minmax", "non_saturating"] = option(
        "default", "the generator's side of the game; default is non_saturating for js and minmax for the others"
    )
    # R1 sums over pixels. No rule carries a good gamma to another size; these are a start.
    r1_gamma: float | None = option(
        None,
        "weight of R1, the squared gradient of the discriminator at real images; none goes by the divergence",
        at_least=0,
        tied=False,
    )
    r1_interval: int = option(1, "apply R1 at every so many steps", at_least=1, tied=False)
    # The paper's code does not multiply; without it a longer interval is a weaker penalty.
    r1_times_interval: bool = option(
        True, "multiply r1_gamma by the interval, so that the mean penalty stays the same"
    )
    wgan_gp: float = option(
        0.0, "weight of WGAN-GP, a gradient of norm 1 between real and generated; 0 is none", at_least=0
    )
    # A generator that is good already must not follow a discriminator that knows nothing yet.
    discriminator_warmup_steps: int = option(
        0, "first steps, in which the discriminator alone is updated", at_least=0, tied=False
    )
    n_critic: int = option(
        1, "update the generator at every so many steps; every step updates the discriminator", at_least=1, tied=False
    )
    l1_weight: float = option(0.0, "weight of the distance |prediction - x_0| in the generator's loss", at_least=0)
    timestep_sampling: Literal["uniform", "stratified"] = option(
        "uniform", "how a batch's timesteps are drawn; the paper's code draws them uniformly"
    )
    discriminator_full_precision: bool = option(
        False,
        "compute the discriminator in float32, whatever mixed_precision says of the generator",
        group="discriminator",
        tied=False,
    )

    @property
    def gamma(self) -> float:
        """The weight of R1 that is used."""
        return R1_GAMMA[self.divergence] if self.r1_gamma is None else self.r1_gamma

    @property
    def saturating(self) -> bool | None:
        """Which of the generator's losses is used; None is the one that trains."""
        return {"default": None, "minmax": True, "non_saturating": False}[self.generator_objective]


class DiscriminatorHalf(nn.Module):
    """All that the discriminator computes in its half of a step, as one forward.

    Data parallelism joins the gradients of one forward with one backward. Two forwards and the
    derivative within would be at the mercy of its bookkeeping.
    """

    def __init__(self, discriminator: nn.Module, options: AdversarialOptions):
        super().__init__()
        self.discriminator, self.options = discriminator, options

    def forward(
        self,
        x_t: Tensor,
        x_fake: Tensor,
        t: Tensor,
        x_tp1: Tensor,
        labels: Tensor | None,
        r1_gamma: float,
        mix: Tensor | None,
    ) -> dict[str, Tensor]:
        """Values (B,): "loss", its "penalty", and the discriminator's "real" and "fake"."""

        def critic(x: Tensor, full_precision: bool = self.options.discriminator_full_precision) -> Tensor:
            return discriminate(self.discriminator, x, t, x_tp1, labels, full_precision)

        values = {}
        if r1_gamma:
            x_t = x_t.detach().requires_grad_()
            # Second derivatives need float32.
            values["real"] = critic(x_t, full_precision=True)
            penalty = r1_penalty(values["real"], x_t, r1_gamma)
        else:
            values["real"] = critic(x_t)
            penalty = torch.zeros_like(values["real"])
        values["fake"] = critic(x_fake)
        if mix is not None:
            penalty = penalty + gradient_penalty(critic, x_t, x_fake, mix, self.options.wgan_gp)
        divergence = self.options.divergence
        loss = real_loss(divergence, values["real"]) + fake_loss(divergence, values["fake"]) + penalty
        return values | {"loss": loss, "penalty": penalty}

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the discriminator's activations in its backward pass."""
        self.discriminator.enable_gradient_checkpointing()


def discriminate(
    discriminator: nn.Module, x_t: Tensor, t: Tensor, x_tp1: Tensor, labels: Tensor | None, full_precision: bool
) -> Tensor:
    """The discriminator's values (B,) as float32; autocast has no say with `full_precision`."""
    with torch.autocast(x_t.device.type, enabled=False) if full_precision else nullcontext():
        return discriminator(x_t, t, x_tp1, labels, return_dict=False)[0].float()


class AdversarialGame(Objective):
    """A discriminator's turn, then a generator's, on the same real images and noise of their own.

    `scheduler` has `q_sample_pairs` and `sample_posterior`. Both networks get labels where the
    generator's config has `num_class_embeds`. For gradients that do not depend on the number of
    processes, the discriminator's groups must be contiguous and divide a process's batch.
    """

    shown: ClassVar[dict[str, str]] = {"loss_d": ".3f", "loss_g": ".3f", "right": ".2f", "max_abs_v": ".1f"}

    def __init__(
        self,
        scheduler: Any,
        generator: nn.Module,
        discriminator: nn.Module,
        options: AdversarialOptions,
        learning_rates: tuple[float, float],
    ):
        self.scheduler, self.discriminator, self.options = scheduler, discriminator, options
        self.spread = stratified if options.timestep_sampling == "stratified" else None
        self.num_timesteps = scheduler.config.num_train_timesteps
        self.class_conditional = generator.config.num_class_embeds is not None
        self.latent_dim = generator.config.latent_dim
        self.step = 0
        self.largest_value: Tensor | None = None
        # Who had won, at the last reports.
        self.ahead: list[str | None] = []
        self.generator = Player(
            generator, self.generator_values, learning_rates[0], "generator", "_g", frozen=(discriminator,)
        )
        self.critic = Player(
            DiscriminatorHalf(discriminator, options),
            self.discriminator_values,
            learning_rates[1],
            "discriminator",
            "_d",
            compilable=False,
            is_averaged=False,
        )
        super().__init__(self.generator, self.critic)

    def turns(self, step: int) -> Iterator[Player]:
        """The discriminator in every step, the generator in some."""
        self.step = step
        yield self.critic
        if step >= self.options.discriminator_warmup_steps and (step + 1) % self.options.n_critic == 0:
            yield self.generator

    # --- the two losses ---

    def discriminator_values(self, half: nn.Module, batch: dict[str, Tensor], draw: Draw | FixedDraw) -> Values:
        """The discriminator's losses (B,) on real and generated x_t."""
        options = self.options
        gamma = r1_weight(options.gamma, self.step, options.r1_interval, options.r1_times_interval)
        t, x_t, x_tp1, labels = self._real_pairs(batch, draw)
        with torch.no_grad():
            x_fake, _ = self._generate(self.generator.network, x_tp1, t, labels, draw)
        mix = draw.uniform() if options.wgan_gp else None
        values = half(x_t, x_fake, t, x_tp1, labels, gamma, mix)
        return {"loss": values["loss"], "penalty": values["penalty"], **self._watched(values, t)}

    def generator_values(self, generator: nn.Module, batch: dict[str, Tensor], draw: Draw | FixedDraw) -> Values:
        """The generator's losses (B,) on pairs of its own."""
        options = self.options
        t, _, x_tp1, labels = self._real_pairs(batch, draw)
        x_fake, x_0 = self._generate(generator, x_tp1, t, labels, draw)
        value = discriminate(self.discriminator, x_fake, t, x_tp1, labels, options.discriminator_full_precision)
        values = {"loss": generator_loss(options.divergence, value, options.saturating)}
        if options.l1_weight:
            values["l1"] = (x_0 - batch["x_0"]).abs().flatten(1).mean(dim=1)
            values["loss"] = values["loss"] + options.l1_weight * values["l1"]
        return values

    def _real_pairs(
        self, batch: dict[str, Tensor], draw: Draw | FixedDraw
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """t (B,), x_t and x_{t+1} (B, ...) of real data, labels (B,) where networks take them."""
        x_0 = batch["x_0"]
        t = timesteps(draw.level(self.spread), self.num_timesteps)
        noise_tp1, noise_t = draw.normal(*x_0.shape[1:]), draw.normal(*x_0.shape[1:])
        x_t, x_tp1 = self.scheduler.q_sample_pairs(x_0, t, noise_t, noise_tp1)
        return t, x_t, x_tp1, batch["labels"] if self.class_conditional else None

    def _generate(
        self, generator: nn.Module, x_tp1: Tensor, t: Tensor, labels: Tensor | None, draw: Draw | FixedDraw
    ) -> tuple[Tensor, Tensor]:
        """A generated x_t and the x_0 (B, ...) that it was drawn for."""
        latent, noise = draw.normal(self.latent_dim), draw.normal(*x_tp1.shape[1:])
        x_0 = generator(x_tp1, t, latent, labels, return_dict=False)[0].to(x_tp1.dtype)
        return self.scheduler.sample_posterior(x_0, x_tp1, t, noise), x_0

    # --- health ---

    def _watched(self, values: dict[str, Tensor], t: Tensor) -> Values:
        """The share of pairs with the real one ahead, and the values V by timestep."""
        real, fake = values["real"].detach(), values["fake"].detach()
        largest = torch.maximum(real.abs().max(), fake.abs().max())
        self.largest_value = largest if self.largest_value is None else torch.maximum(self.largest_value, largest)
        watched: Values = {"right": (real > fake).float()}
        for i in range(self.num_timesteps):
            here = (t == i).float()
            watched |= {f"real_t{i}": (real, here), f"fake_t{i}": (fake, here)}
        return watched

    def report(self, accelerator: Accelerator) -> dict[str, float]:
        """The largest value |V| of the discriminator since the last report."""
        if self.largest_value is None:
            return {}
        largest = accelerator.gather(self.largest_value.reshape(1)).max()
        self.largest_value = None
        return {"max_abs_v": float(largest)}

    def remark(self, values: dict[str, float]) -> str | None:
        """Who has won and what to do, once a side has been far ahead for `PATIENCE` reports."""
        discriminator, generator, stuck = ADVICE
        if values.get("grad_norm_g", 1.0) < NO_GRADIENT:
            state = stuck
        else:
            share = values["right"]
            state = discriminator if share > CERTAIN else generator if share < 1 - CERTAIN else None
        self.ahead = [*self.ahead, state][-PATIENCE - 1 :]
        lately = self.ahead[-PATIENCE:]
        if state is None or lately != [state] * PATIENCE or self.ahead == [state] * (PATIENCE + 1):
            return None
        told, largest = values["right"], values["max_abs_v"]
        return f"{state} ({told:.1%} of pairs told apart, |V| up to {largest:.3g}); {ADVICE[state]}"

    def identity(self) -> dict[str, Any]:
        """The game that a checkpoint belongs to."""
        return {
            "divergence": self.options.divergence,
            "num_timesteps": self.num_timesteps,
            "discriminator_parameters": sum(p.numel() for p in self.critic.network.parameters()),
            # one with frozen parts tells whose they are
            **getattr(self.discriminator, "identity", dict)(),
        }

    def draw_curve(self, metrics_jsonl: Path, out_png: Path) -> Path | None:
        """Draw both sides' losses from the run's log."""
        return adversarial_curve(metrics_jsonl, out_png)
