"""Images as the latents of an autoencoder: computed once, kept on disk, read from there.

Latents of a set are files in a folder whose name is a hash of the images and of all that the
autoencoder is, so another run finds them, and never those of other weights. They are written in
parts, from which an interrupted run goes on. Letters: B samples, latents (D, h, w).
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from tqdm.auto import tqdm

from hf_diffusion.data.augmentation import FLIP, draws
from hf_diffusion.data.autoencoders import decode, digest_of, encode, load_autoencoder
from hf_diffusion.data.protocol import Batch, TrainingData
from hf_diffusion.files import cache_folder, remove_partials, write_whole


logger = logging.getLogger(__name__)
# Of what the files hold.
VERSION = 1
# Samples of a file, and of a forward of the autoencoder.
PART, ENCODED = 4096, 32


class LatentData(TrainingData):
    """A set of images as scaled latents of an autoencoder, of mean 0 and deviation 1.

    images: the set without augmentation, which is what samples are compared with. Gaussian latents
    are drawn anew in each epoch, unless `posterior` is "mean"; what is drawn follows from (seed,
    epoch, index). With `random_flip` half of the latents are those of mirrored images, the same
    halves as of images. ValueError for images that are no set of one size and shape.
    """

    kind = "latents"
    is_bounded = False

    def __init__(
        self, images: TrainingData, autoencoder: torch.nn.Module, random_flip: bool, posterior: str, seed: int
    ):
        self.images, self.autoencoder = images, autoencoder
        self.name, self.class_names, self.labels = images.name, images.class_names, images.labels
        self.split_rows, self.remarks, self.captions = images.split_rows, images.remarks, images.captions
        if images.caption_coder is not None:
            self.encode_captions(images.caption_coder)
        self.num_samples = images.num_samples
        self._seed, self._samples, digest = seed, posterior == "sample", digest_of(autoencoder)
        plain = stored_latents(images, autoencoder, digest, mirrored=False)
        self._stores = [plain, stored_latents(images, autoencoder, digest, mirrored=True)] if random_flip else [plain]
        self._has_spread = plain.has_spread
        channels, *size = plain.shape
        self.sample_shape = (channels // 2 if self._has_spread else channels, *size)
        said = [VERSION, images.fingerprint, digest, random_flip, posterior]
        self.fingerprint = hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]

    @property
    def as_drawn(self) -> TrainingData:
        return self.images

    def fetch(self, indices: Sequence[int], epoch: int | Sequence[int]) -> Batch:
        """Return "x_0" float32 (B, D, h, w), "indices" and, where there are classes, "labels"."""
        rows = np.asarray(indices, dtype=np.int64)
        for index in rows[(rows < 0) | (rows >= len(self))][:1].tolist():
            raise IndexError(f"index {index} is not in the data set {self.name!r}, which has 0..{len(self) - 1}")
        epochs = np.broadcast_to(np.asarray(epoch, dtype=np.int64), rows.shape)
        mirrored = np.zeros(len(rows), dtype=bool)
        if len(self._stores) > 1:
            mirrored = draws(self._seed, epochs, rows, FLIP) < 0.5
        values = np.stack([self._stores[flip].row(row) for flip, row in zip(mirrored.astype(int), rows)])
        values = values.astype(np.float32)
        if self._has_spread:
            values, spread = np.split(values, 2, axis=1)
            if self._samples:
                values = values + spread * self._noise(epochs, rows)
        sources = self._stores[0].sources[rows]
        batch = {"x_0": torch.from_numpy(np.ascontiguousarray(values)), "indices": torch.from_numpy(sources)}
        batch |= self.captions_of(epochs, sources)
        return batch if self.labels is None else batch | {"labels": torch.from_numpy(self.labels[sources])}

    def _noise(self, epochs: np.ndarray, rows: np.ndarray) -> np.ndarray:
        generators = (np.random.default_rng((self._seed, int(epoch), int(row))) for epoch, row in zip(epochs, rows))
        return np.stack([generator.standard_normal(self.sample_shape, dtype=np.float32) for generator in generators])

    def picture(
        self, samples: np.ndarray, columns: int | None = None, row_labels: Sequence[str] | None = None
    ) -> Image.Image:
        return self.images.picture(samples, columns, row_labels)

    def to_samples(self, batch: Batch) -> np.ndarray:
        """The images that the autoencoder decodes, uint8 (B, H, W, C)."""
        decoded = [decode(self.autoencoder, part) for part in batch["x_0"].split(ENCODED)]
        return self.images.to_samples({"x_0": torch.cat(decoded)})

    def form(self) -> dict[str, Any]:
        return self.images.form() | super().form()

    def use_classes(self, names: Sequence[str]) -> None:
        super().use_classes(names)
        self.images.use_classes(names)

    def describe(self) -> dict[str, Any]:
        """Return what the images say of themselves, and which latents of them these are."""
        shape, posterior = "x".join(map(str, self.sample_shape)), "sampled" if self._samples else "means"
        return self.images.describe() | {
            "latents": f"{shape}, {posterior}, of {type(self.autoencoder).__name__}",
            "random_flip": len(self._stores) > 1,
            "fingerprint": self.fingerprint,
        }


class StoredLatents:
    """Latents on disk, read row by row from the parts of a folder.

    sources: int64 (N,), whose latents a row holds: another's where an image is corrupt.
    has_spread: the first half of the channels are means, the others standard deviations.
    """

    def __init__(self, folder: Path, count: int):
        starts = range(0, count, PART)
        self.parts = [np.load(_part(folder, start), mmap_mode="r") for start in starts]
        self.sources = np.concatenate([np.load(_part(folder, start, "indices")) for start in starts])
        self.has_spread = json.loads((folder / "about.json").read_text(encoding="utf-8"))["has_spread"]
        self.shape = self.parts[0].shape[1:]

    def row(self, index: int) -> np.ndarray:
        """One sample's numbers, float16."""
        return self.parts[index // PART][index % PART]


def stored_latents(images: TrainingData, autoencoder: torch.nn.Module, digest: str, mirrored: bool) -> StoredLatents:
    """The latents of all images, or of their mirror images: those on disk, the others computed now.

    Half precision: of latents of deviation 1 it keeps what is far below a grey level of the image.
    """
    identity = json.dumps([VERSION, images.fingerprint, len(images), digest, mirrored, PART])
    folder = cache_folder("latents") / hashlib.sha256(identity.encode()).hexdigest()[:24]
    parts = [range(start, min(start + PART, len(images))) for start in range(0, len(images), PART)]
    missing = [rows for rows in parts if not _part(folder, rows.start).is_file()]
    remove_partials(folder)
    what, shown = f"{'mirrored ' if mirrored else ''}latents of {images.name}", PartialState().is_main_process
    with tqdm(total=sum(map(len, missing)), desc=what, unit="image", disable=not (missing and shown)) as bar:
        for rows in missing:
            _encode_part(images, autoencoder, folder, rows, mirrored, bar)
    if missing and shown:
        size = sum(file.stat().st_size for file in folder.glob("*.npy"))
        print(f"the {what}, {size / 2**20:.1f} MiB, are in {folder}", flush=True)
    return StoredLatents(folder, len(images))


def _part(folder: Path, start: int, kind: str = "latents") -> Path:
    return folder / f"{start // PART:05d}.{kind}.npy"


def _encode_part(
    images: TrainingData, autoencoder: torch.nn.Module, folder: Path, rows: range, mirrored: bool, bar: tqdm
) -> None:
    values, sources = [], []
    for start in range(0, len(rows), ENCODED):
        batch = images.fetch(rows[start : start + ENCODED], epoch=0)
        x_0 = batch["x_0"].flip(-1) if mirrored else batch["x_0"]
        mean, std = encode(autoencoder, x_0)
        found = mean if std is None else torch.cat([mean, std], dim=1)
        if not found.isfinite().all():
            raise ValueError(
                f"the vae gives NaN or infinity for one of the {len(x_0)} images of {images.name} from {rows[start]} "
                "on; look at them, or give another vae"
            )
        values.append(found.half().cpu().numpy())
        sources.append(batch["indices"].numpy())
        bar.update(len(x_0))
    about = {"data": images.name, "vae": type(autoencoder).__name__, "has_spread": std is not None}
    write_whole(folder / "about.json", json.dumps(about))
    # The latents last: where they are, the part is whole.
    for kind, arrays in (("indices", sources), ("latents", values)):
        array = np.concatenate(arrays)
        write_whole(_part(folder, rows.start, kind), lambda file, array=array: np.save(file, array))


def load_latents(images: TrainingData, vae: str, random_flip: bool, posterior: str, seed: int) -> LatentData:
    """`LatentData` of a set of images, with the autoencoder in a folder or repository.

    ValueError where images are none, or the autoencoder is of other channels or sides.
    """
    if images.kind != "images" or images.num_samples is None:
        what = images.kind if images.num_samples is not None else "a stream of images"
        raise ValueError(f"vae {vae} encodes a set of images once, and {images.name} is {what}; leave one of them out")
    autoencoder = load_autoencoder(vae, PartialState().device)
    channels, wanted = images.sample_shape[0], autoencoder.config["in_channels"]
    if channels != wanted:
        raise ValueError(f"vae {vae} takes images of {wanted} channels, not {channels}; give --channels {wanted}")
    widths = autoencoder.config.get("block_out_channels") or autoencoder.config["encoder_block_out_channels"]
    factor = 2 ** (len(widths) - 1)
    if any(side % factor for side in images.sample_shape[1:]):
        size = "x".join(map(str, images.sample_shape[1:]))
        raise ValueError(
            f"vae {vae} halves images {len(widths) - 1} times, which {size} pixels do not allow; give a --resolution "
            f"whose sides are multiples of {factor}"
        )
    return LatentData(images, autoencoder, random_flip, posterior, seed)
