"""What files beside images say: metadata.csv, .jsonl, .parquet, dataset.json, *.cls, *.txt."""

import csv
import io
import json
import os
import posixpath
import re
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hf_diffusion.data.addresses import read_bytes, shown
from hf_diffusion.data.listing import METADATA, Listing, counted


def read_metadata(listing: Listing, images: Sequence[str], folder: str) -> tuple[dict[str, list], list[str]]:
    """Columns of the images, a value or None for each, and remarks; images lie below `folder`.

    ValueError in one sentence for a file that cannot be read, or that names no image.
    """
    columns: dict[str, list] = {}
    remarks: list[str] = []
    places = {name: place for place, name in enumerate(images)}
    for name in listing.others:
        own = posixpath.dirname(name) + "/" if "/" in name else ""
        if posixpath.basename(name) not in METADATA or not (name.startswith(folder) or folder.startswith(own)):
            continue
        rows = _rows(listing.addresses[name], posixpath.basename(name))
        missing, twice, named = [], [], set()
        for row in rows:
            file = row.pop("file_name")
            place = places.get(posixpath.normpath(posixpath.join(posixpath.dirname(name), file)))
            if place is None:
                missing.append(file)
                continue
            if place in named:
                twice.append(file)
            named.add(place)
            for key, value in row.items():
                columns.setdefault(key, [None] * len(images))[place] = value
        if rows and not named and own == folder:
            raise ValueError(f"{shown(listing.addresses[name])} names no image that is there, such as {missing[0]!r}")
        if missing and named:
            remarks.append(f"{name} names {counted(missing, 'file')} that are not there")
        if twice:
            remarks.append(f"{name} names {counted(twice, 'image')} more than once, of which the last row is taken")
    remarks += _add_sidecars(listing, images, columns)
    return {name: _typed(values) for name, values in columns.items()}, remarks


def _rows(address: str, name: str) -> list[dict[str, Any]]:
    """The rows, each with "file_name"; ValueError names the file."""
    try:
        data = read_bytes(address)
        if name.endswith(".parquet"):
            rows = pq.read_table(io.BytesIO(data)).to_pylist()
        elif name.endswith(".csv"):
            rows = list(csv.DictReader(io.StringIO(data.decode("utf-8-sig"))))
        elif name.endswith(".jsonl"):
            rows = [json.loads(line) for line in data.decode("utf-8").splitlines() if line.strip()]
        else:
            # StyleGAN's and EDM's dataset_tool: a list of [name, class], or null.
            labels = (json.loads(data) or {}).get("labels") or []
            rows = [{"file_name": name, "label": label} for name, label in labels]
        rows = [dict(row) for row in rows]
    except UnicodeDecodeError as error:
        raise ValueError(f"{shown(address)} is not text in UTF-8; save it as UTF-8, or remove it") from error
    except (OSError, ValueError, TypeError, AttributeError, csv.Error, pa.ArrowInvalid) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{shown(address)} cannot be read: {reason[:200]}; repair or remove it") from error
    if any(not isinstance(row.get("file_name"), str) for row in rows):
        has = ", ".join(map(str, rows[0]))
        raise ValueError(
            f"{shown(address)} needs a column file_name with the name of an image in every row; its columns are {has}"
        )
    return rows


def _add_sidecars(listing: Listing, images: Sequence[str], columns: dict[str, list]) -> list[str]:
    """Add what webdatasets have beside each image: a label in a .cls or in "label" of a .json, and
    in a .txt a caption, the column txt as on the Hub, None where it is missing.
    """
    # The key of a webdataset ends at the first dot of the file's name.
    stems = [posixpath.join(posixpath.dirname(n), posixpath.basename(n).split(".")[0]) for n in images]
    by_stem = {
        ending: {
            os.path.splitext(name)[0]: name
            for name in listing.others
            if name.lower().endswith(ending) and posixpath.basename(name) not in METADATA
        }
        for ending in (".cls", ".json", ".txt")
    }

    def read(ending: str, stem: str) -> bytes:
        return read_bytes(listing.addresses[by_stem[ending][stem]])

    if "txt" not in columns and any(stem in by_stem[".txt"] for stem in stems):
        columns["txt"] = [_text(read(".txt", stem)) if stem in by_stem[".txt"] else None for stem in stems]
    for ending, label_of in ((".cls", _text), (".json", _label_in_json)):
        without = [name for name, stem in zip(images, stems) if stem not in by_stem[ending]]
        if "label" in columns or len(without) == len(images) or (without and ending == ".json"):
            continue
        if without:
            return [f"no classes: {counted(without, 'image')} without a .cls file"]
        labels = [label_of(read(ending, stem)) for stem in stems]
        if any(label is not None for label in labels):
            columns["label"] = labels
    return []


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace").strip()


def _label_in_json(data: bytes) -> Any:
    try:
        facts = json.loads(data)
    except ValueError:
        return None
    return facts.get("label") if isinstance(facts, dict) else None


def _typed(values: list) -> list:
    """Numbers written as text, as a .csv has them, become integers; 01 beside 1 is no number."""
    texts = [value for value in values if value is not None]
    if texts and all(isinstance(v, str) and re.fullmatch(r" *(0|-?[1-9]\d*) *", v) for v in texts):
        return [None if value is None else int(value) for value in values]
    return values
