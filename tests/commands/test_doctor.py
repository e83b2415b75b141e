"""`hf-diffusion doctor`: what it finds, and what it advises."""

import importlib.metadata

import pytest

from hf_diffusion.cli import main
from hf_diffusion.commands import doctor


REQUIRED = ["torch>=2.11", "numpy>=2.0", 'scikit-learn>=1.7; extra == "digits"', 'nothing>=1; extra == "energy"']


@pytest.fixture
def said(monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)

    def run(required=REQUIRED, versions=None) -> tuple[int, str]:
        known = {"torch": "2.13.0+cpu", "numpy": "2.4.6", "scikit-learn": "1.7.1"} | (versions or {})

        def version(name: str) -> str:
            if name not in known:
                raise importlib.metadata.PackageNotFoundError(name)
            return known[name]

        monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: required)
        monkeypatch.setattr(doctor.importlib.metadata, "version", version)
        return main(["doctor"]), capsys.readouterr().out

    return run


def test_what_is_there_is_listed_and_what_is_optional_is_told_how_to_get(said):
    status, text = said()
    assert status == 0
    for part in ("packages: torch 2.13.0+cpu, numpy 2.4.6", "digits yes, energy no", "CPU: ", "disk: this folder, "):
        assert part in text
    assert "- optional part energy: pip install 'hf-diffusion[energy]'" in text
    assert "Hub: not logged in" in text and "hf auth login" in text


def test_a_package_that_is_too_old_is_named_and_fails(said):
    status, text = said(versions={"torch": "2.9.1"})
    assert status == 1 and "- torch 2.9.1, 2.11 or newer is needed: pip install -U 'torch'" in text
    status, text = said(required=[*REQUIRED, "absent>=3"])
    assert status == 1 and "- absent is missing, 3 or newer is needed: pip install -U 'absent'" in text


def test_a_token_without_a_network_is_no_failure(said, monkeypatch):
    def whoami():
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_x")
    monkeypatch.setattr("huggingface_hub.whoami", whoami)
    status, text = said()
    assert status == 0 and "not who it belongs to (no route to host)" in text and "hf_x" not in text


def test_a_full_disk_is_told(said, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: doctor.shutil._ntuple_diskusage(1, 1, 2**20))
    assert "this folder has 0.0 GiB free: give --output a folder elsewhere" in said()[1]
