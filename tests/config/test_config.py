"""A dataclass as configuration: from files and flags to values of the annotated types, and back.

The table of what users get wrong with the real commands is tests/test_bad_inputs.py.
"""

import dataclasses
import inspect
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_type_hints

import pytest
import yaml

from hf_diffusion.config.command_line import parse_config
from hf_diffusion.config.options import config_to_dict, config_to_yaml, option, read_config, save_config
from hf_diffusion.config.run_options import TrainingConfig
from hf_diffusion.config.shared_options import DataOptions
from hf_diffusion.data.images import load_images
from hf_diffusion.training.train_text_to_image import TextToImageConfig


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """A field of every kind that a script or a command may want."""

    source: str = option(help="where to read from", positional=True)
    target: Path | None = option(None, "where to write to", positional=True)
    rate: float = option(1e-4, "a number with a bound", above=0, below=2, group="numbers")
    norm: float | None = option(1.0, "a number or none")
    seed: int = option(0, "a whole number with a bound", at_least=0)
    heads: int | None = option(None, "a whole number or none", at_least=1)
    size: int | tuple[int, int] | None = option(None, "a number or a pair", at_least=1)
    widths: tuple[float, ...] = option((1.0, 2.0), "a list of numbers", above=0)
    factors: tuple[int, ...] = option((), "an empty list")
    trackers: tuple[Literal["board", "trackio"], ...] = option((), "a list of choices", group="words")
    precision: Literal["no", "fp16", "bf16"] = option("no", "a choice")
    level: Literal[0, 1] = option(0, "a choice among numbers")
    name: str | None = option(None, "a text or none")
    label: str = option("auto", "a text")
    flip: bool = option(True, "a switch")
    sweep: tuple[str, ...] = option((), "texts, one a flag", repeatable=True)
    cache: Path = option(Path("cache"), "a path")
    from_: Literal["here", "there"] = option("here", "a word of Python")

    def validate(self) -> None:
        if self.heads == 3:
            raise ValueError("heads 3 does not divide anything here")


def parsed(*flags: str) -> Shapes:
    return parse_config(Shapes, ["src", *flags])


def complaint(capsys, *words: str, cls: type = Shapes) -> str:
    """The sentence with which this command line is refused."""
    with pytest.raises(SystemExit) as exit:
        parse_config(cls, words, prog="program")
    error = capsys.readouterr().err
    # One line: no traceback, no pages of usage.
    assert exit.value.code == 2 and error.startswith("program: ") and error.count("\n") == 1, error
    return error.removeprefix("program: ").rstrip()


