"""One DDGAN step on the CPU: the trainer's against the reference's, written from its description.

What is dear in the reference's step:
- FIR resampling treats every channel of every image as an image of its own;
- a downsampling computes all outputs and drops three quarters of them;
- an upsampling is a convolution over inserted zeros;
- the discriminator's half differentiates through the generator and drops that gradient.
"""

import copy
import tempfile
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from hf_diffusion.data.image_data import ImageData
from hf_diffusion.data.images import load_images
from hf_diffusion.losses.adversarial import r1_penalty
from hf_diffusion.models.ncsnpp_ddgan import Resample
from hf_diffusion.schedulers.scheduling_ddgan import DDGANScheduler
from hf_diffusion.training.train_ddgan import DDGANConfig, build, build_discriminator, build_generator
from tests.benchmarks.networks import parameters
from tests.benchmarks.pairs import Comparison


BATCH, SIZE, STEPS, GAMMA = 64, 28, 1000, 0.05


def upfirdn_by_channel(x: Tensor, kernel: Tensor, up: int = 1, down: int = 1, pad: tuple[int, int] = (0, 0)) -> Tensor:
    """`upfirdn2d` the slow way."""
    batch, channels, height, width = x.shape
    x = F.pad(x.reshape(-1, 1, height, 1, width, 1), (0, up - 1, 0, 0, 0, up - 1))
    x = F.pad(x.reshape(-1, 1, height * up, width * up), (*pad, *pad))
    x = F.conv2d(x, kernel.flip(0, 1)[None, None])[:, :, ::down, ::down]
    return x.reshape(batch, channels, *x.shape[-2:])


class ResampleByChannel(torch.nn.Module):
    def __init__(self, fast: Resample):
        super().__init__()
        self.direction, self.kernel = fast.direction, fast.kernel

    def forward(self, x: Tensor) -> Tensor:
        if self.direction == "up":
            return upfirdn_by_channel(x, 4 * self.kernel, up=2, pad=(2, 1))
        return upfirdn_by_channel(x, self.kernel, down=2, pad=(1, 1))


def slowed(network: torch.nn.Module) -> torch.nn.Module:
    """A copy that resamples by channel.

    The pyramid's one filter a level stays as it is, in favour of the reference.
    """
    network = copy.deepcopy(network)
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, Resample):
                setattr(module, name, ResampleByChannel(child))
    return network


def reference_steps(generator: torch.nn.Module, discriminator: torch.nn.Module, data: ImageData) -> Iterator[float]:
    """The iteration of reference/ddgan.md section 1.

    Real, R1 and fake each have a backward; the generator's graph is kept throughout.
    """
    generator, discriminator = slowed(generator), slowed(discriminator)
    process = DDGANScheduler(4)
    optimizers = [torch.optim.Adam(net.parameters(), lr=1e-4, betas=(0.5, 0.9)) for net in (generator, discriminator)]
    averages = [p.detach().clone() for p in generator.parameters()]
    pixels = data.fetch(list(range(len(data))), 0)["x_0"]

    def pairs(x_0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t = torch.randint(0, len(process), (BATCH,))
        return t, *process.q_sample_pairs(x_0, t)

    def fake(x_tp1: Tensor, t: Tensor) -> Tensor:
        x_0 = generator(x_tp1, t, torch.randn(BATCH, generator.config.latent_dim)).sample
        return process.sample_posterior(x_0, x_tp1, t)

    while True:
        x_0 = pixels[torch.randint(0, len(pixels), (BATCH,))]
        t, x_t, x_tp1 = pairs(x_0)
        discriminator.zero_grad()
        x_t.requires_grad_()
        real = discriminator(x_t, t, x_tp1).logits
        F.softplus(-real).mean().backward(retain_graph=True)
        r1_penalty(real, x_t, GAMMA).mean().backward()
        F.softplus(discriminator(fake(x_tp1, t), t, x_tp1).logits).mean().backward()
        optimizers[1].step()
        t, _, x_tp1 = pairs(x_0)
        generator.zero_grad()
        loss = F.softplus(-discriminator(fake(x_tp1, t), t, x_tp1).logits).mean()
        loss.backward()
        optimizers[0].step()
        with torch.no_grad():
            for average, parameter in zip(averages, generator.parameters()):
                average.mul_(0.999).add_(parameter, alpha=0.001)
        yield loss.item()


def our_steps(config: DDGANConfig, data: ImageData) -> Iterator[int]:
    trainer = build(config, Accelerator(cpu=True), data)
    stream = trainer.batches()
    while True:
        trainer.optimizer_step(stream)
        trainer.step += 1
        yield trainer.step


def resample_twice(up: torch.nn.Module, down: torch.nn.Module, x: Tensor) -> None:
    """Down, up, and their backward."""
    x.grad = None
    up(down(x)).sum().backward()


def comparisons() -> Iterator[Comparison]:
    x = torch.randn(BATCH, 24, SIZE, SIZE, requires_grad=True)
    fast = [Resample(direction, (1, 3, 3, 1)) for direction in ("up", "down")]
    slow = [ResampleByChannel(module) for module in fast]
    torch.testing.assert_close(slow[0](slow[1](x)), fast[0](fast[1](x)))
    works = [partial(resample_twice, *modules, x) for modules in (slow, fast)]
    yield Comparison(f"FIR down and up, forward and backward {tuple(x.shape)}", works[0], {"": (works[1], 0.1)})

    data = load_images(dataset_name="digits", resolution=SIZE)
    data.fetch(list(range(len(data))), 0)  # decoding is over before the clock starts, for both
    with tempfile.TemporaryDirectory() as folder:
        config = DDGANConfig(
            dataset_name="digits",
            resolution=SIZE,
            output_dir=folder,
            train_batch_size=BATCH,
            max_train_steps=STEPS,
            r1_gamma=GAMMA,
            model_channels=16,
            num_res_blocks=1,
            attention_sizes=(7,),
            latent_dim=32,
            latent_embed_dim=64,
            num_latent_layers=2,
            discriminator_channels=8,
            time_embed_dim=64,
        )
        networks = build_generator(config, data), build_discriminator(config, data)
        sizes = " and ".join(f"{parameters(network) / 1e6:.2f}" for network in networks)
        works = [partial(next, reference_steps(*networks, data)), partial(next, our_steps(config, data))]
        yield Comparison(f"DDGAN step, {sizes} M, {BATCH} of {SIZE}x{SIZE}", works[0], {"": (works[1], 0.5)})
