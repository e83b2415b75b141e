"""Signals that end a run between two steps, on all processes at once."""

import signal

import torch
from accelerate import Accelerator
from torch import Tensor

from hf_diffusion.loop.later import Later


class StopSignal:
    """SIGTERM and SIGINT as a flag that the loop reads between steps.

    A second SIGINT interrupts at once.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.requested = accelerator, False
        # the last answer of `before`, on its way from the device
        self.answer: Later | None = None
        self.former = {number: signal.signal(number, self._request) for number in (signal.SIGTERM, signal.SIGINT)}

    def _request(self, number: int, frame) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True

    def anywhere(self) -> bool:
        """Whether a signal has come to any process; all of them must ask together."""
        return self.requested if self.accelerator.num_processes == 1 else bool(self._count() > 0)

    def before(self) -> bool:
        """Whether one had come to any process when this was asked the last time.

        Nobody waits for the others. A single process knows of those that come now.
        """
        if self.accelerator.num_processes == 1:
            return self.requested
        last, self.answer = self.answer, Later(self._count())
        return last is not None and last.value() > 0

    def _count(self) -> Tensor:
        """The number () of processes that a signal has come to, on the device."""
        asked = torch.full((), float(self.requested), device=self.accelerator.device)
        return self.accelerator.reduce(asked, "sum")

    def restore(self) -> None:
        """Give the signals back to whom they belonged."""
        for number, handler in self.former.items():
            signal.signal(number, handler)
