"""A discriminator on a denoiser's features: they are the denoiser's own, and stay as they are."""

import copy

import pytest
import torch
from torch import Tensor

from hf_diffusion.losses.adversarial import r1_penalty
from hf_diffusion.losses.denoiser_critic import DenoiserCritic
from hf_diffusion.models.unet_adm import ADMUNet2DModel


TIMESTEPS = (0.0, 250.0, 900.5)


@pytest.fixture
def denoiser() -> ADMUNet2DModel:
    torch.manual_seed(0)
    network = ADMUNet2DModel(
        sample_size=8, in_channels=1, model_channels=8, channel_mult=(1, 2, 2), num_res_blocks=1,
        attention_resolutions=(2,), norm_num_groups=4, num_head_channels=4, num_class_embeds=3, dropout=0.5,
    )  # fmt: skip
    # a new network has zeros here and there
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network


@pytest.fixture
def critic(denoiser) -> DenoiserCritic:
    return DenoiserCritic(copy.deepcopy(denoiser), TIMESTEPS, channels=6)


def pairs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x_t, x_tp1 = torch.randn(2, 4, 1, 8, 8, generator=generator)
    return x_t, torch.tensor([0, 1, 0, 1]), x_tp1, torch.tensor([0, 1, 2, 0])


def test_it_sees_what_the_denoiser_computes_at_the_timestep_of_each_level(denoiser, critic):
    x_t, level, _, labels = pairs()
    found = critic.features(x_t, level, labels)
    assert [tuple(features.shape[1:]) for features in found] == [(8, 8, 8), (16, 4, 4), (16, 2, 2)]
    seen = []
    denoiser.eval().mid_block.register_forward_hook(lambda layer, given, output: seen.append(output))
    with torch.no_grad():
        denoiser(x_t, torch.tensor(TIMESTEPS)[level], labels)
    torch.testing.assert_close(found[-1], seen[0])


def test_the_condition_has_the_next_level_and_no_gradient(critic):
    x_t, t, x_tp1, labels = pairs()
    asked, original = [], critic.features

    def spy(x: Tensor, level: Tensor, known: Tensor) -> list[Tensor]:
        asked.append((x, level))
        return original(x, level, known)

    critic.features = spy
    x_t, x_tp1 = x_t.requires_grad_(), x_tp1.requires_grad_()
    (logits,) = critic(x_t, t, x_tp1, labels, return_dict=False)
    assert logits.shape == (4,)
    assert asked[0][0] is x_t and torch.equal(asked[0][1], t)
    assert asked[1][0] is x_tp1 and torch.equal(asked[1][1], t + 1)
    logits.sum().backward()
    assert float(x_t.grad.abs().sum()) > 0 and x_tp1.grad is None
    assert all(p.grad is not None for p in critic.parameters())


def test_each_argument_changes_the_logits_and_a_sample_has_none_of_another(critic):
    x_t, t, x_tp1, labels = pairs()
    with torch.no_grad():
        (whole,) = critic(x_t, t, x_tp1, labels)
        for changed in ((x_t + 0.1, t, x_tp1, labels), (x_t, 1 - t, x_tp1, labels), (x_t, t, x_tp1 + 0.1, labels),
                        (x_t, t, x_tp1, (labels + 1) % 3)):  # fmt: skip
            assert not torch.isclose(critic(*changed)[0], whole).any()
        torch.testing.assert_close(critic(x_t[1:2], t[1:2], x_tp1[1:2], labels[1:2])[0], whole[1:2])


def test_the_denoiser_is_frozen_and_no_part_of_what_is_trained_and_saved(denoiser, critic):
    assert not any(name.startswith("_trunk") or "denoiser" in name for name in critic.state_dict())
    # as a game freezes and frees a discriminator
    critic.requires_grad_(False).requires_grad_(True).train()
    assert not critic.denoiser.training and not any(p.requires_grad for p in critic.denoiser.parameters())
    optimizer = torch.optim.SGD(critic.parameters(), 0.1)
    critic(*pairs())[0].sum().backward()
    optimizer.step()
    before, after = denoiser.state_dict(), critic.denoiser.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    (first,) = critic(*pairs())
    # no dropout, although it trains
    assert torch.equal(first, critic(*pairs())[0])


def test_r1_takes_the_derivative_of_its_derivative(critic):
    x_t, t, x_tp1, labels = pairs()
    (logits,) = critic(x_t.requires_grad_(), t, x_tp1, labels)
    penalty = r1_penalty(logits, x_t, 1.0)
    penalty.sum().backward()
    assert float(penalty.detach().min()) > 0 and all(
        float(p.grad.abs().sum()) > 0 for p in critic.heads[0].conv_in.parameters()
    )


def test_it_tells_whose_features_it_has(critic, denoiser):
    same = DenoiserCritic(copy.deepcopy(denoiser), TIMESTEPS, channels=6)
    assert critic.identity() == same.identity()
    with torch.no_grad():
        denoiser.conv_in.bias += 1
    assert critic.identity() != DenoiserCritic(denoiser, TIMESTEPS, channels=6).identity()
