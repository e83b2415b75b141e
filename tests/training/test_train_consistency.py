"""train_consistency.py end to end on the CPU: every objective, exact resume, starts from denoisers,
the stock pipeline.
"""

import json
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline
from safetensors.torch import load_file
from torch import nn

from hf_diffusion import ConsistencyPipeline
from hf_diffusion.config.command_line import parse_config
from hf_diffusion.data.loading import load_data
from hf_diffusion.hub.loading import load_pipeline
from hf_diffusion.losses.consistency_objective import PUBLISHED
from hf_diffusion.sampling.drawing import draw
from hf_diffusion.training import train_consistency, train_ddpm, train_edm, train_flow
from tests.training.interruptions import stop_after
from tests.training.test_points import DDPM, QUICK, curve_shares, mode_shares, samples_of, trained


RECIPES = Path(train_consistency.__file__).parent / "recipes"
POINTS = """
    --dataset_name eight_gaussians --class_conditional --max_train_samples 500 --model_channels 8 --train_batch_size 16
    --logging_steps 2 --sample_steps none --num_sample_images 8 --checkpointing_steps 3 --ema_max_decay 0.9
    --learning_rate 0.01 --max_train_steps 7 --dropout 0.1
""".split()
IMAGES = """
    --dataset_name digits --max_train_samples 64 --model_channels 8 --channel_mult 1,2 --num_res_blocks 1
    --patch_size 2
    --norm_num_groups 4 --num_head_channels 8 --train_batch_size 8 --logging_steps 2 --sample_steps none
    --num_sample_images 10 --max_train_steps 2
""".split()


def run(folder: Path, *flags: str) -> Path:
    return trained(train_consistency, folder, *flags)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory) -> Path:
    """A DDPM of points."""
    return trained(train_ddpm, tmp_path_factory.mktemp("ddpm"), *POINTS, "--ddpm_num_inference_steps", "2")


# Of the two that are slow the state is part of the others'.
SLOW = {"improved": [pytest.mark.slow], "tuning": [pytest.mark.slow]}


@pytest.mark.parametrize("objective", [pytest.param(name, marks=SLOW.get(name, [])) for name in PUBLISHED])
def test_a_run_that_was_interrupted_goes_on_bit_for_bit(objective, denoiser, tmp_path, monkeypatch):
    flags = [*POINTS, "--objective", objective, "--eval_split", "test[:50]", "--eval_steps", "3"]
    flags += [] if objective in ("training", "improved") else ["--init_from", str(denoiser)]
    flags += ["--teacher_guidance_scale", "1.5"] if objective == "distillation" else []
    whole = run(tmp_path / "whole", *flags)
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        run(tmp_path / "cut", *flags)
    assert not (tmp_path / "cut" / "model_index.json").exists()
    cut = run(tmp_path / "cut", *flags, "--resume_from_checkpoint", "latest")
    ours, expected = weights(cut), weights(whole)
    assert ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in expected)
    # the curriculum of the held-out loss goes on, too
    held_out = [[r["eval_loss"] for r in metrics(folder) if "eval_loss" in r] for folder in (cut, whole)]
    assert held_out[0] == held_out[1] and len(held_out[0]) == 3
    log = [r for r in metrics(whole) if "loss" in r]
    assert all(("stage" in r) == (objective == "tuning") and ("scales" in r) == (objective != "tuning") for r in log)


