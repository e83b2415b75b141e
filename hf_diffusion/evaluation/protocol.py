"""What a measure holds for: which samples, drawn how, against which data."""

import hashlib
import inspect
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

from hf_diffusion.data.protocol import TrainingData
from hf_diffusion.evaluation.feature_networks import FeatureNetwork
from hf_diffusion.evaluation.network_files import hash_tensors
from hf_diffusion.sampling.drawing import sampling_options


# Values of a setting that a protocol writes out.
LONGEST_TABLE = 32
DATA_FACTS = ("name", "split", "images", "samples", "size", "resize", "fingerprint")


def data_protocol(data: TrainingData) -> dict[str, Any]:
    """Which real data: name, split, how many, how they were resized, and their fingerprint."""
    described = data.describe()
    return {key: described[key] for key in DATA_FACTS if key in described}


def sampling_protocol(pipeline: DiffusionPipeline, batch_size: int, options: dict[str, Any]) -> dict[str, Any]:
    """All that decides which sample belongs to a seed and a label, as plain values.

    `batch_size` is that of the calls, since samples of other batch shapes differ in the last bit.
    """
    modules = {n: module for n, module in pipeline.components.items() if isinstance(module, torch.nn.Module)}
    scheduler = {k: _brief(v) for k, v in pipeline.scheduler.config.items() if not k.startswith("_")}
    parameters = inspect.signature(pipeline.__call__).parameters
    defaults = {name: parameters[name].default for name in sampling_options(pipeline) if name in parameters}
    defaults |= getattr(pipeline, "default_options", dict)()
    used = {k: v for k, v in (defaults | options).items() if v is not inspect.Parameter.empty}
    # UniPC takes what a search has found for so many steps.
    tuned = getattr(pipeline.scheduler, "tuned_timesteps", lambda steps: None)(used.get("num_inference_steps"))
    if tuned is not None and used.get("timesteps") is None:
        used["timesteps"] = list(tuned)
    return {
        "pipeline": type(pipeline).__name__,
        "weights_sha256": {name: hash_tensors(module.state_dict()) for name, module in modules.items()},
        "sampler": type(pipeline.scheduler).__name__,
        "sampler_config": json.loads(json.dumps(scheduler, default=str)),
        "dtype": str(pipeline.dtype).removeprefix("torch."),
        "device": pipeline.device.type,
        "chunk_size": batch_size,
        "options": used,
    }


def _brief(value: Any) -> Any:
    """A setting; of a long table, which every line of a run's metrics would repeat, its hash."""
    if not isinstance(value, list | tuple) or len(value) <= LONGEST_TABLE:
        return value
    digest = hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()
    return f"{len(value):,} values, sha256 {digest[:12]}"


def samples_protocol(
    count: int,
    seed: int | None,
    labels: Sequence[int] | Sequence[str] | None,
    sampling: dict[str, Any],
    network: FeatureNetwork,
    classifier: FeatureNetwork | None = None,
) -> dict[str, Any]:
    """What the measures of `count` samples hold for.

    `seed` is that of the first sample, None for samples that nobody drew here.
    """
    classes, prompts = None, {}
    if labels is not None and isinstance(labels[0], str):
        prompts = {
            "prompts": {
                "different": len(set(labels)),
                "sha256": hashlib.sha256("\n".join(labels).encode()).hexdigest(),
            }
        }
    elif labels is not None:
        classes = {int(label): int(number) for label, number in zip(*np.unique(labels, return_counts=True))}
    networks = {"features": network.describe()}
    if classifier is not None:
        networks["classifier"] = classifier.describe()
    seeds = None if seed is None else [seed, seed + count - 1]
    return {"count": count, "seeds": seeds, "images_of_class": classes, **prompts, "sampling": sampling, **networks}


def protocol_text(protocol: dict[str, Any]) -> str:
    """A protocol as one line for a card."""
    parts = [f"{protocol['count']:,} samples"]
    if data := protocol.get("data"):
        parts[0] += f" of {_where(data)}"
    if features := protocol.get("features"):
        chosen = f", chosen since {features['chosen']}" if features.get("chosen") else ""
        parts.append(f"features {features['name']} (sha256 {features['sha256'][:12]}{chosen})")
    if reference := protocol.get("reference"):
        number = reference.get("images", reference.get("samples"))
        parts.append(f"against {number:,} of {_where(reference)}")
    if held_out := protocol.get("held_out"):
        parts.append(
            f"held out, {_where(held_out)}; one fixed noise in each quarter of the noise levels (seed "
            f"{protocol['noise_seed']})"
        )
    if sampling := protocol.get("sampling"):
        # The scheduler's own eta, unless the call said another.
        used = {"eta": sampling.get("sampler_config", {}).get("eta")}
        used |= {name: value for name, value in sampling["options"].items() if value is not None}
        parts.append(f"{sampling['sampler']}, " + _listed(used) + f"{sampling['dtype']} on {sampling['device']}")
    if protocol.get("seeds"):
        parts.append(f"seeds {protocol['seeds'][0]} to {protocol['seeds'][1]}")
    return "; ".join(parts)


def _where(data: dict[str, Any]) -> str:
    split = f"/{data['split']}" if data.get("split") else ""
    resize = f", resize: {data['resize']}" if data.get("resize") else ""
    return f"{data['name']}{split}{resize}"


def _listed(options: dict[str, Any]) -> str:
    return "".join(f"{name} {value}, " for name, value in options.items() if value is not None)
