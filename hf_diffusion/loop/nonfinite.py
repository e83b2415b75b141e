"""What there is to say and to do about steps whose gradient is not finite: which images they
consisted of, how many may follow each other, and the loss scale of fp16.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from hf_diffusion.config.run_options import TrainingConfig
from hf_diffusion.loop.later import Later
from hf_diffusion.loop.reporting import Progress


NAMED_ROWS = 8
# GradScaler begins at 2**16 and doubles every 2000 steps without overflow; far beyond, one rare
# large loss would cost many skipped steps.
HIGHEST_LOSS_SCALE, LOWEST_LOSS_SCALE = 2.0**24, 2.0**-10


class TrainingDiverged(RuntimeError):
    """The loss or its gradient was not finite for `max_nonfinite_steps` steps in a row, or at any
    loss scale.
    """


class Turn(NamedTuple):
    """A player's turn in a step, by the norm of its gradient before clipping.

    `seen` has the rows, the noise levels or -1, and the losses (B,) of each micro-batch.
    """

    step: int
    norm: Later
    seen: list[tuple[Tensor, Tensor, Tensor]]

    def is_finite(self) -> bool:
        """Whether its gradient was; waits for the device."""
        return math.isfinite(self.norm.value())


class Skips:
    """Counts the steps that were left out, and gives up after too many in a row."""

    def __init__(self, config: TrainingConfig, accelerator: Accelerator, progress: Progress):
        self.config, self.accelerator, self.progress = config, accelerator, progress
        self.count, self.in_a_row = 0, 0

    def judge(self, turns: Sequence[Turn]) -> None:
        """Count a step by its turns, and say what is wrong with the first that is not finite.

        All processes must ask together. TrainingDiverged.
        """
        bad = next((turn for turn in turns if not turn.is_finite()), None)
        if bad is None:
            self.in_a_row = 0
            return
        self.count, self.in_a_row = self.count + 1, self.in_a_row + 1
        columns = [self.accelerator.gather(torch.cat(values)).cpu().double() for values in zip(*bad.seen)]
        if self.accelerator.is_main_process:
            rows = bad_rows_in_words(torch.stack(columns, dim=1))
            self.progress.say(
                f"step {bad.step}: the gradient is not finite (norm {bad.norm.value()}); all processes skip the "
                f"step; {rows}"
            )
        check_loss_scale(self.accelerator.scaler, bad.step, Path(self.config.output_dir))
        if self.in_a_row >= self.config.max_nonfinite_steps:
            raise TrainingDiverged(
                f"the gradient was not finite in {self.in_a_row} steps in a row, the last of them step {bad.step}; "
                f"the checkpoints in {self.config.output_dir}, if any, are untouched: go on from one, or begin anew, "
                "with a lower learning_rate, or in bf16 instead of fp16"
            )


def bad_rows_in_words(seen: Tensor) -> str:
    """In words, the images (global batch, 3: row, noise level or -1, loss) that a bad step probably
    owes to.
    """
    bad = seen[~seen[:, 2].isfinite()]
    what = "loss not finite" if len(bad) else "every loss is finite, the largest"
    shown = (bad if len(bad) else seen[seen[:, 2].argsort(descending=True)])[:NAMED_ROWS].tolist()
    images = ", ".join(
        f"row {row:.0f}" + (f" at noise level {level:.3f}" if level >= 0 else "") + f" ({loss:.3g})"
        for row, level, loss in shown
    )
    return f"{what}: {images}" + (f" and {len(bad) - NAMED_ROWS} more" if len(bad) > NAMED_ROWS else "")


def bound_loss_scale(scaler: torch.amp.GradScaler | None) -> dict[str, float]:
    """The loss scale for the log, where there is one, brought back below its bound: it doubles as
    long as nothing overflows.
    """
    if scaler is None:
        return {}
    if scaler.get_scale() > HIGHEST_LOSS_SCALE:
        scaler.update(HIGHEST_LOSS_SCALE)
    return {"loss_scale": scaler.get_scale()}


def check_loss_scale(scaler: torch.amp.GradScaler | None, step: int, output_dir: Path) -> None:
    """TrainingDiverged where overflows have halved the loss scale to nothing, however many good
    steps lay between them.
    """
    if scaler is not None and scaler.get_scale() < LOWEST_LOSS_SCALE:
        raise TrainingDiverged(
            f"the loss scale of fp16 fell to {scaler.get_scale():g} by step {step}, so the gradients are too large "
            "for fp16 at any scale; the "
            f"checkpoints in {output_dir}, if any, are untouched: go on in bf16 or float32, or with a lower "
            "learning_rate"
        )
