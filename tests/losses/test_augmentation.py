"""Augmentation that the network is told of: what is done to images, how often, who learns of it."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_diffusion import ADMUNet2DModel, EDMPipeline
from hf_diffusion.losses.augmentation import (
    AUGMENT_DIM,
    AugmentationOptions,
    Transformation,
    random_transformation,
    with_augmentation,
)
from hf_diffusion.losses.denoising import DenoisingObjective, DenoisingOptions
from hf_diffusion.losses.flow import FlowMatchingObjective, FlowMatchingOptions
from hf_diffusion.losses.preconditioned import PreconditionedObjective, PreconditionedOptions
from hf_diffusion.models.transformer_pixel import PixelTransformer2DModel
from hf_diffusion.randomness import Draw
from hf_diffusion.schedulers.scheduling_flow import FlowMatchingScheduler
from hf_diffusion.schedulers.scheduling_gaussian import LinearDDPMScheduler
from hf_diffusion.training import train_ddpm
from tests.training.interruptions import stop_after
from tests.training.test_train_edm import TINY, metrics, run


NAMES = ("flip_x", "flip_y", "octaves", "angle", "uneven", "axis", "shift_x", "shift_y")


def drawn(count: int, step: int = 0) -> Draw:
    return Draw(0, step, slice(0, count), count, torch.device("cpu"))


def done(**numbers: float) -> Transformation:
    """One image's transformation."""
    return Transformation(**{name: torch.tensor([numbers.get(name, 0.0)], dtype=torch.float64) for name in NAMES})


def smooth(height: int = 16, width: int = 16, turns: float = 0.0) -> torch.Tensor:
    """An image (1, 1, H, W) of slow waves about its middle, turned by an angle, y downward."""
    y, x = torch.meshgrid(
        torch.arange(height) - (height - 1) / 2, torch.arange(width) - (width - 1) / 2, indexing="ij"
    )
    u, v = x * math.cos(turns) + y * math.sin(turns), y * math.cos(turns) - x * math.sin(turns)
    return (0.4 * (u / 3 + 1).sin() + 0.4 * (v / 4).cos())[None, None]


def inner(images: torch.Tensor, border: int = 4) -> torch.Tensor:
    return images[..., border:-border, border:-border]


