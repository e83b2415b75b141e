"""The Accelerate loop for denoising diffusion GANs (arXiv:2112.07804, Eqs. 4 to 6): a discriminator's and a
generator's half a step.

What surrounds the optimizer step is in `training_run`, the losses are in `losses.adversarial`. B images, t the
transition t + 1 -> t.
"""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from PIL import Image
from torch import Tensor, nn

from hf_diffusion.checkpoints import DATA_PARALLEL, engine
from hf_diffusion.config.training import TrainingConfig
from hf_diffusion.data.images import ImageData, StreamingImageData
from hf_diffusion.evaluation.in_training import Measurement
from hf_diffusion.figures import adversarial_curve
from hf_diffusion.losses.adversarial import (
    fake_loss,
    generator_loss,
    gradient_penalty,
    r1_penalty,
    r1_weight,
    real_loss,
)
from hf_diffusion.randomness import Draw
from hf_diffusion.schedulers.scheduling_ddgan import DDGANScheduler
from hf_diffusion.training_run import TrainingRun, adam, made_ready


# (divergence, gamma): the weakest R1 that trained in 2-D with data of unit scale, see the table in train_ddgan.py
R1_GAMMA = {"js": 0.05, "hellinger": 0.05, "reverse_kl": 0.05, "total_variation": 0.5, "wasserstein": 1.0}
CERTAIN = 0.98  # share of pairs in which real beats fake, from which on the discriminator has little to teach
NO_GRADIENT = 1e-7  # norm below which the generator stands still
PATIENCE = 3  # reports in a row until a side is said to have won; at the start it is normal to be ahead
ADVICE = {
    "the discriminator has won: it tells nearly every generated image from a real one": "raise r1_gamma, lower "
    "discriminator_learning_rate, or train with fewer timesteps",
    "the generator has won: the discriminator takes generated images for the real ones": "raise "
    "discriminator_learning_rate or discriminator_channels, or lower r1_gamma",
    "no gradient reaches the generator, the discriminator is saturated": "raise r1_gamma, or choose another divergence",
}

Micro = tuple[int, dict[str, Tensor], Draw]
Sampler = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True, kw_only=True)
class AdversarialObjective:
    """What the two networks play for; see `losses.adversarial` for the divergences and penalties.

    `saturating` None takes the generator's loss that trains. R1 acts every `r1_interval` steps, `r1_gamma` times the
    interval if `r1_times_interval`. `wgan_gp` is the weight of WGAN-GP (0: none), `l1_weight` that of the distance of
    the prediction to x_0. The generator is updated at every `n_critic`-th step after the first `warmup_steps`.
    `full_precision` computes the discriminator in float32 also where the rest is in half precision.
    """

    divergence: str = "js"
    saturating: bool | None = None
    r1_gamma: float = R1_GAMMA["js"]
    r1_interval: int = 1
    r1_times_interval: bool = True
    wgan_gp: float = 0.0
    l1_weight: float = 0.0
    n_critic: int = 1
    warmup_steps: int = 0
    full_precision: bool = False


class DiscriminatorHalf(nn.Module):
    """All that the discriminator computes in its half of a step, as one forward.

    Data parallelism joins the gradients of one forward with one backward; two forwards and the derivative within would
    be at the mercy of its bookkeeping.
    """

    def __init__(self, discriminator: nn.Module, objective: AdversarialObjective):
        super().__init__()
        self.discriminator, self.objective = discriminator, objective

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
        """Per-image (B,) "loss", "penalty" within it, and the values "real" and "fake" of the discriminator."""

        def critic(x: Tensor, full_precision: bool = self.objective.full_precision) -> Tensor:
            return discriminate(self.discriminator, x, t, x_tp1, labels, full_precision)

        values = {}
        if r1_gamma:
            x_t = x_t.detach().requires_grad_()
            values["real"] = critic(x_t, full_precision=True)  # second derivatives need float32
            penalty = r1_penalty(values["real"], x_t, r1_gamma)
        else:
            values["real"] = critic(x_t)
            penalty = torch.zeros_like(values["real"])
        values["fake"] = critic(x_fake)
        if mix is not None:
            penalty = penalty + gradient_penalty(critic, x_t, x_fake, mix, self.objective.wgan_gp)
        divergence = self.objective.divergence
        loss = real_loss(divergence, values["real"]) + fake_loss(divergence, values["fake"]) + penalty
        return values | {"loss": loss, "penalty": penalty}


