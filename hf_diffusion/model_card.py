"""The model card: what is known about a run, laid out by model_cards/template.md.

Nothing is asked and nothing invented: what is not known is left out. The generated text stands between two markers, and what
people write outside them survives the next run, as do the keys that they add to the metadata.
"""

import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

from hf_diffusion.config.options import config_to_yaml


TEMPLATE = Path(__file__).parent / "model_cards" / "template.md"
START, END = "<!-- hf_diffusion:generated:start -->", "<!-- hf_diffusion:generated:end -->"
NOT_MEASURED = "- The quality of the samples has not been measured."  # two sentences of the template
MEASURED = (
    "- The results hold for the protocol beside them and cannot be compared with figures that were measured otherwise."
)
PIPELINE_TAG = "unconditional-image-generation"  # the Hub knows no task for images of a class
NOT_IN_TABLES = (
    "class_names",
    "license",
    "command",
    "versions",
    "git_commit",
    "git_dirty",
    "git_repository",
    "wall_time_s",
)


def write_model_card(
    folder: str | os.PathLike,
    *,
    config: dict[str, Any],
    data: dict[str, Any],
    training: dict[str, Any],
    metrics: dict[str, Any] | None = None,
    images: Sequence[str] = (),
    curve: str | None = None,
    kind: str = "diffusion model",
    tags: Sequence[str] = ("ddpm",),
    license: str | None = None,
    repo_id: str | None = None,
    revision: str | None = None,
) -> Path:
    """Write or renew README.md in the folder of a saved pipeline or model, by an atomic rename; works without a network.

    config: all settings of the run. data: `describe()` of the data. training: steps, images_seen, wall_time_s, processes,
    global_batch, parameters, command and the like, and what `environment()` tells. metrics: name -> number, or name -> {"value": number,
    "protocol": text, ...}. images, curve: paths relative to the folder. ValueError for a picture that is not there, and for an
    existing card whose markers or metadata are damaged.
    """
    folder = Path(folder)
    for image in [*images, *([curve] if curve else [])]:
        if Path(image).is_absolute() or not (folder / image).is_file():
            raise ValueError(
                f"the card would show {image!r}, which is not a file in {folder}; give paths relative to the folder"
            )
    title = repo_id.split("/")[-1] if repo_id else folder.resolve().name
    pipeline_class, has_code = _pipeline(folder)
    network = _network(folder)
    class_names = (
        data.get("class_names") if network.get("num_class_embeds") else None
    )  # labelled data, unconditional model
    results = _results(metrics)
    card = ModelCard.from_template(
        _metadata(title, config, data, results, tags, license, pipeline_class, has_code, images),
        template_path=str(TEMPLATE),
        title=title,
        summary=_summary(f"class-conditional {kind}" if network.get("num_class_embeds") else kind, data, training),
        images=list(images),
        curve=curve,
        pipeline_class=pipeline_class,
        has_code=has_code,
        call=_call(pipeline_class, network, class_names),
        repo_id=repo_id,
        revision=revision,
        class_names=_class_names(class_names),
        results=[
            {**result, "protocol": _cell(result["protocol"]), "value": f"{result['value']:.6g}"} for result in results
        ],
        command=training.get("command"),
        tables=_tables(data, training),
        config_yaml=config_to_yaml(config).rstrip(),
        data_license=data.get("license"),
        license=license,
    )
    return _merge_into(folder / "README.md", card)


