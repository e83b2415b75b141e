"""train_text_to_image.py end to end on the CPU: both kinds of encoders and processes, resume, the
command line, what strangers load, quality."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from hf_diffusion import TextToImagePipeline, cli
from hf_diffusion.cards.papers import bibtex
from hf_diffusion.config.command_line import parse_config
from hf_diffusion.data.loading import load_data
from hf_diffusion.loop.readers import trained_unet
from hf_diffusion.losses.captioned import CaptionDenoisingObjective, ReadingUNet
from hf_diffusion.randomness import Draw
from hf_diffusion.training import train_text_to_image
from hf_diffusion.training.train_text_to_image import TextToImageConfig
from tests.data.autoencoders import make_autoencoder
from tests.data.test_captions import captioned_parquet, folder_with, make_encoder
from tests.launching import ENVIRONMENT, launcher, run_claims
from tests.training.interruptions import stop_after


REPO = Path(__file__).resolve().parents[2]
SMALL = """
    --train_batch_size 8 --max_train_steps 5 --checkpointing_steps 3 --logging_steps 1 --sample_steps none
    --learning_rate 0.01 --model_channels 8 --channel_mult 1,2 --num_res_blocks 1 --norm_num_groups 4
    --num_head_channels 8 --num_inference_steps 2 --num_sample_images 4
