"""Opening a set of labelled images through `datasets`, and finding its image and label columns."""

import contextlib
import io
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow.dataset
from PIL import Image

from hf_diffusion.data.decoding import BadData


SPLIT_FOLDERS = {"train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval"}
AnyDataset = datasets.Dataset | datasets.IterableDataset


class Source(NamedTuple):
    """An opened set: its rows, the name to show, and a remark on what was done to the data on the way."""

    dataset: AnyDataset
    name: str
    remark: str | None = None


def open_source(
    dataset_name: str | None,
    dataset_config_name: str | None,
    train_data_dir: str | None,
    split: str,
    streaming: bool,
    cache_dir: str | None,
) -> Source:
    """Open a Hub id, `digits`, a folder of images or of parquet files, a .parquet or a .zip file.

    Beware: `datasets` counts downloads over the network even for local files, unless HF_UPDATE_DOWNLOAD_COUNTS=0.
    """
    if (dataset_name is None) == (train_data_dir is None):
        raise ValueError(
            f"got dataset_name={dataset_name!r} and train_data_dir={train_data_dir!r}; pass exactly one of them"
        )
    if dataset_name == "digits":
        dataset = _digits(split)
        return Source(
            dataset.to_iterable_dataset() if streaming else dataset,
            "digits",
            "grey levels 0..16 of scikit-learn's digits are scaled to round(level * 255 / 16)",
        )
    name = dataset_name if dataset_name is not None else str(train_data_dir)
    options = {"split": split, "streaming": streaming, "cache_dir": cache_dir}
    with _one_sentence(name):
        if dataset_name is not None:
            return Source(datasets.load_dataset(dataset_name, dataset_config_name, **options), name)
        return Source(_open_local(Path(train_data_dir).expanduser(), options), Path(train_data_dir).name or name)


@contextlib.contextmanager
def _one_sentence(name: str) -> Iterator[None]:
    """Turn what `datasets` raises into one sentence that names the data and says what to do."""
    try:
        yield
    except datasets.exceptions.DatasetNotFoundError as error:
        raise ValueError(
            f"data set {name!r} does not exist on the Hub or is not accessible; check the id, run `hf auth login` "
            "if it is private or gated, or pass train_data_dir for local images"
        ) from error
    except ConnectionError as error:
        raise ConnectionError(
            f"the Hub cannot be reached for data set {name!r} and the cache does not hold it; connect to the network, "
            "pass train_data_dir for local images, or use dataset_name 'digits'"
        ) from error
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError, zipfile.BadZipFile) as error:
        if isinstance(error, ValueError) and str(error).startswith(("train_data_dir ", "split ")):
            raise
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"data set {name!r} cannot be opened: {reason[:400]}") from error


def _digits(split: str) -> datasets.Dataset:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the data set 'digits' comes with scikit-learn; run `pip install scikit-learn`") from error
    digits = load_digits()
    encoded = []
    for levels in np.rint(digits.images * 255 / 16).astype(np.uint8):
        Image.fromarray(levels).save(buffer := io.BytesIO(), "PNG")
        encoded.append({"bytes": buffer.getvalue(), "path": None})
    names = [str(digit) for digit in digits.target_names]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    dataset = datasets.Dataset.from_dict({"image": encoded, "label": digits.target.tolist()}, features=features)
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute({"train": len(dataset)})
    except ValueError as error:
        raise ValueError(
            f"split {split!r} is unknown; digits has the one split 'train', of which a part is 'train[:80%]'"
        ) from error
    rows = [row for part in parts for row in range(part.from_ or 0, len(dataset) if part.to is None else part.to)]
    return dataset if len(rows) == len(dataset) else dataset.select(rows)


def _open_local(path: Path, options: dict[str, Any]) -> AnyDataset:
    base = re.match(r"\w*", options["split"]).group()
    if path.is_dir():
        return _open_folder(path, base, options)
    if path.is_file() and path.suffix.lower() == ".parquet":
        return datasets.load_dataset("parquet", data_files={base: str(path)}, **options, **_reading_parquet())
    if path.is_file() and path.suffix.lower() == ".zip":
        return _open_zip(path, options)
    found = "does not exist" if not path.exists() else "is neither a folder nor a .parquet or .zip file"
    raise ValueError(f"train_data_dir {str(path)!r} {found}; pass a folder of images, a .parquet or a .zip file")


def _reading_parquet() -> dict[str, Any]:
    """Beware: Arrow reads ahead by default and drops nothing of it before a file's end, so that memory grows to the file's size."""
    return {"fragment_scan_options": pyarrow.dataset.ParquetFragmentScanOptions(pre_buffer=False)}


