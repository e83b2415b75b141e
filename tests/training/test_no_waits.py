"""A step asks the device for everything and waits for nothing.

The device is torch's "meta" here, which computes nothing: whoever waits for a value of it, or
copies to it and waits, is met and named. The first step may, since it fills tables on the device.
"""

import traceback
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import hf_diffusion
from hf_diffusion.loop import trainer as loop
from hf_diffusion.loop import update
from hf_diffusion.loop.trainer import Trainer
from hf_diffusion.randomness import Draw
from hf_diffusion.training import (
    train_autoencoder,
    train_classifier,
    train_clip,
    train_consistency,
    train_d3pm,
    train_ddgan,
    train_ddpm,
    train_edm,
    train_flow,
    train_mean_flow,
    train_score,
    train_text,
)


META = torch.device("meta")
CODE = Path(hf_diffusion.__file__).parent
RUN = "--train_batch_size 8 --max_train_steps 4 --sample_steps none".split()
DIGITS = [*RUN, "--dataset_name", "digits", "--split", "train[:64]"]
UNET = "--model_channels 8 --channel_mult 1,2 --num_res_blocks 1 --norm_num_groups 4 --num_head_channels 8".split()
CLASSES = [*DIGITS, *UNET, "--class_conditional"]
POINTS = [*RUN, *"--dataset_name eight_gaussians --max_train_samples 200 --model_channels 8".split()]
GAME = """
    --class_conditional --model_channels 8 --channel_mult 1,2 --num_res_blocks 1 --latent_dim 4 --latent_embed_dim 8
    --time_embed_dim 8 --discriminator_channels 8
""".split()
CLIP = """
    --contrast_size 4 --patch_size 4 --width 16 --layers 1 --heads 2 --embed_dim 8 --text_width 16 --text_layers 1
""".split()
CLIP += ["--caption_template", "the digit {}"]
TEXT = "--sequence_length 16 --hidden_size 16 --num_layers 1 --num_attention_heads 2".split()
AUGMENTED = "--loss_weighting min_snr --augment_probability 0.2".split()
LEARNED = "--objective hybrid --variance_type learned_range --timestep_sampling loss_second_moment".split()
SCRIPTS = {
    "ddpm": (train_ddpm, CLASSES),
    "ddpm, min-SNR, augmented": (
        train_ddpm,
        [*CLASSES, *AUGMENTED],
    ),
    "ddpm, p2": (train_ddpm, [*CLASSES, "--loss_weighting", "p2"]),
    "ddpm, error of v": (train_ddpm, [*CLASSES, "--loss_weighting", "v", "--prediction_type", "sample"]),
    "ddpm, learned variance": (train_ddpm, [*CLASSES, *LEARNED]),
    "edm, learned weighting": (train_edm, [*CLASSES, "--learned_weighting"]),
    "flow, pairs": (train_flow, [*CLASSES, "--pairing", "knn", "--level_distribution", "logit_normal"]),
    "score": (train_score, CLASSES),
    "score, NCSN": (train_score, [*DIGITS, *UNET, "--process", "ncsn"]),
    "d3pm": (train_d3pm, [*DIGITS, *UNET, "--num_levels", "17", "--d3pm_num_steps", "6"]),
    "mean flow": (train_mean_flow, POINTS),
    "consistency": (train_consistency, [*POINTS, "--optimizer", "adamw"]),
    "ddgan": (train_ddgan, [*DIGITS, *GAME]),
    "autoencoder": (train_autoencoder, [*DIGITS, *UNET[:2], *UNET[4:8], "--critic_channels", "8"]),
    "classifier": (train_classifier, [*DIGITS, *UNET]),
    "clip": (train_clip, [*DIGITS, *CLIP]),
    "text": (train_text, [*RUN, *TEXT]),
}


class Watch(TorchDispatchMode):
    """Notes who waits for a device, or reads a number of it."""

    READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::equal"}

    def __init__(self):
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func._schema.name
        if name == "aten::_to_copy" and kwargs.get("device", args[0].device) != args[0].device:
            if not kwargs.get("non_blocking"):
                self.note("copies")
        elif name == "aten::copy_" and args[0].device != args[1].device and not (*args, False)[2]:
            self.note("copies")
        elif name in self.READS and args[0].is_meta:
            self.note("reads")
            if name == "aten::_local_scalar_dense":
                return 1.0 if args[0].is_floating_point() else 1
        elif name == "aten::index.Tensor" and any(i is not None and i.dtype == torch.bool for i in args[1]):
            self.note("reads")
        return func(*args, **kwargs)

    def note(self, what: str) -> None:
        """Remember the innermost line of ours."""
        frame = [frame for frame in traceback.extract_stack() if Path(frame.filename).is_relative_to(CODE)][-1]
        self.waits.append(f"{Path(frame.filename).name}:{frame.lineno} {what}: {frame.line}")


