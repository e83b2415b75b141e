"""What is measured while a model trains: the loss on held-out images, and samples against real ones; by all processes together.

A measurement is called on every process as measure(model, stopping), with the averaged weights in evaluation mode. Before each of its batches it
asks `stopping()`, which all processes ask at the same moment; after a signal it raises EvaluationStopped on all of them. ValueError, on all of
them, means that nothing could be measured this time. Letters: B images, C channels, H x W pixels.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from hf_diffusion.data.images import ImageData
from hf_diffusion.evaluation.feature_networks import load_feature_network
from hf_diffusion.evaluation.feature_training import trained_network_file
from hf_diffusion.evaluation.measures import Measure, check_metrics, measure_images, network_features
from hf_diffusion.evaluation.model_measures import proportional_labels
from hf_diffusion.evaluation.reference import Reference, reference_statistics
from hf_diffusion.evaluation.sampling import draw, images_protocol, sampling_protocol
from hf_diffusion.randomness import derive_seed


QUARTILES = 4
DATA_FACTS = ("name", "split", "images", "resize", "fingerprint")
Stopping = Callable[[], bool]


class EvaluationStopped(Exception):
    """A signal came during an evaluation; raised on all processes at once."""


@dataclass(frozen=True)
class Evaluation:
    """Measures by the keys that metrics.jsonl and `--best_metric` use, and the protocol that they hold for."""

    measures: dict[str, Measure]
    protocol: dict[str, Any]

    def numbers(self) -> dict[str, float]:
        """Key -> value, and key_error -> standard error where there is one."""
        values = {key: measure.value for key, measure in self.measures.items()}
        errors = {key: m.error for key, m in self.measures.items() if m.error is not None and math.isfinite(m.error)}
        return values | {f"{key}_error": error for key, error in errors.items()}


Measurement = Callable[[nn.Module, Stopping], Evaluation]


def shares(count: int, batch_size: int, stopping: Stopping) -> Iterator[range]:
    """This process's batches of the positions 0 to count - 1, which are cut alike for any number of processes.

    Every process asks `stopping` equally often, also where it has one batch fewer than another.
    """
    state, batches = PartialState(), math.ceil(count / batch_size)
    for first in range(0, batches, state.num_processes):
        if stopping():
            raise EvaluationStopped
        start = (first + state.process_index) * batch_size
        if start < count:
            yield range(start, min(start + batch_size, count))


class HeldOutLoss:
    """The mean of per-image values, such as the loss, over held-out images, at noise and timesteps that never change.

    `loss(model, batch, t, noise)` returns values (B,) by name, for images and labels in `batch`, timesteps int64 t (B,) and unit noise (B, C, H, W). Each image
    is looked at in every quartile of the timesteps: eval_<name>_q0 is that of the least noise, eval_<name> the mean of the four. Noise
    and timestep belong to the image, so that neither batches nor processes change the result.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        data: ImageData,
        loss: Callable[[nn.Module, dict[str, Tensor], Tensor, Tensor], dict[str, Tensor]],
        num_timesteps: int,
        names: Sequence[str] = ("loss",),
        batch_size: int = 64,
        seed: int = 0,
    ):
        self.accelerator, self.data, self.loss = accelerator, data, loss
        self.num_timesteps, self.batch_size, self.seed = num_timesteps, batch_size, seed
        self.keys = [f"eval_{name}{part}" for name in names for part in ("", *(f"_q{q}" for q in range(QUARTILES)))]

    @torch.no_grad()
    def __call__(self, model: nn.Module, stopping: Stopping) -> Evaluation:
        sums: dict[str, float] = {}
        for rows in shares(len(self.data), self.batch_size, stopping):
            batch = self.data.fetch(rows, epoch=0)
            batch = {name: value.to(self.accelerator.device) for name, value in batch.items()}
            timesteps, noise = self._draw(rows)
            for quartile in range(QUARTILES):
                with self.accelerator.autocast():
                    values = self.loss(model, batch, timesteps[quartile], noise[quartile])
                for name, value in values.items():
                    key = f"eval_{name}_q{quartile}"
                    sums[key] = sums.get(key, 0.0) + float(value.float().sum())
        sums = gather_object([sums])
        means = {key: sum(part.get(key, 0.0) for part in sums) / len(self.data) for part in sums for key in part}
        for name in sorted({key.removesuffix("_q0") for key in means if key.endswith("_q0")}):
            means[name] = sum(means[f"{name}_q{quartile}"] for quartile in range(QUARTILES)) / QUARTILES
        measures = {key: Measure(self._described(key), value) for key, value in sorted(means.items())}
        described = self.data.describe()
        protocol = {"count": len(self.data), "held_out": {key: described.get(key) for key in DATA_FACTS}}
        return Evaluation(measures, protocol | {"noise_seed": self.seed})

    def _draw(self, rows: range) -> tuple[Tensor, Tensor]:
        """Timesteps int64 (4, B) and noise (4, B, C, H, W) of images."""
        shape, drawn = (self.data.channels, *self.data.size), []
        for row in rows:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "held out", row))
            u = torch.rand(QUARTILES, generator=generator)
            drawn.append((u, torch.randn(QUARTILES, *shape, generator=generator)))
        u, noise = (torch.stack(part, dim=1) for part in zip(*drawn))
        t = (torch.arange(QUARTILES)[:, None] + u) / QUARTILES * self.num_timesteps
        t = t.long().clamp(max=self.num_timesteps - 1)
        return t.to(self.accelerator.device), noise.to(self.accelerator.device)

    def _described(self, key: str) -> str:
        name, _, quartile = key.removeprefix("eval_").partition("_q")
        where = f", quartile {int(quartile) + 1} of the timesteps" if quartile else ""
        return f"{name} on held-out images{where}"


