"""What is said about how a run was started, and what of it others may see."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from hf_diffusion.commands.push import push_folder
from hf_diffusion.config.publishing import published, published_command
from hf_diffusion.loop.launching import command_to_go_on
from hf_diffusion.training import train_ddpm
from hf_diffusion.training.train_ddpm import DDPMConfig
from tests.hub.test_push import connect
from tests.launching import ENVIRONMENT, REPO
from tests.loop.test_start import png_folder
from tests.training.test_train_ddpm import TINY, assert_same_weights, run, weights


def test_paths_that_lead_out_of_the_working_folder_are_cut_to_their_last_part(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = ["/home/alice/cats", f"{tmp_path}/runs/x", "~/cats", "../alice/cats", "runs/x", "alice/cats", "train[:8]"]
    assert published({"a": paths, "b": 3, "c": None, "d": (1, 2)}) == {
        "a": ["cats", "runs/x", "cats", "cats", "runs/x", "alice/cats", "train[:8]"],
        "b": 3,
        "c": None,
        "d": [1, 2],
    }


@pytest.mark.parametrize(
    "words, shown",
    [
        (
            "--train_data_dir /home/alice/cats --output_dir=/home/alice/runs/x --resume_from_checkpoint latest --seed "
            "3",
            "--train_data_dir cats --output_dir=x --seed 3",
        ),
        ("--overwrite_output_dir --config digits.yaml --no-traceback", "--config training/recipes/digits.yaml"),
        ("--config {tmp}/own.yaml --resume_from_checkpoint=latest --seed 3", "--config config.yaml"),
    ],
)
def test_the_published_command_has_nothing_of_one_start_or_of_this_machine(tmp_path, words, shown):
    (tmp_path / "own.yaml").write_text("seed: 1\n")
    command = ["train_ddpm.py", *words.format(tmp=tmp_path).split()]
    assert published_command(DDPMConfig, command) == ["train_ddpm.py", *shown.split()]


def test_nothing_that_is_pushed_names_this_machine_and_the_local_settings_still_repeat_the_run(
    hub, tmp_path, monkeypatch
):
    api = connect(hub, monkeypatch)
    images = png_folder(tmp_path / "alice" / "cats")
    flags = ["--dataset_name", "none", "--train_data_dir", str(images), "--max_train_steps", "1"]
    hub_flags = ["--push_to_hub", "--hub_model_id", "alice/nameless"]
    folder = run(tmp_path / "alice" / "run", *flags, *hub_flags)
    push_folder(folder, "alice/nameless2", "by hand", None, private=True)
    for repo in ("alice/nameless", "alice/nameless2"):
        there = Path(api.snapshot_download(repo, local_dir=tmp_path / repo))
        settings = yaml.safe_load((there / "config.yaml").read_text())
        assert (settings["train_data_dir"], settings["output_dir"]) == ("cats", "run")
        for file in there.rglob("*"):
            if file.is_file() and ".cache" not in file.parts:
                assert str(tmp_path).encode() not in file.read_bytes(), file
    card = (folder / "README.md").read_text()
    assert "--train_data_dir cats" in card and str(tmp_path) not in card
    # the file here is for this machine
    words = ["--config", str(folder / "config.yaml"), "--no-push_to_hub", "--output_dir", str(tmp_path / "again")]
    assert train_ddpm.main(words) == 0
    assert_same_weights(weights(tmp_path / "again"), weights(folder))


@pytest.mark.parametrize("launched", [False, True])
def test_the_command_to_go_on_works_as_it_is_printed(tmp_path, launched):
    """Pasted into a shell, in the folder of the first start, it ends the run that a signal has
    interrupted."""
    launch = ["-m", "accelerate.commands.launch", "--num_processes", "1", "--mixed_precision", "bf16"]
    script = [sys.executable, *(launch if launched else []), "training/train_ddpm.py"]
    steps = ["--max_train_steps", "100000", "--checkpointing_steps", "50000", "--logging_steps", "1"]
    words = [*script, *TINY, *steps, "--output_dir", str(tmp_path / "a run")]
    env = {**ENVIRONMENT, "PYTHONPATH": str(REPO)}
    with subprocess.Popen(
        words, cwd=REPO, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as job:
        while not (tmp_path / "a run" / "metrics.jsonl").exists():
            assert job.poll() is None
            time.sleep(0.05)
        pid = job.pid
        if launched:
            pid = int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])
        os.kill(pid, signal.SIGTERM)
        said, _ = job.communicate(timeout=240)
    command = said.strip().splitlines()[-1]
    assert ("accelerate.commands.launch" in command) == launched == ("--mixed_precision bf16" in command)
    newest = int(sorted((tmp_path / "a run").glob("checkpoint-*"))[-1].name.split("-")[1])
    done = subprocess.run(
        f"{command} --max_train_steps {newest + 1}", shell=True, cwd=REPO, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a run" / "model_index.json").is_file()


def test_without_a_launcher_the_script_itself_is_named(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["training/train_x.py"])
    shown = command_to_go_on(Path("a run/config.yaml"), ["--no-such-words"])
    assert shlex.split(shown) == [
        "training/train_x.py",
        *("--config", "a run/config.yaml", "--resume_from_checkpoint", "latest"),
    ]
