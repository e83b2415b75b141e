"""Which files of a folder leave the machine: a list of what may, so that nothing slips through."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

import yaml

from hf_diffusion.config.publishing import published, published_yaml
from hf_diffusion.hub.card_format import pictures


INDEX, CARD = "model_index.json", "README.md"
CHECKPOINT = "last-checkpoint"  # in the repository; pushed only where `--hub_strategy checkpoint` asks for it
SPACE_MODEL = "model"  # the folder of a Space that carries its model
ROOT_FILES = (CARD, "LICENSE", "LICENSE.md", "config.yaml", "metrics.json", "loss_curve.png")
SETTINGS_AND_RESULTS = ("config.yaml", "metrics.json")
# Of a component; no pickle, whatever its name. A *.model is a tokenizer's table, which
# sentencepiece reads as protobuf.
PART_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.py")
# .bin and .pkl are in a checkpoint only.
NO_TEXT = (".safetensors", ".bin", ".pkl")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif")
GRID = re.compile(r"samples/(ema|raw)-\d+\.(png|txt)")
# Of a component or a module: an index may come from anywhere, and name "../.ssh".
NAME = re.compile(r"[A-Za-z]\w*")
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}\b")


def pushable_files(folder: Path) -> dict[str, Path]:
    """What is shared of the folder of a saved pipeline or model: path in the repository -> file.

    Weights as safetensors, configurations, shipped code, the card, the pictures that the card
    shows, settings and results. Never checkpoints, optimizer state, logs or random states.
    ValueError where there is nothing to share, or a text holds a token.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give the folder of a saved pipeline")
    names = model_files(folder)
    if not names:
        raise ValueError(
            f"{folder} holds no pipeline and no model: it has neither {INDEX} nor config.json with weights"
        )
    names += [name for name in ROOT_FILES if (folder / name).is_file()]
    names += _pictures_in_card(folder)
    files = {name: folder / name for name in dict.fromkeys(names)}
    refuse_tokens(files.values())
    return files


def model_files(folder: Path) -> list[str]:
    """The files of the pipeline or the model in a folder, by their paths there; without what else
    is shared."""
    return [*_pipeline_files(folder), *_model_files(folder)]


def write_published(source: Path, target: Path) -> bool:
    """Write settings or results as others may see them; False, and nothing is written, without
    local paths in them."""
    if source.name not in SETTINGS_AND_RESULTS:
        return False
    text = source.read_text(encoding="utf-8")
    try:
        # JSON is YAML, too
        content = yaml.safe_load(text)
    except yaml.YAMLError:
        return False
    if published(content) == content:
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    shown = published_yaml(text) if source.suffix == ".yaml" else json.dumps(published(content), indent=2)
    target.write_text(shown, encoding="utf-8")
    return True


def refuse_tokens(files: Iterable[Path]) -> None:
    """ValueError for a text, among files to be shared, with what looks like a token of the Hub."""
    for path in files:
        if path.suffix not in (*NO_TEXT, *PICTURES) and TOKEN.search(_text(path)):
            raise ValueError(
                f"{path} holds what looks like a token of the Hub; take it out, and revoke it if it was public"
            )


def checkpoint_files(checkpoint: Path) -> dict[str, Path]:
    """A training checkpoint, optimizer state and all, under its one name in the repository."""
    found = (path for path in sorted(checkpoint.rglob("*")) if path.is_file())
    return {f"{CHECKPOINT}/{path.relative_to(checkpoint).as_posix()}": path for path in found}


def newest_grid(folder: Path) -> list[Path]:
    """The last grid or texts of a run, of the averaged weights if there are any; empty without."""
    shown = sorted(file for file in (folder / "samples").glob("*-*") if GRID.fullmatch(f"samples/{file.name}"))
    return ([file for file in shown if file.name.startswith("ema")] or shown)[-1:]


def step_tag(step: int) -> str:
    """The tag of what is pushed at a step, for `revision=` of whoever loads it."""
    return f"step-{step:08d}"


def is_stale(path: str, files: Iterable[str]) -> bool:
    """Whether a file of the repository is left over from an earlier push, which `files` replace.

    Such are other files of the same components (a list of shards beside a single file would win
    when loading), earlier grids and earlier checkpoints. What people put elsewhere is theirs.
    """
    if path in files:
        return False
    if path.startswith(f"{SPACE_MODEL}/"):
        return f"{SPACE_MODEL}/{INDEX}" in files
    if "/" not in path:
        return "config.json" in files and path.endswith((".safetensors", ".safetensors.index.json"))
    parts = {name.split("/")[0] for name in files if "/" in name and name.split("/")[1].endswith("config.json")}
    return path.split("/")[0] in {*parts, CHECKPOINT} or GRID.fullmatch(path) is not None


def _pipeline_files(folder: Path) -> list[str]:
    if not (folder / INDEX).is_file():
        return []
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    names, cls = [INDEX], index.get("_class_name")
    if isinstance(cls, list) and NAME.fullmatch(cls[0]) and (folder / f"{cls[0]}.py").is_file():
        names.append(f"{cls[0]}.py")
    for part, entry in index.items():
        if NAME.fullmatch(part) and isinstance(entry, list) and (folder / part).is_dir():
            names += [
                f"{part}/{path.name}" for pattern in PART_FILES for path in sorted((folder / part).glob(pattern))
            ]
    return names


def _model_files(folder: Path) -> list[str]:
    """Files of a model that is no pipeline, such as a classifier."""
    weights = sorted(path.name for path in folder.glob("*.safetensors*"))
    return ["config.json", *weights] if weights and (folder / "config.json").is_file() else []


def _pictures_in_card(folder: Path) -> list[str]:
    card = folder / CARD
    shown = pictures(card.read_text(encoding="utf-8")) if card.is_file() else {}
    inside = (name for name in shown if (folder / name).is_file() and ".." not in Path(name).parts)
    return [name for name in inside if Path(name).suffix.lower() in PICTURES and not Path(name).is_absolute()]


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")
