"""How a run begins: which settings win, what is read, what the launcher has a say in."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from hf_diffusion.config.command_line import parse_config
from hf_diffusion.config.options import RECIPES
from hf_diffusion.training.train_ddpm import DDPMConfig


ONE_START = {"overwrite_output_dir", "dry_run", "resume_from_checkpoint", "traceback"}


def png_folder(folder: Path, classes=("ant", "bee"), each: int = 16, size: int = 8) -> Path:
    """A folder of classes, of dim and of bright images."""
    rng = np.random.default_rng(0)
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(each):
            pixels = rng.integers(80 * number, 80 * number + 80, (size, size), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def parsed(*words: str, cls: type = DDPMConfig):
    return parse_config(cls, words, prog="program")


def complaint(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        parsed(*words)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_the_file_that_repeats_a_run_has_nothing_of_one_start(tmp_path):
    from tests.training.test_train_ddpm import run

    folder = run(tmp_path, "--max_train_steps", "1", "--overwrite_output_dir", "--traceback")
    kept = yaml.safe_load((folder / "config.yaml").read_text())
    assert not ONE_START & set(kept) and {"seed", "learning_rate", "dataset_name", "num_epochs"} <= set(kept)
    card = (folder / "README.md").read_text()
    assert not [name for name in ONE_START if name in card]


def test_a_flag_that_names_data_or_a_length_replaces_those_of_a_file():
    config = parsed("--config", "digits.yaml", "--train_data_dir", "mine", "--num_epochs", "3")
    assert (config.dataset_name, config.train_data_dir) == (None, "mine")
    assert (config.max_train_steps, config.num_epochs) == (None, 3)
    assert config.class_conditional and config.learning_rate == 1e-3


def test_a_later_file_replaces_them_too_with_the_columns_of_the_former_data(tmp_path):
    (tmp_path / "hub.yaml").write_text(
        "dataset_name: a/b\ndataset_config_name: c\nlabel_column: fine\nnum_epochs: 1\n"
    )
    (tmp_path / "mine.yaml").write_text("train_data_dir: mine\n")
    config = parsed("--config", str(tmp_path / "hub.yaml"), "--config", str(tmp_path / "mine.yaml"))
    assert (config.dataset_name, config.dataset_config_name, config.label_column) == (None, None, "auto")
    kept = parsed("--config", str(tmp_path / "hub.yaml"), "--dataset_name", "a/d")
    assert (kept.dataset_name, kept.label_column) == ("a/d", "fine")


def test_two_sources_of_data_on_one_command_line_are_still_refused(capsys):
    words = ["--dataset_name", "digits", "--train_data_dir", "mine", "--max_train_steps", "1"]
    assert "both say the data to train on; give one" in complaint(capsys, *words)


def test_recipes_of_the_package_are_found_by_name_from_anywhere(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("digits.yaml", "training/recipes/digits.yaml"):
        assert parsed("--config", name).output_dir == "runs/digits"
    (tmp_path / "digits.yaml").write_text((RECIPES / "digits.yaml").read_text() + "seed: 5\n")
    assert parsed("--config", "digits.yaml").seed == 5
    said = complaint(capsys, "--config", "digit.yaml")
    assert "No such file or directory; recipes by name: " in said
    assert "digits.yaml, digits_autoencoder.yaml" in said
    assert "No such file" in complaint(capsys, "--config", "elsewhere/digits.yaml")


def test_the_home_folder_is_meant_by_a_tilde_in_a_file_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.yaml").write_text("output_dir: ~/x\ntrain_data_dir: ~/images\ncache_dir: ~\nmax_train_steps: 1\n")
    config = parsed("--config", str(tmp_path / "x.yaml"))
    home = str(tmp_path)
    assert (config.output_dir, config.train_data_dir) == (f"{home}/x", f"{home}/images")


@pytest.mark.parametrize("seed", [2**64, 2**63])
def test_a_seed_that_torch_cannot_take_is_refused_in_a_sentence(capsys, seed):
    said = complaint(capsys, "--config", "digits.yaml", "--seed", str(seed))
    assert said == f"program: seed: got {seed}; allowed: at least 0 and at most 9223372036854775807\n"
    assert parsed("--config", "digits.yaml", "--seed", str(2**63 - 1)).seed == 2**63 - 1


# --- what accelerate launch was told
# -----------------------------------------------------------------------------------


def trained_under(monkeypatch, capsys, folder: Path, *flags: str, **variables: str) -> tuple[dict, str]:
    """The settings that a run of one step recorded, and what it said, with variables that
    `accelerate launch` sets."""
    from tests.launching import forget_accelerate
    from tests.training.test_train_ddpm import run

    for name, value in variables.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    forget_accelerate()
    run(folder, "--max_train_steps", "1", *flags)
    return yaml.safe_load((folder / "config.yaml").read_text()), capsys.readouterr().out


def test_what_the_launcher_was_told_is_honoured_and_recorded(tmp_path, monkeypatch, capsys):
    settings, said = trained_under(
        monkeypatch,
        capsys,
        tmp_path,
        MIXED_PRECISION="bf16",
        DYNAMO_BACKEND="EAGER",
        GRADIENT_ACCUMULATION_STEPS="2",
    )
    assert (settings["mixed_precision"], settings["torch_compile"]) == ("bf16", True)
    assert settings["gradient_accumulation_steps"] == 2 and "stands above" not in said
    assert (tmp_path / "model_index.json").is_file()


def test_a_flag_that_says_otherwise_is_named(tmp_path, monkeypatch, capsys):
    flags = ["--mixed_precision", "no", "--no-torch_compile"]
    settings, said = trained_under(
        monkeypatch, capsys, tmp_path, *flags, MIXED_PRECISION="bf16", DYNAMO_BACKEND="EAGER"
    )
    assert (settings["mixed_precision"], settings["torch_compile"]) == ("no", False)
    assert "mixed_precision no of this run stands above bf16 of accelerate launch" in said
    assert "torch_compile no of this run stands above dynamo_backend eager of accelerate launch" in said


def test_the_dry_run_shows_the_launchers_precision(tmp_path, monkeypatch, capsys):
    from tests.launching import forget_accelerate
    from tests.training.test_train_ddpm import run

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    forget_accelerate()
    run(tmp_path, "--max_train_steps", "1", "--dry_run")
    assert "mixed_precision: bf16" in capsys.readouterr().out


# --- presets
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, rate", [((3, 64, 64), 1e-3), ((1, 28, 28), 1e-3), ((2,), 1e-3), ((3, 128, 128), 1e-4), ((3, 32, 96), 1e-4)]
)
def test_the_learning_rate_goes_by_the_size_unless_it_is_given(shape, rate):
    config = parsed("--dataset_name", "x/y", "--max_train_steps", "1")
    config.settle(shape)
    assert config.learning_rate == rate
    given = parsed("--dataset_name", "x/y", "--max_train_steps", "1", "--learning_rate", "3e-4")
    given.settle(shape)
    assert given.learning_rate == 3e-4


def test_a_preset_stands_below_what_is_given():
    words = ["--dataset_name", "x/y", "--max_train_steps", "1", "--preset", "fast"]
    config = parsed(*words, "--model_channels", "48")
    config.settle((1, 28, 28))
    assert (config.model_channels, config.num_res_blocks, config.patch_size) == (48, 1, 2)
    odd = parsed(*words)
    odd.settle((1, 27, 27))
    assert (odd.model_channels, odd.patch_size) == (32, 1)


def test_the_dry_run_says_what_a_better_choice_would_cost(tmp_path, capsys, monkeypatch):
    from hf_diffusion.loop import dry_run
    from tests.training.test_train_ddpm import run

    monkeypatch.setattr(dry_run, "SLOW", 0.0)
    run(tmp_path, "--max_train_steps", "1", "--dry_run")
    assert "--preset fast takes 0." in capsys.readouterr().out
    run(tmp_path, "--max_train_steps", "1", "--dry_run", "--preset", "standard")
    assert "a better choice" not in capsys.readouterr().out
