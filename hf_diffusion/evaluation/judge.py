"""What samples are judged by: a feature network, statistics of real data, a classifier."""

from collections.abc import Sequence

import torch
from accelerate import PartialState

from hf_diffusion.data.protocol import TrainingData
from hf_diffusion.evaluation.feature_networks import load_classifier, load_feature_network
from hf_diffusion.evaluation.feature_training import trained_network_file
from hf_diffusion.evaluation.inputs import FileImages
from hf_diffusion.evaluation.measures import Evaluation, check_metrics, measure_samples
from hf_diffusion.evaluation.options import EvaluationOptions
from hf_diffusion.evaluation.protocol import samples_protocol
from hf_diffusion.evaluation.reference import Reference, reference_statistics
from hf_diffusion.evaluation.sample_store import Samples


class Judge:
    """Gives samples the measures that `metrics` name, against `data`, on the options' device."""

    def __init__(self, options: EvaluationOptions, metrics: Sequence[str], data: TrainingData):
        self.metrics, self.data, self.cache = metrics, data, options.reference_cache
        shape, device, spec = data.sample_shape, options.device, options.features
        if spec == "trained":
            spec = trained_network_file(data, self.cache)
        self.network = load_feature_network(spec, shape, device, options.inception_weights)
        self.classifier = load_classifier(options.classifier, shape, device) if options.classifier else None
        self.reference: Reference | None = None

    def check(self, count: int, labels: Sequence[int] | None) -> None:
        """ValueError for what `count` samples of these classes cannot be measured by."""
        known = self.classifier or self.network
        classifies = known.classifier is not None
        check_metrics(self.metrics, count, len(self.data), self.network, classifies, labels is not None)
        if "label_accuracy" in self.metrics:
            classes = known.classify(torch.zeros(1, *self.data.sample_shape)).shape[1]
            if max(labels) >= classes:
                raise ValueError(
                    f"the classifier knows {classes} classes, but samples of class {max(labels)} are asked for"
                )

    def evaluate(self, samples: Samples | FileImages, labels: Sequence[int] | None, seed: int | None) -> Evaluation:
        """Measure samples; `seed` is that of the first, None for those of a file."""
        if self.reference is None:
            self.reference = reference_statistics(self.data, self.network, self.cache)
        state, count = PartialState(), len(samples)
        share = samples.chunks(state.process_index, state.num_processes)
        measures = measure_samples(share, count, self.network, self.reference, self.metrics, self.classifier, labels)
        protocol = samples_protocol(count, seed, labels, samples.protocol, self.network, self.classifier)
        return Evaluation(measures, {**protocol, "reference": self.reference.protocol})
