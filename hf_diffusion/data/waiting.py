"""Several processes: one prepares what all need, and the others wait for it, however long.

A barrier of torch gives up after ten or thirty minutes, which latents or tokens of a large set may
take. So the others look into the store that the processes have met in.
"""

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate import Accelerator, PartialState


# Seconds between two looks, and between two lines that tell of the wait.
PAUSE, TELLING = 0.2, 60.0
# At a barrier, where the others wait while the first draws samples or the card's pictures, or one
# its last part of many.
LONGEST_WAIT = timedelta(hours=2)
# All processes come to the same places in the same order.
_places = itertools.count()


@contextmanager
def main_first(state: Accelerator | PartialState) -> Iterator[None]:
    """The main process before the others, which end without a word where it has failed with one."""
    if not torch.distributed.is_initialized():
        yield
        return
    store = torch.distributed.distributed_c10d._get_default_store()
    key = f"hf_diffusion/main_first/{next(_places)}"
    if not state.is_main_process:
        try:
            ending = _awaited(store, key, state)
        # The first has ended, and with it the store that it kept.
        except torch.distributed.DistError:
            raise SystemExit(1) from None
        if ending != b"done":
            raise SystemExit(1)
        yield
        return
    try:
        yield
    except BaseException:
        store.set(key, "failed")
        raise
    store.set(key, "done")


def _awaited(store: torch.distributed.Store, key: str, state: Accelerator | PartialState) -> bytes:
    began, told = time.monotonic(), 0
    while not store.check([key]):
        time.sleep(PAUSE)
        waited = time.monotonic() - began
        if waited > (told + 1) * TELLING:
            told = int(waited // TELLING)
            if state.process_index == 1:
                others = state.num_processes - 1
                who = "1 process waits" if others == 1 else f"{others} processes wait"
                print(f"{who} for the first, which prepares the data, {waited / 60:.0f} minutes so far", flush=True)
    return store.get(key)
