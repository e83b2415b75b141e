"""`hf-diffusion train`: a training script on what this machine has."""

import ast
import importlib
import inspect
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from hf_diffusion.commands.command import Command
from hf_diffusion.commands.script_settings import config_class
from hf_diffusion.config.command_line import OneSentenceParser, check_flags
from hf_diffusion.config.options import RECIPES, settings
from hf_diffusion.config.publishing import STARTED_AS
from hf_diffusion.config.shared_options import place_data


# Installed, the scripts are a package; in a clone, a link to the folder at the top.
SCRIPTS, PACKAGE = RECIPES.parent, "hf_diffusion.training"
# With one of these a run says itself what it trains.
OWN_CHOICE = ("config", "preset", "init_from")


@dataclass(frozen=True, kw_only=True)
class TrainCommand(Command):
    """Train a model of a family on your own data.

    hf-diffusion train ddpm --data my_images --output runs/mine

    looks at the images and at the machine, says what it chooses and why, and trains. A folder of
    images, of which sub-folders are classes, a .parquet or .zip file, user/name on the Hub, and
    swiss_roll and other points are data. With several GPUs it starts a process on each.
    """

    family: str
    words: tuple[str, ...]
    num_processes: int | None

    @classmethod
    def parsed(cls, words: Sequence[str], prog: str) -> Self:
        """The family and the words of its script; help and mistakes end before torch is read."""
        known = families()
        if words and words[0] in ("-h", "--help"):
            _show_families(prog, known)
        if not words or words[0] not in known:
            wrong = f"there is no family {words[0]!r}" if words else "give a family to train"
            OneSentenceParser(prog=prog).error(f"{wrong}; choose from {', '.join(known)}, as in {prog} ddpm --help")
        family, *words = words
        parser = OneSentenceParser(prog=f"{prog} {family}", allow_abbrev=False, add_help=False)
        parser.add_argument("--num_processes", type=int)
        own, rest = parser.parse_known_args(words)
        if own.num_processes is not None and own.num_processes < 1:
            parser.error(f"num_processes: got {own.num_processes}; allowed: at least 1")
        options = config_class(f"{PACKAGE}.train_{family}")
        # Ends where --help is asked for, or a flag is wrong.
        config = check_flags(options, rest, parser.prog)
        if config.data is not None:
            try:
                place_data(config)
            except ValueError as error:
                parser.error(str(error))
        if not _chosen(rest) & {*OWN_CHOICE, *_network_settings(options)}:
            rest = ["--preset", "auto", *rest]
        # The script tells of a user's mistakes; what else goes wrong is ours, and shown whole.
        return cls(family=family, words=tuple(rest), num_processes=own.num_processes, traceback=True)

    def run(self) -> int:
        """Train in this process where one suffices, else in several; returns the exit status."""
        # torch takes seconds, and --help ends before this.
        import torch

        on_gpus = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() != "true"
        count = self.num_processes or (torch.cuda.device_count() if on_gpus else 1)
        if on_gpus and count > torch.cuda.device_count():
            there = torch.cuda.device_count()
            raise SystemExit(
                f"hf-diffusion train: num_processes {count} is more than the {there} GPUs of this machine"
            )
        if on_gpus and torch.cuda.is_bf16_supported(including_emulation=False):
            # What neither a flag nor a recipe says is taken from here.
            os.environ.setdefault("ACCELERATE_MIXED_PRECISION", "bf16")
        os.environ[STARTED_AS] = f"hf-diffusion train {self.family}" + (
            f" --num_processes {count}" if self.num_processes else ""
        )
        try:
            if count == 1:
                return importlib.import_module(f"{PACKAGE}.train_{self.family}").main(list(self.words))
            return self._launch(count, on_gpus)
        finally:
            del os.environ[STARTED_AS]

    def _launch(self, count: int, on_gpus: bool) -> int:
        """The same by `accelerate launch`, whose own traceback says nothing of what went wrong."""
        import logging

        from accelerate.commands.launch import launch_command, launch_command_parser
        from torch.distributed.elastic.multiprocessing.api import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

        if not on_gpus:
            # `--cpu` starts one process, whatever their number.
            os.environ["ACCELERATE_USE_CPU"] = "true"
        words = ["--multi_gpu", "--num_machines", "1", "--num_processes", str(count), "--dynamo_backend", "no"]
        words += ["--mixed_precision", os.environ.get("ACCELERATE_MIXED_PRECISION", "no"), "--main_process_port", "0"]
        words += ["--module", f"{PACKAGE}.train_{self.family}", *self.words]
        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
        try:
            launch_command(launch_command_parser().parse_args(words))
        except ChildFailedError as error:
            return max(failure.exitcode for failure in error.failures.values()) or 1
        except SignalException as error:
            return 128 + error.sigval
        return 0


def families() -> dict[str, str]:
    """What each script train_NAME.py of the package trains, by its name: its first sentence."""
    found = {}
    for path in sorted(SCRIPTS.glob("train_*.py")):
        documented = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        found[path.stem.removeprefix("train_")] = " ".join(documented.partition("\n\n")[0].split())
    return found


def _show_families(prog: str, known: dict[str, str]) -> None:
    width = max(map(len, known))
    listed = "\n".join(f"  {name:<{width}}  {what}" for name, what in known.items())
    print(
        f"usage: {prog} FAMILY [--data DATA] [--output FOLDER] [settings]\n\n{inspect.getdoc(TrainCommand)}\n\n"
        f"families:\n{listed}\n\n"
        f"{prog} FAMILY --help shows the settings that matter first, --help all shows every one"
    )
    raise SystemExit(0)


def _chosen(words: Sequence[str]) -> set[str]:
    """The names of the flags among some words."""
    return {word.partition("=")[0].removeprefix("--") for word in words if word.startswith("--")}


def _network_settings(options: type) -> set[str]:
    """The settings that shape the network: those of its group, which lasts to the next."""
    found, group = set(), None
    for name, field in settings(options).items():
        group = field.metadata.get("group") or group
        if group == "network":
            found.add(name)
    return found
