"""train_text.py: every noise and objective, resumed bit for bit, measured, shared, sampled."""

import json
import re
import subprocess
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM

from hf_diffusion.cli import main as command_line
from hf_diffusion.config.preset import Circumstances
from hf_diffusion.data.tokenizing import character_tokenizer
from hf_diffusion.hub.loading import load_pipeline
from hf_diffusion.pipelines.pipeline_discrete_text import DiscreteTextPipeline
from hf_diffusion.training import train_text
from tests.hub.test_push import connect
from tests.launching import ENVIRONMENT, REPO, launcher, run_claims
from tests.training.interruptions import stop_after


TINY = """
    --sequence_length 16 --hidden_size 16 --num_layers 1 --num_attention_heads 2 --train_batch_size 8
    --max_train_steps 4 --lr_warmup_steps 0 --sample_steps none --num_sample_images 2 --logging_steps 1
    --checkpointing_steps 1 --num_inference_steps 4
""".split()
WORDS = "the cat sat on the mat, and the dog saw it.\n"


@pytest.fixture(scope="module", autouse=True)
def text(tmp_path_factory) -> Path:
    """A file of 60 lines; the cache of tokens is beside it."""
    folder = tmp_path_factory.mktemp("text")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DIFFUSION_CACHE", str(folder / "cache"))
        (folder / "cats.txt").write_text(WORDS * 60)
        yield folder / "cats.txt"


def trained(folder: Path, text: Path, *flags: str) -> Path:
    assert train_text.main([*TINY, "--train_data_dir", str(text), "--output_dir", str(folder), *flags]) == 0
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next((folder / "transformer").glob("*.safetensors")))


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    flags = ["--split", "train[:80%]", "--eval_split", "train[80%:]", "--sample_steps", "2", "--eval_steps", "2"]
    return trained(folder, text, *flags)


def test_an_interrupted_run_ends_with_the_very_weights_of_an_uninterrupted_one(whole, text, tmp_path):
    flags = ["--split", "train[:80%]", "--eval_split", "train[80%:]", "--sample_steps", "2", "--eval_steps", "2"]
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2)
        train_text.main([*TINY, "--train_data_dir", str(text), "--output_dir", str(tmp_path), *flags])
    assert not (tmp_path / "model_index.json").exists()
    trained(tmp_path, text, *flags, "--resume_from_checkpoint", "latest")
    a, b = weights(whole), weights(tmp_path)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_leaves_texts_where_others_leave_pictures_and_a_card_that_shows_them(whole):
    shown = sorted(path.name for path in (whole / "samples").iterdir())
    assert shown == ["ema-00000002.txt", "ema-00000004.txt", "infills.txt", "raw-00000002.txt", "raw-00000004.txt",
                     "steps.txt"]  # fmt: skip
    card = (whole / "README.md").read_text()
    assert (whole / "samples" / "ema-00000004.txt").read_text().strip() in card
    assert "--- the original ---" in card and "░" in card and "sahoo2024simple" in card
    assert "texts = pipe(batch_size=2" in card and "pipeline_tag: text-generation" in card
    assert "shares word for word with another place of the training data: in 2 samples median" in card
    assert "numbers with" not in card and "samples/ema" not in card
    log = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert {r["step"] for r in log if "eval_bits_per_token" in r} == {2, 4}


def test_the_command_draws_texts_around_a_prompt_and_writes_them(whole, tmp_path, capsys):
    flags = [
        "--prompt",
        "the [MASK:3]\\n",
        "--suffix",
        "it.",
        "--num_samples",
        "2",
        "--output",
        str(tmp_path / "s.txt"),
    ]
    assert command_line(["sample", str(whole), *flags, "--set", "sampler=confidence"]) == 0
    written = (tmp_path / "s.txt").read_text()
    texts = re.findall(r"---\n(.{16})\n", written, re.DOTALL)
    assert len(texts) == 2 and all(t.startswith("the ") and t[7] == "\n" and t.endswith("it.") for t in texts)
    said = capsys.readouterr().out
    assert written in said and "s.txt: 2 texts" in said
    assert command_line(["sample", str(whole), "--prompt", "a" * 20]) != 0
    assert "20 tokens long, and a text has 16; give fewer" in capsys.readouterr().err
    assert command_line(["sample", str(whole), "--output", "s.png"]) != 0
    assert "s.png is named as a picture" in capsys.readouterr().err


