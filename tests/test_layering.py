"""The direction of dependencies, read from the imports: components stand alone, the library does not know its users."""

import ast
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "hf_diffusion"
COMPONENTS = sorted((LIBRARY / "schedulers").glob("scheduling_*.py")) + sorted((LIBRARY / "models").glob("[!_]*.py"))


def imported(path: Path) -> set[str]:
    """Full names of the modules that a file imports anywhere."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively; components and pipelines travel alone"
            names.add(node.module)
    return names


def library_files() -> list[Path]:
    """Everything of the library but its facade, which exports the pipelines too, and what stands beside it."""
    beside = {"pipelines", "training", "model_cards"}
    return [
        path
        for path in sorted(LIBRARY.rglob("*.py"))
        if path != LIBRARY / "__init__.py" and path.relative_to(LIBRARY).parts[0] not in beside
    ]


@pytest.mark.parametrize("path", COMPONENTS, ids=lambda path: path.stem)
def test_a_component_imports_torch_numpy_and_diffusers_only(path):
    allowed = {"torch", "numpy", "diffusers", "math", "functools", "dataclasses", "collections", "typing"}
    assert {name.split(".")[0] for name in imported(path)} <= allowed


def test_every_file_that_travels_has_a_stem_of_its_own():
    """Shipped code lands flat in one folder of diffusers' module cache."""
    stems = [path.stem for path in COMPONENTS + sorted((ROOT / "pipelines").glob("pipeline_*.py"))]
    assert len(stems) == len(set(stems))


@pytest.mark.parametrize("path", library_files(), ids=lambda path: str(path.relative_to(LIBRARY)))
def test_the_library_imports_nothing_from_training_and_below_the_commands_nothing_from_pipelines(path):
    names = imported(path)
    assert not any(name.startswith(("hf_diffusion.training.", "training", "tests")) for name in names)
    if path.relative_to(LIBRARY).parts[0] in ("schedulers", "models", "losses", "data", "config"):
        above = ("trainer", "training_run", "run", "pipelines", "evaluation", "hub", "commands", "cli")
        assert not any(name.startswith(tuple(f"hf_diffusion.{part}" for part in above)) for name in names)


def test_losses_take_schedulers_and_models_as_arguments():
    for path in sorted((LIBRARY / "losses").glob("*.py")):
        assert not any(
            name.startswith(("hf_diffusion.schedulers", "hf_diffusion.models")) for name in imported(path)
        ), path


def test_pipelines_use_nothing_of_the_package_but_what_travels_with_them():
    for path in sorted((ROOT / "pipelines").glob("pipeline_*.py")):
        own = {name for name in imported(path) if name.startswith("hf_diffusion")}
        assert own <= {"hf_diffusion.pipelines.self_contained"}, (path, own)


def test_no_folder_of_the_package_bears_the_name_of_a_diffusers_pipeline():
    """diffusers would record that folder's name in model_index.json instead of our module, and then not find the class."""
    import diffusers.pipelines

    folders = {path.name for path in LIBRARY.iterdir() if path.is_dir()}
    assert not any(hasattr(diffusers.pipelines, name) for name in folders - {"__pycache__"})
