"""Sampling from a preconditioned denoiser, EDM (Karras et al. 2022, arXiv:2206.00364).

Classifier-free guidance: Ho and Salimans 2022, arXiv:2207.12598. Autoguidance: Karras et al. 2024,
arXiv:2406.02507. Guidance interval: Kynkaanniemi et al. 2024, arXiv:2404.07724. Shapes: B images, C
channels, H x W pixels; samples of any other rank go the same way.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin
from PIL import Image
from torch import Tensor

from hf_diffusion.pipelines.sampling_parts import SamplingMixin, in_micro_batches
from hf_diffusion.pipelines.self_contained import SelfContainedMixin


class EDMPipeline(SamplingMixin, SelfContainedMixin, DiffusionPipeline):
    """Samples from noise to data, of given classes if the network knows classes, with guidance.

    Args:
        unet: called as `unet(c_in x, c_noise, class_labels=...)`, with out_channels C.
            `config.num_class_embeds` is the number of classes (None: unconditional); with
            `config.null_class` the label `num_class_embeds` means "no class", which guidance needs.
        scheduler: `EDMHeunScheduler`, or `EDMEulerScheduler` or `EDMDPMSolverMultistepScheduler`
            of diffusers for a network with EDM's preconditioning.
        id2label: the names of the classes by number; kept in model_index.json.
        vae: an autoencoder of diffusers, which decodes what the network draws; None draws samples.
        guide_unet: a weaker network of the same data and process, such as an early checkpoint, that
            guidance leads away from, in place of the prediction without a class (autoguidance).
    """

    model_cpu_offload_seq = "unet->vae"
    _optional_components = ["vae", "guide_unet"]
    sampling_options = (
        "num_inference_steps",
        "guidance_scale",
        "guidance_interval",
        "s_churn",
        "s_min",
        "s_max",
        "s_noise",
    )

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
        can_guide = self.guide_unet is not None or self.null_class_id is not None
        guidance = {"guidance_scale": 1.5} if can_guide else {}
        return {**super().example_call(), "num_inference_steps": 18, **guidance}

    def check_scheduler(self, churn: dict[str, float]) -> None:
        """Raise ValueError for a scheduler that knows another preconditioning, or no churn."""
        name, trained = type(self.scheduler).__name__, self.scheduler.config.get("preconditioning", "edm")
        accepted = inspect.signature(type(self.scheduler).__init__).parameters
        if trained != "edm" and "preconditioning" not in accepted:
            raise ValueError(
                f"the network was trained with preconditioning {trained!r}, which {name} does not know; use "
                "EDMHeunScheduler"
            )
        unknown = [key for key in churn if key not in inspect.signature(self.scheduler.set_timesteps).parameters]
        if unknown:
            raise ValueError(f"{name} cannot be given {', '.join(unknown)}; leave it out, or use EDMHeunScheduler")

    def check_guidance(
        self, labels: Tensor | None, guidance_scale: float, guidance_interval: tuple[float, float]
    ) -> None:
        """Raise ValueError, with what is allowed, for guidance that does not fit the model."""
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
        if len(tuple(guidance_interval)) != 2 or not 0 <= guidance_interval[0] <= guidance_interval[1]:
            raise ValueError(
                "guidance_interval must be (low, high) with 0 <= low <= high, noise levels sigma, not "
                f"{guidance_interval!r}"
            )

    def predict(
        self,
        latents: Tensor,
        t: Tensor,
        labels: Tensor | None,
        micro_batch_size: int | None,
        network: ModelMixin | None = None,
    ) -> Tensor:
        """The network's output for a noisy x (B, C, ...), `micro_batch_size` samples at a time."""
        inputs = self.scheduler.scale_model_input(latents, t)
        return in_micro_batches(network or self.unet, micro_batch_size, inputs, t, class_labels=labels)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int | str] | Tensor | None = None,
        batch_size: int | None = None,
        num_images_per_label: int = 1,
        num_inference_steps: int = 18,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, math.inf),
        s_churn: float | None = None,
        s_min: float | None = None,
        s_max: float | None = None,
        s_noise: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        micro_batch_size: int | None = None,
    ) -> ImagePipelineOutput | tuple[list[Image.Image] | np.ndarray | Tensor]:
        """Sample images, or whatever the network was trained on.

        Args:
            class_labels: numbers or names of classes, one for each image. None on a model with a
                null class samples from all classes.
            batch_size: the number of images where there are no labels (1 if left out).
            num_images_per_label: images of each entry of `class_labels`, next to each other.
            num_inference_steps: the number of steps; one of second order calls the network twice,
                but for the last.
            guidance_scale: w in uncond + w * (cond - uncond); 1 is plain conditional sampling,
                without a second forward. With a guide_unet its prediction, of the same class, takes
                the place of uncond.
            guidance_interval: guide only at noise levels sigma in [low, high].
            s_churn, s_min, s_max, s_noise: how much noise is added on the way, see
                `EDMHeunScheduler`; None leaves the scheduler's own.
            generator: one, or a list with one for each image: then an image does not depend on the
                rest of its batch.
            latents: unit noise (B, C, H, W) to start from instead of drawing it.
            output_type: "pil", "np" (B, H, W, C) in [0, 1], "pt" (B, C, H, W) in [0, 1], or
                "latent" (B, C, H, W) as the scheduler left it, about [-1, 1]. Samples that are no
                images are never "pil", and keep their shape and values in all others.
            return_dict: whether to return an `ImagePipelineOutput` instead of a tuple.
            callback_on_step_end: called as f(pipe, step, t, tensors) after each step, with t of its
                first call of the network; returns a dict of changed tensors.
            callback_on_step_end_tensor_inputs: which tensors the callback is given.
            micro_batch_size: images that one forward of the network takes; does not change the
                images. None: chosen for the device.

        Returns:
            `ImagePipelineOutput` or a tuple with the images. Raises ValueError for unknown classes
            and for arguments that do not fit the model, the scheduler or each other.
        """
        given = {"s_churn": s_churn, "s_min": s_min, "s_max": s_max, "s_noise": s_noise}
        churn = {name: value for name, value in given.items() if value is not None}
        labels, batch = self.prepare_labels(class_labels, batch_size, num_images_per_label)
        self.check_steps(num_inference_steps)
        self.check_scheduler(churn)
        self.check_guidance(labels, guidance_scale, guidance_interval)
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
        if labels is None and self.null_class_id is not None:
            labels = torch.full((batch,), self.null_class_id, device=self._execution_device)
        guided_labels = None  # (2 B,), uncond and cond; of a guide_unet (B,)
        if self.guide_unet is not None:
            guided_labels = labels if self.guide_unet.config.get("num_class_embeds") else None
        elif guidance_scale != 1:
            guided_labels = torch.cat([torch.full_like(labels, self.null_class_id), labels])

        self.scheduler.set_timesteps(num_inference_steps, device=self._execution_device, **churn)
        timesteps, order = self.scheduler.timesteps, self.scheduler.order
        self._num_timesteps = num_inference_steps
        low, high = guidance_interval
        sigmas = self.scheduler.sigmas.tolist()  # of every call, and the end's
        latents = self.prepare_latents(batch, generator, latents)
        with self.progress_bar(total=num_inference_steps) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                if guidance_scale != 1 and low <= sigmas[i] <= high:
                    if self.guide_unet is None:
                        doubled = self.predict(torch.cat([latents, latents]), t, guided_labels, micro_batch_size)
                        worse, better = doubled.chunk(2)
                    else:
                        worse = self.predict(latents, t, guided_labels, micro_batch_size, self.guide_unet)
                        better = self.predict(latents, t, labels, micro_batch_size)
                    output = worse + guidance_scale * (better - worse)
                else:
                    output = self.predict(latents, t, labels, micro_batch_size)
                latents = self.scheduler.step(output, t, latents, generator=generator, return_dict=False)[0]
                if (i + 1) % order and i + 1 < len(timesteps):
                    continue  # within a step
                step = i // order
                (latents,) = self.after_step(
                    callback_on_step_end,
                    callback_on_step_end_tensor_inputs,
                    step,
                    timesteps[step * order],
                    latents=latents,
                )
                progress_bar.update()
        return self.to_output(self.decode(latents, output_type), output_type, return_dict)