def discriminate(
    discriminator: nn.Module, x_t: Tensor, t: Tensor, x_tp1: Tensor, labels: Tensor | None, full_precision: bool
) -> Tensor:
    """The discriminator's values (B,) in float32, computed in float32 or in the precision that autocast chooses."""
    with torch.autocast(x_t.device.type, enabled=False) if full_precision else nullcontext():
        return discriminator(x_t, t, x_tp1, labels, return_dict=False)[0].float()


class DDGANTrainer(TrainingRun):
    """Trains `generator` against `discriminator` for the transitions of `scheduler`; export, preview and measurements:
    see TrainingRun.

    Both get labels if `class_conditional`. Each step draws one batch of real images for both halves and everything
    else anew for each. For gradients that do not depend on the number of processes the discriminator's groups must be
    contiguous and divide a process's batch.
    """

    draw_curve = staticmethod(adversarial_curve)

    def __init__(
        self,
        config: TrainingConfig,
        accelerator: Accelerator,
        generator: nn.Module,
        discriminator: nn.Module,
        scheduler: DDGANScheduler,
        data: ImageData | StreamingImageData,
        objective: AdversarialObjective,
        sampler: Sampler,
        discriminator_learning_rate: float,
        export: Callable[[nn.Module, Path], None],
        preview: Callable[[nn.Module], Image.Image] | None = None,
        measurements: Sequence[Measurement] = (),
    ):
        super().__init__(config, accelerator, data, export, preview, measurements)
        if engine(accelerator) != DATA_PARALLEL:
            raise ValueError(
                f"{engine(accelerator)} takes one network with its optimizer, and a GAN trains two; leave it out, as "
                "training/accelerate_configs/multi_gpu.yaml does"
            )
        self.scheduler, self.objective, self.sampler = scheduler, objective, sampler
        self.steps_of_process = scheduler.config.num_train_timesteps
        self.class_conditional = generator.config.num_class_embeds is not None
        self.learning_rates = {"generator": config.learning_rate, "discriminator": discriminator_learning_rate}
        generator = made_ready(config, generator)
        # not compiled: compiled graphs cannot be differentiated twice
        self.discriminator = made_ready(config, discriminator, compilable=False)
        half = DiscriminatorHalf(discriminator, objective)
        self.model, self.discriminator_half, self.optimizer, self.discriminator_optimizer = accelerator.prepare(
            generator,
            half,
            adam(config, generator, self.learning_rates["generator"]),
            adam(config, half, self.learning_rates["discriminator"]),
        )
        self.networks = [self.model, self.discriminator_half]
        self.largest_value = torch.zeros((), device=accelerator.device)
        self.ahead: list[str | None] = []  # who had won, at the last reports
        self._start_average()
        self._resume()

    # --- a step ------------------------------------------------------------------------------------------------------

    def _optimizer_step(self, stream: Iterator[dict[str, Tensor]]) -> None:
        """Both halves on the same real images; a half whose gradient is not finite changes nothing and ends the
        step."""
        micros = list(self._micro_batches(stream))
        updated = self._discriminator_step(micros)
        warm = self.step >= self.objective.warmup_steps
        if updated and warm and (self.step + 1) % self.objective.n_critic == 0:
            updated = self._generator_step(micros)
        if updated:
            self.skipped_in_a_row = 0

    def _discriminator_step(self, micros: list[Micro]) -> bool:
        for micro, batch, draw in micros:
            with self._sync_at_the_last(micro, self.discriminator_half):
                values, t = self._discriminator_values(micro, batch, draw)
                self.accelerator.backward(values["loss"].mean() / len(micros))
            self._remember(micro, batch, draw, values["loss"])
            self._note(values, t)
        return self._update("discriminator", self.discriminator_half, self.discriminator_optimizer)

    def _generator_step(self, micros: list[Micro]) -> bool:
        self.discriminator.requires_grad_(False)  # its weights' gradients would be thrown away
        try:
            for micro, batch, draw in micros:
                with self._sync_at_the_last(micro, self.model):
                    values = self._generator_values(micro, batch, draw)
                    self.accelerator.backward(values["loss_g"].mean() / len(micros))
                self._remember(micro, batch, draw, values["loss_g"])
                self.means.add(values, None)
        finally:
            self.discriminator.requires_grad_(True)
        updated = self._update("generator", self.model, self.optimizer)
        if updated and self.ema is not None:
            self.ema.step(self.model.parameters())
        return updated

    def _discriminator_values(
        self, micro: int, batch: dict[str, Tensor], draw: Draw
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The discriminator's losses on real and generated pairs, and t (B,)."""
        self._seed_dropout("discriminator", micro)
        objective = self.objective
        gamma = r1_weight(objective.r1_gamma, self.step, objective.r1_interval, objective.r1_times_interval)
        with self.accelerator.autocast():
            t, x_t, x_tp1, labels = self._real_pairs(batch, draw)
            with torch.no_grad():
                x_fake, _ = self._generate(x_tp1, t, labels, draw)
            mix = draw.uniform() if objective.wgan_gp else None
            return self.discriminator_half(x_t, x_fake, t, x_tp1, labels, gamma, mix), t

    def _generator_values(self, micro: int, batch: dict[str, Tensor], draw: Draw) -> dict[str, Tensor]:
        """The generator's losses on pairs of its own."""
        self._seed_dropout("generator", micro)
        objective = self.objective
        with self.accelerator.autocast():
            t, _, x_tp1, labels = self._real_pairs(batch, draw)
            x_fake, x_0 = self._generate(x_tp1, t, labels, draw)
            value = discriminate(self.discriminator, x_fake, t, x_tp1, labels, objective.full_precision)
        values = {"loss_g": generator_loss(objective.divergence, value, objective.saturating)}
        if objective.l1_weight:
            values["l1"] = (x_0 - batch["pixels"]).abs().flatten(1).mean(dim=1)
            values["loss_g"] = values["loss_g"] + objective.l1_weight * values["l1"]
        return values

    def _real_pairs(self, batch: dict[str, Tensor], draw: Draw) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """t (B,) and x_t, x_{t+1} (B, C, H, W) of real images, with their labels (B,) where the networks take them."""
        x_0 = batch["pixels"]
        t = draw.timesteps(self.sampler, self.steps_of_process)
        noise_tp1, noise_t = draw.normal(*x_0.shape[1:]), draw.normal(*x_0.shape[1:])
        x_t, x_tp1 = self.scheduler.q_sample_pairs(x_0, t, noise_t, noise_tp1)
        return t, x_t, x_tp1, batch["labels"] if self.class_conditional else None

    def _generate(self, x_tp1: Tensor, t: Tensor, labels: Tensor | None, draw: Draw) -> tuple[Tensor, Tensor]:
        """A generated x_t and the x_0 (B, C, H, W) that it was drawn for."""
        latent, noise = draw.normal(self.latent_dim), draw.normal(*x_tp1.shape[1:])
        x_0 = self.model(x_tp1, t, latent, labels, return_dict=False)[0].to(x_tp1.dtype)
        return self.scheduler.sample_posterior(x_0, x_tp1, t, noise), x_0

    def _sync_at_the_last(self, micro: int, network: nn.Module):
        last = micro == self.config.gradient_accumulation_steps - 1
        return nullcontext() if last else self.accelerator.no_sync(network)

    def _update(self, name: str, network: nn.Module, optimizer: AcceleratedOptimizer) -> bool:
        """One step of the optimizer, unless the gradient is not finite; whether there was one."""
        self._set_learning_rate(optimizer, self.learning_rates[name])
        grad_norm = self._clip_gradients(optimizer, network)
        finite = math.isfinite(grad_norm)
        if finite:
            optimizer.step()
            self.means.add({f"grad_norm_{name[0]}": torch.tensor([grad_norm], device=self.accelerator.device)}, None)
        else:
            self._skip(optimizer, grad_norm)
        optimizer.zero_grad(set_to_none=True)
        return finite

    @property
    def latent_dim(self) -> int:
        return self.accelerator.unwrap_model(self.model).config.latent_dim

    # --- health ------------------------------------------------------------------------------------------------------

    def _note(self, values: dict[str, Tensor], t: Tensor) -> None:
        real, fake = values["real"].detach(), values["fake"].detach()
        means = {"loss_d": values["loss"], "penalty": values["penalty"], "right": (real > fake).float()}
        self.means.add(means, None)
        for i in range(self.steps_of_process):
            here = (t == i).float()
            self.means.add_weighted(f"real_t{i}", real, here)
            self.means.add_weighted(f"fake_t{i}", fake, here)
        self.largest_value = torch.maximum(self.largest_value, torch.maximum(real.abs().max(), fake.abs().max()))

    def _report(self) -> None:
        largest = self.accelerator.gather(self.largest_value.reshape(1)).max()
        self.largest_value = torch.zeros_like(self.largest_value)
        optimizers = {"lr": self.optimizer, "lr_d": self.discriminator_optimizer}
        values = {name: optimizer.param_groups[0]["lr"] for name, optimizer in optimizers.items()}
        shown = {"loss_d": ".3f", "loss_g": ".3f", "right": ".2f", "max_abs_v": ".1f"}
        values = self._write_report({**values, "max_abs_v": float(largest)}, shown)
        self._say_who_has_won(values)

    def _say_who_has_won(self, values: dict[str, float]) -> None:
        """A warning, once, when a side has been far ahead for `PATIENCE` reports."""
        discriminator, generator, stuck = ADVICE
        if values.get("grad_norm_g", 1.0) < NO_GRADIENT:
            state = stuck
        else:
            share = values["right"]
            state = discriminator if share > CERTAIN else generator if share < 1 - CERTAIN else None
        self.ahead = [*self.ahead, state][-PATIENCE - 1 :]
        lately = self.ahead[-PATIENCE:]
        new = len(lately) == PATIENCE and set(lately) == {state} and self.ahead != [state] * (PATIENCE + 1)
        if state is not None and new and self.accelerator.is_main_process:
            self.progress.write(
                f"step {self.step}: {state} ({values['right']:.1%} of pairs told apart, |V| up to "
                f"{values['max_abs_v']:.3g}); {ADVICE[state]}",
                file=sys.stderr,
            )

    def _identity(self) -> dict:
        trained = sum(p.numel() for p in self.discriminator.parameters())
        return super()._identity() | {
            "divergence": self.objective.divergence,
            "num_timesteps": self.steps_of_process,
            "discriminator_parameters": trained,
        }

    def rehearse(self, batch: dict[str, Tensor], draw: Draw) -> None:
        """Both halves of one micro step, whose gradients are thrown away."""
        self.accelerator.backward(self._discriminator_values(0, batch, draw)[0]["loss"].mean())
        self.accelerator.backward(self._generator_values(0, batch, draw)["loss_g"].mean())
        self.optimizer.zero_grad()
        self.discriminator_optimizer.zero_grad()
