"""Sampling by a score network: predictors and correctors, annealed Langevin dynamics, a flow.

Song et al. 2021, arXiv:2011.13456; NCSN, arXiv:1907.05600. Classifier-free guidance: Ho and
Salimans 2022, arXiv:2207.12598; its interval: arXiv:2404.07724. Shapes: B samples of any shape
(B, ...), images are (B, C, H, W).
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


SAMPLERS = ("pc", "ode")


class ScoreSdePipeline(SamplingMixin, SelfContainedMixin, DiffusionPipeline):
    """Samples from a score network, of given classes if it knows classes, guided or not.

    Args:
        unet: called as `unet(sample, timestep, class_labels=...)`, with out_channels C; `scheduler`
            says what its timestep is and how its output is a score. `config.num_class_embeds` is
            the number of classes (None: unconditional); with `config.null_class` the label
            `num_class_embeds` means "no class", which guidance needs.
        scheduler: a ScoreSdeVEScheduler, ScoreSdeVPScheduler, ScoreSdeSubVPScheduler or
            AnnealedLangevinScheduler.
        id2label: the names of the classes by number; kept in model_index.json.
    """

    model_cpu_offload_seq = "unet"
    sampling_options = (
        "num_inference_steps",
        "sampler",
        "predictor",
        "corrector",
        "correct_steps",
        "snr",
        "denoise",
        "tolerance",
        "guidance_scale",
        "guidance_interval",
    )
    measures = {"bpd_ode": "hf_diffusion.evaluation.ode_likelihood:measure_score_bits_per_dim"}

    def __init__(self, unet: ModelMixin, scheduler: SchedulerMixin, id2label: dict | None = None):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_id2label(id2label)

    def example_call(self) -> dict[str, Any]:
        """Arguments of a call that draws a few samples, guided where the model can be."""
        guidance = {} if self.null_class_id is None else {"guidance_scale": 1.5}
        return {**super().example_call(), "sampler": "ode", **guidance}

    def check_sampling(
        self, labels: Tensor | None, sampler: str, guidance_scale: float, guidance_interval, **above_zero: Any
    ) -> None:
        """Raise ValueError, with what is allowed, for a sampler or guidance that does not fit."""
        if not hasattr(self.scheduler, "to_score"):
            raise ValueError(
                f"a {type(self.scheduler).__name__} cannot sample from a score network; use the scheduler of its "
                "process, such as ScoreSdeVPScheduler"
            )
        if sampler not in SAMPLERS:
            raise ValueError(f"unknown sampler {sampler!r}; choose from {list(SAMPLERS)}")
        for name, value in above_zero.items():
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, not {value!r}")
        interval = tuple(guidance_interval)
        if len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1:
            raise ValueError(
                f"guidance_interval must be (low, high) with 0 <= low <= high <= 1, not {guidance_interval!r}"
            )
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

    def predict_score(
        self, latents: Tensor, t: Tensor, labels: Tensor | None, size: int | None, guidance: float | Tensor = 1.0
    ) -> Tensor:
        """The score (B, ...) at x_t and timesteps () or (B,), `size` samples at a time.

        guidance: w of all samples, where 1 costs no second forward, or (B,).
        """
        scheduler, is_guided = self.scheduler, isinstance(guidance, Tensor) or guidance != 1
        t = t.expand(len(latents))
        if is_guided:
            # uncond and cond
            labels = torch.cat([torch.full_like(labels, self.null_class_id), labels])
            latents, t = torch.cat([latents, latents]), torch.cat([t, t])
        inputs, times = scheduler.scale_model_input(latents, t), scheduler.network_time(t)
        size = int(size or len(inputs))
        rows = [None] * len(inputs) if labels is None else labels.split(size)
        output = torch.cat(
            [
                in_micro_batches(self.unet, None, x, time, class_labels=some)
                for x, time, some in zip(inputs.split(size), times.split(size), rows)
            ]
        )
        score = scheduler.to_score(output.to(latents.dtype), t)
        if not is_guided:
            return score
        uncond, cond = score.chunk(2)
        if isinstance(guidance, Tensor):
            guidance = guidance.to(score).reshape(-1, *(1,) * (score.ndim - 1))
        return uncond + guidance * (cond - uncond)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int | str] | Tensor | None = None,
        batch_size: int | None = None,
        num_images_per_label: int = 1,
        num_inference_steps: int | None = None,
        sampler: str = "pc",
        predictor: str | None = None,
        corrector: str | None = None,
        correct_steps: int | None = None,
        snr: float | None = None,
        denoise: bool = True,
        tolerance: float = 1e-4,
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
            num_inference_steps: times that "pc" visits, None for those of the training; steps of
                Heun's method for "ode", None for as many as `tolerance` needs.
            sampler: "pc", correctors and then a predictor at each time; or "ode", the probability
                flow, which draws nothing but its start.
            predictor: "euler_maruyama", "reverse_diffusion", "ancestral" or "none"; None leaves
                the scheduler's own, as the next three do.
            corrector: "langevin", "annealed" or "none".
            correct_steps: corrector's steps at each time.
            snr: signal-to-noise ratio of the corrector.
            denoise: leave out the noise of the last update; after annealed Langevin dynamics one
                more call of the network removes what is left.
            tolerance: rtol and atol of "ode"; each sample has step sizes of its own.
            guidance_scale: w in uncond + w * (cond - uncond); 1 is plain conditional sampling,
                without a second forward.
            guidance_interval: guide only where the time lies in [low, high]; 0 is clean, 1 is pure
                noise.
            generator: one, or a list with one for each image: then an image does not depend on the
                rest of its batch.
            latents: unit noise (B, C, H, W) to start from instead of drawing it.
            output_type: "pil", "np" (B, H, W, C) in [0, 1], "pt" (B, C, H, W) in [0, 1], or
                "latent" (B, C, H, W) as the scheduler left it, about [-1, 1]. Samples that are no
                images are never "pil", and keep their shape and values in all others.
            return_dict: whether to return an `ImagePipelineOutput` instead of a tuple.
            callback_on_step_end: called as f(pipe, step, t, tensors) after each step, and after
                all of "ode"; returns a dict of changed tensors.
            callback_on_step_end_tensor_inputs: which tensors the callback is given.
            micro_batch_size: images that one forward of the network takes; does not change the
                images. None: chosen for the device.

        Returns:
            `ImagePipelineOutput` or a tuple with the images. Raises ValueError for unknown classes
            and for arguments that do not fit the model, the scheduler or each other.
        """
        labels, batch = self.prepare_labels(class_labels, batch_size, num_images_per_label)
        self.check_sampling(
            labels,
            sampler,
            guidance_scale,
            guidance_interval,
            tolerance=tolerance,
            snr=snr,
            correct_steps=correct_steps,
        )
        self.check_common(
            batch,
            generator,
            latents,
            output_type,
            callback_on_step_end_tensor_inputs,
            micro_batch_size=micro_batch_size,
        )
        self._guidance_scale, self._interrupt = guidance_scale, False
        size, scheduler = micro_batch_size or self.default_micro_batch_size(), self.scheduler
        if labels is None and self.null_class_id is not None:
            labels = torch.full((batch,), self.null_class_id, device=self._execution_device)
        low, high = guidance_interval

        timesteps = self.prepare_timesteps(num_inference_steps if sampler == "pc" else None)
        latents = mean = self.prepare_latents(batch, generator, latents)
        if sampler == "ode":
            self._num_timesteps = 1

            def velocity(x: Tensor, time: Tensor, rows: Tensor) -> Tensor:
                t, guidance = scheduler.timestep_of(time), guidance_scale
                if guidance_scale != 1 and (low, high) != (0, 1):
                    guidance = torch.where((low <= time) & (time <= high), guidance_scale, 1.0)
                score = self.predict_score(x, t, None if labels is None else labels[rows], size, guidance)
                return scheduler.velocity(score, t, x)

            latents, self.calls = scheduler.solve_flow(velocity, latents, num_inference_steps, tolerance, tolerance)
            (latents,) = self.after_step(
                callback_on_step_end, callback_on_step_end_tensor_inputs, 0, timesteps[-1], latents=latents
            )
            return self.to_output(latents, output_type, return_dict)
        predictor, corrector = predictor or scheduler.predictor, corrector or scheduler.corrector
        corrections = 0 if corrector == "none" else correct_steps or scheduler.correct_steps
        # known before the loop, because reading a timestep on a GPU makes the host wait
        guidance = [guidance_scale if low <= time <= high else 1.0 for time in scheduler.times(timesteps).tolist()]
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                for _ in range(corrections):
                    score = self.predict_score(latents, t, labels, size, guidance[i])
                    latents, mean = scheduler.step_correct(
                        score, t, latents, generator, corrector, snr, return_dict=False
                    )
                if predictor != "none":
                    score = self.predict_score(latents, t, labels, size, guidance[i])
                    latents, mean = scheduler.step_pred(score, t, latents, generator, predictor, return_dict=False)
                if denoise and i == len(timesteps) - 1:
                    latents = mean
                    if scheduler.denoises_apart and predictor == "none":
                        score = self.predict_score(latents, t, labels, size, guidance[i])
                        latents = scheduler.denoise(score, t, latents)
                (latents,) = self.after_step(
                    callback_on_step_end, callback_on_step_end_tensor_inputs, i, t, latents=latents
                )
                progress_bar.update()
        return self.to_output(latents, output_type, return_dict)
