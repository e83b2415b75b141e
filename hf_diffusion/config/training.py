"""The settings that all training scripts share; a script adds its own by a subclass.

`parse_config(DDPMConfig)` reads them from `--config recipe.yaml` and the command line, `save_config` writes the file that gives the
same run again. Flags have the names of diffusers' train_unconditional.py where it has one.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

from hf_diffusion.config.options import (
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


@dataclass(kw_only=True)
class TrainingConfig:
    """Data, optimizer, averaging, precision, logging and checkpoints of one training run."""

    # A Hub id, or the digits that scikit-learn carries: a first run needs neither a network nor a folder of images.
    dataset_name: str | None = option(None, "data set on the Hub, or `digits` (8x8, no network needed)", group="data")
    dataset_config_name: str | None = option(None, "configuration of the data set on the Hub, where it has several")
    # Exclusive with dataset_name: a folder that silently lost against a Hub id would train on the wrong images.
    train_data_dir: str | None = option(
        None, "folder of images (folders in it are classes) or of parquet files, or one .parquet or .zip file"
    )
    split: str = option("train", "split of the data set to train on")
    cache_dir: str | None = option(None, "where downloaded data are kept instead of the cache of datasets")
    image_column: str | None = option(None, "column that holds the image; none finds it by its type")
    # The names of the classes come along; whether the network learns classes is a setting of the script.
    label_column: str = option("auto", "column that holds the class; auto finds it by its type, none takes no classes")
    # None keeps the size of the data, which for small data sets is what one wants and for mixed sizes is an error that says so.
    resolution: int | tuple[int, int] | None = option(
        None, "size of the images, 32 or HEIGHTxWIDTH; none keeps the size of the data", at_least=1
    )
    channels: Literal[1, 3, 4] | None = option(None, "channels of the images; none keeps those of the data")
    center_crop: bool = option(True, "crop the middle after resizing the shorter side, instead of a crop at random")
    # Off, since mirrored digits, letters and medical images are wrong images; recipes for photographs turn it on.
    random_flip: bool = option(False, "mirror half of the images, chosen anew in each epoch")
    max_train_samples: int | None = option(None, "use only so many images", at_least=1)
    # A few broken files in a scraped folder are normal; many of them mean that the folder is not what it was taken for.
    max_bad_images: int = option(
        100, "stop when more images than this cannot be read; fewer are skipped and counted", at_least=0
    )
    streaming: bool = option(False, "read the data set while training instead of downloading and preparing it first")
    # Decoded images are kept in memory where they fit, and then worker processes cost more than they bring.
    dataloader_num_workers: int = option(0, "processes that read images ahead of the training", at_least=0)

    output_dir: str = option("runs/model", "folder for checkpoints, samples, logs and the final model", group="run")
    # Without it, a folder that holds another run is refused: nobody loses a finished model to a repeated command.
    overwrite_output_dir: bool = option(False, "begin anew in an output_dir that already holds a run")
    # Never random: every draw of a run follows from the seed and the step, which is what makes a resumed run the same run.
    seed: int = option(0, "seed of the initial weights, the order of the images, timesteps and noise", at_least=0)
    dry_run: bool = option(
        False, "show settings, sizes and a grid of training images, then stop before the first step"
    )

    train_batch_size: int = option(16, "images for each process and micro step", at_least=1, group="optimization")
    gradient_accumulation_steps: int = option(1, "micro steps that make one optimizer step", at_least=1)
    # Exclusive: with both given, one of them would be ignored. Steps are what the schedule and the logs count.
    max_train_steps: int | None = option(None, "length of the training in optimizer steps", at_least=1)
    num_epochs: int | None = option(
        None, "length of the training in passes over the data, instead of max_train_steps", at_least=1
    )
    # The rate of the published U-Nets at batch 128 and above; small networks on small images take up to 1e-3.
    learning_rate: float = option(1e-4, "highest learning rate", above=0)
    # Constant and then down to 0: the decay takes out the noise that a constant rate leaves in the weights, and the length of
    # the run need not be known until the decay begins.
    lr_scheduler: Literal["constant", "linear", "cosine", "trapezoid"] = option(
        "trapezoid", "shape of the learning rate after the warm-up; trapezoid is constant, then linear to 0"
    )
    lr_warmup_steps: int | None = option(
        None,
        "optimizer steps in which the learning rate rises from 0; none is 5 % of the run, at most 500",
        at_least=0,
    )
    lr_decay_steps: int | None = option(
        None, "last steps over which trapezoid decays; none is 30 % of the run", at_least=1
    )
    adam_beta1: float = option(0.9, "decay of AdamW's mean of the gradients", at_least=0, below=1)
    adam_beta2: float = option(0.999, "decay of AdamW's mean of the squared gradients", at_least=0, below=1)
    # 0 as in the published recipes: the average over the weights already keeps the sampled network smooth.
    adam_weight_decay: float = option(0.0, "weight decay of AdamW", at_least=0)
    adam_epsilon: float = option(1e-8, "epsilon of AdamW", above=0)
    max_grad_norm: float | None = option(1.0, "norm to which gradients are clipped; none does not clip", above=0)
    # One bad batch must not end a run of days, while a diverged run must not go on for days.
    max_nonfinite_steps: int = option(
        10, "stop after so many steps in a row whose loss is not finite; fewer are skipped", at_least=1
    )

    # Samples of the averaged weights are much better than those of the last ones, at the price of one copy of the weights.
    use_ema: bool = option(
        True, "keep an exponential moving average of the weights, and sample and export from it", group="averaging"
    )
    ema_max_decay: float = option(
        0.9999, "highest decay of the average; a short run wants less, such as 0.999", at_least=0, below=1
    )
    # The decay at step n is 1 - (1 + n / inv_gamma) ** -power, so that the first, random weights are forgotten soon.
    ema_inv_gamma: float = option(1.0, "steps after which the warm-up of the average takes hold", above=0)
    ema_power: float = option(
        0.75, "exponent of that warm-up; 2/3 for a million steps and more, 3/4 for fewer", above=0, at_most=1
    )

    # bf16 needs no loss scaling and the accelerators of recent years have it; fp16 is for those that do not.
    mixed_precision: Literal["no", "fp16", "bf16"] = option(
        "no", "precision of the network's arithmetic", group="speed and memory"
    )
    allow_tf32: bool = option(False, "let float32 products use TF32 on NVIDIA GPUs: faster, with 10 bits of mantissa")
    gradient_checkpointing: bool = option(
        False, "recompute activations in the backward pass: less memory for one more forward pass"
    )
    torch_compile: bool = option(False, "compile the network: a minute or more at the start, faster steps afterwards")
    channels_last: bool = option(
        False, "store images channel by channel last: for GPUs with half precision; slower on CPUs"
    )

    # Several at once are allowed. Metrics always go to output_dir/metrics.jsonl too, so none loses nothing.
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = option(
        (), "experiment trackers, separated by commas", group="logging and checkpoints"
    )
    logging_steps: int = option(50, "write metrics after so many optimizer steps", at_least=1)
    sample_steps: int | None = option(
        1000, "draw a grid of samples after so many optimizer steps; none draws none", at_least=1
    )
    num_sample_images: int = option(64, "images in such a grid", at_least=1)
    # What is measured is a setting of the script: a loss on held-out images, distances of samples to real ones.
    eval_steps: int | None = option(
        1000,
        "measure after so many optimizer steps, where there is something to measure; none only at the end",
        at_least=1,
    )
    best_metric: str | None = option(
        None, "keep the model with the best value of this measure, by its name in metrics.jsonl, in output_dir/best"
    )
    checkpointing_steps: int = option(1000, "write a checkpoint after so many optimizer steps", at_least=1)
    # Two: a full disk ends a run, and the one before the newest is there when the newest proves unusable.
    checkpoints_total_limit: int | None = option(
        2, "keep only so many of the newest checkpoints; none keeps all", at_least=1
    )
    resume_from_checkpoint: str | None = option(
        None, "`latest`, the folder of a checkpoint to go on from, or `hub` for the one that was pushed"
    )

    push_to_hub: bool = option(
        False, "share the model on the Hub; the token is that of `hf auth login` or HF_TOKEN", group="the Hub"
    )
    hub_model_id: str | None = option(None, "repository, user/name; none takes the name of output_dir")
    # Training waits for no push in any case: what does not get through stays in output_dir/outbox.
    hub_strategy: Literal["end", "every_save", "checkpoint"] = option(
        "end", "push at the end, or with every save, or with every save and the state to resume from"
    )
    # Private, since publishing cannot be undone, and samples may show more of the training data than one thinks.
    hub_public: bool = option(False, "let everybody see a repository that this run creates")
    hub_license: str | None = option(
        None, "licence of the weights, for the card: an id of the Hub such as mit or cc-by-4.0; none states none"
    )

    def validate(self) -> None:
        """ValueError, in one sentence, at the first setting that is out of range or contradicts another."""
        check_fields(self)
        self._check_exclusive("dataset_name", "train_data_dir", "the data to train on")
        self._check_exclusive("max_train_steps", "num_epochs", "how long to train")
        if self.streaming and self.num_epochs:
            raise ValueError(
                "num_epochs needs the number of images, which a stream does not tell; give max_train_steps instead"
            )
        if self.dataset_config_name and not self.dataset_name:
            raise ValueError(
                f"dataset_config_name {self.dataset_config_name!r} needs dataset_name, the data set that it belongs to"
            )
        if self.overwrite_output_dir and self.resume_from_checkpoint:
            raise ValueError(
                "overwrite_output_dir deletes what resume_from_checkpoint would go on from; give one of them"
            )
        if not self.output_dir:
            raise ValueError("output_dir is empty; give a folder")
        if self.resume_from_checkpoint == "hub" and not self.hub_model_id and not self.push_to_hub:
            raise ValueError("resume_from_checkpoint hub needs hub_model_id, the repository with the checkpoint")
        if self.max_train_steps and (self.lr_warmup_steps or 0) > self.max_train_steps:
            raise ValueError(
                f"lr_warmup_steps {self.lr_warmup_steps} is longer than the run of {self.max_train_steps} steps; give fewer"
            )

    def _check_exclusive(self, one: str, other: str, what: str) -> None:
        given = [name for name in (one, other) if getattr(self, name) is not None]
        if not given:
            raise ValueError(f"give --{one} or --{other}: {what}")
        if len(given) == 2:
            raise ValueError(
                f"{one} {getattr(self, one)!r} and {other} {getattr(self, other)!r} both say {what}; give one, and `none` for the other"
            )

    def data_arguments(self) -> dict[str, Any]:
        """The arguments of `load_images` for the data of this run."""
        names = [
            "dataset_name",
            "dataset_config_name",
            "train_data_dir",
            "split",
            "image_column",
            "resolution",
            "center_crop",
        ]
        names += ["random_flip", "channels", "streaming", "cache_dir", "max_train_samples", "max_bad_images", "seed"]
        label_column = None if self.label_column == "auto" else self.label_column
        return {**{name: getattr(self, name) for name in names}, "label_column": label_column}

    def total_steps(self, images: int, processes: int) -> int:
        """Optimizer steps of the run; `num_epochs` passes over `images` are rounded up to whole steps."""
        if self.max_train_steps is not None:
            return self.max_train_steps
        return math.ceil(self.num_epochs * images / self.global_batch(processes))

    def global_batch(self, processes: int) -> int:
        """Images of one optimizer step over all processes and micro steps."""
        return self.train_batch_size * self.gradient_accumulation_steps * processes


@dataclass(kw_only=True)
class GenerativeTrainingConfig(TrainingConfig):
    """What trainings of models that draw images share beyond that: how their samples are measured while they train."""

    # Nothing by default: drawing a thousand images costs as much as hundreds of optimizer steps.
    eval_metrics: tuple[Literal["fd", "kd", "pr", "label_accuracy"], ...] = option(
        (),
        "measures of samples at every eval_steps: Frechet and kernel distance, precision and recall, label accuracy",
        group="evaluation",
    )
    # A distance needs more images than the features have dimensions, and its value holds for this number only.
    eval_num_images: int = option(1000, "images drawn for eval_metrics, by all processes together", at_least=1)
    eval_features: str = option(
        "pixels",
        "network that images are compared in: pixels, inception, trained (a small classifier of the data), or a file, as in hf-diffusion evaluate",
    )
    eval_batch_size: int = option(64, "images that a process draws or measures at a time", at_least=1)

    def validate(self) -> None:
        super().validate()
        if self.eval_metrics and self.streaming:
            raise ValueError(
                "eval_metrics compare with all training images, which a stream does not hold; leave one of the two out, and "
                "measure the saved pipeline by hf-diffusion evaluate"
            )
