"""Calls that work as they stand, for the "Use" section of a card: found from the files of a saved pipeline or classifier."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


SHOWN_LABELS = 4


@dataclass(frozen=True)
class Use:
    """What a card says about loading and calling what is saved in a folder.

    `kind` is "pipeline", "classifier", or None for anything else. `has_code`: the folder carries the code of its classes. `call` draws
    images with `pipe`. `schedule` are the noise levels that a classifier knows. `class_names` in the order of their numbers.
    """

    kind: str | None
    class_name: str | None
    has_code: bool
    call: str
    schedule: str
    class_names: list[str] | None
    is_conditional: bool


def how_to_use(folder: Path, class_names: list[str] | None = None) -> Use:
    """Read the small files of the folder; `class_names` are those of the data, for a model that does not record them."""
    index, own = _read(folder / "model_index.json"), _read(folder / "config.json")
    network = _read(folder / "unet" / "config.json") or _read(folder / "generator" / "config.json") or {}
    classifier = _read(folder / "classifier" / "config.json") or {}
    if index is not None:
        name = index["_class_name"]
        count = classifier.get("num_classes") or network.get("num_class_embeds")
        recorded = index.get("id2label") or classifier.get("id2label")
        names = _names(recorded, class_names, count)
        pipeline = name[-1] if isinstance(name, list) else name
        conditional = bool(network.get("num_class_embeds"))
        known = names if recorded and names else list(range(count or 0))  # what the call takes
        call = _call(pipeline, network, classifier, known)
        return Use("pipeline", pipeline, isinstance(name, list), call, "", names, conditional)
    if own is not None and own.get("_class_name") == "ADMClassifier":
        names = _names(own.get("id2label"), class_names, own["num_classes"])
        call = _guided(names or list(range(own["num_classes"])))
        return Use("classifier", "ADMClassifier", False, call, _schedule(own.get("noise_schedule")), names, False)
    return Use(None, None, False, "", "", None, False)


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _names(recorded: dict[str, str] | None, of_the_data: list[str] | None, count: int | None) -> list[str] | None:
    """The classes that a model knows; None for one without classes, or with numbers only."""
    if not count:
        return None
    if recorded:
        return [recorded[number] for number in sorted(recorded, key=int)]
    return of_the_data if of_the_data and len(of_the_data) == count else None


def _call(pipeline: str, network: dict[str, Any], classifier: dict[str, Any], labels: list[str] | list[int]) -> str:
    if pipeline == "ClassifierGuidancePipeline" and classifier:
        return _guided(labels)
    if pipeline not in ("ClassifierFreeGuidancePipeline", "ClassifierGuidancePipeline", "DDGANPipeline"):
        return "image = pipe(generator=torch.Generator().manual_seed(0)).images[0]"
    labels = labels[:SHOWN_LABELS] if network.get("num_class_embeds") else []
    arguments = f"class_labels={json.dumps(labels, ensure_ascii=False)}" if labels else f"batch_size={SHOWN_LABELS}"
    if pipeline == "ClassifierGuidancePipeline":  # without a classifier it waits for a guidance_fn of the caller's
        arguments += ", guidance_scale=0.0"
    elif pipeline == "ClassifierFreeGuidancePipeline" and labels and network.get("null_class"):
        arguments += ", guidance_scale=1.5"
    return _with_generators(arguments, len(labels) or SHOWN_LABELS)


def _guided(labels: list[str] | list[int]) -> str:
    labels = labels[:SHOWN_LABELS]
    return _with_generators(f"class_labels={json.dumps(labels, ensure_ascii=False)}, guidance_scale=2.0", len(labels))


def _with_generators(arguments: str, count: int) -> str:
    seeds = f"generators = [torch.Generator().manual_seed(seed) for seed in range({count})]"
    return f"{seeds}\nimages = pipe({arguments}, generator=generators).images"


def _schedule(schedule: dict[str, Any] | None) -> str:
    """The noise schedule as the arguments of a scheduler."""
    return ", ".join(f"{name}={value!r}" for name, value in (schedule or {}).items())
