"""Train a CLIP of noisy images and captions, whose gradient guides a text-to-image model.

    accelerate launch training/train_clip.py --config training/recipes/digits_clip.yaml

The noise schedule must be that of the diffusion model. It is saved in the network's config, and the
pipeline compares them:

    hf-diffusion sample runs/digits_text --prompt "the digit 3" --guide_by runs/digits_clip

Settings come from `--config` files, then from flags; `--help` lists them and `--dry_run` shows what
a run would do.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from diffusers.utils import CONFIG_NAME
from torch import nn

from hf_diffusion.config.caption_options import CaptionOptions
from hf_diffusion.config.options import option
from hf_diffusion.config.run_options import TrainingConfig
from hf_diffusion.config.shared_options import DataOptions, NoiseScheduleOptions
from hf_diffusion.data.protocol import TrainingData
from hf_diffusion.files import write_folder
from hf_diffusion.loop.fine_tuning import started_from
from hf_diffusion.loop.generative import check_best_metric, held_out_loss
from hf_diffusion.loop.readers import token_coder, trained_clip_reader
from hf_diffusion.loop.start import run
from hf_diffusion.loop.trainer import Trainer
from hf_diffusion.losses.noisy_clip import ContrastOptions, NoisyCaptionObjective
from hf_diffusion.models.clip_noisy import NoisyCLIP
from hf_diffusion.schedulers.scheduling_gaussian import LinearDDPMScheduler


@dataclass(kw_only=True)
class CLIPConfig(NoiseScheduleOptions, ContrastOptions, CaptionOptions, TrainingConfig, DataOptions):
    """Train a CLIP of noisy images and their captions, for CLIP guidance."""

    method: ClassVar[str] = "noisy-clip"
    kind: ClassVar[str] = "CLIP of noisy images"
    tags: ClassVar[tuple[str, ...]] = ("noisy-clip",)
    task: ClassVar[str | None] = "zero-shot-image-classification"
    usage_template: ClassVar[str | None] = "use_clip.md"

    patch_size: int = option(4, "side of the patches that the image tower reads", at_least=1, group="network")
    width: int = option(128, "width of the image tower", at_least=8)
    layers: int = option(4, "layers of the image tower", at_least=1)
    heads: int = option(4, "attention heads of the image tower", at_least=1)
    embed_dim: int = option(64, "width of the embeddings that are compared", at_least=2)
    eval_split: str | None = option(
        None, "split that loss and hits are measured on at every eval_steps", group="evaluation", tied=None
    )

    def papers(self) -> tuple[str, ...]:
        return ("nichol2022glide", "radford2021learning")


def build_network(config: CLIPConfig, data: TrainingData, tokenizer: Any, length: int) -> NoisyCLIP:
    """Two towers for the shape of the data and its tokens, which record the noise schedule."""
    torch.manual_seed(config.seed)
    return NoisyCLIP(
        num_timesteps=config.ddpm_num_steps,
        in_channels=data.sample_shape[0],
        sample_size=tuple(data.sample_shape[1:]),
        patch_size=config.patch_size,
        width=config.width,
        num_layers=config.layers,
        num_heads=config.heads,
        embed_dim=config.embed_dim,
        vocab_size=len(tokenizer),
        text_length=length,
        text_width=config.text_width,
        text_layers=config.text_layers,
        text_heads=config.text_heads,
        noise_schedule=config.noise_schedule(),
    )


def build(config: CLIPConfig, accelerator: Accelerator, data: TrainingData) -> Trainer:
    """The trainer of the towers, which users get with their tokenizer."""
    former = None if config.init_from is None else trained_clip_reader(config.init_from)
    coder = token_coder(config, accelerator, data.captions, former)
    tokenizer = coder.tokenizer
    data.encode_captions(coder)
    # v_prediction, because nothing is predicted here and zero SNR is refused with the default.
    scheduler = LinearDDPMScheduler(**config.noise_schedule(), prediction_type="v_prediction")
    fresh = build_network(config, data, tokenizer, coder.length)
    called = {"num_layers": "layers", "num_heads": "heads"}
    network = started_from(config, data, fresh, config.noise_schedule(), called)
    objective = NoisyCaptionObjective(
        scheduler, network, config.learning_rate, config.contrast_size, coder.fingerprint
    )
    evaluators = held_out_loss(config, accelerator, data, objective.players[0])
    check_best_metric(config, evaluators)

    def export(network: nn.Module, folder: Path) -> None:
        def write(place: Path) -> None:
            network.save_pretrained(place)
            tokenizer.save_pretrained(place)

        write_folder(folder, write, last=CONFIG_NAME)

    return Trainer(config, accelerator, objective, data, export, evaluators=evaluators)


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says; returns the exit status."""
    return run(CLIPConfig, build, argv, prog="train_clip.py")


if __name__ == "__main__":
    sys.exit(main())
