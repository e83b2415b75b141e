"""What samples are judged by: a feature network, statistics of real data, a classifier."""

from collections.abc import Sequence

import numpy as np
import torch
from accelerate import PartialState

from hf_diffusion.data.protocol import TrainingData
from hf_diffusion.evaluation.distances import precision_recall
from hf_diffusion.evaluation.feature_networks import load_classifier, load_feature_network
from hf_diffusion.evaluation.feature_training import features_for, held_out_accuracy
from hf_diffusion.evaluation.floors import Floor, floors
from hf_diffusion.evaluation.image_files import FileImages
from hf_diffusion.evaluation.measures import Evaluation, check_metrics, measure_samples
from hf_diffusion.evaluation.options import EvaluationOptions
from hf_diffusion.evaluation.protocol import samples_protocol
from hf_diffusion.evaluation.reference import Reference, reference_statistics
from hf_diffusion.evaluation.sample_store import Samples


# Of classes on held-out images, and of noise among real images: beyond them a measure says little.
WEAK_ACCURACY, NOISE_TAKEN_FOR_REAL = 0.7, 0.1
NOISE_IMAGES = 1000


class Judge:
    """Gives samples the measures that `metrics` name, against `data`, on the options' device.

    class_names: of the samples' classes, by which those of a classifier are found; None or empty
        where they have numbers only. count: of the samples, None for as many as the options say.
    """

    def __init__(
        self,
        options: EvaluationOptions,
        metrics: Sequence[str],
        data: TrainingData,
        class_names: Sequence[str] | None = None,
        count: int | None = None,
    ):
        self.metrics, self.data, self.cache = metrics, data, options.reference_cache
        shape, device = data.sample_shape, options.device
        spec, reason = features_for(options.features, data, metrics, count or options.num_images, self.cache)
        self.network = load_feature_network(spec, shape, device, options.inception_weights, reason)
        if reason is not None and PartialState().is_main_process:
            print(f"features {self.network.name}: {reason}", flush=True)
        self.classifier = load_classifier(options.classifier, shape, device) if options.classifier else None
        self.accuracy = held_out_accuracy(spec)
        if "label_accuracy" in metrics:
            if self.classifier is not None:
                self.classifier = self.classifier.numbered_as(class_names or ())
            elif self.network.classifier is not None:
                self.network = self.network.numbered_as(class_names or ())
        self.reference: Reference | None = None
        self.floors: dict[str, Floor] = {}

    def check(self, count: int, labels: Sequence[int] | Sequence[str] | None) -> None:
        """ValueError for what `count` samples of these classes cannot be measured by."""
        known = self.classifier or self.network
        classifies = known.classifier is not None
        labelled = labels is not None and not isinstance(labels[0], str)
        check_metrics(self.metrics, count, len(self.data), self.network, classifies, labelled)
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
            self.floors = floors(self.reference, len(samples), self.metrics)
            self.warn_of_weakness()
        state, count = PartialState(), len(samples)
        share = samples.chunks(state.process_index, state.num_processes)
        measures = measure_samples(share, count, self.network, self.reference, self.metrics, self.classifier, labels)
        protocol = samples_protocol(count, seed, labels, samples.protocol, self.network, self.classifier)
        protocol |= {"reference": self.reference.protocol}
        if self.floors:
            protocol["floors"] = {key: floor._asdict() for key, floor in self.floors.items()}
        return Evaluation(measures, protocol)

    def warn_of_weakness(self) -> None:
        """Print what speaks against the feature network: few classes known, noise taken as real."""
        sentences = []
        if self.accuracy is not None and self.accuracy < WEAK_ACCURACY:
            sentences.append(f"it knows {self.accuracy:.0%} of the held-out images")
        if "pr" in self.metrics and len(self.data.sample_shape) == 3:
            share = self.noise_taken_for_real()
            if share > NOISE_TAKEN_FOR_REAL:
                sentences.append(f"it takes {share:.0%} of pure noise for real images (precision)")
        if sentences and PartialState().is_main_process:
            print(
                f"the features {self.network.name} are a weak judge: {', and '.join(sentences)}; measure by another "
                "network, or train it on more images",
                flush=True,
            )

    def noise_taken_for_real(self) -> float:
        """The precision that images of independent uniform pixels would have."""
        channels, height, width = self.data.sample_shape
        real = self.reference.features[:NOISE_IMAGES]
        noise = np.random.default_rng(0).integers(0, 256, (len(real), height, width, channels), dtype=np.uint8)
        return precision_recall(real, self.network.features(noise))[0]
