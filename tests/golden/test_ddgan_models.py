"""Replay of the reference's generators and discriminators (outputs, gradients, R1), converted to our models."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_diffusion.convert.nvlabs import (
    discriminator_from_nvlabs,
    discriminator_to_nvlabs,
    generator_from_nvlabs,
    generator_to_nvlabs,
    load_nvlabs_checkpoint,
)
from hf_diffusion.losses.adversarial import r1_penalty
from tests.golden.replay import golden


FOLDER, MANIFEST = golden("ddgan_models")


def tolerance_of(entry: dict, name: str) -> dict:
    for names, tolerance in entry["tolerance"].items():
        if name in names.split(","):
            return tolerance
    raise AssertionError(f"the manifest gives no tolerance for {name!r}")


class Replay:
    """One model of the manifest: its arrays, and comparison with the tolerance that the manifest states."""

    def __init__(self, name: str):
        self.name, self.entry = name, MANIFEST["models"][name]
        files = {Path(f).suffix: FOLDER / f for f in self.entry["files"]}
        self.state = load_nvlabs_checkpoint(files[".safetensors"])
        self.flags = json.loads(files[".json"].read_text()) | self.entry["config"]
        if "image_size" in self.entry:
            self.flags["image_size"] = self.entry["image_size"]
        with np.load(files[".npz"]) as arrays:
            self.arrays = {key: torch.from_numpy(np.array(value)) for key, value in arrays.items()}
        self.compared: set[str] = set()

    def check(self, name: str, actual: torch.Tensor) -> None:
        expected, actual = self.arrays[name], actual.detach()
        assert actual.shape == expected.shape, f"{self.name}/{name}: {actual.shape} is not {expected.shape}"
        bound = tolerance_of(self.entry, name)["relmax"] * float(expected.abs().max())
        worst = float((actual - expected).abs().max())
        assert worst <= bound, f"{self.name}/{name}: off by {worst}, allowed {bound}"
        self.compared.add(name)

    def check_norms(self, key: str, gradients: dict[str, torch.Tensor | None]) -> None:
        """Norms of the gradients under the reference's names; None or NaN means that the tensor takes no gradient."""
        expected = self.entry[key]
        assert gradients.keys() == expected.keys()
        tolerance = tolerance_of(self.entry, key)
        known = {name: value for name, value in expected.items() if value is not None and not np.isnan(value)}
        assert tolerance["atol"] == "1e-4 * max over all parameters", f"unknown tolerance {tolerance['atol']!r}"
        atol = 1e-4 * max(known.values())
        for name, gradient in gradients.items():
            norm = 0.0 if gradient is None else float(gradient.norm())
            value = known.get(name, 0.0)
            assert abs(norm - value) <= atol + tolerance["rtol"] * value, (
                f"{self.name}/{name}: {norm}, expected {value}"
            )

    def assert_complete(self, inputs: set[str]) -> None:
        assert set(self.arrays) == self.compared | inputs, set(self.arrays) - self.compared - inputs


def named_gradients(model, export, gradients: list[torch.Tensor | None]) -> dict[str, torch.Tensor | None]:
    """Gradients under the reference's names: the converter carries them as it carries the weights."""
    with torch.no_grad():
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.copy_(torch.zeros_like(parameter) if gradient is None else gradient)
        for buffer in model.buffers():
            buffer.zero_()
    return export(model)[0]


def capture(module: torch.nn.Module, store: list, inputs: bool = False) -> None:
    module.register_forward_hook(lambda _, given, result: store.append(given[0] if inputs else result))


def replay_generator(replay: Replay) -> None:
    model, data = generator_from_nvlabs(replay.state, replay.flags).eval(), replay.arrays
    assert sum(t.numel() for t in replay.state.values()) == replay.entry["parameters"]
    time, latent = [], []
    capture(model.time_mlp, time)
    capture(model.latent_mapping, latent)
    x, z = data["x"].clone().requires_grad_(), data["z"].clone().requires_grad_()
    output = model(x, data["t"], z).sample
    replay.check("output", output)
    replay.check("temb", time[0])
    replay.check("zemb", latent[0])
    grads = torch.autograd.grad((output * data["v"]).sum(), [x, z, *model.parameters()])
    replay.check("grad_x", grads[0])
    replay.check("grad_z", grads[1])
    replay.check("output_single", model(data["x_single"], data["t"][:1], data["z"][:1]).sample)
    replay.check_norms("grad_param_norms", named_gradients(model, generator_to_nvlabs, grads[2:]))
    replay.assert_complete({"x", "t", "z", "v", "x_single"})


def replay_discriminator(replay: Replay) -> None:
    model, data = discriminator_from_nvlabs(replay.state, replay.flags).eval(), replay.arrays
    assert sum(t.numel() for t in replay.state.values()) == replay.entry["parameters"]
    assert len(data["x"]) == replay.entry["batch"]
    time, head = [], []
    capture(model.time_mlp, time)
    capture(model.conv_out, head, inputs=True)
    x = data["x"].clone().requires_grad_()
    logits = model(x, data["t"], data["x_t"]).logits
    replay.check("output", logits[:, None])
    replay.check("t_embed", time[0])
    replay.check("final_conv_input", head[0])
    replay.check("grad_x", torch.autograd.grad(logits.sum(), x, retain_graph=True)[0])
    r1 = r1_penalty(logits, x, gamma=2.0).mean()  # the golden has no factor gamma / 2
    replay.check("r1", r1)
    grads = torch.autograd.grad(r1, list(model.parameters()), allow_unused=True)
    replay.check_norms("r1_param_grad_norms", named_gradients(model, discriminator_to_nvlabs, grads))
    replay.assert_complete({"x", "t", "x_t"})


@pytest.mark.parametrize("name", sorted(MANIFEST["models"]))
def test_a_converted_model_computes_what_the_reference_computed(name):
    replay = Replay(name)
    kind = replay.entry["cls"].rsplit(".", 1)[-1] if "cls" in replay.entry else ""
    replays = {
        "NCSNpp": replay_generator,
        "Discriminator_small": replay_discriminator,
        "Discriminator_large": replay_discriminator,
    }
    assert kind in replays, f"{name}: no replay for models of class {kind!r}"
    replays[kind](replay)


@pytest.mark.parametrize("name", sorted(MANIFEST["models"]))
def test_a_checkpoint_survives_both_conversions_bit_for_bit(name):
    replay = Replay(name)
    if "nz" in replay.flags:
        back, flags = generator_to_nvlabs(generator_from_nvlabs(replay.state, replay.flags))
        assert flags == replay.flags
    else:
        back, flags = discriminator_to_nvlabs(discriminator_from_nvlabs(replay.state, replay.flags))
        assert flags == {k: v for k, v in replay.flags.items() if k != "nc"} | {
            "num_channels": replay.flags["nc"] // 2
        }
    assert back.keys() == replay.state.keys()
    for key, tensor in replay.state.items():
        assert torch.equal(back[key], tensor), key
