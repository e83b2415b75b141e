"""What every training loop has around its optimizer step: counting, logging, sampling, checkpoints, resuming, signals, export.

A loop for one network is in `trainer`, one for a generator and a discriminator in `ddgan_trainer`.
"""

import logging
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_diffusion.bad_steps import TrainingDiverged, bound_loss_scale, check_loss_scale, described
from hf_diffusion.best_model import BestModel
from hf_diffusion.checkpoints import check_same_run, engine, find_together, save_checkpoint
from hf_diffusion.config.resuming import changeable_settings, differences, tied_settings
from hf_diffusion.config.training import TrainingConfig, config_to_dict, save_config
from hf_diffusion.data.images import ImageData, StreamingImageData, batches
from hf_diffusion.energy import EnergyMeter
from hf_diffusion.evaluation.in_training import Evaluation, EvaluationStopped, Measurement
from hf_diffusion.figures import loss_curve
from hf_diffusion.lr_schedule import lr_factor
from hf_diffusion.randomness import BatchOrder, Draw, derive_seed
from hf_diffusion.reporting import MetricsLog, RunningMeans, Stopwatch
from hf_diffusion.sharding import AveragedWeights, own_class, whole


logger = logging.getLogger(__name__)


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


class DrawingStopped(Exception):
    """A signal came while samples were drawn."""


