"""Where an image lies: a file, or an entry of a zip or tar archive; and how its bytes are read.

An address is written like fsspec's, "zip://cat/1.png::/data/set.zip", but its name is quoted. So a
name in an archive stays a name: one that holds "::http://..." cannot become an address of its own.
"""

import functools
import os
import re
import tarfile
import zipfile
import zlib
from typing import BinaryIO
from urllib.parse import quote, unquote

import datasets


ARCHIVES = {".zip": "zip", ".tar": "tar"}
# What `datasets` makes of files on the Hub, also of those in its archives; no other address is
# followed.
ON_THE_HUB = re.compile(r"((zip|tar)://[^:]*::)?hf://[^:]*(@[^:]*)?")
# The names of compression methods that Python cannot undo, by the number in a zip's directory.
METHODS = {9: "Deflate64", 93: "Zstandard", 95: "XZ", 96: "JPEG", 97: "WavPack", 98: "PPMd"}
READABLE = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)


class Unreadable(OSError):
    """One image cannot be had from where it should lie."""


def entry_address(archive: str, name: str) -> str:
    """The address of an entry; `archive` is an absolute path ending in .zip or .tar."""
    return f"{ARCHIVES[os.path.splitext(archive)[1].lower()]}://{quote(name, errors='surrogateescape')}::{archive}"


def shown(address: str) -> str:
    """The address as a person reads it: the path of a file, or archive and name."""
    kind, archive, name = _parts(address)
    return f"{archive}/{name}" if kind else address


def read_bytes(address: str) -> bytes:
    """The content of the file or entry; Unreadable, in words, where there is none."""
    kind, archive, name = _parts(address)
    try:
        if kind == "zip":
            return _open_zip(archive, os.getpid()).read(name)
        if kind == "tar":
            return _read_tar(archive, name)
        if os.path.isabs(address):
            with open(address, "rb") as file:
                return file.read()
        if ON_THE_HUB.fullmatch(address):
            with datasets.utils.file_utils.xopen(address, "rb") as file:
                return file.read()
    except KeyError as error:
        raise Unreadable("the archive has no such entry") from error
    except FileNotFoundError as error:
        gone = os.path.islink(address)
        raise Unreadable("it is a link that leads nowhere" if gone else "there is no such file") from error
    except (OSError, RuntimeError, NotImplementedError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise Unreadable(" ".join(str(error).split()) or type(error).__name__) from error
    if "://" in address:
        raise Unreadable("it is an address outside of the Hub, which is not followed")
    raise Unreadable("its path is not absolute; store images in the table, or pass the folder with the files")


def zip_entries(path: str) -> list[str]:
    """The names of the files in a zip; ValueError for one that Python cannot read."""
    with zipfile.ZipFile(path) as archive:
        entries = [entry for entry in archive.infolist() if not entry.is_dir()]
    for entry in entries:
        if entry.flag_bits & 1:
            raise ValueError(f"{path} is encrypted; unpack it and pass the folder")
        if entry.compress_type not in READABLE:
            method = METHODS.get(entry.compress_type, f"method {entry.compress_type}")
            raise ValueError(
                f"{path} is packed by {method}, which Python cannot read; unpack it and pass the folder, "
                "or pack it anew"
            )
    return [entry.filename for entry in entries]


def tar_entries(path: str) -> list[str]:
    """The names of the files in an uncompressed tar."""
    return list(_tar_index(path))


def _parts(address: str) -> tuple[str | None, str, str]:
    """Kind of archive, its path and the name in it; (None, "", "") for another address."""
    match = re.fullmatch(r"(zip|tar)://([^:]*)::(/.*)", address, re.DOTALL)
    return (match[1], match[3], unquote(match[2], errors="surrogateescape")) if match else (None, "", "")


@functools.lru_cache(maxsize=4)
def _open_zip(path: str, process: int) -> zipfile.ZipFile:
    # One handle for each process: forked workers that share a file offset read each other's bytes.
    return zipfile.ZipFile(path)


@functools.lru_cache(maxsize=1024)
def _tar_index(path: str) -> dict[str, tuple[int, int]]:
    with tarfile.open(path, "r:") as archive:
        return {entry.name: (entry.offset_data, entry.size) for entry in archive if entry.isfile()}


@functools.lru_cache(maxsize=64)
def _open_tar(path: str, process: int) -> BinaryIO:
    return open(path, "rb")


def _read_tar(path: str, name: str) -> bytes:
    offset, size = _tar_index(path)[name]
    # pread has no shared offset, so that threads do not read each other's bytes.
    data = os.pread(_open_tar(path, os.getpid()).fileno(), size, offset)
    if len(data) < size:
        raise EOFError("the archive ends in the middle of the entry")
    return data
