"""Networks for points: shapes, conditioning, config and files, and that they can learn."""

import json
import math
import shutil

import pytest
import torch
from diffusers import AutoModel
from torch import Tensor

from hf_diffusion.losses.adversarial import generator_loss, r1_penalty
from hf_diffusion.losses.gaussian import simple_loss
from hf_diffusion.models import mlp_points
from hf_diffusion.models.mlp_points import PointDenoiser, PointDiscriminator, PointGenerator
from hf_diffusion.schedulers.scheduling_ddgan import DDGANScheduler
from hf_diffusion.schedulers.scheduling_gaussian import DDIMEtaScheduler
from tests.launching import run_claims


LABELS = torch.tensor([0, 2, 1, 0])


def network(cls, seed: int = 0, **changes):
    """A small network whose layers are none of them zero, in eval mode."""
    torch.manual_seed(seed)
    model = cls(**{"model_channels": 16, "num_res_blocks": 2, **changes})
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def inputs(cls, dim: int = 2, batch: int = 4) -> list[Tensor]:
    """Points, timesteps, and what the class takes third."""
    rng = torch.Generator().manual_seed(1)
    third = {PointDenoiser: [], PointGenerator: [4], PointDiscriminator: [dim]}[cls]
    x, *more = (torch.randn(batch, width, generator=rng) for width in (dim, *third))
    return [x, torch.arange(batch), *more]


NETWORKS = (PointDenoiser, PointGenerator, PointDiscriminator)


@pytest.mark.parametrize("cls", NETWORKS)
def test_every_input_changes_the_output_of_its_own_point_alone(cls):
    for dim in (1, 2, 5):
        model, given = network(cls, in_channels=dim, num_class_embeds=3), [*inputs(cls, dim), LABELS]
        base = model(*given, return_dict=False)[0]
        assert base.shape == ((4,) if cls is PointDiscriminator else (4, dim))
        for place, tensor in enumerate(given):
            changed = [*given]
            changed[place] = tensor.clone()
            changed[place][1] = (tensor[1] + 1) % 3
            moved = (model(*changed, return_dict=False)[0] - base).abs().reshape(4, -1).amax(1)
            assert moved[1] > 1e-3 and moved[[0, 2, 3]].max() < 1e-6, (dim, place)


def test_a_fresh_denoiser_predicts_exactly_zero_and_the_others_do_not():
    for cls in NETWORKS:
        assert bool(cls()(*inputs(cls), return_dict=False)[0].any()) is (cls is not PointDenoiser)


def test_timesteps_have_every_form_and_fractions_lie_between():
    model, (x, _) = network(PointDenoiser), inputs(PointDenoiser)
    expected = model(x, torch.full((4,), 7)).sample
    for timestep in (7, 7.0, torch.tensor(7), torch.tensor([7]), torch.full((4,), 7.0)):
        assert torch.equal(model(x, timestep).sample, expected)
    low, middle, high = (model(x, t).sample for t in (500, 500.5, 501))
    assert 0 < (middle - low).norm() < (high - low).norm()


def test_no_label_is_the_null_label():
    model, given = network(PointDenoiser, num_class_embeds=3, null_class=True), inputs(PointDenoiser)
    assert model.null_class_id == 3 and PointDenoiser(num_class_embeds=3).null_class_id is None
    assert torch.equal(model(*given).sample, model(*given, torch.full((4,), 3)).sample)
    assert not torch.allclose(model(*given).sample, model(*given, LABELS).sample)


def test_logits_and_variances_come_in_more_channels():
    for out_channels in (None, 2, 4, 2 * 7):
        model = PointDenoiser(out_channels=out_channels)
        assert model(*inputs(PointDenoiser)).sample.shape == (4, out_channels or 2)
        assert model.config.out_channels == (out_channels or 2)


