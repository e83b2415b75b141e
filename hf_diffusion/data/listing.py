"""What lies in a folder or an archive: images by split, and what is left out, by name.

Everything here works on names relative to the root, with "/" between folders, so that a folder, a
zip and a tar of the same files give the same images, classes and splits.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath

from PIL import Image

from hf_diffusion.data.addresses import entry_address, shown, tar_entries, zip_entries
from hf_diffusion.data.selection import SPLIT_NAMES, canonical_name


METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet", "dataset.json")
# Files of a webdataset that stand beside an image of the same name, and files that describe the
# whole.
SIDECARS = (".cls", ".txt", ".json", ".md", ".csv", ".jsonl", ".yaml", ".yml")
TABLES = (".csv", ".tsv", ".jsonl", ".parquet")
NOT_DATA = ("__MACOSX", "__pycache__", "Thumbs.db", "desktop.ini")
# What this package writes into an output_dir: pictures in such a folder were drawn by a model.
OF_A_RUN = {"metrics.jsonl", "data_preview.png", "data_preview.txt"}
# What shards are told apart by: train-00000-of-00002, part_3, 017.
NUMBERS = re.compile(r"[-_. ]*\d+([-_. ]*of[-_. ]*\d+)?$")
MOST_NAMED = 3


@dataclass
class Listing:
    """The files of a root: `addresses` by name, in order of name; `images` and `others` are names.

    remarks: what was left out, counted and named.
    """

    addresses: dict[str, str]
    images: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


@cache
def image_extensions() -> frozenset[str]:
    """The file extensions that Pillow reads."""
    return frozenset(extension for extension, kind in Image.registered_extensions().items() if kind in Image.OPEN)


def list_folder(root: Path) -> Listing:
    """List a folder with all folders below it, also those that links lead to, each once."""
    # Addresses are absolute: a relative path is one of a table, whose folder nobody knows.
    root = os.path.abspath(root)
    addresses, seen, empty, remarks = {}, set(), [], []
    unreadable: list[str] = []
    walk = os.walk(
        root, followlinks=True, onerror=lambda error: unreadable.append(os.path.relpath(error.filename, root))
    )
    for folder, inner, files in walk:
        real = os.path.realpath(folder)
        if folder != root and OF_A_RUN & set(files):
            remarks.append(
                f"left out the folder {os.path.relpath(folder, root)}, which is the output of a training run"
            )
            inner.clear()
            continue
        # A link to a folder above would never end.
        if real in seen:
            inner.clear()
            continue
        seen.add(real)
        if not inner and not files and os.path.basename(folder) not in NOT_DATA:
            empty.append(os.path.relpath(folder, root))
        prefix = "" if folder == root else os.path.relpath(folder, root).replace(os.sep, "/") + "/"
        for file in files:
            addresses[prefix + file] = os.path.join(folder, file)
    if unreadable:
        remarks.append(f"left out {counted(unreadable, 'folder')} that cannot be read")
    if empty and addresses:
        remarks.append(f"left out {counted(sorted(empty), 'empty folder')}")
    return _sorted_out(addresses, remarks)


def list_archives(paths: Sequence[Path], root: Path | None = None) -> Listing:
    """List one or several zips or tars as one root; ValueError for one that cannot be read.

    Several of them, below `root`, are like folders of their names: train.zip is a split, cat.zip a
    class. Names that differ in numbers only are parts of one set.
    """
    addresses, twice = {}, []
    folders, remarks = _folders_of_archives(paths, root)
    for path, folder in zip(paths, folders):
        archive, own = os.path.abspath(path), set()
        for name in (zip_entries if path.suffix.lower() == ".zip" else tar_entries)(archive):
            # Written by Windows, which takes both; and a "/" or "./" at the beginning is no folder.
            plain = folder + name.replace("\\", "/").lstrip("/").removeprefix("./")
            if plain in own:
                twice.append(plain)
            elif plain in addresses and os.path.splitext(plain)[1].lower() in image_extensions():
                raise ValueError(
                    f"{shown(addresses[plain])} and {path.name} both hold {name}; unpack them into folders of their "
                    "own, or give the files other names"
                )
            own.add(plain)
            addresses[plain] = entry_address(archive, name)
    remarks += [f"of {counted(twice, 'name')} given twice the last file is taken"] if twice else []
    return _sorted_out(addresses, remarks)


def _folders_of_archives(paths: Sequence[Path], root: Path | None) -> tuple[list[str], list[str]]:
    """The folder, "" or ending in "/", that each archive stands for, and remarks."""
    if len(paths) == 1 or root is None:
        return [""] * len(paths), []
    names = [path.relative_to(root).with_suffix("").as_posix() for path in paths]
    without_numbers = [NUMBERS.sub("", name) for name in names]
    parts = [name.rpartition("/")[2] for name in without_numbers]
    # The name of a set that comes in parts is no class of it.
    if len(set(without_numbers)) == 1 and canonical_name(parts[0]) not in ("validation", "test", "eval"):
        without_numbers = [name.rpartition("/")[0] for name in without_numbers]
    folders = [f"{name}/" if name and not name.endswith("/") else name for name in without_numbers]
    joined = [path.name for path, folder in zip(paths, folders) if folders.count(folder) > 1]
    return folders, [f"read as parts of one set: {counted(joined, 'archive')}"] if joined else []


def _sorted_out(addresses: Mapping[str, str], remarks: list[str]) -> Listing:
    strange = [name for name in addresses if not _is_text(name)]
    listing = Listing({name: addresses[name] for name in sorted(addresses) if _is_text(name)}, remarks=remarks)
    if strange:
        shown = [name.encode("utf-8", "backslashreplace").decode() for name in strange]
        listing.remarks.append(f"left out {counted(shown, 'file')} whose names are not UTF-8")
    hidden, strange, tables = [], [], []
    for name in listing.addresses:
        if any(part.startswith(".") or part in NOT_DATA for part in name.split("/")):
            hidden.append(name)
        elif os.path.splitext(name)[1].lower() in image_extensions():
            if name != "data_preview.png":
                listing.images.append(name)
        else:
            listing.others.append(name)
            base, extension = os.path.splitext(name.rsplit("/", 1)[-1])
            if extension.lower() in TABLES and base + extension not in METADATA:
                tables.append(name)
            elif extension.lower() not in SIDECARS and base not in ("LICENSE", "README"):
                strange.append(name)
    listing.remarks += [f"left out {counted(strange, 'file')} without an image's extension"] if strange else []
    if tables and listing.images:
        listing.remarks.append(f"{counted(tables, 'table')} not read; labels are taken from {', '.join(METADATA[:3])}")
    pictures = [name for name in hidden if os.path.splitext(name)[1].lower() in image_extensions()]
    listing.remarks += [f"left out {counted(pictures, 'hidden file')}"] if pictures else []
    return listing


def _is_text(name: str) -> bool:
    """Whether a table can hold the name; bytes of other encodings become lone surrogates."""
    return name.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in name)


def counted(names: Sequence[str], what: str, several: str | None = None) -> str:
    """Number and first names: "5 files (a.txt, b.txt, c.txt, ...)"."""
    more = ", ..." if len(names) > MOST_NAMED else ""
    noun = what if len(names) == 1 else several or f"{what}s"
    return f"{len(names):,} {noun} ({', '.join(names[:MOST_NAMED])}{more})"


def common_folder(names: Iterable[str]) -> str:
    """The folders that all names begin with, "" or ending in "/", such as the one of an archive."""
    folders = [PurePosixPath(name).parent.parts for name in names]
    shared = os.path.commonprefix(folders) if folders else ()
    # A split folder that stands alone is still a split.
    keep = next((place for place, part in enumerate(shared) if part.lower() in SPLIT_NAMES), len(shared))
    return "".join(f"{part}/" for part in shared[:keep])


def split_images(images: Sequence[str], root: str) -> tuple[dict[str, str], list[str]]:
    """The folder of each split by name, ending in "/"; and the folders that are no split.

    Folders are splits where there are two of them with names of splits, or one alone. A single one
    beside other folders with images is a class, as a toy train is. Without splits all images are
    "train".
    """
    folders = sorted({name[len(root) :].split("/")[0] for name in images if "/" in name[len(root) :]})
    splits = [folder for folder in folders if folder.lower() in SPLIT_NAMES]
    others = [folder for folder in folders if folder not in splits]
    if not splits or (len(splits) == 1 and others):
        return {"train": root}, []
    by_name: dict[str, str] = {}
    # A folder called validation has the name before one called val, which then keeps its own.
    for folder in sorted(splits, key=lambda folder: (folder != canonical_name(folder), folder)):
        name = next(name for name in (canonical_name(folder), folder.lower(), folder) if name not in by_name)
        by_name[name] = f"{root}{folder}/"
    return by_name, others


def classes_of_folders(names: Sequence[str]) -> tuple[list[str] | None, str | None]:
    """The class of each image, by its folder, and a remark; None where the folders tell no classes.

    names: relative to the folder of the split. With images everywhere at one depth a class is the
        innermost folder,
    if no two of these have one name. Else it is the outermost one.
    """
    parts = [name.split("/") for name in names]
    loose = [name for name, part in zip(names, parts) if len(part) == 1]
    folders = {part[0] for part in parts if len(part) > 1}
    if loose:
        lies = "lies" if len(loose) == 1 else "lie"
        return None, (
            f"no classes: {counted(loose, 'image')} {lies} beside the folders {', '.join(sorted(folders)[:5])}; "
            "put every image into the folder of its class"
            if folders
            else None
        )
    innermost = {part[-2]: "/".join(part[:-1]) for part in parts}
    unique = len(set(innermost.values())) == len({"/".join(part[:-1]) for part in parts})
    if len({len(part) for part in parts}) == 1 and unique:
        classes, remark = [part[-2] for part in parts], None
    else:
        classes = [part[0] for part in parts]
        remark = "classes are the outermost folders: images lie at several depths, or inner folders share names"
    return (classes, remark) if len(set(classes)) > 1 else (None, None)
