"""README, CONTRIBUTING and docs/: every link leads somewhere, every command and example is taken.

What commands do is proved elsewhere; here their words are read by the parsers that would read them.
"""

import ast
import importlib
import inspect
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import hf_diffusion
from hf_diffusion.cli import COMMANDS
from hf_diffusion.config.command_line import parse_config
from hf_diffusion.config.run_options import TrainingConfig


ROOT = Path(__file__).resolve().parents[1]
SKILL = ROOT / "hf_diffusion" / "commands" / "SKILL.md"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", SKILL, *sorted((ROOT / "docs").glob("*.md"))]
# Its Python is an outline.
OUTLINE = ROOT / "CONTRIBUTING.md"
FENCED = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
# Python of an extra that is not installed here; the tests in the browser run it.
OF_AN_EXTRA = {"gradio_client"}
# Commands of others, of which only the name is looked at.
OTHERS = {"hf", "pip", "cd", "git", "python", "uv"}


def blocks(page: Path, *languages: str) -> list[str]:
    return [text for language, text in FENCED.findall(page.read_text()) if language in languages]


def commands(page: Path) -> Iterator[list[str]]:
    """The words of every command in the page's bash blocks."""
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


def anchors(page: Path) -> set[str]:
    """The ids that GitHub gives to the headings."""
    text = FENCED.sub("", page.read_text())
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def settings_of(module: str) -> type[TrainingConfig]:
    """The settings of a training script: the last class of them that it defines itself."""
    found = [
        cls
        for _, cls in inspect.getmembers(importlib.import_module(module), inspect.isclass)
        if issubclass(cls, TrainingConfig) and cls.__module__ == module
    ]
    (config,) = found
    return config


def read_words(words: list[str]) -> None:
    """Let the parser of a command read its words; SystemExit with its sentence where it refuses."""
    while "=" in words[0]:
        words = words[1:]
    if words[0] == "accelerate":
        assert words[1] == "launch", words
        script = next(word for word in words if word.startswith(("training/", "hf_diffusion.")))
        rest = words[words.index(script) + 1 :]
        if script == "hf_diffusion.cli":
            return read_words(["hf-diffusion", *rest])
        name = Path(script).stem if script.endswith(".py") else script.rpartition(".")[2]
        parse_config(settings_of(f"hf_diffusion.training.{name}"), rest, prog=name)
    elif words[0] == "hf-diffusion":
        COMMANDS[words[1]].parsed(words[2:], prog=" ".join(words[:2]))
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
    else:
        assert words[0] in OTHERS, words
        assert all((ROOT / word).exists() for word in words if word.startswith(("training/", "docs/"))), words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_local_links_of_a_page_lead_to_files_and_headings(page):
    missing = []
    for link in LINK.findall(FENCED.sub("", page.read_text())):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            missing.append(link)
    assert not missing


def test_the_index_names_every_page():
    listed = set(LINK.findall((ROOT / "docs" / "README.md").read_text()))
    assert {page.name for page in PAGES if page.parent == ROOT / "docs"} - {"README.md"} <= listed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_of_a_page_are_taken_as_they_stand(page, tmp_path, monkeypatch):
    # The top of a clone in which all that the commands name is there.
    for name in ("training", "model_cards", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("my_images", "my_texts"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    for words in commands(page):
        for folder in [Path(word) for word in words if word.startswith("runs/")]:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "README.md").touch()
        try:
            read_words(words)
        except SystemExit as refused:
            pytest.fail(f"{page.name}: {shlex.join(words)} ends with status {refused.code}")


@pytest.mark.parametrize("page", [page for page in PAGES if page != OUTLINE], ids=lambda page: page.stem)
def test_the_python_of_a_page_is_valid_and_imports_what_is_there(page):
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(textwrap.dedent(block))):
            if isinstance(node, ast.ImportFrom) and node.module not in OF_AN_EXTRA:
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


def test_a_wrong_flag_a_lost_link_and_a_lost_heading_would_be_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A heading: b\n[x](nowhere.md) [y](#a-heading-b) [z](#c)\n```bash\nmake tea\n```\n")
    with pytest.raises(AssertionError):
        test_local_links_of_a_page_lead_to_files_and_headings(page)
    assert anchors(page) == {"a-heading-b"}
    with pytest.raises(AssertionError):
        read_words(next(commands(page)))
    with pytest.raises(SystemExit):
        read_words(["hf-diffusion", "sample", "runs/digits", "--num_imagse", "3"])


@pytest.mark.slow
def test_the_reference_has_every_public_class_and_no_broken_link(tmp_path):
    pytest.importorskip("pdoc")
    subprocess.run([sys.executable, str(ROOT / "docs" / "make_reference.py"), str(tmp_path)], cwd=ROOT, check=True)
    pages = {path: path.read_text() for path in tmp_path.rglob("*.html")}
    assert all(f'id="{name}"' in pages[tmp_path / "hf_diffusion.html"] for name in hf_diffusion.__all__)
    broken = []
    for path, text in pages.items():
        for link in re.findall(r'href="([^"#:]+\.html)(?:#[^"]*)?"', text):
            if not (path.parent / link).exists():
                broken.append(f"{path.name}: {link}")
    assert not broken
