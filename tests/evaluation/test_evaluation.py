"""Measures of images against a cached reference: agreement with the ruler, independence of shares, honest names."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState

import hf_diffusion.evaluation.reference as reference_module
from hf_diffusion.data.images import load_images
from hf_diffusion.evaluation.feature_networks import (
    FeatureNetwork,
    ResNetFeatures,
    feature_network,
    load_feature_network,
)
from hf_diffusion.evaluation.measures import check_metrics, distance_name, measure_images, network_features
from hf_diffusion.evaluation.reference import reference_statistics


SHARED = Path(__file__).resolve().parents[3] / "shared"


@pytest.fixture(autouse=True)
def state():
    PartialState(cpu=True)


def network_of(dimension: int, is_inception: bool = False, classifier=None) -> FeatureNetwork:
    return FeatureNetwork("X", "0", lambda x: x, dimension, torch.device("cpu"), classifier, is_inception)


def chunks_of(images, labels=None, size: int = 50):
    for start in range(0, len(images), size):
        rows = np.arange(start, min(start + size, len(images)))
        yield rows, images[rows], None if labels is None else labels[rows]


def pixels_of(data) -> np.ndarray:
    pixels = data.fetch(range(len(data)), epoch=0)["pixels"]
    return ((pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def test_real_images_measured_against_themselves_are_perfect(image_folder, tmp_path):
    data = load_images(train_data_dir=str(image_folder))
    network = feature_network(ResNetFeatures(width=4).eval(), "toy", torch.zeros(2, 1, 8, 8))
    reference = reference_statistics(data, network, tmp_path)
    measures = measure_images(chunks_of(pixels_of(data)), len(data), network, reference, ["fd", "pr", "kd"])
    assert abs(measures["fd"].value) < 1e-6 and measures["fd"].name == "FD-120 (features toy)"
    assert measures["precision"].value == measures["recall"].value == 1
    assert measures["precision"].name == "precision (k=3, 120 real, 120 generated, features toy)"
    assert abs(measures["kd"].value) < 3 * measures["kd"].error + 1e-9


def test_measures_agree_with_the_ruler_on_the_same_samples_and_network(tmp_path):
    if not SHARED.is_dir():
        pytest.skip("the ruler is not there: ../shared/ruler is missing")
    sys.path.insert(0, str(SHARED / "ruler"))
    try:
        import measure
        from safetensors.torch import load_file
    finally:
        sys.path.pop(0)
    weights = SHARED / "ruler" / "feature_net.safetensors"
    data = load_images(train_data_dir=str(SHARED / "data" / "fashion_mnist-test.parquet"), max_train_samples=900)
    real, labels = pixels_of(data), data.labels
    noise = np.random.default_rng(0).normal(0, 20, real.shape)
    fake = (real[::-1] + noise)[:800].clip(0, 255).astype(np.uint8)
    fake_labels = np.where(np.arange(800) % 4 == 0, 0, labels[::-1][:800])

    net = measure.FeatureNet(32).eval()
    net.load_state_dict(load_file(weights))
    real_features, fake_features = (measure.features(net, images[..., 0]) for images in (real, fake))
    expected = {"fd": measure.frechet(measure.moments(fake_features), measure.moments(real_features))}
    expected["precision"], expected["recall"] = measure.precision_recall(real_features, fake_features)
    with torch.no_grad():
        expected["label_accuracy"] = float((net.head(fake_features).argmax(1).numpy() == fake_labels).mean())

    network = load_feature_network(weights, channels=1, size=(28, 28))
    reference = reference_statistics(data, network, tmp_path)
    measures = measure_images(chunks_of(fake, fake_labels), 800, network, reference, ["fd", "pr", "label_accuracy"])
    assert set(expected) == set(measures) and expected["fd"] > 1 and 0.1 < expected["recall"] < 0.99
    for name, value in expected.items():
        assert measures[name].value == pytest.approx(value, rel=1e-3), name


def test_measures_do_not_depend_on_how_images_are_cut_into_chunks(image_folder, tmp_path):
    data = load_images(train_data_dir=str(image_folder))
    network = load_feature_network("pixels", channels=1, size=(8, 8))
    reference = reference_statistics(data, network, tmp_path)
    images = np.random.default_rng(1).integers(0, 256, (90, 8, 8, 1), dtype=np.uint8)
    first, second = (
        measure_images(chunks_of(images, size=size), 90, network, reference, ["fd", "kd", "pr"]) for size in (90, 7)
    )
    for name in first:
        assert first[name].value == pytest.approx(second[name].value, rel=1e-9), name


def test_reference_statistics_are_cached_under_data_and_network(image_folder, tmp_path, monkeypatch):
    computed = []
    compute = reference_module._compute
    monkeypatch.setattr(reference_module, "_compute", lambda *args: computed.append(args) or compute(*args))
    data = load_images(train_data_dir=str(image_folder))
    toy = feature_network(ResNetFeatures(width=4), "toy", torch.zeros(2, 1, 8, 8))
    first, again = (reference_statistics(data, toy, tmp_path) for _ in range(2))
    assert len(computed) == 1 and torch.equal(first.covariance, again.covariance)
    assert torch.equal(first.features, again.features) and first.protocol == again.protocol
    reference_statistics(load_images(train_data_dir=str(image_folder), max_train_samples=90), toy, tmp_path)
    other = feature_network(ResNetFeatures(width=4), "toy", torch.zeros(2, 1, 8, 8))  # other random weights
    reference_statistics(data, other, tmp_path)
    assert len(computed) == 3 and len(list(tmp_path.iterdir())) == 3
    for file in tmp_path.iterdir():
        file.write_bytes(b"cut off")
    reference_statistics(data, toy, tmp_path)
    assert len(computed) == 4


def test_a_distance_at_a_small_number_of_images_never_has_the_published_name():
    inception = network_of(2048, is_inception=True)
    assert distance_name("F", 5000, inception) == "FID-5k" and distance_name("F", 10_000, inception) == "FID-10k"
    assert distance_name("F", 50_000, inception) == "FID" and distance_name("K", 1000, inception) == "KID-1k"
    assert distance_name("F", 5000, network_of(128)) == "FD-5k (features X)"
    assert distance_name("K", 1797, network_of(64)) == "KD-1.797k (features X)"


MISTAKES = {
    "unknown": ("fid", 100, 100, "unknown metric 'fid'; choose from"),
    "few generated": (
        "fd",
        64,
        900,
        "64 generated images are too few .* in 64 features, .* raise num_images to 65 or more",
    ),
    "few real": ("fd", 900, 64, "64 real images are too few .* raise max_reference_images to 65"),
    "few for kd": ("kd", 19, 900, "19 generated images are too few for a kernel distance"),
    "few for pr": ("pr", 3, 900, "3 generated images are too few for precision and recall"),
    "no labels": ("label_accuracy", 100, 100, "asked for by class"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_cannot_be_measured_is_refused_by_counting(mistake):
    metric, count, real, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        check_metrics([metric], count, real, network_of(64), classifies=True, labelled=False)


def test_label_accuracy_needs_a_classifier():
    with pytest.raises(ValueError, match="label_accuracy needs a classifier"):
        check_metrics(["label_accuracy"], 100, 100, network_of(64), classifies=False, labelled=True)


def test_images_of_another_shape_than_the_network_takes_are_refused():
    network = feature_network(ResNetFeatures(width=4), "toy", torch.zeros(2, 1, 8, 8))
    with pytest.raises(ValueError, match=r"the network toy does not take images \(2, 3, 8, 8\)"):
        network_features(network, np.zeros((2, 8, 8, 3), dtype=np.uint8))
