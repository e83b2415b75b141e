"""Networks whose features images are compared in: Inception, a file of one's own, a saved classifier, or the pixels.

Files are TorchScript, which runs no Python of the file's author, or safetensors of an architecture that is known here; no pickle
with code is opened. Letters: B images, C channels, H x W pixels, D features. A network is named and hashed: a distance means
nothing without both.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


MOST_PIXELS = 4096  # as features; their covariance has the square of this number of entries


@dataclass(frozen=True)
class FeatureNetwork:
    """A function of images float32 (B, C, H, W) in [-1, 1] to features (B, D), and what it is called.

    `classify` gives logits (B, classes), None for a network without classes. Calling checks what comes out.
    """

    name: str
    digest: str  # of the weights
    function: Callable[[Tensor], Tensor] | None
    dimension: int
    device: torch.device
    classifier: Callable[[Tensor], Tensor] | None = None
    is_inception: bool = False

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        return self._checked(self.function, images)

    @torch.no_grad()
    def classify(self, images: Tensor) -> Tensor:
        """Logits (B, classes)."""
        return self._checked(self.classifier, images)

    def _checked(self, function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        try:
            output = function(images.to(self.device))
        except (RuntimeError, TypeError) as error:  # RuntimeError is what torch raises for shapes that do not fit
            if isinstance(error, torch.OutOfMemoryError):
                raise
            reason = str(error).strip().splitlines()[-1]
            raise ValueError(
                f"the network {self.name} does not take images {tuple(images.shape)}: {reason}"
            ) from error
        if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != len(images):
            shown = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"the network {self.name} must give one row an image, (B, D); for {len(images)} it gave {shown}"
            )
        output = output.float()
        if not output.isfinite().all():
            raise ValueError(
                f"the network {self.name} gives NaN or infinity for some image, so nothing can be measured"
            )
        return output

    def describe(self) -> dict:
        """What a protocol records."""
        return {"name": self.name, "sha256": self.digest, "dimension": self.dimension}


class ResNetFeatures(nn.Module):
    """A small residual network for small grey images with 4 * width features; the form of a saved Fashion-MNIST ruler.

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
    channels: int,
    size: tuple[int, int],
    device: torch.device | str = "cpu",
    inception_weights: str | os.PathLike | None = None,
) -> FeatureNetwork:
    """The network for images of `channels` and `size` (H, W) that `spec` names.

    "pixels": the pixels themselves. "inception": the 2048 features of FID, from `inception_weights` (the TorchScript
    file inception-2015-12-05.pt, or weights for torch-fidelity) or by torch-fidelity's download. Else a path: a .safetensors file
    of `ResNetFeatures`, the folder of a saved ADMClassifier (it classifies, and its logits are the features), or a TorchScript
    module from images float32 in [-1, 1] to (B, D). ValueError for what cannot be loaded or does not take such images; ImportError
    where torch-fidelity is missing.
    """
    device = torch.device(device)
    if spec == "pixels":
        return _pixels(channels, size, device)
    if spec == "inception":
        name, digest, function, classifier = _inception(inception_weights, device)
    else:
        name, digest, function, classifier = _from_file(Path(spec), device)
    network = FeatureNetwork(name, digest, function, 0, device, classifier, spec == "inception")
    probe = network(torch.zeros(2, channels, *size))  # now, and not after hours of sampling
    return replace(network, dimension=probe.shape[1])


def load_classifier(
    spec: str | os.PathLike, channels: int, size: tuple[int, int], device: torch.device | str = "cpu"
) -> FeatureNetwork:
    """The classifier in a file or folder, see `load_feature_network`; what a TorchScript module gives is taken for logits."""
    if spec in ("pixels", "inception"):
        raise ValueError(f"{spec!r} is no classifier; give a file or folder")
    network = load_feature_network(spec, channels, size, device)
    return network if network.classifier else replace(network, classifier=network.function)


def feature_network(
    module: nn.Module, name: str, example: Tensor, classifier: Callable | None = None
) -> FeatureNetwork:
    """Any module as a feature network, in evaluation mode; `example` (B, C, H, W) in [-1, 1] shows how many features it has."""
    module = module.eval()
    device = next((p.device for p in module.parameters()), example.device)
    network = FeatureNetwork(name, hash_tensors(module.state_dict()), module, 0, device, classifier)
    return replace(network, dimension=network(example).shape[1])


