"""Opening a set of images: what is found out from it, and what a wrong request is answered."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from hf_diffusion.data import columns as data_columns
from hf_diffusion.data.image_data import ImageData
from hf_diffusion.data.images import load_images
from hf_diffusion.data.pixels import from_network_range
from hf_diffusion.data.selection import evenly_spaced, shown_rows
from tests.data.making import folder_of, labelled_parquet, noise_image, parquet_of, png, same


FASHION = Path(__file__).parents[3] / "shared" / "data" / "fashion_mnist-test.parquet"


def test_digits_are_the_1797_images_of_scikit_learn_with_grey_levels_scaled_to_the_full_range():
    digits = load_digits()
    data = load_images("digits")
    assert (len(data), data.channels, data.size, data.num_classes) == (1797, 1, (8, 8), 10)
    assert data.class_names == [str(digit) for digit in range(10)]
    batch = data.fetch(range(1797), epoch=0)
    expected = np.rint(digits.images * 255 / 16) / 127.5 - 1
    np.testing.assert_allclose(batch["x_0"][:, 0], expected, atol=1e-6)
    assert batch["labels"].tolist() == digits.target.tolist()
    assert "255 / 16" in data.describe()["remarks"][0]


def test_a_part_of_the_digits_can_be_held_out():
    assert len(load_images("digits", split="train[:1500]")) + len(load_images("digits", split="train[1500:]")) == 1797
    with pytest.raises(
        ValueError, match=r"split 'test' is unknown; digits has train \(1,797\), of which a part is train\[:80%\]"
    ):
        load_images("digits", split="test")


def test_sub_folders_are_classes_even_when_one_is_called_train(tmp_path):
    data = load_images(train_data_dir=str(folder_of(tmp_path / "toys", {"boat": 3, "train": 2})))
    assert (len(data), data.channels, data.size) == (5, 3, (6, 8))
    assert data.class_names == ["boat", "train"] and data.labels.tolist() == [0, 0, 0, 1, 1]
    expected = np.array(noise_image(0)).transpose(2, 0, 1)
    assert torch.equal(from_network_range(data.fetch([0], 0)["x_0"])[0], torch.from_numpy(expected))


def test_a_folder_of_split_folders_serves_the_split_that_was_asked_for(tmp_path):
    folder_of(tmp_path / "set" / "train", {"a": 2, "b": 2})
    folder_of(tmp_path / "set" / "test", {"a": 1, "b": 2})
    assert len(load_images(train_data_dir=str(tmp_path / "set"))) == 4
    assert len(load_images(train_data_dir=str(tmp_path / "set"), split="test")) == 3
    with pytest.raises(ValueError, match=r"split 'validation' is unknown; set has test \(3\), train \(4\)"):
        load_images(train_data_dir=str(tmp_path / "set"), split="validation")


def test_a_flat_folder_has_no_labels(tmp_path):
    data = load_images(train_data_dir=str(folder_of(tmp_path / "flat", {"": 3})))
    assert data.class_names is None and data.num_classes is None
    assert "labels" not in data.fetch([0], 0)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_zip_gives_the_same_images_and_classes_as_its_folder(tmp_path, streaming):
    folder = folder_of(tmp_path / "set", {"cat": 3, "dog": 2})
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for file in sorted(folder.rglob("*.png")):
            archive.write(file, file.relative_to(folder))
        archive.writestr("__MACOSX/cat/._00.png", b"not an image")
        archive.writestr("readme.txt", "not an image")
    packed = load_images(train_data_dir=str(tmp_path / "set.zip"), streaming=streaming)
    assert packed.class_names == ["cat", "dog"]
    unpacked = load_images(train_data_dir=str(folder)).fetch(range(5), 0)
    if streaming:
        batch = next(packed.stream(0, batch_size=5))
        order = (batch["x_0"].flatten(1)[:, None] == unpacked["x_0"].flatten(1)).all(-1).int().argmax(1)
        assert sorted(order.tolist()) == list(range(5))
        assert torch.equal(batch["labels"], unpacked["labels"][order])
    else:
        assert same(packed.fetch(range(5), 0), unpacked)


@pytest.mark.skipif(not FASHION.exists(), reason=f"{FASHION} is not there")
def test_fashion_mnist_keeps_its_names_size_and_channel():
    data = load_images(train_data_dir=str(FASHION))
    assert (len(data), data.channels, data.size, data.num_classes) == (10000, 1, (28, 28), 10)
    assert data.class_names[0] == "T - shirt / top" and data.class_names[9] == "Ankle boot"
    assert np.bincount(data.labels).tolist() == [1000] * 10
    batch = data.fetch([0, 1], 0)
    assert batch["x_0"].shape == (2, 1, 28, 28) and batch["x_0"].dtype == torch.float32


def test_columns_are_found_by_type_and_wrong_names_are_answered_with_the_right_one(tmp_path):
    images = [{"bytes": png(noise_image(seed)), "path": None} for seed in range(3)]
    path = parquet_of(
        tmp_path / "a.parquet",
        {"id": [7, 8, 9], "picture": images, "kind": [0, 1, 0]},
        {"id": datasets.Value("int64"), "picture": datasets.Image(), "kind": datasets.ClassLabel(names=["x", "y z"])},
    )
    data = load_images(train_data_dir=str(path))
    assert data.class_names == ["x", "y z"]
    assert (data.describe()["image_column"], data.describe()["label_column"]) == ("picture", "kind")
    columns = r"\['id', 'picture', 'kind'\]"
    with pytest.raises(ValueError, match=rf"column 'img' is not .*{columns}; pass --image_column picture"):
        load_images(train_data_dir=str(path), image_column="img")
    with pytest.raises(ValueError, match=rf"column 'label' is not .*{columns}; pass --label_column kind"):
        load_images(train_data_dir=str(path), label_column="label")
    with pytest.raises(ValueError, match=r"column 'id' is of type .* no image; pass --image_column picture"):
        load_images(train_data_dir=str(path), image_column="id")
    assert load_images(train_data_dir=str(path), label_column="none").class_names is None


def test_encoded_bytes_without_an_image_type_are_found_too(tmp_path):
    path = parquet_of(
        tmp_path / "b.parquet",
        {"content": [png(noise_image(0)), png(noise_image(1))]},
        {"content": datasets.Value("binary")},
    )
    assert load_images(train_data_dir=str(path)).fetch([1], 0)["x_0"].shape == (1, 3, 6, 8)


def test_several_label_columns_are_a_choice_to_make(tmp_path):
    names = datasets.ClassLabel(names=["a", "b"])
    path = parquet_of(
        tmp_path / "c.parquet",
        {"image": [{"bytes": png(noise_image(0)), "path": None}], "fine": [0], "coarse": [1]},
        {"image": datasets.Image(), "fine": names, "coarse": names},
    )
    with pytest.raises(ValueError, match=r"several label columns \['fine', 'coarse'\]; pass --label_column"):
        load_images(train_data_dir=str(path))
    assert load_images(train_data_dir=str(path), label_column="coarse").labels.tolist() == [1]


def test_string_labels_become_sorted_names_and_integers_their_numbers(tmp_path):
    strings = load_images(
        train_data_dir=str(labelled_parquet(tmp_path / "s.parquet", ["oak", "ash", "oak"], datasets.Value("string")))
    )
    assert strings.class_names == ["ash", "oak"] and strings.labels.tolist() == [1, 0, 1]
    integers = load_images(
        train_data_dir=str(labelled_parquet(tmp_path / "i.parquet", [2, 0, 1], datasets.Value("int64")))
    )
    assert integers.class_names == ["0", "1", "2"] and integers.labels.tolist() == [2, 0, 1]


@pytest.mark.parametrize(
    ("labels", "feature", "message"),
    [
        ([0, -1, 1], datasets.ClassLabel(names=["a", "b"]), r"row 1 has label -1 .* allowed are 0\.\.1"),
        ([0, -1, 1], datasets.Value("int64"), "row 1 has label -1"),
        ([0, 3, 1], datasets.Value("int32"), r"ids up to 3 without \[2\]; ids must be 0\.\.n-1"),
        ([0, 1, None], datasets.ClassLabel(names=["a", "b"]), "row 2 has no label in column 'label'"),
        (["a", None, "b"], datasets.Value("string"), "row 1 has no label in column 'label'"),
    ],
)
def test_a_label_out_of_range_stops_at_once_and_names_its_row(tmp_path, labels, feature, message):
    path = labelled_parquet(tmp_path / "l.parquet", labels, feature)
    with pytest.raises(ValueError, match=message):
        load_images(train_data_dir=str(path))


def test_a_class_id_beyond_the_names_stops_at_once(tmp_path):
    path = labelled_parquet(tmp_path / "l.parquet", [0, 5], datasets.Value("int64"))
    dataset = datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "c"))
    dataset.info.features["label"] = datasets.ClassLabel(names=["a", "b"])
    with pytest.raises(ValueError, match=r"row 1 has label 5 in column 'label', allowed are 0\.\.1"):
        data_columns.read_labels(dataset, "label")


def test_a_limited_set_shows_every_class_of_a_sorted_one(tmp_path):
    data = load_images(train_data_dir=str(folder_of(tmp_path / "set", {"a": 4, "b": 4, "c": 4})), max_train_samples=3)
    assert data.labels.tolist() == [0, 1, 2] and data.class_names == ["a", "b", "c"]


def test_a_limited_set_shows_every_class_of_one_whose_classes_take_turns():
    turns = np.arange(1000) % 10
    assert len(np.unique(turns[evenly_spaced(1000, 100)])) == 1
    rows = shown_rows(1000, 100, turns)
    assert np.array_equal(np.bincount(turns[rows]).clip(1, 20), np.bincount(turns[rows])) and len(rows) == 100
    # one of each ten rows, and the same ones the next time
    assert np.array_equal(rows // 10, np.arange(100)) and np.array_equal(rows, shown_rows(1000, 100, turns))
    # where equal steps leave nothing out, or nobody knows, they stay
    for labels in (np.arange(1000) % 7, np.sort(turns), None):
        assert np.array_equal(shown_rows(1000, 100, labels), evenly_spaced(1000, 100))
    assert np.array_equal(shown_rows(30, None, turns[:30]), np.arange(30))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "pass exactly one of them"),
        ({"dataset_name": "digits", "train_data_dir": "x"}, "pass exactly one of them"),
        ({"train_data_dir": "/no/such/folder"}, "'/no/such/folder' does not exist; pass a folder of images"),
        ({"train_data_dir": __file__}, "is neither a folder nor a .parquet, .zip or .tar file"),
        ({"dataset_name": "digits", "channels": 2}, "channels=2 is not possible; choose 1, 3 or 4"),
        ({"dataset_name": "digits", "resolution": 0}, "resolution=0 is not possible"),
        ({"dataset_name": "digits", "resolution": (8, 8, 8)}, "is not possible; pass a side or"),
        ({"dataset_name": "digits", "max_train_samples": 0}, "max_train_samples=0 is not possible"),
    ],
)
def test_impossible_requests_are_answered_in_one_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        load_images(**options)


def test_empty_sets_stop_at_once(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no images; put files"):
        load_images(train_data_dir=str(tmp_path / "empty"))
    path = labelled_parquet(tmp_path / "none.parquet", [], datasets.ClassLabel(names=["a"]))
    for streaming in (False, True):
        with pytest.raises(ValueError, match=r"split 'train' of none.parquet holds nothing; train has 0 rows"):
            load_images(train_data_dir=str(path), streaming=streaming)
    (tmp_path / "zero.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match=r"zero\.parquet' is damaged, incomplete or not"):
        load_images(train_data_dir=str(tmp_path / "zero.parquet"))


@pytest.mark.parametrize(
    ("raised", "kind", "message"),
    [
        (datasets.exceptions.DatasetNotFoundError("x"), ValueError, "'me/none' does not exist on the Hub or is not"),
        (ConnectionError("x"), ConnectionError, "cannot be reached for data set 'me/none'"),
        (ValueError("Config name is missing.\nPick one of ['a']"), ValueError, r"Config name is missing. Pick one"),
        (RuntimeError("Dataset scripts are no longer supported"), ValueError, "scripts are no longer supported"),
    ],
)
def test_what_the_hub_answers_becomes_one_sentence(monkeypatch, raised, kind, message):
    def refuse(*args, **kwargs):
        raise raised

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(kind, match=message) as caught:
        load_images("me/none")
    assert "\n" not in str(caught.value)


def test_an_index_outside_of_the_set_is_refused(tmp_path):
    data = load_images(train_data_dir=str(folder_of(tmp_path / "set", {"": 2})))
    assert isinstance(data, ImageData)
    with pytest.raises(IndexError, match=r"index 2 is not in the data set 'set', which has 0\.\.1"):
        data.fetch([0, 2], 0)


@pytest.mark.slow
def test_data_of_the_hub_are_loaded_streamed_and_found_without_it_and_what_is_missing_is_explained(tmp_path, hub):
    parquet = labelled_parquet(tmp_path / "train.parquet", [1, 0, 1], datasets.ClassLabel(names=["oak", "ash tree"]))
    client = f"""
