"""Checkpoints that cannot be written, or are of another run: what is kept, said, and may change."""

import errno
import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import accelerate.utils.other
import pytest
import torch

from hf_diffusion.loop import checkpoints, continuation, trainer
from hf_diffusion.loop.checkpoints import BadCheckpoint, latest_checkpoint, list_checkpoints, read_manifest
from tests.training.test_train_ddpm import assert_same_weights, run, weights


STEPS = ["--max_train_steps", "7"]
LATEST = ["--resume_from_checkpoint", "latest"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return run(tmp_path_factory.mktemp("run") / "whole", *STEPS)


def no_room(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def half_a_file(state, path, *_, **__):
    Path(path).write_bytes(b"half")
    no_room()


def limit_files(patch: pytest.MonkeyPatch) -> None:
    """The system's own refusal, EFBIG; Python ignores the signal that comes with it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))


FULL_DISKS = {
    "weights": lambda patch: patch.setattr(accelerate.utils.other, "safe_save_file", half_a_file),
    "optimizer": lambda patch: patch.setattr(torch, "save", half_a_file),
    "manifest": lambda patch: patch.setattr(checkpoints, "_seal", no_room),
    "the system's limit": limit_files,
}


def at_step(patch: pytest.MonkeyPatch, step: int, act: Callable) -> None:
    """Call `act(patch)` before the checkpoint of a step is written."""
    save = continuation.save_checkpoint

    def save_checkpoint(accelerator, output_dir, now, *rest):
        if now == step:
            act(patch)
        return save(accelerator, output_dir, now, *rest)

    patch.setattr(continuation, "save_checkpoint", save_checkpoint)


@pytest.mark.parametrize("disk", FULL_DISKS)
def test_a_full_disk_ends_the_run_in_one_sentence_and_leaves_the_last_checkpoint_to_go_on_from(whole, tmp_path, disk):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        at_step(patch, 6, FULL_DISKS[disk])
        try:
            run(tmp_path, *STEPS)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    sentence = stopped.value.code
    assert sentence.startswith(
        f"train_ddpm.py: the checkpoint checkpoint-00000006 could not be written to {tmp_path}: "
    )
    reason = "File too large" if disk == "the system's limit" else "No space left on device"
    assert reason in sentence and "MiB are free there" in sentence and "\n" not in sentence
    assert sentence.endswith(
        "checkpoint-00000003, is untouched: make room and go on with --resume_from_checkpoint latest"
    )
    assert [f.name for f in tmp_path.iterdir() if "checkpoint" in f.name] == ["checkpoint-00000003"]
    assert read_manifest(tmp_path / "checkpoint-00000003")["step"] == 3
    run(tmp_path, *STEPS, *LATEST)
    assert_same_weights(weights(tmp_path), weights(whole))


def test_a_failure_of_torch_save_in_its_own_words_is_recognised_as_one_of_the_disk(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(RuntimeError) as caught:
            torch.save(torch.zeros(10_000), tmp_path / "x.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoints.write_failure(caught.value) == "a file could not be written to its end"
    assert checkpoints.write_failure(RuntimeError("CUDA out of memory")) is None


def test_a_full_disk_at_another_place_names_the_checkpoint_that_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer.MetricsLog, "draw", no_room)
    with pytest.raises(
        SystemExit, match="No space left on device; checkpoint-00000003 is untouched, go on with --resume"
    ):
        run(tmp_path, *STEPS)


def test_what_a_kill_left_half_written_is_removed_by_the_next_save(tmp_path):
    for name in (".checkpoint-00000001.partial", ".checkpoint-00000000.dropped"):
        (tmp_path / "run" / name).mkdir(parents=True)
        (tmp_path / "run" / name / "model.safetensors").write_bytes(b"half")
    run(tmp_path / "run", "--max_train_steps", "1", *LATEST)
    assert [f.name for f in (tmp_path / "run").iterdir() if "checkpoint" in f.name] == ["checkpoint-00000001"]


def test_none_but_damaged_checkpoints_are_no_reason_to_begin_anew(tmp_path):
    for step in (1, 2):
        (tmp_path / f"checkpoint-{step:08}").mkdir()
    assert latest_checkpoint(tmp_path) is None and len(list_checkpoints(tmp_path)) == 2
    with pytest.raises(BadCheckpoint, match="every checkpoint in .* is damaged; begin anew by --overwrite_output_dir"):
        checkpoints.find_checkpoint(tmp_path, "latest")
    assert checkpoints.find_checkpoint(tmp_path / "empty", "latest") is None


@pytest.mark.parametrize(
    "flags, differing",
    [
        (["--prediction_type", "epsilon"], "prediction_type was 'v_prediction' and is 'epsilon'"),
        (["--beta_schedule", "linear"], "beta_schedule was 'squaredcos_cap_v2' and is 'linear'"),
        (["--seed", "5", "--train_batch_size", "4"], "seed was 0 and is 5; global_batch was 8 and is 4"),
        (["--no-use_ema"], "use_ema was True and is False"),
        (["--max_train_samples", "32"], "data was '"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_with_all_that_differs(whole, tmp_path, flags, differing):
    checkpoint = str(whole / "checkpoint-00000006")
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, *STEPS, *flags, "--resume_from_checkpoint", checkpoint)
    assert "belongs to another run: " in stopped.value.code and differing in stopped.value.code
    assert not list(tmp_path.glob("*checkpoint*"))


def test_a_learning_rate_and_a_decay_may_change_on_the_way_and_that_is_said(whole, tmp_path, capsys, monkeypatch):
    decays = []
    finish = trainer.Trainer._finish
    monkeypatch.setattr(
        trainer.Trainer, "_finish", lambda run, stop: decays.append(run.shared.average.decay) or finish(run, stop)
    )
    checkpoint = str(whole / "checkpoint-00000006")
    flags = ["--learning_rate", "0.001", "--ema_max_decay", "0.5", "--logging_steps", "1"]
    run(tmp_path, *STEPS, *flags, "--resume_from_checkpoint", checkpoint)
    said = capsys.readouterr().out
    assert (
        "with other settings than before: learning_rate was 0.01 and is 0.001; ema_max_decay was 0.9 and is 0.5"
        in said
    )
    assert decays == [0.5]


def test_a_checkpoint_of_an_earlier_version_that_records_no_settings_is_taken(whole, tmp_path):

    older = Path(shutil.copytree(whole / "checkpoint-00000006", tmp_path / "older"))
    manifest = json.loads((older / "manifest.json").read_text())
    for name in ("settings", "changeable", "engine"):
        del manifest[name]
    (older / "manifest.json").write_text(json.dumps(manifest))
    run(tmp_path / "run", *STEPS, "--resume_from_checkpoint", str(older))
    assert_same_weights(weights(tmp_path / "run"), weights(whole))


def test_a_damaged_checkpoint_is_recognised_and_the_one_before_it_taken(whole, tmp_path, capsys, caplog):
    folder = Path(shutil.copytree(whole, tmp_path / "copy"))
    newest = folder / "checkpoint-00000007" / "model.safetensors"
    data = bytearray(newest.read_bytes())
    data[-10] ^= 1
    newest.write_bytes(data)
    run(folder, *STEPS, *LATEST)
    assert "model.safetensors is different from what was saved; trying the one before it" in caplog.text
    assert "checkpoint-00000006, step 6 of 7" in capsys.readouterr().out
    assert_same_weights(weights(folder), weights(whole))
    assert [read_manifest(checkpoint)["step"] for checkpoint in list_checkpoints(folder)] == [6, 7]
