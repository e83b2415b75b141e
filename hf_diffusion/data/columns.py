"""The columns of a table that hold images and classes, and the classes of a whole set."""

import re
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np

from hf_diffusion.data.errors import BadData
from hf_diffusion.data.listing import counted


def find_image_column(features: datasets.Features, asked: str | None) -> str:
    """Return the column of type Image, or one of encoded bytes; ValueError without a single one."""
    _check_column(features, asked, "image_column")
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    images = images or [name for name, feature in features.items() if _is_encoded(feature)]
    if asked is not None:
        if asked not in images and not _is_encoded(features[asked]):
            raise ValueError(
                f"column {asked!r} is of type {features[asked]}, which is no image; "
                + (f"pass --image_column {images[0]}" if images else "store the images as files or encoded bytes")
            )
        return asked
    if len(images) > 1 and "image" not in images:
        raise ValueError(f"the data set has several image columns {images}; pass --image_column with one of them")
    if not images:
        raise ValueError(_no_image_column(features))
    return "image" if "image" in images else images[0]


def _no_image_column(features: datasets.Features) -> str:
    """What is there instead, and what is taken."""
    lists = [name for name, feature in features.items() if isinstance(feature, (datasets.List, list))]
    texts = [name for name in ("image", "file_name", "path") if getattr(features.get(name), "dtype", "") == "string"]
    if lists:
        found = f"column {lists[0]!r} holds lists, and a row holds one image"
    elif texts:
        found = f"column {texts[0]!r} holds text; pass the folder with the files instead of their names"
    else:
        found = f"its columns are {list(features)}"
    return f"the data set has no image column: {found}; an image is an encoded file (PNG, JPEG, ...) stored as bytes"


def as_images(dataset: Any, column: str) -> Any:
    """The data set with the column as undecoded images, {"bytes", "path"}."""
    return dataset.cast_column(column, datasets.Image(decode=False))


def find_label_column(features: datasets.Features, asked: str | None) -> str | None:
    """Return the column of type ClassLabel, else another one called `label` or `labels`, else None.

    `asked` = "none" means no labels. ValueError if that column cannot hold classes or if there is a
    choice to make.
    """
    if asked == "none" and "none" not in features:
        return None
    _check_column(features, asked, "label_column")
    if asked is not None:
        if not _holds_classes(features[asked]):
            raise ValueError(
                f"column {asked!r} is of type {features[asked]}; labels are a ClassLabel, integer, bool or string "
                "column, so pass another --label_column, or `none` to train without labels"
            )
        return asked
    labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    labels = labels or [name for name in ("label", "labels") if name in features and _holds_classes(features[name])]
    if len(labels) > 1 and "label" not in labels:
        raise ValueError(
            f"the data set has several label columns {labels}; pass --label_column with one of them, "
            "or `none` to train without labels"
        )
    return ("label" if "label" in labels else labels[0]) if labels else None


def label_remarks(features: datasets.Features, found: str | None, asked: str | None) -> list[str]:
    """Why a column that is called as if it held labels is not taken."""
    if found is not None or asked is not None:
        return []
    named = [name for name in ("label", "labels", "class") if name in features]
    return [
        f"no classes: column {name!r} is of type {features[name]}; labels are integers, bools or strings"
        if not _holds_classes(features[name])
        else f"no classes: name column {name!r} by --label_column to train with it"
        for name in named[:1]
    ]


def _check_column(features: datasets.Features, asked: str | None, option: str) -> None:
    if asked is None or asked in features:
        return
    finder = find_image_column if option == "image_column" else find_label_column
    try:
        advice = finder(features, None)
    except ValueError:
        advice = None
    raise ValueError(
        f"column {asked!r} is not in the data set; its columns are {list(features)}; "
        + (f"pass --{option} {advice}" if advice else f"leave --{option} out or choose one of them")
    )


def _is_encoded(feature: Any) -> bool:
    if isinstance(feature, dict):
        return "bytes" in feature and set(feature) <= {"bytes", "path"}
    return isinstance(feature, (datasets.Image, datasets.Value)) and feature.dtype in (
        "PIL.Image.Image",
        "binary",
        "large_binary",
    )


