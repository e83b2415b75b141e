"""Groups of options that several training scripts mix into their configuration.

Each checks its own.
"""

import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal

from hf_diffusion.config import preset
from hf_diffusion.config.options import option
from hf_diffusion.config.preset import Choice, Circumstances
from hf_diffusion.config.run_options import check_exclusive


# Endings that say that a name is a path.
FILES = (".zip", ".tar", ".gz", ".parquet", ".arrow", ".npz", ".npy", ".txt", ".jsonl", ".json", ".csv", ".tsv")
FILES += (".png", ".jpg", ".jpeg", ".webp")


@dataclass(kw_only=True)
class DataOptions:
    """The data to train on: images, or points of the plane."""

    # The fingerprint of the data ties a checkpoint to them.
    settings_are_tied: ClassVar[bool] = False
    # With the columns, whose names belong to the data.
    alternatives: ClassVar[tuple] = (
        (
            ("data", "image_column", "label_column"),
            ("dataset_name", "dataset_config_name", "image_column", "label_column"),
            ("train_data_dir", "image_column", "label_column"),
        ),
    )

    # Sets that need neither a file nor a network; those of the data room, as a test says.
    built_in: ClassVar[tuple[str, ...]] = ("digits", "eight_gaussians", "swiss_roll", "checkerboard")

    # What it names is put into one of the two below, which are what a run records.
    data: str | None = option(
        None,
        "the data to train on: a folder of images (folders in it are classes), a .parquet or .zip file, a data set "
        "on the Hub as user/name, or one of the built-in ones such as digits and swiss_roll",
        group="data",
        is_path=True,
        often=True,
    )
    # A Hub id, or the digits that scikit-learn carries: a first run needs neither a network nor a
    # folder of images.
    dataset_name: str | None = option(None, "data set on the Hub, or `digits` (8x8, no network needed)", is_path=True)
    dataset_config_name: str | None = option(None, "configuration of the data set on the Hub, where it has several")
    # Exclusive with dataset_name: a folder that silently lost against a Hub id would train on the
    # wrong images.
    train_data_dir: str | None = option(
        None,
        "folder of images (folders in it are classes) or of parquet files, or one .parquet or .zip file",
        is_path=True,
    )
    split: str = option("train", "split of the data set to train on")
    cache_dir: str | None = option(
        None, "where downloaded data are kept instead of the cache of datasets", is_path=True
    )
    image_column: str | None = option(None, "column that holds the image; none finds it by its type")
    # The names of the classes come along; whether the network learns classes is a setting of the
    # script.
    label_column: str = option("auto", "column that holds the class; auto finds it by its type, none takes no classes")
    # None keeps the size of the data, which for small data sets is what one wants and for mixed
    # sizes is an error that says so.
    resolution: int | tuple[int, int] | None = option(
        None, "size of the images, 32 or HEIGHTxWIDTH; none keeps the size of the data", at_least=1, often=True
    )
    channels: Literal[1, 3, 4] | None = option(None, "channels of the images; none keeps those of the data")
    # What lies hidden under full transparency is no colour of the image.
    background: str = option(
        "white", "colour that transparent images are laid on where channels is not 4, by name or as #rrggbb"
    )
    center_crop: bool = option(True, "crop the middle after resizing the shorter side, instead of a crop at random")
    # Off, since mirrored digits, letters and medical images are wrong images; recipes for
    # photographs turn it on.
    random_flip: bool = option(False, "mirror half of the images, chosen anew in each epoch", often=True)
    max_train_samples: int | None = option(
        None,
        "use only so many images, spread over the set so that they show its classes; of a stream the first ones",
        at_least=1,
    )
    # A few broken files in a scraped folder are normal; many of them mean that the folder is not
    # what it was taken for.
    max_bad_images: int = option(
        100, "stop when more images than this cannot be read; fewer are skipped and counted", at_least=0
    )
    streaming: bool = option(False, "read the data set while training instead of downloading and preparing it first")

    def check(self) -> None:
        """ValueError for settings of the data that contradict each other."""
        if self.data is not None:
            place_data(self)
        if self.dataset_name is None and self.train_data_dir is None:
            raise ValueError(
                "give the data to train on: --data with a folder of images, a .parquet or .zip file, or user/name on "
                "the Hub (or --dataset_name or --train_data_dir)"
            )
        check_exclusive(self, "dataset_name", "train_data_dir", "the data to train on")
        check_length_of_stream(self)
        if self.dataset_config_name and not self.dataset_name:
            raise ValueError(
                f"dataset_config_name {self.dataset_config_name!r} needs dataset_name, the data set that it belongs to"
            )

    def data_arguments(self) -> dict[str, Any]:
        """The arguments of `load_data` for the data of this run."""
        names = [field.name for field in fields(DataOptions) if field.name != "data"]
        label_column = None if self.label_column == "auto" else self.label_column
        return {**{name: getattr(self, name) for name in names}, "label_column": label_column, "seed": self.seed}


