"""One way to write a file: whole or not at all."""

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO


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


def remove_partials(*folders: str | os.PathLike) -> None:
    """Remove what processes that were killed while they wrote have left in folders.

    Files of another machine's processes are younger than a minute while these write.
    """
    for folder in folders:
        for path in Path(folder).glob(".*.partial"):
            process = path.name.split(".")[-2]
            if process.isdecimal() and not _is_alive(int(process)) and time.time() - path.stat().st_mtime > 60:
                path.unlink(missing_ok=True)


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
