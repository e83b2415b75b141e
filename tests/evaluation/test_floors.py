"""Real data against real data: what is printed beside a figure is what so many real samples get."""

import numpy as np
import pytest
import torch

from hf_diffusion.evaluation.distances import Moments, frechet_distance
from hf_diffusion.evaluation.floors import floors
from hf_diffusion.evaluation.reference import Reference


def reference_of(features: torch.Tensor, kept: int) -> Reference:
    moments = Moments(features.shape[1])
    moments.add(features)
    return Reference(len(features), *moments.mean_and_covariance(), features[:kept], {})


def normal(count: int, dimension: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).normal(3, 2, (count, dimension)).astype(np.float32))


def test_the_distance_of_a_part_is_that_to_all_others_and_no_sample_is_on_both_sides():
    features = normal(900, 6)
    found = floors(reference_of(features, kept=500), 200, ["fd"])["fd"]
    part, others = Moments(6), Moments(6)
    part.add(features[:200])
    others.add(features[200:])
    expected = frechet_distance(part.mean_and_covariance(), others.mean_and_covariance())
    assert (found.count, found.others) == (200, 700) and found.value == pytest.approx(expected, rel=1e-9)


def test_few_samples_in_many_features_have_a_large_distance_and_no_kernel_distance():
    few, many = (floors(reference_of(normal(4000, 40), kept=2000), n, ["fd", "kd", "pr"]) for n in (100, 1000))
    # the bias goes as 1 / N, and its size is that of the spread of 40 values of variance 4
    assert few["fd"].value > 8 * many["fd"].value > 1
    for found in (few, many):
        assert abs(found["kd"].value) < 4 * found["kd"].error
    # of one distribution, as far as 40 dimensions and so few neighbours show it
    assert many["precision"].value == pytest.approx(many["recall"].value, abs=0.1)
    assert set(few) == {"fd", "kd", "precision", "recall"}


def test_floors_say_how_many_there_were_and_are_left_out_where_there_are_too_few():
    reference = reference_of(normal(50, 6), kept=50)
    assert {key: floor.count for key, floor in floors(reference, 1000, ["fd", "kd", "pr"]).items()} == {
        "fd": 25, "kd": 25, "precision": 25, "recall": 25,
    }  # fmt: skip
    assert floors(reference_of(normal(12, 6), kept=12), 1000, ["fd", "kd"]) == {}
    assert floors(reference, 1000, []) == {}
