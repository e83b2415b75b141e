"""Starting from a trained network: from any of its forms, with classes matched by name, and what
does not fit named."""

import json
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file

from hf_diffusion import ClassifierFreeGuidancePipeline, EDMHeunScheduler, EDMPipeline
from hf_diffusion.config.command_line import parse_config
from hf_diffusion.data.loading import load_data
from hf_diffusion.loop import fine_tuning
from hf_diffusion.loop.checkpoints import MANIFEST
from hf_diffusion.loop.fine_tuning import started_from
from hf_diffusion.loop.init_from import trained_generator
from hf_diffusion.loop.trained_denoiser import trained_denoiser
from hf_diffusion.training import train_classifier, train_consistency, train_ddgan, train_ddpm
from tests.loop.test_start import png_folder


SMALL = ["--model_channels", "8", "--norm_num_groups", "4", "--num_head_channels", "8", "--channel_mult", "1,2"]
SMALL += ["--num_res_blocks", "1", "--train_batch_size", "8", "--max_train_steps", "2", "--ema_max_decay", "0.5"]
SMALL += ["--learning_rate", "0.01", "--sample_steps", "none", "--num_sample_images", "4"]
DDPM = [*SMALL, "--class_conditional", "--ddpm_num_inference_steps", "2"]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("fine")
    png_folder(root / "two", ("bee", "cow"))
    png_folder(root / "three", ("ant", "bee", "cow"))
    assert train_ddpm.main([*DDPM, "--train_data_dir", str(root / "two"), "--output_dir", str(root / "ddpm")]) == 0
    words = [*SMALL, "--train_data_dir", str(root / "two"), "--output_dir", str(root / "classifier")]
    assert train_classifier.main(words) == 0
    return root


def begun(root: Path, source: Path, *flags: str, module=train_ddpm, cls=None, base=DDPM, data="three"):
    """The network that a run would start from, with its settings."""
    cls = cls or train_ddpm.DDPMConfig
    words = [*base, "--train_data_dir", str(root / data), "--init_from", str(source), *flags]
    config = parse_config(cls, words)
    data = load_data(**config.data_arguments())
    process = config.noise_schedule()
    process |= {"prediction_type": config.prediction_type} if hasattr(config, "prediction_type") else {}
    return started_from(config, data, module.build_network(config, data), process), config


def test_embeddings_are_carried_over_by_the_names_of_the_classes(root, capsys):
    # another seed: two steps leave an embedding as it began
    network, _ = begun(root, root / "ddpm", "--seed", "1")
    trained = load_file(root / "ddpm" / "unet" / "diffusion_pytorch_model.safetensors")
    rows, former = network.state_dict()["class_embedding.weight"], trained["class_embedding.weight"]
    # ant, bee, cow, none from bee, cow, none
    assert rows.shape[0] == 4 and torch.equal(rows[1:], former) and not torch.equal(rows[0], former[0])
    assert all(torch.equal(network.state_dict()[name], trained[name]) for name in trained if "class" not in name)
    assert "2 of 3 classes are those of" in capsys.readouterr().out


def test_a_checkpoint_gives_the_averaged_weights_that_its_run_exported(root):
    ours, _ = begun(root, root / "ddpm" / "checkpoint-00000002")
    exported, _ = begun(root, root / "ddpm")
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), exported.state_dict().values()))


def test_the_shape_of_the_network_is_the_trained_ones_and_is_recorded(root, capsys):
    network, config = begun(
        root, root / "ddpm", "--model_channels", "16", "--channel_mult", "none", "--dropout", "0.3"
    )
    assert (config.model_channels, config.channel_mult, config.dropout) == (8, (1.0, 2.0), 0.3)
    assert network.config.model_channels == 8 and network.config.dropout == 0.3
    assert "model_channels 8" in capsys.readouterr().out


def test_colours_that_were_not_there_make_new_convolutions_that_are_listed(root, capsys):
    network, _ = begun(root, root / "ddpm", "--channels", "3", "--resolution", "16")
    assert network.config.in_channels == 3 and tuple(network.config.sample_size) == (16, 16)
    said = capsys.readouterr().out
    assert "3 tensors are new" in said and "conv_in.weight" in said and "conv_out.weight" in said


@pytest.mark.parametrize(
    "source, flags, sentence",
    [
        (
            "ddpm",
            ["--prediction_type", "epsilon"],
            "trained with prediction_type v_prediction, and this run has epsilon",
        ),
        (
            "ddpm",
            ["--beta_schedule", "linear"],
            "trained with beta_schedule squaredcos_cap_v2, and this run has linear",
        ),
        ("ddpm/checkpoint-00000002", ["--beta_schedule", "linear"], "trained with beta_schedule squaredcos_cap_v2"),
        ("two", [], "holds no pipeline, no model and no checkpoint"),
    ],
)
def test_a_start_that_does_not_fit_is_refused_in_a_sentence(root, source, flags, sentence):
    with pytest.raises(ValueError, match=sentence):
        begun(root, root / source, *flags)


def test_a_network_of_another_kind_is_refused(root):
    for source in (root / "ddpm", root / "ddpm" / "checkpoint-00000002"):
        with pytest.raises(ValueError, match="has a?.?ADMUNet2DModel, and this run trains a ADMClassifier"):
            begun(root, source, module=train_classifier, cls=train_classifier.ClassifierConfig, base=SMALL)


