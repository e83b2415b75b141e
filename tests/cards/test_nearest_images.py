"""The search for the training image nearest to each sample: findings, memory, and sentences."""

import numpy as np
import pytest
import torch

from hf_diffusion.cards import nearest_images as module
from hf_diffusion.cards.nearest_images import nearest_images
from hf_diffusion.data.images import load_images
from hf_diffusion.data.points import load_points
from hf_diffusion.data.selection import evenly_spaced


@pytest.fixture(scope="module")
def digits():
    return load_images("digits", max_train_samples=300)


def pixels(data, indices) -> np.ndarray:
    """uint8 (N, H, W, C)."""
    return data.to_samples(data.fetch(indices, epoch=0))


def by_hand(samples: np.ndarray, data) -> np.ndarray:
    """Root mean squares (N, len(data)) of all differences."""
    real = pixels(data, range(len(data))).astype(np.float64)
    return ((samples[:, None].astype(np.float64) - real[None]) ** 2).mean(axis=(2, 3, 4)) ** 0.5


@pytest.fixture(scope="module")
def noisy(digits):
    """Digits with noise, of which each has one nearest image."""
    draws = np.random.default_rng(0).integers(-60, 60, (12, 8, 8, 1))
    return (pixels(digits, range(0, 300, 25)).astype(int) + draws).clip(0, 255).astype(np.uint8)


def test_distances_and_images_are_those_of_comparing_all_pairs(digits, noisy):
    found, everything = nearest_images(noisy, digits), by_hand(noisy, digits)
    np.testing.assert_allclose(found.distances, everything.min(1), rtol=1e-5)
    np.testing.assert_array_equal(found.images, pixels(digits, everything.argmin(1)))
    assert (found.searched, found.total) == (300, 300)


def test_a_copy_of_a_training_image_has_distance_zero_and_the_sentence_counts_it(digits, noisy):
    samples = noisy.copy()
    samples[[2, 5]] = pixels(digits, [17, 201])
    found = nearest_images(samples, digits)
    assert found.distances[[2, 5]].tolist() == [0, 0] and (np.delete(found.distances, [2, 5]) > 10).all()
    sentence = found.sentence()
    assert "From each of 12 samples to the nearest of 300 training images" in sentence and "smallest 0.0." in sentence
    nearer = int((found.distances < found.real_distances.min()).sum())
    assert nearer >= 2 and f"{nearer} of the samples are nearer to a training image than that" in sentence
    assert "none of the samples is nearer" in nearest_images(255 - samples, digits).sentence()


def test_real_images_are_compared_with_all_others_but_themselves(digits, noisy):
    found = nearest_images(noisy, digits)
    chosen = np.array(evenly_spaced(300, 12))
    among = by_hand(pixels(digits, chosen), digits)
    among[np.arange(12), chosen] = np.inf
    np.testing.assert_allclose(found.real_distances, among.min(1), rtol=1e-5)


def test_no_more_images_are_in_memory_than_a_chunk_holds_and_its_size_changes_nothing(digits, noisy, monkeypatch):
    whole, sizes, cdist = nearest_images(noisy, digits), [], torch.cdist
    monkeypatch.setattr(module, "CHUNK_VALUES", 64 * 7)
    monkeypatch.setattr(torch, "cdist", lambda a, b: sizes.append(len(b)) or cdist(a, b))
    parts = nearest_images(noisy, digits)
    assert max(sizes) == 7 and sum(sizes) == 300
    np.testing.assert_array_equal(parts.distances, whole.distances)
    np.testing.assert_array_equal(parts.images, whole.images)
    np.testing.assert_array_equal(parts.real_distances, whole.real_distances)


def test_of_more_images_than_the_limit_evenly_spaced_ones_are_searched(digits, noisy):
    found = nearest_images(noisy, digits, limit=30)
    np.testing.assert_allclose(found.distances, by_hand(noisy, digits)[:, ::10].min(1), rtol=1e-5)
    assert (found.searched, found.total) == (30, 300)
    assert "to the nearest of 30 training images, evenly spaced ones of 300, by" in found.sentence()


def test_where_training_mirrors_images_a_mirrored_copy_is_found(digits, noisy):
    flipping = load_images("digits", max_train_samples=300, random_flip=True)
    samples = np.stack([pixels(digits, [17])[0][:, ::-1], noisy[0]])
    assert nearest_images(samples, flipping).distances[0] == 0
    assert nearest_images(samples, digits).distances[0] > 0


@pytest.mark.parametrize("chunk_values", [64 * 7, 2**23])
def test_a_stream_is_searched_once_through(digits, noisy, monkeypatch, chunk_values):
    monkeypatch.setattr(module, "CHUNK_VALUES", chunk_values)
    stream = load_images("digits", max_train_samples=300, streaming=True)
    whole = load_images("digits")  # of a stream the first images are taken
    first = by_hand(noisy, whole)[:, :300]
    found = nearest_images(noisy, stream)
    np.testing.assert_allclose(found.distances, first.min(1), rtol=1e-5)
    assert (found.searched, found.total) == (300, 300) and len(found.real_distances) == 12
    assert "to the nearest of 300 training images, by" in found.sentence()
    part = nearest_images(noisy, load_images("digits", max_train_samples=300, streaming=True), limit=20)
    assert (part.searched, part.total) == (20, None)
    assert "the first 20 training images of a stream, a part of the training set, by" in part.sentence()


def test_one_training_image_has_no_other_to_compare_with(noisy):
    one = load_images("digits", max_train_samples=1)
    found = nearest_images(noisy[:3], one)
    assert (
        found.searched == 1 and len(found.real_distances) == 0 and "to the nearest other one" not in found.sentence()
    )
    assert torch.isfinite(torch.from_numpy(found.distances)).all()


def test_points_are_compared_by_their_values_and_called_points():
    data = load_points("eight_gaussians", max_train_samples=200)
    points = data.to_samples(data.fetch(range(200), 0))
    samples = np.concatenate([points[[7]], np.random.default_rng(0).normal(size=(9, 2)).astype(np.float32)])
    found = nearest_images(samples, data)
    everything = np.sqrt(((samples[:, None] - points[None]) ** 2).mean(axis=2))
    np.testing.assert_allclose(found.distances, everything.min(1), rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(found.images, points[everything.argmin(1)])
    sentence = found.sentence()
    assert "200 training points, by the root mean square difference of the values: median" in sentence
    assert "nearer to a training point than that." in sentence and "image" not in sentence and "grey" not in sentence
