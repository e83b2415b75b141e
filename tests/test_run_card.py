"""The card of a training run: what a run records about itself, also when it was interrupted, and its pictures."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from hf_diffusion import ClassifierFreeGuidancePipeline, run_card, training_run
from hf_diffusion.card_pictures import GUIDANCE_SCALES, _nearest_grid
from hf_diffusion.evaluation.sampling import draw
from hf_diffusion.figures import labelled_grid
from hf_diffusion.run_card import launch_command
from tests.training.test_sharing import stop_after
from tests.training.test_train_ddpm import run


def test_the_command_on_the_card_starts_as_many_processes():
    def on(processes: int, device: str) -> str:
        accelerator = SimpleNamespace(num_processes=processes, device=torch.device(device))
        return launch_command(accelerator, ["train_x.py", "--split", "train[:80%]"])

    assert on(1, "cpu") == "accelerate launch training/train_x.py --split 'train[:80%]'"
    assert on(8, "cuda").startswith("accelerate launch --multi_gpu --num_processes 8 training/train_x.py")
    assert on(2, "cpu").startswith("ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 ")


class TenJoules:
    """A meter that has counted as much at every look."""

    def __init__(self, gpus: int):
        pass

    def joules(self) -> dict[str, float]:
        return {"CPU packages (RAPL)": 10.0 * 3.6e6}


def test_wall_time_and_energy_of_an_interrupted_run_are_those_of_all_its_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(training_run, "EnergyMeter", TenJoules)
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        run(tmp_path, "--max_train_steps", "6")
    first = json.loads((tmp_path / "checkpoint-00000004" / "manifest.json").read_text())["spent"]
    assert first["joules"] == TenJoules(0).joules() and first["wall_time"] > 0
    (manifest,) = [tmp_path / "checkpoint-00000004" / "manifest.json"]
    content = json.loads(manifest.read_text())
    content["spent"]["wall_time"] = 3600.0  # as if it had taken an hour
    manifest.write_text(json.dumps(content))
    run(tmp_path, "--max_train_steps", "6", "--resume_from_checkpoint", "latest")
    card = (tmp_path / "README.md").read_text()
    assert "| wall time | 1 h 0 min |" in card and "| energy | 20 kWh CPU packages (RAPL) |" in card
    assert "| images seen | 48 |" in card


def test_a_source_of_energy_that_a_part_of_the_run_could_not_read_is_left_out(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        patch.setattr(training_run, "EnergyMeter", lambda gpus: SimpleNamespace(joules=dict))
        run(tmp_path, "--max_train_steps", "6")
    monkeypatch.setattr(training_run, "EnergyMeter", TenJoules)
    run(tmp_path, "--max_train_steps", "6", "--resume_from_checkpoint", "latest")
    assert "| energy |" not in (tmp_path / "README.md").read_text()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return run(tmp_path_factory.mktemp("trained"), "--max_train_steps", "3")


def test_the_card_shows_guidance_and_nearest_images_and_says_what_was_measured(trained):
    card = (trained / "README.md").read_text()
    shown = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", card)
    assert shown == ["samples/ema-00000003.png", "samples/guidance.png", "loss_curve.png", "samples/nearest.png"]
    assert all((trained / name).is_file() for name in shown)
    assert "to the nearest of 64 training images" in card and "From each of 10 samples" in card
    assert "steps 2" in card and "the classes 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 from left to right" in card
    assert "Classifier-Free Diffusion Guidance" in card and "Licence of the training data: cc-by-4.0" in card
    assert not re.search(r"TODO|\bNone\b|\bnan\b", re.sub(r"```yaml.*?```", "", card, flags=re.DOTALL))


def test_the_rows_of_the_picture_of_guidance_are_what_the_pipeline_draws_with_these_scales(trained):
    pipe = ClassifierFreeGuidancePipeline.from_pretrained(trained)
    rows = [draw(pipe, range(10), range(10), num_inference_steps=2, guidance_scale=w) for w in GUIDANCE_SCALES]
    expected = labelled_grid(np.concatenate(rows), 10, ["w = 1", "w = 1.5", "w = 2", "w = 4"])
    with Image.open(trained / "samples" / "guidance.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture), np.asarray(expected))


def test_pairs_stand_one_above_the_other_the_nearest_first(tmp_path):
    samples = np.arange(12, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 1), dtype=np.uint8)
    _nearest_grid(samples, samples + 100, np.arange(12)[::-1].astype(float), tmp_path / "x.png")
    ten, two = samples[:1:-1], samples[1::-1]
    white = np.full((8, 8, 8, 1), 255, dtype=np.uint8)
    parts = np.concatenate([ten, ten + 100, two, white, two + 100, white])
    expected = labelled_grid(parts, 10, ["samples", "training data"] * 2)
    with Image.open(tmp_path / "x.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture), np.asarray(expected))


def test_pictures_that_cannot_be_drawn_cost_a_warning_and_not_the_card(tmp_path, monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(run_card, "draw_pictures", fail)
    run(tmp_path, "--max_train_steps", "2")
    assert "the card does without pictures" in caplog.text and "out of memory" in caplog.text
    assert "has not been measured, unless a result" in (tmp_path / "README.md").read_text()
