"""Pictures in the format that their name says, and a folder that holds one call's images alone."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_diffusion.config.options import UsageError
from hf_diffusion.files import remove_partials
from hf_diffusion.hub import loading
from hf_diffusion.hub.loading import find_index
from hf_diffusion.sampling.writing import write_images, write_picture


IMAGES = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)


@pytest.mark.parametrize("ending, form", [("png", "PNG"), ("jpg", "JPEG"), ("JPEG", "JPEG"), ("webp", "WEBP")])
def test_a_picture_has_the_format_of_its_name(tmp_path, ending, form):
    write_picture(Image.new("RGBA", (8, 8), (255, 0, 0, 255)), tmp_path / f"grid.{ending}")
    with Image.open(tmp_path / f"grid.{ending}") as picture:
        assert picture.format == form and abs(np.asarray(picture.convert("RGB"))[0, 0] - [255, 0, 0]).max() < 6


def test_a_name_without_a_format_is_refused(tmp_path):
    with pytest.raises(UsageError, match="grid.txt does not end in the name of a picture's format; use .png, .jpg"):
        write_picture(Image.new("L", (8, 8)), tmp_path / "grid.txt")


def test_images_of_an_earlier_longer_call_are_gone_and_files_of_the_user_stay(tmp_path):
    write_images(IMAGES, [0] * 5, tmp_path)
    write_images(IMAGES[:2], None, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["00000.png", "00001.png"]
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "00007.png").write_bytes(b"mine")
    write_images(IMAGES[:2], None, tmp_path)
    assert (tmp_path / "00007.png").read_bytes() == b"mine" and (tmp_path / "mine.txt").is_file()


def test_what_a_kill_has_left_is_removed_and_what_is_being_written_stays(tmp_path):
    ended = subprocess.run(["sh", "-c", "echo $$"], capture_output=True, text=True).stdout.strip()
    names = (f".a.png.{ended}.partial", f".b.png.{ended}.partial", f".c.png.{os.getpid()}.partial", ".mine.partial")
    old, young, own, users = (tmp_path / name for name in names)
    for path in (old, young, own, users):
        path.touch()
    for path in (old, own, users):
        os.utime(path, (0, 0))
    remove_partials(tmp_path, tmp_path / "nowhere")
    assert set(tmp_path.iterdir()) == {young, own, users}


def test_a_folder_that_is_not_there_is_taken_from_the_hub_or_said_to_be_none(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    index = tmp_path / "index.json"

    class Hub:
        """One repository, asked briefly."""

        def __init__(self, token):
            assert token is None

        def repo_info(self, repo_id, timeout):
            assert timeout <= 5
            if repo_id != "runs/there":
                raise OSError("no such repository")

    monkeypatch.setattr(loading, "HfApi", Hub)
    monkeypatch.setattr(loading, "hf_hub_download", lambda repo_id, name, **where: str(index))
    with pytest.raises(ValueError, match="there is no folder 'runs/x', though 'runs' is one here, and no repository"):
        find_index("runs/x")
    assert find_index("runs/there") == index
    assert "runs/there is taken from the Hub: 'runs' is a folder here, but does not hold it" in caplog.text


def test_the_folder_of_an_unfinished_run_says_how_far_it_has_come(tmp_path, caplog):
    for step in (5, 10):
        (tmp_path / f"checkpoint-{step:08}").mkdir()
        manifest = {"step": step, "total_steps": 20}
        (tmp_path / f"checkpoint-{step:08}" / "manifest.json").write_text(json.dumps(manifest))
    way_on = "by its command with --resume_from_checkpoint latest, to which --max_train_steps 10 adds that it ends"
    with pytest.raises(
        ValueError, match=f"holds no pipeline: its run has come to step 10 of 20; go on {way_on} there"
    ):
        find_index(tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    # ended at the newest checkpoint
    assert find_index(tmp_path) == tmp_path / "model_index.json" and not caplog.text
    os.utime(tmp_path / "model_index.json", (0, 0))
    assert find_index(tmp_path) == find_index(tmp_path) == tmp_path / "model_index.json"
    assert caplog.text.count("of an earlier end") == 1
    assert "the pipeline is of an earlier end; its run has come to step 10 of 20" in caplog.text
    caplog.clear()
    (tmp_path / "checkpoint-00000010" / "manifest.json").write_text(json.dumps({"step": 10, "total_steps": 10}))
    assert find_index(tmp_path) == tmp_path / "model_index.json" and not caplog.text
