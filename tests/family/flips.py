"""A family that no file of the package knows: vectors of seven signs, corrupted by flipping signs.

There is no Gaussian noise, no timestep and no image in it. A level u in [0, 1) says how many signs
are wrong: each is replaced by a fair coin with probability u. The network predicts the clean signs.
Sampling goes from coins to signs in rounds. A copy of this file travels with the weights.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from PIL import Image
from torch import nn

from hf_diffusion.pipelines.self_contained import SelfContainedMixin


WIDTH = 7


class FlipScheduler(SchedulerMixin, ConfigMixin):
    """Levels fall evenly from `highest` in as many rounds as are asked for."""

    @register_to_config
    def __init__(self, highest: float = 0.98):
        pass

    def levels(self, rounds: int) -> list[float]:
        return [self.config.highest * (rounds - i) / rounds for i in range(rounds)]

    def corrupt(self, signs, level, chance, coin):
        """Signs (B, 7); where chance (B, 7) is below level (B,), the sign of coin - 1/2."""
        return torch.where(chance < level[:, None], (coin - 0.5).sign(), signs)


class FlipNetwork(ModelMixin, ConfigMixin):
    """Logits (B, 7) of the clean signs, from corrupted ones and their level (B,)."""

    @register_to_config
    def __init__(self, width: int = 32):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH + 1, width), nn.SiLU(), nn.Linear(width, WIDTH))
        self.dropout = nn.Dropout(0.1)

    def forward(self, signs, level):
        return self.layers(self.dropout(torch.cat([signs, level[:, None].to(signs.dtype)], dim=1)))


class FlipPipeline(SelfContainedMixin, DiffusionPipeline):
    """Draws vectors (B, 7) of signs."""

    sampling_options = ("rounds",)
    measures: ClassVar = {"agreement": "tests.family.flips:measure_agreement"}
    num_classes = id2label = null_class_id = None
    sample_shape = (WIDTH,)

    def __init__(self, network, scheduler):
        super().__init__()
        self.register_modules(network=network, scheduler=scheduler)

    def example_call(self):
        return {"batch_size": 3, "rounds": 4}

    @torch.no_grad()
    def __call__(self, batch_size: int = 1, rounds: int = 8, generator=None, output_type: str = "np"):
        one_each = generator if isinstance(generator, list) else [generator] * batch_size
        draws = [torch.rand(rounds + 1, 2, WIDTH, generator=g) for g in one_each]
        chance, coin = torch.stack(draws).unbind(2)
        signs = (coin[:, 0] - 0.5).sign()
        for i, level in enumerate(self.scheduler.levels(rounds)):
            known = self.network(signs, torch.full((batch_size,), level)).sigmoid()
            clean = torch.where(chance[:, i + 1] < known, 1.0, -1.0)
            lower = torch.full((batch_size,), self.scheduler.levels(rounds + 1)[i + 1])
            signs = self.scheduler.corrupt(clean, lower, coin[:, i + 1], chance[:, i])
        return (clean.numpy(),)


# --- what trains it, in the same file, so that the whole family can be read at once ---


def measure_agreement(pipeline, data, options):
    """The share of neighbours with equal signs, which the data have at nine in ten."""
    from hf_diffusion.evaluation.measures import Evaluation, Measure

    signs = pipeline(options.count, generator=[torch.Generator().manual_seed(i) for i in range(options.count)])[0]
    share = float((signs[:, 1:] == signs[:, :-1]).mean())
    return Evaluation(
        {"agreement": Measure("neighbours that agree", share, better="higher")}, {"count": options.count}
    )


def make_data(dataset_name: str = "signs", rows: int = 256, seed: int = 0, **options_of_images):
    """Chains of signs, each of which equals its neighbour with probability 0.9."""
    from hf_diffusion.data.protocol import TrainingData

    class SignData(TrainingData):
        kind = "vectors"

        def __init__(self):
            rng = np.random.default_rng(seed)
            first = rng.choice([-1.0, 1.0], (rows, 1))
            turns = rng.choice([-1.0, 1.0], (rows, WIDTH - 1), p=[0.1, 0.9])
            self.signs = torch.from_numpy(np.cumprod(np.hstack([first, turns]), axis=1)).float()
            self.name, self.fingerprint = dataset_name, f"signs-{rows}-{seed}"
            self.num_samples, self.sample_shape = rows, (WIDTH,)

        def fetch(self, indices, epoch):
            return {"x_0": self.signs[list(indices)], "indices": torch.tensor(list(indices))}

        def picture(self, samples, columns=None, row_labels=None):
            rows = Image.fromarray(((np.asarray(samples) + 1) * 127.5).clip(0, 255).astype(np.uint8))
            return rows.resize((WIDTH * 8, len(samples) * 8), Image.Resampling.NEAREST)

    return SignData()


def make_script():
    """The configuration and `build` of a training script."""
    from hf_diffusion.config.options import option
    from hf_diffusion.config.run_options import TrainingConfig
    from hf_diffusion.evaluation.held_out import HeldOutLoss
    from hf_diffusion.loop.generative import sample_grid
    from hf_diffusion.loop.trainer import Trainer
    from hf_diffusion.losses.objective import Objective, Player

    @dataclass(kw_only=True)
    class FlipConfig(TrainingConfig):
        """Train a network to undo flipped signs."""

        method: ClassVar[str] = "flips"
        kind: ClassVar[str] = "model of signs"
        tags: ClassVar[tuple[str, ...]] = ("flips",)

        dataset_name: str = option("signs", "the data", group="data")
        rows: int = option(256, "how many vectors", at_least=1)
        highest: float = option(0.98, "most signs that are wrong", group="method", above=0, below=1)
        width: int = option(32, "width of the network", group="teacher", at_least=1)

        def papers(self):
            return ("austin2021structured", "@misc{flips2026, title={Signs and Coins}, author={Nobody}, year={2026}}")

        def sampling_options(self):
            return {"rounds": 4}

        def data_arguments(self):
            return {"dataset_name": self.dataset_name, "rows": self.rows, "seed": self.seed}

    def build(config, accelerator, data):
        torch.manual_seed(config.seed)
        scheduler = FlipScheduler(config.highest)

        def loss(network, batch, draw):
            level, signs = draw.level(), batch["x_0"]
            wrong = scheduler.corrupt(signs, level * config.highest, draw.uniform(WIDTH), draw.uniform(WIDTH))
            logits = network(wrong, level)
            found = F.binary_cross_entropy_with_logits(logits, (signs + 1) / 2, reduction="none").mean(1)
            return {"loss": found, "level": level, "right": ((logits > 0) == (signs > 0)).float().mean(1)}

        player = Player(FlipNetwork(config.width), loss, config.learning_rate, higher_is_better=("right",))
        held_out = HeldOutLoss(accelerator, make_data(rows=64, seed=config.seed + 1), player, 32, config.seed)

        def pipeline(network):
            return FlipPipeline(network, FlipScheduler(config.highest))

        return Trainer(
            config,
            accelerator,
            Objective(player),
            data,
            export=lambda network, folder: pipeline(network).save_pretrained(folder),
            preview=lambda network: sample_grid(pipeline(network), data, 16, config.seed, config.sampling_options()),
            evaluators=[held_out],
        )

    return FlipConfig, build


def main(argv):
    """The training script."""
    from hf_diffusion.loop.start import run

    return run(*make_script(), argv, prog="train_flips.py")
