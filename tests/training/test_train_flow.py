"""train_flow.py end to end on the CPU: points and images, resume, the command line, quality."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hf_diffusion import FlowMatchingPipeline, cli
from hf_diffusion.cards.papers import bibtex
from hf_diffusion.data.points import load_points
from hf_diffusion.sampling.drawing import draw
from hf_diffusion.training import train_flow
from hf_diffusion.training.train_flow import FlowConfig
from tests.training.interruptions import stop_after
from tests.training.test_points import curve_shares


REPO = Path(__file__).resolve().parents[2]
RUN = "--train_batch_size 32 --logging_steps 2 --sample_steps none --checkpointing_steps 3 --learning_rate 0.01"
SMALL = f"{RUN} --max_train_steps 5 --model_channels 8 --num_res_blocks 1 --num_inference_steps 2".split()
POINTS = [*SMALL, "--dataset_name", "eight_gaussians", "--class_conditional", "--num_sample_images", "16"]
# Everything that an option brings.
ALL = """
    --prediction_type sample --level_distribution logit_normal --logit_mean 0.8 --logit_std 0.8 --time_shift 1.5
    --pairing assignment --contrastive_weight 0.05 --loss_weighting cosmap --level_spread antithetic --noise_scale 1.5
    --num_train_timesteps 500
