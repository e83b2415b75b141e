"""What the trainer adds to a step: order, draws, log and checks, against the same step bare.

The bare step has the network, the loss, clipping, fused AdamW and the average, on a batch that is
always the same and always there. With --optimizer muon also what its products cost beside AdamW's.
"""

import tempfile
from collections.abc import Callable, Iterator
from functools import partial

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import nn

from hf_diffusion.data.image_data import ImageData
from hf_diffusion.data.images import load_images
from hf_diffusion.loop.trainer import Trainer
from hf_diffusion.loop.update import OPTIMIZERS
from hf_diffusion.losses.denoising import DenoisingObjective
from hf_diffusion.randomness import Draw
from hf_diffusion.training.train_ddpm import DDPMConfig, build_scheduler
from tests.benchmarks.networks import networks, parameters
from tests.benchmarks.pairs import Comparison


BATCH, SIZE, STEPS = 64, 28, 10_000
# Within 3 % of the bare step; and what Muon's products may cost beside it.
TARGET, MUON_TARGET = 1.03, 1.2


def settings(folder: str, optimizer: str = "adamw") -> DDPMConfig:
    return DDPMConfig(
        dataset_name="digits",
        resolution=SIZE,
        output_dir=folder,
        train_batch_size=BATCH,
        max_train_steps=STEPS,
        learning_rate=1e-4,
        optimizer=optimizer,
    )


def in_works(step: Callable[[], None], device: torch.device) -> Iterator[None]:
    """Works of one step; of ten on a GPU, which still computes one while the next is asked for."""
    while True:
        for _ in range(10 if device.type == "cuda" else 1):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        yield


def bare_steps(model: nn.Module, config: DDPMConfig, data: ImageData, accelerator: Accelerator) -> Iterator[None]:
    device = accelerator.device
    model = model.to(device).train()
    objective = DenoisingObjective(build_scheduler(config), model, config, config.learning_rate, accelerator)
    optimizer = OPTIMIZERS[config.optimizer](model, lr=config.learning_rate)
    average = EMAModel(model.parameters(), decay=0.999, use_ema_warmup=True, foreach=True)
    batch = {name: value.to(device) for name, value in data.fetch(list(range(BATCH)), 0).items()}
    draw = Draw(0, 0, slice(0, BATCH), BATCH, device)

    def step() -> None:
        objective.values(model, batch, draw)["loss"].mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.step(model.parameters())

    return in_works(step, device)


def our_steps(model: nn.Module, config: DDPMConfig, data: ImageData, accelerator: Accelerator) -> Iterator[None]:
    objective = DenoisingObjective(build_scheduler(config), model, config, config.learning_rate, accelerator)
    trainer = Trainer(config, accelerator, objective, data, export=lambda averaged, target: None)
    trainer.objective.players[0].network.train()
    stream = trainer.batches()

    def step() -> None:
        trainer.optimizer_step(stream)
        trainer.step += 1

    return in_works(step, accelerator.device)


def comparisons() -> Iterator[Comparison]:
    data = load_images(dataset_name="digits", resolution=SIZE)
    data.fetch(list(range(len(data))), 0)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    with tempfile.TemporaryDirectory() as folder:
        made = [networks(size=SIZE, channels=1, blocks=1)[1] for _ in range(3)]
        works = [
            partial(next, steps(model, settings(folder, optimizer), data, accelerator))
            for steps, model, optimizer in zip(
                (bare_steps, our_steps, bare_steps), made, ("adamw", "adamw", "muon"), strict=True
            )
        ]
        yield Comparison(
            f"step of {parameters(made[0]) / 1e6:.1f} M, {BATCH} of {SIZE}x{SIZE}, over the bare step",
            works[0],
            {"trainer": (works[1], TARGET), "bare with Muon": (works[2], MUON_TARGET)},
            calls=2,
        )
