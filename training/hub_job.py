# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-diffusion"]
#
# [tool.hf-jobs]
# flavor = "a10g-small"
# timeout = "30m"
# secrets = ["HF_TOKEN"]
# ///
"""Train on machines of the Hub, which end at a time limit and forget their disk.

    hf jobs uv run --attempts 20 training/hub_job.py ddpm --data user/photos --resolution 64 \
        --max_train_steps 100000 --hub_model_id user/photos-ddpm

All that is not said by --help goes to `hf-diffusion train`. Each start goes on from the checkpoint
that the one before has put on the Hub, or into --output_dir where that is given: a bucket that is
mounted there. Shortly before the limit the training is told to save, what is not sent yet is sent,
and the script ends with status 75, a failure, so that it is started again. The last start leaves
the finished model with its card.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from hf_diffusion.config.closed_output import ending_with_its_reader
from hf_diffusion.hub.errors import PushError
from hf_diffusion.hub.outbox import pending, push_pending


TRAIN = (sys.executable, "-m", "hf_diffusion.cli", "train")
# "Try again later", in the C library's list of exit statuses.
NOT_FINISHED = 75
# Before the limit, for the last checkpoint and its way to the Hub: minutes, and of a short limit
# this share.
MARGIN, SHARE = 3.0, 0.1
# Each of these says how long to train, whatever the machine; a file of settings may.
LENGTHS = {"--max_train_steps", "--num_epochs", "--config"}


@ending_with_its_reader()
def main(argv: Sequence[str] | None = None) -> int:
    """Train to the end or the limit; 0, NOT_FINISHED, or the status of a training that failed."""
    own, words = parse(argv)
    margin = min(MARGIN, SHARE * own.minutes)
    status, stopped = train(words, start_of_the_job() + 60 * (own.minutes - margin))
    try:
        send(own.folder)
    except (PushError, OSError) as error:
        print(f"{error}; the next start goes on from an earlier checkpoint", flush=True)
    if stopped:
        print("the time is over and the training is not: start the same command again to go on", flush=True)
        return NOT_FINISHED
    return status


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The settings of the job, and the words for `hf-diffusion train`."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="hub_job.py", description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("family", help="what to train: a family of `hf-diffusion train`")
    parser.add_argument("--minutes", type=float, default=30, help="the limit, as --timeout of hf jobs (default: 30)")
    parser.add_argument(
        "--output_dir", help="where checkpoints outlast the machine, such as a bucket; without it the Hub keeps them"
    )
    own, words = parser.parse_known_args(argv)
    if own.minutes <= 0:
        parser.error(f"--minutes {own.minutes:g}: give the limit of the job in minutes, above 0")
    given = {word.partition("=")[0] for word in words}
    if "--hub_model_id" not in given:
        parser.error("give --hub_model_id user/name, where the model is to arrive")
    # Minutes are planned by the speed of the machine, and chosen where no length is given.
    if "--max_train_minutes" in given or not given & LENGTHS:
        parser.error("give --max_train_steps or --num_epochs: every start must plan the same length")
    own.folder = Path(own.output_dir or "runs/job")
    keeping = ["latest"] if own.output_dir else ["hub", "--hub_strategy", "checkpoint"]
    words = [
        own.family,
        *words,
        "--output_dir",
        str(own.folder),
        "--push_to_hub",
        "--resume_from_checkpoint",
        *keeping,
    ]
    return own, words


def send(folder: Path) -> None:
    """Send what waits in the outbox of the training; PushError for what does not get through.

    A sender that the training has left may still be at it, and would end with this machine.
    """
    while pending(folder):
        try:
            for pushed in push_pending(folder):
                print(f"pushed to {pushed.url}, commit {pushed.commit[:12]}", *pushed.notes, sep="\n  ", flush=True)
        except BlockingIOError:
            time.sleep(0.5)


def start_of_the_job() -> float:
    """When the limit began to run: a job's first process installs the package before this."""
    return psutil.Process(1).create_time() if "JOB_ID" in os.environ else time.time()


def train(words: Sequence[str], until: float) -> tuple[int, bool]:
    """Train in a child, to which the end of the time and a signal to this process are passed on.

    Its exit status, and whether it was stopped.
    """
    child = subprocess.Popen([*TRAIN, *words])
    stopped = False

    def stop(*_) -> None:
        nonlocal stopped
        stopped = True
        child.send_signal(signal.SIGTERM)

    former = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        try:
            status = child.wait(max(0.0, until - time.time()))
        except subprocess.TimeoutExpired:
            stop()
            status = child.wait()
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
    return status, stopped


if __name__ == "__main__":
    sys.exit(main())
