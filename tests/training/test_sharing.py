"""Training with `--push_to_hub` against a Hub on loopback: what is pushed, what an outage does, and going on from the Hub."""

import hashlib
import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import CommitOperationAdd, HfApi

from hf_diffusion import ClassifierFreeGuidancePipeline
from hf_diffusion.checkpoints import BadCheckpoint
from hf_diffusion.hub import outbox, sharing
from hf_diffusion.training import train_ddpm
from tests.test_push import connect
from tests.training.test_train_ddpm import TINY, assert_same_weights, weights


@pytest.fixture
def api(hub, monkeypatch):
    api = connect(hub, monkeypatch)
    api.server = hub
    yield api
    hub.faults.clear()


def run(output_dir: Path, repo: str, *flags: str) -> None:
    flags = ("--output_dir", str(output_dir), "--push_to_hub", "--hub_model_id", repo, *flags)
    assert train_ddpm.main([*TINY, "--max_train_steps", "5", *flags]) == 0


def stop_after(monkeypatch, step: int) -> None:
    original = train_ddpm.Trainer._optimizer_step

    def step_and_signal(trainer, stream):
        original(trainer, stream)
        if trainer.step + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train_ddpm.Trainer, "_optimizer_step", step_and_signal)


@pytest.mark.slow
def test_a_run_that_is_stopped_goes_on_from_the_hub_on_another_machine_bit_for_bit(api, tmp_path, monkeypatch):
    repo = "alice/goes-on"
    run(tmp_path / "whole", "alice/whole", "--hub_strategy", "every_save")
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        run(tmp_path / "first", repo, "--hub_strategy", "checkpoint")
    assert outbox.pending(tmp_path / "first") == []
    assert {tag.name for tag in api.list_repo_refs(repo).tags} == {"step-00000003", "step-00000004"}
    assert "last-checkpoint/optimizer.bin" in api.list_repo_files(repo)
    run(tmp_path / "second", repo, "--hub_strategy", "checkpoint", "--resume_from_checkpoint", "hub")
    assert (tmp_path / "second" / "checkpoint-00000004").is_dir()
    assert_same_weights(weights(tmp_path / "second"), weights(tmp_path / "whole"))
    assert_same_weights(weights(tmp_path / "second", averaged=False), weights(tmp_path / "whole", averaged=False))
    loaded = ClassifierFreeGuidancePipeline.from_pretrained(
        api.snapshot_download(repo, revision="step-00000005", local_dir=tmp_path / "there")
    )
    assert_same_weights(loaded.unet.state_dict(), weights(tmp_path / "whole"))


def test_a_run_pushes_private_weights_card_and_code_and_no_state(api, tmp_path, capsys):
    repo = "alice/saves"
    run(tmp_path, repo, "--hub_strategy", "every_save")
    assert f"everything is pushed to {repo}" in capsys.readouterr().out
    assert [commit.title for commit in api.list_repo_commits(repo)][:2] == ["Step 5 of 5", "Step 3 of 5"]
    assert {tag.name for tag in api.list_repo_refs(repo).tags} == {"step-00000003", "step-00000005"}
    assert api.model_info(repo).private
    for tag in ("step-00000003", "step-00000005"):
        files = set(api.list_repo_files(repo, revision=tag))
        assert {
            "README.md",
            "config.yaml",
            "model_index.json",
            "unet/unet_adm.py",
            "scheduler/scheduling_gaussian.py",
        } <= files
        state = (
            "optimizer",
            "random_states",
            "checkpoint",
            "metrics.jsonl",
            "logs",
            "outbox",
            ".pkl",
            ".bin",
            "tfevents",
        )
        assert not [name for name in files if any(word in name for word in state)]
        card = api.hf_hub_download(repo, "README.md", revision=tag, local_dir=tmp_path / "there" / tag)
        text = Path(card).read_text()
        assert f'"{repo}"' in text and f'revision="{tag}"' in text
    assert {"samples/ema-00000005.png", "loss_curve.png"} <= files


def test_an_outage_during_training_costs_nothing_but_the_push_which_goes_out_later(api, tmp_path, capsys, monkeypatch):
    repo = "alice/outage"
    monkeypatch.setattr(sharing, "WAIT_AT_THE_END", 0.1)
    api.server.faults.add(match="POST", action="status", status=503, count=-1)
    run(tmp_path, repo, "--hub_strategy", "end")
    said = capsys.readouterr().out
    assert "training starts all the same" in said
    assert "not pushed yet: 000001-step-00000005" in said and f"hf-diffusion push --pending {tmp_path}" in said
    assert (tmp_path / "model_index.json").is_file()
    api.server.faults.clear()
    deadline = time.monotonic() + 60
    while outbox.pending(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)  # the child that the run has started is still at it
    assert outbox.pending(tmp_path) == [] and api.list_repo_commits(repo)[0].title == "Step 5 of 5"


@pytest.mark.parametrize("token", ["hf_alice_read", "hf_bob_write"])
def test_a_run_that_may_not_push_ends_before_it_trains(api, tmp_path, monkeypatch, token):
    HfApi(endpoint=api.endpoint, token="hf_alice_write").create_repo("alice/refused", exist_ok=True)
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(SystemExit, match="may not write to alice/refused"):
        run(tmp_path, "alice/refused")
    assert not list(tmp_path.glob("checkpoint-*")) and not (tmp_path / "metrics.jsonl").exists()


def test_a_checkpoint_on_the_hub_that_would_run_code_is_refused(api, tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "owned"),))

    torch.save(Evil(), tmp_path / "evil.pkl")
    data = (tmp_path / "evil.pkl").read_bytes()
    manifest = {"step": 3, "files": {"custom_checkpoint_0.pkl": hashlib.sha256(data).hexdigest()}}
    api.create_repo("alice/evil")
    files = {"custom_checkpoint_0.pkl": data, "manifest.json": json.dumps(manifest).encode()}
    operations = [CommitOperationAdd(f"last-checkpoint/{name}", content) for name, content in files.items()]
    api.create_commit("alice/evil", operations, commit_message="evil")
    with pytest.raises(BadCheckpoint, match="could run code"):
        sharing.fetch_checkpoint("alice/evil", tmp_path)
    assert not (tmp_path / "owned").exists() and not list(tmp_path.glob("checkpoint-*"))


def test_no_checkpoint_on_the_hub_is_none_and_an_outage_is_an_error(api, tmp_path):
    api.create_repo("alice/empty")
    assert sharing.fetch_checkpoint("alice/empty", tmp_path) is None
    with pytest.raises(OSError, match="no repository alice/nothing-here"):
        sharing.fetch_checkpoint("alice/nothing-here", tmp_path)
    api.server.faults.add(match="GET /api/models/alice/empty", action="status", status=503, count=-1)
    with pytest.raises(OSError, match="cannot be reached for alice/empty"):
        sharing.fetch_checkpoint("alice/empty", tmp_path)
