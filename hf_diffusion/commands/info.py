"""`hf-diffusion info`: what a pipeline consists of."""

import os
from dataclasses import dataclass

from hf_diffusion.commands.command import Command
from hf_diffusion.config.options import UsageError
from hf_diffusion.sampling.options import PipelineOptions


@dataclass(frozen=True, kw_only=True)
class InfoCommand(PipelineOptions, Command):
    """Show what a pipeline consists of.

    Neither runs its code nor fetches its weights.
    """

    def run(self) -> None:
        """Print the classes, the configurations and the numbers of parameters."""
        # Both import diffusers, which takes seconds, and --help comes past here without running
        # anything.
        from hf_diffusion.hub.download import fetch_and_verify
        from hf_diffusion.hub.loading import describe_pipeline

        if self.verify:
            if os.path.isdir(self.pipeline):
                raise UsageError(
                    f"--verify compares a download with the Hub, but {self.pipeline} is a folder here; leave it out"
                )
            commit, count = fetch_and_verify(self.pipeline, self.revision)
            print(f"{self.pipeline} at commit {commit[:12]}: all {count} files are as on the Hub")
        description = describe_pipeline(self.pipeline, **self.where())
        index = description["index"]
        print(f"{self.pipeline}: {description['class_name']}")
        if isinstance(index["_class_name"], list):
            print("carries its own code; not run by hf-diffusion, which uses the installed classes")
        if index.get("id2label"):
            print(f"{len(index['id2label'])} classes: " + ", ".join(index["id2label"].values()))
        for name, part in description["parts"].items():
            count = f", {part['parameters']:,} parameters" if part["parameters"] else ""
            print(f"\n{name}: {part['class_name']}{count}")
            for key, value in part["config"].items():
                if not key.startswith("_"):
                    print(f"  {key}: {value}")
