"""Sampling with a consistency model: in one call of the network, better in a few.

Song et al. 2023, arXiv:2303.01469. Shapes: B images, C channels, H x W pixels; samples of any other
rank go the same way.
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


class ConsistencyPipeline(SamplingMixin, SelfContainedMixin, DiffusionPipeline):
    """Samples from a network that maps any noise level to the data.

    Args:
        unet: called as `unet(sample, timestep, class_labels=...)`. `config.num_class_embeds` is the
            number of classes (None: unconditional); with `config.null_class` the label
            `num_class_embeds` means "no class", which guidance needs.
        scheduler: a ConsistencyScheduler of the training, or diffusers'
            CMStochasticIterativeScheduler.
        id2label: the names of the classes by number; kept in model_index.json.
    """

    model_cpu_offload_seq = "unet"
    sampling_options = ("num_inference_steps", "timesteps", "sigmas", "guidance_scale")
    _callback_tensor_inputs = ["latents", "x_0"]

    def __init__(self, unet: ModelMixin, scheduler: SchedulerMixin, id2label: dict | None = None):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_id2label(id2label)

    def default_options(self) -> dict[str, Any]:
        """The values of options of a call that follow from the model where they are not given."""
        return {"num_inference_steps": len(self.scheduler.config.get("sampling_sigmas") or ()) or 1}

    def example_call(self) -> dict[str, Any]:
        """Arguments of a call that draws a few samples, in two steps or those of the training."""
        trained = self.scheduler.config.get("sampling_sigmas")
        return {**super().example_call(), "num_inference_steps": len(trained) if trained else 2}

    @property
    def solver_advice(self) -> str:
        """How many calls a student of ends may take, for a card."""
        config = self.scheduler.config
        if not config.get("predicts_end"):
            return ""
        return (
            f"`num_inference_steps` may be 1 to {len(config.sampling_sigmas)}: every call of this network estimates "
            "the sample itself, fewer calls are faster, and more are nearer to the samples of its teacher."
        )

    def check_guidance(self, labels: Tensor | None, guidance_scale: float) -> None:
        """Raise ValueError, with what is allowed, for guidance that does not fit the model."""
        self.check_scale(guidance_scale)
        if guidance_scale != 1 and (labels is None or self.null_class_id is None):
            raise ValueError(
                f"guidance_scale={guidance_scale} needs class_labels, and a model that was trained with a null class "
                "(labels left out at random); use guidance_scale=1"
            )

    def choose_levels(
        self, num_inference_steps: int, timesteps: Sequence[int] | None, sigmas: Sequence[float] | None
    ) -> Tensor:
        """The timesteps of this call; levels of one's own, or their indices, replace the number."""
        if sigmas is not None and timesteps is not None:
            raise ValueError("timesteps and sigmas both say which noise levels to visit; give one of them")
        if sigmas is None:
            return self.prepare_timesteps(num_inference_steps, timesteps)
        self.scheduler.set_timesteps(sigmas=sigmas, device=self._execution_device)
        self._num_timesteps = len(self.scheduler.timesteps)
        return self.scheduler.timesteps

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int | str] | Tensor | None = None,
        batch_size: int | None = None,
        num_images_per_label: int = 1,
        num_inference_steps: int | None = None,
        timesteps: list[int] | None = None,
        sigmas: tuple[float, ...] | None = None,
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
            num_inference_steps: the number of calls of the network, one or a few. None is one, or
                those that the model was trained for, whose levels are its scheduler's
                `sampling_sigmas`.
            timesteps: indices of the scheduler's grid of noise levels in falling order instead,
                such as [22, 0]; 0 is pure noise.
            sigmas: the noise levels themselves instead, falling from the scheduler's `sigma_max`,
                such as (80, 0.8).
            guidance_scale: w in uncond + w * (cond - uncond), for a model with a null class; 1 is
                plain conditional sampling, without a second forward. It is learned once and for
                all where the model was distilled from a guided teacher.
            generator: one, or a list with one for each image: then an image does not depend on the
                rest of its batch.
            latents: unit noise (B, C, H, W) to start from instead of drawing it.
            output_type: "pil", "np" (B, H, W, C) in [0, 1], "pt" (B, C, H, W) in [0, 1], or
                "latent" (B, C, H, W) as the scheduler left it, about [-1, 1]. Samples that are no
                images are never "pil", and keep their shape and values in all others.
            return_dict: whether to return an `ImagePipelineOutput` instead of a tuple.
            callback_on_step_end: called as f(pipe, step, t, tensors) after each step; returns a
                dict of changed tensors.
            callback_on_step_end_tensor_inputs: which tensors the callback is given: "latents", and
                "x_0", what the step has made of them before the next level's noise.
            micro_batch_size: images that one forward of the network takes; does not change the
                images. None: chosen for the device.

        Returns:
            `ImagePipelineOutput` or a tuple with the images. Raises ValueError for unknown classes
            and for arguments that do not fit the model, the scheduler or each other.
        """
        labels, batch = self.prepare_labels(class_labels, batch_size, num_images_per_label)
        if num_inference_steps is None:
            num_inference_steps = self.default_options()["num_inference_steps"]
        self.check_steps(num_inference_steps, timesteps)
        self.check_guidance(labels, guidance_scale)
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
        timesteps = self.choose_levels(num_inference_steps, timesteps, sigmas)
        # looking a timestep up in the run would make the host wait
        self.scheduler.set_begin_index(0)
        latents = self.prepare_latents(batch, generator, latents)
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                inputs = self.scheduler.scale_model_input(latents, t)
                output = in_micro_batches(self.unet, size, inputs, t, class_labels=labels)
                if guidance_scale != 1:
                    # The estimate of x_0 is linear in the output, so this guides it.
                    null = torch.full_like(labels, self.null_class_id)
                    uncond = in_micro_batches(self.unet, size, inputs, t, class_labels=null)
                    output = uncond + guidance_scale * (output - uncond)
                latents, *rest = self.scheduler.step(output, t, latents, generator=generator, return_dict=False)
                x_0 = rest[0] if rest else latents
                latents, _ = self.after_step(
                    callback_on_step_end, callback_on_step_end_tensor_inputs, i, t, latents=latents, x_0=x_0
                )
                progress_bar.update()
        return self.to_output(latents, output_type, return_dict)
