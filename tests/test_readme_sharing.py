"""The README's ten lines on sharing, pasted as they stand into new processes, with the name of a user of the Hub on loopback."""

import re
import shlex
from pathlib import Path

import numpy as np
from PIL import Image

from hf_diffusion import cli
from tests.pipelines.test_loading import run_child
from tests.test_push import lfs  # noqa: F401  (a fixture)
from tests.training.test_train_ddpm import run


README = Path(__file__).resolve().parents[1] / "README.md"


def test_the_lines_on_sharing_work_as_pasted(lfs, tmp_path, monkeypatch):  # noqa: F811
    section = README.read_text().split("\n## Share\n")[1].split("\n## ")[0].replace("your-name", "alice")
    commands = re.search(r"```bash\n(.*?)```", section, re.DOTALL)[1].splitlines()
    stock, installed = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    run(tmp_path / "runs" / "digits", "--max_train_steps", "2")
    (command,) = [shlex.split(line, comments=True) for line in commands if line.startswith("hf-diffusion ")]
    assert cli.main(command[1:]) == 0
    run_child(stock, tmp_path, lfs.server.env("hf_alice_read", home=tmp_path / "one"), "absent")
    with Image.open(tmp_path / "elsewhere" / "three.png") as picture:
        assert picture.size == (8, 8) and np.asarray(picture).std() > 0
    code = installed + "\nseen['module'] = type(pipe).__module__"
    seen = run_child(code, tmp_path, lfs.server.env("hf_alice_read", home=tmp_path / "two"), "present")
    assert seen["module"].startswith("hf_diffusion.")
