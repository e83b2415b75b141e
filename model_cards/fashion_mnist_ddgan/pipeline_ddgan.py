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
