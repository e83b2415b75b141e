"""What the commands of `hf-diffusion` have in common."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from hf_diffusion.config.command_line import parse_config
from hf_diffusion.config.options import option


@dataclass(frozen=True, kw_only=True)
class Command(ABC):
    """One command: a dataclass of its options, with the text of --help as its docstring.

    The module of a command is imported for --help too, so what needs torch is imported within
    `run`. A subclass may have `validate()`, which raises ValueError for options that contradict
    each other.
    """

    traceback: bool = option(False, "on an error, show where in the code it arose")

    @classmethod
    def parsed(cls, words: Sequence[str], prog: str) -> Self:
        """The command that the words describe; a wrong one ends the process with status 2."""
        return parse_config(cls, words, prog=prog)

    @abstractmethod
    def run(self) -> int | None:
        """Do the work; returns the exit status where it is not 0.

        A UsageError ends with status 2, any other error with status 1.
        """
