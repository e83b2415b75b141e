"""What there is to say and to do about steps whose gradient is not finite: which images they
consisted of, and the loss scale of fp16.
"""

from pathlib import Path

import torch
from torch import Tensor


NAMED_ROWS = 8
# GradScaler begins at 2**16 and doubles every 2000 steps without overflow; far beyond, one rare
# large loss would cost many skipped steps.
HIGHEST_LOSS_SCALE, LOWEST_LOSS_SCALE = 2.0**24, 2.0**-10


class TrainingDiverged(RuntimeError):
    """The loss or its gradient was not finite for `max_nonfinite_steps` steps in a row, or at any
    loss scale.
    """


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
            f"checkpoints in {output_dir} are untouched: go on in bf16 or float32, or with a lower learning_rate"
        )
