"""The model card: what is known about a model, laid out by model_cards/template.md.

Nothing is asked and nothing invented: what is not known is left out. The generated text stands
between two markers. What people write outside them survives the next run, as do the keys that they
add to the metadata.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hf_diffusion.cards.data_set import hub_data_set
from hf_diffusion.cards.results import eval_results, model_index, recorded_results, result_rows
from hf_diffusion.cards.tables import class_list, kind_of, summary_of, tables_of, words_of
from hf_diffusion.cards.usage import Use, call_text, use_of_model, use_of_pipeline
from hf_diffusion.config.options import config_to_yaml
from hf_diffusion.config.publishing import published
from hf_diffusion.files import write_whole
from hf_diffusion.hub.card_format import START, format_card, parse_card, pictures, sections, split_generated
from hf_diffusion.hub.loading import load_pipeline, read_index


CARD = "README.md"
# What shows texts, whose content stands in the card.
TEXT = ".txt"
TEMPLATES = Path(__file__).parents[1] / "model_cards"
# What the Hub calls the task of a pipeline that draws such data, with or without classes. It has
# none for points.
TASKS = {"images": "unconditional-image-generation"}
MEASURED = (
    "The results hold for the protocol beside them and cannot be compared with figures that were measured otherwise."
)
NOT_MEASURED = "The quality of the samples has not been measured."
# Of a network that draws nothing.
NOT_MEASURED_ALONE = "How well it does has not been measured."


@dataclass(frozen=True)
class NearestImages:
    """A picture of samples with their nearest training images, and what the distances say.

    None for texts, of which the sentence says enough.
    """

    picture: str | None
    sentence: str


def write_model_card(
    folder: str | os.PathLike,
    *,
    config: dict[str, Any],
    data: dict[str, Any],
    training: dict[str, Any],
    pipeline: DiffusionPipeline | None = None,
    metrics: dict[str, Any] | None = None,
    images: Sequence[str] | Mapping[str, str] = (),
    curve: str | None = None,
    nearest: NearestImages | None = None,
    citations: Sequence[str] = (),
    kind: str = "diffusion model",
    tags: Sequence[str] = (),
    task: str | None = None,
    usage_template: str | None = None,
    license: str | None = None,
    repo_id: str | None = None,
    revision: str | None = None,
) -> Path:
    """Write or renew README.md in the folder of a saved pipeline or model; needs no network.

    config: all settings of the run.
    data: `describe()` of the data, and what `data_set_facts` found.
    training: steps, images_seen, wall_time_s, processes, global_batch, parameters, command, energy
        (source -> joules) and the like, and what `environment()` tells.
    pipeline: what the folder holds; None loads it, where it holds one.
    metrics: name -> number, or name -> {"value": number, "protocol": text, ...}.
    images (with captions, if it is a mapping), curve: paths relative to the folder.
    citations: BibTeX entries.
    kind, tags, task, usage_template: what the family's TrainingConfig says of itself.
    license: of the weights, an id of the Hub.

    ValueError for a picture that is not there, and for an existing card whose markers or metadata
    are damaged.
    """
    folder = Path(folder)
    captions = dict(images) if isinstance(images, Mapping) else dict.fromkeys(images, "")
    _check_pictures(
        folder, [*captions, *([curve] if curve else []), *([nearest.picture] if nearest and nearest.picture else [])]
    )
    title = repo_id.split("/")[-1] if repo_id else folder.resolve().name
    use, dataset = _use(folder, pipeline, data), hub_data_set(config, data)
    task = task or (TASKS.get(kind_of(data)) if use.call else None)
    results = eval_results(metrics, task, str(data.get("name") or dataset or "training data"), dataset)
    things, thing = words_of(data)
    block = _render(
        "template.md",
        title=title,
        things=things,
        thing=thing,
        summary=summary_of(f"class-conditional {kind}" if use.is_conditional else kind, data, training),
        pictures={name: caption for name, caption in captions.items() if not name.endswith(TEXT)},
        texts={name: (caption, _text(folder / name)) for name, caption in captions.items() if name.endswith(TEXT)},
        curve=curve,
        use=use,
        usage_template=None if use.call or not use.class_name else usage_template,
        model=_read_json(folder / "config.json"),
        repo_id=repo_id,
        revision=revision,
        classes=class_list(use.class_names),
        results=result_rows(results),
        figures={},
        command=training.get("command"),
        tables=tables_of(data, training),
        config_yaml=config_to_yaml(published(config)).rstrip(),
        measured=MEASURED if results else NOT_MEASURED if use.call else NOT_MEASURED_ALONE,
        nearest=nearest,
        data_license=data.get("license"),
        data_card=data.get("data_card"),
        considerations=data.get("considerations"),
        license=license,
        citations=list(citations),
    )
    tags = ["hf_diffusion", *(["custom_code"] if use.has_code else []), *tags]
    metadata = {
        "library_name": "diffusers",
        "pipeline_tag": task if use.call else None,
        "license": license,
        "datasets": [dataset] if dataset else None,
        "tags": list(dict.fromkeys(tags)),
        "widget": _gallery(captions),
        **model_index(title, results),
    }
    return _renew(folder / CARD, {key: value for key, value in metadata.items() if value}, block)


def _gallery(captions: Mapping[str, str]) -> list[dict[str, Any]]:
    """The pictures as the Hub's gallery takes them."""
    shown = {name: caption for name, caption in captions.items() if not name.endswith(TEXT)}
    return [{"text": caption or "samples", "output": {"url": name}} for name, caption in shown.items()]


