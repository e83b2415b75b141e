"""Replays of the reference's generators and discriminators, converted to our models."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from hf_diffusion.convert.nvlabs import (
    discriminator_from_nvlabs,
    discriminator_to_nvlabs,
    generator_from_nvlabs,
    generator_to_nvlabs,
)
from hf_diffusion.losses.adversarial import r1_penalty
from tests.golden.manifests import Record
from tests.golden.replay import Case


def assert_converted_there_and_back(record: Record) -> None:
    """Every bit of the weights and every flag of the reference comes back."""
    state, flags = record.read_weights(), record.settings
    if record.kind == "NCSNpp":
        back, exported = generator_to_nvlabs(generator_from_nvlabs(state, flags))
        assert exported == flags
    else:
        back, exported = discriminator_to_nvlabs(discriminator_from_nvlabs(state, flags))
        given = {name: value for name, value in flags.items() if name != "nc"}
        assert exported == given | {"num_channels": flags["nc"] // 2}
    assert back.keys() == state.keys()
    for key, tensor in state.items():
        assert torch.equal(back[key], tensor), key


def check_norms(case: Case, key: str, gradients: dict[str, Tensor | None]) -> None:
    """Norms of the gradients under the reference's names.

    None or NaN means that the tensor takes no gradient.
    """
    expected, tolerance = case.record.entry[key], case.tolerance(key)
    assert gradients.keys() == expected.keys()
    known = {name: value for name, value in expected.items() if value is not None and not np.isnan(value)}
    assert tolerance["atol"] == "1e-4 * max over all parameters", f"unknown tolerance {tolerance['atol']!r}"
    atol = 1e-4 * max(known.values())
    for name, gradient in gradients.items():
        norm = 0.0 if gradient is None else float(gradient.norm())
        value = known.get(name, 0.0)
        assert abs(norm - value) <= atol + tolerance["rtol"] * value, f"{case}/{name}: {norm}, expected {value}"


def named_gradients(model: nn.Module, export: Callable, gradients: list[Tensor | None]) -> dict[str, Tensor | None]:
    """Gradients under the reference's names.

    The converter carries them as it carries the weights.
    """
    with torch.no_grad():
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.copy_(torch.zeros_like(parameter) if gradient is None else gradient)
        for buffer in model.buffers():
            buffer.zero_()
    return export(model)[0]


def capture(module: nn.Module, store: list, inputs: bool = False) -> None:
    module.register_forward_hook(lambda _, given, result: store.append(given[0] if inputs else result))


def replay_generator(case: Case) -> None:
    state = case.record.read_weights()
    model = generator_from_nvlabs(state, case.settings).eval()
    assert sum(tensor.numel() for tensor in state.values()) == case.record.entry["parameters"]
    time, latent = [], []
    capture(model.time_mlp, time)
    capture(model.latent_mapping, latent)
    x, t, z = case["x"].requires_grad_(), case["t"], case["z"].requires_grad_()
    output = model(x, t, z).sample
    case.check("output", output)
    case.check("temb", time[0])
    case.check("zemb", latent[0])
    grads = torch.autograd.grad((output * case["v"]).sum(), [x, z, *model.parameters()])
    case.check("grad_x", grads[0])
    case.check("grad_z", grads[1])
    case.check("output_single", model(case["x_single"], t[:1], z[:1]).sample)
    check_norms(case, "grad_param_norms", named_gradients(model, generator_to_nvlabs, grads[2:]))


def replay_discriminator(case: Case) -> None:
    state = case.record.read_weights()
    model = discriminator_from_nvlabs(state, case.settings).eval()
    assert sum(tensor.numel() for tensor in state.values()) == case.record.entry["parameters"]
    time, head = [], []
    capture(model.time_mlp, time)
    capture(model.conv_out, head, inputs=True)
    x = case["x"].requires_grad_()
    assert len(x) == case.record.entry["batch"]
    logits = model(x, case["t"], case["x_t"]).logits
    case.check("output", logits[:, None])
    case.check("t_embed", time[0])
    case.check("final_conv_input", head[0])
    case.check("grad_x", torch.autograd.grad(logits.sum(), x, retain_graph=True)[0])
    # the golden has no factor gamma / 2
    r1 = r1_penalty(logits, x, gamma=2.0).mean()
    case.check("r1", r1)
    grads = torch.autograd.grad(r1, list(model.parameters()), allow_unused=True)
    check_norms(case, "r1_param_grad_norms", named_gradients(model, discriminator_to_nvlabs, grads))


REPLAYS = {
    "NCSNpp": replay_generator,
    "Discriminator_small": replay_discriminator,
    "Discriminator_large": replay_discriminator,
}
