"""What the page of a run reads out of its folder."""

import json
import os

import pytest


pytest.importorskip("gradio", reason="gradio is missing: pip install 'hf-diffusion[space]'")

from hf_diffusion.space.watch import MOST_POINTS, Run, left


def log(folder, *records) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def test_the_time_left_comes_from_the_steps_that_were_seen(tmp_path):
    (tmp_path / "config.yaml").write_text("max_train_steps: 1000\n")
    run = Run(tmp_path)
    assert run.says() == f"Nothing is logged yet in {tmp_path}."
    log(tmp_path, {"step": 100, "loss": 0.5, "loss_q0": 2.0, "images_per_second": 40.0})
    os.utime(tmp_path / "metrics.jsonl", (1000, 1000))
    assert run.says() == "**Step 100** of 1,000 · loss 0.5 · 40 samples/s · time left is known after the next record"
    log(tmp_path, {"step": 200, "loss": 0.25, "images_per_second": 40.0}, {"step": 200, "eval_loss": 0.3})
    os.utime(tmp_path / "metrics.jsonl", (1060, 1060))
    assert run.says().endswith("eval_loss 0.3 · loss 0.25 · 40 samples/s · about 8 min left")
    log(tmp_path, {"step": 1000, "loss": 0.1})
    assert run.says().endswith("finished")
    assert left(3600 * 2 + 60) == "about 2 h 1 min left"


def test_the_curve_has_every_loss_but_those_of_quarters_and_no_more_points_than_a_browser_draws(tmp_path):
    log(tmp_path, *({"step": step, "loss": 1 / step, "loss_q1": 3.0, "lr": 0.1} for step in range(1, 2002)))
    curve = Run(tmp_path).losses()
    assert set(curve.quantity) == {"loss"} and len(curve) <= MOST_POINTS
    assert curve.step.iloc[-1] == 2001 and curve.step.is_monotonic_increasing


def test_the_newest_grid_is_that_of_the_last_step_and_of_the_averaged_weights(tmp_path):
    (tmp_path / "samples").mkdir()
    assert Run(tmp_path).newest_grid() is None
    for name in ("raw-00000100", "ema-00000100", "raw-00000050", "nearest"):
        (tmp_path / "samples" / f"{name}.png").touch()
    assert Run(tmp_path).newest_grid().endswith("ema-00000100.png")
