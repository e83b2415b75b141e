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
    read_nvlabs_checkpoint,
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


def assert_same_weights(a: torch.nn.Module, b: torch.nn.Module) -> None:
    for (name, left), right in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(left, right), name


CHOICES = {
    "resblock_type": ("biggan", "biggan_oneadagn"),
    "progressive": ("none", "output_skip"),
    "progressive_input": ("residual", "input_skip", "none"),
    "progressive_combine": ("sum", "cat"),
    "embedding_type": ("positional", "fourier"),
    "fir": (True, False),
}


def pairwise() -> list[dict]:
    """Generators of which some one has any two values of two flags that the reference can run."""
    names, cases = list(CHOICES), []
    runs = [dict(zip(names, values)) for values in itertools.product(*CHOICES.values())]
    runs = [run for run in runs if run["fir"] or run["progressive"] != "output_skip"]

    def pairs(run: dict) -> set:
        return set(itertools.combinations(run.items(), 2))

    missing = set().union(*map(pairs, runs))
    while missing:
        cases.append(max(runs, key=lambda run: len(pairs(run) & missing)))
        missing -= pairs(cases[-1])
    return cases


@pytest.mark.parametrize("choice", pairwise(), ids=lambda choice: "-".join(map(str, choice.values())))
def test_every_pair_of_the_reference_s_choices_survives_the_round_trip(choice):
    flags = FLAGS | choice
    model = DDGANGenerator(**generator_config(flags)).eval()
    state, written = generator_to_nvlabs(model)
    assert len(state) == len(model.state_dict())
    assert all(written[name] == value for name, value in flags.items())
    again = generator_from_nvlabs(state, written)
    assert_same_weights(model, again)
    x, t, z, _ = inputs()
    assert torch.equal(again(x, t, z).sample, model(x, t, z).sample)


@pytest.mark.parametrize("kind", ["small", "large"])
def test_every_discriminator_survives_the_round_trip(kind):
    flags = CRITIC_FLAGS | {"image_size": 8 if kind == "small" else 64}
    model = DDGANDiscriminator(**discriminator_config(flags))
    state, written = discriminator_to_nvlabs(model)
    assert model.config.variant == kind and written["kind"] == kind and len(state) == len(model.state_dict())
    assert_same_weights(model, discriminator_from_nvlabs(state, written))


def test_a_checkpoint_of_parallel_training_is_read_without_its_prefix(tmp_path):
    model = DDGANGenerator(**generator_config(FLAGS)).eval()
    state, flags = generator_to_nvlabs(model)
    prefixed = {f"module.{name}": tensor for name, tensor in state.items()}
    torch.save(prefixed, tmp_path / "netG_10.pth")
    torch.save({"epoch": 10, "netG_dict": prefixed, "netD_dict": {}}, tmp_path / "content.pth")
    for name in ("netG_10.pth", "content.pth"):
        read = read_nvlabs_checkpoint(tmp_path / name)
        assert read.generator.keys() == state.keys() and read.discriminator is None
        assert_same_weights(model, generator_from_nvlabs(read.generator, flags))
    assert_same_weights(model, generator_from_nvlabs(prefixed, flags))


def generator(**changes) -> DDGANGenerator:
    return DDGANGenerator(**generator_config(FLAGS) | changes)


def read_back(**changes) -> DDGANGenerator:
    """A generator of FLAGS, read with other flags."""
    state, flags = generator_to_nvlabs(generator())
    return generator_from_nvlabs(state, flags | changes)


def export_critic(**changes) -> None:
    discriminator_to_nvlabs(DDGANDiscriminator(**discriminator_config(CRITIC_FLAGS), **changes))


