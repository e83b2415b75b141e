"""The `hf-diffusion` command: sample and info, on tiny pipelines."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image

from hf_diffusion.cli import class_grid, main
from hf_diffusion.models.unet_adm import ADMUNet2DModel
from hf_diffusion.pipelines.pipeline_classifier_free_guidance import ClassifierFreeGuidancePipeline
from hf_diffusion.schedulers.scheduling_gaussian import CosineDDPMScheduler, DDIMEtaScheduler


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Saved pipelines: "digits" (3 classes named by digits that are not their numbers), "plain" (no classes), "stock", "many"."""
    parent = tmp_path_factory.mktemp("pipelines")
    options = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "model_channels": 8, "channel_mult": (1, 2),
               "num_res_blocks": 1, "attention_resolutions": (), "num_heads": 2, "norm_num_groups": 4}  # fmt: skip
    torch.manual_seed(0)
    for name, classes in (("digits", 3), ("plain", None), ("many", 30)):
        unet = ADMUNet2DModel(**options, num_class_embeds=classes, null_class=classes is not None)
        with torch.no_grad():
            for parameter in unet.parameters():
                parameter.normal_(std=0.2)
        names = {0: "2", 1: "0", 2: "1"} if name == "digits" else None
        ClassifierFreeGuidancePipeline(unet, CosineDDPMScheduler(), id2label=names).save_pretrained(parent / name)
    unet = UNet2DModel(sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 8), norm_num_groups=2,
                       down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, layers_per_block=1)  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(parent / "stock")
    return parent


def run(*words) -> int:
    return main([str(word) for word in words])


def test_samples_are_written_as_grid_files_and_array(folders, tmp_path, capsys):
    grid, files, npz = tmp_path / "new" / "grid.png", tmp_path / "files", tmp_path / "samples.npz"
    status = run("sample", folders / "digits", "--class_labels", "2,1", "--num_images", 6, "--num_inference_steps", 2,
                 "--guidance_scale", 1.5, "--output", grid, "--images_dir", files, "--npz", npz)  # fmt: skip
    assert status == 0
    arrays = np.load(npz)
    assert arrays["images"].shape == (6, 8, 8) and arrays["images"].dtype == np.uint8
    assert arrays["labels"].tolist() == [0, 0, 0, 2, 2, 2]  # "2" and "1" are names here, and go before numbers
    assert sorted(f.name for f in files.iterdir()) == [f"{i:05d}.png" for i in range(6)] + ["metadata.csv"]
    np.testing.assert_array_equal(np.asarray(Image.open(files / "00004.png")), arrays["images"][4])
    assert (files / "metadata.csv").read_text().splitlines()[:2] == ["file_name,label", "00000.png,0"]
    assert Image.open(grid).size[0] > Image.open(grid).size[1]  # 3 columns, 2 rows
    printed = capsys.readouterr().out
    assert str(grid) in printed and str(files) in printed and "images uint8 (6, 8, 8), labels int64 (6,)" in printed


def test_an_image_has_its_own_seed_whatever_the_batch_size(folders, tmp_path):
    def images(*options):
        common = ("--num_images", 5, "--num_inference_steps", 2, "--npz", tmp_path / "x.npz")
        assert run("sample", folders / "plain", *common, *options) == 0
        return np.load(tmp_path / "x.npz")["images"].astype(int)

    assert np.abs(images("--batch_size", 2, "--seed", 3) - images("--seed", 3)).max() <= 1  # a rounding of 1/255 apart
    assert np.abs(images("--seed", 4)[:4] - images("--seed", 3)[1:]).max() <= 1
    assert np.abs(images("--seed", 9) - images("--seed", 3)).max() > 50


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "dpm++", "unipc", "euler"])
def test_every_scheduler_can_be_asked_for(folders, tmp_path, scheduler):
    assert run("sample", folders / "digits", "--num_images", 3, "--num_inference_steps", 3, "--scheduler", scheduler,
               "--timestep_spacing", "trailing", "--npz", tmp_path / "x.npz") == 0  # fmt: skip
    assert len(np.load(tmp_path / "x.npz")["images"]) == 3


def test_eta_changes_ddim_images(folders, tmp_path):
    images = []
    for eta in (0, 1):
        assert run("sample", folders / "plain", "--num_images", 2, "--num_inference_steps", 3, "--scheduler", "ddim",
                   "--eta", eta, "--npz", tmp_path / "x.npz") == 0  # fmt: skip
        images.append(np.load(tmp_path / "x.npz")["images"].astype(int))
    assert np.abs(images[0] - images[1]).max() > 10


def test_stock_pipelines_are_sampled_too(folders, tmp_path):
    assert run("sample", folders / "stock", "--num_images", 2, "--num_inference_steps", 2, "--npz", tmp_path / "x.npz") == 0  # fmt: skip
    arrays = np.load(tmp_path / "x.npz")
    assert arrays["images"].shape == (2, 8, 8, 3) and "labels" not in arrays


def test_the_null_class_is_sampled_by_none(folders, tmp_path):
    assert run("sample", folders / "digits", "--class_labels", "none", "--num_images", 2, "--num_inference_steps", 1, "--dtype", "bf16",
               "--npz", tmp_path / "x.npz") == 0  # fmt: skip
    assert "labels" not in np.load(tmp_path / "x.npz")


