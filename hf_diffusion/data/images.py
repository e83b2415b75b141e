"""Opening images and labels: of the Hub, a folder, an archive, tables, or digits."""

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import datasets
import numpy as np
from PIL import ImageColor

from hf_diffusion.data.captions import (
    CaptionCoder,
    Captions,
    StreamedCaptions,
    captions_of_classes,
    class_captions,
    find_caption_column,
    missing_remark,
    read_captions,
    texts_of,
)
from hf_diffusion.data.columns import (
    as_images,
    check_label,
    class_remarks,
    find_image_column,
    find_label_column,
    label_remarks,
    read_labels,
    stream_classes,
)
from hf_diffusion.data.decoding import brief_name
from hf_diffusion.data.image_data import ImageData
from hf_diffusion.data.probing import PROBED_IMAGES, choose_transform
from hf_diffusion.data.selection import Split, canonical_name, evenly_spaced, shown_rows
from hf_diffusion.data.source import AnyDataset, Source
from hf_diffusion.data.sources import open_source, part_of
from hf_diffusion.data.streaming import StreamingImageData
from hf_diffusion.data.transforms import PIL_MODES


logger = logging.getLogger(__name__)


def load_images(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_data_dir: str | None = None,
    split: str = "train",
    image_column: str | None = None,
    label_column: str | None = None,
    resolution: int | tuple[int, int] | None = None,
    center_crop: bool = True,
    random_flip: bool = False,
    channels: int | None = None,
    streaming: bool = False,
    cache_dir: str | None = None,
    max_train_samples: int | None = None,
    max_bad_images: int = 100,
    seed: int = 0,
    cache_bytes: int | None = None,
    shuffle_buffer: int = 1000,
    fit_size: tuple[int, int] | None = None,
    background: str = "white",
    captioned: bool = False,
    caption_column: str | None = None,
    caption_templates: Sequence[str] = (),
    caption_rows: int = 5000,
    caption_coder: CaptionCoder | None = None,
) -> ImageData | StreamingImageData:
    """Open a set of images; what is not given comes from the data.

    dataset_name: a Hub id, "digits" (scikit-learn's 8x8 digits), or a path.
    train_data_dir: a folder of images (sub-folders are classes, or splits with classes in them), a
        .zip or .tar of such a folder, a .parquet file or a folder of them, or what `save_to_disk`
        has written. Labels are also read from metadata.csv, .jsonl, .parquet, StyleGAN's
        dataset.json, and the .cls files of webdatasets.
    split: a split or a part of it, such as train[:80%].
    label_column: None takes a ClassLabel column, or an integer or string column called label or
        labels; "none" takes no labels.
    resolution: a side or (H, W); resizes with the aspect kept, then crops.
    max_train_samples: takes evenly spaced images, one drawn from each of so many equal parts where
        equal steps leave classes out; of a stream the first ones.
    cache_bytes: limit of the decoded images kept in memory (None: a quarter of what is available,
        0: none).
    shuffle_buffer: rows of a stream.
    fit_size: a resolution for images that do not have this size already.
    background: the colour, by name or as #rrggbb, that transparent images are laid on where C is
        not 4.
    captioned: each image has captions, those of `caption_column` (None finds it by its name), or
        one of its class for each of `caption_templates`; `caption_coder` makes conditions of them.
    caption_rows: first rows of a stream whose captions are read before training.

    ValueError in one sentence for data that are missing, empty, of mixed size, wrongly labelled or
    unreadable beyond `max_bad_images`; ConnectionError if the Hub cannot be reached.
    """
    resolution = _checked_options(resolution, channels, max_train_samples, max_bad_images, background)
    source = open_source(dataset_name, dataset_config_name, train_data_dir, split, streaming, cache_dir)
    dataset, features = source.dataset, source.dataset.features
    if not streaming and not len(dataset):
        raise ValueError(f"the data set {source.name!r} is empty in split {split!r}; choose another split or data set")
    if features is None:
        raise ValueError(f"the columns of {source.name!r} are unknown while streaming; load it with streaming=False")
    image_column = find_image_column(features, image_column)
    label_given, label_column = label_column, find_label_column(features, label_column)
    labels, class_names = None, None
    remarks = source.remarks + label_remarks(features, label_column, asked=label_given)
    if label_column is not None and streaming:
        class_names = stream_classes(features, label_column)
    elif label_column is not None:
        # Of the whole split, so that every part of it has the same classes.
        labels, class_names = read_labels(dataset, label_column)
    dataset = as_images(dataset, image_column)
    rows = None
    if streaming:
        dataset = part_of(dataset, source.rows)
        dataset = dataset if max_train_samples is None else dataset.take(max_train_samples)
    else:
        rows = np.arange(len(dataset)) if source.rows is None else np.array(source.rows)
        rows = rows[shown_rows(len(rows), max_train_samples, None if labels is None else labels[rows])]
        dataset = dataset if len(rows) == len(dataset) else dataset.select(rows)
        labels = None if labels is None else labels[rows]
        remarks += class_remarks(labels, class_names, split)
    probe = choose_transform(
        _probe_order(dataset, image_column), resolution, channels, center_crop, max_bad_images, fit_size, background
    )
    remarks += probe.remarks
    captions = None
    if captioned:
        column = None if caption_templates else find_caption_column(features, caption_column)
        if caption_templates and class_names is None:
            raise ValueError(
                f"caption_template makes captions of class names, and {source.name} has no classes; name their column "
                "by --label_column, or a column of captions by --caption_column"
            )
    if captioned and streaming:
        by_class = class_captions(caption_templates, class_names or ())
        captions = StreamedCaptions(dataset, _captions_of_row(column, label_column, by_class), caption_rows, seed)
    elif captioned:
        captions = _captions(source, rows, labels, class_names, column, caption_templates, seed)
        remarks += missing_remark(captions, lambda i: brief_name(dataset[i][image_column], int(rows[i])))
    for remark in remarks[len(source.given) :]:
        logger.warning("%s: %s", source.name, remark)
    facts = {"split": split, "image_column": image_column, "label_column": label_column, "remarks": remarks}
    if captioned:
        facts |= {"caption_column": caption_column, "caption_templates": list(caption_templates)}
    if source.splits is not None:
        facts["splits"] = dict(source.splits)
    common = {
        "name": source.name,
        "image_column": image_column,
        "class_names": class_names,
        "random_flip": random_flip,
        "seed": seed,
        "max_bad_images": max_bad_images,
        "facts": facts,
        "captions": captions,
    }
    if streaming:
        data = StreamingImageData(
            dataset, probe.transform, label_column=label_column, shuffle_buffer=shuffle_buffer, **common
        )
        data.remarks = remarks
        # The rows of a whole split of unknown length are all of it.
        rows = (
            source.rows if max_train_samples is None else (source.rows or range(max_train_samples))[:max_train_samples]
        )
        data.split_rows = (canonical_name(Split.parse(split).name), rows)
        return data
    data = ImageData(dataset, probe.transform, labels=labels, cache_bytes=cache_bytes, **common)
    data.split_rows = (canonical_name(Split.parse(split).name), rows)
    data.remarks = remarks
    data.record(probe.bad)
    if caption_coder is not None:
        data.encode_captions(caption_coder)
    return data


