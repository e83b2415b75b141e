import dataclasses
import inspect
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_type_hints

import pytest
import yaml

import hf_diffusion.config.training
from hf_diffusion.config.training import (
    TrainingConfig,
    config_to_dict,
    config_to_yaml,
    option,
    parse_config,
    save_config,
)
from hf_diffusion.data.images import load_images


@dataclass(kw_only=True)
class ShapesConfig(TrainingConfig):
    """A subclass with a field of every kind that a script may want."""

    # Settings as the training scripts add them.
    channel_mult: tuple[float, ...] = option((1.0, 2.0), "width of each level", group="model", above=0)
    attention_resolutions: tuple[int, ...] = option((), "where to attend")
    num_heads: int | None = option(None, "heads", at_least=1)
    beta_end: float = option(0.02, "last beta", above=0, below=1)
    prediction_type: Literal["epsilon", "v_prediction"] = option("epsilon", "what the network predicts")
    level: Literal[0, 1] = option(0, "a choice among numbers")

    def validate(self) -> None:
        super().validate()
        if self.num_heads == 3:
            raise ValueError("num_heads 3 does not divide anything here")


MINIMUM = ["--dataset_name", "digits", "--max_train_steps", "10"]


def parsed(*flags, cls=ShapesConfig):
    return parse_config(cls, [*MINIMUM, *flags])


def complaint(capsys, *flags, cls=ShapesConfig, minimum=MINIMUM):
    """The sentence with which these flags are refused."""
    with pytest.raises(SystemExit) as exit:
        parse_config(cls, [*minimum, *flags], prog="train")
    error = capsys.readouterr().err
    assert exit.value.code == 2
    assert error.startswith("train: ") and error.count("\n") == 1, error  # one line: no traceback, no pages of usage
    return error.removeprefix("train: ").rstrip()


@pytest.fixture
def recipe(tmp_path):
    def write(text, name="recipe.yaml"):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def test_every_setting_has_help():
    for field in dataclasses.fields(TrainingConfig):
        assert len(field.metadata["help"]) > 15, field.name


