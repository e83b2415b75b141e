"""Measures in the middle of a run and at its end, and the best model by one of them."""

from collections.abc import Callable, Mapping, Sequence
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
        # of the averages that `choose` has compared, by their decays
        self.of_averages: dict[float, Evaluation] = {}

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
        results = self._results(f"step {step}", network, stop)
        if results is not None:
            self._keep(step, network, results)

    def choose(
        self, step: int, copies: Mapping[float, Callable[[], nn.Module]], metric: str, stop: StopSignal
    ) -> float | None:
        """The decay whose average is best by a metric, of `copies` by their decays; its results are
        those of the step.

        The first where none can be measured; None after a signal.
        """
        best, results = None, {}
        for decay, copy in copies.items():
            found = self._results(f"average of decay {decay}", copy(), stop)
            if found is None:
                return None
            of_metric = next((result for result in found if metric in result.measures), None)
            if of_metric is None:
                continue
            results[decay], self.of_averages[decay] = found, of_metric
            measure = of_metric.measures[metric]
            self.progress.say(f"average of decay {decay}: {measure.name} {with_error(measure)}")
            self.log.write(step, {f"{metric}_of_average_{decay}": measure.value})
            if best is None or measure.beats(self.of_averages[best].measures[metric].value):
                best = decay
        if best is None:
            return next(iter(copies))
        self.progress.say(f"the average of decay {best} is best by {metric}, and becomes the model")
        self._keep(step, copies[best](), results[best])
        return best

    def _results(self, what: str, network: nn.Module, stop: StopSignal) -> list[Evaluation] | None:
        """What the evaluators find; nothing where it cannot be measured, None after a signal."""
        try:
            return [evaluate(network, stop.anywhere) for evaluate in self.evaluators]
        except EvaluationStopped:
            return None
        # of all processes at once; a bad step is no reason to end a run of days
        except ValueError as error:
            self.progress.say(f"{what}: nothing could be measured: {error}")
            return []

    def _keep(self, step: int, network: nn.Module, results: list[Evaluation]) -> None:
        """Log and show the results of a step, and keep the model if it is the best."""
        self.results, self.step = results, step
        for result in results:
            self.log.write(step, result.numbers(), result.protocol)
        measures = [measure for result in results for measure in result.measures.values()]
        if measures:
            found = ", ".join(f"{measure.name} {with_error(measure)}" for measure in measures)
            self.progress.say(f"step {step}: {found}")
        if self.best is not None and results:
            self._offer(step, network)
        self.accelerator.wait_for_everyone()

    def _offer(self, step: int, network: nn.Module) -> None:
        value = self.best.offer(step, self.results, partial(self.export, network))
        if value is not None:
            self.progress.say(
                f"step {step}: {self.best.metric} {value:.4g} is the best so far, kept in {self.best.folder}"
            )
