"""What lies in a folder or an archive arrives, and what is left out is named."""

import io
import json
import os
import struct
import tarfile
import zipfile

import datasets
import numpy as np
import pytest
from PIL import Image

from hf_diffusion.data.addresses import entry_address, read_bytes, shown
from hf_diffusion.data.loading import load_data
from hf_diffusion.data.splits import load_unaugmented
from tests.data.making import folder_of, labelled_parquet, noise_image, parquet_of, png, same, truncate, zip_of


RED, BLUE = Image.new("RGB", (4, 4), (255, 0, 0)), Image.new("RGB", (4, 4), (0, 0, 255))


def load(path, **options):
    return load_data(train_data_dir=str(path), **options)


def seeds(data) -> list[int]:
    """Which of the images 0, 1, ... of `noise_image` the data are, in their order."""
    if data.num_samples is None:
        samples = np.concatenate([data.to_samples(batch) for batch in data.once(4)])
    else:
        samples = data.to_samples(data.fetch(range(len(data)), 0))
    known = np.stack([np.asarray(noise_image(seed)) for seed in range(20)])
    return (samples[:, None] == known).all((2, 3, 4)).argmax(1).tolist()


def remarks(data) -> str:
    return "; ".join(data.describe()["remarks"])


# Splits


def ways_in(tmp_path) -> dict:
    """The same ten images by every way that has one split."""
    images = {f"{seed}.png": png(noise_image(seed)) for seed in range(10)}
    folder = folder_of(tmp_path / "folder", {"": 10})
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        archive.add(folder, ".")
    table = parquet_of(
        tmp_path / "one.parquet",
        {"image": [{"bytes": data, "path": None} for data in images.values()]},
        {"image": datasets.Image()},
    )
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "train-00000-of-00001.parquet").write_bytes(table.read_bytes())
    datasets.Dataset.from_parquet(str(table)).save_to_disk(tmp_path / "saved")
    return {
        "folder": {"train_data_dir": str(folder)},
        "path as dataset_name": {"dataset_name": str(folder)},
        "zip": {"train_data_dir": str(zip_of(tmp_path / "set.zip", images))},
        "tar": {"train_data_dir": str(tmp_path / "set.tar")},
        "parquet": {"train_data_dir": str(table)},
        "folder of parquets": {"train_data_dir": str(tmp_path / "tables")},
        "save_to_disk": {"train_data_dir": str(tmp_path / "saved")},
    }


def test_every_way_in_honours_slices_and_refuses_unknown_splits_streamed_or_not(tmp_path):
    for way, where in ways_in(tmp_path).items():
        for streaming in (False, True):
            how = {**where, "streaming": streaming}
            wanted = {"train[80%:]": 2, "train[3:5]": 2}
            wanted |= {} if streaming else {"train": 10, "train[:80%]": 8, "train[-4:]": 4}
            for split, count in wanted.items():
                found = sorted(seeds(load_data(**how, split=split)))
                start = {"train[80%:]": 8, "train[3:5]": 3, "train[-4:]": 6}.get(split, 0)
                assert found == list(range(start, start + count)), (way, split, streaming)
            for split, message in {
                "vlidation": r"split 'vlidation' is unknown; .* has train \(10\), of which a part is train\[:80%\]",
                "train[10:]": r"split 'train\[10:\]' of .* holds nothing; train has 10 rows",
                "train[:x]": r"split 'train\[:x\]' is not possible; a part is written train\[:80%\]",
            }.items():
                with pytest.raises(ValueError, match=message):
                    load_data(**how, split=split)


@pytest.mark.parametrize("wrapper", ["", "mine/"])
def test_train_and_test_folders_are_never_mixed_in_a_folder_or_a_zip(tmp_path, wrapper):
    pictures = {"Train": RED, "Test": BLUE}
    files = {f"{wrapper}{s}/{c}/{i}.png": png(p) for s, p in pictures.items() for c in "ab" for i in range(3)}
    files[f"{wrapper}docs/readme.txt"] = "x"
    packed = zip_of(tmp_path / "split.zip", files)
    for name, content in files.items():
        (tmp_path / "split" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "split" / name).write_bytes(content.encode() if isinstance(content, str) else content)
    for path in (packed, tmp_path / "split"):
        for split, picture in (("train", RED), ("test", BLUE), ("Test", BLUE), ("testing", BLUE)):
            data = load(path, split=split)
            assert (data.to_samples(data.fetch(range(6), 0)) == np.asarray(picture)).all()
            assert data.class_names == ["a", "b"] and data.labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert data.describe()["splits"] == {"test": 6, "train": 6}
        with pytest.raises(ValueError, match=r"split 'validation' is unknown; .* has test \(6\), train \(6\)"):
            load(path, split="validation")


