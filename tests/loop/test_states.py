"""What a checkpoint holds beside networks and optimizers: never unpickled, and older forms are
still read."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from hf_diffusion.files import sha256
from hf_diffusion.loop.states import read_state, write_state
from tests.training.test_train_ddpm import assert_same_weights, metrics, run, weights


STEPS = ["--max_train_steps", "4", "--checkpointing_steps", "2", "--ddpm_num_steps", "2", "--logging_steps", "1"]
STEPS += ["--timestep_sampling", "loss_second_moment"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return run(tmp_path_factory.mktemp("run") / "whole", *STEPS)


def test_a_state_comes_back_with_its_types_and_bits(tmp_path):
    shared = torch.randn(3)
    state = {"a": [shared, shared[:2], torch.tensor(7)], "b": {"c": None, "d": True, "e": 0.1, "f": 3, "g": "x"}}
    write_state(tmp_path, "x", state)
    back = read_state(tmp_path, "x")
    assert back["b"] == state["b"] and type(back["b"]["e"]) is float and type(back["b"]["f"]) is int
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(back["a"], state["a"], strict=True))


def test_averages_and_history_are_in_files_that_cannot_run_code(whole):
    files = {path.name for path in (whole / "checkpoint-00000004").iterdir()}
    assert {"average.safetensors", "average.json", "objective_0.safetensors", "objective_0.json"} <= files
    assert not [name for name in files if name.startswith("custom_checkpoint")]
    history = read_state(whole / "checkpoint-00000004", "objective_0")
    assert history["counts"].sum() == 20 and history["history"].dtype == torch.float64


def as_written_before(checkpoint: Path, folder: Path, spoil=None) -> Path:
    """A copy of a checkpoint in the form of versions before 0.3."""
    folder = Path(shutil.copytree(checkpoint, folder))
    for place, name in enumerate(("objective_0", "average")):
        torch.save(read_state(folder, name), folder / f"custom_checkpoint_{place}.pkl")
        for suffix in ("safetensors", "json"):
            (folder / f"{name}.{suffix}").unlink()
    if spoil is not None:
        (folder / "custom_checkpoint_0.pkl").write_bytes(spoil)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = {path.name: sha256(path) for path in folder.iterdir() if path.name != "manifest.json"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_a_run_goes_on_bit_for_bit_from_a_checkpoint_of_this_and_of_earlier_versions(whole, tmp_path):
    old = as_written_before(whole / "checkpoint-00000002", tmp_path / "old")
    for name, checkpoint in (("from_new", whole / "checkpoint-00000002"), ("from_old", old)):
        again = run(tmp_path / name, *STEPS, "--resume_from_checkpoint", str(checkpoint))
        assert_same_weights(weights(again), weights(whole))
        assert_same_weights(weights(again, averaged=False), weights(whole, averaged=False))


class Bomb:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_code_in_an_old_checkpoint_does_not_run(whole, tmp_path):
    old = as_written_before(whole / "checkpoint-00000002", tmp_path / "old", pickle.dumps(Bomb(tmp_path / "off")))
    with pytest.raises(SystemExit, match="custom_checkpoint_0.pkl of .*old holds more than tensors and numbers"):
        run(tmp_path / "run", *STEPS, "--resume_from_checkpoint", str(old))
    assert not (tmp_path / "off").exists()


# --- another length
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
# --------------------------------------------------------------------------------------------------


def test_a_finished_run_is_lengthened_with_the_learning_rate_planned_anew(whole, tmp_path, capsys):
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    run(folder, *STEPS, "--max_train_steps", "8", "--resume_from_checkpoint", "latest")
    said = capsys.readouterr().out
    assert (
        "the run has 8 steps now, and had 4: the learning rate is planned anew over all of them, from 0 to 0.01"
        in said
    )
    rates = [record["lr"] for record in metrics(folder)]
    # as logged after a step: the decay takes the last 30 % of the steps, one of four and two of
    # eight
    assert rates == pytest.approx([0.01] * 7 + [0.005])
    assert [record["step"] for record in metrics(folder)] == list(range(1, 9))
    assert (folder / "checkpoint-00000008").is_dir()


def test_a_checkpoint_past_the_end_is_refused(whole, tmp_path):
    with pytest.raises(SystemExit, match="is past the end of a run of 3 steps; give a larger max_train_steps"):
        run(tmp_path, *STEPS, "--max_train_steps", "3", "--resume_from_checkpoint", str(whole / "checkpoint-00000004"))
