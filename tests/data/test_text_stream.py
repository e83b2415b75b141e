"""A stream of text is the same for any number of processes and wherever it is resumed."""

import itertools

import datasets
import numpy as np
import pytest
import torch

from hf_diffusion.data.loading import load_data
from hf_diffusion.data.splits import load_unaugmented
from hf_diffusion.data.text_stream import StreamingTextData
from hf_diffusion.data.tokenizing import character_tokenizer
from hf_diffusion.randomness import BatchOrder
from tests.data.making import same


TEXTS = [f"Text {number} says {'ha' * (number % 5)}, {number % 7}!" for number in range(60)]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("HF_DIFFUSION_CACHE", str(folder / "ours"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
    return folder


@pytest.fixture
def tables(tmp_path):
    """Three .jsonl files of 20 texts each."""
    for part in range(3):
        rows = datasets.Dataset.from_dict({"text": TEXTS[part::3], "n": list(range(20))})
        rows.to_json(tmp_path / "set" / f"{part}.jsonl")
    return tmp_path / "set"


def load(path, **options) -> StreamingTextData:
    return load_data(
        train_data_dir=str(path), **{"tokenizer": "chars", "sequence_length": 16, "streaming": True, **options}
    )


def batches(data, start: int, stop: int, rank: int = 0, processes: int = 1, workers: int = 0) -> list[dict]:
    order = BatchOrder(None, 0, 8 // processes, 2, rank, processes)
    return list(data.batches(order, start, stop, workers))


def rows(found: list[dict]) -> list[tuple]:
    return sorted(tuple(row) for batch in found for row in batch["x_0"].tolist())


def test_one_pass_holds_the_sequences_of_the_set_that_is_tokenised_first(tables):
    kept, stream = load(tables, streaming=False, random_offset=False), load(tables, random_offset=False)
    assert rows(list(stream.once(7))) == rows([kept.fetch(range(len(kept)), 0)])
    assert torch.equal(next(stream.once(5, 5))["x_0"], kept.fetch(range(5), 0)["x_0"])


def test_training_sees_every_sequence_of_a_file_once_in_a_pass_in_an_order_of_its_own(tables):
    data = load(tables / "0.jsonl", random_offset=False)
    wanted = list(data.once(1))
    found = list(data.batches(BatchOrder(None, 0, 1, 1, 0, 1), 0, len(wanted)))
    assert rows(found) == rows(wanted) and not all(torch.equal(a["x_0"], b["x_0"]) for a, b in zip(found, wanted))
    assert [batch["indices"].item() for batch in found] == list(range(len(wanted)))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_does_not_depend_on_processes_workers_or_where_it_was_resumed(tables, workers):
    def opened(**options):
        return load(tables, seed=3, shuffle_buffer=10, **options)

    whole = batches(opened(), 0, 12)  # over two passes
    left, right = (batches(opened(), 0, 12, rank, 2, workers) for rank in range(2))
    for one, *two in zip(whole, left, right):
        assert same(one, {key: torch.cat([part[key] for part in two]) for key in one})
    resumed = opened()
    assert all(map(same, whole[18:], batches(resumed, 9, 12, workers=workers)))
    # a pass whose length is known is not read again
    assert all(map(same, whole[22:], batches(resumed, 11, 12)))
    assert not any(map(same, whole, batches(load(tables, seed=4, shuffle_buffer=10), 0, 12)))


def test_every_pass_cuts_elsewhere_and_all_of_the_text_is_seen(tables):
    data = load(tables, shuffle_buffer=1)
    length = len(list(data.once(1)))
    found = batches(data, 0, 2 * length // 16 + 1)
    first, second = rows(found[: length // 8]), rows(found[length // 8 + 1 : 2 * length // 8])
    assert len(set(first) & set(second)) < len(first) // 2
    text = "".join(sorted("".join(data.tokenizer.batch_decode(first))))
    assert len(text) == len(first) * 16 and set(text) == set("".join(TEXTS))


def test_lines_of_files_are_streamed_in_parts_and_share_none_with_what_is_held_out(tmp_path):
    lines = [f"Line {number} of it\n" for number in range(100)]
    (tmp_path / "a.txt").write_text("".join(lines))
    arguments = {"train_data_dir": str(tmp_path / "a.txt"), "tokenizer": "chars", "sequence_length": 16}
    arguments |= {"streaming": True, "split": "train[:80%]"}
    data = load_data(**arguments)
    held_out = load_unaugmented(arguments, data, "train[80%:]")
    text = "".join(data.tokenizer.batch_decode(held_out.fetch(range(len(held_out)), 0)["x_0"]))
    assert text and text in "".join(lines[80:]) and held_out.stream.tokenizer is data.tokenizer
    assert "the first" in held_out.remarks[-1] and len(held_out) == len("".join(lines[80:])) // 16
    with pytest.raises(ValueError, match="shares rows with the training"):
        load_unaugmented(arguments, data, "train[70%:]")
    with pytest.raises(ValueError, match="split 'tset' is unknown; a.txt has train"):
        load_data(**{**arguments, "split": "tset"})


def test_parts_of_tables_are_counted_from_the_first_row(tables):
    data, held_out = load(tables, split="train[20:]"), load(tables, split="train[:20]")
    words = data.tokenizer.batch_decode(torch.cat([batch["x_0"] for batch in held_out.once(64)]))
    assert "Text 57" in "".join(words) and "Text 1 " not in "".join(words)
    assert "rows 20 to the end" in data.summary()["splits"]
    with pytest.raises(ValueError, match="not known while streaming; count rows from the first, as in train.:1000."):
        load(tables, split="train[:90%]")


def test_characters_that_the_first_documents_lack_are_counted_and_said(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("hf_diffusion.data.texts.FIRST_DOCUMENTS", 10)
    rows = {"text": ["abab" * 8] * 10 + ["abzz" * 8] * 10 + [None]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "rows.parquet")
    data = load(tmp_path / "rows.parquet")
    assert set(data.tokenizer.get_vocab()) == {"a", "b", "[UNK]", "[MASK]"}
    assert "the alphabet is that of the first 320 characters of 10 pieces" in data.remarks[0]
    list(data.once(8))
    assert data.describe()["unknown_tokens"] == 0
    batches(data, 0, 2)
    assert data.describe()["unknown_tokens"] == 160 and data.describe()["rows_without_text"] == 1
    assert "16 of 352 tokens (4.55%) that were read are unknown" in caplog.text
    assert "rows without a text are left out" in caplog.text


def test_classes_go_with_their_texts_and_must_be_known_before(tmp_path):
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["low", "high"]))
    rows = {"text": ["aaaa", "BBBB"] * 30, "label": [0, 1] * 30}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    data = load(tmp_path / "rows.parquet", label_column=None, sequence_length=8)
    assert data.class_names == ["low", "high"]
    for batch in batches(data, 0, 2):
        for ids, label in zip(batch["x_0"], batch["labels"]):
            assert set(data.tokenizer.decode(ids)) == set("aB"[label])
    data.use_classes(["new", "high", "low"])
    batch = batches(data, 0, 1)[0]
    assert set(batch["labels"].tolist()) <= {1, 2} and data.class_names == ["new", "high", "low"]
    assert all(set(data.tokenizer.decode(ids)) == {" Ba"[label]} for ids, label in zip(batch["x_0"], batch["labels"]))
    datasets.Dataset.from_dict({"text": ["a"], "label": ["low"]}).to_parquet(tmp_path / "names.parquet")
    with pytest.raises(ValueError, match="classes are unknown before the stream was read"):
        load(tmp_path / "names.parquet", label_column=None)


def test_what_no_sequence_can_be_cut_from_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(ValueError, match="fewer tokens than a sequence of 16"):
        load(tmp_path / "a.txt")
    (tmp_path / "b.txt").write_text("a [MASK] of it " * 9)
    with pytest.raises(ValueError, match="hold the mask"):
        list(load(tmp_path / "b.txt", tokenizer=_with_a_mask_of_its_own()).once(4))
    with pytest.raises(TypeError, match="cannot be read by index"):
        load(tmp_path / "b.txt").fetch([0], 0)


def _with_a_mask_of_its_own():
    tokenizer = character_tokenizer("ofmit aMASK[]")
    tokenizer.mask_token = "t"
    return tokenizer


def test_max_train_samples_takes_the_first_sequences_of_every_pass(tables):
    data = load(tables, max_train_samples=16, random_offset=False)
    first = rows(list(load(tables, random_offset=False).once(16, 16)))
    found = batches(data, 0, 2)
    assert rows(found[:2]) == rows(found[2:]) == first and not same(found[0], found[2])


def test_tokens_of_a_stream_are_those_of_transformers(tables):
    tokenizer = character_tokenizer("".join(TEXTS))
    stream = load(tables, tokenizer=tokenizer, sequence_length=8)
    words = np.concatenate([tokens for _, tokens in itertools.islice(stream._tokens(None, False), 3)])
    first = [row["text"] for row in datasets.Dataset.from_json(str(tables / "0.jsonl"))][:2]
    assert words.tolist() == [*tokenizer(first[0])["input_ids"], *tokenizer(first[1])["input_ids"]]
