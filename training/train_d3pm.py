"""Train a diffusion model of categories (D3PM) on your own images, as integers of 2 to 256 levels.

    accelerate launch training/train_d3pm.py --config training/recipes/digits_d3pm.yaml
    accelerate launch training/train_d3pm.py --train_data_dir my_images --resolution 32

Settings come from `--config` files, then from flags; `--help` lists them and `--dry_run` shows what
a run would do.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from accelerate import Accelerator
from torch import nn

from hf_diffusion.config.denoiser_options import DenoiserOptions
from hf_diffusion.config.options import option
from hf_diffusion.config.preset import Choice, Circumstances
from hf_diffusion.config.run_options import TrainingConfig
from hf_diffusion.config.shared_options import ClassOptions, DataOptions, MeasureOptions
from hf_diffusion.data.points import SHAPES
from hf_diffusion.data.protocol import TrainingData
from hf_diffusion.loop.fine_tuning import started_from
from hf_diffusion.loop.generative import generative_trainer
from hf_diffusion.loop.networks import new_denoiser
from hf_diffusion.loop.start import run
from hf_diffusion.loop.trainer import Trainer
from hf_diffusion.losses.discrete import DiscreteObjective, DiscreteOptions
from hf_diffusion.pipelines.pipeline_discrete_image import DiscreteImagePipeline
from hf_diffusion.schedulers.scheduling_discrete import D3PMScheduler


# Of the sampling of grids while a run that chooses itself trains on a CPU.
GRID_STEPS = 100


@dataclass(kw_only=True)
class D3PMConfig(MeasureOptions, DenoiserOptions, DiscreteOptions, ClassOptions, TrainingConfig, DataOptions):
    """Train a diffusion model of categories on images, with or without classes."""

    method: ClassVar[str] = "d3pm"
    tags: ClassVar[tuple[str, ...]] = ("d3pm", "discrete-diffusion")

    d3pm_num_inference_steps: int | None = option(
        None, "sampling steps of the grids and of eval_metrics; none is all", at_least=1, group="sampling", tied=None
    )
    guidance_scale: float = option(
        1.0, "classifier-free guidance of the grids and of eval_metrics; 1 is none", at_least=0, tied=None
    )

    def check(self) -> None:
        """ValueError for settings of different groups that contradict each other."""
        if (self.d3pm_num_inference_steps or 1) > self.d3pm_num_steps:
            raise ValueError(
                f"d3pm_num_inference_steps {self.d3pm_num_inference_steps} is more than d3pm_num_steps "
                f"{self.d3pm_num_steps}; give fewer"
            )

    def auto_settings(self, circumstances: Circumstances) -> dict[str, Choice]:
        """Grids in fewer steps than the process has, which a CPU would draw for minutes."""
        steps = min(GRID_STEPS, self.d3pm_num_steps)
        grids = {"grids": Choice({"d3pm_num_inference_steps": steps}, "all of its steps take a CPU minutes")}
        return super().auto_settings(circumstances) | (grids if circumstances.on_cpu else {})

    def papers(self) -> tuple[str, ...]:
        used = {
            "austin2021structured": True,
            # The U-Net, which points do without.
            "dhariwal2021diffusion": self.network == "adm" and self.dataset_name not in SHAPES,
            "li2025back": self.network == "transformer",
            "ho2022classifier": self.class_conditional and self.label_dropout > 0,
        }
        return tuple(paper for paper, is_used in used.items() if is_used)

    def sampling_options(self) -> dict[str, Any]:
        guidance = {"guidance_scale": self.guidance_scale} if self.class_conditional else {}
        return {"num_inference_steps": self.d3pm_num_inference_steps or self.d3pm_num_steps, **guidance}


def build_network(config: D3PMConfig, data: TrainingData) -> nn.Module:
    """A network for the shape and the classes of the data, with an output for each level."""
    return new_denoiser(config, data, config.output_channels(data.sample_shape[0]))


def build(config: D3PMConfig, accelerator: Accelerator, data: TrainingData) -> Trainer:
    """The trainer of a network, which users get with its process and the names of the classes."""
    scheduler, network = D3PMScheduler(**config.process()), started_from(config, data, build_network(config, data))
    objective = DiscreteObjective(scheduler, network, config, config.learning_rate)
    names = dict(enumerate(data.class_names)) if config.class_conditional else None

    def pipeline(network: nn.Module) -> DiscreteImagePipeline:
        # a scheduler of its own: sampling chooses timesteps, training needs all
        return DiscreteImagePipeline(network, D3PMScheduler.from_config(scheduler.config), names)

    return generative_trainer(config, accelerator, objective, data, pipeline, **config.sampling_options())


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says; returns the exit status."""
    return run(D3PMConfig, build, argv, prog="train_d3pm.py")


if __name__ == "__main__":
    sys.exit(main())
