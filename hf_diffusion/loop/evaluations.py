"""Measures in the middle of a run and at its end, and the best model by one of them."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from accelerate import Accelerator
from torch import nn

from hf_diffusion.evaluation.in_training import Evaluation, EvaluationStopped, Evaluator
from hf_diffusion.evaluation.report import with_error
from hf_diffusion.loop.best import BestModel
from hf_diffusion.loop.reporting import MetricsLog, Progress
from hf_diffusion.loop.signals import StopSignal


class Evaluations:
    """What is measured of the network that users get, by all processes together and until a signal
    comes.

    `best`, on the main process, keeps the best model; `export(network, folder)` writes it.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        evaluators: Sequence[Evaluator],
        export: Callable[[nn.Module, Path], None],
        best: BestModel | None,
        log: MetricsLog,
        progress: Progress,
    ):
        self.accelerator, self.evaluators, self.export, self.best = accelerator, evaluators, export, best
        self.log, self.progress = log, progress
        # the last results, and the step that they are of
        self.results: list[Evaluation] = []
        self.step: int | None = None

    def of(self, step: int) -> list[Evaluation] | None:
        """The results of a step; None where it was not measured."""
        return self.results if self.step == step else None

    def in_short(self) -> dict[str, str]:
        """The last results by their short names, for the side of a bar."""
        return {key: f"{measure.value:.3g}" for result in self.results for key, measure in result.measures.items()}

    def measure(self, step: int, copy: Callable[[], nn.Module], stop: StopSignal) -> None:
        """Measure `copy()`, log and show the results, and keep the model if it is the best."""
        if not self.evaluators:
            return
        network = copy()
        try:
            self.results = [evaluate(network, stop.anywhere) for evaluate in self.evaluators]
        except EvaluationStopped:
            return
        # of all processes at once; a bad step is no reason to end a run of days
        except ValueError as error:
            self.progress.say(f"step {step}: nothing could be measured: {error}")
            self.results = []
        self.step = step
        for result in self.results:
            self.log.write(step, result.numbers(), result.protocol)
        measures = [measure for result in self.results for measure in result.measures.values()]
        if measures:
            found = ", ".join(f"{measure.name} {with_error(measure)}" for measure in measures)
            self.progress.say(f"step {step}: {found}")
        if self.best is not None and self.results:
            self._offer(step, network)
        self.accelerator.wait_for_everyone()

    def _offer(self, step: int, network: nn.Module) -> None:
        value = self.best.offer(step, self.results, partial(self.export, network))
        if value is not None:
            self.progress.say(
                f"step {step}: {self.best.metric} {value:.4g} is the best so far, kept in {self.best.folder}"
            )