def check_length_of_stream(config: Any) -> None:
    """ValueError for passes over data that nobody has counted."""
    if config.streaming and config.num_epochs:
        raise ValueError(
            "num_epochs needs the number of samples, which a stream does not tell; give max_train_steps instead"
        )


def place_data(config: Any) -> None:
    """Put what `data` names where it belongs: a path that is there into `train_data_dir`, else a
    name into `dataset_name`.
    """
    for name in ("dataset_name", "train_data_dir"):
        if getattr(config, name) is not None:
            raise ValueError(
                f"data {config.data!r} and {name} {getattr(config, name)!r} both say the data to train on; give one"
            )
    built_in = getattr(config, "built_in", ())
    near = _near(config.data, built_in)
    # A mistyped path in a folder that is here rather than somebody's repository.
    is_path = near and os.path.isdir(os.path.expanduser(os.path.dirname(config.data) or "?"))
    if os.path.exists(os.path.expanduser(config.data)):
        config.train_data_dir = config.data
    elif config.data in built_in or (_may_be_on_the_hub(config.data) and not is_path):
        config.dataset_name = config.data
    else:
        meant = f"did you mean {' or '.join(near)}? Else give a path" if near else "give one"
        built = f", one of {', '.join(built_in)}" if built_in else ""
        is_id = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", config.data)
        named = f"; --dataset_name {config.data} asks the Hub for it all the same" if is_id else ""
        raise ValueError(
            f"data {config.data!r} is no folder or file here; {meant}{built}, or user/name of a data set on the "
            f"Hub{named}"
        )
    config.data = None


def _may_be_on_the_hub(name: str) -> bool:
    """Whether it has the form user/name, and no ending of a file."""
    is_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)
    return is_id is not None and os.path.splitext(name)[1].lower() not in FILES


def _near(name: str, built_in: Sequence[str]) -> list[str]:
    """Up to three paths and built-in names that a mistyped one may stand for."""
    folder, last = os.path.split(os.path.expanduser(name.rstrip("/")))
    try:
        there = [entry for entry in os.listdir(folder or ".") if not entry.startswith(".")]
    except OSError:
        there = []
    names = {entry.lower(): os.path.join(folder, entry) for entry in there}
    names |= {} if folder else {entry: entry for entry in built_in}
    return [names[close] for close in difflib.get_close_matches(last.lower(), names, n=3, cutoff=0.6)]


@dataclass(kw_only=True)
class LatentOptions:
    """Whether the network learns images, or latents of them; stands before DataOptions."""

    # The fingerprint of the latents ties a checkpoint to the autoencoder, wherever it is.
    settings_are_tied: ClassVar[bool] = False

    vae: str | None = option(
        None,
        "learn the latents of this autoencoder, a folder or Hub id, as train_autoencoder.py leaves one; they are "
        "computed once and kept in HF_DIFFUSION_CACHE",
        group="latents",
        is_path=True,
    )
    vae_posterior: Literal["sample", "mean"] = option(
        "sample", "sample Gaussian latents anew in each epoch, as the reference does, or take their means"
    )

    def data_arguments(self) -> dict[str, Any]:
        """The arguments of `load_data` for the data of this run."""
        return {**super().data_arguments(), "vae": self.vae, "vae_posterior": self.vae_posterior}


