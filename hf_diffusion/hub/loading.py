"""Folders and repositories of pipelines: fetching them, and finding the class of every part."""

import functools
import importlib
import json
import logging
import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.utils import DIFFUSERS_DYNAMIC_MODULE_NAME
from huggingface_hub import HfApi, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hf_diffusion.data.reaching import hub_or_cache
from hf_diffusion.hub.download import fetch_and_verify, patiently, verify_download


logger = logging.getLogger(__name__)
INDEX = DiffusionPipeline.config_name
# Parts of these are loaded from there, whatever the package has.
LIBRARIES = ("diffusers", "transformers")
# Weights are read as safetensors only: a pickle can run code when it is read.
NOT_FETCHED = ["*.py", "*.bin", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.pkl", "*.pt", "*.pth"]
# Of a part: an index may come from anywhere, and name "../.ssh".
NAME = re.compile(r"[A-Za-z]\w*")
# Seconds: without a network nobody wants to wait for the answer to a mistyped folder.
BRIEFLY = 5.0
KINDS = (ModelMixin, SchedulerMixin)
WHERE = ("subfolder", "revision", "token", "cache_dir", "local_files_only", "force_download")


def package_class(class_name: str, kind: type | tuple[type, ...]) -> type | None:
    """The class that this package exports under a name, if it is one of `kind`, else None."""
    candidate = getattr(importlib.import_module("hf_diffusion"), class_name, None)
    is_ours = isinstance(candidate, type) and issubclass(candidate, kind)
    return candidate if is_ours and candidate.__module__.startswith("hf_diffusion.") else None


def imported_class(module: str, class_name: str, kind: type | tuple[type, ...]) -> type | None:
    """The class of a family outside of this package, by its file's stem and its name.

    It must be imported already. Code of repositories that was run in this process is passed over.
    """
    for cls in _subclasses(kind):
        known = getattr(sys.modules.get(cls.__module__), class_name, None)
        package, _, stem = cls.__module__.rpartition(".")
        if (
            known is cls
            and stem == module.rpartition(".")[2]
            and package.split(".")[0] != DIFFUSERS_DYNAMIC_MODULE_NAME
        ):
            return cls
    return None


def _subclasses(kind: type | tuple[type, ...]) -> Iterator[type]:
    for parent in kind if isinstance(kind, tuple) else (kind,):
        for cls in parent.__subclasses__():
            yield cls
            yield from _subclasses(cls)


def name_package_classes(index: dict) -> None:
    """Rewrite the index of a pipeline in place so that its parts name modules of this process.

    The package's own classes are found by their names alone, whatever module or file the index
    names; others among those that are imported already. Raises ValueError for a class that is
    nowhere.
    """
    index["_class_name"] = index_class_name(index)
    for name, entry in index.items():
        is_part = isinstance(entry, (list, tuple)) and len(entry) == 2 and not name.startswith("_")
        if not is_part or entry[0] is None or entry[0] in LIBRARIES:
            continue
        module, class_name = map(str, entry)
        found = package_class(class_name, KINDS) or imported_class(module, class_name, KINDS)
        if found is None:
            raise ValueError(
                f"the {name} of this pipeline is a {entry[1]!r}, which this version of hf_diffusion does not"
                " have; update hf_diffusion, or run the repository's own code with"
                " DiffusionPipeline.from_pretrained(..., trust_remote_code=True) if you trust it"
            )
        index[name] = [found.__module__, found.__name__]


def read_index(file: Path) -> dict:
    """The index of a pipeline; ValueError for a file that is none."""
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
        index_class_name(index)
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise ValueError(
            f"{file} is damaged or no index of a pipeline ({error}); save or fetch the pipeline again"
        ) from error
    return index


def index_class_name(index: dict) -> str:
    """The pipeline's class name; shipped code makes the entry a list of file and class."""
    name = index["_class_name"]
    return name[1] if isinstance(name, list) else name


def find_index(
    name_or_path: str | os.PathLike, subfolder: str | None = None, revision: str | None = None, **where
) -> Path:
    """The model_index.json of a folder or, fetched, of a repository; `where`: see
    `download_pipeline`.

    Raises ValueError for a folder or name that cannot hold a pipeline, OSError for what the Hub
    does not have.
    """
    if os.path.isdir(name_or_path):
        file = Path(name_or_path) / (subfolder or "") / INDEX
        unfinished = unfinished_run(file.parent)
        if not file.is_file():
            why = f"it has no {INDEX}" if unfinished is None else f"{unfinished}, which writes its pipeline at the end"
            raise ValueError(f"the folder {str(file.parent)!r} holds no pipeline: {why}")
        if unfinished is not None:
            _warn_once(f"{file.parent}: the pipeline is of an earlier end; {unfinished}")
        return file
    repo_id = str(name_or_path)
    if os.path.exists(repo_id):
        raise ValueError(f"{repo_id!r} is a file; give the folder of a pipeline, or 'user/repository' on the Hub")
    if repo_id.count("/") > 1 or repo_id.startswith((".", "/", "~")):
        raise ValueError(f"{repo_id!r} is neither a folder here nor a name of the form 'user/repository' on the Hub")
    parent = Path(repo_id).parent
    if "/" in repo_id and parent.is_dir():
        # A folder mistyped, or a repository whose owner has the name of a folder here.
        if not _is_on_the_hub(repo_id, revision, where.get("token"), where.get("cache_dir")):
            raise ValueError(
                f"there is no folder {repo_id!r}, though {str(parent)!r} is one here, and no repository of this name "
                "was found on the Hub; give a folder that is there, or look whether the Hub can be reached"
            )
        _warn_once(f"{repo_id} is taken from the Hub: {str(parent)!r} is a folder here, but does not hold it")
    try:
        options = {"subfolder": subfolder, "revision": revision, **where}
        with hub_or_cache(repo_id):
            return Path(patiently(lambda: hf_hub_download(repo_id, INDEX, **options)))
    except LocalEntryNotFoundError as error:  # before EntryNotFoundError, of which it is a kind
        raise OSError(
            f"there is no folder {repo_id!r} here, and the Hub could not be asked for {repo_id!r}, and it is not in "
            "the cache"
        ) from error
    except RevisionNotFoundError as error:
        raise OSError(f"{repo_id!r} has no branch, tag or commit {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise OSError(
            f"{repo_id!r} is neither a folder here nor a repository on the Hub that you may read; log in with"
            " `hf auth login` if it is private"
        ) from error
    except EntryNotFoundError as error:
        where = f" in its folder {subfolder!r}" if subfolder else ""
        raise OSError(f"the repository {repo_id!r} holds no pipeline{where}: it has no {INDEX}") from error


@functools.cache
def _warn_once(sentence: str) -> None:
    # Loading asks for the index more than once.
    logger.warning(sentence)


def _is_on_the_hub(repo_id: str, revision: str | None, token: str | None, cache_dir: str | None) -> bool:
    """Whether the cache or the Hub has a repository, asked once and briefly."""
    if isinstance(try_to_load_from_cache(repo_id, INDEX, cache_dir=cache_dir, revision=revision), str):
        return True
    try:
        HfApi(token=token).repo_info(repo_id, timeout=BRIEFLY)
        return True
    # Whatever goes wrong, the folder is not there.
    except Exception:
        return False


def unfinished_run(folder: Path) -> str | None:
    """In words, that a training run in a folder has not come to its end, and what to do."""
    manifests = sorted(
        folder.glob("checkpoint-[0-9]*/manifest.json"), key=lambda file: (len(file.parent.name), file.parent.name)
    )
    try:
        run = json.loads(manifests[-1].read_text(encoding="utf-8"))
        step, total = int(run["step"]), int(run["total_steps"])
    except (IndexError, OSError, ValueError, KeyError, TypeError):
        return None
    index = folder / INDEX
    # A run may also have been ended at the step of its newest checkpoint.
    if index.is_file() and (step >= total or index.stat().st_mtime >= manifests[-1].stat().st_mtime):
        return None
    return (
        f"its run has come to step {step:,} of {total:,}; go on by its command with --resume_from_checkpoint latest, "
        f"to which --max_train_steps {step} adds that it ends there"
    )


def download_pipeline(name_or_path: str | os.PathLike, options: dict) -> Path:
    """The local folder of a pipeline, fetched from the Hub if it is no folder, without any code.

    Takes what says where to look out of `options`, the keyword arguments of a `from_pretrained`
    call: subfolder, revision, token, cache_dir, local_files_only, force_download; and `verify`,
    which compares all files with the Hub's checksums. Parts that `options` holds are not fetched.
    OSError where files are missing, or damaged also when fetched again.
    """
    where = {key: options.pop(key) for key in WHERE if key in options}
    verify = options.pop("verify", False)
    if verify and os.path.isdir(name_or_path):
        raise ValueError(
            f"verify compares a download with the Hub, but {str(name_or_path)!r} is a folder here; leave it out"
        )
    index_file = find_index(name_or_path, **where)
    if os.path.isdir(name_or_path):
        return index_file.parent
    index = read_index(index_file)
    parts = [
        name
        for name, entry in index.items()
        if NAME.fullmatch(name) and isinstance(entry, list) and entry[:1] != [None] and name not in options
    ]
    subfolder = where.pop("subfolder", None)
    prefix = f"{subfolder}/" if subfolder else ""
    ignored = NOT_FETCHED
    if options.get("variant") is None:
        ignored = ignored + [f"{prefix}{part}/*.*.safetensors" for part in parts]  # the variants
    commit = index_file.parents[prefix.count("/")].name  # so that a push in between cannot mix two versions
    patterns = {"allow_patterns": [f"{prefix}{part}/*" for part in parts], "ignore_patterns": ignored}
    try:
        patiently(lambda: snapshot_download(str(name_or_path), **patterns, **{**where, "revision": commit}))
    except LocalEntryNotFoundError:  # told below, in terms of the pipeline
        pass
    # While the Hub is out of reach, snapshot_download hands back what the cache has, without a
    # word.
    missing = [part for part in parts if not any((index_file.parent / part).glob("*.json"))]
    if missing:
        raise OSError(
            f"{', '.join(missing)} of {str(name_or_path)!r} could not be fetched: the Hub cannot be "
            "reached and the cache has only a part of this repository, or the repository itself lacks them"
        )
    if verify:
        verify_download(str(name_or_path), commit, where.get("token"), where.get("cache_dir"))
    return index_file.parent


def load_pipeline(name_or_path: str | os.PathLike, trust_remote_code: bool = False, **kwargs) -> DiffusionPipeline:
    """Load any pipeline: with a class of this package or of this process, else as diffusers does.

    `kwargs` are those of `from_pretrained`, and `verify`. Only a pipeline whose class is not here
    needs `trust_remote_code`. Weights are read as safetensors; those of such a one also otherwise
    with `use_safetensors=False`.
    """
    index_file = find_index(name_or_path, **{key: kwargs[key] for key in WHERE if key in kwargs})
    index = read_index(index_file)
    own = package_class(index_class_name(index), DiffusionPipeline)
    if own is None and isinstance(index["_class_name"], list):
        own = imported_class(*map(str, index["_class_name"]), DiffusionPipeline)
    if own is not None:
        return own.from_pretrained(name_or_path, **kwargs)
    if kwargs.get("subfolder"):
        raise ValueError(
            f"{index_file.parent} holds a pipeline of another package, for which diffusers has no subfolder"
        )
    if kwargs.pop("verify", False):
        fetch_and_verify(
            str(name_or_path), **{k: kwargs[k] for k in ("revision", "token", "cache_dir") if k in kwargs}
        )
    kwargs = {"use_safetensors": True, **kwargs}
    return DiffusionPipeline.from_pretrained(name_or_path, trust_remote_code=trust_remote_code, **kwargs)


def describe_pipeline(name_or_path: str | os.PathLike, **where) -> dict:
    """What a pipeline consists of, from its small files alone: without code and weights.

    Returns `class_name`, `index`, and `parts`: for each the `class_name`, the `config`, and the
    `parameters` of a model. `where`: subfolder, revision, token, cache_dir, local_files_only.
    """
    index_file = find_index(name_or_path, **where)
    index = read_index(index_file)
    subfolder = where.pop("subfolder", None)
    prefix = f"{subfolder}/" if subfolder else ""
    if os.path.isdir(name_or_path):
        weights = {
            str(f.relative_to(index_file.parent)): _header(f) for f in index_file.parent.glob("*/*.safetensors")
        }
    else:
        where["revision"] = index_file.parents[prefix.count("/")].name
        snapshot_download(str(name_or_path), allow_patterns=[f"{prefix}*/*config.json"], **where)
        weights = _headers_on_the_hub(str(name_or_path), prefix, **where)
    parts = {}
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list) or len(entry) != 2 or entry[0] is None:
            continue
        configs = sorted((index_file.parent / name).glob("*config.json"))
        shapes = [header for file, header in weights.items() if file.split("/")[0] == name and _is_plain(file)]
        parts[name] = {
            "class_name": entry[1],
            "config": json.loads(configs[0].read_text(encoding="utf-8")) if configs else {},
            "parameters": sum(shapes) if shapes else None,
        }
    return {"class_name": index_class_name(index), "index": index, "parts": parts}


def _is_plain(file: str) -> bool:
    return os.path.basename(file).count(".") == 1  # variants, such as fp16, repeat the same parameters


def _header(file: Path) -> int:
    """The number of parameters in a safetensors file, from its header."""
    with open(file, "rb") as f:
        header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
    return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")


def _headers_on_the_hub(repo_id: str, prefix: str, revision: str, token: str | None = None, **where) -> dict[str, int]:
    if where.get("local_files_only"):
        return {}
    api = HfApi(token=token)
    counts = {}
    for file in api.list_repo_files(repo_id, revision=revision):
        if file.startswith(prefix) and file.endswith(".safetensors"):
            metadata = api.parse_safetensors_file_metadata(repo_id, file, revision=revision)
            counts[file[len(prefix) :]] = sum(metadata.parameter_count.values())
    return counts
