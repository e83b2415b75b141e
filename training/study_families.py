"""What families of diffusion models learn of Fashion-MNIST in the same minutes on the same cores.

    python training/study_families.py run all --minutes 20
    python training/study_families.py report

Each family trains the network of FLAGS by its recipe for so many minutes, and is drawn from by its
solvers at about 10, 20 and 50 calls of the network. The runs lie in runs/families/NAME with their
measurements; what is done is left alone. `report` writes a table and a figure of the Frechet
distance against the calls, in the features of `--features`.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_diffusion.config.closed_output import ending_with_its_reader
from hf_diffusion.training.study_fashion_mnist import launch


RECIPES = Path(__file__).resolve().parent / "recipes"
# Half of the recipes' blocks and of their batch: more steps where the minutes are few.
FLAGS = "--num_res_blocks 1 --train_batch_size 32 --sample_steps none --checkpointing_steps 100000".split()
# About 10, 20 and 50 calls of the network: by one call a step, and by two but for the last step.
FIRST_ORDER, SECOND_ORDER = (10, 20, 50), (5, 10, 25)


@dataclass(frozen=True)
class Solver:
    """How a family is drawn from; a sample costs `calls` of the network a step, less `saved`."""

    name: str
    label: str
    steps: tuple[int, ...]
    words: tuple[str, ...] = ()
    calls: int = 1
    saved: int = 0

    def calls_of(self, steps: int) -> int:
        """Calls of the network for a sample without guidance."""
        return self.calls * steps - self.saved


# Each `train_NAME.py` with the recipe fashion_mnist_NAME_cpu.yaml.
FAMILIES: dict[str, tuple[Solver, ...]] = {
    "ddpm": (
        Solver("ddim", "v-prediction DDPM, DDIM", FIRST_ORDER, ("--scheduler", "ddim")),
        Solver("unipc", "v-prediction DDPM, UniPC", FIRST_ORDER, ("--scheduler", "unipc")),
    ),
    "edm": (
        Solver("heun", "EDM, Heun", SECOND_ORDER, calls=2, saved=1),
        Solver("dpmpp", "EDM, DPM++ 2M", FIRST_ORDER, ("--scheduler", "edm-dpm++")),
    ),
    "flow": (
        Solver("euler", "flow matching, Euler", FIRST_ORDER, ("--set", "solver=euler")),
        Solver("heun", "flow matching, Heun", SECOND_ORDER, ("--set", "solver=heun"), calls=2, saved=1),
    ),
    "score": (Solver("ode", "VP score, flow by Heun", SECOND_ORDER, ("--set", "sampler=ode"), calls=2),),
}


def run(options: argparse.Namespace) -> None:
    """Train and measure the families that `options` names."""
    for name in list(FAMILIES) if options.families == ["all"] else options.families:
        folder = options.output_dir / name
        # The card is the last thing that a training writes.
        if not (folder / "README.md").is_file():
            words = ["train", name, "--config", str(RECIPES / f"fashion_mnist_{name}_cpu.yaml"), *FLAGS]
            words += ["--max_train_minutes", str(options.minutes), "--output", str(folder)]
            words += ["--dataset_name", "none", "--data", options.data] if options.data else []
            launch(["hf_diffusion.cli", *words])
        for solver in FAMILIES[name]:
            measured = folder / "measurements" / solver.name
            if (measured / "metrics.json").is_file():
                continue
            words = ["evaluate", str(folder), "--metrics", "fd,pr,label_accuracy", "--features", options.features]
            words += ["--num_images", str(options.num_images), "--dtype", options.dtype, *solver.words]
            words += ["--sweep", "num_inference_steps=" + ",".join(map(str, solver.steps))]
            words += ["--train_data_dir", options.data] if options.data else []
            launch(["hf_diffusion.cli", *words, "--output_dir", str(measured)])


def collect(folder: Path) -> dict[str, list[dict]]:
    """The measured results of each solver by its label, in the order of their calls."""
    found = {}
    for name, solvers in FAMILIES.items():
        for solver in solvers:
            file = folder / name / "measurements" / solver.name / "metrics.json"
            if file.is_file():
                results = json.loads(file.read_text(encoding="utf-8"))["results"]
                rows = [{**r["measures"], "calls": solver.calls_of(int(r["settings"]["num_inference_steps"])),
                         "seconds": r["seconds_per_image"]} for r in results]  # fmt: skip
                found[solver.label] = sorted(rows, key=lambda row: row["calls"])
    return found


def table(found: dict[str, list[dict]]) -> str:
    """The results in Markdown."""
    lines = ["| family, solver | calls | FD | precision | recall | label accuracy | s / 1,000 images |"]
    lines += ["|" + " --- |" * 7]
    for label, rows in found.items():
        for row in rows:
            shares = " | ".join(f"{row[m]['value']:.3f}" for m in ("precision", "recall", "label_accuracy"))
            seconds = "" if row["seconds"] is None else f"{1000 * row['seconds']:.1f}"
            fd = f"{row['fd']['value']:.3g} ± {row['fd']['error']:.2g}"
            lines.append(f"| {label} | {row['calls']} | {fd} | {shares} | {seconds} |")
    names = sorted({row["fd"]["name"] for rows in found.values() for row in rows})
    return "\n".join([*lines, "", *(f"FD: {name}" for name in names)]) + "\n"


def figure(found: dict[str, list[dict]], path: Path) -> None:
    """Distance against calls of the network, a line a solver."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    drawing = Figure(figsize=(8, 4.8), dpi=130, layout="constrained")
    axes = drawing.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92", linewidth=0.8)
    for number, (label, rows) in enumerate(found.items()):
        calls, distances = [row["calls"] for row in rows], [row["fd"]["value"] for row in rows]
        errors = [row["fd"]["error"] for row in rows]
        axes.errorbar(calls, distances, errors, marker="os^DvPX"[number % 7], linewidth=1.3, capsize=2, label=label)
    axes.set(xscale="log", yscale="log", xlabel="calls of the network for a sample")
    axes.set_xticks([10, 20, 50], ["10", "20", "50"])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_ylabel("Frechet distance, lower is better")
    axes.legend(frameon=False, fontsize=8)
    partial = path.with_suffix(".partial.png")
    drawing.savefig(partial)
    os.replace(partial, path)


