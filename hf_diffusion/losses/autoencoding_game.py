"""An autoencoder and the critic of its reconstructions, as two players.

The losses are in `losses.autoencoding`; here is who sees what, and when the critic joins. B images
of shape (C, H, W).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, VQModel
from torch import Tensor, nn

from hf_diffusion.config.options import option
from hf_diffusion.figures.curves import autoencoder_curve
from hf_diffusion.losses.autoencoding import (
    adaptive_weight,
    critic_loss,
    fooling_loss,
    negative_log_likelihood,
    perplexity,
    posterior_kl,
    quantise,
    reconstruction_errors,
    sample_posterior,
)
from hf_diffusion.losses.objective import Objective, Player, Values
from hf_diffusion.randomness import Draw, FixedDraw


AUTOENCODERS = {cls.__name__: cls for cls in (AutoencoderKL, VQModel)}
# Of two batches of images to one of distances (B,).
Distance = Callable[[Tensor, Tensor], Tensor]


@dataclass(kw_only=True)
class AutoencodingOptions:
    """What an autoencoder is trained by, with the values of latent diffusion."""

    # Small: latents are to be smooth, not to become noise. It weighs a sum over values.
    kl_weight: float = option(
        1e-6, "weight of the latents' KL divergence from N(0, 1)", group="method", at_least=0, tied=False
    )
    quantised: bool = option(False, "train a VQModel, whose latents are codes, instead of an AutoencoderKL")
    commitment: float = option(0.25, "weight of the term that moves latents to their codes", above=0)
    perceptual_weight: float = option(1.0, "weight of the perceptual distance", at_least=0, tied=False)
    # With a scale of 1 the likelihood is the distance itself. So it is in the reference, whose
    # optimizer never gets the parameter.
    learned_logvar: bool = option(False, "learn the scale of the likelihood, one number")
    adversarial_weight: float = option(
        0.5, "weight of the critic in the autoencoder's loss; 0 trains none", at_least=0
    )
    critic_loss: Literal["hinge", "vanilla"] = option("hinge", "what the critic minimises")
    # Early on any critic tells the two apart, and its gradient is of no use.
    critic_start: int | None = option(
        None, "step from which the critic learns; none is half of the run", at_least=0, tied=False
    )
    # The adaptive weight makes a critic that knows nothing as strong as one that knows all. Digits:
    # without a head start it never learned to tell the two apart.
    critic_head_start: int | None = option(
        None,
        "steps in which the critic learns before the autoencoder listens to it; none is a tenth of the run, and 0 "
        "what the reference does",
        at_least=0,
        tied=False,
    )

    def critic_schedule(self, total_steps: int) -> tuple[int, int]:
        """The steps from which the critic learns, and from which the autoencoder listens to it."""
        start = total_steps // 2 if self.critic_start is None else self.critic_start
        return start, start + (total_steps // 10 if self.critic_head_start is None else self.critic_head_start)


def critic_joins(step: int, start: int) -> bool:
    """Whether the critic takes part in a step, counted from 0."""
    return step >= start


class Reconstructor(nn.Module):
    """An autoencoder as one forward from images to reconstructions, which data parallelism needs.

    forward: images (B, C, H, W), noise (B, D, h, w) -> "reconstruction" (B, C, H, W), "penalty"
    (B,), which is the KL divergence or the codes' loss, the codes' numbers "indices" where there
    are any, and the likelihood's "logvar". Noise 0 gives the reconstruction of the mean.
    """

    def __init__(self, autoencoder: AutoencoderKL | VQModel, learned_logvar: bool = False, commitment: float = 0.25):
        super().__init__()
        self.autoencoder, self.commitment = autoencoder, commitment
        self.logvar = nn.Parameter(torch.zeros(())) if learned_logvar else None

    @property
    def config(self) -> dict[str, Any]:
        """Settings from which `from_config` makes another one."""
        settings = {name: value for name, value in self.autoencoder.config.items() if not name.startswith("_")}
        own = {"learned_logvar": self.logvar is not None, "commitment": self.commitment}
        return {"class": type(self.autoencoder).__name__, "autoencoder": settings, **own}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Reconstructor":
        """A new one of these settings."""
        autoencoder = AUTOENCODERS[config["class"]].from_config(config["autoencoder"])
        return cls(autoencoder, config["learned_logvar"], config["commitment"])

    @property
    def last_layer(self) -> Tensor:
        """The weight of the decoder's last layer."""
        return self.autoencoder.decoder.conv_out.weight

    def latent_shape(self, sample_shape: tuple[int, ...]) -> tuple[int, ...]:
        """(D, h, w) of images (C, H, W)."""
        factor = 2 ** (len(self.autoencoder.config.block_out_channels) - 1)
        return self.autoencoder.config.latent_channels, *(side // factor for side in sample_shape[1:])

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the autoencoder's activations in its backward pass."""
        self.autoencoder.enable_gradient_checkpointing()

    def forward(self, images: Tensor, noise: Tensor) -> dict[str, Tensor]:
        result = {} if self.logvar is None else {"logvar": self.logvar}
        if isinstance(self.autoencoder, VQModel):
            z, codebook = self.autoencoder.encode(images).latents, self.autoencoder.quantize.embedding.weight
            found = quantise(z.float(), codebook.float(), self.commitment)
            result |= {"penalty": found.loss, "indices": found.indices}
            reconstruction = self.autoencoder.decode(found.z_q, force_not_quantize=True).sample
        else:
            moments = self.autoencoder.encode(images).latent_dist.parameters.float()
            result["penalty"] = posterior_kl(moments)
            reconstruction = self.autoencoder.decode(sample_posterior(moments, noise)).sample
        return result | {"reconstruction": reconstruction.float()}


class AutoencodingGame(Objective):
    """The autoencoder's turn in every step; from a step on the critic's after it.

    schedule: the steps from which the critic learns, and from which the autoencoder listens to it.
    critic: (B, C, H, W) -> values of real images and reconstructions; None trains without one.
    distance: a perceptual one; None is none.
    """

    shown: ClassVar[dict[str, str]] = {"loss": ".4f", "l1": ".4f"}

    def __init__(
        self,
        reconstructor: Reconstructor,
        critic: nn.Module | None,
        options: AutoencodingOptions,
        learning_rates: tuple[float, float],
        schedule: tuple[int, int],
        accelerator: Accelerator,
        distance: Distance | None = None,
    ):
        self.options, self.schedule, self.accelerator, self.distance = options, schedule, accelerator, distance
        self.reconstructor, self.critic_network, self.step = reconstructor, critic, 0
        frozen = () if critic is None else (critic,)
        # The adaptive weight differentiates a graph several times.
        self.autoencoder = Player(
            reconstructor, self.autoencoder_values, learning_rates[0], frozen=frozen, compilable=critic is None
        )
        players = [self.autoencoder]
        if critic is not None:
            self.critic = Player(critic, self.critic_values, learning_rates[1], "critic", "_d", is_averaged=False)
            players.append(self.critic)
        super().__init__(*players)

    def turns(self, step: int) -> Iterator[Player]:
        """The autoencoder, then the critic, once it has joined."""
        self.step = step
        yield self.autoencoder
        if self.critic_network is not None and critic_joins(step, self.schedule[0]):
            yield self.critic

    @property
    def _listens(self) -> bool:
        return self.critic_network is not None and critic_joins(self.step, self.schedule[1])

    def _reconstruct(self, network: nn.Module, x: Tensor, draw: Draw | FixedDraw) -> dict[str, Tensor]:
        return network(x, draw.normal(*self.reconstructor.latent_shape(x.shape[1:])))

    def autoencoder_values(self, network: nn.Module, batch: dict[str, Tensor], draw: Draw | FixedDraw) -> Values:
        """The autoencoder's losses (B,) a value of an image; without the critic in evaluation."""
        options, x = self.options, batch["x_0"]
        result = self._reconstruct(network, x, draw)
        reconstruction, values, perceptual = result["reconstruction"], {}, None
        if self.distance is not None and options.perceptual_weight:
            values["perceptual"] = self.distance(x, reconstruction)
            perceptual = options.perceptual_weight * values["perceptual"]
        errors = reconstruction_errors(x, reconstruction, perceptual)
        nll, size = negative_log_likelihood(errors, result.get("logvar", 0.0)), x[0].numel()
        if options.quantised:
            # a mean, as is the reference's likelihood where there are codes
            loss = nll + size * result["penalty"]
            values |= {"codes": result["penalty"], "perplexity": self._perplexity(result["indices"])}
        else:
            loss = nll + options.kl_weight * result["penalty"]
            values["kl"] = result["penalty"]
        if self._listens and network.training:
            fooling = fooling_loss(self.critic_network(reconstruction).float())
            weight = options.adversarial_weight * adaptive_weight(
                nll.mean(), fooling.mean(), self.reconstructor.last_layer, self._average
            )
            loss = loss + weight * fooling
            values |= {"fooling": fooling, "critic_weight": weight.expand(len(x))}
        l1 = (x - reconstruction).detach().abs().flatten(1).mean(1)
        # Adam does not mind the factor; clipping and the log are easier to read so.
        return {"loss": loss / size, "l1": l1, **{name: value.detach() for name, value in values.items()}}

    def critic_values(self, critic: nn.Module, batch: dict[str, Tensor], draw: Draw | FixedDraw) -> Values:
        """The critic's losses (B,), and whether it tells an image from its reconstruction."""
        x = batch["x_0"]
        with torch.no_grad():
            reconstruction = self._reconstruct(self.autoencoder.network, x, draw)["reconstruction"]
        # One forward, since data parallelism joins the gradients of one.
        real, fake = critic(torch.cat([x, reconstruction])).float().chunk(2)
        right = (real.flatten(1).mean(1) > fake.flatten(1).mean(1)).float()
        return {"loss": critic_loss(self.options.critic_loss, real, fake), "right": right}

    def _average(self, gradient: Tensor) -> Tensor:
        """That of all processes, so that their number does not change the weight."""
        return self.accelerator.reduce(gradient, "mean")

    def _perplexity(self, indices: Tensor) -> Tensor:
        codes = self.reconstructor.autoencoder.config.num_vq_embeddings
        return perplexity(indices, codes).float().expand(len(indices))

    def identity(self) -> dict[str, Any]:
        """The game that a checkpoint belongs to."""
        parameters = 0 if self.critic_network is None else sum(p.numel() for p in self.critic_network.parameters())
        return {"critic_parameters": parameters}

    def draw_curve(self, metrics_jsonl: Path, out_png: Path) -> Path | None:
        """Draw both sides' losses from the run's log."""
        return autoencoder_curve(metrics_jsonl, out_png)
