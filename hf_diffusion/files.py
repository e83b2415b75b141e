"""One way to write a file, or a folder: whole or not at all."""

import hashlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO


def cache_folder(kind: str) -> Path:
    """Where things of a kind are kept that cost time to make: in HF_DIFFUSION_CACHE, or in
    hf_diffusion beside the Hub's cache.
    """
    # Here, since commands that keep nothing answer without it.
    from huggingface_hub.constants import HF_HOME

    return Path(os.environ.get("HF_DIFFUSION_CACHE") or Path(HF_HOME) / "hf_diffusion") / kind


def write_whole(path: str | os.PathLike, content: bytes | str | Callable[[BinaryIO], object]) -> Path:
    """Write a file that takes its name only when it is complete; returns its path.

    `content` is bytes, text (stored as UTF-8), or a function of the open binary file. The folder is
    made where there is none. A failure leaves the former file as it was, and nothing beside it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def write_shown(path: str | os.PathLike, shown: Any) -> Path:
    """Write what shows samples: a picture of PIL as `path`.png, a text as `path`.txt.

    Returns where it is.
    """
    if isinstance(shown, str):
        return write_whole(f"{path}.txt", shown)
    return write_whole(f"{path}.png", lambda file: shown.save(file, format="PNG"))


def write_folder(path: str | os.PathLike, write: Callable[[Path], object], last: str) -> Path:
    """Write a folder whose files take their names when all of them are complete; returns its path.

    `write(folder)` writes into an empty folder. A folder that is there keeps its other files, and
    gets the new ones one after the other, the one called `last` at the end: with it, the folder is
    whole. A failure leaves the former files as they were.
    """
    path = Path(path)
    # The same file system, and surely writable.
    place = path if path.is_dir() else path.absolute().parent
    remove_partials(place)
    partial = place / f".{path.name}.{os.getpid()}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write(partial)
        try:
            partial.rename(path)
        # There is one, perhaps of a process that was faster.
        except OSError:
            files = (file for file in partial.rglob("*") if file.is_file())
            for file in sorted(files, key=lambda file: file.name == last):
                target = path / file.relative_to(partial)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return path


def remove_partials(*folders: str | os.PathLike) -> None:
    """Remove what processes that were killed while they wrote have left in folders.

    Files of another machine's processes are younger than a minute while these write.
    """
    for folder in folders:
        for path in Path(folder).glob(".*.partial"):
            process = path.name.split(".")[-2]
            if not process.isdecimal() or _is_alive(int(process)):
                continue
            newest = max((file.stat().st_mtime for file in (path, *path.rglob("*"))), default=0)
            if time.time() - newest > 60:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def sha256(path: str | os.PathLike) -> str:
    """The SHA-256 of a file's content, in hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
