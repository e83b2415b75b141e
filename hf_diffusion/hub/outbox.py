"""The queue of pushes of a run: folders on disk, so that no outage and no kill loses anything.

`output_dir/outbox/000001-step-00000100/` holds `push.json` and, under `files/`, exactly what is
pushed. A child process sends them in their order; it is a process of its own so that nothing that
happens there can hold up or end the training.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi

from hf_diffusion.hub.errors import PushError
from hf_diffusion.hub.push import PATIENCE, Patience, Push, Pushed, push


FOLDER, STAGING = "outbox", ".staging"
ENTRY = re.compile(r"(\d{6})-.+")
WRITTEN_ONCE = (".safetensors", ".bin", ".pkl")
# During an outage of days every save would stay on disk; the oldest beyond these are given up.
MOST_WAITING = 10
# Imports the Hub's client and no torch, which takes seconds and hundreds of megabytes.
CHILD = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from hf_diffusion.hub.outbox import send_and_report
sys.exit(send_and_report(Path(sys.argv[2])))
"""


def pending(output_dir: Path) -> list[Path]:
    """The entries of a run's outbox that are complete and not pushed yet, oldest first."""
    folder = Path(output_dir) / FOLDER
    found = [f for f in folder.glob("*") if ENTRY.fullmatch(f.name) and (f / "push.json").is_file()]
    return sorted(found, key=lambda f: f.name)


@contextmanager
def new_entry(
    output_dir: Path, name: str, repo_id: str, message: str, tag: str | None, private: bool
) -> Iterator[Path]:
    """A folder to fill with the files of one push; it joins the queue when the block ends well."""
    outbox = Path(output_dir) / FOLDER
    staging = outbox / STAGING
    shutil.rmtree(staging, ignore_errors=True)
    (staging / "files").mkdir(parents=True)
    try:
        yield staging / "files"
        record = {"repo_id": repo_id, "message": message, "tag": tag, "private": private}
        (staging / "push.json").write_text(json.dumps(record, indent=1))
        used = [int(ENTRY.fullmatch(f.name)[1]) for f in outbox.iterdir() if ENTRY.fullmatch(f.name)]
        staging.rename(outbox / f"{max(used, default=0) + 1:06d}-{name}")
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def drop_oldest(output_dir: Path, limit: int = MOST_WAITING) -> list[str]:
    """Give up the oldest entries beyond `limit`, sent at the moment or not; returns their names."""
    dropped = pending(output_dir)[:-limit]
    for entry in dropped:
        shutil.rmtree(entry, ignore_errors=True)
    return [entry.name for entry in dropped]


def link_or_copy(source: Path, target: Path) -> None:
    """Put a file into an entry; weights, which are only ever replaced, as a link if possible."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.suffix in WRITTEN_ONCE:
        try:
            os.link(source, target)
            return
        except OSError:  # another file system, or one without hard links
            pass
    shutil.copyfile(source, target)


def push_pending(
    output_dir: Path,
    api: HfApi | None = None,
    patience: Patience = PATIENCE,
) -> Iterator[Pushed]:
    """Push the entries of the outbox, also those that join meanwhile, and yield where each arrived.

    PushError at the first that does not get through: it stays, and so do those after it, since an
    older model must never be pushed on top of a newer one. BlockingIOError where another process is
    at it.
    """
    with _sole_sender(Path(output_dir) / FOLDER):
        while entries := pending(output_dir):
            record = json.loads((entries[0] / "push.json").read_text())
            folder = entries[0] / "files"
            files = {f.relative_to(folder).as_posix(): f for f in sorted(folder.rglob("*")) if f.is_file()}
            yield push(Push(files, **record), api, patience)
            (entries[0] / "push.json").unlink(missing_ok=True)  # first, so that a half-removed entry is none
            shutil.rmtree(entries[0], ignore_errors=True)


@contextmanager
def _sole_sender(outbox: Path) -> Iterator[None]:
    import fcntl  # not on Windows, where only training needs no lock

    outbox.mkdir(parents=True, exist_ok=True)
    with (outbox / ".lock").open("w") as lock:
        fcntl.flock(
            lock, fcntl.LOCK_EX | fcntl.LOCK_NB
        )  # the system lets go of it when the process ends, however it ends
        yield


def send_and_report(output_dir: Path) -> int:
    """`push_pending` for a command: says where all arrived or why it did not; the exit status."""
    try:
        for pushed in push_pending(output_dir):
            print(f"pushed to {pushed.url}, commit {pushed.commit[:12]}", *pushed.notes, sep="\n  ", flush=True)
    except BlockingIOError:
        print(f"another process is sending the outbox of {output_dir}", flush=True)
        return 0
    except (PushError, OSError, ValueError) as error:
        print(error, file=sys.stderr, flush=True)
        return 1
    return 0


def start_sending(output_dir: Path) -> subprocess.Popen:
    """Send the outbox in a child, which writes to `outbox/push.log` and outlives this process."""
    with (Path(output_dir) / FOLDER / "push.log").open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-c", CHILD, str(Path(__file__).parents[2]), str(output_dir)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            # An interrupt that ends the training in good order must not cut the push off.
            start_new_session=True,
        )
