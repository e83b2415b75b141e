"""Captions of images: where they come from, which one an image has, what networks get of them."""

import itertools
import json
import logging
import tarfile

import datasets
import numpy as np
import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    SiglipTextConfig,
    SiglipTextModel,
    T5Config,
    T5Model,
)

from hf_diffusion.data import caption_coders
from hf_diffusion.data.caption_coders import EmbeddingCoder, TokenCoder, fitting_length, train_tokenizer
from hf_diffusion.data.captions import Captions, class_captions, number_of, with_article
from hf_diffusion.data.loading import load_data
from hf_diffusion.data.splits import load_unaugmented
from hf_diffusion.losses.captioned import encode_text
from hf_diffusion.pipelines import pipeline_text_to_image
from tests.data.making import noise_image, parquet_of, png, same


TEXTS = ["a red square", "the blue sea, at noon", "", "a dog"]


def folder_with(root, captions: list, form: str = "jsonl"):
    for number in range(len(captions)):
        noise_image(number).save(root / f"{number}.png")
    rows = [{"file_name": f"{number}.png", "text": caption} for number, caption in enumerate(captions)]
    if form == "jsonl":
        (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        (root / "metadata.csv").write_text(
            "file_name,text\n" + "".join(f"{i}.png,{c}\n" for i, c in enumerate(captions))
        )
    return root


def caption_of(data, index: int, epoch: int = 0) -> str:
    return data.captions.texts[int(data.fetch([index], epoch)["captions"][0])]


def test_a_file_beside_the_images_and_a_parquet_column_say_the_same(tmp_path):
    for name in ("jsonl", "csv"):
        (tmp_path / name).mkdir()
    images = [{"bytes": png(noise_image(seed)), "path": None} for seed in range(3)]
    captions = ["a cat", "two dogs", "3"]
    columns = {"image": datasets.Image(), "words": datasets.Value("string")}
    table = parquet_of(tmp_path / "table.parquet", {"image": images, "words": captions}, columns)
    found = [
        load_data(train_data_dir=str(folder_with(tmp_path / "jsonl", captions)), captioned=True),
        load_data(train_data_dir=str(folder_with(tmp_path / "csv", captions, "csv")), captioned=True),
        load_data(train_data_dir=str(table), captioned=True, caption_column="words"),
    ]
    for data in found:
        assert [caption_of(data, index) for index in range(3)] == captions
    assert len({data.captions.digest() for data in found}) == 1


def test_each_of_several_captions_is_drawn_anew_in_an_epoch_and_equally_often(tmp_path):
    data = load_data(train_data_dir=str(folder_with(tmp_path, [["a", "b", "c"], ["d"], ["e", "f"]])), captioned=True)
    drawn = [[caption_of(data, index, epoch) for index in range(3)] for epoch in range(600)]
    again = data.captions.choose(np.arange(600), np.zeros(600, np.int64))
    assert [data.captions.texts[number] for number in again] == [row[0] for row in drawn]
    for name in "abc":
        # five deviations of a binomial of 600 draws
        assert abs(sum(row[0] == name for row in drawn) - 200) < 5 * (600 * 2 / 9) ** 0.5
    assert {row[1] for row in drawn} == {"d"} and {row[2] for row in drawn} == {"e", "f"}
    other = Captions([["a", "b", "c"]] * 600, seed=1).choose(np.zeros(600, np.int64), np.arange(600))
    mine = Captions([["a", "b", "c"]] * 600, seed=0).choose(np.zeros(600, np.int64), np.arange(600))
    assert 0.2 < (other == mine).mean() < 0.47


def test_images_without_a_caption_are_counted_and_named(tmp_path, caplog):
    captions = ["a cat", None, " ", "a dog", "a cat"]
    data = load_data(train_data_dir=str(folder_with(tmp_path, captions)), captioned=True)
    assert caption_of(data, 1) == caption_of(data, 2) == ""
    assert "no caption: 2 images (1.png (row 1), 2.png (row 2)), trained without a text" in caplog.text
    described = data.describe()["captions"]
    assert described["images_with_a_caption"] == 3 and described["examples"] == ["a cat", "a dog"]
    assert "3 of 5 images have some, 1 each, 2 different ones, as 'a cat', 'a dog'" in data.summary()["captions"]


def captioned_parquet(path, captions: list):
    """A table of images, each of another shade, with several captions or one."""
    images = [{"bytes": png(noise_image(seed)), "path": None} for seed in range(len(captions))]
    words = datasets.List(datasets.Value("string"))
    return parquet_of(path, {"image": images, "text": captions}, {"image": datasets.Image(), "text": words})


def streamed(path, count: int, position: int = 0, rank: int = 0, world: int = 1, workers: int = 0, coder=None):
    """The first batches of one process of a stream with captions, 4 rows of all processes."""
    data = load_data(train_data_dir=str(path), streaming=True, captioned=True, shuffle_buffer=3, seed=1)
    if coder is not None:
        data.encode_captions(coder)
    batches = data.stream(position, rank, world, 4 // world, workers)
    return list(itertools.islice(batches, count))


SEVERAL = [["a cat", "a grey cat"], ["a dog"], None, ["two cars", "cars", "a road"], ["a tree", "a tree"]]


def test_the_captions_of_a_stream_travel_with_their_images(tmp_path):
    path = captioned_parquet(tmp_path / "set.parquet", SEVERAL)
    still = load_data(train_data_dir=str(path), captioned=True).fetch(range(5), 0)["x_0"]
    allowed = [{number_of(text) for text in texts or [""]} for texts in SEVERAL]
    met: list[set[int]] = [set() for _ in SEVERAL]
    for batch in streamed(path, 25):
        for x_0, number in zip(batch["x_0"], batch["captions"].tolist()):
            (image,) = (index for index in range(5) if torch.equal(x_0, still[index]))
            assert number in allowed[image]
            met[image].add(number)
    # in twenty epochs each of several captions comes
    assert met == allowed


@pytest.mark.parametrize("workers", [0, 2])
def test_captions_of_a_stream_depend_neither_on_processes_nor_on_where_it_was_resumed(tmp_path, workers):
    path = captioned_parquet(tmp_path / "set.parquet", SEVERAL)
    coder = TokenCoder(train_tokenizer(TEXTS, 300, length=8), 8)
    whole = streamed(path, 6, coder=coder)
    halves = [streamed(path, 6, 0, rank, 2, workers, coder) for rank in range(2)]
    for batch, left, right in zip(whole, *halves):
        assert same(batch, {name: torch.cat([left[name], right[name]]) for name in batch})
    assert all(map(same, whole[3:], streamed(path, 3, 12, 0, 1, workers, coder)))
    assert {"captions", "input_ids", "attention_mask"} < set(whole[0])


def test_a_stream_knows_the_captions_of_its_first_rows_and_a_class_has_one_by_template(tmp_path, monkeypatch):
    path = captioned_parquet(tmp_path / "set.parquet", SEVERAL)
    data = load_data(train_data_dir=str(path), streaming=True, captioned=True, caption_rows=2)
    assert data.captions.texts == ["", "a cat", "a grey cat", "a dog"] and not data.captions.whole
    said = "3 different ones in the first 2 rows of the stream, as 'a cat', 'a grey cat', 'a dog'"
    assert data.summary()["captions"] == said
    other = captioned_parquet(tmp_path / "other.parquet", [["a cow"], *SEVERAL[1:]])
    assert load_data(train_data_dir=str(other), streaming=True, captioned=True).fingerprint != data.fingerprint
    nothing = load_data(
        train_data_dir=str(captioned_parquet(tmp_path / "no.parquet", [None, [" "]])), streaming=True, captioned=True
    )
    with pytest.raises(ValueError, match="none of the first 5,000 rows has a caption; choose another --caption_col"):
        nothing.captions.examples(3)
    templates = {"caption_templates": ("the digit {}", "a {}"), "captioned": True, "max_train_samples": 40}
    digits = load_data("digits", streaming=True, **templates)
    assert len(digits.captions.texts) == 21
    batch = next(digits.stream(0, batch_size=16))
    for label, number in zip(batch["labels"], batch["captions"].tolist()):
        name = digits.class_names[label]
        assert number in {number_of(f"the digit {name}"), number_of(f"a {name}")}


def test_the_embeddings_of_a_stream_are_those_that_are_cached_for_a_set(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DIFFUSION_CACHE", str(tmp_path / "cache"))
    coder = EmbeddingCoder(str(make_encoder("bert", tmp_path / "encoder", 300)), 16)
    kept = coder.rows_of(TEXTS)(torch.tensor([1, 3, 1, 2]))
    before = sorted((tmp_path / "cache").rglob("*"))
    found = coder.conditions_of([TEXTS[number] for number in (1, 3, 1, 2)])
    for name, value in kept.items():
        # of the 11 bits that float16 has
        torch.testing.assert_close(found[name], value, rtol=2e-3, atol=2e-3)
    assert sorted((tmp_path / "cache").rglob("*")) == before
    alone = coder.conditions_of([TEXTS[3]])
    torch.testing.assert_close(alone["class_labels"][0], found["class_labels"][1], rtol=1e-5, atol=1e-6)


def test_templates_make_captions_of_class_names():
    data = load_data("digits", captioned=True, caption_templates=("the digit {}", "a {}"), max_train_samples=50)
    for index in (0, 7, 33):
        name = data.class_names[data.labels[index]]
        assert {caption_of(data, index, epoch) for epoch in range(20)} == {f"the digit {name}", f"a {name}"}
    other = load_data("digits", captioned=True, caption_templates=("the digit {}",), max_train_samples=50)
    assert other.fingerprint != data.fingerprint


def test_an_article_goes_by_the_name_of_the_class_for_the_model_as_in_its_training():
    names = ["Ankle boot", "bag", "Umbrella", "unicorn", "8"]
    made = class_captions(("a {}", "A {}.", "mia {}", "such as {}"), names)
    assert [captions[0] for captions in made] == ["an Ankle boot", "a bag", "an Umbrella", "a unicorn", "a 8"]
    assert made[0][1:] == ["An Ankle boot.", "mia Ankle boot", "such as Ankle boot"]
    for name, captions in zip(names, made):
        assert pipeline_text_to_image.caption_of_class(with_article("a {}"), name) == captions[0]
    # what a pipeline of before has recorded means what it did
    assert pipeline_text_to_image.caption_of_class("a {}", "Ankle boot") == "a Ankle boot"


@pytest.mark.parametrize("form", ["tar", "folder"])
@pytest.mark.parametrize("streaming", [False, True])
def test_the_txt_files_of_a_webdataset_are_captions(tmp_path, form, streaming):
    texts, folder = {"0": "a cat\n", "1": "two dogs", "3": "7"}, tmp_path / "set"
    folder.mkdir()
    for number in range(4):
        noise_image(number).save(folder / f"{number}.png")
    for number, text in texts.items():
        (folder / f"{number}.txt").write_text(text)
    (folder / "README.txt").write_text("about the set")
    if form == "tar":
        with tarfile.open(tmp_path / "set.tar", "w") as archive:
            archive.add(folder, ".")
    path = tmp_path / ("set.tar" if form == "tar" else "set")
    data = load_data(train_data_dir=str(path), captioned=True, streaming=streaming)
    assert set(data.captions.texts) == {"", "a cat", "two dogs", "7"}
    if not streaming:
        assert [caption_of(data, i) for i in range(4)] == ["a cat", "two dogs", "", "7"]


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({}, "there are no captions: the data have none of the columns text, caption, captions, prompt, txt; name"),
        ({"caption_column": "words"}, "caption_column 'words' is not in the data set; no column of it holds texts"),
        ({"caption_column": "label"}, "caption_column 'label' is of type ClassLabel"),
        ({"caption_templates": ("a photo",)}, "'a photo' has 0 places for the name of the class; write {} once"),
        ({"caption_templates": ("a {}",), "label_column": "none"}, "digits has no classes; name their column by"),
        ({"caption_templates": ("a {} or {}",), "streaming": True}, "'a {} or {}' has 2 places for the name"),
        ({"streaming": True}, "there are no captions: the data have none of the columns"),
    ],
)
def test_captions_that_cannot_be_are_met_by_a_sentence(options, sentence):
    with pytest.raises(ValueError) as raised:
        load_data("digits", captioned=True, **options)
    assert sentence in str(raised.value)


def test_a_column_without_any_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no text in any of 2 rows; choose another --caption_column"):
        load_data(train_data_dir=str(folder_with(tmp_path, ["", " "], "jsonl")), captioned=True)


# --- what networks get ---


def test_the_tokenizer_of_captions_writes_any_text_and_gives_it_back():
    tokenizer = train_tokenizer(TEXTS, 300, length=32)
    for text in ("a red dog", "ß und 水 😀"):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True).strip() == text
    assert tokenizer("A RED dog")["input_ids"] == tokenizer("a red dog")["input_ids"]
    again = train_tokenizer(TEXTS, 300, length=32)
    assert TokenCoder(again, 8).fingerprint == TokenCoder(tokenizer, 8).fingerprint


