"""What every training loop has around its optimizer step: counting, logging, sampling, checkpoints, resuming, signals, export.

A loop for one network is in `trainer`, one for a generator and a discriminator in `ddgan_trainer`.
"""

import logging
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_diffusion.checkpoints import check_same_run, find_checkpoint, save_checkpoint
from hf_diffusion.config.training import TrainingConfig, config_to_dict, save_config
from hf_diffusion.data.images import ImageData, StreamingImageData, batches
from hf_diffusion.figures import loss_curve
from hf_diffusion.lr_schedule import lr_factor
from hf_diffusion.randomness import BatchOrder, Draw, derive_seed
from hf_diffusion.reporting import MetricsLog, RunningMeans, Stopwatch


logger = logging.getLogger(__name__)


class TrainingDiverged(RuntimeError):
    """The loss or its gradient was not finite for `max_nonfinite_steps` steps in a row."""


class StopSignal:
    """SIGTERM and SIGINT as a flag that the loop reads between steps; a second SIGINT interrupts at once."""

    def __init__(self):
        self.requested = False
        self.former = {number: signal.signal(number, self._request) for number in (signal.SIGTERM, signal.SIGINT)}

    def _request(self, number: int, frame) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True

    def restore(self) -> None:
        for number, handler in self.former.items():
            signal.signal(number, handler)


