"""Few-step models by distribution matching and an adversary on the denoiser's own features, DMD2
(arXiv:2405.14867), as an objective of two players.

The losses of samples are in `losses.distribution_matching`. B samples.
"""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from hf_diffusion.config.options import option
from hf_diffusion.figures.curves import matching_curve
from hf_diffusion.losses import distribution_matching as losses
from hf_diffusion.losses.consistency_objective import digest, process_digest
from hf_diffusion.losses.noise_levels import stratified
from hf_diffusion.losses.objective import Objective, Player, Values
from hf_diffusion.randomness import Draw, FixedDraw


@dataclass(kw_only=True)
class DistributionMatchingOptions:
    """What a few-step student is trained by."""

    dmd_steps: int = option(
        1, "calls of the network that a sample is to cost", group="method", at_least=1, at_most=16, often=True
    )
    student_sigmas: tuple[float, ...] = option(
        (),
        "noise levels of these calls, falling; none is the highest that init_from knows, at most 80, and then even "
        "ones in the time of the cosine schedule",
        above=0,
    )
    student_inputs: Literal["simulated", "noised"] = option(
        "simulated",
        "what later calls see in training: simulated, the student's own samples of the earlier ones, with noise; "
        "noised, real ones with noise, which is cheaper and is not what they see later",
    )
    distribution_matching_weight: float = option(
        1.0, "weight of distribution matching; 0 trains by the adversary alone", at_least=0
    )
    # Of 28x28 images both halves have gradients of about one norm at weights of 1.
    adversarial_weight: float = option(
        0.1, "weight of the adversary in the student's loss; 0 matches distributions alone", at_least=0
    )
    classifier_weight: float = option(
        0.01, "weight of telling real from fake in the loss of the fake denoiser, beside its denoising", above=0
    )
    r1_gamma: float = option(
        0.0,
        "weight of (D(x) - D(x + r1_noise z))^2 at real samples, which smooths the adversary as R1 does; 0 is none",
        at_least=0,
    )
    r1_noise: float = option(0.1, "its noise, beside inputs of the network, whose deviation is about 1", above=0)
    fake_updates: int = option(2, "updates of the fake denoiser in a step; the paper has 5", at_least=1, tied=False)
    fake_warmup_steps: int = option(0, "first steps, in which the fake denoiser alone learns", at_least=0, tied=False)
    reuse_samples: bool = option(
        True, "the fake denoiser learns from the samples of the student's update, not from new ones", tied=False
    )
    fake_learning_rate: float | None = option(
        None, "highest learning rate of the fake denoiser; none takes learning_rate", above=0, tied=False
    )
    matching_sigma_min: float = option(0.03, "lowest noise level at which distributions are compared", above=0)
    matching_sigma_max: float = option(30.0, "highest such level, at most that of init_from", above=0)
    matching_spacing: Literal["time", "log"] = option(
        "time", "how these levels are drawn: evenly in the time of the cosine schedule, or in ln(sigma)"
    )
    teacher_guidance_scale: float = option(
        1.0, "classifier-free guidance of the teacher, which the student learns; 1 is none", at_least=0
    )
    # Without it samples without a label come from weights that were never trained for few steps.
    label_dropout: float = option(
        0.1, "share of labels replaced by 'no class', where init_from knows it", at_least=0, below=1
    )
    sigma_min: float = option(0.002, "noise level at which the student is the identity", above=0)

    def check(self) -> None:
        """ValueError for settings that contradict each other."""
        if self.init_from is None:
            raise ValueError("distribution matching starts from a trained diffusion model; name it by --init_from")
        if not self.distribution_matching_weight and not self.adversarial_weight:
            raise ValueError("distribution_matching_weight and adversarial_weight are both 0; give one of them")
        if self.teacher_guidance_scale != 1 and not (self.class_conditional and self.distribution_matching_weight):
            raise ValueError(
                f"teacher_guidance_scale {self.teacher_guidance_scale} guides the teacher to classes; give "
                "--class_conditional and a distribution_matching_weight above 0, or 1"
            )
        if self.matching_sigma_min >= self.matching_sigma_max:
            raise ValueError(
                f"matching_sigma_min {self.matching_sigma_min} must be below matching_sigma_max "
                f"{self.matching_sigma_max}"
            )
        if self.student_sigmas:
            losses.check_levels(self.student_sigmas, self.dmd_steps, None)


