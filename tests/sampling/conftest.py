"""A pipeline whose images can be computed by hand from their seeds and labels."""

import pytest
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput

from hf_diffusion.schedulers.scheduling_gaussian import DDIMEtaScheduler


class Stripes(DiffusionPipeline):
    """Images (2, 3, 1) of noise, brighter with the class; `jitter` draws noise on the way."""

    sample_shape = (1, 2, 3)
    num_classes = 3
    id2label = {0: "2", 1: "cat", 2: "0"}

    def __init__(self):
        super().__init__()
        self.register_modules(scheduler=DDIMEtaScheduler())
        self.calls = []

    def get_label_ids(self, labels):
        names = {name: number for number, name in self.id2label.items()}
        unknown = [label for label in labels if label not in (*range(3), *names)]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is not a class")
        return [names.get(label, label) for label in labels]

    def __call__(self, class_labels=None, batch_size: int | None = None, num_inference_steps: int = 1,
                 jitter: float = 0.0, generator=None, latents=None, output_type: str = "pil"):  # fmt: skip
        self.calls.append({"labels": class_labels, "output_type": output_type, "bar": dict(self._progress_bar_config)})
        if latents is None:
            latents = torch.stack([torch.randn(self.sample_shape, generator=one) for one in generator])
        noise = torch.stack([torch.randn(self.sample_shape, generator=one) for one in generator])
        level = torch.tensor(class_labels or [0] * len(latents)).view(-1, 1, 1, 1)
        images = (0.5 + 0.1 * latents + 0.05 * level + jitter * noise) / num_inference_steps
        return ImagePipelineOutput(images=images.permute(0, 2, 3, 1).numpy())


@pytest.fixture
def stripes():
    pipeline = Stripes()
    pipeline.set_progress_bar_config(desc="mine")
    return pipeline
