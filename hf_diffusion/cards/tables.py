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
    # In the sentence below the title.
    "kind",
)
JOULES_A_KWH = 3.6e6


def kind_of(data: dict[str, Any]) -> str:
    """The kind of data in the plural, such as images or points; data that do not say are images."""
    return data.get("kind", "images")


def words_of(data: dict[str, Any]) -> tuple[str, str]:
    """What the samples are called: many of them, and one."""
    things = kind_of(data)
    return things, things.removesuffix("s")


def summary_of(kind: str, data: dict[str, Any], training: dict[str, Any]) -> str:
    """The sentence below the title: model, size of a sample, parameters, data and steps."""
    text = f"{'An' if kind[0] in 'aeiou' else 'A'} {kind}{_size(kind, data)}"
    if training.get("parameters"):
        text += f" with {_readable_count(training['parameters'])} parameters"
    text += ", trained with hf_diffusion"
    text += f" on {data['name']}" if data.get("name") else ""
    return text + (f" for {training['steps']:,} steps." if training.get("steps") else ".")


def _size(kind: str, data: dict[str, Any]) -> str:
    """ " of 28x28 images", " of points of 2 numbers"; a kind of model that names its data is not
    told twice.
    """
    things = kind_of(data)
    named = "" if kind.endswith(things) else f" {things}"
    if data.get("size"):
        return f" of {'x'.join(map(str, data['size']))}{named}"
    shape, values = data.get("sample_shape") or (), data.get("values", "numbers")
    size = f" of {shape[0]} {values}" if len(shape) == 1 else f" of shape {'x'.join(map(str, shape))}" if shape else ""
    return f" of{named}{size}" if named and "kind" in data else size


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