""".split()


def run(folder: Path, *flags: str) -> Path:
    assert train_flow.main([*flags, "--output_dir", str(folder)]) == 0
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def assert_same(ours: dict, whole: dict) -> None:
    assert ours.keys() == whole.keys() and all(torch.equal(ours[name], whole[name]) for name in whole)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return run(tmp_path_factory.mktemp("flow") / "whole", *POINTS, *ALL, "--eval_split", "test[:64]")


def test_an_interrupted_run_ends_with_the_very_weights_of_an_uninterrupted_one(finished, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        run(tmp_path, *POINTS, *ALL)
    assert not (tmp_path / "model_index.json").exists()
    run(tmp_path, *POINTS, *ALL, "--resume_from_checkpoint", "latest")
    assert_same(weights(tmp_path), weights(finished))


def test_accumulation_leaves_pairs_and_levels_as_they_are(finished, tmp_path):
    flags = [*POINTS, *ALL, "--train_batch_size", "16", "--gradient_accumulation_steps", "2"]
    halves = weights(run(tmp_path, *flags))
    for name, value in weights(finished).items():
        torch.testing.assert_close(halves[name], value, rtol=1e-3, atol=1e-4)


def test_what_is_exported_says_how_it_was_trained(finished):
    pipe = FlowMatchingPipeline.from_pretrained(finished)
    assert pipe.config.prediction_type == "sample" and pipe.config.noise_scale == 1.5
    assert pipe.scheduler.config.shift == 1.5 and pipe.scheduler.config.solver == "heun"
    assert pipe.scheduler.config.num_train_timesteps == 500
    assert pipe.id2label[1] == "north-east" and pipe.sample_shape == (2,)
    log = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert any("eval_loss_q3" in record for record in log)


def test_the_card_has_the_papers_of_what_was_used(finished):
    card = (finished / "README.md").read_text()
    for title in (
        "Flow Matching for Generative",
        "Back to Basics",
        "Minibatch Optimal",
        "Contrastive Flow",
        "Rectified",
    ):
        assert title in card
    assert "class-conditional flow matching model" in card and "Dhariwal" not in card
    plain = FlowConfig(dataset_name="digits", max_train_steps=1).papers()
    assert plain == ("lipman2023flow", "liu2023flow", "dhariwal2021diffusion") and len(bibtex(plain)) == 3
    knn = FlowConfig(dataset_name="swiss_roll", max_train_steps=1, pairing="knn").papers()
    assert knn == ("lipman2023flow", "liu2023flow", "li2025improved")


def test_the_command_line_samples_it_with_either_solver(finished, tmp_path, capsys):
    def samples(*words: str) -> np.ndarray:
        npz = tmp_path / "points.npz"
        assert cli.main(["sample", str(finished), "--num_images", "8", "--npz", str(npz), *words]) == 0
        archive = np.load(npz)
        return archive[archive.files[0]]

    euler, heun = (samples("--num_inference_steps", "4", "--set", f"solver={name}") for name in ("euler", "heun"))
    assert euler.shape == (8, 2) and not np.allclose(euler, heun)
    guided = samples("--num_inference_steps", "4", "--set", "guidance_interval=0.2,0.8", "--guidance_scale", "3")
    assert np.isfinite(guided).all() and not np.allclose(guided, heun)
    words = ["sample", str(finished), "--num_images", "1", "--npz", str(tmp_path / "one.npz"), "--scheduler", "ddim"]
    assert cli.main(words) == 2 and "FlowMatchingScheduler" in capsys.readouterr().err


def test_its_own_measures_are_found_by_the_command_line(finished, tmp_path):
    words = ["evaluate", str(finished), "--output_dir", str(tmp_path), "--model_images", "8"]
    words += ["--dataset_name", "eight_gaussians", "--split", "test", "--metrics", "bpd_ode"]
    assert cli.main(words) == 0
    (model,) = json.loads((tmp_path / "metrics.json").read_text())["model"]
    # of the density, so that it may be of either sign
    assert np.isfinite(model["measures"]["bpd_ode"]["value"])


def test_images_go_the_same_way_with_the_shift_of_their_size(tmp_path):
    flags = "--channel_mult 1,2 --norm_num_groups 4 --num_head_channels 8 --dataset_name digits --max_train_samples 64"
    flags += " --class_conditional --num_sample_images 10 --pairing knn --time_shift none --patch_size 2"
    folder = run(tmp_path, *SMALL, *flags.split())
    pipe = FlowMatchingPipeline.from_pretrained(folder)
    # 4 x 4 positions
    assert pipe.scheduler.config.shift == pytest.approx(np.exp(0.5 - 0.65 * 240 / 3840))
    assert draw(pipe, [0, 1], [3, 4], num_inference_steps=2).shape == (2, 8, 8, 1)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--pairing", "assignment", "--train_batch_size", "24"], "group_size 16 does not divide train_batch_size 24"),
        (["--contrastive_weight", "0.1", "--loss_space", "epsilon"], "compares velocities, got loss_space epsilon"),
        (["--pairing", "knn"], "pairing knn leans the noise towards the data"),
        (["--mode_scale", "2"], "mode_scale"),
        (["--sigma_floor", "0"], "sigma_floor"),
    ],
)
def test_wrong_settings_end_in_one_sentence(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as ended:
        train_flow.main([*POINTS, *flags, "--output_dir", str(tmp_path / "run")])
    assert message in f"{ended.value} {capsys.readouterr().err}"


@pytest.mark.parametrize(
    "recipe", sorted((REPO / "training" / "recipes").glob("*[!n]_flow*.yaml")), ids=lambda p: p.stem
)
def test_a_recipe_sets_what_the_script_knows(recipe, tmp_path, capsys):
    words = ["--config", str(recipe), "--dataset_name", "digits", "--output_dir", str(tmp_path), "--dry_run"]
    assert train_flow.main(words) == 0
    assert "parameters" in capsys.readouterr().out


def sliced_wasserstein(one: torch.Tensor, other: torch.Tensor) -> float:
    """The 1-Wasserstein distance of equally many points (N, 2), a mean over 64 directions."""
    angle = torch.arange(64) * torch.pi / 64
    directions = torch.stack([angle.cos(), angle.sin()])
    return float(((one @ directions).sort(0).values - (other @ directions).sort(0).values).abs().mean())


# The windings of the roll are 0.4 apart, so that little noise hides which one a point is on. Near
# the roll lie 0.58 of the samples with uniform levels, and 0.8 with these, after as many steps.
LITTLE_NOISE = ["--level_distribution", "logit_normal", "--logit_mean", "-1"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, flags", [("swiss_roll", []), ("checkerboard", []), ("swiss_roll", ["--prediction_type", "sample"])]
)
def test_points_are_learned_within_a_sliced_wasserstein_bound(tmp_path, name, flags):
    """Two draws of the data are 0.010 to 0.016 apart, a Gaussian of deviation 0.5 is 0.11 away."""
    quick = "--train_batch_size 256 --max_train_steps 1000 --learning_rate 0.002 --lr_warmup_steps 0"
    quick += " --ema_max_decay 0.995 --logging_steps 500 --sample_steps none --num_sample_images 200"
    flags = [*quick.split(), *LITTLE_NOISE, "--sigma_floor", "0.01", *flags]
    folder = run(tmp_path, *flags, "--model_channels", "128", "--dataset_name", name)
    samples = torch.from_numpy(draw(FlowMatchingPipeline.from_pretrained(folder), range(4000), None))
    distance = sliced_wasserstein(samples, load_points(name, split="test").fetch(range(4000), 0)["x_0"])
    assert distance < 0.03, distance
    if name == "swiss_roll":
        assert curve_shares(samples).sum() > 0.65, curve_shares(samples)
