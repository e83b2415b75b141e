"""Paths between noises: on the great circle, between images, where one noise has one image."""

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from hf_diffusion.config.options import UsageError
from hf_diffusion.sampling.drawing import draw
from hf_diffusion.sampling.interpolation import interpolate, require_deterministic, slerp


def test_slerp_stays_on_the_great_circle_at_even_angles():
    a, b = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # Of one length, since the path between two lengths is no circle.
    b *= (a.flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1)).view(-1, 1, 1)
    path = [slerp(a, b, weight) for weight in (0, 0.25, 0.5, 0.75, 1)]
    torch.testing.assert_close(path[0], a)
    torch.testing.assert_close(path[-1], b)
    lengths = torch.stack([point.flatten(1).norm(dim=1) for point in path])
    torch.testing.assert_close(lengths, lengths[:1].expand_as(lengths))
    steps = [torch.cosine_similarity(x.flatten(1), y.flatten(1)).arccos() for x, y in zip(path, path[1:])]
    for step in steps[1:]:
        torch.testing.assert_close(step, steps[0])


def test_slerp_of_a_noise_with_itself_is_that_noise():
    a = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(slerp(a, a, 0.3), a)


def test_a_row_leads_from_the_image_of_one_seed_to_that_of_the_other(stripes):
    images = interpolate(stripes, [(3, 4), (8, 9)], columns=5, class_labels=[2, 0])
    assert images.shape == (10, 2, 3, 1) and images.dtype == np.uint8
    ends = draw(stripes, [3, 4, 8, 9], [2, 2, 0, 0])
    np.testing.assert_array_equal(images[[0, 4, 5, 9]], ends)
    assert (np.abs(np.diff(images[:5].astype(int), axis=0)).max(axis=(1, 2, 3)) > 0).all()


def test_noise_on_the_way_is_found_by_drawing_and_refused(stripes):
    require_deterministic(stripes, [0, 1], num_inference_steps=2)
    sentence = r"DDIMEtaScheduler draws noise in its steps \(options \{'jitter': 0.01\}\)"
    with pytest.raises(ValueError, match=sentence):
        require_deterministic(stripes, None, jitter=0.01)
    with pytest.raises(ValueError, match=sentence):
        interpolate(stripes, [(0, 1)], 3, jitter=0.01)


def test_one_column_and_pipelines_without_given_noise_are_refused(stripes):
    with pytest.raises(UsageError, match="at least 2 columns, its two ends, not 1"):
        interpolate(stripes, [(0, 1)], 1)
    blocks = {"block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    unet = UNet2DModel(sample_size=8, norm_num_groups=2, layers_per_block=1, **blocks)
    with pytest.raises(UsageError, match="DDPMPipeline cannot start from given noise"):
        interpolate(DDPMPipeline(unet, DDPMScheduler()), [(0, 1)], 3)
