"""Replays of the networks: sinusoids, attention orders (in ../shared/golden/openai) and whole models (openai_models)."""

import math
from pathlib import Path

import numpy as np
import torch

from hf_diffusion.convert.openai import (
    classifier_from_openai,
    classifier_to_openai,
    load_openai_checkpoint,
    unet_from_openai,
    unet_to_openai,
)
from hf_diffusion.models.unet_adm import qkv_attention, timestep_embedding
from tests.golden.replay import Case


DTYPES = {"f64": torch.float64, "f32": torch.float32}


def replay_timestep_embedding(case: Case) -> None:
    params = case.params
    for dtype in case.dtypes():
        timesteps = case.input("timesteps", dtype)
        embedding = timestep_embedding(timesteps, params["dim"], params["max_period"], params["layout"])
        assert embedding.dtype == torch.float32
        case.check("embedding", embedding, dtype)


def replay_attention_orders(case: Case) -> None:
    new_order = {"legacy": False, "new": True}[case.params["order"]]
    for dtype in case.dtypes():
        out = qkv_attention(case.input("qkv", dtype), case.params["n_heads"], new_order)
        case.check("out", out, dtype)


REPLAYS = {
    "sinusoidal timestep embedding": replay_timestep_embedding,
    "attention head orders": replay_attention_orders,
}


class ModelCase:
    """One network of openai_models: its weights, flags, inputs and expected arrays."""

    def __init__(self, folder: Path, entry: dict):
        self.flags, self.tolerance, self.class_name = entry["config"], entry["tolerance"], entry["class_name"]
        self.weights = load_openai_checkpoint(folder / entry["weights"])
        with np.load(folder / entry["vectors"]) as arrays:
            self.arrays = dict(arrays)
        self.is_classifier = {"UNetModel": False, "EncoderUNetModel": True}[self.class_name]
        self.checked: set[str] = set()

    def model(self, dtype: torch.dtype = torch.float32):
        build = classifier_from_openai if self.is_classifier else unet_from_openai
        return build(self.weights, self.flags).to(dtype)

    def exported(self, model) -> tuple[dict, dict]:
        return (classifier_to_openai if self.is_classifier else unet_to_openai)(model)

    def input(self, name: str, dtype: torch.dtype) -> torch.Tensor | None:
        array = self.arrays.get(f"input__{name}")
        if array is None:
            return None
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    def labels(self, dtype: torch.dtype) -> dict:
        labels = self.input("y", dtype)
        return {} if self.is_classifier or labels is None else {"class_labels": labels}

    def check(self, key: str, actual, tolerance: dict) -> None:
        actual = actual.detach().numpy() if isinstance(actual, torch.Tensor) else np.asarray(actual)
        np.testing.assert_allclose(actual, self.arrays[key], **tolerance, err_msg=key)
        self.checked.add(key)


def replay_output(case: ModelCase, column: str) -> None:
    """Output and conditioning vector."""
    dtype = DTYPES[column]
    model, x, t = case.model(dtype), case.input("x", dtype), case.input("timesteps", dtype)
    labels = case.labels(dtype)
    with torch.no_grad():
        case.check(f"expected_{column}__emb", model.conditioning(x, t, **labels), case.tolerance["emb"][column])
        output = model(x, t, **labels, return_dict=False)[0]
    case.check(f"expected_{column}__output", output, case.tolerance["output"][column])


def replay_guidance_gradient(case: ModelCase, column: str) -> None:
    """The gradient that guides sampling, through a frozen classifier."""
    dtype = DTYPES[column]
    model = case.model(dtype).requires_grad_(False)
    x, labels = case.input("x", dtype).requires_grad_(), case.input("y", dtype)
    log_probabilities = model(x, case.input("timesteps", dtype)).logits.log_softmax(dim=-1)
    log_probability = log_probabilities[torch.arange(len(x)), labels].sum()
    gradient = torch.autograd.grad(log_probability, x)[0] * case.input("guidance_scale", dtype)
    case.check(f"expected_{column}__guidance_gradient", gradient, case.tolerance["guidance_gradient"][column])


def replay_blocks(case: ModelCase) -> None:
    """Mean, root mean square and first values of every block's output in execution order, in float64."""
    dtype = torch.float64
    model = case.model(dtype)
    blocks = [model.conv_in, *model.down_blocks, model.mid_block]
    names = [f"input_blocks.{i}" for i in range(len(blocks) - 1)] + ["middle_block"]
    if not case.is_classifier:
        names += [f"output_blocks.{i}" for i in range(len(model.up_blocks))]
        blocks += model.up_blocks
    assert case.arrays["block_names"].tolist() == names
    shown = case.arrays["block_stats"].shape[1] - 2
    stats = []

    def note(module, inputs, output):
        stats.append([output.mean(), output.pow(2).mean().sqrt(), *output.flatten()[:shown]])

    for block in blocks:
        block.register_forward_hook(note)
    with torch.no_grad():
        model(case.input("x", dtype), case.input("timesteps", dtype), **case.labels(dtype))
    case.check("block_stats", [[value.item() for value in row] for row in stats], case.tolerance["block_stats"]["f64"])
    case.checked.add("block_names")


def replay_sinusoids(case: ModelCase) -> None:
    """The sinusoids, both computed in float32: they differ by the rounding of t * frequency, half an ulp of the largest t."""
    timesteps = case.input("timesteps", torch.float64)
    sinusoids = timestep_embedding(timesteps, case.flags["model_channels"])
    ulp = 2.0 ** (math.floor(math.log2(max(timesteps.abs().max().item(), 1.0))) - 23)
    case.check("timestep_embedding", sinusoids, {"rtol": 0, "atol": 4 * ulp})


def replay_model(case: ModelCase) -> None:
    """Every array of one network."""
    for column in DTYPES:
        replay_output(case, column)
        if f"expected_{column}__guidance_gradient" in case.arrays:
            replay_guidance_gradient(case, column)
    replay_blocks(case)
    replay_sinusoids(case)
    left = {key for key in case.arrays if not key.startswith("input__")} - case.checked
    assert not left, f"never compared: {sorted(left)}"
