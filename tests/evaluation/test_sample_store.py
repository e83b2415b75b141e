"""Drawing many samples: one seed each, nothing drawn twice, nothing mixed up."""

import json

import numpy as np
import pytest
import torch

import hf_diffusion.evaluation.sample_store as store
from hf_diffusion.evaluation.sample_store import draw_two, sample_images
from hf_diffusion.sampling.drawing import draw
from tests.evaluation.conftest import stock_pipeline, tiny_pipeline
from tests.evaluation.made_up import Puller, PullScheduler, VectorPipeline


STEPS = {"num_inference_steps": 2, "progress": False}


def count_draws(monkeypatch) -> list[list[int]]:
    drawn = []

    def counted(pipeline, seeds, labels, **options):
        drawn.append(list(seeds))
        return draw(pipeline, seeds, labels, **options)

    monkeypatch.setattr(store, "draw", counted)
    return drawn


def test_image_i_is_that_of_its_seed_and_label_alone(conditional, tmp_path):
    samples = sample_images(conditional, range(5, 12), [0, 1, 2, 0, 1, 2, 0], tmp_path, chunk_size=3, **STEPS)
    images = samples.samples()
    assert images.shape == (7, 8, 8, 1) and images.dtype == np.uint8
    alone = draw(conditional, [9], [1], num_inference_steps=2)[0]
    assert np.abs(images[4].astype(int) - alone).max() <= 1
    positions, labels = zip(*((positions, labels) for positions, _, labels in samples.chunks()))
    assert np.concatenate(positions).tolist() == list(range(7))
    assert np.concatenate(labels).tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_shares_of_any_number_of_processes_make_up_all_images_once(pipeline, tmp_path):
    samples = sample_images(pipeline, range(10), None, tmp_path, chunk_size=3, **STEPS)
    for processes in (1, 2, 8):
        shares = [p for k in range(processes) for p, _, _ in samples.chunks(k, processes)]
        assert sorted(np.concatenate(shares).tolist()) == list(range(10))


def test_eight_processes_draw_bit_for_bit_the_images_of_one(conditional, tmp_path, monkeypatch):
    """Every process is simulated by its number; test_evaluate_command launches two."""

    class Process:
        is_main_process, num_processes = True, 8
        wait_for_everyone = staticmethod(lambda: None)

        def __init__(self, index):
            self.process_index = index

    labels = [i % 3 for i in range(40)]
    options = {"chunk_size": 4, "eta": 1.0, **STEPS}
    one = sample_images(conditional, range(40), labels, tmp_path / "one", **options)
    drawn = count_draws(monkeypatch)
    for index in range(8):
        monkeypatch.setattr(store, "PartialState", lambda index=index: Process(index))
        eight = sample_images(conditional, range(40), labels, tmp_path / "eight", **options)
    assert sorted(seed for seeds in drawn for seed in seeds) == list(range(40))  # each once
    np.testing.assert_array_equal(one.samples(), eight.samples())


def test_interrupted_sampling_goes_on_where_it_stopped(pipeline, tmp_path, monkeypatch):
    whole = sample_images(pipeline, range(8), None, tmp_path / "whole", chunk_size=3, **STEPS).samples()

    def interrupt(pipeline, seeds, labels, **options):
        if 3 in seeds:
            raise KeyboardInterrupt
        return draw(pipeline, seeds, labels, **options)

    monkeypatch.setattr(store, "draw", interrupt)
    with pytest.raises(KeyboardInterrupt):
        sample_images(pipeline, range(8), None, tmp_path / "cut", chunk_size=3, **STEPS)
    drawn = count_draws(monkeypatch)
    samples = sample_images(pipeline, range(8), None, tmp_path / "cut", chunk_size=3, **STEPS)
    assert drawn == [[3, 4, 5], [6, 7]]
    np.testing.assert_array_equal(samples.samples(), whole)
    assert samples.seconds_per_image() > 0 and not list(samples.folder.glob(".*"))


def test_a_damaged_chunk_is_drawn_again(pipeline, tmp_path, monkeypatch):
    samples = sample_images(pipeline, range(4), None, tmp_path, chunk_size=2, **STEPS)
    whole, damaged = samples.samples(), sorted(samples.folder.glob("*.npz"))[1]
    damaged.write_bytes(damaged.read_bytes()[:100])
    drawn = count_draws(monkeypatch)
    np.testing.assert_array_equal(
        sample_images(pipeline, range(4), None, tmp_path, chunk_size=2, **STEPS).samples(), whole
    )
    assert drawn == [[2, 3]]


