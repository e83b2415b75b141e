"""A file or a folder is whole or not there, also where its writer was killed."""

import os
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from hf_diffusion.data.loading import load_data
from hf_diffusion.files import remove_partials, write_folder
from hf_diffusion.training import train_classifier
from tests import killed_writers
from tests.launching import forked
from tests.training.test_train_classifier import TINY


def killed(writer, *flags, log: Path) -> None:
    process = forked(writer, list(map(str, flags)), log)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL, log.read_text()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def age(folder: Path) -> None:
    """Let what is there be of two minutes ago."""
    for path in (folder, *folder.rglob("*")):
        os.utime(path, (time.time() - 120,) * 2)


def test_a_killed_writer_leaves_the_former_file_and_what_the_next_removes(tmp_path):
    (tmp_path / "set" / "a").mkdir(parents=True)
    (tmp_path / "set" / "a" / "one").write_text("old")
    (tmp_path / "set" / "file").write_text("old")
    killed(killed_writers.half_a_file, tmp_path / "set" / "file", log=tmp_path / "log")
    killed(killed_writers.half_a_folder, tmp_path / "set" / "a", log=tmp_path / "log")
    killed(killed_writers.half_a_folder, tmp_path / "set" / "b", log=tmp_path / "log")
    assert (tmp_path / "set" / "file").read_text() == "old" and (tmp_path / "set" / "a" / "one").read_text() == "old"
    assert {"a", "file"} == {name for name in names(tmp_path / "set") if not name.startswith(".")}
    assert len(names(tmp_path / "set")) == 4 and len(names(tmp_path / "set" / "a")) == 2
    # of another machine's process, perhaps
    remove_partials(tmp_path / "set")
    assert len(names(tmp_path / "set")) == 4
    age(tmp_path / "set")
    write_folder(tmp_path / "set" / "a", lambda folder: (folder / "two").write_text("new"), last="two")
    remove_partials(tmp_path / "set")
    assert names(tmp_path / "set") == ["a", "file"] and names(tmp_path / "set" / "a") == ["one", "two"]


def test_a_folder_appears_at_once_and_its_last_file_at_the_end(tmp_path, monkeypatch):
    def write(folder: Path) -> None:
        assert not (tmp_path / "new").exists()
        for name in ("a", "deep/index", "z"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("new")

    assert write_folder(tmp_path / "new", write, last="index") == tmp_path / "new"
    assert names(tmp_path) == ["new"] and names(tmp_path / "new") == ["a", "deep", "z"]
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "kept").write_text("old")
    replace, order = os.replace, []
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(Path(b).name), replace(a, b)))
    write_folder(tmp_path / "old", lambda folder: [(folder / n).write_text("") for n in "bca"], last="b")
    assert order[-1] == "b" and names(tmp_path / "old") == ["a", "b", "c", "kept"]
    with pytest.raises(ZeroDivisionError):
        write_folder(tmp_path / "old", lambda folder: 1 / (folder / "a").write_text(""), last="a")
    assert names(tmp_path / "old") == ["a", "b", "c", "kept"]


def test_tokens_of_a_killed_process_are_made_anew(tmp_path):
    cache = tmp_path / "cache"
    (tmp_path / "a.txt").write_text("a text of some length\n" * 9)
    killed(killed_writers.half_the_tokens, tmp_path / "a.txt", cache, log=tmp_path / "log")
    (left,) = names(cache)
    assert left.endswith(".partial")
    age(cache)
    data = load_data(train_data_dir=str(tmp_path / "a.txt"), cache_dir=cache, tokenizer="chars", sequence_length=16)
    assert data.tokenizer.decode(data.fetch([0], 0)["x_0"][0]) == "a text of some l"
    assert len(names(cache)) == 1 and left not in names(cache)


@pytest.mark.slow
def test_a_network_whose_saving_was_killed_is_not_there_and_the_run_goes_on(tmp_path):
    flags = [*TINY, "--output_dir", str(tmp_path / "run"), "--max_train_steps", "1"]
    killed(killed_writers.half_a_model, *flags, log=tmp_path / "log")
    assert not [name for name in names(tmp_path / "run") if name.endswith(("config.json", ".safetensors"))]
    assert train_classifier.main([*flags, "--resume_from_checkpoint", "latest"]) == 0
    (weights,) = (tmp_path / "run").glob("*.safetensors")
    assert load_file(weights) and not [name for name in names(tmp_path / "run") if name.startswith(".")]
