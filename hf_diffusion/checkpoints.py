"""Checkpoints that are either whole or not there: staged, checksummed, renamed, rotated, and verified before use."""

import hashlib
import json
import logging
import re
import shutil
from pathlib import Path

from accelerate import Accelerator


logger = logging.getLogger(__name__)
MANIFEST = "manifest.json"
NAME = re.compile(r"checkpoint-(\d+)")


class BadCheckpoint(ValueError):
    """A checkpoint that is incomplete, damaged, or of another run."""


def save_checkpoint(accelerator: Accelerator, output_dir: Path, step: int, run: dict, limit: int | None) -> Path:
    """Write `checkpoint-<step>` on all processes together and drop the oldest beyond `limit`.

    The state goes to a hidden folder first, is described by a manifest with a checksum of every file, and is renamed at the end, so that a kill
    at any moment leaves the former checkpoints as they were. `run` is what `load_checkpoint` compares.
    """
    target = output_dir / f"checkpoint-{step:08d}"
    staging = output_dir / f".{target.name}.partial"
    if accelerator.is_main_process:
        shutil.rmtree(staging, ignore_errors=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(staging), safe_serialization=True)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            _seal(staging, {"step": step, **run})
            shutil.rmtree(target, ignore_errors=True)  # of the same step, from before a resume
            staging.rename(target)
            _drop_oldest(output_dir, limit)
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        newest = latest_checkpoint(output_dir)
        kept = f"the newest whole one is {newest}" if newest else "there is none yet"
        raise OSError(
            f"the checkpoint of step {step} could not be written to {output_dir} ({error}); {kept}"
        ) from error
    accelerator.wait_for_everyone()
    return target


def _seal(folder: Path, run: dict) -> None:
    files = {str(f.relative_to(folder)): _sha256(f) for f in sorted(folder.rglob("*")) if f.is_file()}
    (folder / MANIFEST).write_text(json.dumps({**run, "files": files}, indent=1, sort_keys=True))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _drop_oldest(output_dir: Path, limit: int | None) -> None:
    for folder in list_checkpoints(output_dir)[: -limit if limit else 0]:
        shutil.rmtree(folder, ignore_errors=True)


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    folders = [f for f in Path(output_dir).glob("checkpoint-*") if NAME.fullmatch(f.name) and f.is_dir()]
    return sorted(folders, key=lambda folder: int(NAME.fullmatch(folder.name)[1]))


def latest_checkpoint(output_dir: Path) -> Path | None:
    """The newest checkpoint whose files all match their checksums; damaged ones are passed over with a warning."""
    for folder in reversed(list_checkpoints(output_dir)):
        try:
            read_manifest(folder)
            return folder
        except BadCheckpoint as error:
            logger.warning("%s; trying the one before it", error)
    return None


def read_manifest(folder: Path) -> dict:
    """The manifest of a checkpoint after comparing every file with it; BadCheckpoint says what is missing or damaged."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = manifest["files"]
    except (OSError, ValueError, KeyError):
        raise BadCheckpoint(
            f"{folder} is no whole checkpoint of this package: its {MANIFEST} is missing or damaged"
        ) from None
    for name, checksum in files.items():
        path = folder / name
        if not path.is_file() or _sha256(path) != checksum:
            raise BadCheckpoint(
                f"{folder} is damaged: {name} is {'different from what was saved' if path.is_file() else 'missing'}"
            )
    return manifest


def find_checkpoint(output_dir: Path, asked: str) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` means: `latest` (None where there is none yet) or a folder.

    `hub` is the latest, too: the one of the Hub has been put beside the others by then.
    """
    if asked in ("latest", "hub"):
        return latest_checkpoint(output_dir)
    folder = Path(asked)
    if not folder.is_dir() and (Path(output_dir) / asked).is_dir():
        folder = Path(output_dir) / asked
    if not folder.is_dir():
        names = [f.name for f in list_checkpoints(output_dir)]
        raise BadCheckpoint(
            f"there is no checkpoint {asked!r}; {output_dir} has {names or 'none'}, and 'latest' takes the newest"
        )
    read_manifest(folder)
    return folder


def check_same_run(folder: Path, run: dict) -> int:
    """The step of a checkpoint, after making sure that it belongs to this run; BadCheckpoint lists the settings that differ."""
    manifest = read_manifest(folder)
    differing = [
        f"{name} was {manifest.get(name)!r} and is {value!r}"
        for name, value in run.items()
        if manifest.get(name) != value
    ]
    if differing:
        raise BadCheckpoint(
            f"{folder} belongs to another run: {'; '.join(differing)}; restore these settings or start in a new output_dir"
        )
    return manifest["step"]