""".split()
DIGITS = ["--dataset_name", "digits", "--max_train_samples", "64", "--text_width", "16", "--text_layers", "1"]
DIGITS += ["--caption_template", "the digit {}", "--caption_template", "a handwritten {}"]
CAPTIONS = [["a cat", "a small cat"], ["a dog"], None, ["two cars"], ["a tree"], ["a dog, asleep"]]


def run(folder: Path, *flags: str) -> Path:
    assert train_text_to_image.main([*SMALL, *flags, "--output_dir", str(folder)]) == 0
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    parts = {"unet": "diffusion_pytorch_model", "text_encoder": "model"}
    found = {part: load_file(folder / part / f"{file}.safetensors") for part, file in parts.items()}
    return {f"{part}.{name}": tensor for part, own in found.items() for name, tensor in own.items()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    flags = "--objective hybrid --variance_type learned_range --eval_split train[90%:] --split train[:90%]".split()
    return run(tmp_path_factory.mktemp("text") / "whole", *DIGITS, *flags)


@pytest.fixture(scope="module")
def frozen(tmp_path_factory) -> tuple[Path, Path]:
    """A run on captions of a folder with a frozen encoder, and the encoder."""
    parent = tmp_path_factory.mktemp("frozen")
    (parent / "images").mkdir()
    encoder = make_encoder("bert", parent / "encoder", 300)
    data = ["--train_data_dir", str(folder_with(parent / "images", CAPTIONS * 4)), "--resolution", "8"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DIFFUSION_CACHE", str(parent / "cache"))
        return run(parent / "run", *data, "--text_encoder", str(encoder), "--process", "flow"), encoder


def test_an_interrupted_run_ends_with_the_very_weights_of_an_uninterrupted_one(finished, tmp_path, monkeypatch):
    flags = [*DIGITS, "--objective", "hybrid", "--variance_type", "learned_range", "--split", "train[:90%]"]
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        run(tmp_path, *flags)
    assert not (tmp_path / "model_index.json").exists()
    run(tmp_path, *flags, "--resume_from_checkpoint", "latest")
    ours, whole = weights(tmp_path), weights(finished)
    assert ours.keys() == whole.keys() and all(torch.equal(ours[name], whole[name]) for name in whole)


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ["scratch", "frozen"])
def test_a_run_on_a_stream_reads_its_captions_on_the_way_and_is_resumed_bit_for_bit(
    encoder, frozen, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("HF_DIFFUSION_CACHE", str(tmp_path / "cache"))
    path = captioned_parquet(tmp_path / "set.parquet", CAPTIONS * 4)
    flags = ["--train_data_dir", str(path), "--streaming", "--resolution", "8", "--dataloader_num_workers", "1"]
    flags += ["--caption_rows", "20", "--text_width", "16", "--text_layers", "1", "--text_length", "12"]
    flags += ["--text_encoder", str(frozen[1])] if encoder == "frozen" else []
    whole = weights(run(tmp_path / "whole", *flags))
    said = capsys.readouterr().out
    if encoder == "frozen":
        assert "the embeddings of a stream's captions are not cached" in said
    else:
        assert "the tokenizer is trained on captions of the stream's first 20 rows" in said
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        run(tmp_path / "cut", *flags)
    ours = weights(run(tmp_path / "cut", *flags, "--resume_from_checkpoint", "latest"))
    assert ours.keys() == whole.keys() and all(torch.equal(ours[name], whole[name]) for name in whole)
    pipe = TextToImagePipeline.from_pretrained(tmp_path / "whole")
    # room for captions that are longer than those of the first rows
    assert pipe.config.text_length == 12 and "a small cat" in pipe.example_prompts


def begun(*flags: str):
    """Network, coder and settings that a run would start with."""
    config = parse_config(TextToImageConfig, ["--train_batch_size", "8", "--max_train_steps", "2", *flags])
    accelerator = Accelerator()
    coder, network = train_text_to_image.build_reading(config, load_data(**config.data_arguments()), accelerator)
    return network, coder, config


@pytest.mark.parametrize("source", ["", "checkpoint-00000005"], ids=["pipeline", "checkpoint"])
def test_a_run_starts_from_network_text_model_and_tokenizer_of_a_saved_one(finished, source, capsys):
    flags = [*DIGITS, "--split", "train[:90%]", "--variance_type", "learned_range", "--objective", "hybrid"]
    network, coder, config = begun(*flags, "--text_width", "64", "--init_from", str(finished / source))
    trained = weights(finished)
    assert all(torch.equal(value, trained[name]) for name, value in network.state_dict().items())
    assert (config.model_channels, config.channel_mult, config.text_width, config.is_started) == (8, (1, 2), 16, True)
    assert "the shape is that of" in capsys.readouterr().out
    theirs = TextToImagePipeline.from_pretrained(finished)
    assert coder.length == theirs.config.text_length == config.text_length
    texts = ["the digit 3", "an unseen word"]
    for name, value in coder.conditions_of(texts).items():
        expected = theirs.tokenizer(texts, padding="max_length", max_length=coder.length, return_tensors="pt")[name]
        assert torch.equal(value, expected)


def test_other_captions_are_read_with_the_tokenizer_of_the_run_that_one_starts_from(finished, tmp_path):
    path = captioned_parquet(tmp_path / "set.parquet", CAPTIONS)
    flags = ["--train_data_dir", str(path), "--resolution", "8", "--channels", "1", "--init_from"]
    network, coder, _ = begun(*flags, str(finished))
    assert len(coder.tokenizer) == network.text_encoder.config.vocab_size
    trained = load_file(finished / "text_encoder" / "model.safetensors")
    assert all(torch.equal(value, trained[name]) for name, value in network.text_encoder.state_dict().items())
    with pytest.raises(
        ValueError, match="is a checkpoint, which holds no tokenizer, .* give the folder of a finished"
    ):
        begun(*flags, str(finished / "checkpoint-00000005"))


def test_what_cannot_be_started_from_is_met_by_a_sentence(finished, frozen):
    with pytest.raises(ValueError, match="was trained with prediction_type v_prediction, and this run has epsilon"):
        begun(*DIGITS, "--prediction_type", "epsilon", "--init_from", str(finished))
    with pytest.raises(
        ValueError, match="is a TextToImagePipeline with a BertModel, and an encoder from scratch is a"
    ):
        begun(*DIGITS, "--init_from", str(frozen[0]))


def test_a_network_of_a_frozen_encoder_is_started_from_in_its_own_shape(frozen, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DIFFUSION_CACHE", str(tmp_path / "cache"))
    path = captioned_parquet(tmp_path / "set.parquet", CAPTIONS)
    words = ["--train_data_dir", str(path), "--resolution", "8", "--text_encoder", str(frozen[1]), "--process", "flow"]
    for source in (frozen[0], frozen[0] / "checkpoint-00000005"):
        given = [*words, "--train_batch_size", "8", "--max_train_steps", "2", "--init_from", str(source)]
        config = parse_config(TextToImageConfig, given)
        data = load_data(**config.data_arguments())
        _, network = train_text_to_image.build_frozen(config, data, Accelerator())
        trained = load_file(frozen[0] / "unet" / "diffusion_pytorch_model.safetensors")
        assert all(torch.equal(value, trained[name]) for name, value in network.state_dict().items())
        assert config.model_channels == 8 and config.is_started
    (tmp_path / "model_index.json").write_text('{"_class_name": "TextToImagePipeline", "padding_id": 30}')
    with pytest.raises(ValueError, match="reads padding as a part of texts, as GLIDE does, and no training here does"):
        trained_unet(str(tmp_path))


def test_a_started_run_trains_on_and_is_saved(finished, tmp_path):
    flags = [*DIGITS, "--max_train_steps", "1", "--variance_type", "learned_range", "--objective", "hybrid"]
    ours = weights(run(tmp_path / "on", *flags, "--init_from", str(finished), "--learning_rate", "1e-6"))
    for name, value in weights(finished).items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=2e-6)


def test_unet_and_encoder_are_both_trained(finished):
    config = TextToImagePipeline.from_pretrained(finished).unet.config
    assert config.out_channels == 2
    text = json.loads((finished / "text_encoder" / "config.json").read_text())
    torch.manual_seed(0)
    fresh = ReadingUNet(unet_config=dict(config), text_config=text).state_dict()
    trained = weights(finished)
    embedding = "text_encoder.embeddings.token_embedding.weight"
    rows = (trained[embedding] != fresh[embedding]).any(1)
    # tokens that no caption has are as they were
    assert 5 < rows.sum() < len(rows) and trained["unet.conv_out.weight"].abs().min() > 0
    log = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert any("eval_loss_q3" in record for record in log)


def test_stock_diffusers_and_transformers_load_it_in_a_fresh_process(finished, tmp_path):
    pipe = TextToImagePipeline.from_pretrained(finished)
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    call = {"prompt": ["the digit 3", "a handwritten 8"], "negative_prompt": "the digit 1", "output_type": "np"}
    np.save(tmp_path / "ours.npy", pipe(**call, generator=generators, num_inference_steps=2).images)
    claims = run_claims(
        f"""
