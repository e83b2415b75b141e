"""Train a model of one call or a few by distillation of a diffusion model's trajectories.

    accelerate launch training/train_distillation.py \\
        --config training/recipes/fashion_mnist_distillation_cpu.yaml
    accelerate launch training/train_distillation.py --train_data_dir my_images --distill_steps 2 \\
        --init_from runs/my_ddpm --output_dir runs/mine

Settings come from `--config` files, then from flags. `--help` lists them, and `--dry_run` shows
what a run would do.

`--init_from` is a trained model of train_ddpm.py, train_edm.py or train_flow.py, the folder or a
checkpoint. It draws some thousand samples in a dozen calls each, which are kept in
HF_DIFFUSION_CACHE. The student begins with its weights and learns to go the same ways in the few
calls of `--distill_steps`: the same noise then becomes nearly the same sample. The images of the
training are looked at for their shape and their classes only.
"""

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from accelerate import Accelerator

from hf_diffusion.config.options import option
from hf_diffusion.config.run_options import TrainingConfig
from hf_diffusion.config.shared_options import ClassOptions, DataOptions, MeasureOptions
from hf_diffusion.data.protocol import TrainingData
from hf_diffusion.loop.generative import generative_trainer
from hf_diffusion.loop.start import run
from hf_diffusion.loop.trained_denoiser import trained_denoiser
from hf_diffusion.loop.trainer import Trainer
from hf_diffusion.loop.trajectories import kept_trajectories
from hf_diffusion.losses.distribution_matching import check_levels, even_levels
from hf_diffusion.losses.trajectory_objective import TrajectoryObjective, TrajectoryOptions
from hf_diffusion.pipelines.pipeline_consistency import ConsistencyPipeline
from hf_diffusion.schedulers.scheduling_consistency import ConsistencyScheduler


@dataclass(kw_only=True)
class DistillationConfig(MeasureOptions, TrajectoryOptions, ClassOptions, TrainingConfig, DataOptions):
    """Train a few-step student of a diffusion model's trajectories, on images or points."""

    method: ClassVar[str] = "trajectory-distillation"
    kind: ClassVar[str] = "few-step model distilled from trajectories"
    tags: ClassVar[tuple[str, ...]] = ("distillation", "few-step")
    learns_from: ClassVar[str | None] = "trajectories"

    init_from: str | None = option(
        None,
        "the trained diffusion model, a folder or Hub id: the weights to start from, and the teacher",
        is_path=True,
        tied=False,
        often=True,
    )
    # Of the trained network it keeps enough; measured on Fashion-MNIST alone.
    learning_rate: float = option(3e-4, "highest learning rate", above=0, often=True)

    def papers(self) -> tuple[str, ...]:
        used = {
            "luhman2021knowledge": True,
            "salimans2022progressive": self.distill_steps > 1,
            "lu2022dpm": True,
            "ho2022classifier": self.teacher_guidance_scale != 1,
        }
        return tuple(paper for paper, is_used in used.items() if is_used)

    def sampling_options(self) -> dict[str, Any]:
        return {"num_inference_steps": self.distill_steps}


def build_scheduler(config: DistillationConfig, data: TrainingData, process: dict[str, Any]) -> ConsistencyScheduler:
    """The noise levels of the student's calls, and what the network must be told of them."""
    known = process.get("trained_sigmas")
    highest = None if known is None else known[-1]
    sigmas = config.student_sigmas or even_levels(config.distill_steps, min(80.0, highest or 80.0))
    check_levels(sigmas, config.distill_steps, highest)
    return ConsistencyScheduler(
        sigma_max=sigmas[0],
        # points know no bounds
        clip_denoised=data.kind == "images",
        sampling_sigmas=sigmas,
        renoise=False,
        predicts_end=config.student_targets == "end",
        **process,
    )


def build(config: DistillationConfig, accelerator: Accelerator, data: TrainingData) -> Trainer:
    """The trainer of the student.

    Users get it with its scheduler and the names of the classes.
    """
    student, process = trained_denoiser(config, data)
    if config.teacher_guidance_scale != 1 and not student.config.get("null_class"):
        raise ValueError(
            f"teacher_guidance_scale {config.teacher_guidance_scale} needs a model that was trained with labels left "
            "out, and init_from was not; give 1"
        )
    scheduler = build_scheduler(config, data, process)
    teacher = copy.deepcopy(student)
    follow = partial(
        kept_trajectories, accelerator, teacher, scheduler, config, config.seed, data.sample_shape, config.dry_run
    )
    total = config.total_steps(data.num_samples, accelerator.num_processes)
    objective = TrajectoryObjective(scheduler, student, follow, config, config.learning_rate, total)
    names = dict(enumerate(data.class_names)) if config.class_conditional else None

    def pipeline(network) -> ConsistencyPipeline:
        # a scheduler of its own: sampling chooses levels
        return ConsistencyPipeline(network, ConsistencyScheduler.from_config(scheduler.config), names)

    return generative_trainer(config, accelerator, objective, data, pipeline, **config.sampling_options())


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says; returns the exit status."""
    return run(DistillationConfig, build, argv, prog="train_distillation.py")


if __name__ == "__main__":
    sys.exit(main())
