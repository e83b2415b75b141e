"""What all tests share: the device, accelerate's state, and a Hub on loopback."""

import os

import pytest
import torch

from tests.hub_server import HubServer
from tests.launching import forget_accelerate


HAS_CUDA = torch.cuda.is_available()
# Small networks gain nothing from a second thread, sums over more threads round otherwise, and
# accelerate changes the number where the variable is not set.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
# What tests and the processes that they start see of the device, unless they are marked `gpu`.
ON_CPU = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item):
    """Every test runs on the CPU, as do the fixtures made for it, unless it is marked `gpu`.

    Most tests compare to the last bit, which no two devices share.
    """
    if item.get_closest_marker("gpu"):
        return (yield)
    # Of the environment these alone are put back: a fixture of the module may have set others.
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ON_CPU.items():
            patch.setenv(name, value)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        return (yield)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not HAS_CUDA:
        pytest.skip("needs a CUDA device, and this machine has none")


@pytest.fixture(autouse=True)
def accelerate_starts_anew():
    """One process holds one precision, device and engine at a time: each test may ask for others.

    Before it, too, since a fixture of the module may have trained.
    """
    forget_accelerate()
    yield
    forget_accelerate()


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """A running server: `hub.env(token, home=folder)` is the environment of a client."""
    with HubServer(tmp_path_factory.mktemp("hub")) as server:
        yield server
