"""`hf-diffusion watch`: follow a run in the browser."""

from dataclasses import dataclass
from pathlib import Path

from hf_diffusion.commands.command import Command
from hf_diffusion.commands.demo import PageOptions
from hf_diffusion.config.options import UsageError, option


@dataclass(frozen=True, kw_only=True)
class WatchCommand(PageOptions, Command):
    """Follow a run in the browser.

    A local page with the curve, the rate, the time left and the newest grid, read from the run's
    folder. Needs gradio, which comes with `pip install 'hf-diffusion[space]'`.
    """

    output_dir: Path = option(help="output folder of a training run", group="run", positional=True)

    def run(self) -> None:
        """Serve the page; it reads and never writes."""
        from hf_diffusion.space.serving import require_gradio, serve

        if not self.output_dir.is_dir():
            raise UsageError(f"there is no folder {self.output_dir}; give the --output_dir of a training run")
        require_gradio()
        from hf_diffusion.space.watch import build_watch

        serve(build_watch(self.output_dir), self.port, self.host)