def _text(path: Path) -> str:
    """A text for a block of code, which it must not end."""
    return path.read_text(encoding="utf-8").rstrip().replace("```", "` ` `")


def update_card_results(
    folder: str | os.PathLike,
    metrics: dict[str, Any],
    data_name: str,
    figures: Mapping[str | os.PathLike, str] | None = None,
) -> Path:
    """Add results to the card of a saved pipeline, in the place of earlier ones of the same names.

    metrics: as for `write_model_card`.
    figures: picture file, anywhere -> its caption; they are copied into `figures/` of the folder.

    The section of results is laid out anew from what the card's metadata record; the other sections
    stay. ValueError where the folder has no card of this package, whose generated part the section
    belongs to.
    """
    path = Path(folder) / CARD
    former = path.read_text(encoding="utf-8") if path.is_file() else ""
    metadata, text = parse_card(former, str(path))
    if START not in text:
        raise ValueError(f"{path} is no card of hf_diffusion (it lacks the marker {START}); add the results by hand")
    head, block, tail = split_generated(text)
    parts = sections(block)
    earlier = recorded_results(metadata)
    task = earlier[0].task_type if earlier else metadata.get("pipeline_tag")
    results = [result for result in earlier if result.metric_name not in metrics]
    results += [result for result in eval_results(metrics, task, data_name) if math.isfinite(result.metric_value)]
    headings = (line[2:].strip() for line in parts[""].splitlines() if line.startswith("# "))
    metadata |= model_index(next(headings, path.parent.resolve().name), results)
    shown = pictures(parts.pop("Results", "")) | _copy_figures(path.parent, figures or {})
    section = _render("results.md", results=result_rows(results), figures=shown)
    limits = parts.get("Limits", "")
    for sentence in (NOT_MEASURED, NOT_MEASURED_ALONE):
        limits = limits.replace(f"- {sentence}", f"- {MEASURED}")
    if limits:
        parts["Limits"] = limits
    # Results stand first among the sections, as in the template.
    block = parts.pop("") + f"{section}\n\n" + "".join(parts.values())
    return write_whole(path, format_card(metadata, head + block + tail, former))


def _use(folder: Path, pipeline: DiffusionPipeline | None, data: dict[str, Any]) -> Use:
    """How to use what the folder holds: a pipeline, a network alone, or nothing that is known."""
    names, index = data.get("class_names"), folder / DiffusionPipeline.config_name
    if index.is_file():
        has_code = isinstance(read_index(index)["_class_name"], list)
        return use_of_pipeline(pipeline or load_pipeline(folder), has_code, names)
    return use_of_model(_read_json(folder / "config.json"), names)


def _render(template: str, **facts: Any) -> str:
    """A template of model_cards/ with these facts, which are text and no templates themselves."""
    environment = Environment(loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined)
    environment.filters["python"] = repr
    environment.globals["call"] = call_text
    return environment.get_template(template).render(facts)


def _check_pictures(folder: Path, names: Sequence[str]) -> None:
    for name in names:
        if Path(name).is_absolute() or not (folder / name).is_file():
            raise ValueError(
                f"the card would show {name!r}, which is not a file in {folder}; give paths relative to the folder"
            )


def _copy_figures(folder: Path, figures: Mapping[str | os.PathLike, str]) -> dict[str, str]:
    """Put pictures into `figures/` of the folder; captions by their names there."""
    for source in figures:
        write_whole(folder / "figures" / Path(source).name, Path(source).read_bytes())
    return {f"figures/{Path(source).name}": caption for source, caption in figures.items()}


def _renew(path: Path, metadata: dict[str, Any], block: str) -> Path:
    """Renew the generated part of a card, and keep what people wrote and the keys they added."""
    head, tail, old = "\n", "\n", ""
    if path.is_file():
        old = path.read_text(encoding="utf-8")
        old_metadata, old_text = parse_card(old, str(path))
        # The results there are those of the earlier weights.
        old_metadata.pop("model-index", None)
        tags = [*metadata["tags"], *(tag for tag in old_metadata.get("tags") or [] if tag not in metadata["tags"])]
        metadata = {**old_metadata, **metadata, "tags": tags}
        head, former, tail = split_generated(old_text)
        if not former:
            head, tail = f"{head.rstrip()}\n\n", "\n"
    return write_whole(path, format_card(metadata, head + block + tail, old))


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
