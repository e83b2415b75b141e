"""The data: what is found out from them, how they become pixels, and that order and augmentation depend on nothing else."""

import io
import itertools
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path


os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")  # before datasets is imported: it would reach for the network

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from hf_diffusion.data import decoding as data_decoding
from hf_diffusion.data import images as data_module
from hf_diffusion.data import sources as data_sources
from hf_diffusion.data.decoding import (
    ImageTransform,
    draws,
    from_network_range,
    native_format,
    to_network_range,
    to_pixels,
)
from hf_diffusion.data.images import ImageData, batches, load_images


FASHION = Path(__file__).parents[2] / "shared" / "data" / "fashion_mnist-test.parquet"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)


def noise_image(seed: int, height: int = 6, width: int = 8, mode: str = "RGB") -> Image.Image:
    shape = (height, width) if mode == "L" else (height, width, len(mode))
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


def png(image: Image.Image) -> bytes:
    image.save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


def folder_of(root: Path, classes: dict[str, int], mode: str = "RGB") -> Path:
    seed = itertools.count()
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            noise_image(next(seed), mode=mode).save(root / name / f"{number:02}.png")
    return root


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-60])


def parquet_of(path: Path, columns: dict, features: dict) -> Path:
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(path)
    return path


def labelled_parquet(path: Path, labels: list, label_feature) -> Path:
    images = [{"bytes": png(noise_image(seed)), "path": None} for seed in range(len(labels))]
    return parquet_of(path, {"image": images, "label": labels}, {"image": datasets.Image(), "label": label_feature})


def positions(length: int, batch: int, epochs: int) -> list[list[tuple[int, int]]]:
    order = [
        (epoch, int(index)) for epoch in range(epochs) for index in np.random.default_rng(epoch).permutation(length)
    ]
    return [order[start : start + batch] for start in range(0, len(order), batch)]


def same(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


# What is found out from the data


def test_digits_are_the_1797_images_of_scikit_learn_with_grey_levels_scaled_to_the_full_range():
    digits = load_digits()
    data = load_images("digits")
    assert (len(data), data.channels, data.size, data.num_classes) == (1797, 1, (8, 8), 10)
    assert data.class_names == [str(digit) for digit in range(10)]
    batch = data.fetch(range(1797), epoch=0)
    expected = np.rint(digits.images * 255 / 16) / 127.5 - 1
    np.testing.assert_allclose(batch["pixels"][:, 0], expected, atol=1e-6)
    assert batch["labels"].tolist() == digits.target.tolist()
    assert "255 / 16" in data.describe()["remarks"][0]


def test_a_part_of_the_digits_can_be_held_out():
    assert len(load_images("digits", split="train[:1500]")) + len(load_images("digits", split="train[1500:]")) == 1797
    with pytest.raises(ValueError, match="split 'test' is unknown; digits has the one split 'train'"):
        load_images("digits", split="test")


def test_sub_folders_are_classes_even_when_one_is_called_train(tmp_path):
    data = load_images(train_data_dir=str(folder_of(tmp_path / "toys", {"boat": 3, "train": 2})))
    assert (len(data), data.channels, data.size) == (5, 3, (6, 8))
    assert data.class_names == ["boat", "train"] and data.labels.tolist() == [0, 0, 0, 1, 1]
    expected = np.array(noise_image(0)).transpose(2, 0, 1)
    assert torch.equal(from_network_range(data.fetch([0], 0)["pixels"])[0], torch.from_numpy(expected))


def test_a_folder_of_split_folders_serves_the_split_that_was_asked_for(tmp_path):
    folder_of(tmp_path / "set" / "train", {"a": 2, "b": 2})
    folder_of(tmp_path / "set" / "test", {"a": 1, "b": 2})
    assert len(load_images(train_data_dir=str(tmp_path / "set"))) == 4
    assert len(load_images(train_data_dir=str(tmp_path / "set"), split="test")) == 3
    with pytest.raises(ValueError, match=r"split 'validation' needs a sub-folder of this name"):
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
        order = (batch["pixels"].flatten(1)[:, None] == unpacked["pixels"].flatten(1)).all(-1).int().argmax(1)
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
    assert batch["pixels"].shape == (2, 1, 28, 28) and batch["pixels"].dtype == torch.float32


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
    assert load_images(train_data_dir=str(path)).fetch([1], 0)["pixels"].shape == (1, 3, 6, 8)


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
        data_sources.read_labels(dataset, "label")


def test_a_limited_set_shows_every_class_of_a_sorted_one(tmp_path):
    data = load_images(train_data_dir=str(folder_of(tmp_path / "set", {"a": 4, "b": 4, "c": 4})), max_train_samples=3)
    assert data.labels.tolist() == [0, 1, 2] and data.class_names == ["a", "b", "c"]


# From images to pixels


def test_16_bits_keep_their_precision_and_cover_the_range(tmp_path):
    values = np.array([[0, 1, 257], [40000, 65534, 65535]], np.uint16)
    (tmp_path / "deep").mkdir()
    Image.fromarray(values).save(tmp_path / "deep" / "a.png")
    data = load_images(train_data_dir=str(tmp_path / "deep"))
    assert (data.channels, data.transform.bits) == (1, 16)
    for epoch in range(2):  # decoded, then from memory
        pixels = data.fetch([0], epoch)["pixels"][0, 0].double().numpy()
        np.testing.assert_allclose(pixels, values / 32767.5 - 1, atol=1e-7)
    assert np.abs(np.rint((pixels + 1) * 32767.5) - values).max() == 0


def test_8_bit_pixels_survive_the_network_range_exactly():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    images = to_network_range(pixels)
    assert images.min() == -1 and images.max() == 1
    assert torch.equal(from_network_range(images), torch.from_numpy(pixels))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "I;16"])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("bits", [8, 16])
