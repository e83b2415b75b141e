"""Where golden vectors are, and what a manifest says of its cases, whatever its layout.

A folder of vectors is one system: a `manifest.json` and the files that it names. Three layouts are
in use:
- `files`: archives of several cases, whose keys begin with the case's name (`<case>__x`,
  `<case>/x`); an archive of one case may leave that out. The settings are called `params`,
  `settings`, or are the entry of a list.
- `models`: one network each, with its weights, its flags and an archive of its own.
- `configs`: the same by configuration and class.
"""

import functools
import gzip
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load
from torch import Tensor


HERE = Path(__file__).resolve().parent
SMALL_SET = HERE / "data"
FULL_SET = HERE.parents[2] / "shared" / "golden"


def golden_root() -> Path:
    """The folder of HF_DIFFUSION_GOLDEN, else this repository's small set, else the full one."""
    if named := os.environ.get("HF_DIFFUSION_GOLDEN"):
        return Path(named)
    return SMALL_SET if SMALL_SET.is_dir() else FULL_SET


def systems(root: Path) -> list[str]:
    """The systems that a folder of vectors holds."""
    return sorted(path.parent.name for path in root.glob("*/manifest.json"))


@dataclass(frozen=True)
class Record:
    """One case: its arrays, what was computed (`kind`), how, and how close is close enough.

    `tolerances` holds those of single arrays, `tolerance` that of all others.
    """

    folder: Path
    file: str
    name: str
    kind: str
    settings: dict[str, Any]
    entry: dict[str, Any] = field(repr=False)
    manifest: dict[str, Any] = field(repr=False)
    tolerances: dict[str, Any] = field(repr=False)
    tolerance: dict[str, Any] | None = field(default=None, repr=False)
    weights: str | dict | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return f"{self.folder.name}/{self.file}/{self.name}"

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays of this case by name, without the case's own name."""
        found = read_arrays(self.folder / self.file)
        for prefix in (f"{self.name}__", f"{self.name}/"):
            if own := {key.removeprefix(prefix): found[key] for key in found if key.startswith(prefix)}:
                return own
        assert len(self.entry.get("cases", [self.name])) == 1, f"{self.file} holds nothing for case {self.name!r}"
        return found

    def read_weights(self) -> dict[str, Tensor]:
        """The weights of this network, from their file or drawn again."""
        return read_weights(self.folder / self.weights) if isinstance(self.weights, str) else drawn(self.weights)


def records(folder: Path) -> list[Record]:
    """Every case of one system."""
    manifest = json.loads((folder / "manifest.json").read_text())
    layouts = {"files": _of_files, "models": _of_models, "configs": _of_configs}
    layout = next((layout for layout in layouts if layout in manifest), None)
    if layout is None:
        raise ValueError(f"{folder}: a manifest lists its cases under one of {list(layouts)}, not {list(manifest)}")
    return list(layouts[layout](folder, manifest))


def _of_files(folder: Path, manifest: dict) -> Iterator[Record]:
    for file, entry in manifest["files"].items():
        # a file without cases holds weights
        cases = entry.get("cases", {})
        if isinstance(cases, list):
            cases = dict((case, {"id": case}) if isinstance(case, str) else (case["id"], case) for case in cases)
        # every run of a training has a file of its own
        kind = "training run" if file.startswith("train_") else entry.get("feature", file.split(".")[0])
        for name, case in cases.items():
            settings = case.get("params", case.get("settings", case))
            keys = case.get("keys", {})
            tolerances = case.get("tolerance") or {
                key.removeprefix(f"{name}/"): about["tolerance"] for key, about in keys.items() if "tolerance" in about
            }
            common = entry.get("tolerance")
            yield Record(folder, file, name, kind, settings, entry, manifest, tolerances, common)


def _of_models(folder: Path, manifest: dict) -> Iterator[Record]:
    for name, entry in manifest["models"].items():
        files = {Path(file).suffix: file for file in entry["files"]}
        settings = json.loads((folder / files[".json"]).read_text()) | entry["config"]
        if "image_size" in entry:
            settings["image_size"] = entry["image_size"]
        tolerances = {key: rule for keys, rule in entry["tolerance"].items() for key in keys.split(",")}
        kind = entry["cls"].rsplit(".", 1)[-1]
        weights = files.get(".safetensors", entry.get("drawn"))
        yield Record(folder, files[".npz"], name, kind, settings, entry, manifest, tolerances, weights=weights)


def _of_configs(folder: Path, manifest: dict) -> Iterator[Record]:
    for config, networks in manifest["configs"].items():
        for network, entry in networks.items():
            name, kind, file = f"{config}-{network}", entry["class_name"], entry["vectors"]
            weights = entry.get("weights", entry.get("drawn"))
            settings, tolerances = entry["config"], entry["tolerance"]
            yield Record(folder, file, name, kind, settings, entry, manifest, tolerances, weights=weights)


@functools.lru_cache(maxsize=64)
def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an npz, or of a safetensors file, gzipped or not."""
    if path.suffix != ".npz":
        return {name: tensor.numpy() for name, tensor in read_weights(path).items()}
    with np.load(path) as arrays:
        return dict(arrays)


def read_weights(path: Path) -> dict[str, Tensor]:
    """A safetensors file, gzipped or not, in the precision in which it is stored."""
    data = path.read_bytes()
    return load(gzip.decompress(data) if path.suffix == ".gz" else data)


def drawn(recipe: dict[str, Any]) -> dict[str, Tensor]:
    """Weights that the maker of the vectors drew from a seed, drawn again.

    `location + scale * noise / divisor`.

    `tensors` lists name, shape, location, scale and divisor in the order of the draws. Skips the
    test where the processor's Gaussian numbers differ in their last bits (torch draws them by
    AVX2), since the weights would be others.
    """
    generator = torch.Generator().manual_seed(recipe["seed"])
    weights = {}
    for name, shape, location, scale, divisor in recipe["tensors"]:
        noise = torch.randn(shape, generator=generator)
        weights[name] = shaped(noise, location, scale, divisor, recipe["dtype"])
    if digest(weights) != recipe["sha256"]:
        pytest.skip("this processor draws other last bits, so the weights of the reference cannot be drawn again")
    return weights


def shaped(noise: Tensor, location: float | list[float], scale: float, divisor: float, dtype: str) -> Tensor:
    """One tensor of a recipe; a list of locations is one for each equal share of the entries."""
    center = torch.tensor(location)
    center = center.repeat_interleave(len(noise) // len(center)) if center.ndim else center
    return (center + noise * scale / divisor).to(getattr(torch, dtype))


def digest(weights: dict[str, Tensor]) -> str:
    """SHA-256 of all tensors in the order of their names."""
    return hashlib.sha256(b"".join(weights[name].numpy().tobytes() for name in sorted(weights))).hexdigest()
