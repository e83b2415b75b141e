"""Measures of the model: what a pipeline names gives a number, and nothing else does."""

import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import EDMEulerScheduler

import hf_diffusion
import hf_diffusion.evaluation.evaluate as evaluate_module
import hf_diffusion.evaluation.sweep as sweep_module
from hf_diffusion.cli import main
from hf_diffusion.data.images import load_images
from hf_diffusion.data.loading import load_data
from hf_diffusion.evaluation.inputs import class_names, number_classes_alike
from hf_diffusion.evaluation.likelihood import bits_per_dim
from hf_diffusion.evaluation.measures import Evaluation
from hf_diffusion.evaluation.model_measures import (
    ModelMeasureOptions,
    fetch,
    find_model_measure,
    measure_bits_per_dim,
    model_measures,
)
from hf_diffusion.pipelines.pipeline_classifier_free_guidance import ClassifierFreeGuidancePipeline
from hf_diffusion.schedulers.scheduling_gaussian import LinearDDPMScheduler
from tests.evaluation.conftest import stock_pipeline, tiny_pipeline
from tests.evaluation.made_up import Puller, PullScheduler, VectorData, VectorPipeline, mean_square


PIPELINES = [getattr(hf_diffusion, name) for name in hf_diffusion.__all__ if name.endswith("Pipeline")]


@pytest.fixture
def data(image_folder):
    return load_images(train_data_dir=str(image_folder))


# --- what a pipeline says ---


def test_every_measure_that_an_exported_pipeline_names_is_there():
    assert len(PIPELINES) >= 3
    for cls in PIPELINES:
        for name in model_measures(cls):
            assert callable(find_model_measure(cls, name)), (cls, name)
    assert {"bpd", "consistency", "inversion"} <= set(hf_diffusion.ClassifierFreeGuidancePipeline.measures)
    assert model_measures(hf_diffusion.DDGANPipeline) == {}
    assert model_measures(stock_pipeline()) == {}


def test_a_measure_may_be_a_function_or_the_place_of_one():
    pipeline = SimpleNamespace(measures={"own": mean_square, "far": f"{mean_square.__module__}:mean_square"})
    assert find_model_measure(pipeline, "own") is find_model_measure(pipeline, "far") is mean_square
    for place in ("no.such.module:f", f"{mean_square.__module__}:no_such", "nowhere"):
        with pytest.raises(ValueError, match="names .* for bad, which cannot be found"):
            find_model_measure(SimpleNamespace(measures={"bad": place}), "bad")


# --- bits per dimension ---


def test_bits_per_dimension_are_those_of_the_bound_image_by_image(data):
    pipeline = tiny_pipeline(classes=2)
    options = ModelMeasureOptions(count=5, num_timesteps=4, seed=3, batch_size=2, progress=False)
    found = measure_bits_per_dim(pipeline, data, options)
    indices = [0, 24, 48, 72, 96]
    batch, scheduler = data.fetch(indices, epoch=0), LinearDDPMScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(4)
    generators = [torch.Generator().manual_seed(3 + i) for i in indices]
    bound = bits_per_dim(pipeline.unet, scheduler, batch["x_0"], generator=generators, class_labels=batch["labels"])
    bpd, prior = found.measures["bpd"], found.measures["prior_bpd"]
    assert bpd.value == pytest.approx(float(bound.total_bpd.mean()), rel=1e-5) and bpd.better == "lower"
    assert bpd.error == pytest.approx(float(bound.total_bpd.std() / 5**0.5), rel=1e-5)
    assert bpd.breakdown.places == scheduler.timesteps.tolist()
    assert bpd.breakdown.values == pytest.approx(bound.vb.mean(0).tolist(), rel=1e-5)
    assert sum(bpd.breakdown.values) + prior.value == pytest.approx(bpd.value, rel=1e-5)
    assert found.protocol["count"] == 5 and found.protocol["data"]["name"] == data.name


def test_a_process_without_betas_and_data_without_8_bits_have_no_such_bound(data):
    pipeline, options = tiny_pipeline(), ModelMeasureOptions()
    measure_bits_per_dim.check(pipeline, data, options)
    with pytest.raises(ValueError, match="bpd over 2000 steps asks for more than the 1000 timesteps"):
        measure_bits_per_dim.check(pipeline, data, ModelMeasureOptions(num_timesteps=2000))
    with pytest.raises(ValueError, match="code length of values of 8 bits, which those of checkerboard are not"):
        measure_bits_per_dim.check(pipeline, load_data("checkerboard"), options)
    pipeline.scheduler = EDMEulerScheduler()
    with pytest.raises(ValueError, match="bpd is defined by the betas of a Gaussian process, and EDMEulerScheduler"):
        measure_bits_per_dim.check(pipeline, data, options)


