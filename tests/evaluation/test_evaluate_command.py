"""`hf-diffusion evaluate` on tiny pipelines."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from torch import nn

from hf_diffusion import DDGANGenerator, DDGANPipeline, DDGANScheduler
from hf_diffusion.cards.model_card import write_model_card
from hf_diffusion.cli import main
from hf_diffusion.models.mlp_points import PointDenoiser
from hf_diffusion.pipelines.pipeline_classifier_free_guidance import ClassifierFreeGuidancePipeline
from hf_diffusion.schedulers.scheduling_gaussian import DDIMEtaScheduler
from tests.evaluation.conftest import stock_pipeline, tiny_pipeline
from tests.launching import ENVIRONMENT, launcher


@pytest.fixture(scope="module")
def folders(tmp_path_factory, image_folder):
    """Saved pipelines, of which `classes` has 2 as the images, and `judge.pt` of 4 features."""
    parent = tmp_path_factory.mktemp("pipelines")
    tiny_pipeline().save_pretrained(parent / "plain")
    tiny_pipeline(classes=2).save_pretrained(parent / "classes")
    (parent / "classes" / "config.yaml").write_text(f"train_data_dir: {image_folder}\nlabel_column: auto\n")
    labelled = tiny_pipeline(classes=2, null_class=False)
    labelled.save_pretrained(parent / "labelled")
    generator = DDGANGenerator(sample_size=8, in_channels=1, model_channels=8, channel_mult=(1, 2), num_res_blocks=1,
                               attention_sizes=(), latent_dim=4, latent_embed_dim=8, num_latent_layers=1)  # fmt: skip
    DDGANPipeline(generator=generator, scheduler=DDGANScheduler()).save_pretrained(parent / "gan")
    stock_pipeline().save_pretrained(parent / "stock")
    judge = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    torch.jit.script(judge).save(str(parent / "judge.pt"))
    torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(64, 2))).save(str(parent / "classifier.pt"))
    return parent


@pytest.fixture
def evaluate(folders, tmp_path, monkeypatch):
    """Call the command on a pipeline, in an empty folder: status and metrics.json or None."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DIFFUSION_CACHE", str(tmp_path / "cache"))

    def call(name, *words, features=True):
        network = ("--features", folders / "judge.pt") if features else ()
        status = main([str(w) for w in ("evaluate", folders / name, "--device", "cpu", *network, *words)])
        report = Path("evaluation/metrics.json")
        return status, json.loads(report.read_text()) if report.is_file() else None

    return call


def test_a_sweep_gives_a_table_a_figure_and_the_protocol_of_every_point(evaluate, folders, capsys, monkeypatch):
    words = ("--num_images", 40, "--metrics", "fd,kd,pr,label_accuracy", "--classifier", folders / "classifier.pt",
             "--sweep", "num_inference_steps=2,4", "--sweep", "eta=0,1", "--seed", 7, "--batch_size", 16)  # fmt: skip
    status, report = evaluate("classes", *words)
    assert status == 0
    printed = capsys.readouterr().out
    header = next(line for line in printed.splitlines() if "num_inference_steps" in line and "s/image" in line)
    assert header.split() == "num_inference_steps eta s/image FD KD precision recall label accuracy".split()
    assert [point["settings"] for point in report["results"]] == [
        {"num_inference_steps": steps, "eta": eta} for steps in (2, 4) for eta in (0.0, 1.0)
    ]
    point = report["results"][3]
    assert point["measures"]["fd"]["name"] == "FD-40 (features judge)" and point["measures"]["fd"]["error"] > 0
    protocol = point["protocol"]
    assert protocol["count"] == 40 and protocol["seeds"] == [7, 46]
    assert protocol["images_of_class"] == {"0": 13, "1": 27}  # as frequent as in the data, a third bright
    assert len(protocol["features"]["sha256"]) == 64 and protocol["reference"]["images"] == 120
    assert protocol["sampling"]["options"]["num_inference_steps"] == 4 and protocol["sampling"]["dtype"] == "float32"
    assert "torch" in report["environment"]["versions"] and point["seconds_per_image"] > 0
    assert {key: m["better"] for key, m in point["measures"].items()} == {
        "fd": "lower", "kd": "lower", "precision": "higher", "recall": "higher", "label_accuracy": "higher",
    }  # fmt: skip
    assert Image.open("evaluation/sweep.png").size[0] > 1000

    # A second run finds all samples; only the trial draws.
    monkeypatch.setattr("hf_diffusion.evaluation.sample_store._draw_chunk", drawn_already)
    assert evaluate("classes", *words)[1]["results"][3]["measures"] == point["measures"]


