"""The network that a run starts from: the trained one that `init_from` names, fitted to the data
and the method of the run."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from huggingface_hub import file_exists
from torch import Tensor, nn

from hf_diffusion.config.run_options import TrainingConfig
from hf_diffusion.data.protocol import TrainingData
from hf_diffusion.data.reaching import hub_or_cache
from hf_diffusion.hub.checkpoint_files import MANIFEST, BadCheckpoint, read_network
from hf_diffusion.hub.loading import load_pipeline
from hf_diffusion.loop.checkpoints import latest_checkpoint


# How a network's config calls the number of its classes.
CLASS_COUNTS = ("num_class_embeds", "num_classes")
# Of the run, whatever the network was trained with: it has no weights.
FREE = ("dropout",)
# With fewer weights than this share taken over, it is another network.
LEAST_SHARE = 0.5


@dataclass(frozen=True)
class Trained:
    """A trained network, the names of its classes, and what the process was that it was trained
    on, where known."""

    network: nn.Module
    class_names: tuple[str, ...] | None
    process: dict[str, Any]


def started_from(
    config: TrainingConfig,
    data: TrainingData,
    fresh: nn.Module,
    process: dict[str, Any] | None = None,
    called: Mapping[str, str] | None = None,
    wrapper: tuple[type, str] | None = None,
) -> nn.Module:
    """`fresh`, or what `init_from` names in its place: a pipeline, a model or a checkpoint, a
    folder or a Hub id.

    Settings of the run that shape the network take the values of the trained one; what follows
    from data and method (channels, classes, size) stays that of `fresh`. Class embeddings are
    carried over by the classes' names. What does not fit is new, and listed. `process` are the
    settings that the network must have been trained with. `called` are names of the network's
    settings that the run calls otherwise, `wrapper` is as in `open_trained`. ValueError where they
    differ, where the class of the network differs, or where hardly anything fits.
    """
    if config.init_from is None:
        return fresh
    config.is_started = True
    trained = open_trained(config.init_from, (type(fresh),), wrapper)
    check_process(config.init_from, trained.process, process or {})
    names, called = {field.name for field in dataclasses.fields(config)} - set(FREE), called or {}
    of_run = {name: called.get(name, name) for name in _settings(fresh) if called.get(name, name) in names}
    take_shape(config, {of_run[name]: v for name, v in _settings(trained.network).items() if name in of_run})
    bound = {name: value for name, value in _settings(fresh).items() if name not in of_run}
    torch.manual_seed(config.seed)
    return fitted(config.init_from, trained, bound, data.class_names)


def take_shape(config: TrainingConfig, shape: dict[str, Any]) -> None:
    """Give settings of the run the values of the trained network, and say which change."""
    differing = {name: value for name, value in shape.items() if _plain(getattr(config, name)) != _plain(value)}
    for name, value in differing.items():
        setattr(config, name, tuple(value) if isinstance(value, list) else value)
    if differing:
        _say(
            f"the shape is that of {config.init_from}: " + ", ".join(f"{k} {_plain(v)}" for k, v in differing.items())
        )


def open_trained(source: str, wanted: Sequence[type], wrapper: tuple[type, str] | None = None) -> Trained:
    """What `source` holds of one of the wanted classes, with averaged weights; ValueError where it
    holds none.

    Of a run that has not come to its pipeline the newest checkpoint is taken. `wrapper` is a class
    that checkpoints hold the network in, and its attribute there.
    """
    folder = newest_checkpoint(source)
    if (folder / MANIFEST).is_file():
        return _of_checkpoint(folder, wanted, wrapper)
    if folder.is_dir() and not any(
        (folder / name).is_file() for name in (DiffusionPipeline.config_name, "config.json")
    ):
        raise ValueError(f"init_from {source} holds no pipeline, no model and no checkpoint; give a folder that does")
    if (folder / "config.json").is_file() or (not folder.exists() and _is_network_on_the_hub(source)):
        network = wanted[0].from_pretrained(source)
        return Trained(network, names_of(network.config.get("id2label")), network.config.get("noise_schedule") or {})
    pipe = load_pipeline(source)
    found = [part for part in pipe.components.values() if isinstance(part, tuple(wanted))]
    if not found:
        has = ", ".join(type(part).__name__ for part in pipe.components.values() if isinstance(part, nn.Module))
        raise ValueError(f"init_from {source} has {has or 'no network'}, and this run trains a {_spoken(wanted)}")
    return Trained(found[0], names_of(getattr(pipe, "id2label", None)), _settings(pipe.scheduler))


def _is_network_on_the_hub(source: str) -> bool:
    """Whether a repository holds one network alone; what is wrong with it, `load_pipeline` says."""
    try:
        with hub_or_cache(source):
            return file_exists(source, "config.json") and not file_exists(source, DiffusionPipeline.config_name)
    except (OSError, ValueError):
        return False


def newest_checkpoint(source: str) -> Path:
    """The newest checkpoint in the folder of an unfinished run; any other source as it is."""
    folder = Path(source).expanduser()
    if any((folder / name).is_file() for name in (MANIFEST, DiffusionPipeline.config_name, "config.json")):
        return folder
    newest = latest_checkpoint(folder) if folder.is_dir() else None
    if newest is not None:
        _say(f"{source} is an unfinished run: starting from its {newest.name}")
    return newest or folder


def check_process(source: str, trained: dict[str, Any], wanted: dict[str, Any]) -> None:
    """ValueError for the first setting of the process that the network was not trained with."""
    for name, value in wanted.items():
        if name in trained and _plain(trained[name]) != _plain(value):
            raise ValueError(
                f"init_from {source} was trained with {name} {trained[name]}, and this run has {value}; give what it "
                "was trained with"
            )


def fitted(source: str, trained: Trained, bound: dict[str, Any], class_names: Sequence[str] | None) -> nn.Module:
    """A network like the trained one but for the settings `bound`, with all of its weights that
    fit."""
    settings = {**_settings(trained.network), **bound}
    network = type(trained.network).from_config(settings)
    theirs, mine = trained.network.state_dict(), network.state_dict()
    of_classes = _tensors_of_classes(type(network), settings)
    rows = _rows(source, trained, settings, class_names) if of_classes & set(theirs) else []
    new, taken = [], 0
    for name, target in mine.items():
        former = theirs.get(name)
        if name in of_classes and former is not None:
            taken += _copy_rows(former, target, rows)
        elif former is not None and former.shape == target.shape:
            target.copy_(former)
            taken += target.numel()
        else:
            new.append(name)
    total = sum(tensor.numel() for tensor in mine.values())
    if taken < LEAST_SHARE * total:
        raise ValueError(
            f"init_from {source} fits this run in {taken:,} of {total:,} weights only; choose a model of its size and "
            "channels"
        )
    if new:
        _say(f"{len(new)} tensors are new, since {source} has none that fit: {', '.join(new)}")
    return network


def _rows(
    source: str, trained: Trained, settings: dict[str, Any], class_names: Sequence[str] | None
) -> list[tuple[int, int]]:
    """Pairs (row here, row there) of the classes, and of the row for no class."""
    count, before = _class_count(settings), _class_count(_settings(trained.network))
    if trained.class_names is None or class_names is None:
        if count != before:
            raise ValueError(
                f"init_from {source} has {before} classes without names, and this run {count}; they cannot be matched"
            )
        pairs = [(row, row) for row in range(count)]
    else:
        place = {name: row for row, name in enumerate(trained.class_names)}
        pairs = [(row, place[name]) for row, name in enumerate(class_names) if name in place]
        new = [name for name in class_names if name not in place]
        if new:
            _say(f"{len(pairs)} of {count} classes are those of {source}; new are {', '.join(new)}")
    return [*pairs, (count, before)]


def _copy_rows(former: Tensor, target: Tensor, rows: list[tuple[int, int]]) -> int:
    """Copy the rows that both have; how many numbers these are."""
    pairs = [(here, there) for here, there in rows if here < len(target) and there < len(former)]
    for here, there in pairs:
        target[here].copy_(former[there])
    return sum(target[here].numel() for here, _ in pairs)


def _tensors_of_classes(cls: type, settings: dict[str, Any]) -> set[str]:
    """The names of the tensors that have a row for each class: those that grow with one class
    more."""
    counts = [name for name in CLASS_COUNTS if settings.get(name)]
    if not counts:
        return set()
    with torch.device("meta"):
        one_more = {
            **settings,
            counts[0]: settings[counts[0]] + 1,
            **({"id2label": None} if "id2label" in settings else {}),
        }
        now, more = (cls.from_config(config).state_dict() for config in (settings, one_more))
    return {name for name, tensor in now.items() if tensor.shape != more[name].shape}


def _of_checkpoint(folder: Path, wanted: Sequence[type], wrapper: tuple[type, str] | None) -> Trained:
    held = () if wrapper is None else wrapper[:1]

    def class_of(name: str) -> type[nn.Module]:
        cls = next((cls for cls in (*wanted, *held) if cls.__name__ == name), None)
        if cls is None:
            raise ValueError(f"init_from {folder} has a {name}, and this run trains a {_spoken(wanted)}")
        return cls

    try:
        network, manifest = read_network(folder, class_of)
    except BadCheckpoint as error:
        raise ValueError(f"init_from {error}") from error
    if isinstance(network, held):
        network = getattr(network, wrapper[1])
        if not isinstance(network, tuple(wanted)):
            raise ValueError(
                f"init_from {folder} has a {type(network).__name__}, and this run trains a {_spoken(wanted)}"
            )
    names = manifest.get("classes")
    return Trained(network, tuple(names) if names else None, manifest.get("settings", {}))


def _class_count(settings: dict[str, Any]) -> int:
    return next((settings[name] for name in CLASS_COUNTS if settings.get(name)), 0)


def _settings(part: Any) -> dict[str, Any]:
    return {name: value for name, value in part.config.items() if not name.startswith("_")}


def names_of(id2label: dict | None) -> tuple[str, ...] | None:
    """The names of the classes in the order of their numbers."""
    return tuple(name for _, name in sorted((int(k), v) for k, v in id2label.items())) if id2label else None


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _spoken(classes: Sequence[type]) -> str:
    return " or a ".join(cls.__name__ for cls in classes)


def _say(sentence: str) -> None:
    if PartialState().is_main_process:
        print(sentence)
