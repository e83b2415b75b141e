"""What the server answers with."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Reply:
    body: bytes = b""
    status: int = 200
    headers: dict = field(default_factory=dict)
    file: tuple[Path, int, int] | None = None  # (path, start, length) instead of `body`

    @property
    def length(self) -> int:
        return self.file[2] if self.file else len(self.body)


def as_json(value, status: int = 200, **headers) -> Reply:
    return Reply(json.dumps(value).encode(), status, {"Content-Type": "application/json; charset=utf-8", **headers})
