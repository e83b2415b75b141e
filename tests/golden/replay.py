"""Golden vectors: where they are, and how a replay compares with them.

A folder of vectors holds a `manifest.json` and the `.npz` files that it describes. `HF_DIFFUSION_GOLDEN` names the parent
folder; otherwise the copies in `tests/golden/data`, otherwise `../shared/golden` beside the checkout.
"""

import functools
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch


HERE = Path(__file__).resolve().parent


def golden_root() -> Path | None:
    if os.environ.get("HF_DIFFUSION_GOLDEN"):
        return Path(os.environ["HF_DIFFUSION_GOLDEN"])
    candidates = [HERE / "data", HERE.parents[2] / "shared" / "golden"]
    return next((folder for folder in candidates if folder.is_dir()), None)


def golden(system: str) -> tuple[Path, dict]:
    """The folder and the manifest of one system; the calling module is skipped where there are no vectors at all."""
    root = golden_root()
    if root is None:
        pytest.skip(
            "no golden vectors: set HF_DIFFUSION_GOLDEN or put them in ../shared/golden", allow_module_level=True
        )
    folder = root / system
    return folder, json.loads((folder / "manifest.json").read_text())


@functools.lru_cache(maxsize=64)
def _arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as arrays:
        return dict(arrays)


def file_cases(manifest: dict) -> list[tuple[str, str]]:
    """(npz file, case) for every case of a manifest that lists its cases under `files`."""
    return [(file, case) for file, entry in manifest["files"].items() for case in entry["cases"]]


class Case:
    """One case: `params`, inputs in either precision, and `check(name, actual, dtype)` against the expected array.

    Keys in the npz are `<case>__<kind>__<name>`, kind being input, expected_f64, expected_f32 or expected (exact).
    """

    def __init__(self, folder: Path, manifest: dict, file: str, case: str):
        entry = manifest["files"][file]
        self.file, self.name, self.manifest, self.entry = file, case, manifest, entry
        self.feature, self.params = entry["feature"], entry["cases"][case]["params"]
        self.keys, self.tolerance = entry["cases"][case]["keys"], entry["cases"][case]["tolerance"]
        prefix = f"{case}__"
        arrays = _arrays(folder / file)
        self.arrays = {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}
        self.checked: set[str] = set()

    def input(self, name: str, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """An input as a tensor: floating arrays in `dtype` (they hold float32-representable values), integers as they are."""
        array = torch.from_numpy(np.ascontiguousarray(self.arrays[f"input__{name}"]))
        return array.to(dtype) if array.is_floating_point() else array

    def has_input(self, name: str) -> bool:
        return f"input__{name}" in self.arrays

    def dtypes(self) -> list[torch.dtype]:
        """The precisions in which this case has expected values."""
        kinds = {key.split("__")[0] for key in self.arrays}
        return [d for d, k in ((torch.float64, "expected_f64"), (torch.float32, "expected_f32")) if k in kinds]

    def expects(self, name: str, dtype: torch.dtype = torch.float64) -> bool:
        return f"{_kind(dtype)}__{name}" in self.arrays

    def check(self, name: str, actual, dtype: torch.dtype | None = torch.float64) -> None:
        """Compare with the expected array of `dtype`, or with the exact one for dtype None, and note that it was compared."""
        key = f"expected__{name}" if dtype is None else f"{_kind(dtype)}__{name}"
        if key not in self.arrays:
            raise AssertionError(f"{self.file}/{self.name} has no {key}; it has {sorted(self.arrays)}")
        expected = self.arrays[key]
        actual = np.asarray(actual.detach().numpy() if isinstance(actual, torch.Tensor) else actual)
        where = f"{self.file}/{self.name}/{key}"
        tolerance = self.tolerance.get(name, "exact")
        if isinstance(tolerance, dict) and dtype is not None:
            tolerance = tolerance["f64" if dtype == torch.float64 else "f32"]
        if tolerance == "exact" or dtype is None:
            np.testing.assert_array_equal(actual, expected, err_msg=where)
        else:
            if actual.shape != expected.shape:
                actual = np.broadcast_to(actual, expected.shape)
            np.testing.assert_allclose(actual, expected, rtol=tolerance["rtol"], atol=tolerance["atol"], err_msg=where)
        self.checked.add(key)

    def assert_everything_was_checked(self) -> None:
        expected = {key for key in self.arrays if key.startswith("expected")}
        assert expected <= self.checked, f"{self.file}/{self.name}: never compared {sorted(expected - self.checked)}"


def _kind(dtype: torch.dtype) -> str:
    return {torch.float64: "expected_f64", torch.float32: "expected_f32"}[dtype]


def toy(formula: str):
    """A toy network or gradient of the manifest ("0.1*x + 0.01*sin(t)") as a function of tensors x, t, y, s."""
    names = {
        name: getattr(torch, name) for name in ("sin", "cos", "tan", "tanh", "exp", "log", "sqrt", "sigmoid", "abs")
    }
    code = compile(formula, "<toy function>", "eval")

    def evaluate(**variables):
        return eval(code, {"__builtins__": {}, "pi": math.pi, "e": math.e, **names}, variables)

    return evaluate
