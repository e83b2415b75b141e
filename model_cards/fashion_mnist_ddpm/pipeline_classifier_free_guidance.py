"""Class-conditional image sampling with classifier-free guidance; unconditional sampling where the model has no classes.

Classifier-free guidance: Ho and Salimans 2022, arXiv:2207.12598. Guidance interval: Kynkaanniemi et al. 2024,
arXiv:2404.07724. Guidance rescale: Lin et al. 2023, arXiv:2305.08891. Shapes: B images, C channels, H x W pixels.
"""

import inspect
from collections.abc import Callable, Sequence

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin
from diffusers.guiders import BaseGuidance
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

"""Pipelines that save the code of their classes beside the weights, and load without running a repository's code.

diffusers loads a pipeline whose package is not installed if the folder carries the pipeline's file at its root, each
component's file in the component's folder, and an index that names them (`trust_remote_code=True`). `SelfContainedMixin`
writes that form. The file that travels must need no neighbour: diffusers keeps the code of all repositories in one folder
and keeps imported neighbours across loads, so a second repository would run with the first one's neighbour. Therefore this
file's text replaces the line that imports it, and what travels is one file.
"""

import difflib
import importlib
import json
import logging
import os
import re
import shutil
import sys
import uuid
from numbers import Integral
from pathlib import Path

import numpy as np
from torch import Tensor


logger = logging.getLogger(__name__)

IN_PACKAGE = __name__.startswith("hf_diffusion.")  # False in the copy of this text that travels with a pipeline
IMPORT_OF_THIS_FILE = re.compile(r"^from hf_diffusion\.pipelines\.self_contained import \w+$", re.MULTILINE)
LIBRARIES = ("diffusers", "transformers", "onnxruntime")  # what stock diffusers imports by itself


def _code_of(cls: type) -> tuple[str, str] | None:
    """File stem and self-contained text of the module of `cls`; None where there is no module file to send along."""
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    if cls.__module__.split(".")[0] in LIBRARIES or cls.__module__ == "__main__" or file is None:
        return None
    text = Path(file).read_text(encoding="utf-8")
    return Path(file).stem, IMPORT_OF_THIS_FILE.sub(lambda _: Path(__file__).read_text(encoding="utf-8"), text)


def _move_into(staging: Path, target: Path, index_name: str) -> None:
    """Move every file of `staging` to its place in `target`, each in one step and the index last."""
    files = sorted((f for f in staging.rglob("*") if f.is_file()), key=lambda f: f.name == index_name)
    for folder in {f.parent.relative_to(staging) for f in files}:
        (target / folder).mkdir(parents=True, exist_ok=True)
        for shards in (target / folder).glob("*.safetensors.index*.json"):
            # the loader prefers shards to a single file, so the list of an earlier, larger save would win over this one
            if folder != Path() and not (staging / folder / shards.name).exists():
                shards.unlink()
    for file in files:
        os.replace(file, target / file.relative_to(staging))


