"""The first samples of a stream, kept in memory, so that they can be asked for by number."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from hf_diffusion.data.protocol import Batch, TrainingData


READ_AT_ONCE = 64


class KeptSamples(TrainingData):
    """Up to `count` samples of a stream, read once; what else it says is what the stream says."""

    def __init__(self, stream: TrainingData, count: int):
        parts = list(stream.once(READ_AT_ONCE, count))
        self._kept = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        self.stream, self.kind, self.is_bounded = stream, stream.kind, stream.is_bounded
        self.num_samples, self.sample_shape = len(self._kept["x_0"]), stream.sample_shape
        self.name, self.class_names, self.split_rows = stream.name, stream.class_names, stream.split_rows
        self.labels = self._kept["labels"].numpy() if "labels" in self._kept else None
        self.remarks = [*stream.remarks, f"the first {self.num_samples:,} {self.kind} of a stream"]
        self.fingerprint = f"{stream.fingerprint}-{self.num_samples}"

    def fetch(self, indices: Sequence[int], epoch: int | Sequence[int]) -> Batch:
        rows = torch.as_tensor(indices, dtype=torch.int64)
        batch = {name: values[rows] for name, values in self._kept.items()} | {"indices": rows}
        return batch if self.labels is None else batch | {"labels": torch.from_numpy(self.labels)[rows]}

    def picture(
        self, samples: np.ndarray, columns: int | None = None, row_labels: Sequence[str] | None = None
    ) -> Image.Image | str:
        return self.stream.picture(samples, columns, row_labels)

    def to_samples(self, batch: Batch) -> np.ndarray:
        return self.stream.to_samples(batch)

    def form(self) -> dict[str, Any]:
        return self.stream.form()

    def describe(self) -> dict[str, Any]:
        return self.stream.describe() | {"samples": self.num_samples, "fingerprint": self.fingerprint}
