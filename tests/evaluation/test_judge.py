"""Who judges: classes found by name, and a feature network that is too weak says so."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from hf_diffusion.cli import main
from hf_diffusion.data.images import load_images
from hf_diffusion.evaluation import feature_training
from hf_diffusion.evaluation.feature_networks import FeatureNetwork, load_classifier
from hf_diffusion.evaluation.feature_training import features_for
from hf_diffusion.evaluation.image_files import FileImages
from hf_diffusion.evaluation.judge import Judge
from hf_diffusion.evaluation.options import EvaluationOptions
from hf_diffusion.evaluation.protocol import protocol_text
from hf_diffusion.models.unet_adm import ADMClassifier


class Corner(nn.Module):
    """Sees one pixel alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :, :1, :1].flatten(1)


def brightness(names) -> FeatureNetwork:
    """Logits of "dark" and "bright" in the order of `names`."""
    dark = -1 if names[0] == "bright" else 1

    def logits(x):
        mean = x.mean((1, 2, 3))
        return torch.stack([-dark * (mean + 0.3), dark * (mean + 0.3)], 1)

    return FeatureNetwork("b", "0", None, 1, torch.device("cpu"), logits, class_names=tuple(names))


@pytest.mark.parametrize("known", [("dark", "bright"), ("bright", "dark")])
def test_a_classifier_is_asked_by_the_names_of_its_classes(known):
    images = np.concatenate([np.full((2, 4, 4, 1), 20, np.uint8), np.full((3, 4, 4, 1), 220, np.uint8)])
    network = brightness(known)
    assert [known[i] for i in network.logits(images).argmax(1)] == ["dark"] * 2 + ["bright"] * 3
    for names in (("dark", "bright"), ("bright", "dark")):
        guesses = network.numbered_as(names).logits(images).argmax(1)
        assert [names[i] for i in guesses] == ["dark"] * 2 + ["bright"] * 3
    with pytest.raises(ValueError, match="the classifier b knows .*, and samples of red are asked for"):
        network.numbered_as(["red", "dark"])


def test_a_saved_classifier_tells_its_classes(tmp_path):
    net = ADMClassifier(sample_size=8, in_channels=1, model_channels=8, channel_mult=(1, 2), num_res_blocks=1,
                        attention_resolutions=(2,), num_heads=2, norm_num_groups=4, num_classes=2,
                        id2label={0: "cat", 1: "dog"})  # fmt: skip
    net.save_pretrained(tmp_path)
    assert load_classifier(tmp_path, (1, 8, 8)).class_names == ("cat", "dog")


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """60 images of 4,800 values in the class folders dark and bright."""
    folder, rng = tmp_path_factory.mktemp("large"), np.random.default_rng(0)
    for i in range(60):
        path = folder / ("dark" if i % 2 else "bright") / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 120, (40, 40, 3), np.uint8) + np.uint8(120 * (i % 2 == 0))).save(path)
    return folder


@pytest.fixture(autouse=True)
def briefly(monkeypatch):
    monkeypatch.setattr(feature_training, "STEPS", 2)


def test_features_are_chosen_by_the_size_of_samples_their_number_and_the_classes(large, image_folder, tmp_path):
    small, wide = load_images(train_data_dir=str(image_folder)), load_images(train_data_dir=str(large))
    plain = load_images(train_data_dir=str(large), label_column="none")
    assert (
        features_for("auto", small, ["fd", "kd"], 100) == features_for("pixels", small, ["fd"], 5) == ("pixels", None)
    )
    spec, reason = features_for("auto", small, ["fd"], 60, tmp_path)
    assert spec.name.startswith("trained-on-images") and "the 64 values of a sample are too many" in reason
    assert features_for("auto", small, ["kd"], 60) == ("pixels", None)
    spec, reason = features_for("auto", wide, ["kd"], 50, tmp_path)
    assert spec.name.startswith("trained-on-large") and "the 4,800 values" in reason and "4,096 at most" in reason
    with pytest.raises(
        ValueError, match="4,800 values of a sample .* has no classes to train a network on; give feat"
    ):
        features_for("auto", plain, ["kd"], 50)
    # where too few are drawn, what is said is how many it takes
    bare = load_images(train_data_dir=str(image_folder), label_column="none")
    assert features_for("auto", bare, ["fd"], 60) == ("pixels", None)


def test_images_too_large_for_pixels_are_measured_by_the_default_which_its_protocol_says(large, tmp_path, capsys):
    words = [
        "evaluate",
        str(large),
        "--train_data_dir",
        str(large),
        "--metrics",
        "kd,pr",
        "--output_dir",
        str(tmp_path),
    ]
    assert main([*words, "--reference_cache", str(tmp_path / "cache")]) == 0
    said = capsys.readouterr().out
    assert "too many to be features, which are 4,096 at most" in said and "features trained-on-large" in said
    (entry,) = json.loads((tmp_path / "metrics.json").read_text())["results"]
    assert "4,800 values" in entry["protocol"]["features"]["chosen"]
    assert "chosen since the 4,800 values of a sample" in protocol_text(entry["protocol"])
    assert main([*words[:4], "--label_column", "none", *words[4:]]) == 1
    assert "has no classes to train a network on; give features 'imagenet' or 'inception'" in capsys.readouterr().err


@pytest.mark.parametrize("weak", [False, True])
def test_features_that_take_noise_for_real_images_say_so(tmp_path, image_folder, capsys, weak):
    torch.jit.script(Corner()).save(str(tmp_path / "corner.pt"))
    options = EvaluationOptions(
        pipeline="x.npz", features=str(tmp_path / "corner.pt") if weak else "pixels", device="cpu",
        reference_cache=tmp_path,
    )  # fmt: skip
    data = load_images(train_data_dir=str(image_folder))
    images = np.stack([data.to_samples(data.fetch([i], epoch=0))[0] for i in range(40)])
    Judge(options, ["pr"], data).evaluate(FileImages(images, None, {"sampler": "x", "options": {}}), None, None)
    said = capsys.readouterr().out
    assert (
        "the features corner are a weak judge: it takes" in said and "of pure noise for real images" in said
    ) == weak
