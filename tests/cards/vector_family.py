"""A made-up family that no file of the package knows: vectors of 7 numbers, drawn by halvings."""

import torch
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import nn

from hf_diffusion.pipelines.self_contained import SelfContainedMixin


class VectorNetwork(ModelMixin, ConfigMixin):
    """Predicts a vector (B, width) from another."""

    @register_to_config
    def __init__(self, width: int = 7):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x):
        return self.linear(x)


class HalvingScheduler(SchedulerMixin, ConfigMixin):
    """Every step goes a share of the way."""

    @register_to_config
    def __init__(self, share: float = 0.5):
        pass


class VectorOutput(BaseOutput):
    vectors: torch.Tensor


class VectorPipeline(SelfContainedMixin, DiffusionPipeline):
    """Draws vectors (B, 7), or of another width."""

    sampling_options = ("halvings",)
    num_classes = id2label = null_class_id = None

    def __init__(self, network, scheduler):
        super().__init__()
        self.register_modules(network=network, scheduler=scheduler)

    @property
    def sample_shape(self):
        return (self.network.config.width,)

    def example_call(self):
        return {"batch_size": 3, "halvings": 5}

    @torch.no_grad()
    def __call__(self, batch_size=1, halvings=10, generator=None):
        x = randn_tensor((batch_size, *self.sample_shape), generator=generator, dtype=self.network.dtype)
        for _ in range(halvings):
            x = x + self.scheduler.config.share * (self.network(x) - x)
        return VectorOutput(vectors=x)
