"""Repositories that mean harm: nothing is run unasked, and nothing outside is read or written.

One fresh process, in which the package is installed, tries to load them all; each would leave a
trace if anything of it ran.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_diffusion import ClassifierFreeGuidancePipeline
from tests.pipelines.fresh_process import image, make_pipe, run_child


CHILD = """
from hf_diffusion import ADMUNet2DModel, ClassifierFreeGuidancePipeline as Pipeline
from hf_diffusion.hub.loading import describe_pipeline, load_pipeline
from huggingface_hub import CommitOperationAdd, HfApi
def attempt(name, load):
    try:
        note(name, load())
    except Exception as error:
        seen[name] = f"{type(error).__name__}: {error}"
for name in json.loads(os.environ["POISONED"]):
    files = [f for f in sorted((work / name).rglob("*")) if f.is_file()]
    repo = "alice/" + name.replace(",", "").replace(" ", "-")
    HfApi().create_repo(repo)
    operations = [CommitOperationAdd(str(f.relative_to(work / name)), f) for f in files]
    HfApi().create_commit(repo, operations, commit_message=name)
    attempt(f"{name}, folder", lambda: Pipeline.from_pretrained(work / name))
    attempt(f"{name}, hub", lambda: Pipeline.from_pretrained(repo))
    attempt(f"{name}, any class", lambda: load_pipeline(work / name))
    attempt(f"{name}, stock", lambda: DiffusionPipeline.from_pretrained(work / name))
    note_error(f"{name}, network", lambda: ADMUNet2DModel.from_pretrained(work / name, subfolder="unet"))
    note_error(f"{name}, described", lambda: describe_pipeline(work / name))
seen["left"] = sorted(str(f) for f in work.rglob("owned*"))
seen["imported"] = [name for name in sys.modules if name.split(".")[-1] in ("evil", "payload")]
"""


class Harm:
    """A pickle of it makes a folder when it is read."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        import os

        return os.mkdir, (str(self.trace),)


def change_json(file: Path, **changes) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, **changes}))