def test_what_a_denoiser_is_tuned_into_knows_its_process_and_draws_points_by_class(denoiser, tmp_path):
    folder = run(tmp_path / "tuned", *POINTS, "--objective", "tuning", "--init_from", str(denoiser))
    pipe, start = load_pipeline(folder), load_pipeline(denoiser)
    config = pipe.scheduler.config
    assert isinstance(pipe, ConsistencyPipeline) and config.prediction_type == "v_prediction"
    assert config.sigma_data == 1 and config.sigma_max == 80 and not config.clip_denoised
    alpha_bar = start.scheduler.alphas_cumprod.double()
    levels = torch.tensor(config.trained_sigmas, dtype=torch.float64)
    torch.testing.assert_close(levels, (1 / alpha_bar - 1).sqrt(), rtol=1e-6, atol=0)
    # not moved far in seven steps: the denoiser's x_0, which the scheduler finds again
    pipe.unet.load_state_dict(start.unet.state_dict())
    x_0, t, labels = torch.randn(5, 2), torch.tensor([400] * 5), torch.tensor([0, 1, 2, 3, 4])
    x_t = start.scheduler.add_noise(x_0, torch.randn(5, 2), t)
    with torch.no_grad():
        expected = start.scheduler.predict_x_0(start.unet(x_t, t, labels).sample, t, x_t, clip=False)
        sigma = levels[t]
        x = x_t / alpha_bar[t].sqrt()[:, None].float()
        found = pipe.scheduler.denoise(pipe.unet, x, sigma, 0.0, class_labels=labels)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    points = draw(pipe, [1, 2, 3], [0, 3, 3], num_inference_steps=2, guidance_scale=1.5)
    assert points.shape == (3, 2)
    card = (folder / "README.md").read_text()
    assert "Consistency Models Made Easy" in card and "consistency model" in card and "north-east" in card
    again = run(tmp_path / "further", *POINTS, "--objective", "distillation", "--init_from", str(folder))
    assert load_pipeline(again).scheduler.config.trained_sigmas == config.trained_sigmas


