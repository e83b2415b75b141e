"""Measurements of a model in training: shares and signals, held-out loss, the same figures as the command's, the best model kept."""

import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator

import hf_diffusion.evaluation.in_training as in_training
from hf_diffusion.best_model import BestModel, higher_is_better
from hf_diffusion.data.images import load_images
from hf_diffusion.evaluation.in_training import Evaluation, EvaluationStopped, HeldOutLoss, SampleMeasures, shares
from hf_diffusion.evaluation.measures import Measure
from tests.evaluation.conftest import tiny_pipeline


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


# --- shares and signals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2, 8])
def test_shares_are_the_same_batches_for_any_number_of_processes_and_all_ask_equally_often(monkeypatch, processes):
    asked, batches = [], []
    for index in range(processes):
        monkeypatch.setattr(in_training, "PartialState", lambda index=index: Processes(index, processes))
        asked.append([])
        batches += shares(100, 16, lambda: asked[-1].append(1))
    assert sorted(batches, key=lambda batch: batch.start) == [range(s, min(s + 16, 100)) for s in range(0, 100, 16)]
    assert {len(times) for times in asked} == {-(-7 // processes)}


def test_a_signal_ends_all_processes_before_their_next_batch(monkeypatch):
    for index in range(2):
        monkeypatch.setattr(in_training, "PartialState", lambda index=index: Processes(index, 2))
        answers, done = iter([False, True]), []
        with pytest.raises(EvaluationStopped):
            for batch in shares(10, 2, lambda answers=answers: next(answers)):
                done.append(batch)
        assert len(done) == 1


# --- the loss on held-out images ------------------------------------------------------------------------------------------


def noise_and_time(model, batch, t, noise):
    """Values that show what an image was looked at with."""
    return {"loss": t.float(), "noise": noise.flatten(1).sum(1) * batch["labels"]}


def test_noise_and_timesteps_belong_to_the_image_and_cover_every_quartile(accelerator, data):
    seen = []

    def note(model, batch, t, noise):
        seen.append((batch["indices"], t, noise))
        return noise_and_time(model, batch, t, noise)

    first, again, other = (
        HeldOutLoss(accelerator, data, note, 1000, ("loss", "noise"), batch_size=size, seed=seed)(None, never)
        for size, seed in ((16, 0), (50, 0), (50, 1))
    )
    for key, measure in first.measures.items():
        assert again.measures[key].value == pytest.approx(measure.value, rel=1e-5), key
    assert other.measures["eval_noise"].value != pytest.approx(first.measures["eval_noise"].value, rel=1e-3)
    for quartile in range(4):
        t = torch.cat([t for _, t, _ in seen[quartile:32:4]])
        assert 250 * quartile <= t.min() and t.max() < 250 * (quartile + 1) and t.unique().numel() > 50
        assert first.measures[f"eval_loss_q{quartile}"].value == pytest.approx(250 * quartile + 125, abs=25)
    assert first.measures["eval_loss"].value == pytest.approx(500, abs=15)
    assert abs(torch.cat([noise for *_, noise in seen[:32]]).std() - 1) < 0.02
    assert first.protocol["count"] == 120 and first.protocol["held_out"]["name"] == data.name


def test_the_share_of_each_of_three_processes_makes_up_the_whole(accelerator, data, monkeypatch):
    measure = HeldOutLoss(accelerator, data, noise_and_time, 1000, ("loss", "noise"), batch_size=16)
    whole, sums = measure(None, never), []
    monkeypatch.setattr(in_training, "gather_object", lambda parts: sums.extend(parts) or parts)
    for index in range(3):
        monkeypatch.setattr(in_training, "PartialState", lambda index=index: Processes(index, 3))
        measure(None, never)
    for key in sums[0]:
        total = sum(part[key] for part in sums) / len(data)
        assert total == pytest.approx(whole.measures[key].value, rel=1e-6), key


def test_a_process_of_few_timesteps_is_measured_too(accelerator, data):
    evaluation = HeldOutLoss(accelerator, data, noise_and_time, 2)(None, never)
    assert [evaluation.measures[f"eval_loss_q{q}"].value for q in range(4)] == [0, 0, 1, 1]


# --- samples --------------------------------------------------------------------------------------------------------------


def sample_measures(accelerator, data, pipeline, metrics=("fd", "kd", "pr"), **options):
    options = {"num_images": 100, "num_inference_steps": 3, "batch_size": 16, "class_conditional": False, **options}
    measure = SampleMeasures(accelerator, metrics, data, lambda model: pipeline, None, **options)
    measure.prepare()
    return measure


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DIFFUSION_CACHE", str(tmp_path / "cache"))


def test_the_shares_of_eight_processes_are_bit_for_bit_the_images_of_one(accelerator, data, conditional, monkeypatch):
    measure = sample_measures(accelerator, data, conditional, class_conditional=True, num_images=130)
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
    measure = sample_measures(accelerator, data, good)
    with torch.no_grad():
        next(broken.unet.parameters()).fill_(float("nan"))
    measure.build_pipeline = lambda model: broken
    with pytest.raises(ValueError, match="NaN or infinity for 16 of 16 images"):
        measure(None, never)


MISTAKES = {
    "too few": ({"num_images": 50}, "50 generated images are too few .* raise eval_num_images to 65"),
    "no classes": ({"metrics": ["label_accuracy"]}, "label_accuracy needs images that were asked for by class"),
    "no network": ({"features": "/nowhere.pt"}, "is not there; give 'pixels', 'inception'"),
    "option": ({"strength": 1.0}, "strength"),
    "labels": ({"class_conditional": True}, "class"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_cannot_be_measured_is_refused_before_the_training(accelerator, data, pipeline, mistake):
    options, message = MISTAKES[mistake]
    with pytest.raises((ValueError, TypeError), match=message):
        sample_measures(accelerator, data, pipeline, **options)


# --- the best model -------------------------------------------------------------------------------------------------------


def evaluation(value: float, metric: str = "fd", count: int = 100) -> list[Evaluation]:
    return [
        Evaluation({"other": Measure("other", 1.0)}, {"count": 3}),
        Evaluation(
            {metric: Measure(f"a name of {metric}", value, 0.1)}, {"count": count, "sampling": {"options": {}}}
        ),
    ]


def offer(best: BestModel, step: int, value: float, **about) -> bool:
    written = best.offer(step, evaluation(value, best.metric, **about), lambda f: (f / "model").write_text(str(step)))
    return written is not None


@pytest.mark.parametrize("metric, better, worse", [("fd", 1.0, 2.0), ("recall", 0.9, 0.3), ("eval_loss_q1", 0.1, 0.2)])
def test_the_best_stays_and_a_worse_one_does_not_come_also_after_a_restart(tmp_path, metric, better, worse):
    best = BestModel(tmp_path, metric)
    assert (
        offer(best, 1, worse) and offer(best, 2, better) and not offer(best, 3, worse) and not offer(best, 4, better)
    )
    assert not offer(BestModel(tmp_path, metric), 5, worse)
    record = json.loads((tmp_path / "best" / "best.json").read_text())
    assert record["step"] == 2 and record["value"] == better and record["protocol"]["count"] == 100
    assert record["better"] == ("higher" if higher_is_better(metric) else "lower")
    assert set(record["measures"]) == {"other", metric} and record["measures"][metric]["error"] == 0.1
    assert (tmp_path / "best" / "model").read_text() == "2"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best"]


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
