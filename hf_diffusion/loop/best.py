"""The best model of a run by one of its measures, in a folder of its own beside the last one."""

import json
import logging
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hf_diffusion.evaluation.measures import Evaluation, Measure
from hf_diffusion.evaluation.report import write_metrics


logger = logging.getLogger(__name__)
FOLDER, RECORD = "best", "best.json"
# What two values of a measure must share to be compared; the weights differ, and the device and the
# chunks change the last digits only.
COMPARED = ("count", "seeds", "images_of_class", "features", "reference", "held_out", "noise_seed")
COMPARED_OF_SAMPLING = ("pipeline", "sampler", "sampler_config", "options")


class BestModel:
    """`best/` of a run: the model with the best value of `metric` so far, and best.json with its
    step, measures and protocol.

    The folder is its own memory: a resumed run compares with the value in it, as long as both were
    measured under one protocol. It is replaced as a whole; what a kill leaves half done is
    completed or taken back here. For the main process only.
    """

    def __init__(self, output_dir: Path, metric: str):
        self.metric, self.folder = metric, output_dir / FOLDER
        self.staging, self.former = output_dir / f".{FOLDER}.partial", output_dir / f".{FOLDER}.former"
        if not self.folder.exists() and self.former.exists():
            self.former.rename(self.folder)

    def record(self) -> dict[str, Any] | None:
        """best.json; None where there is no whole one."""
        try:
            return json.loads((self.folder / RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def offer(self, step: int, evaluations: Sequence[Evaluation], export: Callable[[Path], None]) -> float | None:
        """Keep the model, written by `export(folder)`, if it is better than the one in the folder;
        its value if so, else None.

        A folder that cannot be written, say on a full disk, is a warning: the former one stays, and
        training goes on.
        """
        evaluation = next(evaluation for evaluation in evaluations if self.metric in evaluation.measures)
        measure, protocol = evaluation.measures[self.metric], evaluation.protocol
        value = measure.value
        if not math.isfinite(value) or not self._beats(measure, protocol):
            return None
        measures = {key: measure for part in evaluations for key, measure in part.measures.items()}
        record = {"metric": self.metric, "value": value, "better": measure.better, "step": step, "measures": measures}
        try:
            shutil.rmtree(self.staging, ignore_errors=True)
            self.staging.mkdir(parents=True)
            export(self.staging)
            write_metrics(self.staging / RECORD, {**record, "protocol": protocol})
            shutil.rmtree(self.former, ignore_errors=True)
            if self.folder.exists():
                self.folder.rename(self.former)
            self.staging.rename(self.folder)
        except OSError as error:
            logger.warning("the best model so far, of step %d, could not be kept in %s: %s", step, self.folder, error)
            return None
        finally:
            shutil.rmtree(self.staging, ignore_errors=True)
        shutil.rmtree(self.former, ignore_errors=True)
        return value

    def _beats(self, measure: Measure, protocol: dict[str, Any]) -> bool:
        former = self.record()
        if former is None:
            return True
        if former.get("metric") != self.metric or _comparable(former["protocol"]) != _comparable(protocol):
            logger.warning(
                "%s was kept by %s under another protocol; it is replaced", self.folder, former.get("metric")
            )
            return True
        return measure.beats(former["value"])


def _comparable(protocol: dict[str, Any]) -> str:
    sampling = protocol.get("sampling") or {}
    parts = [{key: protocol.get(key) for key in COMPARED}, {key: sampling.get(key) for key in COMPARED_OF_SAMPLING}]
    return json.dumps(json.loads(json.dumps(parts, default=str)), sort_keys=True)
