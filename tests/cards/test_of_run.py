"""The card of a training run: what a run says of itself, and the pictures of its pipeline."""

import re
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from huggingface_hub import metadata_load
from PIL import Image

from hf_diffusion import ClassifierFreeGuidancePipeline, DDGANPipeline, DDGANScheduler, DDIMEtaScheduler
from hf_diffusion.cards import of_run
from hf_diffusion.cards.of_run import RunFacts, draw_run_pictures, launch_command, saved_pipeline, write_run_card
from hf_diffusion.cards.pictures import GUIDANCE_SCALES, _nearest_grid, draw_pictures
from hf_diffusion.config.run_options import TrainingConfig
from hf_diffusion.config.shared_options import DataOptions
from hf_diffusion.data.images import load_images
from hf_diffusion.data.points import load_points
from hf_diffusion.evaluation.measures import Evaluation, Measure
from hf_diffusion.evaluation.protocol import protocol_text
from hf_diffusion.figures.grid import labelled_grid
from hf_diffusion.sampling.drawing import draw
from tests.cards import small
from tests.cards.vector_family import HalvingScheduler, VectorNetwork, VectorPipeline


@dataclass(kw_only=True)
class Settings(TrainingConfig, DataOptions):
    """A family that lives in this file."""

    method: ClassVar[str] = "halving"
    kind: ClassVar[str] = "halving model"
    tags: ClassVar[tuple[str, ...]] = ("halves",)

    def papers(self) -> tuple[str, ...]:
        return ("karras2022elucidating", "@misc{zeno450halves,\n  title={On Arrows}\n}")

    def sampling_options(self) -> dict[str, Any]:
        return {"halvings": 3}


@dataclass(kw_only=True)
class GuidedSettings(Settings):
    """The same with the options of guided pipelines."""

    def sampling_options(self) -> dict[str, Any]:
        return {"num_inference_steps": 2, "guidance_scale": 1.5}


def facts_of(config: TrainingConfig, data, **changes) -> RunFacts:
    facts = RunFacts(
        config=config,
        data=data.describe(),
        command="accelerate launch training/train_x.py",
        steps=6,
        global_batch=8,
        processes=2,
        wall_time_s=3600.04,
        parameters=1_500_000,
    )
    return replace(facts, **changes)


def settings(cls=Settings, **values) -> TrainingConfig:
    return cls(**{"dataset_name": "digits", "max_train_steps": 6, "num_sample_images": 12, "seed": 3, **values})


@pytest.fixture(scope="module")
def digits():
    return load_images("digits", max_train_samples=40)


@pytest.fixture(scope="module")
def guided():
    """Ten classes of digits and "no class"."""
    torch.manual_seed(0)
    unet = small.ADMUNet2DModel(**small.ADM, out_channels=1, num_class_embeds=10, null_class=True)
    return ClassifierFreeGuidancePipeline(unet, DDIMEtaScheduler(), id2label={i: str(i) for i in range(10)})


@pytest.fixture(scope="module")
def drawn(guided, digits, tmp_path_factory):
    """(folder, pictures) of a finished run."""
    folder = tmp_path_factory.mktemp("run")
    guided.save_pretrained(folder)
    (folder / "samples").mkdir()
    for name in ("ema-00000003.png", "ema-00000006.png", "raw-00000006.png"):
        Image.new("L", (8, 8)).save(folder / "samples" / name)
    return folder, draw_run_pictures(facts_of(settings(GuidedSettings), digits), folder, digits, guided)


def test_the_command_on_the_card_starts_as_many_processes():
    script = ["train_x.py", "--split", "train[:80%]"]
    assert launch_command(script, on_cpu=True) == "accelerate launch training/train_x.py --split 'train[:80%]'"
    assert launch_command(script, 8).startswith("accelerate launch --multi_gpu --num_processes 8 training/train_x.py")
    on_cpus = launch_command(script, 2, on_cpu=True)
    assert on_cpus.startswith("ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 ")


def test_the_card_tells_what_the_run_and_its_family_say(drawn, digits, guided):
    folder, pictures = drawn
    evaluation = Evaluation({"fd": Measure("FD-40", 1.25, better="lower")}, {"count": 40})
    facts = facts_of(settings(GuidedSettings), digits, joules={"GPUs (NVML)": 7.2e6}, skipped=1, started_from="a/b")
    write_run_card(replace(facts, evaluations=[evaluation]), folder, guided, pictures)
    card = (folder / "README.md").read_text()
    rows = ["method | halving", "steps | 6", "images seen | 48", "global batch | 8", "processes | 2"]
    rows += ["energy | 2 kWh GPUs (NVML)", "wall time | 1 h 0 min", "parameters | 1,500,000", "skipped steps | 1"]
    for row in [*rows, "started from | a/b"]:
        assert f"| {row} |" in card, row
    assert "class-conditional halving model of 8x8 images with 1.5 M parameters" in card
    assert f"| FD-40 | 1.25 | {protocol_text({'count': 40})} |" in card and "title={On Arrows}" in card
    assert re.findall(r"^@\w+\{(\w+),", card, re.MULTILINE) == ["karras2022elucidating", "zeno450halves"]
    assert metadata_load(folder / "README.md")["tags"] == ["hf_diffusion", "custom_code", "halves"]
    shown = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", card)
    assert shown == ["samples/ema-00000006.png", "samples/guidance.png", "samples/nearest.png"]
    said = "Samples, a row for each class: steps 2, guidance_scale 1.5, averaged weights, seeds from 3 on"
    assert f"*{said}.*" in card and "From each of 12 samples to the nearest of 40 training images" in card
    # Those of another step are not: the next push does without.
    write_run_card(facts, folder, guided)
    assert "FD-40" not in (folder / "README.md").read_text()


