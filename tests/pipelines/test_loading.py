"""Saved pipelines: from a folder and from a Hub, with the package and without it, trusted or not.

One fresh process does all the loading, see fresh_process.py; the tests look at one claim each.
"""

import ast
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from hf_diffusion import ClassifierFreeGuidancePipeline, DDIMEtaScheduler
from hf_diffusion.hub.loading import name_package_classes
from tests.pipelines.fresh_process import image, make_pipe
from tests.pipelines.tiny import TINY, public_pipelines


SHIPPED_CODE = [
    "pipeline_classifier_free_guidance.py",
    "scheduler/scheduling_gaussian.py",
    "unet/unet_adm.py",
]
SAME_AS_A = [
    "trusted folder",
    "trusted hub",
    "trusted, package present, folder",
    "trusted, package present, hub",
    "own folder",
    "own folder, tampered",
    "own hub",
    "own hub, pushed by save",
    "own hub, tampered",
    "own hub, trusted all the same",
    "own hub, from the cache",
    "own hub, subfolder and revision",
    "first repository after the second",
    "saved again",
    "pushed again",
    "own class of the repository",
]


@pytest.mark.parametrize("name", SAME_AS_A)
def test_a_loaded_pipeline_draws_the_same_images_bit_for_bit(outcome, name):
    assert outcome.references["a"].std() > 0.1
    np.testing.assert_array_equal(outcome.images(name), outcome.references["a"])


def test_automodel_finds_the_network_of_a_pipeline_with_its_code(outcome):
    for where in ("a folder", "the hub"):
        assert outcome.seen[f"network of {where}"] == ["ADMUNet2DModel", True]


def test_what_the_own_class_pushes_is_what_it_saves(outcome):
    assert outcome.seen["pushed"] is True


def test_a_newer_commit_of_a_subfolder_is_read_unless_a_revision_is_asked_for(outcome):
    np.testing.assert_array_equal(outcome.images("own hub, subfolder"), outcome.references["b"])


@pytest.mark.parametrize("name", [name for name in SAME_AS_A if name.startswith("own ") and "class" not in name])
def test_the_own_class_runs_the_packages_code_only(outcome, name):
    assert all(module.startswith("hf_diffusion.") for module in outcome.seen[name].values()), outcome.seen[name]
    assert not (outcome.work / "evil").exists()


@pytest.mark.parametrize("name", [name for name in SAME_AS_A if "trusted " in name and "own" not in name])
def test_the_stock_loader_runs_the_shipped_code(outcome, name):
    assert all(module.startswith("diffusers_modules.local.") for module in outcome.seen[name].values())


def test_two_repositories_in_one_process_keep_their_own_code(outcome):
    # The sign of its network was turned in its own copy of the code.
    assert not np.allclose(outcome.images("second repository"), outcome.references["b"])
    assert "-self.conv_out(" not in (outcome.work / "again" / "unet" / "unet_adm.py").read_text()


def test_saving_what_was_loaded_from_shipped_code_gives_the_same_folder(outcome):
    work = outcome.work
    first, again = (sorted(f.relative_to(work / name) for f in (work / name).rglob("*")) for name in ("a", "again"))
    assert first == again
    for file in first:
        if (work / "a" / file).is_file():
            assert (work / "a" / file).read_bytes() == (work / "again" / file).read_bytes(), file


@pytest.mark.parametrize("name", ["untrusted folder", "untrusted hub"])
def test_without_trust_the_stock_loader_refuses(outcome, name):
    assert outcome.seen[name].startswith("ValueError: The ") and "trust_remote_code=True" in outcome.seen[name]


def test_parts_can_be_passed_and_are_then_not_fetched(outcome):
    assert outcome.seen["swapped"] and outcome.seen["fetched"] == ["model_index.json"]


def test_saving_and_pushing_in_one_call_takes_the_arguments_of_push_to_hub(outcome):
    assert outcome.seen["private"] is True


def test_a_variant_is_loaded_in_its_dtype_and_the_name_stays_that_of_the_repository(outcome):
    assert outcome.seen["variant"] == ["torch.bfloat16", "alice/b"]