@dataclass(kw_only=True)
class ClassOptions:
    """Whether the network learns the classes of the data."""

    class_conditional: bool = option(
        False, "learn the classes of the data, so that samples can be asked for by class", group="method", often=True
    )

    def auto_settings(self, circumstances: Circumstances) -> dict[str, Choice]:
        """Learn the classes where there are enough images of each."""
        guided = getattr(self, "label_dropout", 0) > 0
        return {"classes": preset.classes(circumstances, guided), **super().auto_settings(circumstances)}

    def num_class_embeds(self, data: Any) -> int | None:
        """How many classes the network knows.

        ValueError for data without labels, None if it is to know none.
        """
        if self.class_conditional and not data.num_classes:
            raise ValueError(
                f"class_conditional is set, but {data.name} has no labels; "
                + (
                    data.why_no_classes
                    or "put the images of each class into a folder of its own, name the column by --label_column, or "
                    "leave it out"
                )
            )
        return data.num_classes if self.class_conditional else None


@dataclass(kw_only=True)
class MeasureOptions:
    """What is measured while a generative model trains: samples, and the loss on held-out data."""

    settings_are_tied: ClassVar[bool] = False

    # Nothing by default: drawing a thousand images costs as much as hundreds of optimizer steps.
    eval_metrics: tuple[Literal["fd", "kd", "pr", "label_accuracy"], ...] = option(
        (),
        "measures of samples at every eval_steps: Frechet and kernel distance, precision and recall, label accuracy",
        group="evaluation",
        often=True,
    )
    # A distance needs more images than the features have dimensions, and its value holds for this
    # number only.
    eval_num_images: int = option(1000, "images drawn for eval_metrics, by all processes together", at_least=1)
    eval_features: str = option(
        "auto",
        "network that images are compared in: pixels, imagenet, inception, trained (a small classifier of the data), "
        "or a file, as in hf-diffusion evaluate; auto is pixels where they are few enough, else trained",
        is_path=True,
    )
    eval_batch_size: int = option(64, "images that a process draws or measures at a time", at_least=1)
    # The training loss falls for a model that learns its images by heart, too; this one rises.
    eval_split: str | None = option(
        None, "split whose loss is measured at every eval_steps, such as train[90%:] or test"
    )

    def check(self) -> None:
        """ValueError for measures that a stream does not allow."""
        if self.eval_metrics and self.streaming:
            raise ValueError(
                "eval_metrics compare with all training images, which a stream does not hold; leave one of the two "
                "out, and measure the saved pipeline by hf-diffusion evaluate"
            )


@dataclass(kw_only=True)
class NoiseScheduleOptions:
    """The Gaussian process of a diffusion model."""

    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"] = option(
        "squaredcos_cap_v2", "noise schedule; squaredcos_cap_v2 is the cosine schedule", group="method"
    )
    beta_start: float = option(0.0001, "first beta of the linear schedules", above=0, below=1)
    beta_end: float = option(0.02, "last beta of the linear schedules", above=0, below=1)
    ddpm_num_steps: int = option(1000, "timesteps of the process, T", at_least=1)
    rescale_betas_zero_snr: bool = option(False, "end the schedule in pure noise; needs v_prediction or sample")

    def noise_schedule(self) -> dict[str, Any]:
        """The scheduler's arguments that say what a timestep means."""
        schedule = {
            "num_train_timesteps": self.ddpm_num_steps,
            "beta_schedule": self.beta_schedule,
            "rescale_betas_zero_snr": self.rescale_betas_zero_snr,
        }
        if self.beta_schedule != "squaredcos_cap_v2":
            schedule |= {"beta_start": self.beta_start, "beta_end": self.beta_end}
        return schedule


