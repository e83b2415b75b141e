"""Other processes for the tests: claims of a child, `accelerate launch` on the CPU, forks."""

import json
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState

from tests.nursery import nursery_for


REPO = Path(__file__).resolve().parents[1]
CONFIGS = REPO / "training" / "accelerate_configs"
# `accelerate launch --cpu --num_processes 2` starts one process only (accelerate 1.15).
# --multi_gpu on a machine that is told to use its CPU starts two, which talk over gloo.
ENVIRONMENT = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}

# What every child of `run_claims` starts with.
PREAMBLE = """\
import json, socket, sys
from pathlib import Path
_connect = socket.socket.connect
def _loopback_only(self, address):
    assert self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1"), f"the network was asked for {address}"
    return _connect(self, address)
socket.socket.connect = _loopback_only
claims = {}
def claim(function):
    try:
        claims[function.__name__] = function()
    except Exception as error:
        claims[function.__name__] = f"{type(error).__name__}: {error}"
    return function
"""


def run_claims(
    source: str,
    cwd: str | Path | None = None,
    env: Mapping[str, str] | None = None,
    with_package: bool = True,
    timeout: int = 300,
    anew: bool = False,
) -> dict[str, Any]:
    """Run `source` in a process of its own and return its dict `claims`, carried as JSON.

        import hf_diffusion
        claims["classes"] = sorted(hf_diffusion.__all__)
        @claim
        def empty_folder():
            return hf_diffusion.DDGANPipeline.from_pretrained("empty").num_classes

    claims["empty_folder"] is then what the function returns, or "OSError: " and its message.

    The process has imported diffusers, and nothing of this package; see `tests.nursery`. With
    `anew` Python has imported nothing, which costs 6 CPU s where `source` needs diffusers.
    `env` is added to this process's environment. `with_package=False` makes `import hf_diffusion`
    fail. The process reaches loopback only. It has as many threads as this one, since sums over
    more threads round otherwise. AssertionError with its output if it does not end well.
    """
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "ACCELERATE_USE_CPU": "true", **(env or {})}
    paths = [str(REPO)] if with_package else []
    blocked = "" if with_package else 'sys.modules["hf_diffusion"] = None  # its import raises ModuleNotFoundError\n'
    with tempfile.TemporaryDirectory() as folder:
        script, result = Path(folder, "child.py"), Path(folder, "claims.json")
        ending = f"\nPath({str(result)!r}).write_text(json.dumps(claims))\n"
        script.write_text(PREAMBLE + blocked + textwrap.dedent(source) + ending)
        cwd = cwd or folder
        if anew:
            done = subprocess.run(
                [sys.executable, str(script)],
                cwd=cwd,
                env={**env, "PYTHONPATH": os.pathsep.join(paths)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=timeout,
            )
            status, said = done.returncode, done.stdout
        else:
            status, said = nursery_for(env).run(script, cwd, env, paths, timeout)
        assert status == 0, f"a child process failed:\n{said}"
        return json.loads(result.read_text())


def forget_accelerate() -> None:
    """Let the next `Accelerator` of this process choose its precision, device and engine anew."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def launcher(processes: int, config: str | None = None) -> list[str]:
    """The beginning of a command line, to be run with ENVIRONMENT.

    `config` names a shipped file.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--dynamo_backend", "no"]
    command += ["--mixed_precision", "no", "--num_cpu_threads_per_process", "1", "--num_processes", str(processes)]
    if config is not None:
        command += ["--config_file", str(CONFIGS / f"{config}.yaml")]
    elif processes > 1:
        command += ["--multi_gpu"]
    return command + (["--main_process_port", str(free_port())] if processes > 1 else [])


def free_port() -> int:
    return random.randint(20_000, 50_000)


def forked(main: Callable[[list[str]], int], flags: list[str], log: Path) -> multiprocessing.Process:
    """`main(flags)` in a fork of a process that has imported torch but not used it: fast."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([main.__module__])
    process = context.Process(target=_logged, args=(main, flags, log))
    process.start()
    return process


def _logged(main: Callable[[list[str]], int], flags: list[str], log: Path) -> None:
    with log.open("a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        sys.exit(main(flags))
