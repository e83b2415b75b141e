"""How this run was started, as words that can be pasted into a shell."""

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

from hf_diffusion.config.publishing import STARTED_AS


# From a launcher to its processes there are at most so many generations.
GENERATIONS = 3


def start_of(argv: Sequence[str]) -> str:
    """The beginning of the command that started this process with the arguments `argv`, as it was
    typed.

    With `accelerate launch` and its flags, and with the variables of accelerate that were set for
    it.
    """
    if STARTED_AS in os.environ:
        return os.environ[STARTED_AS]
    process = psutil.Process()
    own = _before(process, argv)
    for _ in range(GENERATIONS):
        process = process.parent()
        if process is None:
            break
        typed = _before(process, argv)
        if typed is not None and any(Path(word).name in ("launch", "accelerate.commands.launch") for word in typed):
            return _shown(typed, _variables(process))
    return _shown(own if own is not None else [sys.argv[0]], {})


def command_to_go_on(config_file: Path, argv: Sequence[str]) -> str:
    """The command that goes on with a run from its newest checkpoint."""
    return f"{start_of(argv)} --config {shlex.quote(str(config_file))} --resume_from_checkpoint latest"


def _before(process: psutil.Process, argv: Sequence[str]) -> list[str] | None:
    """The words of a process before `argv`; None where its command does not end in them."""
    try:
        words = process.cmdline()
    except psutil.Error:
        return None
    rest = len(words) - len(argv)
    return words[:rest] if rest > 0 and words[rest:] == list(argv) else None


def _variables(process: psutil.Process) -> dict[str, str]:
    try:
        return {name: value for name, value in process.environ().items() if name.startswith("ACCELERATE_")}
    except psutil.Error:
        return {}


def _shown(words: list[str], variables: dict[str, str]) -> str:
    """The words with programs by their short names, where the shell finds the same ones by
    these."""
    short = [_short(word) for word in words]
    # the script of `accelerate` behind its interpreter, which the system has put there
    if len(short) > 1 and short[0].startswith("python") and short[1] == "accelerate":
        short = short[1:]
    given = [f"{name}={shlex.quote(value)}" for name, value in sorted(variables.items())]
    return " ".join([*given, shlex.join(short)])


def _short(word: str) -> str:
    name = Path(word).name
    found = shutil.which(name) if os.sep in word else None
    return name if found is not None and Path(found).absolute() == Path(word).absolute() else word


def how_to_go_on(step: int, total_steps: int, config_file: Path, arguments: Sequence[str]) -> str:
    """What a person is told whose run a signal has stopped."""
    return (
        f"stopped by a signal at step {step} of {total_steps}, everything is saved; go on with the same command and "
        f"--resume_from_checkpoint latest, or by\n{command_to_go_on(config_file, arguments)}"
    )
