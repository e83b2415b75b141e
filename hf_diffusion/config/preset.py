"""The rules of `--preset auto`: from the images and the machine to settings, each with its reason.

Sources: ADM (arXiv:2105.05233) for levels, attention and the rate of large images; EDM
(arXiv:2206.00364) for dropout on small sets; the runs of this package on two CPU cores and on an
H100 for widths, patches and batches (docs/train_command.md says which).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


# Positions a side that a network for a CPU works on: 16x16 for 32 and 64 pixels, 14x14 for 28.
CPU_POSITIONS = 16
# On a flat ground patches leave a lattice of dots, which short trainings of v do not unlearn (seen
# on 5,000 garments after 620 steps of 32); images up to this side can do without.
FLAT, UNPATCHED_SIDE = 1 / 3, 32
# Smaller images have too few positions for patches.
LEAST_PATCHED = 24
# Sides that a patch of a GPU's network is taken from on: 14 positions and more are left.
GPU_PATCHED = 64
# A set with fewer images is learned by heart within minutes.
SMALL_SET = 5000
# Classes with fewer images are learned by heart one by one.
FEWEST_OF_A_CLASS = 20
# A run sees so many samples at least, where a narrower network makes that possible. Garments of
# 28x28 were recognised after 20,000 at width 32, in one run.
LEAST_SEEN = 30_000
# Group norms have 32 groups. Noise fills all values of a patch, which a width below their number
# can hardly carry (JiT, arXiv:2511.13720).
LEAST_WIDTH = 32
# Without a given length; on two cores enough for shapes that one recognises.
MINUTES = 20.0


@dataclass(frozen=True)
class Circumstances:
    """What settings are chosen by.

    sample_shape: (C, H, W) of images, (2,) of points.
    samples: None for a stream.
    of_a_class: samples of the smallest class that has any; None without classes and for a stream.
    device: `cpu` or the kind of accelerator; its cores count on a CPU.
    bf16: whether it multiplies bfloat16 faster than float32.
    ground: the share of the values at an end of their range, such as a black ground; 0 where the
        method does not mind.
    processes: share a batch.
    """

    sample_shape: tuple[int, ...]
    samples: int | None
    classes: int
    of_a_class: int | None
    device: str
    cores: int
    bf16: bool
    ground: float = 0.0
    processes: int = 1

    @property
    def on_cpu(self) -> bool:
        """Whether the settings are for a CPU, which does a thousandth of a GPU's work."""
        return self.device == "cpu"

    @property
    def are_images(self) -> bool:
        """Whether the samples have channels, height and width."""
        return len(self.sample_shape) == 3

    @property
    def side(self) -> int:
        """The longer side of an image."""
        return max(self.sample_shape[1:], default=1)


@dataclass(frozen=True)
class Choice:
    """Settings that are chosen together, and why."""

    settings: dict[str, Any]
    reason: str


def network(c: Circumstances, patch: int | None = None) -> Choice:
    """Width, levels, blocks and patches of a U-Net, or of a network for points.

    patch: the side of a patch, where that is given.
    """
    if not c.are_images:
        return Choice({"model_channels": 128, "num_res_blocks": 2}, "points need a small network")
    patch = patch or patch_for(c)
    positions = min(c.sample_shape[1:]) // patch
    if c.on_cpu:
        settings = {"model_channels": 64 if positions <= CPU_POSITIONS else 32, "num_res_blocks": 1}
        settings |= {"channel_mult": (1, 2)} if positions <= CPU_POSITIONS else {}
        reason = f"{positions} positions a side, which {c.cores} CPU cores train in the time"
    else:
        settings = {"model_channels": 128, "num_res_blocks": 2}
        reason = "ADM's width and levels for this size, which a GPU trains well"
    if patch > 1:
        reason += f"; {patch}x{patch} pixels a patch do {patch * patch} times less work"
    elif c.on_cpu and c.ground > FLAT:
        reason += "; no patches, which leave dots on a flat ground"
    return Choice({**settings, "patch_size": patch, "dropout": dropout_for(c)}, reason)


def patch_for(c: Circumstances) -> int:
    """The side of a patch: it leaves about CPU_POSITIONS on a CPU, and is 1 or 2 on a GPU."""
    patch = 1
    if c.ground > FLAT and c.side <= UNPATCHED_SIDE:
        return patch
    most = c.side // CPU_POSITIONS if c.on_cpu else (2 if c.side >= GPU_PATCHED else 1)
    while 2 * patch <= max(most, 2 if c.on_cpu else 1) and takes_patches(c.sample_shape, 2 * patch):
        patch *= 2
    return patch


