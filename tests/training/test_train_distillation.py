"""train_distillation.py end to end on the CPU: resume, the cache, what is saved, quality."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from hf_diffusion import ConsistencyPipeline, cli
from hf_diffusion.config.command_line import parse_config
from hf_diffusion.evaluation.protocol import sampling_protocol
from hf_diffusion.hub.loading import load_pipeline
from hf_diffusion.loop import trajectories
from hf_diffusion.sampling.drawing import draw
from hf_diffusion.training import train_ddpm, train_distillation, train_edm, train_flow
from tests.launching import ENVIRONMENT, launcher, run_claims
from tests.training.interruptions import stop_after
from tests.training.test_points import DDPM, QUICK, mode_shares, samples_of, trained
from tests.training.test_train_dmd import IMAGES, POINTS, REPO, SMALL, UNET, metrics, weights


DISTILLED = [*POINTS, "--trajectories", "40", "--teacher_steps", "4", "--teacher_guidance_scale", "1.5"]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory) -> Path:
    """A cache of the module's own."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DIFFUSION_CACHE", str(folder))
        yield folder


def run(folder: Path, *flags: str) -> Path:
    return trained(train_distillation, folder, *flags)


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory) -> Path:
    """A DDPM of points."""
    flags = [*POINTS, *SMALL, "--ddpm_num_inference_steps", "2"]
    return trained(train_ddpm, tmp_path_factory.mktemp("ddpm"), *flags)


@pytest.fixture(scope="module")
def finished(denoiser, tmp_path_factory) -> Path:
    """An uninterrupted run of two calls, guided."""
    flags = [*DISTILLED, "--init_from", str(denoiser), "--eval_split", "test[:50]", "--eval_steps", "3"]
    return run(tmp_path_factory.mktemp("distilled") / "whole", *flags)


def test_a_run_that_was_interrupted_goes_on_bit_for_bit_by_kept_trajectories(
    denoiser, finished, cache, tmp_path, monkeypatch
):
    assert len(list((cache / "trajectories").glob("*.safetensors"))) == 1
    monkeypatch.setattr(trajectories, "draw", lambda *_: pytest.fail("they are kept"))
    flags = [*DISTILLED, "--init_from", str(denoiser)]
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        run(tmp_path, *flags)
    assert not (tmp_path / "model_index.json").exists()
    ours, expected = weights(run(tmp_path, *flags, "--resume_from_checkpoint", "latest")), weights(finished)
    assert ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in expected)


