"""What goes wrong on the way to the Hub: what passes by itself, how long to wait, what to say."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from huggingface_hub import constants, set_client_factory
from huggingface_hub.errors import (
    BadRequestError,
    GatedRepoError,
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils._http import default_client_factory


Result = TypeVar("Result")
# 409 and 412: somebody else's commit came first. 507: no room at the moment. 520 to 524: a proxy
# before the Hub.
TRANSIENT = (408, 409, 412, 425, 429, 500, 502, 503, 504, 507, 520, 521, 522, 523, 524)
TIMEOUTS = {"connect": 15.0, "read": 120.0, "write": 120.0, "pool": 60.0}  # seconds without any progress
# hf_xet has time limits of its own for large files, 300 s, and for the list of their chunks none at
# all (xet-core, pull request 685).
UPLOAD_TIME = 600.0  # seconds for a commit with all its files, beside those that the files take at the slowest rate
SLOWEST_RATE = 100_000  # bytes a second


class PushError(RuntimeError):
    """A push that did not get through, in one sentence; `final` if trying again would not help."""

    def __init__(self, message: str, final: bool):
        super().__init__(message)
        self.final = final


class ChecksumMismatch(RuntimeError):
    """A file on the Hub differs from the one that was sent."""


@contextmanager
def bounded_requests() -> Iterator[None]:
    """No request of huggingface_hub, in this process, waits without end for a silent peer."""

    def client():
        made = default_client_factory()
        # A timeout of the client alone would not bind the calls that ask for none explicitly.
        hooks = made.event_hooks
        made.event_hooks = {**hooks, "request": [*hooks["request"], _bound]}
        return made

    set_client_factory(client)
    try:
        yield
    finally:
        set_client_factory(default_client_factory)


def within(seconds: float, call: Callable[[], Result]) -> Result:
    """The result of `call()`; TimeoutError after so many seconds, while a daemon thread goes on."""
    ended: list[tuple[Result | None, BaseException | None]] = []

    def run() -> None:
        try:
            ended.append((call(), None))
        except BaseException as error:
            ended.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not ended:
        raise TimeoutError(f"the upload has not ended in {seconds:.0f} s")
    result, error = ended[0]
    if error is not None:
        raise error
    return result


@contextmanager
def without_xet() -> Iterator[None]:
    """Large files go by LFS: hf_xet queues behind an upload of this process that has stalled."""
    former, constants.HF_HUB_DISABLE_XET = constants.HF_HUB_DISABLE_XET, True
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_XET = former


def _bound(request) -> None:
    given = request.extensions.get("timeout") or {}
    bounds = {kind: limit if given.get(kind) is None else given[kind] for kind, limit in TIMEOUTS.items()}
    request.extensions = {**request.extensions, "timeout": bounds}


def is_transient(error: BaseException) -> bool:
    """Whether the same push may well succeed a little later."""
    if isinstance(error, OfflineModeIsEnabled):
        return False
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in TRANSIENT
    if isinstance(error, json.JSONDecodeError | ChecksumMismatch | TimeoutError):  # a gateway's HTML page is no JSON
        return True
    if isinstance(error, ConnectionError):  # hf_xet tells the status in the text only
        return re.search(r"\b4(?!08|25|29)\d\d\b", str(error)) is None
    if isinstance(error, RuntimeError) and str(error).startswith("Error while uploading"):
        return True  # refused by the storage, as when a signed address expired; the next attempt gets a new one
    return type(error).__module__.split(".")[0].startswith(("httpx", "httpcore"))


def retry_after(error: BaseException) -> float:
    """Seconds that the Hub asks to wait, 0 if it does not say."""
    headers = error.response.headers if isinstance(error, HfHubHTTPError) else {}
    asked = re.match(r"\d+", headers.get("Retry-After", "")) or re.search(r"(?<=t=)\d+", headers.get("RateLimit", ""))
    return float(asked[0]) if asked else 0.0


def brief(error: BaseException) -> str:
    """What happened, in a few words."""
    status = f"the Hub answered {error.response.status_code}" if isinstance(error, HfHubHTTPError) else ""
    text = " ".join(str(error).split())
    return status or f"{type(error).__name__}{': ' if text else ''}{text[:200]}"


def in_one_sentence(error: BaseException, repo_id: str) -> str:
    """What the user should know and do about a push that failed."""
    if isinstance(error, LocalTokenNotFoundError):
        return "there is no token for the Hub; log in by `hf auth login`, or set HF_TOKEN"
    if isinstance(error, OfflineModeIsEnabled):
        return f"nothing can be pushed to {repo_id} while HF_HUB_OFFLINE is set"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status in (401, 403) or isinstance(error, RepositoryNotFoundError | GatedRepoError):
        return (
            f"this token may not write to {repo_id} ({status}); log in by `hf auth login` or set HF_TOKEN, "
            "with a token that has write access to this repository"
        )
    if isinstance(error, BadRequestError):
        return f"the Hub refuses the push to {repo_id}: {(error.server_message or brief(error)).strip()}"
    if is_transient(error):
        return f"the Hub cannot be reached for {repo_id}: {brief(error)}"
    return f"the push to {repo_id} failed: {' '.join(str(error).split()) or repr(error)}"
