"""Trainings in processes of their own: `accelerate launch` on the CPU, with as many processes as asked for, and forks that can be killed."""

import multiprocessing
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path


# `accelerate launch --cpu --num_processes 2` starts one process only (accelerate 1.15); --multi_gpu on a machine that is told to use its
# CPU starts two, which talk over gloo.
ENVIRONMENT = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
CONFIGS = Path(__file__).resolve().parents[1] / "training" / "accelerate_configs"


def launcher(processes: int, config: str | None = None) -> list[str]:
    """The beginning of a command line; run it with ENVIRONMENT. `config` is the name of one of the configurations that are shipped."""
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
    """`main(flags)` in a fork of a process that has imported torch but not used it: it starts in a fraction of a second."""
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
