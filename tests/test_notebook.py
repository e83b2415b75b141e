"""The notebook goes from a folder to a model on a Hub on loopback, cell after cell."""

import ast
import json
import re
import shlex
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from tests.launching import REPO, run_claims


NOTEBOOK = REPO / "docs" / "from_folder_to_hub.ipynb"
# Nothing else of a cell is touched.
CHANGED = {
    "--max_train_minutes 10": "--max_train_minutes 0.05 --num_sample_images 4 --ddpm_num_inference_steps 5",
    "range(300)": "range(40)",
    "(16, 16)": "(8, 8)",
    "rng.integers(7, 11)": "rng.integers(1, 4)",
    "--num_images 200": "--num_images 80 --num_inference_steps 5",
    "your-name/": "alice/",
}
RUN_COMMAND = """
import multiprocessing
def _command(*words):
    # In a fork, as a shell would run it in a process of its own.
    from hf_diffusion.cli import main
    child = multiprocessing.get_context("fork").Process(target=lambda: sys.exit(main(list(words))))
    child.start()
    child.join()
    assert child.exitcode == 0, words
"""


def cells() -> list[tuple[str, bool]]:
    """The code of the cells, and whether people run it by hand: to install and to log in."""
    found = json.loads(NOTEBOOK.read_text())["cells"]
    code = [cell for cell in found if cell["cell_type"] == "code"]
    return [("".join(cell["source"]), "by-hand" in cell["metadata"].get("tags", [])) for cell in code]


def as_python(cell: str) -> str:
    """A cell as Python runs it: `!hf-diffusion ...` is a call of the command."""
    return re.sub(r"^!hf-diffusion (.*)$", lambda line: f"_command(*{shlex.split(line[1])!r})", cell, flags=re.M)


def test_the_notebook_holds_no_outputs_and_its_cells_are_python_and_our_commands():
    assert all(not cell.get("outputs") for cell in json.loads(NOTEBOOK.read_text())["cells"])
    for code, by_hand in cells():
        if not by_hand:
            ast.parse(as_python(code))
    assert sum(by_hand for _, by_hand in cells()) == 2


@pytest.mark.slow
def test_the_cells_of_the_notebook_run_in_order(hub, tmp_path: Path):
    code = "\n".join(cell for cell, by_hand in cells() if not by_hand)
    for given, instead in CHANGED.items():
        assert given in code, f"the notebook no longer says {given!r}"
        code = code.replace(given, instead)
    code = as_python(code)
    env = {**hub.env("hf_alice_write"), "HF_UPDATE_DOWNLOAD_COUNTS": "0"}
    # The last line of the last cell shows a picture.
    claims = run_claims(f"{RUN_COMMAND}\n{code.rstrip()}.save('theirs.png')\nclaims['images'] = len(images)",
                        tmp_path, env, timeout=900)  # fmt: skip
    assert claims["images"] == 4 and (tmp_path / "theirs.png").is_file()
    there = HfApi(endpoint=hub.url, token="hf_alice_write")
    assert {tag.name for tag in there.list_repo_refs("alice/mine").tags} == {"v1"}
    assert "FD-80" in Path(there.hf_hub_download("alice/mine", "README.md", local_dir=tmp_path / "there")).read_text()
