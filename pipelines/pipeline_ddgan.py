"""Image sampling in a few steps with a denoising diffusion GAN, Xiao, Kreis and Vahdat 2022, arXiv:2112.07804.

Shapes: B images, C channels, H x W pixels.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from hf_diffusion.pipelines.self_contained import SelfContainedMixin


OUTPUT_TYPES = ("pil", "np", "pt", "latent")
# Of the first feature map, in one forward on the CPU; measured for ClassifierFreeGuidancePipeline, whose network is alike.
CPU_FEATURE_MAP_BYTES = 2**22


class DDGANPipeline(SelfContainedMixin, DiffusionPipeline):
    """Samples images from a generator that was trained for the T steps of its scheduler, by one call of it a step.

    Args:
        generator: called as `generator(sample, timestep, latent)`, with `class_labels=...` if `config.num_class_embeds` says
            that it knows classes; predicts x_0. `config.latent_dim` is the width of the latent. The sources of randomness of a
            call, `torch.Generator`s, are another thing, which diffusers calls `generator` in every pipeline.
        scheduler: a DDGANScheduler of the T steps of the training.
        id2label: the names of the classes by number; kept in model_index.json.
    """

    model_cpu_offload_seq = "generator"
    _callback_tensor_inputs = ["latents"]

    def __init__(self, generator: ModelMixin, scheduler: SchedulerMixin, id2label: dict | None = None):
        super().__init__()
        self.register_modules(generator=generator, scheduler=scheduler)
        if id2label is not None:
            id2label = {int(i): str(name) for i, name in id2label.items()}  # JSON turns the numbers into strings
        self.register_to_config(id2label=id2label)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    @property
    def id2label(self) -> dict[int, str] | None:
        """The names of the classes by number, None if they have no names."""
        return self.config["id2label"]

    @property
    def num_classes(self) -> int | None:
        """The number of classes, None for an unconditional model."""
        return self.generator.config.get("num_class_embeds")

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images."""
        size = self.generator.config.sample_size
        return (size, size) if isinstance(size, int) else tuple(size)

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Set `pipe._interrupt = True` in a callback to leave out the remaining steps."""
        return self._interrupt

    def check_inputs(
        self,
        label_ids: list[int] | None,
        batch: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None,
        output_type: str,
        callback_on_step_end_tensor_inputs: Sequence[str],
        micro_batch_size: int | None,
    ) -> None:
        """Raise ValueError, with what is allowed, for an argument of a call that the rest cannot work with."""
        if not hasattr(self.scheduler, "sample_posterior"):
            raise ValueError(
                f"a {type(self.scheduler).__name__} cannot sample from this network; a denoising diffusion GAN needs the"
                " DDGANScheduler that it was trained with"
            )
        if self.num_classes is not None and label_ids is None:
            raise ValueError(
                f"class_labels are missing; this model needs one of 0 to {self.num_classes - 1} for each image"
            )
        if batch < 1:
            raise ValueError(f"the call asks for {batch} images; ask for at least 1")
        if isinstance(generator, list) and len(generator) != batch:
            raise ValueError(
                f"{len(generator)} generators were given for {batch} images; give one, or one for each image"
            )
        shape = (batch, self.generator.config.in_channels, *self.image_size)
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}, but this call needs {shape}")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"unknown output_type {output_type!r}; choose from {list(OUTPUT_TYPES)}")
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(f"callback_on_step_end_tensor_inputs knows {self._callback_tensor_inputs}, not {unknown}")
        if micro_batch_size is not None and (not isinstance(micro_batch_size, int) or micro_batch_size < 1):
            raise ValueError(
                f"micro_batch_size must be a whole number of at least 1 or None, not {micro_batch_size!r}"
            )

    def default_micro_batch_size(self) -> int | None:
        """Images that one forward should take: None, all of them, unless it runs on the CPU."""
        if self._execution_device.type != "cpu":
            return None
        config, (height, width) = self.generator.config, self.image_size
        pixels = height * width // config.get("patch_size", 1) ** 2
        return max(1, CPU_FEATURE_MAP_BYTES // (config.get("model_channels", 128) * pixels * 4))

    def predict(
        self, x_tp1: Tensor, t: Tensor, latent: Tensor, labels: Tensor | None, micro_batch_size: int | None
    ) -> Tensor:
        """The prediction of x_0 for x_{t+1} (B, C, H, W), computed `micro_batch_size` images at a time."""
        dtype, size = self.generator.dtype, micro_batch_size or len(x_tp1)
        outputs = []
        for start in range(0, len(x_tp1), size):
            rows = slice(start, start + size)
            condition = {} if labels is None else {"class_labels": labels[rows]}
            inputs = (x_tp1[rows].to(dtype), t, latent[rows].to(dtype))
            outputs.append(self.generator(*inputs, **condition, return_dict=False)[0])
        return torch.cat(outputs).to(x_tp1.dtype)

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
        """Sample images.

        Args:
            class_labels: numbers or names of classes, one for each image, for a model that knows classes.
            batch_size: the number of images where there are no labels (1 if left out).
            num_images_per_label: images of each entry of `class_labels`, next to each other.
            num_inference_steps: T or None, which means T: the transitions between the noise levels are learned, so that a model of
                T steps cannot be sampled in fewer.
            generator: one, or a list with one for each image: then an image does not depend on the rest of its batch. The first
                noise, and the latent and the posterior's noise of every step are drawn from it.
            latents: unit noise (B, C, H, W) to start from instead of drawing it.
            output_type: "pil", "np" (B, H, W, C) in [0, 1], "pt" (B, C, H, W) in [0, 1], or "latent" (B, C, H, W) as the
                generator left it, about [-1, 1].
            return_dict: whether to return an `ImagePipelineOutput` instead of a tuple.
            callback_on_step_end: called as f(pipe, step, t, tensors) after each step; returns a dict of changed tensors.
            callback_on_step_end_tensor_inputs: which tensors the callback is given.
            micro_batch_size: images that one forward of the network takes; does not change the images. None: chosen for
                the device.

        Returns:
            `ImagePipelineOutput` or a tuple with the images. Raises ValueError for unknown classes and for arguments that
            do not fit the model, the scheduler or each other.
        """
        if class_labels is not None and self.num_classes is None:
            raise ValueError(f"class_labels={class_labels!r} were given to a model without classes; leave them out")
        label_ids = None if class_labels is None else self.get_label_ids(class_labels)
        if label_ids is not None:
            label_ids = [i for i in label_ids for _ in range(num_images_per_label)]
            if batch_size not in (None, len(label_ids)):
                raise ValueError(f"batch_size={batch_size}, but the labels make {len(label_ids)} images; leave it out")
        batch = len(label_ids) if label_ids is not None else 1 if batch_size is None else batch_size
        self.check_inputs(
            label_ids,
            batch,
            generator,
            latents,
            output_type,
            callback_on_step_end_tensor_inputs,
            micro_batch_size,
        )
        self._interrupt = False
        device, config = self._execution_device, self.generator.config
        dtype = torch.promote_types(self.generator.dtype, torch.float32)  # the process stays in float32 at least
        micro_batch_size = micro_batch_size or self.default_micro_batch_size()
        labels = None if label_ids is None else torch.tensor(label_ids, device=device)

        def draw(*shape: int) -> Tensor:
            return randn_tensor((batch, *shape), generator=generator, device=device, dtype=dtype)

        self.scheduler.set_timesteps(num_inference_steps, device=device)
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        latents = draw(config.in_channels, *self.image_size) if latents is None else latents.to(device, dtype)
        latents = latents * self.scheduler.init_noise_sigma
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                x_0 = self.predict(latents, t, draw(config.latent_dim), labels, micro_batch_size)
                latents = self.scheduler.step(x_0, t, latents, generator=generator, return_dict=False)[0]

                if callback_on_step_end is not None:
                    callback_kwargs = {}
                    for name in callback_on_step_end_tensor_inputs:
                        callback_kwargs[name] = locals()[name]
                    callback_outputs = callback_on_step_end(self, i, t, callback_kwargs)
                    latents = callback_outputs.pop("latents", latents)
                progress_bar.update()

        image = latents
        if output_type != "latent":
            image = self.image_processor.postprocess(latents, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=image) if return_dict else (image,)
