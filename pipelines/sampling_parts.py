"""The parts of sampling that pipelines share; each pipeline's loop stands in its own `__call__`.

A part takes the shape of a sample from the pipeline and assumes neither images nor labels nor a
noise process, so that a pipeline uses the parts that fit it. This text travels inside the
pipeline's file, see self_contained.py. Shapes: B samples of shape (...), images are (C, H, W).
"""

import difflib
import inspect
import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from diffusers import ImagePipelineOutput, ModelMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor


OUTPUT_TYPES = ("pil", "np", "pt", "latent")
# Of the first feature map in one forward on the CPU. Measured on one core, 28x28 in 2x2 patches and
# 32x32, 64 channels: images/s for 0.4, 1.5, 3, 6, 12 MiB are 141, 165, 177, 175, 164 and 33 to 36.
# Past 32 MiB a tensor, page faults halve it. A classifier's gradient: 33, 39, 43, 44, 38 images/s
# for 0.25, 1, 4, 8, 16 MiB.
CPU_FEATURE_MAP_BYTES = 2**22
# Of the largest feature map of an autoencoder that decodes elsewhere.
DECODER_FEATURE_MAP_BYTES = 2**30
SHOWN_SAMPLES = 4


def sides(sample_size: int | Sequence[int] | None) -> tuple[int, ...]:
    """The spatial sides that a network's `sample_size` means: a number is a square, None is ()."""
    if sample_size is None:
        return ()
    return (sample_size, sample_size) if isinstance(sample_size, int) else tuple(sample_size)


