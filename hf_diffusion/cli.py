"""The `hf-diffusion` command: sample from pipelines, measure them and look into them. Sub-commands import what they need themselves."""

import argparse
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

from hf_diffusion.commands.convert import add_convert_parser
from hf_diffusion.commands.evaluate import add_evaluate_parser
from hf_diffusion.commands.push import add_push_parser


SCHEDULERS = ("ddim", "ddpm", "dpm++", "unipc", "euler")
DTYPES = {"float32": "float32", "bf16": "bfloat16", "fp16": "float16"}
MAX_COLUMNS = 16
ALL_CLASSES_AT_MOST = 20  # so many classes are shown without being asked for


class UsageError(Exception):
    """The command line asks for something that cannot be; exit status 2."""


def main(argv: list[str] | None = None) -> int:
    """Run one sub-command; returns the exit status: 0, 1 for a failure, 2 for a wrong command line."""
    args = build_parser().parse_args(argv)
    try:
        args.run(args)
        return 0
    except KeyboardInterrupt:
        print("hf-diffusion: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if args.traceback:
            raise
        print(f"hf-diffusion {args.command}: {' '.join(str(error).split()) or repr(error)}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


def build_parser() -> argparse.ArgumentParser:
    """The parser of all sub-commands; `run` of the result is the function to call with it."""
    parser = argparse.ArgumentParser(
        prog="hf-diffusion",
        description="Sample from diffusion pipelines, measure them and look into them",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    common.add_argument("pipeline", help="a folder, or user/repository on the Hub")
    common.add_argument("--revision", help="branch, tag or commit of the repository")
    common.add_argument("--subfolder", help="folder of the pipeline within the repository")
    common.add_argument(
        "--verify", action="store_true", help="compare every downloaded file with the Hub's checksums first"
    )
    common.add_argument("--traceback", action="store_true", help="on an error, show where in the code it arose")
    sampling = sampling_options()
    add_sample_parser(commands, [common, sampling])
    add_evaluate_parser(commands, [common, sampling])
    info = commands.add_parser("info", parents=[common], allow_abbrev=False, help="show what a pipeline consists of")
    info.set_defaults(run=info_command)
    add_push_parser(commands)
    add_convert_parser(commands)
    return parser


def sampling_options() -> argparse.ArgumentParser:
    """The options that say how to sample, for all sub-commands that do."""
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add = options.add_argument
    add("--num_inference_steps", type=int)
    add("--eta", type=float, help="noise of DDIM sampling, 0 to 1")
    add("--guidance_scale", type=float, help="w in uncond + w * (cond - uncond)")
    add("--guidance_rescale", type=float)
    add(
        "--guide_by",
        metavar="CLASSIFIER",
        help="folder or repository of a classifier of noisy images, whose gradient guides instead: guidance_scale is its scale",
    )
    add("--scheduler", choices=SCHEDULERS, help="sample with another scheduler of the same process")
    add("--timestep_spacing", choices=("leading", "trailing", "linspace"))
    add("--dtype", choices=DTYPES, default="float32")
    add("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    add("--batch_size", type=int, default=256, help="images that are in memory at a time")
    add(
        "--trust_remote_code", action="store_true", help="run the code of a repository that hf_diffusion does not know"
    )
    return options


def add_sample_parser(commands: argparse._SubParsersAction, parents: list[argparse.ArgumentParser]) -> None:
    """Add `sample`."""
    sample = commands.add_parser(
        "sample", parents=parents, allow_abbrev=False, help="draw images from a pipeline",
        description="Draw images; image i uses the seed --seed + i and does not depend on the rest of its batch.",
    )  # fmt: skip
    add = sample.add_argument
    add("--class_labels", help="numbers or names separated by commas, 'all', or 'none' for the null class")
    add(
        "--num_images", type=int, help="images in all, the same number of each class (default: 8 of each class, or 64)"
    )
    add("--seed", type=int, default=0)
    add("--output", type=Path, help="picture of all images, a row for each class (default: grid.png)")
    add("--images_dir", type=Path, help="folder for the single images as PNG")
    add("--npz", type=Path, help="file for the images, uint8 (N, H, W[, C]), and their labels (N,)")
    add(
        "--interpolate", type=int, metavar="COLUMNS",
        help="draw a grid instead whose rows lead from one noise to another (spherically), a row for each class or 8 rows",
    )  # fmt: skip
    sample.set_defaults(run=sample_command)


def sample_command(args: argparse.Namespace) -> None:
    """`hf-diffusion sample`: draw images and write them as a grid, single files, an array."""
    for name in ("num_images", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UsageError(f"--{name} must be at least 1, not {getattr(args, name)}")
    if args.output is None and args.images_dir is None and args.npz is None:
        args.output = Path("grid.png")
    import numpy as np

    pipe = load_for_sampling(args)
    if args.interpolate is not None:
        draw_interpolation(pipe, args)
        return
    labels = choose_labels(pipe, args)
    images = np.concatenate(list(draw_batches(pipe, labels, args)))  # uint8 (N, H, W, C)
    if args.output is not None:
        grid = class_grid(images, labels, pipe)
        write_whole(args.output, lambda file: grid.save(file, format="PNG"))
        print(f"{args.output}: {len(images)} images")
    if args.images_dir is not None:
        write_images(images, labels, args.images_dir)
        print(f"{args.images_dir}: {len(images)} images, 00000.png to {len(images) - 1:05d}.png")
    if args.npz is not None:
        arrays = {"images": images[..., 0] if images.shape[-1] == 1 else images}
        if labels[0] is not None:
            arrays["labels"] = np.array(labels, dtype=np.int64)
        write_whole(args.npz, lambda file: np.savez_compressed(file, **arrays))
        print(f"{args.npz}: " + ", ".join(f"{name} {array.dtype} {array.shape}" for name, array in arrays.items()))


def load_for_sampling(args: argparse.Namespace):
    """The pipeline with the scheduler, dtype and device that the command line asks for."""
    import torch

    from hf_diffusion.hub.loading import load_pipeline

    where = {"revision": args.revision, "subfolder": args.subfolder}
    pipe = load_pipeline(
        args.pipeline,
        trust_remote_code=args.trust_remote_code,
        dtype=getattr(torch, DTYPES[args.dtype]),
        verify=args.verify,
        **{key: value for key, value in where.items() if value is not None},
    )
    if args.scheduler is not None or args.timestep_spacing is not None:
        spacing = {} if args.timestep_spacing is None else {"timestep_spacing": args.timestep_spacing}
        cls = type(pipe.scheduler) if args.scheduler is None else scheduler_class(args.scheduler)
        pipe.scheduler = cls.from_config(pipe.scheduler.config, **spacing)
    if args.guide_by is not None:
        pipe = guided_by(pipe, args.guide_by)
    return pipe.to(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def guided_by(pipe, classifier: str):
    """The network and the scheduler of a class-conditional pipeline with a saved classifier that guides."""
    from hf_diffusion.models.unet_adm import ADMClassifier
    from hf_diffusion.pipelines.pipeline_classifier_guidance import ClassifierGuidancePipeline

    if not hasattr(pipe, "unet"):
        raise UsageError(
            f"--guide_by: a {type(pipe).__name__} has no U-Net that a classifier could guide; leave it out"
        )
    parts = {"unet": pipe.unet, "scheduler": pipe.scheduler, "id2label": getattr(pipe, "id2label", None)}
    return ClassifierGuidancePipeline(
        classifier=ADMClassifier.from_pretrained(classifier, dtype=pipe.unet.dtype), **parts
    )


def scheduler_class(name: str) -> type:
    """The class that one of SCHEDULERS stands for; each takes over the process from the configuration of any other."""
    import diffusers

    from hf_diffusion.schedulers.scheduling_gaussian import DDIMEtaScheduler, LinearDDPMScheduler

    return {
        "ddim": DDIMEtaScheduler,
        "ddpm": LinearDDPMScheduler,
        "dpm++": diffusers.DPMSolverMultistepScheduler,
        "unipc": diffusers.UniPCMultistepScheduler,
        "euler": diffusers.EulerDiscreteScheduler,
    }[name]


def choose_labels(pipe, args: argparse.Namespace) -> list[int | None]:
    """The class of every image, classes one after the other; None for each image without a class."""
    num_classes, given = getattr(pipe, "num_classes", None), args.class_labels
    if num_classes is None or given == "none":
        if given not in (None, "none"):
            raise UsageError(f"--class_labels {given}: this pipeline has no classes; leave it out")
        return [None] * (args.num_images or 64)
    if given is None and num_classes > ALL_CLASSES_AT_MOST:
        raise UsageError(f"this pipeline has {num_classes} classes; choose with --class_labels, or take 'all'")
    if given in (None, "all"):
        classes = list(range(num_classes))
    else:
        words = [word.strip() for word in given.split(",")]
        names = set((pipe.id2label or {}).values())  # digits may be names: class 3 of the digits is called "3"
        try:
            classes = pipe.get_label_ids([int(w) if w.isdecimal() and w not in names else w for w in words])
        except ValueError as error:
            raise UsageError(f"--class_labels {given}: {error}") from None
    each, rest = divmod(args.num_images or 8 * len(classes), len(classes))
    if rest or each == 0:
        fits = len(classes) * (each + 1)
        raise UsageError(
            f"--num_images {args.num_images} cannot be shared evenly by {len(classes)} classes; use {fits}"
        )
    return [label for label in classes for _ in range(each)]


def draw_batches(pipe, labels: list[int | None], args: argparse.Namespace):
    """Yield uint8 images (B, H, W, C), one seed for each image."""
    import inspect

    import torch

    accepted = inspect.signature(pipe.__call__).parameters
    names = ("num_inference_steps", "eta", "guidance_scale", "guidance_rescale")
    options = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    for name in options:
        if name not in accepted:
            raise UsageError(f"--{name}: {type(pipe).__name__} does not take it; leave it out")
    if "batch_size" not in accepted:
        raise UsageError(f"{type(pipe).__name__} does not sample from classes or noise alone; call it from Python")
    for start in range(0, len(labels), args.batch_size):
        batch = labels[start : start + args.batch_size]
        pipe.set_progress_bar_config(desc=f"images {start + 1}-{start + len(batch)} of {len(labels)}")
        generators = [torch.Generator().manual_seed(args.seed + start + i) for i in range(len(batch))]
        what = {"batch_size": len(batch)} if batch[0] is None else {"class_labels": batch}
        images = pipe(**what, generator=generators, output_type="np", **options).images
        yield (images * 255).round().astype("uint8")


def draw_interpolation(pipe, args: argparse.Namespace) -> None:
    """`hf-diffusion sample --interpolate`: row r leads from the noise of seed --seed + 2 r to that of --seed + 2 r + 1."""
    from hf_diffusion.evaluation.latent_space import interpolate
    from hf_diffusion.figures import labelled_grid

    for name in ("images_dir", "npz", "num_images"):
        if getattr(args, name) is not None:
            raise UsageError(f"--{name} does not go with --interpolate, which draws one grid; leave it out")
    labels = list(dict.fromkeys(choose_labels(pipe, args)))
    classes = None if labels[0] is None else labels
    rows = 8 if classes is None else len(classes)
    names = [(pipe.id2label or {}).get(label, str(label)) for label in classes or []]
    names_of_options = ("num_inference_steps", "eta", "guidance_scale", "guidance_rescale")
    options = {name: getattr(args, name) for name in names_of_options if getattr(args, name) is not None}
    seeds = [(args.seed + 2 * row, args.seed + 2 * row + 1) for row in range(rows)]
    images = interpolate(pipe, seeds, args.interpolate, classes, **options)
    grid = labelled_grid(images, args.interpolate, names)
    output = args.output or Path("grid.png")
    write_whole(output, lambda file: grid.save(file, format="PNG"))
    print(f"{output}: {rows} paths of {args.interpolate} images")


def class_grid(images, labels: list[int | None], pipe):
    """A picture with the images of each class in rows, the first of which carries the class's name."""
    import numpy as np

    from hf_diffusion.figures import labelled_grid

    if labels[0] is None:
        return labelled_grid(images, columns=math.isqrt(len(images) - 1) + 1)
    classes = list(dict.fromkeys(labels))
    each = len(labels) // len(classes)
    columns = min(each, MAX_COLUMNS)
    rows_each = -(-each // columns)
    blocks = images.reshape(len(classes), each, *images.shape[1:])
    white = np.full((len(classes), rows_each * columns - each, *images.shape[1:]), 255, dtype=np.uint8)
    tiles = np.concatenate([blocks, white], axis=1).reshape(-1, *images.shape[1:])
    names = [(pipe.id2label or {}).get(label, str(label)) for label in classes]
    return labelled_grid(tiles, columns, [text for name in names for text in [name] + [""] * (rows_each - 1)])


def write_images(images, labels: list[int | None], folder: Path) -> None:
    """Write 00000.png, 00001.png, ... and, for images with classes, the labels as metadata.csv beside them."""
    from PIL import Image

    for i, image in enumerate(images):
        picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
        write_whole(folder / f"{i:05d}.png", lambda file, picture=picture: picture.save(file, format="PNG"))
    if labels[0] is not None:
        rows = "".join(f"{i:05d}.png,{label}\n" for i, label in enumerate(labels))
        write_whole(folder / "metadata.csv", lambda file: file.write(("file_name,label\n" + rows).encode()))


def write_whole(path: Path, write: Callable) -> None:
    """Call `write` with an open file that takes the place of `path` only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(partial, "wb") as file:
            write(file)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def info_command(args: argparse.Namespace) -> None:
    """`hf-diffusion info`: what a pipeline consists of, without running its code or fetching its weights."""
    from hf_diffusion.hub.download import fetch_and_verify
    from hf_diffusion.hub.loading import describe_pipeline

    where = {"revision": args.revision, "subfolder": args.subfolder}
    if args.verify:
        if os.path.isdir(args.pipeline):
            raise UsageError(
                f"--verify compares a download with the Hub, but {args.pipeline} is a folder here; leave it out"
            )
        commit, count = fetch_and_verify(args.pipeline, args.revision)
        print(f"{args.pipeline} at commit {commit[:12]}: all {count} files are as on the Hub")
    description = describe_pipeline(args.pipeline, **{k: v for k, v in where.items() if v is not None})
    index = description["index"]
    print(f"{args.pipeline}: {description['class_name']}")
    if isinstance(index["_class_name"], list):
        print("carries its own code; not run by hf-diffusion, which uses the installed classes")
    if index.get("id2label"):
        print(f"{len(index['id2label'])} classes: " + ", ".join(index["id2label"].values()))
    for name, part in description["parts"].items():
        print(
            f"\n{name}: {part['class_name']}" + (f", {part['parameters']:,} parameters" if part["parameters"] else "")
        )
        for key, value in part["config"].items():
            if not key.startswith("_"):
                print(f"  {key}: {value}")


if __name__ == "__main__":
    sys.exit(main())
