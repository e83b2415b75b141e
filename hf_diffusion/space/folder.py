"""The folder of a Space: the page, its card, what it needs, and the model or the model's name."""

import importlib.metadata
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers

from hf_diffusion.files import remove_partials, write_whole
from hf_diffusion.hub.card_format import END, START, format_card, parse_card, split_generated
from hf_diffusion.hub.files import CARD, SPACE_MODEL, model_files, refuse_tokens
from hf_diffusion.hub.loading import find_index, read_index


HERE = Path(__file__).parent
APP, REQUIREMENTS = "app.py", "requirements.txt"
# The pages are tested with it; a Space gets it where gradio is not installed here.
TESTED_GRADIO = "6.31.0"
LONGEST_DESCRIPTION = 60  # characters, of the Hub


@dataclass(frozen=True)
class Space:
    """A Space that was written: its files by their paths there, and what the user should know."""

    files: dict[str, Path]
    notes: tuple[str, ...]


def write_space(source: str, output: Path, title: str, revision: str | None = None) -> Space:
    """Write the Space of a saved pipeline, which it carries, or of a repository, which it names.

    What people have changed in files of an earlier call stays; the model, its name and its commit
    are always those of `source`. ValueError for a source without a pipeline, or with one whose code
    is not there; OSError for what the Hub does not have.
    """
    index_file = find_index(source, revision=revision)
    check_code(index_file)
    folder = Path(source) if Path(source).is_dir() else None
    parts = {} if folder is None else {f"{SPACE_MODEL}/{name}": folder / name for name in model_files(folder)}
    refuse_tokens(parts.values())
    place = (SPACE_MODEL, None) if folder is not None else (source, index_file.parent.name)
    app, notes = app_text(output / APP, dict(zip(("MODEL", "REVISION", "TITLE"), (*place, title))))
    remove_partials(output, *(path for path in output.rglob("*") if path.is_dir()))
    requirements = output / REQUIREMENTS
    needed = (HERE / REQUIREMENTS).read_text(encoding="utf-8")
    if not requirements.exists():
        write_whole(requirements, needed)
    elif requirements.read_text(encoding="utf-8") != needed:
        notes.append(f"{requirements} is not what this version writes, and stays as it is; remove it for a new one")
    write_whole(output / CARD, card_text(output / CARD, title, None if folder else source, licence(folder)))
    write_whole(output / APP, app)
    for name, path in parts.items():
        with path.open("rb") as file:
            write_whole(output / name, lambda target, file=file: shutil.copyfileobj(file, target))
    if folder is not None:
        # Of an earlier model, such as one in shards: the loader would prefer it.
        for path in (output / SPACE_MODEL).rglob("*"):
            if path.is_file() and path.relative_to(output).as_posix() not in parts:
                path.unlink()
    return Space({name: output / name for name in (APP, CARD, REQUIREMENTS, *parts)}, tuple(notes))


def check_code(index_file: Path) -> None:
    """ValueError for a pipeline that diffusers alone cannot load, since its code is not there."""
    cls = read_index(index_file)["_class_name"]
    if isinstance(cls, str) and not hasattr(diffusers, cls):
        raise ValueError(
            f"{index_file} names the class {cls} without its code, which a Space would not find; load the pipeline "
            "with hf_diffusion and save it again by save_pretrained"
        )


def app_text(path: Path, constants: dict[str, Any]) -> tuple[str, list[str]]:
    """The page with these constants, and notes; a page that was changed changes in them alone."""
    ours = (HERE / APP).read_text(encoding="utf-8")
    text, notes = path.read_text(encoding="utf-8") if path.exists() else ours, []
    filled = {"page": text, "ours": ours}
    for name, value in constants.items():
        line = re.compile(rf"^({name}\b[^=\n]*= ).*$", re.MULTILINE)
        if not line.search(text):
            raise ValueError(f"{path} has no line `{name} = ...` any more; put it back, or remove the file")
        for which in filled:
            filled[which] = line.sub(lambda found, value=value: found[1] + quoted(value), filled[which], count=1)
    if filled["page"] != filled["ours"]:
        notes.append(f"{path} is not what this version writes; its {', '.join(constants)} are set, the rest stays")
    return filled["page"], notes


def quoted(value: str | None) -> str:
    """A text, or None, as Python writes it between double quotes."""
    return "None" if value is None else '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def card_text(path: Path, title: str, repository: str | None, license: str | None) -> str:
    """The card of a Space, with what people wrote into the one that is there."""
    former = path.read_text(encoding="utf-8") if path.exists() else ""
    theirs, text = parse_card(former, str(path))
    metadata = {
        "title": title,
        "emoji": "🎲",
        "colorFrom": "indigo",
        "colorTo": "pink",
        "sdk": "gradio",
        "sdk_version": gradio_version(),
        "python_version": "3.12",
        "app_file": APP,
        "short_description": f"Draw samples from {title}"[:LONGEST_DESCRIPTION],
    }
    metadata |= {"license": license} if license else {}
    metadata |= theirs
    metadata |= {"models": [repository]} if repository else {}
    said = (HERE / CARD).read_text(encoding="utf-8")
    said = said.replace("MODEL", f"[{repository}](https://huggingface.co/{repository})" if repository else title)
    head, _, tail = split_generated(text)
    pieces = (head.strip() or f"# {title}", f"{START}\n{said.strip()}\n{END}", tail.strip())
    return format_card(metadata, "\n" + "\n\n".join(piece for piece in pieces if piece) + "\n", former)


def licence(folder: Path | None) -> str | None:
    """The licence that the card of a folder names."""
    card = folder and folder / CARD
    return (
        parse_card(card.read_text(encoding="utf-8"), str(card))[0].get("license") if card and card.is_file() else None
    )


def gradio_version() -> str:
    """The version of gradio that is installed, else the one that the pages are tested with."""
    try:
        return importlib.metadata.version("gradio")
    except importlib.metadata.PackageNotFoundError:
        return TESTED_GRADIO