def test_white_of_every_mode_is_white_in_every_format(mode, channels, bits):
    white = {"I": 65535, "I;16": 65535, "1": 1, "CMYK": (0, 0, 0, 0), "HSV": (0, 0, 255), "YCbCr": (255, 128, 128)}
    image = Image.new(mode, (3, 2), white.get(mode, (255,) * len(Image.new(mode, (1, 1)).getbands())))
    if mode in ("P", "PA"):
        image = Image.new("RGBA" if mode == "PA" else "RGB", (3, 2), "white").convert(mode)
    pixels = to_pixels(image, ImageTransform(channels, (2, 3), bits, False, True), "it")
    assert pixels.shape == (channels, 2, 3) and pixels.dtype == (np.uint8 if bits == 8 else np.uint16)
    assert (pixels == np.iinfo(pixels.dtype).max).all()


def test_alpha_is_kept_by_four_channels_and_made_opaque_where_absent():
    transform = ImageTransform(4, (6, 8), 8, False, True)
    image = noise_image(3, mode="RGBA")
    assert (to_pixels(image, transform, "it") == np.asarray(image).transpose(2, 0, 1)).all()
    assert (to_pixels(noise_image(3), transform, "it")[3] == 255).all()
    assert native_format(image, "it") == (4, 8)


def test_mixed_modes_become_the_most_general_and_that_is_recorded(tmp_path):
    (tmp_path / "mix").mkdir()
    for name, mode in (("a", "L"), ("b", "RGB"), ("c", "L")):
        noise_image(1, mode=mode).save(tmp_path / "mix" / f"{name}.png")
    data = load_images(train_data_dir=str(tmp_path / "mix"))
    assert data.channels == 3
    assert data.describe()["remarks"] == ["images of modes ['L', 'RGB'] are brought to 3 channels of 8 bits"]
    grey = data.fetch([0], 0)["pixels"][0]
    assert torch.equal(grey[0], grey[1]) and torch.equal(grey[0], grey[2])
    assert load_images(train_data_dir=str(tmp_path / "mix"), channels=1).fetch([1], 0)["pixels"].shape[1] == 1


