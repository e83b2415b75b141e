"""`accelerate launch` on the CPU, with as many processes as asked for."""

import os
import random
import sys


# `accelerate launch --cpu --num_processes 2` starts one process only (accelerate 1.15); --multi_gpu on a machine that is told to use its
# CPU starts two, which talk over gloo.
ENVIRONMENT = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


def launcher(processes: int) -> list[str]:
    """The beginning of a command line; run it with ENVIRONMENT."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--dynamo_backend", "no"]
    command += ["--mixed_precision", "no", "--num_cpu_threads_per_process", "1", "--num_processes", str(processes)]
    if processes > 1:
        command += ["--multi_gpu", "--main_process_port", str(random.randint(20_000, 50_000))]
    return command
