"""The study's commands are ones that the scripts take; its report says what was measured.

The trainings themselves take hours. Here the commands are caught, parsed by their real parsers, and
answered with made-up measures.
"""

import itertools
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from hf_diffusion.commands.evaluate import EvaluateCommand
from hf_diffusion.config.command_line import parse_config
from hf_diffusion.training import study_fashion_mnist as study
from hf_diffusion.training.train_classifier import ClassifierConfig
from hf_diffusion.training.train_ddgan import DDGANConfig
from hf_diffusion.training.train_ddpm import DDPMConfig
from hf_diffusion.training.train_distillation import DistillationConfig


CONFIGS = {
    "train_ddpm.py": DDPMConfig,
    "train_classifier.py": ClassifierConfig,
    "train_ddgan.py": DDGANConfig,
    "train_distillation.py": DistillationConfig,
}


SCHEDULERS = {
    None: "DDIMEtaScheduler",
    "ddpm": "LinearDDPMScheduler",
    "unipc": "UniPCMultistepScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
}


class Machine:
    """Stands for the study's processes: trainings leave a card, evaluations what is asked for."""

    def __init__(self):
        self.trained: list[tuple[str, object]] = []
        self.evaluated: list = []

    def launch(self, words: list[str]) -> None:
        if words[0] == "hf_diffusion.cli":
            assert words[1] == "evaluate"
            self.evaluate(parse_config(EvaluateCommand, words[2:]))
        else:
            script = Path(words[1]).name
            config = parse_config(CONFIGS[script], words[2:])
            self.trained.append((script, config))
            Path(config.output_dir).mkdir(parents=True)
            Path(config.output_dir, "README.md").write_text("card")

    def evaluate(self, args) -> None:
        self.evaluated.append(args)
        results = []
        swept = {name: values.split(",") for name, values in (text.split("=") for text in args.sweep)}
        for number, values in enumerate(itertools.product(*swept.values()), 1):
            texts = dict(zip(swept, values))
            setting = {name: text if name == "guidance" else float(text) for name, text in texts.items()}
            scale = setting.get("guidance_scale", args.guidance_scale or 1.0)
            steps = int(setting.get("num_inference_steps", 0)) or args.num_inference_steps
            free = setting.get("guidance") != "classifier"
            sampling = {
                "pipeline": "ClassifierFreeGuidancePipeline" if free else "ClassifierGuidancePipeline",
                "sampler": SCHEDULERS[args.scheduler],
                "sampler_config": {"num_train_timesteps": 4},
                "options": {"num_inference_steps": steps, "guidance_scale": scale},
            }
            measures = {name: {"name": name, "value": 0.5, "error": None} for name in ("precision", "recall")}
            measures["fd"] = {"name": "FD-10k", "value": 1.0 / number, "error": 0.01}
            results.append({"settings": setting, "measures": measures, "seconds_per_image": 0.01 * (steps or 4),
                            "protocol": {"sampling": sampling, "count": args.num_images}})  # fmt: skip
        args.output_dir.mkdir(parents=True, exist_ok=True)
        (args.output_dir / "metrics.json").write_text(json.dumps({"results": results}))


@pytest.fixture
def machine(monkeypatch):
    machine = Machine()
    monkeypatch.setattr(study, "launch", machine.launch)
    return machine


def run(folder: Path, *words: str) -> int:
    return study.main(["run", *words, "--output_dir", str(folder)])


