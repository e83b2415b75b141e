"""Networks whose features samples are compared in: known ones, a file, a classifier, raw values.

Files are TorchScript, which runs no Python of the file's author, or safetensors of an architecture
that is known here; no pickle with code is opened. A network is named and hashed: a distance means
nothing without both. Letters: B samples, C channels, H x W pixels, D features.
"""

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from hf_diffusion.data.pixels import to_network_range
from hf_diffusion.evaluation.imagenet import imagenet
from hf_diffusion.evaluation.inception import inception
from hf_diffusion.evaluation.network_files import hash_tensors, torch_script
from hf_diffusion.files import sha256
from hf_diffusion.models.unet_adm import ADMClassifier


# As features; their covariance has the square of this number of entries.
MOST_PIXELS = 4096
FEATURE_BATCH = 250


@dataclass(frozen=True)
class FeatureNetwork:
    """A function of data float32 (B, *shape), as networks see it, to features (B, D), and its name.

    Images are (B, C, H, W) in [-1, 1]. `classifier` gives logits (B, classes), None for a network
    without classes. `digest` is that of the weights. Calling checks what comes out.
    """

    name: str
    digest: str
    function: Callable[[Tensor], Tensor] | None
    dimension: int
    device: torch.device
    classifier: Callable[[Tensor], Tensor] | None = None
    is_inception: bool = False
    # Of the classes, in the order of the logits; None where nobody recorded them.
    class_names: tuple[str, ...] | None = None
    # Why it was chosen, where nobody has named it.
    reason: str | None = None

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        return self._checked(self.function, x)

    @torch.no_grad()
    def classify(self, x: Tensor) -> Tensor:
        """Logits (B, classes)."""
        return self._checked(self.classifier, x)

    def features(self, samples: np.ndarray) -> Tensor:
        """Features float32 (N, D) on the CPU of samples as `draw` gives them, in batches."""
        return _in_batches(self, samples)

    def logits(self, samples: np.ndarray) -> Tensor:
        """Logits float32 (N, classes) on the CPU of samples as `draw` gives them, in batches."""
        return _in_batches(self.classify, samples)

    def numbered_as(self, names: Sequence[str]) -> "FeatureNetwork":
        """The same network with its first classes in the order of `names`.

        Where it recorded none, they are taken to be in order. ValueError for a name it lacks.
        """
        known = self.class_names
        if known is None or not names or tuple(names) == known[: len(names)]:
            return self
        missing = [name for name in names if name not in known]
        if missing:
            raise ValueError(
                f"the classifier {self.name} knows {', '.join(known)}, and samples of {missing[0]} are asked for; "
                "take "
                "one that was trained on these classes"
            )
        order = [known.index(name) for name in names] + [i for i, name in enumerate(known) if name not in names]
        classify = self.classifier
        return replace(self, classifier=lambda x: classify(x)[:, order], class_names=tuple(known[i] for i in order))

    def _checked(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        try:
            output = function(x.to(self.device))
        # RuntimeError is what torch raises for shapes that do not fit.
        except (RuntimeError, TypeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            reason = str(error).strip().splitlines()[-1]
            raise ValueError(f"the network {self.name} does not take samples {tuple(x.shape)}: {reason}") from error
        if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != len(x):
            shown = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"the network {self.name} must give one row a sample, (B, D); for {len(x)} it gave {shown}"
            )
        output = output.float()
        if not output.isfinite().all():
            raise ValueError(
                f"the network {self.name} gives NaN or infinity for some sample, so nothing can be measured"
            )
        return output

    def describe(self) -> dict:
        """What a protocol records."""
        described = {"name": self.name, "sha256": self.digest, "dimension": self.dimension}
        return described if self.reason is None else described | {"chosen": self.reason}


class ResNetFeatures(nn.Module):
    """A small residual network with 4 * width features; the form of a saved Fashion-MNIST ruler.

    forward: (B, 1, H, W) in [-1, 1] -> (B, 4 * width); `head` turns features into logits.
    """

    def __init__(self, width: int = 32, num_classes: int = 10, in_channels: int = 1):
        super().__init__()
        self.stem = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        widths = (width, width, 2 * width, 4 * width)
        self.blocks = nn.Sequential(*(_Block(a, b, 1 + (a != b)) for a, b in zip(widths[:-1], widths[1:])))
        self.head = nn.Linear(4 * width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.blocks(self.stem(images)).mean((2, 3))


class _Block(nn.Module):
    def __init__(self, width_in: int, width_out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width_out)
        changes = stride != 1 or width_in != width_out
        self.skip = nn.Conv2d(width_in, width_out, 1, stride, bias=False) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.skip(x) + self.bn2(self.conv2(h)))


def load_feature_network(
    spec: str | os.PathLike,
    shape: Sequence[int],
    device: torch.device | str = "cpu",
    inception_weights: str | os.PathLike | None = None,
    reason: str | None = None,
) -> FeatureNetwork:
    """The network for samples of `shape`, (C, H, W) for images, that `spec` names.

    - "pixels": the raw values.
    - "inception": the 2048 features of FID, from `inception_weights` (the TorchScript file
      inception-2015-12-05.pt, or weights for torch-fidelity) or by torch-fidelity's download.
    - "imagenet": the 1,280 features of EfficientNet-Lite0, see `evaluation.imagenet`.
    - a .safetensors file of `ResNetFeatures`.
    - the folder of a saved ADMClassifier: it classifies, and its logits are the features.
    - a TorchScript module from float32 (B, *shape), images in [-1, 1], to (B, D).

    ValueError for what cannot be loaded or does not take such samples; ImportError where
    the extra of a known network is missing.
    """
    device, shape = torch.device(device), tuple(shape)
    if spec == "pixels":
        if math.prod(shape) > MOST_PIXELS:
            raise ValueError(
                f"features 'pixels' are meant for up to {MOST_PIXELS} values, these samples have {math.prod(shape)}; "
                "give 'trained' where there are classes, a network's file, 'imagenet' or 'inception'"
            )
        return raw_values(shape, device)
    if spec in ("inception", "imagenet"):
        if len(shape) != 3:
            raise ValueError(
                f"features {spec!r} are those of images, and these samples have the shape {shape}; give 'pixels', "
                "which are their raw values, or a network's file"
            )
        known = inception(inception_weights, device) if spec == "inception" else imagenet(shape, device)
        name, digest, function, classifier = known
    else:
        name, digest, function, classifier = _from_file(Path(spec), device)
    network = FeatureNetwork(name, digest, function, 0, device, classifier, spec == "inception")
    # Now, and not after hours of sampling.
    probe = network(torch.zeros(2, *shape))
    return replace(network, dimension=probe.shape[1], class_names=_recorded_classes(spec), reason=reason)


def load_classifier(
    spec: str | os.PathLike, shape: Sequence[int], device: torch.device | str = "cpu"
) -> FeatureNetwork:
    """The classifier in a file or folder; what TorchScript gives is taken for logits.

    See `load_feature_network`.
    """
    if spec in ("pixels", "inception", "imagenet"):
        raise ValueError(f"{spec!r} is no classifier; give a file or folder")
    network = load_feature_network(spec, shape, device)
    return network if network.classifier else replace(network, classifier=network.function)


def feature_network(
    module: nn.Module, name: str, example: Tensor, classifier: Callable | None = None
) -> FeatureNetwork:
    """Any module, in evaluation mode; `example` (B, *shape) shows how many features it has."""
    module = module.eval()
    device = next((p.device for p in module.parameters()), example.device)
    network = FeatureNetwork(name, hash_tensors(module.state_dict()), module, 0, device, classifier)
    return replace(network, dimension=network(example).shape[1])


def network_input(samples: np.ndarray) -> Tensor:
    """Samples as `draw` gives them in the form that networks see.

    Images become float32 (B, C, H, W) in [-1, 1], others stay as they are.
    """
    if samples.dtype == np.uint8:
        return to_network_range(np.ascontiguousarray(samples.transpose(0, 3, 1, 2)))
    return torch.from_numpy(np.asarray(samples, dtype=np.float32))


def _in_batches(function: Callable[[Tensor], Tensor], samples: np.ndarray) -> Tensor:
    starts = range(0, len(samples), FEATURE_BATCH)
    return torch.cat([function(network_input(samples[start : start + FEATURE_BATCH])).cpu() for start in starts])


def raw_values(shape: Sequence[int], device: torch.device) -> FeatureNetwork:
    """Samples as their own features, of any number."""
    return FeatureNetwork("pixels", "none", lambda x: x.flatten(1), math.prod(shape), device)


def _from_file(path: Path, device: torch.device) -> tuple:
    if not path.exists():
        raise ValueError(
            f"the network {str(path)!r} is not there; give 'pixels', 'inception', 'imagenet', a .safetensors or "
            "TorchScript file, or the folder of a saved classifier"
        )
    if path.is_dir():
        return _classifier_folder(path, device)
    if path.suffix == ".safetensors":
        net = residual_network(path).to(device).eval()
        # Of the tensors, since the order of a file's metadata is not the same in every process.
        return path.stem, hash_tensors(net.state_dict()), net, lambda images: net.head(net(images))
    net = torch_script(path, device)
    return path.stem, sha256(path), net, None


def residual_network(path: Path) -> ResNetFeatures:
    """The network in a .safetensors file; ValueError where it is of another form."""
    state = load_file(path)
    try:
        stem, head = state["stem.weight"], state["head.weight"]
        net = ResNetFeatures(stem.shape[0], head.shape[0], stem.shape[1])
        net.load_state_dict(state)
    except (KeyError, RuntimeError) as error:
        raise ValueError(
            f"{path} does not hold a network of the form of "
            "hf_diffusion.evaluation.feature_networks.ResNetFeatures, the only one known here; give any other network "
            "as TorchScript"
        ) from error
    return net


def _classifier_folder(path: Path, device: torch.device) -> tuple:
    config = path / "config.json"
    name = json.loads(config.read_text(encoding="utf-8")).get("_class_name") if config.is_file() else None
    if name != "ADMClassifier":
        raise ValueError(f"the folder {path} holds no saved ADMClassifier (found {name or 'no config.json'})")
    net = ADMClassifier.from_pretrained(path, use_safetensors=True).to(device).eval()

    def logits(images: Tensor) -> Tensor:
        return net(images, torch.zeros(len(images), dtype=torch.long, device=images.device), return_dict=False)[0]

    return path.resolve().name, hash_tensors(net.state_dict()), logits, logits


def _recorded_classes(spec: str | os.PathLike) -> tuple[str, ...] | None:
    """The names of the classes in the configuration of a saved classifier, by number."""
    config = Path(spec) / "config.json"
    names = json.loads(config.read_text(encoding="utf-8")).get("id2label") if config.is_file() else None
    return tuple(names[number] for number in sorted(names, key=int)) if names else None
