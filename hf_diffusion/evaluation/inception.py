"""Inception's 2048 features: those of FID (Heusel et al. 2017, arXiv:1706.08500)."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from hf_diffusion.data.pixels import from_network_range
from hf_diffusion.evaluation.network_files import hash_tensors, refuse_code, torch_script
from hf_diffusion.files import sha256


def inception(weights: str | os.PathLike | None, device: torch.device) -> tuple[str, str, Callable, None]:
    """Name, digest and function of Inception, and None, since it is no classifier here.

    The function takes images (B, C, H, W) in [-1, 1].
    """
    if weights is not None and not Path(weights).is_file():
        raise ValueError(f"inception_weights {str(weights)!r} is not a file")
    if weights is not None and Path(weights).suffix == ".pt":
        net = torch_script(Path(weights), device)
        digest, name = sha256(Path(weights)), f"Inception {Path(weights).stem}"
        return name, digest, lambda images: net(bytes_of_three_channels(images), return_features=True), None
    try:
        # Here, since it is an extra that most do without.
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    # RuntimeError: its torchvision does not fit the installed torch.
    except (ImportError, RuntimeError) as error:
        raise ImportError(
            "features 'inception' need torch-fidelity (pip install 'hf-diffusion[inception]', with a torchvision that "
            "fits torch), or inception_weights with the TorchScript file inception-2015-12-05.pt; or give features of "
            "your own"
        ) from error
    if weights is not None:
        refuse_code(Path(weights))
    net = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=None if weights is None else str(weights)
    )
    net = net.to(device).eval()
    digest = hash_tensors(net.state_dict())
    return "Inception inception-v3-compat", digest, lambda images: net(bytes_of_three_channels(images))[0], None


def bytes_of_three_channels(images: Tensor) -> Tensor:
    """What both Inceptions take: uint8 (B, 3, H, W), grey repeated; they resize themselves."""
    images = from_network_range(images)
    return images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)
