"""train_autoencoder.py end to end: what a run leaves, scaled latents, resume, bad settings."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from PIL import Image
from safetensors.torch import load_file, save_file

from hf_diffusion.config.command_line import parse_config
from hf_diffusion.data.loading import load_data
from hf_diffusion.evaluation.feature_networks import ResNetFeatures
from hf_diffusion.training import train_autoencoder
from tests.launching import ENVIRONMENT, REPO, launcher, run_claims
from tests.training.interruptions import stop_after


TINY = """
    --dataset_name digits --split train[:192] --model_channels 8 --norm_num_groups 4 --num_res_blocks 1
    --latent_channels 2 --critic_channels 8 --train_batch_size 8 --logging_steps 2 --sample_steps none
    --num_sample_images 8 --checkpointing_steps 3 --learning_rate 0.005 --ema_max_decay 0.9 --eval_num_images 96
""".split()
GAME = ["--max_train_steps", "8", "--critic_start", "2", "--critic_head_start", "1", "--learned_logvar"]
MEASURED = ["--eval_metrics", "psnr,rfd", "--eval_split", "train[192:400]", "--eval_steps", "8"]


def run(output_dir, *flags: str) -> Path:
    assert train_autoencoder.main([*flags, "--output_dir", str(output_dir)]) == 0
    return Path(output_dir)


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def perceptual(tmp_path_factory) -> list[str]:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("network") / "net.safetensors"
    save_file(ResNetFeatures(4).state_dict(), path)
    return ["--perceptual", str(path)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, perceptual) -> Path:
    """A run of eight steps without interruption; the critic learns from the third on."""
    folder = tmp_path_factory.mktemp("run") / "whole"
    return run(folder, *TINY, *GAME, *MEASURED, *perceptual, "--gradient_accumulation_steps", "2")


@pytest.mark.parametrize("source", ["", "checkpoint-00000008"], ids=["autoencoder", "checkpoint"])
def test_a_run_starts_from_a_saved_autoencoder_or_its_checkpoint(finished, source):
    words = [*TINY, "--max_train_steps", "2", "--model_channels", "16", "--init_from", str(finished / source)]
    config = parse_config(train_autoencoder.AutoencoderConfig, [*words, "--model_channels", "8"])
    fresh = train_autoencoder.build_autoencoder(config, load_data(**config.data_arguments()))
    network = train_autoencoder.start_network(config, load_data(**config.data_arguments()))
    trained = load_file(finished / "diffusion_pytorch_model.safetensors")
    assert trained.keys() == network.state_dict().keys()
    assert all(torch.equal(value, trained[name]) for name, value in network.state_dict().items())
    assert not torch.equal(fresh.state_dict()["decoder.conv_out.weight"], trained["decoder.conv_out.weight"])


def test_a_checkpoint_of_a_quantised_autoencoder_starts_no_plain_one(finished):
    words = [*TINY, "--max_train_steps", "2", "--quantised", "--init_from", str(finished / "checkpoint-00000008")]
    config = parse_config(train_autoencoder.AutoencoderConfig, words)
    with pytest.raises(ValueError, match="has a AutoencoderKL, and this run trains a VQModel"):
        train_autoencoder.start_network(config, load_data(**config.data_arguments()))


def test_stock_diffusers_loads_the_autoencoder_in_a_process_without_the_package(finished):
    source = f"""
        import torch
        from diffusers import AutoencoderKL
        vae = AutoencoderKL.from_pretrained({str(finished)!r}, use_safetensors=True)
        images = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8)
        claims["given back"] = vae.decode(vae.encode(images).latent_dist.mode()).sample.flatten().tolist()
        claims["config"] = [vae.config.latents_mean, vae.config.latents_std, vae.config.scaling_factor]
    """
    claims = run_claims(source, with_package=False)
    vae = AutoencoderKL.from_pretrained(finished)
    images = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8)
    torch.testing.assert_close(torch.tensor(claims["given back"]), vae(images).sample.flatten(), rtol=1e-4, atol=1e-4)
    assert [len(claims["config"][0]), len(claims["config"][1]), claims["config"][2]] == [2, 2, 1.0]
    names = load_file(finished / "diffusion_pytorch_model.safetensors")
    assert not any("logvar" in name or "layers" in name for name in names)


@torch.no_grad()
def training_latents(folder: Path) -> tuple[AutoencoderKL, torch.Tensor]:
    """Of all training images, each sampled sixteen times."""
    vae = AutoencoderKL.from_pretrained(folder)
    images = load_data("digits", split="train[:192]").fetch(range(192), epoch=0)["x_0"]
    posterior, generator = vae.encode(images).latent_dist, torch.Generator().manual_seed(5)
    return vae, torch.cat([posterior.sample(generator) for _ in range(16)])


def test_scaled_latents_of_the_training_images_have_mean_0_and_deviation_1(finished):
    vae, z = training_latents(finished)
    mean, std = (
        torch.tensor(values).reshape(1, -1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    scaled = (z - mean) / std * vae.config.scaling_factor
    for channel in scaled.transpose(0, 1):
        assert float(channel.std()) == pytest.approx(1, abs=0.02) and float(channel.mean()) == pytest.approx(
            0, abs=0.02
        )


def test_the_scale_may_be_one_number_that_stable_diffusions_pipelines_read(tmp_path):
    flags = ["--max_train_steps", "2", "--perceptual", "none", "--adversarial_weight", "0", "--eval_metrics", "psnr"]
    vae, z = training_latents(run(tmp_path, *TINY, *flags, "--latent_scaling", "scalar"))
    scaled = (z - vae.config.shift_factor) * vae.config.scaling_factor
    assert vae.config.latents_mean is None and float(scaled.std()) == pytest.approx(1, abs=0.02)
    assert float(scaled.mean()) == pytest.approx(0, abs=0.02)
    assert {record["grad_norm_d"] for record in metrics(tmp_path) if "grad_norm_d" in record} == set()


def test_the_log_has_both_sides_and_the_measures_stand_beside_their_floor(finished):
    log = metrics(finished)
    last = next(record for record in reversed(log) if "loss" in record)
    assert {"loss", "l1", "kl", "perceptual", "fooling", "critic_weight", "loss_d", "right", "grad_norm_d"} <= set(
        last
    )
    first = next(record for record in log if "loss" in record)
    assert "fooling" not in first and "loss_d" not in first and last["skipped"] == 0
    measured = next(record for record in log if "psnr" in record)
    assert 0 < measured["rfd_floor"] < measured["rfd"] and 0 < measured["psnr"] < 30
    assert measured["protocol"]["count"] == 96 and measured["protocol"]["data"]["split"] == "train[192:400]"


def test_a_run_leaves_pairs_of_images_and_a_card_that_shows_how_to_use_it(finished):
    (grid,) = finished.glob("samples/ema-*.png")
    assert Image.open(grid).size[0] > 4 * 56
    card = (finished / "README.md").read_text()
    texts = [
        "An autoencoder of 8x8 images",
        "from diffusers import AutoencoderKL",
        "latents_std",
        "Images, each above",
    ]
    texts += ["High-Resolution Image Synthesis", "Taming Transformers", "PSNR of reconstructions", "of originals"]
    for text in texts:
        assert text in card, text
    code = card.split("```python\n")[1].split("```")[0].replace('"whole"', repr(str(finished)))
    namespace = {}
    exec(code, namespace)
    assert namespace["images"].shape == (1, 1, 8, 8) and namespace["latents"].shape == (1, 2, 4, 4)


def test_an_interrupted_run_goes_on_bit_for_bit(finished, tmp_path, monkeypatch, perceptual):
    flags = [*TINY, *GAME, *MEASURED, *perceptual, "--gradient_accumulation_steps", "2"]
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        run(tmp_path, *flags)
    assert not (tmp_path / "config.json").exists()
    run(tmp_path, *flags, "--resume_from_checkpoint", "latest")
    checkpoint = Path("checkpoint-00000008")
    weights = "diffusion_pytorch_model.safetensors"
    for file in (weights, checkpoint / "model.safetensors", checkpoint / "model_1.safetensors"):
        ours, whole = load_file(tmp_path / file), load_file(finished / file)
        assert ours.keys() == whole.keys() and all(torch.equal(ours[name], whole[name]) for name in whole), file
    assert (tmp_path / "config.json").read_text() == (finished / "config.json").read_text()


def test_a_quantised_one_of_four_channels_is_a_vqmodel_whose_codes_are_in_use(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 4), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image, "RGBA").save(folder / f"{number}.png")
    flags = [*TINY, "--max_train_steps", "3", "--quantised", "--num_codes", "16", "--channels", "4"]
    flags += ["--dataset_name", "none", "--train_data_dir", str(folder), "--split", "train"]
    out = run(tmp_path / "run", *flags)
    vae = VQModel.from_pretrained(out)
    assert vae.config.in_channels == 4 and vae.config.num_vq_embeddings == 16 and "latents_mean" not in vae.config
    assert vae(torch.zeros(1, 4, 8, 8)).sample.shape == (1, 4, 8, 8)
    last = next(record for record in reversed(metrics(out)) if "codes" in record)
    assert 1 <= last["perplexity"] <= 16
    assert "a `VQModel` of diffusers" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--dataset_name", "swiss_roll"], "swiss_roll holds points, and this autoencoder is one of images"),
        (["--resolution", "9"], "images of 9x9 pixels cannot be halved 1 times; give a --resolution whose sides are"),
        (["--norm_num_groups", "3"], "norm_num_groups 3 does not divide the widths"),
        (["--critic_channels", "12"], "critic_channels 12 is no multiple of 8"),
        (["--eval_metrics", "rfd", "--eval_num_images", "20"], "20 generated samples are too few"),
        (["--perceptual", "no_such_file"], "perceptual no_such_file: there is no network of known layers"),
        (["--quantised", "--gradient_checkpointing"], "gradient_checkpointing is not in diffusers' VQModel"),
    ],
)
def test_a_bad_setting_ends_in_one_sentence_before_the_training(tmp_path, capsys, flags, sentence):
    given = [*TINY, "--max_train_steps", "1", *flags]
    if "swiss_roll" in flags:
        given = ["--dataset_name", "swiss_roll", "--max_train_steps", "1"]
    with pytest.raises(SystemExit) as end:
        run(tmp_path / "out", *given)
    said = f"{end.value} {capsys.readouterr().err}"
    assert sentence in said and "Traceback" not in said


@pytest.mark.slow
def test_two_processes_follow_the_run_of_one_the_critics_adaptive_weight_included(tmp_path, perceptual):
    runs = []
    for processes, batch in ((1, "8"), (2, "4")):
        folder = tmp_path / str(processes)
        words = [*launcher(processes), "training/train_autoencoder.py", *TINY, *GAME, *perceptual, "--output_dir"]
        words += [str(folder), "--train_batch_size", batch, "--eval_metrics", "psnr"]
        done = subprocess.run(words, cwd=REPO, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        runs.append(metrics(folder))
    for one, two in zip(*runs, strict=True):
        for name in {"loss", "critic_weight", "fooling", "loss_d", "psnr"} & set(one):
            assert two[name] == pytest.approx(one[name], rel=2e-3), (name, one, two)
    assert any("critic_weight" in record for record in runs[0])
