"""The one training loop: optimizer steps, and when to log, draw, measure, save and stop.

What differs between methods is in the objective (`losses.objective`), not in hooks of the loop.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from PIL import Image
from torch import Tensor, nn

from hf_diffusion.config.options import config_to_dict, save_config
from hf_diffusion.config.resuming import tied_settings
from hf_diffusion.config.run_options import TrainingConfig
from hf_diffusion.data.protocol import TrainingData
from hf_diffusion.evaluation.in_training import Evaluator
from hf_diffusion.loop.averages import SharedNetwork
from hf_diffusion.loop.best import BestModel
from hf_diffusion.loop.continuation import Continuation
from hf_diffusion.loop.deadline import Deadline
from hf_diffusion.loop.energy import EnergyCount
from hf_diffusion.loop.engines import check_players, describe_to_deepspeed, parallelism
from hf_diffusion.loop.evaluations import Evaluations
from hf_diffusion.loop.feed import DeviceFeed
from hf_diffusion.loop.launching import how_to_go_on
from hf_diffusion.loop.nonfinite import bound_loss_scale
from hf_diffusion.loop.output_folder import CONFIG
from hf_diffusion.loop.previews import Previews
from hf_diffusion.loop.reporting import MetricsLog, Progress, RunningMeans, Stopwatch
from hf_diffusion.loop.signals import StopSignal
from hf_diffusion.loop.states import Stateful
from hf_diffusion.loop.update import Micro, Updater, prepare_player
from hf_diffusion.losses.objective import Objective
from hf_diffusion.randomness import BLOCK, BatchOrder, Draw


# Beside the bar from the first steps on, before the first report; each costs a wait for the device.
EARLY = (1, 2, 3, 5, 10, 20)
# Steps that a stream of a run without a fixed length may go to.
ENDLESS = 2**40
# When a first picture is drawn, long before the first regular one.
FIRST_PREVIEW = 50


class Trainer:
    """A run of optimizer steps on `data`, on as many processes as `accelerate launch` starts.

    `export(network, folder)` writes what users load, `preview(network)` draws a grid of samples.
    Both are called on the main process with a copy in evaluation mode: the averaged weights, and
    for previews the raw ones, too. `evaluators` (see evaluation.in_training) are called with the
    averaged weights on all processes.
    """

    def __init__(
        self,
        config: TrainingConfig,
        accelerator: Accelerator,
        objective: Objective,
        data: TrainingData,
        export: Callable[[nn.Module, Path], None],
        preview: Callable[[nn.Module], Image.Image] | None = None,
        evaluators: Sequence[Evaluator] = (),
    ):
        self.config, self.accelerator, self.objective, self.data = config, accelerator, objective, data
        self.export, self.output_dir = export, Path(config.output_dir)
        processes = accelerator.num_processes
        self.global_batch = config.global_batch(processes)
        self.total_steps = config.total_steps(data.num_samples, processes)
        accumulation, rank = config.gradient_accumulation_steps, accelerator.process_index
        self.order = BatchOrder(data.num_samples, config.seed, config.train_batch_size, accumulation, rank, processes)
        check_players(accelerator, objective)
        describe_to_deepspeed(accelerator, config)
        for player in objective.players:
            prepare_player(config, accelerator, player)
        shared = next(player for player in objective.players if player.is_averaged)
        self.shared = SharedNetwork(config, accelerator, shared.network)
        self.progress, self.watch, self.means = Progress(accelerator), Stopwatch(), RunningMeans(accelerator.device)
        self.updater = Updater(
            config, accelerator, objective, self.shared, self.means, self.progress, self.total_steps
        )
        self.log = MetricsLog(accelerator, self.output_dir, objective.draw_curve)
        self.previews = Previews(accelerator, self.output_dir, preview, self.log.show)
        # those of the script, for what is to be typed to go on
        self.arguments = sys.argv[1:]
        # set on the main process where saves are shared
        self.after_save: Callable[[], None] | None = None
        # beside networks and optimizers; in this order they are in older checkpoints
        states: dict[str, Stateful] = {f"objective_{i}": state for i, state in enumerate(objective.state)}
        states |= self.shared.states
        identity = {
            "seed": config.seed,
            "global_batch": self.global_batch,
            "total_steps": self.total_steps,
            "data": data.fingerprint,
            "parameters": self.shared.parameters,
            "use_ema": self.shared.average is not None,
            "engine": parallelism(accelerator),
            "settings": tied_settings(config),
            **objective.identity(),
        }
        self.continuation = Continuation(config, accelerator, identity, states)
        manifest = self.continuation.resume() or {"step": 0, "noise_block": BLOCK}
        self.step, spent = manifest["step"], manifest.get("spent", {})
        self.wall_time, self.joules = spent.get("wall_time", 0.0), spent.get("joules", {})
        self.updater.skips.count = spent.get("skipped", 0)
        self.deadline = None if objective.goes_by_length else Deadline.of(config, self.step, self.total_steps)
        # Rows that share a generator of noise: a run goes on with what it has begun with. Absent
        # from checkpoints of versions before 0.2, which drew all rows from one.
        self.noise_block: int | None = manifest.get("noise_block")
        is_first = accelerator.is_main_process and not config.dry_run
        gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if accelerator.device.type == "cuda" else 0
        self.energy = EnergyCount(self.joules if self.step else None, gpus) if is_first else None
        best = BestModel(self.output_dir, config.best_metric) if is_first and config.best_metric else None
        self.evaluations = Evaluations(accelerator, evaluators, export, best, self.log, self.progress)

    def train(self) -> bool:
        """Train to the end, or to a signal.

        True when the run is complete. Raises TrainingDiverged.
        """
        accelerator = self.accelerator
        self._begin()
        stop = StopSignal(accelerator)
        try:
            finished = self._loop(stop) and self._finish(stop)
        finally:
            stop.restore()
            self.progress.close()
        if not finished:
            accelerator.print(how_to_go_on(self.step, self.total_steps, self.output_dir / CONFIG, self.arguments))
        accelerator.end_training()
        return finished

    def _begin(self) -> None:
        config = self.config
        if self.accelerator.is_main_process:
            save_config(config, self.output_dir / CONFIG)
        self.log.begin(self.step, config_to_dict(config) if config.report_to else None)
        self.progress.start(self.step, self.total_steps)
        self.watch.start()

    def _loop(self, stop: StopSignal) -> bool:
        config = self.config
        for player in self.objective.players:
            player.network.train()
        stream, began = self.batches(), time.perf_counter()
        if self._is_due(config.eval_steps) and not self.log.has_evaluation(self.step):
            # what a signal had cut short
            with self.watch.paused():
                self._evaluate(stop)
        while self.step < self.total_steps:
            self.optimizer_step(stream)
            self.step += 1
            self.progress.advance()
            if self.deadline is not None and self.deadline.is_due(self.step):
                self._plan(self.wall_time + time.perf_counter() - began)
            if self.step in EARLY and self.step < config.logging_steps:
                self._show(self.means.so_far(self.objective.shown))
            if self.step % config.logging_steps == 0 or self.step == self.total_steps:
                self._report()
            is_drawn, is_measured = self._is_due_to_draw(), self._is_due(config.eval_steps)
            with self.watch.paused():
                if is_drawn:
                    self.previews.draw(self.step, self.shared.copies, stop)
                if is_measured:
                    self._evaluate(stop)
            # what a signal has cut short is done again where the run goes on from this very step
            stopping = stop.anywhere() if is_drawn or is_measured else stop.before()
            if stopping or self.step % config.checkpointing_steps == 0 or self.step == self.total_steps:
                self.wall_time += time.perf_counter() - began
                began = time.perf_counter()
                self._save()
            if stopping and self.step < self.total_steps:
                return False
        return True

    def _plan(self, elapsed: float) -> None:
        """Fit the length of the run to its minutes, on all processes by the clock of the first."""
        config = self.config
        plan = self.deadline.plan(self.step, broadcast_object_list([elapsed])[0])
        if plan is None:
            return
        config.max_train_steps = plan.total_steps
        if config.lr_scheduler == "trapezoid" and "lr_decay_steps" not in config.given:
            config.lr_decay_steps, config.lr_decay_ends = plan.decay_steps, plan.decay_ends
        self.total_steps = self.updater.total_steps = self.continuation.identity["total_steps"] = plan.total_steps
        self.progress.set_total(plan.total_steps)
        if self.accelerator.is_main_process:
            save_config(config, self.output_dir / CONFIG)

    def _is_due(self, interval: int | None) -> bool:
        """Whether something that happens every `interval` steps does so now.

        The end's part is left to `_finish`.
        """
        return bool(interval) and self.step % interval == 0 and 0 < self.step < self.total_steps

    def _is_due_to_draw(self) -> bool:
        """Whether pictures are drawn now, the first one long before the first regular one."""
        is_early = self.step == FIRST_PREVIEW < min(self.config.sample_steps or 0, self.total_steps)
        return is_early or self._is_due(self.config.sample_steps)

    def batches(self) -> DeviceFeed:
        """Every micro-batch of this process from the current step on."""
        workers = self.config.dataloader_num_workers
        end = self.total_steps if self.deadline is None else ENDLESS
        stream = self.data.batches(self.order, self.step, end, workers)
        return DeviceFeed(stream, self.accelerator.device)

    def optimizer_step(self, stream: DeviceFeed) -> None:
        """Every player's turn of the current step, on the next micro-batches of the stream."""
        self.updater.step(self.step, self._micro_batches(stream))

    def _micro_batches(self, stream: DeviceFeed) -> Iterator[Micro]:
        """The number, the images and the random numbers of each micro-batch of the current step."""
        for micro in range(self.config.gradient_accumulation_steps):
            yield micro, self.in_layout(self.watch.wait(stream)), self.draw(micro)

    def draw(self, micro: int) -> Draw:
        """The random numbers of a micro-batch of the current step."""
        rows, device = self.order.rows(micro), self.accelerator.device
        return Draw(self.config.seed, self.step, rows, self.global_batch, device, self.noise_block)

    def in_layout(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch in the memory format of the settings."""
        if self.config.channels_last:
            batch["x_0"] = batch["x_0"].contiguous(memory_format=torch.channels_last)
        return batch

    def _report(self) -> None:
        """Log the means since the last report, and show some beside the progress bar."""
        self.updater.settle()
        # the network that users get has the plain name
        names = {"lr" if player.is_averaged else f"lr{player.suffix}": player for player in self.objective.players}
        rates = {name: player.optimizer.param_groups[0]["lr"] for name, player in names.items()}
        images = (self.step % self.config.logging_steps or self.config.logging_steps) * self.global_batch
        values = self.means.report(self.accelerator) | self.watch.report(images) | rates
        values |= self.objective.report(self.accelerator) | {"skipped": self.updater.skips.count}
        values |= bound_loss_scale(self.accelerator.scaler)
        self.log.write(self.step, values)
        self.joules = self.energy.joules() if self.energy else {}
        self._show(values, {"img_s": f"{values['images_per_second']:.0f}", "data_wait": f"{values['data_wait']:.0%}"})
        if remark := self.objective.remark(values):
            self.progress.say(f"step {self.step}: {remark}")

    def _show(self, values: dict[str, float], speed: dict[str, str] | None = None) -> None:
        """Put the loss, the speed and the last measures beside the bar."""
        shown = {name: format(values[name], form) for name, form in self.objective.shown.items() if name in values}
        self.progress.show(shown | (speed or {}) | self.evaluations.in_short())

    def _evaluate(self, stop: StopSignal) -> None:
        self.evaluations.measure(self.step, self.shared.copy, stop)

    def _save(self) -> None:
        self.updater.settle()
        self.joules = self.energy.joules() if self.energy else {}
        facts = {
            "network": self.shared.description(),
            "classes": list(self.data.class_names or ()) or None,
            "spent": {"wall_time": self.wall_time, "skipped": self.updater.skips.count, "joules": self.joules},
            "noise_block": self.noise_block,
        }
        if self.continuation.save(self.step, facts):
            self.log.draw()
            if self.after_save is not None:
                self.after_save()

    def _finish(self, stop: StopSignal) -> bool:
        """The export with the averaged weights, samples, measures, curve.

        False if a signal cut them short.
        """
        if len(self.shared.averages) > 1:
            copies = {decay: partial(self.shared.copy, decay) for decay in self.shared.averages}
            decay = self.evaluations.choose(self.step, copies, self.config.ema_metric, stop)
            if decay is None:
                return False
            self.shared.decay = decay
        is_main = self.accelerator.is_main_process
        network = self.shared.copy() if is_main or self.shared.is_sharded else None
        if is_main:
            self.export(network, self.output_dir)
        self.previews.draw(self.step, self.shared.copies, stop)
        if self.evaluations.of(self.step) is None:
            self._evaluate(stop)
        self.log.draw()
        self.accelerator.wait_for_everyone()
        return not self.evaluations.evaluators or self.evaluations.step == self.step