def test_its_bound_says_what_it_holds_for(whole, tmp_path, capsys):
    flags = ["--metrics", "bits_per_token", "--split", "train[80%:]", "--model_images", "6", "--bpd_steps", "4"]
    assert command_line(["evaluate", str(whole), *flags, "--output_dir", str(tmp_path)]) == 0
    (entry,) = json.loads((tmp_path / "metrics.json").read_text())["model"]
    measures = entry["measures"]
    assert set(measures) == {"bits_per_token", "bits_per_character", "perplexity"}
    bits = measures["bits_per_token"]
    assert "6 texts of 16 tokens, 4 noise levels each" in bits["name"] and 0 < bits["error"] < 2
    assert measures["perplexity"]["value"] == pytest.approx(2 ** bits["value"])
    assert measures["bits_per_character"]["value"] == bits["value"]
    assert command_line(["evaluate", str(whole), "--output_dir", str(tmp_path)]) != 0
    assert "--metrics fd compares values, which texts have none of; give bits_per_token" in capsys.readouterr().err
    assert entry["protocol"]["data"]["name"] == "cats.txt" and entry["protocol"]["levels"] == 4


def test_a_stream_is_resumed_bit_for_bit_measured_on_its_first_lines_and_has_a_card(text, tmp_path, capsys):
    flags = ["--streaming", "--split", "train[10:]", "--eval_split", "train[:10]", "--eval_steps", "2"]
    flags += ["--dataloader_num_workers", "1"]
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2)
        train_text.main([*TINY, "--train_data_dir", str(text), "--output_dir", str(tmp_path / "b"), *flags])
    trained(tmp_path / "b", text, *flags, "--resume_from_checkpoint", "latest")
    a, b = weights(trained(tmp_path / "a", text, *flags)), weights(tmp_path / "b")
    assert all(torch.equal(a[name], b[name]) for name in a)
    log = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert {r["step"] for r in log if "eval_bits_per_token" in r} == {2, 4}
    card = (tmp_path / "a" / "README.md").read_text()
    assert "another place of the first 2,200 tokens of the stream" in card and "--- the original ---" in card
    with pytest.raises(SystemExit):
        trained(tmp_path / "c", text, "--streaming", "--num_epochs", "1", "--max_train_steps", "none")
    assert "num_epochs needs the number of samples, which a stream does not tell" in capsys.readouterr().err


CHILD = """
import os, torch
from diffusers import DiffusionPipeline
@claim
def drawn():
    pipe = DiffusionPipeline.from_pretrained(os.environ["FOLDER"], trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe(prompt="the ", batch_size=3, generator=torch.Generator().manual_seed(0), num_inference_steps=5).texts
@claim
def parts():
    pipe = DiffusionPipeline.from_pretrained(os.environ["FOLDER"], trust_remote_code=True)
    return {name: type(part).__module__.split(".")[0] for name, part in pipe.components.items()}
"""


def test_a_process_without_the_package_draws_the_same_texts(whole):
    claims = run_claims(CHILD, env={"FOLDER": str(whole)}, with_package=False)
    pipe = load_pipeline(whole)
    call = {"prompt": "the ", "batch_size": 3, "generator": torch.Generator().manual_seed(0)}
    assert claims["drawn"] == pipe(**call, num_inference_steps=5).texts
    assert claims["parts"] == {
        "transformer": "diffusers_modules",
        "scheduler": "diffusers_modules",
        "tokenizer": "transformers",
    }


def test_a_pushed_model_is_whole(hub, text, tmp_path, monkeypatch):
    api = connect(hub, monkeypatch)
    flags = ["--push_to_hub", "--hub_model_id", "alice/cats", "--max_train_steps", "1"]
    trained(tmp_path / "run", text, *flags)
    files = api.list_repo_files("alice/cats")
    assert {"tokenizer/tokenizer.json", "pipeline_discrete_text.py", "transformer/transformer_tokens.py"} <= set(files)
    assert not [name for name in files if "checkpoint" in name or name.endswith(".txt")]
    pipe = DiscreteTextPipeline.from_pretrained("alice/cats")
    assert pipe(num_inference_steps=2, output_type="pt").texts.shape == (1, 16)


