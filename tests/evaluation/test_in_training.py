"""Evaluators of a model in training: shares, signals, samples, the best model kept."""

import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator

import hf_diffusion.evaluation.in_training as in_training
from hf_diffusion.data.images import load_images
from hf_diffusion.evaluation.in_training import EvaluationStopped, SampleEvaluator, shares
from hf_diffusion.evaluation.measures import Evaluation, Measure
from hf_diffusion.evaluation.protocol import sampling_protocol
from hf_diffusion.loop.best import BestModel
from hf_diffusion.schedulers.scheduling_consistency import ConsistencyScheduler
from tests.evaluation.conftest import tiny_pipeline
from tests.evaluation.made_up import Puller, PullScheduler, VectorData, VectorPipeline
from tests.pipelines.tiny import make_consistency


def never() -> bool:
    return False


class Processes:
    """A state that says that this is process `index` of `count`."""

    def __init__(self, index: int, count: int):
        self.process_index, self.num_processes = index, count


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture
def data(image_folder):
    return load_images(train_data_dir=str(image_folder))


# --- shares and signals ---


def test_shares_are_the_same_batches_for_any_number_of_processes_and_all_ask_equally_often(monkeypatch):
    for processes in (1, 2, 8):
        asked, batches = [], []
        for index in range(processes):
            state = Processes(index, processes)
            monkeypatch.setattr(in_training, "PartialState", lambda state=state: state)
            asked.append([])
            batches += shares(100, 16, lambda times=asked[-1]: times.append(1))
        assert sorted(batches, key=lambda b: b.start) == [range(s, min(s + 16, 100)) for s in range(0, 100, 16)]
        assert {len(times) for times in asked} == {-(-7 // processes)}


def test_a_signal_ends_all_processes_before_their_next_batch(monkeypatch):
    for index in range(2):
        monkeypatch.setattr(in_training, "PartialState", lambda index=index: Processes(index, 2))
        answers, done = iter([False, True]), []
        with pytest.raises(EvaluationStopped):
            for batch in shares(10, 2, lambda answers=answers: next(answers)):
                done.append(batch)
        assert len(done) == 1


# --- samples ---


def sample_evaluator(accelerator, data, pipeline, metrics=("fd", "kd", "pr"), **options):
    options = {"num_images": 100, "num_inference_steps": 3, "batch_size": 16, "class_conditional": False, **options}
    measure = SampleEvaluator(accelerator, metrics, data, lambda model: pipeline, None, **options)
    measure.prepare()
    return measure


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DIFFUSION_CACHE", str(tmp_path / "cache"))


def test_the_shares_of_eight_processes_are_bit_for_bit_the_images_of_one(accelerator, data, conditional, monkeypatch):
    measure = sample_evaluator(accelerator, data, conditional, class_conditional=True, num_images=130)
    whole = list(measure._chunks(conditional, never, []))
    for processes in (2, 8):
        drawn = []
        for index in range(processes):
            monkeypatch.setattr(in_training, "PartialState", lambda i=index, n=processes: Processes(i, n))
            drawn += measure._chunks(conditional, never, [])
        drawn.sort(key=lambda chunk: chunk[0][0])
        for one, several in zip(whole, drawn, strict=True):
            for ours, theirs in zip(one, several, strict=True):
                np.testing.assert_array_equal(ours, theirs)


def test_images_that_are_not_finite_are_an_error_that_no_process_waits_for(accelerator, data):
    good, broken = tiny_pipeline(), tiny_pipeline()
    measure = sample_evaluator(accelerator, data, good)
    with torch.no_grad():
        next(broken.unet.parameters()).fill_(float("nan"))
    measure.build_pipeline = lambda model: broken
    with pytest.raises(ValueError, match="NaN or infinity for 16 of 16 samples"):
        measure(None, never)


def test_vectors_of_a_model_in_training_are_measured_and_broken_ones_noted(accelerator):
    pipeline, data = VectorPipeline(Puller(), PullScheduler()), VectorData(scale=0.75)
    options = {"num_images": 400, "num_inference_steps": 1, "batch_size": 64, "class_conditional": False}
    evaluate = SampleEvaluator(accelerator, ("fd", "pr"), data, lambda model: pipeline, None, **options)
    evaluate.prepare()
    found = evaluate(None, never)
    # One step draws noise times 0.75, which is what the data are.
    assert found.measures["fd"].value < 0.3 and found.measures["precision"].value > 0.9
    assert found.measures["fd"].name == "FD-400 (features pixels)" and evaluate.keys == ["fd", "precision", "recall"]
    with torch.no_grad():
        pipeline.puller.linear.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN or infinity for 64 of 64 samples"):
        evaluate(None, never)


REFUSED = {
    "too few": ({"num_images": 50}, "50 generated samples are too few .* raise eval_num_images to 65"),
    "no classes": ({"metrics": ["label_accuracy"]}, "label_accuracy needs samples that were asked for by class"),
    "no network": ({"features": "/nowhere.pt"}, "is not there; give 'pixels', 'inception'"),
    "option": ({"strength": 1.0}, "strength"),
    "labels": ({"class_conditional": True}, "class"),
}


def test_what_cannot_be_measured_is_refused_before_the_training(accelerator, data, pipeline):
    for options, message in REFUSED.values():
        with pytest.raises((ValueError, TypeError), match=message):
            sample_evaluator(accelerator, data, pipeline, **options)


# --- the best model ---


def evaluation(value: float, metric: str = "fd", count: int = 100, better: str = "lower") -> list[Evaluation]:
    return [
        Evaluation({"other": Measure("other", 1.0, better="lower")}, {"count": 3}),
        Evaluation(
            {metric: Measure(f"a name of {metric}", value, 0.1, better=better)},
            {"count": count, "sampling": {"options": {}}},
        ),
    ]


def offer(best: BestModel, step: int, value: float, **about) -> bool:
    written = best.offer(step, evaluation(value, best.metric, **about), lambda f: (f / "model").write_text(str(step)))
    return written is not None


DIRECTIONS = {
    "lower": ("fd", "eval_loss_q1", "eval_vb", "eval_nll", "bpd", "mmd", "perplexity"),
    "higher": ("recall", "eval_accuracy", "fd_agreement"),
}


def test_the_best_by_the_measures_own_direction_stays_also_after_a_restart(tmp_path):
    """Whatever a measure is called: a bound or a perplexity is better when low."""
    for direction, metrics in DIRECTIONS.items():
        for metric in metrics:
            folder, (better, worse) = tmp_path / metric, (1.0, 2.0) if direction == "lower" else (2.0, 1.0)
            best = BestModel(folder, metric)
            kept = [offer(best, step, v, better=direction) for step, v in enumerate((worse, better, worse, better), 1)]
            assert kept == [True, True, False, False], metric
            assert not offer(BestModel(folder, metric), 5, worse, better=direction)
            record = json.loads((folder / "best" / "best.json").read_text())
            assert record["step"] == 2 and record["value"] == better and record["protocol"]["count"] == 100
            assert record["better"] == direction and set(record["measures"]) == {"other", metric}
            assert record["measures"][metric] == {
                "name": f"a name of {metric}", "value": better, "error": 0.1, "better": direction,
            }  # fmt: skip
            assert (folder / "best" / "model").read_text() == "2"
            assert [p.name for p in folder.iterdir()] == ["best"]


def test_values_of_another_protocol_or_metric_are_not_compared_and_nan_is_never_best(tmp_path, caplog):
    best = BestModel(tmp_path, "fd")
    assert not offer(best, 1, float("nan")) and offer(best, 2, 1.0)
    assert not caplog.records
    assert offer(best, 3, 5.0, count=200) and "under another protocol; it is replaced" in caplog.text
    assert offer(BestModel(tmp_path, "recall"), 4, 0.1)


def test_a_folder_that_cannot_be_written_is_a_warning_and_the_former_one_stays(tmp_path, caplog):
    best = BestModel(tmp_path, "fd")
    assert offer(best, 1, 2.0)

    def full(folder):
        raise OSError(28, "No space left on device")

    assert best.offer(2, evaluation(1.0), full) is None and "No space left" in caplog.text
    assert best.record()["step"] == 1 and sorted(p.name for p in tmp_path.iterdir()) == ["best"]


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path):
    assert offer(BestModel(tmp_path, "fd"), 1, 2.0)
    (tmp_path / "best").rename(tmp_path / ".best.former")  # where a kill may leave it
    best = BestModel(tmp_path, "fd")
    assert best.record()["step"] == 1 and not offer(best, 2, 3.0)


def test_a_long_table_of_the_scheduler_stands_in_no_line_of_the_metrics():
    levels = {"prediction_type": "epsilon", "trained_sigmas": tuple(0.01 * i + 0.002 for i in range(1000))}
    pipe = make_consistency(ConsistencyScheduler(**levels))
    recorded = sampling_protocol(pipe, 4, {})["sampler_config"]
    assert recorded["trained_sigmas"].startswith("1,000 values, sha256 ") and recorded["prediction_type"] == "epsilon"
    pipe.scheduler = ConsistencyScheduler(**levels | {"trained_sigmas": levels["trained_sigmas"][:-1] + (99.0,)})
    assert sampling_protocol(pipe, 4, {})["sampler_config"]["trained_sigmas"] != recorded["trained_sigmas"]
