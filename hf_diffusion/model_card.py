"""The model card: what is known about a run, laid out by model_cards/template.md.

Nothing is asked and nothing invented: what is not known is left out. The generated text stands between two markers, and what
people write outside them survives the next run, as do the keys that they add to the metadata.
"""

import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

from hf_diffusion.card_text import cell, class_list, summary_of, tables_of
from hf_diffusion.card_use import how_to_use
from hf_diffusion.config.options import config_to_yaml


TEMPLATE = Path(__file__).parent / "model_cards" / "template.md"
START, END = "<!-- hf_diffusion:generated:start -->", "<!-- hf_diffusion:generated:end -->"
NOT_MEASURED = {
    True: "The quality of the samples has not been measured.",
    False: "How well it does has not been measured.",  # of a model that draws nothing
}
MEASURED = (  # a sentence of the template
    "- The results hold for the protocol beside them and cannot be compared with figures that were measured otherwise."
)
PIPELINE_TAG = "unconditional-image-generation"  # the Hub knows no task for images of a class


@dataclass(frozen=True)
class NearestImages:
    """A picture of samples and their nearest training images, relative to the folder, and a sentence on the distances."""

    picture: str
    sentence: str


def write_model_card(
    folder: str | os.PathLike,
    *,
    config: dict[str, Any],
    data: dict[str, Any],
    training: dict[str, Any],
    metrics: dict[str, Any] | None = None,
    images: Sequence[str] | Mapping[str, str] = (),
    curve: str | None = None,
    nearest: NearestImages | None = None,
    citations: Sequence[str] = (),
    kind: str = "diffusion model",
    tags: Sequence[str] = ("ddpm",),
    license: str | None = None,
    repo_id: str | None = None,
    revision: str | None = None,
) -> Path:
    """Write or renew README.md in the folder of a saved pipeline or model, by an atomic rename; works without a network.

    config: all settings of the run. data: `describe()` of the data, and what `data_set_facts` found. training: steps, images_seen,
    wall_time_s, processes, global_batch, parameters, command, energy (source -> joules) and the like, and what `environment()` tells. metrics:
    name -> number, or name -> {"value": number, "protocol": text, ...}. images (with captions, if it is a mapping), curve: paths relative to the
    folder. citations: BibTeX entries. license: of the weights, an id of the Hub. ValueError for a picture that is not there, and for an existing card
    whose markers or metadata are damaged.
    """
    folder = Path(folder)
    captions = dict(images) if isinstance(images, Mapping) else dict.fromkeys(images, "")
    _check_pictures(folder, [*captions, *([curve] if curve else []), *([nearest.picture] if nearest else [])])
    title = repo_id.split("/")[-1] if repo_id else folder.resolve().name
    use, results = how_to_use(folder, data.get("class_names")), _results(metrics)
    kind = f"class-conditional {kind}" if use.is_conditional else kind
    card = ModelCard.from_template(
        _metadata(title, config, data, results, tags, license, use.kind == "pipeline", use.has_code, captions),
        template_path=str(TEMPLATE),
        title=title,
        summary=summary_of(kind, data, training),
        images=list(captions.items()),
        curve=curve,
        use=use,
        repo_id=repo_id,
        revision=revision,
        class_names=class_list(use.class_names),
        results=_rows([(result["name"], result["value"], result["protocol"]) for result in results]),
        command=training.get("command"),
        tables=tables_of(data, training),
        config_yaml=config_to_yaml(config).rstrip(),
        not_measured=NOT_MEASURED[use.kind == "pipeline"],
        nearest=nearest,
        data_license=data.get("license"),
        data_card=data.get("data_card"),
        considerations=data.get("considerations"),
        license=license,
        citations=list(citations),
    )
    return _merge_into(folder / "README.md", card)


def _rows(results: Sequence[tuple[str, float, str]]) -> list[str]:
    """Lines of the table of results; a protocol that is that of the line before is not repeated."""
    protocols = ["", *(protocol for *_, protocol in results)]
    return [
        f"| {cell(name)} | {value:.6g} | {'as above' if protocol and protocol == before else cell(protocol)} |"
        for (name, value, protocol), before in zip(results, protocols)
    ]


