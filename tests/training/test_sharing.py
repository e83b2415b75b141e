"""Training with `--push_to_hub` against a Hub on loopback: pushes, outages, going on from there."""

import hashlib
import json
import os
import re
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import CommitOperationAdd, HfApi, constants, metadata_load

from hf_diffusion import ADMClassifier, ClassifierFreeGuidancePipeline, cli
from hf_diffusion.cards.data_set import data_set_facts, facts_of_card
from hf_diffusion.hub import outbox
from hf_diffusion.loop import planning, sharing
from hf_diffusion.loop.checkpoints import BadCheckpoint
from hf_diffusion.training import train_classifier, train_ddgan, train_ddpm
from tests.hub.test_push import connect
from tests.launching import run_claims
from tests.loop.test_start import png_folder
from tests.training.interruptions import stop_after
from tests.training.test_train_ddpm import TINY, assert_same_weights, weights


# No more than a network; all else is for the run to choose.
CHOOSING = "--model_channels 8 --norm_num_groups 4 --num_head_channels 8 --channel_mult 1 --num_res_blocks 1".split()
CHOOSING += "--ddpm_num_inference_steps 2 --num_sample_images 2 --sample_steps none --checkpointing_steps 1".split()


@pytest.fixture
def api(hub, monkeypatch):
    api = connect(hub, monkeypatch)
    api.server = hub
    yield api
    hub.faults.clear()


def run(output_dir: Path, repo: str, *flags: str) -> None:
    flags = ("--output_dir", str(output_dir), "--push_to_hub", "--hub_model_id", repo, *flags)
    assert train_ddpm.main([*TINY, "--max_train_steps", "5", *flags]) == 0


@pytest.mark.slow
def test_a_run_that_is_stopped_goes_on_from_the_hub_on_another_machine_bit_for_bit(api, tmp_path, monkeypatch):
    repo = "alice/goes-on"
    run(tmp_path / "whole", "alice/whole", "--hub_strategy", "every_save")
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        run(tmp_path / "first", repo, "--hub_strategy", "checkpoint")
    assert outbox.pending(tmp_path / "first") == []
    assert {tag.name for tag in api.list_repo_refs(repo).tags} == {"step-00000003", "step-00000004"}
    assert "last-checkpoint/optimizer.bin" in api.list_repo_files(repo)
    run(tmp_path / "second", repo, "--hub_strategy", "checkpoint", "--resume_from_checkpoint", "hub")
    assert (tmp_path / "second" / "checkpoint-00000004").is_dir()
    assert_same_weights(weights(tmp_path / "second"), weights(tmp_path / "whole"))
    assert_same_weights(weights(tmp_path / "second", averaged=False), weights(tmp_path / "whole", averaged=False))
    loaded = ClassifierFreeGuidancePipeline.from_pretrained(
        api.snapshot_download(repo, revision="step-00000005", local_dir=tmp_path / "there")
    )
    assert_same_weights(loaded.unet.state_dict(), weights(tmp_path / "whole"))


@pytest.mark.slow
def test_what_a_run_has_chosen_itself_goes_on_from_the_hub_too(api, tmp_path, monkeypatch, capsys):
    repo, pictures = "alice/chooses", tmp_path / "pictures"
    png_folder(pictures)
    words = [*CHOOSING, "--preset", "auto", "--max_train_steps", "4", "--train_data_dir", str(pictures)]
    words += ["--push_to_hub", "--hub_model_id", repo, "--hub_strategy", "checkpoint"]
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        train_ddpm.main([*words, "--output_dir", str(tmp_path / "first")])
    # another machine, which would choose otherwise
    chosen = yaml.safe_load((tmp_path / "first" / "config.yaml").read_text())
    monkeypatch.setattr(planning, "choose", None)
    fresh = [*words, "--output_dir", str(tmp_path / "second"), "--resume_from_checkpoint", "hub"]
    assert train_ddpm.main(fresh) == 0
    assert "going on from" in capsys.readouterr().out
    now = yaml.safe_load((tmp_path / "second" / "config.yaml").read_text())
    assert {name for name in now if now[name] != chosen[name]} == {"output_dir"}
    assert now["train_data_dir"] == str(pictures) and now["train_batch_size"] == chosen["train_batch_size"] is not None
    # a run without settings beside its checkpoint goes on as it did
    api.delete_file("config.yaml", repo)
    assert sharing.fetch_checkpoint(repo, tmp_path / "third").is_dir() and not list(tmp_path.glob("third/*.yaml"))


