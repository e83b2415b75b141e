"""`hf-diffusion doctor`: what this machine has for training, and what is missing."""

import importlib.metadata
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hf_diffusion import __version__
from hf_diffusion.commands.command import Command
from hf_diffusion.config.options import option
from hf_diffusion.environment import cpu_cores, cpu_multiplies_bf16, cpu_name


DISTRIBUTION = "hf-diffusion"
GIB = 2**30
# A run keeps two checkpoints, of which each holds a network four times.
LEAST_DISK = 5 * GIB


@dataclass(frozen=True, kw_only=True)
class DoctorCommand(Command):
    """Show versions, devices, disk and login, what is missing, and how to get it.

    Ends with status 1 where something is missing that training needs.
    """

    offline: bool = option(False, "do not ask the Hub who is logged in")

    def run(self) -> int:
        """Print a line a fact, and then a line for each thing to do."""
        advice: list[str] = []
        print(f"hf_diffusion {__version__}, Python {platform.python_version()}, {sys.executable}")
        missing = list(self.packages(advice))
        self.devices(advice)
        self.disk(advice)
        self.hub(advice)
        print("\n" + "\n".join(f"- {sentence}" for sentence in advice) if advice else "\nnothing is missing")
        return 1 if missing else 0

    def packages(self, advice: list[str]) -> Iterator[str]:
        """Show the requirements of the package; yields what training cannot do without."""
        try:
            required = importlib.metadata.requires(DISTRIBUTION) or []
        except importlib.metadata.PackageNotFoundError:
            advice.append(f"{DISTRIBUTION} is not installed, only found on the path: pip install -e . in the clone")
            return
        found, extras = [], {}
        for text in required:
            name, floor = re.match(r"([\w.-]+)\s*(?:>=\s*([\w.]+))?", text).groups()
            version, extra = _version(name), re.search(r"""extra\s*==\s*["'](\w+)""", text)
            is_fit = version is not None and _numbers(version) >= _numbers(floor or "0")
            if extra is not None:
                extras.setdefault(extra[1], []).append(is_fit)
                continue
            found.append(f"{name} {version or 'missing'}")
            if not is_fit:
                advice.append(f"{name} {version or 'is missing'}, {floor} or newer is needed: pip install -U '{name}'")
                yield name
        print("packages: " + ", ".join(found))
        absent = [extra for extra, are_fit in extras.items() if not all(are_fit)]
        print("optional parts: " + ", ".join(f"{extra} {'no' if extra in absent else 'yes'}" for extra in extras))
        for extra in absent:
            advice.append(f"optional part {extra}: pip install '{DISTRIBUTION}[{extra}]'")

    def devices(self, advice: list[str]) -> None:
        """Show what can compute."""
        import psutil

        memory = psutil.virtual_memory()
        products = "multiplies bf16" if cpu_multiplies_bf16() else "float32 is faster than bf16"
        free = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free"
        print(f"CPU: {cpu_name()}, {cpu_cores()} cores, {products}, {free}")
        try:
            import torch
        except ImportError:
            return
        for number in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(number)
            name = torch.cuda.get_device_name(number)
            bf16 = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bf16"
            print(f"GPU {number}: {name}, {bf16}, {free / GIB:.1f} of {total / GIB:.1f} GiB free")
        if not torch.cuda.is_available():
            print("GPU: none that torch can use")
            if shutil.which("nvidia-smi"):
                advice.append(
                    f"there is an NVIDIA driver, and torch {torch.__version__} cannot use it: install a build of "
                    "torch for your CUDA version, see https://pytorch.org/get-started/locally"
                )

    def disk(self, advice: list[str]) -> None:
        """Show the space where runs and downloads go."""
        from huggingface_hub.constants import HF_HOME

        cache = Path(HF_HOME)
        there = next(folder for folder in (cache, *cache.parents) if folder.exists())
        for what, folder in (("this folder", Path.cwd()), (f"downloads ({cache})", there)):
            free = shutil.disk_usage(folder).free
            writable = "" if os.access(folder, os.W_OK) else ", cannot be written"
            print(f"disk: {what}, {free / GIB:.1f} GiB free{writable}")
            if free < LEAST_DISK or writable:
                advice.append(f"{what} has {free / GIB:.1f} GiB free{writable}: give --output a folder elsewhere")

    def hub(self, advice: list[str]) -> None:
        """Show who is logged in to the Hub."""
        from huggingface_hub import get_token, whoami

        if get_token() is None:
            print("Hub: not logged in")
            advice.append("to share models or use private data: hf auth login, or set HF_TOKEN")
            return
        if self.offline:
            print("Hub: a token is there; not asked whose")
            return
        try:
            print(f"Hub: logged in as {whoami()['name']}")
        # No network, a token that has ended, a Hub that is down: each has its own class.
        except Exception as error:
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            print(f"Hub: a token is there, but not who it belongs to ({reason})")
            advice.append("if the network is there, the token may be old: hf auth login")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """The release of a version, for comparing: (2, 13, 0) of 2.13.0+cpu."""
    return tuple(int(part) for part in re.match(r"\d+(?:\.\d+)*", version)[0].split("."))
