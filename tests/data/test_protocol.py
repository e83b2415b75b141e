"""What every kind of data promises to training, and how two sets with classes meet."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from hf_diffusion.config.shared_options import ClassOptions
from hf_diffusion.data.classes import match_classes
from hf_diffusion.data.loading import load_data
from hf_diffusion.data.protocol import TrainingData
from hf_diffusion.data.selection import evenly_spaced
from hf_diffusion.data.splits import load_unaugmented, make_same_kind
from hf_diffusion.figures.grid import labelled_grid
from hf_diffusion.randomness import BatchOrder


class Waves(TrainingData):
    """A made-up kind: sines of seven samples, of two classes of frequency."""

    kind, name, sample_shape, class_names = "waves", "waves", (7,), ["slow", "fast"]

    def __init__(self, count: int, class_names: list[str] | None = None):
        self.num_samples, self.fingerprint = count, f"waves-{count}"
        self.class_names = class_names or self.class_names
        self.labels = np.arange(count) % 2

    def fetch(self, indices, epoch):
        rows = torch.as_tensor(indices)
        frequency = 1 + torch.from_numpy(self.labels)[rows]
        phases = rows[:, None] + frequency[:, None] * torch.arange(7) * math.pi / 7
        return {"x_0": phases.sin().float(), "indices": rows, "labels": torch.from_numpy(self.labels)[rows]}

    def picture(self, samples, columns=None, row_labels=None):
        return Image.fromarray((127.5 * (samples + 1)).astype(np.uint8))


def test_a_made_up_kind_of_data_needs_two_methods_to_give_its_batches_in_order():
    data = Waves(10)
    order = BatchOrder(len(data), seed=0, batch_size=3, accumulation=1, rank=1, processes=2)
    batches = list(data.batches(order, 2, 5))
    wanted = [[index for _, index in pairs] for pairs in order.positions(2, 5)]
    assert [batch["indices"].tolist() for batch in batches] == wanted
    assert all(batch["x_0"].shape == (3, 7) for batch in batches)
    assert data.num_classes == 2 and data.describe()["sample_shape"] == [7] and data.describe()["kind"] == "waves"
    assert data.picture(data.to_samples(batches[0])).size == (7, 3)


@pytest.mark.parametrize("streaming", [False, True])
def test_images_give_the_batches_of_the_order_from_any_step_on(streaming):
    data = load_data("digits", max_train_samples=20, streaming=streaming, seed=1)
    assert (data.num_samples, data.sample_shape) == (None if streaming else 20, (1, 8, 8))
    order = BatchOrder(data.num_samples, seed=1, batch_size=3, accumulation=2, rank=0, processes=1)
    whole, rest = list(data.batches(order, 0, 4)), list(data.batches(order, 2, 4, num_workers=1))
    assert len(whole) == 8 and len(rest) == 4
    for batch, again in zip(whole[4:], rest):
        assert all(torch.equal(batch[key], again[key]) for key in ("x_0", "indices", "labels"))
    halves = []
    for rank in range(2):
        order = BatchOrder(data.num_samples, seed=1, batch_size=3, accumulation=1, rank=rank, processes=2)
        halves.append(list(data.batches(order, 0, 4)))
    # The same six images make a step, whether one process takes two micro-batches or two take one.
    for step, (left, right) in enumerate(zip(*halves)):
        assert torch.equal(left["x_0"], whole[2 * step]["x_0"]) and torch.equal(
            right["x_0"], whole[2 * step + 1]["x_0"]
        )
    samples = data.to_samples(whole[0])
    assert samples.dtype == np.uint8 and samples.shape == (3, 8, 8, 1)
    np.testing.assert_allclose(samples / 127.5 - 1, whole[0]["x_0"].permute(0, 2, 3, 1), atol=1e-6)


def test_a_stream_is_walked_once_and_cannot_be_read_by_index():
    stream, whole = load_data("digits", max_train_samples=20, streaming=True), load_data("digits")
    walked = torch.cat([batch["x_0"] for batch in stream.once(8)]).flatten(1)
    first = whole.fetch(range(20), 0)["x_0"].flatten(1)
    assert (walked[:, None] == first).all(-1).sum(0).tolist() == [1] * 20
    assert sum(len(batch["x_0"]) for batch in stream.once(8, limit=10)) == 10
    with pytest.raises(TypeError, match="digits is streamed and cannot be read by index"):
        stream.fetch([0], 0)
    with pytest.raises(TypeError, match="is a stream, whose length is not known"):
        len(stream)


def test_data_without_augmentation_have_the_same_form(tmp_path):
    for name, place in (("train", 0), ("test", 1)):
        (tmp_path / "set" / name).mkdir(parents=True)
        for number in range(3):
            pixels = np.random.default_rng(10 * place + number).integers(0, 256, (6 + place, 8, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "set" / name / f"{number}.png")
    asked = {"train_data_dir": str(tmp_path / "set"), "split": "train", "random_flip": True, "max_train_samples": 2}
    data = load_data(**asked)
    plain, test = load_unaugmented(asked, data), load_unaugmented(asked, data, "test")
    # Nothing has to be resized in the training split, so the pixels and the fingerprint stay those
    # of the files.
    first = np.asarray(Image.open(tmp_path / "set" / "train" / "0.png"))
    np.testing.assert_array_equal(plain.to_samples(plain.fetch([0], 3))[0], first)
    assert plain.fingerprint == load_data(**asked | {"random_flip": False}).fingerprint and len(plain) == 2
    assert test.sample_shape == data.sample_shape and len(test) == 3
    points = load_data("eight_gaussians")
    held_out = load_unaugmented({"dataset_name": "eight_gaussians"}, points, "test[:50]")
    assert len(held_out) == 50 and held_out.class_names == points.class_names


def test_classes_are_matched_by_name_and_others_are_refused():
    assert match_classes(["b", "a"], ["a", "b", "c"], "it").tolist() == [1, 0]
    data, other = Waves(4), Waves(4, ["fast", "slow"])
    make_same_kind(other, data, "the test split")
    assert other.class_names == ["slow", "fast"] and other.labels.tolist() == [1, 0, 1, 0]
    assert other.fetch([0], 0)["labels"].tolist() == [1]
    with pytest.raises(ValueError, match="waves has the classes 'loud', which are not among 'slow', 'fast'; rename"):
        make_same_kind(Waves(4, ["slow", "loud"]), data, "the test split")
    with pytest.raises(ValueError, match=r"holds points of shape \(2,\), the training waves of shape \(7,\)"):
        make_same_kind(load_data("swiss_roll"), data, "the test split")


def test_a_summary_tells_counts_classes_values_and_what_was_left_out(tmp_path):
    for name, count in (("train/oak", 3), ("train/ash", 2), ("test/oak", 1)):
        (tmp_path / "set" / name).mkdir(parents=True)
        for number in range(count):
            Image.new("L", (8, 6), 51 * number).save(tmp_path / "set" / name / f"{number}.png")
    (tmp_path / "set" / "train" / "notes.doc").write_text("x")
    facts = load_data(train_data_dir=str(tmp_path / "set")).summary()
    assert facts == {
        "data": "5 images, 1 x 6 x 8, 2 classes",
        "splits": "test 1, train 5",
        "classes": "ash 2, oak 3",
        "values": "-1 to -0.2, mean -0.68, of 5 images",
        "remarks": "left out 1 file (train/notes.doc) without an image's extension",
    }
    assert load_data("swiss_roll").summary()["data"] == "65536 points, 2, no classes"
    assert load_data("digits", streaming=True).summary()["classes"] == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9"


def test_a_preview_shows_rows_of_each_class_with_its_name(tmp_path):
    data = load_data("digits", max_train_samples=200)
    wanted = []
    for label in evenly_spaced(10, 8):
        row = np.flatnonzero(data.labels == label)
        wanted += [int(row[place]) for place in evenly_spaced(len(row), 8)]
    names = [str(label) for label in evenly_spaced(10, 8)]
    picture = labelled_grid(data.to_samples(data.fetch(wanted, 0)), 8, names)
    assert np.array_equal(np.asarray(data.preview()), np.asarray(picture))
    unlabelled = load_data("digits", max_train_samples=200, label_column="none")
    first = labelled_grid(unlabelled.to_samples(unlabelled.fetch(evenly_spaced(200, 64), 0)))
    assert np.array_equal(np.asarray(unlabelled.preview()), np.asarray(first))
    assert load_data("eight_gaussians").preview().size[0] > 500


def test_what_hides_classes_is_said_to_who_asks_for_them(tmp_path):
    (tmp_path / "set" / "cat").mkdir(parents=True)
    (tmp_path / "set" / "dog").mkdir()
    for name in ("cat/0.png", "dog/0.png", "0.png"):
        Image.new("L", (8, 6)).save(tmp_path / "set" / name)
    data = load_data(train_data_dir=str(tmp_path / "set"))
    with pytest.raises(ValueError, match=r"set has no labels; no classes: 1 image \(0\.png\) lies beside the folders"):
        ClassOptions(class_conditional=True).num_class_embeds(data)