def drawn_already(pipeline, path, wanted, options):
    with np.load(path) as arrays:
        assert np.array_equal(arrays["seeds"], wanted["seeds"]) and np.array_equal(arrays["labels"], wanted["labels"])


def test_settings_come_from_a_file_and_flags_win(evaluate, tmp_path):
    (tmp_path / "settings.yaml").write_text("metrics: [fd, pr]\nnum_images: 20\nnum_inference_steps: 2\nseed: 5\n")
    status, report = evaluate("classes", "--config", tmp_path / "settings.yaml", "--seed", 7)
    (result,) = report["results"]
    assert status == 0 and set(result["measures"]) == {"fd", "precision", "recall"}
    assert result["protocol"]["seeds"] == [7, 26]
    assert result["protocol"]["sampling"]["options"]["num_inference_steps"] == 2


def test_a_stock_pipeline_is_swept_as_our_own(evaluate, image_folder):
    words = ("--train_data_dir", image_folder, "--num_images", 20, "--sweep", "num_inference_steps=2,3", "--eta", 1)
    status, report = evaluate("stock", *words, "--metrics", "fd,pr")
    assert status == 0 and [r["settings"]["num_inference_steps"] for r in report["results"]] == [2, 3]
    for result in report["results"]:
        sampling = result["protocol"]["sampling"]
        assert sampling["pipeline"] == "DDIMPipeline" and sampling["options"]["eta"] == 1
        assert result["measures"]["recall"]["error"] is not None


def test_points_are_measured_by_their_coordinates_and_have_no_bits(evaluate, folders, capsys):
    torch.manual_seed(0)
    denoiser = PointDenoiser(model_channels=16, num_res_blocks=1, num_class_embeds=8)
    ClassifierFreeGuidancePipeline(denoiser, DDIMEtaScheduler()).save_pretrained(folders / "points")
    words = ("--dataset_name", "eight_gaussians", "--max_reference_images", 2000, "--num_images", 300)
    words = (*words, "--num_inference_steps", 3, "--reference_cache", folders / "cache")
    metrics = "fd,kd,pr,consistency,inversion"
    status, report = evaluate("points", *words, "--metrics", metrics, "--model_images", 8, features=False)
    assert status == 0
    (result,) = report["results"]
    assert set(result["measures"]) == {"fd", "kd", "precision", "recall"} and result["measures"]["fd"]["value"] > 0
    assert result["measures"]["fd"]["name"] == "FD-300 (features pixels)"
    assert result["protocol"]["features"]["dimension"] == 2 and result["protocol"]["reference"]["samples"] == 2000
    assert sum(result["protocol"]["images_of_class"].values()) == 300
    assert len(result["protocol"]["images_of_class"]) == 8
    floors = result["protocol"]["floors"]
    assert set(floors) == set(result["measures"]) and (floors["fd"]["count"], floors["fd"]["others"]) == (300, 1700)
    assert floors["fd"]["value"] < 0.1 < result["measures"]["fd"]["value"]
    printed = capsys.readouterr().out
    assert re.search(r"FD-300 \(features pixels\); real against real: \S+ \(300 against 1,700 others\)\n", printed)
    for flags, message in (
        (("--metrics", "bpd"), "code length of values of 8 bits, which those of eight_gaussians are not"),
        (("--features", "inception"), "features 'inception' are those of images"),
        (("--metrics", "label_accuracy"), "label_accuracy needs a classifier"),
    ):
        assert evaluate("points", *words, *flags, "--output_dir", "other", features=False)[0] == 1
        assert message in capsys.readouterr().err and not Path("other").exists()