def test_images_beside_split_folders_are_named_and_left_out(tmp_path):
    folder_of(tmp_path / "set", {"train/a": 2, "train/b": 2, "val/a": 1, "extra": 3})
    data = load(tmp_path / "set")
    assert len(
        data
    ) == 4 and "left out 3 images (extra/00.png, extra/01.png, extra/02.png) beside the splits" in remarks(data)
    assert load(tmp_path / "set", split="validation").describe()["splits"] == {"train": 4, "validation": 1}


def test_folders_that_mean_the_same_split_stay_apart(tmp_path):
    folder_of(tmp_path / "set", {"train/a": 1, "val/a": 2, "validation/a": 3, "Train/a": 4})
    assert load(tmp_path / "set").describe()["splits"] == {"train": 1, "validation": 3, "Train": 4, "val": 2}
    assert len(load(tmp_path / "set", split="val")) == 2 and len(load(tmp_path / "set", split="Train")) == 4


def test_held_out_images_that_are_trained_on_are_refused_and_classes_keep_their_numbers(tmp_path):
    folder = folder_of(tmp_path / "set", {"train/a": 2, "train/b": 2, "train/c": 2, "val/c": 2, "val/a": 1})
    asked = {"train_data_dir": str(folder), "split": "train"}
    data = load_data(**asked)
    held_out = load_unaugmented(asked, data, "val")
    assert held_out.class_names == ["a", "b", "c"] and held_out.labels.tolist() == [0, 2, 2]
    with pytest.raises(ValueError, match=r"split 'train\[50%:\]' shares 3 of its 3 samples with the training"):
        load_unaugmented(asked, data, "train[50%:]")
    for split in ("train", "train[60%:]"):
        streamed = {**asked, "split": split, "streaming": True}
        with pytest.raises(ValueError, match=r"split 'train\[50%:\]' shares rows with the training"):
            load_unaugmented(streamed, load_data(**streamed), "train[50%:]")
    asked["split"] = "train[:50%]"
    assert len(load_unaugmented(asked, load_data(**asked), "train[50%:]")) == 3
    (folder / "val" / "a").rename(folder / "val" / "d")
    with pytest.raises(ValueError, match="set has the classes 'd', which are not among 'a', 'b', 'c'"):
        load_unaugmented(asked, data, "val")


def test_a_part_has_the_classes_of_the_whole_and_says_which_of_them_it_lacks(tmp_path):
    data = load(folder_of(tmp_path / "set", {"a": 2, "b": 2, "c": 2}), split="train[:50%]")
    assert data.class_names == ["a", "b", "c"] and data.class_counts == {"a": 2, "b": 1, "c": 0}
    assert "of 3 classes, 1 has ('c') no image in train[:50%]" in remarks(data)


# What arrives and what does not


def test_all_that_pillow_reads_arrives_and_the_rest_is_counted_and_named(tmp_path, caplog):
    folder = tmp_path / "set [v1] {x} 100%#?*"
    folder.mkdir()
    formats = {
        "0.png": "PNG",
        "1.avif": "AVIF",
        "2.JPG": "JPEG",
        "3.jfif": "JPEG",
        "4.png": "WEBP",
        "im[5].gif": "GIF",
    }
    for name, kind in formats.items():
        noise_image(0).save(folder / name, kind)
    (folder / "notes.docx").write_text("x")
    noise_image(0).save(folder / "noext", "PNG")
    (folder / "._0.png").write_bytes(b"Mac OS X")
    (folder / "b").mkdir()
    data = load(folder)
    assert len(data) == 6 and data.skipped == 0
    assert "left out 2 files (noext, notes.docx) without an image's extension" in remarks(data)
    assert "left out 1 hidden file (._0.png)" in remarks(data) and "left out 1 empty folder (b)" in remarks(data)
    assert "left out 2 files" in caplog.text


