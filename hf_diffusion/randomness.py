"""Random numbers as a function of seed and step: a run needs no stored generator state.

A step draws for its whole batch over all processes and micro-batches, in blocks of rows. Each
micro-batch takes its rows. So the same images meet the same noise on one process or four, with or
without accumulation, interrupted or not. No process draws much more than it needs.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor


# Rows that share a generator. Even, so that the two of an antithetic pair are drawn together.
# Smaller blocks cost more kernels on a GPU, larger ones draw more rows that nobody uses.
BLOCK = 16

# (u of whole blocks, their numbers in the global batch, its size) -> u, see `losses.noise_levels`
Spread = Callable[[Tensor, Tensor, int], Tensor]


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2**63), one for each combination of parts, as (run seed, purpose, step)."""
    digest = hashlib.blake2b("/".join(str(part) for part in parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Draw:
    """The random numbers of one micro-batch: `rows` of what `step` draws for its `total` images.

    Successive calls give independent numbers, so a loss must draw in the same order at every step.
    `block` None draws all rows from one generator, as versions before 0.2 did. A run that began so
    goes on so.
    """

    def __init__(self, seed: int, step: int, rows: slice, total: int, device: torch.device, block: int | None = BLOCK):
        size = block or total
        blocks = range(rows.start // size, (rows.stop - 1) // size + 1)
        seeds = [derive_seed(seed, "step", step, *([] if block is None else [number])) for number in blocks]
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self.numbers = torch.arange(blocks.start * size, blocks.stop * size, device=device)
        self.size, self.total, self.device = size, total, device
        self.rows = slice(rows.start - blocks.start * size, rows.stop - blocks.start * size)

    def level(self, spread: Spread | None = None) -> Tensor:
        """Noise levels u float64 (B,) in [0, 1); a family turns them into its timestep or sigma.

        `spread` arranges those of the whole batch; without it they are independent.
        """
        u = self._blocks(torch.rand).double()
        return (u if spread is None else spread(u, self.numbers, self.total))[self.rows]

    def normal(self, *shape: int) -> Tensor:
        """Unit Gaussian noise of shape (B, *shape)."""
        return self._blocks(torch.randn, *shape)[self.rows]

    def uniform(self, *shape: int) -> Tensor:
        """Numbers in [0, 1) of shape (B, *shape)."""
        return self._blocks(torch.rand, *shape)[self.rows]

    def _blocks(self, draw: Callable[..., Tensor], *shape: int) -> Tensor:
        parts = [draw(self.size, *shape, generator=generator, device=self.device) for generator in self.generators]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class FixedDraw:
    """The random numbers of held-out images: they belong to the image, however work is divided.

    Its levels lie in part `part` of `parts` equal parts of [0, 1).
    """

    def __init__(self, seed: int, rows: Sequence[int], part: int, parts: int, device: torch.device):
        self.generators = [torch.Generator().manual_seed(derive_seed(seed, "held out", row)) for row in rows]
        self.part, self.parts, self.device = part, parts, device

    def level(self, spread: Spread | None = None) -> Tensor:
        """Noise levels float64 (B,) in the part; a spread over a batch means nothing here."""
        return (self.part + self._each(torch.rand).double()) / self.parts

    def normal(self, *shape: int) -> Tensor:
        """Unit Gaussian noise of shape (B, *shape)."""
        return self._each(torch.randn, *shape)

    def uniform(self, *shape: int) -> Tensor:
        """Numbers in [0, 1) of shape (B, *shape)."""
        return self._each(torch.rand, *shape)

    def _each(self, draw: Callable[..., Tensor], *shape: int) -> Tensor:
        drawn = [draw(self.parts, *shape, generator=generator)[self.part] for generator in self.generators]
        return torch.stack(drawn).to(self.device)


class BatchOrder:
    """Which images each micro-batch of this process holds.

    The run reads one endless stream, the epochs' permutations one after the other. Step k takes its
    k-th global batch. No image is left out at an epoch's end, and the step tells the place in it.
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