@dataclass(kw_only=True)
class UNetOptions:
    """The shape of a U-Net, or of its half that classifies."""

    model_channels: int = option(64, "width of the U-Net's first level", at_least=1, group="network", often=True)
    channel_mult: tuple[float, ...] | None = option(
        None, "width of each level in units of model_channels; none goes by the size", above=0
    )
    num_res_blocks: int = option(2, "residual blocks a level", at_least=1)
    attention_resolutions: tuple[int, ...] | None = option(
        None, "downsampling factors with attention; none takes the lowest level", at_least=1
    )
    num_head_channels: int = option(32, "width of an attention head", at_least=1)
    norm_num_groups: int = option(32, "groups of the group norms; must divide every width", at_least=1)
    dropout: float = option(0.0, "dropout in the residual blocks", at_least=0, below=1)
    # 2x2 pixels become channels at the network's two ends: a quarter of the positions, several
    # times the speed.
    patch_size: int = option(1, "side of the pixel patches that the network works on", at_least=1, often=True)

    def auto_settings(self, circumstances: Circumstances) -> dict[str, Choice]:
        """The network by the size of the images and the machine."""
        patch = self.patch_size if "patch_size" in self.given else None
        others = super().auto_settings(circumstances)
        if any(choice.settings.get("prediction_type") == "sample" for choice in others.values()):
            # Patches leave no dots on a flat ground where x_0 is predicted (docs/training.md).
            circumstances = replace(circumstances, ground=0.0)
        return {"network": preset.network(circumstances, patch), **others}

    def reduce(self, sample_shape: tuple[int, ...]) -> str | None:
        if "model_channels" not in self.given and self.model_channels // 2 >= preset.LEAST_WIDTH:
            self.model_channels //= 2
            return f"model_channels {self.model_channels}"
        is_free = not {"patch_size", "channel_mult"} & self.given
        if is_free and self.patch_size == 1 and preset.takes_patches(sample_shape, 2):
            self.patch_size, self.channel_mult = 2, (1, 2)
            return "patch_size 2"
        return None

    def preset_settings(self, sample_shape: tuple[int, ...]) -> dict[str, Any]:
        """Of fast: half the width, on patches where the sides allow it, which is a small part of
        the work.
        """
        settings = super().preset_settings(sample_shape)
        if self.preset == "fast":
            even = (
                len(sample_shape) == 3
                and not any(side % 4 for side in sample_shape[1:])
                and min(sample_shape[1:]) > 16
            )
            return {**settings, "model_channels": 32, "num_res_blocks": 1, "patch_size": 2 if even else 1}
        return {**settings, "model_channels": 64, "num_res_blocks": 2, "patch_size": 1}

    def mlp_shape(self, sample_shape: tuple[int, ...]) -> dict[str, Any]:
        """The arguments of a network for points of a shape (D,): as wide as model_channels, as deep
        as its blocks.
        """
        return {
            "in_channels": sample_shape[0],
            "model_channels": self.model_channels,
            "num_res_blocks": self.num_res_blocks,
            "dropout": self.dropout,
        }

    def unet_shape(self, sample_shape: tuple[int, ...]) -> dict[str, Any]:
        """The arguments of a U-Net for images of a shape (C, H, W)."""
        channels, *size = sample_shape
        channel_mult = self.channel_mult or levels_for(min(size) // self.patch_size)
        lowest = (2 ** (len(channel_mult) - 1),)
        return {
            "sample_size": tuple(size),
            "in_channels": channels,
            "model_channels": self.model_channels,
            "channel_mult": channel_mult,
            "num_res_blocks": self.num_res_blocks,
            "attention_resolutions": lowest if self.attention_resolutions is None else self.attention_resolutions,
            "num_head_channels": self.num_head_channels,
            "norm_num_groups": self.norm_num_groups,
            "dropout": self.dropout,
            "patch_size": self.patch_size,
        }


def levels_for(side: int) -> tuple[float, ...]:
    """Width multipliers for images of so many positions a side: levels down to 4 or 8 positions, as
    ADM has them.
    """
    for smallest, multipliers in (
        (192, (1, 1, 2, 2, 4, 4)),
        (96, (1, 1, 2, 3, 4)),
        (48, (1, 2, 3, 4)),
        (20, (1, 2, 2)),
    ):
        if side >= smallest:
            return multipliers
    return (1, 2)
