"""How well samples fit their texts, as a CLIP of noisy images sees them without noise.

CLIP score: Hessel et al. 2021, arXiv:2104.08718, here without its factor. B samples, K texts.
"""

from itertools import cycle, islice

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from diffusers import DiffusionPipeline

from hf_diffusion.data.protocol import TrainingData
from hf_diffusion.evaluation.likelihood import mean_and_standard_error
from hf_diffusion.evaluation.measures import Evaluation, Measure
from hf_diffusion.evaluation.model_measures import ModelMeasureOptions, checked_by
from hf_diffusion.evaluation.network_files import hash_tensors
from hf_diffusion.sampling.drawing import draw_floats


def check_clip(pipeline: DiffusionPipeline, data: TrainingData, options: ModelMeasureOptions) -> None:
    """ValueError for a pipeline without a CLIP."""
    if pipeline.clip is None:
        raise ValueError("clip_score needs a CLIP of noisy images; name one by --guide_by, as train_clip.py leaves it")


@checked_by(check_clip)
@torch.no_grad()
def measure_clip_score(pipeline: DiffusionPipeline, data: TrainingData, options: ModelMeasureOptions) -> Evaluation:
    """The mean product of the embeddings of samples and their texts, and how often a sample's own
    text is the best of all that were asked for.

    Beware: samples that the same CLIP has guided score high, whatever they look like.
    """
    state, texts = PartialState(), texts_of(pipeline, options)
    different = list(dict.fromkeys(texts))
    embeddings, found = pipeline.clip_texts(different), []  # (K, D)
    mine = list(range(options.count))[state.process_index :: state.num_processes]
    for start in range(0, len(mine), options.batch_size):
        rows = mine[start : start + options.batch_size]
        asked = [texts[row] for row in rows]
        samples = draw_floats(pipeline, [options.seed + row for row in rows], asked, **options.sampling)
        x_0 = torch.from_numpy(samples).permute(0, 3, 1, 2).to(embeddings) * 2 - 1
        products = pipeline.clip.image_embeddings(x_0, 0) @ embeddings.T  # (B, K)
        own = torch.tensor([different.index(text) for text in asked], device=products.device)
        hits = (products.argmax(1) == own).double()
        found += zip(rows, products.gather(1, own[:, None])[:, 0].tolist(), hits.tolist())
    _, scores, hits = map(list, zip(*sorted(gather_object(found))))
    measures = {}
    for name, values, what in (("clip_score", scores, "CLIP score"), ("clip_top1", hits, "own text is the best")):
        value, error = mean_and_standard_error(torch.tensor(values, dtype=torch.float64))
        measures[name] = Measure(f"{what}, of {len(different)} texts (noisy CLIP)", value, error, better="higher")
    clip = {"sha256": hash_tensors(pipeline.clip.state_dict())}
    protocol = {"count": options.count, "seeds": [options.seed, options.seed + options.count - 1], "clip": clip}
    return Evaluation(measures, protocol)


def texts_of(pipeline: DiffusionPipeline, options: ModelMeasureOptions) -> list[str]:
    """A text for each sample: those of the options in turn, or the pipeline's examples."""
    asked = list(options.labels or pipeline.example_prompts)
    if not isinstance(asked[0], str):
        asked = pipeline.prompts_of(asked)
    return list(islice(cycle(asked), options.count))
