"""The Accelerate loop for one network; what surrounds the optimizer step is in `training_run`.

A training script hands it a model, data, and a loss function; what differs between methods is in these, not in hooks of the loop.
A loss function takes (model, batch, draw) and returns per-image tensors (B,): "loss", optionally "level" (noise level in [0, 1)
for the quartiles in the log), and whatever else is to be averaged into the log.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from hf_diffusion.config.training import TrainingConfig
from hf_diffusion.data.images import ImageData, StreamingImageData
from hf_diffusion.randomness import Draw
from hf_diffusion.training_run import TrainingDiverged, TrainingRun, adam, made_ready


__all__ = ["Loss", "Trainer", "TrainingDiverged"]
Loss = Callable[[nn.Module, dict[str, Tensor], Draw], dict[str, Tensor]]


class Trainer(TrainingRun):
    """Trains `model` on `data` by `loss`; export, preview and evaluate: see TrainingRun."""

    def __init__(
        self,
        config: TrainingConfig,
        accelerator: Accelerator,
        model: nn.Module,
        data: ImageData | StreamingImageData,
        loss: Loss,
        export: Callable[[nn.Module, Path], None],
        preview: Callable[[nn.Module], Image.Image] | None = None,
        evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    ):
        super().__init__(config, accelerator, data, export, preview, evaluate)
        self.loss = loss
        model = made_ready(config, model)
        self.model, self.optimizer = accelerator.prepare(model, adam(config, model, config.learning_rate))
        self.networks = [self.model]
        self._start_average()
        self._resume()

    def _optimizer_step(self, stream: Iterator[dict[str, Tensor]]) -> None:
        """One step on `gradient_accumulation_steps` micro-batches; a step whose gradient is not finite changes nothing."""
        accelerator, micro_steps = self.accelerator, self.config.gradient_accumulation_steps
        for micro, batch, draw in self._micro_batches(stream):
            self._seed_dropout(micro)
            last = micro == micro_steps - 1
            with nullcontext() if last else accelerator.no_sync(self.model):
                with accelerator.autocast():
                    values = self.loss(self.model, batch, draw)
                accelerator.backward(values["loss"].mean() / micro_steps)
            self.means.add({k: v for k, v in values.items() if k != "level"}, values.get("level"))
        self._update()

    def _update(self) -> None:
        self._set_learning_rate(self.optimizer, self.config.learning_rate)
        self.grad_norm = self._clip_gradients(self.optimizer, self.model)
        if math.isfinite(self.grad_norm):
            self.optimizer.step()
            self.skipped_in_a_row = 0
            if self.ema is not None:
                self.ema.step(self.model.parameters())
        else:
            self._skip(self.optimizer, self.grad_norm)
        self.optimizer.zero_grad(set_to_none=True)

    def _report(self) -> None:
        values = {"lr": self.optimizer.param_groups[0]["lr"], "grad_norm": self.grad_norm}
        self._write_report(values, {"loss": ".4f"})

    def rehearse(self, batch: dict[str, Tensor], draw: Draw) -> None:
        """One micro step whose gradient is thrown away."""
        with self.accelerator.autocast():
            loss = self.loss(self.model, batch, draw)["loss"].mean()
        self.accelerator.backward(loss)
        self.optimizer.zero_grad()
