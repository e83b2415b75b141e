"""The energy that a run takes, where the machine tells it: CPU packages by RAPL, NVIDIA GPUs by
NVML.

RAPL (https://docs.kernel.org/power/powercap/powercap.html) counts whole CPU packages, whatever else
runs on them, and most systems let only root read it. NVML needs the package `nvidia-ml-py`. What
cannot be read is left out, never estimated.
"""

from pathlib import Path

import torch


POWERCAP = Path("/sys/class/powercap")
PACKAGE_ZONE = "intel-rapl:[0-9]*"  # AMD's processors have it under this name, too


class EnergyMeter:
    """Joules since it was made, by source: "CPU packages (RAPL)" and "GPUs (NVML)"; a source that
    cannot be read is none.

    Read it more often than a RAPL counter goes round, which takes minutes to hours.
    """

    def __init__(self, gpus: int = 0):
        self._zones = [zone for zone in sorted(POWERCAP.glob(PACKAGE_ZONE)) if zone.name.count(":") == 1]
        self._zones = [zone for zone in self._zones if _number(zone / "energy_uj") is not None]
        self._last = {zone: _number(zone / "energy_uj") for zone in self._zones}
        self._cpu = 0.0
        self._handles = _nvml_handles(gpus)
        self._gpu_at_start = self._gpu_joules()

    def joules(self) -> dict[str, float]:
        """What each source has counted so far."""
        for zone in self._zones:
            now = _number(zone / "energy_uj")
            if now is not None:
                passed = now - self._last[zone]
                if passed < 0:  # the counter went round
                    passed += _number(zone / "max_energy_range_uj") or 0
                self._cpu, self._last[zone] = self._cpu + max(0, passed) / 1e6, now
        found = {"CPU packages (RAPL)": self._cpu} if self._zones else {}
        if self._gpu_at_start is not None and (gpu := self._gpu_joules()) is not None:
            found["GPUs (NVML)"] = gpu - self._gpu_at_start
        return found

    def _gpu_joules(self) -> float | None:
        if not self._handles:
            return None
        import pynvml

        try:
            return sum(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in self._handles) / 1000
        except pynvml.NVMLError:  # GPUs from before Volta do not count
            return None


class EnergyCount:
    """The joules of a run over all its processes in time, by source.

    For the main process of a machine.
    """

    def __init__(self, before: dict[str, float] | None, gpus: int = 0):
        self.before, self.meter = before, EnergyMeter(gpus)

    def joules(self) -> dict[str, float]:
        """What this process has measured, added to what earlier ones of the run have."""
        now = self.meter.joules()
        if self.before is None:
            return now
        # a source that earlier processes could not read would tell a part for the whole
        return {name: self.before[name] + value for name, value in now.items() if name in self.before}


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _nvml_handles(gpus: int) -> list:
    """Handles of the first `gpus` devices that this process sees.

    CUDA_VISIBLE_DEVICES renumbers them, so that the UUID must find them.
    """
    if not gpus or not torch.cuda.is_available():
        return []
    try:
        import pynvml

        pynvml.nvmlInit()
        uuids = [torch.cuda.get_device_properties(i).uuid for i in range(min(gpus, torch.cuda.device_count()))]
        return [pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode()) for uuid in uuids]
    # not installed, no driver, a virtual GPU, or a GPU of another maker: any of many errors
    except Exception:
        return []
