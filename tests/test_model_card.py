import ast
import json
import math
import re
import subprocess

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, metadata_load

from hf_diffusion import (
    ADMClassifier,
    ADMGenerator,
    ADMUNet2DModel,
    ClassifierFreeGuidancePipeline,
    ClassifierGuidancePipeline,
    DDGANGenerator,
    DDGANPipeline,
    DDGANScheduler,
    DDIMEtaScheduler,
)
from hf_diffusion.citations import citations
from hf_diffusion.config.training import TrainingConfig, config_to_dict, parse_config
from hf_diffusion.environment import environment
from hf_diffusion.hub.card_merge import name_repository
from hf_diffusion.model_card import END, START, NearestImages, update_card_results, write_model_card


NAMES = ["T-shirt/top", "Trouser", 'the "Bag"', "Sandal", "Coat"]
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
PROTOCOL = "10,000 samples, 50 DDIM steps"


def settings(**values):
    return config_to_dict(
        TrainingConfig(**{"dataset_name": "zalando-datasets/fashion_mnist", "max_train_steps": 3000, **values})
    )


@pytest.fixture
def folder(tmp_path):
    """What a saved pipeline looks like to the card."""
    folder = tmp_path / "boots"
    (folder / "unet").mkdir(parents=True)
    names = dict(enumerate(NAMES))
    index = {"_class_name": ["pipeline_classifier_free_guidance", "ClassifierFreeGuidancePipeline"], "id2label": names}
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "unet" / "config.json").write_text(json.dumps({"num_class_embeds": 5, "null_class": True}))
    for name in ("samples.png", "loss.png"):
        (folder / name).write_bytes(b"a picture")
    return folder


def card_of(folder, **changes):
    arguments = {"config": settings(), "data": DATA, "training": RUN, "images": ["samples.png"], "curve": "loss.png"}
    return write_model_card(folder, **{**arguments, **changes}).read_text()


def headings(card):
    return [line[3:] for line in card.splitlines() if line.startswith("## ")]


def code_blocks(card):
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


def test_the_card_shows_pictures_use_reproduction_and_limits(folder):
    card = card_of(folder)
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
    everything = card_of(
        folder, metrics={"FD": 1.0}, citations=["@misc{a}"], nearest=NearestImages("loss.png", "Far away.")
    )
    assert headings(everything) == ["Results", "Training curve", "Use", "Reproduce", "Limits", "Citation"]
    limits = everything.split("## Limits")[1]
    assert "- Far away." in limits and "](loss.png)" in limits and "@misc{a}" in limits
    assert "has not been measured" not in limits
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "loss.png",
        "model_index.json",
        "samples.png",
        "unet",
    ]


def test_what_is_not_known_is_left_out_and_nothing_is_asked(folder):
    for card in (
        card_of(folder),
        card_of(folder, data={}, training={}, images=[], curve=None),
        card_of(folder, metrics={"FD": 1.0}),
    ):
        card = re.sub(r"```yaml.*?```", "", card, flags=re.DOTALL)  # settings may be null
        assert not re.search(r"TODO|More Information|None|\bnan\b|\[\]|\{\}|\{\{|\{%", card)
        assert "\n\n\n" not in card.replace("\n\n\n\n</details>", "")  # no holes where something was left out


def test_metadata_name_library_task_tags_and_the_data_set_of_the_hub(folder):
    card_of(folder)
    assert metadata_load(folder / "README.md") == {
        "library_name": "diffusers",
        "pipeline_tag": "unconditional-image-generation",
        "datasets": ["zalando-datasets/fashion_mnist"],
        "tags": ["hf_diffusion", "custom_code", "ddpm"],
        "widget": [{"text": "samples", "output": {"url": "samples.png"}}],
    }


@pytest.mark.parametrize(
    "values", [{"dataset_name": "digits"}, {"dataset_name": None, "train_data_dir": "/home/me/pictures"}]
)
def test_data_that_are_not_on_the_hub_are_not_named_as_a_data_set_of_it(folder, values):
    card_of(folder, config=settings(**values))
    assert "datasets" not in metadata_load(folder / "README.md")


