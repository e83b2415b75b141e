"""The curves of metrics.jsonl over the optimizer steps, drawn by matplotlib."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hf_diffusion.files import write_whole


if TYPE_CHECKING:
    from matplotlib.axes import Axes


# An ordered quantity in an ordered palette: viridis, its yellow end darkened to show on white.
ORDERED = ("#440154", "#31688e", "#1f9e89", "#9fb80f")
UNORDERED = ("#440154", "#1f9e89", "#d1495b", "#31688e")
HELD_OUT = {"linestyle": "--", "linewidth": 1.2, "marker": "o", "markersize": 3.5}
# Of fewer points the running mean would hide the values beside it, and is left out.
FEWEST_SMOOTHED = 80


@dataclass(frozen=True)
class Panel:
    """One panel of a figure: the quantities of metrics.jsonl that it shows, and how.

    label: of the y axis.
    keys: what the legend calls a quantity, by its key. One that is recorded as "eval_" + key, too,
        is drawn dashed.
    colours: of the quantities, repeated where there are more of them.
    bottom, top: of the y axis; None follows the values.
    line: a value worth a dotted line, such as that of chance.
    height: relative to other panels.
    legend: title of the legend, where there is more than the first quantity.
    logarithmic: show a positive quantity that falls to a third or less on a logarithmic axis.
    """

    label: str
    keys: Mapping[str, str]
    colours: Sequence[str] = ("black", *UNORDERED)
    bottom: float | None = None
    top: float | None = None
    line: float | None = None
    height: float = 1.0
    legend: str | None = None
    logarithmic: bool = False


QUARTERS = {
    "loss_q0": "1st quarter (least noise)",
    "loss_q1": "2nd quarter",
    "loss_q2": "3rd quarter",
    "loss_q3": "4th quarter (most noise)",
}
LEARNING_RATE = Panel("learning rate", {"lr": ""}, bottom=0, height=1)
# Panels without a recorded quantity are left out: a classifier has accuracies, a denoiser none.
LOSS_PANELS = (
    Panel("loss", {"loss": "all", **QUARTERS}, ("black", *ORDERED), height=4, legend="noise level", logarithmic=True),
    Panel("accuracy", {"top1": "first", "top5": "among the first five"}, bottom=0, top=1, height=2.5),
    LEARNING_RATE,
)
ADVERSARIAL_PANELS = (
    Panel("loss", {"loss_d": "discriminator", "loss_g": "generator"}, UNORDERED, height=3),
    # Where real and generated samples cannot be told apart, half of the guesses are right.
    Panel("told apart", {"right": ""}, bottom=0, top=1, line=0.5, height=2),
    Panel("max |V|", {"max_abs_v": ""}, bottom=0, height=2),
)
AUTOENCODER_PANELS = (
    Panel("error", {"l1": "|x - r|", "perceptual": "perceptual"}, height=3, logarithmic=True),
    Panel("critic's loss", {"loss_d": ""}, bottom=0, height=2),
    Panel("told apart", {"right": ""}, bottom=0, top=1, line=0.5, height=2),
    LEARNING_RATE,
)
MATCHING_PANELS = (
    Panel("student's loss", {"loss": ""}, height=3),
    Panel("denoising", {"denoising": ""}, bottom=0, height=2),
    Panel("told apart", {"right": ""}, bottom=0, top=1, line=0.5, height=2),
    LEARNING_RATE,
)


def loss_curve(metrics_jsonl: str | os.PathLike, out_png: str | os.PathLike) -> Path | None:
    """Draw loss, accuracy and learning rate where they are recorded; see `plot_curves`."""
    return plot_curves(metrics_jsonl, out_png, LOSS_PANELS)


def adversarial_curve(metrics_jsonl: str | os.PathLike, out_png: str | os.PathLike) -> Path | None:
    """Draw losses of a GAN, what its discriminator tells apart, max |V|; see `plot_curves`."""
    return plot_curves(metrics_jsonl, out_png, ADVERSARIAL_PANELS)


def autoencoder_curve(metrics_jsonl: str | os.PathLike, out_png: str | os.PathLike) -> Path | None:
    """Draw errors of reconstructions, and what a critic tells apart; see `plot_curves`."""
    return plot_curves(metrics_jsonl, out_png, AUTOENCODER_PANELS)


def matching_curve(metrics_jsonl: str | os.PathLike, out_png: str | os.PathLike) -> Path | None:
    """Draw a student's loss, its fake denoiser's, and what is told apart; see `plot_curves`."""
    return plot_curves(metrics_jsonl, out_png, MATCHING_PANELS)


def plot_curves(
    metrics_jsonl: str | os.PathLike, out_png: str | os.PathLike, panels: Sequence[Panel] = LOSS_PANELS
) -> Path | None:
    """Draw the panels over the optimizer steps; None where the first panel has nothing recorded.

    metrics.jsonl has one JSON object a line with `step` and whatever quantities there are. Lines
    cut off by a crash and values that are not finite are left out. Where a resumed run went back,
    its steps count.
    """
    # Here, since matplotlib takes a second to import and a run that ends early needs none of it.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    records = read_metrics(metrics_jsonl)
    if not any(len(series(records, key)[0]) for key in panels[0].keys):
        return None
    panels = [panel for panel in panels if any(len(series(records, key)[0]) for key in panel.keys)]
    heights = [panel.height for panel in panels]
    figure = Figure(figsize=(8, 1.2 + 0.8 * sum(heights)), dpi=160, layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for place, panel in zip(axes, panels):
        _draw(place, panel, records)
    axes[-1].xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    axes[-1].set_xlabel("optimizer step")
    return write_whole(out_png, lambda file: figure.savefig(file, format="png"))


def _draw(axes: "Axes", panel: Panel, records: list[dict]) -> None:
    from hf_diffusion.figures.axes import dress, plain_log_ticks

    dress(axes, panel.label)
    drawn, with_held_out = [], False
    for number, (key, name) in enumerate(panel.keys.items()):
        colour, above = panel.colours[number % len(panel.colours)], 3 - 0.1 * number
        steps, values = series(records, key)
        if len(values):
            # Of many quantities only the first is shown as logged, or the noise would cover the
            # others.
            as_logged = number == 0 or len(panel.keys) == 2
            _draw_quantity(axes, steps, values, name, colour, as_logged, above)
        held_out_steps, held_out = series(records, f"eval_{key}")
        if len(held_out):
            # One entry of the legend is enough: the others have the colours of the training's.
            label = None if with_held_out else "held out"
            axes.plot(held_out_steps, held_out, color=colour, label=label, zorder=above, **HELD_OUT)
            with_held_out = True
        drawn += [values, held_out]
    everything = np.concatenate(drawn)
    if panel.logarithmic and everything.min() > 0 and everything.max() > 3 * everything.min():
        axes.set_yscale("log")
        plain_log_ticks(axes.yaxis)
    if panel.bottom is not None:
        axes.set_ylim(bottom=panel.bottom)
    if panel.top is not None:
        axes.set_ylim(top=panel.top)
    if panel.line is not None:
        axes.axhline(panel.line, color="0.5", linewidth=0.8, linestyle=":")
    if len(axes.get_legend_handles_labels()[0]) > 1:
        title = panel.legend if len(drawn) > 2 and any(map(len, drawn[2:])) else None
        axes.legend(title=title, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _draw_quantity(
    axes: "Axes", steps: np.ndarray, values: np.ndarray, name: str, colour: str, as_logged: bool, above: float
) -> None:
    label = name or None
    if len(values) < FEWEST_SMOOTHED:
        # A line of few points shows its points; one of one point would be invisible without.
        marker = "o" if len(values) < 20 else None
        axes.plot(steps, values, color=colour, linewidth=1.4, marker=marker, markersize=3, label=label, zorder=above)
        return
    if as_logged:
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8, label=label and f"{name}, as logged")
        label = label and f"{name}, smoothed"
    axes.plot(steps, _smooth(values), color=colour, linewidth=1.8, label=label, zorder=above)


def read_metrics(path: str | os.PathLike) -> list[dict]:
    """The records in order of step; a run that went back discards what it repeats."""
    records: list[dict] = []
    if not Path(path).is_file():
        return records
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        # A crash in the middle of a line.
        except json.JSONDecodeError:
            continue
        if not isinstance(record, dict) or not isinstance(record.get("step"), int | float):
            continue
        while records and records[-1]["step"] > record["step"]:
            records.pop()
        # The training's and the evaluation's records of one step.
        if records and records[-1]["step"] == record["step"]:
            record = records.pop() | record
        records.append(record)
    return records


def series(records: Sequence[Mapping], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one quantity where it is there and finite."""
    points = [
        (record["step"], float(record[key]))
        for record in records
        if isinstance(record.get(key), int | float) and math.isfinite(record[key])
    ]
    steps, values = np.array(points, dtype=float).reshape(-1, 2).T
    return steps, values


def _smooth(values: np.ndarray) -> np.ndarray:
    """The running mean over 5 % of the points, over fewer at the two ends."""
    half = len(values) // 40
    sums = np.concatenate([[0.0], np.cumsum(values)])
    centre = np.arange(len(values))
    # Shrinks evenly on both sides, so that the ends are not dragged.
    reach = np.minimum(half, np.minimum(centre, len(values) - 1 - centre))
    return (sums[centre + reach + 1] - sums[centre - reach]) / (2 * reach + 1)