import numpy as np, torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from transformers import AutoTokenizer, CLIPTextModel
folder = {str(finished)!r}
pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
images = pipe(**{call!r}, generator=generators, num_inference_steps=2).images
claims["same"] = bool(np.array_equal(images, np.load({str(tmp_path / "ours.npy")!r})))
UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
CLIPTextModel.from_pretrained(folder, subfolder="text_encoder")
claims["tokens"] = AutoTokenizer.from_pretrained(f"{{folder}}/tokenizer")("the digit 3")["input_ids"]
""",
        with_package=False,
    )
    assert claims == {"same": True, "tokens": pipe.tokenizer("the digit 3")["input_ids"]}


def test_a_frozen_encoder_travels_along_as_it_was(frozen):
    folder, encoder = frozen
    pipe = TextToImagePipeline.from_pretrained(folder)
    theirs = load_file(encoder / "model.safetensors")
    assert all(torch.equal(theirs[name], value) for name, value in pipe.text_encoder.state_dict().items())
    assert type(pipe.text_encoder).__name__ == "BertModel" and pipe.num_classes is None
    assert type(pipe.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    assert sorted(pipe.example_prompts) == ["a cat", "a dog", "a dog, asleep", "a small cat", "a tree", "two cars"]
    cats, cars = (pipe("a cat", generator=torch.Generator().manual_seed(0), output_type="np").images,
                  pipe("two cars", generator=torch.Generator().manual_seed(0), output_type="np").images)  # fmt: skip
    assert np.isfinite(cats).all() and not np.allclose(cats, cars)


def test_the_card_shows_prompts(finished, frozen):
    card = (finished / "README.md").read_text()
    assert "a row for each of the prompts 'the digit 0', 'the digit 1'" in card and "GLIDE" in card
    assert 'prompt=["the digit 0", "the digit 1", "the digit 2", "the digit 3"]' in card
    assert "pipeline_tag: text-to-image" in card and "Saharia" not in card
    card = (frozen[0] / "README.md").read_text()
    assert "a row for each of the prompts 'a cat', 'a small cat'" in card and "Saharia" in card and "Lipman" in card
    used = TextToImageConfig(dataset_name="digits", max_train_steps=1).papers()
    assert used == ("nichol2022glide", "ho2020denoising", "song2021denoising", "ho2022classifier")
    assert len(bibtex(used)) == 4


def test_the_command_line_draws_prompts(finished, tmp_path, capsys):
    words = [
        "sample",
        str(finished),
        "--num_inference_steps",
        "2",
        "--num_images",
        "4",
        "--npz",
        str(tmp_path / "a.npz"),
    ]
    texts = ["--prompt", "the digit 3", "--prompt", "one, of many"]
    assert cli.main([*words, *texts, "--negative_prompt", "a", "--images_dir", str(tmp_path / "images")]) == 0
    archive = np.load(tmp_path / "a.npz")
    assert archive["prompts"].tolist() == ["the digit 3"] * 2 + ["one, of many"] * 2
    table = (tmp_path / "images" / "metadata.csv").read_text().splitlines()
    assert table[0] == "file_name,text" and table[3] == '00002.png,"one, of many"'
    assert cli.main([*words, *texts, "--class_labels", "3"]) == 2
    assert "both say what to draw" in capsys.readouterr().err
    assert cli.main([*words, "--class_labels", "3"]) == 0
    assert np.array_equal(np.load(tmp_path / "a.npz")["images"][0], archive["images"][0]) is False


def test_a_model_without_classes_draws_its_examples_when_nothing_is_asked(frozen, tmp_path):
    assert cli.main(["sample", str(frozen[0]), "--num_images", "6", "--npz", str(tmp_path / "a.npz")]) == 0
    assert np.load(tmp_path / "a.npz")["prompts"].tolist()[:2] == ["a cat", "a small cat"]


def test_label_accuracy_of_prompts_is_measured(finished, tmp_path):
    words = [
        "evaluate",
        str(finished),
        "--metrics",
        "label_accuracy",
        "--num_images",
        "20",
        "--output_dir",
        str(tmp_path),
    ]
    words += ["--features", "trained", "--num_inference_steps", "2", "--max_reference_images", "200"]
    assert cli.main(words) == 0
    (found,) = json.loads((tmp_path / "metrics.json").read_text())["results"]
    assert 0 <= found["measures"]["label_accuracy"]["value"] <= 1


def test_samples_are_measured_by_the_captions_of_the_data(frozen, tmp_path, monkeypatch):
    asked = []
    original = TextToImagePipeline.prepare_prompts

    def spy(pipe, prompt, *rest):
        asked.append(prompt)
        return original(pipe, prompt, *rest)

    monkeypatch.setattr(TextToImagePipeline, "prepare_prompts", spy)
    words = ["evaluate", str(frozen[0]), "--metrics", "kd", "--num_images", "24", "--num_inference_steps", "1"]
    words += ["--output_dir", str(tmp_path / "out")]
    assert cli.main(words) == 0
    (found,) = json.loads((tmp_path / "out" / "metrics.json").read_text())["results"]
    assert np.isfinite(found["measures"]["kd"]["value"]) and found["protocol"]["prompts"]["different"] > 4
    assert {"a dog", "two cars", ""} <= set(asked[-1]) and len(asked[-1]) == 24
    assert cli.main([*words[:3], "label_accuracy", *words[4:]]) != 0


def test_captions_of_latents_are_learned_and_decoded(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DIFFUSION_CACHE", str(tmp_path / "cache"))
    make_autoencoder(scaling_factor=0.7).save_pretrained(tmp_path / "vae")
    flags = ["--vae", str(tmp_path / "vae"), "--split", "train[:90%]", "--eval_split", "train[90%:]"]
    pipe = TextToImagePipeline.from_pretrained(run(tmp_path / "run", *DIGITS, *flags))
    assert type(pipe.vae).__name__ == "AutoencoderKL" and pipe.unet.config.in_channels == 2
    assert pipe.sample_shape == (1, 8, 8) and pipe.noise_shape == (2, 4, 4)
    assert pipe("the digit 3", num_inference_steps=2).images[0].size == (8, 8)
    with pytest.raises(ValueError, match="latents have no bounds"):
        pipe("the digit 3", num_inference_steps=2, dynamic_threshold=0.9)


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--caption_template", "a {}", "--caption_column", "text"], "both say what the captions are; give one"),
        (["--caption_template", "a {}", "--patch_size", "2"], "UNet2DConditionModel works on pixels; leave it out"),
        (["--caption_template", "a {}", "--text_heads", "3"], "text_heads 3 does not divide text_width 128"),
        (["--caption_template", "a {}", "--text_encoder", "no/such/folder"], "text_encoder no/such/folder"),
        ([], "there are no captions"),
        (
            ["--caption_template", "a {}", "--label_dropout", "0", "--guidance_scale", "2"],
            "guidance_scale 2.0 leads away from the empty text, which a network with label_dropout 0 never sees",
        ),
    ],
)
def test_settings_that_cannot_be_are_met_by_a_sentence(flags, sentence, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        train_text_to_image.main([*SMALL, "--dataset_name", "digits", *flags, "--output_dir", str(tmp_path)])
    said = f"{stopped.value} {capsys.readouterr().err}"
    assert sentence in said and "Traceback" not in said


def test_a_run_on_a_stream_without_dropped_captions_is_drawn_from_without_guidance(tmp_path, capsys):
    folder = run(tmp_path, *DIGITS, "--streaming", "--label_dropout", "0", "--max_train_steps", "1")
    assert "the tokenizer is trained on captions of the stream's first 5,000 rows" in capsys.readouterr().out
    pipe = TextToImagePipeline.from_pretrained(folder)
    assert pipe.config.empty_text is False and "guidance_scale=1.0" in (folder / "README.md").read_text()
    assert not (folder / "samples" / "guidance.png").exists()


def test_dropped_captions_become_the_empty_text_in_training_alone():
    seen = []

    class Network(torch.nn.Module):
        config = type("Config", (), {"num_class_embeds": None})

        def forward(self, x, t, input_ids):
            seen.append(input_ids)
            return type("Output", (), {"sample": x})

    config = TextToImageConfig(dataset_name="digits", max_train_steps=1, label_dropout=0.5)
    scheduler = train_text_to_image.build_scheduler(config)
    objective = CaptionDenoisingObjective(
        scheduler, Network(), config, 1e-3, None, empty={"input_ids": torch.tensor([[7, 7]])}, fingerprint="x"
    )
    batch = {"x_0": torch.zeros(400, 1, 2, 2), "input_ids": torch.ones(400, 2, dtype=torch.int64)}
    draw = Draw(0, 0, slice(0, 400), 400, torch.device("cpu"))
    objective.values(objective.players[0].network.train(), batch, draw)
    dropped = (seen[0] == 7).all(1)
    assert 150 < dropped.sum() < 250 and (seen[0][~dropped] == 1).all()
    objective.values(objective.players[0].network.eval(), batch, draw)
    assert (seen[1] == 1).all()


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--streaming", "--text_length", "16"]], ids=["set", "stream"])
def test_two_processes_train_what_one_does(tmp_path, flags):
    def launch(name: str, processes: int, batch: str) -> Path:
        words = [*launcher(processes, "cpu_two_processes" if processes == 2 else None)]
        words += ["training/train_text_to_image.py", *SMALL, *DIGITS, *flags, "--train_batch_size", batch]
        words += ["--output_dir", str(tmp_path / name)]
        result = subprocess.run(words, cwd=REPO, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
        assert result.returncode == 0, result.stdout + result.stderr
        return tmp_path / name

    one, two = launch("one", 1, "16"), launch("two", 2, "8")
    losses = [
        [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (one, two)
    ]
    np.testing.assert_allclose(*losses, rtol=1e-3)


@pytest.mark.slow
def test_digits_are_drawn_as_their_captions_ask(tmp_path):
    """The recipe in a third of its steps: a classifier reads what the prompt has named."""
    words = ["--config", "digits_text.yaml", "--max_train_steps", "400", "--num_sample_images", "20"]
    assert train_text_to_image.main([*words, "--output_dir", str(tmp_path / "run")]) == 0
    words = ["evaluate", str(tmp_path / "run"), "--metrics", "label_accuracy", "--features", "trained"]
    words += ["--num_images", "200", "--num_inference_steps", "10", "--output_dir", str(tmp_path / "evaluation")]
    assert cli.main(words) == 0
    (found,) = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())["results"]
    assert found["measures"]["label_accuracy"]["value"] >= 0.9
