"""Training on captions: objectives whose conditions are texts, a network that reads along.

GLIDE (arXiv:2112.10741) trains the encoder of texts with the U-Net, Imagen (arXiv:2205.11487) takes
a frozen one. B images, L tokens, D features.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from hf_diffusion.losses.denoising import DenoisingObjective
from hf_diffusion.losses.flow import FlowMatchingObjective
from hf_diffusion.randomness import Draw, FixedDraw


def encode_text(encoder: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """The encoder's last states (B, L, D), 0 at padding, and their mean over the tokens (B, D)."""
    hidden = encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    mask = attention_mask[..., None].to(hidden.dtype)
    hidden = hidden * mask
    return hidden, hidden.sum(1) / mask.sum(1).clamp(min=1)


class ReadingUNet(ModelMixin, ConfigMixin):
    """A U-Net with an encoder of texts, for training both; users get each of them as it is.

    Args:
        unet_config: settings of the UNet2DConditionModel.
        text_config: settings of the CLIPTextModel.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(self, unet_config: dict[str, Any], text_config: dict[str, Any]):
        super().__init__()
        self.unet = UNet2DConditionModel.from_config(dict(unet_config))
        self.text_encoder = CLIPTextModel(CLIPTextConfig(**text_config))

    def forward(self, sample: Tensor, timestep: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Any:
        """The U-Net's output for x_t (B, C, H, W) and tokens (B, L)."""
        hidden, mean = encode_text(self.text_encoder, input_ids, attention_mask)
        return self.unet(sample, timestep, encoder_hidden_states=hidden, class_labels=mean)


class CaptionMixin:
    """The conditions of an objective are texts; it stands before the objective's class.

    `empty` are the conditions of the empty text, each (1, ...), which takes the place of
    `label_dropout` of the captions in training.
    """

    def __init__(self, *args: Any, empty: Mapping[str, Tensor], fingerprint: str):
        self.empty, self.fingerprint = dict(empty), fingerprint
        super().__init__(*args)

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"text": self.fingerprint}

    def predict(
        self, network: nn.Module, x: Tensor, t: Tensor, batch: dict[str, Tensor], draw: Draw | FixedDraw
    ) -> Tensor:
        """The network's output for x (B, ...) and timesteps t (B,), told each image's caption."""
        conditions = {name: batch[name] for name in self.empty}
        if network.training and self.options.label_dropout > 0:
            dropped = draw.uniform() < self.options.label_dropout
            for name, rows in conditions.items():
                mask = dropped.view(-1, *[1] * (rows.ndim - 1))
                conditions[name] = torch.where(mask, self.empty[name].to(rows), rows)
        return network(x, t, **conditions).sample


class CaptionDenoisingObjective(CaptionMixin, DenoisingObjective):
    """A network that undoes Gaussian noise, told by a caption what is beneath."""


class CaptionFlowObjective(CaptionMixin, FlowMatchingObjective):
    """A network that knows the velocity from noise to data, told by a caption where to."""
