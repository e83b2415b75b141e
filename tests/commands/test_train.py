"""`hf-diffusion train`: families, help, mistakes, and the run that it starts."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
import yaml

from hf_diffusion.cli import main
from hf_diffusion.commands import train as train_command
from hf_diffusion.commands.script_settings import config_class
from hf_diffusion.commands.train import families
from hf_diffusion.config.options import settings
from hf_diffusion.config.publishing import STARTED_AS
from hf_diffusion.config.shared_options import DataOptions
from hf_diffusion.data.points import SHAPES
from hf_diffusion.data.sources import EMBEDDED
from tests.launching import ENVIRONMENT, REPO, run_claims
from tests.loop.test_start import png_folder


FAMILIES = sorted(families())
TINY = "--model_channels 8 --channel_mult 1 --num_res_blocks 1 --norm_num_groups 4 --num_head_channels 8".split()
SHORT = [*TINY, *"--train_batch_size 4 --ddpm_num_inference_steps 2 --num_sample_images 2".split()]
CHILD = """
import io, sys
from contextlib import redirect_stderr, redirect_stdout
from hf_diffusion.cli import main
from hf_diffusion.commands.script_settings import config_class
from hf_diffusion.commands.train import families
from hf_diffusion.config.options import settings

HEAVY = "torch numpy diffusers transformers accelerate huggingface_hub PIL datasets matplotlib".split()

def end(*words):
    said = io.StringIO()
    try:
        with redirect_stdout(said), redirect_stderr(said):
            main(["train", *words])
    except SystemExit as stopped:
        return stopped.code, said.getvalue(), [name for name in HEAVY if name in sys.modules]

claims["help"] = end("--help")
claims["no family"], claims["no such family"] = end(), end("ddmp")
claims["flag"] = end("ddpm", "--data", "x", "--max_train_step", "3")
claims["value"] = end("edm", "--max_train_minutes", "soon")
claims["processes"] = end("edm", "--num_processes", "0")
for name in families():
    claims[f"{name} --help"] = end(name, "--help")
    claims[f"{name} --help all"] = end(name, "--help", "all")
    cls = config_class(f"hf_diffusion.training.train_{name}")
    claims[name] = [cls.__name__, {option: repr(field.default) for option, field in settings(cls).items()}]