def test_the_first_frame_of_an_animation_and_the_exif_orientation_count(tmp_path):
    (tmp_path / "odd").mkdir()
    black, white = Image.new("L", (4, 4), 0), Image.new("L", (4, 4), 255)
    black.save(tmp_path / "odd" / "a.gif", save_all=True, append_images=[white])
    turned = Image.fromarray(np.repeat([[255, 0, 0, 0]], 4, axis=0).astype(np.uint8))  # bright left column
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to show: the left column becomes the top row
    turned.save(tmp_path / "odd" / "b.png", exif=exif)
    pixels = load_images(train_data_dir=str(tmp_path / "odd"), channels=1).fetch([0, 1], 0)["pixels"][:, 0]
    assert (pixels[0] == -1).all()
    assert (pixels[1, 0] == 1).all() and (pixels[1, 1:] == -1).all()


@pytest.mark.parametrize("size", [(30, 50), (50, 30), (64, 64), (9, 11)])
@pytest.mark.parametrize("target", [(8, 8), (8, 16), (12, 8)])
def test_resizing_keeps_the_aspect_and_crops_the_middle(size, target):
    y, x = np.mgrid[: size[0], : size[1]]
    ramp = np.stack([x + 0.5, y + 0.5], -1)  # every pixel holds its own place
    scale = min(
        size[0] / target[0], size[1] / target[1]
    )  # source pixels for one of the target, the same along both axes
    for axis, (length, wanted) in enumerate(((size[1], target[1]), (size[0], target[0]))):
        channel = Image.fromarray((ramp[..., axis] * 1000).astype(np.int32))  # mode I: 32 bits, so no rounding to 8
        out = to_pixels(channel, ImageTransform(1, target, 16, True, True), "it")[0] / 1000
        expected = length / 2 + scale * (np.arange(wanted) + 0.5 - wanted / 2)
        line = out.mean(axis)
        inner = slice(2, -2)  # at the border of the image the filter is cut off
        np.testing.assert_allclose(line[inner], expected[inner], atol=0.15 * max(1, scale))


def test_shrinking_is_antialiased():
    stripes = Image.fromarray(np.tile(np.array([0, 255], np.uint8), (64, 32)))
    out = to_pixels(stripes, ImageTransform(1, (8, 8), 8, True, True), "it")
    assert np.abs(out.astype(int) - 127).max() <= 16  # plain subsampling would give 0 or 255


def test_a_random_crop_is_a_function_of_seed_epoch_and_index(tmp_path):
    (tmp_path / "wide").mkdir()
    noise_image(0, height=8, width=40).save(tmp_path / "wide" / "a.png")
    options = {"train_data_dir": str(tmp_path / "wide"), "resolution": 8, "center_crop": False}
    first, second = load_images(**options), load_images(**options)
    crops = [first.fetch([0], epoch)["pixels"] for epoch in range(4)]
    assert torch.equal(crops[2], second.fetch([0], 2)["pixels"])
    assert len({crop.sum().item() for crop in crops}) > 1
    assert not first.complete and "random crop" in first.describe()["resize"]


def test_images_of_mixed_size_ask_for_a_resolution_and_name_the_odd_one(tmp_path):
    folder = folder_of(tmp_path / "set", {"": 3})
    noise_image(9, height=5, width=9).save(folder / "odd.png")
    with pytest.raises(ValueError, match=r"odd\.png .* is 5x9; pass --resolution"):
        load_images(train_data_dir=str(folder))
    data = load_images(train_data_dir=str(folder), resolution=(4, 6))
    assert data.fetch(range(4), 0)["pixels"].shape == (4, 3, 4, 6)
    assert "bicubic" in data.describe()["resize"]


def test_an_odd_size_that_the_first_look_missed_stops_in_one_sentence(tmp_path, monkeypatch):
    folder = folder_of(tmp_path / "set", {"": 4})
    noise_image(9, height=5, width=9).save(folder / "odd.png")
    monkeypatch.setattr(data_module, "PROBED_IMAGES", 1)
    monkeypatch.setattr(data_decoding, "PROBED_IMAGES", 1)
    data = load_images(train_data_dir=str(folder))
    for workers in (0, 1):
        with pytest.raises(
            ValueError, match=r"^\S+odd\.png \(row 4\) is 5x9 \(HxW\) while the set began with 6x8; pass"
        ):
            list(batches(data, [[(0, 0), (0, 4)]], num_workers=workers))


# Corrupt images


