"""The one training loop: optimizer steps, and when to log, draw, measure, save and stop.

What differs between methods is in the objective (`losses.objective`), not in hooks of the loop.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from hf_diffusion.config.options import config_to_dict, save_config
from hf_diffusion.config.resuming import changeable_settings, differences, tied_settings
from hf_diffusion.config.run_options import TrainingConfig
from hf_diffusion.data.protocol import TrainingData
from hf_diffusion.evaluation.in_training import Evaluation, EvaluationStopped, Evaluator
from hf_diffusion.loop.averages import SharedNetwork
from hf_diffusion.loop.best import BestModel
from hf_diffusion.loop.checkpoints import check_same_run, find_together, save_checkpoint
from hf_diffusion.loop.energy import EnergyCount
from hf_diffusion.loop.engines import check_players, describe_to_deepspeed, parallelism
from hf_diffusion.loop.nonfinite import bound_loss_scale
from hf_diffusion.loop.previews import Previews
from hf_diffusion.loop.reporting import MetricsLog, Progress, RunningMeans, Stopwatch
from hf_diffusion.loop.signals import StopSignal
from hf_diffusion.loop.update import Micro, Updater, prepare_player
from hf_diffusion.losses.objective import Objective
from hf_diffusion.randomness import BLOCK, BatchOrder, Draw


class Trainer:
    """A run of optimizer steps on `data`, on as many processes as `accelerate launch` starts.

    `export(network, folder)` writes what users load, `preview(network)` draws a grid of samples. Both are called on the
    main process with a copy in evaluation mode: the averaged weights, and for previews the raw ones, too. `evaluators`
    (see evaluation.in_training) are called with the averaged weights on all processes.
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
        self.export, self.evaluators, self.output_dir = export, evaluators, Path(config.output_dir)
        processes = accelerator.num_processes
        self.global_batch = config.global_batch(processes)
        self.total_steps = config.total_steps(data.num_samples, processes)
        accumulation, rank = config.gradient_accumulation_steps, accelerator.process_index
        self.order = BatchOrder(data.num_samples, config.seed, config.train_batch_size, accumulation, rank, processes)
        check_players(accelerator, objective)
        describe_to_deepspeed(accelerator, config)
        for player in objective.players:
            prepare_player(config, accelerator, player)
        for state in objective.state:
            accelerator.register_for_checkpointing(state)
        shared = next(player for player in objective.players if player.is_averaged)
        self.shared = SharedNetwork(config, accelerator, shared.network)
        self.progress, self.watch, self.means = Progress(accelerator), Stopwatch(), RunningMeans(accelerator.device)
        self.updater = Updater(
            config, accelerator, objective, self.shared, self.means, self.progress, self.total_steps
        )
        self.previews = Previews(accelerator, self.output_dir, preview)
        self.log = MetricsLog(accelerator, self.output_dir, objective.draw_curve)
        # set on the main process where saves are shared
        self.after_save: Callable[[], None] | None = None
        # the last results, which are those of evaluated_step
        self.evaluations: list[Evaluation] = []
        self.evaluated_step: int | None = None
        # rows that share a generator of noise; a run goes on with what it has begun with
        self.noise_block: int | None = BLOCK
        self.step, self.wall_time, self.joules = 0, 0.0, {}
        self._resume()
        self.saved_step = self.step
        is_first = accelerator.is_main_process and not config.dry_run
        gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if accelerator.device.type == "cuda" else 0
        self.energy = EnergyCount(self.joules if self.step else None, gpus) if is_first else None
        self.best = BestModel(self.output_dir, config.best_metric) if is_first and config.best_metric else None

    # --- the run -----------------------------------------------------------------------------------------------------

    def train(self) -> bool:
        """Train to the end, or to a signal; True when the run is complete. Raises TrainingDiverged."""
        self._begin()
        stop = StopSignal(self.accelerator)
        try:
            finished = self._loop(stop) and self._finish(stop)
        finally:
            stop.restore()
            self.progress.close()
        if not finished:
            self._say_how_to_go_on()
        self.accelerator.end_training()
        return finished

    def _begin(self) -> None:
        config = self.config
        if self.accelerator.is_main_process:
            save_config(config, self.output_dir / "config.yaml")
        if config.report_to:
            settings = config_to_dict(config).items()
            trackable = {k: v if isinstance(v, int | float | str) else str(v) for k, v in settings}
            self.accelerator.init_trackers("hf_diffusion", config=trackable)
        self.log.go_on_after(self.step)
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
            if self.step % config.logging_steps == 0 or self.step == self.total_steps:
                self._report()
            with self.watch.paused():
                if self._is_due(config.sample_steps):
                    self.previews.draw(self.step, self.shared.copies, stop)
                if self._is_due(config.eval_steps):
                    self._evaluate(stop)
            stopping = stop.anywhere()
            if stopping or self.step % config.checkpointing_steps == 0 or self.step == self.total_steps:
                self.wall_time += time.perf_counter() - began
                began = time.perf_counter()
                self._save()
            if stopping and self.step < self.total_steps:
                return False
        return True

    def _is_due(self, interval: int | None) -> bool:
        """Whether something that happens every `interval` steps does so now; the end's part is left to `_finish`."""
        return bool(interval) and self.step % interval == 0 and 0 < self.step < self.total_steps

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """Every micro-batch of this process from the current step on."""
        pin = self.accelerator.device.type == "cuda"
        workers = self.config.dataloader_num_workers
        return self.data.batches(self.order, self.step, self.total_steps, workers, pin)

    def optimizer_step(self, stream: Iterator[dict[str, Tensor]]) -> None:
        """Every player's turn of the current step, on the next micro-batches of the stream."""
        self.updater.step(self.step, self._micro_batches(stream))

    def _micro_batches(self, stream: Iterator[dict[str, Tensor]]) -> Iterator[Micro]:
        """The number, the images and the random numbers of each micro-batch of the current step."""
        for micro in range(self.config.gradient_accumulation_steps):
            batch = self.to_device(self.watch.wait(stream))
            yield micro, batch, self.draw(micro)

    def draw(self, micro: int) -> Draw:
        """The random numbers of a micro-batch of the current step."""
        rows, device = self.order.rows(micro), self.accelerator.device
        return Draw(self.config.seed, self.step, rows, self.global_batch, device, self.noise_block)

    def to_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch where the network computes, in the memory format of the settings."""
        batch = {name: value.to(self.accelerator.device, non_blocking=True) for name, value in batch.items()}
        if self.config.channels_last:
            batch["x_0"] = batch["x_0"].contiguous(memory_format=torch.channels_last)
        return batch

    # --- what a run leaves behind ------------------------------------------------------------------------------------

    def _report(self) -> None:
        """Log the means since the last report, and show some beside the progress bar."""
        # the network that users get has the plain name
        names = {"lr" if player.is_averaged else f"lr{player.suffix}": player for player in self.objective.players}
        rates = {name: player.optimizer.param_groups[0]["lr"] for name, player in names.items()}
        images = (self.step % self.config.logging_steps or self.config.logging_steps) * self.global_batch
        values = self.means.report(self.accelerator) | self.watch.report(images) | rates
        values |= self.objective.report(self.accelerator) | {"skipped": self.updater.skipped}
        values |= bound_loss_scale(self.accelerator.scaler)
        self.log.write(self.step, values)
        self._count_energy()
        shown = {name: format(values[name], form) for name, form in self.objective.shown.items() if name in values}
        speed = {"img_s": f"{values['images_per_second']:.0f}", "data_wait": f"{values['data_wait']:.0%}"}
        self.progress.show(shown | speed)
        if remark := self.objective.remark(values):
            self.progress.say(f"step {self.step}: {remark}")

    def _evaluate(self, stop: StopSignal) -> None:
        """Measure the averaged weights, together with all processes and until a signal comes, and keep the best."""
        if not self.evaluators:
            return
        network = self.shared.copy()
        try:
            self.evaluations = [evaluate(network, stop.anywhere) for evaluate in self.evaluators]
        except EvaluationStopped:
            return
        # of all processes at once; a bad step is no reason to end a run of days
        except ValueError as error:
            self.progress.say(f"step {self.step}: nothing could be measured: {error}")
            self.evaluations = []
        self.evaluated_step = self.step
        for evaluation in self.evaluations:
            self.log.write(self.step, evaluation.numbers(), evaluation.protocol)
        if self.best is not None and self.evaluations:
            value = self.best.offer(self.step, self.evaluations, partial(self.export, network))
            if value is not None:
                kept = f"{self.best.metric} {value:.4g} is the best so far, kept in {self.best.folder}"
                self.progress.say(f"step {self.step}: {kept}")
        self.accelerator.wait_for_everyone()

    def _save(self) -> None:
        if self.saved_step == self.step:
            return
        self._count_energy()
        spent = {"wall_time": self.wall_time, "skipped": self.updater.skipped, "joules": self.joules}
        run = {"spent": spent, "changeable": changeable_settings(self.config), "noise_block": self.noise_block}
        limit = self.config.checkpoints_total_limit
        save_checkpoint(self.accelerator, self.output_dir, self.step, {**self._identity(), **run}, limit)
        self.saved_step = self.step
        self.log.draw()
        if self.after_save is not None:
            self.after_save()

    def _finish(self, stop: StopSignal) -> bool:
        """The export with the averaged weights, samples, measures, curve; False if a signal cut them short."""
        if self.accelerator.is_main_process or self.shared.is_sharded:
            network = self.shared.copy()
            if self.accelerator.is_main_process:
                self.export(network, self.output_dir)
        self.previews.draw(self.step, self.shared.copies, stop)
        self._evaluate(stop)
        self.log.draw()
        self.accelerator.wait_for_everyone()
        return not self.evaluators or self.evaluated_step == self.step

    def _count_energy(self) -> None:
        if self.energy is not None:
            self.joules = self.energy.joules()

    # --- going on ----------------------------------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        """What must agree for a checkpoint to continue this run exactly."""
        return {
            "seed": self.config.seed,
            "global_batch": self.global_batch,
            "total_steps": self.total_steps,
            "data": self.data.fingerprint,
            "parameters": self.shared.parameters,
            "use_ema": self.shared.average is not None,
            "engine": parallelism(self.accelerator),
            "settings": tied_settings(self.config),
            **self.objective.identity(),
        }

    def _resume(self) -> None:
        """Go on from the checkpoint that the settings name, if any."""
        asked, accelerator = self.config.resume_from_checkpoint, self.accelerator
        if not asked or self.config.dry_run:
            return
        checkpoint = find_together(accelerator, self.output_dir, asked)
        if checkpoint is None:
            accelerator.print(f"there is no checkpoint in {self.output_dir} yet: starting at step 0")
            return
        manifest = check_same_run(checkpoint, self._identity())
        self.step, spent = manifest["step"], manifest.get("spent", {})
        self.wall_time, self.joules = spent.get("wall_time", 0.0), spent.get("joules", {})
        self.updater.skipped = spent.get("skipped", 0)
        # absent from checkpoints of versions before 0.2, which drew all rows from one generator
        self.noise_block = manifest.get("noise_block")
        accelerator.load_state(str(checkpoint))
        accelerator.print(f"going on from {checkpoint}, step {self.step} of {self.total_steps}")
        if changed := differences(manifest.get("changeable", {}), changeable_settings(self.config)):
            accelerator.print(f"from here on with other settings than before: {'; '.join(changed)}")

    def _say_how_to_go_on(self) -> None:
        config_file = self.output_dir / "config.yaml"
        self.accelerator.print(
            f"stopped by a signal at step {self.step} of {self.total_steps}, everything is saved; go on with the same "
            f"command and --resume_from_checkpoint latest, e.g. {sys.argv[0]} --config {config_file} "
            "--resume_from_checkpoint latest"
        )