def report(folder: Path) -> None:
    """families.md and families.png, from what was measured."""
    found = collect(folder)
    if not found:
        raise SystemExit(f"study_families.py: nothing is measured in {folder} yet; give `run` and a family, or all")
    partial = folder / ".families.md.partial"
    partial.write_text(table(found), encoding="utf-8")
    os.replace(partial, folder / "families.md")
    figure(found, folder / "families.png")
    print(table(found) + f"written: {folder}/families.md, families.png")


@ending_with_its_reader()
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="study_families.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("action", choices=("run", "report"))
    parser.add_argument("families", nargs="*", help=f"for run: {', '.join(FAMILIES)}, or all")
    parser.add_argument("--minutes", type=float, default=20.0, help="of each training")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/families"))
    parser.add_argument("--data", help="the data as a parquet file, instead of those of the Hub")
    parser.add_argument("--features", default="trained", help="as in hf-diffusion evaluate")
    parser.add_argument("--dtype", default="float32", help="as in hf-diffusion evaluate")
    parser.add_argument("--num_images", type=int, default=2000, help="images a measurement")
    options = parser.parse_args(argv)
    if options.action == "report":
        report(options.output_dir)
    elif not options.families or set(options.families) - {*FAMILIES, "all"}:
        parser.error(f"got {options.families}; run needs some of {', '.join(FAMILIES)}, or all")
    else:
        run(options)
        report(options.output_dir)
    return 0


if __name__ == "__main__":
    sys.exit(main())
