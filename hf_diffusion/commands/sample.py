"""`hf-diffusion sample`: samples of a pipeline as a picture, single files or an array."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_diffusion.commands.command import Command
from hf_diffusion.config.options import HIGHEST_SEED, UsageError, option
from hf_diffusion.files import remove_partials, write_whole
from hf_diffusion.sampling.options import SamplingOptions


GRID, TEXTS = Path("grid.png"), Path("samples.txt")
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

    prompt: tuple[str, ...] = option(
        (),
        "what to draw, for a text-to-image model: each use adds one, none takes the texts that the model names; or "
        "how a text begins: masks in it, such as [MASK:12] for twelve, are filled in, and \\n is a new line",
        group="samples",
        repeatable=True,
    )
    negative_prompt: str | None = option(None, "text that guidance leads away from")
    class_labels: str = option(
        "auto",
        "numbers or names separated by commas, in double quotes where a name has one, all, or none for the null "
        "class; auto is all if they are "
        f"{ALL_CLASSES_AT_MOST} or fewer",
    )
    num_images: int | None = option(
        None,
        f"samples in all, as many of each class or text; none is {NUM_OF_A_CLASS} of each, {NUM_IMAGES} without any",
        at_least=1,
    )
    num_samples: int | None = option(None, "the same, for samples that are no images", at_least=1)
    suffix: str | None = option(None, "how a text ends")
    seed: int = option(0, "seed of the first sample", at_least=0, at_most=HIGHEST_SEED)
    interpolate: int | None = option(
        None,
        "draw a grid of so many columns instead, whose rows lead from one noise to another, spherically",
        at_least=2,
    )
    output: Path | None = option(
        None,
        f"picture of all samples, or file of all texts; none is {GRID} or {TEXTS}, if nothing else is written",
        group="files",
    )
    images_dir: Path | None = option(None, "folder for the single images as PNG")
    npz: Path | None = option(None, "file for the samples, images as uint8 (N, H, W[, C]), and their labels (N,)")

    def validate(self) -> None:
        """ValueError for options that do not go together."""
        if self.num_images is not None and self.num_samples is not None:
            raise ValueError("--num_images and --num_samples mean the same; give one of them")
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
        id2label, of_texts = getattr(pipeline, "id2label", None), getattr(pipeline, "output_name", None) == "texts"
        classes = (None if of_texts else self.choose_prompts(pipeline)) or drawing.choose_labels(
            pipeline, self.class_labels
        )
        labels, options = self.share_out(classes), drawing.call_options(pipeline, self) | self.texts_of_call(of_texts)
        drawing.check_call(pipeline, classes is not None, options)
        if of_texts:
            self.write_texts(pipeline, labels, id2label, options)
            return
        if self.negative_prompt is not None:
            options["negative_prompt"] = self.negative_prompt
        self.check_files(type(pipeline).__name__, getattr(pipeline, "sample_shape", None))
        picture = self.output or (GRID if self.images_dir is None and self.npz is None else None)
        if picture is not None:
            writing.picture_format(picture)
        written = [picture, self.images_dir and self.images_dir / "0", self.npz]
        remove_partials(*{path.parent for path in written if path is not None})
        if self.interpolate is not None:
            rows = NUM_PATHS if classes is None else len(classes)
            seeds = [(self.seed + 2 * row, self.seed + 2 * row + 1) for row in range(rows)]
            images = interpolation.interpolate(pipeline, seeds, self.interpolate, classes, **options)
            names = writing.class_names(classes or [], id2label)
            writing.write_picture(labelled_grid(images, self.interpolate, names), picture)
            print(f"{picture}: {rows} paths of {self.interpolate} images")
            return
        count = len(labels) if labels is not None else self.count or NUM_IMAGES
        seeds = range(self.seed, self.seed + count)
        samples = drawing.draw_in_batches(pipeline, seeds, labels, self.batch_size, **options)
        if picture is not None:
            writing.write_picture(writing.picture_of(samples, labels, id2label), picture)
            print(f"{picture}: {count} {'images' if samples.ndim == 4 else 'samples'}")
        if self.images_dir is not None:
            writing.write_images(samples, labels, self.images_dir, id2label)
            print(f"{self.images_dir}: {count} images, 00000.png to {count - 1:05d}.png")
        if self.npz is not None:
            print(f"{self.npz}: {writing.write_arrays(samples, labels, self.npz, id2label)}")

    @property
    def count(self) -> int | None:
        """How many samples are asked for."""
        return self.num_images if self.num_images is not None else self.num_samples

    def choose_prompts(self, pipeline: Any) -> list[str] | None:
        """The texts that images are asked for by; UsageError beside classes that say it, too."""
        from hf_diffusion.sampling import drawing

        if self.prompt and self.class_labels != "auto":
            raise UsageError(f"--prompt and --class_labels {self.class_labels} both say what to draw; give one")
        if self.negative_prompt is not None:
            drawing.choose_prompts(pipeline, [self.negative_prompt])
        return None if self.class_labels == "none" else drawing.choose_prompts(pipeline, self.prompt)

    def texts_of_call(self, of_texts: bool) -> dict[str, str]:
        """What is given of each text that is written, with line ends that a shell hardly takes."""
        given = {"suffix": self.suffix}
        if of_texts:
            if len(self.prompt) > 1:
                raise UsageError(f"--prompt {self.prompt[1]!r}: texts begin with one prompt; give one at a time")
            given |= {"prompt": "".join(self.prompt) or None, "negative_prompt": self.negative_prompt}
        return {name: text.replace("\\n", "\n") for name, text in given.items() if text is not None}

    def write_texts(
        self, pipeline, labels: list[int] | None, id2label: dict[int, str] | None, options: dict[str, Any]
    ) -> None:
        """Draw texts, print them and write them."""
        from hf_diffusion.sampling import drawing, writing

        for name in ("interpolate", "images_dir"):
            if getattr(self, name) is not None:
                raise UsageError(f"--{name}: the samples of this {type(pipeline).__name__} are texts; leave it out")
        path = self.output or (TEXTS if self.npz is None else None)
        if path is not None:
            writing.check_text_name(path)
        count = len(labels) if labels is not None else self.count or NUM_OF_A_CLASS
        seeds = range(self.seed, self.seed + count)
        try:
            tokens = drawing.draw_in_batches(pipeline, seeds, labels, self.batch_size, **options)
        except ValueError as error:
            raise UsageError(str(error)) from error
        shown = writing.numbered_texts(pipeline.decode(tokens), labels, id2label)
        print(shown)
        if path is not None:
            print(f"{write_whole(path, shown)}: {count} texts")
        if self.npz is not None:
            print(f"{self.npz}: {writing.write_arrays(tokens, labels, self.npz)}")

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

    def share_out(self, classes: list[int] | list[str] | None) -> list[int] | list[str] | None:
        """The class or text of every sample, one after the other; None where nothing is asked for.

        UsageError where the samples cannot be shared evenly.
        """
        if classes is None:
            return None
        if self.class_labels == "auto" and not self.prompt and len(classes) > ALL_CLASSES_AT_MOST:
            raise UsageError(f"this pipeline has {len(classes)} classes; choose with --class_labels, or take 'all'")
        each, rest = divmod(self.count or NUM_OF_A_CLASS * len(classes), len(classes))
        if rest or each == 0:
            what = "prompts" if isinstance(classes[0], str) else "classes"
            raise UsageError(
                f"--num_images {self.count} cannot be shared evenly by {len(classes)} {what}; "
                f"use {len(classes) * (each + 1)}"
            )
        return [label for label in classes for _ in range(each)]