class DistributionMatchingGame(Objective):
    """The student's turn, then those of the fake denoiser, in every step.

    `scheduler` is a ConsistencyScheduler with the student's `sampling_sigmas`; `teacher` is a
    denoiser in its parametrisation. Student and fake denoiser begin with the teacher's weights.
    """

    shown: ClassVar[dict[str, str]] = {"loss": ".4f", "denoising": ".4f", "right": ".2f"}

    def __init__(
        self,
        scheduler: Any,
        student: nn.Module,
        fake: losses.FakeDenoiser,
        teacher: nn.Module,
        options: DistributionMatchingOptions,
        learning_rate: float,
        accelerator: Accelerator,
    ):
        self.scheduler, self.options, self.student, self.fake = scheduler, options, student, fake
        self.sigmas = tuple(scheduler.config.sampling_sigmas)
        self.class_conditional = student.config.num_class_embeds is not None
        self.null_class_id = student.config.num_class_embeds if student.config.get("null_class") else None
        if options.teacher_guidance_scale != 1 and self.null_class_id is None:
            raise ValueError(
                f"teacher_guidance_scale {options.teacher_guidance_scale} needs a model that was trained with labels "
                "left out, and init_from was not; give 1"
            )
        self.teacher = teacher.to(accelerator.device).eval().requires_grad_(False)
        self.generator = Player(student, self.values, learning_rate, frozen=(fake,))
        rate = options.fake_learning_rate or learning_rate
        # its hooks are no part of a compiled graph
        self.critic = Player(fake, self.fake_values, rate, "fake", "_f", compilable=False, is_averaged=False)
        super().__init__(self.generator, self.critic)

    def turns(self, step: int) -> Iterator[Player]:
        """The student, after the warm-up, and then what has to follow it."""
        if step >= self.options.fake_warmup_steps:
            yield self.generator
        for _ in range(self.options.fake_updates):
            yield self.critic

    # --- the two losses ---

    def values(self, network: nn.Module, batch: dict[str, Tensor], draw: Draw | FixedDraw) -> Values:
        """The student's losses (B,); the samples stay in the batch for the fake denoiser."""
        options = self.options
        x, labels = self.sample(network, batch, draw)
        if options.reuse_samples and network.training:
            batch["generated"], batch["generated_labels"] = x.detach(), labels
        u = draw.level(stratified)
        sigma = self.levels(u)
        x_t = self.scheduler.add_noise(x, draw.normal(*x.shape[1:]), sigma)
        rest = "without gradient" if options.distribution_matching_weight else "left out"
        # what dropout adds is no difference of distributions
        self.fake.eval()
        with nullcontext() if options.adversarial_weight else torch.no_grad():
            seen = self.fake(*self.inputs(x_t, sigma), labels, rest=rest)
        values, loss = {}, torch.zeros_like(sigma, dtype=torch.float32)
        if options.distribution_matching_weight:
            with torch.no_grad():
                real = self.guided_teacher(x_t, sigma, labels)
                fake = self.estimate(seen["output"], x_t, sigma)
            values["matching"] = losses.matching_loss(x, real, fake)
            loss = loss + options.distribution_matching_weight * values["matching"]
        if options.adversarial_weight:
            values["fooling"] = F.softplus(-seen["fake"])
            loss = loss + options.adversarial_weight * values["fooling"]
        return {"loss": loss, "level": u} | {name: value.detach() for name, value in values.items()}

    def fake_values(self, network: nn.Module, batch: dict[str, Tensor], draw: Draw | FixedDraw) -> Values:
        """The losses (B,) of the fake denoiser, on samples of the student and real ones."""
        options = self.options
        x, labels = self.generated(batch, draw)
        sigma, shape = self.levels(draw.level(stratified)), x.shape[1:]
        x_t = self.scheduler.add_noise(x, draw.normal(*shape), sigma)
        real, denoises = None, options.distribution_matching_weight > 0
        if options.adversarial_weight:
            noisy = self.scheduler.add_noise(batch["x_0"], draw.normal(*shape), sigma)
            real, _ = self.inputs(noisy, sigma)
            if options.r1_gamma:
                real = torch.cat([real, real + options.r1_noise * draw.normal(*shape)])
        rest = "with gradient" if denoises else "left out"
        self.fake.train()
        seen = network(*self.inputs(x_t, sigma), labels, real=real, rest=rest)
        values, loss = {}, torch.zeros_like(sigma, dtype=torch.float32)
        if denoises:
            # of the network's own output, whatever it predicts
            error = (self.estimate(seen["output"], x_t, sigma) - x).square().flatten(1).mean(1)
            values["denoising"] = error / self.scheduler.scalings(sigma, 0.0)[2].square().to(error)
            loss = loss + values["denoising"]
        if options.adversarial_weight:
            of_real, *of_rough = seen["real"].split(len(x))
            told = losses.real_and_fake_loss(of_real, seen["fake"])
            for rough in of_rough:
                told = told + options.r1_gamma * (of_real - rough).square()
            values |= {"telling": told, "right": (of_real > seen["fake"]).float()}
            loss = loss + options.classifier_weight * told
        return {"loss": loss} | {name: value.detach() for name, value in values.items()}

    # --- the student's samples ---

    def sample(
        self, network: nn.Module, batch: dict[str, Tensor], draw: Draw | FixedDraw
    ) -> tuple[Tensor, Tensor | None]:
        """x (B, ...) of one of the student's calls for each sample, and its labels (B,)."""
        x_0, labels = batch["x_0"], batch["labels"] if self.class_conditional else None
        if self.null_class_id is not None and network.training:
            labels = torch.where(draw.uniform() < self.options.label_dropout, self.null_class_id, labels)
        count = len(self.sigmas)
        # as many for all rows: processes that share a generator must draw alike
        noises = [draw.normal(*x_0.shape[1:]) for _ in self.sigmas]
        call = (draw.uniform() * count).long().clamp(max=count - 1)
        sigma = torch.tensor(self.sigmas, dtype=torch.float64).to(call.device, non_blocking=True)[call]
        x = self.sigmas[0] * noises[0]
        if self.options.student_inputs == "simulated":
            # without the wrapper of several processes, which need not ask for as many calls
            bare = self.student if network.training else network
            self.simulate(bare, x, noises[1:], call, labels)
        else:
            noised = self.scheduler.add_noise(x_0, noises[0], sigma)
            x = torch.where((call > 0).reshape(-1, *(1,) * (x.ndim - 1)), noised, x)
        return self.scheduler.denoise(network, x, sigma, **conditions(labels)), labels

    @torch.no_grad()
    def simulate(
        self, network: nn.Module, x: Tensor, noises: list[Tensor], call: Tensor, labels: Tensor | None
    ) -> None:
        """Take x (B, ...) in place through the calls before `call` (B,), as sampling does."""
        config = self.scheduler.config
        for k, noise in enumerate(noises):
            rows = (call > k).nonzero().squeeze(1)
            if len(rows) == 0:
                return
            sigma = torch.full((len(rows),), self.sigmas[k], dtype=torch.float64, device=x.device)
            known = conditions(None if labels is None else labels[rows])
            x_0 = self.scheduler.denoise(network, x[rows], sigma, **known)
            x_0 = x_0.clamp(-1, 1) if config.clip_denoised else x_0
            x[rows] = x_0 + math.sqrt(self.sigmas[k + 1] ** 2 - config.sigma_min**2) * noise[rows]

    def generated(self, batch: dict[str, Tensor], draw: Draw | FixedDraw) -> tuple[Tensor, Tensor | None]:
        """Samples (B, ...) of the student without a gradient: those of its turn, or new ones."""
        if "generated" in batch:
            return batch["generated"], batch["generated_labels"]
        with torch.no_grad():
            x, labels = self.sample(self.student, batch, draw)
        if self.options.reuse_samples:
            batch["generated"], batch["generated_labels"] = x, labels
        return x, labels

    # --- the denoisers ---

    def levels(self, u: Tensor) -> Tensor:
        """The levels (B,) at which distributions are compared, for u (B,) in [0, 1)."""
        options, known = self.options, self.scheduler.config.trained_sigmas
        highest = options.matching_sigma_max if known is None else min(options.matching_sigma_max, known[-1])
        return losses.levels(u, options.matching_sigma_min, highest, options.matching_spacing)

    def inputs(self, x_t: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """What a network is shown of x_t (B, ...), and told of sigma (B,)."""
        c_in = self.scheduler.scalings(sigma, 0.0)[0].to(x_t).reshape(-1, *(1,) * (x_t.ndim - 1))
        return c_in * x_t, self.scheduler.network_timestep(sigma)

    def estimate(self, output: Tensor, x_t: Tensor, sigma: Tensor) -> Tensor:
        """x_0 (B, ...) by a denoiser's raw output."""
        return self.scheduler.denoise(lambda *_, **__: (output,), x_t, sigma, 0.0)

    def guided_teacher(self, x_t: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        """x_0 (B, ...) by the teacher, with the guidance of the options."""
        cond = self.scheduler.denoise(self.teacher, x_t, sigma, 0.0, **conditions(labels))
        scale = self.options.teacher_guidance_scale
        if scale == 1:
            return cond
        null = torch.full_like(labels, self.null_class_id)
        uncond = self.scheduler.denoise(self.teacher, x_t, sigma, 0.0, class_labels=null)
        return uncond + scale * (cond - uncond)

    def identity(self) -> dict[str, Any]:
        """The process, and the teacher that a checkpoint belongs to."""
        return {"process": process_digest(self.scheduler), "teacher": digest(self.teacher)}

    def draw_curve(self, metrics_jsonl: Path, out_png: Path) -> Path | None:
        """Draw both sides' losses from the run's log."""
        return matching_curve(metrics_jsonl, out_png)


def conditions(labels: Tensor | None) -> dict[str, Tensor]:
    """What a network is given beside x and its timestep."""
    return {} if labels is None else {"class_labels": labels}
