"""Rules that make chosen requests fail, break off, crawl or lie."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, field

from tests.hub_server.reply import Reply


@dataclass
class Fault:
    """Spoil some requests; `match` is a regular expression searched in "METHOD /path?query".

    The actions:
    - status: answer `status` with `headers` (and `body`, if the Hub's JSON is not wanted)
    - drop: close the connection without an answer
    - cut: send the answer's headers and `at` bytes of its body, then close
    - cut_upload: take `at` bytes of the request's body, then close
    - corrupt: flip byte `at` of the answer's body; its length stays right
    - corrupt_upload: flip byte `at` of the request's body
    - delay: wait `seconds`, then go on as usual
    - slow: send the answer's body at `rate` bytes a second

    `when` is "before" the request is carried out, or "after" (status, drop): it takes effect, but
    the client never learns so. `rst` breaks off with a TCP reset rather than an orderly close.
    """

    action: str
    match: str = ""
    # how many requests; -1: all
    count: int = 1
    # let this many go by first
    skip: int = 0
    when: str = "before"
    status: int = 500
    headers: dict = field(default_factory=dict)
    message: str = "injected fault"
    body: str | None = None
    at: int = 0
    seconds: float = 0.0
    rate: int = 0
    rst: bool = False

    ACTIONS = ("status", "drop", "cut", "cut_upload", "corrupt", "corrupt_upload", "delay", "slow")

    def __post_init__(self):
        if self.action not in self.ACTIONS or self.when not in ("before", "after"):
            raise ValueError(f"not a fault: {self}")
        re.compile(self.match)


class Faults:
    """The rules of now; each request takes the first that applies."""

    def __init__(self):
        self.rules: list[Fault] = []
        self.lock = threading.Lock()

    def add(self, **rule) -> None:
        with self.lock:
            self.rules.append(Fault(**rule))

    def clear(self) -> None:
        with self.lock:
            self.rules.clear()

    def take(self, line: str) -> Fault | None:
        """The first rule that applies to this request, using up one of its counts."""
        with self.lock:
            for rule in self.rules:
                if rule.count and re.search(rule.match, line):
                    if rule.skip > 0:
                        rule.skip -= 1
                        continue
                    rule.count -= 1 if rule.count > 0 else 0
                    return rule
        return None


class Broken(Exception):
    """This connection is to be closed now."""


class Spoiled(Exception):
    """A reply decided by a fault, in place of the proper one."""

    def __init__(self, reply: Reply):
        self.reply = reply
