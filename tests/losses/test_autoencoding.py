"""Losses of autoencoders, and who sees what when a critic joins."""

import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, VQModel
from torch import nn

from hf_diffusion.losses.autoencoding import (
    adaptive_weight,
    fooling_loss,
    latent_statistics,
    posterior_kl,
    quantise,
    sample_posterior,
)
from hf_diffusion.losses.autoencoding_game import AutoencodingGame, AutoencodingOptions, Reconstructor
from hf_diffusion.models.discriminator_patch import PatchDiscriminator
from tests.losses.scripted import ScriptedDraw


SHAPE = {
    "in_channels": 1,
    "out_channels": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (8, 16),
    "latent_channels": 2,
    "norm_num_groups": 4,
    "sample_size": 8,
}
source = torch.Generator().manual_seed(0)
X = torch.rand(4, 1, 8, 8, generator=source) * 2 - 1
BATCH = {"x_0": X, "indices": torch.arange(4)}
NOISE = torch.randn(4, 2, 4, 4, generator=source)
SIZE = 64


def script(times: int = 1) -> ScriptedDraw:
    return ScriptedDraw(normals=[NOISE] * times)


def game(critic: bool = True, schedule=(0, 0), distance=None, **options) -> AutoencodingGame:
    torch.manual_seed(0)
    if options.get("quantised"):
        autoencoder = VQModel(**SHAPE, num_vq_embeddings=5)
        nn.init.normal_(autoencoder.quantize.embedding.weight)
    else:
        autoencoder = AutoencoderKL(**SHAPE)
    options = AutoencodingOptions(**options)
    reconstructor = Reconstructor(autoencoder, options.learned_logvar, options.commitment)
    judge = PatchDiscriminator(1, 8, 1) if critic else None
    return AutoencodingGame(reconstructor, judge, options, (1e-3, 2e-3), schedule, Accelerator(cpu=True), distance)


def values(made: AutoencodingGame, step: int = 0) -> dict:
    list(made.turns(step))
    return made.autoencoder_values(made.reconstructor, BATCH, script())


def test_the_loss_is_the_sum_of_the_errors_and_the_weighted_divergence_a_value():
    made = game(critic=False, kl_weight=0.5)
    moments = made.reconstructor.autoencoder.encode(X).latent_dist.parameters
    reconstruction = made.reconstructor.autoencoder.decode(sample_posterior(moments, NOISE)).sample
    wanted = (X - reconstruction).abs().flatten(1).sum(1) + 0.5 * posterior_kl(moments)
    torch.testing.assert_close(values(made)["loss"], wanted / SIZE)


def test_a_perceptual_distance_counts_at_every_pixel():
    plain = values(game(critic=False))
    made = values(game(critic=False, distance=lambda x, y: torch.arange(4.0), perceptual_weight=2.0))
    torch.testing.assert_close(made["loss"], plain["loss"] + 2 * torch.arange(4.0))
    assert torch.equal(made["perceptual"], torch.arange(4.0)) and torch.equal(made["l1"], plain["l1"])


def test_a_learned_scale_gets_the_gradient_of_the_laplace_likelihood():
    made = game(critic=False, learned_logvar=True, kl_weight=0.0)
    result = values(made)
    result["loss"].mean().backward()
    # of |x - r| exp(-s) + s at s = 0
    torch.testing.assert_close(made.reconstructor.logvar.grad, 1 - result["l1"].mean())


def test_the_critic_pulls_at_the_last_layer_as_hard_as_asked_of_the_likelihoods_pull():
    made = game(adversarial_weight=0.25)
    list(made.turns(0))
    result, last = values(made), made.reconstructor.last_layer
    with_critic = torch.autograd.grad(result["loss"].mean(), last)[0]
    silent = game(adversarial_weight=0.25, schedule=(0, 9))
    without = torch.autograd.grad(values(silent)["loss"].mean(), silent.reconstructor.last_layer)[0]
    share = (with_critic - without).norm() / without.norm()
    # a little less, by the offset in the ratio; the divergence does not reach the last layer
    assert share == pytest.approx(0.25, rel=0.02)
    assert result["critic_weight"].unique().numel() == 1 and not result["critic_weight"].requires_grad