def test_rows_of_the_grid_belong_to_classes_and_carry_their_names(monkeypatch):
    drawn = {}
    monkeypatch.setattr("hf_diffusion.figures.labelled_grid", lambda *args: drawn.update(tiles=args[0], rest=args[1:]))

    class Pipe:
        id2label = {4: "cat"}

    labels = [4] * 20 + [7] * 20
    class_grid(np.full((40, 2, 2, 1), 9, dtype=np.uint8), labels, Pipe())
    assert drawn["rest"] == (16, ["cat", "", "7", ""])
    rows = drawn["tiles"].reshape(4, 16, -1).max(axis=2)
    assert (rows[[0, 2]] == 9).all() and (rows[[1, 3], 4:] == 255).all()  # the rest of a class's last row stays white


def test_info_shows_what_a_pipeline_consists_of(folders, capsys):
    assert run("info", folders / "digits") == 0
    printed = capsys.readouterr().out
    unet = ADMUNet2DModel.from_pretrained(folders / "digits" / "unet")
    for expected in (
        "ClassifierFreeGuidancePipeline",
        "carries its own code",
        "3 classes: 2, 0, 1",
        f"unet: ADMUNet2DModel, {unet.num_parameters():,} parameters",
        "sample_size: 8",
        "scheduler: CosineDDPMScheduler",
        "beta_schedule: squaredcos_cap_v2",
    ):
        assert expected in printed
    assert run("info", folders / "stock") == 0 and "unet: UNet2DModel" in capsys.readouterr().out


def test_info_reads_a_repository_without_fetching_weights_or_running_code(folders, hub, tmp_path):
    (tmp_path / "cwd").mkdir()
    folder = tmp_path / "folder"
    pipe = ClassifierFreeGuidancePipeline.from_pretrained(folders / "digits")
    pipe.save_pretrained(folder)
    for file in folder.rglob("*.py"):
        file.write_text("raise SystemExit('ran')")
    code = f"""
import sys
from pathlib import Path
from huggingface_hub import HfApi, CommitOperationAdd, constants
from hf_diffusion.cli import main
HfApi().create_repo("alice/info")
folder = Path({str(folder)!r})
files = [CommitOperationAdd(str(f.relative_to(folder)), f) for f in folder.rglob("*") if f.is_file()]
HfApi().create_commit("alice/info", files, commit_message="x")
assert main(["info", "alice/info"]) == 0
assert not list(Path(constants.HF_HUB_CACHE).rglob("*.safetensors")) and not list(Path(constants.HF_HUB_CACHE).rglob("*.py"))
sys.exit(main(["sample", "alice/info", "--num_images", "3", "--num_inference_steps", "1", "--npz", "x.npz"])
         or main(["sample", "alice/nothing"]))
"""
    env = {**os.environ, **hub.env("hf_alice_write", home=tmp_path / "home"), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path / "cwd", capture_output=True, text=True)
    assert f"unet: ADMUNet2DModel, {pipe.unet.num_parameters():,} parameters" in done.stdout, done.stderr
    assert "x.npz: images uint8 (3, 8, 8), labels int64 (3,)" in done.stdout
    assert done.returncode == 1 and "hf-diffusion sample: " in done.stderr and "Traceback" not in done.stderr


MISTAKES = {
    "not a pipeline": (["sample", "{}"], 1, "holds no pipeline"),
    "not a name": (["info", "a/b/c"], 1, "'a/b/c' is neither a folder here nor a name"),
    "unknown class": (["sample", "{}/digits", "--class_labels", "5"], 2, "class label 5 is not a class"),
    "unknown name": (["sample", "{}/digits", "--class_labels", "cat"], 2, "unknown class name 'cat'"),
    "no classes": (["sample", "{}/plain", "--class_labels", "1"], 2, "has no classes"),
    "too many classes": (["sample", "{}/many"], 2, "30 classes; choose with --class_labels"),
    "uneven": (["sample", "{}/digits", "--num_images", "4"], 2, "evenly by 3 classes; use 6"),
    "no images": (["sample", "{}/digits", "--num_images", "0"], 2, "--num_images must be at least 1, not 0"),
    "no eta": (["sample", "{}/stock", "--eta", "1"], 2, "--eta: DDPMPipeline does not take it"),
    "guidance without classes": (["sample", "{}/plain", "--guidance_scale", "2"], 1, "needs class_labels"),
    "eta of another scheduler": (["sample", "{}/digits", "--eta", "1"], 1, "CosineDDPMScheduler has no eta"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_without_traceback_or_files(folders, mistake, capsys, tmp_path, monkeypatch):
    words, status, message = MISTAKES[mistake]
    monkeypatch.chdir(tmp_path)
    assert run(*[word.format(folders) for word in words]) == status
    printed = capsys.readouterr().err
    last = [line for line in printed.splitlines() if line.startswith("hf-diffusion ")]
    assert len(last) == 1 and message in last[0] and "Traceback" not in printed
    assert not list(tmp_path.iterdir())


def test_the_traceback_is_shown_on_request(folders):
    with pytest.raises(ValueError, match="holds no pipeline"):
        run("sample", folders, "--traceback")


def test_unknown_options_end_with_status_2(folders):
    with pytest.raises(SystemExit) as error:
        run("sample", folders / "plain", "--num_image", 3)
    assert error.value.code == 2


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
