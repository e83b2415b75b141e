"""Requests of the tests themselves: the log and the faults; and why there is no Xet."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict

from tests.hub_server.objects import HubError
from tests.hub_server.reply import as_json
from tests.hub_server.request import API, Request, route


class Administration(Request):
    """Requests of the tests themselves: the log and the faults; and why there is no Xet."""

    def xet_hash(self, sha256: str) -> str | None:
        return None

    @route("GET", API + r"/xet-(?:read|write)-token/.*")
    def xet_token(self, kind, repo):
        raise HubError(404, "This server has no Xet storage: run the client with HF_HUB_DISABLE_XET=1")

    @route("GET", r"/_admin/(?P<what>log|faults)")
    def admin_show(self, what):
        return as_json(list(self.hub.log) if what == "log" else [asdict(f) for f in self.hub.faults.rules])

    @route("DELETE", r"/_admin/(?P<what>log|faults)")
    def admin_clear(self, what):
        getattr(self.hub, what).clear()
        return as_json({"ok": True})

    @route("POST", r"/_admin/faults")
    def admin_add(self):
        rules = json.loads(self.body())
        try:
            for rule in rules if isinstance(rules, list) else [rules]:
                self.hub.faults.add(**rule)
        except (TypeError, ValueError, re.error) as exc:
            raise HubError(400, str(exc)) from None
        return as_json({"ok": True})

    def log_message(self, format, *args):
        if self.hub.verbose:
            print(f"{self.server.origin:7} {format % args}", file=sys.stderr)
