"""`hf-diffusion tune-steps`: better timesteps are written and drawn by; no gain writes nothing."""

import json
import shutil

import numpy as np
import pytest
import torch

from hf_diffusion.evaluation import step_search
from hf_diffusion.evaluation.protocol import sampling_protocol
from hf_diffusion.hub.loading import load_pipeline
from hf_diffusion.sampling.loading import replace_scheduler
from hf_diffusion.schedulers.scheduling_unipc import UniPCTimestepsScheduler
from tests.commands.test_sample import run


SMALL = ("--num_samples", 4, "--held_out", 8, "--reference_steps", 12, "--num_inference_steps", 3)


def test_what_is_found_beats_the_own_spacing_on_other_noises_and_draws(folders, tmp_path, capsys):
    file = tmp_path / "steps.json"
    assert run("tune-steps", folders / "digits", *SMALL, "--timestep_spacing", "leading", "--output", file) == 0
    found = json.loads(file.read_text())
    assert found["distance"] + 2 * found["gain_error"] < found["own_distance"] and found["noises"] == 8
    words = ",".join(map(str, found["timesteps"]))
    said = capsys.readouterr().out
    assert f"--scheduler unipc --timesteps {words}" in said and str(found["own_timesteps"]) in said
    drawn = []
    for npz, steps in ((tmp_path / "a.npz", ("--timesteps", words)), (tmp_path / "b.npz", SMALL[-2:])):
        assert run("sample", folders / "digits", "--scheduler", "unipc", *steps, "--npz", npz, "--num_images", 3) == 0
        drawn.append(np.load(npz)["images"].astype(int))
    assert np.abs(drawn[0] - drawn[1]).max() > 2


def test_what_is_saved_is_what_unipc_takes_for_so_many_steps_and_for_no_others(folders, tmp_path, capsys):
    model = shutil.copytree(folders / "digits", tmp_path / "model")
    searched = ("tune-steps", model, *SMALL, "--timestep_spacing", "leading", "--output", tmp_path / "steps.json")
    assert run(*searched, "--save") == 0 and "unipc in 3 steps takes them" in capsys.readouterr().out
    timesteps = json.loads((tmp_path / "steps.json").read_text())["timesteps"]
    pipeline = load_pipeline(model)
    plain, unipc = pipeline.scheduler, UniPCTimestepsScheduler.from_config(pipeline.scheduler.config)
    unipc.set_timesteps(3)
    assert unipc.timesteps.tolist() == timesteps
    # one that was saved with the solver knows them, too
    unipc.save_pretrained(tmp_path / "solver")
    again = UniPCTimestepsScheduler.from_pretrained(tmp_path / "solver")
    again.set_timesteps(3)
    assert again.timesteps.tolist() == timesteps
    for scheduler, steps in ((unipc, 4), (plain, 3)):
        config = {name: value for name, value in scheduler.config.items() if name != "_tuned_timesteps"}
        other = type(scheduler).from_config(config)
        for each in (scheduler, other):
            each.set_timesteps(steps)
        assert torch.equal(scheduler.timesteps, other.timesteps)
    # the command says so, and the protocol of a figure does
    unipc_pipeline = load_pipeline(model)
    unipc_pipeline.scheduler = unipc
    recorded = sampling_protocol(unipc_pipeline, 4, {"num_inference_steps": 3})["options"]
    assert recorded["timesteps"] == timesteps
    assert sampling_protocol(unipc_pipeline, 4, {"num_inference_steps": 4})["options"].get("timesteps") is None
    drawn = []
    for npz, chosen in (
        (tmp_path / "a.npz", ("--timesteps", ",".join(map(str, timesteps)))),
        (tmp_path / "b.npz", SMALL[-2:]),
    ):
        assert run("sample", model, "--scheduler", "unipc", *chosen, "--npz", npz, "--num_images", 3) == 0
        drawn.append(np.load(npz)["images"])
    assert (drawn[0] == drawn[1]).all()
    assert "which tune-steps has found for this model" in capsys.readouterr().out
    # a spacing that is asked for stands above them
    spaced = replace_scheduler(pipeline.scheduler, "unipc", "trailing")
    spaced.set_timesteps(3)
    assert spaced.timesteps.tolist() == [999, 666, 332]
    # a search starts from the solver's own spacing, whatever was saved
    assert run(*searched) == 0 and json.loads((tmp_path / "steps.json").read_text())["timesteps"] == timesteps


def test_a_model_that_is_no_local_folder_cannot_be_written_to(capsys):
    assert run("tune-steps", "somebody/something", *SMALL, "--save") == 2
    assert "scheduler_config.json, which is not there; leave it out" in capsys.readouterr().err


def test_where_nothing_is_gained_nothing_is_written_and_that_is_said(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(step_search, "search", lambda distance, start, total: tuple(start))
    file = tmp_path / "steps.json"
    assert run("tune-steps", folders / "plain", *SMALL, "--output", file) == 0
    assert "no gain beyond chance" in capsys.readouterr().out and not file.exists()


@pytest.mark.parametrize(
    "words, message",
    [
        ((), "give the number of steps by --num_inference_steps"),
        (("--num_inference_steps", 50), "must be fewer than the --reference_steps 50"),
        (("--num_inference_steps", 4, "--scheduler", "deis"), "takes timesteps and draws nothing; take unipc"),
        (("--num_inference_steps", 4, "--scheduler", "ddim", "--eta", 1), "without --eta"),
        (("--num_inference_steps", 4, "--class_labels", "nine"), "--class_labels nine"),
        (
            ("--num_inference_steps", 4, "--scheduler", "ddim", "--save"),
            "--save is for the scheduler unipc, not for ddim",
        ),
    ],
)
def test_what_cannot_be_searched_is_refused_in_a_sentence(folders, words, message, capsys):
    assert run("tune-steps", folders / "digits", *words) == 2
    assert message in capsys.readouterr().err
