"""What generated images are measured against: mean, covariance and some features of real images, cached."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from hf_diffusion.data.images import ImageData
from hf_diffusion.evaluation.distances import KEPT_FEATURES, Moments, in_order, selection
from hf_diffusion.evaluation.feature_networks import FeatureNetwork


VERSION = 1  # of what a cache file holds
FEATURE_BATCH = 250


@dataclass(frozen=True)
class Reference:
    """Statistics of real images: mean (D,) and covariance (D, D) of all in float64, features (K, D) of a fixed choice."""

    count: int
    mean: Tensor
    covariance: Tensor
    features: Tensor
    protocol: dict  # data, split, resize, fingerprint, and the cache key


def cache_folder() -> Path:
    """Where statistics are kept: HF_DIFFUSION_CACHE, or hf_diffusion in the folder of the Hugging Face caches."""
    from huggingface_hub.constants import HF_HOME

    return Path(os.environ.get("HF_DIFFUSION_CACHE") or Path(HF_HOME) / "hf_diffusion") / "reference"


def reference_statistics(
    data: ImageData, network: FeatureNetwork, cache_dir: str | os.PathLike | None = None
) -> Reference:
    """The statistics of all images of `data` in the network's features, computed by all processes, or read from the cache.

    The cache's key hashes the data's fingerprint (of images, labels and transform), their number, and the network's weights.
    """
    description = data.describe()
    protocol = {key: description.get(key) for key in ("name", "split", "images", "size", "resize", "fingerprint")}
    identity = [VERSION, KEPT_FEATURES, data.fingerprint, len(data), network.name, network.digest, network.dimension]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]
    path = Path(cache_dir or cache_folder()) / f"{key}.safetensors"
    protocol["cache_key"] = key
    state = PartialState()
    tensors = _read(path)
    # all or none, since computing is a common effort
    if not all(gather_object([tensors is not None])):
        tensors = _compute(data, network)
        if state.is_main_process:
            _write(path, tensors, protocol)
        state.wait_for_everyone()
    return Reference(len(data), tensors["mean"], tensors["covariance"], tensors["features"], protocol)


def _read(path: Path) -> dict[str, Tensor] | None:
    """The cached tensors; None if there are none, or only what a full disk left of them."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in ("mean", "covariance", "features")}
    except (SafetensorError, OSError):
        return None


def _write(path: Path, tensors: dict[str, Tensor], protocol: dict) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial, metadata={"protocol": json.dumps(protocol)})
        os.replace(partial, path)
    except OSError as error:  # a cache that cannot be written costs time, not results
        print(f"the reference statistics are not cached: {error}")
    finally:
        partial.unlink(missing_ok=True)


def _compute(data: ImageData, network: FeatureNetwork) -> dict[str, Tensor]:
    state, count = PartialState(), len(data)
    moments, kept = Moments(network.dimension, device=network.device), []
    _, chosen = selection(1, count)  # the real images' part of it does not depend on the generated ones
    place = torch.full((count,), -1).index_copy(0, chosen, torch.arange(len(chosen)))
    starts = range(state.process_index * FEATURE_BATCH, count, state.num_processes * FEATURE_BATCH)
    for start in tqdm(starts, desc=f"reference: {data.name}", disable=not state.is_main_process, leave=False):
        indices = torch.arange(start, min(start + FEATURE_BATCH, count))
        features = network(data.fetch(indices.tolist(), epoch=0)["pixels"]).cpu()
        moments.add(features)
        wanted = place[indices] >= 0
        kept.append((place[indices][wanted].numpy(), features[wanted].numpy()))
    moments.reduce()
    mean, covariance = (part.cpu().contiguous() for part in moments.mean_and_covariance())
    return {"mean": mean, "covariance": covariance, "features": in_order(gather_object(kept), len(chosen))}
