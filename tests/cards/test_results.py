"""Results on a card: one set of numbers for people and for the Hub, also when later ones join."""

import math
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, metadata_load

from hf_diffusion.cards.model_card import update_card_results, write_model_card
from hf_diffusion.cards.results import eval_results, recorded_results, result_rows
from hf_diffusion.hub.card_format import parse_card
from tests.cards.vector_family import HalvingScheduler, VectorNetwork, VectorPipeline


PROTOCOL = "10,000 samples, 50 DDIM steps"
SHIPPED = sorted((Path(__file__).resolve().parents[2] / "model_cards").glob("*/README.md"))


@pytest.fixture
def folder(tmp_path):
    """A folder whose card shows no results yet."""
    (tmp_path / "loss.png").write_bytes(b"a picture")
    VectorPipeline(VectorNetwork(), HalvingScheduler()).save_pretrained(tmp_path)
    card_of(tmp_path)
    return tmp_path


def card_of(folder, metrics=None) -> str:
    facts = {"config": {"seed": 0}, "data": {"name": "digits"}, "training": {"command": "x"}, "curve": "loss.png"}
    return write_model_card(folder, **facts, metrics=metrics).read_text()


def results_in(folder):
    return ModelCard.load(folder / "README.md").data.eval_results


def test_results_stand_in_table_and_model_index_with_their_protocol(folder):
    metrics = {"FD (Fashion-MNIST features)": {"value": 0.5, "protocol": PROTOCOL, "samples": 10000}, "recall": 0.75}
    card = card_of(folder, metrics)
    assert (
        f"| FD (Fashion-MNIST features) | 0.5 | {PROTOCOL} |" in card and "quality of the samples has not" not in card
    )
    first, second = results_in(folder)
    assert (first.metric_type, first.metric_value) == ("fd-fashion-mnist-features", 0.5)
    assert first.metric_args == {"protocol": PROTOCOL, "samples": 10000}
    assert (second.metric_name, second.metric_value, second.metric_args) == ("recall", 0.75, None)


def test_a_protocol_that_many_results_share_stands_in_the_table_once_and_in_the_model_index_for_each(folder):
    metrics = {name: {"value": 1.0, "protocol": PROTOCOL} for name in ("FD", "KD")}
    table = card_of(folder, metrics | {"loss": {"value": 2.0, "protocol": "x"}}).split("## Results")[1].split("## ")[0]
    assert table.count(PROTOCOL) == 1 and "| KD | 1 | as above |" in table and "| loss | 2 | x |" in table
    assert [result.metric_args["protocol"] for result in results_in(folder)] == [PROTOCOL, PROTOCOL, "x"]


def test_a_result_that_is_not_finite_stays_out_of_the_model_index(folder):
    assert "| FD | inf |" in card_of(folder, {"FD": math.inf})
    assert "model-index" not in metadata_load(folder / "README.md")


def test_later_results_come_with_their_figures_and_leave_all_else_as_it_was(folder, tmp_path):
    path = folder / "README.md"
    path.write_text(path.read_text().replace("tags:\n", "language: en\ntags:\n") + "\n## Thanks\n\nTo all.\n")
    before = path.read_text()
    sources = tmp_path / "elsewhere"
    sources.mkdir()
    for name in ("sweep.png", "bound.png"):
        (sources / name).write_bytes(name.encode())
    update_card_results(folder, {"FD": 1.0}, "digits", {sources / "sweep.png": "Quality against steps"})
    bound = {"bpd": {"value": 3.0, "protocol": PROTOCOL}}
    update_card_results(folder, bound, "digits", {sources / "bound.png": "The bound"})
    after = path.read_text()
    results = after.split("## Results")[1].split("## ")[0]
    for name, caption in (("sweep.png", "Quality against steps"), ("bound.png", "The bound")):
        assert f"![{caption}](figures/{name})\n\n*{caption}.*\n" in results
        assert (folder / "figures" / name).read_bytes() == name.encode()
    assert "| FD | 1 |" in results and f"| bpd | 3 | {PROTOCOL} |" in results and "\n\n\n" not in results
    # Nothing else has changed but the one sentence that says that nothing was measured.
    new, text = parse_card(after, "the card")
    old, former = parse_card(before, "the card")
    text = text.replace(f"## Results{results}", "")
    (was, *_), (now, *_) = zip(*[pair for pair in zip(former.splitlines(), text.splitlines()) if pair[0] != pair[1]])
    assert "has not been measured" in was and "cannot be compared" in now
    assert len(text.splitlines()) == len(former.splitlines())
    assert {key: value for key, value in new.items() if key != "model-index"} == old
    assert {result.task_type for result in results_in(folder)} == {"unconditional-image-generation"}


def test_a_result_of_the_same_name_takes_the_place_of_the_earlier_one(folder):
    update_card_results(folder, {"FD": 1.0, "KD": 2.0}, "digits")
    card = update_card_results(folder, {"FD": 0.5}, "digits").read_text()
    assert "| FD | 0.5 |" in card and "| FD | 1 |" not in card and "| KD | 2 |" in card
    assert {r.metric_name: r.metric_value for r in results_in(folder)} == {"KD": 2.0, "FD": 0.5}


def test_the_cards_that_lie_in_the_repository_stay_to_the_letter_when_their_results_are_laid_out_anew(tmp_path):
    shown = 0
    for shipped in SHIPPED:
        if results := recorded_results(metadata_load(shipped) or {}):
            shutil.copyfile(shipped, tmp_path / "README.md")
            metrics = {r.metric_name: {"value": r.metric_value, **(r.metric_args or {})} for r in results}
            update_card_results(tmp_path, metrics, results[0].dataset_name)
            assert (tmp_path / "README.md").read_text() == shipped.read_text(), shipped
            shown += 1
    assert shown >= 7


def test_a_card_of_a_person_gets_no_results(tmp_path):
    for card in (None, "# By hand\n"):
        if card is not None:
            (tmp_path / "README.md").write_text(card)
        with pytest.raises(ValueError, match="is no card of hf_diffusion .*; add the results by hand"):
            update_card_results(tmp_path, {"FD": 1.0}, "x")


def test_a_sweep_says_its_protocol_once_and_then_what_changes():
    whole = (
        "500 samples; features F (sha256 ab); against 900 of x; DDIM, steps {}, eta 0.0, float32 on cpu; seeds 0 "
        "to 499"
    )
    metrics = {
        f"{name}, steps {steps}": {"value": 1.0, "protocol": whole.format(steps)}
        for steps in (5, 10)
        for name in ("FD", "recall")
    }
    metrics["bpd"] = {"value": 3.0, "protocol": "64 samples"}
    said = [row.split(" | ")[-1].removesuffix(" |") for row in result_rows(eval_results(metrics, None, "x"))]
    assert said == [whole.format(5), "as above", "as in the last full row, but steps 10", "as above", "64 samples"]
