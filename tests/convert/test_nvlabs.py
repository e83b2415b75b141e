import itertools

import pytest
import torch

from hf_diffusion.convert.nvlabs import (
    discriminator_config,
    discriminator_from_nvlabs,
    discriminator_to_nvlabs,
    generator_config,
    generator_from_nvlabs,
    generator_to_nvlabs,
    load_nvlabs_checkpoint,
    scheduler_from_nvlabs,
)
from hf_diffusion.models.ncsnpp_ddgan import DDGANDiscriminator, DDGANGenerator


FLAGS = {"image_size": 8, "num_channels": 2, "num_channels_dae": 8, "ch_mult": [1, 2], "num_res_blocks": 1}
FLAGS |= {"attn_resolutions": [4], "nz": 5, "z_emb_dim": 16, "n_mlp": 1}
CRITIC_FLAGS = {"image_size": 8, "num_channels": 2, "ngf": 4, "t_emb_dim": 8}


def inputs() -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    x, other = (torch.randn(4, 2, 8, 8, generator=g) for _ in range(2))
    return x, torch.arange(4), torch.randn(4, 5, generator=g), other


@pytest.mark.parametrize(
    ("block", "progressive", "pyramid", "combine", "embedding", "fir"),
    [
        case
        for case in itertools.product(
            ("biggan", "biggan_oneadagn"), ("none", "output_skip"), ("residual", "input_skip", "none"), ("sum", "cat"),
            ("positional", "fourier"), (True, False),
        )
        if not (case[1] == "output_skip" and not case[5])  # does not run in the reference
    ],
)  # fmt: skip
def test_every_generator_that_runs_in_the_reference_survives_the_round_trip(
    block, progressive, pyramid, combine, embedding, fir
):
    flags = FLAGS | {"resblock_type": block, "progressive": progressive, "progressive_input": pyramid}
    flags |= {"progressive_combine": combine, "embedding_type": embedding, "fir": fir}
    model = DDGANGenerator(**generator_config(flags)).eval()
    state, written = generator_to_nvlabs(model)
    assert len(state) == len(model.state_dict())
    assert all(written[name] == value for name, value in flags.items())
    again = generator_from_nvlabs(state, written)
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    x, t, z, _ = inputs()
    assert torch.equal(again(x, t, z).sample, model(x, t, z).sample)


@pytest.mark.parametrize("kind", ["small", "large"])
def test_every_discriminator_survives_the_round_trip(kind):
    flags = CRITIC_FLAGS | {"image_size": 8 if kind == "small" else 64}
    model = DDGANDiscriminator(**discriminator_config(flags))
    state, written = discriminator_to_nvlabs(model)
    assert model.config.variant == kind and written["kind"] == kind and len(state) == len(model.state_dict())
    again = discriminator_from_nvlabs(state, written)
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_checkpoint_of_parallel_training_is_read_without_its_prefix(tmp_path):
    model = DDGANGenerator(**generator_config(FLAGS)).eval()
    state, flags = generator_to_nvlabs(model)
    prefixed = {f"module.{name}": tensor for name, tensor in state.items()}
    torch.save(prefixed, tmp_path / "netG_10.pth")
    torch.save({"epoch": 10, "netG_dict": prefixed, "netD_dict": {}}, tmp_path / "content.pth")
    for path, entry in ((tmp_path / "netG_10.pth", None), (tmp_path / "content.pth", "netG_dict")):
        read = load_nvlabs_checkpoint(path, entry)
        assert read.keys() == state.keys()
        again = generator_from_nvlabs(read, flags)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert torch.equal(generator_from_nvlabs(prefixed, flags).conv_in.weight, model.conv_in.weight)


def test_checkpoints_that_do_not_fit_are_refused_with_advice(tmp_path):
    state, flags = generator_to_nvlabs(DDGANGenerator(**generator_config(FLAGS)))
    with pytest.raises(ValueError, match=r"tensors are missing \(first .*give the flags that it was trained with"):
        generator_from_nvlabs(state, flags | {"num_res_blocks": 2})
    with pytest.raises(ValueError, match=r"has shape .* but these flags give"):
        generator_from_nvlabs(state, flags | {"z_emb_dim": 12})
    torch.save({"netG_dict": state, "netD_dict": {}}, tmp_path / "content.pth")
    with pytest.raises(ValueError, match="entry='netG_dict' or 'netD_dict'"):
        load_nvlabs_checkpoint(tmp_path / "content.pth")
    with pytest.raises(ValueError, match="has no entry 'ema'"):
        load_nvlabs_checkpoint(tmp_path / "content.pth", "ema")
    with pytest.raises(ValueError, match="no checkpoint at"):
        load_nvlabs_checkpoint(tmp_path / "nothing.pth")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"conditional": False}, "conditional=False"),
        ({"resblock_type": "ddpm"}, "resblock_type='ddpm' fails in the reference"),
        ({"progressive": "residual"}, "progressive='residual' fails in the reference"),
    ],
)
def test_flags_that_the_reference_cannot_run_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        generator_config(FLAGS | flags)


def test_models_that_the_reference_cannot_express_are_refused():
    config, critic = generator_config(FLAGS), discriminator_config(CRITIC_FLAGS)
    for model in (DDGANGenerator(**config, num_class_embeds=3), DDGANGenerator(**config | {"sample_size": (8, 16)})):
        with pytest.raises(ValueError, match="no counterpart of"):
            generator_to_nvlabs(model)
    for changes in ({"num_class_embeds": 3}, {"stddev_contiguous_groups": True}, {"fir_kernel": (1, 2, 1)}):
        with pytest.raises(ValueError, match="no counterpart of"):
            discriminator_to_nvlabs(DDGANDiscriminator(**critic, **changes))


def test_absent_flags_have_the_defaults_of_the_training_script():
    assert (
        DDGANGenerator(**generator_config(FLAGS | {"num_channels_dae": 128, "nz": 100})).config.num_latent_layers == 1
    )
    bare = generator_config({"image_size": 32})
    assert bare["num_latent_layers"] == 3 and bare["tanh"]
    assert discriminator_config({"image_size": 256})["variant"] == "large"


def test_the_schedule_of_a_training_run_is_read_from_its_flags():
    scheduler = scheduler_from_nvlabs({"num_timesteps": 2, "beta_min": 0.2, "beta_max": 15.0})
    assert (len(scheduler), scheduler.config.beta_min, scheduler.config.schedule) == (2, 0.2, "vp")
    geometric = {"num_timesteps": 3, "use_geometric": True, "beta_min": 0.01, "beta_max": 0.99}
    assert scheduler_from_nvlabs(geometric).config.schedule == "geometric"