@pytest.mark.parametrize("size", ["cpu", "gpu"])
def test_every_cell_is_a_training_and_measurements_that_the_commands_take(machine, tmp_path, size):
    assert run(tmp_path, "all", "--size", size) == 0
    games = {(c.divergence, c.num_timesteps) for script, c in machine.trained if script == "train_ddgan.py"}
    assert games == {(d, t) for d in study.DIVERGENCES for t in (3, 4, 5, 10)}
    in_four = [c for script, c in machine.trained if script == "train_ddgan.py" and c.num_timesteps == 4]
    assert sorted(c.seed for c in in_four if c.discriminator != "denoiser") == [0] * 5 + [1] * 5 + [2] * 5
    by_features = [(Path(c.init_from).name, c.r1_gamma) for c in in_four if c.discriminator == "denoiser"]
    assert by_features == ([("ddpm", 1.0)] if size == "cpu" else [])
    distilled = [Path(c.init_from).name for script, c in machine.trained if script == "train_distillation.py"]
    assert distilled == (["ddpm"] if size == "cpu" else [])
    assert sorted(c.ddpm_num_steps for script, c in machine.trained if script == "train_ddpm.py") == [50, 300, 1000]
    assert [script for script, _ in machine.trained].count("train_classifier.py") == 1
    guided = [args for args in machine.evaluated if args.guide_by is not None]
    assert [Path(args.guide_by).name for args in guided] == ["classifier"]


def test_what_is_done_is_left_alone_and_another_number_of_images_is_measured_anew(machine, tmp_path):
    run(tmp_path, "ddgan_js_t4", "--size", "gpu")
    run(tmp_path, "ddgan_js_t4", "--size", "gpu")
    assert (len(machine.trained), len(machine.evaluated)) == (1, 1)
    run(tmp_path, "ddgan_js_t4", "--size", "gpu", "--num_images", "2000")
    assert (len(machine.trained), len(machine.evaluated)) == (1, 2)


def test_on_the_cpu_the_gans_start_from_the_ddpm_of_the_study(machine, tmp_path):
    with pytest.raises(SystemExit, match="ddgan_js_t3 needs ddpm, which is not trained; run it, too"):
        run(tmp_path, "ddgan_js_t3")
    run(tmp_path, "ddgan_js_t3", "ddpm")
    (gan,) = [config for script, config in machine.trained if script == "train_ddgan.py"]
    assert Path(gan.init_from) == tmp_path / "cpu" / "ddpm"


def test_long_chains_draw_fewer_images_and_say_so(machine, tmp_path):
    run(tmp_path, "ddpm", "--network_calls", "3000000")
    counts = {args.output_dir.name: args.num_images for args in machine.evaluated}
    chains = {"ddpm_50": 10_000, "ddpm_300": 10_000, "ddpm_1000": 3000}
    solvers = {"unipc": 10_000, "dpmpp": 10_000, "unipc_guided": 10_000}
    assert counts == {"ddim": 10_000, "ddim_4": 10_000, **solvers, **chains}
    rows = json.loads((tmp_path / "cpu" / "study.json").read_text())
    assert {r["network_calls"]: r["images"] for r in rows}[1000] == 3000


def test_untrained_solvers_stand_in_the_table_at_the_same_few_calls_and_images_as_the_gans(machine, tmp_path):
    run(tmp_path, "ddpm", "--network_calls", "50000")
    rows = json.loads((tmp_path / "cpu" / "study.json").read_text())
    for sampler in ("UniPC", "DPM++ 2M"):
        found = [(r["network_calls"], r["images"]) for r in rows if r["sampler"] == sampler and not r["settings"]]
        assert found == [(calls, 10_000) for calls in (2, 3, 4, 5, 8, 10, 20)]
    guided = [(r["network_calls"], r["settings"]) for r in rows if r["sampler"] == "UniPC" and r["settings"]]
    assert guided == [(20, "guidance_scale 1.2"), (40, "guidance_scale 1.2")]
    assert "| ddpm | UniPC |  | 4 | 10,000 |" in (tmp_path / "cpu" / "study.md").read_text()


def test_no_line_of_the_figure_joins_distances_from_different_numbers_of_images(machine, tmp_path):
    run(tmp_path, "ddpm", "--network_calls", "1000000")
    rows = json.loads((tmp_path / "cpu" / "study.json").read_text())
    lines = study.lines_of(rows)
    assert all(len({r["images"] for r in line}) == 1 for line in lines.values())
    assert sum(map(len, lines.values())) == len(rows) and "DDPM, N 1,000" in lines and "DDPM, N 10,000" in lines


