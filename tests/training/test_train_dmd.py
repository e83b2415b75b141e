"""train_dmd.py end to end on the CPU: resume, what is saved, teachers of every kind, quality."""

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
from hf_diffusion.hub.loading import load_pipeline
from hf_diffusion.sampling.drawing import draw
from hf_diffusion.training import train_consistency, train_ddpm, train_dmd, train_edm, train_flow
from tests.launching import ENVIRONMENT, launcher, run_claims
from tests.training.interruptions import stop_after
from tests.training.test_points import DDPM, QUICK, mode_shares, samples_of, trained


REPO = Path(__file__).resolve().parents[2]
RUN = """
    --train_batch_size 16 --logging_steps 2 --sample_steps none --num_sample_images 8 --checkpointing_steps 3
    --ema_max_decay 0.9 --learning_rate 0.01 --max_train_steps 7
""".split()
POINTS = [*RUN, *"--dataset_name eight_gaussians --class_conditional --max_train_samples 500".split()]
SMALL = ["--model_channels", "8", "--dropout", "0.1"]
IMAGES = [*RUN, *"--dataset_name digits --max_train_samples 64 --class_conditional --max_train_steps 2".split()]
UNET = """
    --model_channels 8 --channel_mult 1,2 --num_res_blocks 1 --patch_size 2 --norm_num_groups 4 --num_head_channels 8
""".split()
DMD_POINTS = [*POINTS, "--dmd_steps", "2", "--adversarial_weight", "0.1", "--teacher_guidance_scale", "1.5"]


def run(folder: Path, *flags: str) -> Path:
    return trained(train_dmd, folder, *flags)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory) -> Path:
    """A DDPM of points."""
    flags = [*POINTS, *SMALL, "--ddpm_num_inference_steps", "2"]
    return trained(train_ddpm, tmp_path_factory.mktemp("ddpm"), *flags)


@pytest.fixture(scope="module")
def finished(denoiser, tmp_path_factory) -> Path:
    """An uninterrupted run of two calls, guided, with the adversary."""
    flags = [*DMD_POINTS, "--init_from", str(denoiser), "--eval_split", "test[:50]", "--eval_steps", "3"]
    return run(tmp_path_factory.mktemp("dmd") / "whole", *flags)


def test_a_run_that_was_interrupted_goes_on_bit_for_bit(denoiser, finished, tmp_path, monkeypatch):
    flags = [*DMD_POINTS, "--init_from", str(denoiser)]
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        run(tmp_path, *flags)
    assert not (tmp_path / "model_index.json").exists()
    ours, expected = weights(run(tmp_path, *flags, "--resume_from_checkpoint", "latest")), weights(finished)
    assert ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in expected)
    # both networks go on, and both moved
    last = [load_file(folder / "checkpoint-00000007" / "model_1.safetensors") for folder in (tmp_path, finished)]
    assert all(torch.equal(last[0][name], last[1][name]) for name in last[1])
    start = load_pipeline(denoiser).unet.state_dict()
    assert any(not torch.equal(last[0][f"denoiser.{name}"], weight) for name, weight in start.items())


def test_a_checkpoint_belongs_to_its_teacher(denoiser, finished, tmp_path):
    other = load_pipeline(denoiser)
    nn.init.normal_(other.unet.linear_out.weight)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(SystemExit, match="teacher was"):
        run(tmp_path / "run", *DMD_POINTS, "--init_from", str(tmp_path / "other"),
            "--resume_from_checkpoint", str(finished / "checkpoint-00000006"))  # fmt: skip


def test_the_log_tells_of_both_players_and_the_held_out_loss_is_that_of_the_student(finished):
    log, held_out = ([r for r in metrics(finished) if name in r] for name in ("loss", "eval_loss"))
    names = {"matching", "fooling", "denoising", "telling", "right", "loss_f", "grad_norm", "grad_norm_f", "lr_f"}
    assert names <= log[0].keys() and len(log) == 4
    assert len(held_out) == 3 and {"eval_matching", "eval_fooling_q3"} <= held_out[0].keys()
    assert (finished / "loss_curve.png").is_file()


