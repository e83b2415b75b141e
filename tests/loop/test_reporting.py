"""Means for the log over all images since the last report: weighted, and by noise level."""

import torch
from accelerate import Accelerator

from hf_diffusion.loop.reporting import RunningMeans


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