def test_a_corrupt_image_is_named_counted_and_replaced_by_the_next_good_one(tmp_path, caplog):
    folder = folder_of(tmp_path / "set", {"a": 3, "b": 3})
    truncate(folder / "a" / "02.png")
    (folder / "b" / "00.png").write_bytes(b"")
    truncate(folder / "b" / "02.png")
    data = load_images(train_data_dir=str(folder))
    assert data.skipped == 3
    assert "a/02.png (row 2)" in caplog.text and "b/00.png (row 3): the file is empty" in caplog.text
    for epoch in range(2):
        batch = data.fetch([2, 3, 4, 5, 0], epoch)
        assert batch["indices"].tolist() == [4, 4, 4, 0, 0]  # forward past both, and round the end
        assert batch["labels"].tolist() == [1, 1, 1, 0, 0]
        assert torch.equal(batch["pixels"][0], batch["pixels"][2])
    assert data.skipped == 3 and data.describe()["skipped_images"] == 3


def test_corrupt_images_beyond_the_limit_stop_the_run_and_are_named(tmp_path, monkeypatch):
    folder = folder_of(tmp_path / "set", {"": 6})
    truncate(folder / "01.png")
    truncate(folder / "03.png")
    with pytest.raises(ValueError, match=r"more than max_bad_images=1 images .*01\.png.*03\.png.*; repair or remove"):
        load_images(train_data_dir=str(folder), max_bad_images=1)
    monkeypatch.setattr(data_module, "PROBED_IMAGES", 1)
    monkeypatch.setattr(data_decoding, "PROBED_IMAGES", 1)
    for workers in (0, 1):
        data = load_images(train_data_dir=str(folder), max_bad_images=1)
        with pytest.raises(ValueError, match="^more than max_bad_images=1 images"):
            list(batches(data, [[(0, index)] for index in range(6)], num_workers=workers))


def test_a_set_of_nothing_but_corrupt_images_stops_at_once(tmp_path):
    folder = folder_of(tmp_path / "set", {"": 3})
    for file in folder.glob("*.png"):
        truncate(file)
    with pytest.raises(ValueError, match=r"no image can be decoded: .*00\.png"):
        load_images(train_data_dir=str(folder))


# Order, augmentation and memory


def test_the_flip_of_an_image_depends_on_seed_epoch_and_index_alone(tmp_path):
    folder = folder_of(tmp_path / "set", {"": 12})
    plain = load_images(train_data_dir=str(folder)).fetch(range(12), 0)["pixels"]
    data = load_images(train_data_dir=str(folder), random_flip=True, seed=3, cache_bytes=0)
    cached = load_images(train_data_dir=str(folder), random_flip=True, seed=3)
    together = data.fetch(range(12), 5)["pixels"]
    flipped = draws(3, np.full(12, 5), np.arange(12), 0) < 0.5
    for index in range(12):
        assert torch.equal(together[index], plain[index].flip(-1) if flipped[index] else plain[index])
        assert torch.equal(together[index], data.fetch([index], 5)["pixels"][0])
    assert torch.equal(together, cached.fetch(range(12), 5)["pixels"])
    assert torch.equal(together, cached.fetch(range(12), 5)["pixels"])
    mixed = cached.fetch([1, 1, 1, 1], [5, 6, 7, 8])["pixels"]  # a batch across the end of an epoch
    assert all(torch.equal(mixed[place], data.fetch([1], 5 + place)["pixels"][0]) for place in range(4))


def test_draws_are_uniform_and_unrelated_between_neighbours():
    epochs, indices = (grid.ravel() for grid in np.meshgrid(np.arange(100), np.arange(1000)))
    u = draws(0, epochs, indices, 0)
    assert 0 <= u.min() and u.max() < 1
    assert abs(u.mean() - 0.5) < 5 / np.sqrt(12 * u.size)
    counts = np.bincount((u * 64).astype(int), minlength=64)
    assert ((counts - u.size / 64) ** 2 / (u.size / 64)).sum() < 63 + 5 * np.sqrt(2 * 63)  # chi square, five sigma
    grid = u.reshape(1000, 100)
    others = (grid[1:, :-1], grid[:-1, 1:]), (draws(1, epochs, indices, 0).reshape(1000, 100),) * 2
    others += ((draws(0, epochs, indices, 1).reshape(1000, 100),) * 2,)
    for other in (other for pair in others for other in pair):
        own = grid if other.shape == grid.shape else grid[:-1, :-1]
        assert abs(np.corrcoef(own.ravel(), other.ravel())[0, 1]) < 5 / np.sqrt(own.size)


