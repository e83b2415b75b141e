"""The loopback Hub itself: what it keeps, whom it lets in, and what each fault does."""

import base64
import http.client
import json
import time
import urllib.error
import urllib.request

import pytest

from tests.hub_server import HubServer
from tests.hub_server.cards import read_card
from tests.hub_server.faults import Faults
from tests.hub_server.objects import git_oid
from tests.hub_server.xet import hash_text, unlz4_block


CONTENT = bytes(range(256)) * 40


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with HubServer(tmp_path_factory.mktemp("hub")) as server:
        ask(server, "POST", "/api/repos/create", {"name": "open", "type": "model"})
        ask(server, "POST", "/api/repos/create", {"name": "secret", "type": "model", "private": True})
        commit(server, "alice/open", {"a.txt": b"first"})
        commit(server, "alice/open", {"data.txt": CONTENT})
        yield server


@pytest.fixture
def hub(server):
    server.faults.clear()
    server.log.clear()
    return server


def ask(hub, method: str, path: str, body=None, token: str | None = "hf_alice_write", address: str | None = None):
    """Status and body of one request, on a connection of its own."""
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    request = urllib.request.Request((address or hub.url) + path, data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def commit(hub, repo: str, files: dict[str, bytes], token: str = "hf_alice_write") -> int:
    steps = [{"key": "header", "value": {"summary": "a commit"}}]
    for path, content in files.items():
        value = {"path": path, "content": base64.b64encode(content).decode(), "encoding": "base64"}
        steps.append({"key": "file", "value": value})
    return ask(hub, "POST", f"/api/models/{repo}/commit/main", "\n".join(map(json.dumps, steps)).encode(), token)[0]


def read(hub, path: str = "data.txt", revision: str = "main"):
    return ask(hub, "GET", f"/alice/open/resolve/{revision}/{path}")


def test_every_commit_is_kept_whole_and_read_by_its_name_from_a_server_started_again(hub):
    history = json.loads(ask(hub, "GET", "/api/models/alice/open/commits/main")[1])
    assert [len(entry["id"]) for entry in history] == [40, 40, 40]
    assert read(hub) == (200, CONTENT) and read(hub, "a.txt") == (200, b"first")
    assert read(hub, "data.txt", history[1]["id"])[0] == 404
    again = HubServer(hub.store.root)
    with again:
        assert read(again) == (200, CONTENT)


def test_a_private_repository_looks_missing_to_others_and_nobody_writes_without_the_right(hub):
    assert ask(hub, "GET", "/api/models/alice/secret")[0] == 200
    assert ask(hub, "GET", "/api/models/alice/secret", token="hf_bob_write")[0] == 404
    assert ask(hub, "GET", "/api/models/alice/secret", token=None)[0] == 401
    assert ask(hub, "GET", "/api/models/alice/secret", token="hf_wrong")[0] == 401
    for token in ("hf_bob_write", "hf_alice_read", "hf_alice_fine"):
        assert commit(hub, "alice/open", {"b.txt": b"x"}, token) == 403
    assert read(hub, "b.txt")[0] == 404


def test_storage_wants_a_signed_address_and_nobodys_token(hub):
    sha256 = hub.store.add_blob(CONTENT)
    signed = hub.signed_url("GET", sha256).removeprefix(hub.storage_url)
    assert ask(hub, "GET", signed, token=None, address=hub.storage_url) == (200, CONTENT)
    for wrong in (signed.replace("signature=", "signature=0"), hub.signed_url("GET", sha256, lifetime=-1)):
        assert ask(hub, "GET", wrong.removeprefix(hub.storage_url), token=None, address=hub.storage_url)[0] == 403
    assert ask(hub, "GET", signed, address=hub.storage_url)[0] == 400


def test_a_status_comes_before_or_after_the_deed_and_as_often_as_asked(hub):
    hub.faults.add(action="status", match="POST .*/commit/", status=503, when="before")
    assert commit(hub, "alice/open", {"before.txt": b"x"}) == 503 and read(hub, "before.txt")[0] == 404
    hub.faults.add(action="status", match="POST .*/commit/", status=502, when="after")
    assert commit(hub, "alice/open", {"after.txt": b"x"}) == 502 and read(hub, "after.txt")[0] == 200
    hub.faults.add(action="status", match="data.txt", skip=1, count=2, status=500)
    assert [read(hub)[0] for _ in range(4)] == [200, 500, 500, 200]
    assert [entry["status"] for entry in hub.log if "data.txt" in entry["path"]] == [200, 500, 500, 200]


def test_a_dropped_and_a_cut_answer_end_the_connection_early(hub):
    for rst in (False, True):
        hub.faults.add(action="drop", match="data.txt", rst=rst)
        with pytest.raises((http.client.RemoteDisconnected, ConnectionResetError, urllib.error.URLError)):
            read(hub)
    hub.faults.add(action="cut", match="data.txt", at=100)
    with pytest.raises(http.client.IncompleteRead) as cut:
        read(hub)
    assert cut.value.partial == CONTENT[:100]


def test_a_corrupt_answer_differs_in_one_byte_and_a_corrupt_upload_is_found_out(hub):
    hub.faults.add(action="corrupt", match="data.txt", at=300)
    status, got = read(hub)
    assert status == 200 and [i for i in range(len(CONTENT)) if got[i] != CONTENT[i]] == [300]
    hub.faults.add(action="corrupt_upload", match="PUT /storage", at=3)
    sha256 = hub.store.add_blob(b"whole").replace("0", "1")
    path = hub.signed_url("PUT", sha256).removeprefix(hub.storage_url)
    assert ask(hub, "PUT", path, b"other bytes", token=None, address=hub.storage_url)[0] == 400
    assert not hub.store.has_blob(sha256)


def test_delay_and_slow_take_their_time_and_the_answer_stays_whole(hub):
    for rule in ({"action": "delay", "seconds": 0.3}, {"action": "slow", "rate": 30_000}):
        hub.faults.add(match="data.txt", **rule)
        start = time.monotonic()
        assert read(hub) == (200, CONTENT)
        assert time.monotonic() - start >= 0.3


def test_an_unknown_fault_is_refused():
    with pytest.raises(ValueError, match="not a fault"):
        Faults().add(action="explode")


def test_objects_have_the_names_that_git_gives_them():
    # git hash-object of an empty file and of "hello\n"
    assert git_oid("blob", b"") == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"
    assert git_oid("blob", b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"


def test_a_card_is_read_as_the_hub_reads_it():
    assert read_card("---\nlicense: mit\ntags: [a]\n---\n# text")[0] == {"license": "mit", "tags": ["a"]}
    assert read_card("---\ntags: art\n---\n")[1] == ['"tags" must be an array of strings']
    assert "known licence ids" in read_card("---\nlicense: free\n---\n")[1][0]
    assert read_card("# no front matter")[2] == ["empty or missing yaml metadata in repo card"]


def test_xet_reads_its_hashes_and_compressed_blocks():
    assert hash_text(bytes(range(32)))[:16] == "0706050403020100"
    out = bytearray()
    # 3 literals "abc", then a match of 9 bytes 3 back that runs into what it writes, then 1 literal
    unlz4_block(bytes([0x35]) + b"abc" + bytes([3, 0]) + bytes([0x10]) + b"!", out)
    assert bytes(out) == b"abcabcabcabc!"
