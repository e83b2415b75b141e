"""Whether the Hub can be reached at all, found in seconds.

huggingface_hub and datasets try for half a minute before they say that there is no network.
"""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import datasets
from huggingface_hub import constants
from huggingface_hub.errors import OfflineModeIsEnabled


# Seconds for a connection, and before it is tried once more.
CONNECTING, BEFORE_ANOTHER = 5.0, 1.0
PORTS = {"http": 80, "https": 443}


@contextmanager
def hub_or_cache(name: str | os.PathLike) -> Iterator[None]:
    """Let the libraries look into the cache alone where the Hub, which has `name`, is out of reach.

    What is a path here needs no Hub. ConnectionError for what is not in the cache.
    """
    if os.path.exists(name) or constants.HF_HUB_OFFLINE or hub_answers():
        yield
        return
    former, datasets_former = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise ConnectionError(
            f"{str(name)!r} is no path here, and the Hub, which may have it, cannot be reached; look at the name and "
            "at the network"
        ) from error
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = former, datasets_former


def hub_answers() -> bool:
    """Whether the Hub, or the proxy before it, takes a connection."""
    address = urlsplit(constants.ENDPOINT)
    proxy = None if proxy_bypass(address.hostname) else getproxies().get(address.scheme)
    address = urlsplit(proxy) if proxy else address
    where = (address.hostname, address.port or PORTS.get(address.scheme, 443))
    for wait in (BEFORE_ANOTHER, None):
        try:
            socket.create_connection(where, timeout=CONNECTING).close()
            return True
        except OSError:
            if wait is not None:
                time.sleep(wait)
    return False
