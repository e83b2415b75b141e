"""A made-up family goes the whole way to the Hub, though no file of the package knows it."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hf_diffusion import cli
from hf_diffusion.data.loading import LOADERS
from tests.family import flips
from tests.hub.test_push import connect
from tests.training.interruptions import stop_after


ROOT = Path(__file__).resolve().parents[2]
SHORT = """
    --max_train_steps 60 --train_batch_size 32 --gradient_accumulation_steps 2 --learning_rate 0.01 --ema_max_decay 0.9
    --logging_steps 20 --eval_steps 20 --sample_steps 40 --checkpointing_steps 20 --best_metric eval_right
""".split()


@pytest.fixture(scope="module", autouse=True)
def signs_are_data():
    """A kind of data of one's own is a name for `--dataset_name`."""
    LOADERS["signs"] = flips.make_data
    yield
    del LOADERS["signs"]


def train(folder: Path, *flags: str) -> Path:
    assert flips.main([*SHORT, "--output_dir", str(folder), *flags]) == 0
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("flips") / "signs")


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "network" / "diffusion_pytorch_model.safetensors")


def test_no_file_of_the_package_knows_it():
    words = re.compile(r"flip(s\b|network|scheduler|pipeline)", re.IGNORECASE)
    files = [f for room in ("hf_diffusion", "pipelines", "training") for f in sorted((ROOT / room).rglob("*.py"))]
    assert len(files) > 90 and not [file for file in files if words.search(file.read_text())]


def test_it_trains_and_the_loss_is_sorted_by_its_own_levels(finished):
    log = [r for r in records(finished) if "loss" in r]
    assert log[-1]["loss"] < log[0]["loss"] < 0.7
    # with nearly all signs wrong there is nothing to know, with few wrong nearly all
    assert log[-1]["loss_q3"] > 0.6 > 0.35 > log[-1]["loss_q0"]


def test_its_held_out_loss_is_the_trainings_own_and_says_which_way_is_better(finished):
    measured = [r for r in records(finished) if "protocol" in r]
    assert [r["step"] for r in measured] == [20, 40, 60]
    assert measured[-1]["eval_loss"] < measured[0]["eval_loss"]
    best = json.loads((finished / "best" / "best.json").read_text())
    assert best["better"] == "higher" and best["value"] == max(r["eval_right"] for r in measured)


def test_it_goes_on_bit_for_bit_where_it_was_interrupted(finished, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 33)
        train(tmp_path)
    assert not (tmp_path / "model_index.json").exists()
    train(tmp_path, "--resume_from_checkpoint", "latest")
    ours, whole = weights(tmp_path), weights(finished)
    assert ours.keys() == whole.keys() and all(torch.equal(ours[name], whole[name]) for name in whole)


def test_every_setting_of_its_own_is_tied_to_the_checkpoint(finished, capsys):
    for flag, value in (("highest", "0.5"), ("width", "16")):
        with pytest.raises(SystemExit, match=f"belongs to another run: .*{flag} was"):
            train(finished, "--resume_from_checkpoint", "latest", f"--{flag}", value)


def test_it_is_sampled_as_its_pipeline_says_and_other_options_are_refused(finished, tmp_path, capsys):
    npz = tmp_path / "signs.npz"
    words = ["sample", str(finished), "--num_images", "5", "--npz", str(npz)]
    assert cli.main([*words, "--set", "rounds=3"]) == 0
    samples = np.load(npz)
    (name,) = samples.files
    assert samples[name].shape == (5, 7) and set(np.unique(samples[name])) <= {-1.0, 1.0}
    assert cli.main([*words, "--num_inference_steps", "3"]) == 2
    assert "FlipPipeline does not take it" in capsys.readouterr().err
    assert cli.main([*words, "--scheduler", "ddim"]) == 2
    assert "FlipScheduler" in capsys.readouterr().err


def test_it_is_measured_by_what_it_says_and_refused_the_rest_in_a_sentence(finished, tmp_path, capsys):
    words = ["evaluate", str(finished), "--output_dir", str(tmp_path), "--model_images", "200"]
    assert cli.main([*words, "--metrics", "agreement"]) == 0
    found = json.loads((tmp_path / "metrics.json").read_text())["model"][0]["measures"]["agreement"]
    pipe = flips.FlipPipeline.from_pretrained(finished)
    signs = pipe(200, generator=[torch.Generator().manual_seed(seed) for seed in range(200)])[0]
    # coins agree at one half of the places
    assert found["value"] == pytest.approx((signs[:, 1:] == signs[:, :-1]).mean()) and found["value"] > 0.6
    assert found["better"] == "higher"
    assert "neighbours that agree" in capsys.readouterr().out
    assert cli.main([*words, "--metrics", "bpd"]) in (1, 2)
    said = capsys.readouterr().err
    assert "bpd" in said and "agreement" in said and "Traceback" not in said


def test_its_card_has_its_own_papers_and_an_example_that_runs(finished):
    card = (finished / "README.md").read_text()
    assert "Signs and Coins" in card and "Structured Denoising" in card
    assert not re.search(r"DDPM|Denoising Diffusion Probabilistic|diffusion model|ADM|image", card.split("## ")[0])
    assert "Dhariwal" not in card and "model of signs" in card
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    code = re.sub(r"from_pretrained\(\s*\"[^\"]*\"", f'from_pretrained("{finished}"', code)
    scope: dict = {}
    exec(code, scope)
    assert scope["pipe"].__class__.__name__ == "FlipPipeline"


def test_it_is_pushed_to_the_hub_and_loaded_back(hub, tmp_path, monkeypatch, finished):
    api = connect(hub, monkeypatch)
    train(tmp_path, "--push_to_hub", "--hub_model_id", "alice/signs")
    files = set(api.list_repo_files("alice/signs"))
    assert {"README.md", "model_index.json", "flips.py", "network/flips.py", "scheduler/flips.py"} <= files
    pipe = flips.FlipPipeline.from_pretrained("alice/signs")
    ours = weights(finished)
    assert all(torch.equal(value, ours[name]) for name, value in pipe.network.state_dict().items())
