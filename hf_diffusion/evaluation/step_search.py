"""Where the few timesteps of a run should lie: a search on a trained model's own trajectories.

A deterministic solver in many steps leads a noise to the sample that the model means by it. The
timesteps of few steps are good where they lead near it. B samples.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from hf_diffusion.evaluation.feature_networks import FeatureNetwork
from hf_diffusion.sampling.drawing import draw


# A step of the search smaller than this share of the process changes no sample visibly.
FINEST = 1 / 200


@dataclass(frozen=True)
class Trajectories:
    """Noises, by their seeds, and the features (B, D) of what the model means by them."""

    pipeline: DiffusionPipeline
    network: FeatureNetwork
    seeds: Sequence[int]
    labels: Sequence[int] | None
    batch_size: int
    options: dict
    reference: Tensor

    @classmethod
    def follow(cls, pipeline, network, seeds, labels, batch_size: int, options: dict, steps: int) -> "Trajectories":
        """Draw the reference in so many steps of the same solver."""
        begun = cls(pipeline, network, seeds, labels, batch_size, options, torch.empty(0))
        return cls(**{**vars(begun), "reference": begun.features(num_inference_steps=steps)})

    def features(self, **steps) -> Tensor:
        """Features (B, D) of the samples of a run."""
        parts = []
        for start in range(0, len(self.seeds), self.batch_size):
            rows = slice(start, start + self.batch_size)
            labels = None if self.labels is None else self.labels[rows]
            drawn = draw(self.pipeline, self.seeds[rows], labels, **self.options, **steps)
            parts.append(self.network.features(drawn))
        return torch.cat(parts)

    def distances(self, **steps) -> np.ndarray:
        """Mean squared distances (B,) of a run's features to the reference."""
        return (self.features(**steps) - self.reference).square().mean(dim=1).double().numpy()

    def distance(self, timesteps: Sequence[int]) -> float:
        """Their mean at these timesteps."""
        return float(self.distances(timesteps=list(timesteps)).mean())


def search(distance: Callable[[tuple[int, ...]], float], start: Sequence[int], total: int) -> tuple[int, ...]:
    """The timesteps near which no single one can be moved to lessen the distance.

    Coordinate descent from `start`, falling numbers below `total`: each timestep is moved as long
    as that helps, by strides that are halved when none can be.
    """
    known: dict[tuple[int, ...], float] = {}

    def of(steps: tuple[int, ...]) -> float:
        if steps not in known:
            known[steps] = distance(steps)
        return known[steps]

    best, stride = tuple(int(t) for t in start), max(total // (4 * len(start)), 1)
    while stride >= max(total * FINEST, 1):
        moved = False
        for place in range(len(best)):
            for move in (-stride, stride):
                while (tried := _moved(best, place, move, total)) is not None and of(tried) < of(best):
                    best, moved = tried, True
        stride = stride if moved else stride // 2
    return best


def _moved(steps: tuple[int, ...], place: int, move: int, total: int) -> tuple[int, ...] | None:
    """The timesteps with one of them moved; None where they would not fall any more."""
    moved = (*steps[:place], steps[place] + move, *steps[place + 1 :])
    bounds = (total, *moved, -1)
    return moved if all(a > b for a, b in zip(bounds, bounds[1:])) else None
