"""train_score.py: every process on images and points, resumed bit for bit, and what is learned."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hf_diffusion.config.command_line import parse_config
from hf_diffusion.data.loading import load_data
from hf_diffusion.data.points import load_points
from hf_diffusion.hub.loading import load_pipeline
from hf_diffusion.sampling.drawing import draw
from hf_diffusion.training import train_score
from tests.training.interruptions import stop_after


RECIPES = Path(train_score.__file__).parent / "recipes"
SHORT = """
    --train_batch_size 8 --model_channels 8 --norm_num_groups 4 --num_head_channels 4 --num_res_blocks 1
    --sample_steps none --num_sample_images 2 --logging_steps 1 --max_train_steps 2 --learning_rate 0.01
    --sampler ode --score_num_inference_steps 2
""".split()
IMAGES = ["--dataset_name", "digits", "--max_train_samples", "40"]
# Settings of the schedulers that say what was trained.
PROCESS = {"num_train_timesteps", "sigma_min", "sigma_max", "beta_min", "beta_max", "num_levels", "sigma_begin",
           "sigma_end", "step_lr", "n_steps_each"}  # fmt: skip
POINTS = ["--dataset_name", "eight_gaussians", "--max_train_samples", "200"]


def trained(folder: Path, *flags: str) -> Path:
    assert train_score.main([*SHORT, *flags, "--output_dir", str(folder)]) == 0
    return folder


def script_settings(flags: list[str]) -> train_score.ScoreConfig:
    return parse_config(train_score.ScoreConfig, [*SHORT, *flags])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize(
    "flags, scheduler",
    [
        ([*IMAGES, "--process", "vp", "--class_conditional", "--beta_max", "15"], "ScoreSdeVPScheduler"),
        ([*IMAGES, "--process", "ve", "--network", "ncsnpp", "--model_channels", "32"], "ScoreSdeVEScheduler"),
        (
            [*POINTS, "--process", "subvp", "--class_conditional", "--likelihood_weighting", "--beta_min", "0.2"],
            "ScoreSdeSubVPScheduler",
        ),
        ([*POINTS, "--process", "ncsn", "--matching", "sliced"], "AnnealedLangevinScheduler"),
    ],
    ids=["vp", "ve-ncsnpp", "subvp-points", "ncsn-points"],
)
def test_every_process_trains_and_its_pipeline_draws(tmp_path, flags, scheduler):
    folder = trained(tmp_path / "run", *flags)
    pipe = load_pipeline(folder)
    assert type(pipe.scheduler).__name__ == scheduler
    # what it was trained on is what it samples
    config = script_settings(flags)
    process = train_score.build_scheduler(config, load_data(**config.data_arguments())).config
    for name in PROCESS & set(process):
        assert pipe.scheduler.config[name] == pytest.approx(process[name]), name
    labels = [0, 1, 2] if pipe.num_classes else None
    samples = draw(pipe, [0, 1, 2], labels, sampler="ode", num_inference_steps=2)
    assert samples.shape == ((3, 8, 8, 1) if "digits" in flags else (3, 2))
    card = (folder / "README.md").read_text()
    assert "Score-Based Generative Modeling" in card if scheduler != "AnnealedLangevinScheduler" else "Sliced" in card
    assert "Denoising Diffusion Probabilistic" not in card


def test_the_levels_of_ncsn_follow_from_the_data():
    config = train_score.ScoreConfig(process="ncsn", dataset_name="digits")
    data = load_data("digits")
    scheduler = train_score.build_scheduler(config, data)
    images = data.fetch(range(len(data)), 0)["x_0"].flatten(1)
    assert scheduler.config.sigma_begin == pytest.approx(float(torch.cdist(images, images).max()), rel=0.02)
    ratios = scheduler.sigmas[:-1] / scheduler.sigmas[1:]
    assert 1.3 < float(ratios[0]) < 1.4 and scheduler.config.num_levels == len(scheduler.sigmas)


def test_a_run_goes_on_bit_for_bit_where_it_was_interrupted(tmp_path, monkeypatch):
    flags = [*POINTS, "--class_conditional", "--max_train_steps", "6", "--checkpointing_steps", "100"]
    whole = weights(trained(tmp_path / "whole", *flags))
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        trained(tmp_path / "parts", *flags)
    parts = weights(trained(tmp_path / "parts", *flags, "--resume_from_checkpoint", "latest"))
    assert whole.keys() == parts.keys() and all(torch.equal(parts[name], whole[name]) for name in whole)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--process", "subvp", "--discrete"], "the sub-VP equation has no discrete models"),
        (["--discrete", "--likelihood_weighting"], "likelihood_weighting is of continuous time"),
        (
            ["--network", "ncsnpp", "--class_conditional", "--guidance_scale", "2"],
            "network ncsnpp has no null class to guide away from",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(tmp_path, capsys, flags, words):
    with pytest.raises(SystemExit):
        trained(tmp_path, *IMAGES, *flags)
    assert words in capsys.readouterr().err


def sliced_wasserstein(x: torch.Tensor, y: torch.Tensor) -> float:
    """The mean distance of sorted projections on 64 directions of the half circle."""
    angles = torch.arange(64) * torch.pi / 64
    directions = torch.stack([angles.cos(), angles.sin()])
    return float(((x @ directions).sort(0).values - (y @ directions).sort(0).values).abs().mean())


@pytest.mark.slow
@pytest.mark.parametrize("process", ["vp", "subvp", "ve", "ncsn"])
def test_every_process_finds_the_swiss_roll(tmp_path, process):
    flags = f"""--process {process} --dataset_name swiss_roll --train_batch_size 256 --model_channels 128
        --num_res_blocks 2 --max_train_steps 4000 --learning_rate 0.002 --ema_max_decay 0.995
        --logging_steps 500""".split()
    pipe = load_pipeline(trained(tmp_path, *flags))
    samples = torch.from_numpy(draw(pipe, range(2000), None, **({} if process == "ncsn" else {"sampler": "ode"})))
    real, other = (load_points("swiss_roll", split=split).fetch(range(2000), 0)["x_0"] for split in ("test", "train"))
    # two draws of the data are 0.01 apart, the data and noise of their deviation 0.1
    assert sliced_wasserstein(real, other) < 0.02 < 0.08 < sliced_wasserstein(real, 0.45 * torch.randn(2000, 2))
    # 0.028 of vp, 0.021 of subvp, 0.029 of ve, 0.032 of ncsn
    assert sliced_wasserstein(samples, real) < 0.04, sliced_wasserstein(samples, real)


@pytest.mark.slow
def test_the_recipe_learns_digits(tmp_path):
    recipe = [
        "--config",
        str(RECIPES / "digits_score_vp.yaml"),
        "--output_dir",
        str(tmp_path),
        "--sample_steps",
        "none",
    ]
    assert train_score.main(recipe) == 0
    linear = pytest.importorskip("sklearn.linear_model")
    real = load_data("digits").fetch(range(1797), 0)
    judge = linear.LogisticRegression(max_iter=500).fit(real["x_0"].flatten(1).numpy(), real["labels"].numpy())
    labels = [i % 10 for i in range(500)]
    samples = draw(load_pipeline(tmp_path), range(500), labels, sampler="ode", guidance_scale=1.5).astype(np.float32)
    assert judge.score((samples / 127.5 - 1).reshape(500, -1), labels) > 0.95
