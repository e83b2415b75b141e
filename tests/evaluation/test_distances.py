"""Distances between sets of features: identities, closed forms, errors, and torchmetrics."""

import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from hf_diffusion.evaluation.distances import (
    Moments,
    frechet_distance,
    frechet_with_error,
    in_order,
    jackknife_groups,
    kernel_distance,
    precision_recall,
    precision_recall_with_error,
    selection,
)


def gaussians(count: int, dimension: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, dimension, generator=torch.Generator().manual_seed(seed))


def moments_of(features: torch.Tensor, groups: int = 1) -> Moments:
    moments = Moments(features.shape[1], groups)
    moments.add(features, torch.arange(len(features)) % groups)
    return moments


def test_streamed_moments_are_those_of_all_features_at_once_whatever_the_pieces_and_groups():
    features = gaussians(500, 6) * 3 + 10
    moments = Moments(6, groups=5)
    for start in range(0, 500, 77):
        piece = features[start : start + 77]
        moments.add(piece, torch.arange(start, start + len(piece)) % 5)
    mean, covariance = moments.mean_and_covariance()
    torch.testing.assert_close(mean, features.double().mean(0))
    torch.testing.assert_close(covariance, torch.cov(features.double().T))
    kept = features.double()[torch.arange(500) % 5 != 2]
    torch.testing.assert_close(moments.mean_and_covariance(without=2)[1], torch.cov(kept.T))


def test_a_set_has_no_frechet_distance_to_itself_also_where_features_are_constant():
    features = gaussians(300, 8)
    features[:, 3] = -1
    own = moments_of(features).mean_and_covariance()
    assert abs(frechet_distance(own, own)) < 1e-6


def test_frechet_distance_of_commuting_covariances_is_the_closed_form():
    rotation = torch.linalg.qr(gaussians(5, 5).double()).Q
    a, b = torch.tensor([[1.0, 2, 3, 4, 0], [4.0, 1, 0, 2, 9]], dtype=torch.float64)  # variances along common axes
    means = torch.zeros(5, dtype=torch.float64), torch.arange(5, dtype=torch.float64)
    sides = [(mean, rotation @ variances.diag() @ rotation.T) for mean, variances in zip(means, (a, b))]
    expected = (means[1] ** 2).sum() + ((a.sqrt() - b.sqrt()) ** 2).sum()
    # the root of a variance that is 0 up to rounding, 1e-16, is 1e-8
    assert frechet_distance(*sides) == pytest.approx(float(expected), rel=1e-7)
    assert frechet_distance(*sides[::-1]) == pytest.approx(float(expected), rel=1e-7)


def test_the_error_of_the_frechet_distance_is_the_spread_over_repeated_draws():
    reference = (torch.zeros(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64))
    drawn = [frechet_with_error(moments_of(gaussians(400, 4, seed) + 0.3, groups=10), reference) for seed in range(60)]
    values, errors = np.array(drawn).T
    assert np.sqrt(np.mean(errors**2)) == pytest.approx(values.std(ddof=1), rel=0.3)


def test_the_error_is_that_of_images_of_the_classes_that_were_asked_for():
    reference = (torch.zeros(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64))
    labels = [i % 2 for i in range(400)]
    centre = torch.tensor(labels)[:, None] * 6.0  # as many of one class as of the other in every draw
    ratios = []
    for groups in (jackknife_groups(400, labels), jackknife_groups(400, None)):
        found = []
        for seed in range(60):
            moments = Moments(4, 10)
            moments.add(gaussians(400, 4, seed) + centre, groups)
            found.append(frechet_with_error(moments, reference))
        values, errors = np.array(found).T
        ratios.append(np.sqrt(np.mean(errors**2)) / values.std(ddof=1))
    assert ratios[0] == pytest.approx(1, rel=0.35) and ratios[1] > 2
    assert torch.bincount(jackknife_groups(403, [0] * 403)).tolist() == [41, 41, 41, *[40] * 7]


