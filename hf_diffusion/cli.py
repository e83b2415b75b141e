"""The `hf-diffusion` command: which command is meant, its options, and how it ends."""

import inspect
import os
import sys
from collections.abc import Sequence

from hf_diffusion import __version__
from hf_diffusion.commands.command import Command
from hf_diffusion.commands.convert import ConvertCommand
from hf_diffusion.commands.demo import DemoCommand
from hf_diffusion.commands.doctor import DoctorCommand
from hf_diffusion.commands.evaluate import EvaluateCommand
from hf_diffusion.commands.info import InfoCommand
from hf_diffusion.commands.push import PushCommand
from hf_diffusion.commands.sample import SampleCommand
from hf_diffusion.commands.skill import SkillCommand
from hf_diffusion.commands.space import SpaceCommand
from hf_diffusion.commands.train import TrainCommand
from hf_diffusion.commands.tune_steps import TuneStepsCommand
from hf_diffusion.commands.watch import WatchCommand
from hf_diffusion.config.closed_output import ending_with_its_reader, nobody_reads
from hf_diffusion.config.command_line import OneSentenceParser
from hf_diffusion.config.options import UsageError


PROG = "hf-diffusion"
COMMANDS: dict[str, type[Command]] = {
    "train": TrainCommand,
    "sample": SampleCommand,
    "info": InfoCommand,
    "evaluate": EvaluateCommand,
    "push": PushCommand,
    "convert": ConvertCommand,
    "doctor": DoctorCommand,
    "skill": SkillCommand,
    "space": SpaceCommand,
    "demo": DemoCommand,
    "watch": WatchCommand,
    "tune-steps": TuneStepsCommand,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 for a failure, 2 for a wrong command line."""
    # A notebook hands its own on, which need not be installed here; figures go into files.
    os.environ["MPLBACKEND"] = "agg"
    with ending_with_its_reader():
        return run(sys.argv[1:] if argv is None else argv)


def run(argv: Sequence[str]) -> int:
    """Run the command that the words name; returns the exit status."""
    name, *words = choose_command(argv)
    command = COMMANDS[name].parsed(words, f"{PROG} {name}")
    try:
        return command.run() or 0
    except KeyboardInterrupt:
        return interrupted()
    except Exception as error:
        if command.traceback or nobody_reads(error):
            raise
        print(f"{PROG} {name}: {' '.join(str(error).split()) or repr(error)}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


def interrupted() -> int:
    """Say so; the exit status of shells for it."""
    print(f"{PROG}: interrupted", file=sys.stderr)
    return 130


def choose_command(argv: Sequence[str]) -> list[str]:
    """The words of the command line, of which the first names a command.

    --help, --version and an unknown command end here.
    """
    parser = OneSentenceParser(
        prog=PROG,
        description="Train diffusion models, sample from them, measure, share and convert them",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"hf_diffusion {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=inspect.getdoc(command).splitlines()[0], add_help=False)
    if not argv:
        parser.error(f"the following arguments are required: command; choose from {', '.join(COMMANDS)}")
    # All that follows is the command's own.
    return [parser.parse_args(argv[:1]).command, *argv[1:]]


if __name__ == "__main__":
    sys.exit(main())
