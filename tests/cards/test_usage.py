"""The section "Use": the code on a card runs as it stands, also of a family that nobody knows."""

import ast
import json
import re

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from huggingface_hub import metadata_load

from hf_diffusion import ClassifierGuidancePipeline
from hf_diffusion.cards.model_card import write_model_card
from hf_diffusion.cards.usage import call_text
from hf_diffusion.hub.card_merge import name_repository
from tests.cards.small import NAMES, PIPELINES, classifier
from tests.cards.vector_family import HalvingScheduler, VectorNetwork, VectorPipeline


VECTORS = {"name": "the made-up ones", "kind": "vectors", "sample_shape": [7], "samples": 100, "class_names": None}


def card_of(folder, data=None, **facts) -> str:
    data = data or {"name": "x", "size": [8, 8], "class_names": NAMES}
    return write_model_card(folder, config={}, data=data, training={"steps": 3}, **facts).read_text()


def code_blocks(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


@pytest.mark.parametrize("make", PIPELINES.values(), ids=PIPELINES)
def test_the_code_on_the_card_runs_as_it_stands(tmp_path, monkeypatch, make):
    pipe = make()
    pipe.save_pretrained(tmp_path / "boots")
    stock, installed = code_blocks(card_of(tmp_path / "boots", pipeline=pipe))
    assert ("class_labels" in installed) == (pipe.num_classes is not None)
    # The same call in both forms.
    assert stock.split(")\n", 1)[1].splitlines()[-1] == installed.splitlines()[-1]
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(installed, names)
    assert type(names["pipe"]) is type(pipe) and [image.size for image in names["images"]] == [(8, 8)] * 4


def test_the_card_of_a_family_that_the_package_does_not_know_shows_its_own_call_which_runs(tmp_path, monkeypatch):
    torch.manual_seed(0)
    pipe = VectorPipeline(VectorNetwork(), HalvingScheduler())
    pipe.save_pretrained(tmp_path / "winds")
    card = card_of(tmp_path / "winds", VECTORS, kind="halving model", tags=["halving"])
    assert "A halving model of vectors of 7 numbers, trained with hf_diffusion on the made-up ones" in card
    assert metadata_load(tmp_path / "winds/README.md") == {
        "library_name": "diffusers",
        "tags": ["hf_diffusion", "custom_code", "halving"],
    }
    assert not re.search("image|DDPM|guidance|class|None", card.split("## Reproduce")[0]), card
    # The installed package does not have it: one form only.
    (code,) = code_blocks(card)
    assert "samples = pipe(batch_size=3, halvings=5, generator=generators)[0]" in code
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    seeds = [torch.Generator().manual_seed(seed) for seed in range(3)]
    torch.testing.assert_close(names["samples"], pipe(3, halvings=5, generator=seeds).vectors, rtol=0, atol=0)


def test_a_stock_pipeline_is_loaded_from_diffusers_without_trust_and_draws_by_its_signature(tmp_path, monkeypatch):
    unet = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, block_out_channels=(32,), layers_per_block=1,
                       down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "stock")
    card = card_of(tmp_path / "stock")
    (code,) = code_blocks(card)
    assert "from diffusers import DDPMPipeline" in code and "trust_remote_code" not in code
    assert "custom_code" not in metadata_load(tmp_path / "stock/README.md")["tags"]
    monkeypatch.chdir(tmp_path)
    names = {}
    # Its default of 1000 steps would take seconds.
    exec(code.replace("pipe(", "pipe(num_inference_steps=2, "), names)
    assert len(names["images"]) == 4


def test_the_card_of_a_classifier_guides_a_diffusion_model_with_it(tmp_path, monkeypatch):
    classifier().save_pretrained(tmp_path / "judge")
    PIPELINES["unconditional"]().save_pretrained(tmp_path / "runs" / "diffusion")
    about = {"kind": "classifier of noisy images", "task": "image-classification"}
    card = card_of(tmp_path / "judge", usage_template="use_classifier.md", metrics={"top1": 0.5}, **about)
    assert "A classifier of noisy images of 8x8, trained" in card
    assert "(beta_schedule='linear', num_train_timesteps=1000)\ntowards a class." in card
    assert "0 T-shirt/top, 1 Trouser" in card and "quality of the samples" not in card
    metadata = metadata_load(tmp_path / "judge/README.md")
    assert "pipeline_tag" not in metadata
    assert metadata["model-index"][0]["results"][0]["task"] == {"type": "image-classification"}
    (code,) = code_blocks(card)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    assert isinstance(names["pipe"], ClassifierGuidancePipeline) and len(names["images"]) == 4
    renamed = name_repository(card, "me/judge", "v1")
    assert 'ADMClassifier.from_pretrained("me/judge", revision="v1")' in renamed
    # That is another repository.
    assert "ClassifierGuidancePipeline.from_pretrained(diffusion_model," in renamed


def test_a_network_alone_of_another_family_is_not_taken_for_a_classifier(tmp_path):
    VectorNetwork().save_pretrained(tmp_path)
    card = card_of(tmp_path, VECTORS, kind="network", metrics={"loss": 1.0})
    assert "## Use" not in card and "classif" not in card
    assert metadata_load(tmp_path / "README.md")["model-index"][0]["results"][0]["task"] == {"type": "other"}


def test_a_call_is_written_as_python_reads_it():
    arguments = {"class_labels": ["a", 'the "b"'], "eta": 0.5, "flag": True, "interval": (0.0, 1), "none": None}
    seeds, call = call_text(arguments).split("\n")
    assert "range(2)" in seeds
    given = {word.arg: word.value for word in ast.parse(call).body[0].value.value.keywords}
    assert given.pop("generator").id == "generators"
    found = {name: ast.literal_eval(value) for name, value in given.items()}
    assert found == {**arguments, "interval": [0.0, 1]} and 'the \\"b\\"' in call
    assert call_text({"prompt": "a cat"}).endswith(
        'pipe(prompt="a cat", generator=torch.Generator().manual_seed(0)).images'
    )


def test_a_folder_is_loaded_for_its_card_where_no_pipeline_is_given(tmp_path):
    pipe = PIPELINES["few steps"]()
    pipe.save_pretrained(tmp_path)
    assert card_of(tmp_path) == card_of(tmp_path, pipeline=pipe)
    index = json.loads((tmp_path / DiffusionPipeline.config_name).read_text())
    assert index["_class_name"][1] in (tmp_path / "README.md").read_text()


def test_the_card_of_a_ddpm_says_which_solver_to_take_for_few_calls_with_the_source_and_others_do_not(tmp_path):
    for name, make in PIPELINES.items():
        pipe = make()
        pipe.save_pretrained(tmp_path / name)
        card = card_of(tmp_path / name, pipeline=pipe)
        advises = "UniPCMultistepScheduler.from_config(pipe.scheduler.config)" in card
        assert advises == (type(pipe).__name__ == "ClassifierFreeGuidancePipeline"), name
        assert ("source: model_cards/fashion_mnist_study" in card) == advises