class TrainingRun:
    """A run of optimizer steps on `data`, on as many processes as `accelerate launch` starts; a subclass has the step itself.

    `preview(model)` draws a grid of samples; `evaluate(model)` measures numbers for the log; `export(model, folder)` writes what users load. All are
    called on the main process with a model in evaluation mode: the averaged weights, and for previews the raw ones, too.

    A subclass prepares `model` (the network that users get) with its optimizers and then calls `_start_average` and `_resume`.
    It defines `_optimizer_step(stream)`, `_report()` and `rehearse(batch, draw)`.
    """

    model: nn.Module
    networks: list[nn.Module]  # all that are trained
    draw_curve = staticmethod(loss_curve)

    def __init__(
        self,
        config: TrainingConfig,
        accelerator: Accelerator,
        data: ImageData | StreamingImageData,
        export: Callable[[nn.Module, Path], None],
        preview: Callable[[nn.Module], Image.Image] | None = None,
        evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    ):
        self.config, self.accelerator, self.data = config, accelerator, data
        self.export, self.preview, self.output_dir = export, preview, Path(config.output_dir)
        self.evaluate, self.evaluation = evaluate, {}  # the last evaluation's results, by name
        self.after_save: Callable[[], None] | None = None  # set on the main process where saves are shared
        self.step, self.skipped, self.skipped_in_a_row, self.wall_time = 0, 0, 0, 0.0
        self.ema: EMAModel | None = None
        self.global_batch = config.global_batch(accelerator.num_processes)
        self.images = None if isinstance(data, StreamingImageData) else len(data)
        self.total_steps = config.total_steps(self.images, accelerator.num_processes)
        self.order = BatchOrder(
            self.images,
            config.seed,
            config.train_batch_size,
            config.gradient_accumulation_steps,
            accelerator.process_index,
            accelerator.num_processes,
        )

    @property
    def parameters(self) -> int:
        """Parameters of the network that users get."""
        return sum(p.numel() for p in self.model.parameters())

    # --- the run --------------------------------------------------------------------------------------------------------

    def train(self) -> bool:
        """Train to the end, or to a signal; True when the run is complete. Raises TrainingDiverged."""
        self._begin()
        stop = StopSignal()
        try:
            finished = self._loop(stop)
        finally:
            stop.restore()
            self.progress.close()
        if finished:
            self._finish()
        self.accelerator.end_training()
        return finished

    def _begin(self) -> None:
        config, accelerator = self.config, self.accelerator
        if accelerator.is_main_process:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            save_config(config, self.output_dir / "config.yaml")
        if config.report_to:
            trackable = {
                k: v if isinstance(v, int | float | str) else str(v) for k, v in config_to_dict(config).items()
            }
            accelerator.init_trackers("hf_diffusion", config=trackable)
        self.log = MetricsLog(accelerator, self.output_dir, self.step, self.draw_curve)
        self.means, self.watch = RunningMeans(accelerator.device), Stopwatch()
        self.saved_step = self.step
        self.progress = tqdm(
            total=self.total_steps,
            initial=self.step,
            disable=not accelerator.is_main_process,
            desc="training",
            unit="step",
            mininterval=1,
        )

    def _loop(self, stop: StopSignal) -> bool:
        config = self.config
        for network in self.networks:
            network.train()
        stream = self.batches()
        began = time.perf_counter()
        while self.step < self.total_steps:
            self._optimizer_step(stream)
            self.step += 1
            self.progress.update()
            if self.step % config.logging_steps == 0 or self.step == self.total_steps:
                self._report()
            if config.sample_steps and self.step % config.sample_steps == 0 and self.step < self.total_steps:
                self._draw_samples()
            stopping = self._stop_everywhere(stop)
            if stopping or self.step % config.checkpointing_steps == 0 or self.step == self.total_steps:
                self.wall_time += time.perf_counter() - began
                began = time.perf_counter()
                self._save()
            if stopping and self.step < self.total_steps:
                self._say_how_to_go_on()
                return False
        return True

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """Every micro-batch of this process from the current step on."""
        config, accelerator = self.config, self.accelerator
        if self.images is None:  # a stream counts its own way to the place, in the same layout as BatchOrder
            place = (accelerator.process_index, accelerator.num_processes)
            return self.data.stream(
                self.step * self.global_batch, *place, config.train_batch_size, config.dataloader_num_workers
            )
        positions = self.order.positions(self.step, self.total_steps)
        return batches(self.data, positions, config.dataloader_num_workers, accelerator.device.type == "cuda")

    # --- parts of an optimizer step ---------------------------------------------------------------------------------------

    def _micro_batches(self, stream: Iterator[dict[str, Tensor]]) -> Iterator[tuple[int, dict[str, Tensor], Draw]]:
        """The number, the images and the random numbers of each micro-batch of the current step."""
        for micro in range(self.config.gradient_accumulation_steps):
            batch = self._to_device(self.watch.wait(stream))
            draw = Draw(
                self.config.seed, self.step, self.order.rows(micro), self.global_batch, self.accelerator.device
            )
            yield micro, batch, draw

    def _seed_dropout(self, *place: int | str) -> None:
        """Dropout draws from the global generator: tie it to the place in the run, too."""
        torch.manual_seed(derive_seed(self.config.seed, "dropout", self.step, *place, self.accelerator.process_index))

    def _set_learning_rate(self, optimizer: torch.optim.Optimizer, highest: float) -> None:
        config = self.config
        for group in optimizer.param_groups:
            group["lr"] = highest * lr_factor(
                self.step, self.total_steps, config.lr_scheduler, config.lr_warmup_steps, config.lr_decay_steps
            )

    def _clip_gradients(self, optimizer: AcceleratedOptimizer, network: nn.Module) -> float:
        """Clip to `max_grad_norm`, if that is set, and return the norm before it."""
        self.accelerator.unscale_gradients(optimizer)
        return float(nn.utils.clip_grad_norm_(network.parameters(), self.config.max_grad_norm or math.inf))

    def _skip(self, optimizer: AcceleratedOptimizer, grad_norm: float) -> None:
        """Leave out an update whose gradient is not finite, and give up after too many of them."""
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        if self.accelerator.scaler is not None:
            optimizer.step()  # the scaler skips the update and lowers the loss scale
        self.progress.write(
            f"step {self.step}: the gradient is not finite ({grad_norm}); the step is skipped", file=sys.stderr
        )
        if self.skipped_in_a_row >= self.config.max_nonfinite_steps:
            raise TrainingDiverged(
                f"the gradient was not finite in {self.skipped_in_a_row} steps in a row, the last of them step {self.step}; the checkpoints in "
                f"{self.output_dir} are untouched: resume from one with a lower learning_rate, or in bf16 instead of fp16"
            )

    def _to_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        batch = {name: value.to(self.accelerator.device, non_blocking=True) for name, value in batch.items()}
        if self.config.channels_last:
            batch["pixels"] = batch["pixels"].contiguous(memory_format=torch.channels_last)
        return batch

    # --- what a run leaves behind -----------------------------------------------------------------------------------------

    def _write_report(self, values: dict[str, float], shown: dict[str, str]) -> dict[str, float]:
        """Log the means since the last report with `values`; `shown` (name -> format) stand beside the progress bar, too."""
        images = (self.step % self.config.logging_steps or self.config.logging_steps) * self.global_batch
        values = self.means.report(self.accelerator) | self.watch.report(images) | values | {"skipped": self.skipped}
        self.log.write(self.step, values)
        self.progress.set_postfix(
            {name: format(values[name], form) for name, form in shown.items() if name in values}
            | {"img_s": f"{values['images_per_second']:.0f}"},
            refresh=False,
        )
        return values

    def _draw_samples(self) -> None:
        if self.preview is not None and self.accelerator.is_main_process:
            folder = self.output_dir / "samples"
            folder.mkdir(exist_ok=True)
            kinds = {"raw": self._raw_model()} | ({"ema": self._averaged_model()} if self.ema is not None else {})
            for kind, model in kinds.items():
                with self.accelerator.autocast():
                    self.preview(model).save(folder / f"{kind}-{self.step:08d}.png")
        if self.evaluate is not None and self.accelerator.is_main_process:
            with self.accelerator.autocast():
                self.evaluation = self.evaluate(self.shared_model())
            self.log.write(self.step, self.evaluation)
        self.accelerator.wait_for_everyone()

    def _save(self) -> None:
        if self.saved_step != self.step:
            save_checkpoint(
                self.accelerator, self.output_dir, self.step, self._identity(), self.config.checkpoints_total_limit
            )
            self.saved_step = self.step
            self.log.draw()
            if self.after_save is not None:
                self.after_save()

    def _finish(self) -> None:
        """Samples, curve, and the pipeline with the averaged weights."""
        self._draw_samples()
        if self.accelerator.is_main_process:
            self.log.draw()
            self.export(self.shared_model(), self.output_dir)
        self.accelerator.wait_for_everyone()

    # --- averaged weights -------------------------------------------------------------------------------------------------

    def _start_average(self) -> None:
        config = self.config
        if config.use_ema:
            self.ema = EMAModel(
                self.model.parameters(),
                decay=config.ema_max_decay,
                use_ema_warmup=True,
                inv_gamma=config.ema_inv_gamma,
                power=config.ema_power,
                foreach=True,
            )
            self.accelerator.register_for_checkpointing(self.ema)

    def shared_model(self) -> nn.Module:
        """A copy of what users get: the averaged weights, or the raw ones where no average is kept."""
        return self._averaged_model() if self.ema is not None else self._raw_model()

    def _raw_model(self) -> nn.Module:
        return self._copy(self.accelerator.unwrap_model(self.model).state_dict())

    def _averaged_model(self) -> nn.Module:
        """A copy with the averaged weights: the weights in training are never swapped, so they cannot be mixed up."""
        model = self._copy(self.accelerator.unwrap_model(self.model).state_dict())
        self.ema.copy_to(model.parameters())
        return model

    def _copy(self, state: dict[str, Tensor]) -> nn.Module:
        source = self.accelerator.unwrap_model(self.model)
        model = type(source).from_config(source.config).to(self.accelerator.device)
        model.load_state_dict(state)
        return model.eval().requires_grad_(False)

    # --- resuming and stopping --------------------------------------------------------------------------------------------

    def _identity(self) -> dict:
        """What must agree for a checkpoint to continue this run exactly."""
        return {
            "seed": self.config.seed,
            "global_batch": self.global_batch,
            "total_steps": self.total_steps,
            "data": self.data.fingerprint,
            "parameters": self.parameters,
            "use_ema": self.ema is not None,
        }

    def _resume(self) -> None:
        """Go on from the checkpoint that the settings name, if any."""
        if not self.config.resume_from_checkpoint or self.config.dry_run:
            return
        checkpoint = find_checkpoint(self.output_dir, self.config.resume_from_checkpoint)
        if checkpoint is None:
            self.accelerator.print(f"there is no checkpoint in {self.output_dir} yet: starting at step 0")
            return
        self.step = check_same_run(checkpoint, self._identity())
        self.accelerator.load_state(str(checkpoint))
        if self.ema is not None:
            self.ema.to(self.accelerator.device)
        self.accelerator.print(f"going on from {checkpoint}, step {self.step} of {self.total_steps}")

    def _stop_everywhere(self, stop: StopSignal) -> bool:
        if self.accelerator.num_processes == 1:
            return stop.requested
        flag = torch.tensor(
            float(stop.requested), device=self.accelerator.device
        )  # a signal may reach one process only
        return bool(self.accelerator.reduce(flag, "sum") > 0)

    def _say_how_to_go_on(self) -> None:
        self.progress.close()
        self.accelerator.print(
            f"stopped by a signal at step {self.step} of {self.total_steps}, everything is saved; go on with the same command and "
            f"--resume_from_checkpoint latest, e.g. {sys.argv[0]} --config {self.output_dir / 'config.yaml'} --resume_from_checkpoint latest"
        )


def adam(config: TrainingConfig, network: nn.Module, learning_rate: float) -> torch.optim.AdamW:
    """The optimizer of the settings; with adam_weight_decay 0 it is plain Adam."""
    return torch.optim.AdamW(
        network.parameters(),
        lr=learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
        fused=True,
    )


def made_ready(config: TrainingConfig, network: nn.Module, compilable: bool = True) -> nn.Module:
    """The network in the memory format, with the checkpointing and, if `compilable`, the compilation that the settings ask for."""
    if config.channels_last:
        network = network.to(memory_format=torch.channels_last)
    if config.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    if config.torch_compile and compilable:
        network.compile()  # in place, so that the names in the state dict stay as they are
    return network
