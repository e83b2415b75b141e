"""Which rows of a set are taken: a split or a part of one, evenly spaced rows."""

import re
from collections.abc import Mapping
from typing import NamedTuple

import datasets


# Folders that are splits, and the name that each of them means.
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
    "eval": "eval",
}


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
    name = next((name for name in sizes if name == split.name), None)
    name = name or next((name for name in sizes if canonical_name(name) == canonical_name(split.name)), None)
    if name is None:
        known = ", ".join(f"{name} ({count:,})" for name, count in sizes.items())
        raise ValueError(
            f"split {split.name!r} is unknown; {whose} has {known}, of which a part is {next(iter(sizes))}[:80%]"
        )
    rows = split.rows(sizes[name])
    if not rows:
        raise ValueError(f"split {text!r} of {whose} holds nothing; {name} has {sizes[name]:,} rows")
    return name, rows


def canonical_name(name: str) -> str:
    """The usual name of a split: validation for val, train for Training."""
    return SPLIT_NAMES.get(name.lower(), name.lower())


def evenly_spaced(total: int, count: int | None = None) -> list[int]:
    """Return `count` evenly spaced indices of 0..total-1; all where there are fewer, or for None.

    Of a set that is sorted by class they show every class.
    """
    count = total if count is None else min(total, count)
    return [place * total // count for place in range(count)]
