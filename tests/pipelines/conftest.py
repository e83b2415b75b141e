"""The fresh process that all tests of this folder share."""

import pytest

from tests.pipelines.fresh_process import load_in_a_fresh_process


@pytest.fixture(scope="session")
def outcome(hub, tmp_path_factory):
    """What a process that imports nothing of this one saw, drew and left; see `Outcome`."""
    work = tmp_path_factory.mktemp("loading")
    return load_in_a_fresh_process(work, hub.env("hf_alice_write", home=work / "home"))
