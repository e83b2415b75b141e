r"""What a diffusion language model is measured against: an autoregressive one of equal size.

    python -m tests.benchmarks.text_autoregressive --config shakespeare_mdlm.yaml \
        --train_data_dir tiny_shakespeare.txt

The settings are those of train_text.py, and so are the network, the batches, the precision, the
optimizer, the average and the held-out sequences. The first token is predicted from the mask.
"""

import time

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor

from hf_diffusion.config.command_line import parse_config
from hf_diffusion.data.loading import load_data
from hf_diffusion.data.splits import load_unaugmented
from hf_diffusion.evaluation.likelihood import mean_and_standard_error
from hf_diffusion.loop.learning_rate import lr_factor
from hf_diffusion.loop.start import start
from hf_diffusion.loop.update import OPTIMIZERS
from hf_diffusion.losses.tokens import mean_bits
from hf_diffusion.models.transformer_tokens import TokenAttention, TokenTransformerModel
from hf_diffusion.randomness import BatchOrder
from hf_diffusion.training.train_text import TextConfig


class CausalAttention(TokenAttention):
    """Attention of each place to itself and to those before it."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if v.dtype != torch.bfloat16 or not v.requires_grad:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        # As in TokenAttention: the kernel's backward pass is slow in bfloat16 on a CPU.
        later = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).triu(1)
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(later, -torch.inf)
        with torch.autocast("cpu", enabled=False):
            return torch.softmax(weights, dim=-1) @ v


def losses(accelerator: Accelerator, network: TokenTransformerModel, x_0: Tensor, first: int) -> Tensor:
    """-log p(x_0) of each token (B, L), in nats."""
    shifted = torch.cat([torch.full_like(x_0[:, :1], first), x_0[:, :-1]], dim=1)
    with accelerator.autocast():
        logits = network(shifted, return_dict=False)[0].float()
    return F.cross_entropy(logits.movedim(-1, 1), x_0, reduction="none")


def main() -> None:
    """Train, measure, and print bits per character with the CPU seconds of the training."""
    config = parse_config(TextConfig, prog="text_autoregressive")
    accelerator, data = start(config), load_data(**config.data_arguments())
    held_out = load_unaugmented(config.data_arguments(), data, config.eval_split)
    torch.manual_seed(config.seed)
    network = TokenTransformerModel(
        len(data.tokenizer),
        data.sample_shape[0],
        config.hidden_size,
        config.num_layers,
        config.num_attention_heads,
        dropout=config.dropout,
    )
    for block in network.blocks:
        block.attention.__class__ = CausalAttention
    average = EMAModel(network.parameters(), config.ema_max_decay, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    betas = config.adam_beta1, config.adam_beta2
    optimizer = OPTIMIZERS[config.optimizer](network, lr=config.learning_rate, betas=betas, weight_decay=0.0)
    order, mask = BatchOrder(len(data), config.seed, config.train_batch_size, 1, 0, 1), data.tokenizer.mask_token_id
    steps, began = config.total_steps(len(data), 1), time.process_time()
    for step, batch in enumerate(data.batches(order, 0, steps)):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * lr_factor(step, steps, config.lr_scheduler, None, None)
        losses(accelerator, network, batch["x_0"], mask).mean().backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.step(network.parameters())
        if step % 100 == 0:
            print(f"step {step}, {time.process_time() - began:.0f} CPU s", flush=True)
    seconds = time.process_time() - began
    average.copy_to(network.parameters())
    with torch.no_grad():
        found = [
            mean_bits(losses(accelerator, network.eval(), batch["x_0"], mask))
            for batch in held_out.once(config.eval_batch_size)
        ]
    bits, error = mean_and_standard_error(torch.cat(found))
    parameters = sum(p.numel() for p in network.parameters())
    print(
        f"autoregressive, {parameters:,} parameters, {steps} steps, {seconds:.0f} CPU s: {bits:.4f} +- "
        f"{error:.4f} bits per character of {len(held_out)} held-out texts of {data.sample_shape[0]} characters"
    )


if __name__ == "__main__":
    main()
