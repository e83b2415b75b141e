"""How much memory decoded images may take."""

import contextlib
import os
from pathlib import Path

import psutil


# Of the available memory, for the decoded images of all processes on this machine together.
CACHE_SHARE = 0.25


def cache_limit() -> int:
    """Return the bytes that decoded images may take in this process."""
    available = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        # A container's own limit, which psutil does not see; no such file, or the word "max" for no
        # limit.
        with contextlib.suppress(OSError, ValueError):
            available = min(available, int((group / limit).read_text()) - int((group / used).read_text()))
    return int(CACHE_SHARE * max(0, available) / int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
