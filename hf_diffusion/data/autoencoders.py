"""Autoencoders of diffusers as data see them: images to scaled latents, and back.

Scaled latents have mean 0 and deviation 1 on the images that the autoencoder was made for. Letters:
B images (B, C, H, W) in [-1, 1], latents (B, D, h, w).
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, ModelMixin, VQModel
from torch import Tensor

from hf_diffusion.data.reaching import hub_or_cache


KINDS = {cls.__name__: cls for cls in (AutoencoderKL, AutoencoderTiny, AutoencoderDC, VQModel)}
CONFIG = "config.json"
# Of the config; nothing that an autoencoder computes depends on it.
NO_MATTER = ("sample_size", "force_upcast")


def load_autoencoder(source: str, device: torch.device | str = "cpu") -> ModelMixin:
    """The autoencoder in a folder or repository, or in the `vae` folder of a pipeline there.

    ValueError for another class, and where there is none. Weights are read as safetensors.
    """
    with hub_or_cache(source):
        return _load(source).to(device).eval().requires_grad_(False)


def _load(source: str) -> ModelMixin:
    where, config = {}, _config_of(source, {})
    if config is None:
        where = {"subfolder": "vae"}
        config = _config_of(source, where)
    name = (config or {}).get("_class_name")
    if name not in KINDS:
        found = f"holds a {name}" if name else "holds no autoencoder"
        raise ValueError(f"vae {source} {found}; give the folder or Hub id of one of {', '.join(KINDS)}")
    return KINDS[name].from_pretrained(source, **where, use_safetensors=True)


def _config_of(source: str, where: dict[str, str]) -> dict[str, Any] | None:
    """The configuration of a model in a folder or repository; None where there is none."""
    folder = Path(source)
    if folder.is_dir():
        file = folder / where.get("subfolder", "") / CONFIG
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    # Asking the Hub for a mistyped path would take a minute without a network.
    if source.startswith((".", "/", "~")) or source.count("/") != 1 or folder.parent.is_dir():
        raise ValueError(f"vae {source} is neither a folder here nor a name of the form user/repository on the Hub")
    try:
        return AutoencoderKL.load_config(source, **where)
    except OSError:
        return None


def digest_of(vae: ModelMixin) -> str:
    """A hash of all that decides the latents: class, settings, weights; the same on any device."""
    settings = {k: v for k, v in vae.config.items() if not k.startswith("_") and k not in NO_MATTER}
    digest = hashlib.sha256(f"{type(vae).__name__} {json.dumps(settings, sort_keys=True, default=str)}".encode())
    for name, tensor in sorted(vae.state_dict().items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


@torch.no_grad()
def encode(vae: ModelMixin, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Mean and standard deviation (B, D, h, w) of scaled latents; None where they are certain."""
    encoded = vae.encode(images.to(vae.device, vae.dtype))
    if hasattr(encoded, "latent_dist"):
        posterior = encoded.latent_dist
        return scaled(posterior.mean.float(), vae.config), posterior.std.float() * _factor(posterior.std, vae.config)
    latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent
    return scaled(latents.float(), vae.config), None


@torch.no_grad()
def decode(vae: ModelMixin, latents: Tensor) -> Tensor:
    """Images (B, C, H, W) of scaled latents, on the latents' device."""
    z = latents.to(vae.device, vae.dtype)
    z = z / _factor(z, vae.config) + _shift(z, vae.config)
    return vae.decode(z, return_dict=False)[0].float().to(latents.device)


def scaled(latents: Tensor, config: Any) -> Tensor:
    """Latents (B, D, h, w) of an autoencoder with mean 0 and deviation 1, as its config says."""
    return (latents - _shift(latents, config)) * _factor(latents, config)


# The two conventions of diffusers: `latents_mean` and `latents_std` of channels beside
# `scaling_factor`, as in SDXL, or `scaling_factor` and `shift_factor` alone, as in SD3.
def _shift(like: Tensor, config: Any) -> Tensor | float:
    if config.get("latents_mean") is None or config.get("latents_std") is None:
        return config.get("shift_factor") or 0.0
    return like.new_tensor(config["latents_mean"]).reshape(1, -1, 1, 1)


def _factor(like: Tensor, config: Any) -> Tensor | float:
    factor = config.get("scaling_factor") or 1.0
    if config.get("latents_mean") is None or config.get("latents_std") is None:
        return factor
    return factor / like.new_tensor(config["latents_std"]).reshape(1, -1, 1, 1)
