"""Pushing to the Hub: one commit on a checked parent, retried as a whole, compared, and tagged.

What can go wrong on the way, and why a push is built like this, was tried against a Hub on
loopback. `upload_folder` commits in parts, so that a failure leaves half a push; a commit whose
answer got lost has happened all the same; requests have no timeouts.
"""

import hashlib
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, get_token, hf_hub_url
from huggingface_hub.constants import REPO_TYPES_URL_PREFIXES
from huggingface_hub.errors import LocalTokenNotFoundError
from huggingface_hub.hf_api import ModelInfo, RepoFile, SpaceInfo
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from hf_diffusion.hub import errors
from hf_diffusion.hub.card_merge import merge_cards
from hf_diffusion.hub.errors import (
    ChecksumMismatch,
    PushError,
    bounded_requests,
    brief,
    in_one_sentence,
    is_transient,
    retry_after,
    within,
    without_xet,
)
from hf_diffusion.hub.files import CARD, is_stale


@dataclass(frozen=True)
class Patience:
    """How long a push is tried again, in seconds; waits double from the first to the longest."""

    deadline: float = 900.0
    first_wait: float = 1.0
    longest_wait: float = 60.0


PATIENCE = Patience()


@dataclass(frozen=True)
class Pushed:
    """Where a push arrived; `notes` are sentences that the user should read."""

    repo_id: str
    commit: str
    url: str
    notes: tuple[str, ...] = ()


@dataclass
class Push:
    """What is to arrive in a repository: paths there -> files here, which must stay as they are."""

    files: dict[str, Path]
    repo_id: str
    message: str = "Push with hf_diffusion"
    tag: str | None = None
    private: bool = True
    repo_type: str = "model"
    _checksums: dict[str, tuple[str, str]] = field(default_factory=dict, repr=False)

    def checksums(self, path: str) -> tuple[str, str]:
        """The sha256 and git's object id of a file that is pushed, computed once."""
        if path not in self._checksums:
            self._checksums[path] = _checksums(self.files[path])
        return self._checksums[path]


def say_on_stderr(sentence: str) -> None:
    """Tell the user what is waited for."""
    print(sentence, file=sys.stderr, flush=True)


def push(
    what: Push, api: HfApi | None = None, patience: Patience = PATIENCE, say: Callable[[str], None] = say_on_stderr
) -> Pushed:
    """Push until the Hub has exactly these files, or the deadline is over; raises PushError.

    Every wait is said: what happened, which attempt it was, how long it will be.

    The card keeps what people wrote on the Hub outside its generated part; files of earlier pushes
    that this one does not have are removed, others stay. The new commit appears whole or not at
    all, and never on top of a commit that was not read.
    """
    api = api or HfApi()
    began, wait, attempt = time.monotonic(), patience.first_wait, 0
    with ExitStack() as way:
        while True:
            attempt += 1
            try:
                with bounded_requests():
                    return _attempt(what, api)
            except Exception as error:
                if isinstance(error, TimeoutError):
                    way.enter_context(without_xet())
                if not is_transient(error):
                    raise PushError(in_one_sentence(error, what.repo_id), final=True) from error
                pause = max(wait * random.uniform(0.5, 1), retry_after(error))
                if time.monotonic() - began + pause > patience.deadline:
                    raise PushError(
                        f"the push to {what.repo_id} did not get through in {patience.deadline:.0f} s: {brief(error)}",
                        final=False,
                    ) from error
                left = patience.deadline - (time.monotonic() - began)
                say(
                    f"attempt {attempt} to push to {what.repo_id} did not get through ({brief(error)}); "
                    f"the next one in {pause:.1f} s, for at most {left:.0f} s more"
                )
                time.sleep(pause)
                wait = min(2 * wait, patience.longest_wait)


def check_write_access(repo_id: str, private: bool = True, api: HfApi | None = None, repo_type: str = "model") -> str:
    """The full name of a repository, made if there is none; PushError where writing is refused."""
    api = api or HfApi()
    try:
        if not (api.token or get_token()):
            raise LocalTokenNotFoundError
        with bounded_requests():
            repo_id = _created(api, repo_id, private, repo_type)
            api.auth_check(repo_id, write=True, repo_type=repo_type)
    except Exception as error:
        raise PushError(in_one_sentence(error, repo_id), final=not is_transient(error)) from error
    return repo_id


def check_license(license: str | None) -> None:
    """ValueError for a licence that the Hub does not know: at the end it would refuse the model."""
    if license is None:
        return
    try:
        with bounded_requests():
            ModelCard(f"---\nlicense: {json.dumps(license)}\n---\n").validate()
    except ValueError as error:
        raise ValueError(
            f"hub_license {license!r} is none of the Hub's licences: {' '.join(str(error).split())}"
        ) from error
    except Exception as error:
        raise PushError(in_one_sentence(error, "the card"), final=not is_transient(error)) from error


