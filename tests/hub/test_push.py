"""Pushing to a Hub on loopback, faults included: what arrives, what stays, what never leaves."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import CommitOperationAdd, HfApi, constants
from safetensors.torch import save_file

from hf_diffusion import cli
from hf_diffusion.hub import errors as push_errors
from hf_diffusion.hub import outbox
from hf_diffusion.hub.errors import PushError
from hf_diffusion.hub.files import pushable_files
from hf_diffusion.hub.push import Patience, Push, check_write_access, push
from tests.hub.sending import sender
from tests.hub.test_card_format import card
from tests.hub_server import HubServer


SOON = Patience(deadline=20, first_wait=0.05, longest_wait=0.2)
SHARED = {
    "README.md", "config.yaml", "metrics.json", "loss_curve.png", "model_index.json", "pipeline_x.py",
    "samples/ema-00000009.png", "unet/config.json", "unet/unet_adm.py", "unet/diffusion_pytorch_model.safetensors",
    "scheduler/scheduler_config.json",
}  # fmt: skip
NOT_SHARED = (
    "metrics.jsonl", "logs/events.out.tfevents.1", "checkpoint-00000009/optimizer.bin",
    "checkpoint-00000009/random_states_0.pkl", "checkpoint-00000009/model.safetensors", "samples/ema-00000005.png",
    "outbox/push.log", "unet/optimizer.pt", "unet/pytorch_model.bin", "notes.txt", ".env", "other/config.json",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path) -> Path:
    """The output folder of a run: what is shared, and much that is not."""
    folder = tmp_path / "run"
    for name in (*SHARED, *NOT_SHARED):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"\x89PNG " + name.encode() if name.endswith("png") else name.encode())
    index = {"_class_name": ["pipeline_x", "X"], "unet": ["unet_adm", "U"], "scheduler": ["s", "S"], "id2label": None}
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "README.md").write_text(card("# a model\n\n![grid](samples/ema-00000009.png) ![curve](loss_curve.png)"))
    save_file({"w": torch.randn(20_000)}, folder / "unet" / "diffusion_pytorch_model.safetensors")
    return folder


@pytest.fixture(scope="session")
def xet_hub(tmp_path_factory):
    with HubServer(tmp_path_factory.mktemp("xet_hub"), xet=True) as server:
        yield server


def connect(server, monkeypatch) -> HfApi:
    """An API of this process and the environment of its children, both for the server."""
    server.faults.clear()
    server.log.clear()
    for name, value in server.env("hf_alice_write").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", not server.xet)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    return HfApi(endpoint=server.url, token="hf_alice_write")


@pytest.fixture(params=["lfs", "xet"])
def api(request, monkeypatch):
    server = request.getfixturevalue("hub" if request.param == "lfs" else "xet_hub")
    api = connect(server, monkeypatch)
    api.server = server
    yield api
    server.faults.clear()


@pytest.fixture
def lfs(hub, monkeypatch):
    api = connect(hub, monkeypatch)
    api.server = hub
    yield api
    hub.faults.clear()


@pytest.fixture
def repo(request) -> str:
    return f"alice/r{abs(hash((request.node.name, time.time_ns()))):x}"


def commits(api, repo) -> int:
    return len(api.list_repo_commits(repo)) - 1  # one is made with the repository


def contents(api, repo, tmp_path, revision=None) -> dict[str, bytes]:
    there = Path(api.snapshot_download(repo, revision=revision, local_dir=tmp_path / f"there{time.time_ns()}"))
    found = {f.relative_to(there).as_posix(): f.read_bytes() for f in there.rglob("*") if f.is_file()}
    return {name: data for name, data in found.items() if not name.startswith(".cache") and name != ".gitattributes"}


def write_to_hub(api, repo, **files: str) -> None:
    operations = [
        CommitOperationAdd(name.replace("__", "/").replace("_md", ".md"), text.encode())
        for name, text in files.items()
    ]
    api.create_commit(repo, operations, commit_message="by hand")


# --- what arrives ---


def test_a_push_is_one_commit_of_exactly_what_is_shared_private_and_tagged(api, repo, folder, tmp_path):
    pushed = push(Push(pushable_files(folder), repo, tag="step-00000009"), api, SOON)
    assert commits(api, repo) == 1 and api.model_info(repo).private and pushed.notes == ()
    there = contents(api, repo, tmp_path, revision="step-00000009")
    assert set(there) == SHARED
    assert all(data == (folder / name).read_bytes() for name, data in there.items() if name != "README.md")
    again = push(Push(pushable_files(folder), repo, tag="step-00000009"), api, SOON)
    assert again.commit == pushed.commit and commits(api, repo) == 1


COMMIT, CARD = "POST .*/commit/", "GET .*/resolve/.*README"
FAULTS = {
    "commit answered 503": {"match": COMMIT, "action": "status", "status": 503},
    "commit done, answered 500": {"match": COMMIT, "action": "status", "status": 500, "when": "after"},
    "commit dropped": {"match": COMMIT, "action": "drop"},
    "commit done, connection lost": {"match": COMMIT, "action": "drop", "when": "after", "rst": True},
    "commit answered 429": {"match": COMMIT, "action": "status", "status": 429, "headers": {"Retry-After": "1"}},
    "creation answered 500": {"match": "POST /api/repos/create", "action": "status"},
    "card check answers with a page": {"match": "validate-yaml", "action": "status", "status": 502, "body": "<html>"},
    "list of files answered 500": {"match": "GET .*/tree/", "action": "status"},
    "card cut": {"match": CARD, "action": "cut", "at": 10},
    "card damaged": {"match": CARD, "action": "corrupt", "at": 12},
    "card answered 503 for a while": {"match": CARD, "action": "status", "status": 503, "count": 4},
    "tag answered 503": {"match": "POST .*/tag/", "action": "status", "status": 503},
    "tag made, connection lost": {"match": "POST .*/tag/", "action": "drop", "when": "after"},
    "comparison dropped": {"match": "paths-info", "action": "drop"},
}


ALSO_BY_XET = (
    "commit answered 503",
    "commit done, connection lost",
    "card answered 503 for a while",
    "comparison dropped",
)


@pytest.mark.parametrize(
    "fault, api", [*((f, "lfs") for f in FAULTS), *((f, "xet") for f in ALSO_BY_XET)], indirect=["api"]
)
def test_a_fault_on_the_way_ends_in_one_commit_one_tag_and_the_persons_text(api, repo, folder, tmp_path, fault):
    api.create_repo(repo, private=True)
    write_to_hub(api, repo, README_md=card("old", after="\nWritten by a person.\n"), notes__mine="kept")
    api.server.faults.add(**FAULTS[fault])
    push(Push(pushable_files(folder), repo, tag="v1"), api, SOON)
    assert commits(api, repo) == 2
    there = contents(api, repo, tmp_path, revision="v1")
    text = there.pop("README.md").decode()
    assert "Written by a person." in text and "# a model" in text and "old" not in text
    assert there.pop("notes/mine") == b"kept"
    assert all(data == (folder / name).read_bytes() for name, data in there.items()) and set(there) == SHARED - {
        "README.md"
    }


def status(code: int, **more) -> dict:
    return {"action": "status", "status": code, "headers": {"Retry-After": "0"}, **more}


# What stands between the first question and the commit differs between the two ways of sending
# large files.
UPLOADS = {
    "lfs": {
        "how to send, answered 500": {"match": "POST .*/preupload/", **status(500)},
        "where to send, answered 503": {"match": "objects/batch", **status(503)},
        "storage answers 429": {"match": "PUT /storage/", **status(429)},
        "storage answers 500": {"match": "PUT /storage/", **status(500)},
        "address expired, 403": {"match": "PUT /storage/", "action": "status", "status": 403},
        "storage hangs up": {"match": "PUT /storage/", "action": "drop"},
        "storage resets after taking it": {"match": "PUT /storage/", "action": "drop", "when": "after", "rst": True},
        "storage hangs up halfway": {"match": "PUT /storage/", "action": "cut_upload", "at": 30_000},
        "damaged on the way": {"match": "PUT /storage/", "action": "corrupt_upload", "at": 30_000},
    },
    "xet": {
        "token answered 503": {"match": "xet-write-token", **status(503)},
        "storage answers 429": {"match": "POST /xet/v1/xorbs", **status(429)},
        "storage answers 500": {"match": "POST /xet/v1/xorbs", **status(500)},
        "storage hangs up": {"match": "POST /xet/v1/xorbs", "action": "drop"},
        "storage hangs up halfway": {"match": "POST /xet/v1/xorbs", "action": "cut_upload", "at": 30_000},
        "list of chunks answered 503": {"match": "POST /xet/v1/shards", **status(503)},
        "list of chunks taken, connection lost": {"match": "POST /xet/v1/shards", "action": "drop", "when": "after"},
    },
}


@pytest.mark.parametrize(
    "fault, api", [(fault, way) for way, faults in UPLOADS.items() for fault in faults], indirect=["api"]
)
def test_a_fault_while_weights_are_sent_ends_in_one_commit_of_these_weights(api, repo, folder, tmp_path, fault):
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(os.urandom(80_000))  # new to the storage, too
    api.server.faults.add(**UPLOADS["xet" if api.server.xet else "lfs"][fault])
    push(Push(pushable_files(folder), repo, tag="v1"), api, SOON)
    assert api.server.faults.rules[0].count == 0, "the fault was never met"
    assert commits(api, repo) == 1
    assert contents(api, repo, tmp_path, "v1")["unet/diffusion_pytorch_model.safetensors"] == weights.read_bytes()


@pytest.mark.parametrize("where", ["POST .*/commit/", "PUT /storage/"])
def test_a_request_that_stalls_is_given_up_and_tried_again(lfs, repo, folder, monkeypatch, where):
    (folder / "unet/diffusion_pytorch_model.safetensors").write_bytes(os.urandom(50_000))
    monkeypatch.setitem(push_errors.TIMEOUTS, "read", 0.5)
    lfs.server.faults.add(match=where, action="delay", seconds=1.5)
    began = time.monotonic()
    push(Push(pushable_files(folder), repo), lfs, SOON)
    assert lfs.server.faults.rules[0].count == 0 and time.monotonic() - began < 10
    time.sleep(1.2)  # the stalled request is carried out late, a commit on top of a parent that is no longer the head
    assert commits(lfs, repo) == 1


def test_the_process_that_sends_imports_no_torch(tmp_path):
    code = outbox.CHILD.replace(
        "sys.exit(", "print([m for m in ('torch._C', 'diffusers.utils', 'accelerate') if m in sys.modules])\nsys.exit("
    )
    command = [sys.executable, "-c", code, str(Path(outbox.__file__).parents[2]), str(tmp_path)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"


# In a process of its own, as in training: what has stalled in hf_xet holds up every later upload of
# its process.
IMPATIENT = outbox.CHILD.replace(
    "from hf_diffusion.hub.outbox",
    "from hf_diffusion.hub import errors\nerrors.UPLOAD_TIME = 1.5\nfrom hf_diffusion.hub.outbox",
)


@pytest.mark.parametrize("where", ["POST /xet/v1/xorbs", "POST /xet/v1/shards"])
def test_an_upload_that_stalls_by_xet_is_given_up_and_goes_by_lfs(
    xet_hub, repo, folder, queued, monkeypatch, tmp_path, where
):
    api = connect(xet_hub, monkeypatch)
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(os.urandom(50_000))
    queued("one", "step-1")
    xet_hub.faults.add(match=where, action="delay", seconds=3600)
    command = [sys.executable, "-c", IMPATIENT, str(Path(outbox.__file__).parents[2]), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and f"pushed to {api.endpoint}/{repo}" in done.stdout, done.stderr
    assert xet_hub.faults.rules[0].count == 0 and commits(api, repo) == 1 and outbox.pending(folder) == []
    assert contents(api, repo, tmp_path)["unet/weights.safetensors"] == weights.read_bytes()


def test_a_wait_that_the_hub_asks_for_is_kept(lfs, repo, folder):
    lfs.server.faults.add(match=COMMIT, **status(429) | {"headers": {"Retry-After": "2"}})
    began = time.monotonic()
    push(Push(pushable_files(folder), repo), lfs, SOON)
    assert 2 <= time.monotonic() - began < 8 and commits(lfs, repo) == 1


def test_without_a_network_a_push_ends_in_one_sentence_and_is_not_final(lfs, repo, folder):
    nowhere = HfApi(endpoint="http://127.0.0.1:9", token=lfs.token)
    with pytest.raises(PushError, match=r"did not get through in 1 s: ConnectError") as stopped:
        push(Push(pushable_files(folder), repo), nowhere, Patience(1, 0.1, 0.3))
    assert not stopped.value.final and "\n" not in str(stopped.value)
    with pytest.raises(PushError, match="the Hub cannot be reached for alice/x: ConnectError"):
        check_write_access("alice/x", api=nowhere)


def test_a_file_damaged_on_the_way_is_found_by_its_checksum_and_sent_again(api, repo, folder, tmp_path, monkeypatch):
    real, seen = api.create_commit, []

    def damaging(repo_id, operations, **kwargs):
        if not seen:
            operations = [
                CommitOperationAdd(op.path_in_repo, b"damaged") if op.path_in_repo == "unet/config.json" else op
                for op in operations
            ]
        seen.append(kwargs["parent_commit"])
        return real(repo_id, operations, **kwargs)

    monkeypatch.setattr(api, "create_commit", damaging)
    push(Push(pushable_files(folder), repo), api, SOON)
    assert len(seen) == 2 and contents(api, repo, tmp_path)["unet/config.json"] == b"unet/config.json"


def test_a_commit_that_came_first_is_read_and_kept(api, repo, folder, tmp_path, monkeypatch):
    api.create_repo(repo)
    real, seen = api.create_commit, []

    def overtaken(repo_id, operations, **kwargs):
        if not seen:
            person = HfApi(endpoint=api.endpoint, token=api.token)
            write_to_hub(person, repo, README_md=card("old", before="Read me first.\n\n"), extra="theirs")
        seen.append(1)
        return real(repo_id, operations, **kwargs)

    monkeypatch.setattr(api, "create_commit", overtaken)
    push(Push(pushable_files(folder), repo), api, SOON)
    there = contents(api, repo, tmp_path)
    assert len(seen) == 2 and there["extra"] == b"theirs" and b"Read me first." in there["README.md"]


# --- what stays ---


def test_shards_of_an_earlier_push_go_and_files_of_people_stay(lfs, repo, folder):
    lfs.create_repo(repo)
    files = {"unet__diffusion_pytorch_model-00001-of-00002.safetensors": "x", "samples__ema-00000001.png": "x"}
    write_to_hub(
        lfs,
        repo,
        **files,
        **{"unet__diffusion_pytorch_model.safetensors.index.json": "{}", "samples__cat.png": "x", "talk": "x"},
    )
    push(Push(pushable_files(folder), repo), lfs, SOON)
    assert set(lfs.list_repo_files(repo)) == SHARED | {".gitattributes", "samples/cat.png", "talk"}


def test_a_tag_on_another_commit_is_not_moved(lfs, repo, folder):
    lfs.create_repo(repo, private=True)
    lfs.create_tag(repo, tag="v1")
    first = lfs.model_info(repo).sha
    pushed = push(Push(pushable_files(folder), repo, tag="v1"), lfs, SOON)
    assert "was not moved" in pushed.notes[0]
    assert lfs.list_repo_refs(repo).tags[0].target_commit == first


def test_a_push_to_a_public_repository_says_so(lfs, repo, folder):
    lfs.create_repo(repo, private=False)
    assert "is public" in push(Push(pushable_files(folder), repo), lfs, SOON).notes[0]


def test_every_wait_of_a_push_is_said_with_its_reason_its_number_and_its_length(lfs, repo, folder, capsys):
    lfs.server.faults.add(match=COMMIT, action="status", status=520, count=2)
    push(Push(pushable_files(folder), repo), lfs, SOON)
    waits = (
        r"attempt (\d) to push to (\S+) did not get through \((.*?)\); the next one in 0\.\d s, for at most 20 s more"
    )
    said = re.findall(waits, capsys.readouterr().err)
    assert said == [(number, repo, "the Hub answered 520") for number in ("1", "2")]


def test_an_outage_that_lasts_changes_nothing_and_is_not_final(lfs, repo, folder):
    lfs.create_repo(repo)
    write_to_hub(lfs, repo, README_md="Only text of a person.")
    head = lfs.model_info(repo).sha
    lfs.server.faults.add(match=CARD, action="status", status=503, count=-1)
    with pytest.raises(PushError, match="did not get through in 1 s: the Hub answered 503") as stopped:
        push(Push(pushable_files(folder), repo), lfs, Patience(1, 0.1, 0.3))
    assert not stopped.value.final and lfs.model_info(repo).sha == head


@pytest.mark.parametrize("token, sentence", [("hf_alice_read", "may not write"), ("hf_wrong", "may not write")])
def test_a_token_without_write_access_fails_at_once(lfs, repo, folder, token, sentence):
    lfs.create_repo(repo)
    reader = HfApi(endpoint=lfs.endpoint, token=token)
    for act in (
        lambda: check_write_access(repo, api=reader),
        lambda: push(Push(pushable_files(folder), repo), reader),
    ):
        began = time.monotonic()
        with pytest.raises(PushError, match=sentence) as stopped:
            act()
        assert stopped.value.final and time.monotonic() - began < 3 and token not in str(stopped.value)


def test_a_token_for_this_one_repository_is_enough(lfs, folder):
    lfs.create_repo("alice/fine-one", exist_ok=True)
    fine = HfApi(endpoint=lfs.endpoint, token="hf_alice_fine")
    assert check_write_access("alice/fine-one", api=fine) == "alice/fine-one"
    assert (
        push(Push(pushable_files(folder), "alice/fine-one"), fine, SOON).commit == lfs.model_info("alice/fine-one").sha
    )


def test_a_card_that_the_hub_refuses_is_final_and_says_why(lfs, repo, folder):
    (folder / "README.md").write_text("---\nlicense: no-such-licence\n---\n# a model")
    with pytest.raises(PushError, match="license") as stopped:
        push(Push(pushable_files(folder), repo), lfs, SOON)
    assert stopped.value.final and "unet/config.json" not in lfs.list_repo_files(repo)


def test_a_text_with_a_token_is_not_shared(folder):
    (folder / "config.yaml").write_text("token: hf_" + "a" * 34)
    with pytest.raises(ValueError, match="config.yaml holds what looks like a token"):
        pushable_files(folder)


def test_the_tables_of_a_tokenizer_are_shared_and_pickles_are_not(folder):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "tokenizer": ["transformers", "T5TokenizerFast"]}))
    files = ("spiece.model", "tokenizer.json", "merges.txt", "vocab.bin", "vocab.pkl")
    (folder / "tokenizer").mkdir()
    for name in files:
        (folder / "tokenizer" / name).write_bytes(b"\x0a\x0e\xff")
    shared = {name for name in pushable_files(folder) if name.startswith("tokenizer/")}
    assert shared == {"tokenizer/spiece.model", "tokenizer/tokenizer.json", "tokenizer/merges.txt"}


def test_an_index_cannot_reach_for_files_outside_of_its_folder(folder):
    (folder.parent / "secret").mkdir()
    (folder.parent / "secret" / "keys.json").write_text("{}")
    index = {"_class_name": ["../secret/x", "X"], "../secret": ["a", "B"], "unet": ["unet_adm", "U"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "README.md").write_text("![x](../secret/keys.json) ![y](/etc/passwd)")
    assert not [name for name in pushable_files(folder) if "secret" in name or "etc" in name]


# --- the outbox ---


@pytest.fixture
def queued(folder, repo):
    def put(text: str, tag: str, text_of_card: str | None = None) -> None:
        with outbox.new_entry(folder, tag, repo, f"message {tag}", tag, private=True) as files:
            outbox.link_or_copy(
                folder / "unet/diffusion_pytorch_model.safetensors", files / "unet/weights.safetensors"
            )
            (files / "text").write_text(text)
            if text_of_card is not None:
                (files / "README.md").write_text(text_of_card)

    return put


def test_failed_pushes_wait_in_their_order_and_go_out_later(lfs, repo, folder, queued):
    queued("one", "step-1")
    queued("two", "step-2")
    lfs.server.faults.add(match=COMMIT, action="status", status=503, count=-1)
    with pytest.raises(PushError):
        list(outbox.push_pending(folder, lfs, Patience(0.5, 0.1, 0.1)))
    assert [entry.name for entry in outbox.pending(folder)] == ["000001-step-1", "000002-step-2"]
    lfs.server.faults.clear()
    assert cli.main(["push", "--pending", str(folder)]) == 0
    assert outbox.pending(folder) == [] and commits(lfs, repo) == 2
    assert [commit.title for commit in lfs.list_repo_commits(repo)][:2] == ["message step-2", "message step-1"]
    assert {tag.name for tag in lfs.list_repo_refs(repo).tags} == {"step-1", "step-2"}
    assert cli.main(["push", "--pending", str(folder)]) == 0  # nothing waits


def test_an_entry_that_could_not_be_filled_is_none(folder, queued, repo):
    with pytest.raises(OSError), outbox.new_entry(folder, "x", repo, "m", None, True):
        raise OSError("disk full")
    assert outbox.pending(folder) == []
    for number in range(4):
        queued(str(number), f"step-{number}")
    assert outbox.drop_oldest(folder, limit=2) == ["000001-step-0", "000002-step-1"]
    assert [entry.name for entry in outbox.pending(folder)] == ["000003-step-2", "000004-step-3"]


# Every request of a push, in their order: a process that is killed while it waits for the answer
# was killed at that moment.
UNTIL_THE_COMMIT = [
    "POST /api/repos/create", "GET /api/models/[^/]+/[^/? ]+$", "GET .*/tree/", "GET .*/resolve/.*README",
    "validate-yaml", "preupload",
]  # fmt: skip
AFTER_IT = ["paths-info", "GET .*/refs", "POST .*/tag/"]
BY_LFS = ["objects/batch", "PUT /storage/", COMMIT]
BY_XET = ["xet-write-token", "POST /xet/v1/xorbs", "POST /xet/v1/shards", COMMIT]
KILLS = [("lfs", where) for where in [*UNTIL_THE_COMMIT, *BY_LFS, *AFTER_IT]] + [("xet", where) for where in BY_XET]


@pytest.mark.parametrize("api, where", KILLS, indirect=["api"])
def test_a_kill_while_pushing_leaves_the_old_or_the_new_revision_and_the_queue(
    api, repo, folder, queued, where, tmp_path
):
    api.create_repo(repo)
    write_to_hub(api, repo, README_md=card("old", after="By a person."))
    old, head = contents(api, repo, tmp_path), api.model_info(repo).sha
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(os.urandom(50_000))  # new to the storage, too
    queued("one", "step-1", card("new"))
    new = {"text": b"one", "unet/weights.safetensors": weights.read_bytes()}

    api.server.faults.add(match=where, action="delay", seconds=3600)
    process = sender(folder, api, by_xet=api.server.xet)
    deadline = time.monotonic() + 60
    while api.server.faults.rules[0].count and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert api.server.faults.rules[0].count == 0, "the moment to kill it never came"
    process.kill()
    process.join()

    api.server.faults.clear()
    found, is_new = contents(api, repo, tmp_path), where in AFTER_IT
    assert (api.model_info(repo).sha != head) == is_new and len(outbox.pending(folder)) == 1
    assert "By a person." in found.pop("README.md").decode()
    assert found == (new if is_new else {name: data for name, data in old.items() if name != "README.md"})
    assert list(api.list_repo_refs(repo).tags) == []  # the tag is set last

    (pushed,) = outbox.push_pending(folder, api, SOON)
    assert commits(api, repo) == 2 and api.model_info(repo).sha == pushed.commit
    assert [(tag.name, tag.target_commit) for tag in api.list_repo_refs(repo).tags] == [("step-1", pushed.commit)]
    found = contents(api, repo, tmp_path)
    assert found.pop("README.md").decode().count("By a person.") == 1 and found == new


def test_only_one_process_sends(lfs, folder, queued):
    queued("one", "step-1")
    with outbox._sole_sender(folder / "outbox"), pytest.raises(BlockingIOError):
        list(outbox.push_pending(folder, lfs, SOON))


# --- the command ---


def test_the_command_pushes_a_folder_whose_card_names_the_repository(lfs, repo, folder, tmp_path, capsys):
    (folder / "README.md").write_text(card('X.from_pretrained("run")'))
    assert cli.main(["push", str(folder), repo.split("/")[1], "--tag", "v1"]) == 0  # the user's own name space
    assert f"pushed to {lfs.endpoint}/{repo}, commit" in capsys.readouterr().out
    there = contents(lfs, repo, tmp_path, revision="v1")
    assert f'from_pretrained("{repo}", revision="v1")'.encode() in there["README.md"]
    assert lfs.model_info(repo).private


def test_wrong_use_is_one_sentence(capsys):
    for arguments, status, message in (
        (["push"], 2, "give the folder and the repository"),
        (["push", "/nowhere", "alice/x"], 1, "/nowhere is not a folder"),
        (["push", "--pending", "/nowhere"], 1, "there is no folder /nowhere"),
    ):
        try:
            ended = cli.main(arguments)
        except SystemExit as stopped:
            ended = stopped.code
        said = capsys.readouterr().err
        assert ended == status and message in said and said.count("\n") == 1, said


def test_without_a_token_the_command_says_how_to_get_one(lfs, folder, monkeypatch, capsys, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert cli.main(["push", str(folder), "alice/x"]) == 1
    assert "hf auth login" in capsys.readouterr().err