def _check_pictures(folder: Path, names: Sequence[str]) -> None:
    for name in names:
        if Path(name).is_absolute() or not (folder / name).is_file():
            raise ValueError(
                f"the card would show {name!r}, which is not a file in {folder}; give paths relative to the folder"
            )


def update_card_results(
    folder: str | os.PathLike,
    metrics: dict[str, Any],
    data_name: str,
    figures: Mapping[str | os.PathLike, str] | None = None,
) -> Path:
    """Add results to the card of a saved pipeline, in the place of earlier ones of the same names; `metrics` as for `write_model_card`.

    figures: picture file, anywhere -> its caption; they are copied into `figures/` of the folder. ValueError where the folder has no
    card of this package, whose generated part the table belongs to.
    """
    path = Path(folder) / "README.md"
    metadata, text = _read_card(path) if path.is_file() else ({}, "")
    if START not in text:
        raise ValueError(f"{path} is no card of hf_diffusion (it lacks the marker {START}); add the results by hand")
    earlier = model_index_to_eval_results(metadata["model-index"])[1] if metadata.get("model-index") else []
    is_pipeline = "pipeline_tag" in metadata
    added = _metadata("", {}, {"name": data_name}, _results(metrics), (), None, is_pipeline, False).eval_results or []
    merged = [result for result in earlier if result.metric_name not in metrics] + added
    title = re.search(r"^# (.+)$", text, re.MULTILINE)
    metadata["model-index"] = eval_results_to_model_index(title[1] if title else path.parent.resolve().name, merged)
    rows = _rows([(r.metric_name, r.metric_value, (r.metric_args or {}).get("protocol", "")) for r in merged])
    start, end = text.index(START), text.index(END)
    block = text[start:end]
    former = re.search(r"^## Results\n.*?(?=^## |\Z)", block, flags=re.DOTALL | re.MULTILINE)
    shown = dict(re.findall(r"^!\[[^\]\n]*\]\((\S+)\)\n\n\*([^\n]*)\.\*$", former[0] if former else "", re.MULTILINE))
    shown |= _copy_figures(path.parent, figures or {})
    pictures = [f"![{caption}]({name})\n\n*{caption}.*\n" for name, caption in shown.items()]
    section = "\n".join(
        ["## Results", "", "| measure | value | protocol |", "|---|---|---|", *rows, "", *pictures, ""]
    )
    block = block if former is None else block[: former.start()] + block[former.end() :]
    # the template's order: results stand before the curve and the way to use the model
    place = re.search(r"^## (Training curve|Use|Reproduce)$", block, re.MULTILINE)
    at = place.start() if place else len(block)
    block = block[:at] + section + block[at:]
    for sentence in NOT_MEASURED.values():
        block = block.replace(f"- {sentence}", MEASURED)
    _write_card(path, metadata, text[:start] + block + text[end:])
    return path


def _copy_figures(folder: Path, figures: Mapping[str | os.PathLike, str]) -> dict[str, str]:
    """Put pictures into `figures/` of the folder; captions by their names there."""
    captions = {}
    for source, caption in figures.items():
        target = folder / "figures" / Path(source).name
        target.parent.mkdir(exist_ok=True)
        half_written = target.with_name(f".{target.name}.{os.getpid()}")
        shutil.copyfile(source, half_written)
        os.replace(half_written, target)
        captions[target.relative_to(folder).as_posix()] = caption
    return captions


def _metadata(
    title: str,
    config: dict[str, Any],
    data: dict[str, Any],
    results: list[dict[str, Any]],
    tags: Sequence[str],
    license: str | None,
    is_pipeline: bool,
    has_code: bool,
    captions: Mapping[str, str] | None = None,
) -> ModelCardData:
    dataset = hub_data_set(config)
    evaluations = [
        EvalResult(
            task_type=PIPELINE_TAG if is_pipeline else "image-classification",  # a model alone is a classifier
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
        pipeline_tag=PIPELINE_TAG if is_pipeline else None,
        license=license,
        datasets=[dataset] if dataset else None,
        tags=["hf_diffusion", *(["custom_code"] if has_code else []), *tags],
        model_name=title if evaluations else None,
        eval_results=evaluations or None,
        # the Hub's gallery
        widget=[{"text": text or "samples", "output": {"url": name}} for name, text in (captions or {}).items()]
        or None,
    )


def hub_data_set(config: dict[str, Any]) -> str | None:
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
