"""Text that is read while training: documents of files or of tables, neither counted nor kept.

Rows, of which a split takes a part, are lines of .txt files and rows of tables.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np

from hf_diffusion.data.columns import check_label, find_label_column, stream_classes
from hf_diffusion.data.documents import PIECE, TABLES, count_lines, files_of_text, find_text_column, lines_of
from hf_diffusion.data.errors import BadData
from hf_diffusion.data.selection import Split, canonical_name, rows_of_split, rows_of_stream
from hf_diffusion.data.source import AnyDataset
from hf_diffusion.data.sources import one_sentence, open_source, part_of


# Rows by which the columns of a table without a schema are known.
PROBED_ROWS = 16


class Piece(NamedTuple):
    """A document, or a part of a long one; without a text where its row has none."""

    document: int
    text: str | None
    label: int = 0


@dataclass(frozen=True)
class DocumentStream:
    """Texts of one split, in the order of the files for None, else in one that a seed says.

    rows: which of `split` these are, None for all.
    """

    name: str
    pieces: Callable[[int | None], Iterator[Piece]]
    split: str
    rows: range | None
    class_names: list[str] | None = None
    facts: dict[str, str] = field(default_factory=dict)


def stream_documents(
    dataset_name: str | None,
    dataset_config_name: str | None,
    train_data_dir: str | None,
    split: str,
    text_column: str | None,
    label_column: str | None,
    cache_dir: str | None,
) -> DocumentStream:
    """The documents of a split, or of a part of it; the arguments are those of `open_documents`.

    ValueError in one sentence where there is no text, or no such split.
    """
    files = files_of_text(dataset_name, train_data_dir, text_column)
    if files is None:
        source = open_source(dataset_name, dataset_config_name, train_data_dir, split, True, cache_dir)
        of_split = canonical_name(Split.parse(split).name)
        return _of_rows(source.name, source.dataset, source.rows, of_split, text_column, label_column)
    if files.ending == ".txt":
        return _of_lines(files.name, files.by_split, split)
    of_split, rows = rows_of_stream(split, list(files.by_split), files.name)
    paths = [str(file) for file in files.by_split[of_split]]
    with one_sentence(files.name):
        options = {"split": "train", "streaming": True, "cache_dir": cache_dir, **files.options}
        table = datasets.load_dataset(TABLES[files.ending], data_files={"train": paths}, **options)
    return _of_rows(files.name, table, rows, of_split, text_column, label_column)


def _of_lines(name: str, by_split: dict[str, list[Path]], split: str) -> DocumentStream:
    asked = Split.parse(split)
    of_split, rows = asked.name, None
    if asked.is_part:
        # A part may be in percent, and files that are here can be counted.
        sizes = {key: sum(map(count_lines, found)) for key, found in by_split.items()}
        of_split, rows = rows_of_split(split, sizes, name)
    else:
        of_split, _ = rows_of_stream(split, list(by_split), name)
    files = by_split[of_split]

    def pieces(seed: int | None) -> Iterator[Piece]:
        order = list(range(len(files)))
        if seed is not None and rows is None:
            order = np.random.default_rng(seed).permutation(len(files)).tolist()
        lines = ((number, line) for number in order for line in lines_of(files[number]))
        if rows is not None:
            lines = itertools.islice(lines, rows.start, rows.stop)
        for number, own in itertools.groupby(lines, key=lambda pair: pair[0]):
            yield from (Piece(number, text) for text in _joined(line for _, line in own))

    facts = {"files": str(len(files))} if len(files) > 1 else {}
    return DocumentStream(name, pieces, of_split, rows, facts=facts)


def _joined(lines: Iterable[str]) -> Iterator[str]:
    """Lines as texts of about PIECE characters."""
    held, size = [], 0
    for line in lines:
        held.append(line)
        size += len(line)
        if size > PIECE:
            yield "".join(held)
            held, size = [], 0
    if held:
        yield "".join(held)


def _of_rows(
    name: str,
    table: AnyDataset,
    rows: range | None,
    split: str,
    text_column: str | None,
    label_column: str | None,
) -> DocumentStream:
    with one_sentence(name):
        features = table.features or datasets.Dataset.from_list(list(table.take(PROBED_ROWS))).features
    column = find_text_column(features, text_column, name)
    label_column = find_label_column(features, label_column)
    class_names = None if label_column is None else stream_classes(features, label_column)
    table = part_of(table.select_columns([column, *([label_column] if label_column else [])]), rows)

    def pieces(seed: int | None) -> Iterator[Piece]:
        # One row in the buffer: the order of the files is drawn, ten of which are read in turns.
        ordered = table if seed is None or rows is not None else table.shuffle(seed=seed, buffer_size=1)
        for number, row in enumerate(_read(name, ordered)):
            label = 0
            if label_column is not None:
                label = check_label(row[label_column], class_names, label_column, f"row {number} of the stream")
            yield Piece(number, row[column], label)

    facts = {"text_column": column} | ({"label_column": label_column} if label_column else {})
    return DocumentStream(name, pieces, split, rows, class_names, facts)


def _read(name: str, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows; BadData, in one sentence, for what turns out to be unreadable."""
    try:
        with one_sentence(name):
            yield from rows
    except ValueError as error:
        raise BadData(str(error)) from error