def test_no_line_of_the_figure_joins_models_of_different_processes(machine, tmp_path):
    run(tmp_path, "ddpm", "ddpm_t50", "ddpm_t300")
    lines = study.lines_of(json.loads((tmp_path / "cpu" / "study.json").read_text()))
    assert all(len({r["cell"] for r in line}) == 1 for line in lines.values())
    assert [r["network_calls"] for r in lines["DDPM, trained with T = 50, N 10,000"]] == [50]


def test_no_line_of_the_figure_joins_a_discriminator_on_the_denoisers_features_with_another(machine, tmp_path):
    run(tmp_path, "ddpm", "ddgan_js_t4", "ddgan_js_t3", "ddgan_denoiser_t4")
    rows = json.loads((tmp_path / "cpu" / "study.json").read_text())
    rows.append(rows[-1] | {"cell": "ddgan_js_t4, 1200 steps"})
    lines = {name: sorted(r["cell"] for r in line) for name, line in study.lines_of(rows).items() if "DDGAN" in name}
    assert lines == {
        "DDGAN, js, eta 0.0, N 10,000": ["ddgan_js_t3", "ddgan_js_t4"],
        "DDGAN, denoiser, eta 0.0, N 10,000": ["ddgan_denoiser_t4"],
        "DDGAN, js, 1200 steps, eta 0.0, N 10,000": ["ddgan_js_t4, 1200 steps"],
    }


def test_the_report_counts_two_network_calls_for_a_step_of_classifier_free_guidance(machine, tmp_path):
    run(tmp_path, "ddpm", "classifier", "guidance", "ddgan_js_t4")
    rows = json.loads((tmp_path / "cpu" / "study.json").read_text())
    guidance = {r["settings"]: r["network_calls"] for r in rows if r["cell"] == "guidance"}
    assert guidance["guidance classifier_free, guidance_scale 2.0"] == 40
    assert guidance["guidance classifier_free, guidance_scale 1.0"] == 20
    assert guidance["guidance classifier, guidance_scale 2.0"] == 20
    assert [r["network_calls"] for r in rows if r["cell"] == "ddgan_js_t4"] == [4]
    lines = (tmp_path / "cpu" / "study.md").read_text().splitlines()
    assert len([line for line in lines if line.startswith("| ")]) == 1 + 1 + len(rows)
    for axis in ("time", "calls"):
        with Image.open(tmp_path / "cpu" / f"quality_against_{axis}.png") as picture:
            assert len(set(picture.convert("RGB").resize((200, 120)).getdata())) > 20


def test_the_cost_of_a_training_is_the_time_of_its_steps_at_the_rates_that_it_logged(tmp_path):
    assert study.training_minutes(tmp_path) is None
    (tmp_path / "config.yaml").write_text("train_batch_size: 30\ngradient_accumulation_steps: 2\n")
    lines = [
        {"step": 10, "images_per_second": 10.0},
        {"step": 10, "eval_loss": 1.0},
        {"step": 40, "images_per_second": 20.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert study.training_minutes(tmp_path) == pytest.approx((10 * 60 / 10 + 30 * 60 / 20) / 60)


def test_wrong_cells_are_one_sentence(machine, tmp_path, capsys):
    with pytest.raises(SystemExit, match="there is no cell 'ddpn'; choose from ddpm, classifier, guidance"):
        run(tmp_path, "ddpn")
    with pytest.raises(SystemExit, match="guidance needs ddpm, which is not trained; run it, too"):
        run(tmp_path, "guidance")
    with pytest.raises(SystemExit, match="nothing is measured in .* yet"):
        study.main(["report", "--output_dir", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path)
    assert stopped.value.code == 2 and "run needs the names of cells" in capsys.readouterr().err


def test_a_command_that_fails_ends_the_study(monkeypatch):
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(SystemExit, match="ended with status 1: hf_diffusion.cli evaluate"):
        study.launch(["hf_diffusion.cli", "evaluate"])
