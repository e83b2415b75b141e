"""What a card says, what it leaves out, and what of people's own words survives the next run."""

import ast
import json
import re
from dataclasses import dataclass

import pytest
import yaml
from huggingface_hub import metadata_load

from hf_diffusion.cards.model_card import NearestImages, write_model_card
from hf_diffusion.config.command_line import parse_config
from hf_diffusion.config.options import config_to_dict
from hf_diffusion.config.run_options import TrainingConfig
from hf_diffusion.config.shared_options import DataOptions
from hf_diffusion.hub.card_format import END, START
from tests.cards.small import NAMES, PIPELINES
from tests.cards.vector_family import HalvingScheduler, VectorNetwork, VectorPipeline


DATA = {
    "name": "fashion_mnist",
    "size": [28, 28],
    "class_names": NAMES,
    "images": 60000,
    "remarks": [],
    "skipped_images": 0,
}
RUN = {
    "steps": 3000,
    "images_seen": 192000,
    "wall_time_s": 1234.5,
    "parameters": 1834241,
    "command": "accelerate launch x.py",
}


@dataclass(kw_only=True)
class Config(TrainingConfig, DataOptions):
    """The settings of a run on images."""


def settings(**values):
    return config_to_dict(
        Config(**{"dataset_name": "zalando-datasets/fashion_mnist", "max_train_steps": 3000, **values})
    )


@pytest.fixture(scope="module")
def pipeline():
    return PIPELINES["class-conditional"]()