def test_help_lists_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as exit:
        parse_config(ShapesConfig, ["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert exit.value.code == 0
    for field in dataclasses.fields(ShapesConfig):
        assert re.search(rf"--{field.name}\b", shown)
    assert "last steps over which trapezoid decays; none is 30 % of the run (at least 1; default: none)" in shown
    assert "(above 0; default: 1.0,2.0)" in shown


def test_settings_need_neither_torch_nor_diffusers():
    package = Path(hf_diffusion.config.training.__file__).parents[1]
    script = f"""if True:
        import sys, types
        package = types.ModuleType("hf_diffusion"); package.__path__ = [{str(package)!r}]
        sys.modules["hf_diffusion"] = package  # stands for the package, whose own __init__ imports everything
        import hf_diffusion.config.training, hf_diffusion.lr_schedule
        print(sorted({{"torch", "diffusers", "accelerate", "numpy", "transformers"}} & set(sys.modules)))"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("learning_rate", "1e-4", 1e-4),
        ("learning_rate", "1", 1.0),
        ("max_grad_norm", ".inf", float("inf")),
        ("max_grad_norm", "none", None),
        ("max_train_samples", "1e5", 100000),
        ("max_train_samples", "123456789012345678901", 123456789012345678901),
        ("num_heads", "null", None),
        ("num_heads", "4", 4),
        ("resolution", "32", 32),
        ("resolution", "28,36", (28, 36)),
        ("resolution", "28x36", (28, 36)),
        ("resolution", "[28, 36]", (28, 36)),
        ("channel_mult", "1,2,2.5", (1.0, 2.0, 2.5)),
        ("attention_resolutions", "[2, 4]", (2, 4)),
        ("attention_resolutions", "none", ()),
        ("report_to", "none", ()),
        ("report_to", "tensorboard, wandb", ("tensorboard", "wandb")),
        ("mixed_precision", "no", "no"),
        ("dataset_config_name", "20231101", "20231101"),
        ("dataset_config_name", "010", "010"),
        ("level", "0", 0),
    ],
)
def test_command_line_and_yaml_give_the_annotated_type(recipe, name, text, value):
    flag = parsed(f"--{name}", text)
    file = parsed("--config", recipe(f"{name}: {text}"))
    for config in (flag, file):
        assert getattr(config, name) == value and type(getattr(config, name)) is type(value)


@pytest.mark.parametrize(("text", "value"), [("true", True), ("yes", True), ("off", False), ("False", False)])
def test_switches_are_set_by_yaml_and_by_a_pair_of_flags(recipe, text, value):
    file = recipe(f"random_flip: {text}")
    assert parsed("--config", file).random_flip is value
    assert parsed("--config", file, "--random_flip").random_flip is True
    assert parsed("--config", file, "--no-random_flip").random_flip is False


def test_the_command_line_wins_over_later_files_and_those_over_earlier_ones(recipe):
    first = recipe("seed: 1\ntrain_batch_size: 1\nlearning_rate: 1e-1", "first.yaml")
    second = recipe("seed: 2\ntrain_batch_size: 2\n# a comment\n", "second.yaml")
    config = parsed("--seed", "3", "--config", first, "--config", second)
    assert (config.seed, config.train_batch_size, config.learning_rate) == (3, 2, 0.1)


@pytest.mark.parametrize(
    "flags",
    [
        [],
        [
            "--learning_rate",
            "3.3333333333333335e-05",
            "--resolution",
            "28x36",
            "--report_to",
            "wandb,trackio",
            "--no-use_ema",
        ],
        [
            "--channel_mult",
            "0.1,1e-3,1e22",
            "--attention_resolutions",
            "none",
            "--mixed_precision",
            "no",
            "--max_grad_norm",
            ".inf",
        ],
        [
            "--output_dir",
            "Übung: no # 1",
            "--dataset_config_name",
            "1e-4",
            "--cache_dir",
            " ~/data\t",
            "--split",
            "true",
        ],
    ],
)
def test_a_saved_configuration_gives_exactly_the_same_run_again(tmp_path, flags):
    config = parsed(*flags)
    save_config(config, tmp_path / "run" / "config.yaml")
    assert parse_config(ShapesConfig, ["--config", str(tmp_path / "run" / "config.yaml")]) == config
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]  # nothing half written is left


def test_a_saved_configuration_is_plain_yaml_with_every_field_in_order(tmp_path):
    config = parsed("--resolution", "28,36")
    save_config(config, tmp_path / "config.yaml")
    loaded = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert list(loaded) == [field.name for field in dataclasses.fields(config)]
    assert loaded == yaml.safe_load(config_to_yaml(config_to_dict(config)))
    assert loaded["resolution"] == [28, 36] and loaded["random_flip"] is False and loaded["mixed_precision"] == "no"


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--lerning_rate", "1"], "unknown flag --lerning_rate; did you mean --learning_rate?"),
        (["--train-batch-size=4"], "unknown flag --train-batch-size; did you mean --train_batch_size?"),
        (["--no_use_ema"], "unknown flag --no_use_ema; did you mean --no-use_ema?"),
        (["--quux", "1"], "unknown flag --quux; --help lists all of them"),
        (["--learning", "1"], "unknown flag --learning"),  # no abbreviations
        (["--channel_mult", "1", "2"], "unexpected argument '2'; every value follows its --flag"),
        (["--learning_rate", "fast"], "--learning_rate: got 'fast'; allowed: a number"),
        (["--learning_rate", "nan"], "--learning_rate: got 'nan'; allowed: a number"),
        (["--seed", "1.5"], "--seed: got '1.5'; allowed: a whole number"),
        (["--seed", "inf"], "--seed: got 'inf'; allowed: a whole number"),
        (["--seed", "none"], "--seed: got 'none'; allowed: a whole number"),
        (["--num_heads", "x"], "--num_heads: got 'x'; allowed: a whole number or none"),
        (["--mixed_precision", "fp8"], "--mixed_precision: got 'fp8'; allowed: no, fp16, bf16"),
        (
            ["--resolution", "1,2,3"],
            "--resolution: got '1,2,3'; allowed: a whole number or 2 values such as 28,36 or 28x36 or none",
        ),
        (["--channel_mult", "1,,2"], "--channel_mult: got '1,,2'; allowed: a list a,b,c of which each is a number"),
        (
            ["--report_to", "wanb"],
            "--report_to: got 'wanb'; allowed: a list a,b,c of which each is tensorboard, wandb, trackio",
        ),
        (["--learning_rate"], "argument --learning_rate: expected one argument"),
        (["--train_batch_size", "0"], "train_batch_size: got 0; allowed: at least 1"),
        (["--learning_rate", "-1"], "learning_rate: got -1.0; allowed: above 0"),
        (["--beta_end", "1"], "beta_end: got 1.0; allowed: above 0 and below 1"),
        (["--channel_mult", "1,0"], "channel_mult: got (1.0, 0.0); allowed: above 0"),
        (
            ["--train_data_dir", "x"],
            "dataset_name 'digits' and train_data_dir 'x' both say the data to train on; give one",
        ),
        (["--num_epochs", "1"], "max_train_steps 10 and num_epochs 1 both say how long to train; give one"),
        (["--overwrite_output_dir", "--resume_from_checkpoint", "latest"], "overwrite_output_dir deletes what"),
        (["--lr_warmup_steps", "11"], "lr_warmup_steps 11 is longer than the run of 10 steps"),
        (["--output_dir", ""], "output_dir is empty"),
        (["--num_heads", "3"], "num_heads 3 does not divide anything here"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence_and_status_2(capsys, flags, sentence):
    assert complaint(capsys, *flags).startswith(sentence)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("lerning_rate: 1", "lerning_rate: there is no such setting; did you mean learning_rate?"),
        ("learning_rate: fast", "learning_rate: got 'fast'; allowed: a number"),
        ("learning_rate: [1, 2]", "learning_rate: got ['1', '2']; allowed: a number"),
        ("learning_rate: {value: 1}", "learning_rate: got {'value': '1'}; allowed: a number"),
        ("seed:", "seed: got ''; allowed: a whole number"),
        ("random_flip: maybe", "random_flip: got 'maybe'; allowed: true or false"),
    ],
)
def test_a_mistake_in_a_file_names_the_file_and_the_key(capsys, recipe, text, sentence):
    file = recipe(text)
    assert complaint(capsys, "--config", file) == f"{file}: {sentence}"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("- a\n- b", "must hold `key: value` lines, got a list"),
        ("seed: 1\n  broken: [", "is not valid YAML (line 2, column"),
        ("just words", "must hold `key: value` lines, got a str"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused_in_words(capsys, recipe, text, sentence):
    file = recipe(text)
    assert complaint(capsys, "--config", file).startswith(f"{file} {sentence}")


def test_a_missing_or_binary_file_is_refused_in_words(capsys, tmp_path):
    (tmp_path / "weights").write_bytes(b"\xff\xfe\x00\x01")
    assert "cannot read the configuration file /nowhere.yaml: No such file" in complaint(
        capsys, "--config", "/nowhere.yaml"
    )
    assert "is not text in UTF-8" in complaint(capsys, "--config", str(tmp_path / "weights"))


def test_an_empty_file_changes_nothing(recipe):
    assert parsed("--config", recipe("# only a comment\n")) == parsed("--config", recipe("")) == parsed()


def test_data_and_length_must_be_given_and_none_takes_back_what_a_recipe_gives(capsys, recipe):
    assert complaint(capsys, minimum=[]).startswith("give --dataset_name or --train_data_dir")
    assert complaint(capsys, "--dataset_name", "digits", minimum=[]).startswith(
        "give --max_train_steps or --num_epochs"
    )
    config = parsed(
        "--num_epochs", "2", "--max_train_steps", "none", "--dataset_name", "none", "--train_data_dir", "x"
    )
    assert (config.num_epochs, config.max_train_steps, config.dataset_name) == (2, None, None)


def test_saved_settings_stand_one_a_line_with_lists_in_the_line():
    assert config_to_yaml({"seed": 0, "resolution": None}) == "seed: 0\nresolution: null\n"
    assert config_to_yaml({"channel_mult": [1, 2], "seed": 0}) == "channel_mult: [1, 2]\nseed: 0\n"


def test_a_required_field_is_asked_for_by_name(capsys):
    @dataclass(kw_only=True)
    class Needs:
        teacher: str = option(help="the model to start from")

    assert complaint(capsys, cls=Needs, minimum=[]).startswith("--teacher is required")
    assert parse_config(Needs, ["--teacher", "x"]) == Needs(teacher="x")


@pytest.mark.parametrize(
    "values", [{"learning_rate": "1e-4"}, {"seed": True}, {"output_dir": None}, {"dataset_name": "none"}]
)
def test_values_of_a_wrong_type_given_in_python_are_refused(values):
    config = TrainingConfig(**{"dataset_name": "digits", "max_train_steps": 1, **values})
    with pytest.raises(ValueError, match=f"{next(iter(values))}: got .*; allowed: "):
        config.validate()


def test_lists_and_whole_numbers_given_in_python_are_fine():
    ShapesConfig(
        dataset_name="digits", max_train_steps=1, channel_mult=[1, 2], learning_rate=1, resolution=(8, 8)
    ).validate()


def test_epochs_become_steps_of_the_global_batch_rounded_up():
    config = TrainingConfig(dataset_name="digits", num_epochs=3, train_batch_size=8, gradient_accumulation_steps=2)
    assert config.global_batch(processes=2) == 32
    assert config.total_steps(images=100, processes=2) == 10  # 300 images / 32 = 9.375
    assert parsed().total_steps(images=100, processes=2) == 10


def test_flags_that_diffusers_has_too_have_its_names():
    script = "dataset_name dataset_config_name train_data_dir output_dir overwrite_output_dir cache_dir resolution center_crop"
    script += (
        " random_flip train_batch_size dataloader_num_workers num_epochs gradient_accumulation_steps learning_rate"
    )
    script += (
        " lr_scheduler lr_warmup_steps adam_beta1 adam_beta2 adam_weight_decay adam_epsilon use_ema ema_inv_gamma"
    )
    script += " ema_power mixed_precision checkpointing_steps checkpoints_total_limit resume_from_checkpoint"
    assert set(script.split()) <= set(get_type_hints(TrainingConfig))


def test_data_arguments_are_those_of_load_images_and_none_means_no_classes():
    accepted = inspect.signature(load_images).parameters
    arguments = parsed("--resolution", "28x36", "--seed", "5").data_arguments()
    assert set(arguments) == set(accepted) - {"cache_bytes", "shuffle_buffer"}
    assert (arguments["resolution"], arguments["seed"], arguments["label_column"]) == ((28, 36), 5, None)
    assert parsed("--label_column", "none").data_arguments()["label_column"] == "none"
    assert parsed("--label_column", "digit").data_arguments()["label_column"] == "digit"
