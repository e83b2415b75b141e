"""Sampling from a network that was trained to undo noise on categories (D3PM).

Austin et al. 2021, arXiv:2107.03006. Classifier-free guidance: Ho and Salimans 2022,
arXiv:2207.12598. Shapes: B images, C channels, H x W pixels, K levels; samples of any other rank go
the same way.
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


class DiscreteImagePipeline(SamplingMixin, SelfContainedMixin, DiffusionPipeline):
    """Samples images of K levels, of given classes if the network knows classes.

    Args:
        unet: called as `unet(sample, timestep, class_labels=...)` with levels as numbers in
            [-1, 1]; its output has K C or 2 C channels, as the scheduler's `prediction_type` says.
            `config.num_class_embeds` is the number of classes (None: unconditional); with
            `config.null_class` the label `num_class_embeds` means "no class", which guidance
            needs.
        scheduler: the D3PMScheduler of the training.
        id2label: the names of the classes by number; kept in model_index.json.
    """

    model_cpu_offload_seq = "unet"
    sampling_options = ("num_inference_steps", "guidance_scale")
    measures = {"bpd": "hf_diffusion.evaluation.discrete_measures:measure_bits_per_dim"}

    def __init__(self, unet: ModelMixin, scheduler: SchedulerMixin, id2label: dict | None = None):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_id2label(id2label)

    def example_call(self) -> dict[str, Any]:
        """Arguments of a call that draws a few samples."""
        return {**super().example_call(), "num_inference_steps": min(100, self.scheduler.config.num_train_timesteps)}

    def check_guidance(self, labels: Tensor | None, guidance_scale: float) -> None:
        """Raise ValueError, with what is allowed, for guidance that does not fit the model."""
        self.check_scale(guidance_scale)
        if guidance_scale != 1 and labels is None:
            raise ValueError(
                f"guidance_scale={guidance_scale} needs class_labels to guide towards; use 1 without them"
            )
        if guidance_scale != 1 and self.null_class_id is None:
            raise ValueError(
                f"guidance_scale={guidance_scale} needs a model that was trained with a null class (null_class=True "
                "and labels left out at random); this one has none, so use guidance_scale=1"
            )

    def predict(
        self, latents: Tensor, x_t: Tensor, t: Tensor, labels: Tensor | None, micro_batch_size: int | None
    ) -> Tensor:
        """Log probabilities of x_0 (B, C, H, W, K), `micro_batch_size` samples at a time."""
        output = in_micro_batches(self.unet, micro_batch_size, latents, t, class_labels=labels)
        return self.scheduler.x_0_logits(output, x_t).log_softmax(dim=-1)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int | str] | Tensor | None = None,
        batch_size: int | None = None,
        num_images_per_label: int = 1,
        num_inference_steps: int | None = None,
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
            num_inference_steps: the number of steps; None is all timesteps of the training. Fewer
                go by the exact products of the skipped transitions.
            guidance_scale: w in log p(x_0) + (w - 1) (log p(x_0 | class) - log p(x_0)) + ..., so
                that p(x_0) is proportional to p(x_0 | class)^w p(x_0)^(1 - w); 1 is plain
                conditional sampling, without a second forward.
            generator: one, or a list with one for each image: then an image does not depend on the
                rest of its batch. Each step draws B x C x H x W x K numbers in float64.
            latents: unit noise (B, C, H, W) to start from instead of drawing it; the first levels
                are its quantiles, or all the same for absorbing noise.
            output_type: "pil", "np" (B, H, W, C) in [0, 1], "pt" (B, C, H, W) in [0, 1], or
                "latent" (B, C, H, W), the levels as numbers in [-1, 1]. Samples that are no
                images are never "pil", and keep their shape and values in all others.
            return_dict: whether to return an `ImagePipelineOutput` instead of a tuple.
            callback_on_step_end: called as f(pipe, step, t, tensors) after each step; returns a
                dict of changed tensors, which are rounded to the levels.
            callback_on_step_end_tensor_inputs: which tensors the callback is given.
            micro_batch_size: images that one forward of the network takes; does not change the
                images. None: chosen for the device.

        Returns:
            `ImagePipelineOutput` or a tuple with the images. Raises ValueError for unknown classes
            and for arguments that do not fit the model, the scheduler or each other.
        """
        if not hasattr(self.scheduler, "to_categories"):
            raise ValueError(
                f"a {type(self.scheduler).__name__} has no categories; sample with the D3PMScheduler that the network "
                "was trained with"
            )
        if num_inference_steps is None:
            num_inference_steps = self.scheduler.config.num_train_timesteps
        labels, batch = self.prepare_labels(class_labels, batch_size, num_images_per_label)
        self.check_steps(num_inference_steps)
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
        micro_batch_size = micro_batch_size or self.default_micro_batch_size()
        null = None
        if self.null_class_id is not None:
            null = torch.full((batch,), self.null_class_id, device=self._execution_device)
        labels = null if labels is None else labels

        timesteps = self.prepare_timesteps(num_inference_steps)
        noise = self.prepare_latents(batch, generator, latents)
        x_t = self.scheduler.sample_prior(torch.special.ndtr(noise.double()))
        latents = self.scheduler.to_values(x_t)
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                x_0 = self.predict(latents, x_t, t, labels, micro_batch_size)
                if guidance_scale != 1:
                    uncond = self.predict(latents, x_t, t, null, micro_batch_size)
                    x_0 = uncond + guidance_scale * (x_0 - uncond)
                x_t = self.scheduler.step(x_0, t, x_t, generator=generator, return_dict=False)[0]
                (latents,) = self.after_step(
                    callback_on_step_end,
                    callback_on_step_end_tensor_inputs,
                    i,
                    t,
                    latents=self.scheduler.to_values(x_t),
                )
                if callback_on_step_end is not None:
                    x_t = self.scheduler.to_categories(latents)
                progress_bar.update()
        return self.to_output(latents, output_type, return_dict)