@pytest.mark.parametrize("noise", ["absorbing", "uniform"])
@pytest.mark.parametrize("objective", ["continuous", "hybrid"])
def test_every_process_trains_with_classes_and_draws_by_them(tmp_path, noise, objective):
    rows = {"text": [WORDS, WORDS.upper()] * 8, "kind": ["small", "large"] * 8}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "rows.parquet")
    flags = ["--noise", noise, "--objective", objective, "--d3pm_num_steps", "8", "--max_train_steps", "1"]
    flags += ["--class_conditional", "--label_column", "kind"]
    pipe = load_pipeline(trained(tmp_path / "run", tmp_path / "rows.parquet", *flags))
    assert pipe.id2label == {0: "large", 1: "small"} and pipe.null_class_id == 2
    call = {"num_inference_steps": 3, "generator": torch.Generator().manual_seed(0)}
    texts = pipe(class_labels=["small", "large"], guidance_scale=2.0, **call).texts
    assert len(texts) == 2 and all(text for text in texts)
    assert "[MASK]" not in "".join(texts) and "░" not in "".join(texts)


def bert(folder: Path, **sizes) -> Path:
    """A masked language model as transformers saves it, with its tokenizer."""
    tokenizer = character_tokenizer(WORDS)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    return folder


SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def test_a_masked_language_model_becomes_the_network_with_its_tokenizer(text, tmp_path):
    source = bert(tmp_path / "bert", **SMALL)
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 1)
        trained_part = [*TINY, "--train_data_dir", str(text), "--init_from", str(source), "--max_train_steps", "2"]
        train_text.main([*trained_part, "--output_dir", str(run)])
    trained(run, text, "--init_from", str(source), "--max_train_steps", "2", "--resume_from_checkpoint", "latest")
    pipe = load_pipeline(run)
    assert (
        isinstance(pipe.transformer, BertForMaskedLM) and pipe.scheduler.mask_token_id == pipe.tokenizer.mask_token_id
    )
    former = BertForMaskedLM.from_pretrained(source).state_dict()
    moved = [name for name, value in pipe.transformer.state_dict().items() if not torch.equal(value, former[name])]
    assert moved and pipe(num_inference_steps=2, prompt="the ").texts[0].startswith("the ")
    claims = run_claims(CHILD, env={"FOLDER": str(run)}, with_package=False)
    assert claims["parts"]["transformer"] == "transformers" and claims["drawn"][0].startswith("the ")
    # and what it has become is a start, too
    flags = ["--init_from", str(source), "--max_train_steps", "1", "--gradient_checkpointing"]
    again = trained(tmp_path / "again", text, *flags)
    assert load_pipeline(again).tokenizer.get_vocab() == pipe.tokenizer.get_vocab()


@pytest.mark.slow
def test_one_of_the_size_of_bert_base_trains_two_steps_and_samples(text, tmp_path):
    source = bert(tmp_path / "bert")
    flags = ["--init_from", str(source), "--max_train_steps", "2", "--checkpointing_steps", "2", "--no-use_ema"]
    pipe = load_pipeline(trained(tmp_path / "run", text, *flags, "--train_batch_size", "2"))
    assert sum(p.numel() for p in pipe.transformer.parameters()) > 80e6
    assert pipe(num_inference_steps=2, output_type="np").texts.shape == (1, 16)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--noise", "uniform"], "is a masked language model, which knows noise absorbing alone"),
        (["--sequence_length", "600"], "reads 512 tokens at most; give --sequence_length 512"),
        (["--time_conditioning"], "sees tokens alone; leave time_conditioning out"),
    ],
)
def test_a_masked_language_model_that_does_not_fit_is_refused(text, tmp_path, flags, message):
    source = bert(tmp_path / "bert", **SMALL)
    with pytest.raises(SystemExit, match=message):
        trained(tmp_path / "run", text, "--init_from", str(source), *flags)
    assert not list((tmp_path / "run").glob("*"))


