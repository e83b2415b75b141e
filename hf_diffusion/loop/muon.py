"""Muon: matrices move by the nearest orthogonal matrix of their momentum, all else by AdamW.

Jordan et al. 2024, https://kellerjordan.github.io/posts/muon. The length of a step is that of
arXiv:2502.16982, section 2.2: a matrix moves as far as AdamW would move it, so that learning rate
and weight decay of AdamW serve both. torch.optim.Muon is the same for matrices alone, one at a time
and in bfloat16; here kernels of convolutions are matrices (out, in * kh * kw), those of one shape
are taken together, and a CPU without products in bfloat16 computes in float32.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from hf_diffusion.environment import cpu_multiplies_bf16


# Of x -> a x + b x^3 + c x^5, which brings singular values from (0, 1] to about 1 in few steps.
QUINTIC, ITERATIONS = (3.4445, -4.7750, 2.0315), 5
# The usual root mean square of an update of AdamW, in units of the learning rate.
RMS_OF_ADAMW = 0.2
# A layer with so few channels at one side sees or makes samples.
FEW_CHANNELS = 16


def orthogonalized(matrices: Tensor) -> Tensor:
    """U V^T for matrices U S V^T (B, M, N): singular values near 1 by Newton-Schulz iterations.

    In bfloat16 where the device multiplies it, which is far faster and enough, else in float32.
    """
    x = matrices.to(torch.bfloat16 if matrices.is_cuda or cpu_multiplies_bf16() else torch.float32)
    is_tall = x.shape[1] > x.shape[2]
    x = x.mT if is_tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = QUINTIC
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).to(matrices.dtype)


def matrices_of(network: nn.Module) -> list[nn.Parameter]:
    """The weights of linear maps and convolutions within the blocks of a network.

    Not the first and last layers: those directly in it or in an nn.Sequential of it, and those with
    few channels at one side. No weight that an embedding shares.
    """
    embeddings = {id(m.weight) for m in network.modules() if isinstance(m, nn.Embedding)}
    top = {network, *(child for child in network.children() if isinstance(child, nn.Sequential))}
    ends = {id(network), *(id(layer) for parent in top for layer in parent.children())}
    found = {}
    for module in network.modules():
        if isinstance(module, nn.Linear | _ConvNd) and id(module) not in ends and id(module.weight) not in embeddings:
            if min(module.weight.shape[:2]) > FEW_CHANNELS:
                found[id(module.weight)] = module.weight
    return list(found.values())


class Muon(torch.optim.Optimizer):
    """Muon for the first group of parameters, `matrices` (M, N, ...), and AdamW for the `others`.

    `lr` and `weight_decay` are those of both; `betas` and `eps` are AdamW's. The state of a matrix
    is one tensor, `momentum_buffer`, where AdamW has two. As in optimizers of torch, a tensor () of
    1 as `found_inf` leaves everything as it is.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
    ):
        adamw = torch.optim.AdamW([{"params": list(others)}], lr, betas, eps, weight_decay, fused=True)
        groups = [{"params": list(matrices), "momentum": momentum}, adamw.param_groups[0]]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})
        self.adamw = adamw
        self.found_inf: Tensor | None = None

    @classmethod
    def of(cls, network: nn.Module, **options) -> "Muon":
        """The optimizer of a network; ValueError where no layer of it is meant for Muon."""
        matrices = matrices_of(network)
        if not matrices:
            raise ValueError(
                f"optimizer muon is for matrices of more than {FEW_CHANNELS} channels within blocks, and this "
                f"{type(network).__name__} has none; give adamw, or a wider network"
            )
        chosen = {id(p) for p in matrices}
        return cls(matrices, [p for p in network.parameters() if id(p) not in chosen], **options)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Move every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        matrices, others = self.param_groups
        by_shape: dict[tuple, list[nn.Parameter]] = {}
        for parameter in matrices["params"]:
            if parameter.grad is not None:
                key = parameter.flatten(1).shape, parameter.dtype, parameter.device
                by_shape.setdefault(key, []).append(parameter)
        for alike in by_shape.values():
            self._move(alike, **{name: matrices[name] for name in ("lr", "momentum", "weight_decay")})
        self.adamw.found_inf = self.found_inf
        # One state and one group: what was loaded or scheduled holds for it, too.
        self.adamw.state, self.adamw.param_groups = self.state, [others]
        self.adamw.step()
        return loss

    def _move(self, parameters: list[nn.Parameter], lr: float, momentum: float, weight_decay: float) -> None:
        """Move matrices of one shape."""
        directions, spoiled = [], self.found_inf
        kept = 1 if spoiled is None else 1 - spoiled
        for parameter in parameters:
            gradient = parameter.grad if spoiled is None else parameter.grad.masked_fill(spoiled > 0, 0)
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            mean = state["momentum_buffer"].lerp_(gradient, (1 - momentum) * kept)
            # Nesterov's: what the mean will be, seen from the gradient of now
            directions.append(gradient.lerp(mean, momentum).flatten(1))
        updates = orthogonalized(torch.stack(directions)) * kept
        length = lr * RMS_OF_ADAMW * math.sqrt(max(updates.shape[1:]))
        for parameter, update in zip(parameters, updates):
            parameter.mul_(1 - lr * weight_decay * kept).sub_(update.reshape(parameter.shape), alpha=length)
