"""How long torch.compile takes before a network's first step is done, anew and with its cache.

Every time in a process of its own, since what a process has compiled it keeps.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from tests.benchmarks.networks import networks, parameters
from tests.benchmarks.pairs import Comparison


BATCH, SIZE = 16, 28


def first_step(which: str) -> None:
    """Compile a network, and take its first step forward and backward."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    stock, ours = networks(size=SIZE, channels=1, blocks=1)
    model = {"stock": stock, "ours": ours}[which].to(device).train()
    model.compile()
    model(torch.randn(BATCH, 1, SIZE, SIZE, device=device), torch.arange(BATCH, device=device)).sample.sum().backward()
    if device == "cuda":
        torch.cuda.synchronize()


def in_a_process(which: str, cache: Path | None = None) -> None:
    with tempfile.TemporaryDirectory() as empty:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache or empty)}
        command = [sys.executable, "-m", "tests.benchmarks.compile_start", which]
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"torch.compile fails here: {result.stderr.strip().splitlines()[-1]}")


def comparisons() -> Iterator[Comparison]:
    with tempfile.TemporaryDirectory() as cache:
        _, ours = networks(size=SIZE, channels=1, blocks=1)
        in_a_process("ours", Path(cache))
        yield Comparison(
            f"process to its first compiled step, {parameters(ours) / 1e6:.1f} M",
            partial(in_a_process, "stock"),
            {
                "": (partial(in_a_process, "ours"), 1.0),
                "with its cache": (partial(in_a_process, "ours", Path(cache)), 0.6),
            },
            most_rounds=2,
            warm_up=False,
        )


if __name__ == "__main__":
    first_step(sys.argv[1])