def test_the_kernel_distance_is_unbiased_and_sees_a_shift():
    same = [kernel_distance(gaussians(200, 5, seed), gaussians(200, 5, seed + 1000)) for seed in range(40)]
    values, errors = np.array(same).T
    assert abs(values.mean()) < 3 * values.std(ddof=1) / np.sqrt(len(values))
    assert np.sqrt(np.mean(errors**2)) == pytest.approx(values.std(ddof=1), rel=0.35)
    value, error = kernel_distance(gaussians(200, 5), gaussians(200, 5, 1) + 1)
    assert value > 5 * error > 0


def test_identical_sets_have_full_precision_and_recall_and_far_ones_none():
    features = gaussians(120, 6)
    assert precision_recall(features, features) == (1, 1)
    assert precision_recall(features, features + 100) == (0, 0)


def test_precision_is_about_fakes_and_recall_about_reals():
    real = torch.cat([gaussians(200, 3), gaussians(200, 3, 1) + 50])  # two modes
    precision, recall = precision_recall(real, gaussians(200, 3, 2))  # one of them
    assert precision > 0.8 and 0.4 < recall < 0.5


def test_the_errors_of_precision_and_recall_are_the_spread_over_repeated_draws():
    """Measured over 60 draws: 1.29 times the spread for precision, 1.36 for recall: safe."""
    real, groups = gaussians(300, 16), jackknife_groups(300, None)
    drawn = [precision_recall_with_error(real, 0.9 * gaussians(300, 16, 1 + s), groups) for s in range(60)]
    for name, (values, errors) in zip(("precision", "recall"), np.array(drawn).transpose(1, 2, 0)):
        assert 0.5 < values.mean() < 0.95, name
        assert 0.75 < np.sqrt(np.mean(errors**2)) / values.std(ddof=1) < 1.75, name


def test_precision_and_recall_with_errors_are_those_without():
    real, fake = gaussians(150, 3), gaussians(150, 3, 1) + 0.5
    found = precision_recall_with_error(real, fake, jackknife_groups(150, None))
    assert tuple(value for value, _ in found) == precision_recall(real, fake)
    assert precision_recall_with_error(real, real, jackknife_groups(150, None))[0] == (1, 0)


def test_the_chosen_real_images_do_not_depend_on_the_number_of_generated_ones():
    (few, real), (many, real_again) = selection(50, 30_000), selection(20_000, 30_000)
    assert (
        torch.equal(real, real_again) and len(real) == len(many) == 10_000 and sorted(few.tolist()) == list(range(50))
    )


def test_parts_from_several_processes_are_put_in_order_and_a_missing_one_is_noticed():
    parts = [(np.array([2, 0]), np.array([[2.0], [0.0]])), (np.array([1]), np.array([[1.0]]))]
    assert in_order(parts, 3).flatten().tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="1 of the 3 chosen"):
        in_order(parts[1:], 3)


class Features(nn.Module):
    """A fixed random network that torchmetrics accepts, too."""

    num_features = 12

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(3, 12, 3, 2), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, images):
        return self.net(images)


def test_frechet_and_kernel_distance_agree_with_torchmetrics():
    net = Features()
    real, fake = torch.rand(300, 3, 10, 10), torch.rand(300, 3, 10, 10) ** 1.5
    theirs = FrechetInceptionDistance(feature=net, normalize=True, input_img_size=(3, 10, 10))
    their_kernel = KernelInceptionDistance(feature=net, subsets=1, subset_size=300, normalize=True)
    with torch.no_grad():
        for metric in (theirs, their_kernel):
            metric.update(real, real=True)
            metric.update(fake, real=False)
        ours = [moments_of(net(images)).mean_and_covariance() for images in (real, fake)]
        assert frechet_distance(*ours) == pytest.approx(float(theirs.compute()), rel=1e-3)
        blocks = kernel_distance(net(real).repeat(2, 1), net(fake).repeat(2, 1), block=300)  # twice the same block
        assert blocks[0] == pytest.approx(float(their_kernel.compute()[0]), rel=1e-3) and blocks[1] < 1e-9


def test_too_few_images_are_one_sentence():
    with pytest.raises(ValueError, match="give at least 20"):
        kernel_distance(gaussians(5, 3), gaussians(5, 3))
    with pytest.raises(ValueError, match="more than 3 samples a side, got 3 real"):
        precision_recall(gaussians(3, 3), gaussians(9, 3))