def test_a_dry_run_tells_the_time_of_the_trajectories_and_keeps_none(denoiser, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_DIFFUSION_CACHE", str(tmp_path / "cache"))
    drawn, whole = [], trajectories.draw
    monkeypatch.setattr(trajectories, "draw", lambda *args: drawn.append(args[3].trajectories) or whole(*args))
    flags = [*DISTILLED, "--trajectories", "300", "--init_from", str(denoiser), "--output_dir", str(tmp_path / "run")]
    assert train_distillation.main([*flags, "--dry_run"]) == 0
    assert drawn == [trajectories.PART] and not list((tmp_path / "cache").rglob("*.safetensors"))
    assert "for the teacher's 300 trajectories, which are drawn first" in capsys.readouterr().out


def test_a_checkpoint_belongs_to_its_teacher(denoiser, finished, tmp_path):
    other = load_pipeline(denoiser)
    nn.init.normal_(other.unet.linear_out.weight)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(SystemExit, match="teacher was"):
        run(tmp_path / "run", *DISTILLED, "--init_from", str(tmp_path / "other"),
            "--resume_from_checkpoint", str(finished / "checkpoint-00000006"))  # fmt: skip


def test_kept_trajectories_begin_with_noise_and_have_the_classes_in_turn(finished, cache):
    kept = load_file(next((cache / "trajectories").glob("*.safetensors")))
    assert kept["states"].shape == (3, 40, 2) and kept["states"].dtype == torch.float16
    assert 60 < float(kept["states"][0].float().std()) < 100
    named = kept["labels"] < 8
    assert torch.equal(kept["labels"][named], (torch.arange(40) % 8)[named]) and 0 < int((~named).sum()) < 12


def test_what_is_saved_draws_in_the_calls_that_it_was_trained_for_and_in_no_others(finished, tmp_path, capsys):
    pipe = load_pipeline(finished)
    config = pipe.scheduler.config
    assert isinstance(pipe, ConsistencyPipeline) and config.sampling_sigmas == pytest.approx([80, 1])
    assert not config.renoise and not config.clip_denoised
    words = ["sample", str(finished), "--num_images", "8", "--npz", str(tmp_path / "points.npz")]
    assert cli.main(words) == 0
    points = np.load(tmp_path / "points.npz")["samples"]
    again = draw(pipe, range(8), [i % 8 for i in range(8)], num_inference_steps=2)
    assert points.shape == (8, 2)
    np.testing.assert_allclose(points, again, rtol=1e-5, atol=1e-5)
    # a figure that leaves the steps to the model tells them
    assert sampling_protocol(pipe, 8, {})["options"]["num_inference_steps"] == 2
    with pytest.raises(ValueError, match="must be 2: this model was trained for so many"):
        pipe(batch_size=1, num_inference_steps=4, output_type="np")
    card = (finished / "README.md").read_text()
    assert "| trajectories seen | 112 |" in card and "images seen" not in card
    assert "Progressive Distillation" in card and "few-step model distilled from trajectories" in card
    log, held_out = ([r for r in metrics(finished) if name in r] for name in ("loss", "eval_loss"))
    assert len(log) == 4 and len(held_out) == 3 and (finished / "loss_curve.png").is_file()


def test_a_student_of_ends_draws_in_one_call_and_in_two_and_takes_the_trajectories_that_are_there(
    denoiser, finished, cache, tmp_path, monkeypatch
):
    monkeypatch.setattr(trajectories, "draw", lambda *_: pytest.fail("they are kept"))
    flags = [*DISTILLED, "--init_from", str(denoiser), "--student_targets", "end"]
    pipe = load_pipeline(run(tmp_path, *flags))
    assert "`num_inference_steps` may be 1 to 2: every call" in (tmp_path / "README.md").read_text()
    assert pipe.scheduler.config.predicts_end and pipe.default_options() == {"num_inference_steps": 2}
    one, two = (draw(pipe, range(8), [0] * 8, num_inference_steps=calls) for calls in (1, 2))
    assert one.shape == two.shape == (8, 2) and not np.allclose(one, two)
    with pytest.raises(ValueError, match="must be at most 2: this model was trained for so many"):
        pipe(batch_size=1, num_inference_steps=3, output_type="np")


def test_images_are_drawn_by_stock_diffusers_in_a_new_process(tmp_path):
    start = trained(train_ddpm, tmp_path / "ddpm", *IMAGES, *UNET, "--ddpm_num_inference_steps", "2")
    few = ["--trajectories", "8", "--teacher_steps", "3", "--distill_steps", "3"]
    folder = run(tmp_path / "distilled", *IMAGES, "--init_from", str(start), *few)
    seen = run_claims(
        f"""
        import torch
        from diffusers import DiffusionPipeline
        pipe = DiffusionPipeline.from_pretrained({str(folder)!r}, trust_remote_code=True)
        seeds = [torch.Generator().manual_seed(i) for i in range(2)]
        claims["images"] = pipe([3, 7], generator=seeds, output_type="np").images.tolist()
        claims["class"] = type(pipe).__module__
        """,
        tmp_path,
        with_package=False,
    )
    assert seen["class"].startswith("diffusers_modules.local.")
    pipe, seeds = load_pipeline(folder), [torch.Generator().manual_seed(i) for i in range(2)]
    found = pipe([3, 7], generator=seeds, output_type="np").images
    assert found.std() > 0
    np.testing.assert_array_equal(found, np.array(seen["images"], np.float32))


@pytest.mark.parametrize("script", [train_edm, pytest.param(train_flow, marks=pytest.mark.slow)], ids=["edm", "flow"])
def test_a_student_that_takes_the_teachers_own_steps_begins_without_an_error(script, tmp_path):
    start = trained(script, tmp_path / "start", *POINTS, *SMALL[:2])
    flags = [*POINTS, "--init_from", str(start / "checkpoint-00000007"), "--max_train_steps", "1"]
    flags += ["--trajectories", "40", "--logging_steps", "1", "--distill_steps", "2"]
    as_many = metrics(run(tmp_path / "same", *flags, "--teacher_steps", "2"))[0]["loss"]
    more = metrics(run(tmp_path / "more", *flags, "--teacher_steps", "40"))[0]["loss"]
    # half precision, and the level at which consistency models are the identity
    assert as_many < 0.01 and more > 2 * as_many


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "name it by --init_from"),
        (["--init_from", "X", "--teacher_guidance_scale", "2", "--no-class_conditional"], "guides the teacher"),
        (["--init_from", "X", "--student_sigmas", "80,0.8,0.1"], "must be 2 of them, falling"),
        (["--init_from", "X", "--distill_steps", "13"], "teacher_steps 12 must be at least distill_steps, 13"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as refused:
        run(tmp_path, *POINTS, *flags)
    assert message in (str(refused.value) + capsys.readouterr().err)


def test_the_recipe_names_a_model_that_is_there():
    recipe = REPO / "training" / "recipes" / "fashion_mnist_distillation_cpu.yaml"
    config = parse_config(train_distillation.DistillationConfig, ["--config", str(recipe)])
    start = REPO / config.init_from
    assert json.loads((start / "unet" / "config.json").read_text())["num_class_embeds"] == 10
    assert config.class_conditional and "fashion_mnist" in yaml.safe_load(recipe.read_text())["dataset_name"]


# --- slow ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_follow_the_run_of_one_with_the_same_global_batch(tmp_path):
    # without dropout, which is a process's own
    start = trained(train_ddpm, tmp_path / "ddpm", *POINTS, *SMALL[:2], "--ddpm_num_inference_steps", "2")
    flags = [*DISTILLED, "--init_from", str(start), "--max_train_steps", "4"]
    one = weights(run(tmp_path / "one", *flags))
    words = [*launcher(2), "training/train_distillation.py", *flags, "--train_batch_size", "8"]
    words += ["--output_dir", str(tmp_path / "two")]
    environment = ENVIRONMENT | {"HF_DIFFUSION_CACHE": str(tmp_path / "other")}
    result = subprocess.run(words, cwd=REPO, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    two = weights(tmp_path / "two")
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_two_calls_find_all_modes_where_the_teacher_needs_many(tmp_path):
    start = trained(train_ddpm, tmp_path / "ddpm", *DDPM, "--dataset_name", "eight_gaussians")
    flags = [*QUICK[:-2], "--max_train_steps", "600", "--learning_rate", "0.001", "--ema_max_decay", "0.99"]
    flags += ["--dataset_name", "eight_gaussians", "--teacher_steps", "40", "--trajectories", "4000"]
    folder = run(tmp_path / "distilled", *flags, "--init_from", str(start))
    assert mode_shares(samples_of(start, num_inference_steps=2)).sum() < 0.3
    found = mode_shares(samples_of(folder))
    assert found.sum() > 0.5 and found.min() > 0.03, found
