"""Saved pipelines in fresh processes: from a folder and from a Hub, with the package and without it, trusted or not.

Each child process costs seconds for importing diffusers, so that a few of them do all loading and write down what they saw;
the tests then look at one claim each.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

import hf_diffusion
from hf_diffusion import (
    ADMClassifier,
    ADMUNet2DModel,
    ClassifierFreeGuidancePipeline,
    ClassifierGuidancePipeline,
    CosineDDPMScheduler,
    DDGANGenerator,
    DDGANPipeline,
    DDGANScheduler,
    DDIMEtaScheduler,
)
from hf_diffusion.hub.loading import name_package_classes


PACKAGE_PARENT = Path(hf_diffusion.__file__).parents[1]
SHIPPED_CODE = [
    "pipeline_classifier_free_guidance.py",
    "scheduler/scheduling_gaussian.py",
    "unet/unet_adm.py",
]

# What every child starts with. An attempt to reach anything but loopback fails, and `seen` is handed back as JSON.
PREAMBLE = """
import json, os, socket, sys
from pathlib import Path
connect = socket.socket.connect
def loopback_only(self, address):
    assert address[0] in ("127.0.0.1", "::1"), f"the network was asked for {address}"
    return connect(self, address)
socket.socket.connect = loopback_only
if os.environ["PACKAGE"] == "absent":
    sys.modules["hf_diffusion"] = None  # import hf_diffusion raises ModuleNotFoundError
import numpy as np, torch
from diffusers import DiffusionPipeline
work, seen = Path(os.environ["WORK"]), {}
def image(pipe):
    pipe.set_progress_bar_config(disable=True)
    labels = {"batch_size": 2} if pipe.num_classes is None else {"class_labels": ["cat", 2]}
    if pipe.num_classes and hasattr(pipe, "unet"):
        labels["guidance_scale"] = 2.0
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    return pipe(**labels, num_inference_steps=3, generator=generators, output_type="np").images
def note(name, pipe):
    np.save(work / f"{name}.npy", image(pipe))
    seen[name] = {part: type(part_object).__module__ for part, part_object in pipe.components.items()}
    seen[name]["class"] = type(pipe).__module__
def note_error(name, load):
    try:
        load()
        seen[name] = "no error"
    except Exception as error:
        seen[name] = f"{type(error).__name__}: {error}"
"""


def run_child(code: str, work: Path, env: dict[str, str], package: str) -> dict:
    """Run code in a fresh process in an empty folder, with the package "present" or "absent"; returns its `seen`.

    The threads are as many as here, because sums over several threads round otherwise.
    """
    cwd = work / "elsewhere"
    cwd.mkdir(exist_ok=True)
    env = {**os.environ, **env, "WORK": str(work), "PACKAGE": package, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    env["PYTHONPATH"] = str(PACKAGE_PARENT) if package == "present" else ""
    script = PREAMBLE + code + "\nprint('SEEN', json.dumps(seen))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=cwd, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.rsplit("SEEN ", 1)[1])


def make_pipe(seed: int, classes: bool) -> ClassifierFreeGuidancePipeline:
    torch.manual_seed(seed)
    unet = ADMUNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=2 if classes else 1,
        model_channels=8,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(2,),
        num_heads=2,
        norm_num_groups=4,
        num_class_embeds=3 if classes else None,
        null_class=classes,
    )
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.normal_(std=0.2)
    scheduler = CosineDDPMScheduler(variance_type="learned_range") if classes else DDIMEtaScheduler(eta=0.5)
    names = {0: "cat", 1: "dog", 2: "bird"} if classes else None
    return ClassifierFreeGuidancePipeline(unet.eval(), scheduler, id2label=names)


def make_other_pipes() -> dict[str, DiffusionPipeline]:
    """One of each of the other pipelines, with the same classes."""
    torch.manual_seed(0)
    guided, names = make_pipe(1, classes=False), {0: "cat", 1: "dog", 2: "bird"}
    small = {"sample_size": 8, "in_channels": 1, "model_channels": 8, "channel_mult": (1, 2), "num_res_blocks": 1}
    judge = {"num_classes": 3, "attention_resolutions": (2,), "num_head_channels": 8, "norm_num_groups": 4}
    classifier, generator = ADMClassifier(**small, **judge), DDGANGenerator(**small, num_class_embeds=3)
    with torch.no_grad():
        for network in (classifier, generator):
            for parameter in network.parameters():
                parameter.normal_(std=0.2)
    return {
        "guided": ClassifierGuidancePipeline(guided.unet, classifier.eval(), guided.scheduler, id2label=names),
        "few steps": DDGANPipeline(generator.eval(), DDGANScheduler(3), id2label=names),
    }


def image(pipe) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    labels = {"batch_size": 2} if pipe.num_classes is None else {"class_labels": ["cat", 2]}
    if pipe.num_classes and hasattr(pipe, "unet"):
        labels["guidance_scale"] = 2.0
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    return pipe(**labels, num_inference_steps=3, generator=generators, output_type="np").images


AUTHOR = """
from hf_diffusion.pipelines.pipeline_classifier_free_guidance import ClassifierFreeGuidancePipeline as Pipeline
from huggingface_hub import HfApi, CommitOperationAdd
api = HfApi()
def upload(repo, folder, prefix=""):
    api.create_repo(repo, exist_ok=True)
    operations = [CommitOperationAdd(prefix + str(f.relative_to(work / folder)), f) for f in sorted((work / folder).rglob("*")) if f.is_file()]
    return api.create_commit(repo, operations, commit_message=folder).oid