def test_links_to_folders_are_followed_once_and_outputs_of_a_run_are_no_data(tmp_path):
    folder_of(tmp_path / "elsewhere", {"": 3})
    folder = folder_of(tmp_path / "set", {"cat": 2})
    (folder / "dog").symlink_to(tmp_path / "elsewhere")
    (folder / "cat" / "loop").symlink_to(folder)
    run = folder_of(folder / "runs", {"samples": 4})
    (run / "metrics.jsonl").write_text("{}")
    (folder / "data_preview.png").write_bytes(png(RED))
    data = load(folder)
    assert data.class_counts == {"cat": 2, "dog": 3}
    assert "left out the folder runs, which is the output of a training run" in remarks(data)


def test_files_hidden_in_an_archive_or_twice_in_it_are_named(tmp_path):
    image = png(noise_image(0))
    path = zip_of(tmp_path / "a.zip", {"0.png": image, "__MACOSX/._0.png": "x", "1.png": image})
    with pytest.warns(UserWarning, match="Duplicate"):
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("0.png", png(noise_image(7)))
    data = load(path)
    assert seeds(data) == [7, 0] and "of 1 name (0.png) given twice the last file is taken" in remarks(data)
    assert "left out 1 hidden file (__MACOSX/._0.png)" in remarks(data)


def test_folders_that_cannot_be_read_and_names_that_are_no_text_are_named(tmp_path, monkeypatch):
    folder = folder_of(tmp_path / "set", {"cat": 2, "dog": 1, "locked": 1})
    noise_image(0).save(os.fsencode(folder / "cat") + b"/caf\xe9.png", "PNG")
    scandir = os.scandir

    def refusing(path):
        if os.fspath(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    data = load(folder)
    assert data.class_counts == {"cat": 2, "dog": 1}
    assert "left out 1 folder (locked) that cannot be read" in remarks(data)
    assert r"left out 1 file (cat/caf\udce9.png) whose names are not UTF-8" in remarks(data)


def test_what_is_published_of_the_data_holds_no_path(tmp_path):
    folder = folder_of(tmp_path / "set", {"": 2})
    noise_image(0).save(folder / "00.png", save_all=True, append_images=[noise_image(1)])
    for where in ({"train_data_dir": str(folder)}, {"dataset_name": str(folder)}):
        described = load_data(**where).describe()
        assert described["name"] == "set" and str(tmp_path) not in repr(described)
        assert "of animations only the first frame is used: 00.png (row 0) has 2" in described["remarks"]


# Classes


@pytest.mark.parametrize(
    ("files", "classes", "remark"),
    [
        (["cat/0", "dog/0"], ["cat", "dog"], ""),
        (["mine/cat/0", "mine/dog/0"], ["cat", "dog"], ""),
        (["animals/cat/0", "animals/dog/0", "plants/oak/0"], ["cat", "dog", "oak"], ""),
        (["cat/2019/0", "cat/2020/0", "dog/2019/0"], ["cat", "cat", "dog"], "classes are the outermost folders"),
        (["cat/0", "cat/more/0", "dog/0"], ["cat", "cat", "dog"], "classes are the outermost folders"),
        (
            ["cat/0", "dog/0", "0"],
            None,
            "no classes: 1 image (0.png) lies beside the folders cat, dog; put every image",
        ),
        (["boat/0", "train/0"], ["boat", "train"], ""),
        (["0", "1"], None, ""),
    ],
)
def test_classes_are_those_of_the_folders_or_a_sentence_says_what_hides_them(tmp_path, files, classes, remark):
    data = load(zip_of(tmp_path / "a.zip", {f"{name}.png": png(RED) for name in files}))
    found = None if data.labels is None else [data.class_names[label] for label in data.labels]
    assert found == classes and remark in remarks(data) and bool(remark) == bool(remarks(data))


def test_captions_beside_class_folders_leave_the_classes_alone(tmp_path):
    folder = folder_of(tmp_path / "set", {"cat": 2, "dog": 1})
    (folder / "metadata.csv").write_text("file_name,text\ncat/00.png,a cat\ncat/01.png,a cat\ndog/00.png,a dog\n")
    assert load(folder).class_counts == {"cat": 2, "dog": 1}
    assert load(folder, label_column="text").class_counts == {"a cat": 2, "a dog": 1}


STYLEGAN = '{"labels": [["00000/0.png", 1], ["00000/1.png", 0], ["00000/2.png", 1]]}'


@pytest.mark.parametrize(
    ("files", "names", "labels"),
    [
        ({"metadata.csv": "file_name,label\n2.png,1\n0.png,1\n1.png,0\n"}, ["0", "1"], [1, 0, 1]),
        ({"metadata.jsonl": '{"file_name": "0.png", "label": "oak"}\n{"file_name": "1.png", "label": "ash"}\n'
          '{"file_name": "2.png", "label": "oak"}\n'}, ["ash", "oak"], [1, 0, 1]),
        ({"dataset.json": STYLEGAN}, ["0", "1"], [1, 0, 1]),
        ({"0.cls": "1", "1.cls": "0\n", "2.cls": "1"}, ["0", "1"], [1, 0, 1]),
        ({f"{i}.json": json.dumps({"label": ["ash", "oak"][i != 1]}) for i in range(3)}, ["ash", "oak"], [1, 0, 1]),
        ({"metadata.csv": "file_name,label\n0.png,01\n1.png,1\n2.png,01\n"}, ["01", "1"], [0, 1, 0]),
    ],
)  # fmt: skip
def test_labels_beside_the_images_are_read_from_zip_tar_and_folder(tmp_path, files, names, labels):
    prefix = "00000/" if "dataset.json" in files else ""
    files = {**{f"{prefix}{seed}.png": png(noise_image(seed)) for seed in range(3)}, **files}
    paths = [zip_of(tmp_path / "a.zip", files), tmp_path / "a.tar", tmp_path / "folder", tmp_path / "shards"]
    with tarfile.open(paths[1], "w") as archive:
        for name, content in files.items():
            content = content.encode() if isinstance(content, str) else content
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
            (paths[2] / name).parent.mkdir(parents=True, exist_ok=True)
            (paths[2] / name).write_bytes(content)
    paths[3].mkdir()
    (paths[3] / "data.tar").write_bytes(paths[1].read_bytes())
    for path in paths:
        data = load(path)
        assert seeds(data) == [0, 1, 2] and data.class_names == names and data.labels.tolist() == labels
        stream = load(path, streaming=True)
        batch = next(stream.once(3))
        assert stream.class_names == names
        assert batch["labels"].tolist() == [labels[seed] for seed in seeds(stream)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.csv", "name,label\n0.png,1\n", "needs a column file_name with the name of an image in every row"),
        ("metadata.jsonl", "{", r"metadata\.jsonl cannot be read: .*; repair or remove it"),
        ("metadata.csv", "file_name,label\nx.png,1\n", "names no image that is there, such as 'x.png'"),
        ("metadata.csv", "file_name,label\n0.png,a\n", "row 1 has no label in column 'label'"),
        (
            "metadata.csv",
            b"file_name,label\n0.png,H\xfctte\n",
            r"metadata\.csv is not text in UTF-8; save it as UTF-8",
        ),
    ],
)
def test_metadata_that_do_not_fit_are_refused_in_one_sentence(tmp_path, name, content, message):
    files = {f"{seed}.png": png(noise_image(seed)) for seed in range(2)}
    with pytest.raises(ValueError, match=message):
        load(zip_of(tmp_path / "a.zip", {**files, name: content}))