def test_a_run_pushes_private_weights_card_and_code_and_no_state(api, tmp_path, capsys):
    repo = "alice/saves"
    run(tmp_path, repo, "--hub_strategy", "every_save")
    assert f"everything is pushed to {repo}" in capsys.readouterr().out
    assert [commit.title for commit in api.list_repo_commits(repo)][:2] == ["Step 5 of 5", "Step 3 of 5"]
    assert {tag.name for tag in api.list_repo_refs(repo).tags} == {"step-00000003", "step-00000005"}
    assert api.model_info(repo).private
    for tag in ("step-00000003", "step-00000005"):
        files = set(api.list_repo_files(repo, revision=tag))
        assert {
            "README.md",
            "config.yaml",
            "model_index.json",
            "unet/unet_adm.py",
            "scheduler/scheduling_gaussian.py",
        } <= files
        state = (
            "optimizer",
            "random_states",
            "checkpoint",
            "metrics.jsonl",
            "logs",
            "outbox",
            ".pkl",
            ".bin",
            "tfevents",
        )
        assert not [name for name in files if any(word in name for word in state)]
        card = api.hf_hub_download(repo, "README.md", revision=tag, local_dir=tmp_path / "there" / tag)
        text = Path(card).read_text()
        assert f'"{repo}"' in text and f'revision="{tag}"' in text
    assert {"samples/ema-00000005.png", "loss_curve.png"} <= files


@pytest.mark.parametrize("outage", ["503", "no network", "stalled"])
def test_an_outage_during_training_costs_nothing_but_the_push_which_goes_out_later(
    api, tmp_path, capsys, monkeypatch, outage
):
    repo, senders = f"alice/outage-{outage.replace(' ', '-')}", []
    monkeypatch.setattr(sharing, "WAIT_AT_THE_END", 0.1)
    start = sharing.start_sending
    monkeypatch.setattr(sharing, "start_sending", lambda folder: senders.append(start(folder)) or senders[-1])
    if outage == "503":
        api.server.faults.add(match="POST", action="status", status=503, count=-1)
    elif outage == "stalled":
        api.server.faults.add(match="POST .*/commit/", action="delay", seconds=3600)
    else:
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    run(tmp_path, repo, "--hub_strategy", "every_save")
    said = capsys.readouterr().out
    assert ("training starts all the same" in said) == (outage != "stalled")
    assert "not pushed yet: 000001-step-00000003, 000002-step-00000005" in said
    assert f"hf-diffusion push --pending {tmp_path}" in said
    assert (tmp_path / "model_index.json").is_file()
    for sender in senders:  # as when the machine is switched off
        sender.kill()
        sender.wait()
    api.server.faults.clear()
    connect(api.server, monkeypatch)
    assert cli.main(["push", "--pending", str(tmp_path)]) == 0
    assert outbox.pending(tmp_path) == []
    assert [commit.title for commit in api.list_repo_commits(repo)][:2] == ["Step 5 of 5", "Step 3 of 5"]
    assert {tag.name for tag in api.list_repo_refs(repo).tags} == {"step-00000003", "step-00000005"}


def test_what_people_write_on_the_hub_survives_the_next_run_also_when_the_card_cannot_be_read_at_first(api, tmp_path):
    repo = "alice/written-by-hand"
    run(tmp_path / "first", repo)
    card = api.hf_hub_download(repo, "README.md", local_dir=tmp_path / "there")
    text = Path(card).read_text().replace("library_name: diffusers", "library_name: diffusers\nlicense: mit", 1)
    text += "\n## Thanks\n\nTo all who drew digits.\n"
    api.create_commit(repo, [CommitOperationAdd("README.md", text.encode())], commit_message="by hand")
    api.server.faults.add(match="GET .*README", action="status", status=503, count=3, headers={"Retry-After": "0"})
    run(tmp_path / "second", repo, "--seed", "1")
    card = Path(api.hf_hub_download(repo, "README.md", local_dir=tmp_path / "there", force_download=True))
    assert card.read_text().endswith("## Thanks\n\nTo all who drew digits.\n") and "seed: 1" in card.read_text()
    assert metadata_load(card)["license"] == "mit"


def python_blocks(card: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card.read_text(), re.DOTALL)


