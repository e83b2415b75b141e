"""The first lines of docs/sharing.md, pasted as they stand, with a user of the Hub on loopback."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image

from hf_diffusion import ADMUNet2DModel, ClassifierFreeGuidancePipeline, DDIMEtaScheduler, cli
from tests.cards.small import ADM
from tests.hub.test_push import lfs  # noqa: F401  (a fixture)
from tests.launching import run_claims


PAGE = Path(__file__).resolve().parents[2] / "docs" / "sharing.md"


@pytest.fixture
def trained(tmp_path) -> Path:
    """The folder that the lines speak of, as a training leaves it."""
    torch.manual_seed(0)
    unet = ADMUNet2DModel(**ADM, out_channels=1, num_class_embeds=10, null_class=True)
    pipe = ClassifierFreeGuidancePipeline(unet, DDIMEtaScheduler(), id2label={i: str(i) for i in range(10)})
    pipe.save_pretrained(tmp_path / "runs" / "digits")
    return tmp_path


def test_the_lines_on_sharing_work_as_pasted(lfs, trained, monkeypatch):  # noqa: F811
    section = PAGE.read_text().split("\n## ")[0].replace("your-name", "alice")
    commands = re.search(r"```bash\n(.*?)```", section, re.DOTALL)[1].splitlines()
    stock, installed = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    monkeypatch.chdir(trained)
    (command,) = [shlex.split(line, comments=True) for line in commands if line.startswith("hf-diffusion ")]
    assert cli.main(command[1:]) == 0
    # Diffusers alone, on another machine.
    elsewhere = trained / "elsewhere"
    elsewhere.mkdir()
    env = lfs.server.env("hf_alice_read", home=trained / "home")
    claims = run_claims(f"{stock}\nclaims['class'] = type(pipe).__module__", elsewhere, env, with_package=False)
    assert "hf_diffusion" not in claims["class"].split(".")
    with Image.open(elsewhere / "three.png") as picture:
        assert picture.size == (8, 8) and np.asarray(picture).std() > 0
    # This package, which runs none of the repository's code.
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(trained / "cache"))
    names = {}
    exec(installed, names)
    assert type(names["pipe"]) is ClassifierFreeGuidancePipeline and names["pipe"].num_classes == 10
    assert not list((trained / "cache").rglob("*.py"))
