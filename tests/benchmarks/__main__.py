"""`make bench`: how long the same work takes here and in diffusers, as ratios of paired runs.

Below 1 is faster here. few_steps compares DDGAN's 4 steps with diffusers' DDIM-50 and DDPM-1000.
adversarial_step compares a DDGAN step with the reference's way of computing it. trainer_overhead
compares the trainer's step with the same step bare, on a GPU where there is one, as data_path and
compile_start do.

python -m tests.benchmarks [--only scheduler_step,unet_forward] [--pairs 7] [--threads 2]
    [--output benchmarks.json]
"""

import argparse
import json
import logging
import os
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

from hf_diffusion.environment import environment
from tests.benchmarks import (
    adversarial_step,
    compile_start,
    data_path,
    few_steps,
    sampling_loop,
    scheduler_step,
    trainer_overhead,
    training_step,
    unet_forward,
)
from tests.benchmarks.pairs import Result, measure


SUBJECTS = {
    "scheduler_step": scheduler_step,
    "unet_forward": unet_forward,
    "training_step": training_step,
    "trainer_overhead": trainer_overhead,
    "data_path": data_path,
    "compile_start": compile_start,
    "sampling_loop": sampling_loop,
    "few_steps": few_steps,
    "adversarial_step": adversarial_step,
}


def subject_list(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in SUBJECTS]:
        raise argparse.ArgumentTypeError(f"unknown {', '.join(unknown)}; choose from {', '.join(SUBJECTS)}")
    return names


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--only", type=subject_list, default=list(SUBJECTS), metavar="A,B", help=", ".join(SUBJECTS))
    parser.add_argument(
        "--pairs", type=positive, default=7, help="pairs of each comparison (two at most for the sampling loop)"
    )
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="threads of torch")
    parser.add_argument("--output", type=Path, default=Path("benchmarks.json"))
    return parser.parse_args(argv)


def row(result: Result) -> str:
    s = result.summary()
    unit, scale = ("s ", 1) if s["stock_seconds"] >= 10 else ("ms", 1000)
    reached = "yes" if s["reached"] else "NO"
    return (
        f"{s['name']:<56} {s['ratio']:5.3f} ({s['ratio_min']:.3f}-{s['ratio_max']:.3f}) "
        f"{s['target']:6.2f} {reached:>7} "
        f"{s['stock_seconds'] * scale:9.1f} {unit} {s['our_seconds'] * scale:9.1f} {unit}"
    )


def write(path: Path, content: dict) -> None:
    """In one piece: an interrupted run leaves the file of the last one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(partial, path)


def main(argv: list[str]) -> int:
    logging.disable(logging.WARNING)
    options = parse(argv)
    torch.set_num_threads(options.threads)
    began, load_before = datetime.now(UTC), os.getloadavg()
    print(
        f"{options.threads} threads, load {load_before[0]:.1f}; "
        "median ratio ours / diffusers of alternating runs (min-max)\n"
    )
    print(
        f"{'same work':<56} {'ratio':>5} {'(min-max)':<13} {'target':>6} {'reached':>7} {'diffusers':>12} {'ours':>12}"
    )
    results = []
    for subject in options.only:
        for comparison in SUBJECTS[subject].comparisons():
            for result in measure(comparison, options.pairs):
                results.append({"subject": subject, **result.summary()})
                print(row(result), flush=True)
    content = {
        "command": " ".join(["python -m tests.benchmarks", *argv]),
        "began": began.isoformat(timespec="seconds"),
        "seconds": (datetime.now(UTC) - began).total_seconds(),
        "threads": options.threads,
        "load_before": load_before,
        "load_after": os.getloadavg(),
        "machine": environment(),
        "results": results,
    }
    write(options.output, content)
    print(f"\nload now {os.getloadavg()[0]:.1f}; all times are in {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
