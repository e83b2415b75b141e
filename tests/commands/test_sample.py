"""`hf-diffusion sample`: what it draws, where it writes it, and what it refuses in one sentence."""

import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from hf_diffusion.cli import main
from hf_diffusion.pipelines.pipeline_classifier_free_guidance import ClassifierFreeGuidancePipeline
from hf_diffusion.schedulers.scheduling_gaussian import DDIMEtaScheduler


def run(*words) -> int:
    """The exit status, of a wrong command line too."""
    try:
        return main([str(word) for word in words])
    except SystemExit as end:
        return end.code


def drawn(folder, npz, *words) -> np.ndarray:
    """The images that `sample` writes, as int."""
    assert run("sample", folder, "--npz", npz, *words) == 0
    return np.load(npz)["images"].astype(int)


def test_samples_are_written_as_grid_files_and_array(folders, tmp_path, capsys):
    grid, files, npz = tmp_path / "new" / "grid.png", tmp_path / "files", tmp_path / "samples.npz"
    status = run("sample", folders / "digits", "--class_labels", "2,1", "--num_images", 6, "--num_inference_steps", 2,
                 "--guidance_scale", 1.5, "--output", grid, "--images_dir", files, "--npz", npz)  # fmt: skip
    assert status == 0
    arrays = np.load(npz)
    assert arrays["images"].shape == (6, 8, 8) and arrays["images"].dtype == np.uint8
    # "2" and "1" are names here, and go before numbers.
    assert arrays["labels"].tolist() == [0, 0, 0, 2, 2, 2] and arrays["class_names"].tolist() == ["2", "0", "1"]
    assert sorted(f.name for f in files.iterdir()) == [f"{i:05d}.png" for i in range(6)] + ["metadata.csv"]
    np.testing.assert_array_equal(np.asarray(Image.open(files / "00004.png")), arrays["images"][4])
    assert (files / "metadata.csv").read_text().splitlines()[:2] == ["file_name,label,class_name", "00000.png,0,2"]
    # 3 columns, 2 rows.
    assert Image.open(grid).size[0] > Image.open(grid).size[1]
    printed = capsys.readouterr().out
    assert str(grid) in printed and str(files) in printed and "images uint8 (6, 8, 8), labels int64 (6,)" in printed


def test_an_image_has_its_own_seed_whatever_the_batch_size(folders, tmp_path):
    def images(*words):
        common = ("--num_images", 5, "--num_inference_steps", 2)
        return drawn(folders / "plain", tmp_path / "x.npz", *common, *words)

    # A rounding of 1/255 apart.
    assert np.abs(images("--batch_size", 2, "--seed", 3) - images("--seed", 3)).max() <= 1
    assert np.abs(images("--seed", 4)[:4] - images("--seed", 3)[1:]).max() <= 1
    assert np.abs(images("--seed", 9) - images("--seed", 3)).max() > 50


def test_a_file_of_settings_draws_what_the_flags_draw_and_flags_go_before_it(folders, tmp_path):
    settings = tmp_path / "sampling.yaml"
    settings.write_text(f"pipeline: {folders / 'plain'}\nnum_images: 2\nnum_inference_steps: 2\nseed: 5\n")
    flags = ("--num_images", 2, "--num_inference_steps", 2)
    assert run("sample", "--config", settings, "--npz", tmp_path / "a.npz") == 0
    np.testing.assert_array_equal(
        np.load(tmp_path / "a.npz")["images"], drawn(folders / "plain", tmp_path / "b.npz", *flags, "--seed", 5)
    )
    assert run("sample", "--config", settings, "--seed", 0, "--npz", tmp_path / "a.npz") == 0
    np.testing.assert_array_equal(
        np.load(tmp_path / "a.npz")["images"], drawn(folders / "plain", tmp_path / "b.npz", *flags)
    )


def test_eta_changes_ddim_images(folders, tmp_path):
    words = ("--num_images", 2, "--num_inference_steps", 3, "--scheduler", "ddim", "--eta")
    none, full = (drawn(folders / "plain", tmp_path / "x.npz", *words, eta) for eta in (0, 1))
    assert np.abs(none - full).max() > 10


