"""`hf-diffusion evaluate`: measure a pipeline, or images in a file, under one protocol or over a sweep of sampling settings."""

import argparse
import itertools
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


SAMPLE_METRICS = ("fd", "kd", "pr", "label_accuracy")
MODEL_METRICS = ("bpd", "consistency", "inversion")
SWEEPS = {
    "num_inference_steps": int,
    "eta": float,
    "guidance": str,
    "guidance_scale": float,
    "guidance_rescale": float,
    "scheduler": str,
    "timestep_spacing": str,
}
OF_THE_SCHEDULER = ("scheduler", "timestep_spacing")
GUIDANCE = ("classifier", "classifier_free")  # of the pipeline
DEFAULT_STEPS = (10, 25, 50)


def add_evaluate_parser(commands: argparse._SubParsersAction, parents: list[argparse.ArgumentParser]) -> None:
    """Add `evaluate`; the parents bring the pipeline and what says how to sample from it."""
    evaluate = commands.add_parser(
        "evaluate", parents=parents, allow_abbrev=False, help="measure a pipeline against real images",
        description="Draw images, image i with the seed --seed + i, and measure them against real ones. The pipeline may also "
        "be an .npz file with images (N, H, W[, C]) uint8 and labels (N,). Run by `accelerate launch -m hf_diffusion.cli evaluate` the work is shared by processes.",
    )  # fmt: skip
    add = evaluate.add_argument
    add("--metrics", default="fd,kd,pr", help=f"of {', '.join(SAMPLE_METRICS + MODEL_METRICS)}, separated by commas")
    add("--num_images", type=int, default=1000)
    add("--seed", type=int, default=0)
    add(
        "--class_labels",
        help="numbers or names separated by commas, taken in turn, or 'none' (default: as frequent as in the data)",
    )
    add(
        "--sweep",
        action="append",
        default=[],
        metavar="NAME=A,B",
        help=f"measure every combination; NAME is one of {', '.join(SWEEPS)}",
    )
    add(
        "--output_dir",
        type=Path,
        default=Path("evaluation"),
        help="for metrics.json, the figures and the images, from which an interrupted run goes on",
    )
    add(
        "--features",
        default="pixels",
        help="'pixels', 'inception', 'trained' (a small classifier of the real images, trained once), a TorchScript or .safetensors file, or the folder of a saved classifier",
    )
    add("--inception_weights", type=Path, help="inception-2015-12-05.pt (TorchScript), or weights for torch-fidelity")
    add("--classifier", help="file or folder of a network for label_accuracy, as for --features")
    add(
        "--dataset_name", help="the real images: a Hub id or 'digits' (default: what the pipeline's config.yaml names)"
    )
    for name in ("dataset_config_name", "train_data_dir", "image_column", "label_column", "cache_dir"):
        add(f"--{name}")
    add("--split", default="train", help="split of the real images")
    add("--max_reference_images", type=int, help="evenly spaced real images to measure against (default: all)")
    add(
        "--reference_cache",
        type=Path,
        help="folder for statistics of real images (default: in the Hugging Face cache)",
    )
    add("--model_images", type=int, default=64, help="real images for bpd and inversion, seeds for consistency")
    add("--bpd_steps", type=int, help="timesteps of the bound (default: all)")
    add("--update_card", action="store_true", help="write the results into the README.md of the pipeline's folder")
    evaluate.set_defaults(run=evaluate_command)


def evaluate_command(args: argparse.Namespace) -> None:
    """Check everything, then sample and measure, writing metrics.json after every setting."""
    from hf_diffusion.cli import UsageError
    from hf_diffusion.evaluation.run import EvaluationRun

    metrics = [word.strip() for word in args.metrics.split(",") if word.strip()]
    unknown = [metric for metric in metrics if metric not in SAMPLE_METRICS + MODEL_METRICS]
    if unknown or not metrics:
        raise UsageError(f"--metrics {args.metrics}: choose from {', '.join(SAMPLE_METRICS + MODEL_METRICS)}")
    for name in ("num_images", "batch_size", "model_images", "bpd_steps", "max_reference_images"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} must be at least 1, not {value}")
    if args.update_card and not (Path(args.pipeline) / "README.md").is_file():
        raise UsageError(
            f"--update_card: {args.pipeline} is no folder with a README.md; evaluate the folder of the run"
        )
    settings = list(all_settings(args, UsageError))
    run = EvaluationRun(args, metrics, settings)
    run.check()
    run.measure()
    run.finish(command="hf-diffusion " + shlex.join(sys.argv[1:]))


def all_settings(args: argparse.Namespace, error: type[Exception]) -> Iterator[dict[str, Any]]:
    """Every combination of the swept values, as settings by name; a flag that is swept, too, is a mistake."""
    swept: dict[str, list[Any]] = {}
    for text in args.sweep:
        name, equals, values = text.partition("=")
        if name not in SWEEPS or not equals or not values:
            raise error(f"--sweep {text}: write NAME=A,B,..., with NAME one of {', '.join(SWEEPS)}")
        if name == "guidance" and args.guide_by is None:
            raise error(f"--sweep {text}: comparing kinds of guidance needs --guide_by, the classifier")
        if name in swept or getattr(args, name, None) is not None:
            raise error(f"--sweep {text}: {name} is given twice; leave one out")
        try:
            swept[name] = [SWEEPS[name](value) for value in values.split(",")]
        except ValueError:
            raise error(f"--sweep {text}: the values of {name} must be of type {SWEEPS[name].__name__}") from None
        if name == "guidance" and not set(swept[name]) <= set(GUIDANCE):
            raise error(f"--sweep {text}: the values of guidance are {' and '.join(GUIDANCE)}")
    for values in itertools.product(*swept.values()):
        yield dict(zip(swept, values))