def test_tokens_are_padded_to_one_length_and_what_is_cut_is_told(caplog):
    tokenizer = train_tokenizer(TEXTS, 300, length=32)
    length = fitting_length(tokenizer, TEXTS, 32)
    assert length % 8 == 0 and not caplog.text
    rows = TokenCoder(tokenizer, length).rows_of(TEXTS)(torch.tensor([2, 1, 1]))
    assert rows["input_ids"].shape == (3, length) and torch.equal(rows["input_ids"][1], rows["input_ids"][2])
    # the empty text is a beginning and an end
    assert rows["attention_mask"].sum(1).tolist()[0] == 2
    with caplog.at_level(logging.WARNING):
        assert fitting_length(tokenizer, TEXTS, 4) == 4
    assert "different captions have more than 4 tokens and are cut, such as" in caplog.text


def make_encoder(kind: str, folder, vocabulary: int):
    """A tiny model of transformers as it lies in a repository, with a tokenizer."""
    torch.manual_seed(0)
    small = {"vocab_size": vocabulary, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    small |= {"intermediate_size": 16, "max_position_embeddings": 32}
    model = {
        "bert": lambda: BertModel(BertConfig(**small)),
        "clip": lambda: CLIPModel(
            CLIPConfig(
                text_config={**small, "eos_token_id": 1},
                vision_config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                               "image_size": 8, "patch_size": 4, "intermediate_size": 16},
            )
        ),
        "siglip": lambda: SiglipTextModel(SiglipTextConfig(**small)),
        "t5": lambda: T5Model(T5Config(vocab_size=vocabulary, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)),
    }[kind]()  # fmt: skip
    model.save_pretrained(folder)
    train_tokenizer(TEXTS, vocabulary, length=32).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["bert", "clip", "siglip", "t5"])