class SelfContainedMixin:
    """Saving with code, loading without trust, and labels by name, for a `DiffusionPipeline` that names this class before its base.

    For the labels the pipeline has `num_classes` and `id2label`, the names of the classes by number, or None.
    """

    def register_modules(self, **modules) -> None:
        super().register_modules(**modules)
        # The files that diffusers runs for a repository are overwritten by the next load, so they are read at once.
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
        """Write weights, configurations and code, so that `DiffusionPipeline.from_pretrained` needs no package.

        Every file appears whole, the index last; other files of an existing folder stay. With `push_to_hub=True` the
        remaining arguments (`repo_id`, `private`, `token`, `commit_message`, ...) are those of `push_to_hub`. Raises ValueError for
        `safe_serialization=False`: weights are written as safetensors, since a pickle can run code when it is read.
        """
        if not safe_serialization:
            raise ValueError(
                "safe_serialization=False would write a pickle, which can run code when it is read; leave it out"
            )
        target = Path(save_directory)
        if target.exists() and not target.is_dir():
            raise ValueError(f"save_directory must be a folder, but {str(target)!r} is a file; choose another name")
        inside = target if target.is_dir() else target.absolute().parent  # the same file system, and surely writable
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
            cls = type(getattr(part, "_orig_mod", part))  # torch.compile wraps the model in a class of its own
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
        for file in (folder / self.config_name, *folder.glob("*/*config.json")):
            config = json.loads(file.read_text(encoding="utf-8"))
            config.pop("_name_or_path", None)  # a path on this computer, which is nobody else's business
            config.update(index if file.parent == folder else {})
            file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        """Load a folder or repository with the installed package's classes; code in the repository is never run.

        Takes the arguments of `DiffusionPipeline.from_pretrained`, `subfolder` of the repository, and `verify=True`, which compares what
        was fetched with the Hub's checksums. Raises ValueError for a class that the package does not have and for
        `use_safetensors=False`, OSError for files that are missing or damaged.
        """
        if not IN_PACKAGE:  # this class came from a repository: the stock loader, which asks for trust_remote_code
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
    def load_config(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        config = super().load_config(pretrained_model_name_or_path, **kwargs)
        if IN_PACKAGE:  # from_pretrained reads the index here, and finds the package's modules in place of files
            name_classes = importlib.import_module("hf_diffusion.hub.loading").name_package_classes
            name_classes(config[0] if isinstance(config, tuple) else config)
        return config

    def get_label_ids(self, class_labels: int | str | list[int | str] | Tensor) -> list[int]:
        """Class numbers for numbers and names; raises ValueError for those that the model does not know."""
        labels = class_labels.flatten().tolist() if isinstance(class_labels, (Tensor, np.ndarray)) else class_labels
        return [self._label_id(label) for label in (labels if isinstance(labels, (list, tuple, range)) else [labels])]

    def _label_id(self, label: int | str) -> int:
        if not isinstance(label, str):
            if not isinstance(label, Integral) or isinstance(label, bool) or not 0 <= label < self.num_classes:
                raise ValueError(f"class label {label!r} is not a class; this model knows 0 to {self.num_classes - 1}")
            return int(label)
        names = self.id2label or {}
        found = [i for i, name in names.items() if name == label]
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



OUTPUT_TYPES = ("pil", "np", "pt", "latent")
# Of the first feature map, in one forward on the CPU. Measured on one core (28x28 in 2x2 patches and 32x32, 64 channels,
# images/s for 0.4, 1.5, 3, 6, 12 MiB: 141, 165, 177, 175, 164 and 33 to 36); past 32 MiB a tensor, page faults halve it.
CPU_FEATURE_MAP_BYTES = 2**22


class ClassifierFreeGuidancePipeline(SelfContainedMixin, DiffusionPipeline):
    """Samples images from a U-Net, of given classes if it knows classes, with classifier-free guidance.

    Args:
        unet: called as `unet(sample, timestep, class_labels=...)`, with out_channels C, or 2 C for a learned variance.
            `config.num_class_embeds` is the number of classes (None: unconditional); with `config.null_class` the label
            `num_class_embeds` means "no class", which guidance needs.
        scheduler: any diffusers scheduler.
        id2label: the names of the classes by number; kept in model_index.json.
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ["latents"]

    def __init__(self, unet: ModelMixin, scheduler: SchedulerMixin, id2label: dict | None = None):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
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
        """The number of real classes, None for an unconditional model."""
        return self.unet.config.get("num_class_embeds")

    @property
    def null_class_id(self) -> int | None:
        """The label that means "no class", None if the model has none."""
        return self.num_classes if self.unet.config.get("null_class") else None

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

    def check_inputs(
        self,
        label_ids: list[int] | None,
        batch: int,
        num_inference_steps: int,
        timesteps: list[int] | str | None,
        guidance_scale: float,
        guidance_interval: tuple[float, float],
        guidance_rescale: float,
        eta: float | None,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None,
        output_type: str,
        callback_on_step_end_tensor_inputs: Sequence[str],
        micro_batch_size: int | None,
        guider: BaseGuidance | None,
    ) -> None:
        """Raise ValueError, with what is allowed, for an argument of a call that the rest cannot work with."""
        if guider is not None:
            self._check_guider(guider, label_ids, guidance_scale)
        if self.num_classes is not None and label_ids is None and self.null_class_id is None:
            raise ValueError(
                f"class_labels are missing; this model needs one of 0 to {self.num_classes - 1} for each image"
            )
        if guidance_scale != 1 and label_ids is None:
            raise ValueError(
                f"guidance_scale={guidance_scale} needs class_labels to guide towards; use 1 without them"
            )
        if guidance_scale != 1 and self.null_class_id is None:
            raise ValueError(
                f"guidance_scale={guidance_scale} needs a model that was trained with a null class (null_class=True and "
                "labels left out at random); this one has none, so use guidance_scale=1"
            )
        interval = tuple(guidance_interval)
        if len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1:
            raise ValueError(
                f"guidance_interval must be (low, high) with 0 <= low <= high <= 1, not {guidance_interval!r}"
            )
        if not 0 <= guidance_rescale <= 1:
            raise ValueError(f"guidance_rescale must be between 0 and 1, not {guidance_rescale!r}")
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
        if micro_batch_size is not None and (not isinstance(micro_batch_size, int) or micro_batch_size < 1):
            raise ValueError(
                f"micro_batch_size must be a whole number of at least 1 or None, not {micro_batch_size!r}"
            )

    def _check_guider(self, guider: BaseGuidance, label_ids: list[int] | None, guidance_scale: float) -> None:
        name = type(guider).__name__
        if guidance_scale != 1:
            raise ValueError(
                f"guidance_scale={guidance_scale} and a guider were given; set the scale of the {name} instead"
            )
        if label_ids is None:
            raise ValueError(f"{name} needs class_labels to guide towards; leave the guider out without them")
        if "pred_uncond" in guider._input_predictions and self.null_class_id is None:
            raise ValueError(
                f"{name} needs a model that was trained with a null class (null_class=True and labels left out at random); "
                "this one has none, so leave the guider out"
            )

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images."""
        size = self.unet.config.sample_size
        return (size, size) if isinstance(size, int) else tuple(size)

    def default_micro_batch_size(self) -> int | None:
        """Images that one forward should take: None, all of them, unless it runs on the CPU."""
        if self._execution_device.type != "cpu":
            return None
        config, (height, width) = self.unet.config, self.image_size
        channels = config.get("model_channels") or max(config.get("block_out_channels", [128]))
        pixels = height * width // config.get("patch_size", 1) ** 2
        return max(1, CPU_FEATURE_MAP_BYTES // (channels * pixels * 4))

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
        """The network's output for x_t (B, C, H, W), computed `micro_batch_size` images at a time."""
        inputs = self.scheduler.scale_model_input(latents, t).to(self.unet.dtype)
        size = micro_batch_size or len(inputs)
        outputs = []
        for start in range(0, len(inputs), size):
            rows = slice(start, start + size)
            condition = {} if labels is None else {"class_labels": labels[rows]}
            outputs.append(self.unet(inputs[rows], t, **condition, return_dict=False)[0])
        return torch.cat(outputs).to(latents.dtype)

    def predict_guided(
        self,
        guider: BaseGuidance,
        step: int,
        t: Tensor,
        latents: Tensor,
        labels: Tensor,
        micro_batch_size: int | None,
    ) -> Tensor:
        """The output that a guider makes of the predictions that it asks for, with the variance of the first, the conditional one."""
        channels = self.unet.config.in_channels
        guider.set_state(step=step, num_inference_steps=self.num_timesteps, timestep=t)
        null = None if self.null_class_id is None else torch.full_like(labels, self.null_class_id)
        inputs = {"class_labels": (labels, null), "sample": self.scheduler.scale_model_input(latents, t)}
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
        """Sample images.

        Args:
            class_labels: numbers or names of classes, one for each image. None on a model with a null class samples from
                all classes.
            batch_size: the number of images where there are no labels (1 if left out).
            num_images_per_label: images of each entry of `class_labels`, next to each other.
            num_inference_steps: the number of denoising steps.
            timesteps: the steps themselves instead, in the form that the scheduler's `set_timesteps` takes.
            guidance_scale: w in uncond + w * (cond - uncond); 1 is plain conditional sampling, without a second forward.
            guidance_interval: guide only where t / num_train_timesteps lies in [low, high]; 0 is clean, 1 is pure noise.
            guidance_rescale: phi of arXiv:2305.08891, Eq. 16, between 0 and 1: how far the guided output is brought back
                to the standard deviation of the conditional one.
            eta: handed to the scheduler's `step`; None leaves the scheduler's own.
            generator: one, or a list with one for each image: then an image does not depend on the rest of its batch.
            latents: unit noise (B, C, H, W) to start from instead of drawing it.
            output_type: "pil", "np" (B, H, W, C) in [0, 1], "pt" (B, C, H, W) in [0, 1], or "latent" (B, C, H, W) as the
                scheduler left it, about [-1, 1].
            return_dict: whether to return an `ImagePipelineOutput` instead of a tuple.
            callback_on_step_end: called as f(pipe, step, t, tensors) after each step; returns a dict of changed tensors.
            callback_on_step_end_tensor_inputs: which tensors the callback is given.
            micro_batch_size: images that one forward of the network takes; does not change the images. None: chosen for
                the device.
            guider: a guider of diffusers (experimental there), such as `AdaptiveProjectedGuidance`, which takes the place of
                guidance_scale, guidance_interval and guidance_rescale.

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
            num_inference_steps,
            timesteps,
            guidance_scale,
            guidance_interval,
            guidance_rescale,
            eta,
            generator,
            latents,
            output_type,
            callback_on_step_end_tensor_inputs,
            micro_batch_size,
            guider,
        )
        device, channels = self._execution_device, self.unet.config.in_channels
        self._guidance_scale, self._interrupt = guidance_scale, False
        micro_batch_size = micro_batch_size or self.default_micro_batch_size()

        labels = guided_labels = None  # cond (B,); uncond and cond (2 B,)
        if label_ids is not None:
            labels = torch.tensor(label_ids, device=device)
        elif self.null_class_id is not None:
            labels = torch.full((batch,), self.null_class_id, device=device)
        if guidance_scale != 1:
            guided_labels = torch.cat([torch.full_like(labels, self.null_class_id), labels])

        if timesteps is None:
            self.scheduler.set_timesteps(num_inference_steps, device=device)
        else:
            self.scheduler.set_timesteps(timesteps=timesteps, device=device)
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        # known before the loop, because reading a timestep on a GPU makes the host wait
        low, high = guidance_interval
        num_train_timesteps = self.scheduler.config.num_train_timesteps
        is_guided = [guidance_scale != 1 and low <= t / num_train_timesteps <= high for t in timesteps.tolist()]

        # Any scheduler may carry a variance_type over from the one it was made from. Multistep solvers even have the
        # argument, but only to throw the variance away, by keeping three channels whatever the image has.
        accepted_by_scheduler = inspect.signature(type(self.scheduler).__init__).parameters
        takes_variance = str(self.scheduler.config.get("variance_type")).startswith("learned")
        takes_variance &= "variance_type" in accepted_by_scheduler and "solver_order" not in accepted_by_scheduler
        accepted = inspect.signature(self.scheduler.step).parameters
        step_options = {"generator": generator, "eta": eta}
        step_options = {k: v for k, v in step_options.items() if v is not None and k in accepted}

        latents = self.prepare_latents(batch, generator, latents)
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                if guider is not None:
                    output = self.predict_guided(guider, i, t, latents, labels, micro_batch_size)
                elif is_guided[i]:
                    doubled = self.predict(torch.cat([latents, latents]), t, guided_labels, micro_batch_size)
                    uncond, output = doubled.chunk(2)  # each (B, C or 2 C, H, W)
                    uncond, cond, variance = uncond[:, :channels], output[:, :channels], output[:, channels:]
                    mean = uncond + guidance_scale * (cond - uncond)
                    if guidance_rescale > 0:
                        mean = rescale_guided(mean, cond, guidance_rescale)
                    output = torch.cat([mean, variance], dim=1)  # the variance is the conditional one
                else:
                    output = self.predict(latents, t, labels, micro_batch_size)
                if not takes_variance:
                    output = output[:, :channels]
                latents = self.scheduler.step(output, t, latents, **step_options, return_dict=False)[0]

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


def rescale_guided(guided: Tensor, cond: Tensor, phi: float) -> Tensor:
    """Bring each image's standard deviation towards that of the conditional output, Eqs. 15-16 of arXiv:2305.08891."""
    dims = tuple(range(1, guided.ndim))
    rescaled = guided * (cond.std(dims, keepdim=True) / guided.std(dims, keepdim=True))
    return phi * rescaled + (1 - phi) * guided