def test_model_measures_are_printed_drawn_and_recorded(evaluate, capsys):
    words = ("--metrics", "bpd,consistency,inversion", "--model_images", 6, "--bpd_steps", 4)
    status, report = evaluate("classes", *words, "--sweep", "num_inference_steps=2,6")
    assert status == 0 and report["results"] == []
    measured = {key: m for result in report["model"] for key, m in result["measures"].items()}
    assert set(measured) == {
        "bpd", "prior_bpd", "inversion_2", "inversion_6", "consistency_0", "consistency_2", "consistency_6",
    }  # fmt: skip
    assert {m["better"] for m in measured.values()} == {"lower"}
    parts = measured["bpd"]["breakdown"]
    assert len(parts["values"]) == len(parts["places"]) == 4
    assert sum(parts["values"]) + measured["prior_bpd"]["value"] == pytest.approx(measured["bpd"]["value"], rel=1e-5)
    printed = capsys.readouterr().out
    assert "bits per dimension (6 images, 4 timesteps): " in printed
    assert "difference of 2 steps from 12 steps" in printed
    assert Path("evaluation/bpd.png").is_file() and not Path("evaluation/sweep.png").exists()


def test_images_in_a_file_are_measured_without_a_pipeline(evaluate, folders, image_folder):
    images = np.stack([np.asarray(Image.open(file)) for file in sorted(image_folder.rglob("*.png"))])
    np.savez(folders / "real.npz", images=images)
    status, report = evaluate("real.npz", "--train_data_dir", image_folder, "--metrics", "fd,pr")
    assert status == 0
    measures = report["results"][0]["measures"]
    assert abs(measures["fd"]["value"]) < 1e-6 and measures["recall"]["value"] == 1