def _holds_classes(feature: Any) -> bool:
    if isinstance(feature, datasets.ClassLabel):
        return True
    return isinstance(feature, datasets.Value) and bool(re.match(r"u?int\d+$|bool$|(large_)?string$", feature.dtype))


def read_labels(dataset: datasets.Dataset, column: str) -> tuple[np.ndarray, list[str]]:
    """Return the class ids (int64, one for each row) and the class names of a whole set.

    Names are those of a ClassLabel column, "0".."n-1" for integers, and the sorted values of a
    string column. ValueError names the first row without a label or with an id outside 0..n-1.
    """
    values = dataset.select_columns([column]).with_format("arrow")[:][column].combine_chunks()
    if values.null_count:
        row = int(np.argmax(np.asarray(values.is_null())))
        raise ValueError(f"row {row} has no label in column {column!r}; {_UNLABELLED}")
    labels = values.to_numpy(zero_copy_only=False)
    if labels.dtype.kind not in "iub":
        names = sorted(set(labels.tolist()))
        if not names[0].strip():
            row = next(row for row, label in enumerate(labels.tolist()) if not label.strip())
            raise ValueError(f"row {row} has an empty label in column {column!r}; {_UNLABELLED}")
        ids = {name: position for position, name in enumerate(names)}
        return np.array([ids[label] for label in labels.tolist()], np.int64), names
    labels = labels.astype(np.int64)
    feature = dataset.features[column]
    if isinstance(feature, datasets.ClassLabel):
        names = list(feature.names)
    else:
        found = np.unique(labels)
        names = [str(value) for value in range(len(found))]
        if labels.min() >= 0 and found[-1] != len(found) - 1:
            # An id may be any number: no more of them are written out than there are rows.
            missing = np.setdiff1d(np.arange(min(int(found[-1]), len(found) + 5)), found)[:5].tolist()
            raise ValueError(
                f"column {column!r} has ids up to {found[-1]} without {missing}; ids must be 0..n-1, "
                "so renumber them or store the class names as strings"
            )
    for row in np.flatnonzero((labels < 0) | (labels >= len(names)))[:1]:
        check_label(int(labels[row]), names, column, f"row {row}")
    return labels, names


def stream_classes(features: datasets.Features, column: str) -> list[str]:
    """The class names of a stream, which only a ClassLabel column tells; ValueError for others."""
    if not isinstance(features[column], datasets.ClassLabel):
        raise ValueError(
            f"column {column!r} is of type {features[column]}, whose classes are unknown before the stream was read; "
            "load with streaming=False, choose a ClassLabel column, or pass --label_column none"
        )
    return list(features[column].names)


def class_remarks(labels: np.ndarray | None, names: Sequence[str] | None, split: str) -> list[str]:
    """Classes without images, and names that differ in case or spaces only."""
    if labels is None:
        return []
    counts = np.bincount(labels, minlength=len(names))
    empty = [f"{name!r}" for name, count in zip(names, counts) if not count]
    remarks = [f"of {len(names)} classes, {counted(empty, 'has', 'have')} no image in {split}"] if empty else []
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(" ".join(name.split()).lower(), []).append(name)
    twins = [" and ".join(map(repr, found)) for found in alike.values() if len(found) > 1]
    return remarks + [f"classes differ in case or spaces only: {', '.join(twins[:3])}"] * bool(twins)


_UNLABELLED = "label every row, choose another --label_column, or pass --label_column none to train without labels"


def check_label(label: Any, names: list[str], column: str, where: str) -> int:
    """Return the class id if it is one of 0..n-1; ValueError names the row otherwise."""
    if not isinstance(label, (int, np.integer)) or not 0 <= label < len(names):
        raise BadData(
            f"{where} has label {label} in column {column!r}, allowed are 0..{len(names) - 1}; {_UNLABELLED}"
        )
    return int(label)
