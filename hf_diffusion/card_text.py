"""What is known about a run as the sentence and the tables of its card."""

from collections.abc import Mapping
from typing import Any


NOT_IN_TABLES = (
    "class_names",
    "license",
    "command",
    "versions",
    "git_commit",
    "git_dirty",
    "git_repository",
    "wall_time_s",
    "energy",
    "data_card",
    "considerations",
)
JOULES_A_KWH = 3.6e6


def summary_of(kind: str, data: dict[str, Any], training: dict[str, Any]) -> str:
    text = f"A {kind}"
    if data.get("size"):
        text += f" of {'x'.join(map(str, data['size']))}" + ("" if kind.endswith("images") else " images")
    if training.get("parameters"):
        text += f" with {_readable_count(training['parameters'])} parameters"
    text += ", trained with hf_diffusion"
    text += f" on {data['name']}" if data.get("name") else ""
    return text + (f" for {training['steps']:,} steps." if training.get("steps") else ".")


def tables_of(data: dict[str, Any], training: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Heading and rows of each table that has any."""
    run = _rows(training)
    if training.get("wall_time_s") is not None:
        run.append(("wall time", _readable_time(training["wall_time_s"])))
    if training.get("energy"):
        run.append(("energy", _readable_energy(training["energy"])))
    if training.get("git_commit"):
        changed = ", with uncommitted changes" if training.get("git_dirty") else ""
        repository = f" of {training['git_repository']}" if training.get("git_repository") else ""
        run.append(("git commit", f"`{training['git_commit']}`{repository}{changed}"))
    versions = [(name, str(version)) for name, version in training.get("versions", {}).items()]
    return [(heading, rows) for heading, rows in [("run", run), ("data", _rows(data)), ("versions", versions)] if rows]


def _rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    shown = {name: value for name, value in facts.items() if value not in (None, [], {}) and name not in NOT_IN_TABLES}
    return [
        (cell(name.replace("_", " ")), cell(value)) for name, value in shown.items() if not isinstance(value, dict)
    ]


def cell(value: Any) -> str:
    """A value as one cell of a Markdown table."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(cell, value))
    text = f"{value:,}" if isinstance(value, int) else f"{value:.6g}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", "\\|").split())


def class_list(names: list[str] | None) -> str:
    shown = ", ".join(
        f"{number} {name}" if str(number) != name else name for number, name in enumerate((names or [])[:40])
    )
    return f"{shown}, and {len(names) - 40} more" if names and len(names) > 40 else shown


def _readable_count(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count:,}"


def _readable_time(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min" if seconds >= 120 else f"{seconds:.0f} s"


def _readable_energy(joules: Mapping[str, float]) -> str:
    parts = [f"{value / JOULES_A_KWH:.3g} kWh {source}" for source, value in joules.items()]
    total = f"{sum(joules.values()) / JOULES_A_KWH:.3g} kWh: " if len(joules) > 1 else ""
    return total + ", ".join(parts)
