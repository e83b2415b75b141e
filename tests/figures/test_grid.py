"""Grids: every image is at its place, readable, with its label."""

import numpy as np
import pytest
from PIL import Image

from hf_diffusion.figures.grid import PADDING, class_grid, labelled_grid


def random_images(count, *shape):
    return np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8)


def tile(grid, row, column, height, width):
    """Pixels of one image of a grid without labels."""
    top, left = PADDING + row * (height + PADDING), PADDING + column * (width + PADDING)
    return np.asarray(grid)[top : top + height, left : left + width]


def test_every_image_is_found_unchanged_at_its_place():
    images = random_images(6, 12, 10, 3)
    grid = labelled_grid(images, columns=3, scale=1)
    for position, image in enumerate(images):
        assert np.array_equal(tile(grid, *divmod(position, 3), 12, 10), image)


def test_small_images_are_enlarged_in_whole_pixels_and_large_ones_are_not():
    images = random_images(1, 8, 8, 1)
    grid = labelled_grid(images, columns=1)
    assert grid.size == (56 + 2 * PADDING, 56 + 2 * PADDING)
    assert np.array_equal(tile(grid, 0, 0, 56, 56)[..., 0], images[0, ..., 0].repeat(7, axis=0).repeat(7, axis=1))
    assert labelled_grid(random_images(1, 256, 256, 3), columns=1).size == (256 + 2 * PADDING, 256 + 2 * PADDING)


def test_labels_stand_at_the_left_of_their_rows_on_white():
    images = random_images(4, 28, 28, 1)
    grid = np.asarray(labelled_grid(images, 2, ["Ankle boot", "Bag"]))
    plain = np.asarray(labelled_grid(images, 2))
    margin = grid.shape[1] - plain.shape[1]
    assert margin > 50 and np.array_equal(grid[:, margin:], plain)
    row = grid.shape[0] // 2
    for label in (grid[:row, :margin], grid[row:, :margin]):
        assert label.min() < 80 and (label == 255).mean() > 0.7  # dark letters on white
    assert grid[:, 0].min() == 255  # none is cut off at the left


def test_names_stand_above_their_columns_and_inside_them():
    images = random_images(4, 28, 28, 1)
    names = ["Ankle boot", "a name that is much wider than its column"]
    grid, plain = (np.asarray(labelled_grid(images, 2, ["x", "y"], column_labels=n)) for n in (names, None))
    above = grid.shape[0] - plain.shape[0]
    assert above > 10 and np.array_equal(grid[above:], plain)
    left = grid.shape[1] - 2 * (56 + PADDING)
    for column in range(2):
        start = left + column * (56 + PADDING)
        assert grid[:above, start : start + 56].min() < 80
        # between the columns
        assert grid[:above, start - PADDING : start].min() > 200
    with pytest.raises(ValueError, match="1 labels for 2 columns; give one label a column"):
        labelled_grid(images, 2, column_labels=["x"])


def test_a_line_break_in_a_name_is_a_space():
    grids = [labelled_grid(random_images(1, 8, 8, 1), 1, [name], column_labels=[name]) for name in ("a\nb", "a b")]
    assert np.array_equal(*map(np.asarray, grids))


def test_a_long_label_is_shortened_to_a_bounded_margin():
    images = random_images(1, 32, 32, 3)
    wide = [labelled_grid(images, 1, ["m" * count]).width for count in (20, 40, 400)]
    assert wide[0] < wide[1] == wide[2]


def test_a_last_row_that_is_not_full_stays_white():
    grid = labelled_grid(random_images(3, 28, 28, 3), columns=2, scale=1)
    assert (tile(grid, 1, 1, 28, 28) == 255).all()


def test_arrays_with_and_without_channel_axis_and_pil_images_give_the_same_grid():
    images = random_images(4, 8, 8)
    pictures = [Image.fromarray(image) for image in images]
    grids = [np.asarray(labelled_grid(given, 2)) for given in (images, images[..., None], pictures)]
    assert np.array_equal(grids[0], grids[1]) and np.array_equal(grids[0], grids[2])


def test_transparent_pixels_are_shown_on_white():
    assert (np.asarray(labelled_grid(np.zeros((1, 8, 8, 4), dtype=np.uint8), 1)) == 255).all()


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (random_images(0, 8, 8, 3), None, "at least one image and one column, got 0 images"),
        (np.zeros((2, 8, 8, 3)), None, "must be uint8 .* got float64"),
        (random_images(2, 3, 8, 8), None, r"must be uint8 \(N, H, W, 1 \| 3 \| 4\), got uint8 \('N', 3, 8, 8\)"),
        (random_images(4, 8, 8, 3), ["a"], "1 labels for 2 rows of 2 images"),
        ([Image.new("L", (8, 8)), Image.new("L", (8, 9))], None, "must have one size"),
    ],
)
def test_unusable_images_and_labels_are_refused_in_words(images, labels, message):
    with pytest.raises(ValueError, match=message):
        labelled_grid(images, 2, labels)


def test_a_grid_without_columns_is_about_square():
    images = random_images(10, 8, 8, 3)
    assert np.array_equal(np.asarray(labelled_grid(images)), np.asarray(labelled_grid(images, 4)))


def test_each_class_has_rows_of_its_own_with_its_name_and_the_rest_of_a_row_stays_white():
    images, labels = random_images(6, 28, 28, 1), [4, 7, 4, 4, 7, 4]
    white = np.full((28, 28, 1), 255, np.uint8)
    tiles = [images[0], images[2], images[3], images[5], white, white, images[1], images[4], white]
    wanted = labelled_grid(np.stack(tiles), 3, ["cat", "", "7"])
    assert np.array_equal(np.asarray(class_grid(images, labels, {4: "cat"}, columns=3)), np.asarray(wanted))
    # No wider than the largest class.
    assert class_grid(images, labels, columns=10).width == labelled_grid(images[:4], 4, ["4"]).width
