"""One process that loads saved pipelines without the package, and after that with it.

It does all the loading for the tests of this folder and writes down what it saw; the tests look at
one claim each.
"""

import hashlib
import inspect
import json
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import hf_diffusion
from hf_diffusion import (
    ClassifierFreeGuidancePipeline,
    ClassifierGuidancePipeline,
    CosineDDPMScheduler,
    DDIMEtaScheduler,
)
from tests.launching import run_claims
from tests.pipelines.tiny import (
    TINY,
    make_points,
    make_points_in_few_steps,
    make_unet,
    public_pipelines,
    with_random_weights,
)


PACKAGE_PARENT = Path(hf_diffusion.__file__).parents[1]


class Outcome(NamedTuple):
    """What the process drew into `work`, what it saw, and the images that it should draw.

    classes: of each pipeline that was saved, as `classes_of` tells them.
    """

    work: Path
    seen: dict
    references: dict[str, np.ndarray]
    classes: dict[str, dict[str, list[str]]]

    def images(self, name: str) -> np.ndarray:
        return np.load(self.work / f"{name}.npy")


def image(pipe) -> np.ndarray:
    """Two images of given seeds and classes, guided if the model can be; the child's, too."""
    pipe.set_progress_bar_config(disable=True)
    what = {"batch_size": 2} if pipe.num_classes is None else {"class_labels": ["cat", 2]}
    if getattr(pipe, "null_class_id", None) is not None:
        what["guidance_scale"] = 2.0
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    return pipe(**what, num_inference_steps=3, generator=generators, output_type="np").images


def classes_of(pipe) -> dict[str, list[str]]:
    """Module, name and hash of the code of a pipeline's class and of those of its parts; the
    child's, too."""
    found = {}
    for part, module in {"": pipe, **pipe.components}.items():
        if module is not None:
            cls = type(module)
            code = Path(sys.modules[cls.__module__].__file__).read_bytes()
            found[part] = [cls.__module__, cls.__name__, hashlib.sha256(code).hexdigest()]
    return found


# What every child starts with.
PREAMBLE = """
import hashlib, os
import numpy as np, torch
from diffusers import AutoModel, DiffusionPipeline
work, seen = Path(os.environ["WORK"]), claims
def note(name, pipe):
    np.save(work / f"{name}.npy", image(pipe))
    parts = {part: found for part, found in pipe.components.items() if found is not None}
    seen[name] = {part: type(found).__module__ for part, found in parts.items()}
    seen[name]["class"] = type(pipe).__module__
    seen[f"classes of {name}"] = classes_of(pipe)
def note_error(name, load):
    try:
        load()
        seen[name] = "no error"
    except Exception as error:
        seen[name] = f"{type(error).__name__}: {error}"
"""


def run_child(code: str, work: Path, env: dict[str, str], package: str) -> dict:
    """What code has `seen` in a process of its own, with the package "present" or "absent".

    It starts in an empty folder.
    """
    elsewhere = work / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    script = PREAMBLE + inspect.getsource(image) + inspect.getsource(classes_of) + code
    return run_claims(script, elsewhere, {**env, "WORK": str(work)}, with_package=package == "present")


def make_pipe(seed: int, classes: bool) -> ClassifierFreeGuidancePipeline:
    """A pipeline of three classes with learned variance, or one without classes."""
    unet = make_unet(3 if classes else None, learned_variance=classes)
    torch.manual_seed(seed)
    with_random_weights(unet, std=0.2)
    scheduler = CosineDDPMScheduler(variance_type="learned_range") if classes else DDIMEtaScheduler(eta=0.5)
    return ClassifierFreeGuidancePipeline(
        unet, scheduler, id2label={0: "cat", 1: "dog", 2: "bird"} if classes else None
    )


UPLOAD = """
from huggingface_hub import CommitOperationAdd, HfApi, snapshot_download
api, public = HfApi(), json.loads(os.environ["PUBLIC"])
def upload(repo, folder, prefix=""):
    api.create_repo(repo, exist_ok=True)
    files = [file for file in sorted((work / folder).rglob("*")) if file.is_file()]
    operations = [CommitOperationAdd(prefix + str(file.relative_to(work / folder)), file) for file in files]
    return api.create_commit(repo, operations, commit_message=folder).oid
"""

STRANGER = """
load = DiffusionPipeline.from_pretrained
upload("alice/uploaded", "a")
note_error("untrusted folder", lambda: load(work / "a"))
note_error("untrusted hub", lambda: load("alice/uploaded"))
a = load("alice/uploaded", trust_remote_code=True)
note("trusted hub", a)
note("trusted folder", load(work / "a", trust_remote_code=True))
for where in (str(work / "a"), "alice/uploaded"):
    network = AutoModel.from_pretrained(where, subfolder="unet", trust_remote_code=True)
    same = all(torch.equal(value, network.state_dict()[key]) for key, value in a.unet.state_dict().items())
    seen[f"network of {'the hub' if where == 'alice/uploaded' else 'a folder'}"] = [type(network).__name__, same]
b = load(work / "b, other code", trust_remote_code=True)
note("second repository", b)
note("first repository after the second", a)
a.save_pretrained(work / "again")  # a's code, though b's files lie now where a's were executed
note("saved again", load(work / "again", trust_remote_code=True))
a.push_to_hub("alice/again")
note("pushed again", load("alice/again", trust_remote_code=True))
note("own class of the repository", type(a).from_pretrained(work / "again", trust_remote_code=True))
for name in public:
    upload(f"alice/{name}", name)
    note_error(f"{name}: untrusted hub", lambda: load(f"alice/{name}"))
    there = load(f"alice/{name}", trust_remote_code=True)
    note(f"{name}: trusted hub", there)
    note(f"{name}: trusted folder", load(work / name, trust_remote_code=True))
    there.save_pretrained(work / f"{name} again")
    note(f"{name}: saved again", load(work / f"{name} again", trust_remote_code=True))
"""