def feature_map_bytes(network: ModelMixin) -> int:
    """Bytes of one sample's first feature map in float32, by the names that configs use."""
    config = network.config
    channels = config.get("model_channels") or max(config.get("block_out_channels") or [128])
    shape = sides(config.get("sample_size"))
    return 4 * channels * max(1, math.prod(shape) // (config.get("patch_size") or 1) ** len(shape))


def decoded_shape(autoencoder: ModelMixin, latent_size: Sequence[int]) -> tuple[int, ...]:
    """Shape (C, H, W) of what an autoencoder of diffusers decodes from latents of a size (h, w)."""
    config = autoencoder.config
    widths = config.get("block_out_channels") or config["encoder_block_out_channels"]
    factor = (config.get("upsampling_scaling_factor") or 2) ** (len(widths) - 1)
    channels = config.get("out_channels") or config["in_channels"]
    return (channels, *(side * factor for side in latent_size))


def unscaled(latents: Tensor, config: Any) -> Tensor:
    """Latents (B, D, h, w) as an autoencoder decodes them, from mean 0 and deviation 1.

    Both conventions of diffusers: `latents_mean` and `latents_std` of channels beside
    `scaling_factor`, as in SDXL, or `scaling_factor` and `shift_factor` alone, as in SD3.
    """
    latents = latents / (config.get("scaling_factor") or 1.0)
    if config.get("latents_std") is None or config.get("latents_mean") is None:
        return latents + (config.get("shift_factor") or 0.0)
    mean, std = (latents.new_tensor(config[name]).reshape(1, -1, 1, 1) for name in ("latents_mean", "latents_std"))
    return latents * std + mean


def in_micro_batches(
    network: ModelMixin, size: int | None, sample: Tensor, t: Tensor, *inputs: Tensor, **conditions: Tensor | None
) -> Tensor:
    """`network(sample, t, *inputs, **conditions)` for B samples, `size` at a time; None is all.

    `t` holds for all samples. Inputs and conditions have B rows, and those that are None are left
    out. Floating-point tensors reach the network in its dtype; the output is in float32 at least.
    """
    conditions = {name: rows for name, rows in conditions.items() if rows is not None}
    tensors = [x.to(network.dtype) if x.is_floating_point() else x for x in (sample, *inputs, *conditions.values())]
    outputs = []
    for x, *rest in zip(*(x.split(int(size or len(sample))) for x in tensors)):
        named = dict(zip(conditions, rest[len(inputs) :]))
        outputs.append(network(x, t, *rest[: len(inputs)], **named, return_dict=False)[0])
    output = torch.cat(outputs)
    return output.to(torch.promote_types(output.dtype, torch.float32))


class SamplingMixin:
    """Labels, checks, latents, micro-batches, callbacks and outputs for a `DiffusionPipeline`.

    A pipeline that names this class before its base says of itself what others ask:

        network_name: the component that draws; its config has `in_channels`, `sample_size` and,
            where it knows classes, `num_class_embeds` and `null_class`.
        vae: an autoencoder of diffusers, which decodes what the network draws; None, or no such
            attribute, where that is the sample.
        sampling_options: the arguments of a call that say how to sample, such as the steps.
        measures: measures of the model itself beyond those of its samples, by name, each as
            "module:function".

    Its `__call__` uses the methods below from top to bottom. A process that does not start from
    Gaussian noise has its own `prepare_latents`.
    """

    network_name = "unet"
    sampling_options: tuple[str, ...] = ("num_inference_steps",)
    measures: dict[str, str] = {}
    image_processor = VaeImageProcessor(vae_scale_factor=1)
    _callback_tensor_inputs = ["latents"]

    @property
    def drawing_network(self) -> ModelMixin:
        """The network that draws the samples."""
        return getattr(self, self.network_name)

    @property
    def image_size(self) -> tuple[int, ...]:
        """Height and width of the images; () for samples without sides, such as points."""
        return sides(self.drawing_network.config.get("sample_size"))

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """Shape of what the network draws: of a sample, or of its latents where a vae decodes."""
        return (self.drawing_network.config.in_channels, *sides(self.drawing_network.config.get("sample_size")))

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample: (C, H, W) of an image, (C,) of a point."""
        shape, vae = self.noise_shape, getattr(self, "vae", None)
        return shape if vae is None else decoded_shape(vae, shape[1:])

    @property
    def id2label(self) -> dict[int, str] | None:
        """The names of the classes by number, None if they have no names."""
        return self.config.get("id2label")

    @property
    def num_classes(self) -> int | None:
        """The number of real classes, None for an unconditional model."""
        return self.drawing_network.config.get("num_class_embeds")

    @property
    def null_class_id(self) -> int | None:
        """The label that means "no class" to the network, None if it has none."""
        config = self.drawing_network.config
        return config.get("num_class_embeds") if config.get("null_class") else None

    @property
    def guidance_scale(self) -> float:
        """The scale of the running or last call."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """The number of steps of the running or last call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Set `pipe._interrupt = True` in a callback to leave out the remaining steps."""
        return self._interrupt

    def register_id2label(self, id2label: dict[int | str, str] | None) -> None:
        """Keep the classes' names in model_index.json; JSON turns the numbers into strings."""
        self.register_to_config(id2label=id2label and {int(i): str(name) for i, name in id2label.items()})

    # --- labels ---------------------------------------------------------------------------------

    def prepare_labels(
        self,
        class_labels: int | str | list[int | str] | Tensor | None,
        batch_size: int | None,
        num_images_per_label: int,
    ) -> tuple[Tensor | None, int]:
        """The class numbers, int64 (B,) or None where no labels are given, and B.

        Raises ValueError for labels that the model does not know or lacks, or another `batch_size`.
        """
        for name, count in (("batch_size", batch_size), ("num_images_per_label", num_images_per_label)):
            if count is not None and (not isinstance(count, Integral) or isinstance(count, bool)):
                raise ValueError(f"{name} must be a whole number, not {count!r}")
        if class_labels is None:
            if getattr(self.drawing_network.config, "num_class_embeds", None) and self.null_class_id is None:
                raise ValueError(
                    f"class_labels are missing; this model needs one of 0 to {self.num_classes - 1} for each image"
                )
            return None, 1 if batch_size is None else int(batch_size)
        if self.num_classes is None:
            raise ValueError(f"class_labels={class_labels!r} were given to a model without classes; leave them out")
        label_ids = [i for i in self.get_label_ids(class_labels) for _ in range(num_images_per_label)]
        if batch_size not in (None, len(label_ids)):
            raise ValueError(f"batch_size={batch_size}, but the labels make {len(label_ids)} images; leave it out")
        return torch.tensor(label_ids, dtype=torch.int64, device=self._execution_device), len(label_ids)

    def get_label_ids(self, class_labels: int | str | list[int | str] | Tensor) -> list[int]:
        """Class numbers for numbers and names; raises ValueError for those that are unknown."""
        labels = class_labels.flatten().tolist() if isinstance(class_labels, (Tensor, np.ndarray)) else class_labels
        return [self._label_id(label) for label in (labels if isinstance(labels, (list, tuple, range)) else [labels])]

    def _label_id(self, label: int | str) -> int:
        if not isinstance(label, str):
            if not isinstance(label, Integral) or isinstance(label, bool) or not 0 <= label < self.num_classes:
                raise ValueError(f"class label {label!r} is not a class; this model knows 0 to {self.num_classes - 1}")
            return int(label)
        names = self.id2label or {}
        found = [i for i, name in names.items() if name == label]
        found = found or [i for i, name in names.items() if name.casefold() == label.casefold()]
        if len(found) > 1:
            raise ValueError(f"the class name {label!r} stands for the classes {found}; give the number instead")
        if not found:
            known = ", ".join(list(names.values())[:20]) + (", ..." if len(names) > 20 else "")
            near = difflib.get_close_matches(label, names.values(), n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(
                f"unknown class name {label!r}; {hint}" + (f"known: {known}" if names else "it has numbers only")
            )
        return found[0]

    def example_call(self) -> dict[str, Any]:
        """Arguments of a call that draws a few samples, for the model's card."""
        names = list((self.id2label or {}).values())
        labels = [
            self.id2label[i] if names.count((self.id2label or {}).get(i)) == 1 else i
            for i in range(min(SHOWN_SAMPLES, self.num_classes or 0))
        ]
        arguments = {"class_labels": labels} if labels else {"batch_size": SHOWN_SAMPLES}
        return arguments if len(self.sample_shape) == 3 else {**arguments, "output_type": "np"}

    # --- checks ---------------------------------------------------------------------------------

    def check_common(
        self,
        batch: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None,
        output_type: str,
        callback_on_step_end_tensor_inputs: Sequence[str],
        **micro_batch_sizes: int | None,
    ) -> None:
        """Raise ValueError, with what is allowed, for arguments that every pipeline takes."""
        if batch < 1:
            raise ValueError(f"the call asks for {batch} images; ask for at least 1")
        sources = generator if isinstance(generator, list) else [generator]
        if not all(isinstance(source, torch.Generator) for source in sources) and generator is not None:
            raise ValueError(
                f"generator={generator!r} is neither a torch.Generator nor a list of them; write "
                "torch.Generator().manual_seed(seed)"
            )
        if isinstance(generator, list) and len(generator) != batch:
            raise ValueError(
                f"{len(generator)} generators were given for {batch} images; give one, or one for each image"
            )
        shape = (batch, *self.noise_shape)
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}, but this call needs {shape}")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"unknown output_type {output_type!r}; choose from {list(OUTPUT_TYPES)}")
        if output_type == "pil" and len(self.sample_shape) != 3:
            raise ValueError(
                f"output_type='pil' needs images, but a sample has shape {self.sample_shape}; "
                f"choose from {list(OUTPUT_TYPES[1:])}"
            )
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(f"callback_on_step_end_tensor_inputs knows {self._callback_tensor_inputs}, not {unknown}")
        for name, size in micro_batch_sizes.items():
            if size is not None and (not isinstance(size, Integral) or size < 1):
                raise ValueError(f"{name} must be a whole number of at least 1 or None, not {size!r}")
        self.check_latents()

    def check_latents(self) -> None:
        """Raise ValueError for latents that the scheduler would clip, or the vae cannot decode."""
        vae = getattr(self, "vae", None)
        if vae is None:
            return
        for option in ("clip_sample", "thresholding"):
            if self.scheduler.config.get(option):
                raise ValueError(
                    f"{option} of {type(self.scheduler).__name__} would clip latents, which have no bounds; give "
                    f"{option}=False, as in from_config(pipe.scheduler.config, {option}=False)"
                )
        if vae.config.latent_channels != self.noise_shape[0]:
            raise ValueError(
                f"the vae decodes latents of {vae.config.latent_channels} channels, and the network draws "
                f"{self.noise_shape[0]}; give the vae that it was trained with"
            )

    def check_scale(self, guidance_scale: float) -> None:
        """Raise ValueError for a scale of guidance that is no finite number."""
        if not isinstance(guidance_scale, Real) or not math.isfinite(guidance_scale):
            raise ValueError(f"guidance_scale must be a finite number, not {guidance_scale!r}; 1 does not guide")

    def check_guide(self, guide: ModelMixin) -> None:
        """Raise ValueError for a weaker network that does not draw the same samples.

        One without classes may guide a network that has some: it says what no class looks like.
        """
        said = []
        for config in (guide.config, self.drawing_network.config):
            shape = (config.in_channels, *sides(config.get("sample_size")))
            said.append((shape, config.get("num_class_embeds")))
        (shape, classes), (own_shape, own_classes) = said
        if shape != own_shape or classes not in (None, own_classes):
            raise ValueError(
                f"the network that guides was made for samples of shape {shape} with {classes or 'no'} classes, and "
                f"the one that draws for {own_shape} with {own_classes or 'no'}; give one of the same data, such as "
                "an early checkpoint of its run"
            )

    def check_steps(
        self,
        num_inference_steps: int,
        timesteps: list[int] | str | None = None,
        eta: float | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        """Raise ValueError, with what is allowed, for steps that the scheduler cannot take."""
        scheduler = type(self.scheduler).__name__
        is_whole = isinstance(num_inference_steps, Integral) and not isinstance(num_inference_steps, bool)
        if timesteps is None and not (is_whole and num_inference_steps >= 1):
            raise ValueError(f"num_inference_steps must be a whole number of at least 1, not {num_inference_steps!r}")
        if timesteps is not None and "timesteps" not in inspect.signature(self.scheduler.set_timesteps).parameters:
            raise ValueError(f"{scheduler} takes no timesteps of one's own; use num_inference_steps")
        if eta is not None and "eta" not in inspect.signature(self.scheduler.step).parameters:
            raise ValueError(f"{scheduler} has no eta; leave it out, or use DDIMEtaScheduler")
        if eta is not None and not 0 <= eta <= 1:
            raise ValueError(f"eta must be between 0 and 1, not {eta!r}")
        interval = tuple(guidance_interval)
        if len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1:
            raise ValueError(
                f"guidance_interval must be (low, high) with 0 <= low <= high <= 1, not {guidance_interval!r}"
            )

    # --- the run --------------------------------------------------------------------------------

    def default_micro_batch_size(self, network: ModelMixin | None = None) -> int | None:
        """Samples that one forward should take: None, all of them, unless it runs on the CPU."""
        if self._execution_device.type != "cpu":
            return None
        return max(1, CPU_FEATURE_MAP_BYTES // feature_map_bytes(self.drawing_network if network is None else network))

    def prepare_timesteps(self, num_inference_steps: int | None, timesteps: list[int] | str | None = None) -> Tensor:
        """The scheduler's timesteps for this call; `timesteps` of one's own replace the number."""
        if timesteps is None:
            steps = None if num_inference_steps is None else int(num_inference_steps)
            self.scheduler.set_timesteps(steps, device=self._execution_device)
        else:
            self.scheduler.set_timesteps(timesteps=timesteps, device=self._execution_device)
        # Stock solvers else look the first timestep up, and start at its second entry where two
        # noise levels have the same.
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(0)
        self._num_timesteps = len(self.scheduler.timesteps)
        return self.scheduler.timesteps

    def timesteps_within(self, interval: tuple[float, float]) -> list[bool]:
        """For each timestep of the run whether t / num_train_timesteps lies in [low, high].

        Known before the loop, because reading a timestep on a GPU makes the host wait.
        """
        low, high = interval
        count = self.scheduler.config.num_train_timesteps
        return [low <= t / count <= high for t in self.scheduler.timesteps.tolist()]

    def prepare_latents(
        self, batch: int, generator: torch.Generator | list[torch.Generator] | None, latents: Tensor | None
    ) -> Tensor:
        """The first x_t (B, ...), in float32 at least; given `latents` are unit noise, too."""
        device, dtype = self._execution_device, torch.promote_types(self.drawing_network.dtype, torch.float32)
        if latents is None:
            latents = randn_tensor((batch, *self.noise_shape), generator=generator, device=device, dtype=dtype)
        return latents.to(device, dtype) * self.scheduler.init_noise_sigma

    def after_step(
        self, callback: Callable | None, names: Sequence[str], i: int, t: Tensor, **tensors: Tensor
    ) -> tuple[Tensor, ...]:
        """The tensors in their order, as `callback(pipe, i, t, tensors by name)` leaves them."""
        if callback is None:
            return tuple(tensors.values())
        changed = callback(self, i, t, {name: tensors[name] for name in names})
        if not isinstance(changed, dict):
            raise ValueError(
                f"callback_on_step_end returned {changed!r}; return a dict of changed tensors, {{}} for none"
            )
        for name, tensor in tensors.items():
            if name in changed and getattr(changed[name], "shape", None) != tensor.shape:
                given = (
                    tuple(changed[name].shape) if isinstance(changed[name], Tensor) else type(changed[name]).__name__
                )
                raise ValueError(
                    f"callback_on_step_end returned {name} as {given}; its shape must stay {tuple(tensor.shape)}"
                )
        return tuple(changed.get(name, tensor) for name, tensor in tensors.items())

    def decode(self, latents: Tensor, output_type: str) -> Tensor:
        """The samples (B, ...) that the vae makes of latents, which are left as they are without.

        A few at a time, for memory. A vae in float16 whose config says `force_upcast` computes in
        float32, since it would overflow.
        """
        vae = getattr(self, "vae", None)
        if vae is None or output_type == "latent":
            return latents
        widths = vae.config.get("block_out_channels") or vae.config["decoder_block_out_channels"]
        map_bytes = 4 * max(widths[:2]) * math.prod(self.sample_shape[1:])
        limit = CPU_FEATURE_MAP_BYTES if latents.device.type == "cpu" else DECODER_FEATURE_MAP_BYTES
        upcast = vae.dtype == torch.float16 and vae.config.get("force_upcast")
        if upcast:
            vae.to(torch.float32)
        parts = unscaled(latents, vae.config).to(vae.dtype).split(max(1, limit // map_bytes))
        samples = torch.cat([vae.decode(part, return_dict=False)[0].float() for part in parts])
        if upcast:
            vae.to(torch.float16)
        return samples

    def to_output(
        self, samples: Tensor, output_type: str, return_dict: bool
    ) -> ImagePipelineOutput | tuple[list[Image.Image] | np.ndarray | Tensor]:
        """What a call returns for samples (B, ...); images go from [-1, 1] to [0, 1]."""
        if output_type != "latent" and len(self.sample_shape) == 3:
            samples = self.image_processor.postprocess(samples, output_type=output_type)
        elif output_type == "np":
            samples = samples.cpu().numpy()
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=samples) if return_dict else (samples,)
