"""Sampling with classifier-free guidance; without guidance for a model that knows no classes.

Classifier-free guidance: Ho and Salimans 2022, arXiv:2207.12598. Autoguidance: Karras et al. 2024,
arXiv:2406.02507. Guidance interval: Kynkaanniemi et al. 2024, arXiv:2404.07724. Guidance rescale:
Lin et al. 2023, arXiv:2305.08891. Shapes: B images, C channels, H x W pixels; samples of any other
rank go the same way.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin
from diffusers.guiders import BaseGuidance
from PIL import Image
from torch import Tensor

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

"""Pipelines that save their code beside the weights, and load without running foreign code.

diffusers loads a pipeline whose package is not installed if the folder carries the pipeline's file
at its root, each component's file in the component's folder, and an index that names them
(`trust_remote_code=True`). `SelfContainedMixin` writes that form. The
file that travels must need no neighbour: diffusers keeps the code of all repositories in one folder
and keeps imported neighbours across loads, so a second repository would run with the first one's
neighbour. Therefore the text of this file and of sampling_parts.py replaces the line that imports
from it, and what travels is one file.
"""

import importlib
import json
import logging
import os
import re
import shutil
import sys
import uuid
from pathlib import Path

from diffusers import DiffusionPipeline
from torch import nn


logger = logging.getLogger(__name__)

# False in the copy of this text that travels with a pipeline.
IN_PACKAGE = __name__.startswith("hf_diffusion.")
IMPORT_OF_SHARED_TEXT = re.compile(
    r"^from hf_diffusion\.pipelines\.(self_contained|sampling_parts) import (?:[\w, ]+|\([^)]+\))$", re.MULTILINE
)
# Weights, whole or one of the shards, and the list of the shards, as diffusers names them.
WEIGHTS = re.compile(
    r"(?P<name>[^.]+?)(\.(?P<variant>[^.]+?))?(-\d{5}-of-\d{5})?\.safetensors(\.index(\.(?P<index_variant>[^.]+))?\.json)?"
)
# What stock diffusers imports by itself.
LIBRARIES = ("diffusers", "transformers", "onnxruntime")


def _code_of(cls: type) -> tuple[str, str] | None:
    """Stem and self-contained text of the file of `cls`; None where no file can be sent along."""
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    if cls.__module__.split(".")[0] in LIBRARIES or cls.__module__ == "__main__" or file is None:
        return None
    text = Path(file).read_text(encoding="utf-8")
    return Path(file).stem, IMPORT_OF_SHARED_TEXT.sub(lambda line: _shared_text(line[1]), text)


def _shared_text(stem: str) -> str:
    """The text of this file or of the other one that travels."""
    return Path(__file__).with_name(f"{stem}.py").read_text(encoding="utf-8")


def _move_into(staging: Path, target: Path, index_name: str) -> None:
    """Move every file of `staging` to its place in `target`, each in one step, the index last.

    Weights of the same name and variant that an earlier save left in another number of files are
    removed; those of other variants stay.
    """
    files = sorted((f for f in staging.rglob("*") if f.is_file()), key=lambda f: f.name == index_name)
    stale = []
    for folder in {f.parent.relative_to(staging) for f in files}:
        (target / folder).mkdir(parents=True, exist_ok=True)
        saved = {_weights_of(f.name) for f in (staging / folder).iterdir()} - {None}
        for file in (target / folder).iterdir():
            if _weights_of(file.name) in saved and not (staging / folder / file.name).exists():
                stale.append(file)
    # The loader prefers shards, so the list of an earlier, larger save would win over this one.
    for file in stale:
        if file.suffix == ".json":
            file.unlink()
    for file in files:
        os.replace(file, target / file.relative_to(staging))
    for file in stale:
        file.unlink(missing_ok=True)


def _weights_of(file: str) -> tuple[str, str | None] | None:
    """Name and variant of the weights that a file holds a part of; None where it holds none."""
    found = WEIGHTS.fullmatch(file)
    return None if found is None else (found["name"], found["variant"] or found["index_variant"])


class SelfContainedMixin:
    """Saving with code and loading without trust; a pipeline names this class before its base."""

    def register_modules(self, **modules) -> None:
        super().register_modules(**modules)
        # diffusers overwrites the files that it runs for a repository at the next load.
        classes = [type(self), *(type(getattr(module, "_orig_mod", module)) for module in modules.values())]
        self._code = {**getattr(self, "_code", {}), **{cls: _code_of(cls) for cls in classes}}

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs,
    ) -> None:
        """Write weights, configurations and code, so that loading needs no package.

        Every file appears whole, the index last; other files of an existing folder stay. With
        `push_to_hub=True` the remaining arguments (`repo_id`, `private`, `token`, ...) are those of
        `push_to_hub`. Raises ValueError for `safe_serialization=False`: weights are written as
        safetensors, since a pickle can run code when it is read.
        """
        if not safe_serialization:
            raise ValueError(
                "safe_serialization=False would write a pickle, which can run code when it is read; leave it out"
            )
        for name, part in self.components.items():
            if adapters := getattr(part, "peft_config", None):
                raise ValueError(
                    f"the {name} has the adapters {', '.join(adapters)} beside its weights; save them by "
                    f"pipe.{name}.save_lora_adapter(folder), or make them part of the weights by fuse_lora() and "
                    "unload_lora()"
                )
        target = Path(save_directory)
        if target.exists() and not target.is_dir():
            raise ValueError(f"save_directory must be a folder, but {str(target)!r} is a file; choose another name")
        # Inside the target or beside it: the same file system, and surely writable.
        inside = target if target.is_dir() else target.absolute().parent
        staging = inside / f".saving-{uuid.uuid4().hex}"
        staging.mkdir(parents=True)
        try:
            super().save_pretrained(staging, max_shard_size=max_shard_size, variant=variant)
            self._write_code(staging)
            if target.is_dir():
                _move_into(staging, target, self.config_name)
            else:
                os.rename(staging, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", target.name), variant=variant, **kwargs)

    def _write_code(self, folder: Path) -> None:
        """Put each class's file where diffusers looks for it and name the files in the index."""
        index = {}
        parts = {"": self, **{name: part for name, part in self.components.items() if part is not None}}
        for name, part in parts.items():
            # torch.compile wraps the model in a class of its own.
            cls = type(getattr(part, "_orig_mod", part))
            code = self._code[cls] if cls in self._code else _code_of(cls)
            if code is not None:
                stem, text = code
                (folder / name / f"{stem}.py").write_text(text, encoding="utf-8")
                index[name or "_class_name"] = [stem, cls.__name__]
            elif cls.__module__.split(".")[0] not in LIBRARIES:
                logger.warning(
                    f"{cls.__name__} has no file of its own that could be saved beside its weights; move the class"
                    " into a module, or others cannot load this pipeline"
                )
        networks = [name for name, part in parts.items() if name in index and isinstance(part, nn.Module)]
        if networks:
            # AutoModel reads here which file of the part's folder has its class.
            index["auto_map"] = {"AutoModel": ".".join(index[networks[0]])}
        for file in (folder / self.config_name, *folder.glob("*/*config.json")):
            config = json.loads(file.read_text(encoding="utf-8"))
            # A path on this computer is nobody else's business.
            config.pop("_name_or_path", None)
            config.update(index if file.parent == folder else {})
            file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        """Load a folder or repository with the package's own classes; none of its code is run.

        Takes the arguments of `DiffusionPipeline.from_pretrained`, `subfolder` of the repository,
        and `verify=True`, which compares what was fetched with the Hub's checksums. Raises
        ValueError for a class that the package does not have and for `use_safetensors=False`,
        OSError for files that are missing or damaged.
        """
        # A class that came from a repository: the stock loader, which asks for trust_remote_code.
        if not IN_PACKAGE:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if kwargs.pop("use_safetensors", None) is False:
            raise ValueError(
                "use_safetensors=False would read a pickle, which can run code; save the pipeline as safetensors"
            )
        download = importlib.import_module("hf_diffusion.hub.loading").download_pipeline
        folder = download(pretrained_model_name_or_path, kwargs)
        pipe = super().from_pretrained(folder, **{**kwargs, "trust_remote_code": False, "use_safetensors": True})
        pipe.register_to_config(_name_or_path=str(pretrained_model_name_or_path))
        return pipe

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs):
        """A pipeline of this class with the components and settings of another; see diffusers.

        The stock method hands over networks of exactly the annotated classes, and ours say
        `ModelMixin`.
        """
        expected, _ = cls._get_signature_keys(cls)
        shared = {name: part for name, part in pipeline.components.items() if name in expected}
        return super().from_pipe(pipeline, **{**shared, **kwargs})

    @classmethod
    def extract_init_dict(cls, config_dict: dict, **kwargs):
        # What AutoModel reads in the index is no argument of ours.
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k != "auto_map"}, **kwargs)

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        config = super().load_config(pretrained_model_name_or_path, **kwargs)
        # from_pretrained reads the index here, and finds the package's modules in place of files.
        if IN_PACKAGE:
            name_classes = importlib.import_module("hf_diffusion.hub.loading").name_package_classes
            name_classes(config[0] if isinstance(config, tuple) else config)
        return config



