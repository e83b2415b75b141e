"""Other samples of the data that a run trains on: without augmentation, from another split."""

from collections.abc import Mapping
from typing import Any

from hf_diffusion.data.kept import KeptSamples
from hf_diffusion.data.loading import load_data
from hf_diffusion.data.protocol import TrainingData
from hf_diffusion.data.selection import shared_rows


# Of a stream that is held out.
HELD_OUT = 4096


def load_unaugmented(arguments: Mapping[str, Any], data: TrainingData, split: str | None = None) -> TrainingData:
    """The samples of `data`, or of another split in its form, without augmentation.

    `arguments` are those of `load_data` that gave `data`. Of another split all samples are taken,
    of a stream the first HELD_OUT, and its classes get the numbers that they have in `data`.
    ValueError where the split is of another kind, has other classes, or shares samples with `data`.
    """
    asked = {**arguments, **data.form()}
    if split is not None:
        asked |= {"split": split, "max_train_samples": None}
    other = load_data(**asked)
    if split is not None and other.num_samples is None:
        other = KeptSamples(other, HELD_OUT)
    make_same_kind(other, data, f"split {asked['split']!r}")
    if split is not None:
        _refuse_shared_rows(other, data, split)
    return other


def _refuse_shared_rows(other: TrainingData, data: TrainingData, split: str) -> None:
    if data.split_rows is None or other.split_rows is None or data.split_rows[0] != other.split_rows[0]:
        return
    shared = shared_rows(data.split_rows[1], other.split_rows[1])
    if shared == 0:
        return
    is_stream = data.num_samples is None
    what = "rows" if is_stream else f"{shared:,} of its {len(other):,} samples"
    first, second = ("train[1000:]", "train[:1000]") if is_stream else ("train[:90%]", "train[90%:]")
    raise ValueError(
        f"split {split!r} shares {what} with the training; hold out a part that is not trained on, such as split "
        f"{first} and eval_split {second}"
    )


def make_same_kind(other: TrainingData, data: TrainingData, what: str) -> None:
    """Number the classes of `other` as those of `data`, matched by name.

    ValueError where a network that is trained on `data` cannot be given `other`; `what` says what
    `other` is.
    """
    if (other.kind, other.sample_shape) != (data.kind, data.sample_shape):
        raise ValueError(
            f"{what} holds {other.kind} of shape {tuple(other.sample_shape)}, the training {data.kind} of shape "
            f"{tuple(data.sample_shape)}; give data of the same form"
        )
    if (other.class_names is None) != (data.class_names is None):
        ours, theirs = (f"the classes {d.class_names}" if d.class_names else "no classes" for d in (other, data))
        raise ValueError(f"{what} has {ours} and the training {theirs}; give a split of the same classes")
    if data.class_names is not None:
        other.use_classes(data.class_names)
