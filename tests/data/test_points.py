"""Points of the plane: what is drawn has the stated distribution, and splits share nothing."""

import numpy as np
import pytest
import torch

from hf_diffusion.data.loading import load_data
from hf_diffusion.data.points import SHAPES
from hf_diffusion.randomness import BatchOrder


def points_of(name: str, **options) -> np.ndarray:
    data = load_data(name, **options)
    return data.to_samples(data.fetch(range(len(data)), 0))


@pytest.mark.parametrize("name", SHAPES)
def test_points_follow_from_the_seed_fill_the_square_and_no_split_shares_one(name):
    train, test = points_of(name), points_of(name, split="test")
    assert train.shape == (65_536, 2) and test.shape == (16_384, 2) and train.dtype == np.float32
    assert np.abs(train).max() <= 1 and np.abs(train).max() > 0.85
    together = np.concatenate([train, test, points_of(name, seed=1)])
    assert len(np.unique(together, axis=0)) == len(together)
    np.testing.assert_array_equal(train, points_of(name))
    data = load_data(name)
    assert (data.kind, data.sample_shape, data.num_samples) == ("points", (2,), 65_536)
    # Both splits are of one distribution: means differ by less than five standard errors.
    error = train.std(0) * np.sqrt(1 / len(train) + 1 / len(test))
    assert (np.abs(train.mean(0) - test.mean(0)) < 5 * error).all()


def test_eight_gaussians_are_their_classes():
    data = load_data("eight_gaussians")
    points = data.to_samples(data.fetch(range(len(data)), 0))
    assert data.num_classes == 8 and data.class_names[:3] == ["east", "north-east", "north"]
    counts = np.bincount(data.labels)
    assert len(counts) == 8 and np.abs(counts - len(data) / 8).max() < 5 * np.sqrt(len(data) / 8)
    for label in range(8):
        own = points[data.labels == label]
        centre = 0.75 * np.array([np.cos(label * np.pi / 4), np.sin(label * np.pi / 4)])
        np.testing.assert_allclose(own.mean(0), centre, atol=5 * 0.05 / np.sqrt(len(own)))
        np.testing.assert_allclose(own.std(0), 0.05, rtol=5 / np.sqrt(2 * len(own)))
    assert load_data("eight_gaussians", label_column="none").num_classes is None


def test_the_swiss_roll_is_its_spiral_and_the_checkerboard_its_dark_squares():
    roll = points_of("swiss_roll")
    angle = 1.5 * np.pi * (1 + 2 * np.linspace(0, 1, 4001))
    curve = np.stack([np.cos(angle), np.sin(angle)], axis=1) * (angle / (5 * np.pi))[:, None]
    distances = np.sqrt(((roll[:1000, None] - curve) ** 2).sum(-1))
    # Only the noise across the curve is left, and every part of the curve is visited.
    assert abs(np.sqrt((distances.min(1) ** 2).mean()) - 0.015) < 5 * 0.015 / np.sqrt(2 * 1000)
    visits = np.histogram(distances.argmin(1), bins=10, range=(0, 4001))[0]
    assert np.abs(visits - 100).max() < 5 * np.sqrt(100)
    column, row = np.floor((points_of("checkerboard") + 1) * 2).astype(int).clip(0, 3).T
    counts = np.bincount(4 * column + row, minlength=16)
    dark = (np.arange(16) // 4 + np.arange(16) % 4) % 2 == 0
    assert (counts[~dark] == 0).all()
    assert np.abs(counts[dark] - 65_536 / 8).max() < 5 * np.sqrt(65_536 / 8)


def test_a_part_of_a_split_and_a_limit_are_its_first_rows():
    whole = points_of("swiss_roll")
    np.testing.assert_array_equal(points_of("swiss_roll", split="train[:25%]"), whole[: 65_536 // 4])
    np.testing.assert_array_equal(points_of("swiss_roll", split="train[25%:]"), whole[65_536 // 4 :])
    np.testing.assert_array_equal(points_of("swiss_roll", max_train_samples=100), whole[:100])
    marks = [load_data("swiss_roll", **options).fingerprint for options in ({}, {"split": "test"}, {"seed": 1})]
    marks += [load_data("swiss_roll", max_train_samples=9).fingerprint, load_data("checkerboard").fingerprint]
    assert len(set(marks)) == 5 and load_data("swiss_roll").fingerprint == marks[0]


def test_batches_are_those_of_the_order_and_carry_indices_and_labels():
    data = load_data("eight_gaussians", max_train_samples=10)
    order = BatchOrder(10, seed=3, batch_size=4, accumulation=2, rank=0, processes=1)
    asked = list(order.positions(1, 4))
    batches = list(data.batches(order, 1, 4))
    assert len(batches) == 6
    for pairs, batch in zip(asked, batches):
        rows = [index for _, index in pairs]
        assert batch["indices"].tolist() == rows
        assert torch.equal(batch["x_0"], data.fetch(rows, 0)["x_0"])
        assert batch["labels"].tolist() == data.labels[rows].tolist()
    walked = list(data.once(4))
    assert torch.cat([batch["indices"] for batch in walked]).tolist() == list(range(10))
    assert torch.cat([batch["indices"] for batch in data.once(2, limit=5)]).tolist() == [0, 2, 4, 6, 8]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "validation"}, r"split 'validation' is unknown; swiss_roll has train \(65,536\), test \(16,384\)"),
        ({"split": "train[90%:80%]"}, r"split 'train\[90%:80%\]' of swiss_roll holds nothing"),
        ({"split": "train[a:b]"}, r"split 'train\[a:b\]' is not possible; a part is written train\[:80%\]"),
        ({"split": "train+test"}, r"split 'train\+test' is not possible; give one split"),
        ({"resolution": 32}, "resolution=32 is for images, and swiss_roll holds points; leave it out"),
        ({"streaming": True}, "streaming=True is for images"),
        ({"label_column": "kind"}, "label_column 'kind': swiss_roll has no columns"),
        ({"max_train_samples": 0}, "max_train_samples=0 is not possible"),
    ],
)
def test_what_points_cannot_have_is_refused_in_one_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        load_data("swiss_roll", **options)
    with pytest.raises(IndexError, match=r"index 7 is not in the data set 'swiss_roll', which has 0\.\.4"):
        load_data("swiss_roll", max_train_samples=5).fetch([0, 7], 0)
