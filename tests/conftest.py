"""A Hub on loopback for the tests that push and pull; its clients are child processes, which take its environment."""

import pytest

from tests.hub_server import HubServer


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """A running server: `hub.env(token, home=folder)` is the environment of a client."""
    with HubServer(tmp_path_factory.mktemp("hub")) as server:
        yield server
