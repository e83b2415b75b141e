"""What samples are measured against: mean, covariance and some features of real data, cached."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm

from hf_diffusion.data.protocol import TrainingData
from hf_diffusion.evaluation.distances import KEPT_FEATURES, Moments, in_order, selection
from hf_diffusion.evaluation.feature_networks import FEATURE_BATCH, FeatureNetwork
from hf_diffusion.evaluation.protocol import data_protocol
from hf_diffusion.files import cache_folder, remove_partials, write_whole


# Of what a cache file holds.
VERSION = 1


@dataclass(frozen=True)
class Reference:
    """Mean (D,) and covariance (D, D) of all real samples in float64, features (K, D) of some.

    `protocol` tells the data, their split, resizing and fingerprint, and the cache key.
    """

    count: int
    mean: Tensor
    covariance: Tensor
    features: Tensor
    protocol: dict[str, Any]


def reference_statistics(
    data: TrainingData, network: FeatureNetwork, cache_dir: str | os.PathLike | None = None
) -> Reference:
    """The statistics of `data` in the network's features, computed by all processes or cached.

    The cache's key hashes the data's fingerprint (of samples, labels and transform), their number,
    and the network's weights.
    """
    protocol = data_protocol(data)
    identity = [VERSION, KEPT_FEATURES, data.fingerprint, len(data), network.name, network.digest, network.dimension]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]
    path = Path(cache_dir or cache_folder("reference")) / f"{key}.safetensors"
    protocol["cache_key"] = key
    state = PartialState()
    tensors = _read(path)
    # All or none, since computing is a common effort.
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


def _write(path: Path, tensors: dict[str, Tensor], protocol: dict[str, Any]) -> None:
    try:
        remove_partials(path.parent)
        write_whole(path, save(tensors, metadata={"protocol": json.dumps(protocol)}))
    # A cache that cannot be written costs time, not results.
    except OSError as error:
        print(f"the reference statistics are not cached: {error}")


def _compute(data: TrainingData, network: FeatureNetwork) -> dict[str, Tensor]:
    state, count = PartialState(), len(data)
    moments, kept = Moments(network.dimension, device=network.device), []
    # The real samples' part of it does not depend on the generated ones.
    _, chosen = selection(1, count)
    place = torch.full((count,), -1).index_copy(0, chosen, torch.arange(len(chosen)))
    starts = range(state.process_index * FEATURE_BATCH, count, state.num_processes * FEATURE_BATCH)
    for start in tqdm(starts, desc=f"reference: {data.name}", disable=not state.is_main_process, leave=False):
        indices = torch.arange(start, min(start + FEATURE_BATCH, count))
        # As `draw` gives samples: both sides are rounded alike.
        features = network.features(data.to_samples(data.fetch(indices.tolist(), epoch=0)))
        moments.add(features)
        wanted = place[indices] >= 0
        kept.append((place[indices][wanted].numpy(), features[wanted].numpy()))
    moments.reduce()
    mean, covariance = (part.cpu().contiguous() for part in moments.mean_and_covariance())
    return {"mean": mean, "covariance": covariance, "features": in_order(gather_object(kept), len(chosen))}
