"""What a run chooses itself: the rules of preset auto, and a length that fits its minutes."""

import pytest
import yaml
from safetensors.torch import load_file

from hf_diffusion.config.preset import LEAST_WIDTH, Circumstances
from hf_diffusion.loop.deadline import Deadline
from hf_diffusion.loop.learning_rate import DECAY_SHARE
from hf_diffusion.loop.planning import own_defaults
from hf_diffusion.loop.trainer import Trainer
from hf_diffusion.training.train_ddpm import DDPMConfig
from hf_diffusion.training.train_edm import EDMConfig
from hf_diffusion.training.train_flow import FlowConfig
from hf_diffusion.training.train_score import ScoreConfig
from tests.loop.test_start import parsed, png_folder


FACTS = {"samples": 5000, "classes": 10, "of_a_class": 500, "device": "cpu", "cores": 2, "bf16": True}


def chosen(shape, *words: str, cls: type = DDPMConfig, **changes) -> dict:
    config = parsed("--data", "x/y", "--preset", "auto", *words, cls=cls)
    choices = config.auto_settings(Circumstances(sample_shape=shape, **{**FACTS, **changes}))
    assert all(choice.reason for choice in choices.values())
    return {name: value for choice in choices.values() for name, value in choice.settings.items()}


# --- the length ---


def run_against_the_clock(seconds: float, pace) -> tuple[list[int], int, int]:
    """The totals planned on the way, the last step, and the first step of the decay; `pace(step)`
    is what a step takes."""
    deadline, step, clock, totals, begin = Deadline(seconds, 0), 0, 0.0, [], None
    total = 10**9
    while step < total:
        clock += pace(step)
        step += 1
        if deadline.is_due(step) and (plan := deadline.plan(step, clock)) is not None:
            totals.append(plan.total_steps)
            # what has been done at the full rate stays so, and the decay begins once
            assert plan.total_steps - plan.decay_steps >= step or (plan.decay_ends and plan.decay_ends[0] == begin)
            total, begin = plan.total_steps, plan.total_steps - plan.decay_steps
    return totals, clock, begin


