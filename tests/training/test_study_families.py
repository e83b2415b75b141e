"""The commands are ones that the families take; the report says what was measured.

The trainings take minutes each. Here their commands are caught, parsed by the real parsers, and
answered with made-up measures.
"""

import json
from pathlib import Path

import pytest
from PIL import Image

from hf_diffusion.commands.evaluate import EvaluateCommand
from hf_diffusion.commands.script_settings import config_class
from hf_diffusion.commands.train import PACKAGE
from hf_diffusion.config.command_line import parse_config
from hf_diffusion.training import study_families as study


@pytest.fixture
def launched(monkeypatch):
    configs = []

    def launch(words: list[str]) -> None:
        command, *words = words[1:]
        if command == "train":
            config = parse_config(config_class(f"{PACKAGE}.train_{words[0]}"), words[1:])
            Path(config.output_dir).mkdir(parents=True)
            Path(config.output_dir, "README.md").write_text("card")
        else:
            config = parse_config(EvaluateCommand, words)
            config.output_dir.mkdir(parents=True)
            (config.output_dir / "metrics.json").write_text(json.dumps({"results": made_up(config)}))
        configs.append(config)

    monkeypatch.setattr(study, "launch", launch)
    return configs


def made_up(config: EvaluateCommand) -> list[dict]:
    """A distance of 10 over the steps, and shares of one half."""
    (swept,) = config.sweep
    half = {name: {"value": 0.5} for name in ("precision", "recall", "label_accuracy")}
    steps = [int(value) for value in swept.removeprefix("num_inference_steps=").split(",")]
    fd = [{"fd": {"value": 10 / n, "error": 0.01, "name": f"FD-{config.num_images}"}} for n in steps]
    return [
        {"settings": {"num_inference_steps": float(n)}, "measures": half | f, "seconds_per_image": 0.001 * n}
        for n, f in zip(steps, fd)
    ]


def test_every_family_trains_the_same_network_for_the_same_minutes_and_is_drawn_by_its_solvers(launched, tmp_path):
    assert study.main(["run", "all", "--output_dir", str(tmp_path), "--minutes", "7"]) == 0
    trained = [config for config in launched if not isinstance(config, EvaluateCommand)]
    assert [config.output_dir for config in trained] == [str(tmp_path / name) for name in study.FAMILIES]
    networks = {(c.model_channels, c.channel_mult, c.num_res_blocks, c.patch_size) for c in trained}
    assert networks == {(64, (1, 2), 1, 2)}
    assert {(c.train_batch_size, c.max_train_minutes, c.mixed_precision) for c in trained} == {(32, 7, "bf16")}
    lines = (tmp_path / "families.md").read_text().splitlines()
    assert "| EDM, Heun | 19 | 1 ± 0.01 | 0.500 | 0.500 | 0.500 | 10.0 |" in lines
    assert "| VP score, flow by Heun | 20 | 1 ± 0.01 | 0.500 | 0.500 | 0.500 | 10.0 |" in lines
    with Image.open(tmp_path / "families.png") as picture:
        assert len(set(picture.convert("RGB").resize((200, 120)).getdata())) > 20


def test_what_is_done_is_left_alone(launched, tmp_path):
    study.main(["run", "edm", "--output_dir", str(tmp_path)])
    study.main(["run", "edm", "flow", "--output_dir", str(tmp_path)])
    assert [type(config) for config in launched].count(EvaluateCommand) == 4 and len(launched) == 6


@pytest.mark.parametrize("words", [["run"], ["run", "edn"]])
def test_a_run_needs_families_that_there_are(capsys, words):
    with pytest.raises(SystemExit):
        study.main(words)
    assert "run needs some of ddpm, edm, flow, score, or all" in capsys.readouterr().err


def test_a_report_of_nothing_says_so(tmp_path):
    with pytest.raises(SystemExit, match="nothing is measured in .* yet"):
        study.main(["report", "--output_dir", str(tmp_path)])