"""


@pytest.fixture(scope="module")
def claims():
    return run_claims(CHILD, anew=True)


def test_help_and_mistakes_load_nothing_heavy(claims):
    ends = {what: claim for what, claim in claims.items() if what not in FAMILIES}
    assert len(ends) == 6 + 2 * len(FAMILIES)
    assert {what: heavy for what, (_, _, heavy) in ends.items() if heavy} == {}


@pytest.mark.parametrize("family", FAMILIES)
def test_settings_that_are_read_without_torch_are_those_of_the_script(claims, family):
    cls = config_class(f"hf_diffusion.training.train_{family}")
    assert claims[family] == [cls.__name__, {option: repr(field.default) for option, field in settings(cls).items()}]


@pytest.mark.parametrize("family", FAMILIES)
def test_help_shows_about_twenty_settings_and_all_of_them_on_request(claims, family):
    (status, short, _), (_, whole, _) = claims[f"{family} --help"], claims[f"{family} --help all"]
    count = len(settings(config_class(f"hf_diffusion.training.train_{family}")))
    shown = [text.count("\n  --") for text in (short, whole)]
    assert status == 0 and 12 <= shown[0] <= 25 and shown[1] == count + 1, shown
    assert f"{count + 1 - shown[0]} more settings, in groups: --help all" in short
    assert short.startswith(f"usage: hf-diffusion train {family} [settings]\n")
    for flag in ("--data TEXT", "--output_dir TEXT, --output TEXT", "--max_train_minutes", "--preset"):
        assert flag in short and flag in whole


def test_a_mistake_is_one_sentence_with_status_2(claims):
    for what, sentence in {
        "no family": f"hf-diffusion train: give a family to train; choose from {', '.join(FAMILIES)}, as in",
        "no such family": "hf-diffusion train: there is no family 'ddmp'; choose from autoencoder, classifier, ",
        "flag": "hf-diffusion train ddpm: unknown flag --max_train_step; did you mean --max_train_steps?",
        "value": "hf-diffusion train edm: --max_train_minutes: got 'soon'; allowed: a number or none",
        "processes": "hf-diffusion train edm: num_processes: got 0; allowed: at least 1",
    }.items():
        status, said, _ = claims[what]
        assert status == 2 and said.startswith(sentence) and said.count("\n") == 1, said


def test_every_family_is_listed_with_what_it_trains(claims):
    for name, what in families().items():
        assert what and f"  {name}" in claims["help"][1] and what in claims["help"][1]


def test_a_folder_is_trained_on_and_the_card_tells_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    png_folder(tmp_path / "mine")
    words = ["train", "ddpm", "--data", "mine", "--output", "runs/mine", "--max_train_steps", "2", *SHORT]
    assert main(words) == 0 and STARTED_AS not in os.environ
    kept = yaml.safe_load((tmp_path / "runs/mine/config.yaml").read_text())
    assert (kept["train_data_dir"], kept["dataset_name"], kept["data"]) == ("mine", None, None)
    # The network's flags say what is trained.
    assert kept["preset"] is None
    assert "hf-diffusion train ddpm --data mine --output runs/mine" in (tmp_path / "runs/mine/README.md").read_text()
    with pytest.raises(SystemExit, match="^hf-diffusion train ddpm: output_dir runs/mine is not empty"):
        main(words)


@pytest.mark.parametrize(
    "data, sentence",
    {
        "./nowhere": "data './nowhere' is no folder or file here; give one, one of digits, eight_gaussians, ",
        "a/b/c": "data 'a/b/c' is no folder or file here",
        "digitz": "here; did you mean digits? Else give a path, one of digits, ",
        "image": "did you mean images? Else give a path",
        "images/cat": "did you mean images/cats? Else give a path",
        "me/images.zip": "data 'me/images.zip' is no folder or file here; give one",
        "mnist": "or user/name of a data set on the Hub; --dataset_name mnist asks the Hub for it all the same",
    }.items(),
)
def test_data_that_are_nowhere_are_said_to_be_at_once_with_what_is_near(tmp_path, capsys, data, sentence, monkeypatch):
    (tmp_path / "images" / "cats").mkdir(parents=True)
    (tmp_path / "my_images.zip").touch()
    monkeypatch.chdir(tmp_path)
    # before anything could ask a network
    monkeypatch.setattr(train_command, "importlib", None)
    with pytest.raises(SystemExit) as stopped:
        main(["train", "ddpm", "--data", data, "--output", str(tmp_path / "x"), "--max_train_steps", "1"])
    assert stopped.value.code == 2 and sentence in capsys.readouterr().err


def test_the_built_in_names_are_those_of_the_data():
    assert DataOptions.built_in == (*EMBEDDED, *SHAPES)


def test_data_names_a_path_before_a_name(tmp_path, monkeypatch):
    from tests.loop.test_start import parsed

    monkeypatch.chdir(tmp_path)
    named = [parsed("--data", name, "--max_train_steps", "1") for name in ("digits", "me/birds", "swiss_roll")]
    assert [config.dataset_name for config in named] == ["digits", "me/birds", "swiss_roll"]
    (tmp_path / "digits").mkdir()
    there = parsed("--data", "digits", "--max_train_steps", "1")
    assert (there.train_data_dir, there.dataset_name) == ("digits", None)
    over_file = parsed("--config", "digits.yaml", "--data", "me/birds")
    assert over_file.dataset_name == "me/birds"


@pytest.mark.slow
def test_two_processes_plan_the_same_length_and_end_on_time(tmp_path):
    command = [sys.executable, "-m", "hf_diffusion.cli", "train", "ddpm", "--num_processes", "2", "--data", "digits"]
    command += ["--output", "run", "--max_train_minutes", "0.1", "--sample_steps", "none", *SHORT]
    environment = {**ENVIRONMENT, "PYTHONPATH": str(REPO)}
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and "Traceback" not in done.stdout, done.stdout
    kept = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    spent = re.search(r"trained (\d+) steps in (\d+) s", done.stdout)
    assert int(spent[1]) == kept["max_train_steps"] and 4 <= int(spent[2]) <= 10, done.stdout


@pytest.mark.slow
def test_two_processes_stop_at_ctrl_c_and_say_how_to_go_on(tmp_path):
    png_folder(tmp_path / "mine")
    command = [sys.executable, "-m", "hf_diffusion.cli", "train", "ddpm", "--num_processes", "2", "--data", "mine"]
    command += ["--output", "run", "--max_train_steps", "100000", "--sample_steps", "none", *SHORT]
    environment = {**ENVIRONMENT, "PYTHONPATH": str(REPO)}
    with (tmp_path / "said").open("w") as said:
        child = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=said, stderr=said, start_new_session=True
        )
        log = tmp_path / "run/metrics.jsonl"
        deadline = time.monotonic() + 200
        while not log.exists() and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.5)
        os.killpg(child.pid, signal.SIGINT)
        child.wait(timeout=100)
    text = (tmp_path / "said").read_text()
    assert "everything is saved" in text and "Traceback" not in text, text
    assert "hf-diffusion train ddpm --num_processes 2 --config run/config.yaml --resume_from_checkpoint latest" in text
    assert list((tmp_path / "run").glob("checkpoint-*"))
