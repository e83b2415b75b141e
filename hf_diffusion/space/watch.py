"""A page that follows a run from its folder: curve, rate, time left, newest samples."""

import re
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd
import yaml

from hf_diffusion.figures.curves import read_metrics, series


REFRESH = 5.0  # seconds
# Records and losses of which the curve shows every n-th, so that a browser draws a long run, too.
MOST_POINTS = 500
LOSS = re.compile(r"(eval_)?\w*loss(?!_q\d)\w*")
GRID = re.compile(r"(raw|ema)-(\d+)\.png")


class Run:
    """The folder of a run, as it stands, and how fast its steps were seen to come."""

    def __init__(self, folder: Path):
        self.folder = folder
        # (time in seconds, step) of the first and the last record seen by this page.
        self.seen: list[tuple[float, int]] = []

    def records(self) -> list[dict[str, Any]]:
        """What the run has logged so far."""
        return read_metrics(self.folder / "metrics.jsonl")

    def total_steps(self) -> int | None:
        """The length of the run, None where its settings give it in epochs."""
        config = self.folder / "config.yaml"
        settings = yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else None
        return (settings or {}).get("max_train_steps")

    def seconds_per_step(self, step: int) -> float | None:
        """Seconds between steps since the page began to watch; None before a second record."""
        now = (self.folder / "metrics.jsonl").stat().st_mtime, step
        if not self.seen or step < self.seen[-1][1]:
            self.seen = [now]
        elif step > self.seen[-1][1]:
            self.seen = [self.seen[0], now]
        (began, first), (ended, last) = self.seen[0], self.seen[-1]
        return (ended - began) / (last - first) if last > first else None

    def says(self) -> str:
        """Step, losses, rate and time left, in Markdown."""
        records = self.records()
        if not records:
            return f"Nothing is logged yet in {self.folder}."
        step, total = records[-1]["step"], self.total_steps()
        pace = self.seconds_per_step(step)
        parts = [f"**Step {step:,}**" + (f" of {total:,}" if total else "")]
        for name in sorted({name for record in records for name in record if LOSS.fullmatch(name)}):
            values = series(records, name)[1]
            parts += [f"{name} {values[-1]:.4g}"] if len(values) else []
        rates = series(records, "images_per_second")[1]
        parts += [f"{rates[-1]:,.0f} samples/s"] if len(rates) else []
        if total and step >= total:
            parts.append("finished")
        elif total:
            parts.append("time left is known after the next record" if pace is None else left(pace * (total - step)))
        return " · ".join(parts)

    def losses(self) -> pd.DataFrame:
        """The losses by step, one row a value: step, value, quantity."""
        records, rows = self.records(), []
        for name in sorted({name for record in records for name in record if LOSS.fullmatch(name)}):
            steps, values = series(records, name)
            every = -(-len(steps) // MOST_POINTS) or 1
            rows += [(int(step), value, name) for step, value in zip(steps[::-every][::-1], values[::-every][::-1])]
        return pd.DataFrame(rows, columns=["step", "value", "quantity"])

    def newest_grid(self) -> str | None:
        """The last picture of samples, of the averaged weights where there are both."""
        found = [(int(name[2]), name[1] == "ema", path) for path in (self.folder / "samples").glob("*.png")
                 if (name := GRID.fullmatch(path.name))]  # fmt: skip
        return str(max(found)[-1]) if found else None

    def look(self) -> tuple[str, dict[str, Any], str | None]:
        """All that the page shows."""
        losses = self.losses()
        # A plot keeps the types of its first values, so that an empty one could never draw a line.
        return self.says(), gr.LinePlot(losses, visible=len(losses) > 0), self.newest_grid()


def left(seconds: float) -> str:
    """A time to wait, to the minute."""
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"about {hours} h {minutes} min left" if hours else f"about {max(1, minutes)} min left"


def build_watch(folder: Path) -> gr.Blocks:
    """The page of a run; it looks again by itself."""
    run = Run(folder)
    with gr.Blocks(title=folder.resolve().name, analytics_enabled=False) as page:
        gr.Markdown(f"# {folder.resolve().name}")
        said = gr.Markdown(elem_id="says")
        with gr.Row():
            look = {"y_title": "loss", "height": 420, "elem_id": "curve", "visible": False}
            curve = gr.LinePlot(x="step", y="value", color="quantity", **look)
            grid = gr.Image(show_label=False, interactive=False, elem_id="grid", buttons=["fullscreen", "download"])
        shown = [said, curve, grid]
        page.load(run.look, outputs=shown, show_progress="hidden", api_name="look")
        gr.Timer(REFRESH).tick(run.look, outputs=shown, show_progress="hidden", api_visibility="private")
    return page