def test_a_licence_is_stated_only_when_given(folder):
    assert "No licence is stated for the weights" in card_of(folder)
    assert "No licence is stated for the weights" not in card_of(folder, license="mit")
    assert metadata_load(folder / "README.md")["license"] == "mit"
    assert "Licence of the training data: CC BY 4.0." in card_of(folder, data={**DATA, "license": "CC BY 4.0"})


def test_results_stand_in_table_and_model_index_with_their_protocol(folder):
    metrics = {"FD (Fashion-MNIST features)": {"value": 0.5, "protocol": PROTOCOL, "samples": 10000}, "recall": 0.75}
    card = card_of(folder, metrics=metrics)
    assert f"| FD (Fashion-MNIST features) | 0.5 | {PROTOCOL} |" in card and "has not been measured.\n" not in card
    first, second = ModelCard.load(folder / "README.md").data.eval_results
    assert (first.metric_type, first.metric_value) == ("fd-fashion-mnist-features", 0.5)
    assert first.metric_args == {"protocol": PROTOCOL, "samples": 10000}
    assert (second.metric_name, second.metric_value, second.metric_args) == ("recall", 0.75, None)


def test_a_protocol_that_many_results_share_stands_in_the_table_once_and_in_the_model_index_for_each(folder):
    metrics = {name: {"value": 1.0, "protocol": PROTOCOL} for name in ("FD", "KD")} | {
        "loss": {"value": 2.0, "protocol": "x"}
    }
    card = card_of(folder, metrics=metrics)
    table = card.split("## Results")[1].split("## ")[0]
    assert table.count(PROTOCOL) == 1 and "| KD | 1 | as above |" in table and "| loss | 2 | x |" in table
    results = ModelCard.load(folder / "README.md").data.eval_results
    assert [result.metric_args["protocol"] for result in results] == [PROTOCOL, PROTOCOL, "x"]


def test_later_results_come_with_their_figures_which_later_ones_keep(folder, tmp_path):
    card_of(folder)
    for name in ("sweep.png", "bound.png"):
        (tmp_path / name).write_bytes(name.encode())
    update_card_results(folder, {"FD": 1.0}, "digits", {tmp_path / "sweep.png": "Quality against steps"})
    update_card_results(
        folder, {"bpd": {"value": 3.0, "protocol": PROTOCOL}}, "digits", {tmp_path / "bound.png": "The bound"}
    )
    card = (folder / "README.md").read_text()
    results = card.split("## Results")[1].split("## ")[0]
    for name, caption in (("sweep.png", "Quality against steps"), ("bound.png", "The bound")):
        assert f"](figures/{name})" in results and f"*{caption}.*" in results
        assert (folder / "figures" / name).read_bytes() == name.encode()
    assert "| FD | 1 |" in results and "| bpd | 3 |" in results
    assert headings(card) == ["Results", "Training curve", "Use", "Reproduce", "Limits"]
    assert "has not been measured.\n-" not in card.split("## Limits")[1].split("Whether")[0]
    task = ModelCard.load(folder / "README.md").data.eval_results[0].task_type
    assert task == "unconditional-image-generation"


def test_nothing_that_a_run_knows_is_taken_for_a_template_or_breaks_a_table(folder):
    data = {
        "name": "{{ 7 * 7 }} {% for %}",
        "remarks": ["a | b"],
        "license": "{{ config }}",
        "considerations": ["{{ self }}"],
    }
    card = card_of(folder, data=data, citations=["@misc{{{ 1 }}}"])
    assert "on {{ 7 * 7 }} {% for %} for" in card and "49" not in card and "| remarks | a \\| b |" in card
    assert "> {{ self }}" in card and "@misc{{{ 1 }}}" in card


def test_captions_stand_under_the_pictures_and_in_the_gallery(folder):
    card = card_of(folder, images={"samples.png": "One row a class"})
    assert "](samples.png)\n\n*One row a class.*\n" in card
    assert metadata_load(folder / "README.md")["widget"] == [
        {"text": "One row a class", "output": {"url": "samples.png"}}
    ]


def test_energy_is_on_the_card_where_it_was_read(folder):
    assert "energy" not in card_of(folder, training={**RUN, "energy": {}})
    both = {"CPU packages (RAPL)": 1.8e6, "GPUs (NVML)": 7.2e6}
    card = card_of(folder, training={**RUN, "energy": both})
    assert "| energy | 2.5 kWh: 0.5 kWh CPU packages (RAPL), 2 kWh GPUs (NVML) |" in card


