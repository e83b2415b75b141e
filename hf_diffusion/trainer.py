"""The Accelerate loop for one network; what surrounds the optimizer step is in `training_run`.

A training script hands it a model, data, and a loss function; what differs between methods is in these, not in hooks of the loop.
A loss function takes (model, batch, draw) and returns per-image tensors (B,): "loss", optionally "level" (noise level in [0, 1)
for the quartiles in the log), and whatever else is to be averaged into the log.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from hf_diffusion.bad_steps import TrainingDiverged
from hf_diffusion.checkpoints import engine
from hf_diffusion.config.training import TrainingConfig
from hf_diffusion.data.images import ImageData, StreamingImageData
from hf_diffusion.evaluation.in_training import Measurement
from hf_diffusion.randomness import Draw
from hf_diffusion.sharding import describe_to_deepspeed
from hf_diffusion.training_run import TrainingRun, adam, made_ready


__all__ = ["Loss", "Trainer", "TrainingDiverged"]
Loss = Callable[[nn.Module, dict[str, Tensor], Draw], dict[str, Tensor]]


class Trainer(TrainingRun):
    """Trains `model` on `data` by `loss`; export, preview and measurements: see TrainingRun."""

    def __init__(
        self,
        config: TrainingConfig,
        accelerator: Accelerator,
        model: nn.Module,
        data: ImageData | StreamingImageData,
        loss: Loss,
        export: Callable[[nn.Module, Path], None],
        preview: Callable[[nn.Module], Image.Image] | None = None,
        measurements: Sequence[Measurement] = (),
    ):
        super().__init__(config, accelerator, data, export, preview, measurements)
        self.loss = loss
        model = made_ready(config, model)
        describe_to_deepspeed(accelerator, config)
        self.model, self.optimizer = accelerator.prepare(model, adam(config, model, config.learning_rate))
        self.networks = [self.model]
        self._start_average()
        self._resume()

    def _optimizer_step(self, stream: Iterator[dict[str, Tensor]]) -> None:
        """One step on `gradient_accumulation_steps` micro-batches; a step whose gradient is not finite changes nothing."""
        accelerator, micro_steps = self.accelerator, self.config.gradient_accumulation_steps
        self._set_learning_rate(
            self.optimizer, self.config.learning_rate
        )  # first: DeepSpeed updates within the last backward
        for micro, batch, draw in self._micro_batches(stream):
            self._seed_dropout(micro)
            last = micro == micro_steps - 1
            with nullcontext() if last else accelerator.no_sync(self.model):
                with accelerator.autocast():
                    values = self.loss(self.model, batch, draw)
                self._remember(micro, batch, draw, values["loss"])
                if engine(accelerator) == "DeepSpeed":
                    self._backward_of_engine(values["loss"].mean(), last)
                else:
                    accelerator.backward(values["loss"].mean() / micro_steps)
            self.means.add({k: v for k, v in values.items() if k != "level"}, values.get("level"))
        self._update() if engine(accelerator) != "DeepSpeed" else self._after_engine_step()

    def _backward_of_engine(self, loss: Tensor, last: bool) -> None:
        """The backward pass of DeepSpeed, whose engine divides by the micro steps, clips, and after the last one updates before anybody can look.

        So a loss that is not finite on some process is met before: it becomes 0 on all of them.
        """
        self.finite = not self.accelerator.reduce((~loss.detach().isfinite()).float(), "sum").item()
        if not self.finite:
            self._skip(self.optimizer, math.nan)
            if self.config.gradient_accumulation_steps == 1:
                return  # and nothing changes
            loss = 0 * sum(p.sum() for p in self.model.parameters())  # the other micro-batches count
        self.accelerator.gradient_state._set_sync_gradients(last)
        self.accelerator.backward(loss)

    def _after_engine_step(self) -> None:
        if not self.finite:
            return
        self.grad_norm = float(self.accelerator.clip_grad_norm_(self.model.parameters(), math.inf) or 0.0)  # reads it
        if math.isfinite(self.grad_norm):
            self.skipped_in_a_row = 0
            if self.ema is not None:
                self.ema.step(self.model.parameters())
        elif self.accelerator.mixed_precision == "fp16":
            self._skip(self.optimizer, self.grad_norm)  # as the engine did, and lowered its loss scale
        else:
            raise TrainingDiverged(
                f"the gradient of step {self.step} was not finite ({self.grad_norm}) and DeepSpeed has applied it; the checkpoints in "
                f"{self.output_dir} are untouched: go on from the latest with a lower learning_rate"
            )

    def _update(self) -> None:
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