def test_labels_from_two_places_or_of_no_class_are_told(tmp_path):
    files = {f"{folder}/{seed}.png": png(noise_image(seed)) for folder in ("cat", "dog") for seed in range(2)}
    rows = "".join(f"{name},{'xy'[place % 2]}\n" for place, name in enumerate(files))
    both = load(zip_of(tmp_path / "a.zip", {**files, "metadata.csv": "file_name,label\n" + rows + "cat/0.png,y\n"}))
    assert both.class_names == ["x", "y"] and both.labels.tolist() == [1, 1, 0, 1]
    assert "classes are those of the labels beside the images, not the 2 folders" in remarks(both)
    assert "metadata.csv names 1 image (cat/0.png) more than once, of which the last row is taken" in remarks(both)
    other = load(zip_of(tmp_path / "b.zip", {"0.png": png(RED), "labels.csv": "file_name,label\n0.png,a\n"}))
    assert "1 table (labels.csv) not read; labels are taken from metadata.csv" in remarks(other)
    vectors = {"a/0.png": png(RED), "dataset.json": '{"labels": [["a/0.png", [0, 1]]]}'}
    data = load(zip_of(tmp_path / "c.zip", vectors))
    assert data.class_names is None and "no classes: column 'label' is of type List" in data.why_no_classes
    unlabelled = {"0.png": png(RED), "1.png": png(RED), "metadata.csv": "file_name,label\n0.png,a\n"}
    with pytest.raises(ValueError, match="whose classes are unknown before the stream was read"):
        load(zip_of(tmp_path / "d.zip", unlabelled), streaming=True)


