"""What is measured while a model trains: the loss on held-out data, and its samples.

An evaluator is called on every process as evaluate(model, stopping), with the averaged weights in
evaluation mode. Before each of its batches it asks `stopping()`, which all processes ask at the
same moment; after a signal it raises EvaluationStopped on all of them. ValueError, on all of them,
means that nothing could be measured this time. Letters: B samples, C channels, H x W pixels.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from diffusers import DiffusionPipeline
from torch import nn

from hf_diffusion.data.protocol import TrainingData
from hf_diffusion.evaluation.feature_networks import load_feature_network
from hf_diffusion.evaluation.feature_training import features_for
from hf_diffusion.evaluation.inputs import prompts_of, proportional_labels
from hf_diffusion.evaluation.measures import Evaluation, check_metrics, measure_samples
from hf_diffusion.evaluation.protocol import samples_protocol, sampling_protocol
from hf_diffusion.evaluation.reference import Reference, reference_statistics
from hf_diffusion.evaluation.sample_store import draw_two
from hf_diffusion.sampling.drawing import draw


Stopping = Callable[[], bool]
Evaluator = Callable[[nn.Module, Stopping], Evaluation]


class EvaluationStopped(Exception):
    """A signal came during an evaluation; raised on all processes at once."""


def shares(count: int, batch_size: int, stopping: Stopping) -> Iterator[range]:
    """This process's batches of 0 to count - 1, cut alike for any number of processes.

    Every process asks `stopping` equally often, also where it has one batch fewer than another.
    """
    state, batches = PartialState(), math.ceil(count / batch_size)
    for first in range(0, batches, state.num_processes):
        if stopping():
            raise EvaluationStopped
        start = (first + state.process_index) * batch_size
        if start < count:
            yield range(start, min(start + batch_size, count))


class SampleEvaluator:
    """Samples of the model in training, measured as `hf-diffusion evaluate` measures them.

    metrics: of fd, kd, pr, label_accuracy. data: the real ones, not flipped or cropped at random.
    build_pipeline(model): what users get. options: those of the pipeline's call. ValueError, before
    any training, for metrics that cannot be computed from so many samples, networks that do not
    fit, and calls that the pipeline refuses. `keys` are those of its measures.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        metrics: Sequence[str],
        data: TrainingData,
        build_pipeline: Callable[[nn.Module], DiffusionPipeline],
        model: nn.Module,
        *,
        class_conditional: bool,
        num_images: int = 1000,
        features: str = "auto",
        batch_size: int = 64,
        seed: int = 0,
        **options,
    ):
        self.accelerator, self.metrics, self.data, self.build_pipeline = accelerator, metrics, data, build_pipeline
        self.count, self.batch_size, self.seed, self.options = num_images, batch_size, seed, options
        pipeline = build_pipeline(model)
        of_texts = prompts_of(pipeline, data, num_images)
        self.labels = proportional_labels(data.labels, num_images) if class_conditional else of_texts
        self.reference: Reference | None = None
        spec, reason = features_for(features, data, metrics, num_images)
        self.network = load_feature_network(spec, data.sample_shape, accelerator.device, reason=reason)
        classifies, labelled = self.network.classifier is not None, class_conditional
        options_named = ("eval_num_images", "max_train_samples")
        check_metrics(metrics, num_images, len(data), self.network, classifies, labelled, options_named)
        self.keys = [key for metric in metrics for key in (("precision", "recall") if metric == "pr" else (metric,))]
        trial = draw_two(pipeline, seed, self.labels, options)
        self.network.features(trial)
        self._blank = np.zeros_like(trial[:1])

    def prepare(self) -> None:
        """Compute the statistics of the real data by all processes, or read them from the cache."""
        self.reference = reference_statistics(self.data, self.network)

    def __call__(self, model: nn.Module, stopping: Stopping) -> Evaluation:
        """The measures of the model's samples; see the module."""
        pipeline, failures = self.build_pipeline(model), []
        chunks = self._chunks(pipeline, stopping, failures)
        measures = measure_samples(
            chunks, self.count, self.network, self.reference, self.metrics, all_labels=self.labels
        )
        failures = [failure for part in gather_object([failures]) for failure in part]
        if failures:
            raise ValueError(failures[0])
        sampling = sampling_protocol(pipeline, self.batch_size, self.options)
        if self.accelerator.mixed_precision != "no":
            sampling["dtype"] += f" under {self.accelerator.mixed_precision} autocast"
        protocol = samples_protocol(self.count, self.seed, self.labels, sampling, self.network)
        return Evaluation(measures, protocol | {"reference": self.reference.protocol})

    def _chunks(
        self, pipeline: DiffusionPipeline, stopping: Stopping, failures: list[str]
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
        """This process's share in chunks; one that cannot be drawn is blank and noted."""
        for rows in shares(self.count, self.batch_size, stopping):
            labels = None if self.labels is None else self.labels[rows.start : rows.stop]
            try:
                with self.accelerator.autocast():
                    samples = draw(pipeline, [self.seed + row for row in rows], labels, **self.options)
            # Samples that are not finite; the other processes must not wait for this one.
            except ValueError as error:
                failures.append(str(error))
                samples = np.repeat(self._blank, len(rows), axis=0)
            yield np.array(rows), samples, None if labels is None else np.array(labels)