def test_classes_of_model_and_data_meet_by_name(data, image_folder):
    """The folder has bright 0 and dark 1; the model has them the other way round, or others."""
    pipeline, index = tiny_pipeline(classes=2), int(data.labels.argmin())
    assert data.class_names[data.labels[index]] == "bright"
    turned = ClassifierFreeGuidancePipeline(pipeline.unet, pipeline.scheduler, id2label={0: "dark", 1: "bright"})
    number_classes_alike(data, class_names(turned))
    assert fetch(turned, data, [index])[1].tolist() == [1]
    other = ClassifierFreeGuidancePipeline(pipeline.unet, pipeline.scheduler, id2label={0: "cat", 1: "dog"})
    number_classes_alike(data, class_names(other))
    with pytest.raises(
        ValueError, match=r"the model's classes are \['cat', 'dog'\] and those of .* \['dark', 'bright'\]"
    ):
        measure_bits_per_dim.check(other, data, ModelMeasureOptions())


# --- a made-up family through the command ---


@pytest.fixture
def measured(tmp_path, monkeypatch, capsys):
    """Evaluate the made-up pipeline: status, metrics.json, output, errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DIFFUSION_CACHE", str(tmp_path / "cache"))
    pipeline = VectorPipeline(Puller(), PullScheduler())
    monkeypatch.setattr(sweep_module, "load_for_sampling", lambda options: pipeline)
    monkeypatch.setattr(evaluate_module, "load_real_data", lambda options, shape: VectorData(scale=0.75))

    def call(*words, cls=VectorPipeline):
        pipeline.__class__ = cls
        status = main(["evaluate", "made_up", "--device", "cpu", *map(str, words)])
        printed, report = capsys.readouterr(), tmp_path / "evaluation" / "metrics.json"
        return status, json.loads(report.read_text()) if report.is_file() else None, printed.out, printed.err

    return call


def test_samples_that_are_no_images_are_measured_by_their_raw_values(measured):
    status, report, printed, _ = measured(
        "--metrics", "fd,kd,pr,mean_square", "--num_images", 600, "--sweep", "num_inference_steps=1,8"
    )
    assert status == 0
    one, many = (point["measures"] for point in report["results"])
    # One step goes half of the way to half of the vector; many end at about 0.70 of it. The real
    # vectors have 0.75.
    assert 0 < one["fd"]["value"] < 0.3 < 0.9 < one["precision"]["value"]
    assert many["fd"]["value"] > one["fd"]["value"] - 3 * one["fd"]["error"]
    assert abs(one["kd"]["value"]) < 4 * one["kd"]["error"] and one["fd"]["name"] == "FD-600 (features pixels)"
    assert report["results"][0]["protocol"]["reference"]["samples"] == 400
    (model,) = report["model"]
    expected = float((VectorData(0.75).vectors[:64] * 0.5).square().mean())
    assert model["measures"]["mean_square"]["value"] == pytest.approx(expected, rel=1e-6)
    assert model["measures"]["mean_square"]["better"] == "lower" and "mean square (64 vectors): " in printed


class Consistent(VectorPipeline):
    measures = {"consistency": "hf_diffusion.evaluation.determinism:measure_consistency"}


class Unfinished(VectorPipeline):
    measures = {"half": lambda pipeline, data, options: 3.0}


def test_what_the_pipeline_does_not_name_is_refused_in_a_sentence_that_says_what_it_is_measured_by(measured):
    known = "choose from fd, kd, pr, label_accuracy of samples and mean_square of its model"
    for metric in ("bpd", "inversion", "consistency", "fid"):
        status, report, _, error = measured("--metrics", f"fd,{metric}")
        assert (status, report) == (2, None)
        assert error.strip() == (
            f"hf-diffusion evaluate: --metrics {metric}: {known}, which is all that a VectorPipeline can be measured "
            "by"
        )


def test_what_vectors_cannot_be_measured_by_is_refused_in_a_sentence(measured):
    for words, message in (
        (("--metrics", "label_accuracy"), "label_accuracy needs samples that were asked for by class"),
        (("--features", "inception"), "features 'inception' are those of images"),
        (("--features", "trained"), "features 'trained' are those of images"),
        (("--num_images", 7), "7 generated samples are too few for a Frechet distance in 7 features"),
        (("--sweep", "eta=0,1"), "with NAME one of num_inference_steps, churn, guidance"),
        (("--sweep", "churn=0,some"), "--sweep churn: got 'some'"),
    ):
        status, report, printed, error = measured(*words)
        assert status in (1, 2) and report is None and message in error and len(error.splitlines()) == 1, (
            words,
            error,
        )


def test_a_measure_of_the_package_works_for_a_family_that_names_it(measured):
    words = ("--metrics", "consistency", "--sweep", "num_inference_steps=1,2")
    status, report, _, _ = measured(*words, cls=Consistent)
    assert status == 0 and set(report["model"][0]["measures"]) == {"consistency_0", "consistency_1", "consistency_2"}
    status, _, _, error = measured(*words, "--set", "churn=0.1", cls=Consistent)
    assert status == 1 and "PullScheduler draws noise in its steps" in error


def test_a_measure_that_gives_no_evaluation_is_named(measured):
    status, _, _, error = measured("--metrics", "half", cls=Unfinished)
    assert status == 1 and f"the measure half gave a float; it must give an {Evaluation.__name__}" in error
