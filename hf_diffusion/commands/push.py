"""`hf-diffusion push`: share a folder on the Hub, or send what a training run could not push."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hf_diffusion.commands.command import Command
from hf_diffusion.config.options import UsageError, option


if TYPE_CHECKING:
    from hf_diffusion.hub.push import Pushed


@dataclass(frozen=True, kw_only=True)
class PushCommand(Command):
    """Share a saved pipeline on the Hub.

    Weights, code, card, pictures and settings of a folder become one commit. The token is that of
    `hf auth login`, or HF_TOKEN. With --pending, send what a training run has left in its outbox.
    """

    folder: Path | None = option(None, "folder of a saved pipeline or model", positional=True)
    repo_id: str | None = option(None, "repository on the Hub, user/name; created if there is none", positional=True)
    pending: Path | None = option(
        None, "output folder of a training run, instead of folder and repository", group="push"
    )
    # Publishing cannot be undone.
    public: bool = option(False, "let everybody see the repository, if this push creates it")
    message: str = option("Push with hf-diffusion", "message of the commit")
    tag: str | None = option(None, "tag of the commit, for `revision=`; a tag that exists is never moved")

    def validate(self) -> None:
        """ValueError unless it is clear what to push."""
        if self.pending is not None and self.folder is not None:
            raise UsageError("--pending takes what is pushed from the outbox; leave out the folder and the repository")
        if self.pending is None and self.repo_id is None:
            raise UsageError("give the folder and the repository, or --pending OUTPUT_DIR")

    def run(self) -> None:
        """Push, and print where it arrived."""
        if self.pending is not None:
            push_outbox(self.pending)
        else:
            push_folder(self.folder, self.repo_id, self.message, self.tag, private=not self.public)


def push_outbox(output_dir: Path) -> None:
    """Send the outbox of a training run, and print where each entry arrived.

    Raises PushError at the first that does not.
    """
    # The Hub's client takes a second, and --help comes past here without running anything.
    from hf_diffusion.hub.outbox import pending, push_pending

    if not output_dir.is_dir():
        raise ValueError(f"there is no folder {output_dir}; give the output folder of a training run")
    if not pending(output_dir):
        print(f"nothing waits in the outbox of {output_dir}")
        return
    try:
        for pushed in push_pending(output_dir):
            say_where(pushed)
    except BlockingIOError:
        raise RuntimeError(f"another process is sending the outbox of {output_dir}; let it finish") from None


def push_folder(folder: Path, repo_id: str, message: str, tag: str | None, private: bool) -> None:
    """Push a saved pipeline or model, with its card's examples naming the repository."""
    # As above.
    from hf_diffusion.hub.card_merge import name_repository
    from hf_diffusion.hub.files import pushable_files, write_published
    from hf_diffusion.hub.push import CARD, Push, check_write_access, push

    files = pushable_files(folder)
    repo_id = check_write_access(repo_id, private)
    with tempfile.TemporaryDirectory() as scratch:
        for name, path in files.items():
            # beside the card, and without the paths of this machine
            if write_published(path, Path(scratch) / name):
                files[name] = Path(scratch) / name
        if CARD in files:
            card = Path(scratch) / CARD
            card.write_text(name_repository(files[CARD].read_text(encoding="utf-8"), repo_id, tag), encoding="utf-8")
            files[CARD] = card
        say_where(push(Push(files, repo_id, message=message, tag=tag, private=private)))
    if CARD not in files:
        print(f"{folder} has no {CARD}: the model is there without a card")


def say_where(pushed: "Pushed") -> None:
    """Print where a push arrived and what the user should know about it."""
    print(f"pushed to {pushed.url}, commit {pushed.commit[:12]}", *pushed.notes, sep="\n  ", flush=True)
