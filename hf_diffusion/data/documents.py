"""Text, wherever it lies: a .txt file, a folder of them, or a column of a table, as documents.

Rows, of which a split takes a part, are lines of .txt files and rows of tables.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np

from hf_diffusion.data.columns import find_label_column, read_labels
from hf_diffusion.data.errors import BadData
from hf_diffusion.data.listing import counted
from hf_diffusion.data.selection import SPLIT_NAMES, canonical_name, rows_of_split
from hf_diffusion.data.sources import open_source
from hf_diffusion.files import sha256


# Readers of `datasets` by the ending of a file.
TABLES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv"}
TAKEN = "give a .txt, .jsonl, .csv or .parquet file, a folder of such files, or a Hub id"
# Characters that are tokenised at a time.
PIECE = 2**20


@dataclass(frozen=True)
class Documents:
    """Texts of one split.

    pieces: called for (document, text) from the first to the last; a long document comes in several
        pieces, which break between lines.
    key: tells other texts apart, on this machine.
    labels, class_names: the class of each document; None without classes.
    rows: which rows of `split` these are.
    """

    name: str
    pieces: Callable[[], Iterator[tuple[int, str]]]
    key: str
    split: str
    rows: np.ndarray
    sizes: dict[str, int]
    labels: np.ndarray | None = None
    class_names: list[str] | None = None
    facts: dict[str, str] = field(default_factory=dict)


def open_documents(
    dataset_name: str | None,
    dataset_config_name: str | None,
    train_data_dir: str | None,
    split: str,
    text_column: str | None,
    label_column: str | None,
    cache_dir: str | None,
) -> Documents:
    """The documents of a split, or of a part of it.

    ValueError in one sentence where there is no text, or no such split.
    """
    files = files_of_text(dataset_name, train_data_dir, text_column)
    if files is not None and files.ending == ".txt":
        return _of_lines(files.name, files.by_split, split)
    if files is not None:
        return _of_local_table(files, split, text_column, label_column, cache_dir)
    source = open_source(dataset_name, dataset_config_name, train_data_dir, split, False, cache_dir)
    rows = np.arange(len(source.dataset)) if source.rows is None else np.array(source.rows)
    sizes = dict(source.splits or {split.partition("[")[0]: len(source.dataset)})
    name_of_split = canonical_name(split.partition("[")[0])
    return _of_table(source.name, source.dataset, rows, name_of_split, sizes, text_column, label_column)


class TextFiles(NamedTuple):
    """Files of text by split, in the order of their names, of one ending."""

    name: str
    ending: str
    by_split: dict[str, list[Path]]

    @property
    def options(self) -> dict[str, str]:
        """What their reader must be told."""
        return {"sep": "\t"} if self.ending == ".tsv" else {}


def files_of_text(dataset_name: str | None, train_data_dir: str | None, text_column: str | None) -> TextFiles | None:
    """The .txt files or tables at a path; None for what `open_source` opens.

    ValueError in one sentence for a path without text, and for files of several kinds.
    """
    path = Path(train_data_dir or dataset_name or "").expanduser()
    if train_data_dir is None and not (dataset_name and path.exists()):
        return None
    if not path.exists():
        raise ValueError(f"train_data_dir {str(path)!r} does not exist; {TAKEN}")
    # As for images: the name of a file is published with the model, its folder is not.
    name, by_split = path.resolve().name, _files_by_split(path)
    kinds = sorted({file.suffix.lower() for found in by_split.values() for file in found})
    if kinds == [".txt"] and text_column is not None:
        raise ValueError(f"text_column {text_column!r}: {name} holds .txt files, which have no columns")
    if len(kinds) > 1:
        raise ValueError(f"{str(path)!r} mixes {', '.join(kinds)} files; keep one kind, or name one file")
    if kinds and kinds[0] in (".txt", *TABLES):
        return TextFiles(name, kinds[0], by_split)
    if path.is_file() and path.suffix.lower() != ".parquet":
        raise ValueError(f"train_data_dir {str(path)!r} holds no text that is understood; {TAKEN}")
    return None


def _files_by_split(path: Path) -> dict[str, list[Path]]:
    """Files of text by split, in the order of their names: those of folders and files called
    train, validation or test, else all of them as train."""
    if path.is_file():
        return {"train": [path]}
    files = sorted(f for f in path.rglob("*") if f.suffix.lower() in (".txt", *TABLES) and f.is_file())
    files = [f for f in files if not any(part.startswith(".") for part in f.relative_to(path).parts)]
    splits: dict[str, list[Path]] = {}
    for file in files:
        first = file.relative_to(path).parts[0].removesuffix(file.suffix).lower()
        splits.setdefault(SPLIT_NAMES.get(first, ""), []).append(file)
    outside = splits.pop("", [])
    if outside and splits:
        names = counted([file.name for file in outside], "file")
        raise ValueError(
            f"{path.name} has the splits {', '.join(splits)} and {names} beside them; move those into a split"
        )
    return splits or ({"train": outside} if outside else {})


# --- lines of text files ---


def _of_lines(name: str, files: dict[str, list[Path]], split: str) -> Documents:
    sizes = {key: sum(count_lines(file) for file in found) for key, found in files.items()}
    of_split, rows = rows_of_split(split, sizes, name)
    found = files[of_split]
    key = hashlib.sha256(repr(([sha256(file) for file in found], rows)).encode()).hexdigest()

    def pieces() -> Iterator[tuple[int, str]]:
        first = 0
        for number, file in enumerate(found):
            lines, size = [], 0
            for line in lines_of(file):
                if first in rows:
                    lines.append(line)
                    size += len(line)
                first += 1
                if size > PIECE:
                    yield number, "".join(lines)
                    lines, size = [], 0
            if lines:
                yield number, "".join(lines)

    facts = {"files": str(len(found))} if len(found) > 1 else {}
    return Documents(name, pieces, key, of_split, np.array(rows), sizes, facts=facts)


def lines_of(file: Path) -> Iterator[str]:
    """The lines of a file with their ends, which are newlines alone."""
    try:
        with file.open(encoding="utf-8-sig", newline=None) as text:
            yield from text
    except UnicodeDecodeError as error:
        raise BadData(f"{file} is not text in UTF-8 (byte {error.start}); save it as UTF-8") from error


def count_lines(file: Path) -> int:
    """How many rows a .txt file has."""
    return sum(1 for _ in lines_of(file))


# --- columns of tables ---


def _of_local_table(
    files: TextFiles, split: str, text_column: str | None, label_column: str | None, cache_dir: str | None
) -> Documents:
    paths = {key: [str(file) for file in found] for key, found in files.by_split.items()}
    try:
        tables = datasets.load_dataset(TABLES[files.ending], data_files=paths, cache_dir=cache_dir, **files.options)
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"the table {files.name} cannot be read: {reason[:300]}") from error
    sizes = {key: len(table) for key, table in tables.items()}
    of_split, rows = rows_of_split(split, sizes, files.name)
    return _of_table(files.name, tables[of_split], np.array(rows), of_split, sizes, text_column, label_column)


def _of_table(
    name: str,
    table: datasets.Dataset,
    rows: np.ndarray,
    split: str,
    sizes: dict[str, int],
    text_column: str | None,
    label_column: str | None,
) -> Documents:
    column = find_text_column(table.features, text_column, name)
    label_column = find_label_column(table.features, label_column)
    labels = class_names = None
    if label_column is not None:
        labels, class_names = read_labels(table, label_column)
        labels = labels[rows]
    if len(rows) < len(table):
        table = table.select(rows)
    table = table.select_columns([column])

    def pieces() -> Iterator[tuple[int, str]]:
        for number, row in enumerate(table):
            if row[column] is None:
                raise ValueError(f"row {rows[number]} of {name} has no text in column {column!r}; take such rows out")
            yield number, row[column]

    key = hashlib.sha256(repr((table._fingerprint, column, label_column)).encode()).hexdigest()
    facts = {"text_column": column} | ({"label_column": label_column} if label_column else {})
    return Documents(name, pieces, key, split, rows, sizes, labels, class_names, facts)


def find_text_column(features: datasets.Features, asked: str | None, whose: str) -> str:
    """The column of text: the one that is asked for, one called text, or the only one there is.

    ValueError where there is none, or a choice to make.
    """
    texts = [name for name, feature in features.items() if getattr(feature, "dtype", "") in ("string", "large_string")]
    if asked is not None and asked not in texts:
        kind = f"is of type {features[asked]}" if asked in features else "is not there"
        raise ValueError(f"text_column {asked!r} {kind} in {whose}; its columns of text are {_listed(texts)}")
    if asked is not None:
        return asked
    if "text" in texts:
        return "text"
    if len(texts) != 1:
        what = (
            f"several columns of text, {_listed(texts)}; choose with --text_column"
            if texts
            else (f"no column of text; its columns are {_listed(list(features))}")
        )
        raise ValueError(f"{whose} has {what}")
    return texts[0]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"
