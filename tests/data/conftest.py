"""Every test of data has a cache of its own, and none counts a download."""

import os


# Before datasets is imported: it would reach for the network.
os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")

import datasets
import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)
