"""Sampling along the velocity of flow matching, with classifier-free guidance.

Flow matching: Lipman et al. 2023, arXiv:2210.02747. Autoguidance: Karras et al. 2024,
arXiv:2406.02507. Guidance interval: Kynkaanniemi et al. 2024, arXiv:2404.07724. sigma 1 is the
noise, 0 the data. Shapes: B images, C channels, H x W pixels; samples of any other rank go the same
way.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from hf_diffusion.pipelines.sampling_parts import SamplingMixin, in_micro_batches
from hf_diffusion.pipelines.self_contained import SelfContainedMixin


PREDICTION_TYPES = ("velocity", "sample", "epsilon")


class FlowMatchingPipeline(SamplingMixin, SelfContainedMixin, DiffusionPipeline):
    """Samples from a network of flow matching, of given classes if it knows classes.

    Args:
        unet: called as `unet(sample, timestep, class_labels=...)` with timesteps
            `num_train_timesteps * sigma`, floats. `config.num_class_embeds` is the number of
            classes (None: unconditional); with `config.null_class` the label `num_class_embeds`
            means "no class", which guidance needs.
        scheduler: a FlowMatchingScheduler, or diffusers' FlowMatchEulerDiscreteScheduler or
            FlowMatchHeunDiscreteScheduler; their `step` takes the velocity, whatever the network
            predicts.
        id2label: the names of the classes by number; kept in model_index.json.
        prediction_type: what the network predicts: "velocity" (noise - x_0), "sample" (x_0) or
            "epsilon" (the noise).
        sigma_floor: the least sigma, or 1 - sigma, by which x_0 or noise become a velocity; that of
            the training.
        noise_scale: standard deviation of the noise; that of the training.
        vae: an autoencoder of diffusers, which decodes what the network draws; None draws samples.
        guide_unet: a weaker network of the same data and process, such as an early checkpoint, that
            guidance leads away from, in place of the prediction without a class (autoguidance).
    """

    model_cpu_offload_seq = "unet->vae"
    _optional_components = ["vae", "guide_unet"]
    sampling_options = ("num_inference_steps", "solver", "guidance_scale", "guidance_interval")
    measures = {
        "bpd_ode": "hf_diffusion.evaluation.ode_likelihood:measure_matched_bits_per_dim",
        "consistency": "hf_diffusion.evaluation.determinism:measure_consistency",
    }

    def __init__(
        self,
        unet: ModelMixin,
        scheduler: SchedulerMixin,
        id2label: dict | None = None,
        prediction_type: str = "velocity",
        sigma_floor: float = 0.05,
        noise_scale: float = 1.0,
        vae: ModelMixin | None = None,
        guide_unet: ModelMixin | None = None,
    ):
        super().__init__()
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"unknown prediction_type {prediction_type!r}; choose from {list(PREDICTION_TYPES)}")
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae, guide_unet=guide_unet)
        self.register_id2label(id2label)
        self.register_to_config(prediction_type=prediction_type, sigma_floor=sigma_floor, noise_scale=noise_scale)

    def example_call(self) -> dict[str, Any]:
        """Arguments of a call that draws a few samples, guided where the model can be."""
        can_guide = self.guide_unet is not None or self.null_class_id is not None
        guidance = {"guidance_scale": 1.5} if can_guide else {}
        return {**super().example_call(), "num_inference_steps": 50, **guidance}

    def check_guidance(self, labels: Tensor | None, guidance_scale: float) -> None:
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

    def check_scheduler(self, **options: Any) -> None:
        """Raise ValueError for a scheduler of another process, or without an option of the call."""
        name, config = type(self.scheduler).__name__, self.scheduler.config
        if "shift" not in config and not config.get("use_flow_sigmas"):
            raise ValueError(
                f"a {name} cannot sample from this network; flow matching needs a FlowMatchingScheduler or one of "
                "diffusers' flow matching schedulers"
            )
        accepted = inspect.signature(self.scheduler.set_timesteps).parameters
        for option, value in options.items():
            if value is not None and option not in accepted:
                raise ValueError(f"{name} takes no {option}; leave it out, or use FlowMatchingScheduler")

    def prepare_sigmas(self, num_inference_steps: int, sigmas: Sequence[float] | None, solver: str | None) -> Tensor:
        """The scheduler's timesteps, one a call of the network; `sigmas` replace the number."""
        options = {} if solver is None else {"solver": solver}
        options |= {"num_inference_steps": num_inference_steps} if sigmas is None else {"sigmas": list(sigmas)}
        self.scheduler.set_timesteps(device=self._execution_device, **options)
        self._num_timesteps = len(self.scheduler.timesteps)
        return self.scheduler.timesteps

    def prepare_latents(
        self, batch: int, generator: torch.Generator | list[torch.Generator] | None, latents: Tensor | None
    ) -> Tensor:
        """The noise (B, ...) at sigma 1, in float32 at least; given `latents` are unit noise."""
        device, dtype = self._execution_device, torch.promote_types(self.unet.dtype, torch.float32)
        if latents is None:
            latents = randn_tensor((batch, *self.noise_shape), generator=generator, device=device, dtype=dtype)
        return latents.to(device, dtype) * self.config.noise_scale

    def calls_within(self, interval: tuple[float, float]) -> list[bool]:
        """For each call of the network whether its sigma lies strictly within the interval.

        The ends 0 and 1 of the path belong to an interval that reaches them. Known before the loop,
        because reading a timestep on a GPU makes the host wait.
        """
        low, high = interval
        sigmas = [t / self.scheduler.config.num_train_timesteps for t in self.scheduler.timesteps.tolist()]
        return [(low == 0 or sigma > low) and (high == 1 or sigma < high) for sigma in sigmas]

    def velocity(
        self,
        x: Tensor,
        t: Tensor,
        labels: Tensor | None = None,
        micro_batch_size: int | None = None,
        network: ModelMixin | None = None,
    ) -> Tensor:
        """dx / dsigma (B, ...) that the network tells at x (B, ...) and timestep t ()."""
        output = in_micro_batches(network or self.unet, micro_batch_size, x, t, class_labels=labels)
        sigma, floor = t / self.scheduler.config.num_train_timesteps, self.config.sigma_floor
        if self.config.prediction_type == "sample":
            return (x - output) / sigma.clamp(min=floor)
        if self.config.prediction_type == "epsilon":
            return (output - x) / (1 - sigma).clamp(min=floor)
        return output

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int | str] | Tensor | None = None,
        batch_size: int | None = None,
        num_images_per_label: int = 1,
        num_inference_steps: int = 50,
        sigmas: Sequence[float] | None = None,
        solver: Literal["euler", "heun"] | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
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
            num_inference_steps: the number of steps; Heun takes two calls of the network for each
                but the last.
            sigmas: the levels of the steps themselves instead, falling within (0, 1], before the
                scheduler's shift.
            solver: "euler" or "heun"; None leaves the scheduler's own.
            guidance_scale: w in uncond + w * (cond - uncond); 1 is plain conditional sampling,
                without a second forward. With a guide_unet its prediction, of the same class, takes
                the place of uncond.
            guidance_interval: guide only where sigma lies strictly between low and high, or on an
                end of the path that they reach; 0 is clean, 1 is pure noise.
            generator: one, or a list with one for each image: then an image does not depend on the
                rest of its batch.
            latents: unit noise (B, C, H, W) to start from instead of drawing it.
            output_type: "pil", "np" (B, H, W, C) in [0, 1], "pt" (B, C, H, W) in [0, 1], or
                "latent" (B, C, H, W) as the scheduler left it, about [-1, 1]. Samples that are no
                images are never "pil", and keep their shape and values in all others.
            return_dict: whether to return an `ImagePipelineOutput` instead of a tuple.
            callback_on_step_end: called as f(pipe, call, t, tensors) after each call of the
                network; returns a dict of changed tensors.
            callback_on_step_end_tensor_inputs: which tensors the callback is given.
            micro_batch_size: images that one forward of the network takes; does not change the
                images. None: chosen for the device.

        Returns:
            `ImagePipelineOutput` or a tuple with the images. Raises ValueError for unknown classes
            and for arguments that do not fit the model, the scheduler or each other.
        """
        labels, batch = self.prepare_labels(class_labels, batch_size, num_images_per_label)
        self.check_scheduler(sigmas=sigmas, solver=solver)
        self.check_steps(num_inference_steps, guidance_interval=guidance_interval)
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
        if labels is None and self.null_class_id is not None:
            labels = torch.full((batch,), self.null_class_id, device=self._execution_device)
        guided_labels = None  # (2 B,), uncond and cond; of a guide_unet (B,)
        if self.guide_unet is not None:
            guided_labels = labels if self.guide_unet.config.get("num_class_embeds") else None
        elif guidance_scale != 1:
            guided_labels = torch.cat([torch.full_like(labels, self.null_class_id), labels])

        timesteps = self.prepare_sigmas(num_inference_steps, sigmas, solver)
        is_guided = [guidance_scale != 1 and inside for inside in self.calls_within(guidance_interval)]
        latents = self.prepare_latents(batch, generator, latents)
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                if is_guided[i]:
                    if self.guide_unet is None:
                        both = self.velocity(torch.cat([latents, latents]), t, guided_labels, micro_batch_size)
                        worse, better = both.chunk(2)  # each (B, C, ...)
                    else:
                        worse = self.velocity(latents, t, guided_labels, micro_batch_size, self.guide_unet)
                        better = self.velocity(latents, t, labels, micro_batch_size)
                    velocity = worse + guidance_scale * (better - worse)
                else:
                    velocity = self.velocity(latents, t, labels, micro_batch_size)
                latents = self.scheduler.step(velocity, t, latents, return_dict=False)[0]
                (latents,) = self.after_step(
                    callback_on_step_end, callback_on_step_end_tensor_inputs, i, t, latents=latents
                )
                progress_bar.update()
        return self.to_output(self.decode(latents, output_type), output_type, return_dict)
