"""Signals that end a run between two steps, on all processes at once."""

import signal

import torch
from accelerate import Accelerator


class StopSignal:
    """SIGTERM and SIGINT as a flag that the loop reads between steps.

    A second SIGINT interrupts at once.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.requested = accelerator, False
        self.former = {number: signal.signal(number, self._request) for number in (signal.SIGTERM, signal.SIGINT)}

    def _request(self, number: int, frame) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True

    def anywhere(self) -> bool:
        """Whether a signal has come to any process; all of them must ask together."""
        if self.accelerator.num_processes == 1:
            return self.requested
        flag = torch.tensor(float(self.requested), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)

    def restore(self) -> None:
        """Give the signals back to whom they belonged."""
        for number, handler in self.former.items():
            signal.signal(number, handler)
