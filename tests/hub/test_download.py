"""Loading from a Hub that fails: damage is found, what passes is waited for, what lasts is told."""

import logging
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import CommitOperationAdd, constants

from hf_diffusion import ClassifierFreeGuidancePipeline, cli
from hf_diffusion.hub import download
from tests.hub.test_push import api, lfs, xet_hub  # noqa: F401  (fixtures)
from tests.pipelines.fresh_process import make_pipe


WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
# Where the bytes of the weights come from: byte 8 of a safetensors file is the first of its header,
# the last ones are numbers.
CONTENT = {"lfs": "GET /storage/", "xet": "GET /xet/xorbs/"}


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(download, "WAITS", (0.02, 0.02, 0.02))


@pytest.fixture
def shared(api, tmp_path, monkeypatch):  # noqa: F811
    """(repository with a pipeline, its weights, the server, where its weights come from); the cache
    is empty.
    """
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    pipe = make_pipe(int(torch.randint(1 << 30, ())), classes=True)
    with torch.no_grad():
        # New to the storage.
        pipe.unet.conv_in.bias.normal_(generator=torch.Generator().manual_seed(hash(tmp_path) % 2**31))
    pipe.save_pretrained(tmp_path / "pipe")
    repo = f"alice/{tmp_path.name.replace('_', '').strip('-.')}"
    api.create_repo(repo)
    files = [f for f in (tmp_path / "pipe").rglob("*") if f.is_file()]
    operations = [CommitOperationAdd(f.relative_to(tmp_path / "pipe").as_posix(), f) for f in files]
    api.create_commit(repo, operations, commit_message="a pipeline")
    yield repo, pipe.unet.state_dict(), api.server, CONTENT["xet" if api.server.xet else "lfs"]
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)


def load(repo: str, **options) -> dict[str, torch.Tensor]:
    return ClassifierFreeGuidancePipeline.from_pretrained(repo, **options).unet.state_dict()


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(a[name], b[name]) for name in b)


def corrupt(server, where: str, count: int = 1) -> None:
    server.faults.add(match=where, action="corrupt", at=20_000, count=count)


def test_a_damaged_download_is_found_by_its_checksum_and_fetched_again(shared, caplog):
    repo, weights, server, where = shared
    corrupt(server, where)
    loaded = load(repo, verify=True)
    assert server.faults.rules[0].count == 0 and same(loaded, weights)
    if not server.xet:  # by Xet the client has seen it itself or we have; by HTTP it looks at the size alone
        assert f"{WEIGHTS} of {repo} is damaged in the cache and is fetched again" in caplog.text


def test_a_file_that_was_damaged_on_the_disk_is_found_and_fetched_again(shared, tmp_path):
    repo, weights, server, _ = shared
    load(repo)
    (blob,) = {file.resolve() for file in (tmp_path / "cache").rglob("*.safetensors")}
    content = bytearray(blob.read_bytes())
    content[-3] ^= 0xFF
    blob.write_bytes(content)
    assert not same(load(repo), weights)  # what happens without `verify`
    assert same(load(repo, verify=True), weights) and same(load(repo), weights)


def test_a_download_that_is_damaged_every_time_is_an_error_and_leaves_nothing_in_the_cache(shared, tmp_path):
    repo, weights, server, where = shared
    corrupt(server, where, count=-1)
    with pytest.raises(OSError, match="checksums|damaged|reconstruct|hash|corrupt") as stopped:
        load(repo, verify=True)
    if not server.xet:
        assert f"{WEIGHTS} of {repo} at commit" in str(stopped.value) and "arrived damaged twice" in str(stopped.value)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    server.faults.clear()
    assert same(load(repo), weights)


PASSING = {
    "500": {"action": "status", "status": 500, "count": 2},
    "503 with Retry-After": {"action": "status", "status": 503, "headers": {"Retry-After": "0"}, "count": 2},
    "429": {"action": "status", "status": 429, "headers": {"Retry-After": "0"}, "count": 1},
    "hung up": {"action": "drop", "count": 2},
    "reset": {"action": "drop", "rst": True, "count": 2},
    "cut": {"action": "cut", "at": 20_000, "count": 1},
}


@pytest.mark.parametrize("api", ["lfs"], indirect=True)  # by Xet the client tries again by itself
@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING)
def test_a_fault_that_passes_while_weights_are_fetched_costs_time_only(shared, fault):
    repo, weights, server, where = shared
    server.faults.add(match=where, **fault)
    assert same(load(repo), weights) and server.faults.rules[0].count == 0


@pytest.mark.parametrize("api", ["lfs"], indirect=True)
def test_an_error_that_stays_is_one_sentence(shared, tmp_path):
    repo, _, server, where = shared
    server.faults.add(match=where, action="status", status=500, count=-1)
    with pytest.raises(OSError, match="^the download from the Hub did not get through: the Hub answered 500$"):
        load(repo)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


@pytest.mark.parametrize("api", ["lfs"], indirect=True)
def test_an_outage_that_begins_after_the_index_is_one_sentence_and_not_half_a_pipeline(shared):
    repo, weights, server, where = shared
    outage = {"action": "status", "status": 503, "headers": {"Retry-After": "0"}, "count": -1}
    server.faults.add(match="GET .*/(tree|revision)/|/resolve/.*/(unet|scheduler)/", **outage)
    missing = f"(unet, scheduler|scheduler, unet) of '{repo}' could not be fetched"
    with pytest.raises(OSError, match=f"{missing}|did not get through: the Hub answered 503"):
        load(repo)
    server.faults.clear()
    assert same(load(repo), weights)


def test_info_verifies_a_whole_repository(shared, capsys, tmp_path, caplog):
    repo, _, server, where = shared
    corrupt(server, where)
    with caplog.at_level(logging.WARNING):
        assert cli.main(["info", repo, "--verify"]) == 0
    said = capsys.readouterr().out
    count = len([f for f in (tmp_path / "pipe").rglob("*") if f.is_file()]) + 1  # and .gitattributes
    assert f"all {count} files are as on the Hub" in said and "ADMUNet2DModel" in said


def test_verifying_a_folder_is_refused(tmp_path, capsys):
    make_pipe(0, classes=True).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a folder here"):
        load(str(tmp_path), verify=True)
    assert cli.main(["info", str(tmp_path), "--verify"]) == 2 and "is a folder here" in capsys.readouterr().err
    assert cli.main(["sample", str(tmp_path), "--verify", "--output", str(tmp_path / "x.png")]) == 1
    assert not Path(tmp_path / "x.png").exists()
