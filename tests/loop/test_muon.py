"""Muon: what an orthogonalised step is, which weights take it, and that a run can stop in it."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from torch import nn

from hf_diffusion import ADMUNet2DModel
from hf_diffusion.loop.engines import check_engine
from hf_diffusion.loop.muon import Muon, matrices_of, orthogonalized
from hf_diffusion.loop.update import build_optimizer
from hf_diffusion.losses.objective import Player
from hf_diffusion.models.mlp_points import PointDenoiser
from hf_diffusion.models.transformer_pixel import PixelTransformer2DModel
from hf_diffusion.training.train_consistency import ConsistencyConfig
from hf_diffusion.training.train_ddpm import DDPMConfig


def unet(**settings) -> ADMUNet2DModel:
    shape = {"channel_mult": (1, 1), "num_res_blocks": 1, "attention_resolutions": (2,), "num_head_channels": 32}
    return ADMUNet2DModel(sample_size=8, in_channels=1, model_channels=32, **shape, **settings)


def names_of(network: nn.Module) -> set[str]:
    matrices = {id(p) for p in matrices_of(network)}
    return {name for name, p in network.named_parameters() if id(p) in matrices}


@pytest.mark.parametrize("shape", [(2, 24, 60), (2, 60, 24)])
def test_an_update_keeps_the_directions_of_a_matrix_and_makes_all_as_long(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    turned = u.mT @ orthogonalized(matrices) @ v.mT  # diagonal, where the directions are kept
    lengths = turned.diagonal(dim1=1, dim2=2)
    # Where the device multiplies bfloat16 an update has its 8 bits.
    torch.testing.assert_close(turned, torch.diag_embed(lengths), rtol=0, atol=2e-2)
    assert 0.6 < lengths.min() and lengths.max() < 1.3


def test_matrices_move_as_by_torchs_muon_and_all_else_as_by_adamw():
    linear, twin = nn.Linear(40, 24), nn.Linear(40, 24)
    twin.load_state_dict(linear.state_dict())
    ours = Muon([linear.weight], [linear.bias], lr=0.1, weight_decay=0.01)
    theirs = torch.optim.Muon([twin.weight], lr=0.1, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([twin.bias], lr=0.1, weight_decay=0.01, fused=True)
    began = linear.weight.detach().clone()
    for step in range(3):
        for layer, optimizers in ((linear, [ours]), (twin, [theirs, adamw])):
            generator = torch.Generator().manual_seed(step)
            layer.weight.grad = torch.randn(24, 40, generator=generator)
            layer.bias.grad = torch.randn(24, generator=generator)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    # theirs computes in bfloat16, of 8 bits
    moved = (linear.weight - began).norm()
    assert (linear.weight - twin.weight).norm() < 0.02 * moved
    assert torch.equal(linear.bias, twin.bias)


def test_a_kernel_moves_as_the_matrix_that_it_is_whatever_its_layout():
    kernel = torch.randn(24, 20, 3, 3, generator=torch.Generator().manual_seed(0))
    gradient = torch.randn(24, 20, 3, 3, generator=torch.Generator().manual_seed(1))
    moved = []
    for layout in (kernel.flatten(1), kernel, kernel.to(memory_format=torch.channels_last)):
        parameter = nn.Parameter(layout.clone())
        parameter.grad = gradient.reshape(layout.shape).to(memory_format=torch.preserve_format)
        # another of its shape is in the same product
        other = nn.Parameter(layout.clone())
        other.grad = -2 * parameter.grad
        Muon([parameter, other], [], lr=0.1).step()
        moved.append(parameter.detach().reshape(kernel.shape))
        torch.testing.assert_close(parameter - layout, layout - other, rtol=1e-3, atol=1e-5)
    for other in moved[1:]:
        torch.testing.assert_close(other, moved[0], rtol=0, atol=1e-6)


def test_inner_matrices_are_muons_and_ends_embeddings_norms_and_biases_are_not():
    for network, ends in (
        (unet(num_class_embeds=20), {"conv_in", "conv_out", "class_embedding"}),
        (PixelTransformer2DModel(hidden_size=32, num_layers=1, bottleneck=20, num_class_embeds=20),
         {"patch_in.0", "patch_in.1", "time_mlp.0", "time_mlp.2", "class_embedding", "modulation_out", "patch_out"}),
        (PointDenoiser(in_channels=2, model_channels=32),
         {"time_mlp.0", "time_mlp.2", "linear_in", "linear_out"}),
    ):  # fmt: skip
        weights = {name for name, p in network.named_parameters() if p.ndim > 1}
        assert weights - names_of(network) == {f"{end}.weight" for end in ends}
        assert all(dict(network.named_parameters())[name].ndim > 1 for name in names_of(network))


def test_a_state_is_taken_up_bit_for_bit_and_learning_rates_reach_both_groups():
    def trained(network, optimizer, steps):
        for step in steps:
            x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(step))
            network(x, 10 * step).sample.square().mean().backward()
            for group in optimizer.param_groups:
                group["lr"] = 0.01 / (1 + step)
            optimizer.step()
            optimizer.zero_grad()

    torch.manual_seed(0)
    network, resumed = unet(), unet()
    optimizer = Muon.of(network, lr=1.0)
    trained(network, optimizer, range(3))
    resumed.load_state_dict(network.state_dict())
    other = Muon.of(resumed, lr=1.0)
    # accelerate gives a fresh optimizer its own state first
    other.load_state_dict(other.state_dict())
    other.load_state_dict(optimizer.state_dict())
    trained(network, optimizer, range(3, 6))
    trained(resumed, other, range(3, 6))
    for name, value in network.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_the_settings_choose_the_optimizer_of_the_network_that_users_get():
    given = {"dataset_name": "digits", "max_train_steps": 2, "learning_rate": 0.01}
    player, critic = Player(unet(), None, 0.01), Player(unet(), None, 0.01, is_averaged=False)
    made = [build_optimizer(DDPMConfig(**given, optimizer=name), player) for name in ("adamw", "muon")]
    made += [build_optimizer(DDPMConfig(**given, optimizer="muon"), critic)]
    made += [build_optimizer(ConsistencyConfig(**given), player)]
    assert [type(optimizer).__name__ for optimizer in made] == ["AdamW", "Muon", "AdamW", "RAdam"]
    with pytest.raises(ValueError, match="this Linear has none; give adamw"):
        build_optimizer(DDPMConfig(**given, optimizer="muon"), Player(nn.Linear(40, 40), None, 0.01))


def test_an_engine_that_divides_matrices_is_refused(monkeypatch):
    config = DDPMConfig(dataset_name="digits", max_train_steps=2, optimizer="muon")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    divided = SimpleNamespace(distributed_type=DistributedType.FSDP, device=torch.device("cuda"), num_processes=1)
    with pytest.raises(ValueError, match="optimizer muon needs whole matrices on every process, and FSDP divides"):
        check_engine(divided, config)


def least_squares(make, lr: float, seed: int) -> float:
    """The excess loss of a linear map (32, 32) after 200 steps to rate 0, on inputs of uneven
    spectrum in a basis of their own."""
    generator, size = torch.Generator().manual_seed(seed), 32
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator))
    to_inputs = torch.logspace(0, -1.5, size)[:, None] * basis
    target = torch.randn(size, size, generator=generator) / size**0.5
    weight = nn.Parameter(torch.zeros(size, size))
    optimizer = make(weight)
    for step in range(200):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / 200)
        x = torch.randn(64, size, generator=generator) @ to_inputs
        (x @ (weight - target).T).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return float(((weight.detach() - target) @ to_inputs.T).square().sum() / size)


def test_an_uneven_problem_is_solved_better_than_by_adamw_in_as_many_steps():
    for seed in (0, 1):
        for lr in (0.03, 0.1):
            muon = least_squares(lambda weight: Muon([weight], []), lr, seed)
            adamw = least_squares(lambda weight: torch.optim.AdamW([weight], weight_decay=0.0), lr, seed)
            assert muon < adamw / 2, (seed, lr, muon, adamw)
