"""Fetching from the Hub so that what arrives is whole: tried again, and compared on request."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, hf_hub_download, snapshot_download

from hf_diffusion.hub.errors import brief, is_transient, retry_after


logger = logging.getLogger(__name__)
Result = TypeVar("Result")
WAITS = (1.0, 3.0, 8.0)  # seconds before each further try
ENOUGH = 20.0  # seconds after which a further failure is the last
LONGEST_WAIT = 60.0  # that the Hub may ask for


def patiently(fetch: Callable[[], Result]) -> Result:
    """The result of `fetch()`, tried again after errors that pass by themselves; OSError if they
    last.

    huggingface_hub does so for the questions that come before a download, for half a minute, and
    not for an error or a reset in its middle.
    """
    began = time.monotonic()
    for wait in (*WAITS, None):
        try:
            return fetch()
        except Exception as error:
            if not is_transient(error):
                raise
            if wait is None or time.monotonic() - began > ENOUGH:
                raise OSError(f"the download from the Hub did not get through: {brief(error)}") from error
            wait = min(LONGEST_WAIT, max(wait, retry_after(error)))
            logger.warning("the download is tried again in %.0f s: %s", wait, brief(error))
            time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def verify_download(
    repo_id: str, commit: str, token: str | bool | None = None, cache_dir: str | Path | None = None
) -> int:
    """Compare the cached files of a repository with the Hub's checksums; returns their number.

    A damaged file is fetched once more. If that one is damaged, too, it is taken out of the cache,
    and OSError names it. OSError also where the Hub cannot be asked.
    """
    damaged, count = _damaged(repo_id, commit, token, cache_dir)
    where = {"revision": commit, "token": token, "cache_dir": cache_dir}
    for name in damaged:
        logger.warning("%s of %s is damaged in the cache and is fetched again", name, repo_id)
        patiently(lambda name=name: hf_hub_download(repo_id, name, force_download=True, **where))
    if damaged:
        damaged, count = _damaged(repo_id, commit, token, cache_dir)
    for name in damaged:
        file = Path(hf_hub_download(repo_id, name, local_files_only=True, **where))
        blob = file.resolve()
        file.unlink()
        blob.unlink(missing_ok=True)
    if damaged:
        raise OSError(
            f"{', '.join(damaged)} of {repo_id} at commit {commit[:12]} arrived damaged twice: the checksums are "
            "not those of the Hub; the damaged files were taken out of the cache, try again over another connection"
        )
    return count


def fetch_and_verify(repo_id: str, revision: str | None = None, **where) -> tuple[str, int]:
    """Fetch and compare a whole repository, code included; returns commit and number of files.

    `where`: token, cache_dir. OSError as for `verify_download`.
    """
    folder = Path(patiently(lambda: snapshot_download(repo_id, revision=revision, **where)))
    return folder.name, verify_download(repo_id, folder.name, **where)


def _damaged(
    repo_id: str, commit: str, token: str | bool | None, cache_dir: str | Path | None
) -> tuple[list[str], int]:
    """The files whose checksums differ from those of the Hub, and how many were compared."""
    api = HfApi(token=token)
    try:
        result = patiently(lambda: api.verify_repo_checksums(repo_id, revision=commit, cache_dir=cache_dir))
    except Exception as error:
        raise OSError(f"the Hub could not be asked for the checksums of {repo_id}: {brief(error)}") from error
    return [mismatch["path"] for mismatch in result.mismatches], result.checked_count
