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