@pytest.fixture
def recipe(tmp_path):
    def write(text: str, name: str = "recipe.yaml") -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def test_help_lists_every_setting_with_its_range_and_default(capsys):
    with pytest.raises(SystemExit) as exit:
        parse_config(Shapes, ["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert exit.value.code == 0
    for name in ("rate", "widths", "flip, --no-flip", "sweep", "from", "config"):
        assert re.search(rf"--{name}\b", shown), name
    assert "A field of every kind that a script or a command may want." in shown
    assert "source where to read from (required)" in shown
    assert "target where to write to (default: none)" in shown
    assert "a number with a bound (above 0 and below 2; default: 0.0001)" in shown
    assert "a list of numbers (above 0; default: 1.0,2.0)" in shown
    assert "--sweep TEXT texts, one a flag (may be repeated; default: none)" in shown
    assert "--from {here,there}" in shown and "numbers:" in shown and "words:" in shown


VALUES = [
    ("rate", "1e-4", 1e-4),
    ("rate", "1", 1.0),
    ("norm", ".inf", float("inf")),
    ("norm", "none", None),
    ("seed", "1e5", 100000),
    ("seed", "123456789012345678901", 123456789012345678901),
    ("heads", "null", None),
    ("heads", "4", 4),
    ("size", "32", 32),
    ("size", "28,36", (28, 36)),
    ("size", "28x36", (28, 36)),
    ("size", "[28, 36]", (28, 36)),
    ("widths", "1,2,2.5", (1.0, 2.0, 2.5)),
    ("factors", "[2, 4]", (2, 4)),
    ("factors", "none", ()),
    ("trackers", "none", ()),
    ("trackers", "board, trackio", ("board", "trackio")),
    ("precision", "no", "no"),
    ("level", "1", 1),
    ("name", "20231101", "20231101"),
    ("name", "010", "010"),
    ("label", "none", "none"),
    ("target", "a/b", Path("a/b")),
    ("target", "none", None),
    ("cache", "~/data", Path.home() / "data"),
    ("from", "there", "there"),
]


@pytest.mark.parametrize(("name", "text", "value"), VALUES)
def test_command_line_and_file_give_the_annotated_type(recipe, name, text, value):
    flag = parsed(text) if name == "target" else parsed(f"--{name}", text)
    file = parsed("--config", recipe(f"{name}: {text}"))
    for config in (flag, file):
        given = getattr(config, {"from": "from_"}.get(name, name))
        assert given == value and type(given) is type(value)


def test_switches_are_set_by_a_file_and_by_a_pair_of_flags(recipe):
    for text, value in {"true": True, "yes": True, "off": False, "False": False}.items():
        file = recipe(f"flip: {text}")
        assert parsed("--config", file).flip is value
        assert parsed("--config", file, "--flip").flip is True
        assert parsed("--config", file, "--no-flip").flip is False


def test_values_without_a_flag_stand_anywhere_among_the_flags():
    for words in (
        ["a", "b", "--seed", "1"],
        ["--seed", "1", "a", "b"],
        ["a", "--seed", "1", "b"],
        ["a", "--seed=1", "b"],
    ):
        config = parse_config(Shapes, words)
        assert (config.source, config.target, config.seed) == ("a", Path("b"), 1)


def test_a_repeated_flag_adds_one_text_each_time_with_its_commas(recipe):
    assert parsed("--sweep", "a=1,2", "--sweep", "b=3").sweep == ("a=1,2", "b=3")
    assert parsed("--config", recipe("sweep:\n- a=1,2\n- b=3\n")).sweep == ("a=1,2", "b=3")
    assert parsed("--config", recipe("sweep: [x]"), "--sweep", "y").sweep == ("y",)


def test_the_command_line_wins_over_later_files_and_those_over_earlier_ones(recipe):
    first = recipe("seed: 1\nheads: 1\nrate: 1e-1\nsource: file", "first.yaml")
    second = recipe("seed: 2\nheads: 2\n# a comment\n", "second.yaml")
    config = parse_config(Shapes, ["--seed", "5", "--config", first, "--config", second])
    assert (config.source, config.seed, config.heads, config.rate) == ("file", 5, 2, 0.1)
    assert parsed("--config", recipe("# only a comment\n")) == parsed("--config", recipe("")) == parsed()


ROUND_TRIPS = [
    "",
    "a/b --rate 3.3333333333333335e-05 --size 28x36 --trackers board,trackio --no-flip --from there",
    "--widths 0.1,1e-3,1e22 --factors none --precision no --norm .inf --sweep a=1,2 --sweep b=none",
    "--name 1e-4 --label true --cache 010",
]


@pytest.mark.parametrize("flags", ROUND_TRIPS)
def test_a_saved_configuration_gives_exactly_the_same_again(tmp_path, flags):
    config = parse_config(Shapes, ["Übung: no # 1", *flags.split()])
    save_config(config, tmp_path / "run" / "config.yaml")
    assert parse_config(Shapes, ["--config", str(tmp_path / "run" / "config.yaml")]) == config
    assert Shapes(**read_config(Shapes, tmp_path / "run" / "config.yaml")) == config
    # Nothing half written is left.
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]


def test_a_saved_configuration_is_plain_yaml_with_one_setting_a_line_in_order(tmp_path):
    config = parsed("a/b", "--size", "28,36")
    save_config(config, tmp_path / "config.yaml")
    loaded = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert list(loaded) == [field.name for field in dataclasses.fields(config)]
    assert loaded == yaml.safe_load(config_to_yaml(config_to_dict(config)))
    assert (loaded["size"], loaded["target"], loaded["flip"], loaded["precision"]) == ([28, 36], "a/b", True, "no")
    assert config_to_yaml({"widths": [1, 2], "size": None}) == "widths: [1, 2]\nsize: null\n"


MISTAKES = {
    "": "source is required; give it on the command line or in a --config file",
    "a b c": "unexpected argument 'c'; every value follows its --flag",
    "a --raet 1": "unknown flag --raet; did you mean --rate?",
    "a --from-=there": "unknown flag --from-; did you mean --from?",
    "a --no_flip": "unknown flag --no_flip; did you mean --no-flip?",
    "a --quux 1": "unknown flag --quux; --help lists all of them",
    # No abbreviations.
    "a --prec fp16": "unknown flag --prec",
    "a b --quux c": "unknown flag --quux",
    "a --rate": "argument --rate: expected one argument",
    "a --rate fast": "--rate: got 'fast'; allowed: a number",
    "a --seed 1.5": "--seed: got '1.5'; allowed: a whole number",
    "a --seed inf": "--seed: got 'inf'; allowed: a whole number",
    "a --seed none": "--seed: got 'none'; allowed: a whole number",
    "a --heads x": "--heads: got 'x'; allowed: a whole number or none",
    "a --precision fp8": "--precision: got 'fp8'; allowed: no, fp16, bf16",
    "a --size 1,2,3": "--size: got '1,2,3'; allowed: a whole number or 2 values such as 28,36 or 28x36 or none",
    "a --widths 1,,2": "--widths: got '1,,2'; allowed: a list a,b,c of which each is a number",
    "a --trackers bord": "--trackers: got 'bord'; allowed: a list a,b,c of which each is board, trackio",
    "a --cache=": "--cache: got ''; allowed: a path",
    "a --heads 0": "heads: got 0; allowed: at least 1",
    "a --rate 2": "rate: got 2.0; allowed: above 0 and below 2",
    "a --widths 1,0": "widths: got (1.0, 0.0); allowed: above 0",
    "a --heads 3": "heads 3 does not divide anything here",
    "a --config /nowhere.yaml": "cannot read the configuration file /nowhere.yaml: No such file",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_on_the_command_line_is_one_sentence_and_status_2(capsys, words):
    assert complaint(capsys, *words.split()).startswith(MISTAKES[words])


def test_a_mistake_in_a_file_names_the_file_and_the_key(capsys, recipe):
    for text, sentence in {
        "raet: 1": ": raet: there is no such setting; did you mean rate?",
        "rate: fast": ": rate: got 'fast'; allowed: a number",
        "rate: [1, 2]": ": rate: got ['1', '2']; allowed: a number",
        "rate: {value: 1}": ": rate: got {'value': '1'}; allowed: a number",
        "seed:": ": seed: got ''; allowed: a whole number",
        "flip: maybe": ": flip: got 'maybe'; allowed: true or false",
        "- a\n- b": " must hold `key: value` lines, got a list",
        "just words": " must hold `key: value` lines, got a str",
        "seed: 1\n  broken: [": " is not valid YAML (line 2, column",
    }.items():
        file = recipe(text)
        assert complaint(capsys, "a", "--config", file).startswith(f"{file}{sentence}")
    Path(file).write_bytes(b"\xff\xfe\x00\x01")
    assert "is not text in UTF-8" in complaint(capsys, "a", "--config", file)


# --- the options of trainings ---


@dataclass(kw_only=True)
class Training(TrainingConfig, DataOptions):
    """A script of no family."""


MINIMUM = ["--dataset_name", "digits", "--max_train_steps", "10"]


def test_every_setting_of_a_training_has_help():
    for field in dataclasses.fields(Training):
        assert len(field.metadata["help"]) > 15, field.name


def test_settings_of_a_training_that_contradict_each_other_are_refused(capsys):
    for words, sentence in {
        "--train_data_dir x": "dataset_name 'digits' and train_data_dir 'x' both say the data to train on; give one",
        "--num_epochs 1": "max_train_steps 10 and num_epochs 1 both say how long to train; give one",
        "--lr_warmup_steps 11": "lr_warmup_steps 11 is longer than the run of 10 steps",
        "--output_dir=": "output_dir is empty",
    }.items():
        assert complaint(capsys, *MINIMUM, *words.split(), cls=Training).startswith(sentence)
    assert complaint(capsys, *MINIMUM[2:], cls=Training).startswith("give the data to train on: --data with a folder")
    assert complaint(capsys, *MINIMUM[:2], cls=Training).startswith(
        "give --max_train_steps, --num_epochs or --max_train_minutes: how long"
    )


def test_none_empties_a_list_of_repeated_flags_and_chooses_nothing(recipe):
    file = recipe("sweep: [a, b]")
    assert parsed("--config", file, "--sweep", "None").sweep == ()
    assert parsed("--config", file, "--sweep", "none", "--sweep", "c").sweep == ("none", "c")
    words = ["--config", "digits_text.yaml", "--caption_template", "none"]
    assert parse_config(TextToImageConfig, words).caption_template == ()
    column = recipe("caption_column: words", "column.yaml")
    assert parse_config(TextToImageConfig, [*words, "--config", column]).caption_column == "words"


def test_none_takes_back_what_a_recipe_gives():
    words = "--num_epochs 2 --max_train_steps none --dataset_name none --train_data_dir x"
    config = parse_config(Training, [*MINIMUM, *words.split()])
    assert (config.num_epochs, config.max_train_steps, config.dataset_name) == (2, None, None)


def test_values_of_a_wrong_type_given_in_python_are_refused_and_lists_are_fine():
    fits = {"dataset_name": "digits", "max_train_steps": 1}
    for wrong in ({"learning_rate": "1e-4"}, {"seed": True}, {"output_dir": None}, {"dataset_name": "none"}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: got .*; allowed: "):
            Training(**{**fits, **wrong}).validate()
    Training(**fits, report_to=["wandb"], learning_rate=1, resolution=(8, 8)).validate()


def test_epochs_become_steps_of_the_global_batch_rounded_up():
    config = Training(dataset_name="digits", num_epochs=3, train_batch_size=8, gradient_accumulation_steps=2)
    assert config.global_batch(processes=2) == 32
    # 300 images / 32 = 9.375
    assert config.total_steps(images=100, processes=2) == 10
    assert parse_config(Training, MINIMUM).total_steps(images=100, processes=2) == 10


def test_flags_that_diffusers_has_too_have_its_names():
    script = """dataset_name dataset_config_name train_data_dir output_dir overwrite_output_dir cache_dir resolution
    center_crop random_flip train_batch_size dataloader_num_workers num_epochs gradient_accumulation_steps
    learning_rate lr_scheduler lr_warmup_steps adam_beta1 adam_beta2 adam_weight_decay adam_epsilon use_ema
    ema_inv_gamma ema_power mixed_precision checkpointing_steps checkpoints_total_limit resume_from_checkpoint"""
    assert set(script.split()) <= set(get_type_hints(Training))


def test_data_arguments_are_those_of_load_images_and_none_means_no_classes():
    accepted = inspect.signature(load_images).parameters
    arguments = parse_config(Training, [*MINIMUM, "--resolution", "28x36", "--seed", "5"]).data_arguments()
    of_captions = {"captioned", "caption_column", "caption_templates", "caption_rows", "caption_coder"}
    assert set(arguments) == set(accepted) - {"cache_bytes", "shuffle_buffer", "fit_size"} - of_captions
    assert (arguments["resolution"], arguments["seed"], arguments["label_column"]) == ((28, 36), 5, None)
    for column in ("none", "digit"):
        config = parse_config(Training, [*MINIMUM, "--label_column", column])
        assert config.data_arguments()["label_column"] == column
