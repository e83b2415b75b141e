"""Several processes under `accelerate launch` on the CPU (gloo), and kills: slow, for .ci/run."""

import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_diffusion import ADMUNet2DModel
from hf_diffusion.loop.checkpoints import list_checkpoints, read_manifest
from hf_diffusion.training import train_ddpm
from tests.launching import CONFIGS, ENVIRONMENT, forked, free_port, launcher
from tests.training.test_train_ddpm import REPO, TINY, assert_same_weights, metrics, weights


pytestmark = pytest.mark.slow
STEPS = ["--max_train_steps", "7", "--checkpoints_total_limit", "9"]
SCRIPT = ["training/train_ddpm.py"]
ALTERED = "tests/training/altered_ddpm.py"


def command(output_dir: Path, *flags: str, processes: int, script: list[str] = SCRIPT, config: str | None = None):
    return [*launcher(processes, config), *script, *TINY, "--output_dir", str(output_dir), *flags]


def launch(output_dir: Path, *flags: str, processes: int, env: dict[str, str] = ENVIRONMENT, **how) -> tuple[str, str]:
    """Run to the end and return stdout and stderr."""
    words = command(output_dir, *flags, processes=processes, **how)
    result = subprocess.run(words, cwd=REPO, env=env, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout, result.stderr


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("single")
    launch(folder, *STEPS, "--train_batch_size", "16", processes=1)
    return folder


@pytest.fixture(scope="module")
def double(tmp_path_factory) -> Path:
    """Two processes, as the configuration for the CPU that is shipped starts them."""
    folder = tmp_path_factory.mktemp("double")
    launch(folder, *STEPS, "--train_batch_size", "8", processes=2, config="cpu_two_processes")
    return folder


def assert_same_run(a: Path, b: Path) -> None:
    """The loss curves agree, and so do the networks' answers.

    Not the weights: the bias of the attention's keys has no effect, so Adam moves it by the sign of
    rounding errors.
    """
    for left, right in zip(metrics(a), metrics(b), strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-4), (left, right)
        assert left["grad_norm"] == pytest.approx(right["grad_norm"], rel=1e-3)
    x, labels = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 10
    answers = [ADMUNet2DModel.from_pretrained(folder / "unet")(x, 300, labels).sample for folder in (a, b)]
    torch.testing.assert_close(*answers, rtol=1e-3, atol=1e-3)


def processes_of(checkpoint: Path) -> int:
    return len(list(checkpoint.glob("random_states_*.pkl")))


def test_two_processes_follow_the_run_of_one_with_the_same_global_batch(single, double):
    assert [processes_of(list_checkpoints(folder)[0]) for folder in (single, double)] == [1, 2]
    assert_same_run(double, single)


def test_two_processes_that_accumulate_follow_the_run_of_one_too(single, tmp_path):
    launch(tmp_path, *STEPS, "--train_batch_size", "4", "--gradient_accumulation_steps", "2", processes=2)
    assert_same_run(tmp_path, single)


def test_two_processes_follow_the_run_of_one_by_muon_with_several_averages_and_augmentation(tmp_path):
    flags = [
        "--max_train_steps",
        "4",
        "--optimizer",
        "muon",
        "--augment_probability",
        "0.5",
        "--ema_max_decays",
        "0.5",
    ]
    flags += [
        "--split",
        "train[100:200]",
        "--eval_split",
        "train[:40]",
        "--ema_metric",
        "eval_loss",
        "--learning_rate",
        "0.002",
    ]
    for processes, batch in ((1, "16"), (2, "8")):
        launch(tmp_path / str(processes), *flags, "--train_batch_size", batch, processes=processes)
    one, two = (metrics(tmp_path / str(processes)) for processes in (1, 2))
    for left, right in zip(one, two, strict=True):
        same = [name for name in left if name == "loss" or "eval_loss" in name]
        assert {name: left[name] for name in same} == pytest.approx({name: right[name] for name in same}, rel=1e-3)


def test_two_machines_find_each_other_by_the_flags_for_rendezvous(single, tmp_path):
    port = str(free_port())
    machines = []
    for rank in range(2):
        words = [
            *launcher(1),
            "--config_file",
            str(CONFIGS / "multi_node.yaml"),
            "--num_machines",
            "2",
            "--num_processes",
            "2",
        ]
        words += [
            "--multi_gpu",
            "--machine_rank",
            str(rank),
            "--main_process_ip",
            "127.0.0.1",
            "--main_process_port",
            port,
        ]
        words += [*SCRIPT, *TINY, *STEPS, "--train_batch_size", "8", "--output_dir", str(tmp_path)]
        machines.append(
            subprocess.Popen(
                words, cwd=REPO, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    said = [machine.communicate(timeout=300)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    assert processes_of(list_checkpoints(tmp_path)[0]) == 2
    assert_same_run(tmp_path, single)


def test_two_processes_resume_exactly(double, tmp_path):
    flags = [*STEPS, "--train_batch_size", "8", "--resume_from_checkpoint", str(double / "checkpoint-00000003")]
    launch(tmp_path, *flags, processes=2)
    assert_same_weights(weights(tmp_path), weights(double))


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_a_run_goes_on_with_another_number_of_processes_and_the_same_global_batch(
    single, double, tmp_path, before, after
):
    checkpoint = (single if before == 1 else double) / "checkpoint-00000003"
    flags = [
        "--train_batch_size",
        str(16 // after),
        "--resume_from_checkpoint",
        str(checkpoint),
        "--logging_steps",
        "1",
    ]
    out, _ = launch(tmp_path, *STEPS, *flags, processes=after)
    assert "step 3 of 7" in out
    assert [record["step"] for record in metrics(tmp_path)] == [4, 5, 6, 7]
    assert metrics(tmp_path)[-1]["loss"] == pytest.approx(metrics(single)[-1]["loss"], rel=1e-4)
    x, labels = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 10
    answers = [ADMUNet2DModel.from_pretrained(folder / "unet")(x, 300, labels).sample for folder in (tmp_path, single)]
    torch.testing.assert_close(*answers, rtol=1e-3, atol=1e-3)


def test_a_bad_batch_of_one_process_is_skipped_by_all_and_described(tmp_path):
    script = [ALTERED, "poisoned"]
    _, err = launch(
        tmp_path, *STEPS, "--train_batch_size", "8", "--checkpointing_steps", "1", processes=2, script=script
    )
    said = re.findall(
        r"step 2: the gradient is not finite .*; all processes skip the step; "
        r"loss not finite: row (\d+) at noise level (\d\.\d+) \(inf\)",
        err,
    )
    assert len(said) == 1, err  # the main process says it, for all
    assert 0 <= int(said[0][0]) < 64 and 0 <= float(said[0][1]) < 1
    assert [record["skipped"] for record in metrics(tmp_path)] == [0, 1, 1, 1]
    before, after, later = (load_file(f / "model.safetensors") for f in list_checkpoints(tmp_path)[1:4])
    assert_same_weights(before, after)  # step 2, counted from 0, changed nothing
    assert any(not torch.equal(after[name], later[name]) for name in after)
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path).values())


def test_processes_that_accelerate_would_not_join_are_refused(tmp_path):
    """Without a GPU and ACCELERATE_USE_CPU each of the two would take itself for the only one."""
    if torch.cuda.is_available():
        pytest.skip("here accelerate joins them, on the GPUs")
    env = {name: value for name, value in ENVIRONMENT.items() if name != "ACCELERATE_USE_CPU"}
    words = command(tmp_path / "run", *STEPS, processes=2, config="cpu_two_processes")
    result = subprocess.run(words, cwd=REPO, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode != 0
    assert "train_ddpm.py: 2 processes were started, but accelerate joins them on GPUs only" in result.stderr
    assert not (tmp_path / "run").exists()


# --- sharded by FSDP ---


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    flags = ["--train_batch_size", "8", "--checkpointing_steps", "1"]
    launch(folder, *STEPS, *flags, processes=2, script=[ALTERED, "sharded"], config="fsdp2")
    return folder


def test_shards_on_two_processes_follow_the_run_of_one_whole_network(single, sharded):
    """`single` exports its average, and this network is the same: so the average is right."""
    state = torch.load(sharded / "checkpoint-00000007" / "pytorch_model_fsdp.bin", weights_only=True)
    assert {name: tensor.shape for name, tensor in state.items()} == {n: t.shape for n, t in weights(single).items()}
    assert_same_run(sharded, single)


def test_the_average_over_shards_is_the_recursion_over_whole_weights(sharded):
    average = None
    for step, folder in enumerate(list_checkpoints(sharded), 1):
        raw = torch.load(folder / "pytorch_model_fsdp.bin", weights_only=True)
        decay = min(1 - step**-0.75, 0.9)  # --ema_power, --ema_max_decay; the first step takes the weights as they are
        average = raw if average is None else {n: average[n] * decay + raw[n] * (1 - decay) for n in raw}
    assert step == 7
    assert_same_weights(weights(sharded), average, rtol=1e-5, atol=1e-7)


def test_a_sharded_run_resumes_exactly(sharded, tmp_path):
    flags = [*STEPS, "--train_batch_size", "8", "--resume_from_checkpoint", str(sharded / "checkpoint-00000003")]
    launch(tmp_path, *flags, processes=2, script=[ALTERED, "sharded"], config="fsdp2")
    assert_same_weights(weights(tmp_path), weights(sharded))


def test_the_state_of_one_engine_is_not_taken_for_that_of_another(sharded, tmp_path):
    checkpoint = str(sharded / "checkpoint-00000003")
    with pytest.raises(SystemExit, match="engine was 'FSDP' and is 'data parallel'; restore these settings or start"):
        train_ddpm.main(
            [
                *TINY,
                *STEPS,
                "--train_batch_size",
                "16",
                "--output_dir",
                str(tmp_path),
                "--resume_from_checkpoint",
                checkpoint,
            ]
        )


# --- DeepSpeed ---


@pytest.mark.parametrize(
    "flags", [["--train_batch_size", "8"], ["--train_batch_size", "4", "--gradient_accumulation_steps", "2"]]
)
def test_zero_2_of_deepspeed_follows_the_run_of_one_process_and_resumes(single, tmp_path, flags):
    pytest.importorskip("deepspeed")
    how = {"processes": 2, "script": [ALTERED, "deepspeed"], "config": "deepspeed_zero2"}
    launch(tmp_path / "whole", *STEPS, *flags, **how)
    assert_same_run(tmp_path / "whole", single)
    checkpoint = str(tmp_path / "whole" / "checkpoint-00000003")
    launch(tmp_path / "parted", *STEPS, *flags, "--resume_from_checkpoint", checkpoint, **how)
    assert_same_weights(weights(tmp_path / "parted"), weights(tmp_path / "whole"), rtol=1e-5, atol=1e-6)


# --- signals and kills ---


def wait_for(condition, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.002)


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def signalled(folder: Path, *flags: str, child: int, delay: float = 0) -> tuple[int, str, float]:
    """Send SIGTERM to one of two processes after the first report; status, output and seconds."""
    words = command(folder, *flags, "--train_batch_size", "8", "--checkpointing_steps", "100000", processes=2)
    with subprocess.Popen(
        words, cwd=REPO, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as launcher:
        wait_for(lambda: (folder / "metrics.jsonl").exists() or launcher.poll() is not None)
        time.sleep(delay)
        os.kill(children(launcher.pid)[child], signal.SIGTERM)
        began = time.monotonic()
        out, _ = launcher.communicate(timeout=240)
    return launcher.returncode, out, time.monotonic() - began


@pytest.mark.parametrize("child", [0, 1])
def test_sigterm_to_one_of_two_processes_stops_both_with_everything_saved(tmp_path, child):
    status, out, _ = signalled(tmp_path, "--max_train_steps", "100000", child=child)
    assert status == 0, out
    assert "go on with the same command and --resume_from_checkpoint latest" in out
    assert len(list(tmp_path.glob("checkpoint-*"))) == 1


def test_sigterm_is_heard_while_the_main_process_draws_samples_and_the_other_waits(tmp_path):
    """20,000 sampling steps would take minutes."""
    long = [
        "--ddpm_num_steps",
        "20000",
        "--ddpm_num_inference_steps",
        "20000",
        "--sample_steps",
        "1",
        "--logging_steps",
        "1",
    ]
    status, out, seconds = signalled(tmp_path, "--max_train_steps", "9", *long, child=1, delay=2)
    assert status == 0 and seconds < 30, (seconds, out)
    assert "stopped by a signal at step 1 of 9, everything is saved" in out
    assert not list((tmp_path / "samples").glob("*")) and (tmp_path / "checkpoint-00000001").is_dir()


KILLS = 20


def test_kill_9_at_twenty_random_moments_loses_nothing_that_was_saved(tmp_path):
    """Every restart with `latest` goes on from a whole checkpoint.

    Each run ends with the very weights of the uninterrupted one.
    """
    rng = random.Random(0)
    flags = [*TINY, "--max_train_steps", "30", "--checkpointing_steps", "1", "--checkpoints_total_limit", "2"]

    def start(folder: Path):
        folder.mkdir(exist_ok=True)
        words = [*flags, "--output_dir", str(folder), "--resume_from_checkpoint", "latest"]
        return forked(train_ddpm.main, words, folder / "log.txt")

    def finish(folder: Path) -> float:
        began = time.monotonic()
        process = start(folder)
        process.join(120)
        assert process.exitcode == 0, (folder / "log.txt").read_text()
        return time.monotonic() - began

    finish(tmp_path / "whole")  # with the imports
    seconds = finish(Path(tmp_path / "again"))
    folders, while_writing, kills = [tmp_path / "run0"], 0, 0
    while kills < KILLS:
        folder = folders[-1]
        process = start(folder)
        if kills % 2:  # half of the moments lie where a checkpoint is being written
            wait_for(
                lambda folder=folder, process=process: list(folder.glob(".checkpoint-*")) or not process.is_alive(), 60
            )
            time.sleep(rng.uniform(0, 0.03))
        else:
            time.sleep(rng.uniform(0.1, seconds))
        if process.is_alive():
            process.kill()
            process.join()
            kills += 1
            while_writing += bool(list(folder.glob(".checkpoint-*.partial")))
            for checkpoint in list_checkpoints(folder):
                read_manifest(checkpoint)  # whole: none is seen half-written or half-removed
        if (folder / "README.md").exists():  # the run is complete
            folders.append(tmp_path / f"run{len(folders)}")
    finish(folders[-1])
    assert while_writing >= 3
    for folder in folders:
        assert_same_weights(weights(folder), weights(tmp_path / "whole"))
        assert [record["step"] for record in metrics(folder)] == list(range(2, 31, 2))
        assert not list(folder.glob(".checkpoint-*"))
