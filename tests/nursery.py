"""Processes that have imported diffusers and nothing of this package, at the price of a fork.

Importing torch and diffusers costs 6 CPU s. One process pays it, and every child is forked off it:
the package, what it adds to other libraries, and code from a repository are new to each child.
Libraries read HF_ variables when they are imported, so other ones need another nursery. HF_TOKEN is
read at every call. HF_HOME is one folder, which is empty when a child begins.
"""

import atexit
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from functools import cache
from pathlib import Path


FREE = ("HF_TOKEN", "HF_HOME")


class Nursery:
    """A process that forks off a child for each script, with these HF_ variables."""

    def __init__(self, variables: Mapping[str, str]):
        self.folder = tempfile.TemporaryDirectory()
        self.home = Path(self.folder.name, "home")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment = {**inherited, **variables, "HF_HOME": str(self.home), "PYTHONPATH": ""}
        self.process = subprocess.Popen(
            [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        atexit.register(self.close)

    def run(self, script: Path, cwd: Path, env: Mapping[str, str], paths: list[str], seconds: int) -> tuple[int, str]:
        """The exit status of `script`, and what it printed; it is killed after so many seconds."""
        shutil.rmtree(self.home, ignore_errors=True)
        output = Path(self.folder.name, "output")
        request = {"script": str(script), "cwd": str(cwd), "env": {**env, "HF_HOME": str(self.home)}}
        request |= {"paths": paths, "seconds": seconds, "output": str(output)}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "the nursery has ended"
        return int(answer), output.read_text()

    def close(self) -> None:
        """End the process, which waits for its next script."""
        self.process.stdin.close()
        self.process.wait()
        self.folder.cleanup()


def nursery_for(env: Mapping[str, str]) -> Nursery:
    """The nursery of these HF_ variables, which all tests of a session share."""
    return _nursery(frozenset((k, v) for k, v in env.items() if k.startswith("HF_") and k not in FREE))


@cache
def _nursery(variables: frozenset) -> Nursery:
    return Nursery(dict(variables))


def serve() -> None:
    """Import once; then fork for each request on stdin, and answer with the child's status."""
    # This file's folder, in which no child has any business.
    del sys.path[0]
    import torch  # noqa: F401
    from diffusers import AutoModel, DDIMPipeline, DDPMPipeline, DiffusionPipeline, UNet2DModel  # noqa: F401

    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os._exit(live(**json.loads(line)))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def live(script: str, cwd: str, env: dict[str, str], paths: list[str], seconds: int, output: str) -> int:
    """Run the script as Python itself would; the exit status."""
    signal.alarm(seconds)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    # torch read the variable when the nursery imported it
    if "OMP_NUM_THREADS" in env:
        sys.modules["torch"].set_num_threads(int(env["OMP_NUM_THREADS"]))
    sys.path[:0], sys.argv = paths, [script]
    with open(output, "w") as file, open(os.devnull) as nothing:
        for stream, target in enumerate((nothing, file, file)):
            os.dup2(target.fileno(), stream)
    status = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as stopped:
        status = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


if __name__ == "__main__":
    serve()
