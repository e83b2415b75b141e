"""The server: two listening sockets on loopback, the Hub and its storage."""

from __future__ import annotations

import collections
import hashlib
import hmac
import json
import os
import secrets
import socket
import sys
import threading
import time
from http.server import ThreadingHTTPServer
from urllib.parse import quote, urlencode

from tests.hub_server.administration import Administration
from tests.hub_server.commits import Commits
from tests.hub_server.faults import Faults
from tests.hub_server.files import Files
from tests.hub_server.references import References
from tests.hub_server.repositories import Repositories
from tests.hub_server.storage import Storage
from tests.hub_server.store import Store
from tests.hub_server.xet import XetStorage


# Who may do what.  role: "read", "write", or "fineGrained" (then `write` lists the repo
# ids, shell patterns allowed, that this token may write; it reads all its owner may, and
# creates repos only where it may write the whole namespace, "alice/*").
DEFAULT_TOKENS = {
    "hf_alice_write": {"user": "alice", "role": "write", "orgs": ["acme"]},
    "hf_alice_read": {"user": "alice", "role": "read", "orgs": ["acme"]},
    "hf_alice_fine": {"user": "alice", "role": "fineGrained", "orgs": [], "write": ["alice/fine-*"]},
    "hf_bob_write": {"user": "bob", "role": "write", "orgs": []},
}


class Handler(Repositories, Files, Storage, Commits, References, Administration):
    """All that the Hub answers; of two routes that match, the first counts."""


class XetHandler(XetStorage, Handler):
    """The same with Xet storage, whose routes come first."""


class _Listener(ThreadingHTTPServer):
    request_queue_size = 64
    daemon_threads = True
    block_on_close = False

    def __init__(self, hub: HubServer, origin: str, port: int):
        self.hub, self.origin = hub, origin
        super().__init__((hub.host, port), hub.handler)

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], OSError):  # clients hang up; that is their right
            super().handle_error(request, client_address)


class HubServer:
    """The server, running in background threads between start() and stop() (or inside `with`)."""

    def __init__(
        self,
        root: str | os.PathLike,
        port: int = 0,
        *,
        storage_port: int = 0,
        tokens: dict | None = None,
        upload_mode: str = "lfs",
        lfs_threshold: int = 10 << 20,
        multipart_size: int = 64 << 20,
        redirect_lfs: bool = True,
        page_size: int = 1000,
        xet: bool = False,
        verbose: bool = False,
    ):
        self.handler, self.xet = XetHandler if xet else Handler, xet
        # What a subclass adds comes first, so it can take over a route.
        self.routes = [
            (r, f) for c in self.handler.__mro__ for f in vars(c).values() for r in getattr(f, "routes", ())
        ]
        if upload_mode not in ("lfs", "regular"):
            raise ValueError(f"upload_mode must be 'lfs' or 'regular', not {upload_mode!r}")
        self.host = "127.0.0.1"  # and nowhere else: the tokens are no secret and /_admin is open
        self.store = Store(root)
        self.ports = [port, storage_port]
        self.tokens = dict(DEFAULT_TOKENS if tokens is None else tokens)
        self.upload_mode, self.lfs_threshold, self.multipart_size = upload_mode, lfs_threshold, multipart_size
        self.redirect_lfs, self.page_size, self.verbose = redirect_lfs, page_size, verbose
        self.secret = secrets.token_bytes(16)
        self.faults = Faults()
        self.log: collections.deque = collections.deque(maxlen=10_000)
        self.connections: set[socket.socket] = set()
        self.listeners: list[_Listener] = []
        self.stopped = threading.Event()
        for rule in json.loads(os.environ.get("HUB_FAULTS") or "[]"):
            self.faults.add(**rule)

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.ports[0]}"

    @property
    def storage_url(self) -> str:
        # Another name than the Hub's, as in reality: huggingface_hub 1.33 tells hosts apart by name
        # alone, without the port.
        host = "localhost" if self.host == "127.0.0.1" else self.host
        return f"http://{host}:{self.ports[1]}"

    def start(self) -> HubServer:
        self.listeners = [_Listener(self, origin, port) for origin, port in zip(("hub", "storage"), self.ports)]
        self.ports = [listener.server_port for listener in self.listeners]  # kept, so a restart has the same address
        self.stopped.clear()
        for listener in self.listeners:
            threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def stop(self) -> None:
        self.stopped.set()
        for listener in self.listeners:
            listener.shutdown()
            listener.server_close()
        for connection in list(self.connections):  # those that clients keep open
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        self.listeners = []

    __enter__ = start

    def __exit__(self, *exc):
        self.stop()

    def env(self, token: str | None = None, home: str | os.PathLike | None = None) -> dict[str, str]:
        """Environment that points a client process here.  It is read when `huggingface_hub` is
        imported, so it must be set before that: give it to a fresh process."""
        env = {
            "HF_ENDPOINT": self.url,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_XET": "0" if self.xet else "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }
        if token:
            env["HF_TOKEN"] = token
        if home:
            env["HF_HOME"] = str(home)
        return env

    def signature(self, operation: str, sha256: str, part, expires) -> str:
        text = f"{operation} {sha256} {part} {expires}".encode()
        return hmac.new(self.secret, text, hashlib.sha256).hexdigest()

    def signed_url(self, operation: str, sha256: str, part: int = 0, lifetime: int = 3600) -> str:
        expires = int(time.time()) + lifetime
        query = {"part": part, "expires": expires, "signature": self.signature(operation, sha256, part, expires)}
        return f"{self.storage_url}/storage/{quote(sha256)}?{urlencode(query)}"
