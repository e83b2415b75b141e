"""What `hf-diffusion evaluate` leaves behind: metrics.json, a table, the figures of a sweep and of the bound, results in the card."""

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hf_diffusion.evaluation.measures import Measure
from hf_diffusion.evaluation.model_measures import BoundMeasure


COLOURS = ["#31688e", "#d1495b", "#1f9e89", "#8a5a9e", "#b8860b", "#555555"]  # apart also for colour-blind readers
MARKERS = ["o", "s", "^", "D", "v", "P"]
SHORT = {"fd": "FD", "kd": "KD", "label_accuracy": "label accuracy", "precision": "precision", "recall": "recall"}
LONG = {"num_inference_steps": "sampling steps", "seconds_per_image": "seconds an image"}


def write_metrics(path: Path, report: dict[str, Any]) -> None:
    """Write the report as JSON, by an atomic rename; measures become name, value and error."""

    def plain(value: Any) -> Any:
        if isinstance(value, Measure | BoundMeasure):
            return plain(asdict(value))
        if isinstance(value, dict):
            return {str(key): plain(entry) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return [plain(entry) for entry in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value  # NaN is no JSON

    content = json.dumps(plain(report), indent=2, ensure_ascii=False, allow_nan=False)
    _replace(path, lambda partial: partial.write_text(content + "\n", encoding="utf-8"))


def table(results: list[dict[str, Any]]) -> str:
    """The results of all settings as lines of text: what was varied, seconds an image, each measure with its error."""
    settings = list(dict.fromkeys(name for result in results for name in result["settings"]))
    measures = list(dict.fromkeys(name for result in results for name in result["measures"]))
    timed = any(result["seconds_per_image"] is not None for result in results)
    rows = [[*settings, *(["s/image"] if timed else []), *(SHORT.get(name, name) for name in measures)]]
    for result in results:
        seconds = result["seconds_per_image"]
        row = [str(result["settings"].get(name, "")) for name in settings]
        row += [f"{seconds:.3g}"] if timed else []
        rows.append(row + [_with_error(result["measures"][name]) for name in measures])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows)


def _with_error(measure: Measure) -> str:
    """A value to the place of its error's second digit, both to four digits where there is no error."""
    if measure.error is None or not math.isfinite(measure.error) or measure.error == 0:
        return f"{measure.value:.4g}"
    places = max(0, 1 - math.floor(math.log10(measure.error)))
    return f"{measure.value:.{places}f} ± {measure.error:.{places}f}"


def sweep_figure(results: list[dict[str, Any]], path: Path, title: str) -> Path | None:
    """Draw each measure against what was varied, beside it, where that is the number of steps, against seconds; None for nothing to draw."""
    from matplotlib.figure import Figure  # here, since it takes a second

    varied = [n for n in results[0]["settings"] if len({str(r["settings"].get(n)) for r in results}) > 1]
    numeric = [n for n in varied if all(isinstance(r["settings"].get(n), int | float) for r in results)]
    if not numeric:
        return None
    across = "num_inference_steps" if "num_inference_steps" in numeric else numeric[0]
    lines: dict[str, list[dict[str, Any]]] = {}
    for result in sorted(results, key=lambda r: r["settings"][across]):
        label = ", ".join(f"{_spoken(name)} {result['settings'][name]}" for name in varied if name != across)
        lines.setdefault(label, []).append(result)
    measures = list(results[0]["measures"])
    columns = (across, "seconds_per_image") if across == "num_inference_steps" else (across,)
    figure = Figure(figsize=(7 + len(columns), 0.9 + 2.7 * len(measures)), dpi=160, layout="constrained")
    panels = figure.subplots(len(measures), len(columns), squeeze=False, sharey="row", sharex="col")
    for row, name in enumerate(measures):
        for column, x in enumerate(columns):
            _panel(panels[row, column], lines, name, x)
        panels[row, 0].set_ylabel(_wrapped(results[0]["measures"][name].name))
    for column, x in enumerate(columns):
        panels[-1, column].set_xlabel(_spoken(x))
    if any(lines):
        figure.legend(*panels[0, 0].get_legend_handles_labels(), frameon=False, loc="outside upper right", ncols=3)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    return _replace(path, lambda partial: figure.savefig(partial, format="png"))


def _panel(axes, lines: dict[str, list[dict[str, Any]]], name: str, x: str) -> None:
    _dress(axes)
    for place, (label, results) in enumerate(lines.items()):
        where = [r["seconds_per_image"] if x == "seconds_per_image" else r["settings"][x] for r in results]
        values = [r["measures"][name].value for r in results]
        errors = [r["measures"][name].error or 0.0 for r in results]
        style = {"color": COLOURS[place % 6], "marker": MARKERS[place % 6], "markersize": 4, "linewidth": 1.5}
        axes.errorbar(where, values, yerr=errors, capsize=2, elinewidth=0.8, label=label, **style)
    if x in LONG:  # both range over powers of ten
        axes.set_xscale("log")
        _plain_log_ticks(axes.xaxis)
    values = [r["measures"][name].value for results in lines.values() for r in results]
    if name in ("fd", "kd") and min(values) > 0 and max(values) > 5 * min(values):
        axes.set_yscale("log")
        _plain_log_ticks(axes.yaxis)


def _plain_log_ticks(axis) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _dress(axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)


def _spoken(name: str) -> str:
    return LONG.get(name, name.replace("_", " "))


def _wrapped(name: str) -> str:
    """A measure's name in lines that fit beside a panel."""
    import textwrap

    return "\n".join(textwrap.wrap(name, 34))


def bound_figure(bound: BoundMeasure, path: Path) -> Path:
    """Draw the term of each timestep in bits per dimension, with prior and total in the title."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=160, layout="constrained")
    axes = figure.subplots()
    _dress(axes)
    positive = [(t, v) for t, v in zip(bound.timesteps, bound.terms) if v > 0]
    axes.plot(*zip(*positive), color=COLOURS[0], linewidth=1.5, marker="o", markersize=2.5)
    axes.set_yscale("log")
    axes.set_xlabel("timestep (0 is the least noise)")
    axes.set_ylabel("bits per dimension")
    axes.set_xlim(left=0)
    title = f"{_with_error(bound.total)} in all, of which prior {bound.prior.value:.2g}; {bound.count} images"
    axes.set_title(title, fontsize=10, loc="left")
    return _replace(path, lambda partial: figure.savefig(partial, format="png"))


def protocol_text(protocol: dict[str, Any]) -> str:
    """A protocol as one line for a card."""
    sampling, reference, features = protocol.get("sampling"), protocol.get("reference"), protocol.get("features")
    parts = [f"{protocol['count']:,} images"]
    if features:
        parts.append(f"features {features['name']} (sha256 {features['sha256'][:12]})")
    if reference:
        parts.append(
            f"against {reference['images']:,} of {reference['name']}/{reference['split']}, resize: {reference['resize']}"
        )
    if held_out := protocol.get("held_out"):
        where = f"{held_out['name']}/{held_out['split']}, resize: {held_out['resize']}"
        parts.append(
            f"held out, {where}; one fixed noise and timestep in each quartile (seed {protocol['noise_seed']})"
        )
    if sampling:
        used = {
            "eta": sampling.get("sampler_config", {}).get("eta")
        }  # the scheduler's own, unless the call said another
        used |= {name: value for name, value in sampling["options"].items() if value is not None}
        options = ", ".join(f"{name} {value}" for name, value in used.items() if value is not None)
        parts.append(
            ", ".join(filter(None, (sampling["sampler"], options, f"{sampling['dtype']} on {sampling['device']}")))
        )
    if protocol.get("seeds"):
        parts.append(f"seeds {protocol['seeds'][0]} to {protocol['seeds'][1]}")
    return "; ".join(parts)


def card_results(results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The measures of all settings in the form of `write_model_card`: name -> value, error and protocol."""
    entries = {}
    for result in results:
        varied = ", ".join(f"{_spoken(name)} {value}" for name, value in result["settings"].items())
        for measure in result["measures"].values():
            entry = {"value": measure.value, "protocol": protocol_text(result["protocol"])}
            if measure.error is not None and math.isfinite(measure.error):
                entry["standard_error"] = measure.error
            entries[f"{measure.name}" + (f", {varied}" if varied else "")] = entry
    return entries


def _replace(path: Path, write: Callable[[Path], Any]) -> Path:
    partial = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path
