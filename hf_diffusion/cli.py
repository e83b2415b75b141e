"""The `hf-diffusion` command: which command is meant, its options, and how it ends."""

import inspect
import sys
from collections.abc import Sequence

from hf_diffusion import __version__
from hf_diffusion.commands.command import Command
from hf_diffusion.commands.convert import ConvertCommand
from hf_diffusion.commands.evaluate import EvaluateCommand
from hf_diffusion.commands.info import InfoCommand
from hf_diffusion.commands.push import PushCommand
from hf_diffusion.commands.sample import SampleCommand
from hf_diffusion.config.command_line import OneSentenceParser, parse_config
from hf_diffusion.config.options import UsageError


PROG = "hf-diffusion"
COMMANDS: dict[str, type[Command]] = {
    "sample": SampleCommand,
    "info": InfoCommand,
    "evaluate": EvaluateCommand,
    "push": PushCommand,
    "convert": ConvertCommand,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 for a failure, 2 for a wrong command line."""
    name, *words = choose_command(sys.argv[1:] if argv is None else argv)
    command = parse_config(COMMANDS[name], words, prog=f"{PROG} {name}")
    try:
        command.run()
        return 0
    except KeyboardInterrupt:
        print(f"{PROG}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if command.traceback:
            raise
        print(f"{PROG} {name}: {' '.join(str(error).split()) or repr(error)}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


def choose_command(argv: Sequence[str]) -> list[str]:
    """The words of the command line, of which the first names a command.

    --help, --version and an unknown command end here.
    """
    parser = OneSentenceParser(
        prog=PROG, description="Sample from diffusion pipelines, measure, share and convert them", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"hf_diffusion {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=inspect.getdoc(command).splitlines()[0], add_help=False)
    # All that follows is the command's own.
    return [parser.parse_args(argv[:1]).command, *argv[1:]]


if __name__ == "__main__":
    sys.exit(main())