def _created(api: HfApi, repo_id: str, private: bool, repo_type: str) -> str:
    """The full name of a repository, which is made where there is none."""
    sdk = {"space_sdk": "gradio"} if repo_type == "space" else {}
    return api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True, **sdk).repo_id


def _attempt(what: Push, api: HfApi) -> Pushed:
    kind = {"repo_type": what.repo_type}
    repo_id = _created(api, what.repo_id, what.private, what.repo_type)
    head = api.repo_info(repo_id, **kind)
    there = {
        entry.path: entry
        for entry in api.list_repo_tree(repo_id, recursive=True, revision=head.sha, **kind)
        if isinstance(entry, RepoFile)
    }
    card = _merged_card(what, api, repo_id, head.sha, there.get(CARD)) if CARD in what.files else None
    wanted = {path: _checksums(card) if path == CARD else what.checksums(path) for path in what.files}
    operations = [
        CommitOperationAdd(path, card if path == CARD else what.files[path])
        for path, checksums in wanted.items()
        if path not in there or not _is_same(there[path], checksums)
    ]
    operations += [CommitOperationDelete(path) for path in there if is_stale(path, what.files)]
    commit = head.sha
    if operations:  # there are none if an earlier attempt arrived and only its answer was lost
        # A commit that is made after its time is over is found by the next attempt, or fails there
        # since its parent is no longer the head.
        commit = within(
            errors.UPLOAD_TIME + sum(file.stat().st_size for file in what.files.values()) / errors.SLOWEST_RATE,
            lambda: (
                api.create_commit(repo_id, operations, commit_message=what.message, parent_commit=head.sha, **kind).oid
            ),
        )
        _compare(api, repo_id, commit, wanted, what.repo_type)
    notes = [*_visibility_notes(what, head), *_set_tag(what, api, repo_id, commit)]
    prefix = REPO_TYPES_URL_PREFIXES.get(what.repo_type, "")
    return Pushed(repo_id, commit, f"{api.endpoint}/{prefix}{repo_id}", tuple(notes))


def _merged_card(what: Push, api: HfApi, repo_id: str, head: str, there: RepoFile | None) -> bytes:
    """The card to push, with what people wrote into the one that is there.

    That there is none is learnt from the list of files, never from a failed download: an outage
    must not look like "no card yet".
    """
    mine = what.files[CARD].read_text(encoding="utf-8")
    if there is None:
        return merge_cards(
            "", mine
        ).encode()  # in the form that later merges have, so that pushing again changes nothing
    url = hf_hub_url(repo_id, CARD, repo_type=what.repo_type, revision=head, endpoint=api.endpoint)
    answer = get_session().get(url, headers=build_hf_headers(token=api.token), follow_redirects=True)
    hf_raise_for_status(answer)
    if not _is_same(there, _checksums(answer.content)):
        raise ChecksumMismatch(f"{CARD} was damaged on its way from {repo_id}")
    return merge_cards(answer.content.decode("utf-8"), mine).encode()


def _checksums(content: Path | bytes) -> tuple[str, str]:
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size)
    for block in [content] if isinstance(content, bytes) else _blocks(content):
        sha256.update(block)
        git.update(block)
    return sha256.hexdigest(), git.hexdigest()


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            yield block


def _is_same(there: RepoFile, checksums: tuple[str, str]) -> bool:
    sha256, git = checksums
    return there.lfs.sha256 == sha256 if there.lfs else there.blob_id == git


def _compare(api: HfApi, repo_id: str, commit: str, wanted: dict[str, tuple[str, str]], repo_type: str) -> None:
    """ChecksumMismatch unless the commit has every file as it was sent: any can be damaged."""
    found = api.get_paths_info(repo_id, list(wanted), revision=commit, repo_type=repo_type)
    there = {entry.path: entry for entry in found}
    bad = [path for path, sums in wanted.items() if path not in there or not _is_same(there[path], sums)]
    if bad:
        raise ChecksumMismatch(f"{', '.join(bad)} in {repo_id} differ from what was sent")


def _visibility_notes(what: Push, head: ModelInfo | SpaceInfo) -> list[str]:
    """A repository keeps the visibility that it was created with, whatever is asked for now."""
    if what.private and not head.private:
        return [f"{head.id} was there already and is public: everybody can see this push"]
    if not what.private and head.private:
        return [f"{head.id} was there already and stays private; change that in its settings on the Hub"]
    return []


def _set_tag(what: Push, api: HfApi, repo_id: str, commit: str) -> list[str]:
    """Tag the commit; a tag of another commit stays there, since somebody may have pinned it."""
    if what.tag is None:
        return []
    marked = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo_id, repo_type=what.repo_type).tags}
    if what.tag not in marked:
        api.create_tag(repo_id, tag=what.tag, revision=commit, repo_type=what.repo_type)
        return []
    if marked[what.tag] == commit:
        return []
    return [f"the tag {what.tag} marks the earlier commit {marked[what.tag][:12]} and was not moved to {commit[:12]}"]