@pytest.mark.parametrize(
    "script, flags, kind",
    [
        (train_edm, [], "preconditioned"),
        (train_flow, [], "flow_velocity"),
        (train_flow, ["--prediction_type", "sample"], "flow_sample"),
    ],
)
def test_networks_of_other_families_denoise_as_they_did(script, flags, kind, tmp_path):
    """The x_0 that each family's own pipeline would find, by its own formulas."""
    start = load_pipeline(trained(script, tmp_path / "start", *POINTS, *flags, "--max_train_steps", "1"))
    nn.init.normal_(start.unet.linear_out.weight)
    start.save_pretrained(tmp_path / "start")
    config = parse_config(
        train_consistency.ConsistencyConfig,
        [*POINTS, "--objective", "tuning", "--init_from", str(tmp_path / "start")],
    )
    data = load_data(**config.data_arguments())
    network, process = train_consistency.build_network(config, data)
    scheduler = train_consistency.build_scheduler(config, data, process)
    assert scheduler.config.prediction_type == kind
    x_0, z, sigma = torch.randn(4, 2), torch.randn(4, 2), torch.tensor([0.05, 0.5, 3.0, 40.0]).double()
    x, labels = scheduler.add_noise(x_0, z, sigma), torch.tensor([0, 1, 2, 3])
    with torch.no_grad():
        found = scheduler.denoise(network, x, sigma, 0.0, class_labels=labels)
        if script is train_edm:
            inputs, c_noise = start.scheduler.preconditioning.inputs(x, sigma)
            output = start.unet(inputs, c_noise, labels).sample
            expected = start.scheduler.preconditioning.denoised(output, x, sigma)
        else:
            s = (sigma / (1 + sigma)).float()
            on_path = (1 - s[:, None]) * x
            output = start.unet(on_path, 1000 * s, labels).sample
            expected = on_path - s[:, None] * output if kind == "flow_velocity" else output
    torch.testing.assert_close(found, expected.float(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "script, flags",
    [
        (train_ddpm, ["--beta_schedule", "linear", "--beta_end", "0.03", "--prediction_type", "epsilon"]),
        (train_ddpm, ["--ddpm_num_steps", "100", "--rescale_betas_zero_snr"]),
        (train_edm, ["--sigma_data", "0.7"]),
        (train_flow, ["--num_train_timesteps", "100", "--prediction_type", "sample"]),
    ],
)
def test_a_checkpoint_is_tuned_as_the_pipeline_that_its_run_has_saved(script, flags, tmp_path):
    folder = trained(script, tmp_path / "start", *POINTS, *flags, "--max_train_steps", "2")
    found = []
    for source in (folder, max(folder.glob("checkpoint-*"))):
        config = parse_config(
            train_consistency.ConsistencyConfig,
            [*POINTS, "--objective", "tuning", "--init_from", str(source)],
        )
        found.append(train_consistency.build_network(config, load_data(**config.data_arguments())))
    (network, process), (of_checkpoint, its_process) = found
    assert process == its_process
    for name, value in network.state_dict().items():
        assert torch.equal(value, of_checkpoint.state_dict()[name]), name


def test_the_stock_pipeline_draws_the_same_from_a_model_trained_from_scratch(tmp_path):
    folder = run(
        tmp_path / "scratch", *IMAGES, "--class_conditional", "--label_dropout", "0", "--sampling_sigma_min", "none"
    )
    ours = ConsistencyPipeline.from_pretrained(folder)
    with torch.no_grad():
        ours.unet.conv_out.weight.normal_()
    stock = ConsistencyModelPipeline(ours.unet, CMStochasticIterativeScheduler.from_config(ours.scheduler.config))
    stock.set_progress_bar_config(disable=True)
    # the stock pipeline knows squares by one number only
    ours.unet.register_to_config(sample_size=8)
    for steps in (1, 3):
        labels, seeds = [3, 7], [torch.Generator().manual_seed(i) for i in (0, 1)]
        expected = stock(2, labels, steps, generator=seeds, output_type="np").images
        seeds = [torch.Generator().manual_seed(i) for i in (0, 1)]
        found = ours(labels, num_inference_steps=steps, generator=seeds, output_type="np").images
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--objective", "tuning"], "name it by --init_from"),
        (["--teacher_guidance_scale", "2"], "needs a teacher of classes"),
        (["--objective", "training", "--start_scales", "200"], "is more than end_scales 150"),
        (["--init_from", "DENOISER", "--dataset_name", "digits"], "makes samples of shape"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(flags, message, denoiser, tmp_path, capsys):
    flags = [str(denoiser) if flag == "DENOISER" else flag for flag in flags]
    with pytest.raises(SystemExit) as refused:
        run(tmp_path, *POINTS, *flags)
    assert message in (str(refused.value) + capsys.readouterr().err)


def test_the_recipe_starts_from_the_model_of_the_recipe_of_digits():
    recipe, start = (
        yaml.safe_load((RECIPES / name).read_text()) for name in ("digits_consistency.yaml", "digits.yaml")
    )
    assert recipe["init_from"] == start["output_dir"] and recipe["class_conditional"] == start["class_conditional"]


# --- quality -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, shares, flags, steps, least",
    [
        # The DDPM itself has 0.65 of its samples near a mode in 50 steps and 0.01 in two.
        ("eight_gaussians", mode_shares, ["--max_train_steps", "1000", "--tuning_stages", "4"], 1, (0.45, 0.03)),
        # 0.52 of them near the roll in 50 steps, 0.15 in two.
        ("swiss_roll", curve_shares, ["--max_train_steps", "600", "--tuning_stages", "1"], 2, (0.45, 0.01)),
    ],
)
def test_one_step_finds_the_modes_and_two_the_roll(tmp_path, name, shares, flags, steps, least):
    start = trained(train_ddpm, tmp_path / "ddpm", *DDPM, "--dataset_name", name)
    flags = [*QUICK, "--objective", "tuning", *flags, "--learning_rate", "0.001", "--dataset_name", name]
    flags += ["--tuning_q", "256"] if name == "swiss_roll" else []
    folder = run(tmp_path / "tuned", *flags, "--init_from", str(start))
    found = shares(samples_of(folder, num_inference_steps=steps))
    assert found.sum() > least[0] and found.min() > least[1], found