def test_a_run_starts_from_the_network_and_the_tokenizer_of_another(whole, text, tmp_path):
    run = trained(
        tmp_path / "run", text, "--init_from", str(whole), "--max_train_steps", "1", "--learning_rate", "1e-9"
    )
    a, b = weights(whole), weights(run)
    assert all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)
    assert load_pipeline(run).tokenizer.get_vocab() == load_pipeline(whole).tokenizer.get_vocab()


def test_a_dry_run_tells_counts_vocabulary_and_an_excerpt(text, tmp_path, capsys):
    trained(tmp_path, text, "--dry_run")
    said = capsys.readouterr().out
    assert "sequences of 16 tokens" in said and "60 lines" in said and "an excerpt" in said
    assert "characters: '\\n ,." in said
    assert [path.name for path in tmp_path.iterdir()] == ["data_preview.txt"]


@pytest.mark.parametrize(
    "given, rate, width",
    [
        ({}, 1e-3, 256),
        ({"hidden_size": 512}, 3e-4, 512),
        ({"optimizer": "muon"}, 4e-3, 256),
        ({"init_from": "somewhere"}, 5e-5, 256),
        ({"learning_rate": 0.1, "preset": "standard"}, 0.1, 512),
        ({"preset": "fast"}, 1e-3, 128),
    ],
)
def test_rate_and_size_go_by_the_preset_and_by_the_start(given, rate, width):
    config = train_text.TextConfig(train_data_dir="somewhere", max_train_steps=1, **given)
    config.settle((64,))
    assert (config.learning_rate, config.hidden_size) == (rate, width)


@pytest.mark.parametrize(
    "device, start, expected",
    [("cpu", None, (128, 32, "muon")), ("cpu", "a", (128, 32, None)), ("cuda", None, (512, 64, None))],
)
def test_auto_takes_a_network_and_a_batch_for_text_by_the_device(device, start, expected):
    config = train_text.TextConfig(data=__file__, max_train_steps=1, init_from=start)
    config.validate()
    assert (config.train_data_dir, config.data) == (__file__, None)
    found = Circumstances((64,), 1000, 0, None, device, 2, bf16=True, processes=2 if device == "cuda" else 1)
    chosen = {}
    for choice in config.auto_settings(found).values():
        chosen |= choice.settings
    assert (chosen["hidden_size"], chosen["train_batch_size"], chosen.get("optimizer")) == expected
    assert chosen["mixed_precision"] == "bf16"


@pytest.mark.parametrize(
    "given, message",
    [
        ({"hidden_size": 20}, "hidden_size 20 must be a multiple of twice num_attention_heads, 8"),
        ({"noise": "uniform", "sampler": "confidence"}, "needs masks, which uniform noise has none of"),
        (
            {"objective": "vlb", "num_inference_steps": 2000},
            "num_inference_steps 2000 is more than d3pm_num",
        ),
        ({"channels_last": True}, "an order of images, which tokens have none of"),
        ({"dataset_name": "a/b"}, "both say the texts to train on"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        train_text.TextConfig(train_data_dir="somewhere", max_train_steps=1, **given).validate()


@pytest.mark.slow
@pytest.mark.parametrize("reading", [[], ["--streaming", "--dataloader_num_workers", "1"]], ids=["kept", "streamed"])
def test_two_processes_follow_the_run_of_one_with_the_same_global_batch(text, tmp_path, reading):
    for processes, batch in ((1, "8"), (2, "4")):
        flags = [*TINY, "--train_data_dir", str(text), "--train_batch_size", batch, *reading]
        words = [
            *launcher(processes),
            "training/train_text.py",
            *flags,
            "--output_dir",
            str(tmp_path / str(processes)),
        ]
        done = subprocess.run(words, cwd=REPO, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in "12"
    )
    assert [r["loss"] for r in one if "loss" in r] == pytest.approx([r["loss"] for r in two if "loss" in r], rel=1e-4)
