"""train_ddpm.py end to end on the CPU: what a run leaves, exact resume, divided work, errors."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from hf_diffusion import ClassifierFreeGuidancePipeline
from hf_diffusion.config.command_line import parse_config
from hf_diffusion.loop import reporting, trainer
from hf_diffusion.training import train_classifier, train_ddpm, train_flow
from tests.launching import run_claims
from tests.training.interruptions import poison, stop_after


REPO = Path(__file__).resolve().parents[2]
TINY = [
    *("--dataset_name", "digits", "--class_conditional", "--max_train_samples", "64"),
    *(
        "--model_channels",
        "8",
        "--norm_num_groups",
        "4",
        "--num_head_channels",
        "8",
        "--channel_mult",
        "1,2",
        "--num_res_blocks",
        "1",
    ),
    *("--train_batch_size", "8", "--logging_steps", "2", "--sample_steps", "none", "--num_sample_images", "10"),
    *(
        "--ddpm_num_inference_steps",
        "2",
        "--checkpointing_steps",
        "3",
        "--learning_rate",
        "0.01",
        "--ema_max_decay",
        "0.9",
    ),
]


def run(output_dir, *flags: str) -> Path:
    assert train_ddpm.main([*TINY, "--output_dir", str(output_dir), *flags]) == 0
    return Path(output_dir)


def weights(folder: Path, averaged: bool = True) -> dict[str, torch.Tensor]:
    if averaged:
        return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    return load_file(sorted(folder.glob("checkpoint-*"))[-1] / "model.safetensors")


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_weights(a: dict, b: dict, **tolerance) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], msg=lambda m, name=name: f"{name}: {m}", **(tolerance or {"rtol": 0, "atol": 0})
        )


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """One uninterrupted run of seven steps with two micro-batches each."""
    return run(
        tmp_path_factory.mktemp("run") / "whole", "--max_train_steps", "7", "--gradient_accumulation_steps", "2"
    )


def test_the_loss_and_a_picture_are_there_long_before_the_first_report(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trainer, "FIRST_PREVIEW", 3)
    told = []
    monkeypatch.setattr(reporting.Progress, "show", lambda self, figures: told.append(figures))
    flags = ["--max_train_steps", "5", "--logging_steps", "50", "--sample_steps", "1000"]
    folder = run(tmp_path / "run", *flags)
    assert (folder / "samples" / "ema-00000003.png").is_file()
    # steps 1, 2, 3 and 5, and the report at the end, whose mean the glances leave alone
    assert [set(figures) for figures in told[:4]] == [{"loss"}] * 4 and "img_s" in told[4] and len(told) == 5
    assert len(metrics(folder)) == 1


def test_a_run_leaves_pipeline_config_metrics_curve_samples_and_card(finished):
    for name in (
        "model_index.json",
        "config.yaml",
        "metrics.jsonl",
        "loss_curve.png",
        "README.md",
        "unet/unet_adm.py",
    ):
        assert (finished / name).is_file(), name
    pictures = sorted(path.name for path in (finished / "samples").iterdir())
    assert pictures == ["ema-00000007.png", "guidance.png", "nearest.png", "raw-00000007.png"]
    assert min(Image.open(finished / "samples" / "ema-00000007.png").size) > 50
    card = (finished / "README.md").read_text()
    assert "samples/ema-00000007.png" in card and "112" in card  # 7 steps of 16 images
    assert not list(finished.glob(".*partial*"))


def test_the_exported_pipeline_samples_by_class_name(finished):
    pipe = ClassifierFreeGuidancePipeline.from_pretrained(finished)
    images = pipe(["3", "7"], num_inference_steps=2, guidance_scale=2.0, output_type="np").images
    assert images.shape == (2, 8, 8, 1) and pipe.id2label[9] == "9"


def test_metrics_hold_loss_quartiles_speed_and_learning_rate(finished):
    records = metrics(finished)
    assert [r["step"] for r in records] == [2, 4, 6, 7]
    for record in records:
        assert {"loss", "lr", "grad_norm", "images_per_second", "data_wait", "skipped"} <= set(record)
    assert all(any(f"loss_q{q}" in r for r in records) for q in range(4))
    assert records[-1]["lr"] == pytest.approx(0.01 / 2)  # the last of the two decay steps (30 % of seven)


def test_averaged_and_raw_weights_are_both_kept_and_differ(finished):
    averaged, raw = weights(finished), weights(finished, averaged=False)
    assert averaged.keys() == raw.keys()
    assert sum(not torch.equal(averaged[name], raw[name]) for name in raw) == len(raw)


def test_a_run_that_is_interrupted_three_times_ends_with_the_very_weights_of_an_uninterrupted_one(finished, tmp_path):
    """64 images at 16 a step: an epoch is four steps, so 2, 3 and 5 lie inside epochs.

    The signal comes during the step; a checkpoint is due at 3 and at 6.
    """
    flags = ["--max_train_steps", "7", "--gradient_accumulation_steps", "2"]
    for step in (2, 3, 5):
        with pytest.MonkeyPatch.context() as patch:
            stop_after(patch, step)
            run(tmp_path, *flags, "--resume_from_checkpoint", "latest")
        assert not (tmp_path / "model_index.json").exists()
        assert sorted(tmp_path.glob("checkpoint-*"))[-1].name == f"checkpoint-{step:08d}"
    run(tmp_path, *flags, "--resume_from_checkpoint", "latest")
    assert_same_weights(weights(tmp_path), weights(finished))
    assert_same_weights(weights(tmp_path, averaged=False), weights(finished, averaged=False))
    assert metrics(tmp_path)[-1]["loss"] == metrics(finished)[-1]["loss"]


def test_the_history_of_importance_sampling_survives_an_interruption(tmp_path):
    """Ten losses for each of two timesteps warm the sampler up: three steps of eight images."""
    flags = ["--max_train_steps", "8", "--ddpm_num_steps", "2", "--timestep_sampling", "loss_second_moment"]
    whole = run(tmp_path / "whole", *flags, "--checkpoints_total_limit", "9")
    parted = run(tmp_path / "parted", *flags, "--checkpoints_total_limit", "9")
    run(tmp_path / "parted", *flags, "--resume_from_checkpoint", "checkpoint-00000006")
    assert_same_weights(weights(parted), weights(whole))


def test_metrics_after_the_checkpoint_are_done_again_not_doubled(finished, tmp_path):
    folder = run(
        tmp_path, "--max_train_steps", "7", "--gradient_accumulation_steps", "2", "--checkpoints_total_limit", "9"
    )
    run(
        tmp_path,
        "--max_train_steps",
        "7",
        "--gradient_accumulation_steps",
        "2",
        "--resume_from_checkpoint",
        "checkpoint-00000003",
    )
    assert [r["step"] for r in metrics(folder)] == [2, 4, 6, 7]
    assert_same_weights(weights(folder), weights(finished))


def test_accumulation_gives_the_loss_curve_of_the_whole_batch(finished, tmp_path):
    whole = run(tmp_path, "--max_train_steps", "7", "--train_batch_size", "16")
    for a, b in zip(metrics(whole), metrics(finished)):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_the_saved_config_repeats_the_run(finished, tmp_path):
    again = train_ddpm.main(["--config", str(finished / "config.yaml"), "--output_dir", str(tmp_path)])
    assert again == 0
    assert_same_weights(weights(tmp_path), weights(finished))


def test_a_stream_trains_and_goes_on_where_it_was(tmp_path):
    flags = ["--max_train_steps", "6", "--streaming", "--num_sample_images", "10"]
    whole = run(tmp_path / "whole", *flags, "--checkpoints_total_limit", "9")
    parted = run(tmp_path / "parted", *flags, "--checkpoints_total_limit", "9")
    run(tmp_path / "parted", *flags, "--resume_from_checkpoint", "checkpoint-00000003")
    assert_same_weights(weights(parted), weights(whole))


def test_old_checkpoints_are_dropped_beyond_the_limit(finished):
    assert [f.name for f in sorted(finished.glob("checkpoint-*"))] == ["checkpoint-00000006", "checkpoint-00000007"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--prediction_type", "epsilon", "--loss_weighting", "min_snr", "--timestep_sampling", "uniform"],
        ["--prediction_type", "sample", "--loss_weighting", "p2", "--timestep_sampling", "antithetic"],
        ["--prediction_type", "v_prediction", "--loss_weighting", "min_snr", "--rescale_betas_zero_snr"],
        ["--beta_schedule", "linear", "--lr_scheduler", "cosine", "--no-class_conditional", "--no-use_ema"],
        ["--objective", "hybrid", "--variance_type", "learned_range", "--timestep_sampling", "loss_second_moment"],
        [
            "--objective",
            "vlb",
            "--variance_type",
            "learned_range",
            "--prediction_type",
            "epsilon",
            "--sampler",
            "ddpm",
        ],
        ["--mixed_precision", "bf16", "--gradient_checkpointing", "--label_dropout", "0", "--sampler", "ddpm"],
        ["--patch_size", "2", "--dropout", "0.1", "--random_flip", "--report_to", "tensorboard", "--channels_last"],
    ],
)
def test_every_objective_and_precision_trains_two_steps_and_exports(tmp_path, flags):
    folder = run(tmp_path, "--max_train_steps", "2", *flags)
    assert math.isfinite(metrics(folder)[-1]["loss"])
    pipe = ClassifierFreeGuidancePipeline.from_pretrained(folder)
    labels = {"class_labels": [1, 2]} if pipe.num_classes else {"batch_size": 2}
    assert pipe(**labels, num_inference_steps=2, output_type="np").images.shape == (2, 8, 8, 1)
    if "--report_to" in flags:
        assert list((folder / "logs").rglob("events*"))


def test_training_stops_when_no_step_is_finite_any_more(tmp_path, monkeypatch):
    poison(monkeypatch, range(9))
    with pytest.raises(SystemExit, match="3 steps in a row, the last of them step 2"):
        run(tmp_path, "--max_train_steps", "9", "--max_nonfinite_steps", "3")


def test_dry_run_shows_settings_sizes_and_the_data_without_training(tmp_path, capsys):
    run(tmp_path, "--max_train_steps", "1000", "--dry_run")
    shown = capsys.readouterr().out
    for words in (
        "train_batch_size: 8",
        "parameters",
        "memory a process",
        "s a step",
        "data_preview.png",
        "64 images, 1 x 8 x 8, 10 classes",
    ):
        assert words in shown
    assert Image.open(tmp_path / "data_preview.png").size[0] > 100
    assert not (tmp_path / "metrics.jsonl").exists() and not list(tmp_path.glob("checkpoint-*"))


def test_recipes_are_complete_configurations():
    recipes = sorted((REPO / "training" / "recipes").glob("*.yaml"))
    assert recipes
    for recipe in recipes:
        assert isinstance(yaml.safe_load(recipe.read_text()), dict), recipe


def test_recipes_of_a_gpu_are_settings_of_their_scripts_and_compile_where_they_store_channels_last():
    configs = {
        "fashion_mnist_gpu": train_ddpm.DDPMConfig,
        "fashion_mnist_ddpm_gpu": train_ddpm.DDPMConfig,
        "fashion_mnist_classifier_gpu": train_classifier.ClassifierConfig,
        "cifar10_gpu": train_flow.FlowConfig,
    }
    for name, config_class in configs.items():
        config = parse_config(config_class, ["--config", f"{name}.yaml"])
        config.settle((1, 28, 28))
        assert config.torch_compile and config.channels_last and config.mixed_precision == "bf16", name
    minutes = [parse_config(configs[name], ["--config", f"{name}.yaml"]).max_train_minutes
               for name in ("fashion_mnist_gpu", "cifar10_gpu")]  # fmt: skip
    assert minutes == [10, 25]


# --- errors: one sentence, status 1 for what the world does not offer, 2 for wrong usage ---


def test_the_script_ends_in_one_sentence_and_a_status(tmp_path):
    child = f"""
        import runpy
        sys.argv = ["training/train_ddpm.py", "--train_data_dir", "/nowhere/at/all", "--max_train_steps", "2"]
        sys.argv += ["--output_dir", {str(tmp_path)!r}]
        try:
            runpy.run_path("training/train_ddpm.py", run_name="__main__")
        except SystemExit as stopped:
            claims["sentence"] = stopped.code
    """
    # Python prints a text, and makes it status 1.
    sentence = run_claims(child, REPO)["sentence"]
    assert sentence.startswith("train_ddpm.py: ") and "/nowhere/at/all" in sentence and "\n" not in sentence


@pytest.mark.parametrize(
    "flags, status, message",
    [
        (["--laerning_rate", "1"], 2, "did you mean --learning_rate?"),
        (["--prediction_type", "noise"], 2, "prediction_type"),
        (["--max_train_steps", "0"], 2, "at least 1"),
        (["--dataset_name", "none"], 2, "give the data to train on: --data with a folder"),
        (["--rescale_betas_zero_snr", "--prediction_type", "epsilon"], 2, "needs prediction_type v_prediction"),
        (["--ddpm_num_steps", "5", "--ddpm_num_inference_steps", "50"], 2, "50 is more than ddpm_num_steps 5"),
        (["--variance_type", "learned_range"], 2, "trained by the variational bound only"),
        (["--objective", "hybrid"], 2, "hybrid trains a learned variance"),
        (["--channel_mult", "1,1,1,1,1,1"], 1, "sample_size"),
        (["--norm_num_groups", "3"], 1, "groups"),
        (["--label_column", "none"], 1, "class_conditional is set, but digits has no labels"),
        (["--resume_from_checkpoint", "/nowhere"], 1, "there is no checkpoint '/nowhere'"),
    ],
)
def test_wrong_settings_end_in_one_sentence(tmp_path, capsys, flags, status, message):
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path / "out", "--max_train_steps", "2", *flags)
    code = stopped.value.code
    assert (code if isinstance(code, int) else 1) == status
    assert message in (capsys.readouterr().err if isinstance(code, int) else code)


def test_a_folder_with_another_run_is_refused_until_one_says_what_to_do(finished, capsys):
    with pytest.raises(SystemExit, match="is not empty; go on with its run by --resume_from_checkpoint latest"):
        run(finished, "--max_train_steps", "7")


def test_a_checkpoint_of_another_run_is_refused_with_the_settings_that_differ(finished):
    with pytest.raises(SystemExit, match=re.compile("seed was 0 and is 1; global_batch was 16 and is 8")):
        run(finished, "--max_train_steps", "7", "--seed", "1", "--resume_from_checkpoint", "latest")
