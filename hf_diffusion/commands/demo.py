"""`hf-diffusion demo`: draw from a model in the browser."""

from dataclasses import dataclass
from pathlib import Path

from hf_diffusion.commands.command import Command
from hf_diffusion.config.options import option
from hf_diffusion.sampling.options import PipelineOptions


@dataclass(frozen=True, kw_only=True)
class PageOptions:
    """Where a page is served."""

    port: int | None = option(None, "none is a free one", group="page", at_least=1, at_most=65535)
    host: str = option("127.0.0.1", "address to serve at; 0.0.0.0 lets every machine of the network in")


@dataclass(frozen=True, kw_only=True)
class DemoCommand(PageOptions, PipelineOptions, Command):
    """Draw from a model in the browser, on this machine.

    The page of `hf-diffusion space`, with the package's own classes. Needs gradio, which comes with
    `pip install 'hf-diffusion[space]'`.
    """

    # Code of a repository can do whatever its user can; the package's own classes need none.
    trust_remote_code: bool = option(
        False, "run the code of a repository that hf_diffusion does not know", group="pipeline"
    )
    device: str | None = option(None, "cpu, cuda, cuda:1, ...; none is cuda where there is one")

    def run(self) -> None:
        """Load, check, serve."""
        from hf_diffusion.space.serving import require_gradio, serve

        require_gradio()
        # torch takes seconds, and --help comes past here without running anything.
        import torch

        from hf_diffusion.hub.loading import load_pipeline
        from hf_diffusion.space.app import build

        pipeline = load_pipeline(
            self.pipeline, trust_remote_code=self.trust_remote_code, verify=self.verify, **self.where()
        )
        pipeline = pipeline.to(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        serve(build(pipeline, Path(self.pipeline).resolve().name.replace("_", " ")), self.port, self.host)