def test_both_forms_of_use_on_a_pushed_card_work_as_pasted_into_a_new_process(api, tmp_path):
    repo = "alice/as-pasted"
    run(tmp_path / "run", repo, "--hub_license", "cc-by-4.0")
    card = Path(api.hf_hub_download(repo, "README.md", local_dir=tmp_path / "there"))
    assert metadata_load(card)["license"] == "cc-by-4.0"
    sums = []
    for package, code in zip((False, True), python_blocks(card), strict=True):
        assert f'"{repo}"' in code and 'revision="step-00000005"' in code
        code += "\nimport numpy\nclaims['sums'] = [int(numpy.asarray(image, int).sum()) for image in images]"
        sums.append(run_claims(code, env=api.server.env("hf_alice_read"), with_package=package)["sums"])
    assert sums[0] == sums[1] and len(set(sums[0])) == 4


SMALL = ["--dataset_name", "digits", "--max_train_samples", "64", "--channel_mult", "1,2", "--num_res_blocks", "1"]
SMALL += ["--model_channels", "8", "--train_batch_size", "8", "--num_sample_images", "10", "--max_train_steps", "3"]
OTHERS = {
    "ddgan": (train_ddgan, ["--class_conditional", "--discriminator_channels", "8"]),
    "classifier": (train_classifier, ["--norm_num_groups", "4", "--num_head_channels", "8"]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_other_scripts_push_in_the_same_way(api, tmp_path, name):
    script, flags = OTHERS[name]
    repo, folder = f"alice/pushed-{name}", str(tmp_path / "run")
    assert script.main([*SMALL, *flags, "--output_dir", folder, "--push_to_hub", "--hub_model_id", repo]) == 0
    files = set(api.list_repo_files(repo, revision="step-00000003"))
    assert {"README.md", "config.yaml", "loss_curve.png"} <= files
    assert not [file for file in files if "checkpoint" in file or "optimizer" in file or "metrics.jsonl" in file]
    card = Path(api.hf_hub_download(repo, "README.md", local_dir=tmp_path / "there"))
    assert f'from_pretrained("{repo}", revision="step-00000003")' in card.read_text()
    shown = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", card.read_text())
    assert set(shown) <= files and "loss_curve.png" in shown
    if name == "ddgan":
        assert {"samples/ema-00000003.png", "samples/steps.png", "samples/nearest.png"} <= set(shown)
    else:
        there = api.snapshot_download(repo, local_dir=tmp_path / "all")
        assert ADMClassifier.from_pretrained(there).config.num_classes == 10


def test_the_token_is_in_no_log_card_config_or_queue_whatever_happens(api, tmp_path, monkeypatch, capfd, caplog):
    token = "hf_" + "Q" * 34
    api.server.tokens[token] = {"user": "alice", "role": "write", "orgs": []}
    monkeypatch.setenv("HF_TOKEN", token)
    repo = "alice/secret"
    api.server.faults.add(match="POST .*/commit/", action="status", status=500)
    run(tmp_path / "run", repo, "--hub_strategy", "checkpoint")
    api.server.tokens[token]["role"] = "read"
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path / "refused", repo)
    assert cli.main(["push", str(tmp_path / "run"), repo]) == 1
    there = Path(
        HfApi(endpoint=api.endpoint, token="hf_alice_write").snapshot_download(repo, local_dir=tmp_path / "there")
    )
    files = [f for folder in (tmp_path / "run", tmp_path / "refused", there) for f in folder.rglob("*") if f.is_file()]
    assert len(files) > 30 and any(file.name == "push.log" for file in files)
    assert not [file for file in files if token.encode() in file.read_bytes()]
    said = capfd.readouterr()
    assert token not in said.out + said.err + caplog.text + str(stopped.value)


def test_a_setting_that_holds_a_token_is_not_pushed(api, tmp_path, capsys, caplog):
    run(tmp_path, "alice/leak", "--cache_dir", str(tmp_path / ("hf_" + "Z" * 34)), "--hub_strategy", "every_save")
    assert "holds what looks like a token" in caplog.text and "never queued" in capsys.readouterr().out
    assert set(api.list_repo_files("alice/leak")) == {".gitattributes"} and (tmp_path / "model_index.json").is_file()


@pytest.mark.skipif(
    int(huggingface_hub.__version__.split(".")[0]) < 2, reason="1.x asks huggingface.co, whatever HF_ENDPOINT says"
)
def test_a_licence_that_the_hub_does_not_know_ends_the_run_before_it_trains(api, tmp_path):
    with pytest.raises(SystemExit, match="hub_license 'mine' is none of the Hub's licences"):
        run(tmp_path, "alice/licence", "--hub_license", "mine")
    assert not (tmp_path / "metrics.jsonl").exists()


CARD_OF_DATA = (
    """---
license: cc-by-4.0
---
# Pictures
Nice ones.
## Considerations for Using the Data
### Social Impact of Dataset
[More Information Needed]
### Discussion of Biases
Only **cats** of one street <img src="http://x.y/z.png"> are shown ![cat](../../secret.png).

They were photographed by day.
### Other Known Limitations
Blurred pictures were taken out. """
    + "All of them were. " * 60
    + """
## Citation
none
"""
)


def test_licence_and_biases_of_a_data_set_come_from_its_card_on_the_hub_or_in_its_folder(api, tmp_path):
    api.create_repo("alice/pictures", repo_type="dataset")
    operation = CommitOperationAdd("README.md", CARD_OF_DATA.encode())
    api.create_commit("alice/pictures", [operation], commit_message="a card", repo_type="dataset")
    facts = data_set_facts({"dataset_name": "alice/pictures"}, cache_dir=tmp_path / "cache")
    assert facts["license"] == "cc-by-4.0" and facts["data_card"] == f"{api.endpoint}/datasets/alice/pictures"
    biases, limits = facts["considerations"]
    assert biases == "Only **cats** of one street are shown . They were photographed by day."
    assert (
        limits.startswith("Blurred pictures were taken out. All")
        and limits.endswith("All of them were. [...]")
        and len(limits) < 720
    )
    (tmp_path / "README.md").write_text(CARD_OF_DATA)
    here = data_set_facts({"train_data_dir": str(tmp_path)})
    assert here == {**facts, "data_card": "the README.md beside the images"}
    assert data_set_facts({"dataset_name": "digits"})["license"] == "cc-by-4.0"


def test_a_card_of_the_data_that_is_not_there_or_damaged_is_left_out(api, tmp_path):
    assert data_set_facts({"dataset_name": "alice/no-such-data"}, cache_dir=tmp_path) == {}
    assert data_set_facts({"train_data_dir": str(tmp_path)}) == {}
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    assert data_set_facts({"train_data_dir": str(tmp_path)}) == {}
    assert facts_of_card("no metadata") == {}
    api.server.faults.add(match="GET /datasets", action="status", status=403, count=-1)
    assert data_set_facts({"dataset_name": "alice/pictures"}, cache_dir=tmp_path / "other") == {}


@pytest.mark.parametrize("token", ["hf_alice_read", "hf_bob_write"])
def test_a_run_that_may_not_push_ends_before_it_trains(api, tmp_path, monkeypatch, token):
    HfApi(endpoint=api.endpoint, token="hf_alice_write").create_repo("alice/refused", exist_ok=True)
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(SystemExit, match="may not write to alice/refused"):
        run(tmp_path, "alice/refused")
    assert not list(tmp_path.glob("checkpoint-*")) and not (tmp_path / "metrics.jsonl").exists()


def test_a_checkpoint_on_the_hub_that_would_run_code_is_refused(api, tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "owned"),))

    torch.save(Evil(), tmp_path / "evil.pkl")
    data = (tmp_path / "evil.pkl").read_bytes()
    manifest = {"step": 3, "files": {"custom_checkpoint_0.pkl": hashlib.sha256(data).hexdigest()}}
    api.create_repo("alice/evil")
    files = {"custom_checkpoint_0.pkl": data, "manifest.json": json.dumps(manifest).encode()}
    operations = [CommitOperationAdd(f"last-checkpoint/{name}", content) for name, content in files.items()]
    api.create_commit("alice/evil", operations, commit_message="evil")
    with pytest.raises(BadCheckpoint, match="could run code"):
        sharing.fetch_checkpoint("alice/evil", tmp_path)
    assert not (tmp_path / "owned").exists() and not list(tmp_path.glob("checkpoint-*"))


def test_no_checkpoint_on_the_hub_is_none_and_an_outage_is_an_error(api, tmp_path):
    api.create_repo("alice/empty")
    assert sharing.fetch_checkpoint("alice/empty", tmp_path) is None
    with pytest.raises(OSError, match="no repository alice/nothing-here"):
        sharing.fetch_checkpoint("alice/nothing-here", tmp_path)
    api.server.faults.add(match="GET /api/models/alice/empty", action="status", status=503, count=-1)
    with pytest.raises(OSError, match="cannot be reached for alice/empty"):
        sharing.fetch_checkpoint("alice/empty", tmp_path)
