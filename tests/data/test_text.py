"""Text as data: where it comes from, how it becomes tokens, what is held out, what is refused."""

import json

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from hf_diffusion.data import tokenizing
from hf_diffusion.data.loading import load_data
from hf_diffusion.data.splits import load_unaugmented
from hf_diffusion.data.text import TextData
from hf_diffusion.data.tokenizing import Encoder, character_tokenizer


LINES = [f"Line {number} says: \u00e9a, {number % 7}!\n" for number in range(100)]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("HF_DIFFUSION_CACHE", str(folder))
    return folder / "tokens"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("".join(LINES), encoding="utf-8")
    return path


def load(path, **options) -> TextData:
    return load_data(train_data_dir=str(path), **{"tokenizer": "chars", "sequence_length": 16, **options})


def whole(data: TextData) -> str:
    return "".join(data.tokenizer.batch_decode(data.fetch(range(len(data)), 0)["x_0"].tolist()))


def test_sequences_laid_end_to_end_are_the_text(file):
    data, text = load(file, random_offset=False), "".join(LINES)
    assert whole(data) == text[: len(data) * 16] and len(data) == len(text) // 16
    assert data.fetch([0], 0)["x_0"].dtype == torch.int64 and data.sample_shape == (16,)
    assert any("fill no sequence" in remark for remark in data.remarks)


def test_the_table_of_characters_says_what_the_tokenizer_says(tmp_path):
    tokenizer = character_tokenizer("abc \n\u00e9[M")
    text = "abc\n\u00e9 [cab] z"
    assert Encoder(tokenizer)(text).tolist() == tokenizer(text)["input_ids"]
    tokenizer.save_pretrained(tmp_path)
    stock = AutoTokenizer.from_pretrained(tmp_path)
    assert stock.decode(stock("ab\nc")["input_ids"]) == "ab\nc"
    assert stock.mask_token_id == 9 and stock("a[MASK]b")["input_ids"] == [4, 9, 5]


def test_every_epoch_cuts_elsewhere_and_the_same_epoch_alike(file):
    data, again = load(file, seed=3), load(file, seed=3)
    first, second = (data.fetch([2, 5], epoch)["x_0"] for epoch in (1, 2))
    assert not torch.equal(first, second) and torch.equal(first, again.fetch([2, 5], 1)["x_0"])
    mixed = data.fetch([2, 5], [1, 2])["x_0"]
    assert torch.equal(mixed[0], first[0]) and torch.equal(mixed[1], second[1])
    # also the last one has room to move
    assert data.fetch([len(data) - 1] * 40, list(range(40)))["x_0"].shape == (40, 16)
    assert not torch.equal(load(file, seed=4).fetch([2], 1)["x_0"], first[:1])


def test_parts_of_a_file_share_no_line_and_have_the_vocabulary_of_the_training(file):
    arguments = {"train_data_dir": str(file), "tokenizer": "chars", "sequence_length": 16, "split": "train[:80%]"}
    data = load_data(**arguments)
    held_out = load_unaugmented(arguments, data, "train[80%:]")
    assert held_out.tokenizer is data.tokenizer and whole(held_out) in "".join(LINES[80:])
    assert "here 20 lines of train" in held_out.summary()["splits"]
    with pytest.raises(ValueError, match="shares 10 of its"):
        load_unaugmented(arguments, data, "train[70%:]")


def test_characters_that_training_lacks_are_unknown_and_counted(tmp_path):
    (tmp_path / "train.txt").write_text("aaaa bbbb\n" * 20)
    (tmp_path / "test.txt").write_text("aaaa zz\n" * 20)
    data = load(tmp_path)
    test = load_unaugmented({"train_data_dir": str(tmp_path), "split": "train"}, data, "test")
    assert any("40 tokens (25.00%) are unknown" in remark for remark in test.remarks)
    assert data.describe()["splits"] == {"train": 20, "test": 20}


def test_tokens_are_made_once_and_mapped_from_the_cache(file, cache, monkeypatch):
    first = load(file)
    assert isinstance(first._tokens, np.memmap)
    monkeypatch.setattr(tokenizing, "_write_tokens", None)
    second = load(file)
    assert second.fingerprint == first.fingerprint and len(list(cache.iterdir())) == 1
    monkeypatch.undo()
    file.write_text("".join(LINES[1:]))
    assert load(file).fingerprint != first.fingerprint
    assert not [path for path in cache.iterdir() if path.name.startswith(".")]


