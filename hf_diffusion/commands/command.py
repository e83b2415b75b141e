"""What the commands of `hf-diffusion` have in common."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from hf_diffusion.config.options import option


@dataclass(frozen=True, kw_only=True)
class Command(ABC):
    """One command: a dataclass of its options, with the text of --help as its docstring.

    The module of a command is imported for --help too, so what needs torch is imported within
    `run`. A subclass may have `validate()`, which raises ValueError for options that contradict
    each other.
    """

    traceback: bool = option(False, "on an error, show where in the code it arose")

    @abstractmethod
    def run(self) -> None:
        """Do the work; a UsageError ends with status 2, any other error with status 1."""
