"""Replays of the networks.

Sinusoids, attention orders (in openai) and whole models (openai_models).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor, nn

from hf_diffusion.convert.openai import classifier_from_openai, classifier_to_openai, unet_from_openai, unet_to_openai
from hf_diffusion.models import unet_adm
from hf_diffusion.models.unet_adm import qkv_attention, timestep_embedding
from tests.golden.manifests import Record
from tests.golden.replay import Case


# class of the reference: from its weights, back to them
CONVERTERS = {
    "UNetModel": (unet_from_openai, unet_to_openai),
    "EncoderUNetModel": (classifier_from_openai, classifier_to_openai),
}


def replay_timestep_embedding(case: Case) -> None:
    params = case.settings
    for dtype in case.dtypes():
        timesteps = case.input("timesteps", dtype)
        embedding = timestep_embedding(timesteps, params["dim"], params["max_period"], params["layout"])
        assert embedding.dtype == torch.float32
        case.check("embedding", embedding, dtype)


def replay_attention_orders(case: Case) -> None:
    new_order = {"legacy": False, "new": True}[case.settings["order"]]
    for dtype in case.dtypes():
        out = qkv_attention(case.input("qkv", dtype), case.settings["n_heads"], new_order)
        case.check("out", out, dtype)


REPLAYS = {
    "sinusoidal timestep embedding": replay_timestep_embedding,
    "attention head orders": replay_attention_orders,
}


def converted(record: Record) -> nn.Module:
    """Our model with the weights of the reference's."""
    return CONVERTERS[record.kind][0](record.read_weights(), record.settings)


def assert_converted_there_and_back(record: Record) -> None:
    """Every bit of the weights and every flag of the reference comes back."""
    weights, model = record.read_weights(), converted(record)
    assert sum(p.numel() for p in model.parameters()) == record.entry["parameters"]
    back, flags = CONVERTERS[record.kind][1](model)
    assert set(back) == set(weights)
    assert all(torch.equal(back[name], weights[name].float()) for name in weights)
    assert {name: flags[name] for name in record.settings} == record.settings


class ModelReplay:
    """One network of the reference, converted, and the arrays of its case."""

    def __init__(self, case: Case):
        self.case, self.record, self.model = case, case.record, converted(case.record).requires_grad_(False)
        self.is_classifier = case.record.kind == "EncoderUNetModel"

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """x, timesteps, and the labels where the network takes them."""
        labelled = not self.is_classifier and self.case.has_input("y")
        labels = {"class_labels": self.case.input("y")} if labelled else {}
        return self.case.input("x", dtype), self.case.input("timesteps", dtype), labels

    def check_output(self, dtype: torch.dtype) -> None:
        """Output and conditioning vector."""
        model, (x, t, labels) = self.model.to(dtype), self.inputs(dtype)
        self.case.check("emb", model.conditioning(x, t, **labels), dtype)
        self.case.check("output", model(x, t, **labels, return_dict=False)[0], dtype)

    def check_guidance_gradient(self, dtype: torch.dtype) -> None:
        """The gradient that guides sampling, through a frozen classifier."""
        model, (x, t, _) = self.model.to(dtype), self.inputs(dtype)
        log_probabilities = model(x.requires_grad_(), t).logits.log_softmax(dim=-1)
        log_probability = log_probabilities[torch.arange(len(x)), self.case.input("y")].sum()
        gradient = torch.autograd.grad(log_probability, x)[0] * self.case.input("guidance_scale", dtype)
        self.case.check("guidance_gradient", gradient, dtype)

    def check_blocks(self) -> None:
        """Mean, root mean square and first values of every block's output, in execution order."""
        model, (x, t, labels) = self.model.to(torch.float64), self.inputs(torch.float64)
        blocks = [model.conv_in, *model.down_blocks, model.mid_block]
        names = [f"input_blocks.{i}" for i in range(len(blocks) - 1)] + ["middle_block"]
        if not self.is_classifier:
            names += [f"output_blocks.{i}" for i in range(len(model.up_blocks))]
            blocks += model.up_blocks
        assert self.case.words("block_names") == names
        shown = self.case.arrays["block_stats"].shape[1] - 2
        stats = []

        def note(module, inputs, output):
            stats.append(torch.stack([output.mean(), output.pow(2).mean().sqrt(), *output.flatten()[:shown]]))

        for block in blocks:
            block.register_forward_hook(note)
        model(x, t, **labels)
        self.case.check("block_stats", torch.stack(stats))


@contextmanager
def reference_sinusoids(case: Case) -> Iterator[None]:
    """Our models compute on the reference's own sinusoids, after ours were compared with them.

    Both are computed in float32, also in a float64 run. There another processor's last bit of t *
    frequency is 6e-5 at t = 999, and 6e-6 in `emb`. So this last bit is allowed here, and
    everything after it is held to the float64 tolerance.
    """
    expected, timesteps = case["timestep_embedding"], case.input("timesteps")
    ulp = 2.0 ** (math.floor(math.log2(max(timesteps.abs().max().item(), 1.0))) - 23)

    def checked(*args, **options) -> Tensor:
        torch.testing.assert_close(timestep_embedding(*args, **options), expected, rtol=0, atol=4 * ulp)
        return expected

    with mock.patch.object(unet_adm, "timestep_embedding", side_effect=checked) as asked:
        yield
    assert asked.called


def replay_model(case: Case) -> None:
    """Every array of one network."""
    replay = ModelReplay(case)
    with reference_sinusoids(case):
        for dtype in case.dtypes():
            replay.check_output(dtype)
            if case.expects("guidance_gradient", dtype):
                replay.check_guidance_gradient(dtype)
        replay.check_blocks()


MODEL_REPLAYS = dict.fromkeys(CONVERTERS, replay_model)
