"""`--eval_steps`, `--eval_metrics`, `--eval_split` and `--best_metric` of training, end to end."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from hf_diffusion import ClassifierFreeGuidancePipeline, DDGANPipeline
from hf_diffusion.cli import main as command
from hf_diffusion.evaluation import in_training
from hf_diffusion.evaluation.measures import Evaluation, Measure
from hf_diffusion.figures.curves import read_metrics, series
from hf_diffusion.training import train_ddgan, train_ddpm
from tests.launching import ENVIRONMENT, launcher
from tests.training.test_train_ddpm import REPO, TINY, assert_same_weights, metrics, weights


MEASURED = """
    --split train[:80] --eval_split train[80:120] --max_train_samples none
    --max_train_steps 6 --eval_steps 2 --logging_steps 2
    --eval_metrics fd,kd,pr --eval_num_images 80 --eval_batch_size 32 --seed 3 --best_metric kd
""".split()
HELD_OUT = {"eval_loss", *(f"eval_loss_q{quartile}" for quartile in range(4))}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DIFFUSION_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def run(output_dir, *flags: str) -> Path:
    assert train_ddpm.main([*TINY, *MEASURED, "--output_dir", str(output_dir), *flags]) == 0
    return Path(output_dir)


def evaluations(folder: Path, key: str) -> dict[int, dict]:
    return {record["step"]: record for record in metrics(folder) if key in record}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return run(tmp_path_factory.mktemp("measured") / "whole")


def test_the_log_holds_the_held_out_loss_and_the_measures_of_samples_with_their_protocols(finished):
    losses, samples = evaluations(finished, "eval_loss"), evaluations(finished, "fd")
    assert list(losses) == list(samples) == [2, 4, 6]
    for step in losses:
        assert set(losses[step]) == {"step", "protocol", *HELD_OUT}
        assert losses[step]["eval_loss"] == pytest.approx(sum(losses[step][f"eval_loss_q{q}"] for q in range(4)) / 4)
        values = {"fd", "kd", "precision", "recall"}
        assert set(samples[step]) == {"step", "protocol", *values, *(f"{name}_error" for name in values)}
    assert losses[6]["eval_loss"] < losses[2]["eval_loss"] < 2  # six steps are enough to learn that images are dark
    protocol = samples[4]["protocol"]
    assert protocol["count"] == 80 and protocol["seeds"] == [3, 82] and protocol["reference"]["images"] == 80
    assert protocol["sampling"]["options"]["num_inference_steps"] == 2 and protocol["features"]["name"] == "pixels"
    assert losses[4]["protocol"]["held_out"]["split"] == "train[80:120]"
    card = (finished / "README.md").read_text()
    assert "FD-80 (features pixels)" in card and "loss on held-out data" in card and "seeds 3 to 82" in card


def test_training_and_held_out_losses_of_one_step_are_both_drawn(finished):
    records = read_metrics(finished / "metrics.jsonl")
    for key in ("loss", "eval_loss", "eval_loss_q0", "fd", "lr"):
        assert series(records, key)[0].tolist() == [2, 4, 6], key
    assert (finished / "loss_curve.png").is_file()


def test_the_command_finds_the_figures_of_the_last_evaluation(finished, tmp_path):
    words = ["evaluate", finished, "--metrics", "fd,kd,pr", "--num_images", 80, "--seed", 3, "--batch_size", 32]
    words += ["--num_inference_steps", 2, "--split", "train[:80]", "--device", "cpu", "--output_dir", tmp_path]
    assert command([str(word) for word in words]) == 0
    (result,) = json.loads((tmp_path / "metrics.json").read_text())["results"]
    during = evaluations(finished, "fd")[6]
    for key, measure in result["measures"].items():
        assert measure["value"] == during[key] and measure["error"] == during[f"{key}_error"], key
    shared = during["protocol"].keys() & result["protocol"].keys()
    assert shared == set(during["protocol"]) and all(result["protocol"][k] == during["protocol"][k] for k in shared)


def test_measuring_changes_nothing_in_the_training(finished, tmp_path):
    plain = run(tmp_path, "--eval_split", "none", "--eval_metrics", "none", "--best_metric", "none")
    assert_same_weights(weights(plain), weights(finished))
    assert not (plain / "best").exists() and not evaluations(plain, "eval_loss")


def test_the_best_model_is_kept_as_a_pipeline_that_loads_with_its_measures(finished):
    record = json.loads((finished / "best" / "best.json").read_text())
    by_step = {step: values["kd"] for step, values in evaluations(finished, "kd").items()}
    assert record["metric"] == "kd" and record["value"] == min(by_step.values()) == by_step[record["step"]]
    assert record["measures"]["eval_loss"]["value"] == evaluations(finished, "eval_loss")[record["step"]]["eval_loss"]
    pipe = ClassifierFreeGuidancePipeline.from_pretrained(finished / "best")
    assert pipe(["3"], num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 1)
    assert not list(finished.glob(".best*"))


def test_a_later_worse_model_does_not_replace_the_best_one(tmp_path, monkeypatch):
    values, original = iter([0.5, 0.4, 0.1]), in_training.SampleEvaluator.__call__
    seen = []

    def falling(measure, model, stopping):
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        found = original(measure, model, stopping)
        return Evaluation(
            found.measures | {"recall": Measure("recall", next(values), better="higher")}, found.protocol
        )

    monkeypatch.setattr(in_training.SampleEvaluator, "__call__", falling)
    folder = run(tmp_path, "--best_metric", "recall")
    assert json.loads((folder / "best" / "best.json").read_text())["step"] == 2
    assert_same_weights(load_file(folder / "best" / "unet" / "diffusion_pytorch_model.safetensors"), seen[0])
    assert_same_weights(weights(folder), seen[-1])


@pytest.mark.parametrize("at", [2, 6])
def test_a_signal_during_an_evaluation_ends_the_run_before_the_next_batch_and_it_is_made_up_for(
    finished, tmp_path, monkeypatch, at
):
    drawn, original = [], in_training.draw

    def draw_and_signal(pipeline, seeds, labels, **options):
        drawn.append(len(seeds))
        if len(drawn) == 2 + 3 * (at // 2 - 1):  # two images before the training, then three batches an evaluation
            os.kill(os.getpid(), signal.SIGTERM)
        return original(pipeline, seeds, labels, **options)

    with monkeypatch.context() as patch:
        patch.setattr(in_training, "draw", draw_and_signal)
        run(tmp_path)
    assert len(drawn) == 2 + 3 * (at // 2 - 1)
    assert sorted(tmp_path.glob("checkpoint-*"))[-1].name == f"checkpoint-{at:08d}"
    assert max(evaluations(tmp_path, "fd"), default=0) < at
    run(tmp_path, "--resume_from_checkpoint", "latest")
    assert_same_weights(weights(tmp_path), weights(finished))
    for key in ("fd", "eval_loss"):
        assert evaluations(tmp_path, key) == evaluations(finished, key)
    assert (tmp_path / "best" / "best.json").read_text() == (finished / "best" / "best.json").read_text()
    assert "FD-80 (features pixels)" in (tmp_path / "README.md").read_text()


def test_the_best_value_so_far_is_remembered_by_a_resumed_run(finished, tmp_path):
    run(tmp_path, "--checkpoints_total_limit", "9")
    record = tmp_path / "best" / "best.json"
    unbeatable = json.loads(record.read_text()) | {"value": -1e6, "step": 2}
    record.write_text(json.dumps(unbeatable))
    run(tmp_path, "--checkpoints_total_limit", "9", "--resume_from_checkpoint", "checkpoint-00000003")
    assert json.loads(record.read_text()) == unbeatable
    assert list(evaluations(tmp_path, "fd")) == [2, 4, 6]
    run(tmp_path, "--overwrite_output_dir")
    assert json.loads(record.read_text())["value"] > 0


def test_a_model_whose_samples_are_not_finite_goes_on_training(tmp_path, monkeypatch, capsys):
    original, calls = in_training.draw, []

    def sometimes(pipeline, seeds, labels, **options):
        calls.append(1)
        if len(calls) == 2:
            raise ValueError("the pipeline gives NaN or infinity for 1 of 32 images")
        return original(pipeline, seeds, labels, **options)

    monkeypatch.setattr(in_training, "draw", sometimes)
    run(tmp_path)
    assert "step 2: nothing could be measured: the pipeline gives NaN" in capsys.readouterr().err
    assert list(evaluations(tmp_path, "fd")) == [4, 6]


def test_a_gan_is_measured_by_label_accuracy_too(tmp_path):
    flags = """--dataset_name digits --class_conditional
        --model_channels 8 --channel_mult 1,2 --num_res_blocks 1 --attention_sizes 4 --latent_dim 8
        --latent_embed_dim 8 --num_latent_layers 1 --discriminator_channels 8 --time_embed_dim 8 --train_batch_size 8
        --sample_steps none --num_sample_images 10 --max_train_steps 2 --eval_steps 1 --eval_metrics fd,label_accuracy
        --eval_features trained --eval_num_images 70 --best_metric label_accuracy""".split()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_diffusion.evaluation.feature_training.STEPS", 30)
        assert train_ddgan.main([*flags, "--output_dir", str(tmp_path)]) == 0
    assert list(evaluations(tmp_path, "label_accuracy")) == [1, 2]
    record = json.loads((tmp_path / "best" / "best.json").read_text())
    assert (
        record["better"] == "higher"
        and "label accuracy (trained-on-digits" in record["measures"]["label_accuracy"]["name"]
    )
    assert DDGANPipeline.from_pretrained(tmp_path / "best")(["3"], output_type="np").images.shape == (1, 8, 8, 1)


MISTAKES = {
    "unmeasured": (
        ["--best_metric", "label_accuracy"],
        1,
        "best_metric label_accuracy is none of what is measured: eval_loss,",
    ),
    "nothing": (
        ["--eval_split", "none", "--eval_metrics", "none"],
        1,
        "best_metric kd needs something that is measured",
    ),
    "too few": (["--eval_num_images", "64"], 1, "raise eval_num_images to 65"),
    "too few real": (["--max_train_samples", "60"], 1, "raise max_train_samples to 65"),
    "unknown": (["--eval_metrics", "fid"], 2, "eval_metrics"),
    "stream": (["--streaming"], 2, "eval_metrics compare with all training images, which a stream does not hold"),
    "split": (["--eval_split", "test"], 1, "split 'test' is unknown"),
    "features": (["--eval_features", "/nowhere.pt"], 1, "is not there; give 'pixels', 'inception'"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_cannot_be_measured_is_one_sentence_before_the_first_step(tmp_path, capsys, mistake):
    flags, status, message = MISTAKES[mistake]
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path / "out", *flags)
    code = stopped.value.code
    assert (code if isinstance(code, int) else 1) == status
    assert message in (capsys.readouterr().err if isinstance(code, int) else code)
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_settings_of_the_evaluation_are_saved_with_the_run(finished):
    saved = yaml.safe_load((finished / "config.yaml").read_text())
    assert saved["eval_metrics"] == ["fd", "kd", "pr"] and saved["best_metric"] == "kd" and saved["eval_steps"] == 2


# --- several processes ---


def start(output_dir: Path, *flags: str) -> subprocess.Popen:
    command = [*launcher(2), "training/train_ddpm.py", *TINY, *MEASURED, "--train_batch_size", "4", *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, "--output_dir", str(output_dir)], cwd=REPO, env={**ENVIRONMENT}, **pipes)


@pytest.mark.slow
def test_two_processes_measure_what_one_measures(finished, tmp_path):
    with start(tmp_path) as launched:
        out, err = launched.communicate(timeout=300)
    assert launched.returncode == 0, out + err
    for key in ("fd", "kd", "eval_loss", "eval_loss_q3"):
        ours, theirs = evaluations(finished, key), evaluations(tmp_path, key)
        assert ours.keys() == theirs.keys()
        for step in ours:  # the weights of two processes differ in the last digits
            assert theirs[step][key] == pytest.approx(ours[step][key], rel=2e-3), (step, key)
    records = [json.loads((folder / "best" / "best.json").read_text())["step"] for folder in (finished, tmp_path)]
    assert records[0] == records[1]


@pytest.mark.slow
def test_sigterm_to_one_of_two_processes_ends_both_in_the_middle_of_an_evaluation(tmp_path):
    """A million images would take hours; the run ends seconds after the signal, and saves."""
    with start(tmp_path, "--eval_num_images", "1000000") as launched:
        log = tmp_path / "metrics.jsonl"
        deadline = time.monotonic() + 240
        while not (log.exists() and '"step": 2' in log.read_text()):  # the evaluation comes next
            assert time.monotonic() < deadline and launched.poll() is None, "the evaluation never began"
            time.sleep(0.2)
        time.sleep(2)
        children = Path(f"/proc/{launched.pid}/task/{launched.pid}/children").read_text().split()
        began = time.monotonic()
        os.kill(int(children[0]), signal.SIGTERM)
        out, err = launched.communicate(timeout=120)
    assert launched.returncode == 0 and time.monotonic() - began < 60, out + err
    assert "stopped by a signal at step 2 of 6" in out
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-00000002"]
    assert not evaluations(tmp_path, "fd")