# From here on the package is there, and nothing of it has been imported before.
ARRIVAL = """
assert not [name for name in sys.modules if name.startswith("hf_diffusion.")]
del sys.modules["hf_diffusion"]
sys.path.insert(0, os.environ["PACKAGE_PARENT"])
"""

AUTHOR = """
from hf_diffusion.pipelines.pipeline_classifier_free_guidance import ClassifierFreeGuidancePipeline as Pipeline
Pipeline.from_pretrained(work / "a").push_to_hub("alice/a")
pushed, saved = Path(snapshot_download("alice/a")), [file for file in (work / "a").rglob("*.*")]
seen["pushed"] = all((pushed / file.relative_to(work / "a")).read_bytes() == file.read_bytes() for file in saved)
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
nested = {"pretrained_model_name_or_path": "alice/nested", "subfolder": "runs/v1.0"}
note("own hub, subfolder and revision", Pipeline.from_pretrained(**nested, revision=first))
note("own hub, subfolder", Pipeline.from_pretrained(**nested))
note("own hub, from the cache", Pipeline.from_pretrained("alice/a", local_files_only=True))
other = Pipeline.from_pretrained(work / "b")
swapped = Pipeline.from_pretrained("alice/b", cache_dir=work / "cache", unet=other.unet, scheduler=other.scheduler)
seen["swapped"] = swapped.unet is other.unet and swapped.scheduler is other.scheduler
seen["fetched"] = sorted(f.name for f in (work / "cache").rglob("*") if f.is_file() and "snapshots" in f.parts)
half = Pipeline.from_pretrained("alice/b", variant="bf16", dtype=torch.bfloat16)
seen["variant"] = [str(half.unet.dtype), half.name_or_path]
note_error("unknown class", lambda: Pipeline.from_pretrained(work / "unknown"))
note_error("no pipeline", lambda: Pipeline.from_pretrained(work / "elsewhere"))
note_error("no such path", lambda: Pipeline.from_pretrained("./not/here"))
note_error("no such repository", lambda: Pipeline.from_pretrained("alice/nothing"))
note_error("no such revision", lambda: Pipeline.from_pretrained("alice/a", revision="v9"))
note_error("no pipeline there", lambda: Pipeline.from_pretrained("alice/nested"))
there = {"cache_dir": work / "empty", "local_files_only": True}
note_error("not in the cache", lambda: Pipeline.from_pretrained("alice/a", **there))
note("trusted, package present, folder", load(work / "a", trust_remote_code=True))
note("trusted, package present, hub", load("alice/a", trust_remote_code=True))
import hf_diffusion
for name, class_name in public.items():
    cls = getattr(hf_diffusion, class_name)
    own = cls.from_pretrained(work / name)
    note(f"{name}: own folder", own)
    own.push_to_hub(f"alice/own-{name}")
    note(f"{name}: own hub", cls.from_pretrained(f"alice/own-{name}"))
    note(f"{name}: trusted, package present, hub", load(f"alice/own-{name}", trust_remote_code=True))
guided = hf_diffusion.ClassifierGuidancePipeline
classifier = hf_diffusion.ADMClassifier.from_pretrained(work / "ClassifierGuidancePipeline" / "classifier")
for name in ("no classifier", "no guidance"):
    note(f"{name}: classifier put in", guided.from_pretrained(work / name, classifier=classifier))
"""


def load_in_a_fresh_process(work: Path, env: dict[str, str]) -> Outcome:
    """Save pipelines into `work`, and load them elsewhere with the Hub of `env`."""
    references, classes = {}, {}
    pipes = {"a": make_pipe(ord("a"), True), "b": make_pipe(ord("b"), False)}
    pipes |= {cls.__name__: TINY[cls].make() for cls in public_pipelines() if cls in TINY}
    pipes |= {"points": make_points(), "points-in-few-steps": make_points_in_few_steps()}
    public = {name: type(pipe).__name__ for name, pipe in pipes.items() if len(name) > 1}
    for name, pipe in pipes.items():
        pipe.save_pretrained(work / name)
        references[name], classes[name] = image(pipe), classes_of(pipe)
    guided = pipes["ClassifierGuidancePipeline"]
    ClassifierGuidancePipeline(guided.unet, None, guided.scheduler).save_pretrained(work / "no classifier")
    ClassifierFreeGuidancePipeline(guided.unet, guided.scheduler).save_pretrained(work / "no guidance")
    for copy, source in (("tampered", "a"), ("unknown", "a"), ("b, other code", "b")):
        shutil.copytree(work / source, work / copy)
    for file in (work / "tampered").rglob("*.py"):
        file.write_text(f"open({str(work / 'evil')!r}, 'w')\nraise SystemExit('tampered code ran')\n")
    index = json.loads((work / "unknown" / "model_index.json").read_text())
    index["scheduler"] = ["scheduling_gaussian", "SchedulerOfTheFuture"]
    (work / "unknown" / "model_index.json").write_text(json.dumps(index))
    other = work / "b, other code" / "unet" / "unet_adm.py"
    other.write_text(other.read_text().replace("h = self.conv_out(", "h = -self.conv_out("))
    env = {**env, "PUBLIC": json.dumps(public), "PACKAGE_PARENT": str(PACKAGE_PARENT)}
    return Outcome(work, run_child(UPLOAD + STRANGER + ARRIVAL + AUTHOR, work, env, "absent"), references, classes)
