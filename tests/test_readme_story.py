"""The README's story, typed in order in a clean clone by somebody with a folder of images.

Each command and each piece of Python is taken from the README as it stands, but for what stands in
CHANGED: a minute of training would be too long, and the name of the user is not ours.
"""

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.launching import REPO, run_claims


STORY = (REPO / "README.md").read_text().split("\n## From a folder to the Hub\n")[1].split("\n## ")[0]
# Nothing else of the story is touched.
CHANGED = {
    "--max_train_minutes 20": "--max_train_minutes 0.05 --num_sample_images 4 --ddpm_num_inference_steps 5",
    "your-name/": "alice/",
}
# tests/test_wheel.py installs the package; the token is in the environment.
NOT_TYPED = {"pip install -e .", "hf auth login"}
BLOCK = re.compile(r"```(bash|python)\n(.*?)```", re.DOTALL)


@pytest.fixture
def clone(tmp_path) -> Path:
    """What git tracks, and beside it the reader's own images: two classes of 8 x 8 pixels."""
    folder = tmp_path / "clone"
    others = (".git", ".venv", "runs", "build", "tests", "__pycache__", "*.egg-info", "fashion_mnist*", ".*_cache")
    shutil.copytree(REPO, folder, symlinks=True, ignore=shutil.ignore_patterns(*others))
    rng = np.random.default_rng(0)
    for name, rows in (("bright_above", slice(0, 4)), ("bright_below", slice(4, 8))):
        (folder / "my_images" / name).mkdir(parents=True)
        for i in range(40):
            pixels = rng.integers(0, 80, (8, 8), dtype=np.uint8)
            pixels[rows] += np.uint8(150)
            Image.fromarray(pixels).save(folder / "my_images" / name / f"{i}.png")
    return folder


def typed(line: str) -> str:
    """A child's program that does what the shell would do with `hf-diffusion ...`."""
    program, *words = shlex.split(line)
    assert program == "hf-diffusion", f"the README types {line!r}, which this test does not know how to type"
    return f"from hf_diffusion.cli import main\nassert main({words!r}) == 0"


@pytest.mark.slow
def test_the_story_of_the_readme_works_as_pasted_in_order_in_a_clean_clone(hub, clone):
    text = STORY
    for given, instead in CHANGED.items():
        assert given in text, f"the README no longer says {given!r}"
        text = text.replace(given, instead)
    env = {**hub.env("hf_alice_write"), "HF_UPDATE_DOWNLOAD_COUNTS": "0"}
    ours = f"sys.path.insert(0, {str(clone)!r})\n"
    for language, block in BLOCK.findall(text):
        if language == "python":
            # What names the package needs it; the other reader has diffusers alone.
            with_package = "hf_diffusion" in block
            run_claims((ours if with_package else "") + block, clone, env, with_package, timeout=600)
            continue
        for line in block.replace("\\\n", " ").splitlines():
            if line and line not in NOT_TYPED:
                run_claims(ours + typed(line), clone, env, timeout=600)
    for picture in ("mine.png", "eight_calls.png", "first.png", "theirs.png"):
        with Image.open(clone / picture) as image:
            assert np.asarray(image).std() > 0, picture
    card = (clone / "runs" / "mine" / "README.md").read_text()
    assert "FD-200" in card and "precision" in card.lower()
