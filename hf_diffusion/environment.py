"""What a run ran on: versions, hardware and the state of the code."""

import functools
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any


PACKAGES = (
    "hf-diffusion",
    "torch",
    "diffusers",
    "accelerate",
    "datasets",
    "huggingface-hub",
    "transformers",
    "numpy",
    "pillow",
)


def environment(folder: str | os.PathLike = ".") -> dict[str, Any]:
    """Versions, hardware, and the state of the git repository around `folder`, if any."""
    # Here, since a card can be written where there is no torch.
    import torch

    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    found = {
        "cpu": cpu_name(),
        "cpu_cores": cpu_cores(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        versions["cuda"] = torch.version.cuda
    return {**found, "versions": versions, **_git_state(folder)}


def cpu_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has instructions for products in bfloat16; elsewhere float32 is faster."""
    try:
        return re.search(r"\b(amx_bf16|avx512_bf16)\b", Path("/proc/cpuinfo").read_text()) is not None
    except OSError:
        return False


def cpu_name() -> str:
    try:
        match = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match[1].strip() if match else platform.processor() or platform.machine()


def _git_state(folder: str | os.PathLike) -> dict[str, Any]:
    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20, check=True
        )
        return done.stdout.strip()

    try:
        return {
            "git_commit": git("rev-parse", "HEAD"),
            # Changed files only: a search for new ones would walk every output folder and all data.
            "git_dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
            "git_repository": Path(git("rev-parse", "--show-toplevel")).name,
        }
    # No git, no repository, or no commit in it.
    except (OSError, subprocess.SubprocessError):
        return {}