def test_licence_biases_and_limits_of_the_data_are_quoted_with_their_place(folder):
    facts = {"license": "mit", "data_card": "https://x.y/z", "considerations": ["Only one studio.", "Few shoes."]}
    card = card_of(folder, data={**DATA, **facts})
    assert "- Licence of the training data: mit, as stated by https://x.y/z." in card
    assert "(from https://x.y/z):\n\n  > Only one studio.\n\n  > Few shoes.\n" in card
    assert "considerations" not in card and "| data card" not in card


METHODS = {
    "ddpm": ("ddpm", settings(), {"ho2020denoising", "dhariwal2021diffusion"}),
    "what the settings use": (
        "ddpm",
        {"sampler": "ddim", "beta_schedule": "squaredcos_cap_v2", "class_conditional": True, "label_dropout": 0.1}
        | {"prediction_type": "v_prediction", "loss_weighting": "min_snr", "rescale_betas_zero_snr": True},
        {"ho2020denoising", "dhariwal2021diffusion", "song2021denoising", "nichol2021improved", "ho2022classifier"}
        | {"salimans2022progressive", "hang2023efficient", "lin2024common"},
    ),
    "ddgan": (
        "ddgan",
        {"divergence": "js", "r1_gamma": None},
        {"xiao2022tackling", "song2021score", "mescheder2018which"},
    ),
    "wasserstein": (
        "ddgan",
        {"divergence": "wasserstein", "r1_gamma": 0, "wgan_gp": 10, "spectral_norm": True},
        {
            "xiao2022tackling",
            "song2021score",
            "arjovsky2017wasserstein",
            "gulrajani2017improved",
            "miyato2018spectral",
        },
    ),
}


@pytest.mark.parametrize(("method", "config", "keys"), METHODS.values(), ids=METHODS)
def test_the_papers_of_what_a_run_has_used_are_cited_and_no_others(method, config, keys):
    entries = citations(method, config)
    assert {re.match(r"@\w+\{(\w+),", entry)[1] for entry in entries} == keys
    for entry in entries:
        assert entry.count("{") == entry.count("}") and all(
            field in entry for field in ("title=", "author=", "year=", "eprint=")
        )


def test_a_result_that_is_not_finite_stays_out_of_the_model_index(folder):
    assert "| FD | inf |" in card_of(folder, metrics={"FD": math.inf})
    assert "model-index" not in metadata_load(folder / "README.md")


def test_the_settings_on_the_card_give_the_same_run_again(folder, tmp_path):
    config = settings(learning_rate=1e-3, report_to=("wandb",))
    (tmp_path / "config.yaml").write_text(
        re.search(r"```yaml\n(.*?)```", card_of(folder, config=config), re.DOTALL)[1]
    )
    assert config_to_dict(parse_config(TrainingConfig, ["--config", str(tmp_path / "config.yaml")])) == config


def test_the_code_on_the_card_pins_the_revision_and_names_classes(folder):
    stock, installed = code_blocks(card_of(folder, repo_id="me/boots", revision="step-3000"))
    for code in (stock, installed):
        ast.parse(code)
        assert '"me/boots"' in code and 'revision="step-3000"' in code and "guidance_scale" in code
    assert "trust_remote_code=True" in stock and "trust_remote_code" not in installed
    assert 'class_labels=["T-shirt/top", "Trouser", "the \\"Bag\\"", "Sandal"]' in stock


def test_an_unconditional_model_of_labelled_data_is_not_called_class_conditional(folder):
    (folder / "unet" / "config.json").write_text(json.dumps({"num_class_embeds": None}))
    card = card_of(folder)
    assert "A diffusion model of" in card and "class_labels" not in card and "Trouser" not in card
    assert "batch_size=4" in card


def test_a_folder_without_a_known_model_gets_no_use_section(folder):
    (folder / "model_index.json").unlink()
    card = card_of(folder, kind="noise-aware classifier", tags=["classifier"])
    assert "## Use" not in card and "noise-aware classifier of 28x28 images" in card
    assert metadata_load(folder / "README.md")["tags"] == ["hf_diffusion", "classifier"]