def poison(work: Path) -> list[str]:
    """Make the repositories; returns their names."""
    trace, weights = work / "owned", "diffusion_pytorch_model"
    names = {}

    def repository(name: str) -> Path:
        names[name] = shutil.copytree(work / "a", work / name)
        return names[name]

    code = f"import os\nos.mkdir({str(trace)!r} + __name__)\n"
    only_pickle = repository("only a pickle")
    (only_pickle / "unet" / f"{weights}.safetensors").unlink()
    for folder in (only_pickle, repository("a pickle beside")):
        torch.save(Harm(trace), folder / "unet" / f"{weights}.bin")
        torch.save(Harm(trace), folder / "unet" / f"{weights}.pt")
        torch.save(Harm(trace), folder / "optimizer.pkl")
    shards = repository("shards elsewhere")
    (shards / "unet" / f"{weights}.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"conv_in.weight": f"../../only a pickle/unet/{weights}.bin"}}
    (shards / "unet" / f"{weights}.safetensors.index.json").write_text(json.dumps(index))

    change_json(repository("index, module") / "model_index.json", unet=["evil", "ADMUNet2DModel"])
    change_json(repository("index, unknown class") / "model_index.json", scheduler=["payload", "X"])
    change_json(
        repository("index, path") / "model_index.json",
        unet=["../evil", "ADMUNet2DModel"],
        _class_name=["../evil", "ClassifierFreeGuidancePipeline"],
    )
    change_json(repository("index, builtin") / "model_index.json", _class_name="os.system", unet=["builtins", "eval"])
    outside = repository("index, part outside")
    change_json(outside / "model_index.json", **{"../a/unet": ["unet_adm", "ADMUNet2DModel"], "/etc": ["x", "Y"]})
    configs = {
        "_class_name": "evil.Evil",
        "auto_map": {"AutoModel": "evil.Evil"},
        "_module": "evil",
        "custom_pipeline": "evil",
    }
    for name in ("unet/config.json", "scheduler/scheduler_config.json"):
        folder = repository(f"config of {name.split('/')[0]}")
        change_json(folder / name, **configs)
    expression = f"__import__('os').mkdir({str(trace)!r})"
    change_json(
        repository("config, expression") / "unet/config.json", sample_size=expression, channel_mult=[expression]
    )
    for folder in names.values():  # wherever a loader might look for the module
        for place in (folder, folder / "unet", folder / "scheduler", work, work / "elsewhere"):
            place.mkdir(exist_ok=True)
            for module in ("evil", "payload"):
                (place / f"{module}.py").write_text(code)
        for shipped in (
            *folder.glob("pipeline_*.py"),
            *folder.glob("*/unet_adm.py"),
            *folder.glob("*/scheduling_*.py"),
        ):
            shipped.write_text(code)
    return list(names)


@pytest.fixture(scope="module")
def outcome(hub, tmp_path_factory):
    """(folder, what the child saw, the image of the pipeline that was poisoned)."""
    work = tmp_path_factory.mktemp("security")
    pipe = make_pipe(0, classes=True)
    pipe.save_pretrained(work / "a")
    reference, names = image(pipe), poison(work)
    env = {**hub.env("hf_alice_write", home=work / "home"), "POISONED": json.dumps(names)}
    return work, run_child(CHILD, work, env, "present"), reference


def test_nothing_of_any_repository_is_run_or_imported(outcome):
    work, seen, _ = outcome
    assert seen["left"] == [] and seen["imported"] == []
    assert not (work / "owned").exists()


@pytest.mark.parametrize("how", ["folder", "hub", "any class"])
@pytest.mark.parametrize(
    "name", ["a pickle beside", "index, module", "index, path", "config of unet", "config of scheduler"]
)
def test_what_only_names_foreign_code_is_loaded_with_the_packages_own(outcome, name, how):
    work, seen, reference = outcome
    assert isinstance(seen[f"{name}, {how}"], dict), seen[f"{name}, {how}"]
    np.testing.assert_array_equal(np.load(work / f"{name}, {how}.npy"), reference)


def test_a_part_outside_of_the_repository_is_not_loaded(outcome):
    work, seen, reference = outcome
    for how in ("folder", "hub"):
        what = seen[f"index, part outside, {how}"]
        if isinstance(what, dict):
            assert set(what) == {"unet", "scheduler", "class"}
            np.testing.assert_array_equal(np.load(work / f"index, part outside, {how}.npy"), reference)
        else:
            assert what.startswith(("ValueError", "OSError")), what


@pytest.mark.parametrize("how", ["folder", "hub"])
def test_weights_that_are_a_pickle_only_are_refused(outcome, how):
    message = outcome[1][f"only a pickle, {how}"]
    assert message.startswith("OSError") and "safetensors" in message, message


@pytest.mark.parametrize("how", ["folder", "hub", "any class"])
@pytest.mark.parametrize("name", ["shards elsewhere", "index, builtin", "index, unknown class", "config, expression"])
def test_what_makes_no_sense_is_an_error(outcome, name, how):
    assert isinstance(outcome[1][f"{name}, {how}"], str), outcome[1][f"{name}, {how}"]


def test_a_pickle_is_neither_written_nor_read_on_request(tmp_path):
    pipe = make_pipe(0, classes=True)
    with pytest.raises(ValueError, match="safe_serialization=False would write a pickle"):
        pipe.save_pretrained(tmp_path / "x", safe_serialization=False)
    assert not (tmp_path / "x").exists()
    pipe.save_pretrained(tmp_path / "x")
    with pytest.raises(ValueError, match="use_safetensors=False would read a pickle"):
        ClassifierFreeGuidancePipeline.from_pretrained(tmp_path / "x", use_safetensors=False)
