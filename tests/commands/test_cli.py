"""The `hf-diffusion` command itself: help, exit status, what it loads before a command runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import hf_diffusion
from hf_diffusion.cli import COMMANDS, main
from tests.launching import run_claims


TRAINING = Path(__file__).resolve().parents[2] / "training"
# Measured by what is loaded, since clocks are noisy. Each entry is (exit status, what was said,
# heavy modules by now).
CHILD = """
import io, sys
from contextlib import redirect_stderr, redirect_stdout
from hf_diffusion.cli import COMMANDS, main

HEAVY = "torch numpy diffusers transformers accelerate huggingface_hub PIL datasets matplotlib".split()

def end(*words):
    said = io.StringIO()
    try:
        with redirect_stdout(said), redirect_stderr(said):
            main(words)
    except SystemExit as stopped:
        return stopped.code, said.getvalue(), [name for name in HEAVY if name in sys.modules]

claims["--help"], claims["--version"] = end("--help"), end("--version")
claims["none"], claims["unknown"] = end(), end("trian")
claims["wrong flag"] = end("sample", "folder", "--num_image", "3")
claims["wrong value"] = end("sample", "folder", "--num_images", "many")
for name in COMMANDS:
    claims[name] = end(name, "--help")
"""


@pytest.fixture(scope="module")
def claims():
    return run_claims(CHILD, anew=True)


def test_nothing_heavy_is_loaded_before_a_command_runs(claims):
    assert len(claims) == 6 + len(COMMANDS)
    assert {what: heavy for what, (_, _, heavy) in claims.items() if heavy} == {}


def test_help_lists_the_commands_and_each_has_a_help_of_its_own_with_defaults(claims):
    status, said, _ = claims["--help"]
    assert status == 0
    for name, command in COMMANDS.items():
        assert f"    {name}" in said and command.__doc__.splitlines()[0].strip() in " ".join(said.split())
        status, own, _ = claims[name]
        if "parsed" in vars(command):
            assert status == 0 and own.startswith(f"usage: hf-diffusion {name} FAMILY"), own
            continue
        assert status == 0 and own.startswith(f"usage: hf-diffusion {name} ") and "(default: " in own
        assert "--config FILE" in own and "--traceback" in own


def test_version_is_that_of_the_package(claims):
    assert claims["--version"][:2] == [0, f"hf_diffusion {hf_diffusion.__version__}\n"]


def test_a_wrong_command_line_is_one_sentence_and_status_2(claims):
    sentences = {
        "none": "hf-diffusion: the following arguments are required: command",
        "unknown": "invalid choice: 'trian' (choose from ",
        "wrong flag": "hf-diffusion sample: unknown flag --num_image; did you mean --num_images?",
        "wrong value": "hf-diffusion sample: --num_images: got 'many'; allowed: a whole number or none",
    }
    for what, sentence in sentences.items():
        status, said, _ = claims[what]
        assert status == 2 and sentence in said and said.count("\n") == 1, said


def test_the_traceback_is_shown_on_request(folders):
    assert main(["sample", str(folders)]) == 1
    with pytest.raises(ValueError, match="holds no pipeline"):
        main(["sample", str(folders), "--traceback"])


READERLESS = """
import os, subprocess, sys
@claim
def ended():
    found = {}
    for what in ("help", "sentence", "training", "socket"):
        reader, writer = os.pipe()
        os.close(reader)
        words = [sys.executable, "-c", os.environ["SCRIPT"], what]
        output = subprocess.DEVNULL if what == "socket" else writer
        done = subprocess.run(words, stdout=output, stderr=subprocess.PIPE, text=True, timeout=100)
        os.close(writer)
        found[what] = done.returncode, done.stderr
    return found
"""
SCRIPT = """
import sys
from hf_diffusion.cli import COMMANDS, main
from hf_diffusion.config.closed_output import ending_with_its_reader
what = sys.argv[1]
class Other:
    traceback = False
    def run(self):
        if what == "sentence":
            raise ValueError("no such folder")
        raise BrokenPipeError("of a connection")
if what == "training":
    with ending_with_its_reader():
        for _ in range(10_000):
            print("step")
if what != "help":
    COMMANDS["info"].parsed = lambda *_: Other()
sys.exit(main(["train", "--help"] if what == "help" else ["info", "here"]))
"""


def test_a_command_whose_reader_has_gone_ends_silently_and_tells_of_its_own_mistakes():
    ended = run_claims(READERLESS, env={"SCRIPT": SCRIPT})["ended"]
    assert ended["help"] == ended["training"] == [141, ""]
    assert ended["sentence"] == [1, "hf-diffusion info: no such folder\n"]
    # one that is not of its reader is no reason to be silent
    assert ended["socket"] == [1, "hf-diffusion info: of a connection\n"]


@pytest.mark.parametrize("script", ["study_families", "study_fashion_mnist", "hub_job"])
def test_the_studies_and_the_job_end_silently_with_their_reader_too(script):
    reader, writer = os.pipe()
    os.close(reader)
    words = [sys.executable, str(TRAINING / f"{script}.py"), "--help"]
    # argparse is silent where it writes at once, and says nothing of it
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=100, env=buffered)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_an_interrupted_command_ends_with_status_130(monkeypatch, capsys):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(COMMANDS["info"], "run", interrupted)
    assert main(["info", "folder"]) == 130
    assert capsys.readouterr().err == "hf-diffusion: interrupted\n"


def test_a_notebook_s_own_backend_of_figures_need_not_be_installed(tmp_path):
    child = "from hf_diffusion.cli import main\nmain(['skill', 'here'])\nimport matplotlib\n"
    child += "claims['backend'] = matplotlib.get_backend()"
    assert run_claims(child, tmp_path, {"MPLBACKEND": "module://of_a_notebook"})["backend"] == "agg"
