"""A feature network that fits the data: a small classifier of real images, trained once."""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import PartialState
from safetensors import safe_open
from safetensors.torch import save
from torch.nn import functional as F
from tqdm.auto import tqdm

from hf_diffusion.data.protocol import TrainingData
from hf_diffusion.data.waiting import main_first
from hf_diffusion.evaluation.feature_networks import MOST_PIXELS, ResNetFeatures
from hf_diffusion.files import cache_folder, remove_partials, write_whole
from hf_diffusion.randomness import derive_seed


# Of the recipe.
VERSION = 1
# Seconds of one core for 8x8 images, a minute for 28x28.
STEPS, BATCH, LEARNING_RATE, WIDTH = 300, 64, 2e-3, 16
# Every fifth image is kept from training, to state how well the network knows the classes.
HELD_OUT = 5


class Features(NamedTuple):
    """What `load_feature_network` takes, and why that was chosen, where nobody has named it."""

    spec: str | Path
    reason: str | None = None


def features_for(
    spec: str, data: TrainingData, metrics: Iterable[str], count: int, cache_dir: str | os.PathLike | None = None
) -> Features:
    """The features that `spec` names for `count` samples, a network trained on `data` among them.

    auto: the raw values where they are few enough to be measured in, else a network that is trained
    on the classes. ValueError where neither can be.
    """
    if spec != "auto":
        return Features(trained_network_file(data, cache_dir) if spec == "trained" else spec)
    values, samples = math.prod(data.sample_shape), min(count, len(data))
    is_large, has_classes = values > MOST_PIXELS, len(data.sample_shape) == 3 and data.labels is not None
    if not is_large and ("fd" not in metrics or samples > values):
        return Features("pixels")
    few = f"{MOST_PIXELS:,} at most" if is_large else f"fewer than the {samples:,} samples"
    reason = f"the {values:,} values of a sample are too many to be features, which are {few}"
    if has_classes and data.num_classes > 1:
        return Features(trained_network_file(data, cache_dir), reason)
    if is_large:
        raise ValueError(
            f"{reason}, and {data.name} has no classes to train a network on; give features 'imagenet' or "
            "'inception', a TorchScript or .safetensors file, or the folder of a saved classifier"
        )
    # What follows says how many samples it takes.
    return Features("pixels")


def trained_network_file(data: TrainingData, cache_dir: str | os.PathLike | None = None) -> Path:
    """The .safetensors file of a `ResNetFeatures` trained on the labels of `data`, now or earlier.

    The file's name says what it was trained on, and its metadata the accuracy on held-out images.
    ValueError for data that are no images or have no labels.
    """
    if len(data.sample_shape) != 3:
        raise ValueError(
            f"features 'trained' are those of images, and the samples of {data.name} have the shape "
            f"{tuple(data.sample_shape)}; give 'pixels', which are their raw values, or a network's file"
        )
    if data.labels is None or data.num_classes < 2:
        raise ValueError(f"features 'trained' need real images of at least 2 classes; {data.name} has no such labels")
    # The names, since the same images may have their classes numbered otherwise.
    classes = data.class_names or []
    recipe = [VERSION, data.fingerprint, len(data), STEPS, BATCH, LEARNING_RATE, WIDTH, HELD_OUT, classes]
    key = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:8]
    name = re.sub(r"[^\w.-]+", "-", Path(data.name).name)
    path = Path(cache_dir or cache_folder("reference")) / f"trained-on-{name}-{key}.safetensors"
    with main_first(PartialState()):
        if not path.is_file():
            net, accuracy = train_classifier(data)
            print(f"trained a feature network on {data.name}: it knows {accuracy:.1%} of the held-out images ({path})")
            about = {"held_out_accuracy": f"{accuracy:.4f}", "data": data.name}
            remove_partials(path.parent)
            write_whole(path, save(net.state_dict(), metadata=about))
    return path


def held_out_accuracy(spec: str | os.PathLike) -> float | None:
    """The accuracy that the file of a `trained_network_file` records.

    None for any other network.
    """
    if Path(spec).suffix != ".safetensors":
        return None
    with safe_open(spec, "pt") as file:
        recorded = (file.metadata() or {}).get("held_out_accuracy")
    return None if recorded is None else float(recorded)


def train_classifier(data: TrainingData, seed: int = 0) -> tuple[ResNetFeatures, float]:
    """A classifier of the data's labels, and its accuracy on the images it was not shown."""
    device = PartialState().device
    held_out = torch.arange(0, len(data), HELD_OUT)
    shown = torch.tensor([i for i in range(len(data)) if i % HELD_OUT])
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(seed, "feature network"))
        net = ResNetFeatures(WIDTH, data.num_classes, data.sample_shape[0]).to(device).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS)
    generator = torch.Generator().manual_seed(seed)
    for _ in tqdm(range(STEPS), desc=f"feature network of {data.name}", leave=False):
        some = shown[torch.randint(len(shown), (BATCH,), generator=generator)]
        batch = data.fetch(some.tolist(), epoch=0)
        loss = F.cross_entropy(
            net.head(net(batch["x_0"].to(device))), batch["labels"].to(device), label_smoothing=0.05
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    net.eval()
    with torch.no_grad():
        right = 0
        for some in held_out.split(250):
            batch = data.fetch(some.tolist(), epoch=0)
            right += int((net.head(net(batch["x_0"].to(device))).argmax(1).cpu() == batch["labels"]).sum())
    return net.cpu(), right / len(held_out)
