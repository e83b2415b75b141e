"""The folder of a run: claimed by one process tree at a time, and emptied of a former run only at
the last moment."""

import errno
import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hf_diffusion.hub.card_format import parse_card
from hf_diffusion.hub.files import CARD, model_files
from hf_diffusion.loop.checkpoints import list_checkpoints


logger = logging.getLogger(__name__)
# The settings that repeat a run.
CONFIG = "config.yaml"
# A picture, .png, or a text, .txt.
PREVIEW = "data_preview"
# Where a run that is to be overwritten waits until the new one has its first checkpoint.
FORMER = ".former-run"
# What a run leaves beside its checkpoints and its model. The card stays, since people write into
# it.
LEFT_BY_A_RUN = (
    "metrics.jsonl",
    "metrics.json",
    CONFIG,
    "loss_curve.png",
    "samples",
    "outbox",
    "best",
    "logs",
)
# What a kill leaves behind, of this version and of earlier ones.
LEAVINGS = (
    ".saving-*",
    ".*.partial",
    ".checkpoint-*",
    ".from-hub",
    ".writable.*",
    ".config.yaml.*",
    ".[0-9]*.loss_curve.png",
)


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder, which is made where there is none, and remove what kills
    have left in it.

    The lock is the system's, on the folder itself: it ends with the process, however that ends,
    and leaves no file. ValueError where another run is at work there, or where nothing can be
    written.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir {folder} is a file; give a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # has no name, so that no kill leaves it behind
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"output_dir {folder} cannot be written ({error.strerror}); give another folder") from error
    handle = os.open(folder, os.O_RDONLY)
    try:
        _lock(handle, folder)
        _remove_leavings(folder)
        _take_back(folder)
        yield
    finally:
        os.close(handle)


def check_content(folder: Path, overwrite: bool, resume: bool) -> None:
    """ValueError where the folder holds another run, or a card that the end of the run could not
    renew."""
    used = [path.name for path in folder.iterdir() if path.stem != PREVIEW]
    if used and not (overwrite or resume):
        raise ValueError(
            f"output_dir {folder} is not empty; go on with its run by --resume_from_checkpoint latest, begin anew by "
            "--overwrite_output_dir, or give another folder"
        )
    check_card(folder)


def check_card(folder: Path) -> None:
    """ValueError for a README.md that cannot be read as a model card."""
    card = folder / CARD
    if not card.exists():
        return
    try:
        parse_card(card.read_text(encoding="utf-8"), str(card))
    except UnicodeDecodeError:
        raise ValueError(f"{card} is not text in UTF-8; save it as UTF-8, or remove it") from None


def set_card_aside(folder: Path) -> Path | None:
    """Rename a card that cannot be read any more, so that a new one can be written; returns its
    new place."""
    try:
        check_card(folder)
    except ValueError:
        aside = folder / "README.unreadable.md"
        (folder / CARD).replace(aside)
        return aside
    return None


def move_former_run(folder: Path) -> None:
    """Put what a run has left in its folder aside, to be dropped by `drop_former_run`."""
    former = folder / FORMER
    former.mkdir(exist_ok=True)
    names = [*LEFT_BY_A_RUN, *(path.name for path in list_checkpoints(folder))]
    # of a component its whole folder
    names += dict.fromkeys(Path(name).parts[0] for name in model_files(folder))
    for name in names:
        if (folder / name).exists():
            (folder / name).rename(former / name)


def drop_former_run(folder: Path) -> None:
    """Remove what `move_former_run` has put aside."""
    former = folder / FORMER
    if former.exists():
        # first out of reach: half of a run must not be taken back
        gone = former.rename(folder / f"{FORMER}.partial")
        shutil.rmtree(gone, ignore_errors=True)


def _take_back(folder: Path) -> None:
    """Put a former run back where the one that replaced it has ended before its first
    checkpoint."""
    former = folder / FORMER
    if not former.exists():
        return
    if list_checkpoints(folder):
        drop_former_run(folder)
        return
    for path in sorted(former.iterdir()):
        target = folder / path.name
        if target.is_dir():
            shutil.rmtree(target)
        path.replace(target)
    former.rmdir()
    print(f"{folder}: the run that was to be overwritten is back, since what replaced it ended without a checkpoint")


def _lock(handle: int, folder: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"another run is at work in output_dir {folder}; let it finish, or give another folder"
        ) from None
    except OSError as error:
        # some network file systems lock no folders
        reason = errno.errorcode.get(error.errno, error.strerror)
        logger.warning("%s cannot be locked (%s): start no second run in it", folder, reason)


def _remove_leavings(folder: Path) -> None:
    for replaced in folder.glob(".checkpoint-*.replaced"):
        # a kill between two renames
        whole = folder / replaced.name.removeprefix(".").removesuffix(".replaced")
        if not whole.exists():
            replaced.rename(whole)
    for inside in (folder, folder / "samples", folder / "best", folder / "outbox"):
        for pattern in (*LEAVINGS, ".staging"):
            for path in inside.glob(pattern):
                # the best model's own halves are completed by `BestModel`
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
