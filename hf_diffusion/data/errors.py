"""What can be wrong with data in the middle of a run."""

from collections.abc import Mapping


class CorruptImage(Exception):
    """One image cannot be decoded; the set as a whole may still be fine."""


class BadData(ValueError):
    """The set cannot be used; raised in one sentence, also in the middle of a run."""


def too_many_bad(bad: Mapping[object, str], limit: int) -> BadData:
    """Return the error for more than `limit` corrupt images, naming the first few."""
    named = "; ".join(list(bad.values())[:5])
    return BadData(f"more than max_bad_images={limit} images cannot be decoded: {named}; repair or remove them")
