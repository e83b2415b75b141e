import argparse
import itertools
import json

import pytest
import torch

from hf_diffusion import cli
from hf_diffusion.convert.nvlabs import (
    discriminator_from_nvlabs,
    discriminator_to_nvlabs,
    generator_from_nvlabs,
    generator_to_nvlabs,
    load_nvlabs_checkpoint,
    scheduler_from_nvlabs,
)
from hf_diffusion.convert.nvlabs_flags import discriminator_config, generator_config, read_flags
from hf_diffusion.models.ncsnpp_ddgan import DDGANDiscriminator, DDGANGenerator
from hf_diffusion.models.unet_adm import ADMGenerator
from hf_diffusion.pipelines.pipeline_ddgan import DDGANPipeline
from hf_diffusion.schedulers.scheduling_ddgan import DDGANScheduler


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
    with pytest.raises(ValueError, match="no counterpart of a ADMGenerator; a DDGANGenerator can be exported"):
        generator_to_nvlabs(
            ADMGenerator(sample_size=8, model_channels=32, channel_mult=(1,), attention_resolutions=())
        )
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


# --- hf-diffusion convert --------------------------------------------------------------------------------------------

COMMAND_LINE = (
    "--image_size 8 --num_channels 2 --num_channels_dae 8 --ch_mult 1 2 --num_res_blocks 1 --attn_resolutions 4 --nz 5 --z_emb_dim 16"
    " --n_mlp 1 --num_timesteps 2"
)


def convert(*words) -> int:
    return cli.main(["convert", *map(str, words)])


def assert_same_weights(a: torch.nn.Module, b: torch.nn.Module) -> None:
    for (name, left), right in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(left, right), name


@pytest.fixture
def model() -> DDGANGenerator:
    torch.manual_seed(0)
    return DDGANGenerator(**generator_config(FLAGS)).eval()


def test_the_command_turns_their_checkpoint_into_a_pipeline_and_back(model, tmp_path, capsys):
    state, _ = generator_to_nvlabs(model)
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, tmp_path / "netG_10.pth")
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    assert convert(tmp_path / "netG_10.pth", ours, "--from", "nvlabs", "--flags", COMMAND_LINE + " --lr_g 1e-4") == 0
    said = capsys.readouterr().out
    assert "of 2 steps" in said and "the weights of the file" in said and "do not concern it: lr_g" in said
    pipe = DDGANPipeline.from_pretrained(ours)
    assert_same_weights(pipe.generator, model)
    assert pipe(batch_size=2, generator=torch.Generator().manual_seed(0), output_type="np").images.shape == (
        2,
        8,
        8,
        2,
    )

    assert convert(ours, theirs, "--to", "nvlabs") == 0
    assert sorted(path.name for path in theirs.iterdir()) == ["flags.json", "netG.pth"]
    written = torch.load(theirs / "netG.pth", weights_only=True)
    assert written.keys() == state.keys() and all(torch.equal(written[name], state[name]) for name in state)
    flags = json.loads((theirs / "flags.json").read_text())
    assert flags["num_timesteps"] == 2 and flags["ch_mult"] == [1, 2] and not flags["use_geometric"]

    again = tmp_path / "again"
    assert convert(theirs / "netG.pth", again, "--from", "nvlabs", "--flags", theirs / "flags.json") == 0
    assert_same_weights(DDGANPipeline.from_pretrained(again).generator, model)