def test_a_classifier_starts_from_a_classifier_with_the_answers_of_its_classes(root):
    how = {"module": train_classifier, "cls": train_classifier.ClassifierConfig, "base": SMALL}
    network, _ = begun(root, root / "classifier", **how)
    trained = load_file(root / "classifier" / "diffusion_pytorch_model.safetensors")
    mine = network.state_dict()
    answers = [name for name in trained if mine[name].shape != trained[name].shape]
    assert answers and all(torch.equal(mine[name][1:], trained[name]) for name in answers)
    assert dict(network.config.id2label) == {0: "ant", 1: "bee", 2: "cow"}


def test_a_generator_made_of_a_denoiser_knows_its_classes_by_name(root):
    words = ["--train_data_dir", str(root / "three"), "--class_conditional", "--max_train_steps", "1"]
    config = parse_config(train_ddgan.DDGANConfig, [*words, "--init_from", str(root / "ddpm")])
    data = load_data(**config.data_arguments())
    generator = trained_generator(config, data, train_ddgan.build_scheduler(config))
    trained = load_file(root / "ddpm" / "unet" / "diffusion_pytorch_model.safetensors")["class_embedding.weight"]
    assert torch.equal(generator.state_dict()["class_embedding.weight"][1:3], trained[:2])


def test_of_an_unfinished_run_the_newest_checkpoint_is_taken(root, tmp_path, capsys):
    shutil.copytree(root / "ddpm" / "checkpoint-00000002", tmp_path / "run" / "checkpoint-00000002")
    ours, _ = begun(root, tmp_path / "run")
    exported, _ = begun(root, root / "ddpm")
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), exported.state_dict().values()))
    assert "is an unfinished run: starting from its checkpoint-00000002" in capsys.readouterr().out


def test_a_denoiser_that_is_tuned_keeps_its_classes_by_name_and_refuses_others(root):
    def tuned(source, data):
        words = ["--train_data_dir", str(root / data), "--class_conditional", "--max_train_steps", "1"]
        words += ["--objective", "tuning", "--init_from", str(source)]
        config = parse_config(train_consistency.ConsistencyConfig, words)
        data = load_data(**config.data_arguments())
        data.use_classes(sorted(data.class_names, reverse=True))
        return trained_denoiser(config, data)[0].state_dict()["class_embedding.weight"]

    trained = load_file(root / "ddpm" / "unet" / "diffusion_pytorch_model.safetensors")["class_embedding.weight"]
    # cow, bee, none from bee, cow, none
    assert torch.equal(tuned(root / "ddpm", "two"), trained[[1, 0, 2]])
    png_folder(root / "others", ("bee", "fly"))
    with pytest.raises(ValueError, match="data set others has the classes 'fly', which are not among 'bee', 'cow'"):
        tuned(root / "ddpm", "others")
    assert torch.equal(tuned(root / "ddpm" / "checkpoint-00000002", "two"), trained[[1, 0, 2]])
    # One of another method, whose settings are not those of a process that can be tuned.
    other = shutil.copytree(root / "ddpm" / "checkpoint-00000002", root / "other")
    manifest = json.loads((other / MANIFEST).read_text())
    del manifest["settings"]["beta_schedule"]
    (other / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="is a checkpoint of a run that is none of train_ddpm.py, train_edm.py and"):
        tuned(other, "two")


def test_a_denoiser_of_another_process_makes_no_generator(root, tmp_path):
    unet = ClassifierFreeGuidancePipeline.from_pretrained(root / "ddpm").unet
    EDMPipeline(unet, EDMHeunScheduler()).save_pretrained(tmp_path / "edm")
    words = ["--train_data_dir", str(root / "two"), "--class_conditional", "--max_train_steps", "1"]
    config = parse_config(train_ddgan.DDGANConfig, [*words, "--init_from", str(tmp_path / "edm")])
    with pytest.raises(
        ValueError, match="is a EDMPipeline; a DDGANPipeline, or a pipeline with an ADMUNet2DModel that"
    ):
        trained_generator(config, load_data(**config.data_arguments()), train_ddgan.build_scheduler(config))


def test_a_name_that_is_nowhere_is_said_to_be_no_folder(root, tmp_path, monkeypatch):
    monkeypatch.setattr(fine_tuning, "file_exists", Mock(side_effect=OSError("offline")))
    monkeypatch.setattr(fine_tuning, "load_pipeline", Mock(side_effect=OSError("there is no folder")))
    with pytest.raises(OSError, match="there is no folder"):
        begun(root, Path("owner/none"))


def test_a_whole_run_starts_from_a_trained_one_and_goes_on_from_its_own_checkpoint(root, tmp_path):
    words = [*DDPM, "--train_data_dir", str(root / "three"), "--init_from", str(root / "ddpm"), "--output_dir"]
    slow = ["--learning_rate", "1e-9", "--max_train_steps", "1"]
    assert train_ddpm.main([*words, str(tmp_path / "run"), *slow]) == 0
    trained = load_file(root / "ddpm" / "unet" / "diffusion_pytorch_model.safetensors")
    tuned = load_file(tmp_path / "run" / "unet" / "diffusion_pytorch_model.safetensors")
    torch.testing.assert_close(tuned["conv_in.weight"], trained["conv_in.weight"], rtol=0, atol=1e-7)
    again = [*slow[:-1], "2", "--resume_from_checkpoint", "latest"]
    assert train_ddpm.main([*words, str(tmp_path / "run"), *again]) == 0


def test_a_script_that_begins_with_new_weights_only_does_not_pass_over_it(root, tmp_path):
    from tests.family import flips
    from tests.family.test_flips import LOADERS, SHORT

    LOADERS["signs"] = flips.make_data
    try:
        with pytest.raises(SystemExit, match="begins with new weights only; leave it out"):
            flips.main([*SHORT, "--output_dir", str(tmp_path), "--init_from", str(root / "ddpm")])
    finally:
        del LOADERS["signs"]
