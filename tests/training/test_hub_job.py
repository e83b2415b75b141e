"""Training on the Hub's machines: ended at a limit, killed, started again on an empty disk."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import HfApi
from huggingface_hub.cli._uv_script_header import parse_uv_script_header
from huggingface_hub.utils import HfHubHTTPError
from safetensors.torch import load_file

from hf_diffusion.hub import outbox
from hf_diffusion.training import hub_job, train_ddpm
from tests.hub.test_push import connect
from tests.launching import ENVIRONMENT, REPO
from tests.training.test_train_ddpm import TINY, assert_same_weights, weights


JOBS = (REPO / "docs" / "jobs.md").read_text()
SCRIPT = REPO / "training" / "hub_job.py"
STEPS = ("--max_train_steps", "600", "--checkpointing_steps", "100", "--sample_steps", "none")


@pytest.fixture
def api(hub, monkeypatch):
    api = connect(hub, monkeypatch)
    yield api
    hub.faults.clear()


def start_job(folder: Path, *words: str) -> subprocess.Popen:
    """The script on a machine of its own, whose empty disk is `folder`."""
    folder.mkdir()
    command = [sys.executable, str(SCRIPT), "ddpm", *TINY, *STEPS, *words]
    env = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(REPO), "HF_HOME": str(folder / "home")}
    names = [name for name in os.environ if name.startswith("HF_") and name != "HF_HOME"]
    env |= {name: os.environ[name] for name in names}
    log = (folder / "log").open("w")
    return subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log, start_new_session=True)


def pushed_step(api: HfApi, repo: str) -> int:
    """The newest step whose push the Hub has."""
    try:
        return max((int(tag.name.removeprefix("step-")) for tag in api.list_repo_refs(repo).tags), default=0)
    except HfHubHTTPError:
        return 0


def test_the_script_says_to_hf_jobs_what_it_needs():
    header = parse_uv_script_header(SCRIPT.read_text())
    assert (header.flavor, header.timeout, header.secrets) == ("a10g-small", "30m", ["HF_TOKEN"])


@pytest.mark.skipif(
    int(huggingface_hub.__version__.split(".")[0]) < 2, reason="`hf` of 1.x knows no --attempts, as the page says"
)
def test_hf_jobs_takes_the_commands_of_the_documentation(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(REPO), "HF_TOKEN": "hf_x", "HF_HOME": str(tmp_path)}
    # `hf` and `python` of this environment; a dry run asks nobody and submits nothing.
    env |= {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HF_ENDPOINT": "http://127.0.0.1:9",
    }
    lines = [line for line in JOBS.replace("\\\n", " ").splitlines() if line.startswith("hf jobs uv run ")]
    assert len(lines) == 3
    for line in lines:
        command = line.replace("hf jobs uv run ", "hf jobs uv run --dry-run ", 1)
        done = subprocess.run(["bash", "-c", command], cwd=REPO, env=env, capture_output=True, text=True)
        assert done.returncode == 0 and "Job not submitted" in done.stdout, done.stdout + done.stderr
        said = dict(words.split(maxsplit=1) for words in done.stdout.splitlines() if words.startswith("  "))
        assert said["flavor"].startswith("a10g-small") and said["secrets"].startswith("HF_TOKEN"), done.stdout
        hub_job.parse(said["args"].split())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["ddpm", "--data", "x"], "give --hub_model_id user/name"),
        (["ddpm", "--hub_model_id", "a/b", "--minutes", "0"], "give the limit of the job in minutes, above 0"),
        (["ddpm", "--hub_model_id", "a/b"], "give --max_train_steps or --num_epochs: every start must plan the same"),
        (["ddpm", "--hub_model_id", "a/b", "--max_train_minutes", "9"], "give --max_train_steps or --num_epochs"),
    ],
)
def test_a_job_without_a_place_or_a_time_is_refused_in_a_sentence(words, sentence, capsys):
    with pytest.raises(SystemExit) as refused:
        hub_job.main(words)
    assert refused.value.code == 2 and sentence in capsys.readouterr().err


def test_checkpoints_are_kept_by_the_hub_or_in_a_folder_that_outlasts_the_machine():
    common = ["ddpm", "--max_train_steps", "9", "--hub_model_id", "a/b"]
    own, words = hub_job.parse(common)
    assert own.folder == Path("runs/job") and own.minutes == 30
    pushing = [*common, "--output_dir", "runs/job", "--push_to_hub", "--resume_from_checkpoint"]
    assert words == [*pushing, "hub", "--hub_strategy", "checkpoint"]
    own, words = hub_job.parse([*common, "--output_dir", "/bucket", "--minutes", "240"])
    assert own.folder == Path("/bucket") and own.minutes == 240
    assert words == [*common, "--output_dir", "/bucket", "--push_to_hub", "--resume_from_checkpoint", "latest"]


CHILD = """
import pathlib, signal, sys, time
def save(*_):
    pathlib.Path(sys.argv[-1]).write_text("saved")
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
pathlib.Path(sys.argv[-1]).write_text("trains")
time.sleep(float(sys.argv[1]))
sys.exit(int(sys.argv[2]))
"""


@pytest.mark.parametrize(
    ("seconds", "status", "ends"),
    [(60, 0, (0, True, "saved")), (0, 0, (0, False, "trains")), (0, 3, (3, False, "trains"))],
    ids=["meets its limit", "ends in time", "fails"],
)
def test_training_is_told_to_save_at_the_limit_and_else_says_how_it_ended(
    tmp_path, monkeypatch, seconds, status, ends
):
    monkeypatch.setattr(hub_job, "TRAIN", (sys.executable, "-c", CHILD))
    words = [str(seconds), str(status), str(tmp_path / "file")]
    began = time.time()
    assert (*hub_job.train(words, began + 3), (tmp_path / "file").read_text()) == ends
    assert time.time() - began < 30


def test_the_limit_of_a_job_runs_from_the_start_of_its_machine(monkeypatch):
    monkeypatch.delenv("JOB_ID", raising=False)
    assert abs(hub_job.start_of_the_job() - time.time()) < 60
    monkeypatch.setenv("JOB_ID", "a job")
    # That of the first process here.
    assert hub_job.start_of_the_job() < time.time() - 1


def test_what_waits_is_sent_also_where_the_training_s_own_sender_is_at_it_first(api, tmp_path):
    for step in ("1", "2"):
        with outbox.new_entry(tmp_path, f"step-{step}", "alice/waits", "a step", f"s{step}", private=True) as files:
            (files / "weights.safetensors").write_text(step)
    with outbox._sole_sender(tmp_path / outbox.FOLDER):
        sending = threading.Thread(target=hub_job.send, args=(tmp_path,))
        sending.start()
        time.sleep(0.7)
        assert sending.is_alive() and len(outbox.pending(tmp_path)) == 2
    sending.join(60)
    assert not outbox.pending(tmp_path)
    assert {tag.name for tag in api.list_repo_refs("alice/waits").tags} == {"s1", "s2"}


@pytest.mark.slow
def test_a_job_that_is_killed_and_told_to_stop_ends_in_the_weights_of_an_uninterrupted_run(api, tmp_path):
    repo = "alice/job"
    # The power goes once a checkpoint is on the Hub.
    job = start_job(tmp_path / "first", "--hub_model_id", repo)
    deadline = time.time() + 120
    while not pushed_step(api, repo):
        assert job.poll() is None and time.time() < deadline, (tmp_path / "first" / "log").read_text()
        time.sleep(0.1)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    assert 0 < pushed_step(api, repo) < 600
    # The second start is told to stop in the midst of a step, as it tells itself at its limit.
    job, before = start_job(tmp_path / "second", "--hub_model_id", repo), pushed_step(api, repo)
    while pushed_step(api, repo) == before:
        assert job.poll() is None and time.time() < deadline + 120, (tmp_path / "second" / "log").read_text()
        time.sleep(0.1)
    os.kill(job.pid, signal.SIGTERM)
    assert job.wait(120) == hub_job.NOT_FINISHED, (tmp_path / "second" / "log").read_text()
    said = (tmp_path / "second" / "log").read_text()
    assert "going on from" in said and "start the same command again" in said
    newest = max(int(folder.name.split("-")[1]) for folder in (tmp_path / "second/runs/job").glob("checkpoint-*"))
    assert before < pushed_step(api, repo) == newest < 600
    job = start_job(tmp_path / "third", "--hub_model_id", repo)
    assert job.wait(300) == 0, (tmp_path / "third" / "log").read_text()
    assert "going on from" in (tmp_path / "third" / "log").read_text()
    whole = ["--output_dir", str(tmp_path / "whole"), *STEPS]
    assert train_ddpm.main([*TINY, *whole]) == 0
    there = Path(api.snapshot_download(repo, revision="step-00000600", local_dir=tmp_path / "there"))
    (file,) = (there / "unet").glob("*.safetensors")
    assert_same_weights(load_file(file), weights(tmp_path / "whole"))
    assert "## Reproduce" in (there / "README.md").read_text()
