"""train_clip.py end to end on the CPU: resume, what is saved, guidance from the command line."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from hf_diffusion import NoisyCLIP, cli
from hf_diffusion.training import train_clip
from tests.pipelines.tiny import make_text_to_image
from tests.training.interruptions import stop_after


SMALL = """
    --dataset_name digits --max_train_samples 64 --split train[:90%] --train_batch_size 8 --contrast_size 4
    --max_train_steps 5 --checkpointing_steps 3 --logging_steps 1 --patch_size 4 --width 16 --layers 1 --heads 2
    --embed_dim 8 --text_width 16 --text_layers 1 --beta_schedule linear
""".split()
SMALL += ["--caption_template", "the digit {}", "--caption_template", "a {}"]


def run(folder: Path, *flags: str) -> Path:
    assert train_clip.main([*SMALL, *flags, "--output_dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return run(tmp_path_factory.mktemp("clip") / "whole", "--eval_split", "train[90%:]")


def test_an_interrupted_run_ends_with_the_very_weights_of_an_uninterrupted_one(finished, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        run(tmp_path)
    run(tmp_path, "--resume_from_checkpoint", "latest")
    ours, whole = (load_file(folder / "diffusion_pytorch_model.safetensors") for folder in (tmp_path, finished))
    assert ours.keys() == whole.keys() and all(torch.equal(ours[name], whole[name]) for name in whole)


@pytest.mark.parametrize("source", ["", "checkpoint-00000005"], ids=["run", "checkpoint"])
def test_a_run_starts_from_towers_and_tokenizer_of_a_saved_one(finished, source, tmp_path):
    flags = ["--init_from", str(finished / source), "--layers", "2", "--max_train_steps", "1", "--learning_rate"]
    folder = run(tmp_path / "on", *flags, "1e-6")
    ours, theirs = (load_file(path / "diffusion_pytorch_model.safetensors") for path in (folder, finished))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=2e-6)
    tokens = [AutoTokenizer.from_pretrained(path)("a digit, unseen")["input_ids"] for path in (folder, finished)]
    assert tokens[0] == tokens[1]


def test_a_run_on_another_schedule_cannot_be_started_from(finished, tmp_path):
    with pytest.raises(SystemExit, match="was trained with beta_schedule linear, and this run has squaredcos_cap_v2"):
        train_clip.main(
            [
                *SMALL,
                "--beta_schedule",
                "squaredcos_cap_v2",
                "--init_from",
                str(finished),
                "--output_dir",
                str(tmp_path),
            ]
        )


def test_accumulation_does_not_change_who_is_told_apart(finished, tmp_path):
    flags = ["--train_batch_size", "4", "--gradient_accumulation_steps", "2"]
    halves = load_file(run(tmp_path, *flags) / "diffusion_pytorch_model.safetensors")
    for name, value in load_file(finished / "diffusion_pytorch_model.safetensors").items():
        torch.testing.assert_close(halves[name], value, rtol=1e-2, atol=1e-4)


def test_both_towers_are_saved_with_their_tokenizer_and_the_schedule(finished):
    clip, tokenizer = NoisyCLIP.from_pretrained(finished), AutoTokenizer.from_pretrained(finished)
    assert clip.config.noise_schedule["beta_schedule"] == "linear" and clip.config.vocab_size == len(tokenizer)
    log = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert any("eval_top1_q0" in record for record in log)
    card = (finished / "README.md").read_text()
    assert "NoisyCLIP.from_pretrained" in card and "Radford" in card and "beta_schedule" in card


def test_the_command_line_guides_by_it(finished, tmp_path):
    pipe = make_text_to_image()
    pipe.save_pretrained(tmp_path / "model")
    words = ["sample", str(tmp_path / "model"), "--prompt", "a cat", "--num_images", "2", "--num_inference_steps", "2"]
    words += ["--npz", str(tmp_path / "a.npz")]
    assert cli.main(words) == 0
    plain = np.load(tmp_path / "a.npz")["images"]
    guided = [*words, "--guide_by", str(finished), "--set", "clip_guidance_scale=50"]
    assert cli.main(guided) == 0
    assert not np.array_equal(np.load(tmp_path / "a.npz")["images"], plain)


def test_guidance_by_it_is_swept_beside_classifier_free_guidance(finished, tmp_path):
    make_text_to_image(id2label={i: str(i) for i in range(4)}).save_pretrained(tmp_path / "model")
    words = ["evaluate", str(tmp_path / "model"), "--guide_by", str(finished), "--metrics", "kd", "--num_images", "24"]
    words += ["--dataset_name", "digits", "--num_inference_steps", "2", "--max_reference_images", "30"]
    words += ["--sweep", "guidance=clip,classifier_free", "--sweep", "guidance_scale=0,5"]
    assert cli.main([*words, "--output_dir", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out" / "metrics.json").read_text())["results"]
    used = {tuple(r["settings"].values()): r["protocol"]["sampling"]["options"] for r in results}
    assert used["clip", 5.0]["clip_guidance_scale"] == 5.0 and used["clip", 5.0]["guidance_scale"] == 1.0
    assert used["classifier_free", 5.0]["clip_guidance_scale"] == 0.0
    assert len({r["measures"]["kd"]["value"] for r in results}) == 4
    assert (tmp_path / "out" / "sweep.png").is_file()


def test_samples_are_measured_by_it(finished, tmp_path, capsys):
    pipe = make_text_to_image(id2label={i: str(i) for i in range(4)})
    pipe.save_pretrained(tmp_path / "model")
    words = ["evaluate", str(tmp_path / "model"), "--metrics", "clip_score", "--model_images", "8", "--dataset_name"]
    words += ["digits", "--num_inference_steps", "2", "--class_labels", "all", "--output_dir", str(tmp_path / "out")]
    assert cli.main(words) != 0 and "clip_score needs a CLIP of noisy images" in capsys.readouterr().err
    assert cli.main([*words, "--guide_by", str(finished)]) == 0
    (found,) = json.loads((tmp_path / "out" / "metrics.json").read_text())["model"]
    # the same by hand
    clip, tokenizer = NoisyCLIP.from_pretrained(finished), AutoTokenizer.from_pretrained(finished)
    pipe.register_modules(clip=clip, clip_tokenizer=tokenizer)
    prompts = [pipe.example_prompts[i % 4] for i in range(8)]
    generators = [torch.Generator().manual_seed(i) for i in range(8)]
    x_0 = pipe(prompts, num_inference_steps=2, generator=generators, output_type="pt").images * 2 - 1
    with torch.no_grad():
        products = clip.image_embeddings(x_0, 0) @ pipe.clip_texts(pipe.example_prompts).T
    own = torch.arange(8) % 4
    assert found["measures"]["clip_score"]["value"] == pytest.approx(
        float(products[torch.arange(8), own].mean()), rel=1e-4
    )
    assert found["measures"]["clip_top1"]["value"] == float((products.argmax(1) == own).double().mean())
