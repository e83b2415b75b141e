"""Guidance away from a weaker network, autoguidance (Karras et al. 2024, arXiv:2406.02507).

The weaker one is an early checkpoint of the run, or the network of a shorter run or a smaller model
of the same data and process.
"""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import file_exists
from torch import nn

from hf_diffusion.config.options import UsageError
from hf_diffusion.hub.checkpoint_files import MANIFEST, read_network
from hf_diffusion.hub.loading import INDEX, load_pipeline, package_class
from hf_diffusion.models.unet_adm import ADMUNet2DModel


# What says which process a network was trained on; the first three are of one family each.
FAMILIES = ("beta_schedule", "preconditioning", "sigma_floor")
PROCESS = (*FAMILIES, "prediction_type", "sigma_data", "noise_scale")


def open_guide(source: str, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Any]]:
    """The network that `source` names, and what is known of the process it was trained on.

    A checkpoint, a pipeline or a network, a folder or a Hub id. ValueError or OSError where it is
    none of them.
    """
    folder = Path(source).expanduser()
    if (folder / MANIFEST).is_file():
        network, manifest = read_network(folder, _class_of)
        network = network if dtype == torch.float32 else network.to(dtype)
        return network.eval().requires_grad_(False), manifest.get("settings", {})
    if _holds(source, INDEX):
        pipeline = load_pipeline(source, dtype=dtype)
        network = getattr(pipeline, getattr(pipeline, "network_name", "unet"), None)
        if network is None:
            raise UsageError(f"--guide_by {source}: a {type(pipeline).__name__} has no network to guide by")
        return network, process_of(pipeline)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UsageError(
            f"--guide_by {source}: the folder holds no checkpoint, pipeline or network; give a checkpoint in it, such "
            f"as {source}/checkpoint-00001000"
        )
    name = ADMUNet2DModel.load_config(source).get("_class_name", "")
    return _class_of(name).from_pretrained(source, dtype=dtype), {}


def autoguided(
    pipeline: DiffusionPipeline, network: nn.Module, process: dict[str, Any], source: str
) -> DiffusionPipeline:
    """The pipeline with the network as its guide.

    UsageError where it takes none, or one of other samples, classes or process.
    """
    name = type(pipeline).__name__
    if "guide_unet" not in pipeline._optional_components:
        raise UsageError(f"--guide_by {source}: a {name} is not guided by a network of its kind; leave it out")
    try:
        pipeline.check_guide(network)
    except ValueError as error:
        raise UsageError(f"--guide_by {source}: {error}") from error
    own = process_of(pipeline)
    for known in FAMILIES:
        if known in process and known not in own and any(other in own for other in FAMILIES):
            raise UsageError(
                f"--guide_by {source}: it was trained by another method than this {name}; give one of the same"
            )
    for known in sorted(set(process) & set(own) & set(PROCESS)):
        if _plain(process[known]) != _plain(own[known]):
            raise UsageError(
                f"--guide_by {source}: it was trained with {known} {process[known]}, and this {name} with "
                f"{own[known]}; give one of the same"
            )
    # beside the given one, with the same parts
    guided = copy.copy(pipeline)
    guided.register_modules(guide_unet=network)
    return guided


def process_of(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """What a pipeline says of the process of its network."""
    said = {**getattr(pipeline, "scheduler", pipeline).config, **pipeline.config}
    return {name: said[name] for name in PROCESS if name in said}


def _class_of(name: str) -> type[nn.Module]:
    cls = package_class(name, nn.Module)
    if cls is None:
        raise UsageError(f"--guide_by: a network of class {name!r} is none of this package; give the pipeline of it")
    return cls


def _holds(source: str, file: str) -> bool:
    """Whether a folder or a repository has a file; what is wrong with it, loading says."""
    folder = Path(source).expanduser()
    if folder.exists():
        return (folder / file).is_file()
    try:
        return file_exists(source, file)
    except (OSError, ValueError):
        return False


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))
