"""Curves: what is recorded is drawn, once, under its right name."""

import json

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from hf_diffusion.figures import curves as figures
from hf_diffusion.figures.curves import (
    ADVERSARIAL_PANELS,
    LOSS_PANELS,
    Panel,
    adversarial_curve,
    loss_curve,
    plot_curves,
)


def write_metrics(folder, lines):
    path = folder / "metrics.jsonl"
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def test_a_curve_of_a_whole_run_is_drawn_and_nothing_half_written_is_left(tmp_path):
    quarters = {f"loss_q{quarter}": 0.1 * (quarter + 1) for quarter in range(4)}
    records = [{"step": step, "loss": 0.2 + 1 / step, "lr": 1e-3, **quarters} for step in range(1, 200)]
    path = loss_curve(write_metrics(tmp_path, records), tmp_path / "loss.png")
    with Image.open(path) as picture:
        assert picture.width >= 800
        assert np.asarray(picture.convert("L")).min() < 64  # something dark was drawn on the white
    assert sorted(file.name for file in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]


@pytest.mark.parametrize(
    "records",
    [
        [{"step": 1, "loss": 0.5}],
        [{"step": 1, "loss": 0.5, "lr": 1e-3}, '{"step": 2, "lo'],
        [{"step": step, "loss": -float(step)} for step in range(1, 9)],
        [{"step": step, "loss": 0.0, "loss_q3": 1.0} for step in range(1, 9)],
        [
            {"step": 1, "loss": float("nan"), "loss_q0": None},
            {"step": 2, "loss": 1.0, "loss_q0": "x", "lr": float("inf")},
        ],
    ],
)
def test_runs_with_one_point_negative_losses_missing_or_odd_values_are_drawn(tmp_path, records):
    assert loss_curve(write_metrics(tmp_path, records), tmp_path / "loss.png").is_file()


@pytest.mark.parametrize(
    "lines", [[], [{"step": 1, "lr": 1e-3}], [{"step": 1, "loss": float("nan")}], ["[1]\n", "null\n", "\0"]]
)
def test_without_a_loss_nothing_is_drawn(tmp_path, lines):
    assert loss_curve(write_metrics(tmp_path, lines), tmp_path / "loss.png") is None
    assert loss_curve(tmp_path / "nowhere.jsonl", tmp_path / "loss.png") is None
    assert not (tmp_path / "loss.png").exists()


def test_steps_that_a_resumed_run_repeated_count_once_with_their_last_values(tmp_path):
    first = [{"step": step, "loss": 1.0} for step in (100, 200, 300, 400)]
    resumed = [{"step": step, "loss": 2.0} for step in (250, 350)]
    steps, losses = figures.series(figures.read_metrics(write_metrics(tmp_path, first + resumed)), "loss")
    assert steps.tolist() == [100, 200, 250, 350] and losses.tolist() == [1.0, 1.0, 2.0, 2.0]


def test_what_was_measured_at_a_step_stands_beside_the_training_loss_of_that_step(tmp_path):
    records = [
        {"step": 100, "loss": 1.0},
        {"step": 100, "eval_loss": 2.0, "protocol": {"count": 3}},
        {"step": 200, "loss": 0.5},
    ]
    read = figures.read_metrics(write_metrics(tmp_path, records))
    assert [r["step"] for r in read] == [100, 200] and (read[0]["loss"], read[0]["eval_loss"]) == (1.0, 2.0)
    quarters = {f"eval_loss_q{quarter}": 1.0 + quarter for quarter in range(4)}
    drawn = []
    for extra in ({}, {"eval_loss": 2.0}, {"eval_loss": 2.0, **quarters}):
        path = write_metrics(tmp_path, [{"step": step, "loss": 1.0 / step, **extra} for step in (1, 2, 3)])
        with Image.open(loss_curve(path, tmp_path / "loss.png")) as picture:
            drawn.append(np.asarray(picture.convert("RGB")).copy())
    assert (drawn[0].shape != drawn[1].shape or (drawn[0] != drawn[1]).any()) and (drawn[1] != drawn[2]).any()