def test_images_of_other_settings_seeds_labels_or_weights_are_never_taken_for_these(
    conditional, tmp_path, monkeypatch
):
    def folder(seeds=range(2), labels=(0, 1), **options):
        return sample_images(conditional, seeds, list(labels), tmp_path, **{**STEPS, **options}).folder

    first = folder()
    protocol = json.loads((first / "protocol.json").read_text())
    assert protocol["options"]["num_inference_steps"] == 2 and protocol["options"]["guidance_scale"] == 1.0
    assert protocol["sampler"] == "DDIMEtaScheduler" and len(protocol["weights_sha256"]["unet"]) == 64
    assert folder(eta=1.0) != first and folder(num_inference_steps=3) != first and folder(guidance_scale=2.0) != first
    drawn = count_draws(monkeypatch)
    assert folder() == first and not drawn
    folder(seeds=range(1, 3)), folder(labels=(1, 1))
    assert drawn == [[1, 2], [0, 1]]
    weight = next(conditional.unet.parameters())
    with torch.no_grad():
        weight += 1
        assert folder() != first
        weight -= 1


def test_stock_pipelines_are_drawn_from_too(tmp_path):
    stock = stock_pipeline(channels=3)
    images = sample_images(stock, range(4), None, tmp_path, chunk_size=3, eta=0.5, **STEPS).samples()
    assert images.shape == (4, 8, 8, 3)
    assert np.abs(images[2].astype(int) - draw(stock, [2], None, num_inference_steps=2, eta=0.5)[0]).max() <= 1


def test_vectors_are_kept_as_float32_bit_for_bit(tmp_path):
    pipeline = VectorPipeline(Puller(), PullScheduler())
    samples = sample_images(pipeline, range(5), None, tmp_path, chunk_size=2, churn=0.5, **STEPS)
    assert samples.samples().dtype == np.float32 and samples.samples().shape == (5, 7)
    expected = [draw(pipeline, seeds, None, churn=0.5, num_inference_steps=2) for seeds in ([0, 1], [2, 3], [4])]
    np.testing.assert_array_equal(samples.samples(), np.concatenate(expected))
    assert samples.protocol["options"] == {"num_inference_steps": 2, "churn": 0.5}


def test_a_trial_takes_few_steps_but_those_of_a_model_that_takes_no_others(pipeline, monkeypatch):
    tried, allowed = [], set()

    def counted(pipeline, seeds, labels, **options):
        tried.append(options)
        if options["num_inference_steps"] not in allowed:
            raise ValueError("this model has 4 steps")
        return draw(pipeline, seeds, labels, **{**options, "num_inference_steps": 2})

    monkeypatch.setattr(store, "draw", counted)
    for steps, expected in (({2, 4}, [2]), ({4}, [2, 4])):
        tried.clear()
        allowed.clear()
        allowed.update(steps)
        assert draw_two(pipeline, 0, None, {"num_inference_steps": 4, "eta": 1.0}).shape == (2, 8, 8, 1)
        assert [options["num_inference_steps"] for options in tried] == expected and tried[0]["eta"] == 1.0


def test_bad_calls_are_refused_with_a_reason(pipeline, tmp_path):
    with pytest.raises(ValueError, match="3 labels for 2 seeds"):
        sample_images(pipeline, range(2), [0, 1, 2], tmp_path)
    with pytest.raises(ValueError, match="0 seeds in chunks of 256 make no samples"):
        sample_images(pipeline, [], None, tmp_path)
    with pytest.raises(ValueError, match="strength: ClassifierFreeGuidancePipeline does not take it"):
        sample_images(pipeline, range(2), None, tmp_path, strength=1)
    assert not list(tmp_path.iterdir())


def test_samples_that_are_not_finite_are_refused_with_their_seeds(tmp_path):
    broken = tiny_pipeline()
    with torch.no_grad():
        next(broken.unet.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match=r"NaN or infinity for 2 of 2 samples \(seeds \[3, 4\]"):
        sample_images(broken, [3, 4], None, tmp_path, **STEPS)
    assert not list(tmp_path.rglob("*.npz"))