def test_any_text_model_is_computed_once_and_its_embeddings_are_kept(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DIFFUSION_CACHE", str(tmp_path / "cache"))
    source = str(make_encoder(kind, tmp_path / "encoder", 300))
    coder = EmbeddingCoder(source, 16)
    numbers = torch.tensor([3, 1, 2])
    rows = coder.rows_of(TEXTS)(numbers)
    # what the pipeline computes from the text itself
    tokenizer, encoder = AutoTokenizer.from_pretrained(source), caption_coders.load_text_encoder(source)
    tokens = tokenizer([TEXTS[n] for n in numbers], padding="max_length", max_length=16, return_tensors="pt")
    with torch.no_grad():
        states, mean = encode_text(encoder, tokens["input_ids"], tokens["attention_mask"])
    # of the 11 bits that float16 has
    torch.testing.assert_close(rows["encoder_hidden_states"], states, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(rows["class_labels"], mean, rtol=2e-3, atol=2e-3)
    assert states.std() > 0.01 and not states[2, 2:].any()

    def refuse(_):
        raise AssertionError("the encoder was loaded again")

    monkeypatch.setattr(caption_coders, "load_text_encoder", refuse)
    again = EmbeddingCoder(source, 16).rows_of(TEXTS)(numbers)
    assert all(torch.equal(again[name], rows[name]) for name in rows)
    with pytest.raises(AssertionError, match="loaded again"):
        EmbeddingCoder(source, 16).rows_of([*TEXTS, "one more"])


def test_another_encoder_has_another_fingerprint(tmp_path):
    one, other = (make_encoder("bert", tmp_path / name, 300) for name in ("one", "other"))
    assert caption_coders.encoder_fingerprint(str(one)) == caption_coders.encoder_fingerprint(str(other))
    torch.manual_seed(1)
    BertModel(BertModel.from_pretrained(other).config).save_pretrained(other)
    assert caption_coders.encoder_fingerprint(str(one)) != caption_coders.encoder_fingerprint(str(other))


def test_what_is_no_text_model_is_met_by_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="text_encoder .* cannot be opened: .*; give the folder or Hub id of a text"):
        caption_coders.load_text_encoder(str(tmp_path))


def test_held_out_images_get_conditions_by_the_same_coder():
    arguments = {"dataset_name": "digits", "captioned": True, "caption_templates": ("the digit {}",)}
    data = load_data(**arguments, split="train[:80%]", max_train_samples=30)
    tokenizer = train_tokenizer(data.captions.texts, 300, length=8)
    data.encode_captions(TokenCoder(tokenizer, 8))
    held_out = load_unaugmented({**arguments, "split": "train[:80%]"}, data, "train[80%:]")
    batch = held_out.fetch([0, 1], 0)
    expected = [f"the digit {held_out.class_names[label]}" for label in batch["labels"]]
    tokens = tokenizer(expected, padding="max_length", max_length=8, return_tensors="pt")
    assert torch.equal(batch["input_ids"], tokens["input_ids"])
