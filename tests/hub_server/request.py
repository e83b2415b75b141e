"""One HTTP request from end to end: who asks, which route, the reply, and the faults in between."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import re
import secrets
import socket
import struct
import tempfile
import time
import traceback
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub_server.faults import Broken, Fault, Spoiled
from tests.hub_server.objects import CHUNK, URL_PREFIX, HubError
from tests.hub_server.reply import Reply, as_json
from tests.hub_server.store import Store


API = r"/api/(?P<kind>models|datasets|spaces)/(?P<repo>[^/]+/[^/]+)"
WEB = r"(?:/(?P<kind>datasets|spaces))?/(?P<repo>[^/]+/[^/]+?)"


def route(method: str, pattern: str, origin: str = "hub"):
    """Matched against the path as sent: a quoted slash (refs%2Fpr%2F1) stays inside its part."""

    def mark(function):
        function.routes = [*getattr(function, "routes", []), (origin, method, re.compile(pattern))]
        return function

    return mark


class Request(BaseHTTPRequestHandler):
    """What every request goes through; the areas of the Hub add routes to it."""

    protocol_version = "HTTP/1.1"
    wbufsize = CHUNK  # one send for headers and small body
    disable_nagle_algorithm = True
    server_version, sys_version = "loopback-hub", ""

    def setup(self):
        super().setup()
        self.hub.connections.add(self.connection)

    def finish(self):
        self.hub.connections.discard(self.connection)
        super().finish()

    @property
    def hub(self) -> Any:
        return self.server.hub

    def do(self):
        url = urlsplit(self.path)
        self.url_path, self.query = url.path, parse_qs(url.query, keep_blank_values=True)
        self.body_left, self.chunked = int(self.headers.get("Content-Length") or 0), False
        if "chunked" in (self.headers.get("Transfer-Encoding") or "").lower():
            self.chunked, self.body_left = True, 1
        self.who: dict | None = None
        admin = self.url_path.startswith("/_admin/")
        self.fault = None if admin else self.hub.faults.take(f"{self.command} {self.path}")
        entry = {
            "method": self.command,
            "path": self.path,
            "origin": self.server.origin,
            "status": None,
            "user": None,
            "auth": "Authorization" in self.headers,
            "fault": self.fault and self.fault.action,
        }
        if not admin:
            self.hub.log.append(entry)  # while it is being answered, its status is None
        try:
            reply = self.answer()
            entry |= {"status": reply.status, "user": self.who and self.who["user"]}
            self.send(reply)
        except (Broken, ConnectionError) as exc:
            entry["status"] = f"broken: {exc or type(exc).__name__}"
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do

    def answer(self) -> Reply:
        fault = self.fault
        try:
            if fault and fault.action == "delay":
                if self.hub.stopped.wait(fault.seconds):
                    raise Broken("server stopped")
            if fault and fault.when == "before":
                self.fail_with(fault)
            reply = self.dispatch()
            if fault and fault.when == "after":
                self.fail_with(fault)
            return reply
        except Spoiled as exc:
            return exc.reply
        except HubError as exc:
            # Header values are latin-1 and one line; the body carries the message in full.
            headers = {"X-Error-Message": " ".join(exc.message.split()).encode("ascii", "replace").decode()[:500]}
            if exc.code:
                headers["X-Error-Code"] = exc.code
            return as_json({"error": exc.message}, exc.status, **headers, **exc.headers)
        except (Broken, ConnectionError):
            raise
        except Exception:
            traceback.print_exc()
            return as_json({"error": "the loopback hub failed; see its stderr"}, 500)

    def fail_with(self, fault: Fault) -> None:
        if fault.action == "status" and fault.body is not None:
            raise Spoiled(Reply(fault.body.encode(), fault.status, {"Content-Type": "text/html", **fault.headers}))
        if fault.action == "status":
            raise HubError(fault.status, fault.message, headers=fault.headers)
        if fault.action == "drop":
            self.break_off(fault.rst)

    def break_off(self, rst: bool):
        """End the connection here: orderly (FIN) or not (RST)."""
        self.wfile.flush()
        if rst:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.hub.connections.discard(self.connection)
            os.close(self.connection.detach())
        raise Broken("reset" if rst else "closed")

    def dispatch(self) -> Reply:
        method = "GET" if self.command == "HEAD" else self.command
        for (origin, verb, pattern), function in self.hub.routes:
            match = pattern.fullmatch(self.url_path) if verb == method and origin == self.server.origin else None
            if match:
                parts = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                if self.server.origin == "hub":
                    self.who = self.authenticate()
                    if "repo" in parts:
                        parts.setdefault("kind", "models")
                return function(self, **parts)
        raise HubError(404, f"Not served here: {self.command} {self.url_path}")

    def send(self, reply: Reply) -> None:
        # A body nobody read would be taken for the next request: read it, or close afterwards.
        if self.body_left:
            for _ in self.body_chunks(limit=1 << 20):
                pass
            self.close_connection = self.close_connection or bool(self.body_left)
        self.send_response(reply.status)
        for key, value in {
            "Content-Length": str(reply.length),
            "X-Request-Id": secrets.token_hex(8),
            **reply.headers,
        }.items():
            self.send_header(key, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command == "HEAD":
            return
        fault, sent = self.fault, 0
        for chunk in self.reply_chunks(reply):
            if fault and fault.action == "cut" and sent + len(chunk) > fault.at:
                self.wfile.write(chunk[: fault.at - sent])
                self.break_off(fault.rst)
            if fault and fault.action == "corrupt" and sent <= fault.at < sent + len(chunk):
                chunk = bytearray(chunk)
                chunk[fault.at - sent] ^= 0xFF
            if fault and fault.action == "slow" and fault.rate:
                for start in range(0, len(chunk), max(1, fault.rate // 10)):
                    self.wfile.write(chunk[start : start + max(1, fault.rate // 10)])
                    self.wfile.flush()
                    time.sleep(0.1)
            else:
                self.wfile.write(chunk)
            sent += len(chunk)

    @staticmethod
    def reply_chunks(reply: Reply):
        if reply.file is None:
            yield reply.body
            return
        path, start, left = reply.file
        with open(path, "rb") as file:
            file.seek(start)
            while left > 0 and (chunk := file.read(min(CHUNK, left))):
                left -= len(chunk)
                yield chunk

    def body_chunks(self, limit: int | None = None):
        """The body piece by piece, whether its length is announced or it comes chunked."""
        fault, seen = self.fault, 0
        while self.body_left and (limit is None or seen < limit):
            if self.chunked:
                size = int(self.rfile.readline().split(b";")[0] or b"0", 16)
                data = self.rfile.read(size)
                self.rfile.readline()  # the blank line after the chunk, or after the trailer
                self.body_left = 1 if size else 0
                short = len(data) < size
            else:
                size = min(CHUNK, self.body_left)
                data = self.rfile.read(size)
                self.body_left -= len(data)
                short = len(data) < size
            if short:
                raise Broken("client went away")
            if fault and fault.action == "cut_upload" and seen + len(data) > fault.at:
                self.break_off(fault.rst)
            if fault and fault.action == "corrupt_upload" and seen <= fault.at < seen + len(data):
                data = bytearray(data)
                data[fault.at - seen] ^= 0xFF
            seen += len(data)
            if data:
                yield bytes(data)

    def body(self) -> bytes:
        return b"".join(self.body_chunks())

    def json_body(self) -> dict:
        try:
            value = json.loads(self.body() or b"{}")
        except ValueError as exc:
            raise HubError(400, f"Body is not JSON: {exc}") from None
        if not isinstance(value, dict):
            raise HubError(400, "Body must be a JSON object")
        return value

    def body_to_file(self) -> tuple[Path, str, str]:
        """Store the body -> (file, sha256, md5)."""
        sha256, md5 = hashlib.sha256(), hashlib.md5()
        with tempfile.NamedTemporaryFile(dir=self.store.root / "uploads", delete=False) as tmp:
            try:
                for chunk in self.body_chunks():
                    tmp.write(chunk)
                    sha256.update(chunk)
                    md5.update(chunk)
            except BaseException:
                os.unlink(tmp.name)
                raise
        return Path(tmp.name), sha256.hexdigest(), md5.hexdigest()

    def flag(self, name: str) -> bool:
        return self.query.get(name, [""])[0].lower() in ("1", "true", "yes")

    @property
    def store(self) -> Store:
        return self.hub.store

    def authenticate(self) -> dict | None:
        header = self.headers.get("Authorization")
        if header is None:
            return None
        token = header.removeprefix("Bearer ").strip()
        if token not in self.hub.tokens:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.hub.tokens[token]

    def in_namespace(self, repo_id: str) -> bool:
        owner = repo_id.split("/")[0]
        return bool(self.who) and (owner == self.who["user"] or owner in self.who.get("orgs", []))

    def check_write(self, repo_id: str, create: bool = False) -> None:
        if self.who is None:
            raise HubError(401, "Invalid username or password.")
        if not self.in_namespace(repo_id):
            raise HubError(403, f'You don\'t have the rights to write under the namespace "{repo_id.split("/")[0]}"')
        role, patterns = self.who["role"], self.who.get("write", [])
        if create:
            patterns = [p for p in patterns if p.endswith("/*")]
        if not (role == "write" or (role == "fineGrained" and any(fnmatch.fnmatchcase(repo_id, p) for p in patterns))):
            raise HubError(403, f"Your token has no write access to {repo_id} (its role is {role!r})")

    def get_repo(self, kind: str, repo: str, write: bool = False) -> dict:
        found = self.store.find(kind, repo)
        if found is None or (found["private"] and not self.in_namespace(repo)):
            # A private repo must look like a missing one; the Hub says 401 to those it does not
            # know.
            raise HubError(404 if self.who else 401, "Repository not found", "RepoNotFound")
        if write:
            self.check_write(repo)
        return found

    def get_commit(self, kind: str, repo: str, rev: str | None = None) -> tuple[dict, dict]:
        found = self.get_repo(kind, repo)
        return found, self.store.commit(found, self.store.resolve(found, rev or "main"))

    def web_url(self, repo: dict) -> str:
        return f"http://{self.headers.get('Host') or self.hub.url[7:]}/{URL_PREFIX[repo['kind']]}{repo['id']}"