@pytest.mark.parametrize(
    "flags, there, absent",
    [
        (
            ["--distribution_matching_weight", "0", "--gradient_accumulation_steps", "2"],
            {"fooling", "right"},
            {"matching", "denoising"},
        ),
        pytest.param(
            ["--adversarial_weight", "0"],
            {"matching", "denoising"},
            {"fooling", "right", "telling"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_either_half_of_the_loss_trains_alone(flags, there, absent, denoiser, tmp_path):
    folder = run(tmp_path, *POINTS, "--init_from", str(denoiser), *flags, "--fake_warmup_steps", "1")
    last = metrics(folder)[-1]
    assert there <= last.keys() and not absent & last.keys()
    start = load_pipeline(denoiser).unet.state_dict()
    assert all(value.isfinite().all() for value in weights(folder).values())
    assert any(not torch.equal(value, start[name]) for name, value in weights(folder).items())


def test_what_is_saved_knows_its_levels_and_the_command_line_draws_from_it(finished, tmp_path):
    pipe = load_pipeline(finished)
    config = pipe.scheduler.config
    assert isinstance(pipe, ConsistencyPipeline) and config.prediction_type == "v_prediction"
    assert config.sampling_sigmas == pytest.approx([80, 1]) and not config.clip_denoised
    for steps, levels in ((1, [80]), (2, [80, 1])):
        pipe.scheduler.set_timesteps(steps)
        assert pipe.scheduler.sigmas[:-1].tolist() == pytest.approx(levels)
    words = ["--num_images", "8", "--npz", str(tmp_path / "points.npz"), "--num_inference_steps", "2"]
    assert cli.main(["sample", str(finished), *words]) == 0
    points = np.load(tmp_path / "points.npz")["samples"]
    assert points.shape == (8, 2) and np.isfinite(points).all()
    card = (finished / "README.md").read_text()
    assert "Improved Distribution Matching Distillation" in card and "few-step model by distribution matching" in card
    assert "num_inference_steps=2" in card and "Classifier-Free" in card


def test_images_are_drawn_by_stock_diffusers_in_a_new_process(tmp_path):
    start = trained(train_ddpm, tmp_path / "ddpm", *IMAGES, *UNET, "--ddpm_num_inference_steps", "2")
    folder = run(tmp_path / "dmd", *IMAGES, "--init_from", str(start), "--dmd_steps", "4")
    seen = run_claims(
        f"""
        from diffusers import DiffusionPipeline
        pipe = DiffusionPipeline.from_pretrained({str(folder)!r}, trust_remote_code=True)
        seeds = [torch.Generator().manual_seed(i) for i in range(2)]
        claims["images"] = pipe([3, 7], num_inference_steps=4, generator=seeds, output_type="np").images.tolist()
        claims["levels"] = pipe.scheduler.sigmas.tolist()
        claims["class"] = type(pipe).__module__
        """.replace("from diffusers", "import torch\n        from diffusers"),
        tmp_path,
        with_package=False,
    )
    assert seen["class"].startswith("diffusers_modules.local.")
    assert seen["levels"] == pytest.approx([80, 2.4142, 1, 0.4142, 0.002], rel=1e-3)
    ours = draw(load_pipeline(folder), range(2), [3, 7], num_inference_steps=4)
    assert ours.std() > 0
    pipe, seeds = load_pipeline(folder), [torch.Generator().manual_seed(i) for i in range(2)]
    found = pipe([3, 7], num_inference_steps=4, generator=seeds, output_type="np").images
    np.testing.assert_array_equal(found, np.array(seen["images"], np.float32))


@pytest.mark.parametrize(
    "script, kind",
    [(train_edm, "preconditioned"), pytest.param(train_flow, "flow_velocity", marks=pytest.mark.slow)],
    ids=["edm", "flow"],
)
def test_teachers_of_other_families_are_matched_from_their_checkpoints(script, kind, tmp_path):
    start = trained(script, tmp_path / "start", *POINTS, *SMALL, "--max_train_steps", "1")
    source = start / "checkpoint-00000001"
    folder = run(
        tmp_path / "dmd", *POINTS, "--init_from", str(source), "--max_train_steps", "1", "--fake_updates", "1"
    )
    assert load_pipeline(folder).scheduler.config.prediction_type == kind
    # at first student, teacher and fake denoiser are one network, and agree at every level
    first = metrics(folder)[0]
    assert np.isfinite(first["denoising"]) and first["matching"] < 1e-8


def test_a_consistency_model_may_be_the_start_where_its_own_teacher_is_named(denoiser, tmp_path, capsys):
    flags = [*POINTS, "--max_train_steps", "1"]
    tuned = trained(
        train_consistency, tmp_path / "tuned", *flags, *SMALL, "--objective", "tuning", "--init_from", str(denoiser)
    )
    start = load_pipeline(tuned)
    nn.init.normal_(start.unet.linear_out.weight)
    start.save_pretrained(tuned)
    folder = run(tmp_path / "dmd", *flags, "--init_from", str(tuned), "--teacher", str(denoiser))
    # the student has begun as the consistency model, and the fake denoiser as the teacher
    moved = weights(folder)["linear_out.weight"] - start.unet.linear_out.weight
    assert 0 < float(moved.detach().abs().max()) < 0.02
    assert metrics(folder)[0]["matching"] < 1e-8
    other = trained(train_edm, tmp_path / "edm", *flags, *SMALL)
    with pytest.raises(SystemExit) as refused:
        run(tmp_path / "wrong", *flags, "--init_from", str(tuned), "--teacher", str(other))
    assert "has another prediction_type than init_from" in str(refused.value)


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "name it by --init_from"),
        (["--init_from", "X", "--distribution_matching_weight", "0", "--adversarial_weight", "0"], "are both 0"),
        (["--init_from", "X", "--teacher_guidance_scale", "2", "--no-class_conditional"], "guides the teacher"),
        (["--init_from", "X", "--student_sigmas", "80,0.8"], "must be 1 of them, falling"),
        (["--init_from", "X", "--dmd_steps", "2", "--student_sigmas", "1,80"], "must be 2 of them, falling"),
        (["--init_from", "X", "--matching_sigma_min", "40"], "must be below matching_sigma_max 30"),
        (["--init_from", "DENOISER", "--student_sigmas", "1e9"], "the highest level of init_from"),
        (["--init_from", "DENOISER", "--dataset_name", "digits"], "makes samples of shape"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(flags, message, denoiser, tmp_path, capsys):
    flags = [str(denoiser) if flag == "DENOISER" else flag for flag in flags]
    with pytest.raises(SystemExit) as refused:
        run(tmp_path, *POINTS, *flags)
    assert message in (str(refused.value) + capsys.readouterr().err)


def test_the_recipe_names_a_model_that_is_there():
    recipe = REPO / "training" / "recipes" / "fashion_mnist_dmd_cpu.yaml"
    config = parse_config(train_dmd.DMDConfig, ["--config", str(recipe)])
    start = REPO / config.init_from
    assert json.loads((start / "unet" / "config.json").read_text())["num_class_embeds"] == 10
    assert config.class_conditional and "fashion_mnist" in yaml.safe_load(recipe.read_text())["dataset_name"]


# --- slow ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("weight", ["1", "0"])
def test_two_processes_follow_the_run_of_one_with_the_same_global_batch(weight, tmp_path):
    # without dropout, which is a process's own
    start = trained(train_ddpm, tmp_path / "ddpm", *POINTS, *SMALL[:2], "--ddpm_num_inference_steps", "2")
    flags = [*DMD_POINTS[:-2], "--init_from", str(start), "--distribution_matching_weight", weight]
    flags += ["--max_train_steps", "3"]
    one = weights(run(tmp_path / "one", *flags))
    words = [*launcher(2), "training/train_dmd.py", *flags, "--train_batch_size", "8"]
    words += ["--output_dir", str(tmp_path / "two")]
    result = subprocess.run(words, cwd=REPO, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    two = weights(tmp_path / "two")
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_one_call_finds_all_modes_as_well_as_fifty_of_the_teacher(tmp_path):
    """In one call the teacher has none of its samples near a mode, in fifty 0.65."""
    start = trained(train_ddpm, tmp_path / "ddpm", *DDPM, "--dataset_name", "eight_gaussians")
    flags = [*QUICK[:-2], "--max_train_steps", "450", "--learning_rate", "0.001", "--lr_scheduler", "constant"]
    flags += ["--adversarial_weight", "0", "--ema_max_decay", "0.99", "--dataset_name", "eight_gaussians"]
    folder = run(tmp_path / "dmd", *flags, "--init_from", str(start))
    assert mode_shares(samples_of(start, num_inference_steps=1)).sum() < 0.05
    found = mode_shares(samples_of(folder))
    assert found.sum() > 0.5 and found.min() > 0.03, found