def test_results_go_into_the_card_and_stay_beside_those_of_other_measures(evaluate, folders, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(folders / "classes", folder)
    write_model_card(folder, config={}, data={"name": "stripes"}, training={"steps": 3}, metrics={"older": 1.5})
    with open(folder / "README.md", "a") as file:
        file.write("\nMy own words.\n")
    words = ("--num_images", 30, "--update_card", "--num_inference_steps", 2, "--output_dir", tmp_path / "e")
    assert evaluate(folder, *words, "--metrics", "fd")[0] == 0
    assert evaluate(folder, *words, "--metrics", "fd,kd")[0] == 0
    card = ModelCard.load(folder / "README.md")
    assert [r.metric_name for r in card.data.eval_results] == [
        "older",
        "FD-30 (features judge)",
        "KD-30 (features judge)",
    ]
    fd = card.data.eval_results[1]
    assert fd.metric_args["standard_error"] > 0 and "seeds 0 to 29" in fd.metric_args["protocol"]
    assert (
        card.text.count("## Results") == 1
        and "| FD-30 (features judge) |" in card.text
        and "My own words." in card.text
    )
    assert (
        card.text.index("## Results") < card.text.index("## Reproduce")
        and "has not been measured.\n-" not in card.text
    )


LABEL_ACCURACY = ["--metrics", "label_accuracy"]
# Name of the pipeline, flags, exit status, a part of the one sentence.
MISTAKES = [
    ("plain", ["--metrics", "fid"], 2, "--metrics fid: choose from fd, kd"),
    ("plain", ["--sweep", "steps=1,2"], 2, "--sweep steps=1,2: write NAME=A,B, with NAME one of num_inference_steps"),
    ("plain", ["--sweep", "eta"], 2, "--sweep eta: write NAME=A,B"),
    ("plain", ["--sweep", "eta=a"], 2, "--sweep eta: got 'a'"),
    ("plain", ["--eta", "0", "--sweep", "eta=0,1"], 2, "eta is given twice"),
    ("classes", ["--sweep", "scheduler=ddim,nothing"], 2, "unknown scheduler 'nothing'; choose from ddim"),
    ("no data", [], 1, "no real data to measure against; give --dataset_name"),
    ("plain", ["--dataset_name", "checkerboard"], 1, "checkerboard"),
    ("classes", ["--num_images", "4"], 1, "4 generated samples are too few for a Frechet distance in 4"),
    ("plain", ["--class_labels", "1"], 2, "has no classes"),
    ("classes", ["--class_labels", "five"], 2, "--class_labels five: "),
    ("classes", LABEL_ACCURACY, 1, "label_accuracy needs a classifier"),
    ("classes", [*LABEL_ACCURACY, "--classifier", "one.pt"], 1, "knows 1 classes, but samples of class 1"),
    ("plain", ["--guidance_scale", "2"], 1, "guidance_scale=2.0 needs class_labels"),
    ("classes", ["--sweep", "scheduler=ddpm", "--eta", "1"], 1, "LinearDDPMScheduler has no eta"),
    ("classes", ["--metrics", "consistency", "--eta", "1"], 1, "DDIMEtaScheduler draws noise in its steps"),
    ("classes", ["--metrics", "bpd", "--bpd_steps", "2000"], 1, "asks for more than the 1000 timesteps"),
    ("gan", ["--metrics", "fd,bpd"], 2, "choose from fd, kd, pr, label_accuracy of samples and nothing of its model"),
    ("gan", ["--metrics", "consistency"], 2, "which is all that a DDGANPipeline can be measured by"),
    ("stock", ["--metrics", "inversion"], 2, "which is all that a DDIMPipeline can be measured by"),
    ("labelled", ["--metrics", "inversion", "--label_column", "none"], 1, "the model needs classes, but"),
    ("plain", ["--update_card"], 2, "no folder with a README.md"),
    ("classes", ["--features", "inception"], 1, "need torch-fidelity"),
    ("missing", [], 1, "neither a folder here nor a name"),
    ("NaN.npz", [], 1, "hold NaN or values outside [0, 1]"),
    ("shape.npz", [], 1, "they must be (N, H, W) or (N, H, W, 1 | 3 | 4)"),
    ("type.npz", [], 1, "are int64; they must be uint8"),
    ("none.npz", [], 1, "it needs the array 'images'"),
    ("labels.npz", [], 1, "one an image"),
    ("good.npz", ["--metrics", "fd,bpd"], 2, "holds images alone, which are measured by fd, kd, pr, label_accuracy"),
    ("good.npz", ["--sweep", "eta=0,1"], 2, "a sweep needs a pipeline"),
    ("broken", [], 1, "NaN or infinity for 2 of 2 samples"),
]  # fmt: skip
FILES = {
    "NaN": {"images": np.full((30, 8, 8), np.nan, np.float32)},
    "shape": {"images": np.zeros((30, 8, 8, 2), np.uint8)},
    "type": {"images": np.zeros((30, 8, 8), np.int64)},
    "none": {"x": np.zeros(3)},
    "labels": {"images": np.zeros((30, 8, 8), np.uint8), "labels": np.zeros(4, int)},
    "good": {"images": np.zeros((30, 8, 8), np.uint8)},
}


def test_a_mistake_is_one_sentence_before_anything_is_sampled(evaluate, folders, image_folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(64, 1))).save("one.pt")
    for name, arrays in FILES.items():
        np.savez(folders / f"{name}.npz", **arrays)
    broken = tiny_pipeline()
    with torch.no_grad():
        next(broken.unet.parameters()).fill_(float("nan"))
    broken.save_pretrained(folders / "broken")
    for name, words, status, message in MISTAKES:
        if name not in ("no data", "classes", "missing") and "--dataset_name" not in words:
            words = [*words, "--train_data_dir", image_folder]
        name = "plain" if name == "no data" else name
        try:
            found, report = evaluate(name, *words, features="--features" not in words)
        # The parser's way to end.
        except SystemExit as end:
            found, report = end.code, None
        printed = capsys.readouterr().err
        last = [line for line in printed.splitlines() if line.startswith("hf-diffusion evaluate: ")]
        assert (found, report) == (status, None) and not Path("evaluation").exists(), (name, words, printed)
        assert len(last) == 1 and message in last[0] and "Traceback" not in printed, (name, words, printed)


@pytest.mark.slow
def test_two_processes_draw_the_same_samples_and_find_the_same_measures_as_one(folders, tmp_path):
    reports, images = [], []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        command = [
            *launcher(processes), "-m", "hf_diffusion.cli",
            "evaluate", folders / "classes", "--device", "cpu", "--features", folders / "judge.pt",
            "--metrics", "fd,kd,pr,bpd,inversion", "--num_images", "100", "--batch_size", "16",
            "--num_inference_steps", "3", "--eta", "1", "--bpd_steps", "3",
            "--model_images", "40", "--output_dir", folder, "--reference_cache", folder / "cache",
        ]  # fmt: skip
        environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [str(word) for word in command], env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr
        reports.append(json.loads((folder / "metrics.json").read_text()))
        chunks = sorted((folder / "samples").rglob("*.npz"))
        assert len(chunks) == 7
        images.append(np.concatenate([np.load(chunk)["images"] for chunk in chunks]))
    np.testing.assert_array_equal(*images)
    for kind in ("results", "model"):
        for one, two in zip(*(report[kind] for report in reports), strict=True):
            for name, measure in one["measures"].items():
                assert two["measures"][name]["value"] == pytest.approx(measure["value"], rel=1e-6), name
