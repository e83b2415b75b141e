"""`hf-diffusion evaluate` and `hf-diffusion sample --interpolate`, on tiny pipelines."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from huggingface_hub import ModelCard
from PIL import Image
from torch import nn

from hf_diffusion import DDGANGenerator, DDGANPipeline, DDGANScheduler
from hf_diffusion.cli import main
from hf_diffusion.model_card import write_model_card
from tests.evaluation.conftest import tiny_pipeline
from tests.launching import ENVIRONMENT, launcher


@pytest.fixture(scope="module")
def folders(tmp_path_factory, image_folder):
    """Saved pipelines, of which `classes` has 2 as the images, and `judge.pt`, a network with 4 features."""
    parent = tmp_path_factory.mktemp("pipelines")
    tiny_pipeline().save_pretrained(parent / "plain")
    tiny_pipeline(classes=2).save_pretrained(parent / "classes")
    (parent / "classes" / "config.yaml").write_text(f"train_data_dir: {image_folder}\nlabel_column: auto\n")
    labelled = tiny_pipeline(classes=2, null_class=False)
    labelled.save_pretrained(parent / "labelled")
    generator = DDGANGenerator(sample_size=8, in_channels=1, model_channels=8, channel_mult=(1, 2), num_res_blocks=1,
                               attention_sizes=(), latent_dim=4, latent_embed_dim=8, num_latent_layers=1)  # fmt: skip
    DDGANPipeline(generator=generator, scheduler=DDGANScheduler()).save_pretrained(parent / "gan")
    stock = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=2,
                        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, layers_per_block=1)  # fmt: skip
    DDIMPipeline(stock, DDIMScheduler()).save_pretrained(parent / "stock")
    judge = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    torch.jit.script(judge).save(str(parent / "judge.pt"))
    torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(64, 2))).save(str(parent / "classifier.pt"))
    return parent


@pytest.fixture
def evaluate(folders, tmp_path, monkeypatch):
    """Call the command on a pipeline, in an empty folder: status and metrics.json (None if there is none)."""
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
    assert header.split() == [
        "num_inference_steps",
        "eta",
        "s/image",
        "FD",
        "KD",
        "precision",
        "recall",
        "label",
        "accuracy",
    ]
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
    assert Image.open("evaluation/sweep.png").size[0] > 1000

    monkeypatch.setattr("hf_diffusion.evaluation.sampling.draw", None)  # a second run finds all images
    assert evaluate("classes", *words)[1]["results"][3]["measures"] == point["measures"]


def test_a_stock_pipeline_is_swept_as_our_own(evaluate, image_folder):
    words = ("--train_data_dir", image_folder, "--num_images", 20, "--sweep", "num_inference_steps=2,3", "--eta", 1)
    status, report = evaluate("stock", *words, "--metrics", "fd,pr")
    assert status == 0 and [r["settings"]["num_inference_steps"] for r in report["results"]] == [2, 3]
    for result in report["results"]:
        sampling = result["protocol"]["sampling"]
        assert sampling["pipeline"] == "DDIMPipeline" and sampling["options"]["eta"] == 1
        assert result["measures"]["recall"]["error"] is not None


def test_model_measures_are_printed_drawn_and_recorded(evaluate, capsys):
    status, report = evaluate("classes", "--metrics", "bpd,consistency,inversion", "--model_images", 6, "--bpd_steps", 4,
                              "--sweep", "num_inference_steps=2,6")  # fmt: skip
    assert status == 0 and report["results"] == []
    bound = report["bound"]
    assert len(bound["terms"]) == len(bound["timesteps"]) == 4 and bound["count"] == 6
    assert sum(bound["terms"]) + bound["prior"]["value"] == pytest.approx(bound["total"]["value"], rel=1e-5)
    measured = {key: m for result in report["model"] for key, m in result["measures"].items()}
    assert set(measured) == {
        "bpd",
        "prior_bpd",
        "inversion_2",
        "inversion_6",
        "consistency_0",
        "consistency_2",
        "consistency_6",
    }
    printed = capsys.readouterr().out
    assert (
        "bits per dimension (6 images, 4 timesteps): " in printed and "difference of 2 steps from 12 steps" in printed
    )
    assert Path("evaluation/bits_per_dim.png").is_file() and not Path("evaluation/sweep.png").exists()


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


MISTAKES = {
    "unknown metric": ("plain", ["--metrics", "fid"], 2, "--metrics fid: choose from fd, kd"),
    "unknown sweep": ("plain", ["--sweep", "steps=1,2"], 2, "--sweep steps=1,2: write NAME=A,B"),
    "value of a sweep": ("plain", ["--sweep", "eta=a"], 2, "the values of eta must be of type float"),
    "given twice": ("plain", ["--eta", "0", "--sweep", "eta=0,1"], 2, "eta is given twice"),
    "no data": ("plain", [], 1, "no real images to measure against; give --dataset_name"),
    "too few images": (
        "classes",
        ["--num_images", "4"],
        1,
        "4 generated images are too few for a Frechet distance in 4",
    ),
    "no classes": ("plain", ["--class_labels", "1"], 2, "has no classes"),
    "no classifier": ("classes", ["--metrics", "label_accuracy"], 1, "label_accuracy needs a classifier"),
    "small classifier": (
        "classes",
        ["--metrics", "label_accuracy", "--classifier", "one.pt"],
        1,
        "knows 1 classes, but images of class 1",
    ),
    "guidance": ("plain", ["--guidance_scale", "2"], 1, "guidance_scale=2.0 needs class_labels"),
    "eta of ddpm": ("classes", ["--sweep", "scheduler=ddpm", "--eta", "1"], 1, "LinearDDPMScheduler has no eta"),
    "late in a sweep": ("classes", ["--sweep", "scheduler=ddim,nothing"], 1, "unknown scheduler 'nothing'"),
    "not deterministic": (
        "classes",
        ["--metrics", "consistency", "--eta", "1"],
        1,
        "eta=1.0 draws noise in every step",
    ),
    "bpd of too many steps": (
        "classes",
        ["--metrics", "bpd", "--bpd_steps", "2000"],
        1,
        "bpd over 2000 steps asks for more than the 1000 timesteps",
    ),
    "bpd of a GAN": (
        "gan",
        ["--metrics", "fd,bpd"],
        1,
        "bpd needs a Gaussian process with a U-Net, which DDGANPipeline",
    ),
    "consistency of a GAN": ("gan", ["--metrics", "consistency"], 1, "DDGANScheduler draws noise in every step"),
    "inversion without labels": (
        "labelled",
        ["--metrics", "inversion", "--label_column", "none"],
        1,
        "the model needs classes, but",
    ),
    "no card": ("plain", ["--update_card"], 2, "no folder with a README.md"),
    "no inception": ("classes", ["--features", "inception"], 1, "need torch-fidelity"),
    "no extra for a pipeline": ("missing", [], 1, "neither a folder here nor a name"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_before_anything_is_sampled(evaluate, image_folder, mistake, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    name, words, status, message = MISTAKES[mistake]
    if mistake != "no data" and name not in ("classes", "missing"):
        words = [*words, "--train_data_dir", image_folder]
    torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(64, 1))).save("one.pt")
    found, report = evaluate(name, *words, features="--features" not in words)
    printed = capsys.readouterr().err
    last = [line for line in printed.splitlines() if line.startswith("hf-diffusion evaluate: ")]
    assert found == status and report is None and not Path("evaluation").exists()
    assert len(last) == 1 and message in last[0] and "Traceback" not in printed


BAD_FILES = {
    "NaN": ({"images": np.full((30, 8, 8), np.nan, np.float32)}, "hold NaN or values outside [0, 1]"),
    "shape": ({"images": np.zeros((30, 8, 8, 2), np.uint8)}, "they must be (N, H, W) or (N, H, W, 1 | 3 | 4)"),
    "type": ({"images": np.zeros((30, 8, 8), np.int64)}, "are int64; they must be uint8"),
    "no images": ({"x": np.zeros(3)}, "it needs the array 'images'"),
    "labels": ({"images": np.zeros((30, 8, 8), np.uint8), "labels": np.zeros(4, int)}, "one an image"),
}


@pytest.mark.parametrize("mistake", BAD_FILES)
def test_a_file_that_holds_no_images_is_refused(evaluate, folders, image_folder, mistake, capsys):
    arrays, message = BAD_FILES[mistake]
    np.savez(folders / "bad.npz", **arrays)
    assert evaluate("bad.npz", "--train_data_dir", image_folder, "--metrics", "fd")[0] == 1
    assert message in capsys.readouterr().err


def test_a_model_that_gives_nan_is_noticed_before_the_sampling(evaluate, folders, image_folder, capsys):
    broken = tiny_pipeline()
    with torch.no_grad():
        next(broken.unet.parameters()).fill_(float("nan"))
    broken.save_pretrained(folders / "broken")
    assert evaluate("broken", "--train_data_dir", image_folder)[0] == 1
    assert "NaN or infinity for 2 of 2 images" in capsys.readouterr().err


def test_interpolation_is_drawn_as_a_grid_with_a_row_for_each_class(folders, tmp_path, capsys):
    words = ["sample", str(folders / "classes"), "--interpolate", "5", "--num_inference_steps", "2", "--output"]
    assert main([*words, str(tmp_path / "paths.png")]) == 0
    assert "2 paths of 5 images" in capsys.readouterr().out and Image.open(tmp_path / "paths.png").size[0] > 250
    assert main([*words, str(tmp_path / "x.png"), "--npz", str(tmp_path / "x.npz")]) == 2
    assert main([*words, str(tmp_path / "x.png"), "--eta", "1"]) == 1
    assert not (tmp_path / "x.png").exists()


@pytest.mark.slow
def test_two_processes_draw_the_same_samples_and_find_the_same_measures_as_one(folders, tmp_path):
    reports, images = [], []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        command = [
            *launcher(processes), "-m", "hf_diffusion.cli",
            "evaluate", folders / "classes", "--device", "cpu", "--features", folders / "judge.pt", "--metrics", "fd,kd,pr,bpd,inversion",
            "--num_images", "100", "--batch_size", "16", "--num_inference_steps", "3", "--eta", "1", "--bpd_steps", "3",
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
