"""Scatter plots: one frame for all steps, every point at its place in the colour of its class."""

import numpy as np
import pytest

from hf_diffusion.data.loading import load_data
from hf_diffusion.figures.scatter import MARGIN, SIDE, TOP, _colour, scatter_plot


def pixel(picture, x: float, y: float) -> tuple[int, int, int]:
    """The colour at a place of the plane, of a plot from -1 to 1."""
    return picture.getpixel((round(MARGIN + (x + 1) / 2 * SIDE), round(TOP + (1 - y) / 2 * SIDE)))


def test_points_lie_at_their_places_in_the_colours_of_their_classes():
    points = np.array([[0.52, 0.33], [-0.44, -0.81], [0.1, -0.6]])
    picture = scatter_plot(points, [0, 1, 0], ["a", "b"], limits=(-1, 1))
    for (x, y), label in zip(points, (0, 1, 0)):
        np.testing.assert_allclose(pixel(picture, x, y), _colour(label), atol=30)
        assert min(pixel(picture, -x, -y)) > 200


def test_the_frame_is_the_same_for_every_step_and_says_what_lies_outside():
    rng = np.random.default_rng(0)
    early, late = rng.normal(0, 3, (500, 2)), rng.normal(0, 0.1, (800, 2))
    one, other = scatter_plot(early), scatter_plot(late)
    assert one.size == other.size == (MARGIN + SIDE + TOP, TOP + SIDE + MARGIN)
    # The numbers at the left and below are the same pixels.
    left, below = (slice(None), slice(0, MARGIN - 4)), (slice(TOP + SIDE + 4, None), slice(None))
    for edge in (left, below):
        assert np.array_equal(np.asarray(one)[edge], np.asarray(other)[edge]) and np.asarray(one)[edge].min() < 80
    corner = (slice(TOP + SIDE - 24, TOP + SIDE - 4), slice(MARGIN + SIDE - 120, MARGIN + SIDE - 4))
    assert np.asarray(one)[corner].min() < 80 < np.asarray(other)[corner].min()


def test_no_class_hides_another_at_the_same_place():
    points = np.random.default_rng(0).uniform(-0.2, 0.2, (3000, 2))
    mixed = np.asarray(scatter_plot(points, np.repeat([0, 1], 1500), ["a", "b"])).astype(int)
    middle = mixed[TOP + SIDE // 2 - 25 : TOP + SIDE // 2 + 25, MARGIN + SIDE // 2 - 25 : MARGIN + SIDE // 2 + 25]
    distances = [np.abs(middle - _colour(label)).sum(-1) for label in (0, 1)]
    assert 0.3 < (distances[0] < distances[1]).mean() < 0.7


def test_points_of_data_are_coloured_by_the_labels_of_their_rows():
    data = load_data("eight_gaussians", max_train_samples=400)
    points = data.to_samples(data.fetch(range(400), 0))
    order = np.argsort(data.labels, kind="stable")
    few = np.concatenate([points[order][data.labels[order] == label][:20] for label in (0, 4)])
    picture = data.picture(few, 10, ["east", "", "west", ""])
    wanted = scatter_plot(few, np.repeat([0, 1], 20), ["east", "west"])
    assert np.array_equal(np.asarray(picture), np.asarray(wanted))
    assert np.array_equal(np.asarray(data.picture(few)), np.asarray(scatter_plot(few)))


@pytest.mark.parametrize(
    ("points", "labels", "names", "message"),
    [
        (np.zeros((3, 3)), None, None, r"takes points \(N, 2\), got shape \(3, 3\)"),
        (np.zeros((0, 2)), None, None, r"got shape \(0, 2\)"),
        (np.array([[0.0, np.nan], [1, 1]]), None, None, "1 of 2 points are not finite"),
        (np.zeros((3, 2)), [0, 1], ["a", "b"], "2 labels for 3 points"),
        (np.zeros((2, 2)), [0, 2], ["a", "b"], "labels up to 2 need as many names, got 2"),
    ],
)
def test_what_cannot_be_plotted_is_refused_in_words(points, labels, names, message):
    with pytest.raises(ValueError, match=message):
        scatter_plot(points, labels, names)
