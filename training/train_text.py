"""Train a diffusion language model on your own text: MDLM, UDLM or D3PM, also from a BERT.

    accelerate launch training/train_text.py --config training/recipes/shakespeare_mdlm.yaml
    accelerate launch training/train_text.py --train_data_dir my_texts --tokenizer chars

Settings come from `--config` files, then from flags; `--help` lists them and `--dry_run` shows what
a run would do.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from accelerate import Accelerator
from torch import nn

from hf_diffusion.config.options import option
from hf_diffusion.config.preset import Choice, Circumstances
from hf_diffusion.config.run_options import TrainingConfig
from hf_diffusion.config.shared_options import ClassOptions
from hf_diffusion.config.text_options import TextDataOptions
from hf_diffusion.data.protocol import TrainingData
from hf_diffusion.loop.fine_tuning import started_from
from hf_diffusion.loop.generative import generative_trainer
from hf_diffusion.loop.masked_language_models import holds_masked_lm, masked_lm, tokenizer_to_start_from
from hf_diffusion.loop.start import run
from hf_diffusion.loop.trainer import Trainer
from hf_diffusion.losses.tokens import TokenObjective, TokenOptions
from hf_diffusion.models.transformer_tokens import TokenTransformerModel
from hf_diffusion.pipelines.pipeline_discrete_text import DiscreteTextPipeline


# Up to this width a network is small.
SMALL_WIDTH = 256


@dataclass(kw_only=True)
class TextConfig(TokenOptions, ClassOptions, TrainingConfig, TextDataOptions):
    """Train a diffusion model of text, with or without classes."""

    method: ClassVar[str] = "discrete text diffusion"
    kind: ClassVar[str] = "diffusion language model"
    tags: ClassVar[tuple[str, ...]] = ("discrete-diffusion", "diffusion-language-model")
    task: ClassVar[str | None] = "text-generation"

    # Of the network's size, and small where it is trained already.
    learning_rate: float | None = option(
        None,
        f"highest learning rate; none takes 1e-3 (muon 4e-3) up to a hidden_size of {SMALL_WIDTH}, 3e-4 above, and "
        "5e-5 with init_from",
        above=0,
        group="optimization",
    )

    hidden_size: int = option(256, "width of the transformer", at_least=2, group="network")
    num_layers: int = option(6, "blocks of the transformer", at_least=1)
    num_attention_heads: int = option(4, "heads of its attention", at_least=1)
    mlp_ratio: float = option(4.0, "width of the perceptrons in units of hidden_size", above=0)
    dropout: float = option(0.0, "dropout in the blocks", at_least=0, below=1)

    num_inference_steps: int | None = option(
        None,
        "steps of the texts that are shown; none is as many as a text has tokens",
        at_least=1,
        group="sampling",
        tied=None,
    )
    sampler: Literal["ancestral", "confidence"] = option(
        "ancestral", "of the texts that are shown: the process undone, or the surest tokens first", tied=None
    )
    num_sample_images: int = option(4, "texts that are shown", at_least=1, tied=None)

    def check(self) -> None:
        """ValueError for settings of different groups that contradict each other."""
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of twice num_attention_heads, "
                f"{2 * self.num_attention_heads}"
            )
        if self.channels_last:
            raise ValueError("channels_last is an order of images, which tokens have none of; leave it out")
        if self.sampler == "confidence" and self.noise == "uniform":
            raise ValueError("sampler confidence needs masks, which uniform noise has none of; give ancestral")
        if self.objective != "continuous" and (self.num_inference_steps or 1) > self.d3pm_num_steps:
            raise ValueError(
                f"num_inference_steps {self.num_inference_steps} is more than d3pm_num_steps {self.d3pm_num_steps}"
            )

    def papers(self) -> tuple[str, ...]:
        is_continuous = self.objective == "continuous"
        used = {
            "austin2021structured": True,
            "sahoo2024simple": is_continuous and self.noise == "absorbing",
            "schiff2025simple": is_continuous and self.noise == "uniform",
            "chang2022maskgit": self.sampler == "confidence",
            "ho2022classifier": self.class_conditional and self.label_dropout > 0,
        }
        return tuple(paper for paper, is_used in used.items() if is_used)

    def preset_settings(self, sample_shape: tuple[int, ...]) -> dict[str, Any]:
        """Of fast: a network that a CPU trains in minutes."""
        width, layers = (128, 4) if self.preset == "fast" else (512, 8)
        sizes = {"hidden_size": width, "num_layers": layers, "num_attention_heads": width // 32}
        return {**super().preset_settings(sample_shape), **sizes}

    def auto_settings(self, circumstances: Circumstances) -> dict[str, Choice]:
        """The network and the training of the recipe on a CPU, larger ones on a GPU."""
        on_cpu = circumstances.on_cpu
        width, layers, batch = (128, 4, 32) if on_cpu else (512, 8, 128)
        size = {"hidden_size": width, "num_layers": layers, "num_attention_heads": width // 32}
        each = -(-min(batch, circumstances.samples or batch) // circumstances.processes)
        reason = "of the recipe for a CPU" if on_cpu else "that a GPU trains well"
        chosen = {"network": Choice(size, f"a size {reason}"), **super().auto_settings(circumstances)}
        steps = {"train_batch_size": each, "ema_max_decay": 0.995 if on_cpu else 0.999}
        if on_cpu and self.init_from is None:
            # not measured on a GPU
            steps |= {"optimizer": "muon"} | ({} if self.noise == "uniform" else {"cross_entropy_weight": 3.0})
        chosen["training"] = Choice(steps, f"a batch {reason}")
        if circumstances.bf16:
            chosen["arithmetic"] = Choice(
                {"mixed_precision": "bf16"}, f"this {'CPU' if on_cpu else 'GPU'} multiplies bf16"
            )
        return chosen

    def settle(self, sample_shape: tuple[int, ...]) -> None:
        is_given = self.learning_rate is not None
        super().settle(sample_shape)
        if not is_given:
            of_small = 4e-3 if self.optimizer == "muon" else 1e-3
            of_size = of_small if self.hidden_size <= SMALL_WIDTH else 3e-4
            self.learning_rate = of_size if self.init_from is None else 5e-5

    def data_arguments(self) -> dict[str, Any]:
        arguments = super().data_arguments()
        return {**arguments, "tokenizer": self.tokenizer or tokenizer_to_start_from(self.init_from)}

    def sampling_options(self) -> dict[str, Any]:
        return {"num_inference_steps": self.num_inference_steps, "sampler": self.sampler}


def build_network(config: TextConfig, data: TrainingData, num_tokens: int) -> TokenTransformerModel:
    """A transformer for the length and the classes of the data."""
    classes = config.num_class_embeds(data)
    torch.manual_seed(config.seed)
    return TokenTransformerModel(
        vocab_size=num_tokens,
        sequence_length=data.sample_shape[0],
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        num_attention_heads=config.num_attention_heads,
        mlp_ratio=config.mlp_ratio,
        dropout=config.dropout,
        time_conditioning=config.is_told_time,
        num_class_embeds=classes,
        null_class=classes is not None and config.label_dropout > 0,
    )


def tokens_of_noise(config: TextConfig, tokenizer: Any) -> tuple[int, int]:
    """How many tokens the noise has, and which of them is the mask.

    ValueError for absorbing noise without a mask. Uniform noise leaves out a mask that is the last.
    """
    mask, count = tokenizer.mask_token_id, len(tokenizer)
    if mask is None and config.noise == "absorbing":
        tokenizer.add_special_tokens({"mask_token": "[MASK]"})
        mask, count = tokenizer.mask_token_id, len(tokenizer)
    return (count - 1 if config.noise == "uniform" and mask == count - 1 else count), mask


def build(config: TextConfig, accelerator: Accelerator, data: TrainingData) -> Trainer:
    """The trainer of a network, which users get with its process and its tokenizer."""
    num_tokens, mask = tokens_of_noise(config, data.tokenizer)
    if holds_masked_lm(config.init_from):
        network = masked_lm(config, data)
        num_tokens = network.config.vocab_size
    else:
        network = started_from(config, data, build_network(config, data, num_tokens))
    scheduler = config.process(num_tokens, mask)
    objective = TokenObjective(scheduler, network, config, config.learning_rate)
    names = dict(enumerate(data.class_names)) if config.class_conditional else None

    def pipeline(network: nn.Module) -> DiscreteTextPipeline:
        # a scheduler of its own: sampling chooses timesteps, training needs all
        own = type(scheduler).from_config(scheduler.config)
        return DiscreteTextPipeline(network, own, data.tokenizer, names, data.sample_shape[0])

    return generative_trainer(config, accelerator, objective, data, pipeline, **config.sampling_options())


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says; returns the exit status."""
    return run(TextConfig, build, argv, prog="train_text.py")


if __name__ == "__main__":
    sys.exit(main())
