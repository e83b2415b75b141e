"""What the card says of a run in several parts: time and energy of all of them, or nothing."""

import json

from hf_diffusion.loop import energy
from hf_diffusion.loop.energy import EnergyCount
from tests.training.interruptions import stop_after
from tests.training.test_train_ddpm import run


class TenKilowattHours:
    """A meter that has counted as much at every look."""

    def __init__(self, gpus: int = 0):
        pass

    def joules(self) -> dict[str, float]:
        return {"CPU packages (RAPL)": 10.0 * 3.6e6}


def test_wall_time_and_energy_of_an_interrupted_run_are_those_of_all_its_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "EnergyMeter", TenKilowattHours)
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        run(tmp_path, "--max_train_steps", "6")
    assert not (tmp_path / "README.md").exists()
    manifest = tmp_path / "checkpoint-00000004" / "manifest.json"
    content = json.loads(manifest.read_text())
    assert content["spent"]["joules"] == TenKilowattHours().joules() and content["spent"]["wall_time"] > 0
    # As if it had taken an hour.
    content["spent"]["wall_time"] = 3600.0
    manifest.write_text(json.dumps(content))
    run(tmp_path, "--max_train_steps", "6", "--resume_from_checkpoint", "latest")
    card = (tmp_path / "README.md").read_text()
    assert "| wall time | 1 h 0 min |" in card and "| energy | 20 kWh CPU packages (RAPL) |" in card
    assert "| images seen | 48 |" in card and "resume_from_checkpoint" not in card


def test_a_source_of_energy_that_a_part_of_the_run_could_not_read_is_left_out(monkeypatch):
    monkeypatch.setattr(energy, "EnergyMeter", TenKilowattHours)
    assert EnergyCount(before=None).joules() == TenKilowattHours().joules()
    assert EnergyCount(before={}).joules() == {} and EnergyCount(before={"GPUs (NVML)": 1.0}).joules() == {}