def test_an_unknown_class_or_place_is_named(outcome):
    seen = outcome.seen
    assert "the scheduler of this pipeline is a 'SchedulerOfTheFuture'" in seen["unknown class"]
    assert "holds no pipeline: it has no model_index.json" in seen["no pipeline"]
    assert "'./not/here' is neither a folder here" in seen["no such path"]
    assert "'alice/nothing' is neither a folder here nor a repository" in seen["no such repository"]
    assert "'alice/a' has no branch, tag or commit 'v9'" in seen["no such revision"]
    assert "'alice/nested' holds no pipeline" in seen["no pipeline there"]
    assert "could not be asked for 'alice/a', and it is not in the cache" in seen["not in the cache"]


def test_parts_are_found_by_class_name_whatever_module_the_index_names():
    index = {
        "_class_name": ["x", "Y"],
        "unet": ["evil", "ADMUNet2DModel"],
        "scheduler": ["diffusers", "DDPMScheduler"],
    }
    name_package_classes(index)
    assert index["unet"] == ["hf_diffusion.models.unet_adm", "ADMUNet2DModel"]
    assert index["_class_name"] == "Y" and index["scheduler"] == ["diffusers", "DDPMScheduler"]
    for name in ("ClassifierFreeGuidancePipeline", "annotations", "__builtins__", "NoSuchClass"):
        with pytest.raises(ValueError, match=f"the unet of this pipeline is a '{name}'"):
            name_package_classes({"_class_name": "Y", "unet": ["hf_diffusion", name]})


# --- saving, in this process ---


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "pipe"
    make_pipe(0, classes=True).save_pretrained(folder)
    return folder


def test_shipped_files_need_no_neighbour_and_no_package(saved, tmp_path):
    assert sorted(str(file.relative_to(saved)) for file in saved.rglob("*.py")) == SHIPPED_CODE
    for cls in public_pipelines():
        TINY[cls].make().save_pretrained(tmp_path / cls.__name__)
    for file in tmp_path.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file} line {node.lineno}"
                modules = [node.module]
            assert not any(module.startswith("hf_diffusion") for module in modules), f"{file} line {node.lineno}"


def test_stock_parts_are_saved_without_code(tmp_path):
    pipe = make_pipe(0, classes=False)
    pipe.scheduler = DDPMScheduler()
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "DDPMScheduler"] and index["unet"] == ["unet_adm", "ADMUNet2DModel"]
    assert not (tmp_path / "scheduler" / "scheduling_gaussian.py").exists()


def test_saving_into_a_folder_keeps_its_other_files_and_leaves_no_traces(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "unet" / "notes.txt").write_text("mine too")
    pipe = make_pipe(0, classes=True)
    pipe.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list((tmp_path / "unet").glob("*-of-*.safetensors"))) > 1
    pipe.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine" and (tmp_path / "unet" / "notes.txt").exists()
    assert not list(tmp_path.rglob(".*")) and not list((tmp_path / "unet").glob("*.index.json"))
    loaded = ClassifierFreeGuidancePipeline.from_pretrained(tmp_path)
    np.testing.assert_array_equal(image(loaded), image(pipe))


def test_a_save_that_fails_leaves_the_folder_as_it_was(saved, monkeypatch):
    before = {file: file.read_bytes() for file in saved.rglob("*") if file.is_file()}
    pipe = make_pipe(1, classes=True)

    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(pipe.scheduler, "save_pretrained", fail)
    with pytest.raises(OSError, match="no space"):
        pipe.save_pretrained(saved)
    assert {file: file.read_bytes() for file in saved.rglob("*") if file.is_file()} == before
    with pytest.raises(OSError, match="no space"):
        pipe.save_pretrained(saved.parent / "new")
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_a_file_is_refused_as_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="save_directory must be a folder"):
        make_pipe(0, classes=False).save_pretrained(tmp_path / "file")


def test_a_compiled_network_is_saved_as_what_it_was(saved, tmp_path):
    pipe = make_pipe(0, classes=True)
    pipe.unet = torch.compile(pipe.unet)  # compiles at the first call, so not here
    pipe.save_pretrained(tmp_path)
    assert (tmp_path / "model_index.json").read_bytes() == (saved / "model_index.json").read_bytes()
    assert (tmp_path / "unet" / "unet_adm.py").exists()


def test_a_class_without_a_file_is_saved_with_a_warning(tmp_path, caplog):
    pipe = make_pipe(0, classes=False)
    pipe.scheduler = type("HomeMade", (DDIMEtaScheduler,), {"__module__": "__main__"})()
    pipe.save_pretrained(tmp_path)
    assert "HomeMade has no file of its own" in caplog.text
