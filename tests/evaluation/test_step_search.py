"""The search for timesteps, on functions and on a model whose trajectories are known."""

import numpy as np
import pytest

from hf_diffusion.evaluation.feature_networks import load_feature_network
from hf_diffusion.evaluation.step_search import Trajectories, search
from hf_diffusion.sampling.loading import replace_scheduler
from tests.pipelines.tiny import make_classifier_free


def test_the_search_finds_the_least_of_a_bowl_within_its_finest_stride():
    aim, asked = np.array([930, 610, 220, 47]), []

    def bowl(steps: tuple[int, ...]) -> float:
        asked.append(steps)
        return float(np.square(np.array(steps) - aim).sum())

    found = search(bowl, (999, 749, 499, 249), 1000)
    assert np.abs(np.array(found) - aim).max() <= 4, found
    # each place is measured once, falling and within the process
    assert len(asked) == len(set(asked)) < 150
    assert all(1000 > a > b >= 0 for steps in asked for a, b in zip(steps, steps[1:]))


def test_a_start_that_is_best_is_kept_and_one_step_has_its_search_too():
    assert search(lambda steps: 0.0, (999, 499), 1000) == (999, 499)
    (found,) = search(lambda steps: abs(steps[0] - 321), (999,), 1000)
    assert abs(found - 321) <= 4


def test_trajectories_are_those_of_the_seeds_and_their_distance_falls_with_the_steps():
    pipe = make_classifier_free()
    pipe.scheduler = replace_scheduler(pipe.scheduler, "unipc")
    network = load_feature_network("pixels", (1, 8, 8))
    seen = Trajectories.follow(pipe, network, range(5, 11), [0, 1, 2, 3, 0, 1], 4, {}, 40)
    assert seen.reference.shape == (6, 64)
    many, few = (seen.distances(num_inference_steps=steps) for steps in (30, 3))
    assert many.shape == (6,) and many.mean() < few.mean() / 2
    assert seen.distance([999, 800, 400]) == pytest.approx(seen.distances(timesteps=[999, 800, 400]).mean())
    assert seen.distances(num_inference_steps=40).max() == 0
