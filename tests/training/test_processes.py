"""Several processes under `accelerate launch` on the CPU (gloo), and kills: slow, run by .ci/run."""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_diffusion import ADMUNet2DModel
from tests.launching import ENVIRONMENT, launcher
from tests.training.test_train_ddpm import REPO, TINY, assert_same_weights, metrics, weights


pytestmark = pytest.mark.slow
STEPS = ["--max_train_steps", "7"]


def command(output_dir: Path, *flags: str, processes: int) -> list[str]:
    return [*launcher(processes), "training/train_ddpm.py", *TINY, "--output_dir", str(output_dir), *flags]


def launch(output_dir: Path, *flags: str, processes: int) -> str:
    result = subprocess.run(
        command(output_dir, *flags, processes=processes),
        cwd=REPO,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("single")
    launch(folder, *STEPS, "--train_batch_size", "16", processes=1)
    return folder


@pytest.mark.parametrize(
    "flags", [["--train_batch_size", "8"], ["--train_batch_size", "4", "--gradient_accumulation_steps", "2"]]
)
def test_two_processes_follow_the_loss_curve_and_weights_of_one_with_the_same_global_batch(single, tmp_path, flags):
    launch(tmp_path, *STEPS, *flags, processes=2)
    for a, b in zip(metrics(tmp_path), metrics(single), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4), (a, b)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    # Answers, not weights: the bias of the attention's keys has no effect, so Adam moves it by the sign of rounding errors.
    x, labels = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 10
    answers = [ADMUNet2DModel.from_pretrained(f / "unet")(x, 300, labels).sample for f in (tmp_path, single)]
    torch.testing.assert_close(*answers, rtol=1e-3, atol=1e-3)


def test_two_processes_resume_exactly(tmp_path):
    flags = [*STEPS, "--train_batch_size", "8", "--checkpoints_total_limit", "9"]
    launch(tmp_path / "whole", *flags, processes=2)
    launch(tmp_path / "parted", *flags, processes=2)
    launch(tmp_path / "parted", *flags, "--resume_from_checkpoint", "checkpoint-00000003", processes=2)
    assert_same_weights(weights(tmp_path / "parted"), weights(tmp_path / "whole"))


def wait_for(condition, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.1)


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_sigterm_to_one_of_two_processes_stops_both_with_everything_saved(tmp_path):
    many = ["--max_train_steps", "100000", "--train_batch_size", "8", "--checkpointing_steps", "100000"]
    with subprocess.Popen(
        command(tmp_path, *many, processes=2),
        cwd=REPO,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as launcher:
        wait_for(lambda: (tmp_path / "metrics.jsonl").exists() or launcher.poll() is not None)
        os.kill(children(launcher.pid)[0], signal.SIGTERM)
        out, err = launcher.communicate(timeout=240)
    assert launcher.returncode == 0, out + err
    assert "go on with the same command and --resume_from_checkpoint latest" in out
    assert len(list(tmp_path.glob("checkpoint-*"))) == 1


@pytest.mark.parametrize("seed", range(4))
def test_kill_9_at_a_random_moment_loses_nothing_that_was_saved(single, tmp_path, seed):
    """The run is killed several times, restarted with `latest` each time, and ends with the weights of the uninterrupted run."""
    rng = random.Random(seed)
    flags = [*STEPS, "--train_batch_size", "16", "--checkpointing_steps", "1"]
    for _ in range(3):
        args = command(tmp_path, *flags, "--resume_from_checkpoint", "latest", processes=1)
        process = subprocess.Popen(
            args,
            cwd=REPO,
            env=ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        before = set(tmp_path.glob("*checkpoint-*"))
        wait_for(
            lambda process=process, before=before: (
                set(tmp_path.glob("*checkpoint-*")) - before or process.poll() is not None
            )
        )
        time.sleep(rng.uniform(0, 0.3))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    launch(tmp_path, *flags, "--resume_from_checkpoint", "latest", processes=1)
    assert_same_weights(weights(tmp_path), weights(single))
    assert [r["step"] for r in metrics(tmp_path)] == [2, 4, 6, 7]


def test_a_damaged_checkpoint_is_recognised_and_the_one_before_it_taken(tmp_path):
    flags = [*STEPS, "--train_batch_size", "16", "--checkpoints_total_limit", "9"]
    launch(tmp_path, *flags, processes=1)
    reference = weights(tmp_path)
    newest = sorted(tmp_path.glob("checkpoint-*"))[-1]
    data = bytearray((newest / "model.safetensors").read_bytes())
    data[-10] ^= 1
    (newest / "model.safetensors").write_bytes(data)
    out = subprocess.run(
        command(tmp_path, *flags, "--resume_from_checkpoint", "latest", processes=1),
        cwd=REPO,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert (
        out.returncode == 0
        and "model.safetensors is different from what was saved; trying the one before it" in out.stderr
    )
    assert "checkpoint-00000006, step 6 of 7" in out.stdout
    assert_same_weights(weights(tmp_path), reference)
    manifest = json.loads((sorted(tmp_path.glob("checkpoint-*"))[-1] / "manifest.json").read_text())
    assert manifest["step"] == 7 and torch.isfinite(next(iter(load_file(newest / "model.safetensors").values()))).all()
