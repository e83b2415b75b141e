"""One forward pass of a U-Net without gradients, as sampling runs it, on a small batch."""

from collections.abc import Iterator
from functools import partial

import torch

from tests.benchmarks.networks import networks, parameters
from tests.benchmarks.pairs import Comparison


@torch.no_grad()
def run(model: torch.nn.Module, sample: torch.Tensor, timestep: torch.Tensor) -> None:
    model(sample, timestep, return_dict=False)


def comparisons() -> Iterator[Comparison]:
    sample, timestep = torch.randn(16, 3, 32, 32), torch.full((16,), 500)
    for kind, scale_shift in (("time added", False), ("adaptive norm", True)):
        stock, ours = networks(size=32, channels=3, blocks=2, scale_shift=scale_shift)
        name = f"U-Net forward, {kind}, {parameters(ours) / 1e6:.1f} M, 16 of 32x32"
        works = [partial(run, model, sample, timestep) for model in (stock, ours)]
        yield Comparison(name, works[0], {"": (works[1], 1.0)}, calls=3)
