"""Training, sampling and evaluation on a CUDA device, where results are compared within rounding.

The rest of the suite runs on the CPU (tests/conftest.py). The same bodies run on the CPU as slow
tests, so that a machine without a device proves the tests themselves.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from hf_diffusion import ClassifierFreeGuidancePipeline, DDGANPipeline
from hf_diffusion.cli import main as command_line
from hf_diffusion.loop.update import Updater
from hf_diffusion.training import train_ddgan, train_ddpm
from tests.launching import forget_accelerate
from tests.training.interruptions import stop_after


TINY = """
    --dataset_name digits --max_train_samples 64 --class_conditional --model_channels 16 --channel_mult 1,2
    --num_res_blocks 1 --train_batch_size 16 --sample_steps none --num_sample_images 10 --logging_steps 1
    --checkpointing_steps 3 --learning_rate 0.002 --ema_max_decay 0.9 --max_train_steps 6
""".split()
DDPM = [*TINY, "--norm_num_groups", "4", "--num_head_channels", "8", "--ddpm_num_inference_steps", "4"]
DDGAN = """
    --latent_dim 4 --latent_embed_dim 8 --num_latent_layers 1 --patch_size 2 --discriminator_patch_size 1
    --discriminator_channels 16 --time_embed_dim 8
""".split()
# one value of the 8-bit images
ONE_LEVEL = 1 / 255


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu), pytest.param("cpu", marks=pytest.mark.slow)])
def device(request) -> str:
    return request.param


@pytest.fixture
def trained(tmp_path, device, monkeypatch):
    """Train with further flags on the device: the folder of the run."""
    devices = []
    step = Updater.step

    def noted(updater, *given):
        devices.append(next(updater.shared.network.parameters()).device.type)
        return step(updater, *given)

    monkeypatch.setattr(Updater, "step", noted)

    def train(name: str, *flags: str, script=train_ddpm, base=tuple(DDPM)) -> Path:
        forget_accelerate()
        assert script.main([*base, "--output_dir", str(tmp_path / name), *flags]) == 0
        assert set(devices) == {device}
        return tmp_path / name

    return train


def losses(run: Path, name: str = "loss") -> np.ndarray:
    return np.array([json.loads(line)[name] for line in (run / "metrics.jsonl").read_text().splitlines()])


def shared_weights(run: Path, part: str = "unet") -> dict[str, torch.Tensor]:
    return load_file(run / part / "diffusion_pytorch_model.safetensors")


def assert_close_weights(a: dict, b: dict, atol: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def test_steps_in_bfloat16_have_the_losses_of_float32_within_its_rounding(trained):
    full, half = trained("full"), trained("half", "--mixed_precision", "bf16")
    # bfloat16 keeps 8 bits; its rounding averages out over a batch
    np.testing.assert_allclose(losses(half), losses(full), rtol=2e-2)
    assert not np.array_equal(losses(half), losses(full))
    assert all(tensor.dtype == torch.float32 for tensor in shared_weights(half).values())


def test_a_compiled_network_trains_to_the_same_weights_within_rounding_and_is_saved_as_before(trained):
    plain, compiled = trained("plain"), trained("compiled", "--torch_compile", "--channels_last")
    np.testing.assert_allclose(losses(compiled), losses(plain), rtol=1e-3)
    # Adam turns the sign of a gradient near 0 into a whole step, and six of them at a rate of 0.002
    # make 0.012
    assert_close_weights(shared_weights(compiled), shared_weights(plain), atol=1.2e-2)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
def test_no_step_but_the_first_waits_for_the_device(trained, device, monkeypatch):
    step = Updater.step

    def watched(updater, number, micros):
        # the copies of the feed are its own, and may wait
        micros = list(micros)
        torch.cuda.set_sync_debug_mode("error" if number else "default")
        try:
            step(updater, number, micros)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Updater, "step", watched)
    trained("run", "--mixed_precision", "bf16")


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
def test_captured_graphs_train_to_the_same_weights_within_rounding(trained, device):
    accumulated = ("--gradient_accumulation_steps", "2", "--train_batch_size", "8")
    skipped = counters["inductor"]["cudagraph_skips"]
    captured = trained("captured", *accumulated, "--torch_compile", "--compile_mode", "reduce-overhead")
    assert counters["inductor"]["cudagraph_skips"] == skipped
    plain = trained("plain", *accumulated)
    np.testing.assert_allclose(losses(captured), losses(plain), rtol=1e-3)
    assert_close_weights(shared_weights(captured), shared_weights(plain), atol=1.2e-2)


def test_an_interrupted_run_ends_with_the_weights_of_an_uninterrupted_one_within_rounding(trained):
    whole = trained("whole")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 4)
        stopped = trained("stopped")
    assert not (stopped / "model_index.json").exists()
    resumed = trained("stopped", "--resume_from_checkpoint", "latest")
    np.testing.assert_allclose(losses(resumed), losses(whole), rtol=1e-3)
    assert_close_weights(shared_weights(resumed), shared_weights(whole), atol=1.2e-2)


def test_an_image_of_a_seed_is_that_of_the_cpu_within_a_level_and_of_half_precision_within_some(trained, device):
    pipe = ClassifierFreeGuidancePipeline.from_pretrained(trained("run"))
    pipe.set_progress_bar_config(disable=True)

    def images() -> np.ndarray:
        generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
        labels = ["3", "7", "0", "1"]
        call = pipe(labels, num_inference_steps=4, guidance_scale=2.0, generator=generators, output_type="np")
        return call.images

    on_cpu = images()
    pipe.to(device)
    on_device = images()
    assert np.abs(on_device - on_cpu).max() < ONE_LEVEL
    pipe.to(dtype=torch.bfloat16)
    assert np.abs(images() - on_cpu).mean() < 8 * ONE_LEVEL
    # what the seeds decide stays: different images
    assert np.abs(on_device[0] - on_device[1]).mean() > 8 * ONE_LEVEL


def test_a_denoising_gan_trains_in_bfloat16_and_samples(trained, device):
    run = trained("gan", "--mixed_precision", "bf16", script=train_ddgan, base=(*TINY, *DDGAN))
    for name in ("loss_d", "loss_g", "grad_norm_d", "grad_norm_g", "penalty"):
        assert np.isfinite(losses(run, name)).all(), name
    assert losses(run, "skipped").max() == 0
    # R1 is the square of a gradient, taken in float32
    assert (losses(run, "penalty") > 0).all()
    pipe = DDGANPipeline.from_pretrained(run).to(device)
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    images = pipe(["3", "7"], generator=generators, output_type="np").images
    assert images.shape == (2, 8, 8, 1) and np.abs(images[0] - images[1]).mean() > ONE_LEVEL


def test_an_evaluation_measures_what_the_cpu_measures_within_rounding(trained, device, tmp_path, monkeypatch):
    run = trained("run")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DIFFUSION_CACHE", str(tmp_path / "cache"))
    results = {}
    for where in ("cpu", device):
        words = f"evaluate {run} --features pixels --metrics fd,pr --num_images 80 --num_inference_steps 4"
        assert command_line([*words.split(), "--device", where, "--output_dir", f"on_{where}"]) == 0
        (result,) = json.loads(Path(f"on_{where}", "metrics.json").read_text())["results"]
        results[where] = {name: measure["value"] for name, measure in result["measures"].items()}
    assert results[device].keys() == results["cpu"].keys() and len(results["cpu"]) == 3
    for name, value in results["cpu"].items():
        assert results[device][name] == pytest.approx(value, rel=1e-2, abs=0.02), name


def test_the_rest_of_the_suite_sees_no_device():
    assert not torch.cuda.is_available()
    assert Accelerator().device.type == "cpu"