import io
import datasets, huggingface_hub, torch
from hf_diffusion.data.images import load_images
from hf_diffusion.data.selection import evenly_spaced, shown_rows
from hf_diffusion.data.loading import load_data
datasets.config.USE_PARQUET_EXPORT = False  # the test server has no such host
hub = huggingface_hub.HfApi()
hub.create_repo("alice/trees", repo_type="dataset")
hub.upload_file(path_or_fileobj={str(parquet)!r}, path_in_repo="data/train-00000-of-00001.parquet",
                repo_id="alice/trees", repo_type="dataset")
data = load_images("alice/trees")
assert data.class_names == ["oak", "ash tree"] and data.labels.tolist() == [1, 0, 1], data.describe()
batch = next(load_images("alice/trees", streaming=True).stream(0, batch_size=3))
assert sorted(batch["labels"].tolist()) == [0, 1, 1], batch
for part in range(2):
    file = io.BytesIO()
    datasets.Dataset.from_dict({{"text": [f"text {{part}} of it"] * 8}}).to_parquet(file)
    hub.create_repo("alice/texts", repo_type="dataset", exist_ok=True)
    hub.upload_file(path_or_fileobj=file.getvalue(), path_in_repo=f"data/train-0000{{part}}-of-00002.parquet",
                    repo_id="alice/texts", repo_type="dataset")
texts = load_data("alice/texts", tokenizer="chars", sequence_length=12, streaming=True, split="train[2:]")
said = "".join(texts.tokenizer.batch_decode(torch.cat([batch["x_0"] for batch in texts.once(4)])))
assert said.count("text 0") == 6 and said.count("text 1") == 8, said
try:
    load_images("alice/none")
except ValueError as error:
    print(error)
huggingface_hub.constants.ENDPOINT = "http://127.0.0.1:1"  # nobody is there, and the cache has it
assert load_images("alice/trees").fingerprint == data.fingerprint
"""
    environment = {**os.environ, **hub.env("hf_alice_write", home=str(tmp_path / "home"))}
    environment |= {"HF_UPDATE_DOWNLOAD_COUNTS": "0", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", client], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "data set 'alice/none' does not exist on the Hub or is not accessible; check the id" in done.stdout
