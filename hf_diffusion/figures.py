"""Pictures of a run: a labelled grid of images (PIL alone) and the curves of metrics.jsonl (matplotlib)."""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont


READABLE_SIDE = 56  # pixels: smaller images are enlarged to about this, so that an 8x8 digit can be recognised
PADDING = 6  # pixels between images: enough that white strokes at the borders of two images do not join
LONGEST_LABEL = 28  # characters; the names of ImageNet's classes would be wider than the images
INK = (32, 32, 32)
QUARTER_COLOURS = ["#440154", "#31688e", "#1f9e89", "#9fb80f"]  # viridis, its yellow end darkened to show on white
QUARTER_NAMES = ["1st quarter (least noise)", "2nd quarter", "3rd quarter", "4th quarter (most noise)"]


def labelled_grid(
    images: np.ndarray | Sequence[Image.Image],
    columns: int,
    row_labels: Sequence[str] | None = None,
    scale: int | None = None,
) -> Image.Image:
    """The images row by row on white, each enlarged `scale` times without smoothing, with the label of each row at its left.

    images: uint8 (N, H, W, C) with 1, 3 or 4 channels, or (N, H, W), or N PIL images of one size. `scale` None enlarges small
    images until they can be recognised. ValueError for no images, other shapes, or a number of labels that is not that of rows.
    """
    tiles = [_rgb(image) for image in images]
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
    width, height = tiles[0].size
    scale = scale or max(1, round(READABLE_SIDE / max(width, height)))
    width, height = width * scale, height * scale

    font = ImageFont.load_default(size=min(28, max(10, height // 4)))
    margin = max((math.ceil(font.getlength(label)) + 2 * PADDING for label in labels), default=0)
    grid = Image.new(
        "RGB", (margin + columns * (width + PADDING) + PADDING, rows * (height + PADDING) + PADDING), "white"
    )
    for position, tile in enumerate(tiles):
        row, column = divmod(position, columns)
        corner = (margin + PADDING + column * (width + PADDING), PADDING + row * (height + PADDING))
        grid.paste(tile.resize((width, height), Image.Resampling.NEAREST), corner)
    draw = ImageDraw.Draw(grid)
    for row, label in enumerate(labels):
        middle = PADDING + row * (height + PADDING) + height / 2
        draw.text((margin - PADDING, middle), label, fill=INK, font=font, anchor="rm")
    return grid


def loss_curve(metrics_jsonl: str | os.PathLike, out_png: str | os.PathLike) -> Path | None:
    """Draw loss, loss by quarter of the timesteps, and learning rate over the optimizer steps; the path, or None without a loss.

    Reads one JSON object a line, with `step` and whichever of loss, loss_q0 (least noise) to loss_q3 (most noise), lr, and the same on
    held-out images, eval_loss to eval_loss_q3, there are. Lines cut off by a crash and values that are not finite are left out; where a
    resumed run went back, its steps count.
    """
    from matplotlib.figure import Figure  # here, since it takes a second and most uses of this file are grids

    records = _read_metrics(metrics_jsonl)
    step, loss = _series(records, "loss")
    if not len(step):
        return None
    rate_step, rate = _series(records, "lr")
    quarters = [_series(records, f"loss_q{quarter}") for quarter in range(4)]
    held_out = [_series(records, f"eval_loss{part}") for part in ("", *(f"_q{quarter}" for quarter in range(4)))]
    with_rate, with_quarters = len(rate) > 0, any(len(values) for _, values in quarters)

    figure = Figure(figsize=(8, 5.2 if with_rate else 4.2), dpi=160, layout="constrained")
    panels = figure.subplots(1 + with_rate, 1, sharex=True, squeeze=False, height_ratios=[4, 1][: 1 + with_rate])[:, 0]
    everything = np.concatenate([loss, *(values for _, values in [*quarters, *held_out])])
    _dress(panels[0], "loss", logarithmic=everything.min() > 0 and everything.max() > 3 * everything.min())
    # Viridis in order of noise: an ordered quantity in an ordered palette that colour-blind readers can tell apart.
    for (steps, values), colour, name in zip(quarters, QUARTER_COLOURS, QUARTER_NAMES):
        if len(values):
            panels[0].plot(steps, _smooth(values), color=colour, linewidth=1.6, label=name)
    marker = "o" if len(loss) == 1 else None  # a line of one point is invisible
    panels[0].plot(step, loss, color="0.72", linewidth=0.6, zorder=1, marker=marker, label="all, as logged")
    panels[0].plot(step, _smooth(loss), color="black", linewidth=2.0, label="all, smoothed")
    for (steps, values), colour in zip(held_out, ["black", *QUARTER_COLOURS]):
        if len(values):  # the quarters need no words of their own: they have the colours of the training's
            label = "held-out images" if colour == "black" else None
            style = {"linestyle": "--", "linewidth": 1.2, "marker": "o", "markersize": 3.5}
            panels[0].plot(steps, values, color=colour, label=label, **style)
    panels[0].legend(
        title="loss at timesteps" if with_quarters else None,
        frameon=False,
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
    )
    if with_rate:
        _dress(panels[1], "learning rate", logarithmic=False)
        panels[1].plot(rate_step, rate, color="black", linewidth=1.6)
        panels[1].set_ylim(bottom=0)
        panels[1].ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    panels[-1].set_xlabel("optimizer step")
    _save(figure, Path(out_png))
    return Path(out_png)


def adversarial_curve(metrics_jsonl: str | os.PathLike, out_png: str | os.PathLike) -> Path | None:
    """Draw the two losses of a GAN, the share of pairs that the discriminator tells apart, and max |V|, over the optimizer steps.

    Reads loss_d, loss_g, right and max_abs_v from one JSON object a line, as `loss_curve` does; the path, or None without a loss.
    """
    from matplotlib.figure import Figure

    records = _read_metrics(metrics_jsonl)
    losses = {name: _series(records, key) for name, key in (("discriminator", "loss_d"), ("generator", "loss_g"))}
    if not len(losses["discriminator"][1]):
        return None
    figure = Figure(figsize=(8, 6.2), dpi=160, layout="constrained")
    panels = figure.subplots(3, 1, sharex=True, height_ratios=[3, 2, 2])
    _dress(panels[0], "loss", logarithmic=False)
    for (name, (steps, values)), colour in zip(losses.items(), QUARTER_COLOURS[::2]):
        panels[0].plot(steps, values, color=colour, linewidth=0.5, alpha=0.5)
        panels[0].plot(steps, _smooth(values), color=colour, linewidth=1.8, label=name)
    panels[0].legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    for panel, key, label in ((panels[1], "right", "told apart"), (panels[2], "max_abs_v", "max |V|")):
        _dress(panel, label, logarithmic=False)
        steps, values = _series(records, key)
        panel.plot(steps, values, color="0.72", linewidth=0.6)
        panel.plot(steps, _smooth(values), color="black", linewidth=1.6)
        panel.set_ylim(bottom=0)
    panels[1].axhline(0.5, color="0.5", linewidth=0.8, linestyle=":")  # where real and generated cannot be told apart
    panels[1].set_ylim(top=1)
    panels[-1].set_xlabel("optimizer step")
    _save(figure, Path(out_png))
    return Path(out_png)


def _save(figure, out_png: Path) -> None:
    half_written = out_png.with_name(f".{os.getpid()}.{out_png.name}")
    figure.savefig(half_written, format="png")
    os.replace(half_written, out_png)


def _shortened(label: str) -> str:
    return label if len(label) <= LONGEST_LABEL else label[: LONGEST_LABEL - 1].rstrip(" ,") + "…"


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


def _read_metrics(path: str | os.PathLike) -> list[dict]:
    """The records in order of step. A step that does not go on from the last one discards what it repeats."""
    records: list[dict] = []
    if not Path(path).is_file():
        return records
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # a crash in the middle of a line
            continue
        if not isinstance(record, dict) or not isinstance(record.get("step"), int | float):
            continue
        while records and records[-1]["step"] > record["step"]:
            records.pop()
        if records and records[-1]["step"] == record["step"]:  # the training's and the evaluation's
            record = records.pop() | record
        records.append(record)
    return records


def _series(records: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one quantity where it is there and finite."""
    points = [
        (record["step"], float(record[key]))
        for record in records
        if isinstance(record.get(key), int | float) and math.isfinite(record[key])
    ]
    steps, values = np.array(points, dtype=float).reshape(-1, 2).T
    return steps, values


def _smooth(values: np.ndarray) -> np.ndarray:
    """The running mean over 5 % of the points, over fewer at the two ends."""
    half = len(values) // 40
    sums = np.concatenate([[0.0], np.cumsum(values)])
    centre = np.arange(len(values))
    reach = np.minimum(
        half, np.minimum(centre, len(values) - 1 - centre)
    )  # shrinks evenly, so that the ends are not dragged
    return (sums[centre + reach + 1] - sums[centre - reach]) / (2 * reach + 1)


def _dress(axes, label: str, logarithmic: bool) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

    axes.set_ylabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    if logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