@pytest.mark.parametrize("cache_bytes", [None, 0])
def test_batches_are_the_same_for_any_number_of_workers(tmp_path, cache_bytes):
    folder = folder_of(tmp_path / "set", {"a": 7, "b": 6})
    truncate(folder / "a" / "03.png")
    asked = positions(13, batch=4, epochs=3)
    state = torch.get_rng_state()
    runs = []
    for workers in (0, 2):
        data = load_images(train_data_dir=str(folder), random_flip=True, cache_bytes=cache_bytes)
        runs.append(list(batches(data, iter(asked), num_workers=workers)))
        assert data.skipped == 1 and data.complete == (cache_bytes is None)
    assert len(runs[0]) == len(asked) and all(map(same, *runs))
    direct = [data.fetch([index for _, index in pairs], [epoch for epoch, _ in pairs]) for pairs in asked]
    assert all(map(same, runs[0], direct))
    assert torch.equal(state, torch.get_rng_state())  # loading moves no global generator


def test_workers_end_when_all_images_are_in_memory(tmp_path):
    data = load_images(train_data_dir=str(folder_of(tmp_path / "set", {"": 8})))
    endless = ((epoch, index) for epoch in itertools.count() for index in range(8))
    stream = batches(data, (list(itertools.islice(endless, 4)) for _ in itertools.count()), num_workers=2)
    seen = [next(stream)["indices"].tolist() for _ in range(12)]
    assert seen == [[0, 1, 2, 3], [4, 5, 6, 7]] * 6
    assert data.complete and not torch.multiprocessing.active_children()
    stream.close()


def test_the_second_epoch_decodes_nothing(tmp_path, monkeypatch):
    calls = []
    real = data_decoding.open_image
    data = load_images(train_data_dir=str(folder_of(tmp_path / "set", {"a": 5, "b": 5})))
    monkeypatch.setattr(data_decoding, "open_image", lambda row: calls.append(1) or real(row))
    asked = positions(10, batch=4, epochs=3)
    first, rest = asked[:3], asked[3:]  # three batches hold the first epoch
    list(batches(data, first))
    assert len(calls) == 10 and data.complete
    list(batches(data, rest))
    assert len(calls) == 10


def test_one_of_two_processes_holds_all_images_after_two_epochs(tmp_path, monkeypatch):
    calls = []
    real = data_decoding.open_image
    data = load_images(train_data_dir=str(folder_of(tmp_path / "set", {"": 16})))
    monkeypatch.setattr(data_decoding, "open_image", lambda row: calls.append(1) or real(row))
    for pairs in positions(16, batch=4, epochs=2)[::2]:
        before = len(calls)
        data.fetch([index for _, index in pairs], [epoch for epoch, _ in pairs])
        assert len(calls) - before <= 4
    assert data.complete and len(calls) == 16


def test_a_set_larger_than_the_limit_is_not_kept(tmp_path):
    folder = str(folder_of(tmp_path / "set", {"": 4}))
    needed = 4 * 3 * 6 * 8
    assert load_images(train_data_dir=folder, cache_bytes=needed).describe()["kept_in_memory"]
    assert not load_images(train_data_dir=folder, cache_bytes=needed - 1).describe()["kept_in_memory"]


def test_the_fingerprint_tells_data_and_transforms_apart_but_not_places(tmp_path):
    one = str(folder_of(tmp_path / "one" / "set", {"a": 2, "b": 2}))
    two = str(folder_of(tmp_path / "two" / "set", {"a": 2, "b": 2}))
    mark = load_images(train_data_dir=one).fingerprint
    assert mark == load_images(train_data_dir=two).fingerprint
    noise_image(99).save(Path(two) / "a" / "00.png")
    others = [load_images(train_data_dir=two), load_images(train_data_dir=one, resolution=4)]
    others += [load_images(train_data_dir=one, label_column="none"), load_images(train_data_dir=one, random_flip=True)]
    assert len({mark, *(other.fingerprint for other in others)}) == 5


