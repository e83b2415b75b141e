"""Several averages of one run, of which the best by a measure becomes the model, with Muon."""

import json
from pathlib import Path

import pytest
import torch

from hf_diffusion import ADMUNet2DModel
from hf_diffusion.loop.checkpoints import list_checkpoints
from hf_diffusion.loop.states import read_state
from tests.training.interruptions import stop_after
from tests.training.test_train_ddpm import assert_same_weights, metrics, run, weights


MEASURED = [
    "--max_train_steps",
    "5",
    "--eval_split",
    "train[:40]",
    "--split",
    "train[100:200]",
    "--eval_steps",
    "none",
]
SEVERAL = ["--ema_max_decays", "0.5,0.0", "--ema_metric", "eval_loss", "--optimizer", "muon"]


def parameters(folder: Path, averaged: bool = True) -> list[torch.Tensor]:
    """In the order of the network, which is that of an average."""
    network = ADMUNet2DModel.from_pretrained(folder / "unet")
    network.load_state_dict(weights(folder, averaged))
    return list(network.parameters())


def shadow(folder: Path, name: str) -> list[torch.Tensor]:
    return read_state(list_checkpoints(folder)[-1], name)["shadow_params"]


def assert_equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.fixture(scope="module")
def chosen(tmp_path_factory) -> Path:
    return run(tmp_path_factory.mktemp("several") / "run", *MEASURED, *SEVERAL)


def test_the_best_average_is_the_model_and_all_are_told(chosen):
    records = metrics(chosen)
    told = {name: value for record in records for name, value in record.items() if "_of_average_" in name}
    assert set(told) == {f"eval_loss_of_average_{decay}" for decay in (0.9, 0.5, 0.0)}
    best = min(told, key=told.get)
    # its other results are those of the run
    assert records[-1]["eval_loss"] == told[best]
    card = (chosen / "README.md").read_text()
    assert f"| decay of the average | {best.rsplit('_', 1)[1].removesuffix('.0')} |" in card
    assert all(f"average of decay {decay}" in card for decay in (0.9, 0.5, 0.0))
    name = "average" if best.endswith("0.9") else best.split("of_")[1]
    assert_equal(shadow(chosen, name), parameters(chosen))


def test_an_average_without_memory_is_the_weights_of_now(chosen):
    for average, last in zip(shadow(chosen, "average_0.0"), parameters(chosen, averaged=False), strict=True):
        torch.testing.assert_close(average, last.detach(), rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_an_interrupted_run_of_several_averages_and_muon_ends_with_the_very_same(chosen, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        run(tmp_path, *MEASURED, *SEVERAL)
    for other, what in (("adamw", "optimizer was 'muon' and is 'adamw'"), ("muon", "ema_max_decays was")):
        flags = ["--optimizer", other, *(SEVERAL[:4] if other == "adamw" else [])]
        with pytest.raises(SystemExit, match=what):
            run(tmp_path, *MEASURED, *flags, "--resume_from_checkpoint", "latest")
    manifest = list_checkpoints(tmp_path)[-1] / "manifest.json"
    written = manifest.read_text()
    content = json.loads(written)
    # as versions before these settings have written it
    del content["settings"]["optimizer"], content["settings"]["ema_max_decays"]
    manifest.write_text(json.dumps(content))
    with pytest.raises(SystemExit, match=r"optimizer was 'adamw' and is 'muon'; ema_max_decays was \[\] and is"):
        run(tmp_path, *MEASURED, *SEVERAL, "--resume_from_checkpoint", "latest")
    manifest.write_text(written)
    run(tmp_path, *MEASURED, *SEVERAL, "--resume_from_checkpoint", "latest")
    assert_same_weights(weights(tmp_path), weights(chosen))
    for name in ("average", "average_0.5"):
        assert_equal(shadow(tmp_path, name), shadow(chosen, name))


@pytest.mark.slow
def test_without_them_a_run_is_as_it_was(chosen, tmp_path):
    one = run(tmp_path / "one", *MEASURED, "--optimizer", "muon")
    assert_equal(shadow(one, "average"), shadow(chosen, "average"))
    assert sorted(path.name for path in list_checkpoints(one)[-1].glob("average*")) == [
        "average.json", "average.safetensors"
    ]  # fmt: skip
    assert "average" not in json.dumps(metrics(one))


def test_what_nothing_measures_cannot_choose(tmp_path, capsys):
    with pytest.raises(SystemExit, match="ema_metric fd needs something that is measured"):
        run(tmp_path, "--max_train_steps", "2", "--ema_max_decays", "0.5")
    with pytest.raises(SystemExit):
        run(tmp_path, "--max_train_steps", "2", "--ema_max_decays", "0.5", "--no-use_ema")
    assert "ema_max_decays 0.5 are averages, and use_ema is off" in capsys.readouterr().err