# Solvers of diffusers that give blobs, noise or NaN on some schedule for a perfect network, and
# spacings of the noise levels that give blurred images on all; see
# tests/schedulers/test_stock_solvers.py. Heun and KDPM2 correct a step from sigma 20,291 by what is
# seen at its end, PNDM and IPNDM do not go where the schedule says.
UNFIT_SOLVERS = (
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "IPNDMScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
)
# FD in a classifier's features: model_cards/fashion_mnist_study/README.md.
SOLVER_ADVICE = (
    "Fewer calls of the network: `pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)`, with "
    "`from diffusers import UniPCMultistepScheduler`. On the Fashion-MNIST DDPM of hf_diffusion, Frechet distances in "
    "4, 5, 10 and 20 calls were 0.76, 0.51, 0.25 and 0.20 with UniPC, 1.02, 0.65, 0.27 and 0.20 with DPM++ 2M, and "
    "1.28, 0.89, 0.40 and 0.24 with DDIM (N 2,000; source: model_cards/fashion_mnist_study of hf_diffusion, "
    "bfloat16). Another model may differ."
)
UNFIT_SPACINGS = ("use_beta_sigmas", "use_flow_sigmas")


class ClassifierFreeGuidancePipeline(SamplingMixin, SelfContainedMixin, DiffusionPipeline):
    """Samples from a network, of given classes if it knows classes, with classifier-free guidance.

    Args:
        unet: called as `unet(sample, timestep, class_labels=...)`, with out_channels C, or 2 C for
            a learned variance. `config.num_class_embeds` is the number of classes (None:
            unconditional); with `config.null_class` the label `num_class_embeds` means "no
            class", which guidance needs.
        scheduler: any diffusers scheduler.
        id2label: the names of the classes by number; kept in model_index.json.
        vae: an autoencoder of diffusers, which decodes what the network draws; None draws samples.
        guide_unet: a weaker network of the same data and process, such as an early checkpoint, that
            guidance leads away from, in place of the prediction without a class (autoguidance).
    """

    model_cpu_offload_seq = "unet->vae"
    _optional_components = ["vae", "guide_unet"]
    sampling_options = (
        "num_inference_steps",
        "timesteps",
        "eta",
        "guidance_scale",
        "guidance_interval",
        "guidance_rescale",
    )
    measures = {
        "bpd": "hf_diffusion.evaluation.model_measures:measure_bits_per_dim",
        "bpd_ode": "hf_diffusion.evaluation.ode_likelihood:measure_gaussian_bits_per_dim",
        "consistency": "hf_diffusion.evaluation.determinism:measure_consistency",
        "inversion": "hf_diffusion.evaluation.determinism:measure_inversion",
    }

    def __init__(
        self,
        unet: ModelMixin,
        scheduler: SchedulerMixin,
        id2label: dict | None = None,
        vae: ModelMixin | None = None,
        guide_unet: ModelMixin | None = None,
    ):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae, guide_unet=guide_unet)
        self.register_id2label(id2label)

    def example_call(self) -> dict[str, Any]:
        """Arguments of a call that draws a few samples, guided where the model can be."""
        steps = min(50, self.scheduler.config.num_train_timesteps)
        can_guide = self.guide_unet is not None or self.null_class_id is not None
        guidance = {"guidance_scale": 1.5} if can_guide else {}
        return {**super().example_call(), "num_inference_steps": steps, **guidance}

    @property
    def solver_advice(self) -> str:
        """Which solver to take for how many calls of the network, with its source, for a card."""
        return SOLVER_ADVICE if hasattr(self.scheduler, "alphas_cumprod") else ""

    def check_scheduler(self) -> None:
        """Raise ValueError for a stock solver or spacing of noise levels that cannot draw here."""
        name, config = type(self.scheduler).__name__, self.scheduler.config
        if name in UNFIT_SOLVERS:
            raise ValueError(
                f"{name} cannot sample on every schedule of a discrete diffusion process; use UniPCMultistepScheduler "
                "or another of the compatibles of DDIMEtaScheduler, by from_config(pipe.scheduler.config)"
            )
        for option in UNFIT_SPACINGS:
            if config.get(option) and hasattr(self.scheduler, "alphas_cumprod"):
                raise ValueError(
                    f"{option} of {name} leaves out the noise levels at which a discrete diffusion process draws its "
                    "details; leave it out, or use use_karras_sigmas or use_exponential_sigmas"
                )

    def check_levels(self) -> None:
        """Raise ValueError where a stock solver has one noise level twice, and divides by 0."""
        sigmas = getattr(self.scheduler, "sigmas", None)
        if isinstance(sigmas, Tensor) and len(sigmas) == self.num_timesteps + 1 and self.scheduler.order == 1:
            # the last one is where the run ends, which may be the level before it
            levels = sigmas[:-1]
            if not (levels.isfinite().all() and (levels.diff() < 0).all()):
                raise ValueError(
                    f"num_inference_steps={self.num_timesteps} gives two steps of {type(self.scheduler).__name__} the "
                    f"same noise level, or one without signal; use fewer steps than the "
                    f"{self.scheduler.config.num_train_timesteps} of the training, or DDIMEtaScheduler"
                )

    def check_guidance(
        self,
        labels: Tensor | None,
        guidance_scale: float,
        guidance_rescale: float,
        guider: BaseGuidance | None,
    ) -> None:
        """Raise ValueError, with what is allowed, for guidance that does not fit the model."""
        if guider is not None:
            self._check_guider(guider, labels, guidance_scale)
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
        if not 0 <= guidance_rescale <= 1:
            raise ValueError(f"guidance_rescale must be between 0 and 1, not {guidance_rescale!r}")

    def _check_guider(self, guider: BaseGuidance, labels: Tensor | None, guidance_scale: float) -> None:
        name = type(guider).__name__
        if guidance_scale != 1:
            raise ValueError(
                f"guidance_scale={guidance_scale} and a guider were given; set the scale of the {name} instead"
            )
        if labels is None:
            raise ValueError(f"{name} needs class_labels to guide towards; leave the guider out without them")
        if "pred_uncond" in guider._input_predictions and self.null_class_id is None:
            raise ValueError(
                f"{name} needs a model that was trained with a null class (null_class=True and labels left out at "
                "random); this one has none, so leave the guider out"
            )

    def step_options(
        self, generator: torch.Generator | list[torch.Generator] | None, eta: float | None
    ) -> dict[str, Any]:
        """What the scheduler's `step` takes of the call's arguments."""
        accepted = inspect.signature(self.scheduler.step).parameters
        options = {"generator": generator, "eta": eta}
        return {name: value for name, value in options.items() if value is not None and name in accepted}

    def takes_variance(self) -> bool:
        """Whether the scheduler's `step` uses the channels of a learned variance.

        Any scheduler may carry a variance_type over from the one it was made from. Multistep
        solvers even have the argument, but only to throw the variance away, by keeping three
        channels whatever the sample has.
        """
        accepted = inspect.signature(type(self.scheduler).__init__).parameters
        is_learned = str(self.scheduler.config.get("variance_type")).startswith("learned")
        return is_learned and "variance_type" in accepted and "solver_order" not in accepted

    def predict(
        self,
        latents: Tensor,
        t: Tensor,
        labels: Tensor | None,
        micro_batch_size: int | None,
        network: ModelMixin | None = None,
    ) -> Tensor:
        """The network's output for x_t (B, C, ...), `micro_batch_size` samples at a time."""
        inputs = self.scheduler.scale_model_input(latents, t)
        return in_micro_batches(network or self.unet, micro_batch_size, inputs, t, class_labels=labels)

    def predict_guided(
        self,
        guider: BaseGuidance,
        step: int,
        t: Tensor,
        latents: Tensor,
        labels: Tensor,
        micro_batch_size: int | None,
    ) -> Tensor:
        """What a guider makes of the predictions it asks for, with the variance of the first."""
        channels = self.unet.config.in_channels
        guider.set_state(step=step, num_inference_steps=self.num_timesteps, timestep=t)
        null = None if self.null_class_id is None else torch.full_like(labels, self.null_class_id)
        inputs = {"class_labels": (labels, null), "sample": self.scheduler.scale_model_input(latents, t)}
        # The first prediction is the conditional one.
        batches, variance = guider.prepare_inputs(inputs), None
        for batch in batches:
            guider.prepare_models(self.unet)
            output = self.predict(latents, t, batch.class_labels, micro_batch_size)
            guider.cleanup_models(self.unet)
            batch.noise_pred = output[:, :channels]
            variance = output[:, channels:] if variance is None else variance
        return torch.cat([guider(batches)[0], variance], dim=1)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int | str] | Tensor | None = None,
        batch_size: int | None = None,
        num_images_per_label: int = 1,
        num_inference_steps: int = 50,
        timesteps: list[int] | str | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_rescale: float = 0.0,
        eta: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        micro_batch_size: int | None = None,
        guider: BaseGuidance | None = None,
    ) -> ImagePipelineOutput | tuple[list[Image.Image] | np.ndarray | Tensor]:
        """Sample images, or whatever the network was trained on.

        Args:
            class_labels: numbers or names of classes, one for each image. None on a model with a
                null class samples from all classes.
            batch_size: the number of images where there are no labels (1 if left out).
            num_images_per_label: images of each entry of `class_labels`, next to each other.
            num_inference_steps: the number of denoising steps. From 2 to 20 of them
                UniPCMultistepScheduler is best by measurement, see `solver_advice`.
            timesteps: the steps themselves instead, in the form that `set_timesteps` takes.
            guidance_scale: w in uncond + w * (cond - uncond); 1 is plain conditional sampling,
                without a second forward. With a guide_unet its prediction, of the same class, takes
                the place of uncond.
            guidance_interval: guide only where t / num_train_timesteps lies in [low, high]; 0 is
                clean, 1 is pure noise.
            guidance_rescale: phi of arXiv:2305.08891, Eq. 16, between 0 and 1: how far the guided
                output is brought back to the standard deviation of the conditional one.
            eta: handed to the scheduler's `step`; None leaves the scheduler's own.
            generator: one, or a list with one for each image: then an image does not depend on the
                rest of its batch.
            latents: unit noise (B, C, H, W) to start from instead of drawing it.
            output_type: "pil", "np" (B, H, W, C) in [0, 1], "pt" (B, C, H, W) in [0, 1], or
                "latent" (B, C, H, W) as the scheduler left it, about [-1, 1]. Samples that are no
                images are never "pil", and keep their shape and values in all others.
            return_dict: whether to return an `ImagePipelineOutput` instead of a tuple.
            callback_on_step_end: called as f(pipe, step, t, tensors) after each step; returns a
                dict of changed tensors. It may set `pipe._guidance_scale` for the steps that
                follow, 1 for none, and `pipe._interrupt`.
            callback_on_step_end_tensor_inputs: which tensors the callback is given.
            micro_batch_size: images that one forward of the network takes; does not change the
                images. None: chosen for the device.
            guider: a guider of diffusers (experimental there), such as `AdaptiveProjectedGuidance`
                or `hf_diffusion.ClassifierGuidance`, which takes the place of
                guidance_scale, guidance_interval and guidance_rescale.

        Returns:
            `ImagePipelineOutput` or a tuple with the images. Raises ValueError for unknown classes
            and for arguments that do not fit the model, the scheduler or each other.
        """
        labels, batch = self.prepare_labels(class_labels, batch_size, num_images_per_label)
        self.check_scheduler()
        self.check_steps(num_inference_steps, timesteps, eta, guidance_interval)
        self.check_guidance(labels, guidance_scale, guidance_rescale, guider)
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
        given_labels = labels
        if labels is None and self.null_class_id is not None:
            labels = torch.full((batch,), self.null_class_id, device=self._execution_device)
        guide_labels = None
        if self.guide_unet is not None and self.guide_unet.config.get("num_class_embeds"):
            guide_labels = labels

        timesteps = self.prepare_timesteps(num_inference_steps, timesteps)
        self.check_levels()
        is_inside = self.timesteps_within(guidance_interval)
        channels, takes_variance = self.unet.config.in_channels, self.takes_variance()
        step_options = self.step_options(generator, eta)
        latents = self.prepare_latents(batch, generator, latents)
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                if self.guidance_scale is not guidance_scale:  # a callback has set it
                    guidance_scale = self.guidance_scale
                    self.check_guidance(given_labels, guidance_scale, guidance_rescale, guider)
                if guider is not None:
                    output = self.predict_guided(guider, i, t, latents, labels, micro_batch_size)
                elif is_inside[i] and guidance_scale != 1:
                    if self.guide_unet is None:
                        both = torch.cat([torch.full_like(labels, self.null_class_id), labels])  # (2 B,)
                        doubled = self.predict(torch.cat([latents, latents]), t, both, micro_batch_size)
                        worse, output = doubled.chunk(2)  # each (B, C or 2 C, ...)
                    else:
                        worse = self.predict(latents, t, guide_labels, micro_batch_size, self.guide_unet)
                        output = self.predict(latents, t, labels, micro_batch_size)
                    worse, better, variance = worse[:, :channels], output[:, :channels], output[:, channels:]
                    mean = worse + guidance_scale * (better - worse)
                    if guidance_rescale > 0:
                        mean = rescale_guided(mean, better, guidance_rescale)
                    output = torch.cat([mean, variance], dim=1)  # the variance is that of the better one
                else:
                    output = self.predict(latents, t, labels, micro_batch_size)
                if not takes_variance:
                    output = output[:, :channels]
                latents = self.scheduler.step(output, t, latents, **step_options, return_dict=False)[0]
                (latents,) = self.after_step(
                    callback_on_step_end, callback_on_step_end_tensor_inputs, i, t, latents=latents
                )
                progress_bar.update()
        return self.to_output(self.decode(latents, output_type), output_type, return_dict)


def rescale_guided(guided: Tensor, cond: Tensor, phi: float) -> Tensor:
    """Bring each sample's deviation towards the conditional one, Eqs. 15-16 of arXiv:2305.08891."""
    dims = tuple(range(1, guided.ndim))
    rescaled = guided * (cond.std(dims, keepdim=True) / guided.std(dims, keepdim=True))
    return phi * rescaled + (1 - phi) * guided
