"""`pip install hf-diffusion`: the wheel holds the whole package, and works without a clone."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml


ROOT = Path(__file__).resolve().parents[1]
# Shipped models stay in the repository: megabytes of weights, with their code and pictures.
NOT_INSTALLED = {path for path in (ROOT / "model_cards").iterdir() if path.is_dir()}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """The sdist, unpacked: a wheel is built from it, as `python -m build` and PyPI's users do."""
    folder = tmp_path_factory.mktemp("build")
    # A copy, since setuptools writes beside its sources.
    checkout = folder / "checkout"
    others = [".git", ".venv", "runs", "tests", "build", "*.egg-info", "__pycache__", *(p.name for p in NOT_INSTALLED)]
    shutil.copytree(ROOT, checkout, symlinks=True, ignore=shutil.ignore_patterns(*others))
    name = build(checkout, "sdist", folder)
    with tarfile.open(folder / name) as archive:
        # Python 3.11 has the filter since 3.11.4, and Debian 12 has 3.11.2
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return folder / name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(source) -> Path:
    return source.parent / build(source, "wheel", source.parent)


def build(folder: Path, what: str, target: Path) -> str:
    """Call setuptools as pip does; the name of the file."""
    code = f"import sys; from setuptools.build_meta import build_{what} as build; print(build(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, str(target)], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def files_of_the_package() -> set[str]:
    found = set()
    for folder, folders, names in os.walk(ROOT / "hf_diffusion", followlinks=True):
        here = Path(folder)
        folders[:] = [f for f in folders if f != "__pycache__" and (here / f).resolve() not in NOT_INSTALLED]
        found |= {(here / name).relative_to(ROOT).as_posix() for name in names if name != ".gitignore"}
    return found


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        (licence,) = [name for name in archive.namelist() if name.endswith("licenses/LICENSE")]
        assert b"Apache License" in archive.read(licence)
    assert held == files_of_the_package()
    assert {"hf_diffusion/training/recipes/digits.yaml", "hf_diffusion/model_cards/template.md"} <= held


def test_the_sdist_holds_no_tests_without_what_they_need(source):
    assert not (source / "tests").exists() and (source / "README.md").is_file()


@pytest.fixture(scope="module")
def elsewhere(wheel, tmp_path_factory) -> Path:
    """An environment with the wheel and the libraries of this one, and no trace of the checkout."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    # A line of a path file adds a folder without running the path files in it, such as that of an
    # editable install.
    libraries = {str(Path(module.__file__).parents[1]) for module in (pytest, yaml)}
    (packages / "libraries.pth").write_text("\n".join(sorted(libraries)))
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python")]
    alone = ["--quiet", "--no-deps", "--no-index", "--ignore-installed"]
    subprocess.run([*pip, "install", *alone, str(wheel)], check=True)
    return folder


def run(elsewhere: Path, cwd: Path, *words: str) -> str:
    """A command of the environment, with nothing of ours but what is installed there."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = (str(elsewhere / "bin" / words[0]), *words[1:])
    done = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_installed_command_answers_without_a_clone(elsewhere, tmp_path):
    assert "Draw samples from a pipeline" in run(elsewhere, tmp_path, "hf-diffusion", "--help")
    where = run(elsewhere, tmp_path, "python", "-c", "import hf_diffusion; print(hf_diffusion.__file__)")
    assert Path(where.strip()).is_relative_to(elsewhere)


@pytest.mark.slow
def test_the_installed_package_trains_by_a_recipe_s_name_writes_a_card_and_draws(elsewhere, tmp_path):
    small = ["--max_train_steps", "3", "--sample_steps", "none", "--output_dir", "run"]
    assert "trained 3 steps" in run(
        elsewhere, tmp_path, "hf-diffusion", "train", "ddpm", "--config", "digits.yaml", *small
    )
    card = (tmp_path / "run" / "README.md").read_text()
    assert "from hf_diffusion import ClassifierFreeGuidancePipeline" in card
    draw = ("hf-diffusion", "sample", "run", "--num_images", "10", "--num_inference_steps", "2", "--output", "ten.png")
    assert "ten.png: 10 images" in run(elsewhere, tmp_path, *draw)
