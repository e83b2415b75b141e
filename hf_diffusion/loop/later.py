"""Numbers of the device that the host reads later, so that it need not wait for them now."""

import torch
from torch import Tensor


class Later:
    """One number of a tensor, copied to the host beside what the device is asked for after it.

    `value` waits for what was asked before, at most. On a device that is not CUDA the copy itself
    waits.
    """

    def __init__(self, number: Tensor):
        # torch copies into pinned memory here, and takes that of an earlier number again
        self.copy = number.detach().to("cpu", non_blocking=number.is_cuda)
        self.arrival = torch.cuda.current_stream(number.device).record_event() if number.is_cuda else None

    def value(self) -> float:
        """The number."""
        if self.arrival is not None:
            self.arrival.synchronize()
        return float(self.copy)
