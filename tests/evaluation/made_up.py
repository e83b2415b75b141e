"""A family that nothing in the package knows: vectors (7,) drawn to the origin in steps."""

import torch
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from hf_diffusion.evaluation.measures import Evaluation, Measure


WIDTH = 7


def mean_square(pipeline, data, options) -> Evaluation:
    """The mean square of real vectors after one pass of the network."""
    x_0 = data.fetch(range(min(options.count, len(data))), epoch=0)["x_0"]
    with torch.no_grad():
        value = float(pipeline.puller(x_0).square().mean())
    return Evaluation(
        {"mean_square": Measure(f"mean square ({len(x_0)} vectors)", value, better="lower")}, {"count": len(x_0)}
    )


class Puller(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, width: int = WIDTH):
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False)
        nn.init.eye_(self.linear.weight)
        self.linear.weight.data.mul_(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class PullScheduler(SchedulerMixin, ConfigMixin):
    """No betas, no timesteps: each step goes the same share of the way to the network's output."""

    @register_to_config
    def __init__(self, pull: float = 0.5):
        self.pull = pull

    def step(self, output: Tensor, x: Tensor, steps: int) -> Tensor:
        return x + (output - x) * (1 - (1 - self.pull) ** (1 / steps))


class VectorPipeline(DiffusionPipeline):
    """Vectors from noise; `churn` is the deviation of noise that all steps but the last add."""

    sampling_options = ("num_inference_steps", "churn")
    measures = {"mean_square": mean_square}
    sample_shape = (WIDTH,)

    def __init__(self, puller: ModelMixin, scheduler: SchedulerMixin):
        super().__init__()
        self.register_modules(puller=puller, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int = 4,
        churn: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        return_dict: bool = True,
    ) -> tuple[Tensor]:
        shape = (batch_size, WIDTH)
        x = randn_tensor(shape, generator) if latents is None else latents
        for step in self.progress_bar(range(num_inference_steps)):
            x = self.scheduler.step(self.puller(x), x, num_inference_steps)
            if churn and step < num_inference_steps - 1:
                x = x + churn * randn_tensor(shape, generator)
        return (x,)


class VectorData:
    """What an evaluation asks of data: 400 vectors of the standard deviation `scale`."""

    kind, name, fingerprint, num_samples, sample_shape = "vectors", "vectors", "v1", 400, (WIDTH,)
    class_names = labels = num_classes = None

    def __init__(self, scale: float):
        self.vectors = scale * torch.randn(400, WIDTH, generator=torch.Generator().manual_seed(1))

    def __len__(self):
        return len(self.vectors)

    def fetch(self, indices, epoch):
        return {"x_0": self.vectors[torch.as_tensor(list(indices))]}

    def to_samples(self, batch):
        return batch["x_0"].numpy()

    def describe(self):
        return {"name": self.name, "kind": self.kind, "samples": len(self), "fingerprint": self.fingerprint}
