"""Configuration of training scripts: a dataclass, filled from YAML recipes and the command line."""

from hf_diffusion.config.training import (
    TrainingConfig,
    check_fields,
    config_to_dict,
    config_to_yaml,
    option,
    parse_config,
    read_config,
    save_config,
)


__all__ = [
    "TrainingConfig",
    "check_fields",
    "config_to_dict",
    "config_to_yaml",
    "option",
    "parse_config",
    "read_config",
    "save_config",
]