def test_stock_pipelines_are_sampled_too(folders, tmp_path):
    images = drawn(folders / "stock", tmp_path / "x.npz", "--num_images", 2, "--num_inference_steps", 2)
    assert images.shape == (2, 8, 8, 3) and "labels" not in np.load(tmp_path / "x.npz")


def test_the_null_class_is_sampled_by_none(folders, tmp_path):
    words = ("--num_images", 2, "--num_inference_steps", 1, "--dtype", "bf16", "--class_labels", "none")
    assert len(drawn(folders / "digits", tmp_path / "x.npz", *words)) == 2
    assert "labels" not in np.load(tmp_path / "x.npz")


def test_weights_with_nan_are_refused_with_the_seeds_and_nothing_is_written(folders, tmp_path, capsys, monkeypatch):
    pipe = ClassifierFreeGuidancePipeline.from_pretrained(folders / "plain")
    with torch.no_grad():
        next(pipe.unet.parameters()).fill_(float("nan"))
    pipe.save_pretrained(tmp_path / "broken")
    monkeypatch.chdir(tmp_path)
    assert run("sample", "broken", "--num_images", 3, "--num_inference_steps", 1, "--seed", 7) == 1
    assert "NaN or infinity for 3 of 3 samples (seeds [7, 8, 9]" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["broken"]


def test_interpolation_draws_a_row_for_each_class_and_refuses_noise_on_the_way(folders, tmp_path, capsys):
    grid = tmp_path / "grid.png"
    words = ("--interpolate", 3, "--num_inference_steps", 2, "--output", grid)
    assert run("sample", folders / "digits", *words, "--scheduler", "ddim") == 0
    assert "grid.png: 3 paths of 3 images" in capsys.readouterr().out and Image.open(grid).mode == "RGB"
    grid.unlink()
    assert run("sample", folders / "digits", *words) == 1
    assert "CosineDDPMScheduler draws noise in its steps" in capsys.readouterr().err and not grid.exists()