@pytest.mark.parametrize("cls", NETWORKS)
def test_gradient_checkpointing_keeps_fewer_tensors_and_changes_no_gradient(cls):
    kept, gradients = [0, 0], []

    def keep(tensor: Tensor) -> Tensor:
        kept[len(gradients)] += 1
        return tensor

    for checkpointing in (False, True):
        model, given = network(cls), inputs(cls)
        if checkpointing:
            model.enable_gradient_checkpointing()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(given[0].requires_grad_(), *given[1:], return_dict=False)[0].square().sum()
        loss.backward()
        gradients.append([*(p.grad for p in model.parameters()), given[0].grad])
    assert kept[1] < 0.7 * kept[0]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_half_precision_keeps_the_timesteps_apart():
    model, (x, _) = network(PointDenoiser).to(torch.bfloat16), inputs(PointDenoiser)
    outs = [model(x.bfloat16(), t).sample for t in (998, 999)]
    assert outs[0].dtype == torch.bfloat16 and not torch.equal(*outs)


def test_the_config_says_what_pipelines_ask_for(tmp_path):
    PointGenerator(in_channels=3, latent_dim=5).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["in_channels"], config["sample_size"], config["latent_dim"]) == (3, [], 5)
    assert PointGenerator.from_pretrained(tmp_path).config.num_class_embeds is None