def update_card_results(folder: str | os.PathLike, metrics: dict[str, Any], data_name: str) -> Path:
    """Add results to the card of a saved pipeline, in the place of earlier ones of the same names; `metrics` as for `write_model_card`.

    ValueError where the folder has no card of this package, whose generated part the table belongs to.
    """
    path = Path(folder) / "README.md"
    metadata, text = _read_card(path) if path.is_file() else ({}, "")
    if START not in text:
        raise ValueError(f"{path} is no card of hf_diffusion (it lacks the marker {START}); add the results by hand")
    earlier = model_index_to_eval_results(metadata["model-index"])[1] if metadata.get("model-index") else []
    added = _metadata("", {}, {"name": data_name}, _results(metrics), (), None, None, False).eval_results or []
    merged = [result for result in earlier if result.metric_name not in metrics] + added
    title = re.search(r"^# (.+)$", text, re.MULTILINE)
    metadata["model-index"] = eval_results_to_model_index(title[1] if title else path.parent.resolve().name, merged)
    rows = [
        f"| {r.metric_name} | {r.metric_value:.6g} | {_cell((r.metric_args or {}).get('protocol', ''))} |"
        for r in merged
    ]
    section = "\n".join(["## Results", "", "| measure | value | protocol |", "|---|---|---|", *rows, "", ""])
    start, end = text.index(START), text.index(END)
    block = re.sub(r"^## Results\n.*?(?=^## )", "", text[start:end], flags=re.DOTALL | re.MULTILINE)
    # the template's order: results stand before the curve and the way to reproduce them
    place = re.search(r"^## (Training curve|Reproduce)$", block, re.MULTILINE)
    at = place.start() if place else len(block)
    block = (block[:at] + section + block[at:]).replace(NOT_MEASURED, MEASURED)
    _write_card(path, metadata, text[:start] + block + text[end:])
    return path


def _pipeline(folder: Path) -> tuple[str | None, bool]:
    """Class of the pipeline that is saved in the folder, None if there is none, and whether its code is there too."""
    if not (folder / "model_index.json").is_file():
        return None, False
    name = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
    return (name[-1], True) if isinstance(name, list) else (name, False)


def _network(folder: Path) -> dict[str, Any]:
    """The configuration of the saved pipeline's network; empty where there is none of that name."""
    paths = [folder / part / "config.json" for part in ("unet", "generator")]
    return next((json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()), {})


def _call(pipeline_class: str | None, network: dict[str, Any], class_names: list[str] | None) -> str:
    """A call of the pipeline that works as it stands."""
    if pipeline_class not in ("ClassifierFreeGuidancePipeline", "DDGANPipeline"):
        return "image = pipe(generator=torch.Generator().manual_seed(0)).images[0]"
    labels = class_names or range(network.get("num_class_embeds") or 0)
    labels = list(labels)[:4]
    count = len(labels) or 4
    arguments = f"class_labels={json.dumps(labels, ensure_ascii=False)}" if labels else f"batch_size={count}"
    if labels and network.get("null_class"):
        arguments += ", guidance_scale=1.5"
    seeds = f"generators = [torch.Generator().manual_seed(seed) for seed in range({count})]"
    return f"{seeds}\nimages = pipe({arguments}, generator=generators).images"


def _metadata(
    title: str,
    config: dict[str, Any],
    data: dict[str, Any],
    results: list[dict[str, Any]],
    tags: Sequence[str],
    license: str | None,
    pipeline_class: str | None,
    has_code: bool,
    images: Sequence[str] = (),
) -> ModelCardData:
    dataset = _hub_id(config)
    evaluations = [
        EvalResult(
            task_type=PIPELINE_TAG if pipeline_class else "image-classification",  # a model alone is a classifier
            dataset_type=dataset or "custom",
            dataset_name=str(data.get("name") or dataset or "training data"),
            metric_type=re.sub(r"[^a-z0-9]+", "-", result["name"].lower()).strip("-"),
            metric_name=result["name"],
            metric_value=result["value"],
            metric_args={"protocol": result["protocol"], **result["details"]}
            if result["protocol"]
            else result["details"] or None,
        )
        for result in results
        if math.isfinite(result["value"])  # NaN is no JSON, and the Hub would refuse the whole card
    ]
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag=PIPELINE_TAG if pipeline_class else None,
        license=license,
        datasets=[dataset] if dataset else None,
        tags=["hf_diffusion", *(["custom_code"] if has_code else []), *tags],
        model_name=title if evaluations else None,
        eval_results=evaluations or None,
        widget=[{"text": "samples", "output": {"url": image}} for image in images] or None,  # the Hub's gallery
    )


def _hub_id(config: dict[str, Any]) -> str | None:
    """The data set's id on the Hub; None for the embedded digits and for data of one's own."""
    name = config.get("dataset_name")
    is_id = isinstance(name, str) and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not Path(name).exists()
    return name if is_id and name != "digits" else None


def _results(metrics: dict[str, Any] | None) -> list[dict[str, Any]]:
    results = []
    for name, given in (metrics or {}).items():
        given = dict(given) if isinstance(given, dict) else {"value": given}
        value, protocol = given.pop("value"), given.pop("protocol", "")
        results.append({"name": name, "value": float(value), "protocol": protocol, "details": given})
    return results