ADM = {"sample_size": 8, "model_channels": 32, "channel_mult": (1,), "attention_resolutions": ()}
ERRORS = {
    # the weights and their flags
    r"tensors are missing \(first .*give the flags that it was trained with": lambda: read_back(num_res_blocks=2),
    "has shape .* but these flags give": lambda: read_back(z_emb_dim=12),
    # flags that the reference cannot run
    "conditional=False": lambda: generator_config(FLAGS | {"conditional": False}),
    "resblock_type='ddpm' fails in the reference": lambda: generator_config(FLAGS | {"resblock_type": "ddpm"}),
    "progressive='residual' fails in the reference": lambda: generator_config(FLAGS | {"progressive": "residual"}),
    # models that the reference cannot express
    "no counterpart of {'num_class_embeds': 3}": lambda: generator_to_nvlabs(generator(num_class_embeds=3)),
    r"no counterpart of {'sample_size': \(8, 16\)}": lambda: generator_to_nvlabs(generator(sample_size=(8, 16))),
    "counterpart of a ADMGenerator; a DDGANGenerator can": lambda: generator_to_nvlabs(ADMGenerator(**ADM)),
    "no counterpart of {'num_class_embeds': 2": lambda: export_critic(num_class_embeds=2),
    "no counterpart of {'stddev_contiguous_groups'": lambda: export_critic(stddev_contiguous_groups=True),
    "no counterpart of {'fir_kernel'": lambda: export_critic(fir_kernel=(1, 2, 1)),
    # flags as words
    "must be --name and values": lambda: read_flags("image_size 32"),
    "takes one value, not 0": lambda: read_flags("--image_size"),
    "takes one value, not 2": lambda: read_flags("--image_size 32 32"),
    "must be a whole number, not 'big'": lambda: read_flags("--image_size big"),
    "must be whole numbers, not '1 two'": lambda: read_flags("--ch_mult 1 two"),
    "must be a number, not 'much'": lambda: read_flags("--beta_max much"),
    "is True or False": lambda: read_flags("--fir maybe"),
    "there is no file .* with flags": lambda: read_flags("nowhere/flags.json"),
}


def test_what_does_not_fit_is_refused_with_advice():
    for message, call in ERRORS.items():
        with pytest.raises(ValueError, match=message):
            call()


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


# --- hf-diffusion convert

COMMAND_LINE = (
    "--image_size 8 --num_channels 2 --num_channels_dae 8 --ch_mult 1 2 --num_res_blocks 1 --attn_resolutions 4"
    " --nz 5 --z_emb_dim 16 --n_mlp 1 --num_timesteps 2"
)


def convert(*words) -> int:
    return cli.main(["convert", *map(str, words)])


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
    critic = DDGANDiscriminator(**discriminator_config(CRITIC_FLAGS))
    critic_state, critic_flags = discriminator_to_nvlabs(critic)
    args = argparse.Namespace(
        **flags | critic_flags, num_timesteps=3, use_ema=average, exp="cifar10", seed=1024, resume=False
    )
    content = {"epoch": 10, "args": args, "netG_dict": state, "optimizerG": {"state": slots, "param_groups": []}}
    content["netD_dict"] = {f"module.{name}": tensor for name, tensor in critic_state.items()}
    torch.save(content, tmp_path / "content.pth")
    assert convert(tmp_path / "content.pth", tmp_path / "ours", "--from", "nvlabs") == 0
    assert ("which holds no average" in capsys.readouterr().out) is not average
    pipe = DDGANPipeline.from_pretrained(tmp_path / "ours")
    assert len(pipe.scheduler) == 3
    written, _ = generator_to_nvlabs(pipe.generator)
    assert all(torch.equal(written[name], state[name] + average) for name in state)
    assert_same_weights(DDGANDiscriminator.from_pretrained(tmp_path / "ours" / "discriminator"), critic)

    assert convert(tmp_path / "ours", tmp_path / "theirs", "--to", "nvlabs") == 0
    back = torch.load(tmp_path / "theirs" / "netD.pth", weights_only=True)
    assert back.keys() == critic_state.keys() and all(torch.equal(back[name], critic_state[name]) for name in back)
    assert json.loads((tmp_path / "theirs" / "flags.json").read_text())["ngf"] == CRITIC_FLAGS["ngf"]


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
        ("list.pth", "", "holds a list"),
        ("nothing.pth", "", "there is no file"),
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
