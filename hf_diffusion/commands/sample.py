"""`hf-diffusion sample`: samples of a pipeline as a picture, single files or an array."""

from dataclasses import dataclass
from pathlib import Path

from hf_diffusion.commands.command import Command
from hf_diffusion.config.options import HIGHEST_SEED, UsageError, option
from hf_diffusion.sampling.options import SamplingOptions


GRID = Path("grid.png")
# Samples of this shape are shown as a scatter plot.
POINT = (2,)
NUM_IMAGES, NUM_OF_A_CLASS, NUM_PATHS = 64, 8, 8
# So many classes are shown without being asked for.
ALL_CLASSES_AT_MOST = 20


@dataclass(frozen=True, kw_only=True)
class SampleCommand(SamplingOptions, Command):
    """Draw samples from a pipeline.

    Sample i uses the seed --seed + i and does not depend on the rest of its batch.
    """

    class_labels: str = option(
        "auto",
        "numbers or names separated by commas, all, or none for the null class; auto is all if they are "
        f"{ALL_CLASSES_AT_MOST} or fewer",
        group="samples",
    )
    num_images: int | None = option(
        None,
        f"samples in all, as many of each class; none is {NUM_OF_A_CLASS} of each class, {NUM_IMAGES} without classes",
        at_least=1,
    )
    seed: int = option(0, "seed of the first sample", at_least=0, at_most=HIGHEST_SEED)
    interpolate: int | None = option(
        None,
        "draw a grid of so many columns instead, whose rows lead from one noise to another, spherically",
        at_least=2,
    )
    output: Path | None = option(
        None, f"picture of all samples; none is {GRID}, if nothing else is written", group="files"
    )
    images_dir: Path | None = option(None, "folder for the single images as PNG")
    npz: Path | None = option(None, "file for the samples, images as uint8 (N, H, W[, C]), and their labels (N,)")

    def validate(self) -> None:
        """ValueError for options that do not go together."""
        for name in ("images_dir", "npz", "num_images") if self.interpolate else ():
            if getattr(self, name) is not None:
                raise ValueError(f"--{name} does not go with --interpolate, which draws one grid; leave it out")

    def run(self) -> None:
        """Load, check everything, draw, write."""
        # torch takes seconds, and --help comes past here without running anything.
        from hf_diffusion.figures.grid import labelled_grid
        from hf_diffusion.sampling import drawing, interpolation, writing
        from hf_diffusion.sampling.loading import load_for_sampling

        pipeline = load_for_sampling(self)
        classes, id2label = drawing.choose_labels(pipeline, self.class_labels), getattr(pipeline, "id2label", None)
        labels, options = self.share_out(classes), drawing.call_options(pipeline, self)
        drawing.check_call(pipeline, classes is not None, options)
        self.check_files(type(pipeline).__name__, getattr(pipeline, "sample_shape", None))
        picture = self.output or (GRID if self.images_dir is None and self.npz is None else None)
        if picture is not None:
            writing.picture_format(picture)
        if self.interpolate is not None:
            rows = NUM_PATHS if classes is None else len(classes)
            seeds = [(self.seed + 2 * row, self.seed + 2 * row + 1) for row in range(rows)]
            images = interpolation.interpolate(pipeline, seeds, self.interpolate, classes, **options)
            names = writing.class_names(classes or [], id2label)
            writing.write_picture(labelled_grid(images, self.interpolate, names), picture)
            print(f"{picture}: {rows} paths of {self.interpolate} images")
            return
        count = len(labels) if labels is not None else self.num_images or NUM_IMAGES
        seeds = range(self.seed, self.seed + count)
        samples = drawing.draw_in_batches(pipeline, seeds, labels, self.batch_size, **options)
        if picture is not None:
            writing.write_picture(writing.picture_of(samples, labels, id2label), picture)
            print(f"{picture}: {count} {'images' if samples.ndim == 4 else 'samples'}")
        if self.images_dir is not None:
            writing.write_images(samples, labels, self.images_dir)
            print(f"{self.images_dir}: {count} images, 00000.png to {count - 1:05d}.png")
        if self.npz is not None:
            print(f"{self.npz}: {writing.write_arrays(samples, labels, self.npz)}")

    def check_files(self, pipeline: str, shape: tuple[int, ...] | None) -> None:
        """UsageError for files that samples of this shape cannot fill; None stands for images."""
        if shape is None or len(shape) == 3:
            return
        samples = f"the samples of this {pipeline} are no images, they have the shape {tuple(shape)}"
        for name in ("interpolate", "images_dir"):
            if getattr(self, name) is not None:
                raise UsageError(f"--{name}: {samples}; leave it out")
        if tuple(shape) != POINT and (self.output is not None or self.npz is None):
            raise UsageError(f"{samples}; give --npz alone")

    def share_out(self, classes: list[int] | None) -> list[int] | None:
        """The class of every sample, classes one after the other; None for samples without a class.

        UsageError where the samples cannot be shared evenly.
        """
        if classes is None:
            return None
        if self.class_labels == "auto" and len(classes) > ALL_CLASSES_AT_MOST:
            raise UsageError(f"this pipeline has {len(classes)} classes; choose with --class_labels, or take 'all'")
        each, rest = divmod(self.num_images or NUM_OF_A_CLASS * len(classes), len(classes))
        if rest or each == 0:
            raise UsageError(
                f"--num_images {self.num_images} cannot be shared evenly by {len(classes)} classes; "
                f"use {len(classes) * (each + 1)}"
            )
        return [label for label in classes for _ in range(each)]
