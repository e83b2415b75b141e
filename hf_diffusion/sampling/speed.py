"""A pipeline in the form that its device computes fastest in."""

from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from hf_diffusion.config.run_options import CAPTURING
from hf_diffusion.environment import cpu_multiplies_bf16


def speed_up(pipeline: DiffusionPipeline, compile_mode: str | None = None) -> str:
    """Prepare the network that draws, and one that guides it, for speed; returns what was done.

    On a CUDA device it computes in bfloat16, in the channels_last layout, and is compiled at its
    first call: the three belong together, since channels_last without compilation is slower than
    neither. A CPU takes bfloat16 where it has instructions for its products. Samples differ from
    those in float32 by rounding. Other parts, such as a `vae`, stay as they are.
    """
    drawing = getattr(pipeline, getattr(pipeline, "network_name", "unet"))
    device, guide = drawing.device.type, getattr(pipeline, "guide_unet", None)
    is_native = torch.cuda.is_bf16_supported(including_emulation=False) if device == "cuda" else cpu_multiplies_bf16()
    # in the order of words, each once
    done: dict[str, None] = {}
    for network in (drawing, *([] if guide is None else [guide])):
        if is_native and network.dtype == torch.float32:
            network.to(torch.bfloat16)
            done["bfloat16"] = None
        if device == "cuda":
            if any(parameter.ndim == 4 for parameter in network.parameters()):
                network.to(memory_format=torch.channels_last)
                done["channels_last"] = None
            compile_for_drawing(network, compile_mode)
            done["compiled, which takes a minute or two at the first batch"] = None
    return ", ".join(done) or f"nothing: this {device} computes fastest as it is"


def compile_for_drawing(network: nn.Module, mode: str | None = None) -> None:
    """Compile a network in place, at its first call.

    A captured graph writes its results to the same memory at every replay, and a sampler may keep
    those of earlier calls: so they are copied.
    """
    network.compile(mode=mode)
    if mode not in CAPTURING:
        return
    captured = network._compiled_call_impl

    def call(*inputs: Any, **options: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return tree_map_only(Tensor, Tensor.clone, captured(*inputs, **options))

    network._compiled_call_impl = call
