"""A pipeline of a family that the package does not know: what is shared of it, who can load it."""

import json
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline

from hf_diffusion.hub.files import pushable_files
from hf_diffusion.hub.loading import describe_pipeline, load_pipeline
from tests.cards.vector_family import HalvingScheduler, VectorNetwork, VectorPipeline
from tests.launching import run_claims


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder, what its pipeline draws)."""
    torch.manual_seed(0)
    pipe = VectorPipeline(VectorNetwork(), HalvingScheduler(share=0.25))
    folder = tmp_path_factory.mktemp("family") / "vectors"
    pipe.save_pretrained(folder)
    return folder, drawn(pipe)


def drawn(pipe) -> torch.Tensor:
    return pipe(3, generator=[torch.Generator().manual_seed(seed) for seed in range(3)])[0]


def test_its_own_class_load_pipeline_and_its_shipped_code_draw_the_same(saved):
    folder, expected = saved
    for load, trusted in (
        (VectorPipeline.from_pretrained, False),
        (load_pipeline, False),
        (lambda path: DiffusionPipeline.from_pretrained(path, trust_remote_code=True), True),
        # Also after the shipped code was run in this process, which makes classes of the same
        # names.
        (load_pipeline, False),
    ):
        pipe = load(folder)
        assert torch.equal(drawn(pipe), expected) and pipe.scheduler.config.share == 0.25
        assert all((type(part) in (VectorNetwork, HalvingScheduler)) != trusted for part in pipe.components.values())


CHILD = """
import os, torch
from diffusers import DiffusionPipeline
def drawn(pipe):
    return pipe(3, generator=[torch.Generator().manual_seed(seed) for seed in range(3)])[0].tolist()
@claim
def untrusted(): DiffusionPipeline.from_pretrained(os.environ["FOLDER"])
@claim
def trusted(): return drawn(DiffusionPipeline.from_pretrained(os.environ["FOLDER"], trust_remote_code=True))
"""


def test_a_machine_without_the_package_loads_it_where_its_code_is_trusted_and_not_otherwise(saved):
    claims = run_claims(CHILD, env={"FOLDER": str(saved[0])}, with_package=False)
    assert claims["trusted"] == saved[1].tolist()
    assert claims["untrusted"].startswith("ValueError") and "trust_remote_code" in claims["untrusted"]


def test_everything_that_it_needs_is_shared(saved):
    assert set(pushable_files(saved[0])) == {
        "model_index.json", "vector_family.py", "network/config.json", "network/diffusion_pytorch_model.safetensors",
        "network/vector_family.py", "scheduler/scheduler_config.json", "scheduler/vector_family.py",
    }  # fmt: skip
    described = describe_pipeline(saved[0])
    assert described["class_name"] == "VectorPipeline" and described["parts"]["network"]["parameters"] == 7 * 8


def test_a_class_that_is_nowhere_in_this_process_is_refused_by_name(saved, tmp_path):
    for part, entry in (("network", ["elsewhere", "VectorNetwork"]), ("scheduler", ["vector_family", "Unknown"])):
        folder = shutil.copytree(saved[0], tmp_path / part)
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps({**index, part: entry}))
        with pytest.raises(ValueError, match=f"the {part} of this pipeline is a '{entry[1]}', which"):
            VectorPipeline.from_pretrained(folder)