# Archives in a folder


def test_archives_in_a_folder_are_like_folders_of_their_names(tmp_path):
    def zips(where, **colours):
        (tmp_path / where).mkdir()
        for name, image in colours.items():
            zip_of(tmp_path / where / f"{name}.zip", {f"{i}.png": png(image) for i in range(2)})
        return tmp_path / where

    splits = zips("splits", train=RED, test=BLUE)
    for split, colour in (("train", [255, 0, 0]), ("test", [0, 0, 255])):
        data = load(splits, split=split)
        assert data.to_samples(data.fetch([0, 1], 0))[:, 0, 0].tolist() == [colour] * 2 and not data.class_names
    classes = load(zips("classes", cat=RED, dog=BLUE))
    assert classes.class_counts == {"cat": 2, "dog": 2}
    shards = {"train-000": 0, "train-001": 2, "val-000": 4}
    (tmp_path / "shards").mkdir()
    for name, first in shards.items():
        zip_of(
            tmp_path / "shards" / f"{name}.zip", {f"{first + i}.png": png(noise_image(first + i)) for i in range(2)}
        )
    assert seeds(load(tmp_path / "shards")) == [0, 1, 2, 3] and seeds(load(tmp_path / "shards", split="val")) == [4, 5]
    assert "read as parts of one set: 2 archives (train-000.zip, train-001.zip)" in remarks(load(tmp_path / "shards"))
    with pytest.raises(ValueError, match=r"000\.zip/0\.png and 001\.zip both hold 0\.png; unpack them into folders"):
        load(zips("clash", **{"000": RED, "001": BLUE}))


def test_data_given_by_a_relative_path_are_those_of_the_absolute_one(tmp_path, monkeypatch):
    folder_of(tmp_path / "set", {"a": 1, "b": 1})
    (tmp_path / "set" / "metadata.csv").write_text("file_name,label\na/00.png,x\nb/00.png,y\n")
    there = load(tmp_path / "set")
    monkeypatch.chdir(tmp_path)
    here = load("set")
    assert same(here.fetch([0, 1], 0), there.fetch([0, 1], 0)) and here.fingerprint == there.fingerprint


# Tables


def test_label_columns_that_are_not_taken_say_so_and_odd_ids_take_no_memory(tmp_path):
    floats = load(labelled_parquet(tmp_path / "f.parquet", [0.0, 1.0], datasets.Value("float32")))
    assert floats.class_names is None and "no classes: column 'label' is of type" in remarks(floats)
    with pytest.raises(ValueError, match=r"ids up to 3000000000 without \[2, 3, 4, 5, 6\]; ids must be 0\.\.n-1"):
        load(labelled_parquet(tmp_path / "h.parquet", [0, 1, 3_000_000_000], datasets.Value("int64")))
    with pytest.raises(ValueError, match="row 1 has an empty label in column 'label'"):
        load(labelled_parquet(tmp_path / "e.parquet", ["x", ""], datasets.Value("string")))
    twins = load(labelled_parquet(tmp_path / "t.parquet", ["cat", "Cat"], datasets.Value("string")))
    assert "classes differ in case or spaces only: 'Cat' and 'cat'" in remarks(twins)
    unused = load(labelled_parquet(tmp_path / "u.parquet", [0, 0], datasets.ClassLabel(names=["a", "b"])))
    assert unused.class_counts == {"a": 2, "b": 0} and "of 2 classes, 1 has ('b') no image in train" in remarks(unused)


def test_columns_that_hold_no_image_say_what_is_there_and_what_is_taken(tmp_path):
    def refused(columns, features):
        with pytest.raises(ValueError, match="an image is an encoded file .* stored as bytes") as caught:
            load(parquet_of(tmp_path / "x.parquet", columns, features))
        return str(caught.value)

    image = {"bytes": png(RED), "path": None}
    text = datasets.Value("string")
    assert "'image' holds lists, and a row holds one" in refused(
        {"image": [[image, image]]}, {"image": datasets.List(datasets.Image())}
    )
    assert "'image' holds text; pass the folder with the files" in refused({"image": ["0.png"]}, {"image": text})
    assert "its columns are ['id']" in refused({"id": [1]}, {"id": datasets.Value("int64")})
    only_bytes = {"image": {"bytes": datasets.Value("binary")}}
    data = load(parquet_of(tmp_path / "b.parquet", {"image": [{"bytes": png(noise_image(3))}]}, only_bytes))
    assert seeds(data) == [3]


