"""Who judges: classes found by name, and a feature network that is too weak says so."""

import numpy as np
import pytest
import torch
from torch import nn

from hf_diffusion.data.images import load_images
from hf_diffusion.evaluation.feature_networks import FeatureNetwork, load_classifier
from hf_diffusion.evaluation.image_files import FileImages
from hf_diffusion.evaluation.judge import Judge
from hf_diffusion.evaluation.options import EvaluationOptions
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
