"""Random numbers as a function of the seed and the step, so that a run needs no stored generator state.

What an optimizer step draws is drawn for its whole batch over all processes and micro-batches, and each micro-batch takes its
rows. One process or four, with or without accumulation, interrupted or not: the same images meet the same noise.
"""

import hashlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2**63) that differs for every combination of parts, such as (run seed, purpose, step)."""
    digest = hashlib.blake2b("/".join(str(part) for part in parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Draw:
    """The random numbers of one micro-batch: rows `rows` of what step `step` draws for its `total` images.

    Successive calls give independent numbers, so a loss must draw in the same order at every step.
    """

    def __init__(self, seed: int, step: int, rows: slice, total: int, device: torch.device):
        self.generator = torch.Generator(device).manual_seed(derive_seed(seed, "step", step))
        self.rows, self.total, self.device = rows, total, device
        self.t: Tensor | None = None  # the timesteps (rows,) drawn last, for messages

    def normal(self, *shape: int) -> Tensor:
        """Unit Gaussian noise of shape (rows, *shape)."""
        return torch.randn(self.total, *shape, generator=self.generator, device=self.device)[self.rows]

    def uniform(self) -> Tensor:
        """Numbers in [0, 1) of shape (rows,)."""
        return torch.rand(self.total, generator=self.generator, device=self.device)[self.rows]

    def timesteps(self, sampler: Callable[[Tensor, int], Tensor], num_timesteps: int) -> Tensor:
        """int64 (rows,) from a sampler of `timestep_sampling`, which sees the uniform numbers of the whole batch."""
        u = torch.rand(self.total, generator=self.generator, device=self.device)
        self.t = sampler(u, num_timesteps)[self.rows]
        return self.t


class BatchOrder:
    """Which images each micro-batch of this process holds, as lists of (epoch, index), from `start_step` to `total_steps`.

    The run reads one endless stream, the epochs' permutations one after the other; step k takes the k-th `global batch` of it.
    No image is left out at an epoch's end, and the place in the stream follows from the step.
    `images` None: the data are a stream of their own, and only `rows` and `total` are asked for.
    """

    def __init__(self, images: int | None, seed: int, batch_size: int, accumulation: int, rank: int, processes: int):
        self.images, self.seed, self.batch_size = images, seed, batch_size
        self.accumulation, self.rank, self.processes = accumulation, rank, processes
        self.total = batch_size * accumulation * processes

    def rows(self, micro: int) -> slice:
        """This process's rows of the global batch in micro step `micro`."""
        start = (micro * self.processes + self.rank) * self.batch_size
        return slice(start, start + self.batch_size)

    def positions(self, start_step: int, total_steps: int) -> Iterator[list[tuple[int, int]]]:
        """One list of (epoch, index) pairs for each micro step."""
        permutations: dict[int, list[int]] = {}
        for step in range(start_step, total_steps):
            for micro in range(self.accumulation):
                rows = self.rows(micro)
                places = [divmod(step * self.total + row, self.images) for row in range(rows.start, rows.stop)]
                epochs = {epoch for epoch, _ in places}
                permutations = {epoch: permutations.get(epoch) or self._shuffle(epoch) for epoch in epochs}
                yield [(epoch, permutations[epoch][place]) for epoch, place in places]

    def _shuffle(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", epoch))
        return torch.randperm(self.images, generator=generator).tolist()
