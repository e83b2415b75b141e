"""The folder of a run: what is kept, moved aside, removed and refused, and when."""

import fcntl
import os
from pathlib import Path

import pytest
from PIL import Image

from hf_diffusion.loop import continuation
from hf_diffusion.loop.checkpoints import list_checkpoints, read_manifest
from hf_diffusion.loop.output_folder import FORMER, claimed
from tests.training.test_train_ddpm import assert_same_weights, metrics, run, weights


STEPS = ["--max_train_steps", "4", "--checkpointing_steps", "2", "--logging_steps", "1"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return run(tmp_path_factory.mktemp("run") / "whole", *STEPS)


@pytest.fixture
def finished(whole, tmp_path) -> Path:
    """A copy of a finished run, to be spoilt."""
    os.system(f"cp -r {whole} {tmp_path}/run")
    return tmp_path / "run"


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "mistake",
    [
        ("--dataset_name", "none", "--train_data_dir", "/nowhere/at/all"),
        ("--norm_num_groups", "3"),
        ("--best_metric", "eval_los"),
        ("--eval_split", "no_such_split"),
        ("--max_train_samples", "0"),
    ],
)
def test_overwriting_with_a_mistake_deletes_nothing(finished, mistake):
    before = content(finished)
    with pytest.raises(SystemExit):
        run(finished, *STEPS, "--overwrite_output_dir", *mistake)
    assert content(finished) == before


def test_an_overwritten_run_is_dropped_when_the_new_one_has_its_first_checkpoint(finished, monkeypatch):
    (finished / "logs").mkdir()
    (finished / "logs" / "events.old").touch()
    seen = []
    save = continuation.save_checkpoint

    def look(accelerator, output_dir, step, *rest):
        seen.append((step, (output_dir / FORMER / "checkpoint-00000004").exists(), (output_dir / "unet").exists()))
        return save(accelerator, output_dir, step, *rest)

    monkeypatch.setattr(continuation, "save_checkpoint", look)
    run(finished, *STEPS, "--overwrite_output_dir", "--seed", "5")
    # the former model goes with the former checkpoints
    assert seen == [(2, True, False), (4, False, False)]
    assert not (finished / FORMER).exists() and not (finished / "logs").exists()
    assert [record["step"] for record in metrics(finished)] == [1, 2, 3, 4]
    assert {read_manifest(folder)["seed"] for folder in list_checkpoints(finished)} == {5}


def test_a_run_is_back_where_the_one_that_replaced_it_ended_before_its_first_checkpoint(
    finished, whole, monkeypatch, capsys
):
    def killed(*_):
        raise KeyboardInterrupt

    before = content(finished)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(continuation, "save_checkpoint", killed)
        run(finished, *STEPS, "--overwrite_output_dir", "--seed", "5")
    assert not list_checkpoints(finished) and len(metrics(finished)) < 4
    with pytest.raises(SystemExit, match="is not empty"):
        run(finished, *STEPS)
    assert content(finished) == before
    assert "the run that was to be overwritten is back" in capsys.readouterr().out


def test_going_on_wins_over_beginning_anew(finished, whole):
    run(finished, *STEPS, "--overwrite_output_dir", "--resume_from_checkpoint", "checkpoint-00000002")
    assert_same_weights(weights(finished), weights(whole))


def test_a_folder_with_nothing_but_the_preview_of_a_dry_run_is_new(tmp_path):
    run(tmp_path, *STEPS, "--dry_run")
    assert [path.name for path in tmp_path.iterdir()] == ["data_preview.png"]
    run(tmp_path, *STEPS)
    assert len(list_checkpoints(tmp_path)) == 2
    assert Image.open(tmp_path / "data_preview.png").size[0] > 100


def test_a_second_run_into_one_folder_is_refused_and_a_dead_one_holds_nothing(tmp_path):
    child = os.fork()
    if child == 0:
        # dies with the lock in its hands
        context = claimed(tmp_path)
        context.__enter__()
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not list(tmp_path.iterdir())
    with (
        claimed(tmp_path),
        pytest.raises(SystemExit, match=f"another run is at work in output_dir {tmp_path}; let it"),
    ):
        run(tmp_path, *STEPS)
    assert not list(tmp_path.iterdir())
    run(tmp_path, *STEPS)
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(handle)


def test_what_kills_have_left_is_removed_by_the_next_start(finished, whole):
    for name in (".saving-1f", ".checkpoint-00000007.partial", "outbox/.staging"):
        (finished / name).mkdir(parents=True)
        (finished / name / "half").touch()
    for name in (
        ".config.yaml.8",
        ".config.yaml.8.partial",
        ".8.loss_curve.png",
        ".writable.8",
        "samples/.ema-1.png.8.partial",
    ):
        (finished / name).touch()
    # killed between the two renames of a checkpoint that was saved again
    (finished / "checkpoint-00000004").rename(finished / ".checkpoint-00000004.replaced")
    run(finished, *STEPS, "--resume_from_checkpoint", "latest")
    assert not list(finished.rglob(".*"))
    assert_same_weights(weights(finished), weights(whole))


@pytest.mark.parametrize(
    "card, sentence",
    [
        (b"---\ntags:\n\t- a\n---\n", "the metadata of .*README.md are not valid YAML"),
        (b"---\na: b: c\n---\n", "the metadata of .*README.md are not valid YAML"),
        ("---\nname: Köln\n---\n".encode("latin-1"), "README.md is not text in UTF-8"),
    ],
)
def test_a_card_that_cannot_be_renewed_is_met_at_the_start(finished, card, sentence):
    (finished / "README.md").write_bytes(card)
    for how in (["--overwrite_output_dir"], ["--resume_from_checkpoint", "latest"]):
        with pytest.raises(SystemExit, match=sentence):
            run(finished, *STEPS, *how)
    assert len(list_checkpoints(finished)) == 2


def test_a_card_that_is_spoilt_while_the_run_trains_costs_neither_run_nor_text(tmp_path, monkeypatch, capsys):
    spoilt = b"---\na: b: c\n---\n"
    save = continuation.save_checkpoint

    def spoil(accelerator, output_dir, *rest):
        (output_dir / "README.md").write_bytes(spoilt)
        return save(accelerator, output_dir, *rest)

    monkeypatch.setattr(continuation, "save_checkpoint", spoil)
    run(tmp_path, *STEPS)
    assert (tmp_path / "README.unreadable.md").read_bytes() == spoilt
    assert "## Reproduce" in (tmp_path / "README.md").read_text()
    assert "it is README.unreadable.md now" in capsys.readouterr().out
