"""What a run writes down while it trains: running means over all processes, `metrics.jsonl`,
experiment trackers.
"""

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from hf_diffusion.files import write_whole
from hf_diffusion.losses.objective import Values


QUARTERS = 4


class RunningMeans:
    """Means of per-image values since the last report, kept on the device.

    Only a report waits for it.
    """

    def __init__(self, device: torch.device):
        self.device = device
        # By the names of its rows, a sum and the weight of it (names, 2).
        self.sums: dict[tuple[str, ...], Tensor] = {}

    def add(self, values: Values) -> None:
        """Add values (B,) by name.

        Of a pair of tensors (B,) each value counts as often as its weight says.
        """
        for name, value in values.items():
            value, weight = value if isinstance(value, tuple) else (value, torch.ones_like(value))
            self._add((name,), value[:, None], weight[:, None])

    def add_by_level(self, name: str, value: Tensor, level: Tensor) -> None:
        """Add values (B,) to the quarter of the noise levels (B,) in [0, 1) that each is of."""
        quarters = (level * QUARTERS).long()[:, None] == torch.arange(QUARTERS, device=level.device)
        names = tuple(f"{name}_q{q}" for q in range(QUARTERS))
        # a loss that is not finite is one of its own quarter alone
        self._add(names, torch.where(quarters, value[:, None], 0), quarters)

    def _add(self, names: tuple[str, ...], value: Tensor, weight: Tensor) -> None:
        """Add columns (B, names); all together, since a small network waits for every kernel."""
        value, weight = value.detach().float(), weight.float()
        pairs = torch.stack([(value * weight).sum(0), weight.sum(0)], dim=1)
        self.sums[names] = self.sums[names] + pairs if names in self.sums else pairs

    def so_far(self, names: Iterable[str]) -> dict[str, float]:
        """The means of some values on this process since the last report, for which it waits."""
        pairs = {name: self.sums[name,][0].tolist() for name in names if (name,) in self.sums}
        return {name: total / count for name, (total, count) in pairs.items() if count}

    def report(self, accelerator: Accelerator) -> dict[str, float]:
        """The means over all processes since the last report.

        A quarter that no image fell into is left out.
        """
        if not self.sums:
            return {}
        groups = sorted(self.sums)
        totals = accelerator.reduce(torch.cat([self.sums[names] for names in groups]), "sum").tolist()
        self.sums = {}
        named = zip((name for names in groups for name in names), totals)
        return {name: total / count for name, (total, count) in sorted(named) if count}


class MetricsLog:
    """`metrics.jsonl`, one JSON object a line, with the trackers of `--report_to` beside it.

    By the main process.
    """

    def __init__(self, accelerator: Accelerator, output_dir: Path, draw_curve: Callable[[Path, Path], Path | None]):
        self.accelerator, self.path = accelerator, output_dir / "metrics.jsonl"
        self.curve, self.draw_curve = output_dir / "loss_curve.png", draw_curve
        self.is_drawn = False

    def begin(self, step: int, settings: dict[str, Any] | None) -> None:
        """Go on after `step`, and show the trackers the settings of the run, if there are any."""
        if settings is not None:
            plain = {k: v if isinstance(v, int | float | str) else str(v) for k, v in settings.items()}
            self.accelerator.init_trackers("hf_diffusion", config=plain)
        self._go_on_after(step)

    def _go_on_after(self, step: int) -> None:
        """Drop what an interrupted run wrote after the checkpoint that this one goes on from: it is
        done again.
        """
        if not self.accelerator.is_main_process or not self.path.exists():
            return
        kept = []
        for line in self.path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            # a line cut off by a kill
            except (ValueError, KeyError, TypeError):
                continue
        write_whole(self.path, "".join(kept))

    def write(self, step: int, values: dict[str, float], protocol: dict[str, Any] | None = None) -> None:
        """Append one record, with the protocol that it was measured under, and hand the values to
        the trackers.
        """
        self.is_drawn = False
        if self.accelerator.is_main_process:
            record = {"step": step, **values} | ({} if protocol is None else {"protocol": protocol})
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")
        self.accelerator.log(values, step=step)

    def show(self, step: int, pictures: Mapping[str, Image.Image | str]) -> None:
        """Hand pictures or texts, by their names, to the trackers that take any."""
        for tracker in self.accelerator.trackers:
            for name, picture in pictures.items():
                if isinstance(picture, str):
                    tracker.log({name: picture}, step=step)
                    continue
                pixels = np.asarray(picture.convert("RGB"))
                if tracker.name == "tensorboard":
                    tracker.log_images({name: pixels[None]}, step=step, dataformats="NHWC")
                elif tracker.name == "wandb":
                    tracker.log_images({name: [pixels]}, step=step)
                elif tracker.name == "trackio":
                    # It is there, since accelerate has started it.
                    import trackio

                    tracker.log({name: trackio.Image(pixels)}, step=step)

    def has_evaluation(self, step: int) -> bool:
        """Whether the file holds measures of this step.

        All processes ask, and get the answer of the main one.
        """
        found = [False]
        if self.accelerator.is_main_process and self.path.exists():
            # whole lines since begin
            records = (json.loads(line) for line in self.path.read_text().splitlines())
            found = [any(record["step"] == step and "protocol" in record for record in records)]
        return broadcast_object_list(found)[0]

    def draw(self) -> None:
        """Draw the curve of the run anew, where a record has come since it was drawn."""
        if self.accelerator.is_main_process and self.path.exists() and not self.is_drawn:
            self.draw_curve(self.path, self.curve)
            self.is_drawn = True


class Progress:
    """The progress bar of the main process, and sentences above it."""

    def __init__(self, accelerator: Accelerator):
        self.is_shown = accelerator.is_main_process
        self.bar = tqdm(disable=True)

    def start(self, step: int, total: int) -> None:
        """Show the bar, `step` of `total` steps done."""
        shown = not self.is_shown
        self.bar = tqdm(total=total, initial=step, disable=shown, desc="training", unit="step", mininterval=1)

    def advance(self) -> None:
        """One step more."""
        self.bar.update()

    def set_total(self, total: int) -> None:
        """The run has another length now."""
        self.bar.total = total

    def show(self, figures: dict[str, str]) -> None:
        """Put figures beside the bar."""
        self.bar.set_postfix(figures, refresh=False)

    def say(self, sentence: str) -> None:
        """A line on stderr that does not tear the bar."""
        if self.is_shown:
            self.bar.write(sentence, file=sys.stderr)

    def close(self) -> None:
        """Leave the bar as it stands."""
        self.bar.close()


class Stopwatch:
    """Seconds since the last report, and how many of them were spent waiting for data."""

    def __init__(self):
        self.started, self.waited = time.perf_counter(), 0.0

    def start(self) -> None:
        """Count from now on."""
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
