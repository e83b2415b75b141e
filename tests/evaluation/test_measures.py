"""Measures of samples against a cached reference: the ruler, shares, names, directions."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import hf_diffusion.evaluation.reference as reference_module
from hf_diffusion.data.images import load_images
from hf_diffusion.evaluation.feature_networks import (
    FeatureNetwork,
    ResNetFeatures,
    feature_network,
    load_feature_network,
)
from hf_diffusion.evaluation.measures import METRICS, Measure, check_metrics, distance_name, measure_samples
from hf_diffusion.evaluation.reference import reference_statistics


SHARED = Path(__file__).resolve().parents[3] / "shared"


def network_of(dimension: int, is_inception: bool = False, classifier=None) -> FeatureNetwork:
    return FeatureNetwork("X", "0", lambda x: x, dimension, torch.device("cpu"), classifier, is_inception)


def chunks_of(images, labels=None, size: int = 50):
    for start in range(0, len(images), size):
        rows = np.arange(start, min(start + size, len(images)))
        yield rows, images[rows], None if labels is None else labels[rows]


def pixels_of(data) -> np.ndarray:
    return data.to_samples(data.fetch(range(len(data)), epoch=0))


def test_real_images_measured_against_themselves_are_perfect(image_folder, tmp_path):
    torch.manual_seed(0)
    data = load_images(train_data_dir=str(image_folder))
    network = feature_network(ResNetFeatures(width=4).eval(), "toy", torch.zeros(2, 1, 8, 8))
    reference = reference_statistics(data, network, tmp_path)
    measures = measure_samples(chunks_of(pixels_of(data)), len(data), network, reference, ["fd", "pr", "kd"])
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

    network = load_feature_network(weights, (1, 28, 28))
    reference = reference_statistics(data, network, tmp_path)
    measures = measure_samples(chunks_of(fake, fake_labels), 800, network, reference, ["fd", "pr", "label_accuracy"])
    assert set(expected) == set(measures) and expected["fd"] > 1 and 0.1 < expected["recall"] < 0.99
    for name, value in expected.items():
        assert measures[name].value == pytest.approx(value, rel=1e-3), name


def test_measures_do_not_depend_on_how_images_are_cut_into_chunks(image_folder, tmp_path):
    data = load_images(train_data_dir=str(image_folder))
    network = load_feature_network("pixels", (1, 8, 8))
    reference = reference_statistics(data, network, tmp_path)
    images = np.random.default_rng(1).integers(0, 256, (90, 8, 8, 1), dtype=np.uint8)
    first, second = (
        measure_samples(chunks_of(images, size=size), 90, network, reference, ["fd", "kd", "pr"]) for size in (90, 7)
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


def test_every_measure_of_samples_says_which_way_is_better(image_folder, tmp_path):
    data = load_images(train_data_dir=str(image_folder))
    network = feature_network(ResNetFeatures(width=4), "toy", torch.zeros(2, 1, 8, 8))
    judge = replace(network, classifier=lambda images: images.flatten(1)[:, :2])
    reference = reference_statistics(data, network, tmp_path)
    measures = measure_samples(
        chunks_of(pixels_of(data), data.labels), len(data), network, reference, METRICS, judge, data.labels
    )
    assert {key: measure.better for key, measure in measures.items()} == {
        "fd": "lower", "kd": "lower", "precision": "higher", "recall": "higher", "label_accuracy": "higher",
    }  # fmt: skip


def test_a_measure_has_no_direction_unless_somebody_says_it():
    with pytest.raises(TypeError, match="better"):
        Measure("perplexity", 3.0)
    with pytest.raises(ValueError, match="better='least' of 'perplexity' must be 'lower' or 'higher'"):
        Measure("perplexity", 3.0, better="least")


def test_the_better_value_wins_whatever_the_measure_is_called():
    for name in ("eval_vb", "eval_nll", "bpd", "mmd", "perplexity", "fd", "loss"):
        assert Measure(name, 1.0, better="lower").beats(2.0) and not Measure(name, 2.0, better="lower").beats(1.0)
    for name in ("precision", "fd_similarity", "eval_loss_accuracy"):
        assert Measure(name, 2.0, better="higher").beats(1.0) and not Measure(name, 1.0, better="higher").beats(2.0)
    nan = Measure("fd", float("nan"), better="lower")
    assert not nan.beats(1.0) and not Measure("fd", 1.0, better="lower").beats(1.0)


REFUSED = {
    "unknown": ("fid", 100, 100, "unknown metric 'fid'; choose from"),
    "few generated": ("fd", 64, 900, "64 generated samples are too few .* in 64 features, .* raise num_images to 65"),
    "few real": ("fd", 900, 64, "64 real samples are too few .* raise max_reference_images to 65"),
    "few for kd": ("kd", 19, 900, "19 generated samples are too few for a kernel distance; raise num_images to 20"),
    "few for pr": ("pr", 3, 900, "3 generated samples are too few for precision and recall"),
    "no labels": ("label_accuracy", 100, 100, "asked for by class"),
}


def test_what_cannot_be_measured_is_refused_by_counting():
    for metric, count, real, message in REFUSED.values():
        with pytest.raises(ValueError, match=message):
            check_metrics([metric], count, real, network_of(64), classifies=True, labelled=False)
    with pytest.raises(ValueError, match="label_accuracy needs a classifier"):
        check_metrics(["label_accuracy"], 100, 100, network_of(64), classifies=False, labelled=True)


def test_samples_of_another_shape_than_the_network_takes_are_refused():
    network = feature_network(ResNetFeatures(width=4), "toy", torch.zeros(2, 1, 8, 8))
    with pytest.raises(ValueError, match=r"the network toy does not take samples \(2, 3, 8, 8\)"):
        network.features(np.zeros((2, 8, 8, 3), dtype=np.uint8))