def test_a_stock_pipeline_is_loaded_from_diffusers_without_trust(folder):
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline"}))
    (code,) = code_blocks(card_of(folder))
    ast.parse(code)
    assert "from diffusers import DDPMPipeline" in code and "trust_remote_code" not in code
    assert "\n\n\n" not in card_of(folder)
    assert "custom_code" not in metadata_load(folder / "README.md")["tags"]


def small_unet(classes: bool) -> ADMUNet2DModel:
    return ADMUNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, model_channels=32, channel_mult=(1,), num_res_blocks=1,
        attention_resolutions=(), **({"num_class_embeds": 5, "null_class": True} if classes else {}),
    )  # fmt: skip


def small_classifier() -> ADMClassifier:
    schedule = {"num_train_timesteps": 1000, "beta_schedule": "linear"}
    return ADMClassifier(
        sample_size=8, in_channels=1, num_classes=5, model_channels=32, channel_mult=(1,), num_res_blocks=1, attention_resolutions=(),
        num_head_channels=32, id2label=dict(enumerate(NAMES)), noise_schedule=schedule,
    )  # fmt: skip


def small_generator(classes: bool) -> DDGANGenerator:
    labels = {"num_class_embeds": 5} if classes else {}
    return DDGANGenerator(
        sample_size=8, in_channels=1, model_channels=8, channel_mult=(1, 2), num_res_blocks=1, **labels
    )


names = dict(enumerate(NAMES))
PIPELINES = {
    "class-conditional": lambda: ClassifierFreeGuidancePipeline(small_unet(True), DDIMEtaScheduler(), id2label=names),
    "unconditional": lambda: ClassifierFreeGuidancePipeline(small_unet(False), DDIMEtaScheduler()),
    "guided by a classifier": lambda: ClassifierGuidancePipeline(
        small_unet(False), small_classifier(), DDIMEtaScheduler()
    ),
    "guided by nothing yet": lambda: ClassifierGuidancePipeline(small_unet(True), None, DDIMEtaScheduler()),
    "few steps": lambda: DDGANPipeline(small_generator(True), DDGANScheduler(4), id2label=names),
    "few steps, from a diffusion model": lambda: DDGANPipeline(
        ADMGenerator.from_denoiser(
            small_unet(True), DDIMEtaScheduler().alphas_cumprod, "epsilon", DDGANScheduler(4).alpha_bar[1:]
        ),
        DDGANScheduler(4),
        id2label=names,
    ),
    "few steps, no classes": lambda: DDGANPipeline(small_generator(False), DDGANScheduler(2)),
}


@pytest.mark.parametrize("make", PIPELINES.values(), ids=PIPELINES)
def test_the_code_on_the_card_runs_as_it_stands(tmp_path, monkeypatch, make):
    torch.manual_seed(0)
    pipe = make()
    pipe.save_pretrained(tmp_path / "boots")
    stock, installed = code_blocks(card_of(tmp_path / "boots", images=[], curve=None))
    assert ("class_labels" in installed) == (pipe.num_classes is not None)
    assert stock.split(")\n", 1)[1].splitlines()[-1] == installed.splitlines()[-1]  # the same call in both forms
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(installed, names)
    assert type(names["pipe"]) is type(pipe) and [image.size for image in names["images"]] == [(8, 8)] * 4


def test_the_card_of_a_classifier_guides_a_diffusion_model_with_it(tmp_path, monkeypatch):
    torch.manual_seed(0)
    small_classifier().save_pretrained(tmp_path / "judge")
    PIPELINES["unconditional"]().save_pretrained(tmp_path / "runs" / "diffusion")
    card = card_of(tmp_path / "judge", images=[], curve=None, kind="classifier of noisy images")
    assert "classifier of noisy images of 28x28 with" in card
    assert "(beta_schedule='linear', num_train_timesteps=1000)" in card and "0 T-shirt/top, 1 Trouser" in card
    assert "The quality of the samples" not in card and "pipeline_tag" not in metadata_load(
        tmp_path / "judge/README.md"
    )
    (code,) = code_blocks(card)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    assert isinstance(names["pipe"], ClassifierGuidancePipeline) and len(names["images"]) == 4
    renamed = name_repository(card, "me/judge", "v1")
    assert 'ADMClassifier.from_pretrained("me/judge", revision="v1")' in renamed
    assert "ClassifierGuidancePipeline.from_pretrained(diffusion_model," in renamed  # that is another repository


