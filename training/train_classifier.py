"""Train a classifier of noisy images, whose gradient guides a diffusion model.

    accelerate launch training/train_classifier.py --config training/recipes/digits_classifier.yaml
    accelerate launch training/train_classifier.py --train_data_dir my_images --resolution 64

The noise schedule must be that of the diffusion model. It is saved in the classifier's config, and
the pipeline compares them:

    classifier = ADMClassifier.from_pretrained("runs/classifier")
    pipe = ClassifierGuidancePipeline.from_pretrained("runs/model", classifier=classifier)

Settings come from `--config` files, then from flags; `--help` lists them and `--dry_run` shows what
a run would do.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from accelerate import Accelerator
from diffusers.utils import CONFIG_NAME
from torch import nn

from hf_diffusion.config.options import option
from hf_diffusion.config.run_options import TrainingConfig
from hf_diffusion.config.shared_options import DataOptions, NoiseScheduleOptions, UNetOptions
from hf_diffusion.data.protocol import TrainingData
from hf_diffusion.files import write_folder
from hf_diffusion.loop.fine_tuning import started_from
from hf_diffusion.loop.generative import check_best_metric, held_out_loss
from hf_diffusion.loop.start import run
from hf_diffusion.loop.trainer import Trainer
from hf_diffusion.losses.noisy_classes import NoisyClassObjective
from hf_diffusion.models.unet_adm import ADMClassifier
from hf_diffusion.schedulers.scheduling_gaussian import LinearDDPMScheduler


@dataclass(kw_only=True)
class ClassifierConfig(UNetOptions, NoiseScheduleOptions, TrainingConfig, DataOptions):
    """Train a classifier on noisy images, for classifier guidance."""

    method: ClassVar[str] = "classifier"
    kind: ClassVar[str] = "classifier of noisy images"
    tags: ClassVar[tuple[str, ...]] = ("adm-classifier",)
    task: ClassVar[str | None] = "image-classification"
    usage_template: ClassVar[str | None] = "use_classifier.md"

    random_crop: float = option(
        1.0,
        "smallest side of a crop at random, as a share of the image; 1 crops nothing, 0.8 suits photographs",
        group="method",
        above=0,
        at_most=1,
    )
    pool: Literal["adaptive", "attention", "spatial", "spatial_v2"] = option(
        "attention", "how pixels become one answer; attention is the one of ADM", group="network"
    )
    # Without images that the training does not see, a classifier that has learned them by heart
    # looks perfect.
    eval_split: str | None = option(
        None,
        "split that loss and accuracy are measured on at every eval_steps, such as train[90%:] or test",
        group="evaluation",
        tied=None,
    )

    def papers(self) -> tuple[str, ...]:
        improved = ("nichol2021improved",) if self.beta_schedule == "squaredcos_cap_v2" else ()
        zero_snr = ("lin2024common",) if self.rescale_betas_zero_snr else ()
        # Dhariwal and Nichol have the network, one half of their U-Net, and the guidance that it is
        # for.
        return ("ho2020denoising", *improved, "dhariwal2021diffusion", *zero_snr)


def build_network(config: ClassifierConfig, data: TrainingData) -> ADMClassifier:
    """A classifier for the shape and the classes of the data, which records class names and noise
    schedule.
    """
    if data.kind != "images":
        raise ValueError(f"{data.name} holds {data.kind}, and this classifier is one of images; give images")
    if not data.num_classes:
        reason = data.why_no_classes or "name their column by --label_column"
        raise ValueError(f"{data.name} has no labels to learn; {reason}")
    torch.manual_seed(config.seed)
    return ADMClassifier(
        **config.unet_shape(data.sample_shape),
        num_classes=data.num_classes,
        pool=config.pool,
        id2label=dict(enumerate(data.class_names)),
        noise_schedule=config.noise_schedule(),
    )


def build(config: ClassifierConfig, accelerator: Accelerator, data: TrainingData) -> Trainer:
    """The trainer of a classifier, which users get as a model alone."""
    # v_prediction, because nothing is predicted here and zero SNR is refused with the default.
    scheduler = LinearDDPMScheduler(**config.noise_schedule(), prediction_type="v_prediction")
    network = started_from(config, data, build_network(config, data), config.noise_schedule())
    objective = NoisyClassObjective(scheduler, network, config.learning_rate, config.random_crop)
    evaluators = held_out_loss(config, accelerator, data, objective.players[0])
    check_best_metric(config, evaluators)

    def export(network: nn.Module, folder: Path) -> None:
        write_folder(folder, network.save_pretrained, last=CONFIG_NAME)

    return Trainer(config, accelerator, objective, data, export, evaluators=evaluators)


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says; returns the exit status."""
    return run(ClassifierConfig, build, argv, prog="train_classifier.py")


if __name__ == "__main__":
    sys.exit(main())
