"""Sampling with classifier-free guidance; without guidance for a model that knows no classes.

Classifier-free guidance: Ho and Salimans 2022, arXiv:2207.12598. Autoguidance: Karras et al. 2024,
arXiv:2406.02507. Guidance interval: Kynkaanniemi et al. 2024, arXiv:2404.07724. Guidance rescale:
Lin et al. 2023, arXiv:2305.08891. Shapes: B images, C channels, H x W pixels; samples of any other
rank go the same way.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin
from diffusers.guiders import BaseGuidance
from PIL import Image
from torch import Tensor

from hf_diffusion.pipelines.sampling_parts import SamplingMixin, in_micro_batches
from hf_diffusion.pipelines.self_contained import SelfContainedMixin


# Solvers of diffusers that give blobs, noise or NaN on some schedule for a perfect network, and
# spacings of the noise levels that give blurred images on all; see
# tests/schedulers/test_stock_solvers.py. Heun and KDPM2 correct a step from sigma 20,291 by what is
# seen at its end, PNDM and IPNDM do not go where the schedule says.
UNFIT_SOLVERS = (
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "IPNDMScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
)
# FD in a classifier's features: model_cards/fashion_mnist_study/README.md.
SOLVER_ADVICE = (
    "Fewer calls of the network: `pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)`, with "
    "`from diffusers import UniPCMultistepScheduler`. On the Fashion-MNIST DDPM of hf_diffusion, Frechet distances in "
    "4, 5, 10 and 20 calls were 0.76, 0.51, 0.25 and 0.20 with UniPC, 1.02, 0.65, 0.27 and 0.20 with DPM++ 2M, and "
    "1.28, 0.89, 0.40 and 0.24 with DDIM (N 2,000; source: model_cards/fashion_mnist_study of hf_diffusion, "
    "bfloat16). Another model may differ."
)
UNFIT_SPACINGS = ("use_beta_sigmas", "use_flow_sigmas")


class ClassifierFreeGuidancePipeline(SamplingMixin, SelfContainedMixin, DiffusionPipeline):
    """Samples from a network, of given classes if it knows classes, with classifier-free guidance.

    Args:
        unet: called as `unet(sample, timestep, class_labels=...)`, with out_channels C, or 2 C for
            a learned variance. `config.num_class_embeds` is the number of classes (None:
            unconditional); with `config.null_class` the label `num_class_embeds` means "no
            class", which guidance needs.
        scheduler: any diffusers scheduler.
        id2label: the names of the classes by number; kept in model_index.json.
        vae: an autoencoder of diffusers, which decodes what the network draws; None draws samples.
        guide_unet: a weaker network of the same data and process, such as an early checkpoint, that
            guidance leads away from, in place of the prediction without a class (autoguidance).
    """

    model_cpu_offload_seq = "unet->vae"
    _optional_components = ["vae", "guide_unet"]
    sampling_options = (
        "num_inference_steps",
        "timesteps",
        "eta",
        "guidance_scale",
        "guidance_interval",
        "guidance_rescale",
    )
    measures = {
        "bpd": "hf_diffusion.evaluation.model_measures:measure_bits_per_dim",
        "bpd_ode": "hf_diffusion.evaluation.ode_likelihood:measure_gaussian_bits_per_dim",
        "consistency": "hf_diffusion.evaluation.determinism:measure_consistency",
        "inversion": "hf_diffusion.evaluation.determinism:measure_inversion",
    }

    def __init__(
        self,
        unet: ModelMixin,
        scheduler: SchedulerMixin,
        id2label: dict | None = None,
        vae: ModelMixin | None = None,
        guide_unet: ModelMixin | None = None,
    ):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae, guide_unet=guide_unet)
        self.register_id2label(id2label)

    def example_call(self) -> dict[str, Any]:
        """Arguments of a call that draws a few samples, guided where the model can be."""
        steps = min(50, self.scheduler.config.num_train_timesteps)
        can_guide = self.guide_unet is not None or self.null_class_id is not None
        guidance = {"guidance_scale": 1.5} if can_guide else {}
        return {**super().example_call(), "num_inference_steps": steps, **guidance}

    @property
    def solver_advice(self) -> str:
        """Which solver to take for how many calls of the network, with its source, for a card."""
        return SOLVER_ADVICE if hasattr(self.scheduler, "alphas_cumprod") else ""

    def check_scheduler(self) -> None:
        """Raise ValueError for a stock solver or spacing of noise levels that cannot draw here."""
        name, config = type(self.scheduler).__name__, self.scheduler.config
        if name in UNFIT_SOLVERS:
            raise ValueError(
                f"{name} cannot sample on every schedule of a discrete diffusion process; use UniPCMultistepScheduler "
                "or another of the compatibles of DDIMEtaScheduler, by from_config(pipe.scheduler.config)"
            )
        for option in UNFIT_SPACINGS:
            if config.get(option) and hasattr(self.scheduler, "alphas_cumprod"):
                raise ValueError(
                    f"{option} of {name} leaves out the noise levels at which a discrete diffusion process draws its "
                    "details; leave it out, or use use_karras_sigmas or use_exponential_sigmas"
                )

    def check_levels(self) -> None:
        """Raise ValueError where a stock solver has one noise level twice, and divides by 0."""
        sigmas = getattr(self.scheduler, "sigmas", None)
        if isinstance(sigmas, Tensor) and len(sigmas) == self.num_timesteps + 1 and self.scheduler.order == 1:
            # the last one is where the run ends, which may be the level before it
            levels = sigmas[:-1]
            if not (levels.isfinite().all() and (levels.diff() < 0).all()):
                raise ValueError(
                    f"num_inference_steps={self.num_timesteps} gives two steps of {type(self.scheduler).__name__} the "
                    f"same noise level, or one without signal; use fewer steps than the "
                    f"{self.scheduler.config.num_train_timesteps} of the training, or DDIMEtaScheduler"
                )

    def check_guidance(
        self,
        labels: Tensor | None,
        guidance_scale: float,
        guidance_rescale: float,
        guider: BaseGuidance | None,
    ) -> None:
        """Raise ValueError, with what is allowed, for guidance that does not fit the model."""
        if guider is not None:
            self._check_guider(guider, labels, guidance_scale)
        self.check_scale(guidance_scale)
        if self.guide_unet is not None:
            self.check_guide(self.guide_unet)
        elif guidance_scale != 1 and labels is None:
            raise ValueError(
                f"guidance_scale={guidance_scale} needs class_labels to guide towards; use 1 without them"
            )
        elif guidance_scale != 1 and self.null_class_id is None:
            raise ValueError(
                f"guidance_scale={guidance_scale} needs a model that was trained with a null class (null_class=True "
                "and labels left out at random); this one has none, so use guidance_scale=1"
            )
        if not 0 <= guidance_rescale <= 1:
            raise ValueError(f"guidance_rescale must be between 0 and 1, not {guidance_rescale!r}")

    def _check_guider(self, guider: BaseGuidance, labels: Tensor | None, guidance_scale: float) -> None:
        name = type(guider).__name__
        if guidance_scale != 1:
            raise ValueError(
                f"guidance_scale={guidance_scale} and a guider were given; set the scale of the {name} instead"
            )
        if labels is None:
            raise ValueError(f"{name} needs class_labels to guide towards; leave the guider out without them")
        if "pred_uncond" in guider._input_predictions and self.null_class_id is None:
            raise ValueError(
                f"{name} needs a model that was trained with a null class (null_class=True and labels left out at "
                "random); this one has none, so leave the guider out"
            )

    def step_options(
        self, generator: torch.Generator | list[torch.Generator] | None, eta: float | None
    ) -> dict[str, Any]:
        """What the scheduler's `step` takes of the call's arguments."""
        accepted = inspect.signature(self.scheduler.step).parameters
        options = {"generator": generator, "eta": eta}
        return {name: value for name, value in options.items() if value is not None and name in accepted}

    def takes_variance(self) -> bool:
        """Whether the scheduler's `step` uses the channels of a learned variance.

        Any scheduler may carry a variance_type over from the one it was made from. Multistep
        solvers even have the argument, but only to throw the variance away, by keeping three
        channels whatever the sample has.
        """
        accepted = inspect.signature(type(self.scheduler).__init__).parameters
        is_learned = str(self.scheduler.config.get("variance_type")).startswith("learned")
        return is_learned and "variance_type" in accepted and "solver_order" not in accepted

    def predict(
        self,
        latents: Tensor,
        t: Tensor,
        labels: Tensor | None,
        micro_batch_size: int | None,
        network: ModelMixin | None = None,
    ) -> Tensor:
        """The network's output for x_t (B, C, ...), `micro_batch_size` samples at a time."""
        inputs = self.scheduler.scale_model_input(latents, t)
        return in_micro_batches(network or self.unet, micro_batch_size, inputs, t, class_labels=labels)

    def predict_guided(
        self,
        guider: BaseGuidance,
        step: int,
        t: Tensor,
        latents: Tensor,
        labels: Tensor,
        micro_batch_size: int | None,
    ) -> Tensor:
        """What a guider makes of the predictions it asks for, with the variance of the first."""
        channels = self.unet.config.in_channels
        guider.set_state(step=step, num_inference_steps=self.num_timesteps, timestep=t)
        null = None if self.null_class_id is None else torch.full_like(labels, self.null_class_id)
        inputs = {"class_labels": (labels, null), "sample": self.scheduler.scale_model_input(latents, t)}
        # The first prediction is the conditional one.
        batches, variance = guider.prepare_inputs(inputs), None
        for batch in batches:
            guider.prepare_models(self.unet)
            output = self.predict(latents, t, batch.class_labels, micro_batch_size)
            guider.cleanup_models(self.unet)
            batch.noise_pred = output[:, :channels]
            variance = output[:, channels:] if variance is None else variance
        return torch.cat([guider(batches)[0], variance], dim=1)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int | str] | Tensor | None = None,
        batch_size: int | None = None,
        num_images_per_label: int = 1,
        num_inference_steps: int = 50,
        timesteps: list[int] | str | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_rescale: float = 0.0,
        eta: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        micro_batch_size: int | None = None,
        guider: BaseGuidance | None = None,
    ) -> ImagePipelineOutput | tuple[list[Image.Image] | np.ndarray | Tensor]:
        """Sample images, or whatever the network was trained on.

        Args:
            class_labels: numbers or names of classes, one for each image. None on a model with a
                null class samples from all classes.
            batch_size: the number of images where there are no labels (1 if left out).
            num_images_per_label: images of each entry of `class_labels`, next to each other.
            num_inference_steps: the number of denoising steps. From 2 to 20 of them
                UniPCMultistepScheduler is best by measurement, see `solver_advice`.
            timesteps: the steps themselves instead, in the form that `set_timesteps` takes.
            guidance_scale: w in uncond + w * (cond - uncond); 1 is plain conditional sampling,
                without a second forward. With a guide_unet its prediction, of the same class, takes
                the place of uncond.
            guidance_interval: guide only where t / num_train_timesteps lies in [low, high]; 0 is
                clean, 1 is pure noise.
            guidance_rescale: phi of arXiv:2305.08891, Eq. 16, between 0 and 1: how far the guided
                output is brought back to the standard deviation of the conditional one.
            eta: handed to the scheduler's `step`; None leaves the scheduler's own.
            generator: one, or a list with one for each image: then an image does not depend on the
                rest of its batch.
            latents: unit noise (B, C, H, W) to start from instead of drawing it.
            output_type: "pil", "np" (B, H, W, C) in [0, 1], "pt" (B, C, H, W) in [0, 1], or
                "latent" (B, C, H, W) as the scheduler left it, about [-1, 1]. Samples that are no
                images are never "pil", and keep their shape and values in all others.
            return_dict: whether to return an `ImagePipelineOutput` instead of a tuple.
            callback_on_step_end: called as f(pipe, step, t, tensors) after each step; returns a
                dict of changed tensors. It may set `pipe._guidance_scale` for the steps that
                follow, 1 for none, and `pipe._interrupt`.
            callback_on_step_end_tensor_inputs: which tensors the callback is given.
            micro_batch_size: images that one forward of the network takes; does not change the
                images. None: chosen for the device.
            guider: a guider of diffusers (experimental there), such as `AdaptiveProjectedGuidance`
                or `hf_diffusion.ClassifierGuidance`, which takes the place of
                guidance_scale, guidance_interval and guidance_rescale.

        Returns:
            `ImagePipelineOutput` or a tuple with the images. Raises ValueError for unknown classes
            and for arguments that do not fit the model, the scheduler or each other.
        """
        labels, batch = self.prepare_labels(class_labels, batch_size, num_images_per_label)
        self.check_scheduler()
        self.check_steps(num_inference_steps, timesteps, eta, guidance_interval)
        self.check_guidance(labels, guidance_scale, guidance_rescale, guider)
        self.check_common(
            batch,
            generator,
            latents,
            output_type,
            callback_on_step_end_tensor_inputs,
            micro_batch_size=micro_batch_size,
        )
        self._guidance_scale, self._interrupt = guidance_scale, False
        micro_batch_size = micro_batch_size or self.default_micro_batch_size()
        given_labels = labels
        if labels is None and self.null_class_id is not None:
            labels = torch.full((batch,), self.null_class_id, device=self._execution_device)
        guide_labels = None
        if self.guide_unet is not None and self.guide_unet.config.get("num_class_embeds"):
            guide_labels = labels

        timesteps = self.prepare_timesteps(num_inference_steps, timesteps)
        self.check_levels()
        is_inside = self.timesteps_within(guidance_interval)
        channels, takes_variance = self.unet.config.in_channels, self.takes_variance()
        step_options = self.step_options(generator, eta)
        latents = self.prepare_latents(batch, generator, latents)
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                if self.guidance_scale is not guidance_scale:  # a callback has set it
                    guidance_scale = self.guidance_scale
                    self.check_guidance(given_labels, guidance_scale, guidance_rescale, guider)
                if guider is not None:
                    output = self.predict_guided(guider, i, t, latents, labels, micro_batch_size)
                elif is_inside[i] and guidance_scale != 1:
                    if self.guide_unet is None:
                        both = torch.cat([torch.full_like(labels, self.null_class_id), labels])  # (2 B,)
                        doubled = self.predict(torch.cat([latents, latents]), t, both, micro_batch_size)
                        worse, output = doubled.chunk(2)  # each (B, C or 2 C, ...)
                    else:
                        worse = self.predict(latents, t, guide_labels, micro_batch_size, self.guide_unet)
                        output = self.predict(latents, t, labels, micro_batch_size)
                    worse, better, variance = worse[:, :channels], output[:, :channels], output[:, channels:]
                    mean = worse + guidance_scale * (better - worse)
                    if guidance_rescale > 0:
                        mean = rescale_guided(mean, better, guidance_rescale)
                    output = torch.cat([mean, variance], dim=1)  # the variance is that of the better one
                else:
                    output = self.predict(latents, t, labels, micro_batch_size)
                if not takes_variance:
                    output = output[:, :channels]
                latents = self.scheduler.step(output, t, latents, **step_options, return_dict=False)[0]
                (latents,) = self.after_step(
                    callback_on_step_end, callback_on_step_end_tensor_inputs, i, t, latents=latents
                )
                progress_bar.update()
        return self.to_output(self.decode(latents, output_type), output_type, return_dict)


def rescale_guided(guided: Tensor, cond: Tensor, phi: float) -> Tensor:
    """Bring each sample's deviation towards the conditional one, Eqs. 15-16 of arXiv:2305.08891."""
    dims = tuple(range(1, guided.ndim))
    rescaled = guided * (cond.std(dims, keepdim=True) / guided.std(dims, keepdim=True))
    return phi * rescaled + (1 - phi) * guided
