"""`hf-diffusion info`: what a pipeline consists of, from its small files alone."""

from hf_diffusion.cli import main
from hf_diffusion.models.unet_adm import ADMUNet2DModel
from hf_diffusion.pipelines.pipeline_classifier_free_guidance import ClassifierFreeGuidancePipeline
from tests.launching import run_claims


def test_info_shows_what_a_pipeline_consists_of(folders, capsys):
    assert main(["info", str(folders / "digits")]) == 0
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
    assert main(["info", str(folders / "stock")]) == 0 and "unet: UNet2DModel" in capsys.readouterr().out


CHILD = """
import contextlib, io
from huggingface_hub import CommitOperationAdd, HfApi, constants
from hf_diffusion.cli import main

def end(*words):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        return main(words), said.getvalue()

HfApi().create_repo("alice/info")
files = [CommitOperationAdd(str(f.relative_to(FOLDER)), f) for f in Path(FOLDER).rglob("*") if f.is_file()]
HfApi().create_commit("alice/info", files, commit_message="x")
claims["info"] = end("info", "alice/info")
fetched = {file.suffix for file in Path(constants.HF_HUB_CACHE).rglob("*")}
claims["weights or code fetched"] = sorted(fetched & {".safetensors", ".py"})
claims["sample"] = end("sample", "alice/info", "--num_images", "3", "--num_inference_steps", "1", "--npz", "x.npz")
claims["nothing"] = end("sample", "alice/nothing")
"""


def test_a_repository_is_described_and_sampled_without_running_its_code(folders, hub, tmp_path):
    folder = tmp_path / "folder"
    pipe = ClassifierFreeGuidancePipeline.from_pretrained(folders / "digits")
    pipe.save_pretrained(folder)
    for file in folder.rglob("*.py"):
        file.write_text("raise SystemExit('ran')")
    claims = run_claims(f"FOLDER = {str(folder)!r}\n{CHILD}", env=hub.env("hf_alice_write", home=tmp_path / "home"))
    status, said = claims["info"]
    assert status == 0 and f"unet: ADMUNet2DModel, {pipe.unet.num_parameters():,} parameters" in said
    assert claims["weights or code fetched"] == []
    status, said = claims["sample"]
    assert status == 0 and "x.npz: images uint8 (3, 8, 8), labels int64 (3,)" in said
    status, said = claims["nothing"]
    assert status == 1 and "hf-diffusion sample: " in said and "Traceback" not in said


def test_there_is_nothing_to_verify_in_a_folder(folders, capsys):
    assert main(["info", str(folders / "plain"), "--verify"]) == 2
    assert "--verify compares a download with the Hub, but" in capsys.readouterr().err
