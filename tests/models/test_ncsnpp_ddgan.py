import shutil

import pytest
import torch
from torch.autograd import gradgradcheck

from hf_diffusion.models import ncsnpp_ddgan
from hf_diffusion.models.ncsnpp_ddgan import (
    DDGANDiscriminator,
    DDGANGenerator,
    append_group_stddev,
    downsample_2d,
    fir_kernel_2d,
    resample_by_products,
    upfirdn2d,
    upsample_2d,
)
from tests.launching import run_claims


SMALL = {"model_channels": 8, "channel_mult": (1, 2), "num_res_blocks": 1, "attention_sizes": (4,)}
SMALL |= {"sample_size": 8, "in_channels": 2, "latent_dim": 5, "latent_embed_dim": 16, "num_latent_layers": 1}
CRITIC = {"sample_size": 8, "in_channels": 2, "base_channels": 4, "time_embed_dim": 8}
KERNEL = fir_kernel_2d((1, 3, 3, 1))


def generator(**changes) -> DDGANGenerator:
    torch.manual_seed(0)
    return awake(DDGANGenerator(**SMALL | changes))


def discriminator(**changes) -> DDGANDiscriminator:
    torch.manual_seed(1)
    return awake(DDGANDiscriminator(**CRITIC | changes))


def awake(model):
    """Give every parameter a visible size: the last layer of each block begins almost zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs(
    batch: int = 4, size: tuple[int, int] = (8, 8), channels: int = 2, seed: int = 0
) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    x, other = (torch.randn(batch, channels, *size, generator=g) for _ in range(2))
    return x, torch.arange(batch) % 4, torch.randn(batch, 5, generator=g), other


VARIANTS = [
    {},
    {"block_type": "biggan_oneadagn"},
    {"fir": False},
    {"progressive_input": "none"},
    {"progressive_input": "input_skip"},
    {"progressive_input": "input_skip", "progressive_combine": "cat"},
    {"progressive_output": "output_skip"},
    {"progressive_input": "input_skip", "progressive_output": "output_skip", "skip_rescale": False, "centered": False},
    {"time_embedding": "fourier", "fourier_scale": 1.0},
    {"patch_size": 2},
    {"patch_size": 2, "progressive_output": "output_skip", "progressive_input": "input_skip"},
    {"num_class_embeds": 3},
    {"channel_mult": (1,), "attention_sizes": (8,)},
    {"fir_kernel": (1, 2, 1), "tanh": False},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_every_configuration_trains_all_its_parameters(changes):
    model, (x, t, z, _) = generator(**changes), inputs()
    labels = torch.tensor([0, 1, 2, 0]) if "num_class_embeds" in changes else None
    out = model(x, t, z, labels).sample
    assert out.shape == x.shape and bool(out.isfinite().all())
    (out * torch.randn_like(out)).sum().backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert all(name.endswith("to_k.bias") for name in dead)  # a shift of all keys leaves the softmax as it is


def test_the_sample_depends_on_every_input():
    model, (x, t, z, other) = generator(num_class_embeds=3).eval(), inputs()
    labels = torch.tensor([0, 1, 2, 0])
    base = model(x, t, z, labels).sample
    for changed in (
        (other, t, z, labels),
        (x, t + 1, z, labels),
        (x, t, z.flip(0), labels),
        (x, t, z, (labels + 1) % 3),
    ):
        assert float((model(*changed).sample - base).detach().abs().max()) > 1e-3


def test_each_sample_of_a_batch_is_computed_alone():
    model, (x, t, z, _) = generator().eval(), inputs()
    together = model(x, t, z).sample
    for i in range(len(x)):
        torch.testing.assert_close(
            model(x[i : i + 1], int(t[i]), z[i : i + 1]).sample, together[i : i + 1], atol=1e-5, rtol=1e-4
        )


def test_the_scale_of_the_latent_does_not_matter():
    model, (x, t, z, _) = generator().eval(), inputs()
    torch.testing.assert_close(model(x, t, 7 * z).sample, model(x, t, z).sample, atol=1e-5, rtol=1e-4)


def test_the_last_layers_begin_near_zero_so_that_the_first_prediction_is_grey():
    torch.manual_seed(0)
    model, (x, t, z, _) = DDGANGenerator(**SMALL), inputs()
    assert float(model(x, t, z).sample.detach().abs().max()) < 1e-3


def test_images_that_are_not_square_work():
    model, critic = generator(sample_size=(8, 12), attention_sizes=(4,)), discriminator(sample_size=(8, 12))
    x, t, z, other = inputs(size=(8, 12))
    assert model(x, t, z).sample.shape == x.shape and critic(x, t, other).logits.shape == (4,)


def test_fourier_time_features_are_finite_at_zero_and_tell_the_steps_apart():
    model, (x, _, z, _) = generator(time_embedding="fourier", fourier_scale=1.0).eval(), inputs(batch=1)
    outs = torch.stack([model(x, t, z).sample.detach() for t in range(4)])
    assert bool(outs.isfinite().all())
    assert all(float((outs[i] - outs[j]).abs().max()) > 1e-4 for i in range(4) for j in range(i))


@pytest.mark.parametrize("model", [generator, discriminator])
def test_gradient_checkpointing_changes_no_gradient(model):
    x, t, z, other = inputs()
    gradients = []
    for checkpointing in (False, True):
        network = model()
        if checkpointing:
            network.enable_gradient_checkpointing()
            assert network.is_gradient_checkpointing
        network(x.clone().requires_grad_(), t, z if model is generator else other, return_dict=False)[
            0
        ].square().sum().backward()
        gradients.append([p.grad for p in network.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_runs_both_networks():
    x, t, z, other = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        assert bool(generator()(x, t, z).sample.isfinite().all())
        assert bool(discriminator()(x, t, other).logits.isfinite().all())


def test_half_precision_weights_work():
    x, t, z, other = (v.bfloat16() if v.is_floating_point() else v for v in inputs())
    assert generator().to(torch.bfloat16)(x, t, z).sample.dtype == torch.bfloat16
    assert discriminator().to(torch.bfloat16)(x, t, other).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("classes", [None, 3])
def test_the_penalty_on_the_slope_reaches_every_parameter(patch_size, classes):
    """Double backward through the filters, the group statistics and the blocks."""
    size = 8 * patch_size
    critic = discriminator(sample_size=size, patch_size=patch_size, num_class_embeds=classes)
    x, t, _, other = inputs(size=(size, size))
    labels = None if classes is None else torch.tensor([0, 1, 2, 0])
    logits = critic(x.requires_grad_(), t, other, labels).logits
    torch.autograd.grad(logits.sum(), x, create_graph=True)[0].square().sum().backward()
    constant = ("linear_out.bias", "conv_out.bias")  # piecewise linear past their sum: they do not enter the slope
    assert all(p.grad.any() for name, p in critic.named_parameters() if p.grad is not None and name not in constant)
    assert {name for name, p in critic.named_parameters() if p.grad is None} <= set(constant)


def test_the_filters_can_be_differentiated_twice():
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    for resample in (upsample_2d, downsample_2d):
        assert gradgradcheck(lambda v, f=resample: f(v, KERNEL).square(), x)


def test_the_filters_keep_constants_and_are_adjoint():
    x, y = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 4, 4)
    inside = (..., slice(1, -1), slice(1, -1))  # the border is padded with zeros
    torch.testing.assert_close(upsample_2d(torch.ones(1, 1, 4, 4), KERNEL)[inside], torch.ones(1, 1, 6, 6))
    torch.testing.assert_close(downsample_2d(torch.ones(1, 1, 8, 8), KERNEL)[inside], torch.ones(1, 1, 2, 2))
    torch.testing.assert_close((downsample_2d(x, KERNEL) * y).sum() * 4, (x * upsample_2d(y, KERNEL)).sum())


@pytest.mark.parametrize("taps", [(1, 1), (1, 2, 1), (1, 3, 3, 1), (1, 2, 3, 5), (1, 4, 6, 4, 1), (1, 2, 3, 3, 2, 1)])
def test_upsampling_equals_zero_insertion_and_filtering(taps):
    x, kernel, excess = torch.randn(2, 3, 5, 4), fir_kernel_2d(taps), len(taps) - 2
    expected = upfirdn2d(x, 4 * kernel, up=2, pad=((excess + 1) // 2 + 1, excess // 2))
    torch.testing.assert_close(upsample_2d(x, kernel), expected)


@pytest.mark.parametrize("taps", [(1, 1), (1, 2, 1), (1, 3, 3, 1), (1, 2, 3, 5), (1, 4, 6, 4, 1), (1, 2, 3, 3, 2, 1)])
def test_the_matrices_of_the_cpu_are_the_convolutions(taps):
    kernel = fir_kernel_2d(taps)
    for size in ((5, 4), (14, 14), (2, 7)):
        x = torch.randn(2, 3, *size)
        for direction, convolve in (("up", upsample_2d), ("down", downsample_2d)):
            torch.testing.assert_close(resample_by_products(x, kernel, direction), convolve(x, kernel))
    small = torch.randn(1, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    for direction in ("up", "down"):
        assert gradgradcheck(lambda v, d=direction: resample_by_products(v, kernel, d).square(), small)


@pytest.mark.parametrize("variant", ["small", "large"])
def test_every_parameter_of_the_discriminator_takes_part(variant):
    size = 8 if variant == "small" else 64
    critic, (x, t, _, other) = discriminator(variant=variant, sample_size=size), inputs(size=(size, size))
    critic(x, t, other).logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in critic.parameters())


def test_the_logit_depends_on_both_arguments_their_order_and_t():
    critic, (x, t, _, other) = discriminator(stddev_group_size=1).eval(), inputs()
    base = critic(x, t, other).logits
    for changed in ((other, t, x), (x, t + 1, other), (x, t, other.flip(0)), (x.flip(0), t, other)):
        assert float((critic(*changed).logits - base).detach().norm()) > 1e-3


def test_the_projection_adds_the_product_of_label_and_features():
    critic, (x, t, _, other) = discriminator(num_class_embeds=3, stddev_group_size=1), inputs()
    a, b = (critic(x, t, other, torch.full((4,), label)).logits for label in (0, 1))
    with torch.no_grad():
        critic.class_embedding.weight[1] = critic.class_embedding.weight[0]
    assert not torch.allclose(a, b) and torch.equal(critic(x, t, other, torch.ones(4, dtype=torch.int64)).logits, a)


@pytest.mark.parametrize(("batch", "group"), [(1, 1), (2, 2), (3, 3), (4, 4), (5, 1), (6, 3), (8, 4), (9, 3)])
def test_every_batch_size_is_cut_into_groups(batch, group):
    x = torch.randn(batch, 3, 4, 4)
    strided = x.reshape(group, batch // group, -1)
    expected = (strided.var(dim=0, unbiased=False) + 1e-8).sqrt().mean(dim=1).repeat(group)
    out = append_group_stddev(x, 4, contiguous=False)
    assert torch.equal(out[:, :3], x) and out.shape == (batch, 4, 4, 4)
    torch.testing.assert_close(out[:, 3, 0, 0], expected, rtol=1e-5, atol=0)
    discriminator()(*[inputs(batch=batch)[i] for i in (0, 1, 3)])


def test_contiguous_groups_give_each_process_what_the_whole_batch_gives():
    x = torch.randn(16, 3, 4, 4)
    whole = append_group_stddev(x, 4, contiguous=True)
    parts = torch.cat([append_group_stddev(half, 4, contiguous=True) for half in x.chunk(2)])
    assert torch.equal(whole, parts)
    assert not torch.equal(
        append_group_stddev(x, 4, contiguous=False),
        torch.cat([append_group_stddev(half, 4, contiguous=False) for half in x.chunk(2)]),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_type": "ddpm"}, "block_type='ddpm' is not supported; choose one of"),
        ({"progressive_output": "residual"}, "progressive_output='residual' is not supported"),
        ({"progressive_output": "output_skip", "fir": False}, "set fir=True"),
        ({"progressive_input": "skip"}, "progressive_input='skip'"),
        ({"progressive_combine": "mean"}, "progressive_combine='mean'"),
        ({"time_embedding": "learned"}, "time_embedding='learned'"),
        (
            {"sample_size": 28, "channel_mult": (1, 1, 2, 2)},
            "use at most 3 entries in channel_mult, or pad .* to 32x32",
        ),
        ({"sample_size": 28, "patch_size": 2, "channel_mult": (1, 2, 2)}, "use at most 2 entries .* to 32x32"),
        ({"sample_size": 9, "patch_size": 2}, "; pad or resize them to 12x12"),
        ({"model_channels": 2}, "model_channels must be at least 4"),
        ({"fir_kernel": (1,)}, "at least two taps"),
        ({"model_channels": 130}, "a layer of 130 channels cannot be split into 32 equal groups"),
    ],
)
def test_a_generator_that_the_reference_cannot_run_is_refused_with_the_fix(changes, message):
    with pytest.raises(ValueError, match=message):
        generator(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variant": "huge"}, "variant='huge'"),
        ({"variant": "large", "sample_size": 32}, "at least 64 pixels, got 32x32; use variant='small'"),
        ({"sample_size": 4}, "at least 8 pixels, got 4x4"),
        ({"sample_size": 28, "patch_size": 8}, "cannot be cut into patches of 8"),
        ({"time_embed_dim": 2}, "time_embed_dim must be at least 4"),
        ({"stddev_group_size": 0}, "stddev_group_size must be at least 1"),
    ],
)
def test_a_discriminator_that_cannot_run_is_refused_with_the_fix(changes, message):
    with pytest.raises(ValueError, match=message):
        discriminator(**changes)


def test_wrong_inputs_are_refused_at_the_call():
    x, t, z, other = inputs()
    labels = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"latent must have shape \(4, 5\), got \(4, 6\)"):
        generator()(x, t, torch.randn(4, 6))
    with pytest.raises(ValueError, match="pad or resize"):
        generator()(x[..., :7], t, z)
    with pytest.raises(ValueError, match="at least 8 pixels"):
        discriminator()(x[..., :7], t, other[..., :7])
    for call in (lambda **k: generator(**k), lambda **k: discriminator(**k)):
        second = z if isinstance(call(), DDGANGenerator) else other
        with pytest.raises(ValueError, match="needs class_labels"):
            call(num_class_embeds=3)(x, t, second)
        with pytest.raises(ValueError, match="takes no class_labels"):
            call()(x, t, second, labels)


def test_the_published_configurations_have_the_published_sizes():
    def millions(model):
        return round(sum(p.numel() for p in model.parameters()) / 1e6, 2)

    with torch.device("meta"):
        assert millions(DDGANGenerator()) == 48.43  # CIFAR-10
        assert millions(DDGANDiscriminator()) == 12.74
        assert millions(DDGANGenerator(256, 3, 64, (1, 1, 2, 2, 4, 4), num_latent_layers=3)) == 39.73
        assert millions(DDGANDiscriminator(256, variant="large")) == 27.74


def test_the_shipped_file_alone_loads_a_saved_generator_in_a_new_process(tmp_path):
    """The file travels to the Hub without this package: it imports torch and diffusers only."""
    shutil.copy(ncsnpp_ddgan.__file__, tmp_path)
    x, t, z, _ = inputs()
    labels, expected = torch.tensor([0, 1, 2, 0]), {}
    for name, changes in {
        "plain": {},
        "all": {"time_embedding": "fourier", "num_class_embeds": 3, "patch_size": 2},
    }.items():
        model = generator(**changes).eval()
        model.save_pretrained(tmp_path / name)
        expected[name] = model(x, t, z, labels if name == "all" else None).sample.detach()
    torch.save((x, t, z, labels), tmp_path / "inputs.pt")
    child = """
        import torch
        sys.path.insert(0, "")
        from ncsnpp_ddgan import DDGANGenerator
        x, t, z, labels = torch.load("inputs.pt")
        plain, all = (DDGANGenerator.from_pretrained(name).eval() for name in ("plain", "all"))
        out = {"plain": plain(x, t, z), "all": all(x, t, z, labels)}
        torch.save({name: value.sample.detach() for name, value in out.items()}, "out.pt")
    """
    run_claims(child, tmp_path, with_package=False)
    for name, sample in torch.load(tmp_path / "out.pt").items():
        torch.testing.assert_close(sample, expected[name])


def test_a_saved_discriminator_is_the_same_when_loaded(tmp_path):
    critic, (x, t, _, other) = discriminator(num_class_embeds=3).eval(), inputs()
    critic.save_pretrained(tmp_path)
    again, labels = DDGANDiscriminator.from_pretrained(tmp_path).eval(), torch.tensor([0, 1, 2, 0])
    torch.testing.assert_close(again(x, t, other, labels).logits, critic(x, t, other, labels).logits)
