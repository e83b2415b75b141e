"""The choice of a denoiser's network for images, and its shape."""

from dataclasses import dataclass
from typing import Any, Literal

from hf_diffusion.config.options import option
from hf_diffusion.config.shared_options import UNetOptions


@dataclass(kw_only=True)
class DenoiserOptions(UNetOptions):
    """The network of images: a U-Net, or a transformer on patches."""

    network: Literal["adm", "transformer"] = option(
        "adm", "network of images: ADM's U-Net, or a transformer on patches of patch_size", group="network"
    )
    hidden_size: int = option(256, "width of the transformer's tokens", at_least=1)
    num_layers: int = option(8, "blocks of the transformer", at_least=1)
    bottleneck: int | None = option(
        None,
        "width that the transformer's patches are pressed through, such as 128; none is no such thing",
        at_least=1,
    )

    def transformer_shape(self, sample_shape: tuple[int, ...]) -> dict[str, Any]:
        """The arguments of a transformer for images of a shape (C, H, W)."""
        return {
            "sample_size": tuple(sample_shape[1:]),
            "in_channels": sample_shape[0],
            "patch_size": self.patch_size,
            "hidden_size": self.hidden_size,
            "num_layers": self.num_layers,
            "num_head_channels": self.num_head_channels,
            "bottleneck": self.bottleneck,
            "dropout": self.dropout,
        }
