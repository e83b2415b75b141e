"""Opening a set of labelled images, wherever it lies."""

import contextlib
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq

from hf_diffusion.data.addresses import ARCHIVES
from hf_diffusion.data.digits import digits
from hf_diffusion.data.listing import (
    Listing,
    classes_of_folders,
    common_folder,
    counted,
    list_archives,
    list_folder,
    split_images,
)
from hf_diffusion.data.metadata import read_metadata
from hf_diffusion.data.reaching import hub_or_cache
from hf_diffusion.data.selection import Split, rows_of_split, rows_of_stream
from hf_diffusion.data.source import AnyDataset, Source


# Sets of images that need no network; a new one adds its name here.
EMBEDDED: dict[str, Callable[[], Source]] = {"digits": digits}
TAKEN = "pass a folder of images, a .zip or .tar of them, a .parquet file, or a folder that save_to_disk has made"


def open_source(
    dataset_name: str | None,
    dataset_config_name: str | None,
    train_data_dir: str | None,
    split: str,
    streaming: bool,
    cache_dir: str | None,
) -> Source:
    """Open the split, or a part of it, of a Hub id, an embedded set, or what lies at a path.

    ValueError in one sentence that names the data and says what to do; ConnectionError where the
    Hub is out of reach.
    Beware: `datasets` counts downloads over the network even for local files, unless
        HF_UPDATE_DOWNLOAD_COUNTS=0.
    """
    if (dataset_name is None) == (train_data_dir is None):
        raise ValueError(
            f"got dataset_name={dataset_name!r} and train_data_dir={train_data_dir!r}; pass exactly one of them"
        )
    if dataset_name in EMBEDDED:
        source = EMBEDDED[dataset_name]()
        _, rows = rows_of_split(split, source.splits, dataset_name)
        return source._replace(dataset=_streamed(source.dataset, streaming), rows=rows)
    path = Path(train_data_dir or dataset_name).expanduser()
    # Not the path, which may hold the name of a user and is published with the model.
    name = path.resolve().name if train_data_dir is not None or path.exists() else dataset_name
    with one_sentence(name):
        # A path under dataset_name is opened in the same way, which `datasets` would not do.
        if train_data_dir is not None or path.exists():
            return _open_path(path, split, streaming, cache_dir)._replace(name=name)
        return _open_hub(dataset_name, dataset_config_name, split, streaming, cache_dir)


@contextlib.contextmanager
def one_sentence(name: str) -> Iterator[None]:
    """Turn what libraries raise into one sentence that names the data; ours pass as they are."""
    try:
        yield
    except datasets.exceptions.DatasetNotFoundError as error:
        raise ValueError(
            f"data set {name!r} does not exist on the Hub or is not accessible; check the id, run `hf auth login` "
            "if it is private or gated, or give a folder or file that is here"
        ) from error
    except ConnectionError as error:
        raise ConnectionError(
            f"the Hub cannot be reached for data set {name!r} and the cache does not hold it; connect to the network, "
            "or give a folder or file that is here"
        ) from error
    except Exception as error:
        # Ours were raised in this package and are whole sentences.
        if isinstance(error, ValueError) and _raised_here(error):
            raise
        if not isinstance(error, (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError, *_DAMAGED)):
            raise
        cause = error.__cause__ or error
        # Arrow has no type of its own for a damaged file.
        if isinstance(cause, _DAMAGED) or (type(cause) is OSError and cause.errno is None):
            raise ValueError(
                f"data set {name!r} is damaged, incomplete or not of the kind that its name says; fetch or pack anew"
            ) from error
        reason = " ".join(str(cause).split())
        raise ValueError(f"data set {name!r} cannot be opened: {reason[:400]}") from error


_DAMAGED = (zipfile.BadZipFile, tarfile.TarError, pa.ArrowException, KeyError, AssertionError)


def _raised_here(error: BaseException) -> bool:
    traceback = error.__traceback__
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    return str(traceback.tb_frame.f_globals.get("__name__")).startswith("hf_diffusion.")


# Ways into the data


def _open_hub(name: str, config: str | None, split: str, streaming: bool, cache_dir: str | None) -> Source:
    asked = Split.parse(split)
    with hub_or_cache(name):
        dataset = datasets.load_dataset(name, config, split=asked.name, streaming=streaming, cache_dir=cache_dir)
    if not asked.is_part:
        return Source(dataset, name)
    if not streaming:
        _, rows = rows_of_split(split, {asked.name: len(dataset)}, name)
        return Source(dataset, name, rows)
    known = (dataset.info.splits or {}).get(asked.name)
    if known is None or not known.num_examples:
        _, rows = rows_of_stream(split, [asked.name], name)
    else:
        _, rows = rows_of_split(split, {asked.name: known.num_examples}, name)
    return Source(dataset, name, rows)


def _open_path(path: Path, split: str, streaming: bool, cache_dir: str | None) -> Source:
    if path.is_dir():
        return _open_folder(path, split, streaming, cache_dir)
    if path.is_file() and path.suffix.lower() == ".parquet":
        return _open_tables({"train": [path]}, path.name, split, streaming, cache_dir)
    if path.is_file() and path.suffix.lower() in ARCHIVES:
        return _open_images(list_archives([path]), path, split, streaming)
    found = "does not exist" if not path.exists() else "is neither a folder nor a .parquet, .zip or .tar file"
    raise ValueError(f"train_data_dir {str(path)!r} {found}; {TAKEN}")


