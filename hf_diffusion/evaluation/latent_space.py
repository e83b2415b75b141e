"""What deterministic sampling promises: one noise, one image; paths between noises; the way back from an image to its noise.

DDIM: Song et al. 2021, arXiv:2010.02502, sections 4.3 and 5.2 to 5.4. Letters: B images, C channels, H x W pixels.
"""

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from hf_diffusion.evaluation.sampling import draw
from hf_diffusion.schedulers.scheduling_gaussian import DDIMEtaScheduler


DETERMINISTIC = (  # for eta = 0
    "DDIMEtaScheduler",
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerDiscreteScheduler",
    "UniPCMultistepScheduler",
)


def slerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """The point at `weight` in [0, 1] of the great circle from each a to its b (B, ...), Eq. 67 of DDIM.

    Between two Gaussian noises it has the length of a Gaussian noise, which a straight line does not.
    """
    x, y = a.flatten(1).double(), b.flatten(1).double()
    cosine = torch.nn.functional.cosine_similarity(x, y, dim=1).clamp(-1, 1)
    angle = cosine.arccos().unsqueeze(1)
    safe = angle.clamp(min=1e-6)  # the formula's limit for equal vectors is the vector, and its sine 0
    mixed = ((1 - weight) * safe).sin() / safe.sin() * x + (weight * safe).sin() / safe.sin() * y
    return mixed.reshape(a.shape).to(a.dtype)


def interpolate(
    pipeline: DiffusionPipeline,
    seed_pairs: Sequence[tuple[int, int]],
    columns: int,
    class_labels: Sequence[int] | None = None,
    **options,
) -> np.ndarray:
    """uint8 images (rows * columns, H, W, C): row r leads from the noise of one seed of pair r to that of the other.

    `class_labels` has one class a row. ValueError for fewer than 2 columns, for a pipeline whose call takes no latents, and for
    one whose sampling is not deterministic.
    """
    if columns < 2:
        raise ValueError(f"an interpolation needs at least 2 columns, its two ends, not {columns}")
    require_deterministic(pipeline, options.get("eta"))
    if not hasattr(pipeline, "prepare_latents") or not hasattr(pipeline, "image_size"):
        raise ValueError(
            f"{type(pipeline).__name__} cannot start from given noise; load it as ClassifierFreeGuidancePipeline"
        )
    shape = (len(seed_pairs), pipeline.unet.config.in_channels, *pipeline.image_size)
    ends = [
        torch.stack([torch.randn(shape[1:], generator=torch.Generator().manual_seed(int(seed))) for seed in seeds])
        for seeds in zip(*seed_pairs)
    ]
    path = [slerp(*ends, column / (columns - 1)) for column in range(columns)]
    latents = torch.stack(path, dim=1).flatten(0, 1)  # row by row
    labels = {} if class_labels is None else {"class_labels": [int(y) for y in class_labels for _ in range(columns)]}
    what = labels or {"batch_size": len(latents)}
    images = pipeline(**what, latents=latents, output_type="np", **options).images
    return (images * 255).round().astype(np.uint8)


def consistency(
    pipeline: DiffusionPipeline,
    seeds: Sequence[int],
    labels: Sequence[int] | None,
    step_counts: Sequence[int],
    **options,
) -> dict[int, float]:
    """How far images of the same noise are apart: root mean squared difference, in [0, 1], to those of the most steps.

    Returns a value for each step count but the largest. The comparison of images of different noise gives the scale:
    its value is under the key 0. ValueError for sampling that is not deterministic.
    """
    require_deterministic(pipeline, options.get("eta"))
    counts = sorted(set(step_counts))
    if len(counts) < 2 or len(seeds) < 2:
        raise ValueError(
            f"consistency compares at least 2 step counts on at least 2 seeds, got {counts} and {len(seeds)} seeds"
        )
    images = {n: draw(pipeline, seeds, labels, num_inference_steps=n, **options) / 255.0 for n in counts}
    finest = images[counts[-1]]
    distances = {n: float(np.sqrt(np.mean((images[n] - finest) ** 2))) for n in counts[:-1]}
    return {0: float(np.sqrt(np.mean((np.roll(finest, 1, axis=0) - finest) ** 2))), **distances}


@torch.no_grad()
def invert(
    pipeline: DiffusionPipeline, images: Tensor, class_labels: Tensor | None, num_inference_steps: int
) -> Tensor:
    """The noise (B, C, H, W) from which DDIM's reverse process would lead to images (B, C, H, W) in [-1, 1], by Euler steps, Eq. 14."""
    scheduler = inversion_scheduler(pipeline, num_inference_steps)
    x = images.to(pipeline.device, torch.float32)
    for t in scheduler.timesteps.flip(0)[
        :-1
    ]:  # the image stands for x at the first timestep, whose noise is the least
        x = scheduler.inverse_step(predict(pipeline, x, t, class_labels), t, x).prev_sample
    return x


@torch.no_grad()
def reconstruct(
    pipeline: DiffusionPipeline, latents: Tensor, class_labels: Tensor | None, num_inference_steps: int
) -> Tensor:
    """Images (B, C, H, W) in [-1, 1] from the noise that `invert` found with as many steps."""
    scheduler = inversion_scheduler(pipeline, num_inference_steps)
    x = latents
    for t in scheduler.timesteps:
        x = scheduler.step(predict(pipeline, x, t, class_labels), t, x, eta=0.0).prev_sample
    return x.clamp(-1, 1)


def reconstruction_error(
    pipeline: DiffusionPipeline, images: Tensor, class_labels: Tensor | None, num_inference_steps: int
) -> Tensor:
    """Squared error (B,), a dimension, of images in [0, 1] after inversion and reconstruction, as in Table 2 of DDIM."""
    noise = invert(pipeline, images, class_labels, num_inference_steps)
    again = reconstruct(pipeline, noise, class_labels, num_inference_steps)
    return ((again - images.to(again)) / 2).square().flatten(1).mean(1).cpu()


def inversion_scheduler(pipeline: DiffusionPipeline, num_inference_steps: int) -> DDIMEtaScheduler:
    """The pipeline's process without clipping, which cannot be undone, and with timesteps that begin at the clean end."""
    changes = {"clip_sample": False, "thresholding": False, "timestep_spacing": "leading", "steps_offset": 0}
    scheduler = DDIMEtaScheduler.from_config(pipeline.scheduler.config, eta=0.0, **changes)
    scheduler.set_timesteps(num_inference_steps, device=pipeline.device)
    return scheduler


def predict(pipeline: DiffusionPipeline, x_t: Tensor, t: Tensor, class_labels: Tensor | None) -> Tensor:
    """The output of the pipeline's U-Net, without guidance; no labels means the null class where the model has one."""
    labels = class_labels
    if labels is None and getattr(pipeline, "null_class_id", None) is not None:
        labels = torch.full((len(x_t),), pipeline.null_class_id)
    condition = {} if labels is None else {"class_labels": labels.to(x_t.device)}
    return pipeline.unet(x_t.to(pipeline.unet.dtype), t, **condition, return_dict=False)[0].to(x_t.dtype)


def require_deterministic(pipeline: DiffusionPipeline, eta: float | None) -> None:
    """ValueError unless the noise alone decides the image."""
    name = type(pipeline.scheduler).__name__
    used = pipeline.scheduler.config.get("eta", 0.0) if eta is None else eta
    if name not in DETERMINISTIC:
        raise ValueError(
            f"{name} draws noise in every step; sample with a deterministic one, such as DDIMEtaScheduler"
        )
    if used != 0:
        raise ValueError(f"eta={used} draws noise in every step; use eta=0")