def _summary(kind: str, data: dict[str, Any], training: dict[str, Any]) -> str:
    text = f"A {kind}"
    if data.get("size"):
        text += f" of {'x'.join(map(str, data['size']))} images"
    if training.get("parameters"):
        text += f" with {_readable_count(training['parameters'])} parameters"
    text += ", trained with hf_diffusion"
    text += f" on {data['name']}" if data.get("name") else ""
    return text + (f" for {training['steps']:,} steps." if training.get("steps") else ".")


def _tables(data: dict[str, Any], training: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Heading and rows of each table that has any."""
    run = _rows(training)
    if training.get("wall_time_s") is not None:
        run.append(("wall time", _readable_time(training["wall_time_s"])))
    if training.get("git_commit"):
        changed = ", with uncommitted changes" if training.get("git_dirty") else ""
        repository = f" of {training['git_repository']}" if training.get("git_repository") else ""
        run.append(("git commit", f"`{training['git_commit']}`{repository}{changed}"))
    versions = [(name, str(version)) for name, version in training.get("versions", {}).items()]
    return [(heading, rows) for heading, rows in [("run", run), ("data", _rows(data)), ("versions", versions)] if rows]


def _rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    shown = {name: value for name, value in facts.items() if value not in (None, [], {}) and name not in NOT_IN_TABLES}
    return [
        (_cell(name.replace("_", " ")), _cell(value)) for name, value in shown.items() if not isinstance(value, dict)
    ]


def _cell(value: Any) -> str:
    """A value as one cell of a Markdown table."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(_cell, value))
    text = f"{value:,}" if isinstance(value, int) else f"{value:.6g}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", "\\|").split())


def _class_names(names: list[str] | None) -> str:
    shown = ", ".join(
        f"{number} {name}" if str(number) != name else name for number, name in enumerate((names or [])[:40])
    )
    return f"{shown}, and {len(names) - 40} more" if names and len(names) > 40 else shown


def _readable_count(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count:,}"


def _readable_time(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min" if seconds >= 120 else f"{seconds:.0f} s"


def _merge_into(path: Path, card: ModelCard) -> Path:
    """Put the generated part of `card` in the place of that in the file, and keep what is around it."""
    metadata, text = card.data.to_dict(), card.text
    if path.is_file():
        old_metadata, old_text = _read_card(path)
        old_metadata.pop("model-index", None)  # results of the earlier weights
        tags = [*metadata["tags"], *(tag for tag in old_metadata.get("tags") or [] if tag not in metadata["tags"])]
        metadata = {**old_metadata, **metadata, "tags": tags}
        block = text[text.index(START) : text.rindex(END) + len(END)]
        text = f"{old_text.rstrip()}\n\n{block}\n"
        if START in old_text:
            text = old_text[: old_text.index(START)] + block + old_text[old_text.index(END) + len(END) :]
    _write_card(path, metadata, text)
    return path


def _write_card(path: Path, metadata: dict[str, Any], text: str) -> None:
    front = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    half_written = path.with_name(f".{path.name}.{os.getpid()}")
    half_written.write_text(f"---\n{front}---\n{text}", encoding="utf-8")
    os.replace(half_written, path)


def _read_card(path: Path) -> tuple[dict[str, Any], str]:
    return parse_card(path.read_text(encoding="utf-8"), str(path))


def parse_card(content: str, name: str) -> tuple[dict[str, Any], str]:
    """The metadata and the text of a card; ValueError, naming it, where the metadata or our markers are damaged."""
    front = re.match(r"\s*---\r?\n(.*?)\r?\n?---\r?\n", content, re.DOTALL)
    text = content[front.end() :] if front else content
    try:
        metadata = yaml.safe_load(front[1]) if front else {}
    except yaml.YAMLError as error:
        raise ValueError(f"the metadata of {name} are not valid YAML; repair them or remove the file") from error
    if metadata is not None and not isinstance(metadata, dict):
        raise ValueError(f"the metadata of {name} must be `key: value` lines; repair them or remove the file")
    if text.count(START) > 1 or text.count(START) != text.count(END) or text.find(START) > text.find(END):
        raise ValueError(
            f"the markers {START} and {END} in {name} must be there once each, in this order, or not at all"
        )
    return metadata or {}, text