def test_smoothing_keeps_straight_lines_and_takes_out_noise():
    line = np.linspace(3.0, 1.0, 401)
    np.testing.assert_allclose(figures._smooth(line), line)
    noise = np.random.default_rng(0).normal(size=4001)
    assert figures._smooth(noise)[200:-200].std() < 0.1  # the mean of 201 values: 1 / sqrt(201) = 0.07
    assert figures._smooth(np.array([5.0])).tolist() == [5.0]


def drawn(monkeypatch, folder, records, panels):
    """What a figure shows, by label of the y axis: text of the legend, values by label."""
    shown = {}

    def note(figure, file, format):
        for axes in figure.axes:
            legend = axes.get_legend()
            texts = [] if legend is None else [text.get_text() for text in (legend.get_title(), *legend.get_texts())]
            lines = {line.get_label(): line.get_ydata() for line in axes.get_lines()}
            shown[axes.get_ylabel()] = ([text for text in texts if text], lines)

    monkeypatch.setattr(Figure, "savefig", note)
    plot_curves(write_metrics(folder, records), folder / "curve.png", panels)
    return shown


def test_a_classifier_shows_its_accuracies_and_a_denoiser_has_no_panel_of_them(tmp_path, monkeypatch):
    records = [{"step": step, "loss": 1 / step, "top1": 1 - 1 / step, "lr": 1e-3} for step in range(1, 9)]
    records[3]["eval_top1"] = 0.25
    shown = drawn(monkeypatch, tmp_path, records, LOSS_PANELS)
    assert list(shown) == ["loss", "accuracy", "learning rate"]
    assert shown["accuracy"][0] == ["first", "held out"]
    assert shown["accuracy"][1]["first"].tolist() == [1 - 1 / step for step in range(1, 9)]
    assert shown["accuracy"][1]["held out"].tolist() == [0.25]
    without = [{key: value for key, value in record.items() if "top1" not in key} for record in records]
    assert list(drawn(monkeypatch, tmp_path, without, LOSS_PANELS)) == ["loss", "learning rate"]


def test_a_short_run_shows_what_was_logged_once_and_a_long_one_smoothed_beside_it(tmp_path, monkeypatch):
    quarters = {"loss_q0": 0.5, "loss_q3": 0.1}
    records = [{"step": step, "loss": 1 / step, **quarters} for step in range(1, 201)]
    long = drawn(monkeypatch, tmp_path, records, LOSS_PANELS)["loss"]
    names = ["all, as logged", "all, smoothed", "1st quarter (least noise)", "4th quarter (most noise)"]
    assert long[0] == ["noise level", *names]
    assert long[1]["all, as logged"].tolist() == [1 / step for step in range(1, 201)]
    assert long[1]["all, smoothed"][100] == pytest.approx(np.mean([1 / step for step in range(96, 107)]))
    short = drawn(monkeypatch, tmp_path, records[:40], LOSS_PANELS)["loss"]
    assert short[0] == ["noise level", "all", *names[2:]]
    assert short[1]["all"].tolist() == [1 / step for step in range(1, 41)]


def test_a_family_names_the_quantities_of_its_own_curve(tmp_path, monkeypatch):
    records = [{"step": step, "loss_d": 1.0, "loss_g": 2.0, "right": 0.75, "spread": step} for step in (1, 2, 3)]
    assert list(drawn(monkeypatch, tmp_path, records, ADVERSARIAL_PANELS)) == ["loss", "told apart"]
    shown = drawn(monkeypatch, tmp_path, records, (Panel("spread of samples", {"spread": ""}, bottom=0),))
    assert shown == {"spread of samples": ([], shown["spread of samples"][1])}
    assert [line.tolist() for line in shown["spread of samples"][1].values()] == [[1, 2, 3]]
    monkeypatch.undo()
    path = adversarial_curve(tmp_path / "metrics.jsonl", tmp_path / "gan.png")
    with Image.open(path) as picture:
        assert picture.width >= 800 and np.asarray(picture.convert("L")).min() < 64
    assert adversarial_curve(write_metrics(tmp_path, [{"step": 1, "loss": 1.0}]), tmp_path / "none.png") is None
