"""Reading energy counters: made-up ones, since most machines hide theirs."""

import sys
import types

import pytest

from hf_diffusion.loop import energy
from hf_diffusion.loop.energy import EnergyMeter


@pytest.fixture
def powercap(tmp_path, monkeypatch):
    """Two packages and a zone within the first; `set(zone, microjoules)`."""
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    for zone in ("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0"):
        (tmp_path / zone).mkdir()
        (tmp_path / zone / "energy_uj").write_text("1000000\n")
        (tmp_path / zone / "max_energy_range_uj").write_text("9000000\n")

    def set_counter(zone: str, value: int) -> None:
        (tmp_path / f"intel-rapl:{zone}" / "energy_uj").write_text(f"{value}\n")

    return set_counter


def test_packages_are_added_up_and_zones_within_them_are_not_counted_twice(powercap):
    meter = EnergyMeter()
    assert meter.joules() == {"CPU packages (RAPL)": 0}
    for zone, value in (("0", 3_000_000), ("1", 1_500_000), ("0:0", 2_500_000)):
        powercap(zone, value)
    assert meter.joules() == {"CPU packages (RAPL)": 2.5}


def test_a_counter_that_goes_round_is_counted_on(powercap):
    meter = EnergyMeter()
    powercap("0", 8_000_000)
    assert meter.joules() == {"CPU packages (RAPL)": 7}
    powercap("0", 500_000)  # 1 J to the end of its range and half a joule after
    assert meter.joules() == {"CPU packages (RAPL)": 8.5}


def test_what_cannot_be_read_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    (tmp_path / "intel-rapl:0").mkdir()
    (tmp_path / "intel-rapl:0" / "energy_uj").mkdir()  # reading it is an OSError, as without the right to
    assert EnergyMeter(gpus=1).joules() == {}


def fake_nvml(monkeypatch, read) -> None:
    class NVMLError(Exception):
        pass

    module = types.SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: read(handle, NVMLError),
    )
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.setattr(energy.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(energy.torch.cuda, "device_count", lambda: 4)
    properties = lambda i: types.SimpleNamespace(uuid=f"0-{i}")  # noqa: E731
    monkeypatch.setattr(energy.torch.cuda, "get_device_properties", properties)


def test_gpus_of_this_run_are_found_by_uuid_and_added_up(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    millijoules = {b"GPU-0-0": 5000, b"GPU-0-1": 7000}  # a third would be a KeyError
    fake_nvml(monkeypatch, lambda handle, error: millijoules[handle])
    meter = EnergyMeter(gpus=2)
    millijoules[b"GPU-0-0"] += 1500
    millijoules[b"GPU-0-1"] += 500
    assert meter.joules() == {"GPUs (NVML)": 2.0}


def test_gpus_that_do_not_count_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)

    def refuse(handle, error):
        raise error("not supported")

    fake_nvml(monkeypatch, refuse)
    assert EnergyMeter(gpus=1).joules() == {}
