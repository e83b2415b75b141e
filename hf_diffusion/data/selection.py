"""Which rows of a set are taken: a split or a part of one, evenly spaced rows."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import datasets
import numpy as np


# Folders that are splits, and the name that each of them means.
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
    "eval": "eval",
}
# Rows of a set that nobody has counted.
ENDLESS = 2**62
# Of a part of a split.
RowNumbers = range | np.ndarray


class Split(NamedTuple):
    """A split by name, and the part of it that was asked for, in rows or percent."""

    name: str
    is_part: bool
    instruction: datasets.ReadInstruction

    @classmethod
    def parse(cls, text: str) -> "Split":
        """Read "train", "train[:80%]", "test[10:20]"; ValueError for another form."""
        match = re.fullmatch(r"(\w+(?:[\w.-]*\w)?)(\[.*\])?", text.strip())
        if match is None:
            raise ValueError(f"split {text!r} is not possible; give one split, such as train, or a part, train[:80%]")
        try:
            return cls(match[1], match[2] is not None, datasets.ReadInstruction.from_spec(text.strip()))
        except (ValueError, AssertionError) as error:
            raise ValueError(
                f"split {text!r} is not possible; a part is written train[:80%], train[80%:] or train[100:200]"
            ) from error

    def rows(self, total: int) -> range:
        """The rows of the part, of a split that has `total`."""
        (part,) = self.instruction.to_absolute({self.name: total})
        return range(*slice(part.from_, part.to).indices(total))


def rows_of_split(text: str, sizes: Mapping[str, int], whose: str) -> tuple[str, range]:
    """The name of the split and its rows, of a set whose splits have `sizes`.

    A split is also found in another case, and validation as val. ValueError names the splits that
    there are, and a part without rows.
    """
    split = Split.parse(text)
    name = _same_split(split.name, sizes)
    if name is None:
        known = ", ".join(f"{name} ({count:,})" for name, count in sizes.items())
        raise ValueError(
            f"split {split.name!r} is unknown; {whose} has {known}, of which a part is {next(iter(sizes))}[:80%]"
        )
    rows = split.rows(sizes[name])
    if not rows:
        raise ValueError(f"split {text!r} of {whose} holds nothing; {name} has {sizes[name]:,} rows")
    return name, rows


def rows_of_stream(text: str, names: Sequence[str], whose: str) -> tuple[str, range | None]:
    """The name of the split and its rows, of a set of unknown length; None for all of them.

    ValueError names the splits that there are, and refuses a part that needs the length.
    """
    split = Split.parse(text)
    name = _same_split(split.name, names)
    if name is None:
        raise ValueError(f"split {split.name!r} is unknown; {whose} has {', '.join(names)}")
    if not split.is_part:
        return name, None
    if set("%-") & set(text.partition("[")[2]):
        raise ValueError(
            f"split {text!r}: the number of rows of {whose!r} is not known while streaming; count rows from the "
            f"first, as in {name}[:1000] and {name}[1000:], or load with streaming=False"
        )
    rows = split.rows(ENDLESS)
    if not rows:
        raise ValueError(f"split {text!r} of {whose} holds nothing; give a part such as {name}[1000:]")
    return name, rows


def shared_rows(one: RowNumbers | None, other: RowNumbers | None) -> int | None:
    """How many rows two parts of a split share, None for all of it; None where nobody knows.

    Streams have ranges, of which an array would not fit the memory.
    """
    if one is None or other is None:
        known = other if one is None else one
        return None if known is None else len(known)
    if isinstance(one, range) and isinstance(other, range):
        return len(range(max(one.start, other.start), min(one.stop, other.stop)))
    if isinstance(one, range):
        one, other = other, one
    if isinstance(other, range):
        return int(((one >= other.start) & (one < other.stop)).sum())
    return len(np.intersect1d(one, other))


def _same_split(asked: str, names: Iterable[str]) -> str | None:
    if asked in names:
        return asked
    return next((name for name in names if canonical_name(name) == canonical_name(asked)), None)


def canonical_name(name: str) -> str:
    """The usual name of a split: validation for val, train for Training."""
    return SPLIT_NAMES.get(name.lower(), name.lower())


def shown_rows(total: int, count: int | None, labels: np.ndarray | None) -> np.ndarray:
    """`count` rows of `total`: evenly spaced, which shows every class of a set sorted by class.

    Where the classes `labels` (total,) take turns, equal steps leave some out: then one row is
    drawn from each of `count` equal parts, the same ones on every machine.
    """
    rows = np.array(evenly_spaced(total, count))
    if count is None or count >= total or labels is None or len(np.unique(labels[rows])) == len(np.unique(labels)):
        return rows
    ends = np.append(rows[1:], total)
    drawn = np.random.default_rng(0).integers(rows, ends)
    return drawn if len(np.unique(labels[drawn])) > len(np.unique(labels[rows])) else rows


def evenly_spaced(total: int, count: int | None = None) -> list[int]:
    """Return `count` evenly spaced indices of 0..total-1; all where there are fewer, or for None.

    Of a set that is sorted by class they show every class.
    """
    count = total if count is None else min(total, count)
    return [place * total // count for place in range(count)]
