"""What one family brings to the loop: networks, and for each of them a loss of a micro-batch.

A loss is a function (network, batch, draw) -> values by name, each a tensor (B,):
- "loss", which is minimised;
- "level", optional: the noise level in [0, 1) that the log sorts losses by;
- whatever else is to be averaged into the log; a pair of tensors is a value with its weight.

All that a loss draws comes from `draw`, so that the number of processes changes nothing. It is a
`randomness.Draw`, or a `FixedDraw` for held-out data. What is meant for training alone, such as
label dropout, asks `network.training`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from accelerate import Accelerator
from torch import Tensor, nn

from hf_diffusion.figures.curves import loss_curve
from hf_diffusion.randomness import Draw, FixedDraw


Values = dict[str, Tensor | tuple[Tensor, Tensor]]
Loss = Callable[[nn.Module, dict[str, Tensor], Draw | FixedDraw], Values]


@dataclass
class Player:
    """A network that is trained, by its own loss and optimizer.

    The names of its columns in the log end in `suffix`. `frozen` take part in its loss but get no
    gradient. The loop puts the network that it has prepared in the place of the given one.
    """

    network: nn.Module
    loss: Loss
    learning_rate: float
    name: str = ""
    suffix: str = ""
    frozen: tuple[nn.Module, ...] = ()
    # Compiled graphs cannot be differentiated twice.
    compilable: bool = True
    is_averaged: bool = True
    # Which of the loss function's values are better when high, such as an accuracy.
    higher_is_better: tuple[str, ...] = ()
    optimizer: Any = field(default=None, repr=False)


class Objective:
    """One network and one loss; a game, a distillation or an autoencoder overrides what differs.

    The first player that is averaged is the network that users get.
    """

    # Whether a step depends on the length of the run, which must then be known before the first.
    goes_by_length: ClassVar[bool] = False
    # What stands beside the progress bar, with its format.
    shown: ClassVar[dict[str, str]] = {"loss": ".4f"}

    def __init__(self, *players: Player, state: tuple[Any, ...] = ()):
        self.players = players
        # Joins the checkpoints, each by its state_dict.
        self.state = state

    def turns(self, step: int) -> Iterator[Player]:
        """Who is updated in this step, in order; an update that is not finite ends the step."""
        yield from self.players

    def after_update(self, player: Player, step: int) -> None:
        """What follows an update: target networks, curricula."""

    def identity(self) -> dict[str, Any]:
        """What must agree for a checkpoint to continue this run, beside the settings."""
        return {}

    def report(self, accelerator: Accelerator) -> dict[str, float]:
        """Figures for the log that are no means, over all processes since the last report."""
        return {}

    def remark(self, values: dict[str, float]) -> str | None:
        """What a person should be told about the figures of a report."""
        return None

    def draw_curve(self, metrics_jsonl: Path, out_png: Path) -> Path | None:
        """Draw the run's curve from its log."""
        return loss_curve(metrics_jsonl, out_png)
