"""The flags of NVlabs/denoising-diffusion-gan <-> arguments of DDGANGenerator, DDGANDiscriminator
and DDGANScheduler.

A flag that is absent has the default of the reference's train_ddgan.py.
"""

import argparse
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml


Flags = Mapping[str, Any]

# their flag -> our argument
GENERATOR_FLAGS = {
    "image_size": "sample_size",
    "num_channels": "in_channels",
    "num_channels_dae": "model_channels",
    "ch_mult": "channel_mult",
    "num_res_blocks": "num_res_blocks",
    "attn_resolutions": "attention_sizes",
    "nz": "latent_dim",
    "z_emb_dim": "latent_embed_dim",
    "n_mlp": "num_latent_layers",
    "dropout": "dropout",
    "resblock_type": "block_type",
    "progressive_input": "progressive_input",
    "progressive_combine": "progressive_combine",
    "progressive": "progressive_output",
    "fir": "fir",
    "fir_kernel": "fir_kernel",
    "skip_rescale": "skip_rescale",
    "embedding_type": "time_embedding",
    "fourier_scale": "fourier_scale",
    "centered": "centered",
}
DISCRIMINATOR_FLAGS = {
    "image_size": "sample_size",
    "num_channels": "in_channels",
    "ngf": "base_channels",
    "t_emb_dim": "time_embed_dim",
    "kind": "variant",
    "leaky_relu_slope": "negative_slope",
}
SCHEDULER_FLAGS = {
    "num_timesteps": "num_train_timesteps",
    "beta_min": "beta_min",
    "beta_max": "beta_max",
    "use_geometric": "schedule",
}
SCRIPT_DEFAULTS = {"num_latent_layers": 3}  # where train_ddgan.py and the constructor of DDGANGenerator differ

LISTS = ("ch_mult", "attn_resolutions", "fir_kernel")
DECIMALS = ("dropout", "fourier_scale", "beta_min", "beta_max", "leaky_relu_slope")
TEXTS = (
    "resblock_type",
    "progressive",
    "progressive_input",
    "progressive_combine",
    "embedding_type",
    "kind",
    "dataset",
)
# Switches of their script; those of the first line are on, and naming one turns it off.
ON = ("centered", "conditional", "fir", "skip_rescale", "resamp_with_conv")
OFF = ("use_geometric", "not_use_tanh")
KNOWN = {*GENERATOR_FLAGS, *DISCRIMINATOR_FLAGS, *SCHEDULER_FLAGS, *ON, *OFF, "dataset", "nc"}


def read_flags(given: str) -> dict[str, Any]:
    """The flags of a command line of theirs, as in "--image_size 32 --ch_mult 1 2 2 2", or of a
    .json or .yaml file.

    As in their script, a switch without a value turns off what is on and on what is off; ValueError
    for what is no flag or value.
    """
    if not given.strip().startswith("--") and Path(given).suffix in (".json", ".yaml", ".yml"):
        return _read_file(Path(given))
    words: dict[str, list[str]] = {}
    name = None
    for word in shlex.split(given):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            words[name] = [value] if equals else []
        elif name is None:
            raise ValueError(
                f"--flags {given!r} must be --name and values as train_ddgan.py takes them, or a .json or .yaml file"
            )
        else:
            words[name].append(word)
    return {name: _typed(name, values) for name, values in words.items()}


def _read_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"there is no file {path} with flags")
    try:
        flags = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is neither JSON nor YAML: {' '.join(str(error).split())}") from error
    if not isinstance(flags, dict):
        raise ValueError(f"{path} must hold one object with a value for each flag, such as image_size: 32")
    return {
        str(name): _typed(str(name), value if isinstance(value, list) else [value]) for name, value in flags.items()
    }


