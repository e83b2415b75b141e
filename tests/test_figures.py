import json

import numpy as np
import pytest
from PIL import Image

from hf_diffusion import figures
from hf_diffusion.figures import PADDING, labelled_grid, loss_curve


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
    steps, losses = figures._series(figures._read_metrics(write_metrics(tmp_path, first + resumed)), "loss")
    assert steps.tolist() == [100, 200, 250, 350] and losses.tolist() == [1.0, 1.0, 2.0, 2.0]


def test_what_was_measured_at_a_step_stands_beside_the_training_loss_of_that_step(tmp_path):
    records = [
        {"step": 100, "loss": 1.0},
        {"step": 100, "eval_loss": 2.0, "protocol": {"count": 3}},
        {"step": 200, "loss": 0.5},
    ]
    read = figures._read_metrics(write_metrics(tmp_path, records))
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
