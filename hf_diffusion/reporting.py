"""What a run writes down while it trains: running means over all processes, `metrics.jsonl`, experiment trackers."""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from hf_diffusion.figures import loss_curve


QUARTILES = 4


class RunningMeans:
    """Means of per-image values since the last report, kept on the device; only a report waits for it."""

    def __init__(self, device: torch.device):
        self.device = device
        self.sums: dict[str, Tensor] = {}

    def add(self, values: dict[str, Tensor], level: Tensor | None) -> None:
        """Add values of shape (B,); `level` (B,) in [0, 1) also sorts "loss" into quartiles of the noise level."""
        for name, value in values.items():
            self.add_weighted(name, value, torch.ones_like(value))
        if level is not None:
            quartile = (level * QUARTILES).long()
            for q in range(QUARTILES):
                self.add_weighted(f"loss_q{q}", values["loss"], (quartile == q).float())

    def add_weighted(self, name: str, value: Tensor, weight: Tensor) -> None:
        """Add values (B,) of one name, each as often as its weight (B,) says."""
        value = value.detach().float()
        pair = torch.stack([(value * weight).sum(), weight.sum().to(value.dtype)])
        self.sums[name] = self.sums[name] + pair if name in self.sums else pair

    def report(self, accelerator: Accelerator) -> dict[str, float]:
        """The means over all processes since the last report; a quartile that no image fell into is left out."""
        if not self.sums:
            return {}
        names = sorted(self.sums)
        totals = accelerator.reduce(torch.stack([self.sums[name] for name in names]), "sum").tolist()
        self.sums = {}
        return {name: total / count for name, (total, count) in zip(names, totals) if count}


class MetricsLog:
    """`metrics.jsonl` (one JSON object a line) with the trackers of `--report_to` beside it; written by the main process only."""

    def __init__(
        self,
        accelerator: Accelerator,
        output_dir: Path,
        step: int,
        draw_curve: Callable[[Path, Path], Path | None] = loss_curve,
    ):
        self.accelerator, self.path = accelerator, output_dir / "metrics.jsonl"
        self.curve, self.draw_curve = output_dir / "loss_curve.png", draw_curve
        if accelerator.is_main_process and self.path.exists():
            self._forget_after(step)

    def _forget_after(self, step: int) -> None:
        """Drop what an interrupted run wrote after the checkpoint from which this one goes on: it is done again."""
        kept = []
        for line in self.path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):  # a line cut off by a kill
                continue
        partial = self.path.with_name(".metrics.jsonl.partial")
        partial.write_text("".join(kept))
        os.replace(partial, self.path)

    def write(self, step: int, values: dict[str, float], protocol: dict[str, Any] | None = None) -> None:
        """Append one record, with the protocol that its values were measured under, and hand the values to the trackers."""
        if self.accelerator.is_main_process:
            record = {"step": step, **values} | ({} if protocol is None else {"protocol": protocol})
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")
        self.accelerator.log(values, step=step)

    def has_evaluation(self, step: int) -> bool:
        """Whether the file holds measures of this step; all processes ask, and get the answer of the main one."""
        found = [False]
        if self.accelerator.is_main_process and self.path.exists():
            records = (json.loads(line) for line in self.path.read_text().splitlines())  # whole since _forget_after
            found = [any(record["step"] == step and "protocol" in record for record in records)]
        return broadcast_object_list(found)[0]

    def draw(self) -> None:
        """Draw the curve of the run anew."""
        if self.accelerator.is_main_process and self.path.exists():
            self.draw_curve(self.path, self.curve)


class Stopwatch:
    """Seconds since the last report, and how many of them were spent waiting for data."""

    def __init__(self):
        self.started, self.waited = time.perf_counter(), 0.0

    def wait(self, iterator):
        """The next batch, its waiting time counted."""
        begin = time.perf_counter()
        batch = next(iterator)
        self.waited += time.perf_counter() - begin
        return batch

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time of what is not training."""
        began = time.perf_counter()
        yield
        self.started += time.perf_counter() - began

    def report(self, images: int) -> dict[str, float]:
        """Images per second and the share of the time spent waiting for data; starts anew."""
        elapsed = time.perf_counter() - self.started
        result = {"images_per_second": images / elapsed, "data_wait": self.waited / elapsed}
        self.started, self.waited = time.perf_counter(), 0.0
        return result
