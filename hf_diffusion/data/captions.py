"""Captions of images: one or several of each, of a column or made of class names by templates."""

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any, ClassVar, Protocol

import datasets
import numpy as np
from torch import Tensor

from hf_diffusion.data.augmentation import CAPTION, draws
from hf_diffusion.data.errors import BadData
from hf_diffusion.data.listing import counted
from hf_diffusion.data.selection import evenly_spaced


# Columns that are taken for captions without being asked for, the first one that is there. "txt" is
# what webdatasets on the Hub have.
USUAL_COLUMNS = ("text", "caption", "captions", "prompt", "txt")
# Where a template has the name of the class, and an article that goes by its first letter.
PLACE = "{}"
ARTICLE = "(n) {}"
# What begins with a vowel in writing only, as a unicorn does.
SPOKEN_CONSONANTS = ("uni", "use", "usu", "eu", "one")
SHOWN = 3


class CaptionCoder(Protocol):
    """Makes conditions of a network from texts: numbers of tokens, or embeddings."""

    def rows_of(self, texts: Sequence[str]) -> Callable[[Tensor], dict[str, Tensor]]:
        """A function from numbers of texts, int64 (B,), to conditions by the network's names."""

    def conditions_of(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """The conditions of texts that come with a batch, of which nothing is kept."""


class Captions:
    """Which captions each image has, of `texts`, all the different ones in order of appearance.

    texts[0] is "", what an image without a caption has. `numbers` int64 are the captions of all
    images, one image after the other. Those of image i begin at `starts[i]`.
    """

    # No image has another caption than `texts`.
    whole: ClassVar[bool] = True

    def __init__(self, of_each: Iterable[Sequence[str]], seed: int = 0):
        known, numbers, counts = {"": 0}, [], []
        for captions in of_each:
            own = list(dict.fromkeys(text for text in captions if text))
            numbers += [known.setdefault(text, len(known)) for text in own or [""]]
            counts.append(len(own) or 1)
        self.texts, self.seed = list(known), seed
        self.numbers, self.counts = np.array(numbers, np.int64), np.array(counts, np.int64)
        self.starts = np.cumsum(self.counts) - self.counts

    def choose(self, epochs: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """The number of the caption that each image has in an epoch, drawn anew in each."""
        chosen = draws(self.seed, epochs, indices, CAPTION) * self.counts[indices]
        return self.numbers[self.starts[indices] + chosen.astype(np.int64)]

    @property
    def missing(self) -> list[int]:
        """The images without any caption."""
        return np.flatnonzero(self.numbers[self.starts] == 0).tolist()

    @property
    def has_empty(self) -> bool:
        """Whether some image has the empty text."""
        return bool(self.missing)

    def digest(self) -> bytes:
        """Tells other captions apart."""
        digest = hashlib.sha256("\n".join(self.texts).encode())
        for part in (self.numbers, self.counts):
            digest.update(part.tobytes())
        return digest.digest()

    def describe(self) -> dict[str, Any]:
        """What a card and a dry run tell: how many there are, and the first of them."""
        most, least = int(self.counts.max()), int(self.counts.min())
        return {
            "images_with_a_caption": len(self.counts) - len(self.missing),
            "different_captions": len(self.texts) - 1,
            "captions_an_image": str(most) if most == least else f"{least} to {most}",
            "examples": self.examples(SHOWN),
        }

    def sentence(self, kind: str) -> str:
        """What `describe` says, in words."""
        found = self.describe()
        return (
            f"{found['images_with_a_caption']:,} of {len(self.counts):,} {kind} have some, "
            f"{found['captions_an_image']} each, {found['different_captions']:,} different ones, as "
            f"{', '.join(map(repr, found['examples']))}"
        )

    def examples(self, count: int) -> list[str]:
        """Evenly spaced ones of the different captions."""
        return _some_of(self.texts, count)


class StreamedCaptions:
    """Captions that come with the rows of a stream.

    `texts` are the different ones of its first `rows` rows, which are read when they are asked for;
    texts[0] is "". `of_row` gives the captions of a row.
    """

    whole: ClassVar[bool] = False

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        of_row: Callable[[dict[str, Any]], Iterable[str]],
        rows: int,
        seed: int = 0,
    ):
        self.rows, self.seed = rows, seed
        self._dataset, self._of_row = dataset, of_row

    @cached_property
    def texts(self) -> list[str]:
        """BadData where none of the first rows has a caption."""
        found = dict.fromkeys(text for row in self._dataset.take(self.rows) for text in self.of_row(row))
        self._has_empty = "" in found
        if not set(found) - {""}:
            raise BadData(f"none of the first {self.rows:,} rows has a caption; choose another --caption_column")
        return list(dict.fromkeys([""]) | found)

    @property
    def has_empty(self) -> bool:
        """Whether some image of the first rows has the empty text."""
        return bool(self.texts) and self._has_empty

    def of_row(self, row: dict[str, Any]) -> list[str]:
        """The different captions of a row, [""] where it has none."""
        return list(dict.fromkeys(text for text in self._of_row(row) if text)) or [""]

    def choose(self, row: dict[str, Any], epoch: int, place: int) -> str:
        """The caption that a row has at its place in an epoch, drawn anew in each."""
        own = self.of_row(row)
        return own[int(draws(self.seed, np.array([epoch]), np.array([place]), CAPTION)[0] * len(own))]

    def describe(self) -> dict[str, Any]:
        """What a card and a dry run tell, of the first rows."""
        return {
            "of_the_first_rows": self.rows,
            "different_captions": len(self.texts) - 1,
            "examples": self.examples(SHOWN),
        }

    def sentence(self, kind: str) -> str:
        """What `describe` says, in words."""
        shown = ", ".join(map(repr, self.examples(SHOWN)))
        return f"{len(self.texts) - 1:,} different ones in the first {self.rows:,} rows of the stream, as {shown}"

    def examples(self, count: int) -> list[str]:
        """Evenly spaced ones of the different captions of the first rows."""
        return _some_of(self.texts, count)


def _some_of(texts: Sequence[str], count: int) -> list[str]:
    return [texts[1 + place] for place in evenly_spaced(len(texts) - 1, count)]


def number_of(text: str) -> int:
    """A number that tells a text from others, whatever other texts there are."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def captions_of_classes(
    templates: Sequence[str], class_names: Sequence[str], labels: np.ndarray, seed: int
) -> Captions:
    """Every image has a caption of each template, with the name of its class.

    ValueError for a template without the place of the name.
    """
    by_class = class_captions(templates, class_names)
    return Captions((by_class[label] for label in labels.tolist()), seed)


def class_captions(templates: Sequence[str], class_names: Sequence[str]) -> list[list[str]]:
    """The captions of each class; ValueError for a template without the place of the name."""
    check_templates(templates)
    return [[caption_of_class(with_article(template), name) for template in templates] for name in class_names]


def with_article(template: str) -> str:
    """ "a {}" as "a(n) {}", which becomes "an" before a vowel."""
    return re.sub(r"\b([aA]) \{\}", r"\1" + ARTICLE, template)


def caption_of_class(template: str, name: str) -> str:
    """The template with the name in its place; the pipeline writes a class in the same way."""
    has_vowel = name[:1].lower() in tuple("aeiou") and not name.lower().startswith(SPOKEN_CONSONANTS)
    return template.replace(ARTICLE, f"{'n' if has_vowel else ''} {PLACE}").replace(PLACE, name)


def check_templates(templates: Sequence[str]) -> None:
    """ValueError for a template that does not have one place for the name of a class."""
    for template in templates:
        if template.count(PLACE) != 1:
            raise ValueError(
                f"caption_template {template!r} has {template.count(PLACE)} places for the name of the class; "
                f"write {PLACE} once, as in 'a photo of a {PLACE}'"
            )


def find_caption_column(features: datasets.Features, asked: str | None) -> str:
    """The column of texts, or of lists of texts; ValueError where there is none."""
    fitting = [name for name, feature in features.items() if _holds_texts(feature)]
    found = asked or next((name for name in USUAL_COLUMNS if name in fitting), None)
    if found in fitting:
        return found
    choice = f"choose from {', '.join(fitting)}" if fitting else "no column of it holds texts"
    if asked is None:
        raise ValueError(
            f"there are no captions: the data have none of the columns {', '.join(USUAL_COLUMNS)}; name one by "
            f"--caption_column ({choice}), or make captions of class names by "
            f"--caption_template 'a photo of a {PLACE}'"
        )
    what = f"is of type {features[asked]}, not of texts" if asked in features else "is not in the data set"
    raise ValueError(f"caption_column {asked!r} {what}; {choice}")


def read_captions(dataset: datasets.Dataset, column: str, rows: np.ndarray, seed: int) -> Captions:
    """The captions of these rows; BadData where no row has any."""
    texts = dataset.select_columns([column]).with_format("arrow")
    values = texts[:][column].to_pylist() if len(rows) == len(dataset) else texts[rows.tolist()][column].to_pylist()
    captions = Captions((texts_of(value) for value in values), seed)
    if len(captions.texts) == 1:
        raise BadData(f"column {column!r} has no text in any of {len(values):,} rows; choose another --caption_column")
    return captions


def missing_remark(captions: Captions, name_of: Callable[[int], str]) -> list[str]:
    """How many images have no caption, and which; nothing where all have."""
    if not captions.missing:
        return []
    missing = [name_of(index) for index in captions.missing[: SHOWN + 1]]
    missing += [""] * (len(captions.missing) - len(missing))
    return [f"no caption: {counted(missing, 'image')}, trained without a text"]


def texts_of(value: Any) -> list[str]:
    """The captions in a value of a column: a text, a list of texts, or None."""
    values = value if isinstance(value, list) else [value]
    # A .csv may have made numbers of captions.
    return [str(text).strip() for text in values if text is not None]


def _holds_texts(feature: Any) -> bool:
    if isinstance(feature, (datasets.List, list)):
        feature = feature[0] if isinstance(feature, list) else feature.feature
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string", "int64")
