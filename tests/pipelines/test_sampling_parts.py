"""The shared parts of pipelines where no image is involved, and the size of a forward."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin

from hf_diffusion import ClassifierFreeGuidancePipeline, DDGANPipeline, DDGANScheduler, DDIMEtaScheduler
from hf_diffusion.pipelines.sampling_parts import CPU_FEATURE_MAP_BYTES, SamplingMixin, in_micro_batches, sides
from tests.pipelines.tiny import (
    make_classifier_free,
    make_ddgan,
    make_guided,
    make_points,
    make_points_in_few_steps,
    quiet,
    seeds,
)


class Shrink(ModelMixin, ConfigMixin):
    """A denoiser or generator of any shape, without sides: `scale` times its input."""

    @register_to_config
    def __init__(self, in_channels: int = 2, latent_dim: int = 3, scale: float = 0.5):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(scale))

    def forward(self, sample, timestep, latent=None, return_dict=True):
        return (sample * self.weight + (0 if latent is None else latent.mean()),)


class Sided(Shrink):
    """The same for samples with sides."""

    @register_to_config
    def __init__(self, in_channels: int = 2, sample_size: tuple = (), latent_dim: int = 3, scale: float = 0.5):
        super().__init__(in_channels, latent_dim, scale)


PIPES = {
    "denoiser": lambda network: ClassifierFreeGuidancePipeline(network, DDIMEtaScheduler(clip_sample=False)),
    "generator": lambda network: DDGANPipeline(network, DDGANScheduler(3)),
}
SHAPES = [(2,), (7,), (1, 5), (3, 2, 4, 4)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", PIPES)
def test_samples_that_are_no_images_keep_their_shape_and_values(kind, shape):
    network = Sided(shape[0], shape[1:]) if shape[1:] else Shrink(shape[0])
    pipe = quiet(PIPES[kind](network))
    assert pipe.sample_shape == shape and pipe.image_size == shape[1:]
    call = {"batch_size": 5, "num_inference_steps": 3}
    latent, pt, array = (
        pipe(**call, generator=seeds(*range(5)), output_type=kind).images for kind in ("latent", "pt", "np")
    )
    assert latent.shape == (5, *shape) and latent.min() < -0.1 and torch.equal(latent, pt)
    assert isinstance(array, np.ndarray) and array.dtype == np.float32 and (array == latent.numpy()).all()
    again = pipe(**call | {"batch_size": 1}, generator=seeds(3), output_type="pt", micro_batch_size=1).images
    if kind == "denoiser":  # that generator mixes the latents of a batch
        torch.testing.assert_close(again[0], pt[3])
    with pytest.raises(ValueError, match=r"output_type='pil' needs images, but a sample has shape .*\['np', 'pt'"):
        pipe(**call)
    assert pipe(**pipe.example_call() | {"num_inference_steps": 3}).images.shape == (4, *shape)


@pytest.mark.parametrize("make", [make_points, make_points_in_few_steps])
def test_points_of_given_classes_depend_on_seed_and_class_alone(make):
    pipe = make()
    call = {"num_inference_steps": 3, "output_type": "np"}
    points = pipe(["cat", "dog", 2], generator=seeds(0, 1, 2), **call).images
    assert points.shape == (3, 2)
    alone = pipe([2], generator=seeds(2), **call).images
    np.testing.assert_allclose(alone[0], points[2], rtol=1e-4, atol=1e-5)
    assert not np.allclose(pipe([1], generator=seeds(2), **call).images, alone, atol=1e-3)
    assert pipe.example_call()["output_type"] == "np" and pipe(**pipe.example_call()).images.shape == (4, 2)


def test_points_are_drawn_from_the_distribution_that_the_network_knows():
    """The exact noise prediction of N(0, 4) in the plane gives points of that deviation."""
    scheduler = DDIMEtaScheduler(clip_sample=False)

    class Wide(Shrink):
        def forward(self, sample, timestep, return_dict=True):
            alpha_bar = scheduler.alpha_bar[int(timestep)].float()
            return ((1 - alpha_bar).sqrt() * sample / (4 * alpha_bar + 1 - alpha_bar),)

    pipe = quiet(ClassifierFreeGuidancePipeline(Wide(2), scheduler))
    points = pipe(batch_size=4000, num_inference_steps=200, generator=seeds(0)[0], output_type="pt").images
    assert points.shape == (4000, 2) and (points.std(0) - 2).abs().max() < 0.1


class Tokens(SamplingMixin, DiffusionPipeline):
    """A discrete process that starts from uniform ids and asks the network for logits once."""

    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    def prepare_latents(self, batch, generator, latents):
        rows = [torch.randint(5, self.sample_shape, generator=g) for g in generator]
        return torch.stack(rows) if latents is None else latents

    @torch.no_grad()
    def __call__(self, prompts, generator, output_type="np", micro_batch_size=None, latents=None):
        self.check_common(len(prompts), generator, latents, output_type, (), micro_batch_size=micro_batch_size)
        ids = self.prepare_latents(len(prompts), generator, latents)
        for t in self.prepare_timesteps(2):
            logits = in_micro_batches(self.unet, micro_batch_size, ids, t, embeddings=prompts, mask=None)
            ids = logits.argmax(-1)
        return self.to_output(ids, output_type, return_dict=True)


class Logits(ModelMixin, ConfigMixin):
    """Logits (B, N, 5) for ids (B, N); the highest is the id plus the prompt's, modulo 5."""

    @register_to_config
    def __init__(self, in_channels: int = 6):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(1.0))
        self.rows: list[int] = []

    def forward(self, sample, timestep, embeddings, return_dict=True):
        assert sample.dtype == torch.int64 and embeddings.dtype == self.dtype and not return_dict
        self.rows.append(len(sample))
        return (torch.nn.functional.one_hot((sample + embeddings.long()[:, None]) % 5, 5) * self.weight,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_integer_samples_and_conditions_of_ones_own_pass_through_the_shared_parts(dtype):
    pipe = quiet(Tokens(Logits().to(dtype), DDPMScheduler()))
    start = torch.tensor([[0, 1, 2, 3, 4, 0]] * 3)
    ids = pipe(torch.tensor([0.0, 1.0, 2.0]), seeds(0, 1, 2), latents=start, micro_batch_size=2).images
    assert ids.dtype == np.int64 and (ids == (start.numpy() + 2 * np.arange(3)[:, None]) % 5).all()
    assert pipe.unet.rows == [2, 1] * 2
    assert pipe(torch.zeros(2), seeds(0, 1)).images.shape == (2, 6)


def test_micro_batches_hand_on_rows_and_dtypes_and_come_back_in_float32_at_least():
    def network(sample, t, latent, return_dict, class_labels):
        assert sample.dtype == latent.dtype == torch.bfloat16 and class_labels.dtype == torch.int64
        return (sample + latent + class_labels[:, None],)

    network.dtype = torch.bfloat16
    x, z, labels = torch.arange(5.0)[:, None], torch.full((5, 1), 2.0), torch.arange(5)
    for size in (1, 2, 5, 100, None):
        output = in_micro_batches(network, size, x, torch.tensor(3), z, class_labels=labels, mask=None)
        assert output.dtype == torch.float32 and output[:, 0].tolist() == [2, 4, 6, 8, 10]


def test_a_forward_on_the_cpu_holds_as_many_samples_as_keep_a_feature_map_small():
    small, large = make_classifier_free(), make_classifier_free(sample_size=128, model_channels=64)
    assert small.default_micro_batch_size() == CPU_FEATURE_MAP_BYTES // (8 * 8 * 8 * 4)
    assert large.default_micro_batch_size() == 1
    assert make_ddgan().default_micro_batch_size() == small.default_micro_batch_size()
    guided = make_guided()
    assert guided.default_classifier_micro_batch_size() == guided.default_micro_batch_size(guided.classifier)
    patched = make_classifier_free(sample_size=16, patch_size=2)
    assert patched.default_micro_batch_size() == small.default_micro_batch_size()
    stock = UNet2DModel(8, 1, 1, block_out_channels=(4, 32), norm_num_groups=1, layers_per_block=1,
                        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)  # fmt: skip
    assert small.default_micro_batch_size(stock) == CPU_FEATURE_MAP_BYTES // (32 * 8 * 8 * 4)
    assert small.default_micro_batch_size(Shrink()) == CPU_FEATURE_MAP_BYTES // (128 * 4)


def test_a_sample_size_is_a_square_sides_or_none():
    assert [sides(size) for size in (8, (4, 8), [3], (), None)] == [(8, 8), (4, 8), (3,), (), ()]