def _open_folder(path: Path, base: str, options: dict[str, Any]) -> AnyDataset:
    extensions = _image_extensions()
    files = (file for file in path.rglob("*") if file.suffix.lower() in extensions | {".parquet"})
    first = next((file for file in files if not file.name.startswith(("metadata", "."))), None)
    if first is None:
        raise ValueError(
            f"train_data_dir {str(path)!r} holds no images; put files such as .png or .jpg into it, "
            "in one sub-folder for each class if there are classes"
        )
    if first.suffix.lower() == ".parquet":
        return datasets.load_dataset(str(path), **options, **_reading_parquet())
    folders = {entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
    if base in folders and folders <= SPLIT_FOLDERS:
        path = path / base
    elif base != "train":
        raise ValueError(
            f"split {base!r} needs a sub-folder of this name in {str(path)!r}, which has {sorted(folders)}"
        )
    # Without data_files `datasets` takes a class or a file called "train" or "test" for a split, and drops the rest.
    return datasets.load_dataset("imagefolder", data_dir=str(path), data_files={base: "**"}, **options)


def _image_extensions() -> set[str]:
    return {extension for extension, kind in Image.registered_extensions().items() if kind in Image.OPEN}


def _open_zip(path: Path, options: dict[str, Any]) -> AnyDataset:
    """List a zip of images; the imagefolder builder of datasets 5.2 fails on one that has class folders."""
    with zipfile.ZipFile(path) as archive:
        names = [Path(name) for name in sorted(archive.namelist()) if Path(name).suffix.lower() in _image_extensions()]
    names = [name for name in names if not any(part.startswith((".", "__MACOSX")) for part in name.parts)]
    if not names:
        raise ValueError(f"train_data_dir {str(path)!r} holds no images; put files such as .png or .jpg into the zip")
    columns = {"image": [{"bytes": None, "path": f"zip://{name.as_posix()}::{path.resolve()}"} for name in names]}
    features = datasets.Features({"image": datasets.Image(decode=False)})
    classes = sorted({name.parent.name for name in names})
    if len(classes) > 1 and len({len(name.parts) for name in names}) == 1:  # the imagefolder builder's own rule
        columns["label"] = [name.parent.name for name in names]
        features["label"] = datasets.ClassLabel(names=classes)
    dataset = datasets.Dataset.from_dict(columns, features=features)
    return dataset.to_iterable_dataset() if options["streaming"] else dataset


def find_image_column(features: datasets.Features, asked: str | None) -> str:
    """Return the column of type Image, or one of encoded bytes; ValueError if there is none or a choice to make."""
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
        raise ValueError(f"the data set has no image column; its columns are {list(features)}")
    return "image" if "image" in images else images[0]


def find_label_column(features: datasets.Features, asked: str | None) -> str | None:
    """Return the column of type ClassLabel, else an integer, bool or string column called `label`, else None.

    `asked` = "none" means no labels. ValueError if that column cannot hold classes or if there is a choice to make.
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
    labels = labels or [name for name in ("label",) if name in features and _holds_classes(features[name])]
    if len(labels) > 1 and "label" not in labels:
        raise ValueError(
            f"the data set has several label columns {labels}; pass --label_column with one of them, "
            "or `none` to train without labels"
        )
    return ("label" if "label" in labels else labels[0]) if labels else None


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
        return set(feature) == {"bytes", "path"}
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

    Names are those of a ClassLabel column, "0".."n-1" for integers, and the sorted values of a string column.
    ValueError names the first row without a label or with an id outside 0..n-1.
    """
    values = dataset.select_columns([column]).with_format("arrow")[:][column].combine_chunks()
    if values.null_count:
        row = int(np.argmax(np.asarray(values.is_null())))
        raise ValueError(f"row {row} has no label in column {column!r}; {_UNLABELLED}")
    labels = values.to_numpy(zero_copy_only=False)
    if labels.dtype.kind not in "iub":
        names = sorted(set(labels.tolist()))
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
            missing = sorted(set(range(int(found[-1]) + 1)) - set(found.tolist()))[:5]
            raise ValueError(
                f"column {column!r} has ids up to {found[-1]} without {missing}; ids must be 0..n-1, "
                "so renumber them or store the class names as strings"
            )
    for row in np.flatnonzero((labels < 0) | (labels >= len(names)))[:1]:
        check_label(int(labels[row]), names, column, f"row {row}")
    return labels, names


_UNLABELLED = "label every row, choose another --label_column, or pass --label_column none to train without labels"


def check_label(label: Any, names: list[str], column: str, where: str) -> int:
    """Return the class id if it is one of 0..n-1; ValueError names the row otherwise."""
    if not isinstance(label, (int, np.integer)) or not 0 <= label < len(names):
        raise BadData(
            f"{where} has label {label} in column {column!r}, allowed are 0..{len(names) - 1}; {_UNLABELLED}"
        )
    return int(label)