def test_documents_of_a_folder_and_of_tables_end_in_a_newline_or_the_tokenizers_own_end(tmp_path):
    texts = ["one and", "two and", "six and"]
    (tmp_path / "files").mkdir()
    for text in texts:
        (tmp_path / "files" / f"{text}.txt").write_text(text)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"n": 1, "said": text + "\n"}) + "\n" for text in texts))
    datasets.Dataset.from_dict({"text": texts, "id": ["a", "b", "c"]}).to_parquet(tmp_path / "rows.parquet")
    options = {"sequence_length": 4, "random_offset": False}
    tokenizer = character_tokenizer("adenotwsix \n")
    tokenizer.add_special_tokens({"eos_token": "[END]"})
    assert (
        whole(load(tmp_path / "files", tokenizer=tokenizer, **options)) == "one and[END]six and[END]two and[END]"[:28]
    )
    assert whole(load(tmp_path / "rows.jsonl", **options)) == "one and\n\ntwo and\n\nsix and\n"[:24]
    data = load(
        tmp_path / "rows.parquet", tokenizer=character_tokenizer("adenotwsix \n"), split="train[1:]", **options
    )
    assert whole(data) == "two and\nsix " and any("with '\\n' between them" in remark for remark in data.remarks)


def test_sequences_of_a_class_hold_that_class_alone(tmp_path):
    rows = {"text": ["aaaaaaa", "bbbbb", "aaaaa", "bbbbbbbb"], "label": ["a", "b", "a", "b"]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "rows.parquet")
    tokenizer = character_tokenizer("ab")
    data = load(tmp_path / "rows.parquet", tokenizer=tokenizer, sequence_length=4, label_column=None,
                random_offset=False)  # fmt: skip
    batch = data.fetch(range(len(data)), 0)
    assert data.class_names == ["a", "b"] and batch["labels"].tolist() == [0, 0, 0, 1, 1, 1]
    texts = tokenizer.batch_decode(batch["x_0"].tolist())
    assert texts == ["aaaa"] * 3 + ["bbbb"] * 3
    assert load(tmp_path / "rows.parquet", label_column="none", sequence_length=4).class_names is None


def test_a_text_that_holds_the_mask_of_its_tokenizer_is_refused(tmp_path, cache):
    (tmp_path / "lines.txt").write_text("the [MASK] itself\n" * 9)
    words = character_tokenizer("abc")
    words.add_tokens(["itself"])
    with pytest.raises(ValueError, match=r"lines.txt hold the mask \[MASK\] itself, which stands for noise"):
        load(tmp_path / "lines.txt", tokenizer=words)
    assert not list(cache.iterdir())
    # a tokenizer of characters reads it as characters
    assert whole(load(tmp_path / "lines.txt")).startswith("the [MASK] itself")


def test_the_longest_copy_is_the_longest_stretch_that_the_data_have(file):
    data = load(file)
    encode = Encoder(data.tokenizer)
    assert data.longest_copy(encode("xx Line 12 says: yy")) == len(" Line 12 says: ") - 1
    assert data.longest_copy(encode("!!!")) == 1
    # of the data themselves: "Line 12 says" is there once, ", 5!" in many places
    assert data.longest_copy(encode(LINES[12]), but_once=True) < data.longest_copy(encode(LINES[12])) == len(LINES[12])


@pytest.mark.parametrize(
    "content, options, message",
    [
        (
            b"short",
            {},
            r"has 5 tokens, and a sequence needs 16 and 15 to move the cuts by; give more text",
        ),
        (b"\xff\xfe\x00" * 40, {}, "is not text in UTF-8 .* save it as UTF-8"),
        (b"words " * 40, {"split": "test"}, "split 'test' is unknown; lines.txt has train"),
        (b"words " * 40, {"text_column": "text"}, "text_column 'text': lines.txt holds .txt files, which have no"),
        (b"words " * 40, {"tokenizer": "no/such/folder"}, "tokenizer no/such/folder cannot be loaded"),
    ],
)
def test_texts_that_cannot_be_used_are_refused_in_a_sentence(tmp_path, content, options, message):
    (tmp_path / "lines.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "lines.txt", **options)


def test_tables_without_a_single_column_of_text_say_which_there_are(tmp_path):
    datasets.Dataset.from_dict({"one": ["a"], "two": ["b"], "n": [1]}).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match="several columns of text, one, two; choose with --text_column"):
        load(tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match="text_column 'n' is of type .* its columns of text are one, two"):
        load(tmp_path / "rows.parquet", text_column="n")


def test_a_folder_without_text_and_mixed_folders_are_refused(tmp_path):
    (tmp_path / "a.pdf").write_bytes(b"x")
    with pytest.raises(ValueError, match="holds no"):
        load(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "train.txt").write_text("a")
    with pytest.raises(ValueError, match=r"has the splits train and 1 file \(a.txt\) beside them"):
        load(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        load(tmp_path / "nothing")