# Names are names


def test_a_name_in_an_archive_is_never_an_address(tmp_path, monkeypatch):
    names = ["a.png::http://127.0.0.1:9/x.png", "b%3A.png", "ä ö::zip://c.png"]
    files = {name if name.endswith(".png") else f"{name}.png": png(noise_image(s)) for s, name in enumerate(names)}
    monkeypatch.setattr("datasets.utils.file_utils.xopen", lambda *args, **kwargs: pytest.fail(f"followed {args}"))
    assert sorted(seeds(load(zip_of(tmp_path / "a.zip", files), label_column="none"))) == [0, 1, 2]
    address = entry_address("/data/set.zip", names[0])
    assert shown(address) == f"/data/set.zip/{names[0]}"
    for address in ("http://127.0.0.1:9/x.png", "zip://a.png::http://127.0.0.1:9/x.zip", "zip://a::http://b::hf://c"):
        with pytest.raises(OSError, match="it is an address outside of the Hub, which is not followed"):
            read_bytes(address)


def test_a_table_whose_paths_lead_nowhere_names_them(tmp_path):
    path = tmp_path / "p.parquet"
    features = {"image": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}}
    for place, reason in (("0.png", "its path is not absolute"), ("http://127.0.0.1:9/0.png", "outside of the Hub")):
        parquet_of(path, {"image": [{"bytes": None, "path": place}]}, features)
        with pytest.raises(
            ValueError, match=rf"no image can be decoded: \S*0\.png \(row 0\): cannot be read: .*{reason}"
        ):
            load(path)


# Damage


def with_header(path, flag: int = 0, method: int | None = None):
    """Change flag bits and compression method of every entry of a zip, in both headers."""
    data = bytearray(path.read_bytes())
    for signature, flag_at, method_at in ((b"PK\x03\x04", 6, 8), (b"PK\x01\x02", 8, 10)):
        at = data.find(signature)
        while at >= 0:
            struct.pack_into("<H", data, at + flag_at, struct.unpack_from("<H", data, at + flag_at)[0] | flag)
            if method is not None:
                struct.pack_into("<H", data, at + method_at, method)
            at = data.find(signature, at + 4)
    path.write_bytes(data)
    return path


def test_archives_that_cannot_be_read_are_answered_in_one_sentence(tmp_path):
    files = {f"{seed}.png": png(noise_image(seed)) for seed in range(3)}
    with pytest.raises(ValueError, match=r"a\.zip is encrypted; unpack it and pass the folder"):
        load(with_header(zip_of(tmp_path / "a.zip", files), flag=1))
    with pytest.raises(ValueError, match=r"b\.zip is packed by Deflate64, which Python cannot read; unpack it"):
        load(with_header(zip_of(tmp_path / "b.zip", files), method=9))
    (tmp_path / "c.zip").write_bytes(b"PK\x03\x04 cut off")
    (tmp_path / "d.tar").write_bytes(b"no tar")
    for name in ("c.zip", "d.tar"):
        with pytest.raises(ValueError, match=rf"data set '{name}' is damaged, incomplete or not"):
            load(tmp_path / name)
    broken = zip_of(tmp_path / "e.zip", files)
    data = bytearray(broken.read_bytes())
    data[data.find(b"IDAT") + 10] ^= 0xFF
    broken.write_bytes(data)
    checked = load(broken)
    assert checked.skipped == 1 and seeds(checked) == [1, 1, 2]


def test_an_unreadable_image_in_a_tar_is_replaced_like_one_in_a_folder(tmp_path):
    folder = folder_of(tmp_path / "set", {"": 4})
    truncate(folder / "01.png")
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        archive.add(folder, ".")
    assert seeds(load(tmp_path / "set.tar")) == seeds(load(folder)) == [0, 2, 2, 3]
    assert os.listdir(folder) and load(tmp_path / "set.tar").skipped == 1
