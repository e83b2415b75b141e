"""Perceptual distances of images, in the feature maps of a fixed network.

Zhang et al. 2018, arXiv:1801.03924, Eq. 1, with all weights 1. Letters: B images of shape (C, H,
W).
"""

import importlib
import json
import urllib.error
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from hf_diffusion.data.protocol import TrainingData
from hf_diffusion.evaluation.feature_networks import residual_network
from hf_diffusion.evaluation.feature_training import trained_network_file
from hf_diffusion.models.unet_adm import ADMClassifier


class FeatureDistance(nn.Module):
    """Mean over layers of the squared distance (B,) of their unit-length features.

    network: called with images in [-1, 1]; `layers` are those modules of it whose outputs (B, D, h,
    w) are compared. It is frozen and in evaluation mode; gradients reach the images.
    """

    def __init__(self, network: nn.Module, layers: Sequence[nn.Module]):
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self._maps: list[Tensor] = []
        for layer in layers:
            layer.register_forward_hook(self._keep)

    def _keep(self, layer: nn.Module, inputs: tuple, output: Tensor) -> None:
        self._maps.append(output)

    def maps(self, images: Tensor) -> list[Tensor]:
        """The layers' outputs."""
        self._maps.clear()
        self.network(images)
        found = list(self._maps)
        self._maps.clear()
        return found

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        # Under autocast half precision rounds away what two similar images differ by.
        with torch.autocast(x.device.type, enabled=False):
            pairs = [maps.chunk(2) for maps in self.maps(torch.cat([x.float(), y.float()]))]
        distances = [(_unit(a) - _unit(b)).square().sum(1).mean((1, 2)) for a, b in pairs]
        return torch.stack(distances).mean(0)


class LPIPS(nn.Module):
    """The distance of the package `lpips`, with its learned weights, for 1 or 3 channels."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network.eval().requires_grad_(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x, y = (images.float().expand(-1, 3, -1, -1) for images in (x, y))
            return self.network(x, y).flatten()


class AtTheCleanEnd(nn.Module):
    """A classifier of noisy images (B, C, H, W), told that they have no noise."""

    def __init__(self, classifier: ADMClassifier):
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        t = torch.zeros(len(images), dtype=torch.long, device=images.device)
        return self.classifier(images, t, return_dict=False)[0]


def perceptual_distance(spec: str, data: TrainingData) -> tuple[nn.Module | None, str]:
    """The distance that `spec` names for images like `data`, and which one it is, in words.

    - "auto": "trained" where the data have at least two classes, else none.
    - "trained": layers of a small classifier of the data's own classes, trained once.
    - "none": None.
    - "lpips": that of the package lpips.
    - a .safetensors file of `ResNetFeatures`, or the folder of a saved ADMClassifier.

    ValueError for what does not fit the data, ImportError where lpips is not there.
    """
    has_classes = data.labels is not None and data.num_classes >= 2
    if spec == "none" or (spec == "auto" and not has_classes):
        why = (
            "" if spec == "none" else f", since {data.name} has no classes to train a network of; lpips or a file give"
        )
        return None, f"no perceptual distance{why + ' one' if why else ''}"
    if spec == "lpips":
        return lpips_distance(data.sample_shape[0]), "LPIPS (VGG)"
    path = trained_network_file(data) if spec in ("auto", "trained") else Path(spec)
    distance = FeatureDistance(*_layers_of(path))
    _try(distance, path, data.sample_shape)
    return distance, f"features of {path.name}"


def lpips_distance(channels: int) -> LPIPS:
    """LPIPS by its package; ImportError or ValueError, in one sentence, where it cannot be had."""
    if channels not in (1, 3):
        raise ValueError(f"perceptual lpips sees 1 or 3 channels, not {channels}; give trained, a file, or none")
    try:
        package = importlib.import_module("lpips")
    except ImportError as error:
        raise ImportError(
            "perceptual lpips needs the packages lpips and torchvision: pip install lpips torchvision; without them "
            "give trained, a file, or none"
        ) from error
    try:
        return LPIPS(package.LPIPS(net="vgg", verbose=False))
    except (urllib.error.URLError, OSError) as error:
        raise ValueError(
            f"perceptual lpips could not load its network ({error}), which torchvision downloads; give trained, a "
            "file, or none"
        ) from error


def _layers_of(path: Path) -> tuple[nn.Module, Sequence[nn.Module]]:
    """The network in a file or folder, and the layers that tell images apart."""
    config = path / "config.json"
    if config.is_file() and json.loads(config.read_text(encoding="utf-8")).get("_class_name") == "ADMClassifier":
        network = AtTheCleanEnd(ADMClassifier.from_pretrained(path, use_safetensors=True))
        return network, [network.classifier.conv_in, *network.classifier.down_blocks]
    if path.suffix == ".safetensors" and path.is_file():
        network = residual_network(path)
        return network, [network.stem, *network.blocks]
    raise ValueError(
        f"perceptual {path}: there is no network of known layers; give auto, trained, lpips, none, a .safetensors "
        "file of ResNetFeatures, or the folder of a saved ADMClassifier"
    )


def _try(distance: FeatureDistance, path: Path, shape: tuple[int, ...]) -> None:
    try:
        distance(torch.zeros(1, *shape), torch.zeros(1, *shape))
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"perceptual {path} does not take images of shape {tuple(shape)}: {reason}") from error


def _unit(maps: Tensor) -> Tensor:
    return maps / (maps.square().sum(1, keepdim=True) + 1e-10).sqrt()
