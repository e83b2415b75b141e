"""--vae in the training scripts: models of latents that draw images, resumed bit for bit."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_diffusion.data import latents
from hf_diffusion.hub.loading import load_pipeline
from hf_diffusion.training import train_ddpm, train_edm, train_flow
from tests.data.autoencoders import make_autoencoder
from tests.training.interruptions import stop_after


SCRIPTS = {"ddpm": train_ddpm, "flow": train_flow, "edm": train_edm}
TINY = """
    --dataset_name digits --split train[:96] --class_conditional --random_flip --model_channels 8 --channel_mult 1,2
    --num_res_blocks 1 --norm_num_groups 4 --num_head_channels 8 --train_batch_size 8 --logging_steps 2
    --sample_steps none --num_sample_images 10 --max_train_steps 5 --checkpointing_steps 3
    --eval_metrics fd --eval_num_images 66 --eval_split train[96:120]
""".split()


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("vae")
    make_autoencoder(latents_mean=[0.1, -0.2], latents_std=[0.5, 0.7], scaling_factor=1.0).save_pretrained(folder)
    return ["--vae", str(folder)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def cache(folder, monkeypatch):
    monkeypatch.setenv("HF_DIFFUSION_CACHE", folder)


def run(script: str, output_dir, *flags: str) -> Path:
    steps = "--ddpm_num_inference_steps" if script == "ddpm" else "--num_inference_steps"
    assert SCRIPTS[script].main([*flags, steps, "3", "--output_dir", str(output_dir)]) == 0
    return Path(output_dir)


@pytest.fixture(scope="module")
def finished(vae, folder, tmp_path_factory) -> dict[str, Path]:
    """One uninterrupted run of each script."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DIFFUSION_CACHE", folder)
        return {name: run(name, tmp_path_factory.mktemp("run") / name, *TINY, *vae) for name in SCRIPTS}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_leaves_a_pipeline_of_latents_that_draws_images(finished, script):
    pipe = load_pipeline(finished[script])
    pipe.set_progress_bar_config(disable=True)
    assert pipe.noise_shape == (2, 4, 4) and pipe.sample_shape == (1, 8, 8)
    assert pipe(["3", "7"], num_inference_steps=2, output_type="np").images.shape == (2, 8, 8, 1)
    assert not pipe.scheduler.config.get("clip_sample")
    if script == "edm":
        assert pipe.scheduler.config.sigma_data == 1.0
    card = (finished[script] / "README.md").read_text()
    assert "| latents | 2x4x4, sampled, of AutoencoderKL |" in card and "High-Resolution Image Synthesis" in card
    assert (finished[script] / "samples" / "nearest.png").is_file()


@pytest.mark.parametrize("script", SCRIPTS)
def test_images_are_measured_and_the_held_out_loss_is_of_latents(finished, script):
    log = [json.loads(line) for line in (finished[script] / "metrics.jsonl").read_text().splitlines()]
    measured = {name: record for record in log for name in record}
    assert measured["fd"]["fd"] > 0 and measured["eval_loss"]["eval_loss"] > 0
    protocol = measured["fd"]["protocol"]
    assert protocol["reference"]["images"] == 96 and protocol["features"]["dimension"] == 64


def test_an_interrupted_run_goes_on_bit_for_bit_and_encodes_nothing_again(finished, vae, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(latents, "encode", lambda *_: pytest.fail("encoded again"))
        with monkeypatch.context() as stopping:
            stop_after(stopping, 2)
            run("ddpm", tmp_path, *TINY, *vae)
        run("ddpm", tmp_path, *TINY, *vae, "--resume_from_checkpoint", "latest")
    file = Path("unet") / "diffusion_pytorch_model.safetensors"
    ours, whole = load_file(tmp_path / file), load_file(finished["ddpm"] / file)
    assert all(torch.equal(ours[name], whole[name]) for name in whole)


def test_a_checkpoint_is_tied_to_the_autoencoder_by_its_weights_not_its_place(finished, vae, tmp_path, monkeypatch):
    other = tmp_path / "other"
    make_autoencoder(seed=1, scaling_factor=1.0).save_pretrained(other)
    with pytest.raises(SystemExit, match="belongs to another run: data was"):
        run("ddpm", finished["ddpm"], *TINY, "--vae", str(other), "--resume_from_checkpoint", "latest")
    moved = tmp_path / "moved"
    Path(vae[1]).rename(moved)
    try:
        run("ddpm", finished["ddpm"], *TINY, "--vae", str(moved), "--resume_from_checkpoint", "latest")
    finally:
        moved.rename(vae[1])


def test_a_dry_run_shows_decoded_latents(vae, tmp_path, capsys):
    run("flow", tmp_path, *TINY, *vae, "--dry_run")
    said = capsys.readouterr().out
    assert "96 latents, 2 x 4 x 4, 10 classes" in said and (tmp_path / "data_preview.png").is_file()