class SampleMeasures:
    """Images drawn by the model in training, measured against real ones as `hf-diffusion evaluate` does, of the same seeds and classes.

    metrics: of fd, kd, pr, label_accuracy. data: the real images, not flipped or cropped at random. build_pipeline(model): what users get. ValueError, before
    any training, for metrics that cannot be computed from so many images, networks that do not fit, and calls that the pipeline refuses.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        metrics: Sequence[str],
        data: ImageData,
        build_pipeline: Callable[[nn.Module], DiffusionPipeline],
        model: nn.Module,
        *,
        class_conditional: bool,
        num_images: int = 1000,
        features: str = "pixels",
        batch_size: int = 64,
        seed: int = 0,
        **options,
    ):
        self.accelerator, self.metrics, self.data, self.build_pipeline = accelerator, metrics, data, build_pipeline
        self.count, self.batch_size, self.seed, self.options = num_images, batch_size, seed, options
        self.labels = proportional_labels(data.labels, num_images) if class_conditional else None
        self.reference: Reference | None = None
        path = trained_network_file(data) if features == "trained" else features
        self.network = load_feature_network(path, data.channels, data.size, accelerator.device)
        classifies, labelled = self.network.classifier is not None, self.labels is not None
        options_named = ("eval_num_images", "max_train_samples")
        check_metrics(metrics, num_images, len(data), self.network, classifies, labelled, options_named)
        self.keys = [key for metric in metrics for key in (("precision", "recall") if metric == "pr" else (metric,))]
        self._try(build_pipeline(model))

    def _try(self, pipeline: DiffusionPipeline) -> None:
        """Draw two images in few steps: what the pipeline or the network refuses shows now, not at the first evaluation."""
        options, labels = dict(self.options), self.labels and self.labels[:2]
        if "num_inference_steps" in options:
            options["num_inference_steps"] = min(2, options["num_inference_steps"])
        images = draw(pipeline, range(2 if labels is None else len(labels)), labels, **options)
        network_features(self.network, images)

    def prepare(self) -> None:
        """Compute the statistics of the real images, by all processes together, or read them from the cache."""
        self.reference = reference_statistics(self.data, self.network)

    def __call__(self, model: nn.Module, stopping: Stopping) -> Evaluation:
        pipeline, failures = self.build_pipeline(model), []
        chunks = self._chunks(pipeline, stopping, failures)
        measures = measure_images(
            chunks, self.count, self.network, self.reference, self.metrics, all_labels=self.labels
        )
        failures = [failure for part in gather_object([failures]) for failure in part]
        if failures:
            raise ValueError(failures[0])
        sampling = sampling_protocol(pipeline, self.batch_size, self.options)
        if self.accelerator.mixed_precision != "no":
            sampling["dtype"] += f" under {self.accelerator.mixed_precision} autocast"
        protocol = images_protocol(self.count, self.seed, self.labels, sampling, self.network)
        return Evaluation(measures, protocol | {"reference": self.reference.protocol})

    def _chunks(self, pipeline: DiffusionPipeline, stopping: Stopping, failures: list[str]) -> Iterator[tuple]:
        """This process's share of the images, drawn one chunk at a time; a chunk that cannot be drawn is black and noted."""
        for rows in shares(self.count, self.batch_size, stopping):
            labels = None if self.labels is None else self.labels[rows.start : rows.stop]
            try:
                with self.accelerator.autocast():
                    images = draw(pipeline, [self.seed + row for row in rows], labels, **self.options)
            except ValueError as error:  # images that are not finite; the other processes must not wait for this one
                failures.append(str(error))
                images = np.zeros((len(rows), *self.data.size, self.data.channels), dtype=np.uint8)
            yield np.array(rows), images, None if labels is None else np.array(labels)
