"""Sampling in a few steps with a denoising diffusion GAN.

Xiao, Kreis and Vahdat 2022, arXiv:2112.07804. Shapes: B images, C channels, H x W pixels; samples
of any other rank go the same way.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from hf_diffusion.pipelines.sampling_parts import SamplingMixin, in_micro_batches
from hf_diffusion.pipelines.self_contained import SelfContainedMixin


class DDGANPipeline(SamplingMixin, SelfContainedMixin, DiffusionPipeline):
    """Samples from a generator that was trained for its scheduler's T steps, with one call a step.

    Args:
        generator: called as `generator(sample, timestep, latent)`, with `class_labels=...` if
            `config.num_class_embeds` says that it knows classes; predicts x_0. `config.latent_dim`
            is the width of the latent. The sources of randomness of a call, `torch.Generator`s, are
            another thing, which diffusers calls `generator` in every pipeline.
        scheduler: a DDGANScheduler of the T steps of the training.
        id2label: the names of the classes by number; kept in model_index.json.
    """

    model_cpu_offload_seq = network_name = "generator"
    # What each of the few steps predicts is worth a look: a card shows it.
    _callback_tensor_inputs = ["latents", "x_0"]
    measures = {}
    # The training of a GAN leaves no labels out, so that no label means "no class".
    null_class_id = None

    def __init__(self, generator: ModelMixin, scheduler: SchedulerMixin, id2label: dict | None = None):
        super().__init__()
        self.register_modules(generator=generator, scheduler=scheduler)
        self.register_id2label(id2label)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int | str] | Tensor | None = None,
        batch_size: int | None = None,
        num_images_per_label: int = 1,
        num_inference_steps: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        micro_batch_size: int | None = None,
    ) -> ImagePipelineOutput | tuple[list[Image.Image] | np.ndarray | Tensor]:
        """Sample images, or whatever the generator was trained on.

        Args:
            class_labels: numbers or names of classes, one for each image, for a model that knows
                classes.
            batch_size: the number of images where there are no labels (1 if left out).
            num_images_per_label: images of each entry of `class_labels`, next to each other.
            num_inference_steps: T or None, which means T: the transitions between the noise levels
                are learned, so that a model of T steps cannot be sampled in fewer.
            generator: one, or a list with one for each image: then an image does not depend on the
                rest of its batch. The first noise, and the latent and the posterior's noise of
                every step are drawn from it.
            latents: unit noise (B, C, H, W) to start from instead of drawing it.
            output_type: "pil", "np" (B, H, W, C) in [0, 1], "pt" (B, C, H, W) in [0, 1], or
                "latent" (B, C, H, W) as the generator left it, about [-1, 1]. Samples that are no
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
        if not hasattr(self.scheduler, "sample_posterior"):
            raise ValueError(
                f"a {type(self.scheduler).__name__} cannot sample from this network; a denoising diffusion GAN needs "
                "the DDGANScheduler that it was trained with"
            )
        labels, batch = self.prepare_labels(class_labels, batch_size, num_images_per_label)
        self.check_common(
            batch,
            generator,
            latents,
            output_type,
            callback_on_step_end_tensor_inputs,
            micro_batch_size=micro_batch_size,
        )
        self._interrupt = False
        size = micro_batch_size or self.default_micro_batch_size()
        timesteps = self.prepare_timesteps(num_inference_steps)
        latents = self.prepare_latents(batch, generator, latents)
        z_shape = (batch, self.generator.config.latent_dim)
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                z = randn_tensor(z_shape, generator=generator, device=latents.device, dtype=latents.dtype)
                x_0 = in_micro_batches(self.generator, size, latents, t, z, class_labels=labels)
                latents = self.scheduler.step(x_0, t, latents, generator=generator, return_dict=False)[0]
                latents, _ = self.after_step(
                    callback_on_step_end, callback_on_step_end_tensor_inputs, i, t, latents=latents, x_0=x_0
                )
                progress_bar.update()
        return self.to_output(latents, output_type, return_dict)