def test_text_outside_the_markers_survives_a_second_run_and_text_inside_is_renewed(folder):
    card = card_of(folder, metrics={"FD": 9.0})
    path = folder / "README.md"
    path.write_text(
        card.replace(START, f"Please cite us.\n\n{START}").replace("3,000 steps", "77 steps")
        + "\n## Thanks\n\nto all.\n"
    )
    again = card_of(folder)
    body = again.split("---\n", 2)[2]
    assert body.startswith("\nPlease cite us.\n\n" + START) and body.endswith(f"{END}\n## Thanks\n\nto all.\n")
    assert "3,000 steps" in body and "77 steps" not in body and "| FD |" not in body
    assert "model-index" not in metadata_load(path)  # results of earlier weights
    assert card_of(folder) == again


def test_metadata_that_people_add_survive_and_a_given_licence_wins(folder):
    card_of(folder)
    path = folder / "README.md"
    theirs = {
        "license": "cc-by-4.0",
        "language": "en",
        "tags": ["ddpm", "fashion"],
        "co2_eq_emissions": {"emissions": 3},
    }
    path.write_text(f"---\n{yaml.safe_dump(theirs)}---\n{path.read_text().split('---', 2)[2].lstrip()}")
    card_of(folder)
    assert (
        metadata_load(path).items() >= {**theirs, "tags": ["hf_diffusion", "custom_code", "ddpm", "fashion"]}.items()
    )
    card_of(folder, license="mit")
    assert metadata_load(path)["license"] == "mit"


@pytest.mark.parametrize(
    "text",
    [
        "# Our model\n\nBy hand.",
        "---\nlicense: mit\n---\n# Our model\n\nBy hand.\n",
        "\r\n---\r\na: 1\r\n---\r\n# Our model\r\n\r\nBy hand.",
    ],
)
def test_a_card_written_by_hand_keeps_its_text_before_the_generated_part(folder, text):
    (folder / "README.md").write_bytes(text.encode())
    body = card_of(folder).split("---\n", 2)[2]
    assert body.split()[:6] == ["#", "Our", "model", "By", "hand.", "<!--"] and body.count(START) == 1
    assert card_of(folder).split("---\n", 2)[2] == body


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda card: card.replace(END, ""), "markers .* once each"),
        (lambda card: card + START + END, "markers .* once each"),
        (lambda card: card.replace(START, "X").replace(END, START).replace("X", END), "markers .* once each"),
        (lambda card: "---\ntags: [\n---\n", "are not valid YAML"),
        (lambda card: "---\n- a\n---\n", "must be `key: value` lines"),
    ],
)
def test_a_damaged_card_is_refused_and_left_as_it_is(folder, damage, message):
    path = folder / "README.md"
    path.write_text(damage(card_of(folder)))
    before = path.read_text()
    with pytest.raises(ValueError, match=message):
        card_of(folder)
    assert path.read_text() == before


@pytest.mark.parametrize("image", ["nowhere.png", "/etc/hostname"])
def test_a_picture_that_is_not_in_the_folder_is_refused(folder, image):
    with pytest.raises(ValueError, match=f"{image}.*relative to the folder"):
        card_of(folder, images=[image])


def test_the_environment_names_versions_hardware_and_the_state_of_the_code(tmp_path):
    outside = environment(tmp_path)
    assert outside["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert outside["cpu"] and outside["cpu_cores"] >= 1
    assert not any(name.startswith("git") for name in outside)

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        return subprocess.run(
            ["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    git("init", "-q")
    assert not any(name.startswith("git") for name in environment(tmp_path))  # no commit yet
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("commit", "-q", "-m", "first")
    clean = environment(tmp_path)
    assert (clean["git_commit"], clean["git_dirty"]) == (git("rev-parse", "HEAD").strip(), False)
    (tmp_path / "file").write_text("b")
    assert environment(tmp_path)["git_dirty"] is True


def test_commit_and_uncommitted_changes_are_on_the_card(folder):
    state = {"git_commit": "abc123", "git_dirty": True, "git_repository": "boots", "versions": {"torch": "2.13.0+cpu"}}
    card = card_of(folder, training={**RUN, **state})
    assert "| git commit | `abc123` of boots, with uncommitted changes |" in card and "| torch | 2.13.0+cpu |" in card
