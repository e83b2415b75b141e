"""What an opened set of images consists of, wherever it came from."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import datasets


AnyDataset = datasets.Dataset | datasets.IterableDataset


class Source(NamedTuple):
    """Rows with an image column, and what is known of the whole.

    dataset: the whole split.
    name: what to call the data.
    rows: of the split, that were asked for; None for all.
    given: remarks on what belongs to the set, for its description.
    found: remarks on what was left out or done on the way, which a person is told, too.
    splits: number of rows by split, where known.
    """

    dataset: AnyDataset
    name: str
    rows: range | None = None
    given: Sequence[str] = ()
    found: Sequence[str] = ()
    splits: Mapping[str, int] | None = None

    @property
    def remarks(self) -> list[str]:
        """All remarks, those on the set first."""
        return [*self.given, *self.found]
