"""Feature networks from files and modules: what they give, and what is refused."""

import hashlib
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from hf_diffusion.data.images import load_images
from hf_diffusion.data.loading import load_data
from hf_diffusion.evaluation.feature_networks import (
    ResNetFeatures,
    feature_network,
    load_feature_network,
    network_input,
    raw_values,
)
from hf_diffusion.evaluation.feature_training import trained_network_file
from hf_diffusion.models.unet_adm import ADMClassifier


IMAGES = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def load(spec, **options):
    return load_feature_network(spec, **{"shape": (1, 8, 8), **options})


def test_pixels_are_features_as_they_are():
    network = load("pixels")
    assert network.dimension == 64 and torch.equal(network(IMAGES), IMAGES.flatten(1))
    with pytest.raises(ValueError, match="up to 4096 values, these samples have 196608"):
        load("pixels", shape=(3, 256, 256))


def test_raw_values_of_any_size_can_be_compared_one_by_one():
    network = raw_values((3, 256, 256), torch.device("cpu"))
    assert network.dimension == 196_608 and network(torch.zeros(2, 3, 256, 256)).shape == (2, 196_608)


def test_raw_values_of_points_are_their_features_and_networks_of_images_are_refused(tmp_path):
    points = np.random.default_rng(0).normal(size=(600, 2)).astype(np.float32)
    network = load("pixels", shape=(2,))
    assert network.dimension == 2 and torch.equal(network.features(points), torch.from_numpy(points))
    with pytest.raises(ValueError, match=r"'inception' are those of images, and these samples have the shape \(2,\)"):
        load("inception", shape=(2,))
    with pytest.raises(
        ValueError, match=r"'trained' are those of images, and the samples of .* have the shape \(2,\)"
    ):
        trained_network_file(load_data("checkerboard"), tmp_path)


def test_a_torchscript_file_is_a_network_with_its_hash(tmp_path):
    net = nn.Sequential(nn.Conv2d(1, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    path = tmp_path / "judge.pt"
    torch.jit.script(net).save(str(path))
    network = load(path)
    assert (network.name, network.dimension) == ("judge", 5)
    assert network.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    torch.testing.assert_close(network(IMAGES), net(IMAGES).detach())


def test_a_safetensors_file_of_the_known_form_gives_features_and_classes(tmp_path):
    net = ResNetFeatures(width=4, num_classes=7).eval()
    save_file(net.state_dict(), tmp_path / "ruler.safetensors")
    network = load(tmp_path / "ruler.safetensors")
    torch.testing.assert_close(network(IMAGES), net(IMAGES).detach())
    assert network.dimension == 16 and network.classify(IMAGES).shape == (3, 7)


def test_a_saved_classifier_classifies(tmp_path):
    net = ADMClassifier(sample_size=8, in_channels=1, num_classes=4, model_channels=8, channel_mult=(1, 2),
                        num_res_blocks=1, attention_resolutions=(2,), num_heads=2, norm_num_groups=4)  # fmt: skip
    net.save_pretrained(tmp_path / "classifier")
    assert load(tmp_path / "classifier").classify(IMAGES).shape == (3, 4)


def test_a_module_of_ones_own_is_used_in_evaluation_mode_and_hashed_by_its_weights():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.Dropout(0.5))
    first = feature_network(net.train(), "mine", IMAGES)
    assert first.dimension == 6 and torch.equal(first(IMAGES), first(IMAGES))
    with torch.no_grad():
        net[1].bias += 1
    assert feature_network(net, "mine", IMAGES).digest != first.digest


def test_a_pickled_network_is_not_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (sys.exit, ("ran",))

    torch.save(Bomb(), tmp_path / "net.pt")
    with pytest.raises(ValueError, match="is not TorchScript; save the network with torch.jit.script"):
        load(tmp_path / "net.pt")


def test_what_does_not_fit_is_refused_before_anything_is_measured(tmp_path):
    class Unpooled(nn.Module):
        def forward(self, images):
            return images

    class NotANumber(nn.Module):
        def forward(self, images):
            return images.flatten(1) / 0

    torch.jit.script(nn.Conv2d(3, 4, 3)).save(str(tmp_path / "colour.pt"))
    with pytest.raises(ValueError, match=r"colour does not take samples \(2, 1, 8, 8\)"):
        load(tmp_path / "colour.pt")
    with pytest.raises(ValueError, match=r"must give one row a sample, \(B, D\); for 3 it gave \(3, 1, 8, 8\)"):
        feature_network(Unpooled(), "unpooled", IMAGES)
    with pytest.raises(ValueError, match="gives NaN or infinity"):
        feature_network(NotANumber(), "nan", IMAGES)
    save_file({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="does not hold a network of the form"):
        load(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is not there; give 'pixels', 'inception'"):
        load(tmp_path / "nothing.pt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no saved ADMClassifier"):
        load(tmp_path / "empty")


def test_inception_without_its_extra_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ImportError, match="need torch-fidelity .*or inception_weights with the TorchScript file"):
        load("inception")
    with pytest.raises(ValueError, match="inception_weights '/none' is not a file"):
        load("inception", inception_weights="/none")


def test_inception_of_a_torchscript_file_is_fed_bytes_of_three_channels(tmp_path):
    class Stand(nn.Module):  # called as the published file is
        def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
            assert images.dtype == torch.uint8 and return_features
            return images.float().mean(dim=[2, 3])

    torch.jit.script(Stand()).save(str(tmp_path / "inception-2015-12-05.pt"))
    network = load("inception", inception_weights=tmp_path / "inception-2015-12-05.pt")
    pixels = torch.randint(0, 256, (2, 8, 8, 1), dtype=torch.uint8)
    expected = pixels.float().mean(dim=(1, 2)).expand(-1, 3)
    torch.testing.assert_close(network(network_input(pixels.numpy())), expected)  # bytes come back exactly
    assert network.is_inception and network.name == "Inception inception-2015-12-05"


def test_a_network_is_trained_on_the_classes_of_the_data_once(image_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("hf_diffusion.evaluation.feature_training.STEPS", 30)
    monkeypatch.setattr("hf_diffusion.evaluation.feature_training.WIDTH", 4)
    data = load_images(train_data_dir=str(image_folder))
    path = trained_network_file(data, tmp_path)
    with safe_open(path, "pt") as file:
        assert float(file.metadata()["held_out_accuracy"]) > 0.9  # bright or dark
    assert "of the held-out images" in capsys.readouterr().out
    digest = load(path).digest
    assert trained_network_file(data, tmp_path) == path and capsys.readouterr().out == ""
    path.unlink()
    assert load(trained_network_file(data, tmp_path)).digest == digest  # nothing in it but the data and the recipe
    network = load(path)
    assert network.dimension == 16 and network.classify(IMAGES).shape == (3, 2)
    assert network.name == path.stem and path.name.startswith("trained-on-images")
    with pytest.raises(ValueError, match="need real images of at least 2 classes"):
        trained_network_file(load_images(train_data_dir=str(image_folder), label_column="none"), tmp_path)


def test_a_pickle_with_more_than_tensors_is_not_handed_to_torch_fidelity(tmp_path, monkeypatch):
    class Bomb:
        def __reduce__(self):
            return (sys.exit, ("ran",))

    class Module:
        FeatureExtractorInceptionV3 = None

    monkeypatch.setitem(sys.modules, "torch_fidelity", Module())
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", Module())
    torch.save(Bomb(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="does not hold tensors alone"):
        load("inception", inception_weights=tmp_path / "weights.pth")