MISTAKES = {
    "not a pipeline": ("{}", 1, "holds no pipeline"),
    "no pipeline": ("", 2, "pipeline is required"),
    "unknown class": ("{}/digits --class_labels 5", 2, "--class_labels 5: class label 5 is not a class"),
    "unknown name": ("{}/digits --class_labels cat", 2, "unknown class name 'cat'"),
    "no classes": ("{}/plain --class_labels 1", 2, "has no classes"),
    "too many classes": ("{}/many", 2, "30 classes; choose with --class_labels"),
    "too many paths": ("{}/many --interpolate 3", 2, "30 classes; choose with --class_labels"),
    "uneven": ("{}/digits --num_images 4", 2, "evenly by 3 classes; use 6"),
    "no images": ("{}/digits --num_images 0", 2, "num_images: got 0; allowed: at least 1"),
    "no eta": ("{}/stock --eta 1", 2, "--eta: DDPMPipeline does not take it; leave it out, it takes"),
    "unknown option": ("{}/stock --set churn=1", 2, "--set churn=1: write NAME=VALUE, with NAME one of those of DDPM"),
    "one column": ("{}/plain --interpolate 1", 2, "interpolate: got 1; allowed: at least 2"),
    "two kinds of files": ("{}/plain --interpolate 4 --npz x", 2, "--npz does not go with --interpolate"),
    "guidance without classes": ("{}/plain --guidance_scale 2", 1, "needs class_labels"),
    "eta of another scheduler": ("{}/digits --eta 1", 1, "CosineDDPMScheduler has no eta"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_without_traceback_or_files(folders, mistake, capsys, tmp_path, monkeypatch):
    words, status, message = MISTAKES[mistake]
    monkeypatch.chdir(tmp_path)
    assert run("sample", *words.format(folders).split()) == status
    printed = capsys.readouterr().err
    last = [line for line in printed.splitlines() if line.startswith("hf-diffusion ")]
    assert len(last) == 1 and message in last[0] and "Traceback" not in printed
    assert not list(tmp_path.iterdir())


def test_a_file_of_an_earlier_run_is_replaced_only_by_a_whole_one(folders, tmp_path, monkeypatch):
    out = tmp_path / "x.npz"
    out.write_text("before")

    def fail(file, **arrays):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(np, "savez_compressed", fail)
    assert run("sample", folders / "plain", "--num_images", 1, "--num_inference_steps", 1, "--npz", out) == 1
    assert out.read_text() == "before" and len(list(tmp_path.iterdir())) == 1


def test_code_of_a_foreign_repository_runs_only_with_trust(folders, tmp_path, capsys):
    folder = tmp_path / "foreign"
    pipe = ClassifierFreeGuidancePipeline.from_pretrained(folders / "plain")
    pipe.scheduler = DDIMEtaScheduler()
    pipe.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"][1] = "Foreign"
    (folder / "model_index.json").write_text(json.dumps(index))
    file = folder / "pipeline_classifier_free_guidance.py"
    file.write_text(file.read_text().replace("class ClassifierFreeGuidancePipeline(", "class Foreign("))
    words = ["sample", folder, "--num_images", 1, "--num_inference_steps", 1, "--npz", tmp_path / "x.npz"]
    assert run(*words) == 1 and "trust_remote_code" in capsys.readouterr().err
    assert run(*words, "--trust_remote_code") == 0


class Walk(DiffusionPipeline):
    """A family that the package does not know: its samples are a random walk of `shape`."""

    sampling_options = ("churn",)
    num_classes = 2
    id2label = {0: "left", 1: "right"}

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.register_to_config()
        self.sample_shape = shape

    def get_label_ids(self, labels):
        return [{"left": 0, "right": 1}.get(label, label) for label in labels]

    def __call__(self, class_labels=None, batch_size: int = 1, churn: float = 0.5, generator=None):
        noise = torch.stack([torch.randn(self.sample_shape, generator=one) for one in generator])
        sides = torch.tensor(class_labels or [0] * batch_size).view(-1, *[1] * len(self.sample_shape))
        return (churn * noise.clamp(-1, 1) + sides,)


@pytest.fixture
def walk(monkeypatch):
    """Lets `sample` load a Walk of a shape."""

    def make(*shape: int) -> None:
        monkeypatch.setattr("hf_diffusion.sampling.loading.load_for_sampling", lambda options: Walk(shape))

    return make


def test_points_are_shown_as_a_scatter_plot_and_kept_as_float32(walk, tmp_path, capsys):
    walk(2)
    words = ("--num_images", 6, "--class_labels", "right,left", "--set", "churn=0", "--output", tmp_path / "plot.png")
    assert run("sample", "walk", *words, "--npz", tmp_path / "x.npz") == 0
    arrays = np.load(tmp_path / "x.npz")
    assert arrays["samples"].dtype == np.float32 and arrays["labels"].tolist() == [1, 1, 1, 0, 0, 0]
    np.testing.assert_array_equal(arrays["samples"], [[1, 1]] * 3 + [[0, 0]] * 3)
    assert "plot.png: 6 samples" in capsys.readouterr().out and Image.open(tmp_path / "plot.png").size[0] > 100


def test_samples_that_have_no_picture_are_refused_without_npz_and_written_with_it(walk, tmp_path, capsys, monkeypatch):
    walk(7)
    monkeypatch.chdir(tmp_path)
    assert run("sample", "walk") == 2
    assert (
        "the samples of this Walk are no images, they have the shape (7,); give --npz alone" in capsys.readouterr().err
    )
    for flag in ("--images_dir", "--interpolate"):
        assert run("sample", "walk", flag, 2) == 2 and f"{flag}: the samples of this Walk" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert run("sample", "walk", "--num_images", 4, "--npz", "x.npz") == 0
    assert np.load("x.npz")["samples"].shape == (4, 7)


def test_options_are_those_that_the_pipeline_says_it_samples_by(walk, capsys):
    walk(2)
    assert run("sample", "walk", "--num_inference_steps", 3) == 2
    assert "--num_inference_steps: Walk does not take it; leave it out, it takes churn" in capsys.readouterr().err
    assert run("sample", "walk", "--set", "churn=much") == 2
    assert "--set churn: got 'much'; allowed: a number" in capsys.readouterr().err