class TrainingRun:
    """A run of optimizer steps on `data`, on as many processes as `accelerate launch` starts; a subclass has the step itself.

    `preview(model)` draws a grid of samples; `export(model, folder)` writes what users load. Both are called on the main process with a model in
    evaluation mode: the averaged weights, and for previews the raw ones, too. `measurements` (see evaluation.in_training) are called with the averaged
    weights on all processes.

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
        measurements: Sequence[Measurement] = (),
    ):
        self.config, self.accelerator, self.data = config, accelerator, data
        self.export, self.preview, self.output_dir = export, preview, Path(config.output_dir)
        self.measurements = measurements
        self.evaluations: list[Evaluation] = []  # the last results, which are those of step
        self.evaluated_step: int | None = None
        self.after_save: Callable[[], None] | None = None  # set on the main process where saves are shared
        self.step, self.skipped, self.skipped_in_a_row, self.wall_time = 0, 0, 0, 0.0
        self.joules: dict[str, float] = {}  # on the main process: by source, in all processes of this machine
        self.ema: AveragedWeights | None = None
        self.best: BestModel | None = None  # on the main process where the settings name a measure
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
            finished = self._loop(stop) and self._finish(stop)
            if not finished:
                self._say_how_to_go_on()
        finally:
            stop.restore()
            self.progress.close()
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
        if config.best_metric is not None:
            self.best = BestModel(self.output_dir, config.best_metric) if accelerator.is_main_process else None
        self.means, self.watch = RunningMeans(accelerator.device), Stopwatch()
        self.joules_before = self.joules if self.step else None
        gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if accelerator.device.type == "cuda" else 0
        self.meter = EnergyMeter(gpus) if accelerator.is_main_process else None
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
        if self._is_due(config.eval_steps) and not self.log.has_evaluation(self.step):
            with self.watch.paused():
                self._evaluate(stop)  # what a signal had cut short
        while self.step < self.total_steps:
            self._optimizer_step(stream)
            self.step += 1
            self.progress.update()
            if self.step % config.logging_steps == 0 or self.step == self.total_steps:
                self._report()
            with self.watch.paused():
                if self._is_due(config.sample_steps):
                    self._draw_samples(stop)
                if self._is_due(config.eval_steps):
                    self._evaluate(stop)
            stopping = self._stop_everywhere(stop)
            if stopping or self.step % config.checkpointing_steps == 0 or self.step == self.total_steps:
                self.wall_time += time.perf_counter() - began
                began = time.perf_counter()
                self._save()
            if stopping and self.step < self.total_steps:
                return False
        return True

    def _is_due(self, interval: int | None) -> bool:
        """Whether something that happens every `interval` steps does so now; what belongs to the end is left to `_finish`."""
        return bool(interval) and self.step % interval == 0 and 0 < self.step < self.total_steps

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

    def _remember(self, micro: int, batch: dict[str, Tensor], draw: Draw, loss: Tensor) -> None:
        """Keep what a micro-batch consisted of, with its losses (B,), until the next one that begins a step."""
        t = torch.full_like(batch["indices"], -1) if draw.t is None else draw.t
        seen = (batch["indices"], t, loss.detach())
        self.seen = [seen] if micro == 0 else [*self.seen, seen]

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
        return float(whole(nn.utils.clip_grad_norm_(network.parameters(), self.config.max_grad_norm or math.inf)))

    def _skip(self, optimizer: AcceleratedOptimizer, grad_norm: float) -> None:
        """Leave out an update whose gradient, which is that of all processes, is not finite; give up after too many of them."""
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        if self.accelerator.scaler is not None:
            optimizer.step()  # the scaler skips the update and lowers the loss scale
        columns = [self.accelerator.gather(torch.cat(values)).cpu().double() for values in zip(*self.seen)]
        if self.accelerator.is_main_process:
            seen = described(torch.stack(columns, dim=1))
            self.progress.write(
                f"step {self.step}: the gradient is not finite (norm {grad_norm}); all processes skip the step; {seen}",
                file=sys.stderr,
            )
        check_loss_scale(self.accelerator.scaler, self.step, self.output_dir)
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
        values |= bound_loss_scale(self.accelerator.scaler)
        self.log.write(self.step, values)
        self._count_energy()
        self.progress.set_postfix(
            {name: format(values[name], form) for name, form in shown.items() if name in values}
            | {"img_s": f"{values['images_per_second']:.0f}", "data_wait": f"{values['data_wait']:.0%}"},
            refresh=False,
        )
        return values

    def _draw_samples(self, stop: StopSignal) -> None:
        """Grids of samples, drawn by the main process until a signal comes to any process."""
        if self.preview is None:
            return
        main, models = self.accelerator.is_main_process, {}

        def ask(*_) -> None:
            self._go_on_drawing(stop, drawing=True)

        if main or self._is_sharded:
            models = {"raw": self._raw_model()} | ({"ema": self._averaged_model()} if self.ema is not None else {})
        try:
            for kind, model in models.items() if main else ():
                model.register_forward_pre_hook(ask)
                self._draw_grid(kind, model)
            # The main process asks at every call of the network, and once at the end; the others answer each time.
            while self._go_on_drawing(stop, drawing=False):
                pass
        except DrawingStopped:
            return

    def _draw_grid(self, kind: str, model: nn.Module) -> None:
        folder = self.output_dir / "samples"
        folder.mkdir(exist_ok=True)
        with self.accelerator.autocast():
            grid = self.preview(model)
        partial = folder / f".{kind}.partial.png"
        grid.save(partial)
        os.replace(partial, folder / f"{kind}-{self.step:08d}.png")

    def _go_on_drawing(self, stop: StopSignal, drawing: bool) -> bool:
        """Whether the main process is still drawing; DrawingStopped, on all processes, where one has got a signal."""
        flags = torch.tensor([float(stop.requested), float(drawing)], device=self.accelerator.device)
        if self.accelerator.num_processes > 1:
            flags = self.accelerator.reduce(flags, "sum")
        stopped, drawing = (bool(flag > 0) for flag in flags)
        if stopped:
            raise DrawingStopped
        return drawing

    def _evaluate(self, stop: StopSignal) -> None:
        """Measure the averaged weights, together with all processes and until a signal comes, and keep the best."""
        if not self.measurements:
            return
        model = self.shared_model()
        try:
            self.evaluations = [measure(model, lambda: self._stop_everywhere(stop)) for measure in self.measurements]
        except EvaluationStopped:
            return
        except ValueError as error:  # of all processes at once; a bad step is no reason to end a run of days
            if self.accelerator.is_main_process:
                self.progress.write(f"step {self.step}: nothing could be measured: {error}", file=sys.stderr)
            self.evaluations = []
        self.evaluated_step = self.step
        for evaluation in self.evaluations:
            self.log.write(self.step, evaluation.numbers(), evaluation.protocol)
        if self.best is not None and self.evaluations:
            value = self.best.offer(self.step, self.evaluations, lambda folder: self.export(model, folder))
            if value is not None:
                self.progress.write(
                    f"step {self.step}: {self.best.metric} {value:.4g} is the best so far, kept in {self.best.folder}"
                )
        self.accelerator.wait_for_everyone()

    def _save(self) -> None:
        if self.saved_step != self.step:
            self._count_energy()
            spent = {"wall_time": self.wall_time, "skipped": self.skipped, "joules": self.joules}
            run = {**self._identity(), "spent": spent, "changeable": changeable_settings(self.config)}
            save_checkpoint(self.accelerator, self.output_dir, self.step, run, self.config.checkpoints_total_limit)
            self.saved_step = self.step
            self.log.draw()
            if self.after_save is not None:
                self.after_save()

    def _finish(self, stop: StopSignal) -> bool:
        """The pipeline with the averaged weights, samples, measures, curve; False if a signal cut them short."""
        if self.accelerator.is_main_process or self._is_sharded:
            model = self.shared_model()
            if self.accelerator.is_main_process:
                self.export(model, self.output_dir)
        self._draw_samples(stop)
        self._evaluate(stop)
        self.log.draw()
        self.accelerator.wait_for_everyone()
        return not self.measurements or self.evaluated_step == self.step

    def _count_energy(self) -> None:
        """Bring `joules` up to now; what this process has measured is added to what earlier ones of the run have."""
        if self.meter is not None:
            now, before = self.meter.joules(), self.joules_before
            if before is not None:  # a source that earlier processes could not read would tell a part for the whole
                now = {name: before[name] + value for name, value in now.items() if name in before}
            self.joules = now

    # --- averaged weights -------------------------------------------------------------------------------------------------

    def _start_average(self) -> None:
        config = self.config
        if config.use_ema:
            self.ema = AveragedWeights(
                self.model.parameters(),
                decay=config.ema_max_decay,
                use_ema_warmup=True,
                inv_gamma=config.ema_inv_gamma,
                power=config.ema_power,
                foreach=True,
            )
            self.accelerator.register_for_checkpointing(self.ema)

    @property
    def _is_sharded(self) -> bool:
        """Whether a whole network comes about only where all processes ask for it together."""
        return engine(self.accelerator) == "FSDP"

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
        model = own_class(source).from_config(source.config).to(self.accelerator.device)
        model.load_state_dict({name: whole(tensor) for name, tensor in state.items()})
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
            "engine": engine(self.accelerator),
            "settings": tied_settings(self.config),
        }

    def _resume(self) -> None:
        """Go on from the checkpoint that the settings name, if any."""
        if not self.config.resume_from_checkpoint or self.config.dry_run:
            return
        checkpoint = find_together(self.accelerator, self.output_dir, self.config.resume_from_checkpoint)
        if checkpoint is None:
            self.accelerator.print(f"there is no checkpoint in {self.output_dir} yet: starting at step 0")
            return
        manifest = check_same_run(checkpoint, self._identity())
        self.step, spent = manifest["step"], manifest.get("spent", {})
        self.wall_time, self.skipped = spent.get("wall_time", 0.0), spent.get("skipped", 0)
        self.joules = spent.get("joules", {})
        self.accelerator.load_state(str(checkpoint))
        self.accelerator.print(f"going on from {checkpoint}, step {self.step} of {self.total_steps}")
        if changed := differences(manifest.get("changeable", {}), changeable_settings(self.config)):
            self.accelerator.print(f"from here on with other settings than before: {'; '.join(changed)}")

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
