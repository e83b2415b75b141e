"""Timing of the same work in diffusers and here.

The runs alternate, so that a slow minute of the machine meets both.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass


Work = Callable[[], object]


@dataclass
class Comparison:
    """Work of diffusers, or of what the name says, and the same work here in one or more variants.

    Each variant comes with the ratio to reach. `calls` are timed together, so that one measurement
    is long against the clock and the scheduler of the system. Where only a part of the other's work
    is timed, the name says so, and `stock_scale` is the whole of it over that part.
    """

    name: str
    stock: Work
    ours: dict[str, tuple[Work, float]]
    calls: int = 1
    most_rounds: int | None = None
    warm_up: bool = True
    stock_scale: float = 1.0


@dataclass
class Result:
    """Seconds of one call, in pairs, and the ratios ours / stock."""

    name: str
    target: float
    stock_seconds: list[float]
    our_seconds: list[float]

    @property
    def ratios(self) -> list[float]:
        return [ours / stock for stock, ours in zip(self.stock_seconds, self.our_seconds)]

    def summary(self) -> dict:
        ratio = statistics.median(self.ratios)
        return {
            "name": self.name,
            "ratio": ratio,
            "ratio_min": min(self.ratios),
            "ratio_max": max(self.ratios),
            "target": self.target,
            "reached": ratio <= self.target,
            "stock_seconds": statistics.median(self.stock_seconds),
            "our_seconds": statistics.median(self.our_seconds),
            "all_stock_seconds": self.stock_seconds,
            "all_our_seconds": self.our_seconds,
        }


def seconds(work: Work, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        work()
    return (time.perf_counter() - start) / calls


def measure(comparison: Comparison, rounds: int) -> Iterator[Result]:
    """Run stock, ours, stock, ours, ...; a round runs stock once and every variant once."""
    works = [comparison.stock, *(work for work, _ in comparison.ours.values())]
    if comparison.warm_up:
        for work in works:
            seconds(work, comparison.calls)
    rounds = min(rounds, comparison.most_rounds or rounds)
    times = [[seconds(work, comparison.calls) for work in works] for _ in range(rounds)]
    stock, *variants = (list(column) for column in zip(*times))
    stock = [comparison.stock_scale * time for time in stock]
    for (variant, (_, target)), column in zip(comparison.ours.items(), variants):
        yield Result(f"{comparison.name}, {variant}" if variant else comparison.name, target, stock, column)
