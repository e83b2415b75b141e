"""train_edm.py end to end, on images and points: what a run leaves, resume, what it learns."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from hf_diffusion import EDMPipeline
from hf_diffusion.sampling.drawing import draw
from hf_diffusion.training import train_edm
from tests.training.interruptions import stop_after


REPO = Path(__file__).resolve().parents[2]
TINY = """
    --dataset_name digits --max_train_samples 64 --class_conditional --model_channels 8 --channel_mult 1,2
    --num_res_blocks 1 --norm_num_groups 4 --num_head_channels 8 --train_batch_size 8 --logging_steps 2
    --sample_steps none --num_sample_images 10 --num_inference_steps 3 --checkpointing_steps 3 --learning_rate 0.005
    --ema_max_decay 0.9
""".split()
LEARNED = ["--max_train_steps", "7", "--gradient_accumulation_steps", "2", "--learned_weighting", "--dropout", "0.1"]
POINTS = """
    --dataset_name swiss_roll --train_batch_size 256 --lr_warmup_steps 0 --ema_max_decay 0.995 --logging_steps 500
    --sample_steps none --num_sample_images 200 --model_channels 128 --max_train_steps 1000 --learning_rate 0.002
""".split()


def run(output_dir, *flags: str) -> Path:
    assert train_edm.main([*flags, "--output_dir", str(output_dir)]) == 0
    return Path(output_dir)


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """One uninterrupted run of seven steps with two micro-batches each, and learned weights."""
    flags = ["--eval_split", "train[-20:]", "--eval_steps", "7"]
    return run(tmp_path_factory.mktemp("run") / "whole", *TINY, *LEARNED, *flags)


def test_a_run_leaves_a_pipeline_that_draws_classes_and_a_card_of_its_own_papers(finished):
    pipe = EDMPipeline.from_pretrained(finished)
    images = pipe(["3", "7"], num_inference_steps=2, guidance_scale=2.0, output_type="np").images
    assert images.shape == (2, 8, 8, 1)
    for name in ("pipeline_edm.py", "scheduler/scheduling_edm.py", "unet/unet_adm.py", "loss_curve.png"):
        assert (finished / name).is_file(), name
    card = (finished / "README.md").read_text()
    assert "Elucidating the Design Space" in card and "Training Dynamics" in card and "- edm" in card
    assert "EDMPipeline" in card and "Denoising Diffusion Probabilistic" not in card and "Improved" not in card


def test_the_log_has_the_loss_by_level_the_plain_error_and_the_second_players_loss(finished):
    log = metrics(finished)
    last = next(record for record in reversed(log) if "loss" in record)
    assert {"loss", "error", "loss_u", "grad_norm", "grad_norm_u", "lr", "skipped"} <= set(last)
    assert last["loss"] == pytest.approx(last["loss_u"], abs=0.2) and last["skipped"] == 0
    held = next(record for record in log if "eval_loss" in record)
    assert np.isfinite(held["eval_loss"]) and held["eval_error"] > 0


def test_an_interrupted_run_goes_on_bit_for_bit(finished, tmp_path, monkeypatch):
    flags = [*TINY, *LEARNED, "--eval_split", "train[-20:]", "--eval_steps", "7"]
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        run(tmp_path, *flags)
    assert not (tmp_path / "model_index.json").exists()
    run(tmp_path, *flags, "--resume_from_checkpoint", "latest")
    place = Path("unet") / "diffusion_pytorch_model.safetensors"
    checkpoint = "checkpoint-00000007"
    for file in (place, Path(checkpoint) / "model.safetensors", Path(checkpoint) / "model_1.safetensors"):
        ours, whole = load_file(tmp_path / file), load_file(finished / file)
        assert ours.keys() == whole.keys() and all(torch.equal(ours[name], whole[name]) for name in whole), file


def test_settings_of_the_method_are_tied_to_the_checkpoint(finished):
    for flag, value in (("sigma_std", "1.0"), ("sigma_data", "0.6"), ("preconditioning", "ve")):
        with pytest.raises(SystemExit, match=f"belongs to another run: .*{flag} was"):
            run(finished, *TINY, *LEARNED, "--resume_from_checkpoint", "latest", f"--{flag}", value)


@pytest.mark.parametrize("preconditioning", ["vp", "ve", "iddpm"])
def test_every_preconditioning_trains_on_points_and_is_saved_with_the_sampler_that_knows_it(tmp_path, preconditioning):
    flags = ["--max_train_steps", "2", "--model_channels", "8", "--num_inference_steps", "3"]
    folder = run(tmp_path, *POINTS, *flags, "--preconditioning", preconditioning)
    pipe = EDMPipeline.from_pretrained(folder)
    assert pipe.scheduler.config.preconditioning == preconditioning
    low, high = pipe.scheduler.preconditioning.sampling_range
    assert (pipe.scheduler.config.sigma_min, pipe.scheduler.config.sigma_max) == (low, high)
    assert pipe(batch_size=3, output_type="np").images.shape == (3, 2)


@pytest.mark.slow
def test_the_recipe_learns_digits_that_a_classifier_reads_as_asked(tmp_path):
    recipe = ["--config", str(REPO / "training" / "recipes" / "digits_edm.yaml"), "--sample_steps", "none"]
    # of its 400 steps
    folder = run(tmp_path, *recipe, "--max_train_steps", "250")
    labels = [i % 10 for i in range(500)]
    images = draw(EDMPipeline.from_pretrained(folder), range(500), labels, guidance_scale=1.5)
    real = load_digits()
    judge = SVC().fit(real.data, real.target)
    read = judge.predict(images.reshape(500, 64) / 255 * 16)
    assert float((read == labels).mean()) >= 0.95, float((read == labels).mean())


@pytest.mark.slow
def test_it_finds_the_whole_swiss_roll(tmp_path):
    points = torch.from_numpy(draw(EDMPipeline.from_pretrained(run(tmp_path, *POINTS)), range(4000), None))
    angle = 1.5 * torch.pi * (1 + 2 * torch.linspace(0, 1, 400))
    curve = torch.stack([angle.cos(), angle.sin()], dim=1) * (0.9 * angle / (4.5 * torch.pi))[:, None]
    distance, place = torch.cdist(points, curve).min(dim=1)
    shares = torch.bincount(place[distance < 0.06] * 8 // 400, minlength=8) / len(points)
    assert shares.min() > 0.07 and shares.sum() > 0.8, shares
