"""One of two processes that meet in a process group, for `tests/data/test_waiting.py`."""

import os
import time
from datetime import timedelta

from accelerate import PartialState

from hf_diffusion.data import waiting


def main(flags: list[str]) -> int:
    """Of rank `flags[0]`: wait for the first longer than a barrier would, or for its failure."""
    rank, port, ending = flags
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    state = PartialState(cpu=True, timeout=timedelta(seconds=2))
    waiting.TELLING = 1.0
    for place in range(2):
        with waiting.main_first(state):
            print(f"{rank} begins {place}", flush=True)
            if rank == "0" and place == 1:
                time.sleep(4)
                if ending == "fails":
                    raise ValueError("no such data")
            print(f"{rank} has {place}", flush=True)
    state.wait_for_everyone()
    return 0