def test_the_file_alone_loads_every_saved_network_in_a_new_process_and_so_does_stock_auto_model(tmp_path):
    """The file travels to the Hub without this package; it imports torch and diffusers only."""
    shutil.copy(mlp_points.__file__, tmp_path)
    expected = {}
    for cls in NETWORKS:
        model, given = network(cls, num_class_embeds=3), [*inputs(cls), LABELS]
        folder = tmp_path / cls.__name__
        model.save_pretrained(folder)
        with torch.no_grad():
            expected[cls.__name__] = (given, model(*given, return_dict=False)[0])
        shutil.copy(mlp_points.__file__, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(
            json.dumps({**config, "auto_map": {"AutoModel": f"mlp_points.{cls.__name__}"}})
        )
    torch.save(expected, tmp_path / "expected.pt")
    child = """
        import torch
        sys.path.insert(0, "")
        import mlp_points
        for name, (given, out) in torch.load("expected.pt").items():
            model = getattr(mlp_points, name).from_pretrained(name)
            claims[name] = torch.equal(model(*given, return_dict=False)[0], out)
    """
    assert run_claims(child, tmp_path, with_package=False) == dict.fromkeys(expected, True)
    for name, (given, out) in expected.items():
        model = AutoModel.from_pretrained(str(tmp_path / name), trust_remote_code=True)
        assert type(model).__name__ == name and torch.equal(model(*given, return_dict=False)[0], out)


ERRORS = {
    r"sample has shape \(4, 3\); points \(batch, 2\)": lambda: PointDenoiser()(torch.zeros(4, 3), 0),
    r"sample has shape \(4, 2, 1, 1\)": lambda: PointDenoiser()(torch.zeros(4, 2, 1, 1), 0),
    r"noisier_sample has shape \(4, 1\)": lambda: PointDiscriminator()(torch.zeros(4, 2), 0, torch.zeros(4, 1)),
    r"latent has shape \(4, 3\); \(4, 4\) is": lambda: PointGenerator()(torch.zeros(4, 2), 0, torch.zeros(4, 3)),
    r"timestep has shape \(3,\)": lambda: PointDenoiser()(torch.zeros(4, 2), torch.zeros(3)),
    "given to a model without classes": lambda: PointDenoiser()(torch.zeros(4, 2), 0, LABELS),
    r"class_labels are missing; .* \(4,\) from 0 to 2": lambda: PointDenoiser(num_class_embeds=3)(
        torch.zeros(4, 2), 0
    ),
    "class_labels run from 0 to 2; this model knows 0 to 1": lambda: PointGenerator(num_class_embeds=2)(
        torch.zeros(4, 2), 0, torch.zeros(4, 4), LABELS
    ),
    r"class_labels have shape \(3,\)": lambda: PointDiscriminator(num_class_embeds=3)(
        torch.zeros(4, 2), 0, torch.zeros(4, 2), LABELS[:3]
    ),
    "out_channels 3 does not fit in_channels 2; use 2, or 4 .* or K": lambda: PointDenoiser(out_channels=3),
    "null_class=True needs classes": lambda: PointDenoiser(null_class=True),
    r"sample_size is \(1, 1\); it must be \(\)": lambda: PointGenerator(sample_size=(1, 1)),
    "model_channels is 7; it must be an even": lambda: PointDiscriminator(model_channels=7),
    "in_channels is 0": lambda: PointDenoiser(in_channels=0),
    "num_res_blocks is 0": lambda: PointDenoiser(num_res_blocks=0),
    "num_class_embeds is 0": lambda: PointDenoiser(num_class_embeds=0),
    "latent_dim is 0": lambda: PointGenerator(latent_dim=0),
}


def test_what_does_not_fit_is_refused_with_the_value_and_what_is_allowed():
    for message, call in ERRORS.items():
        with pytest.raises(ValueError, match=message):
            call()


# --- they learn


def ring(count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two classes of points (count, 2) on the unit circle: its right half and its left half."""
    labels = torch.randint(2, (count,), generator=rng)
    angle = math.pi * (torch.rand(count, generator=rng) - 0.5) + math.pi * labels
    return torch.stack([angle.cos(), angle.sin()], dim=1), labels


def test_a_denoiser_learns_both_classes_of_a_ring_and_samples_them_by_ddim():
    torch.manual_seed(0)
    rng, scheduler = torch.Generator().manual_seed(0), DDIMEtaScheduler(100, beta_end=0.2, clip_sample_range=1.5)
    model = PointDenoiser(model_channels=64, num_class_embeds=2)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(600):
        x_0, labels = ring(256, rng)
        t = torch.randint(100, (256,), generator=rng)
        noise = torch.randn(x_0.shape, generator=rng)
        x_t = scheduler.add_noise(x_0, noise, t)
        loss = simple_loss(scheduler, model(x_t, t, labels).sample, x_0, x_t, noise, t).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x, labels = torch.randn(1000, 2, generator=rng), torch.arange(1000) % 2
    scheduler.set_timesteps(25)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t, labels).sample, t, x).prev_sample
    radius = x.norm(dim=1)
    assert ((radius - 1).abs() < 0.15).float().mean() > 0.9
    assert ((x[:, 0] > -0.1) == (labels == 0)).float().mean() > 0.9
    assert abs(float(x[:, 1].std()) - 0.5**0.5) < 0.1


def test_both_players_get_a_gradient_in_every_parameter_also_through_r1():
    """That they find all modes of a distribution is shown by the script, tests/training."""
    scheduler, (x_0, t, latent) = DDGANScheduler(4), inputs(PointGenerator)
    generator, critic = network(PointGenerator), network(PointDiscriminator)
    x_t, x_tp1 = scheduler.q_sample_pairs(x_0, t, generator=torch.Generator().manual_seed(0))
    fake = generator(x_tp1, t, latent).sample
    generator_loss("js", critic(fake, t, x_tp1).logits).sum().backward()
    assert all(p.grad.abs().sum() > 1e-6 for p in generator.parameters())

    # of R1 alone, a second derivative: every map between x_t and the logits; the layers between are
    # piecewise linear, so that no bias has one
    critic.zero_grad()
    x_t = x_t.requires_grad_()
    r1_penalty(critic(x_t, t, x_tp1).logits, x_t, 1.0).sum().backward()
    maps = [critic.linear_in, critic.linear_out, *(m for b in critic.blocks for m in (b.linear_1, b.linear_2))]
    assert all(linear.weight.grad.abs().sum() > 1e-6 for linear in maps)