class DrawnNowhere(Draw):
    """Numbers without values."""

    def __init__(self, rows: slice, total: int):
        super().__init__(0, 0, rows, total, torch.device("cpu"))
        self.generators, self.numbers, self.device = [None] * len(self.generators), self.numbers.to(META), META


def move(thing, seen: set[int]) -> None:
    """Put every network that an object of ours holds on the device."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, nn.Module):
        thing.to(META)
    if isinstance(thing, list | tuple):
        for part in thing:
            move(part, seen)
    elif type(thing).__module__.startswith("hf_diffusion") and hasattr(thing, "__dict__"):
        for part in vars(thing).values():
            move(part, seen)


class NeverRead:
    """In the place of `Later`, which alone may bring a number to the host."""

    def __init__(self, number: torch.Tensor):
        assert number.is_meta and number.shape == ()


@pytest.fixture
def built(monkeypatch, tmp_path):
    """`built(script, flags)`: the trainer of a script, which has not trained."""
    made: list[Trainer] = []

    def build(script, flags: list[str]) -> Trainer:
        monkeypatch.setenv("HF_DIFFUSION_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(loop.Trainer, "train", lambda trainer: made.append(trainer))
        script.main([*flags, "--output_dir", str(tmp_path / "run")])
        return made[0]

    return build


def waits_of_a_step(trainer: Trainer, monkeypatch) -> list[str]:
    """Who waits in the second step of a run."""
    for thing in (trainer.objective, trainer.objective.players):
        move(thing, set())
    updater, tensor = trainer.updater, torch.tensor
    updater.accelerator = trainer.accelerator
    monkeypatch.setattr(type(trainer.accelerator), "device", META)
    monkeypatch.setattr(updater.shared, "update", lambda: None)
    for player in trainer.objective.players:
        assert update.leaves_out(player.optimizer)
        # torch has no fused kernels for this device
        monkeypatch.setattr(player.optimizer, "step", lambda: None)
        for parameter in player.network.parameters():
            parameter.grad = None
    # autocast does not know it either
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(update, "Later", NeverRead)
    monkeypatch.setattr(updater.skips, "judge", lambda turns: None)
    batch = {name: value.to(META) for name, value in next(trainer.batches()).items()}
    micro = 0, batch, DrawnNowhere(trainer.order.rows(0), trainer.global_batch)
    with Watch():
        updater.step(0, [micro])
    watch = Watch()

    def made_on_the_device(*args, **kwargs):
        if torch.device(kwargs.get("device") or "cpu") == META:
            watch.note("copies")
        return tensor(*args, **kwargs)

    monkeypatch.setattr(torch, "tensor", made_on_the_device)
    with watch:
        updater.step(1, [micro])
    assert updater.runs_ahead
    return watch.waits


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_step_waits_for_nothing(name, built, monkeypatch, tmp_path):
    script, flags = SCRIPTS[name]
    if script is train_text:
        (tmp_path / "cats.txt").write_text("the cat sat on the mat, and the dog saw it.\n" * 60)
        flags = [*flags, "--train_data_dir", str(tmp_path / "cats.txt")]
    assert waits_of_a_step(built(script, flags), monkeypatch) == []


def test_whoever_reads_a_number_of_the_device_or_copies_to_it_is_named(built, monkeypatch):
    trainer = built(*SCRIPTS["ddpm"])

    def reading(network, batch, draw):
        values = trainer.objective.values(network, batch, draw)
        if values["loss"].mean() > 0:
            one = torch.tensor([1.0], device=META) * torch.ones(1).to(META) * torch.ones(1).to(META, non_blocking=True)
            values["loss"] = values["loss"] * one
        return values

    trainer.objective.players[0].loss = reading
    waits = waits_of_a_step(trainer, monkeypatch)
    assert [wait.split(" ")[1] for wait in waits] == ["reads:", "copies:", "copies:"]
