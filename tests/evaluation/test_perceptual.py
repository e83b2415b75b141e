"""Perceptual distances: zero for equals, a gradient for others; where networks come from."""

import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hf_diffusion import ADMClassifier
from hf_diffusion.data.loading import load_data
from hf_diffusion.evaluation.feature_networks import ResNetFeatures
from hf_diffusion.evaluation.perceptual import FeatureDistance, perceptual_distance


X, Y = torch.rand(2, 3, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def digits():
    return load_data("digits", max_train_samples=64)


@pytest.fixture(scope="module")
def ruler(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("ruler") / "net.safetensors"
    save_file(ResNetFeatures(8).state_dict(), path)
    return path


def test_the_distance_is_the_mean_over_layers_of_unit_features_squared_difference():
    layer = nn.Conv2d(1, 4, 1)
    distance = FeatureDistance(nn.Sequential(layer), [layer])
    a, b = (nn.functional.normalize(layer(images), dim=1) for images in (X, Y))
    wanted = (a - b).square().sum(1).mean((1, 2))
    torch.testing.assert_close(distance(X, Y), wanted, rtol=1e-4, atol=1e-5)
    twice = FeatureDistance(nn.Sequential(layer, nn.Identity()), [layer])
    torch.testing.assert_close(twice(X, Y), wanted, rtol=1e-4, atol=1e-5)


def test_equal_images_have_no_distance_and_others_a_gradient(ruler, digits):
    distance, described = perceptual_distance(str(ruler), digits)
    assert described == "features of net.safetensors" and not distance(X, X).any()
    y = Y.clone().requires_grad_()
    distance(X, y).sum().backward()
    assert (distance(X, Y) > 0.01).all() and y.grad.flatten(1).norm(dim=1).min() > 0
    assert not any(parameter.requires_grad for parameter in distance.parameters())


def test_a_saved_classifier_of_noisy_images_lends_its_layers(tmp_path, digits):
    torch.manual_seed(0)
    sizes = {"sample_size": 8, "in_channels": 1, "model_channels": 8, "channel_mult": (1, 2), "num_res_blocks": 1}
    ADMClassifier(**sizes, attention_resolutions=(), norm_num_groups=4, num_heads=2).save_pretrained(tmp_path)
    distance, _ = perceptual_distance(str(tmp_path), digits)
    maps = distance.maps(X)
    assert len(maps) > 2 and {len(features.shape) for features in maps} == {4}
    assert (distance(X, Y) > 0).all()


def test_without_classes_there_is_none_by_itself_and_that_is_said(digits):
    plain = SimpleNamespace(name="photos", labels=None, num_classes=None, sample_shape=(1, 8, 8))
    found, described = perceptual_distance("auto", plain)
    assert found is None and described.startswith("no perceptual distance, since photos has no classes")
    assert perceptual_distance("none", digits) == (None, "no perceptual distance")
    with pytest.raises(ValueError, match="features 'trained' need real images of at least 2 classes"):
        perceptual_distance("trained", plain)


def test_lpips_sees_grey_images_as_three_equal_channels(monkeypatch, digits):
    class Package(nn.Module):
        def __init__(self, net, verbose):
            super().__init__()
            assert (net, verbose) == ("vgg", False)

        def forward(self, x, y):
            assert x.shape[1] == 3 and torch.equal(x[:, 0], x[:, 2])
            return (x - y).abs().mean((1, 2, 3), keepdim=True)

    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=Package))
    distance, described = perceptual_distance("lpips", digits)
    assert described == "LPIPS (VGG)"
    torch.testing.assert_close(distance(X, Y), (X - Y).abs().mean((1, 2, 3)))


def test_what_is_missing_is_named_in_one_sentence(monkeypatch, tmp_path, digits):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ImportError, match="perceptual lpips needs the packages lpips and torchvision: pip install"):
        perceptual_distance("lpips", digits)
    four = SimpleNamespace(name="rgba", labels=None, num_classes=None, sample_shape=(4, 8, 8))
    with pytest.raises(ValueError, match="perceptual lpips sees 1 or 3 channels, not 4"):
        perceptual_distance("lpips", four)
    with pytest.raises(ValueError, match="there is no network of known layers; give auto, trained, lpips, none"):
        perceptual_distance(str(tmp_path), digits)