def network_range(images: np.ndarray) -> Tensor:
    """uint8 (B, H, W, C) as float32 (B, C, H, W) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float().div_(127.5).sub_(1)


def hash_tensors(tensors: dict[str, Tensor]) -> str:
    """sha256 of names, dtypes, shapes and bytes, the same on every device."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    """sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _pixels(channels: int, size: tuple[int, int], device: torch.device) -> FeatureNetwork:
    dimension = channels * size[0] * size[1]
    if dimension > MOST_PIXELS:
        raise ValueError(
            f"features 'pixels' are meant for up to {MOST_PIXELS} values, these images have {dimension}; give a network's file, "
            "or 'inception'"
        )
    return FeatureNetwork("pixels", "none", lambda images: images.flatten(1), dimension, device)


def _from_file(path: Path, device: torch.device) -> tuple:
    if not path.exists():
        raise ValueError(
            f"the network {str(path)!r} is not there; give 'pixels', 'inception', a .safetensors or TorchScript file, or the "
            "folder of a saved classifier"
        )
    if path.is_dir():
        return _classifier_folder(path, device)
    if path.suffix == ".safetensors":
        net = _residual_network(path).to(device).eval()
        # of the tensors, since the order of a file's metadata is not the same in every process
        return path.stem, hash_tensors(net.state_dict()), net, lambda images: net.head(net(images))
    net = _torch_script(path, device)
    return path.stem, hash_file(path), net, None


def _torch_script(path: Path, device: torch.device) -> torch.jit.ScriptModule:
    try:
        return torch.jit.load(str(path), map_location=device).eval()
    except RuntimeError as error:
        raise ValueError(
            f"{path} is not TorchScript; save the network with torch.jit.script(net).save(...), since a pickled "
            "file could run code when it is opened"
        ) from error


def _residual_network(path: Path) -> ResNetFeatures:
    from safetensors.torch import load_file

    state = load_file(path)
    try:
        stem, head = state["stem.weight"], state["head.weight"]
        net = ResNetFeatures(stem.shape[0], head.shape[0], stem.shape[1])
        net.load_state_dict(state)
    except (KeyError, RuntimeError) as error:
        raise ValueError(
            f"{path} does not hold a network of the form of hf_diffusion.evaluation.feature_networks.ResNetFeatures, the only one known here; "
            "give any other network as TorchScript"
        ) from error
    return net


def _classifier_folder(path: Path, device: torch.device) -> tuple:
    from hf_diffusion.models.unet_adm import ADMClassifier

    config = path / "config.json"
    name = json.loads(config.read_text(encoding="utf-8")).get("_class_name") if config.is_file() else None
    if name != "ADMClassifier":
        raise ValueError(f"the folder {path} holds no saved ADMClassifier (found {name or 'no config.json'})")
    net = ADMClassifier.from_pretrained(path, use_safetensors=True).to(device).eval()

    def logits(images: Tensor) -> Tensor:
        return net(images, torch.zeros(len(images), dtype=torch.long, device=images.device), return_dict=False)[0]

    return path.resolve().name, hash_tensors(net.state_dict()), logits, logits


def _inception(weights: str | os.PathLike | None, device: torch.device) -> tuple:
    if weights is not None and not Path(weights).is_file():
        raise ValueError(f"inception_weights {str(weights)!r} is not a file")
    if weights is not None and Path(weights).suffix == ".pt":
        net = _torch_script(Path(weights), device)
        digest, name = hash_file(Path(weights)), f"Inception {Path(weights).stem}"
        return name, digest, lambda images: net(_bytes_of_three_channels(images), return_features=True), None
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as error:  # RuntimeError: its torchvision does not fit the installed torch
        raise ImportError(
            "features 'inception' need torch-fidelity (pip install 'hf-diffusion[inception]', with a torchvision that fits "
            "torch), or inception_weights with the TorchScript file inception-2015-12-05.pt; or give features of your own"
        ) from error
    if weights is not None:
        _refuse_code(Path(weights))
    net = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=None if weights is None else str(weights)
    )
    net = net.to(device).eval()
    digest = hash_tensors(net.state_dict())
    return "Inception inception-v3-compat", digest, lambda images: net(_bytes_of_three_channels(images))[0], None


def _refuse_code(path: Path) -> None:
    """ValueError for a pickle with more than tensors: torch-fidelity would run whatever is in it."""
    try:
        torch.load(path, weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path} does not hold tensors alone, so it is not opened: give the weights as published"
        ) from error


def _bytes_of_three_channels(images: Tensor) -> Tensor:
    """What both Inceptions take: uint8 (B, 3, H, W); they resize themselves. Grey images are repeated."""
    images = (images + 1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    return images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)
