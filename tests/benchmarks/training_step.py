"""One optimizer step, data to averaged weights: the trainer's against diffusers' script's."""

import tempfile
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader, TensorDataset

from hf_diffusion.data.image_data import ImageData
from hf_diffusion.data.images import load_images
from hf_diffusion.loop.trainer import Trainer
from hf_diffusion.losses.denoising import DenoisingObjective
from hf_diffusion.models.unet_adm import ADMUNet2DModel
from hf_diffusion.training.train_ddpm import DDPMConfig, build_scheduler
from tests.benchmarks.networks import networks, parameters
from tests.benchmarks.pairs import Comparison


BATCH, SIZE, STEPS = 64, 28, 1000


def stock_steps(model: UNet2DModel, data: ImageData) -> Iterator[float]:
    """The loop body of diffusers' train_unconditional.py with its defaults.

    It stands in examples/unconditional_image_generation.
    """
    pixels = data.fetch(list(range(len(data))), 0)["x_0"]
    loader = DataLoader(TensorDataset(pixels), batch_size=BATCH, shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=STEPS)
    accelerator = Accelerator(cpu=True)
    model, optimizer, loader, schedule = accelerator.prepare(model.train(), optimizer, loader, schedule)
    ema = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    noise_scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    while True:
        for (clean_images,) in loader:
            noise = torch.randn(clean_images.shape)
            timesteps = torch.randint(0, noise_scheduler.config.num_train_timesteps, (len(clean_images),)).long()
            noisy_images = noise_scheduler.add_noise(clean_images, noise, timesteps)
            with accelerator.accumulate(model):
                loss = F.mse_loss(model(noisy_images, timesteps).sample, noise)
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            ema.step(model.parameters())
            yield loss.detach().item()


def our_steps(model: ADMUNet2DModel, data: ImageData, folder: str) -> Iterator[int]:
    config = DDPMConfig(
        dataset_name="digits",
        resolution=SIZE,
        output_dir=folder,
        train_batch_size=BATCH,
        max_train_steps=STEPS,
        prediction_type="epsilon",
        timestep_sampling="uniform",
        learning_rate=1e-4,
    )
    accelerator = Accelerator(cpu=True)
    objective = DenoisingObjective(build_scheduler(config), model.train(), config, config.learning_rate, accelerator)
    trainer = Trainer(config, accelerator, objective, data, export=lambda averaged, target: None)
    stream = trainer.batches()
    while True:
        trainer.optimizer_step(stream)
        trainer.step += 1
        yield trainer.step


def comparisons() -> Iterator[Comparison]:
    data = load_images(dataset_name="digits", resolution=SIZE)
    data.fetch(list(range(len(data))), 0)  # decoding is over before the clock starts, for both
    stock, ours = networks(size=SIZE, channels=1, blocks=1)
    name = f"training step, {parameters(ours) / 1e6:.1f} M, {BATCH} of {SIZE}x{SIZE}"
    with tempfile.TemporaryDirectory() as folder:
        works = [partial(next, stock_steps(stock, data)), partial(next, our_steps(ours, data, folder))]
        yield Comparison(name, works[0], {"": (works[1], 1.0)}, calls=2)
