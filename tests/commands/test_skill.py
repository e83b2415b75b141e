"""`hf-diffusion skill`: the file for coding assistants, and nobody's own edits lost."""

from pathlib import Path

import yaml

from hf_diffusion.cli import main
from hf_diffusion.commands.skill import SKILL


def test_the_skill_arrives_where_assistants_look_with_the_front_matter_that_they_read(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["skill"]) == 0
    path = Path(".agents/skills/hf-diffusion/SKILL.md")
    assert capsys.readouterr().out.strip() == str(path)
    _, front, _ = path.read_text().split("---\n", 2)
    said = yaml.safe_load(front)
    # The form of agent skills: the name is that of the folder, and 1,024 characters at most.
    assert said["name"] == path.parent.name and len(said["description"]) <= 1024


def test_an_edited_skill_is_kept_unless_its_loss_is_asked_for(tmp_path, capsys):
    assert main(["skill", str(tmp_path)]) == main(["skill", str(tmp_path)]) == 0
    path = tmp_path / "hf-diffusion" / "SKILL.md"
    path.write_text("mine")
    assert main(["skill", str(tmp_path)]) == 1 and path.read_text() == "mine"
    assert "is there and differs; keep it, or replace it by --overwrite" in capsys.readouterr().err
    assert main(["skill", str(tmp_path), "--overwrite"]) == 0 and path.read_text() == SKILL.read_text()
