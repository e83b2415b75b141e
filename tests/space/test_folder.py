"""The folder of a Space: what it holds, what stays of a person's changes, what a push leaves."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi, constants

from hf_diffusion.cli import main
from hf_diffusion.hub.card_format import parse_card
from hf_diffusion.hub.files import is_stale
from hf_diffusion.space.folder import HERE, LONGEST_DESCRIPTION, write_space


@pytest.fixture
def api(hub, monkeypatch):
    """An API of alice's, and this process's environment, for the Hub on loopback."""
    hub.faults.clear()
    for name, value in hub.env("hf_alice_write").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    return HfApi(endpoint=hub.url, token="hf_alice_write")


def constants_of(app: Path) -> dict:
    found = re.findall(r"^(MODEL|REVISION|TITLE)\b[^=]*= (.*)$", app.read_text(), re.MULTILINE)
    return {name: yaml.safe_load(value) for name, value in found}


def test_the_space_of_a_folder_carries_the_model_and_names_it(saved, tmp_path):
    space = write_space(str(saved / "tiny_images"), tmp_path, 'Tiny "images"')
    assert constants_of(tmp_path / "app.py") == {"MODEL": "model", "REVISION": "None", "TITLE": 'Tiny "images"'}
    compile((tmp_path / "app.py").read_text(), "app.py", "exec")
    carried = {name for name in space.files if name.startswith("model/")}
    assert {"model/model_index.json", "model/pipeline_classifier_free_guidance.py", "model/unet/unet_adm.py"} < carried
    there = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert there == set(space.files) and space.notes == ()
    card, text = parse_card((tmp_path / "README.md").read_text(), "the card")
    assert card["sdk"] == "gradio" and card["app_file"] == "app.py" and "models" not in card
    assert len(card["short_description"]) <= LONGEST_DESCRIPTION and 'Tiny "images"' in text


def test_a_space_needs_what_the_package_needs_to_sample_in_the_same_versions():
    floors = dict(re.findall(r'"([\w-]+)>=([\d.]+)"', (HERE.parents[1] / "setup.py").read_text()))
    needed = dict(line.split(">=") for line in (HERE / "requirements.txt").read_text().split())
    assert needed == {name: floors[name] for name in needed} and {"torch", "diffusers", "transformers"} <= set(needed)


def test_what_a_person_changed_stays_and_the_model_is_renewed(saved, tmp_path):
    write_space(str(saved / "tiny_images"), tmp_path, "First")
    app, card = tmp_path / "app.py", tmp_path / "README.md"
    app.write_text(app.read_text().replace("READABLE_SIDE = 72", "READABLE_SIDE = 96"))
    card.write_text(card.read_text().replace("emoji: 🎲", "emoji: 🐱") + "\nOur own words.\n")
    (tmp_path / "requirements.txt").write_text("torch\n")
    stale = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    stale.write_text("{}")
    space = write_space(str(saved / "tiny_images"), tmp_path, "Second")
    assert "READABLE_SIDE = 96" in app.read_text() and constants_of(app)["TITLE"] == "Second"
    assert "emoji: 🐱" in card.read_text() and "Our own words." in card.read_text()
    assert (tmp_path / "requirements.txt").read_text() == "torch\n" and not stale.exists()
    assert len(space.notes) == 2 and all("stays" in note for note in space.notes)
    app.write_text(app.read_text().replace("MODEL: str", "WHICH: str"))
    with pytest.raises(ValueError, match="no line `MODEL = ...` any more; put it back, or remove the file"):
        write_space(str(saved / "tiny_images"), tmp_path, "Third")


def test_a_source_that_a_space_could_not_load_is_refused_and_nothing_is_written(saved, tmp_path, capsys):
    assert main(["space", str(tmp_path)]) == 1
    assert "holds no pipeline: it has no model_index.json" in capsys.readouterr().err
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "MyPipeline"}))
    assert main(["space", str(tmp_path), "--output", str(tmp_path / "space")]) == 1
    assert "names the class MyPipeline without its code" in capsys.readouterr().err
    assert not (tmp_path / "space").exists()


def test_a_push_makes_a_private_space_in_one_commit_and_a_second_one_keeps_peoples_words(saved, tmp_path, api, capsys):
    repo, output = "alice/space-of-images", str(tmp_path / "space")
    command = ["space", str(saved / "tiny_images"), "--output", output, "--push", repo]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert f"pushed to {api.endpoint}/spaces/{repo}" in said and "model/unet/unet_adm.py (" in said
    info = api.space_info(repo)
    assert info.private and len(api.list_repo_commits(repo, repo_type="space")) == 2  # one made the Space
    there = set(api.list_repo_files(repo, repo_type="space")) - {".gitattributes"}
    assert there == {path.relative_to(output).as_posix() for path in Path(output).rglob("*") if path.is_file()}
    api.upload_file(
        path_or_fileobj=b"a shard", path_in_repo="model/unet/old.safetensors", repo_id=repo, repo_type="space"
    )
    api.upload_file(path_or_fileobj=b"mine", path_in_repo="notes.txt", repo_id=repo, repo_type="space")
    assert main(command) == 0
    there = set(api.list_repo_files(repo, repo_type="space"))
    assert "notes.txt" in there and "model/unet/old.safetensors" not in there
    with pytest.raises(Exception, match="404"):
        api.model_info(repo)


def test_the_space_of_a_repository_names_its_commit_and_runs_no_other(saved, tmp_path, api):
    repo = "alice/images-of-a-space"
    assert main(["push", str(saved / "tiny_images"), repo]) == 0
    space = write_space(repo, tmp_path, "Images")
    commit = api.model_info(repo).sha
    assert constants_of(tmp_path / "app.py") == {"MODEL": repo, "REVISION": commit, "TITLE": "Images"}
    assert set(space.files) == {"app.py", "README.md", "requirements.txt"}
    assert parse_card((tmp_path / "README.md").read_text(), "the card")[0]["models"] == [repo]


def test_a_push_that_may_not_be_is_one_sentence(saved, tmp_path, api, capsys, monkeypatch):
    command = ["space", str(saved / "tiny_images"), "--output", str(tmp_path), "--push", "bob/space"]
    assert main(command) == 1
    assert "this token may not write to bob/space" in capsys.readouterr().err


def test_files_beside_the_model_of_a_space_are_never_stale():
    files = ["app.py", "model/model_index.json", "model/unet/config.json"]
    assert is_stale("model/unet/old.safetensors", files) and not is_stale("pictures/mine.png", files)
    assert not is_stale("model/unet/old.safetensors", ["app.py"])


@pytest.mark.parametrize("command", [["demo", "tiny_images"], ["watch", "."]])
def test_without_gradio_a_page_is_refused_in_a_sentence(command, saved, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "gradio" else find(name, *rest)
    )
    assert main([command[0], str(saved / command[1])]) == 2
    assert "needs gradio; install it by `pip install 'hf-diffusion[space]'`" in capsys.readouterr().err