@pytest.mark.parametrize("average", [True, False])
def test_a_training_state_brings_its_flags_and_its_averaged_weights(model, tmp_path, capsys, average):
    state, flags = generator_to_nvlabs(model)
    slots = {i: {"step": 3, "ema": tensor + 1} for i, tensor in enumerate(state.values())} if average else {}
    args = argparse.Namespace(**flags, num_timesteps=3, use_ema=average, exp="cifar10", seed=1024, resume=False)
    content = {"epoch": 10, "args": args, "netG_dict": state, "optimizerG": {"state": slots, "param_groups": []}}
    torch.save(content, tmp_path / "content.pth")
    assert convert(tmp_path / "content.pth", tmp_path / "ours", "--from", "nvlabs") == 0
    assert ("which holds no average" in capsys.readouterr().out) is not average
    pipe = DDGANPipeline.from_pretrained(tmp_path / "ours")
    assert len(pipe.scheduler) == 3
    written, _ = generator_to_nvlabs(pipe.generator)
    assert all(torch.equal(written[name], state[name] + average) for name in state)


def test_flags_are_read_as_their_script_reads_them(tmp_path):
    assert read_flags(
        "--ch_mult 1 2 2 --attn_resolutions=16 --beta_max 15 --resblock_type biggan --batch_size 64"
    ) == {
        "ch_mult": [1, 2, 2],
        "attn_resolutions": [16],
        "beta_max": 15.0,
        "resblock_type": "biggan",
        "batch_size": "64",
    }
    # bare switches: those that are on are turned off
    assert read_flags("--use_geometric --not_use_tanh") == {"use_geometric": True, "not_use_tanh": True}
    assert read_flags("--centered --fir True") == {"centered": False, "fir": True}
    for name, text in (
        ("flags.json", '{"ch_mult": [1, 2], "fir": false}'),
        ("flags.yaml", "ch_mult: [1, 2]\nfir: no\n"),
    ):
        (tmp_path / name).write_text(text)
        assert read_flags(str(tmp_path / name)) == {"ch_mult": [1, 2], "fir": False}
    assert read_flags("") == {}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("image_size 32", "must be --name and values"),
        ("--image_size", "takes one value, not 0"),
        ("--image_size 32 32", "takes one value, not 2"),
        ("--image_size big", "must be a whole number, not 'big'"),
        ("--ch_mult 1 two", "must be whole numbers, not '1 two'"),
        ("--beta_max much", "must be a number, not 'much'"),
        ("--fir maybe", "is True or False"),
        ("nowhere/flags.json", "there is no file"),
    ],
)
def test_flags_that_cannot_be_are_refused_in_one_sentence(given, message):
    with pytest.raises(ValueError, match=message):
        read_flags(given)


class Harm:
    def __reduce__(self):
        return (print, ("code of the checkpoint was run",))


def test_the_command_refuses_what_it_cannot_convert_and_writes_nothing(model, tmp_path, capsys):
    state, _ = generator_to_nvlabs(model)
    torch.save(state, tmp_path / "netG.pth")
    torch.save({"netG_dict": Harm()}, tmp_path / "harm.pth")
    (tmp_path / "text.pth").write_text("no checkpoint")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "broken.json").write_text("[1, 2")
    out = tmp_path / "out"
    cases = [
        ("netG.pth", "--n_mlp 2", "give the flags that it was trained with"),
        ("netG.pth", f"{tmp_path}/broken.json", "neither JSON nor YAML"),
        ("harm.pth", "", "without running code from it"),
        ("text.pth", "", "cannot be read"),
        ("list.pth", "", "holds list"),
        ("nothing.pth", "", "no checkpoint at"),
    ]
    for name, flags, message in cases:
        given = flags if flags.endswith(".json") else f"{COMMAND_LINE} {flags}"
        assert convert(tmp_path / name, out, "--from", "nvlabs", "--flags", given) == 1
        captured = capsys.readouterr()
        assert message in captured.err and captured.err.count("\n") == 1 and "was run" not in captured.out
    DDGANPipeline(DDGANGenerator(**generator_config(FLAGS), num_class_embeds=3), DDGANScheduler()).save_pretrained(
        tmp_path / "classes"
    )
    assert convert(tmp_path / "classes", out, "--to", "nvlabs") == 1
    assert "no counterpart of {'num_class_embeds': 3}" in capsys.readouterr().err
    assert not out.exists()