def _captions(
    source: Source,
    rows: np.ndarray,
    labels: np.ndarray | None,
    class_names: list[str] | None,
    column: str | None,
    templates: Sequence[str],
    seed: int,
) -> Captions:
    """The captions of the rows: of a column, or of the classes."""
    if templates:
        return captions_of_classes(templates, class_names, labels, seed)
    return read_captions(source.dataset, column, rows, seed)


def _captions_of_row(
    column: str | None, label_column: str | None, by_class: list[list[str]]
) -> Callable[[dict[str, Any]], list[str]]:
    """What finds the captions of a stream's row: in a column, or by its class."""
    if column is not None:
        return lambda row: texts_of(row[column])
    names = [str(number) for number in range(len(by_class))]
    return lambda row: by_class[check_label(row[label_column], names, label_column, "a row of the stream")]


def _checked_options(
    resolution: int | Sequence[int] | None,
    channels: int | None,
    max_train_samples: int | None,
    max_bad_images: int,
    background: str,
) -> tuple[int, int] | None:
    """Return the resolution as (H, W); ValueError for a value that no data could satisfy."""
    if channels not in (None, *PIL_MODES):
        raise ValueError(f"channels={channels} is not possible; choose 1, 3 or 4, or leave it out to take the data's")
    for option, value, least in (("max_train_samples", max_train_samples, 1), ("max_bad_images", max_bad_images, 0)):
        if value is not None and value < least:
            raise ValueError(f"{option}={value} is not possible; it must be at least {least}")
    try:
        ImageColor.getrgb(background)
    except ValueError as error:
        raise ValueError(
            f"background={background!r} is no colour; give a name such as white or black, or #rrggbb"
        ) from error
    if resolution is None:
        return None
    sides = (resolution, resolution) if isinstance(resolution, int) else tuple(resolution)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"resolution={resolution!r} is not possible; pass a side or (height, width) above 0")
    return sides


def _probe_order(dataset: AnyDataset, column: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (index, undecoded image): of a stream in order, else evenly spaced rows first."""
    if isinstance(dataset, datasets.IterableDataset):
        yield from ((index, row[column]) for index, row in enumerate(dataset))
        return
    images = dataset.select_columns([column])
    sample = dict.fromkeys(evenly_spaced(len(dataset), PROBED_IMAGES))
    others = (index for index in range(len(dataset)) if index not in sample)
    yield from ((index, images[index][column]) for index in itertools.chain(sample, others))
