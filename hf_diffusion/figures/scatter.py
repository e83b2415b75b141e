"""Points of the plane, drawn by PIL alone: the same frame for every step of a run."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont


# Drawn at twice the size and then shrunk: PIL has no smooth edges of its own.
OVERSAMPLING = 2
# Side of the frame, and what is left around it for the numbers; pixels of the finished picture.
SIDE, MARGIN, TOP = 440, 40, 14
LEGEND = 150
LONGEST_NAME = 18
MOST_NAMES = 16
INK, RULE = (32, 32, 32), (225, 225, 225)
# Tableau's ten, in an order in which neighbours differ in lightness, too; from the eleventh class
# on they repeat.
COLOURS = [
    "#4e79a7",
    "#f28e2b",
    "#59a14f",
    "#e15759",
    "#76b7b2",
    "#b07aa1",
    "#9c755f",
    "#edc948",
    "#ff9da7",
    "#79706e",
]


def scatter_plot(
    points: np.ndarray,
    labels: Sequence[int] | np.ndarray | None = None,
    names: Sequence[str] | None = None,
    limits: tuple[float, float] = (-1.2, 1.2),
) -> Image.Image:
    """Plot points (N, 2) in a square with these limits on both axes, coloured by class.

    labels: the class id of each point; None draws all in one colour.
    names: of the classes, for the legend.
    The size of the picture depends on whether there is a legend, on nothing else. Points outside
    the square are counted in a corner. ValueError for another shape, for values that are not
    finite, for labels without names.
    """
    points = np.asarray(points, dtype=np.float64)
    _check(points, labels, names)
    ids = np.zeros(len(points), np.int64) if labels is None else np.asarray(labels, np.int64)
    left, top, right, bottom = (OVERSAMPLING * edge for edge in (MARGIN, TOP, MARGIN + SIDE, TOP + SIDE))
    width = right + OVERSAMPLING * (TOP if names is None else LEGEND)
    picture = Image.new("RGB", (width, bottom + OVERSAMPLING * MARGIN), "white")
    # Mode RGBA blends what is drawn into the picture, so that dense places are darker than sparse
    # ones.
    draw = ImageDraw.Draw(picture, "RGBA")
    _draw_frame(draw, (left, top, right, bottom), limits)
    places = (points - limits[0]) / (limits[1] - limits[0])
    inside = ((places >= 0) & (places <= 1)).all(1)
    radius, alpha = _dot(len(points))
    # In a fixed random order, or the last class would hide the others.
    for number in np.random.default_rng(0).permutation(np.flatnonzero(inside)):
        place, label = places[number], ids[number]
        x, y = left + place[0] * (right - left), bottom - place[1] * (bottom - top)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(*_colour(label), alpha))
    if outside := int((~inside).sum()):
        _write(draw, right - 8, bottom - 8, f"{outside} of {len(points)} outside", anchor="rb")
    if names is not None:
        _draw_legend(draw, right, top, names)
    size = tuple(side // OVERSAMPLING for side in picture.size)
    return picture.resize(size, Image.Resampling.LANCZOS)


def _check(points: np.ndarray, labels: Sequence[int] | np.ndarray | None, names: Sequence[str] | None) -> None:
    if points.ndim != 2 or points.shape[1] != 2 or not len(points):
        raise ValueError(f"a scatter plot takes points (N, 2), got shape {points.shape}")
    if not np.isfinite(points).all():
        raise ValueError(f"{int((~np.isfinite(points)).any(1).sum())} of {len(points)} points are not finite")
    if labels is not None and len(labels) != len(points):
        raise ValueError(f"{len(labels)} labels for {len(points)} points; give one label a point")
    if labels is not None and (names is None or not 0 <= min(labels) <= max(labels) < len(names)):
        raise ValueError(f"labels up to {max(labels)} need as many names, got {len(names or ())}")


def _dot(count: int) -> tuple[float, int]:
    """Radius and opacity: few points are large and solid, many let others shine through."""
    radius = OVERSAMPLING * float(np.clip(40 / count**0.5, 1.4, 5))
    return radius, int(np.clip(2.5e5 / count, 80, 230))


def _draw_frame(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], limits: tuple[float, float]) -> None:
    left, top, right, bottom = box
    for value in _ticks(limits):
        share = (value - limits[0]) / (limits[1] - limits[0])
        x, y = left + share * (right - left), bottom - share * (bottom - top)
        draw.line((x, top, x, bottom), fill=RULE, width=OVERSAMPLING)
        draw.line((left, y, right, y), fill=RULE, width=OVERSAMPLING)
        _write(draw, x, bottom + 5 * OVERSAMPLING, f"{value:g}", anchor="mt")
        _write(draw, left - 5 * OVERSAMPLING, y, f"{value:g}", anchor="rm")
    draw.rectangle(box, outline=INK, width=OVERSAMPLING)


def _ticks(limits: tuple[float, float]) -> list[float]:
    """Round numbers inside the limits, at least four of them."""
    spread = limits[1] - limits[0]
    steps = [factor * 10.0**power for power in range(-3, 6) for factor in (1, 2, 5)]
    step = max(step for step in steps if spread / step >= 4) if spread > 4e-3 else spread / 4
    first, last = np.ceil(limits[0] / step - 1e-9), np.floor(limits[1] / step + 1e-9)
    return [round(float(number * step), 6) for number in np.arange(first, last + 1)]


def _draw_legend(draw: ImageDraw.ImageDraw, right: int, top: int, names: Sequence[str]) -> None:
    line, radius, x = 22 * OVERSAMPLING, 5 * OVERSAMPLING, right + 18 * OVERSAMPLING
    for place, name in enumerate(names[:MOST_NAMES]):
        y = top + line * (place + 0.5)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=_colour(place))
        short = name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"
        _write(draw, x + 2 * radius, y, short, anchor="lm")
    if len(names) > MOST_NAMES:
        _write(draw, x, top + line * (MOST_NAMES + 0.5), f"and {len(names) - MOST_NAMES} more", anchor="lm")


def _write(draw: ImageDraw.ImageDraw, x: float, y: float, text: str, anchor: str) -> None:
    draw.text((x, y), text, fill=INK, font=ImageFont.load_default(size=13 * OVERSAMPLING), anchor=anchor)


def _colour(label: int) -> tuple[int, int, int]:
    code = COLOURS[int(label) % len(COLOURS)].lstrip("#")
    return int(code[:2], 16), int(code[2:4], 16), int(code[4:], 16)