Pipeline.from_pretrained(work / "a").push_to_hub("alice/a")
Pipeline.from_pretrained(work / "b", dtype=torch.bfloat16).save_pretrained(work / "b16", variant="bf16")
upload("alice/b", "b")
upload("alice/tampered", "tampered")
first = upload("alice/nested", "a", "runs/v1.0/")
upload("alice/nested", "b", "runs/v1.0/")
upload("alice/b", "b16")

Pipeline.from_pretrained(work / "a").save_pretrained(work / "c", push_to_hub=True, repo_id="alice/c", private=True)
note("own hub, pushed by save", Pipeline.from_pretrained("alice/c"))
seen["private"] = api.model_info("alice/c").private
note("own folder", Pipeline.from_pretrained(work / "a"))
note("own folder, tampered", Pipeline.from_pretrained(work / "tampered"))
note("own hub", Pipeline.from_pretrained("alice/a"))
note("own hub, tampered", Pipeline.from_pretrained("alice/tampered"))
note("own hub, trusted all the same", Pipeline.from_pretrained("alice/tampered", trust_remote_code=True))
note("own hub, subfolder and revision", Pipeline.from_pretrained("alice/nested", subfolder="runs/v1.0", revision=first))
note("own hub, subfolder", Pipeline.from_pretrained("alice/nested", subfolder="runs/v1.0"))
note("own hub, from the cache", Pipeline.from_pretrained("alice/a", local_files_only=True))
other = Pipeline.from_pretrained(work / "b")
swapped = Pipeline.from_pretrained("alice/b", cache_dir=work / "cache", unet=other.unet, scheduler=other.scheduler)
seen["swapped"] = swapped.unet is other.unet and swapped.scheduler is other.scheduler
seen["fetched"] = sorted(str(f.relative_to(work / "cache")).split("/", 3)[-1] for f in (work / "cache").rglob("*") if f.is_file() and "snapshots" in f.parts)
half = Pipeline.from_pretrained("alice/b", variant="bf16", dtype=torch.bfloat16)
seen["variant"] = [str(half.unet.dtype), half.name_or_path]
note_error("unknown class", lambda: Pipeline.from_pretrained(work / "unknown"))
note_error("no pipeline", lambda: Pipeline.from_pretrained(work / "elsewhere"))
note_error("no such path", lambda: Pipeline.from_pretrained("./not/here"))
note_error("no such repository", lambda: Pipeline.from_pretrained("alice/nothing"))
note_error("no such revision", lambda: Pipeline.from_pretrained("alice/a", revision="v9"))
note_error("no pipeline there", lambda: Pipeline.from_pretrained("alice/nested"))
note_error("not in the cache", lambda: Pipeline.from_pretrained("alice/a", cache_dir=work / "empty", local_files_only=True))
note("trusted, package present, folder", DiffusionPipeline.from_pretrained(work / "a", trust_remote_code=True))
note("trusted, package present, hub", DiffusionPipeline.from_pretrained("alice/a", trust_remote_code=True))
import hf_diffusion
for name, cls in (("guided", hf_diffusion.ClassifierGuidancePipeline), ("few steps", hf_diffusion.DDGANPipeline)):
    repo = "alice/" + name.replace(" ", "-")
    cls.from_pretrained(work / name).push_to_hub(repo)
    note(f"{name}: own folder", cls.from_pretrained(work / name))
    note(f"{name}: own hub", cls.from_pretrained(repo))
    note(f"{name}: trusted, package present, hub", DiffusionPipeline.from_pretrained(repo, trust_remote_code=True))
