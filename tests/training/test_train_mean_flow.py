"""train_mean_flow.py end to end on the CPU: points and images, resume, processes, quality."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hf_diffusion import MeanFlowPipeline, cli
from hf_diffusion.training import train_mean_flow
from tests.launching import ENVIRONMENT, launcher
from tests.training.interruptions import stop_after
from tests.training.test_points import QUICK, mode_shares, samples_of, trained


REPO = Path(__file__).resolve().parents[2]
RUN = "--logging_steps 2 --sample_steps none --checkpointing_steps 3 --learning_rate 0.01 --num_sample_images 10"
SMALL = f"{RUN} --train_batch_size 32 --max_train_steps 5 --model_channels 8 --num_res_blocks 1".split()
POINTS = [*SMALL, "--dataset_name", "eight_gaussians", "--class_conditional", "--guidance_kappa", "0.4"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    flags = [*POINTS, "--eval_split", "test[:64]"]
    return trained(train_mean_flow, tmp_path_factory.mktemp("mean_flow") / "whole", *flags)


def test_an_interrupted_run_ends_with_the_very_weights_of_an_uninterrupted_one(finished, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        trained(train_mean_flow, tmp_path, *POINTS)
    assert not (tmp_path / "model_index.json").exists()
    ours = weights(trained(train_mean_flow, tmp_path, *POINTS, "--resume_from_checkpoint", "latest"))
    whole = weights(finished)
    assert ours.keys() == whole.keys() and all(torch.equal(ours[name], whole[name]) for name in whole)


def test_the_command_line_draws_it_in_one_step_or_more_and_its_card_has_its_papers(finished, tmp_path):
    def samples(steps: str) -> np.ndarray:
        words = ["--num_images", "8", "--npz", str(tmp_path / "points.npz"), "--num_inference_steps", steps]
        assert cli.main(["sample", str(finished), *words]) == 0
        return np.load(tmp_path / "points.npz")["samples"]

    one, two = samples("1"), samples("2")
    assert one.shape == two.shape == (8, 2) and np.isfinite(one).all() and not np.allclose(one, two)
    card = (finished / "README.md").read_text()
    assert "Mean Flows for One-step" in card and "class-conditional MeanFlow model" in card and "Dhariwal" not in card


def test_images_go_the_same_way(tmp_path):
    flags = "--channel_mult 1,2 --norm_num_groups 4 --num_head_channels 8 --dataset_name digits --max_train_samples 64"
    folder = trained(train_mean_flow, tmp_path, *SMALL, *flags.split(), "--patch_size", "2")
    pipe = MeanFlowPipeline.from_pretrained(folder)
    # what the network was told in training, it is told in sampling
    assert pipe.scheduler.config.num_train_timesteps == 1 and pipe.sample_shape == (1, 8, 8)
    assert pipe(batch_size=2, output_type="np").images.shape == (2, 8, 8, 1)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--dropout", "0.1"], "would drop different units"),
        (["--label_dropout", "0"], "guidance is to classes"),
        (["--guidance_start", "0.9", "--guidance_end", "0.5"], "guidance_start 0.9 must be below guidance_end 0.5"),
    ],
)
def test_wrong_settings_end_in_one_sentence(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as ended:
        train_mean_flow.main([*POINTS, *flags, "--output_dir", str(tmp_path / "run")])
    assert message in f"{ended.value} {capsys.readouterr().err}"


# --- slow ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_follow_the_run_of_one_with_the_same_global_batch(tmp_path):
    """A derivative that passed the wrapper of the processes would leave gradients unreduced."""
    for processes, batch in ((1, "32"), (2, "16")):
        words = [*launcher(processes), "training/train_mean_flow.py", *POINTS, "--train_batch_size", batch]
        words += ["--output_dir", str(tmp_path / str(processes))]
        result = subprocess.run(words, cwd=REPO, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stdout + result.stderr
    one, two = weights(tmp_path / "1"), weights(tmp_path / "2")
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_one_step_finds_all_modes(tmp_path):
    """0.62 of the samples lie near a mode in one step, 0.64 in two; 0.058 at least."""
    flags = [*QUICK, "--max_train_steps", "1200", "--learning_rate", "0.002", "--dataset_name", "eight_gaussians"]
    folder = trained(train_mean_flow, tmp_path, *flags)
    for steps in (1, 2):
        found = mode_shares(samples_of(folder, num_inference_steps=steps))
        assert found.sum() > 0.5 and found.min() > 0.03, found
