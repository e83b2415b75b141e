"""`hf-diffusion push`: share a folder on the Hub, or send what a training run could not push."""

import argparse
import tempfile
from pathlib import Path


def add_push_parser(commands: argparse._SubParsersAction) -> None:
    """Add `push`."""
    push = commands.add_parser(
        "push", allow_abbrev=False, help="share a saved pipeline on the Hub",
        description="Push weights, code, card, pictures and settings of a folder as one commit. The token is that of "
        "`hf auth login`, or HF_TOKEN. With --pending, send what a training run has left in its outbox.",
    )  # fmt: skip
    add = push.add_argument
    add("folder", type=Path, nargs="?", help="folder of a saved pipeline or model")
    add("repo_id", nargs="?", help="repository on the Hub, user/name; created if there is none")
    add("--pending", type=Path, metavar="OUTPUT_DIR", help="output folder of a training run")
    add("--public", action="store_true", help="let everybody see the repository, if this push creates it")
    add("--message", default="Push with hf-diffusion", help="message of the commit")
    add("--tag", help="tag of the commit, for `revision=`; a tag that exists is never moved")
    add("--traceback", action="store_true", help="on an error, show where in the code it arose")
    push.set_defaults(run=push_command)


def push_command(args: argparse.Namespace) -> None:
    """`hf-diffusion push`."""
    from hf_diffusion.cli import UsageError

    if args.pending is not None:
        if args.folder is not None:
            raise UsageError("--pending takes what is pushed from the outbox; leave out the folder and the repository")
        push_outbox(args.pending)
    elif args.repo_id is None:
        raise UsageError("give the folder and the repository, or --pending OUTPUT_DIR")
    else:
        push_folder(args.folder, args.repo_id, args.message, args.tag, private=not args.public)


def push_outbox(output_dir: Path) -> None:
    """Send the outbox of a training run; prints where each entry arrived. Raises PushError at the first that does not."""
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
    from hf_diffusion.hub.card_merge import name_repository
    from hf_diffusion.hub.files import pushable_files
    from hf_diffusion.hub.push import CARD, Push, check_write_access, push

    files = pushable_files(folder)
    repo_id = check_write_access(repo_id, private)
    with tempfile.TemporaryDirectory() as scratch:
        if CARD in files:
            card = Path(scratch) / CARD
            card.write_text(name_repository(files[CARD].read_text(encoding="utf-8"), repo_id, tag), encoding="utf-8")
            files[CARD] = card
        say_where(push(Push(files, repo_id, message=message, tag=tag, private=private)))
    if CARD not in files:
        print(f"{folder} has no {CARD}: the model is there without a card")


def say_where(pushed) -> None:
    """Print where a push arrived and what the user should know about it."""
    print(f"pushed to {pushed.url}, commit {pushed.commit[:12]}", *pushed.notes, sep="\n  ", flush=True)
