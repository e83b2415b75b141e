"""Grids of samples in the middle of a run."""

from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn

from hf_diffusion.files import write_shown
from hf_diffusion.loop.signals import StopSignal


FOLDER = "samples"


class DrawingStopped(Exception):
    """A signal came while samples were drawn."""


class Previews:
    """`samples/raw-STEP.png` and `ema-STEP.png`, .txt of texts: what `preview(network)` draws, by
    the main process, until a signal; `show(step, drawn)` hands them to trackers.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        output_dir: Path,
        preview: Callable[[nn.Module], Image.Image | str] | None,
        show: Callable[[int, dict[str, Image.Image | str]], None],
    ):
        self.accelerator, self.folder, self.preview, self.show = accelerator, output_dir / FOLDER, preview, show

    def draw(self, step: int, networks: Callable[[], dict[str, nn.Module]], stop: StopSignal) -> None:
        """Draw with each of `networks()`, which processes that hold a part of them are asked for,
        too.
        """
        if self.preview is None:
            return

        def ask(*_) -> None:
            self._go_on(stop, drawing=True)

        found = networks()
        try:
            for kind, network in found.items() if self.accelerator.is_main_process else ():
                network.register_forward_pre_hook(ask)
                self._draw(step, kind, network)
            # The main process asks at every call of the network, and once at the end. The others
            # answer each time.
            while self._go_on(stop, drawing=False):
                pass
        except DrawingStopped:
            return

    def _draw(self, step: int, kind: str, network: nn.Module) -> None:
        with self.accelerator.autocast():
            grid = self.preview(network)
        write_shown(self.folder / f"{kind}-{step:08d}", grid)
        self.show(step, {f"samples/{kind}": grid})

    def _go_on(self, stop: StopSignal, drawing: bool) -> bool:
        """Whether the main process is still drawing.

        DrawingStopped, on all processes, where one has got a signal.
        """
        flags = torch.tensor([float(stop.requested), float(drawing)], device=self.accelerator.device)
        if self.accelerator.num_processes > 1:
            flags = self.accelerator.reduce(flags, "sum")
        stopped, drawing = (bool(flag > 0) for flag in flags)
        if stopped:
            raise DrawingStopped
        return drawing
