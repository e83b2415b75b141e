"""Grids of images with labels, drawn by PIL alone."""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont


# Pixels: smaller images are enlarged to about this, so that an 8x8 digit can be recognised.
READABLE_SIDE = 56
# Pixels between images: enough that white strokes at the borders of two images do not join.
PADDING = 6
# Characters; the names of ImageNet's classes would be wider than the images.
LONGEST_LABEL = 28
# Pixels of the letters above a column.
HEAD = 11
# Images of one class in a row; more of them begin another row.
MOST_COLUMNS = 10
INK = (32, 32, 32)


def labelled_grid(
    images: np.ndarray | Sequence[Image.Image],
    columns: int | None = None,
    row_labels: Sequence[str] | None = None,
    scale: int | None = None,
    column_labels: Sequence[str] | None = None,
) -> Image.Image:
    """Lay the images row by row on white, without smoothing, labels at the left and above.

    images: uint8 (N, H, W, C) with 1, 3 or 4 channels, or (N, H, W), or N PIL images of one size.
    columns: None makes as many columns as rows.
    row_labels: one for each row.
    scale: None enlarges small images until they can be recognised.
    column_labels: one for each column, cut where it is wider than the images.
    ValueError for no images, for other shapes, and for a number of labels that is not that of rows.
    """
    tiles = [_rgb(image) for image in images]
    columns = math.isqrt(max(0, len(tiles) - 1)) + 1 if columns is None else columns
    if not tiles or columns < 1:
        raise ValueError(
            f"a grid needs at least one image and one column, got {len(tiles)} images and {columns} columns"
        )
    if len({tile.size for tile in tiles}) > 1:
        raise ValueError(f"the images of a grid must have one size, got {sorted({tile.size for tile in tiles})}")
    columns = min(columns, len(tiles))
    rows = math.ceil(len(tiles) / columns)
    labels = [_shortened(str(label)) for label in row_labels or []]
    if labels and len(labels) != rows:
        raise ValueError(f"{len(labels)} labels for {rows} rows of {columns} images; give one label a row")
    heads = [str(label) for label in column_labels or []]
    if heads and len(heads) != columns:
        raise ValueError(f"{len(heads)} labels for {columns} columns; give one label a column")
    width, height = tiles[0].size
    scale = scale or max(1, round(READABLE_SIDE / max(width, height)))
    width, height = width * scale, height * scale

    font = ImageFont.load_default(size=min(28, max(10, height // 4)))
    margin = max((math.ceil(font.getlength(label)) + 2 * PADDING for label in labels), default=0)
    above = HEAD + PADDING if heads else 0
    size = margin + columns * (width + PADDING) + PADDING, above + rows * (height + PADDING) + PADDING
    grid = Image.new("RGB", size, "white")
    for position, tile in enumerate(tiles):
        row, column = divmod(position, columns)
        corner = (margin + PADDING + column * (width + PADDING), above + PADDING + row * (height + PADDING))
        grid.paste(tile.resize((width, height), Image.Resampling.NEAREST), corner)
    draw = ImageDraw.Draw(grid)
    for row, label in enumerate(labels):
        middle = above + PADDING + row * (height + PADDING) + height / 2
        draw.text((margin - PADDING, middle), label, fill=INK, font=font, anchor="rm")
    font = ImageFont.load_default(size=HEAD)
    for column, label in enumerate(heads):
        middle = margin + PADDING + column * (width + PADDING) + width / 2
        text = _shortened(label, lambda text: font.getlength(text) <= width)
        draw.text((middle, above), text, fill=INK, font=font, anchor="md")
    return grid


def class_grid(
    images: np.ndarray,
    labels: Sequence[int | str],
    names: Mapping[int, str] | None = None,
    columns: int = MOST_COLUMNS,
) -> Image.Image:
    """Lay the images of each class in rows of their own, with its name at the first.

    images: uint8 (N, H, W, C).
    labels: the class of each image, or its text, in any order.
    names: by class; a class without a name shows its number.
    Classes come in the order of their first image, and rows that are not full end in white.
    """
    by_class: dict[int | str, list[int]] = {}
    for place, label in enumerate(labels):
        by_class.setdefault(label if isinstance(label, str) else int(label), []).append(place)
    columns = min(columns, max(map(len, by_class.values())))
    white, places, row_labels = len(images), [], []
    for label, own in by_class.items():
        rows = math.ceil(len(own) / columns)
        places += own + [white] * (rows * columns - len(own))
        row_labels += [(names or {}).get(label, str(label))] + [""] * (rows - 1)
    tiles = np.concatenate([images, np.full_like(images[:1], 255)])
    return labelled_grid(tiles[places], columns, row_labels)


def _shortened(label: str, fits: Callable[[str], bool] = lambda text: len(text) <= LONGEST_LABEL) -> str:
    # A class may have a line break in its name.
    label = " ".join(label.split())
    cuts = (label[:length].rstrip(" ,") + "…" for length in range(len(label) - 1, 0, -1))
    return label if fits(label) else next(filter(fits, cuts), "…")


def _rgb(image: np.ndarray | Image.Image) -> Image.Image:
    """One image in RGB, transparency laid on white."""
    if not isinstance(image, Image.Image):
        array = np.asarray(image)
        if (
            array.dtype != np.uint8
            or array.ndim not in (2, 3)
            or (array.ndim == 3 and array.shape[2] not in (1, 3, 4))
        ):
            raise ValueError(f"images must be uint8 (N, H, W, 1 | 3 | 4), got {array.dtype} {('N', *array.shape)}")
        array = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
        image = Image.fromarray(np.ascontiguousarray(array))
    if "A" in image.getbands():
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")
