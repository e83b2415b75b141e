"""Sampling with a MeanFlow network: in one call, better in a few.

Geng et al. 2025, arXiv:2505.13447. sigma 1 is the noise, 0 the data. Shapes: B images, C channels,
H x W pixels; samples of any other rank go the same way.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin
from PIL import Image
from torch import Tensor

from hf_diffusion.pipelines.sampling_parts import SamplingMixin, in_micro_batches
from hf_diffusion.pipelines.self_contained import SelfContainedMixin


class MeanFlowPipeline(SamplingMixin, SelfContainedMixin, DiffusionPipeline):
    """Samples from a network of average velocities, of given classes if it knows classes.

    Args:
        unet: called as `unet(sample, timestep, duration, class_labels=...)` with timestep and
            duration in units of `num_train_timesteps * sigma`, floats. `config.num_class_embeds` is
            the number of classes (None: unconditional); with `config.null_class` the label
            `num_class_embeds` means "no class".
        scheduler: a FlowMatchingScheduler with Euler's steps, which are exact for an average
            velocity.
        id2label: the names of the classes by number; kept in model_index.json.
    """

    model_cpu_offload_seq = "unet"
    sampling_options = ("num_inference_steps", "guidance_scale")
    measures = {"consistency": "hf_diffusion.evaluation.determinism:measure_consistency"}

    def __init__(self, unet: ModelMixin, scheduler: SchedulerMixin, id2label: dict | None = None):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_id2label(id2label)

    def example_call(self) -> dict[str, Any]:
        """Arguments of a call that draws a few samples in two steps."""
        return {**super().example_call(), "num_inference_steps": 2}

    def check_guidance(self, labels: Tensor | None, guidance_scale: float) -> None:
        """Raise ValueError, with what is allowed, for guidance that does not fit the model."""
        if guidance_scale != 1 and (labels is None or self.null_class_id is None):
            raise ValueError(
                f"guidance_scale={guidance_scale} needs class_labels, and a model that was trained with a null class "
                "(labels left out at random); use guidance_scale=1"
            )

    def check_scheduler(self) -> None:
        """Raise ValueError for a scheduler of another process, or whose steps are not Euler's."""
        solver = self.scheduler.config.get("solver", "none of its own")
        if solver != "euler":
            raise ValueError(
                f"a {type(self.scheduler).__name__} with solver {solver} cannot sample from average velocities; use "
                'FlowMatchingScheduler with solver="euler"'
            )

    def choose_levels(self, num_inference_steps: int, sigmas: Sequence[float] | None) -> tuple[Tensor, Tensor]:
        """The timesteps of this call (N,) and the durations of its steps (N,)."""
        levels = {"num_inference_steps": num_inference_steps} if sigmas is None else {"sigmas": list(sigmas)}
        self.scheduler.set_timesteps(device=self._execution_device, **levels)
        self._num_timesteps = len(self.scheduler.timesteps)
        durations = -self.scheduler.sigmas.diff() * self.scheduler.config.num_train_timesteps
        return self.scheduler.timesteps, durations.to(self._execution_device, torch.float32)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int | str] | Tensor | None = None,
        batch_size: int | None = None,
        num_images_per_label: int = 1,
        num_inference_steps: int = 1,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 1.0,
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
            num_inference_steps: the number of steps, and of calls of the network.
            sigmas: the levels of the steps themselves instead, falling from 1, such as (1, 0.5).
            guidance_scale: w in uncond + w * (cond - uncond), for a model with a null class; 1 is
                one call a step. Where the model has learned a guided velocity it needs no other.
            generator: one, or a list with one for each image: then an image does not depend on the
                rest of its batch.
            latents: unit noise (B, C, H, W) to start from instead of drawing it.
            output_type: "pil", "np" (B, H, W, C) in [0, 1], "pt" (B, C, H, W) in [0, 1], or
                "latent" (B, C, H, W) as the scheduler left it, about [-1, 1]. Samples that are no
                images are never "pil", and keep their shape and values in all others.
            return_dict: whether to return an `ImagePipelineOutput` instead of a tuple.
            callback_on_step_end: called as f(pipe, step, t, tensors) after each step; returns a
                dict of changed tensors.
            callback_on_step_end_tensor_inputs: which tensors the callback is given.
            micro_batch_size: images that one forward of the network takes; does not change the
                images. None: chosen for the device.

        Returns:
            `ImagePipelineOutput` or a tuple with the images. Raises ValueError for unknown classes
            and for arguments that do not fit the model, the scheduler or each other.
        """
        labels, batch = self.prepare_labels(class_labels, batch_size, num_images_per_label)
        self.check_scheduler()
        self.check_guidance(labels, guidance_scale)
        self.check_steps(num_inference_steps)
        self.check_common(
            batch,
            generator,
            latents,
            output_type,
            callback_on_step_end_tensor_inputs,
            micro_batch_size=micro_batch_size,
        )
        self._guidance_scale, self._interrupt = guidance_scale, False
        size = micro_batch_size or self.default_micro_batch_size()
        if labels is None and self.null_class_id is not None:
            labels = torch.full((batch,), self.null_class_id, device=self._execution_device)

        timesteps, durations = self.choose_levels(num_inference_steps, sigmas)
        latents = self.prepare_latents(batch, generator, latents)
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                duration = durations[i].expand(batch)
                velocity = in_micro_batches(self.unet, size, latents, t, duration, class_labels=labels)
                if guidance_scale != 1:
                    null = torch.full_like(labels, self.null_class_id)
                    uncond = in_micro_batches(self.unet, size, latents, t, duration, class_labels=null)
                    velocity = uncond + guidance_scale * (velocity - uncond)
                # z_r = z_t - (t - r) u(z_t, r, t), exact for an average velocity
                latents = self.scheduler.step(velocity, t, latents, return_dict=False)[0]
                (latents,) = self.after_step(
                    callback_on_step_end, callback_on_step_end_tensor_inputs, i, t, latents=latents
                )
                progress_bar.update()
        return self.to_output(latents, output_type, return_dict)