def test_each_is_done_with_its_probability_and_told_and_an_untouched_image_is_the_very_same():
    images = torch.rand(4096, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    transformation = random_transformation(0.2, drawn(4096))
    told, moved = transformation.told(), transformation.of(images)
    assert told.shape == (4096, AUGMENT_DIM)
    shares = (told != 0).double().mean(0)
    # half of the flips do nothing; four standard deviations are 0.025
    expected = torch.tensor([0.1, 0.1, *[0.2] * 7], dtype=torch.float64)
    assert (shares - expected).abs().max() < 0.025
    for column in (2, 7, 8):
        assert told[:, column][told[:, column] != 0].std() == pytest.approx(1, abs=0.15)
    untouched = (told == 0).all(1)
    assert untouched.double().mean() == pytest.approx(0.9**2 * 0.8**4, abs=0.03)
    assert torch.equal(moved[untouched], images[untouched])
    assert not any(torch.equal(a, b) for a, b in zip(moved[~untouched], images[~untouched]))
    assert moved.abs().max() <= 1


def test_a_flip_a_turn_a_shift_and_a_scale_are_those_that_are_told():
    image = torch.rand(1, 2, 6, 8, generator=torch.Generator().manual_seed(0))
    both = done(flip_x=1, flip_y=1)
    assert torch.equal(both.of(image), image.flip(2, 3)) and both.told().tolist() == [[1, 1, 0, 0, 0, 0, 0, 0, 0]]
    # of smooth images, since pixels are drawn between those that there are
    for angle in (0.3, math.pi / 2, -2.0):
        turned = done(angle=angle)
        torch.testing.assert_close(inner(turned.of(smooth())), inner(smooth(turns=angle)), atol=0.02, rtol=0)
        told = [0, 0, 0, math.cos(angle) - 1, math.sin(angle), 0, 0, 0, 0]
        assert turned.told()[0].tolist() == pytest.approx(told)
    shifted = done(shift_x=2 / 24, shift_y=-1 / 16)
    image = smooth(16, 24)
    torch.testing.assert_close(inner(shifted.of(image)), inner(image.roll((-1, 2), (2, 3))), atol=0.02, rtol=0)
    assert shifted.told()[0, 7:].tolist() == pytest.approx([2 / 24 / 0.125, -0.5])
    # twice as large about the middle: its pixels lie a quarter of a pixel beside those of before
    large = inner(done(octaves=1.0).of(smooth(32, 32)), 8)
    torch.testing.assert_close(large[..., ::2, ::2] + large[..., 1::2, 1::2], 2 * inner(smooth(16, 16), 4), atol=0.05,
                               rtol=0)  # fmt: skip
    # along an axis of 90 degrees growing is shrinking along the other
    torch.testing.assert_close(
        done(uneven=0.5).of(smooth()), done(uneven=-0.5, axis=math.pi / 2).of(smooth()), atol=1e-4, rtol=0
    )
    wide = done(angle=math.pi).of(smooth(12, 20))
    torch.testing.assert_close(inner(wide), inner(smooth(12, 20).flip(2, 3)), atol=0.02, rtol=0)


SHAPE = {"sample_size": 8, "in_channels": 1, "num_class_embeds": 3}
UNET = {"model_channels": 8, "channel_mult": (1, 2), "num_res_blocks": 1, "norm_num_groups": 4, "num_heads": 2}


def networks(augment_dim: int | None) -> list[nn.Module]:
    made = []
    for cls, shape in ((ADMUNet2DModel, {**UNET, "attention_resolutions": (2,)}), (PixelTransformer2DModel, {})):
        torch.manual_seed(0)
        made.append(cls(**SHAPE, **shape, augment_dim=augment_dim))
    return made


def test_told_nothing_a_network_is_the_one_without_augmentation_and_told_something_it_is_another():
    x, t, labels = torch.randn(2, 1, 8, 8), torch.tensor([3.0, 500.0]), torch.tensor([0, 2])
    vector = torch.randn(2, AUGMENT_DIM)
    for told, plain in zip(networks(AUGMENT_DIM), networks(None), strict=True):
        assert set(told.state_dict()) - set(plain.state_dict()) == {"augment_embedding.weight"}
        # it begins with the very weights of the other
        for name, value in plain.state_dict().items():
            assert torch.equal(told.state_dict()[name], value), name
        with torch.no_grad():
            for parameter in told.parameters():
                parameter.normal_(std=0.2)
        plain.load_state_dict({name: told.state_dict()[name] for name in plain.state_dict()})
        for train in (False, True):
            told.train(train), plain.train(train)
            expected = plain(x, t, labels).sample
            assert torch.equal(told(x, t, labels).sample, expected)
            assert not torch.allclose(told(x, t, labels, augmentation=vector).sample, expected, atol=1e-3)
        told(x, t, labels).sample.sum().backward()
        assert torch.equal(told.augment_embedding.weight.grad, torch.zeros_like(told.augment_embedding.weight))
        with pytest.raises(ValueError, match="without augment_dim; leave it out"):
            plain(x, t, labels, augmentation=vector)


def objectives(network: nn.Module):
    process = LinearDDPMScheduler(prediction_type="v_prediction")
    yield DenoisingObjective(process, network, DenoisingOptions(), 1e-3, None)
    yield PreconditionedObjective(network, PreconditionedOptions(), 1e-3)
    yield FlowMatchingObjective(FlowMatchingScheduler(), network, FlowMatchingOptions(), 1e-3)


def test_every_family_learns_from_the_transformed_images_in_training_alone(monkeypatch):
    network, seen = networks(AUGMENT_DIM)[0], []
    forward = network.forward
    monkeypatch.setattr(network, "forward", lambda *given, **more: seen.append(more) or forward(*given, **more))
    images = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    batch = {"x_0": images, "labels": torch.zeros(16, dtype=torch.long), "indices": torch.arange(16)}
    for plain, told in zip(objectives(network), objectives(network), strict=True):
        assert with_augmentation(plain, AugmentationOptions()).players[0].loss == plain.values
        loss = with_augmentation(told, AugmentationOptions(augment_probability=0.5)).players[0].loss
        network.train()
        loss(network, batch, drawn(16))
        expected = random_transformation(0.5, drawn(16)).told()
        assert torch.equal(seen[-1]["augmentation"], expected)
        network.eval()
        held_out = loss(network, batch, drawn(16))["loss"]
        assert seen[-1] == {} and torch.equal(held_out, plain.values(network, batch, drawn(16))["loss"])


FLAGS = [*TINY, "--max_train_steps", "5", "--augment_probability", "0.5", "--eval_split", "train[-20:]"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return run(tmp_path_factory.mktemp("augmented") / "whole", *FLAGS)


@pytest.mark.slow
def test_an_interrupted_run_ends_with_the_very_weights_and_its_model_draws_without_augmentation(
    finished, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        run(tmp_path, *FLAGS)
    run(tmp_path, *FLAGS, "--resume_from_checkpoint", "latest")
    pipe, again = (EDMPipeline.from_pretrained(folder) for folder in (finished, tmp_path))
    for name, value in pipe.unet.state_dict().items():
        assert torch.equal(again.unet.state_dict()[name], value), name
    assert pipe.unet.augment_embedding.weight.abs().max() > 0
    config = {name: value for name, value in pipe.unet.config.items() if name != "augment_dim"}
    plain = ADMUNet2DModel.from_config(config)
    weights = {name: value for name, value in pipe.unet.state_dict().items() if "augment" not in name}
    plain.load_state_dict(weights)
    images = []
    for network in (pipe.unet, plain.eval()):
        generator = torch.Generator().manual_seed(0)
        images.append(EDMPipeline(network, pipe.scheduler)([3], num_inference_steps=2, generator=generator,
                                                            output_type="pt").images)  # fmt: skip
    assert torch.equal(*images)
    assert "loss" in json.dumps(metrics(finished))


def test_what_is_no_image_is_refused(tmp_path, capsys):
    words = ["--dataset_name", "swiss_roll", "--max_train_steps", "1", "--augment_probability", "0.1"]
    with pytest.raises(SystemExit, match="augment_probability 0.1 transforms images, and swiss_roll are points"):
        train_ddpm.main([*words, "--output_dir", str(tmp_path)])
