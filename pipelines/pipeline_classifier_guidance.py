"""Sampling guided by the gradient of a noise-aware classifier, or of any function of the image.

Classifier guidance: Dhariwal and Nichol 2021, arXiv:2105.05233, Algorithms 1 (ancestral) and 2
(DDIM). The scheduler adds the gradient to its step; this file has the gradients and the sampling
loop. Shapes: B images, C channels, H x W pixels.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin
from PIL import Image
from torch import Tensor

from hf_diffusion.pipelines.sampling_parts import SamplingMixin, feature_map_bytes, in_micro_batches, sides
from hf_diffusion.pipelines.self_contained import SelfContainedMixin


# Of one feature map of the classifier, of which a backward pass keeps about a hundred.
GPU_CLASSIFIER_BYTES = 2**27
# A gradient's weight in a DDIM step is about 1 or less, but hundreds where the schedule ends near
# pure noise (631 in the first of 50 steps on the cosine schedule): a trained classifier's gradient,
# never exactly 0 there, then destroys the image.
MAX_DDIM_WEIGHT = 10.0
# Tried in turn until the gradient is finite.
FP16_LOSS_SCALES = (2.0**10, 2.0**5, 1.0, 2.0**-5, 2.0**-10)


def gradient_of(log_probability: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The gradient by x (B, ...) of a function that maps x to log probabilities (B,)."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(log_probability(x).sum(), x)[0]


def classifier_gradient(
    classifier: ModelMixin, x_t: Tensor, t: Tensor | int, labels: Tensor, micro_batch_size: int | None = None
) -> Tensor:
    """The gradient of log p(labels | x_t) by x_t (B, ...), in x_t's dtype; labels are int64 (B,).

    `classifier(x_t, t)` gives logits (B, K). Its activations are kept for `micro_batch_size` images
    at a time. A classifier in half precision computes its layers so, and the log-softmax in
    float32; in float16 the loss is scaled until the gradient is finite.
    """
    size = micro_batch_size or len(x_t)
    scales = FP16_LOSS_SCALES if classifier.dtype == torch.float16 else (1.0,)
    gradients = []
    for x, y in zip(x_t.split(size), labels.split(size)):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            logits = classifier(x.to(classifier.dtype), t, return_dict=False)[0]
            wide = logits if logits.dtype == torch.float64 else logits.float()
            log_p = wide.log_softmax(dim=-1).gather(1, y[:, None]).sum()
        for scale in scales:
            last = scale == scales[-1]
            gradient = torch.autograd.grad(log_p, x, torch.full_like(log_p, scale), retain_graph=not last)[0] / scale
            if last or gradient.isfinite().all():
                break
        gradients.append(gradient)
    return torch.cat(gradients)


class ClassifierGuidancePipeline(SamplingMixin, SelfContainedMixin, DiffusionPipeline):
    """Samples from a U-Net, guided by a classifier of noisy images or by a function of the user's.

    Args:
        unet: called as `unet(sample, timestep)`, with `class_labels=...` if
            `config.num_class_embeds` says that it knows classes; out_channels is C, or 2 C for a
            learned variance.
        classifier: called as `classifier(sample, timestep)` with the same timesteps, gives logits;
            such as `ADMClassifier`. None leaves guidance to the `guidance_fn` of a call.
        scheduler: LinearDDPMScheduler, CosineDDPMScheduler or DDIMEtaScheduler, whose `step` takes
            a gradient.
        id2label: the names of the classes by number, if they are not in the classifier's config;
            kept in model_index.json.

    A function of one's own guides without any classifier. This one asks for images whose mean is
    near 0.5, log p = -200 (mean - 0.5)^2:

        from hf_diffusion.pipelines.pipeline_classifier_guidance import gradient_of

        def brighter(x_t, t, x_0, **others):
            return gradient_of(lambda x: -200 * (x.mean(dim=(1, 2, 3)) - 0.5) ** 2, x_0)

        images = pipe(batch_size=4, guidance_fn=brighter, guidance_scale=1.0,
        output_type="pt").images
    """

    # The classifier takes turns with the U-Net in the loop, so it stays where it runs.
    model_cpu_offload_seq = "unet"
    _optional_components = ["classifier"]
    sampling_options = (
        "num_inference_steps",
        "timesteps",
        "eta",
        "guidance_scale",
        "guidance_interval",
        "gradient_steps",
        "classifier_free_guidance_scale",
    )
    measures = {
        "bpd": "hf_diffusion.evaluation.model_measures:measure_bits_per_dim",
        "consistency": "hf_diffusion.evaluation.determinism:measure_consistency",
        "inversion": "hf_diffusion.evaluation.determinism:measure_inversion",
    }

    def __init__(
        self,
        unet: ModelMixin,
        classifier: ModelMixin | None,
        scheduler: SchedulerMixin,
        id2label: dict | None = None,
    ):
        super().__init__()
        self.register_modules(unet=unet, classifier=classifier, scheduler=scheduler)
        if id2label is None and classifier is not None:
            id2label = classifier.config.get("id2label")
        self.register_id2label(id2label)
        self.check_classifier()

    @property
    def num_classes(self) -> int | None:
        """The number of classes of the classifier, or of the U-Net; None if neither has any."""
        return super().num_classes if self.classifier is None else self.classifier.config.num_classes

    def example_call(self) -> dict[str, Any]:
        """Arguments of a call that draws a few samples, guided if there is a classifier."""
        steps = min(50, self.scheduler.config.num_train_timesteps)
        scale = 0.0 if self.classifier is None else 2.0
        return {**super().example_call(), "num_inference_steps": steps, "guidance_scale": scale}

    # --- checks -----------------------------------------------------------------------------------

    def check_classifier(self) -> None:
        """Raise ValueError for a classifier of other classes, images or noise than the rest."""
        if self.classifier is None:
            return
        unet, theirs = self.unet.config, self.classifier.config
        pairs = [
            ("classes", theirs.num_classes, unet.get("num_class_embeds") or theirs.num_classes),
            ("channels", theirs.in_channels, unet.in_channels),
            ("pixels", sides(theirs.get("sample_size")), self.image_size),
        ]
        for what, classifier, wanted in pairs:
            if classifier != wanted:
                raise ValueError(
                    f"the classifier is one of {classifier} {what} and the U-Net of {wanted}; take a classifier that "
                    "was trained on the U-Net's data"
                )
        for name, value in (theirs.get("noise_schedule") or {}).items():
            if self.scheduler.config.get(name) != value:
                raise ValueError(
                    f"the classifier was trained with {name}={value!r}, but the scheduler has "
                    f"{self.scheduler.config.get(name)!r}, so that the same timestep means another noise level to "
                    "each; take a classifier trained on the U-Net's schedule"
                )

    def check_guidance(
        self,
        labels: Tensor | None,
        guidance_scale: float,
        gradient_steps: int,
        guidance_fn: Callable | None,
        classifier_free_guidance_scale: float,
    ) -> None:
        """Raise ValueError, with what is allowed, for guidance that does not fit the parts."""
        self.check_classifier()
        if not 0 <= guidance_scale < float("inf"):
            raise ValueError(
                f"guidance_scale must be a number of at least 0, not {guidance_scale!r}; 0 does not guide"
            )
        if not 0 <= classifier_free_guidance_scale < float("inf"):
            raise ValueError(
                "classifier_free_guidance_scale must be a number of at least 0, not "
                f"{classifier_free_guidance_scale!r}; 1 is plain conditional sampling, 0 ignores the U-Net's classes"
            )
        if not isinstance(gradient_steps, int) or gradient_steps < 1:
            raise ValueError(f"gradient_steps must be a whole number of at least 1, not {gradient_steps!r}")
        if "gradient" not in inspect.signature(self.scheduler.step).parameters:
            raise ValueError(
                f"the step of {type(self.scheduler).__name__} takes no gradient, so a classifier cannot guide it; use "
                "DDIMEtaScheduler.from_config(pipe.scheduler.config) or LinearDDPMScheduler"
            )
        if guidance_scale > 0 and guidance_fn is None:
            if self.classifier is None:
                raise ValueError(
                    f"guidance_scale={guidance_scale} needs a classifier or a guidance_fn, and this pipeline has no "
                    "classifier; give one of them, or guidance_scale=0"
                )
            if labels is None:
                raise ValueError(
                    f"guidance_scale={guidance_scale} needs class_labels to guide towards; use 0 without them"
                )
        knows_classes = self.unet.config.get("num_class_embeds") is not None
        if classifier_free_guidance_scale != 1 and knows_classes and self.null_class_id is None:
            raise ValueError(
                f"classifier_free_guidance_scale={classifier_free_guidance_scale} needs a U-Net that was trained with "
                "a null class (null_class=True and labels left out at random); this one has none, so use 1"
            )

    def guided_timesteps(self, interval: tuple[float, float] | None, eta: float | None) -> list[bool]:
        """For each timestep of the run whether a gradient guides it; `interval` as in a call.

        None leaves out what DDIM cannot guide. Raises ValueError for an interval with a timestep
        that has no signal (zero terminal SNR) and a DDIM scheduler.
        """
        timesteps = self.scheduler.timesteps.tolist()
        guided = self.timesteps_within((0.0, 1.0) if interval is None else interval)
        if "eta" not in inspect.signature(self.scheduler.step).parameters:
            return guided
        lost = [t for t, inside in zip(timesteps, guided) if inside and self.scheduler.alpha_bar[t] == 0]
        if interval is None:
            return [t not in lost and self._ddim_weight(t, eta) <= MAX_DDIM_WEIGHT for t in timesteps]
        if lost:
            raise ValueError(
                f"timestep {lost[0]} has no signal (alpha_bar is 0), so {type(self.scheduler).__name__} cannot guide "
                "it; leave guidance_interval out, end it below, or use an ancestral scheduler"
            )
        return guided

    def _ddim_weight(self, t: int, eta: float | None) -> float:
        # The weight of a DDIM step depends on no tensor.
        nothing = torch.empty(0)
        return self.scheduler.guidance_weight(nothing, t, nothing, eta)

    # --- parts of the loop ------------------------------------------------------------------------

    def default_classifier_micro_batch_size(self) -> int:
        """Images whose activations the classifier keeps at a time; bounded on a GPU, too."""
        on_cpu = self.default_micro_batch_size(self.classifier)
        return on_cpu or max(1, GPU_CLASSIFIER_BYTES // feature_map_bytes(self.classifier))

    def predict(self, latents: Tensor, t: Tensor, labels: Tensor | None, micro_batch_size: int | None) -> Tensor:
        """The U-Net's output for x_t (B, C, ...), `micro_batch_size` images at a time."""
        inputs = self.scheduler.scale_model_input(latents, t)
        return in_micro_batches(self.unet, micro_batch_size, inputs, t, class_labels=labels)

    def gradient(
        self,
        latents: Tensor,
        t: Tensor,
        labels: Tensor | None,
        output: Tensor,
        guidance_fn: Callable | None,
        micro_batch_size: int | None,
    ) -> Tensor:
        """The gradient of log p(y | x_t) by x_t (B, ...), of the classifier or `guidance_fn`."""
        if guidance_fn is None:
            return classifier_gradient(self.classifier, latents, t, labels, micro_batch_size)
        x_0 = self.scheduler.predict_x_0(output, t, latents)
        gradient = guidance_fn(latents, t, x_0=x_0, class_labels=labels)
        if not isinstance(gradient, Tensor) or gradient.shape != latents.shape:
            given = tuple(gradient.shape) if isinstance(gradient, Tensor) else type(gradient).__name__
            raise ValueError(f"guidance_fn returned {given}; it must return a tensor of x_t's {tuple(latents.shape)}")
        return gradient.detach().to(latents.dtype)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int | str] | Tensor | None = None,
        batch_size: int | None = None,
        num_images_per_label: int = 1,
        num_inference_steps: int = 50,
        timesteps: list[int] | str | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        gradient_steps: int = 1,
        guidance_fn: Callable[..., Tensor] | None = None,
        classifier_free_guidance_scale: float = 1.0,
        eta: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        micro_batch_size: int | None = None,
        classifier_micro_batch_size: int | None = None,
    ) -> ImagePipelineOutput | tuple[list[Image.Image] | np.ndarray | Tensor]:
        """Sample images.

        Args:
            class_labels: numbers or names of classes, one for each image; a U-Net that knows
                classes is given them, too.
            batch_size: the number of images where there are no labels (1 if left out).
            num_images_per_label: images of each entry of `class_labels`, next to each other.
            num_inference_steps: the number of denoising steps.
            timesteps: the steps themselves instead, in the form that `set_timesteps` takes.
            guidance_scale: multiplies the gradient; 0 is sampling without guidance, 1 turns p(x)
                into p(x | y), more sharpens.
            guidance_interval: guide only where t / num_train_timesteps lies in [low, high]; 0 is
                clean, 1 is pure noise. None guides everywhere, with DDIM except where the schedule
                has next to
                no signal, as at the start of the cosine schedule: there the gradient would be
                multiplied by hundreds.
            gradient_steps: how many gradients make one step's: their mean along the way that the
                step pushes x_t, so that a large scale overshoots less. The scale keeps its meaning.
            guidance_fn: called as f(x_t, t, x_0=..., class_labels=...) instead of the classifier;
                returns the gradient of log p(y | x_t) by x_t (B, C, H, W). x_0 is the U-Net's
                prediction, class_labels is int64 (B,) or None.
            classifier_free_guidance_scale: w in uncond + w * (cond - uncond) of the U-Net's own
                predictions, for a U-Net with a null class; 1 is the conditional prediction, 0 the
                one without class.
            eta: handed to the scheduler's `step`; None leaves the scheduler's own.
            generator: one, or a list with one for each image: then an image does not depend on the
                rest of its batch.
            latents: unit noise (B, C, H, W) to start from instead of drawing it.
            output_type: "pil", "np" (B, H, W, C) in [0, 1], "pt" (B, C, H, W) in [0, 1], or
                "latent" (B, C, H, W) as the scheduler left it, about [-1, 1].
            return_dict: whether to return an `ImagePipelineOutput` instead of a tuple.
            callback_on_step_end: called as f(pipe, step, t, tensors) after each step; returns a
                dict of changed tensors. It may set `pipe._guidance_scale` for the steps that
                follow, 0 for none, and `pipe._interrupt`.
            callback_on_step_end_tensor_inputs: which tensors the callback is given.
            micro_batch_size: images that one forward of the U-Net takes; does not change the
                images. None: chosen for the device.
            classifier_micro_batch_size: images whose activations the classifier keeps at a time,
                likewise.

        Returns:
            `ImagePipelineOutput` or a tuple with the images. Raises ValueError for unknown classes
            and for arguments that do not fit the models, the scheduler or each other.
        """
        interval = (0.0, 1.0) if guidance_interval is None else guidance_interval
        w = classifier_free_guidance_scale
        labels, batch = self.prepare_labels(class_labels, batch_size, num_images_per_label)
        self.check_steps(num_inference_steps, timesteps, eta, interval)
        self.check_guidance(labels, guidance_scale, gradient_steps, guidance_fn, w)
        self.check_common(
            batch,
            generator,
            latents,
            output_type,
            callback_on_step_end_tensor_inputs,
            micro_batch_size=micro_batch_size,
            classifier_micro_batch_size=classifier_micro_batch_size,
        )
        self._guidance_scale, self._interrupt = guidance_scale, False
        micro_batch_size = micro_batch_size or self.default_micro_batch_size()
        if classifier_micro_batch_size is None and self.classifier is not None:
            classifier_micro_batch_size = self.default_classifier_micro_batch_size()

        unet_labels = null_labels = None  # (B,), what the U-Net is given
        if self.unet.config.get("num_class_embeds") is not None:
            if self.null_class_id is not None:
                null_labels = torch.full((batch,), self.null_class_id, device=self._execution_device)
            unet_labels = null_labels if labels is None or w == 0 else labels
        is_classifier_free = labels is not None and null_labels is not None and w not in (0, 1)

        timesteps = self.prepare_timesteps(num_inference_steps, timesteps)
        is_inside = self.timesteps_within(interval)
        is_guided = [False] * len(timesteps)
        if guidance_scale > 0:
            is_guided = self.guided_timesteps(guidance_interval, eta)

        channels = self.unet.config.in_channels
        takes_variance = str(self.scheduler.config.get("variance_type")).startswith("learned")
        eta_option = {} if eta is None else {"eta": eta}
        step_options = eta_option if generator is None else {"generator": generator, **eta_option}
        latents = self.prepare_latents(batch, generator, latents)
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                if self.guidance_scale is not guidance_scale:  # a callback has set it
                    guidance_scale = self.guidance_scale
                    self.check_guidance(labels, guidance_scale, gradient_steps, guidance_fn, w)
                    is_guided = [False] * len(timesteps)
                    if guidance_scale > 0:
                        is_guided = self.guided_timesteps(guidance_interval, eta)
                output = self.predict(latents, t, unet_labels, micro_batch_size)  # (B, C or 2 C, ...)
                if is_inside[i] and is_classifier_free:
                    cond, variance = output[:, :channels], output[:, channels:]
                    uncond = self.predict(latents, t, null_labels, micro_batch_size)[:, :channels]
                    output = torch.cat([uncond + w * (cond - uncond), variance], dim=1)
                if not takes_variance:
                    output = output[:, :channels]
                guidance = {}
                if is_guided[i]:
                    total = torch.zeros_like(latents)  # of the gradients so far, divided by gradient_steps
                    for k in range(gradient_steps):
                        x_t = latents
                        if k > 0:
                            x_t = latents + self.scheduler.guidance_weight(output, t, latents, **eta_option) * total
                        gradient = self.gradient(x_t, t, labels, output, guidance_fn, classifier_micro_batch_size)
                        total = total + (guidance_scale / gradient_steps) * gradient
                    guidance = {"gradient": total}
                latents = self.scheduler.step(output, t, latents, **step_options, **guidance, return_dict=False)[0]
                (latents,) = self.after_step(
                    callback_on_step_end, callback_on_step_end_tensor_inputs, i, t, latents=latents
                )
                progress_bar.update()
        return self.to_output(latents, output_type, return_dict)