"""

STRANGER = """
load = DiffusionPipeline.from_pretrained
note_error("untrusted folder", lambda: load(work / "a"))
note_error("untrusted hub", lambda: load("alice/a"))
a = load("alice/a", trust_remote_code=True)
note("trusted hub", a)
note("trusted folder", load(work / "a", trust_remote_code=True))
b = load(work / "b, other code", trust_remote_code=True)
note("second repository", b)
note("first repository after the second", a)
a.save_pretrained(work / "again")  # a's code, though b's files lie now where a's were executed
note("saved again", load(work / "again", trust_remote_code=True))
a.push_to_hub("alice/again")
note("pushed again", load("alice/again", trust_remote_code=True))
note("own class of the repository", type(a).from_pretrained(work / "again", trust_remote_code=True))
for name in ("guided", "few steps"):
    repo = "alice/" + name.replace(" ", "-")
    note_error(f"{name}: untrusted hub", lambda: load(repo))
    there = load(repo, trust_remote_code=True)
    note(f"{name}: trusted hub", there)
    note(f"{name}: trusted folder", load(work / name, trust_remote_code=True))
    there.save_pretrained(work / f"{name} again")
    note(f"{name}: saved again", load(work / f"{name} again", trust_remote_code=True))
"""


@pytest.fixture(scope="module")
def outcome(hub, tmp_path_factory):
    """(folder with the images of the children, what they saw, images that this process drew)."""
    work = tmp_path_factory.mktemp("loading")
    references = {}
    for name, classes in (("a", True), ("b", False)):
        pipe = make_pipe(ord(name), classes)
        pipe.save_pretrained(work / name)
        references[name] = image(pipe)
    for name, pipe in make_other_pipes().items():
        pipe.save_pretrained(work / name)
        references[name] = image(pipe)
    for copy, source in (("tampered", "a"), ("unknown", "a"), ("b, other code", "b")):
        shutil.copytree(work / source, work / copy)
    for file in (work / "tampered").rglob("*.py"):
        file.write_text(f"open({str(work / 'evil')!r}, 'w')\nraise SystemExit('tampered code ran')\n")
    index = json.loads((work / "unknown" / "model_index.json").read_text())
    index["scheduler"] = ["scheduling_gaussian", "SchedulerOfTheFuture"]
    (work / "unknown" / "model_index.json").write_text(json.dumps(index))
    other = work / "b, other code" / "unet" / "unet_adm.py"
    other.write_text(other.read_text().replace("h = self.conv_out(", "h = -self.conv_out("))
    seen = run_child(AUTHOR, work, hub.env("hf_alice_write", home=work / "home of the author"), "present")
    seen |= run_child(STRANGER, work, hub.env("hf_alice_write", home=work / "home of a stranger"), "absent")
    return work, seen, references


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
    work, _, references = outcome
    assert references["a"].std() > 0.1
    np.testing.assert_array_equal(np.load(work / f"{name}.npy"), references["a"])


FORMS = ["own folder", "own hub", "trusted, package present, hub", "trusted hub", "trusted folder", "saved again"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["guided", "few steps"])
def test_every_other_pipeline_draws_the_same_images_bit_for_bit_however_it_is_loaded(outcome, name, form):
    work, seen, references = outcome
    assert references[name].std() > 0.05
    np.testing.assert_array_equal(np.load(work / f"{name}: {form}.npy"), references[name])
    package = "hf_diffusion." if form.startswith("own") else "diffusers_modules.local."
    assert all(module.startswith(package) for module in seen[f"{name}: {form}"].values())
    assert "trust_remote_code=True" in seen[f"{name}: untrusted hub"]


def test_a_newer_commit_of_a_subfolder_is_read_unless_a_revision_is_asked_for(outcome):
    work, _, references = outcome
    np.testing.assert_array_equal(np.load(work / "own hub, subfolder.npy"), references["b"])


@pytest.mark.parametrize("name", [name for name in SAME_AS_A if name.startswith("own ") and "class" not in name])
def test_the_own_class_runs_the_packages_code_only(outcome, name):
    work, seen, _ = outcome
    assert all(module.startswith("hf_diffusion.") for module in seen[name].values()), seen[name]
    assert not (work / "evil").exists()


@pytest.mark.parametrize("name", [name for name in SAME_AS_A if "trusted " in name and "own" not in name])
def test_the_stock_loader_runs_the_shipped_code(outcome, name):
    assert all(module.startswith("diffusers_modules.local.") for module in outcome[1][name].values())


def test_two_repositories_in_one_process_keep_their_own_code(outcome):
    work, _, references = outcome
    second = np.load(work / "second repository.npy")
    assert not np.allclose(second, references["b"])  # its network's sign was turned in its own copy of the code
    assert "-self.conv_out(" not in (work / "again" / "unet" / "unet_adm.py").read_text()


def test_saving_what_was_loaded_from_shipped_code_gives_the_same_folder(outcome):
    work, _, _ = outcome
    first, again = (sorted(f.relative_to(work / name) for f in (work / name).rglob("*")) for name in ("a", "again"))
    assert first == again
    for file in first:
        if (work / "a" / file).is_file():
            assert (work / "a" / file).read_bytes() == (work / "again" / file).read_bytes(), file


@pytest.mark.parametrize("name", ["untrusted folder", "untrusted hub"])
def test_without_trust_the_stock_loader_refuses(outcome, name):
    assert outcome[1][name].startswith("ValueError: The ") and "trust_remote_code=True" in outcome[1][name]


def test_parts_can_be_passed_and_are_then_not_fetched(outcome):
    _, seen, _ = outcome
    assert seen["swapped"] and [file.split("/")[-1] for file in seen["fetched"]] == ["model_index.json"]


def test_saving_and_pushing_in_one_call_takes_the_arguments_of_push_to_hub(outcome):
    assert outcome[1]["private"] is True


def test_a_variant_is_loaded_in_its_dtype_and_the_name_stays_that_of_the_repository(outcome):
    assert outcome[1]["variant"] == ["torch.bfloat16", "alice/b"]


def test_an_unknown_class_or_place_is_named(outcome):
    _, seen, _ = outcome
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


# --- saving, in this process --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "pipe"
    make_pipe(0, classes=True).save_pretrained(folder)
    return folder


def test_shipped_files_need_no_neighbour_and_no_package(saved):
    files = [str(file.relative_to(saved)) for file in saved.rglob("*.py")]
    assert sorted(files) == SHIPPED_CODE
    for file in files:
        for node in ast.walk(ast.parse((saved / file).read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file} line {node.lineno}"
                modules = [node.module]
            assert not any(module.startswith("hf_diffusion") for module in modules), f"{file} line {node.lineno}"


def test_stock_parts_are_saved_without_code(tmp_path):
    from diffusers import DDPMScheduler

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