# Streams


def take(stream, count: int) -> list[dict]:
    return list(itertools.islice(stream, count))


def test_a_stream_has_the_attributes_of_the_set_and_every_image_once_in_an_epoch():
    stream, data = load_images("digits", streaming=True, max_train_samples=40), load_images("digits")
    assert (stream.channels, stream.size, stream.class_names) == (data.channels, data.size, data.class_names)
    batches_of_epoch = take(stream.stream(0, batch_size=8), 5)
    pixels = torch.cat([batch["pixels"] for batch in batches_of_epoch]).flatten(1)
    wanted = data.fetch(range(40), 0)["pixels"].flatten(1)
    found = (pixels[:, None] == wanted).all(-1)
    assert (found.any(0)).all() and (found.any(1)).all()
    assert not torch.equal(pixels, wanted)  # shuffled
    assert torch.cat([batch["indices"] for batch in batches_of_epoch]).tolist() == list(range(40))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_does_not_depend_on_processes_workers_or_where_it_was_resumed(workers):
    def opened():
        return load_images("digits", streaming=True, max_train_samples=21, random_flip=True, seed=4, shuffle_buffer=8)

    whole = take(opened().stream(0, batch_size=8), 8)  # three epochs of 21
    ranks = [take(opened().stream(0, rank, 2, 4, num_workers=workers), 8) for rank in range(2)]
    for batch, left, right in zip(whole, *ranks):
        assert same(batch, {key: torch.cat([left[key], right[key]]) for key in batch})
    assert all(map(same, whole[6:], take(opened().stream(48, batch_size=8, num_workers=workers), 2)))
    assert not torch.equal(whole[0]["pixels"], whole[3]["pixels"])


