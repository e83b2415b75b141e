"""The study of Fashion-MNIST: what DDPM, DDIM, guidance and denoising diffusion GANs of five
divergences give, and what they cost.

    python training/study_fashion_mnist.py list
    python training/study_fashion_mnist.py run ddpm classifier guidance ddgan_js_t4
    python training/study_fashion_mnist.py run all --size gpu --dtype bf16
    python training/study_fashion_mnist.py report

A cell is one training with its measurements, in runs/study/SIZE/CELL. `run` goes on where it was
interrupted and leaves out what is done; `report` writes a table and figures of quality against
sampling time and calls from the metrics.json files of whatever is there. Quality is the Frechet
distance in the features of `--features`: a network file that is the same for all cells that are
compared, or `trained`.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from hf_diffusion.config.closed_output import ending_with_its_reader


HERE = Path(__file__).resolve().parent
DIVERGENCES = ("js", "hellinger", "reverse_kl", "total_variation", "wasserstein")
SCALES = "0,0.5,1,1.5,2,3,4,6,8"
# Names in the table, by the beginning or the middle of a scheduler's class name.
SAMPLERS = {
    "DDIM": "DDIM",
    "DDPM": "DDPM",
    "DDGAN": "DDGAN",
    "UniPC": "UniPC",
    "DPMSolverMultistep": "DPM++ 2M",
    "Consistency": "distilled",
}
# What the distance is drawn against: a figure's name, the values, what they are called.
AXES = {
    "time": ("seconds_per_1000", "seconds for 1,000 images (beside the points: network calls)"),
    # the same on every machine
    "calls": ("network_calls", "calls of the network for an image"),
}
FEWEST_IMAGES = 500  # a Frechet distance of 128 features from fewer is mostly bias


@dataclass(frozen=True)
class Measurement:
    """Arguments of `hf-diffusion evaluate`; `calls` of the network make one image where the most
    steps are taken.

    Where the results are compared with each other at `all_images`, no number of calls is too large.
    """

    name: str
    calls: int
    words: tuple[str, ...]
    all_images: bool = False


@dataclass(frozen=True)
class Cell:
    """A training (`script` None: none) and what is measured of the pipeline in the folder of the
    cell `model`, its own by default.

    `guide` is the cell whose classifier guides, `start` the one whose network the training starts
    from.
    """

    name: str
    script: str | None
    flags: tuple[str, ...] = ()
    measurements: tuple[Measurement, ...] = ()
    model: str | None = None
    guide: str | None = None
    start: str | None = None


def study_cells(size: str) -> dict[str, Cell]:
    """All cells by name, those that others need first."""

    def recipe(name: str) -> tuple[str, ...]:
        return ("--config", str(HERE / "recipes" / f"fashion_mnist_{name}_{size}.yaml"))

    def ancestral(steps: int) -> Measurement:
        return Measurement(f"ddpm_{steps}", steps, ("--scheduler", "ddpm", "--num_inference_steps", str(steps)))

    ddim = Measurement("ddim", 100, ("--sweep", "num_inference_steps=5,10,20,50,100", "--sweep", "eta=0,1"))
    # as many calls as a GAN of four steps
    ddim_4 = Measurement("ddim_4", 4, ("--num_inference_steps", "4"), all_images=True)
    # Solvers that need no training: what every trained model of few steps stands beside.
    few_steps = "num_inference_steps=2,3,4,5,8,10,20"
    untrained = [
        Measurement(name, 20, ("--scheduler", scheduler, "--sweep", few_steps), all_images=True)
        for name, scheduler in (("unipc", "unipc"), ("dpmpp", "dpm++"))
    ]
    guided = ("--scheduler", "unipc", "--guidance_scale", "1.2", "--sweep", "num_inference_steps=10,20")
    untrained.append(Measurement("unipc_guided", 40, guided, all_images=True))
    # v and the cosine schedule change little at T = 50 and 300; the respaced chain of the T = 1000
    # model is the other way to so many steps
    shorter = [
        Cell(f"ddpm_t{steps}", "train_ddpm.py", (*recipe("ddpm"), "--ddpm_num_steps", str(steps)), (ancestral(steps),))
        for steps in (50, 300)
    ]
    sweep = ("--num_inference_steps", "20", "--sweep", "guidance=classifier,classifier_free")
    guidance = Measurement("guidance", 40, (*sweep, "--sweep", f"guidance_scale={SCALES}"))
    gans = [
        Cell(
            f"ddgan_{divergence}_t{steps}",
            "train_ddgan.py",
            (*recipe("ddgan"), "--divergence", divergence, "--num_timesteps", str(steps)),
            (Measurement("ddgan", steps, (), all_images=True),),
            # two cores need what the DDPM has learned; a GPU trains from scratch, as in the paper
            start="ddpm" if size == "cpu" else None,
        )
        for steps in (4, 3, 5, 10)
        for divergence in DIVERGENCES
    ]
    # how far two trainings of one divergence lie apart
    again = [
        replace(gan, name=f"{gan.name}_seed{seed}", flags=(*gan.flags, "--seed", str(seed)))
        for seed in (1, 2)
        for gan in gans[: len(DIVERGENCES)]
    ]
    one_and_two = Measurement("few_calls", 2, ("--sweep", "num_inference_steps=1,2"), all_images=True)
    in_four = (Measurement("ddgan", 4, (), all_images=True),)
    # there are no such recipes for a GPU yet
    from_ddpm = [
        Cell("distilled", "train_distillation.py", recipe("distillation"), (one_and_two,), start="ddpm"),
        Cell("ddgan_denoiser_t4", "train_ddgan.py", recipe("ddgan_denoiser"), in_four, start="ddpm"),
    ]
    cells = [
        Cell("ddpm", "train_ddpm.py", recipe("ddpm"), (ddim, ddim_4, *untrained, *map(ancestral, (50, 300, 1000)))),
        Cell("classifier", "train_classifier.py", recipe("classifier")),
        Cell("guidance", None, measurements=(guidance,), model="ddpm", guide="classifier"),
        *(from_ddpm if size == "cpu" else ()),
        *gans,
        *again,
        *shorter,
    ]
    return {cell.name: cell for cell in cells}


# --- run ------------------------------------------------------------------------------------------


def train(cell: Cell, parent: Path, options: argparse.Namespace) -> None:
    """Train to the end, from the newest checkpoint where there is one.

    A trained cell is left alone.
    """
    folder = parent / cell.name
    # the card is the last thing that a training writes
    if cell.script is None or (folder / "README.md").is_file():
        return
    words = [*cell.flags, "--output_dir", str(folder), "--resume_from_checkpoint", "latest"]
    if cell.start is not None:
        words += ["--init_from", str(parent / cell.start)]
    if options.train_data_dir is not None:
        words += ["--dataset_name", "none", "--train_data_dir", options.train_data_dir]
    if options.max_train_steps is not None:
        words += ["--max_train_steps", str(options.max_train_steps)]
    launch(["accelerate.commands.launch", str(HERE / cell.script), *words])


def measure(cell: Cell, parent: Path, options: argparse.Namespace) -> None:
    """Draw and measure, from the images that are there already.

    What was measured by the same command is left alone.
    """
    for measurement in cell.measurements:
        folder = parent / cell.name / "measurements" / measurement.name
        affordable = max(FEWEST_IMAGES, options.network_calls // measurement.calls)
        count = options.num_images if measurement.all_images else min(options.num_images, affordable)
        words = [str(parent / (cell.model or cell.name)), *measurement.words, "--num_images", str(count)]
        words += ["--metrics", "fd,pr,label_accuracy", "--features", options.features, "--dtype", options.dtype]
        words += ["--output_dir", str(folder)]
        if cell.guide is not None:
            words += ["--guide_by", str(parent / cell.guide)]
        if options.train_data_dir is not None:
            words += ["--train_data_dir", options.train_data_dir]
        done = folder / "command.json"
        if done.is_file() and json.loads(done.read_text()) == words:
            continue
        launch(["hf_diffusion.cli", "evaluate", *words])
        partial = done.with_suffix(".partial")
        partial.write_text(json.dumps(words))
        os.replace(partial, done)


def launch(words: list[str]) -> None:
    """Run a module in a process of its own, which ends this one where it fails."""
    print(f"+ python -m {shlex.join(words)}", flush=True)
    status = subprocess.run([sys.executable, "-m", *words]).returncode
    # its reader has gone, and is that of the study
    if status == 128 + signal.SIGPIPE:
        raise SystemExit(status)
    if status:
        raise SystemExit(f"this command of the study ended with status {status}: {shlex.join(words)}")


def run(options: argparse.Namespace) -> None:
    """`run`: train and measure the cells, in the order of the list."""
    cells, parent = study_cells(options.size), options.output_dir / options.size
    chosen = list(cells) if options.cells == ["all"] else options.cells
    if unknown := [name for name in chosen if name not in cells]:
        raise SystemExit(
            f"study_fashion_mnist.py: there is no cell {unknown[0]!r}; choose from {', '.join(cells)}, all"
        )
    for cell in (cell for name, cell in cells.items() if name in chosen):
        for name in (cell.model, cell.guide, cell.start):
            if name is not None and name not in chosen and not (parent / name / "README.md").is_file():
                raise SystemExit(
                    f"study_fashion_mnist.py: {cell.name} needs {name}, which is not trained; run it, too"
                )
        train(cell, parent, options)
        measure(cell, parent, options)
    report(options)


# --- report ---------------------------------------------------------------------------------------


def collect(parent: Path, cells: dict[str, Cell]) -> list[dict]:
    """One row for each measured setting of the cells that lie in `parent`."""
    rows = []
    for cell in cells.values():
        for measurement in cell.measurements:
            file = parent / cell.name / "measurements" / measurement.name / "metrics.json"
            if file.is_file():
                trained = (cell.start, cell.model or cell.name)
                minutes = [training_minutes(parent / name) for name in trained if name is not None]
                results = json.loads(file.read_text(encoding="utf-8"))["results"]
                rows += [row(cell, result, minutes) for result in results]
    return rows


def training_minutes(folder: Path) -> float | None:
    """Minutes that the optimizer's steps took, without samples and measurements, from the rates in
    metrics.jsonl.
    """
    file, config = folder / "metrics.jsonl", folder / "config.yaml"
    if not file.is_file() or not config.is_file():
        return None
    settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    batch = settings["train_batch_size"] * settings.get("gradient_accumulation_steps", 1)
    seconds = before = 0.0
    for line in file.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if "images_per_second" in record:
            seconds += (record["step"] - before) * batch / record["images_per_second"]
            before = record["step"]
    return seconds / 60


def row(cell: Cell, result: dict, minutes: list[float | None]) -> dict:
    """What the table says of one result; guidance without a classifier needs two network calls a
    step.

    `minutes` are those of the trainings that the network went through.
    """
    protocol, settings, measures = result["protocol"], result["settings"], result["measures"]
    sampling = protocol["sampling"]
    steps = sampling["options"].get("num_inference_steps") or sampling["sampler_config"]["num_train_timesteps"]
    scale = sampling["options"].get("guidance_scale", 1.0)
    free = sampling["pipeline"] == "ClassifierFreeGuidancePipeline"
    if sampling["sampler"].startswith("DDIM") and "guidance" not in settings:
        settings = {"eta": sampling["sampler_config"].get("eta", 0.0)} | settings
    if scale != 1 and "guidance_scale" not in settings:
        settings = {"guidance_scale": scale} | settings
    if sampling["options"].get("timesteps"):
        settings = {"timesteps": "/".join(map(str, sampling["options"]["timesteps"]))} | settings
    return {
        "cell": cell.name,
        "sampler": next(name for part, name in SAMPLERS.items() if part in sampling["sampler"]),
        "settings": ", ".join(f"{name} {value}" for name, value in settings.items() if name != "num_inference_steps"),
        "network_calls": steps * (2 if free and scale != 1 else 1),
        "images": protocol["count"],
        "seconds_per_1000": None if result["seconds_per_image"] is None else 1000 * result["seconds_per_image"],
        **{
            name: measures[name]["value"]
            for name in ("fd", "precision", "recall", "label_accuracy")
            if name in measures
        },
        "training_minutes": minutes,
        "fd_name": measures["fd"]["name"],
        "fd_error": measures["fd"]["error"],
    }


def table(rows: list[dict]) -> str:
    """The rows in Markdown."""
    lines = [
        "| cell | sampler | settings | network calls | N | FD | precision | recall | label accuracy "
        "| s / 1,000 images | training, min |"
    ]
    lines += ["|" + " --- |" * 11]
    for r in rows:
        error = f" ± {r['fd_error']:.2g}" if r["fd_error"] else ""
        shares = " | ".join(
            f"{r[name]:.3f}" if name in r else "" for name in ("precision", "recall", "label_accuracy")
        )
        seconds = "" if r["seconds_per_1000"] is None else f"{r['seconds_per_1000']:.1f}"
        minutes = " + ".join(f"{value:.0f}" for value in r["training_minutes"] if value is not None)
        lines.append(
            f"| {r['cell']} | {r['sampler']} | {r['settings']} | {r['network_calls']} | {r['images']:,} "
            f"| {r['fd']:.3g}{error} | {shares} | {seconds} | {minutes} |"
        )
    return "\n".join(lines) + "\n"


def lines_of(rows: list[dict]) -> dict[str, list[dict]]:
    """The rows by the line of the figure that they lie on: of one model, sampler, eta and N.

    GANs of one divergence share a line, for their numbers of steps are what it is drawn against. A
    distance from fewer images is larger for that alone, so a line joins no two numbers of images.
    """
    lines: dict[str, list[dict]] = {}
    for r in rows:
        # scales are no matter of time, and seeds are for the table
        if r["cell"] == "guidance" or "_seed" in r["cell"]:
            continue
        kind = r["sampler"]
        # what was measured beside the cells has their names, a comma, and what differs
        cell, comma, beside = r["cell"].partition(", ")
        if cell.startswith("ddgan"):
            kind = f"DDGAN, {cell.split('_', 1)[1].rsplit('_', 1)[0]}"
        if cell.startswith("ddpm_t"):
            kind += f", trained with T = {cell.removeprefix('ddpm_t')}"
        kind += comma + beside
        settings = f", {r['settings']}" if r["settings"] else ""
        lines.setdefault(f"{kind}{settings}, N {r['images']:,}", []).append(r)
    return lines


def figure(rows: list[dict], axis: str, folder: Path) -> None:
    """quality_against_AXIS.png: distance against sampling time or calls, see `lines_of`."""
    from matplotlib.figure import Figure

    lines, path, (key, meaning) = lines_of(rows), folder / f"quality_against_{axis}.png", AXES[axis]
    drawing = Figure(figsize=(9, 5.5), dpi=160, layout="constrained")
    axes = drawing.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92", linewidth=0.8)
    for number, (label, points) in enumerate(lines.items()):
        points = sorted((p for p in points if p[key]), key=lambda p: p[key])
        x, y = [p[key] for p in points], [p["fd"] for p in points]
        # colours begin again after ten, and then have other marks
        mark = "os^DvPX*hd"[(number + 3 * (number // 10)) % 10]
        axes.plot(x, y, marker=mark, markersize=5, linewidth=1.3, label=label)
        for p in points:
            place = (p[key], p["fd"])
            axes.annotate(f"{p['network_calls']}", place, (4, 4), textcoords="offset points", fontsize=7)
    axes.set(xscale="log", yscale="log", xlabel=meaning)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_ylabel("Frechet distance, lower is better")
    axes.legend(frameon=False, fontsize=8)
    partial = path.with_suffix(".partial.png")
    drawing.savefig(partial)
    os.replace(partial, path)


def report(options: argparse.Namespace) -> None:
    """`report`: study.md, study.json and a picture for each of AXES from what was measured."""
    parent = options.output_dir / options.size
    rows = collect(parent, study_cells(options.size))
    if not rows:
        raise SystemExit(f"study_fashion_mnist.py: nothing is measured in {parent} yet; give `run` and a cell")
    names = sorted({r["fd_name"] for r in rows})
    contents = {
        "study.md": table(rows) + "\n" + "".join(f"FD: {name}\n" for name in names),
        "study.json": json.dumps(rows, indent=1),
    }
    for name, content in contents.items():
        partial = parent / f".{name}.partial"
        partial.write_text(content, encoding="utf-8")
        os.replace(partial, parent / name)
    if any(r["cell"] != "guidance" for r in rows):
        for axis in AXES:
            figure(rows, axis, parent)
    print(contents["study.md"] + f"written: {parent}/study.md, study.json, quality_against_*.png")


@ending_with_its_reader()
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="study_fashion_mnist.py", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("action", choices=("list", "run", "report"))
    parser.add_argument("cells", nargs="*", help="for run: names from the list, or all")
    parser.add_argument("--size", choices=("cpu", "gpu"), default="cpu", help="recipes for two cores, or for one GPU")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/study"))
    parser.add_argument("--train_data_dir", help="the data as a parquet file, instead of those of the Hub")
    parser.add_argument("--features", default="trained", help="as in hf-diffusion evaluate; one file for all cells")
    parser.add_argument("--dtype", default="float32", help="as in hf-diffusion evaluate")
    parser.add_argument("--num_images", type=int, default=10_000, help="images a measurement")
    parser.add_argument(
        "--network_calls",
        type=int,
        default=2_000_000,
        help=f"fewer images, down to {FEWEST_IMAGES}, where a measurement would take more calls a setting",
    )
    parser.add_argument("--max_train_steps", type=int, help="shorten every training, to try the study out")
    options = parser.parse_args(argv)
    if options.action == "list":
        for cell in study_cells(options.size).values():
            print(f"{cell.name:28} {cell.script or '':20} {', '.join(m.name for m in cell.measurements)}")
    elif options.action == "report":
        report(options)
    elif not options.cells:
        parser.error("run needs the names of cells, or all; `list` shows them")
    else:
        run(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
