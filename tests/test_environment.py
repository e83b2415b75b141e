"""What a run records about the machine and the code that it ran on."""

import subprocess

import torch

from hf_diffusion.environment import environment


def test_the_environment_names_versions_hardware_and_the_state_of_the_code(tmp_path):
    outside = environment(tmp_path)
    assert outside["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert outside["cpu"] and outside["cpu_cores"] >= 1
    assert not any(name.startswith("git") for name in outside)

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        return subprocess.run(
            ["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    git("init", "-q")
    # There is no commit yet.
    assert not any(name.startswith("git") for name in environment(tmp_path))
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("commit", "-q", "-m", "first")
    clean = environment(tmp_path)
    assert (clean["git_commit"], clean["git_dirty"]) == (git("rev-parse", "HEAD").strip(), False)
    (tmp_path / "file").write_text("b")
    assert environment(tmp_path)["git_dirty"] is True
