"""Measures of a model of tokens: its bound on the likelihood of held-out texts."""

import math

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor
from tqdm.auto import tqdm

from hf_diffusion.data.protocol import TrainingData
from hf_diffusion.evaluation.likelihood import mean_and_standard_error
from hf_diffusion.evaluation.measures import Breakdown, Evaluation, Measure
from hf_diffusion.evaluation.model_measures import (
    ModelMeasureOptions,
    checked_by,
    fetch,
    gather_columns,
    shared_batches,
)
from hf_diffusion.evaluation.protocol import data_protocol
from hf_diffusion.losses.tokens import BOUNDS, bound_of_prior, mean_bits, predictor


# Noise levels at which each text is looked at, one in each of as many equal parts.
LEVELS = 32


def check_tokens(pipeline: DiffusionPipeline, data: TrainingData, options: ModelMeasureOptions) -> None:
    """ValueError unless the process is one of tokens, and the data are texts."""
    if type(pipeline.scheduler) not in BOUNDS or not hasattr(data, "characters_per_token"):
        raise ValueError(
            f"bits_per_token is a bound of tokens, not of {data.kind} with a {type(pipeline.scheduler).__name__}"
        )


@checked_by(check_tokens)
def measure_token_bound(pipeline: DiffusionPipeline, data: TrainingData, options: ModelMeasureOptions) -> Evaluation:
    """The bound in bits a token and a character, and the perplexity, of texts of the data.

    Each text is looked at at `num_timesteps` noise levels, one drawn in each of as many equal parts
    of [0, 1). That has the mean of the whole bound. Text i has the noise of seed + i. A
    class-conditional model is given the classes. Errors are those of the mean over texts.
    """
    levels = options.num_timesteps or LEVELS
    shown, parts = options.progress and PartialState().is_main_process, []
    for start, some in tqdm(shared_batches(data, options), desc="bits per token", disable=not shown):
        x_0, labels = fetch(pipeline, data, some)
        seeds = [options.seed + i for i in some]
        parts.append((start, *bound_of_batch(pipeline, x_0, labels, seeds, levels)))
    terms, prior = gather_columns(parts)
    total = terms.mean(dim=1) + prior
    bits, error = mean_and_standard_error(total)
    count, length = len(total), data.sample_shape[0]
    of_levels = Breakdown(
        "noise level (1 is all noise)",
        "bits a token at this level",
        [(k + 0.5) / levels for k in range(levels)],
        terms.mean(0).tolist(),
        (terms.std(0) / count**0.5).tolist() if count > 1 else None,
        "The bound in bits a token by noise level",
    )
    where = f"{count} texts of {length} tokens, {levels} noise levels each"
    wide, ratio = 2**bits, data.characters_per_token
    measures = {
        "bits_per_token": Measure(
            f"bound, bits per token ({where})", bits, error, better="lower", breakdown=of_levels
        ),
        "bits_per_character": Measure(
            f"bound, bits per character ({ratio:.4g} characters a token)", bits / ratio, error / ratio, better="lower"
        ),
        "perplexity": Measure("bound, perplexity per token", wide, wide * math.log(2) * error, better="lower"),
    }
    protocol = {"count": count, "levels": levels, "sequence_length": length, "noise_seed": options.seed}
    return Evaluation(measures, protocol | {"data": data_protocol(data)})


@torch.no_grad()
def bound_of_batch(
    pipeline: DiffusionPipeline, x_0: Tensor, labels: Tensor | None, seeds: list[int], levels: int
) -> tuple[Tensor, Tensor]:
    """Bits a token at each level (B, levels), and those of the prior (B,), of tokens (B, L)."""
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    if labels is None and getattr(pipeline, "null_class_id", None) is not None:
        labels = torch.full((len(x_0),), pipeline.null_class_id, device=x_0.device)

    def uniform(*shape: int) -> Tensor:
        return torch.stack([torch.rand(*shape, generator=g, dtype=torch.float64) for g in generators]).to(x_0.device)

    predict = predictor(pipeline.transformer, labels, not isinstance(pipeline.transformer, ModelMixin))
    columns = []
    for k in range(levels):
        u = (k + uniform(1)[:, 0]) / levels
        columns.append(mean_bits(BOUNDS[type(scheduler)](scheduler, predict, x_0, u, uniform).bound.double()))
    return torch.stack(columns, dim=1).cpu(), mean_bits(bound_of_prior(scheduler, x_0)).cpu()
