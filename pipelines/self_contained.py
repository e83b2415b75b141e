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
