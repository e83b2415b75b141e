"""What happens when nobody reads on, as in `hf-diffusion train ddpm --help | head`."""

import os
import select
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO


@contextmanager
def ending_with_its_reader() -> Iterator[None]:
    """End the process silently where the reader of its output has gone, with the status of Unix
    tools.

    SIGPIPE itself stays ignored: a connection that breaks must not end a training.
    """
    try:
        try:
            yield
        finally:
            # now, since Python says something about it later
            sys.stdout.flush()
    except BrokenPipeError:
        closed = [stream for stream in (sys.stdout, sys.stderr) if is_closed(stream)]
        if not closed:
            raise
        for stream in closed:
            # takes what is still in the buffer
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None


def nobody_reads(error: BaseException) -> bool:
    """Whether this is the error of writing to a reader that has gone."""
    return isinstance(error, BrokenPipeError) and (is_closed(sys.stdout) or is_closed(sys.stderr))


def is_closed(stream: TextIO) -> bool:
    """Whether a stream is a pipe without a reader."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
    # a stream of a notebook or a test is none of the system's
    except (OSError, ValueError, AttributeError):
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))
