"""What training asks of data: of images, of points, of any kind whose samples have one shape."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hf_diffusion.data.captions import CaptionCoder, Captions, StreamedCaptions
from hf_diffusion.data.classes import match_classes
from hf_diffusion.data.selection import RowNumbers, evenly_spaced
from hf_diffusion.randomness import BatchOrder


Batch = dict[str, Tensor]
# Samples in a picture of the data, and at most so many of a class.
PREVIEWED, PREVIEW_COLUMNS = 64, 8
# Classes in a summary.
MOST_NAMED = 20


class TrainingData(ABC):
    """Samples of one shape, whose batches depend on (seed, epoch, index) alone.

    A kind of data says its `kind`, sets the attributes below and defines `fetch` and `picture`.
    What stands here is right for a set that is read by index; a stream has its own `batches` and
    `once`.

    name: what a card calls the data.
    fingerprint: tells other data apart, the same on any machine.
    num_samples: None for a stream.
    sample_shape: shape of one sample: (C, H, W) for images, (2,) for points in the plane.
    class_names: names by class id; None without classes.
    labels: int64 (num_samples,), the class id of each sample; None without classes and for a
        stream.
    renumbered: the number of each class that the data themselves number, where `use_classes` has
        given others; a stream gives its batches these.
    captions: of the samples, None without; `caption_coder` makes conditions of them.
    split_rows: the split, and which of its rows the samples are, None for all; None without splits.
    remarks: what was left out and what was done on the way, for people.
    autoencoder: what decodes samples that are latents; None for others.
    """

    kind: ClassVar[str]
    # Values lie in [-1, 1], so a prediction beyond them may be clipped.
    is_bounded: ClassVar[bool] = True
    name: str
    fingerprint: str
    num_samples: int | None
    sample_shape: tuple[int, ...]
    class_names: list[str] | None = None
    labels: np.ndarray | None = None
    renumbered: np.ndarray | None = None
    captions: Captions | StreamedCaptions | None = None
    caption_coder: CaptionCoder | None = None
    split_rows: tuple[str, RowNumbers | None] | None = None
    remarks: Sequence[str] = ()
    autoencoder: Any = None

    @property
    def num_classes(self) -> int | None:
        """Number of classes; None without classes."""
        return len(self.class_names) if self.class_names else None

    @property
    def as_drawn(self) -> "TrainingData":
        """The data in the form that a pipeline draws: images, where samples are latents."""
        return self

    @property
    def why_no_classes(self) -> str | None:
        """What hides classes that the data seem to have, in words."""
        return next((remark for remark in self.remarks if remark.startswith("no classes: ")), None)

    @property
    def class_counts(self) -> dict[str, int] | None:
        """Samples by class name; None without classes and for a stream."""
        if self.labels is None:
            return None
        return dict(zip(self.class_names, np.bincount(self.labels, minlength=self.num_classes).tolist()))

    def __len__(self) -> int:
        if self.num_samples is None:
            raise TypeError(f"{self.name} is a stream, whose length is not known")
        return self.num_samples

    @abstractmethod
    def fetch(self, indices: Sequence[int], epoch: int | Sequence[int]) -> Batch:
        """Return "x_0" (B, *sample_shape), "indices" int64 (B,), and conditions.

        x_0 is float32, and int64 where samples are tokens.

        A condition has the name of the network's argument; classes are "labels", int64 (B,).
        `epoch` is one number or one for each index. IndexError for an index outside
        0..num_samples-1.
        """

    @abstractmethod
    def picture(
        self, samples: np.ndarray, columns: int | None = None, row_labels: Sequence[str] | None = None
    ) -> Image.Image | str:
        """Show samples of the form of `to_samples`, `columns` a row, with the label of each row.

        As a picture, or as a text where samples are texts.
        """

    def batches(self, order: BatchOrder, start_step: int, total_steps: int, num_workers: int = 0) -> Iterator[Batch]:
        """Yield this process's micro-batches of these steps, each in memory of its own.

        The batches are the same for any `num_workers`, which read ahead where the kind of data has
        workers.
        """
        for pairs in order.positions(start_step, total_steps):
            epochs, indices = zip(*pairs)
            yield self.fetch(indices, epochs)

    def once(self, batch_size: int, limit: int | None = None, num_workers: int = 0) -> Iterator[Batch]:
        """Yield every sample once, or `limit` evenly spaced ones, of a stream the first."""
        chosen = evenly_spaced(len(self), limit)
        for start in range(0, len(chosen), batch_size):
            yield self.fetch(chosen[start : start + batch_size], 0)

    def preview(self) -> Image.Image | str:
        """Show samples as networks see them: a row of each class with its name, or a square."""
        counts = self.class_counts
        if counts is None:
            return self.picture(self.to_samples(next(iter(self.once(PREVIEWED, PREVIEWED)))))
        shown = [label for label, name in enumerate(counts) if counts[name]]
        shown = [shown[place] for place in evenly_spaced(len(shown), PREVIEWED // PREVIEW_COLUMNS)]
        columns = min(PREVIEW_COLUMNS, *(counts[self.class_names[label]] for label in shown))
        rows = [np.flatnonzero(self.labels == label) for label in shown]
        indices = [int(row[place]) for row in rows for place in evenly_spaced(len(row), columns)]
        names = [self.class_names[label] for label in shown]
        return self.picture(self.to_samples(self.fetch(indices, 0)), columns, names)

    def summary(self) -> dict[str, str]:
        """What a person should know before training: samples, splits, classes, values, remarks."""
        shape, kinds = " x ".join(map(str, self.sample_shape)), self.num_classes or "no"
        facts = {"data": f"{self.num_samples or 'a stream of'} {self.kind}, {shape}, {kinds} classes"}
        if splits := self.describe().get("splits"):
            facts["splits"] = ", ".join(f"{name} {count:,}" for name, count in splits.items())
        if self.class_names:
            counts = self.class_counts or dict.fromkeys(self.class_names)
            named = [name if count is None else f"{name} {count:,}" for name, count in counts.items()]
            more = f" and {len(named) - MOST_NAMED} more" if len(named) > MOST_NAMED else ""
            facts["classes"] = ", ".join(named[:MOST_NAMED]) + more
        if self.captions is not None:
            facts["captions"] = self.captions.sentence(self.kind)
        x_0 = next(iter(self.once(PREVIEWED, PREVIEWED)))["x_0"]
        facts["values"] = f"{x_0.min():.3g} to {x_0.max():.3g}, mean {x_0.mean():.3g}, of {len(x_0)} {self.kind}"
        return facts | ({"remarks": "; ".join(self.remarks)} if self.remarks else {})

    def to_samples(self, batch: Batch) -> np.ndarray:
        """Return x_0 as sampling returns samples of this kind: float32 (B, *sample_shape)."""
        return batch["x_0"].cpu().numpy()

    def form(self) -> dict[str, Any]:
        """Arguments of `load_data` that give another split this form, without augmentation."""
        return {} if self.caption_coder is None else {"caption_coder": self.caption_coder}

    def encode_captions(self, coder: CaptionCoder) -> None:
        """Let batches hold, beside the numbers of captions, what `coder` makes of them."""
        self.caption_coder, self._caption_rows = coder, coder.rows_of(self.captions.texts)

    def captions_of(self, epochs: np.ndarray, sources: np.ndarray) -> Batch:
        """The captions that these samples have in these epochs, as a part of a batch."""
        if self.captions is None:
            return {}
        numbers = torch.from_numpy(self.captions.choose(epochs, sources))
        return {"captions": numbers} | ({} if self.caption_coder is None else self._caption_rows(numbers))

    def use_classes(self, names: Sequence[str]) -> None:
        """Number the classes as `names` does; ValueError for a class that is not among them."""
        if list(names) == self.class_names:
            return
        ids = match_classes(self.class_names or [], names, self.name)
        if self.labels is not None:
            self.labels = ids[self.labels]
        self.renumbered = ids if self.renumbered is None else ids[self.renumbered]
        self.class_names = list(names)

    def describe(self) -> dict[str, Any]:
        """Return what a config or a card records about the data, as plain values."""
        return {
            "name": self.name,
            "kind": self.kind,
            "samples": self.num_samples,
            "sample_shape": list(self.sample_shape),
            "class_names": self.class_names,
            "fingerprint": self.fingerprint,
        }
