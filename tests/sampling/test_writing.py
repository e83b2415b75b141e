"""Pictures in the format that their name says, and a folder that holds one call's images alone."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_diffusion.config.options import UsageError
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


def test_a_folder_that_is_not_there_is_said_to_be_none_without_asking_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    with pytest.raises(ValueError, match="there is no folder 'runs/x', though 'runs' is one here"):
        find_index("runs/x")
