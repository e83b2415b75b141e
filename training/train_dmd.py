"""Train a model of one call or a few by distribution matching, DMD2 (arXiv:2405.14867).

    accelerate launch training/train_dmd.py --config training/recipes/fashion_mnist_dmd_cpu.yaml
    accelerate launch training/train_dmd.py --train_data_dir my_images --dmd_steps 2 \\
        --init_from runs/my_ddpm --output_dir runs/mine

Settings come from `--config` files, then from flags. `--help` lists them, and `--dry_run` shows
what a run would do.

`--init_from` is a trained model of train_ddpm.py, train_edm.py or train_flow.py, the folder or a
checkpoint. The student begins with its weights and moves to where the model's denoiser and that of
the student's own samples agree, and where a head on the latter's features tells nothing apart.
`--distribution_matching_weight 0` leaves the head alone, `--adversarial_weight 0` leaves it out.

In metrics.jsonl `right` is the share of pairs in which the real sample has the larger logit. Where
it nears 1, the head has won: lower fake_learning_rate, or give r1_gamma. `denoising` is the fake
denoiser's error. Where it rises, the student runs away from it: raise fake_updates or
fake_learning_rate, or lower learning_rate.
"""

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from hf_diffusion.config.options import option
from hf_diffusion.config.run_options import TrainingConfig
from hf_diffusion.config.shared_options import ClassOptions, DataOptions, MeasureOptions
from hf_diffusion.data.protocol import TrainingData
from hf_diffusion.loop.generative import generative_trainer
from hf_diffusion.loop.start import run
from hf_diffusion.loop.trained_denoiser import trained_denoiser
from hf_diffusion.loop.trainer import Trainer
from hf_diffusion.losses.distribution_matching import FakeDenoiser, check_levels, even_levels
from hf_diffusion.losses.distribution_matching_objective import DistributionMatchingGame, DistributionMatchingOptions
from hf_diffusion.pipelines.pipeline_consistency import ConsistencyPipeline
from hf_diffusion.schedulers.scheduling_consistency import ConsistencyScheduler


@dataclass(kw_only=True)
class DMDConfig(MeasureOptions, DistributionMatchingOptions, ClassOptions, TrainingConfig, DataOptions):
    """Train a few-step student of a diffusion model, on images or points."""

    method: ClassVar[str] = "distribution-matching"
    kind: ClassVar[str] = "few-step model by distribution matching"
    tags: ClassVar[tuple[str, ...]] = ("distribution-matching", "few-step")

    init_from: str | None = option(
        None,
        "the trained diffusion model, a folder or Hub id: the weights to start from, and the teacher",
        is_path=True,
        tied=False,
        often=True,
    )
    # In one call a diffusion model draws the mean of its data, which is far from any sample.
    teacher: str | None = option(
        None,
        "the teacher where init_from is a consistency model that was tuned from it; none is init_from",
        is_path=True,
        tied=False,
        often=True,
    )
    # The networks know already what there is to see.
    learning_rate: float = option(1e-4, "highest learning rate of the student", above=0, often=True)

    def papers(self) -> tuple[str, ...]:
        used = {
            "yin2024one": self.distribution_matching_weight > 0,
            "yin2024improved": True,
            "ho2022classifier": self.teacher_guidance_scale != 1,
        }
        return tuple(paper for paper, is_used in used.items() if is_used)

    def sampling_options(self) -> dict[str, Any]:
        return {"num_inference_steps": self.dmd_steps}


def build_scheduler(config: DMDConfig, data: TrainingData, process: dict[str, Any]) -> ConsistencyScheduler:
    """The noise levels of the student's calls, and how the teacher is asked at any level."""
    known = process.get("trained_sigmas")
    highest = None if known is None else known[-1]
    sigmas = config.student_sigmas or even_levels(config.dmd_steps, min(80.0, highest or 80.0))
    check_levels(sigmas, config.dmd_steps, highest)
    return ConsistencyScheduler(
        sigma_min=config.sigma_min,
        sigma_max=sigmas[0],
        # points know no bounds
        clip_denoised=data.kind == "images",
        sampling_sigmas=sigmas,
        **process,
    )


def build_teacher(
    config: DMDConfig, data: TrainingData, student: nn.Module, scheduler: ConsistencyScheduler
) -> nn.Module:
    """The denoiser whose distribution is to be matched; ValueError where its process is not that of
    the student.
    """
    if config.teacher is None:
        return copy.deepcopy(student)
    other = copy.copy(config)
    other.init_from = config.teacher
    teacher, process = trained_denoiser(other, data)
    own = ConsistencyScheduler(**process).config
    for name in ("prediction_type", "sigma_data", "trained_sigmas", "time_scale"):
        # a saved list may have been a tuple
        if not np.array_equal(scheduler.config[name], own[name]):
            raise ValueError(
                f"teacher {config.teacher} has another {name} than init_from {config.init_from}; give the model that "
                "init_from was tuned from"
            )
    return teacher


def build(config: DMDConfig, accelerator: Accelerator, data: TrainingData) -> Trainer:
    """The trainer of both networks.

    Users get the student with its scheduler and the names of the classes.
    """
    student, process = trained_denoiser(config, data)
    scheduler = build_scheduler(config, data, process)
    teacher, rate = build_teacher(config, data, student, scheduler), config.learning_rate
    # of the head, which is new
    torch.manual_seed(config.seed)
    fake = FakeDenoiser(copy.deepcopy(teacher), classifies=config.adversarial_weight > 0)
    game = DistributionMatchingGame(scheduler, student, fake, teacher, config, rate, accelerator)
    names = dict(enumerate(data.class_names)) if config.class_conditional else None

    def pipeline(network: nn.Module) -> ConsistencyPipeline:
        # a scheduler of its own: sampling chooses levels
        return ConsistencyPipeline(network, ConsistencyScheduler.from_config(scheduler.config), names)

    return generative_trainer(config, accelerator, game, data, pipeline, **config.sampling_options())


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says; returns the exit status."""
    return run(DMDConfig, build, argv, prog="train_dmd.py")


if __name__ == "__main__":
    sys.exit(main())