def test_a_pushed_run_names_its_repository_and_tag(drawn, digits, guided):
    config = settings(GuidedSettings, push_to_hub=True, hub_model_id="me/halves", hub_license="mit")
    card = write_run_card(facts_of(config, digits), drawn[0], guided).read_text()
    assert '"me/halves",\n    revision="step-00000006",' in card and "\nlicense: mit\n" in card


def test_the_rows_of_the_picture_of_guidance_are_what_the_pipeline_draws_with_these_scales(drawn, guided):
    rows = [draw(guided, range(3, 13), range(10), num_inference_steps=2, guidance_scale=w) for w in GUIDANCE_SCALES]
    labels = {"row_labels": ["w = 1", "w = 1.5", "w = 2", "w = 4"], "column_labels": [str(n) for n in range(10)]}
    expected = labelled_grid(np.concatenate(rows), 10, **labels)
    with Image.open(drawn[0] / "samples" / "guidance.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture), np.asarray(expected))
    assert "the classes 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 from left to right" in drawn[1].captions["samples/guidance.png"]


def test_the_rows_of_predictions_are_what_the_network_says_and_the_last_is_the_result(digits, tmp_path):
    pipe = DDGANPipeline(small.generator(False), DDGANScheduler(4))
    pictures = draw_pictures(tmp_path, pipe, digits, 10, seed=3, options={})
    result = draw(pipe, range(3, 13), None)
    calls = []
    hook = pipe.generator.register_forward_hook(lambda module, given, output: calls.append(output[0]))
    draw(pipe, range(3, 13), None, micro_batch_size=10)
    hook.remove()
    rows = [digits.to_samples({"x_0": calls[n - 1]}) for n in (1, 2, 4)]
    expected = labelled_grid(np.concatenate(rows), 10, ["1 step", "2 steps", "4 steps"])
    with Image.open(tmp_path / "samples" / "steps.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture), np.asarray(expected))
    # The last step adds no noise.
    np.testing.assert_array_equal(rows[-1], result)
    assert list(pictures.captions) == ["samples/steps.png"]
    assert "after 1, 2, 4 of its 4 steps" in pictures.captions["samples/steps.png"]


def test_pairs_stand_one_above_the_other_the_nearest_first(digits, tmp_path):
    samples = np.arange(24, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 1), dtype=np.uint8)
    _nearest_grid(samples, samples + 100, np.arange(24)[::-1].astype(float), digits, tmp_path / "x.png")
    first, second = samples[:13:-1], samples[13:3:-1]
    expected = labelled_grid(
        np.concatenate([first, first + 100, second, second + 100]), 10, ["samples", "training data"] * 2
    )
    with Image.open(tmp_path / "x.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture), np.asarray(expected))


def test_a_family_of_points_without_guidance_and_callback_has_pictures_of_points(tmp_path):
    torch.manual_seed(0)
    data, pipe = load_points("swiss_roll", max_train_samples=100), VectorPipeline(VectorNetwork(2), HalvingScheduler())
    pictures = draw_pictures(tmp_path, pipe, data, 20, seed=0, options={"halvings": 3})
    assert pictures.captions == {} and "100 training points" in pictures.nearest.sentence
    facts = facts_of(settings(dataset_name="swiss_roll"), data)
    pipe.save_pretrained(tmp_path)
    (tmp_path / "samples" / "raw-00000006.png").write_bytes(b"a plot")
    card = write_run_card(facts, tmp_path, pipe, pictures).read_text()
    assert "*Samples: halvings 3, averaged weights, seeds from 3 on.*" in card and "| points seen | 48 |" in card
    assert "*The samples that are nearest to a training point, and those points.*\n" in card
    assert not re.search("image|left to right| row |above", card.split("## Reproduce")[0] + card.split("## Limits")[1])
    pairs = np.concatenate([draw(pipe, range(20), None, halvings=3), data.to_samples(data.fetch(range(20), 0))])
    with Image.open(tmp_path / pictures.nearest.picture) as picture:
        assert picture.size == data.picture(pairs, 10, ["samples", "training data"] * 2).size


def test_pictures_that_cannot_be_drawn_cost_a_warning_and_not_the_card(drawn, digits, guided, monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(of_run, "draw_pictures", fail)
    facts = facts_of(settings(GuidedSettings), digits)
    pictures = draw_run_pictures(facts, drawn[0], digits, guided)
    assert pictures is None and "the card does without pictures" in caplog.text and "out of memory" in caplog.text
    card = write_run_card(facts, drawn[0], guided, pictures).read_text()
    assert "has not been measured, unless a result" in card


def test_the_pipeline_of_a_folder_is_found_also_of_a_family_of_its_own(tmp_path):
    assert saved_pipeline(tmp_path) is None
    VectorPipeline(VectorNetwork(), HalvingScheduler()).save_pretrained(tmp_path)
    assert isinstance(saved_pipeline(tmp_path), VectorPipeline)