def test_the_adaptive_weight_is_bounded_where_the_critic_is_flat():
    last = torch.ones(3, requires_grad=True)
    flat = (last * torch.tensor([1e-12, 0, 0])).sum()
    assert adaptive_weight(last.sum() * 1e9, flat, last) == 1e4


def test_the_critic_learns_from_its_start_and_is_heard_after_its_head_start():
    made = game(schedule=(2, 4))
    played = [[player.name for player in made.turns(step)] for step in range(6)]
    assert played == [[""], [""], ["", "critic"], ["", "critic"], ["", "critic"], ["", "critic"]]
    assert ["fooling" in values(made, step) for step in (2, 3, 4, 5)] == [False, False, True, True]
    assert AutoencodingOptions().critic_schedule(100) == (50, 60)
    assert AutoencodingOptions(critic_start=7, critic_head_start=0).critic_schedule(100) == (7, 7)


def test_evaluation_leaves_the_critic_out():
    made = game()
    made.reconstructor.eval()
    assert "fooling" not in values(made)


def test_no_gradient_of_the_critics_half_reaches_the_autoencoder():
    made = game()
    result = made.critic_values(made.critic_network, BATCH, script())
    result["loss"].mean().backward()
    assert all(p.grad is None for p in made.reconstructor.parameters())
    assert all(p.grad is not None for p in made.critic_network.parameters())
    assert result["right"].shape == (4,)


def test_an_image_is_judged_alike_in_any_batch():
    critic = game().critic_network
    torch.testing.assert_close(critic(X)[2:3], critic(X[2:3]))
    assert fooling_loss(critic(X)).shape == (4,)


def test_codes_pull_latents_by_the_commitment_alone():
    z = torch.randn(2, 3, 2, 2, generator=source).requires_grad_()
    codebook = torch.randn(5, 3, generator=source).requires_grad_()
    found = quantise(z, codebook, commitment=0.5, attraction=1.0)
    codes = codebook.detach()[found.indices].movedim(-1, 1)
    torch.testing.assert_close(found.z_q.detach(), codes)
    found.loss.sum().backward()
    torch.testing.assert_close(z.grad, 0.5 * 2 * (z.detach() - codes) / 12)
    torch.testing.assert_close(codebook.grad.sum(0), 2 * (codes - z.detach()).sum((0, 2, 3)) / 12)


def test_a_quantised_autoencoder_is_trained_by_the_mean_of_its_codes_loss():
    made = game(critic=False, quantised=True)
    result = values(made)
    torch.testing.assert_close(result["loss"], result["l1"] + result["codes"])
    result["loss"].mean().backward()
    assert made.reconstructor.autoencoder.quantize.embedding.weight.grad.abs().sum() > 0
    # what stock diffusers decodes of the same images
    images = made.reconstructor(X, NOISE)["reconstruction"]
    torch.testing.assert_close(images, made.reconstructor.autoencoder(X).sample)


def test_statistics_are_those_of_all_latents_however_they_come_and_however_large_their_mean():
    z = torch.randn(64, 3, 4, 4, generator=source, dtype=torch.float64)
    z = z * torch.tensor([0.1, 1.0, 3.0]).reshape(1, 3, 1, 1) + torch.tensor([1e6, 0.0, -5.0]).reshape(1, 3, 1, 1)
    for size in (64, 7):
        found = latent_statistics(z.split(size))
        assert found.std == pytest.approx(float(z.std())) and found.mean == pytest.approx(float(z.mean()))
        for values_of, wanted in ((found.channel_means, z.mean((0, 2, 3))), (found.channel_stds, z.std((0, 2, 3)))):
            torch.testing.assert_close(torch.tensor(values_of, dtype=torch.float64), wanted)


def test_a_copy_made_of_a_reconstructors_config_takes_its_weights():
    made = game(learned_logvar=True).reconstructor
    copy = Reconstructor.from_config(made.config)
    copy.load_state_dict(made.state_dict())
    torch.testing.assert_close(copy(X, NOISE)["reconstruction"], made(X, NOISE)["reconstruction"])
