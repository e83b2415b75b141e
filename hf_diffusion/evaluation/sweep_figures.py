"""Figures of an evaluation: measures against what was varied, and the parts of a measure."""

import math
import textwrap
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from hf_diffusion.evaluation.measures import Measure
from hf_diffusion.evaluation.report import SPOKEN, spoken, with_error
from hf_diffusion.files import write_whole


# Apart also for colour-blind readers.
COLOURS = ["#31688e", "#d1495b", "#1f9e89", "#8a5a9e", "#b8860b", "#555555"]
MARKERS = ["o", "s", "^", "D", "v", "P"]


def sweep_figure(results: list[dict[str, Any]], path: Path, title: str) -> Path | None:
    """Draw each measure against what was varied; None where nothing numeric was.

    Beside it, where the number of steps was varied, each is drawn against seconds.
    """
    varied = [n for n in results[0]["settings"] if len({str(r["settings"].get(n)) for r in results}) > 1]
    numeric = [n for n in varied if all(isinstance(r["settings"].get(n), int | float) for r in results)]
    if not numeric:
        return None
    across = "num_inference_steps" if "num_inference_steps" in numeric else numeric[0]
    lines: dict[str, list[dict[str, Any]]] = {}
    for result in sorted(results, key=lambda r: r["settings"][across]):
        label = ", ".join(f"{spoken(name)} {result['settings'][name]}" for name in varied if name != across)
        lines.setdefault(label, []).append(result)
    measures = list(results[0]["measures"])
    columns = (across, "seconds_per_image") if across == "num_inference_steps" else (across,)
    figure = Figure(figsize=(7 + len(columns), 0.9 + 2.7 * len(measures)), dpi=160, layout="constrained")
    panels = figure.subplots(len(measures), len(columns), squeeze=False, sharey="row", sharex="col")
    for row, name in enumerate(measures):
        for column, x in enumerate(columns):
            _panel(panels[row, column], lines, name, x)
        panels[row, 0].set_ylabel("\n".join(textwrap.wrap(results[0]["measures"][name].name, 34)))
    for column, x in enumerate(columns):
        panels[-1, column].set_xlabel(spoken(x))
    if any(lines):
        figure.legend(*panels[0, 0].get_legend_handles_labels(), frameon=False, loc="outside upper right", ncols=3)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    return _save(figure, path)


def breakdown_figure(measure: Measure, path: Path) -> Path:
    """Draw the parts of a measure that has a `breakdown`, with the whole in the title."""
    parts = measure.breakdown
    figure = Figure(figsize=(7, 4), dpi=160, layout="constrained")
    axes = figure.subplots()
    _dress(axes)
    drawn = [k for k, value in enumerate(parts.values) if value > 0] or range(len(parts.values))
    x, y = ([column[k] for k in drawn] for column in (parts.places, parts.values))
    axes.plot(x, y, color=COLOURS[0], linewidth=1.5, marker="o", markersize=2.5)
    if min(y) > 0 and max(y) > 5 * min(y):
        axes.set_yscale("log")
    axes.set_xlabel(parts.along)
    axes.set_ylabel(parts.unit)
    axes.set_title(f"{measure.name}: {with_error(measure)}", fontsize=10, loc="left")
    return _save(figure, path)


def _panel(axes: Axes, lines: dict[str, list[dict[str, Any]]], name: str, x: str) -> None:
    _dress(axes)
    for place, (label, results) in enumerate(lines.items()):
        where = [r["seconds_per_image"] if x == "seconds_per_image" else r["settings"][x] for r in results]
        values = [r["measures"][name].value for r in results]
        errors = [r["measures"][name].error or 0.0 for r in results]
        style = {"color": COLOURS[place % 6], "marker": MARKERS[place % 6], "markersize": 4, "linewidth": 1.5}
        axes.errorbar(where, values, yerr=errors, capsize=2, elinewidth=0.8, label=label, **style)
    # Steps and seconds range over powers of ten.
    if x in SPOKEN:
        axes.set_xscale("log")
        _plain_log_ticks(axes.xaxis)
    measures = [r["measures"][name] for results in lines.values() for r in results]
    values = [measure.value for measure in measures]
    # Distances do, too; shares, which are better high, do not.
    if measures[0].better == "lower" and min(values) > 0 and max(values) > 5 * min(values):
        axes.set_yscale("log")
        _plain_log_ticks(axes.yaxis)


def _plain_log_ticks(axis: Axis) -> None:
    low, high = axis.get_data_interval()
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    fitting = [tick for n in powers for tick in (10.0**n, 2 * 10.0**n, 5 * 10.0**n) if low <= tick <= high]
    # LogLocator takes many even ones where one or none fits, and the labels of many overlap.
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if len(fitting) < 7 else (1,)) if fitting[1:] else MaxNLocator(4))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _dress(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)


def _save(figure: Figure, path: Path) -> Path:
    return write_whole(path, lambda file: figure.savefig(file, format="png"))
