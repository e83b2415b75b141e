"""A masked language model of transformers as the network of absorbing noise: what BERT does is one
step of it.
"""

import json
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub import file_exists
from torch import nn
from transformers import AutoModelForMaskedLM, AutoTokenizer

from hf_diffusion.config.run_options import TrainingConfig
from hf_diffusion.data.protocol import TrainingData
from hf_diffusion.data.reaching import hub_or_cache


INDEX = DiffusionPipeline.config_name


def holds_masked_lm(source: str | None) -> bool:
    """Whether `init_from` names a model of transformers, in a folder or on the Hub."""
    if source is None:
        return False
    folder = Path(source)
    if folder.is_dir():
        config = folder / "config.json"
        return config.is_file() and "model_type" in json.loads(config.read_text(encoding="utf-8"))
    with hub_or_cache(source):
        return source.count("/") <= 1 and not file_exists(source, INDEX)


def tokenizer_to_start_from(source: str | None) -> Any:
    """The tokenizer beside what `init_from` names: a masked language model, or a pipeline of text.

    `chars` where there is none.
    """
    if source is None:
        return "chars"
    if holds_masked_lm(source):
        return source
    folder = Path(source)
    if folder.is_dir():
        return str(folder / "tokenizer") if (folder / "tokenizer").is_dir() else "chars"
    with hub_or_cache(source):
        return AutoTokenizer.from_pretrained(source, subfolder="tokenizer")


def masked_lm(config: TrainingConfig, data: TrainingData) -> nn.Module:
    """The masked language model that `init_from` names; ValueError where it does not fit the run.

    Its weights are read as safetensors only.
    """
    source = config.init_from
    if config.noise != "absorbing":
        raise ValueError(f"init_from {source} is a masked language model, which knows noise absorbing alone")
    if config.class_conditional or config.time_conditioning:
        what = "class_conditional" if config.class_conditional else "time_conditioning"
        raise ValueError(f"init_from {source} is a masked language model, which sees tokens alone; leave {what} out")
    try:
        network = AutoModelForMaskedLM.from_pretrained(source, use_safetensors=True, dtype="float32")
    except (ValueError, OSError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"init_from {source} cannot be loaded as a masked language model ({reason[:300]}); give one, such as a "
            "BertForMaskedLM or ModernBertForMaskedLM with safetensors, or a pipeline of text"
        ) from error
    if len(data.tokenizer) > network.config.vocab_size:
        raise ValueError(
            f"init_from {source} knows {network.config.vocab_size:,} tokens, and the tokenizer has "
            f"{len(data.tokenizer):,}; leave --tokenizer out to take the one beside it"
        )
    longest = getattr(network.config, "max_position_embeddings", None)
    if longest is not None and data.sample_shape[0] > longest:
        raise ValueError(f"init_from {source} reads {longest} tokens at most; give --sequence_length {longest}")
    config.is_started = True
    return network
