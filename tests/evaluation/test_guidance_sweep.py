"""`hf-diffusion sample` and `evaluate` with a classifier that guides (`--guide_by`)."""

import json

import numpy as np
import pytest
import torch

from hf_diffusion.cli import main
from hf_diffusion.models.unet_adm import ADMClassifier
from tests.evaluation.conftest import tiny_pipeline


@pytest.fixture(scope="module")
def saved(tmp_path_factory, image_folder):
    """A pipeline of two classes with the settings of its data, and a classifier of them."""
    parent = tmp_path_factory.mktemp("guided")
    tiny_pipeline(classes=2, beta_schedule="squaredcos_cap_v2").save_pretrained(parent / "model")
    (parent / "model" / "config.yaml").write_text(f"train_data_dir: {image_folder}\nlabel_column: auto\n")
    torch.manual_seed(0)
    classifier = ADMClassifier(
        sample_size=8, in_channels=1, num_classes=2, model_channels=8, channel_mult=(1, 2), num_res_blocks=1,
        attention_resolutions=(), norm_num_groups=4, pool="adaptive", id2label={0: "bright", 1: "dark"},
    )  # fmt: skip
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.normal_(std=0.3)
    classifier.save_pretrained(parent / "classifier")
    return parent


def drawn(saved, tmp_path, *words) -> np.ndarray:
    target = tmp_path / "images.npz"
    assert main(["sample", str(saved / "model"), "--class_labels", "0", "--num_images", "3", "--device", "cpu",
                 "--num_inference_steps", "4", "--npz", str(target), *words]) == 0  # fmt: skip
    with np.load(target) as arrays:
        return arrays["images"].astype(int)


def test_sampling_follows_the_classifier_as_much_as_the_scale_says(saved, tmp_path):
    plain = drawn(saved, tmp_path)
    guide = ("--guide_by", str(saved / "classifier"), "--guidance_scale")
    np.testing.assert_array_equal(drawn(saved, tmp_path, *guide, "0"), plain)
    assert abs(drawn(saved, tmp_path, *guide, "4") - plain).max() > 0


def test_both_kinds_of_guidance_are_swept_into_one_table_and_one_figure(saved, tmp_path):
    status = main(["evaluate", str(saved / "model"), "--device", "cpu", "--num_images", "40", "--metrics", "kd,pr",
                   "--features", "pixels", "--num_inference_steps", "2", "--guide_by", str(saved / "classifier"),
                   "--sweep", "guidance=classifier,classifier_free", "--sweep", "guidance_scale=0,1,3",
                   "--reference_cache", str(tmp_path / "cache"), "--output_dir", str(tmp_path / "out")])  # fmt: skip
    assert status == 0
    results = json.loads((tmp_path / "out" / "metrics.json").read_text())["results"]
    kinds = ("classifier", "classifier_free")
    assert [tuple(r["settings"].values()) for r in results] == [(kind, scale) for kind in kinds for scale in (0, 1, 3)]
    sampled = [r["protocol"]["sampling"] for r in results]
    assert [s["pipeline"] for s in sampled] == ["ClassifierGuidancePipeline"] * 3 + [
        "ClassifierFreeGuidancePipeline"
    ] * 3
    assert "classifier" in sampled[0]["weights_sha256"] and "classifier" not in sampled[3]["weights_sha256"]
    assert (tmp_path / "out" / "sweep.png").stat().st_size > 10_000
    # scale 0 of the classifier and scale 1 of the other are the plain conditional sampler, and so
    # the same images
    assert results[0]["measures"] == results[4]["measures"] != results[2]["measures"]


def test_a_guide_that_is_missing_or_unknown_is_one_sentence(saved, tmp_path, capsys):
    command = ["evaluate", str(saved / "model"), "--device", "cpu", "--num_images", "20", "--metrics", "pr"]
    for words, sentence in (
        (("--sweep", "guidance=classifier,classifier_free"), "needs --guide_by, a classifier"),
        (
            ("--guide_by", str(saved / "classifier"), "--sweep", "guidance=clasifier"),
            "unknown guidance 'clasifier'; choose from classifier_free, classifier",
        ),
        (("--guide_by", "nowhere/at/all"), "nowhere/at/all"),
    ):
        assert main([*command, "--output_dir", str(tmp_path / "out"), *words]) in (1, 2)
        error = capsys.readouterr().err
        assert sentence in error.splitlines()[-1] and "Traceback" not in error