def flags_of_namespace(args: argparse.Namespace | Flags) -> dict[str, Any]:
    """The flags that their content.pth carries."""
    flags = dict(args if isinstance(args, Mapping) else vars(args))
    flags = {name: list(value) if isinstance(value, tuple) else value for name, value in flags.items()}
    return {
        name: _typed(name, value if isinstance(value, list) else [value])
        for name, value in flags.items()
        if value is not None
    }


def _typed(name: str, values: list) -> Any:
    """The value of a flag from the words, or the values of a file, that were given for it."""
    if name not in KNOWN:
        return values if len(values) != 1 else values[0]  # of their training: not looked at
    if name in ON + OFF:
        text = str(values[0]).lower() if values else str(name in OFF).lower()
        if len(values) > 1 or text not in ("true", "false"):
            raise ValueError(f"--{name} is True or False in train_ddgan.py, not {_joined(values)}")
        return text == "true"
    if not values or (len(values) > 1 and name not in LISTS):
        raise ValueError(f"--{name} takes {'one or more values' if name in LISTS else 'one value'}, not {len(values)}")
    if name in TEXTS:
        return str(values[0])
    kind = float if name in DECIMALS else int
    try:
        numbers = [kind(value) for value in values]
    except (TypeError, ValueError):
        expected = "a number" if kind is float else "whole numbers" if name in LISTS else "a whole number"
        raise ValueError(f"--{name} must be {expected}, not {_joined(values)}") from None
    return numbers if name in LISTS else numbers[0]


def _joined(values: list) -> str:
    return repr(" ".join(map(str, values)))


def generator_config(flags: Flags) -> dict:
    """Arguments of DDGANGenerator for the flags of train_ddgan.py.

    Raises ValueError for flags that the reference itself cannot run.
    """
    if not flags.get("conditional", True):
        raise ValueError(
            "conditional=False (a generator without time) has no counterpart; T > 1 needs conditional=True"
        )
    if flags.get("resblock_type", "biggan") not in ("biggan", "biggan_oneadagn"):
        raise ValueError(
            f"resblock_type={flags['resblock_type']!r} fails in the reference; choose 'biggan' or 'biggan_oneadagn'"
        )
    if flags.get("progressive", "none") not in ("none", "output_skip"):
        raise ValueError(
            f"progressive={flags['progressive']!r} fails in the reference; choose 'none' or 'output_skip'"
        )
    config = {ours: flags[theirs] for theirs, ours in GENERATOR_FLAGS.items() if theirs in flags}
    config = {name: tuple(value) if isinstance(value, list) else value for name, value in config.items()}
    return SCRIPT_DEFAULTS | config | {"tanh": not flags.get("not_use_tanh", False)}


def discriminator_config(flags: Flags) -> dict:
    """Arguments of DDGANDiscriminator for the flags of train_ddgan.py.

    `kind` ("small", "large") may be given; otherwise images of up to 32 pixels take the small one,
    as the script does by dataset. `nc`, the channels of both arguments together, may stand for
    `num_channels`.
    """
    config = {ours: flags[theirs] for theirs, ours in DISCRIMINATOR_FLAGS.items() if theirs in flags}
    config.setdefault("variant", "small" if flags["image_size"] <= 32 else "large")
    return config | ({"in_channels": flags["nc"] // 2} if "nc" in flags else {})


def scheduler_config(flags: Flags) -> dict:
    """Arguments of DDGANScheduler for the flags of train_ddgan.py."""
    return {
        "num_train_timesteps": flags.get("num_timesteps", 4),
        "beta_min": flags.get("beta_min", 0.1),
        "beta_max": flags.get("beta_max", 20.0),
        "schedule": "geometric" if flags.get("use_geometric", False) else "vp",
    }


def scheduler_flags(config: Mapping[str, Any]) -> dict[str, Any]:
    """The flags of train_ddgan.py for the arguments of a DDGANScheduler."""
    flags = {theirs: config[ours] for theirs, ours in SCHEDULER_FLAGS.items()}
    return flags | {"use_geometric": config["schedule"] == "geometric"}
