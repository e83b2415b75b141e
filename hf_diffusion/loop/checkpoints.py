"""Checkpoints that are either whole or not there: staged, checksummed, renamed, rotated, and
verified before use.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError

from hf_diffusion.config.resuming import differences
from hf_diffusion.files import sha256
from hf_diffusion.hub.checkpoint_files import MANIFEST, BadCheckpoint, read_manifest
from hf_diffusion.loop.engines import DATA_PARALLEL, SHARDED
from hf_diffusion.loop.states import Stateful, write_state


logger = logging.getLogger(__name__)
NAME = re.compile(r"checkpoint-(\d+)")


class SaveFailed(OSError):
    """A checkpoint that could not be written; those before it are as they were."""


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: Path,
    step: int,
    run: dict,
    limit: int | None,
    states: Mapping[str, Stateful] | None = None,
) -> Path:
    """Write `checkpoint-<step>` on all processes together and drop the oldest beyond `limit`.

    The state goes to a hidden folder first, is described by a manifest with a checksum of every
    file, and is renamed at the end, so that a kill at any moment leaves the former checkpoints as
    they were. `run` is what `check_same_run` compares, `states` is what there is beside networks
    and optimizers. SaveFailed, on all processes, where one of them cannot write.
    """
    target = output_dir / f"checkpoint-{step:08d}"
    staging = output_dir / f".{target.name}.partial"

    def write() -> None:
        accelerator.save_state(str(staging), safe_serialization=True)
        # sharded ones come together only where all processes ask
        found = {name: stateful.state_dict() for name, stateful in (states or {}).items()}
        for name, state in found.items() if accelerator.is_main_process else ():
            write_state(staging, name, state)

    def seal() -> None:
        _seal(staging, {"step": step, **run})
        if target.exists():  # of the same step, from before a resume
            target.rename(output_dir / f".{target.name}.replaced")
        staging.rename(target)
        _drop_oldest(output_dir, limit)
        _remove_leftovers(output_dir)

    if accelerator.is_main_process:
        _remove_leftovers(output_dir)
    accelerator.wait_for_everyone()
    _all_or_none(accelerator, staging, write)
    _all_or_none(accelerator, staging, seal if accelerator.is_main_process else lambda: None)
    return target


def _all_or_none(accelerator: Accelerator, staging: Path, write: Callable[[], Any]) -> None:
    """Call `write`.

    If a process cannot write, remove what is written and raise SaveFailed on all of them.
    """
    reason = None
    try:
        write()
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = write_failure(error)
        if reason is None:
            raise
        problem = error
    # A sharded state is written with collectives in between, at which the others wait: nothing can
    # be agreed upon, the launcher ends them.
    together = accelerator.num_processes > 1 and accelerator.distributed_type not in SHARDED
    failed = reason is not None
    if together:
        failed = bool(accelerator.reduce(torch.tensor(float(failed), device=accelerator.device), "sum") > 0)
    if not failed:
        accelerator.wait_for_everyone()  # so that nobody goes on before all has been written
        return
    if accelerator.is_main_process:
        shutil.rmtree(staging, ignore_errors=True)
    free = shutil.disk_usage(staging.parent).free / 2**20
    newest = latest_checkpoint(staging.parent)
    raise SaveFailed(
        f"the checkpoint {staging.name.removeprefix('.').removesuffix('.partial')} could not be written to "
        f"{staging.parent}: "
        f"{reason or 'another process could not write its part'} ({free:,.0f} MiB are free there); "
        + (
            f"the newest whole one, {newest.name}, is untouched: make room and "
            if newest
            else "there is none yet: make room and "
        )
        + "go on with --resume_from_checkpoint latest"
    ) from (None if reason is None else problem)


def write_failure(error: Exception) -> str | None:
    """Why a file could not be written, in words.

    None for an exception that is about something else.
    """
    text = str(error)
    if isinstance(error, OSError):
        return error.strerror or text
    if isinstance(error, SafetensorError) and "I/O error" in text:
        return text.split("I/O error: ")[-1]
    # torch.save writes through C++ streams, which do not say why they fail
    if isinstance(error, RuntimeError) and ("inline_container" in text or "iostream error" in text):
        return "a file could not be written to its end"
    return None


def _seal(folder: Path, run: dict) -> None:
    """Write the manifest, and make sure that all is on the disk before the folder gets its name."""
    files = {str(f.relative_to(folder)): sha256(f) for f in sorted(folder.rglob("*")) if f.is_file()}
    (folder / MANIFEST).write_text(json.dumps({**run, "files": files}, indent=1, sort_keys=True))
    for name in (*files, MANIFEST):
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())


def _drop_oldest(output_dir: Path, limit: int | None) -> None:
    for folder in list_checkpoints(output_dir)[: -limit if limit else 0]:
        folder.rename(
            output_dir / f".{folder.name}.dropped"
        )  # a kill in the middle of a removal must not look like damage


def _remove_leftovers(output_dir: Path) -> None:
    """Remove what was dropped, replaced, or left half-written by a kill."""
    for folder in output_dir.glob(".checkpoint-*"):
        shutil.rmtree(folder, ignore_errors=True)


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    folders = [f for f in Path(output_dir).glob("checkpoint-*") if NAME.fullmatch(f.name) and f.is_dir()]
    return sorted(folders, key=lambda folder: int(NAME.fullmatch(folder.name)[1]))


def latest_checkpoint(output_dir: Path) -> Path | None:
    """The newest checkpoint whose files all match their checksums.

    Damaged ones are passed over with a warning.
    """
    for folder in reversed(list_checkpoints(output_dir)):
        try:
            read_manifest(folder)
            return folder
        except BadCheckpoint as error:
            logger.warning("%s; trying the one before it", error)
    return None


def find_checkpoint(output_dir: Path, asked: str) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` means: `latest` (None where there is none yet)
    or a folder.

    `hub` is the latest, too: the one of the Hub has been put beside the others by then.
    """
    if asked in ("latest", "hub"):
        newest = latest_checkpoint(output_dir)
        if newest is None and list_checkpoints(
            output_dir
        ):  # beginning anew would overwrite what a person may still save
            raise BadCheckpoint(
                f"every checkpoint in {output_dir} is damaged; begin anew by --overwrite_output_dir, or in a new "
                "output_dir"
            )
        return newest
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


