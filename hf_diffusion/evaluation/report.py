"""What an evaluation leaves in words and numbers: metrics.json, a table, results for the card."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hf_diffusion.evaluation.measures import Measure
from hf_diffusion.evaluation.protocol import protocol_text
from hf_diffusion.files import write_whole


ABBREVIATIONS = {"fd": "FD", "kd": "KD"}
SPOKEN = {"num_inference_steps": "sampling steps", "seconds_per_image": "seconds a sample"}


def write_metrics(path: Path, report: dict[str, Any]) -> None:
    """Write the report as JSON, measures with name, value, error, better, and any breakdown."""
    content = json.dumps(_plain(report), indent=2, ensure_ascii=False, allow_nan=False)
    write_whole(path, content + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, Measure):
        return {k: _plain(v) for k, v in asdict(value).items() if k != "breakdown" or v is not None}
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    # NaN is no JSON.
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(results: list[dict[str, Any]]) -> str:
    """Lines of text: what was varied, seconds a sample, each measure with its error."""
    settings = list(dict.fromkeys(name for result in results for name in result["settings"]))
    measures = list(dict.fromkeys(name for result in results for name in result["measures"]))
    timed = any(result["seconds_per_image"] is not None for result in results)
    header = [ABBREVIATIONS.get(name, name.replace("_", " ")) for name in measures]
    rows = [[*settings, *(["s/image"] if timed else []), *header]]
    for result in results:
        seconds = result["seconds_per_image"]
        row = [str(result["settings"].get(name, "")) for name in settings]
        row += [f"{seconds:.3g}"] if timed else []
        rows.append(row + [with_error(result["measures"][name]) for name in measures])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows)


def with_error(measure: Measure) -> str:
    """A value to the place of its error's second digit, to four digits where it has no error."""
    if measure.error is None or not math.isfinite(measure.error) or measure.error == 0:
        return f"{measure.value:.4g}"
    places = max(0, 1 - math.floor(math.log10(measure.error)))
    return f"{measure.value:.{places}f} ± {measure.error:.{places}f}"


def named(result: dict[str, Any]) -> list[str]:
    """The full name of every measure of a result, and what real data get where that is known."""
    floors = result["protocol"].get("floors", {})
    lines = []
    for key, measure in result["measures"].items():
        beside = f"; real against real: {floor_text(floors[key])}" if key in floors else ""
        lines.append(measure.name + beside)
    return lines


def floor_text(floor: dict[str, Any]) -> str:
    """The value of a `Floor` as a protocol holds it, with its error and both numbers."""
    shown = with_error(Measure("", floor["value"], floor["error"], better="lower"))
    return f"{shown} ({floor['count']:,} against {floor['others']:,} others)"


def spoken(name: str) -> str:
    """The name of a setting as figures and cards say it."""
    return SPOKEN.get(name, name.replace("_", " "))


def card_results(results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The measures of all settings for `write_model_card`: name -> value, error, protocol."""
    entries = {}
    for result in results:
        varied = ", ".join(f"{spoken(name)} {value}" for name, value in result["settings"].items())
        floors = result["protocol"].get("floors", {})
        for key, measure in result["measures"].items():
            entry = {"value": measure.value, "protocol": protocol_text(result["protocol"])}
            if key in floors:
                entry["protocol"] += f"; real against real {floor_text(floors[key])}"
            if measure.error is not None and math.isfinite(measure.error):
                entry["standard_error"] = measure.error
            entries[f"{measure.name}" + (f", {varied}" if varied else "")] = entry
    return entries
