"""The texts on the card of a finished model: gaps that it fills in, and a text as it appears."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

from hf_diffusion.data.protocol import TrainingData
from hf_diffusion.files import write_shown


INFILLS = 3
# Of all steps.
SHOWN = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)


def draw_texts(
    folder: Path, pipe: DiffusionPipeline, data: TrainingData, seed: int, options: dict[str, Any]
) -> dict[str, str]:
    """Write texts into `samples/` of a folder; their captions by file.

    options: of the pipeline's call.
    """
    classes = {} if pipe.num_classes is None else {"class_labels": 0}
    former = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(disable=True)
    try:
        infills = _infills(pipe, data, seed, {**options, **classes})
        steps = _as_it_appears(pipe, seed, {**options, **classes})
    finally:
        pipe._progress_bar_config = former
    write_shown(folder / "samples" / "infills", infills)
    write_shown(folder / "samples" / "steps", steps)
    return {
        "samples/infills.txt": "The middle third of texts of the training data, filled in between ⟦ and ⟧, and the "
        "original below each",
        "samples/steps.txt": "A text as it appears in the steps of sampling; ░ is a mask",
    }


def sentence_of_copies(samples: np.ndarray, data: TrainingData) -> str:
    """How long the stretches are that samples, tokens (N, L), share with the training data."""
    found = np.array([data.longest_copy(sample) for sample in samples])
    real = np.array([data.longest_copy(sample, but_once=True) for sample in _spread(data, len(samples))])
    return (
        f"The longest stretch that a text shares word for word with another place of {data.searched_for_copies}: in "
        f"{len(found)} samples median {np.median(found):g} and longest {found.max()} tokens, in as many texts of the "
        f"training data median {np.median(real):g} and longest {real.max()}."
    )


def _spread(data: TrainingData, count: int) -> np.ndarray:
    """Evenly spaced texts (N, L), of a stream the first."""
    return data.to_samples(next(data.once(count, count)))


def _infills(pipe: DiffusionPipeline, data: TrainingData, seed: int, options: dict[str, Any]) -> str:
    # neither the first, which may be a title, nor the last
    originals = torch.from_numpy(_spread(data, INFILLS + 2)[1:-1])
    third = originals.shape[1] // 3
    parts = originals[:, :third], originals[:, third:-third], originals[:, -third:]
    (starts, middles, ends), shown = map(pipe.tokenizer.batch_decode, parts), []
    for row, (start, middle, end) in enumerate(zip(starts, middles, ends)):
        call = {**options, "generator": torch.Generator().manual_seed(seed + row), "output_type": "pt"}
        found = pipe(prompt=start, suffix=end, **call).texts[0]
        first, last = len(pipe.encode(start)), len(found) - len(pipe.encode(end))
        (filled,) = pipe.decode(found[None, first:last])
        shown.append(f"--- {row + 1} ---\n{start}⟦{filled}⟧{end}\n--- the original ---\n{start}⟦{middle}⟧{end}\n")
    return "\n".join(shown)


def _as_it_appears(pipe: DiffusionPipeline, seed: int, options: dict[str, Any]) -> str:
    kept = []

    def keep(pipe: DiffusionPipeline, step: int, t: Any, tensors: dict[str, torch.Tensor]) -> dict:
        kept.append(tensors["tokens"])
        return {}

    call = {**options, "generator": torch.Generator().manual_seed(seed), "output_type": "pt"}
    kept.append(pipe(callback_on_step_end=keep, **call).texts)
    shown = dict.fromkeys(max(1, round(share * len(kept))) for share in SHOWN)
    names = {n: f"after step {n} of {len(kept) - 1}" if n < len(kept) else "at the end" for n in shown}
    return "\n".join(f"--- {name} ---\n{pipe.decode(kept[n - 1])[0]}\n" for n, name in names.items())
