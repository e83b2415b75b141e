"""Runs that a signal ends, and losses that go wrong, for the tests of all training scripts."""

import os
import signal

import pytest
import torch

from hf_diffusion.loop.trainer import Trainer
from hf_diffusion.losses.denoising import DenoisingObjective


def stop_after(patch: pytest.MonkeyPatch, steps: int) -> None:
    """Send this process SIGTERM when so many steps of a training are done."""
    original = Trainer.optimizer_step

    def step_and_signal(trainer, stream):
        original(trainer, stream)
        if trainer.step + 1 == steps:
            os.kill(os.getpid(), signal.SIGTERM)

    patch.setattr(Trainer, "optimizer_step", step_and_signal)


def poison(patch: pytest.MonkeyPatch, calls, rows=None, value: float = torch.inf) -> None:
    """Give these rows (None: all) of a denoiser's batch this loss at these calls, from 0."""
    original, count = DenoisingObjective.values, []

    def poisoned(objective, *inputs):
        values = original(objective, *inputs)
        if len(count) in calls:
            bad = [value if rows is None or row in rows else 1.0 for row in range(len(values["loss"]))]
            values["loss"] = values["loss"] * torch.tensor(bad)
        count.append(None)
        return values

    patch.setattr(DenoisingObjective, "values", poisoned)