def find_together(accelerator: Accelerator, output_dir: Path, asked: str) -> Path | None:
    """`find_checkpoint` by the main process, for all: they must not choose differently, nor each
    read all files.
    """
    answer: list = [None, None]
    if accelerator.is_main_process:
        try:
            answer[0] = find_checkpoint(output_dir, asked)
        except BadCheckpoint as error:
            answer[1] = str(error)
    folder, problem = broadcast_object_list(answer)
    if problem is not None:
        raise BadCheckpoint(problem)
    if folder is not None and not (folder / MANIFEST).is_file():
        raise BadCheckpoint(
            f"process {accelerator.process_index} does not see {folder}; output_dir must be on a disk that all "
            "machines share"
        )
    return folder


def check_same_run(folder: Path, run: dict) -> dict:
    """The manifest of a checkpoint that `find_together` gave, if it belongs to this run;
    BadCheckpoint lists what differs.

    The length may differ, as long as the checkpoint is not past the end.
    """
    manifest = json.loads((folder / MANIFEST).read_text())
    now = json.loads(json.dumps(run))  # what is compared has been through JSON, too
    total = now.pop("total_steps", None)
    if total is not None and manifest["step"] > total:
        raise BadCheckpoint(
            f"{folder} is past the end of a run of {total} steps; give a larger max_train_steps, or an earlier "
            "checkpoint"
        )
    # versions before 0.3 had one optimizer and one average, and said neither
    before = {"optimizer": "adamw", "ema_max_decays": [], **manifest.get("settings", {})}
    settings = differences(before, now.pop("settings", {}))
    differing = differences({**dict.fromkeys(now), "engine": DATA_PARALLEL, **manifest}, now) + settings
    if differing:
        raise BadCheckpoint(
            f"{folder} belongs to another run: {'; '.join(differing)}; restore these settings or start in a new "
            "output_dir"
        )
    return manifest