@pytest.mark.parametrize("world", [1, 2])
def test_a_corrupt_image_in_a_stream_is_replaced_by_the_next_good_one(tmp_path, world):
    folder = folder_of(tmp_path / "set", {"a": 4, "b": 4})
    clean = take(load_images(train_data_dir=str(folder), streaming=True).stream(0, batch_size=8), 2)
    clean = {key: torch.cat([batch[key] for batch in clean]) for key in clean[0]}
    broken = load_images(train_data_dir=str(folder)).fetch([3], 0)["pixels"][0]
    place = next(p for p in range(8) if torch.equal(clean["pixels"][p], broken))
    truncate(folder / "a" / "03.png")
    streams = [load_images(train_data_dir=str(folder), streaming=True) for _ in range(world)]
    parts = [next(data.stream(0, rank, world, 8 // world)) for rank, data in enumerate(streams)]
    seen = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    expected = [p + 1 if p == place else p for p in range(8)]
    assert torch.equal(seen["pixels"], clean["pixels"][expected])
    assert torch.equal(seen["labels"], clean["labels"][expected])
    assert sum(data.skipped for data in streams) == 1


def test_one_corrupt_image_counts_once_however_often_the_stream_meets_it(tmp_path):
    folder = folder_of(tmp_path / "set", {"": 4})
    truncate(folder / "01.png")
    data = load_images(train_data_dir=str(folder), streaming=True, max_bad_images=1)
    take(data.stream(0, batch_size=4), 5)
    assert data.skipped == 1


def test_a_stream_needs_class_names(tmp_path):
    path = str(labelled_parquet(tmp_path / "s.parquet", ["oak", "ash"], datasets.Value("string")))
    with pytest.raises(ValueError, match="classes are unknown before the stream was read; load with streaming=False"):
        load_images(train_data_dir=path, streaming=True)
    assert load_images(train_data_dir=path, streaming=True, label_column="none").class_names is None


# Wrong requests


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "pass exactly one of them"),
        ({"dataset_name": "digits", "train_data_dir": "x"}, "pass exactly one of them"),
        ({"train_data_dir": "/no/such/folder"}, "'/no/such/folder' does not exist; pass a folder of images"),
        ({"train_data_dir": __file__}, "is neither a folder nor a .parquet or .zip file"),
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
        with pytest.raises(ValueError, match="empty"):
            load_images(train_data_dir=str(path), streaming=streaming)
    (tmp_path / "zero.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match=r"zero\.parquet' cannot be opened: "):
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
def test_a_stream_ten_times_larger_than_the_memory_it_may_take_trains_to_its_end(tmp_path):
    """The buffer of 1000 encoded images and the headroom make the memory; the kernel refuses more (RLIMIT_DATA)."""
    size, headroom = 12_500, 24 * 2**20  # bytes of an image, which is noise and cannot be compressed
    count = 10 * (1000 * size + headroom) // size
    path, rng = tmp_path / "noise.parquet", np.random.default_rng(0)
    schema = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    ).arrow_schema
    with pq.ParquetWriter(path, schema, compression="none") as writer:
        for start in range(0, count, 200):
            rows = range(start, min(start + 200, count))
            images = []
            for pixels in rng.integers(0, 256, (len(rows), 64, 64, 3), np.uint8):
                Image.fromarray(pixels).save(buffer := io.BytesIO(), "PNG", compress_level=0)
                images.append({"bytes": buffer.getvalue(), "path": None})
            writer.write_table(pa.table({"image": images, "label": [row % 2 for row in rows]}, schema=schema))
    assert path.stat().st_size > 10 * (1000 * size + headroom) * 0.95
    steps = count // 256
    flags = f"--train_data_dir {path} --streaming --resolution 8 --train_batch_size 256 --max_train_steps {steps} --class_conditional"
    flags += " --model_channels 8 --norm_num_groups 4 --num_head_channels 8 --channel_mult 1,2 --num_res_blocks 1 --sample_steps none"
    flags += f" --logging_steps 10 --ddpm_num_inference_steps 1 --num_sample_images 2 --output_dir {tmp_path / 'run'}"
    command = [sys.executable, "tests/training/altered_ddpm.py", "limited", *flags.split()]
    environment = {**os.environ, "HEADROOM": str(headroom), "DATA": str(count * size), "MALLOC_ARENA_MAX": "2"}
    done = subprocess.run(
        command, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr
    assert "the limit holds" in done.stdout and f"trained {steps} steps" in done.stdout
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < record["data_wait"] < 1 for record in records) and "data_wait=" in done.stderr
    # without the first record, in which the buffer is filled, and the last, in which datasets waits for the readers of a file at its end
    speed = [record["images_per_second"] for record in records[1:-1]]
    assert min(speed[len(speed) // 2 :]) > 0.5 * np.median(speed[: len(speed) // 2]), speed  # as fast at the end


@pytest.mark.slow
def test_a_data_set_of_the_hub_is_loaded_and_streamed_and_a_missing_one_is_explained(tmp_path, hub):
    parquet = labelled_parquet(tmp_path / "train.parquet", [1, 0, 1], datasets.ClassLabel(names=["oak", "ash tree"]))
    client = f"""
import datasets, huggingface_hub
from hf_diffusion.data.images import load_images
datasets.config.USE_PARQUET_EXPORT = False  # the test server has no such host
hub = huggingface_hub.HfApi()
hub.create_repo("alice/trees", repo_type="dataset")
hub.upload_file(path_or_fileobj={str(parquet)!r}, path_in_repo="data/train-00000-of-00001.parquet",
                repo_id="alice/trees", repo_type="dataset")
data = load_images("alice/trees")
assert data.class_names == ["oak", "ash tree"] and data.labels.tolist() == [1, 0, 1], data.describe()
batch = next(load_images("alice/trees", streaming=True).stream(0, batch_size=3))
assert sorted(batch["labels"].tolist()) == [0, 1, 1], batch
try:
    load_images("alice/none")
except ValueError as error:
    print(error)
"""
    environment = {**os.environ, **hub.env("hf_alice_write", home=str(tmp_path / "home"))}
    environment |= {"HF_UPDATE_DOWNLOAD_COUNTS": "0", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", client], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "data set 'alice/none' does not exist on the Hub or is not accessible; check the id" in done.stdout
