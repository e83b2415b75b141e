"""Means for the log over all images since the last report: weighted, and by noise level."""

import sys
import types

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from hf_diffusion.loop.reporting import MetricsLog, RunningMeans


def test_a_weighted_value_counts_as_often_as_its_weight_says():
    means, values = RunningMeans(torch.device("cpu")), torch.tensor([1.0, 2.0, 3.0, 6.0])
    t = torch.tensor([0, 1, 0, 1])
    means.add({f"real_t{i}": (values, (t == i).float()) for i in range(3)})
    # no image met t = 2
    assert means.report(Accelerator(cpu=True)) == {"real_t0": 2.0, "real_t1": 4.0}


def test_means_are_over_images_not_over_batches_and_begin_anew_at_a_report():
    means, accelerator = RunningMeans(torch.device("cpu")), Accelerator(cpu=True)
    means.add({"loss": torch.tensor([1.0])})
    means.add({"loss": torch.tensor([2.0, 4.0, 5.0])})
    assert means.report(accelerator) == {"loss": 3.0}
    assert means.report(accelerator) == {}


def test_a_loss_is_sorted_into_quarters_of_the_noise_level():
    means = RunningMeans(torch.device("cpu"))
    means.add_by_level("loss", torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0.0, 0.2499, 0.75]))
    assert means.report(Accelerator(cpu=True)) == {"loss_q0": 2.0, "loss_q3": 5.0}


def test_a_loss_that_is_not_a_number_spoils_the_mean_of_its_own_quarter_alone():
    means = RunningMeans(torch.device("cpu"))
    means.add_by_level("loss", torch.tensor([1.0, float("nan"), 3.0]), torch.tensor([0.1, 0.4, 0.9]))
    report = means.report(Accelerator(cpu=True))
    assert (report["loss_q0"], report["loss_q3"]) == (1.0, 3.0) and report["loss_q1"] != report["loss_q1"]
    assert "loss_q2" not in report


def test_a_glance_shows_the_means_and_leaves_them_to_the_report():
    means = RunningMeans(torch.device("cpu"))
    assert means.so_far(["loss"]) == {}
    means.add({"loss": torch.tensor([1.0, 2.0])})
    assert means.so_far(["loss"]) == {"loss": 1.5}
    means.add({"loss": torch.tensor([6.0])})
    assert means.so_far(["loss"]) == means.report(Accelerator(cpu=True)) == {"loss": 3.0}


class Tracker:
    """What accelerate's trackers of one kind are given."""

    def __init__(self, name):
        self.name, self.seen = name, []

    def log_images(self, values, step, **options):
        self.seen.append((values, step, options))

    def log(self, values, step):
        self.seen.append((values, step, {}))


def test_pictures_reach_the_trackers_in_the_form_that_each_takes(tmp_path, monkeypatch):
    accelerator = Accelerator(cpu=True)
    board, wandb, trackio = (Tracker(name) for name in ("tensorboard", "wandb", "trackio"))
    accelerator.trackers = [board, wandb, trackio]
    monkeypatch.setitem(sys.modules, "trackio", types.SimpleNamespace(Image=lambda pixels: ("trackio image", pixels)))
    picture = Image.fromarray(np.arange(60, dtype=np.uint8).reshape(4, 5, 3))
    MetricsLog(accelerator, tmp_path, lambda *_: None).show(50, {"samples/ema": picture})
    ((values, step, options),) = board.seen
    assert (step, options) == (50, {"dataformats": "NHWC"})
    np.testing.assert_array_equal(values["samples/ema"], np.asarray(picture)[None])
    np.testing.assert_array_equal(wandb.seen[0][0]["samples/ema"], [np.asarray(picture)])
    kind, pixels = trackio.seen[0][0]["samples/ema"]
    assert kind == "trackio image" and wandb.seen[0][1] == trackio.seen[0][1] == 50
    np.testing.assert_array_equal(pixels, np.asarray(picture))
