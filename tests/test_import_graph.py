"""The direction of dependencies, read from every import of the package, also within functions."""

import ast
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hf_diffusion"
# From the ground up: a room imports from rooms above it in this table only.
# Rooms of one line do not know each other.
FLOORS = (
    ("randomness", "files", "environment"),
    ("config", "figures"),
    ("schedulers", "models"),
    ("losses", "data"),
    ("hub",),
    ("pipelines",),
    ("sampling",),
    ("evaluation", "convert", "space"),
    ("cards",),
    ("loop",),
    ("training", "commands"),
    ("cli",),
)
# What travels with the weights must not import the package.
# So it finds this module at run time, where the package is installed.
FOUND_AT_RUN_TIME = {("pipelines", "hub")}
COMPONENT_LIBRARIES = {"torch", "numpy", "diffusers"}
STANDARD = {"collections", "dataclasses", "functools", "inspect", "math", "numbers", "typing", "types"}


def modules() -> dict[str, Path]:
    """Every module of the package by its full name; links to what stands beside it count, too."""
    found = {}
    for folder in (PACKAGE, *(ROOT / name for name in ("pipelines", "training"))):
        for path in sorted(folder.rglob("*.py")):
            inside = path.relative_to(PACKAGE if folder == PACKAGE else ROOT)
            if folder == PACKAGE and inside.parts[0] in ("pipelines", "training", "model_cards"):
                continue
            name = ".".join(("hf_diffusion", *inside.with_suffix("").parts)).removesuffix(".__init__")
            found[name] = path
    return found


def imports(path: Path) -> set[str]:
    """Full names that a file imports anywhere: modules and what it takes from them.

    `import_module` counts, too.
    """
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively; components and pipelines travel alone"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            names |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
    return names


MODULES = modules()
GRAPH = {name: imports(path) & set(MODULES) - {name, "hf_diffusion"} for name, path in MODULES.items()}


def room(module: str) -> str:
    return module.split(".")[1]


def test_imports_run_one_way():
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    upward = [
        f"{module} imports {other}"
        for module, others in GRAPH.items()
        for other in others
        if module != "hf_diffusion" and room(module) != room(other)
        if floor[room(other)] >= floor[room(module)] and (room(module), room(other)) not in FOUND_AT_RUN_TIME
    ]
    assert not upward, upward


def test_no_file_is_part_of_a_circle():
    state: dict[str, int] = {}

    def visit(module: str, path: list[str]) -> None:
        if state.get(module) == 1:
            pytest.fail(f"circle: {' -> '.join([*path[path.index(module) :], module])}")
        if module in state:
            return
        state[module] = 1
        for other in sorted(GRAPH[module]):
            # the named exception would close circles through what it finds
            if (room(module), room(other)) not in FOUND_AT_RUN_TIME:
                visit(other, [*path, module])
        state[module] = 2

    for module in GRAPH:
        if module != "hf_diffusion":
            visit(module, [])


def test_the_root_holds_at_most_six_files():
    assert len(list(PACKAGE.glob("*.py"))) <= 6


def test_a_component_imports_torch_numpy_and_diffusers_only():
    for module, path in MODULES.items():
        if room(f"{module}.") in ("schedulers", "models"):
            assert {name.split(".")[0] for name in imports(path)} <= COMPONENT_LIBRARIES | STANDARD, module


def test_a_pipeline_uses_nothing_of_the_package_but_what_travels_with_it():
    for module, others in GRAPH.items():
        if module.startswith("hf_diffusion.pipelines.pipeline_"):
            assert {room(other) for other in others} <= {"pipelines"}, module


def test_every_file_that_travels_has_a_stem_of_its_own():
    """Shipped code lands flat in one folder of diffusers' module cache."""
    rooms = ("schedulers", "models", "pipelines")
    stems = [path.stem for module, path in MODULES.items() if room(f"{module}.") in rooms and path.stem != "__init__"]
    assert len(stems) == len(set(stems))


def test_no_folder_of_the_package_bears_the_name_of_a_diffusers_pipeline():
    """diffusers would record that folder's name in model_index.json, and not find the class."""
    import diffusers.pipelines

    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    assert not any(hasattr(diffusers.pipelines, name) for name in folders - {"__pycache__"})