def _open_folder(path: Path, split: str, streaming: bool, cache_dir: str | None) -> Source:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _open_saved(path, split, streaming)
    listing = list_folder(path)
    if listing.images:
        return _open_images(listing, path, split, streaming)
    tables = [name for name in listing.others if name.lower().endswith(".parquet")]
    if tables:
        builder = datasets.load_dataset_builder(str(path), cache_dir=cache_dir)
        files = {str(name): [Path(file) for file in found] for name, found in builder.config.data_files.items()}
        return _open_tables(files, path.name, split, streaming, cache_dir)
    archives = [path / name for name in listing.others if Path(name).suffix.lower() in ARCHIVES]
    if archives:
        return _open_images(list_archives(archives, path), path, split, streaming)
    raise ValueError(_no_images(path, listing))


def _no_images(path: Path, listing: Listing) -> str:
    there = f", but {counted(listing.others, 'file')} of other kinds" if listing.others else ""
    return (
        f"train_data_dir {str(path)!r} holds no images{there}; put files such as .png or .jpg into it, "
        "in one sub-folder for each class if there are classes"
    )


def _open_saved(path: Path, split: str, streaming: bool) -> Source:
    """What `Dataset.save_to_disk` or `DatasetDict.save_to_disk` has written."""
    saved = datasets.load_from_disk(str(path))
    parts = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
    sizes = {key: len(part) for key, part in parts.items()}
    name, rows = rows_of_split(split, sizes, path.name)
    return Source(_streamed(parts[name], streaming), path.name, rows, splits=sizes)


def _open_tables(
    files: dict[str, list[Path]], whose: str, split: str, streaming: bool, cache_dir: str | None
) -> Source:
    sizes = {name: sum(pq.read_metadata(path).num_rows for path in paths) for name, paths in files.items()}
    name, rows = rows_of_split(split, sizes, whose)
    # Beware: Arrow reads ahead by default and drops nothing of it before a file's end: memory grows
    # to the file's size.
    reading = {"fragment_scan_options": pyarrow.dataset.ParquetFragmentScanOptions(pre_buffer=False)}
    options = {"split": name, "streaming": streaming, "cache_dir": cache_dir}
    dataset = datasets.load_dataset("parquet", data_files={name: [str(p) for p in files[name]]}, **options, **reading)
    return Source(dataset, whose, rows, splits=sizes)


def _open_images(listing: Listing, path: Path, split: str, streaming: bool) -> Source:
    """Images as files, with the classes of their folders or of a file beside them."""
    if not listing.images:
        raise ValueError(_no_images(path, listing))
    root = common_folder(listing.images)
    folders, others = split_images(listing.images, root)
    images = {name: [n for n in listing.images if n.startswith(folder)] for name, folder in folders.items()}
    sizes = {name: len(own) for name, own in images.items()}
    name, rows = rows_of_split(split, sizes, path.name)
    remarks = list(listing.remarks)
    if others:
        outside = [n for n in listing.images if n[len(root) :].split("/")[0] in others]
        remarks.append(f"left out {counted(outside, 'image')} beside the splits {', '.join(folders)}")
    columns, found = _columns(listing, images[name], folders[name])
    features = datasets.Features({"image": datasets.Image(decode=False)})
    table: dict[str, list] = {"image": [{"bytes": None, "path": listing.addresses[n]} for n in images[name]]}
    for key, (classes, values) in columns.items():
        inferred = datasets.Features.from_arrow_schema(pa.schema({key: pa.array(values).type}))[key]
        features[key] = inferred if classes is None else datasets.ClassLabel(names=classes)
        table[key] = values
    dataset = datasets.Dataset.from_dict(table, features=features)
    return Source(_streamed(dataset, streaming), path.name, rows, found=remarks + found, splits=sizes)


def _columns(listing: Listing, images: Sequence[str], folder: str) -> tuple[dict[str, tuple], list[str]]:
    """Columns beside the images: (class names or None, values) by name, and remarks."""
    columns: dict[str, tuple] = {}
    metadata, remarks = read_metadata(listing, images, folder)
    for name, values in metadata.items():
        try:
            pa.array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            remarks.append(f"the column {name!r} of the metadata mixes types and is left out")
            continue
        columns[name] = (_known_classes(values) if name == "label" else None, values)
    labels, remark = classes_of_folders([image[len(folder) :] for image in images])
    if "label" in columns:
        if labels is not None and len(set(zip(labels, columns["label"][1]))) > len(set(labels)):
            remarks.append(f"classes are those of the labels beside the images, not the {len(set(labels))} folders")
        return columns, remarks
    remarks += [remark] if remark else []
    if labels is not None:
        columns["label"] = (sorted(set(labels)), labels)
    return columns, remarks


def _known_classes(values: Sequence) -> list[str] | None:
    """The class names of labels that are texts or 0..n-1; a stream has to know them before.

    None where an image has no label, or one of another kind: reading the column says so.
    """
    if not values or not all(isinstance(value, int) or (isinstance(value, str) and value.strip()) for value in values):
        return None
    found = set(values)
    if all(isinstance(value, str) for value in found):
        return sorted(found)
    return [str(number) for number in range(len(found))] if found == set(range(len(found))) else None


# Parts


def _streamed(dataset: datasets.Dataset, streaming: bool) -> AnyDataset:
    return dataset.to_iterable_dataset() if streaming else dataset


def part_of(stream: datasets.IterableDataset, rows: range | None) -> datasets.IterableDataset:
    """The rows of a stream."""
    if rows is None:
        return stream
    return (stream.skip(rows.start) if rows.start else stream).take(len(rows))
