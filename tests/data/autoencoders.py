"""Tiny autoencoders of diffusers with random weights, for the tests of latents."""

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, ModelMixin, VQModel


LEVELS = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (4, 8),
    "norm_num_groups": 2,
    "sample_size": 8,
}


def make_autoencoder(cls: type[ModelMixin] = AutoencoderKL, channels: int = 1, seed: int = 0, **config) -> ModelMixin:
    """One of 2 latent channels, which halves images once."""
    torch.manual_seed(seed)
    if cls is AutoencoderTiny:
        sides = {f"{side}_block_out_channels": (4, 4) for side in ("encoder", "decoder")}
        blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1), "latent_channels": 2}
        return AutoencoderTiny(channels, channels, **sides, **blocks, **config).eval()
    if cls is AutoencoderDC:
        shape = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in
                 (("block_types", ("ResBlock", "ResBlock")), ("block_out_channels", (8, 8)),
                  ("layers_per_block", (1, 1)), ("qkv_multiscales", ((), ())))}  # fmt: skip
        return AutoencoderDC(channels, 2, attention_head_dim=4, **shape, **config).eval()
    vae = cls(in_channels=channels, out_channels=channels, latent_channels=2, **LEVELS, **config).eval()
    if cls is VQModel:
        torch.nn.init.normal_(vae.quantize.embedding.weight)
    return vae