@pytest.fixture
def folder(tmp_path):
    """What a saved pipeline looks like to the card, which is given the pipeline."""
    folder = tmp_path / "boots"
    folder.mkdir()
    index = {"_class_name": ["pipeline_classifier_free_guidance", "ClassifierFreeGuidancePipeline"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    for name in ("samples.png", "loss.png"):
        (folder / name).write_bytes(b"a picture")
    return folder


@pytest.fixture
def card_of(folder, pipeline):
    def write(**changes) -> str:
        arguments = {"config": settings(), "data": DATA, "training": RUN, "images": ["samples.png"]}
        arguments |= {"curve": "loss.png", "tags": ["ddpm"], "pipeline": pipeline}
        return write_model_card(folder, **{**arguments, **changes}).read_text()

    return write


def headings(card):
    return [line[3:] for line in card.splitlines() if line.startswith("## ")]


def code_blocks(card):
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


def test_the_card_shows_pictures_use_reproduction_and_limits(card_of, folder):
    card = card_of()
    assert "A class-conditional diffusion model of 28x28 images with 1.8 M parameters" in card
    for expected in [
        "](samples.png)",
        "](loss.png)",
        "accelerate launch x.py",
        "| wall time | 21 min |",
        "| images seen | 192,000 |",
    ]:
        assert expected in card
    assert headings(card) == ["Training curve", "Use", "Reproduce", "Limits"]
    everything = card_of(metrics={"FD": 1.0}, citations=["@misc{a}"], nearest=NearestImages("loss.png", "Far away."))
    assert headings(everything) == ["Results", "Training curve", "Use", "Reproduce", "Limits", "Citation"]
    limits = everything.split("## Limits")[1]
    assert "- Far away." in limits and "](loss.png)" in limits and "@misc{a}" in limits
    assert "has not been measured" not in limits
    # Nothing half-written lies beside it.
    assert {path.name for path in folder.iterdir()} == {"README.md", "loss.png", "model_index.json", "samples.png"}


def test_what_is_not_known_is_left_out_and_nothing_is_asked(card_of, folder):
    for card in (
        card_of(),
        card_of(data={}, training={}, images=[], curve=None),
        card_of(metrics={"FD": 1.0}),
    ):
        # Settings may be null.
        card = re.sub(r"```yaml.*?```", "", card, flags=re.DOTALL)
        assert not re.search(r"TODO|More Information|None|\bnan\b|\[\]|\{\}|\{\{|\{%", card)
        # There are no holes where something was left out.
        assert "\n\n\n" not in card.replace("\n\n\n\n</details>", "")


def test_metadata_name_library_task_tags_and_the_data_set_of_the_hub(card_of, folder):
    card_of()
    assert metadata_load(folder / "README.md") == {
        "library_name": "diffusers",
        "pipeline_tag": "unconditional-image-generation",
        "datasets": ["zalando-datasets/fashion_mnist"],
        "tags": ["hf_diffusion", "custom_code", "ddpm"],
        "widget": [{"text": "samples", "output": {"url": "samples.png"}}],
    }


def test_data_that_are_not_on_the_hub_are_not_named_as_a_data_set_of_it(card_of, folder):
    (folder / "samples.png").touch()
    points = {"name": "swiss_roll", "kind": "points", "sample_shape": [2]}
    for values, data in (
        ({"dataset_name": "digits"}, DATA),
        ({"dataset_name": None, "train_data_dir": "/home/me/pictures"}, DATA),
        ({"dataset_name": str(folder / "samples.png")}, DATA),
        ({"dataset_name": "swiss_roll"}, points),
    ):
        card_of(config=settings(**values), data=data)
        assert "datasets" not in metadata_load(folder / "README.md"), values
    card_of(config=settings(dataset_name="mnist"))
    assert metadata_load(folder / "README.md")["datasets"] == ["mnist"]


def test_a_licence_is_stated_only_when_given(card_of, folder):
    assert "No licence is stated for the weights" in card_of()
    assert "No licence is stated for the weights" not in card_of(license="mit")
    assert metadata_load(folder / "README.md")["license"] == "mit"
    assert "Licence of the training data: CC BY 4.0." in card_of(data={**DATA, "license": "CC BY 4.0"})


def test_nothing_that_a_run_knows_is_taken_for_a_template_or_breaks_a_table(card_of, folder):
    data = {
        "name": "{{ 7 * 7 }} {% for %}",
        "remarks": ["a | b"],
        "license": "{{ config }}",
        "considerations": ["{{ self }}"],
    }
    card = card_of(data=data, citations=["@misc{{{ 1 }}}"])
    assert "on {{ 7 * 7 }} {% for %} for" in card and "49" not in card and "| remarks | a \\| b |" in card
    assert "> {{ self }}" in card and "@misc{{{ 1 }}}" in card


def test_captions_stand_under_the_pictures_and_in_the_gallery(card_of, folder):
    card = card_of(images={"samples.png": "One row a class"})
    assert "](samples.png)\n\n*One row a class.*\n" in card
    assert metadata_load(folder / "README.md")["widget"] == [
        {"text": "One row a class", "output": {"url": "samples.png"}}
    ]


def test_energy_is_on_the_card_where_it_was_read(card_of, folder):
    assert "energy" not in card_of(training={**RUN, "energy": {}})
    both = {"CPU packages (RAPL)": 1.8e6, "GPUs (NVML)": 7.2e6}
    card = card_of(training={**RUN, "energy": both})
    assert "| energy | 2.5 kWh: 0.5 kWh CPU packages (RAPL), 2 kWh GPUs (NVML) |" in card


def test_licence_biases_and_limits_of_the_data_are_quoted_with_their_place(card_of, folder):
    facts = {"license": "mit", "data_card": "https://x.y/z", "considerations": ["Only one studio.", "Few shoes."]}
    card = card_of(data={**DATA, **facts})
    assert "- Licence of the training data: mit, as stated by https://x.y/z." in card
    assert "(from https://x.y/z):\n\n  > Only one studio.\n\n  > Few shoes.\n" in card
    assert "considerations" not in card and "| data card" not in card


def test_the_settings_on_the_card_give_the_same_run_again(card_of, folder, tmp_path):
    config = settings(learning_rate=1e-3, report_to=("wandb",))
    (tmp_path / "config.yaml").write_text(re.search(r"```yaml\n(.*?)```", card_of(config=config), re.DOTALL)[1])
    assert config_to_dict(parse_config(Config, ["--config", str(tmp_path / "config.yaml")])) == config


def test_the_code_on_the_card_pins_the_revision_and_names_classes(card_of, folder):
    stock, installed = code_blocks(card_of(repo_id="me/boots", revision="step-3000"))
    for code in (stock, installed):
        ast.parse(code)
        assert '"me/boots"' in code and 'revision="step-3000"' in code and "guidance_scale" in code
    assert "trust_remote_code=True" in stock and "trust_remote_code" not in installed
    assert 'class_labels=["T-shirt/top", "Trouser", "the \\"Bag\\"", "Sandal"]' in stock


def test_text_outside_the_markers_survives_a_second_run_and_text_inside_is_renewed(card_of, folder):
    card = card_of(metrics={"FD": 9.0})
    path = folder / "README.md"
    path.write_text(
        card.replace(START, f"Please cite us.\n\n{START}").replace("3,000 steps", "77 steps")
        + "\n## Thanks\n\nto all.\n"
    )
    again = card_of()
    body = again.split("---\n", 2)[2]
    assert body.startswith("\nPlease cite us.\n\n" + START) and body.endswith(f"{END}\n\n## Thanks\n\nto all.\n")
    assert "3,000 steps" in body and "77 steps" not in body and "| FD |" not in body
    # Those are results of earlier weights.
    assert "model-index" not in metadata_load(path)
    assert card_of() == again


def test_metadata_that_people_add_survive_and_a_given_licence_wins(card_of, folder):
    card_of()
    path = folder / "README.md"
    theirs = {
        "license": "cc-by-4.0",
        "language": "en",
        "tags": ["ddpm", "fashion"],
        "co2_eq_emissions": {"emissions": 3},
    }
    path.write_text(f"---\n{yaml.safe_dump(theirs)}---\n{path.read_text().split('---', 2)[2].lstrip()}")
    card_of()
    assert (
        metadata_load(path).items() >= {**theirs, "tags": ["hf_diffusion", "custom_code", "ddpm", "fashion"]}.items()
    )
    card_of(license="mit")
    assert metadata_load(path)["license"] == "mit"


def test_a_card_written_by_hand_keeps_its_text_before_the_generated_part(card_of, folder):
    for text in (
        "# Our model\n\nBy hand.",
        "---\nlicense: mit\n---\n# Our model\n\nBy hand.\n",
        "\r\n---\r\na: 1\r\n---\r\n# Our model\r\n\r\nBy hand.",
    ):
        (folder / "README.md").write_bytes(text.encode())
        body = card_of().split("---\n", 2)[2]
        assert body.split()[:6] == ["#", "Our", "model", "By", "hand.", "<!--"] and body.count(START) == 1
        assert card_of().split("---\n", 2)[2] == body


def test_a_damaged_card_is_refused_and_left_as_it_is(card_of, folder):
    path, whole = folder / "README.md", card_of()
    for damaged, message in (
        (whole.replace(END, ""), "markers .* once each"),
        (whole + START + END, "markers .* once each"),
        (whole.replace(START, "X").replace(END, START).replace("X", END), "markers .* once each"),
        ("---\ntags: [\n---\n", "are not valid YAML"),
        ("---\n- a\n---\n", "must be `key: value` lines"),
    ):
        path.write_text(damaged)
        with pytest.raises(ValueError, match=f"README.md.*{message}|{message}.*"):
            card_of()
        assert path.read_text() == damaged


def test_a_picture_that_is_not_in_the_folder_is_refused(card_of):
    for image in ("nowhere.png", "/etc/hostname"):
        with pytest.raises(ValueError, match=f"{image}.*relative to the folder"):
            card_of(images=[image])


def test_commit_and_uncommitted_changes_are_on_the_card(card_of, folder):
    state = {"git_commit": "abc123", "git_dirty": True, "git_repository": "boots", "versions": {"torch": "2.13.0+cpu"}}
    card = card_of(training={**RUN, **state})
    assert "| git commit | `abc123` of boots, with uncommitted changes |" in card and "| torch | 2.13.0+cpu |" in card


def test_the_words_are_true_for_points(card_of):
    pipeline = VectorPipeline(VectorNetwork(2), HalvingScheduler())
    points = {"name": "swiss_roll", "kind": "points", "sample_shape": [2], "samples": 65536}
    facts = {"config": settings(dataset_name="swiss_roll"), "training": {"points_seen": 64}, "tags": []}
    card = card_of(data=points, pipeline=pipeline, **facts)
    assert "A diffusion model of points of 2 numbers, trained with hf_diffusion on swiss_roll" in card
    assert "![Points of boots](samples.png)" in card and "single training points are reproduced" in card
    assert "| points seen | 64 |" in card and "| samples | 65,536 |" in card and "samples = pipe(" in card
    assert not re.search("image", card.split("---\n")[1] + card.split("## Limits")[1])