@pytest.mark.parametrize(
    "pace",
    {
        "steady": lambda step: 0.5,
        "a first step that compiles": lambda step: 0.02 if step else 60.0,
        "slower for the first pass": lambda step: 0.5 if step < 200 else 0.25,
        "a machine that others use later": lambda step: 0.2 if step < 500 else 0.4,
        "a machine that others use in the decay": lambda step: 0.2 if step < 2200 else 0.5,
        "a machine that others leave in the decay": lambda step: 0.2 if step < 2200 else 0.1,
        "a busy machine": lambda step: 0.2 + 0.3 * (step // 300 % 3 == 1) + 0.1 * (step % 2),
        "a grid now and then": lambda step: 0.1 + 20 * (step % 400 == 399),
    }.values(),
)
def test_a_run_ends_on_time_with_its_decay_done(pace):
    totals, ended, begin = run_against_the_clock(600, pace)
    assert abs(ended - 600) < 0.035 * 600, ended
    assert 0.4 * DECAY_SHARE < (totals[-1] - begin) / totals[-1] < 1.6 * DECAY_SHARE
    # Plans are few, since each asks all processes.
    assert len(totals) < 25


def test_a_run_without_time_left_takes_a_last_step():
    deadline = Deadline(1.0, 100)
    assert deadline.plan(103, 50.0) is None
    plan = deadline.plan(106, 60.0)
    assert plan.total_steps == 107 and plan.decay_steps == 1 and not deadline.is_due(107)


TIMED = "--data digits --num_sample_images 2 --ddpm_num_inference_steps 2 --sample_steps none --model_channels 8"
TIMED += " --channel_mult 1 --num_res_blocks 1 --norm_num_groups 4 --num_head_channels 8 --train_batch_size 4"


def weights(folder):
    return load_file(folder / "unet/diffusion_pytorch_model.safetensors")


def test_max_train_minutes_gives_the_run_that_its_config_repeats(tmp_path, monkeypatch):
    """With the decay, which only the last plan knows: `max_train_minutes` is what has gone by."""
    from hf_diffusion.training.train_ddpm import main

    # a machine that others begin to use in the decay
    plan = Trainer._plan
    monkeypatch.setattr(Trainer, "_plan", lambda self, elapsed: plan(self, self.step + max(0, self.step - 50)))
    timed, repeated = tmp_path / "timed", tmp_path / "repeated"
    minutes = ["--max_train_minutes", "1", "--lr_warmup_steps", "3"]
    assert main([*TIMED.split(), *minutes, "--output", str(timed)]) == 0
    kept = yaml.safe_load((timed / "config.yaml").read_text())
    assert "max_train_minutes" not in kept
    # planned for 60 at the beginning of the decay, and for 58 in its middle
    assert (kept["max_train_steps"], kept["lr_decay_steps"], kept["lr_decay_ends"]) == (58, 16, [42, 60, 51, 58])
    assert main(["--config", str(timed / "config.yaml"), "--output", str(repeated)]) == 0
    first, second = weights(timed), weights(repeated)
    assert all((first[name] == second[name]).all() for name in first)
    # The same command goes on with the length that was found, and finds nothing left to do.
    resumed = [*TIMED.split(), *minutes, "--resume_from_checkpoint", "latest"]
    assert main([*resumed, "--output", str(timed)]) == 0
    assert yaml.safe_load((timed / "config.yaml").read_text()) == kept


# --- the rules ---


def test_a_cpu_gets_fourteen_to_sixteen_positions_and_a_gpu_the_pixels():
    for shape, patch in {(1, 28, 28): 2, (3, 32, 32): 2, (1, 64, 64): 4, (1, 8, 8): 1}.items():
        assert chosen(shape)["patch_size"] == patch, shape
    # The narrowest network carries twice the values of a patch.
    for shape in ((1, 64, 64), (3, 64, 64), (3, 128, 128), (4, 64, 64)):
        assert 2 * shape[0] * chosen(shape)["patch_size"] ** 2 <= LEAST_WIDTH
    # A side that patches and levels do not divide.
    assert chosen((1, 27, 27))["patch_size"] == 1
    for shape, patch in {(1, 28, 28): 1, (3, 32, 32): 1, (3, 64, 64): 2, (3, 256, 256): 2}.items():
        assert chosen(shape, device="cuda")["patch_size"] == patch, shape


def test_patches_on_a_black_ground_are_left_to_networks_that_predict_x_0():
    black = {"shape": (1, 28, 28), "ground": 0.5}
    assert chosen(**black)["patch_size"] == 2 and chosen(**black)["prediction_type"] == "sample"
    # The others leave a lattice of dots there, which large images have to bear.
    for words, cls in (("--prediction_type", "v_prediction"), DDPMConfig), ((), FlowConfig), ((), EDMConfig):
        assert chosen(black["shape"], *words, cls=cls, ground=0.5)["patch_size"] == 1, cls
        assert chosen((3, 64, 64), *words, cls=cls, ground=0.5)["patch_size"] == 2, cls


def test_a_network_is_reduced_step_by_step_but_for_what_is_given():
    def reduced(*words: str) -> list[str]:
        config = parsed("--data", "x/y", "--preset", "auto", *words)
        return [config.reduce((1, 28, 28)) for _ in range(3)]

    assert reduced() == ["model_channels 32", "patch_size 2", None]
    assert reduced("--model_channels", "64") == ["patch_size 2", None, None]
    assert reduced("--patch_size", "1") == ["model_channels 32", None, None]


def test_precision_compilation_and_layout_go_together():
    on_gpu = chosen((3, 32, 32), device="cuda")
    assert on_gpu["torch_compile"] and on_gpu["channels_last"] and on_gpu["mixed_precision"] == "bf16"
    old = chosen((3, 32, 32), device="cuda", bf16=False)
    assert old["mixed_precision"] == "no" and "channels_last" not in old and "torch_compile" not in old
    assert chosen((2,))["mixed_precision"] == "no"


@pytest.mark.parametrize("cls", [DDPMConfig, EDMConfig, FlowConfig])
def test_a_cpu_learns_images_by_muon_unless_something_else_is_given(cls):
    def of(shape, *words: str, **changes) -> tuple:
        found = chosen(shape, *words, cls=cls, **changes)
        return found.get("optimizer"), found["learning_rate"]

    assert of((1, 28, 28)) == ("muon", 3e-3)
    # at its own rate
    assert of((1, 28, 28), "--optimizer", "adamw") == (None, 1e-3)
    assert of((1, 28, 28), device="cuda") == (None, 4e-4) and of((2,)) == (None, 1e-3)


def test_on_a_cpu_a_ddpm_predicts_x_0_under_min_snr_and_a_flow_learns_most_at_the_middle_levels():
    def of(shape, *words: str, **changes) -> tuple:
        found = chosen(shape, *words, **changes)
        return tuple(found.get(name) for name in ("prediction_type", "loss_weighting", "level_distribution"))

    assert of((1, 28, 28)) == ("sample", "min_snr", None)
    assert of((1, 28, 28), cls=FlowConfig) == (None, None, "logit_normal")
    for cls in (DDPMConfig, FlowConfig):
        assert of((1, 28, 28), cls=cls, device="cuda") == of((2,), cls=cls) == (None, None, None)


@pytest.mark.parametrize(
    "words",
    [
        ("--prediction_type", "v_prediction"),
        ("--loss_weighting", "uniform"),
        ("--level_distribution", "logit_normal"),
        ("--timestep_sampling", "loss_second_moment"),
        ("--objective", "vlb"),
    ],
)
def test_a_target_is_chosen_whole_or_not_at_all(words):
    found = chosen((1, 28, 28), *words)
    assert found["optimizer"] == "muon" and not found.keys() & {"prediction_type", "loss_weighting"}


def test_edm_learns_the_weights_of_its_levels_on_a_cpu_unless_they_are_given():
    def of(shape, *words: str, **changes) -> bool | None:
        return chosen(shape, *words, cls=EDMConfig, **changes).get("learned_weighting")

    assert of((1, 28, 28))
    for words in (("--loss_weighting", "edm"), ("--no-learned_weighting",)):
        assert of((1, 28, 28), *words) is None
    assert of((1, 28, 28), device="cuda") is of((2,)) is None


def test_other_methods_are_trained_as_before():
    found = chosen((1, 28, 28), cls=ScoreConfig)
    assert found["learning_rate"] == 1e-3 and "optimizer" not in found and "level_distribution" not in found


def test_classes_are_learned_where_each_has_samples_enough():
    assert chosen((1, 28, 28))["class_conditional"] and chosen((1, 28, 28))["guidance_scale"] > 1
    # a stream does not tell how many
    assert chosen((1, 28, 28), samples=None, of_a_class=None)["class_conditional"]
    for few in ({"classes": 0, "of_a_class": None}, {"classes": 1}, {"of_a_class": 3}):
        assert not chosen((1, 28, 28), **few)["class_conditional"], few


def test_a_family_keeps_the_defaults_that_it_has_set_itself():
    from hf_diffusion.training.train_ddgan import DDGANConfig

    assert "learning_rate" in own_defaults(DDGANConfig) and "train_batch_size" not in own_defaults(DDGANConfig)
    assert own_defaults(DDPMConfig) == set()


def test_a_batch_is_shared_by_processes_and_no_larger_than_the_data():
    assert chosen((3, 32, 32), device="cuda", processes=4)["train_batch_size"] == 64
    assert chosen((3, 32, 32), samples=7)["train_batch_size"] == 7
    assert chosen((3, 32, 32), samples=500)["dropout"] > chosen((3, 32, 32), samples=50_000)["dropout"]


def test_what_is_given_stands_above_what_auto_chooses_and_both_are_told(tmp_path, monkeypatch, capsys):
    from hf_diffusion.training.train_ddpm import main

    monkeypatch.chdir(tmp_path)
    png_folder(tmp_path / "mine", each=24)
    words = "--data mine --preset auto --model_channels 16 --norm_num_groups 4 --num_head_channels 8 --channel_mult 1"
    words += " --mixed_precision no --num_sample_images 2 --ddpm_num_inference_steps 2 --max_train_steps 2"
    assert main([*words.split(), "--output", "run"]) == 0
    said = capsys.readouterr().out
    assert "preset auto, by 48 images of 1x8x8 in 2 classes, on " in said
    assert "model_channels 16 as given" in said and "class_conditional True" in said
    assert "expected: " in said and " s a step, about 2 steps" in said and "memory" in said
    kept = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert (kept["model_channels"], kept["class_conditional"], kept["mixed_precision"]) == (16, True, "no")
    # A run that goes on keeps what was chosen, whatever the machine is now.
    monkeypatch.setattr("hf_diffusion.loop.start.choose", lambda *_: pytest.fail("chosen anew"))
    assert main([*words.split(), "--output", "run", "--resume_from_checkpoint", "latest"]) == 0
