"""Image sampling guided by the gradient of a noise-aware classifier, or of any function of the noisy image.

Classifier guidance: Dhariwal and Nichol 2021, arXiv:2105.05233, Algorithms 1 (ancestral) and 2 (DDIM). The scheduler adds the
gradient to its step; this file has the gradients and the sampling loop. Shapes: B images, C channels, H x W pixels.
"""

import inspect
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
CPU_ACTIVATION_BYTES = (
    2**23
)  # per forward and feature map; see ClassifierFreeGuidancePipeline.default_micro_batch_size
GPU_CLASSIFIER_BYTES = 2**27  # per feature map of the classifier, of which a backward pass keeps about a hundred
# A gradient's weight in a DDIM step is about 1 or less, but hundreds where the schedule ends near pure noise (631 in the first of
# 50 steps on the cosine schedule): a trained classifier's gradient, never exactly 0 there, then destroys the image.
MAX_DDIM_WEIGHT = 10.0
FP16_LOSS_SCALES = (2.0**10, 2.0**5, 1.0, 2.0**-5, 2.0**-10)  # tried in turn until the gradient is finite


def gradient_of(log_probability: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The gradient by x (B, ...) of a function that maps x to log probabilities (B,), up to a constant; x need not require it."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(log_probability(x).sum(), x)[0]


def classifier_gradient(
    classifier: ModelMixin, x_t: Tensor, t: Tensor | int, labels: Tensor, micro_batch_size: int | None = None
) -> Tensor:
    """The gradient of log p(labels | x_t) by x_t (B, C, H, W), in x_t's dtype; labels are int64 (B,).

    `classifier(x_t, t)` gives logits (B, K). Its activations are kept for `micro_batch_size` images at a time. A classifier in
    half precision computes its layers so, and the log-softmax in float32; in float16 the loss is scaled until the gradient is finite.
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


class ClassifierGuidancePipeline(SelfContainedMixin, DiffusionPipeline):
    """Samples images from a U-Net, guided towards classes by a classifier of noisy images, or by a function of the user's.

    Args:
        unet: called as `unet(sample, timestep)`, with `class_labels=...` if `config.num_class_embeds` says that it knows classes;
            out_channels is C, or 2 C for a learned variance.
        classifier: called as `classifier(sample, timestep)` with the same timesteps, gives logits; such as `ADMClassifier`. None
            leaves guidance to the `guidance_fn` of a call.
        scheduler: LinearDDPMScheduler, CosineDDPMScheduler or DDIMEtaScheduler, whose `step` takes a gradient.
        id2label: the names of the classes by number, if they are not in the classifier's config; kept in model_index.json.

    A function of one's own guides without any classifier. This one asks for images whose mean is near 0.5, log p = -200 (mean - 0.5)^2:

        from hf_diffusion.pipelines.pipeline_classifier_guidance import gradient_of

        def brighter(x_t, t, x_0, **others):
            return gradient_of(lambda x: -200 * (x.mean(dim=(1, 2, 3)) - 0.5) ** 2, x_0)

        images = pipe(batch_size=4, guidance_fn=brighter, guidance_scale=1.0, output_type="pt").images
    """

    model_cpu_offload_seq = "unet"  # the classifier takes turns with the U-Net in the loop, so it stays where it runs
    _callback_tensor_inputs = ["latents"]
    _optional_components = ["classifier"]

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
        if id2label is not None:
            id2label = {int(i): str(name) for i, name in id2label.items()}  # JSON turns the numbers into strings
        self.register_to_config(id2label=id2label)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)
        self.check_classifier()

    @property
    def id2label(self) -> dict[int, str] | None:
        """The names of the classes by number, None if they have no names."""
        return self.config["id2label"]

    @property
    def num_classes(self) -> int | None:
        """The number of classes of the classifier, without one those of the U-Net; None if neither has classes."""
        if self.classifier is not None:
            return self.classifier.config.num_classes
        return self.unet.config.get("num_class_embeds")

    @property
    def null_class_id(self) -> int | None:
        """The label that means "no class" to the U-Net, None if it has none."""
        return self.unet.config.get("num_class_embeds") if self.unet.config.get("null_class") else None

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return _sides(self.unet.config.sample_size)

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Set `pipe._interrupt = True` in a callback to leave out the remaining steps."""
        return self._interrupt

    # --- checks -----------------------------------------------------------------------------------------------------------

    def check_classifier(self) -> None:
        """Raise ValueError for a classifier of other classes, channels, image size or noise than the U-Net and the scheduler."""
        if self.classifier is None:
            return
        unet, theirs = self.unet.config, self.classifier.config
        pairs = [
            ("classes", theirs.num_classes, unet.get("num_class_embeds") or theirs.num_classes),
            ("channels", theirs.in_channels, unet.in_channels),
            ("pixels", _sides(theirs.sample_size), self.image_size),
        ]
        for what, classifier, wanted in pairs:
            if classifier != wanted:
                raise ValueError(
                    f"the classifier is one of {classifier} {what} and the U-Net of {wanted}; take a classifier that was "
                    "trained on the U-Net's data"
                )
        for name, value in (theirs.get("noise_schedule") or {}).items():
            if self.scheduler.config.get(name) != value:
                raise ValueError(
                    f"the classifier was trained with {name}={value!r}, but the scheduler has {self.scheduler.config.get(name)!r}, "
                    "so that the same timestep means another noise level to each; take a classifier trained on the U-Net's schedule"
                )

    def check_guidance(
        self,
        label_ids: list[int] | None,
        guidance_scale: float,
        guidance_interval: tuple[float, float] | None,
        gradient_steps: int,
        guidance_fn: Callable | None,
        classifier_free_guidance_scale: float,
    ) -> None:
        """Raise ValueError, with what is allowed, for guidance that the parts or the labels of a call do not allow."""
        self.check_classifier()
        if not 0 <= guidance_scale < float("inf"):
            raise ValueError(
                f"guidance_scale must be a number of at least 0, not {guidance_scale!r}; 0 does not guide"
            )
        if not 0 <= classifier_free_guidance_scale < float("inf"):
            raise ValueError(
                f"classifier_free_guidance_scale must be a number of at least 0, not {classifier_free_guidance_scale!r}; "
                "1 is plain conditional sampling and 0 ignores the U-Net's classes"
            )
        interval = (0.0, 1.0) if guidance_interval is None else tuple(guidance_interval)
        if len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1:
            raise ValueError(
                f"guidance_interval must be (low, high) with 0 <= low <= high <= 1, not {guidance_interval!r}"
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
                    f"guidance_scale={guidance_scale} needs a classifier or a guidance_fn, and this pipeline has no classifier; "
                    "give one of them, or guidance_scale=0"
                )
            if label_ids is None:
                raise ValueError(
                    f"guidance_scale={guidance_scale} needs class_labels to guide towards; use 0 without them"
                )
        if self.unet.config.get("num_class_embeds") is None:
            return
        if label_ids is None and self.null_class_id is None:
            raise ValueError(
                f"class_labels are missing; this U-Net needs one of 0 to {self.num_classes - 1} for each image"
            )
        if classifier_free_guidance_scale != 1 and self.null_class_id is None:
            raise ValueError(
                f"classifier_free_guidance_scale={classifier_free_guidance_scale} needs a U-Net that was trained with a null "
                "class (null_class=True and labels left out at random); this one has none, so use 1"
            )

    def check_inputs(
        self,
        batch: int,
        num_inference_steps: int,
        timesteps: list[int] | str | None,
        eta: float | None,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None,
        output_type: str,
        callback_on_step_end_tensor_inputs: Sequence[str],
        micro_batch_sizes: dict[str, int | None],
    ) -> None:
        """Raise ValueError, with what is allowed, for an argument of a call that the rest cannot work with."""
        if batch < 1:
            raise ValueError(f"the call asks for {batch} images; ask for at least 1")
        if timesteps is None and (not isinstance(num_inference_steps, int) or num_inference_steps < 1):
            raise ValueError(f"num_inference_steps must be a whole number of at least 1, not {num_inference_steps!r}")
        if timesteps is not None and "timesteps" not in inspect.signature(self.scheduler.set_timesteps).parameters:
            raise ValueError(
                f"{type(self.scheduler).__name__} takes no timesteps of one's own; use num_inference_steps"
            )
        if eta is not None and "eta" not in inspect.signature(self.scheduler.step).parameters:
            raise ValueError(f"{type(self.scheduler).__name__} has no eta; leave it out, or use DDIMEtaScheduler")
        if isinstance(generator, list) and len(generator) != batch:
            raise ValueError(
                f"{len(generator)} generators were given for {batch} images; give one, or one for each image"
            )
        shape = (batch, self.unet.config.in_channels, *self.image_size)
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}, but this call needs {shape}")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"unknown output_type {output_type!r}; choose from {list(OUTPUT_TYPES)}")
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(f"callback_on_step_end_tensor_inputs knows {self._callback_tensor_inputs}, not {unknown}")
        for name, size in micro_batch_sizes.items():
            if size is not None and (not isinstance(size, int) or size < 1):
                raise ValueError(f"{name} must be a whole number of at least 1 or None, not {size!r}")

    def timesteps_within(self, interval: tuple[float, float] | None) -> list[bool]:
        """For each timestep of the run whether t / num_train_timesteps lies in the interval; None is all of them."""
        low, high = (0.0, 1.0) if interval is None else interval
        return [
            low <= t / self.scheduler.config.num_train_timesteps <= high for t in self.scheduler.timesteps.tolist()
        ]

    def guided_timesteps(self, interval: tuple[float, float] | None, eta: float | None) -> list[bool]:
        """For each timestep of the run whether a gradient guides it; `interval` as in a call, None leaves out what DDIM cannot guide.

        Raises ValueError for an interval with a timestep that has no signal (zero terminal SNR) and a DDIM scheduler.
        """
        timesteps, guided = self.scheduler.timesteps.tolist(), self.timesteps_within(interval)
        if "eta" not in inspect.signature(self.scheduler.step).parameters:
            return guided
        lost = [t for t, inside in zip(timesteps, guided) if inside and self.scheduler.alpha_bar[t] == 0]
        if interval is None:
            return [t not in lost and self._ddim_weight(t, eta) <= MAX_DDIM_WEIGHT for t in timesteps]
        if lost:
            raise ValueError(
                f"timestep {lost[0]} has no signal (alpha_bar is 0), so {type(self.scheduler).__name__} cannot guide it; leave "
                "guidance_interval out, end it below, or use an ancestral scheduler"
            )
        return guided

    def _ddim_weight(self, t: int, eta: float | None) -> float:
        nothing = torch.empty(0)  # the weight of a DDIM step depends on no tensor
        return self.scheduler.guidance_weight(nothing, t, nothing, eta)

    # --- parts of the loop --------------------------------------------------------------------------------------------------

    def default_micro_batch_size(self, model: ModelMixin) -> int | None:
        """Images that one forward of `model` should take: what the caches of a CPU like; on a GPU all, bounded for the classifier."""
        if self._execution_device.type != "cpu" and model is not self.classifier:
            return None
        budget = CPU_ACTIVATION_BYTES if self._execution_device.type == "cpu" else GPU_CLASSIFIER_BYTES
        config, (height, width) = model.config, self.image_size
        channels = config.get("model_channels") or max(config.get("block_out_channels", [128]))
        return max(1, budget // (channels * height * width // config.get("patch_size", 1) ** 2 * 4))

    def prepare_latents(
        self, batch: int, generator: torch.Generator | list[torch.Generator] | None, latents: Tensor | None
    ) -> Tensor:
        """The first x_t (B, C, H, W), in float32 also for a model in half precision; given `latents` are unit noise too."""
        device, dtype = self._execution_device, torch.promote_types(self.unet.dtype, torch.float32)
        if latents is None:
            shape = (batch, self.unet.config.in_channels, *self.image_size)
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        return latents.to(device, dtype) * self.scheduler.init_noise_sigma

    def predict(self, latents: Tensor, t: Tensor, labels: Tensor | None, micro_batch_size: int | None) -> Tensor:
        """The U-Net's output for x_t (B, C, H, W), computed `micro_batch_size` images at a time."""
        inputs = self.scheduler.scale_model_input(latents, t).to(self.unet.dtype)
        size = micro_batch_size or len(inputs)
        outputs = []
        for start in range(0, len(inputs), size):
            rows = slice(start, start + size)
            condition = {} if labels is None else {"class_labels": labels[rows]}
            outputs.append(self.unet(inputs[rows], t, **condition, return_dict=False)[0])
        return torch.cat(outputs).to(latents.dtype)

    def gradient(
        self,
        latents: Tensor,
        t: Tensor,
        labels: Tensor | None,
        output: Tensor,
        guidance_fn: Callable | None,
        micro_batch_size: int | None,
    ) -> Tensor:
        """The gradient of log p(y | x_t) by x_t (B, C, H, W): the classifier's, or that of `guidance_fn`."""
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
            class_labels: numbers or names of classes, one for each image; a U-Net that knows classes is given them, too.
            batch_size: the number of images where there are no labels (1 if left out).
            num_images_per_label: images of each entry of `class_labels`, next to each other.
            num_inference_steps: the number of denoising steps.
            timesteps: the steps themselves instead, in the form that the scheduler's `set_timesteps` takes.
            guidance_scale: multiplies the gradient; 0 is sampling without guidance, 1 turns p(x) into p(x | y), more sharpens.
            guidance_interval: guide only where t / num_train_timesteps lies in [low, high]; 0 is clean, 1 is pure noise. None guides
                everywhere, with DDIM except where the schedule has next to no signal, as at the start of the cosine schedule:
                there the gradient would be multiplied by hundreds.
            gradient_steps: how many gradients make one step's: their mean along the way that the step pushes x_t, so that a
                large scale overshoots less. The scale keeps its meaning.
            guidance_fn: called as f(x_t, t, x_0=..., class_labels=...) instead of the classifier; returns the gradient of
                log p(y | x_t) by x_t (B, C, H, W). x_0 is the U-Net's prediction, class_labels is int64 (B,) or None.
            classifier_free_guidance_scale: w in uncond + w * (cond - uncond) of the U-Net's own predictions, for a U-Net with a
                null class; 1 is the conditional prediction, 0 the one without class.
            eta: handed to the scheduler's `step`; None leaves the scheduler's own.
            generator: one, or a list with one for each image: then an image does not depend on the rest of its batch.
            latents: unit noise (B, C, H, W) to start from instead of drawing it.
            output_type: "pil", "np" (B, H, W, C) in [0, 1], "pt" (B, C, H, W) in [0, 1], or "latent" (B, C, H, W) as the
                scheduler left it, about [-1, 1].
            return_dict: whether to return an `ImagePipelineOutput` instead of a tuple.
            callback_on_step_end: called as f(pipe, step, t, tensors) after each step; returns a dict of changed tensors.
            callback_on_step_end_tensor_inputs: which tensors the callback is given.
            micro_batch_size: images that one forward of the U-Net takes; does not change the images. None: chosen for the device.
            classifier_micro_batch_size: images whose activations the classifier keeps at a time, likewise.

        Returns:
            `ImagePipelineOutput` or a tuple with the images. Raises ValueError for unknown classes and for arguments that
            do not fit the models, the scheduler or each other.
        """
        if class_labels is not None and self.num_classes is None:
            raise ValueError(f"class_labels={class_labels!r} were given to models without classes; leave them out")
        label_ids = None if class_labels is None else self.get_label_ids(class_labels)
        if label_ids is not None:
            label_ids = [i for i in label_ids for _ in range(num_images_per_label)]
            if batch_size not in (None, len(label_ids)):
                raise ValueError(f"batch_size={batch_size}, but the labels make {len(label_ids)} images; leave it out")
        batch = len(label_ids) if label_ids is not None else 1 if batch_size is None else batch_size
        w = classifier_free_guidance_scale
        self.check_guidance(label_ids, guidance_scale, guidance_interval, gradient_steps, guidance_fn, w)
        sizes = {
            "micro_batch_size": micro_batch_size,
            "classifier_micro_batch_size": classifier_micro_batch_size,
        }
        self.check_inputs(
            batch,
            num_inference_steps,
            timesteps,
            eta,
            generator,
            latents,
            output_type,
            callback_on_step_end_tensor_inputs,
            sizes,
        )
        device, channels = self._execution_device, self.unet.config.in_channels
        self._guidance_scale, self._interrupt = guidance_scale, False
        micro_batch_size = micro_batch_size or self.default_micro_batch_size(self.unet)
        if classifier_micro_batch_size is None and self.classifier is not None:
            classifier_micro_batch_size = self.default_micro_batch_size(self.classifier)

        labels = None if label_ids is None else torch.tensor(label_ids, device=device)  # (B,)
        unet_labels = null_labels = None  # (B,), what the U-Net is given
        if self.unet.config.get("num_class_embeds") is not None:
            if self.null_class_id is not None:
                null_labels = torch.full((batch,), self.null_class_id, device=device)
            unet_labels = null_labels if labels is None or w == 0 else labels
        is_classifier_free = labels is not None and null_labels is not None and w not in (0, 1)

        if timesteps is None:
            self.scheduler.set_timesteps(num_inference_steps, device=device)
        else:
            self.scheduler.set_timesteps(timesteps=timesteps, device=device)
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        # known before the loop, because reading a timestep on a GPU makes the host wait
        is_inside = self.timesteps_within(guidance_interval)
        is_guided = [False] * len(timesteps)
        if guidance_scale > 0:
            is_guided = self.guided_timesteps(guidance_interval, eta)

        step_options = {} if generator is None else {"generator": generator}
        eta_option = {} if eta is None else {"eta": eta}
        takes_variance = str(self.scheduler.config.get("variance_type")).startswith("learned")
        latents = self.prepare_latents(batch, generator, latents)
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                output = self.predict(latents, t, unet_labels, micro_batch_size)  # (B, C or 2 C, H, W)
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
                latents = self.scheduler.step(
                    output, t, latents, **step_options, **eta_option, **guidance, return_dict=False
                )[0]

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


def _sides(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)