def takes_patches(sample_shape: tuple[int, ...], patch: int) -> bool:
    """Whether sides are made of patches, of which the levels halve the number, and the narrowest
    network carries the noise of a patch.
    """
    channels, *sides = sample_shape
    is_carried = channels * patch**2 <= LEAST_WIDTH // 2
    return is_carried and len(sides) == 2 and min(sides) >= LEAST_PATCHED and not any(s % (2 * patch) for s in sides)


def dropout_for(c: Circumstances) -> float:
    """EDM's 0.13 for CIFAR-10, of which small sets need some and short runs of large sets none."""
    return 0.1 if c.samples is not None and c.samples < SMALL_SET else 0.0


def optimization(c: Circumstances) -> Choice:
    """Batch, learning rate and average."""
    if not c.are_images:
        batch, rate, reason = 256, 1e-3, "points are cheap"
    elif c.on_cpu:
        batch, rate = 32, 1e-3
        reason = "many small steps learn most in few minutes"
    else:
        batch = 256 if c.side <= 32 else 128 if c.side <= 64 else 64
        rate = 4e-4 if c.side <= 64 else 1e-4
        reason = "fills a GPU; the rate that this width bears"
    if c.samples is not None:
        batch = max(1, min(batch, c.samples))
    each = -(-batch // c.processes)
    return Choice({"train_batch_size": each, "learning_rate": rate, "ema_max_decay": 0.999}, reason)


def by_muon(chosen: dict[str, Choice], c: Circumstances, given: Mapping[str, Any]) -> dict[str, Choice]:
    """What DDPM, EDM and flow matching, of captions too, learn most by in few minutes of a CPU:
    Muon at three times the rate of AdamW (docs/training.md).

    given: settings of the user, which it has to fit.
    """
    if not (c.on_cpu and c.are_images) or given.get("optimizer", "muon") != "muon":
        return chosen
    steps = chosen["training"].settings | {"optimizer": "muon", "learning_rate": 3e-3}
    return chosen | {"training": Choice(steps, chosen["training"].reason)}


def ddpm_target(c: Circumstances, given: Mapping[str, Any]) -> dict[str, Choice]:
    """What a DDPM predicts, and how much the levels count (docs/training.md).

    given: settings of the user. Nothing is chosen where they say a part of it.
    """
    told = given.keys() & {"objective", "prediction_type", "loss_weighting", "timestep_sampling", "level_distribution"}
    if not (c.on_cpu and c.are_images) or told:
        return {}
    settings = {"prediction_type": "sample", "loss_weighting": "min_snr"}
    return {"target": Choice(settings, "x_0 under these weights of the levels is learned soonest")}


def edm_weights(c: Circumstances, given: Mapping[str, Any]) -> dict[str, Choice]:
    """How much the levels count for EDM (docs/training.md).

    given: settings of the user. Nothing is chosen where they say it.
    """
    if not (c.on_cpu and c.are_images) or given.keys() & {"loss_weighting", "learned_weighting"}:
        return {}
    return {"weights": Choice({"learned_weighting": True}, "no level's loss outweighs the others")}


def flow_levels(c: Circumstances) -> dict[str, Choice]:
    """How often flow matching visits the levels."""
    if not (c.on_cpu and c.are_images):
        return {}
    return {"levels": Choice({"level_distribution": "logit_normal"}, "the middle levels teach most")}


def classes(c: Circumstances, guided: bool) -> Choice:
    """Whether the classes are learned, and drawn with guidance, which needs dropped labels."""
    learned = c.classes > 1 and (c.of_a_class is None or c.of_a_class >= FEWEST_OF_A_CLASS)
    if c.classes < 2:
        reason = "the data have no classes"
    elif learned:
        reason = f"the data have {c.classes} classes"
    else:
        reason = f"the smallest of {c.classes} classes has {c.of_a_class} samples, fewer than {FEWEST_OF_A_CLASS}"
    return Choice({"class_conditional": learned} | ({"guidance_scale": 1.5} if learned and guided else {}), reason)


def arithmetic(c: Circumstances) -> Choice:
    """Precision, and with it what belongs together on a device."""
    if not c.are_images or not c.bf16:
        return Choice({"mixed_precision": "no"}, "float32 is fastest here")
    if c.on_cpu:
        # Not channels_last: 72 images/s on one core and no more on two, where without it 80 and 105
        # (4.3 M weights, 28 px, AVX512-BF16).
        return Choice({"mixed_precision": "bf16"}, "this CPU multiplies bf16")
    # On an H100 together 60 ms a step, channels_last alone 108, neither 90 (35.7 M weights, 32 px).
    settings = {"mixed_precision": "bf16", "torch_compile": True, "channels_last": True, "allow_tf32": True}
    return Choice(settings, "half of the time of float32 on this GPU, after a minute of compiling")
