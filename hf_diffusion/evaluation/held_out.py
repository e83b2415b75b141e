"""The training's own loss on held-out data, at noise and noise levels that never change."""

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from hf_diffusion.data.protocol import TrainingData
from hf_diffusion.evaluation.in_training import Stopping, shares
from hf_diffusion.evaluation.measures import Evaluation, Measure
from hf_diffusion.evaluation.protocol import data_protocol
from hf_diffusion.losses.objective import Player
from hf_diffusion.randomness import FixedDraw


QUARTERS = 4


class HeldOutLoss:
    """The mean of a player's loss, and of what else its loss function returns, over held-out
    samples.

    Each sample is looked at in every quarter of the noise levels: eval_<name>_q0 is that of the
    least noise, eval_<name> the mean of the four. Noise and level belong to the sample, so that
    neither batches nor processes change the result. The network is in evaluation mode, in which a
    loss leaves out what is meant for training alone.
    """

    def __init__(
        self, accelerator: Accelerator, data: TrainingData, player: Player, batch_size: int = 64, seed: int = 0
    ):
        self.accelerator, self.data, self.player = accelerator, data, player
        self.batch_size, self.seed = batch_size, seed
        self.keys = [f"eval_{name}{part}" for name in self._names() for part in ("", *map("_q{}".format, range(4)))]

    @torch.no_grad()
    def _names(self) -> list[str]:
        """What the loss function returns, found by a trial on one sample."""
        network, was_training = self.player.network, self.player.network.training
        network.eval()
        device = next((p.device for p in network.parameters()), torch.device("cpu"))
        values = self._values(network, self.data.fetch([0], epoch=0), range(1), 0, device)
        network.train(was_training)
        return list(values)

    def _values(
        self, network: nn.Module, batch: dict[str, Tensor], rows: range, quarter: int, device: torch.device
    ) -> dict[str, Tensor]:
        """The values (B,) that have one a sample.

        Those that hold for some samples only are left out.
        """
        batch = {name: value.to(device) for name, value in batch.items()}
        with self.accelerator.autocast():
            values = self.player.loss(network, batch, FixedDraw(self.seed, rows, quarter, QUARTERS, device))
        return {name: v for name, v in values.items() if name != "level" and isinstance(v, Tensor)}

    @torch.no_grad()
    def __call__(self, network: nn.Module, stopping: Stopping) -> Evaluation:
        """The measures of `network`, by all processes together.

        EvaluationStopped after a signal.
        """
        device, sums = self.accelerator.device, dict.fromkeys(self.keys, 0.0)
        for rows in shares(len(self.data), self.batch_size, stopping):
            batch = self.data.fetch(rows, epoch=0)
            for quarter in range(QUARTERS):
                for name, value in self._values(network, batch, rows, quarter, device).items():
                    sums[f"eval_{name}_q{quarter}"] += float(value.float().sum())
        parts = gather_object([sums])
        means = {key: sum(part[key] for part in parts) / len(self.data) for key in self.keys}
        for name in (key for key in self.keys if f"{key}_q0" in means):
            means[name] = sum(means[f"{name}_q{quarter}"] for quarter in range(QUARTERS)) / QUARTERS
        measures = {key: Measure(_described(key), value, better=self._better(key)) for key, value in means.items()}
        protocol = {"count": len(self.data), "held_out": data_protocol(self.data)}
        return Evaluation(dict(sorted(measures.items())), protocol | {"noise_seed": self.seed})

    def _better(self, key: str) -> str:
        """Losses are better when low; a loss function's owner names what is better when high."""
        name = key.removeprefix("eval_").split("_q")[0]
        return "higher" if name in self.player.higher_is_better else "lower"


def _described(key: str) -> str:
    name, _, quarter = key.removeprefix("eval_").partition("_q")
    where = f", quarter {int(quarter) + 1} of the noise levels" if quarter else ""
    return f"{name} on held-out data{where}"
