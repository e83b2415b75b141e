"""Golden vectors: how a replay reads one case and compares with it."""

import math
import re
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from tests.golden.manifests import Record


PRECISIONS = {torch.float64: "f64", torch.float32: "f32"}


class Case:
    """One case: `settings`, arrays by name, and comparison with the manifest's tolerance.

    Where inputs and results are kept apart, keys are `input__x`, `expected_f64__x`,
    `expected_f32__x` and, for whole numbers, `expected__x`; `input("x")` and `check("x", ...)` find
    them. Elsewhere a name is the key.
    """

    def __init__(self, record: Record):
        self.record, self.settings, self.manifest = record, record.settings, record.manifest
        self.arrays = record.arrays
        self.seen: set[str] = set()

    def __str__(self) -> str:
        return str(self.record)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.arrays:
            raise AssertionError(f"{self} has no {name!r}; it has {sorted(self.arrays)}")
        self.seen.add(name)
        return torch.from_numpy(np.array(self.arrays[name]))

    def words(self, name: str) -> list[str]:
        """An array of strings."""
        self.seen.add(name)
        return self.arrays[name].tolist()

    def named(self, prefix: str) -> dict[str, Tensor]:
        """All arrays whose names begin with `prefix`, without it."""
        return {name.removeprefix(prefix): self[name] for name in self.arrays if name.startswith(prefix)}

    def input(self, name: str, dtype: torch.dtype = torch.float64) -> Tensor:
        """An input, floating ones in `dtype`: they hold values that float32 represents."""
        array = self[f"input__{name}"]
        return array.to(dtype) if array.is_floating_point() else array

    def has_input(self, name: str) -> bool:
        return f"input__{name}" in self.arrays

    def dtypes(self) -> list[torch.dtype]:
        """The precisions in which this case has expected values."""
        kinds = {name.split("__")[0] for name in self.arrays}
        return [dtype for dtype, kind in PRECISIONS.items() if f"expected_{kind}" in kinds]

    def expects(self, name: str, dtype: torch.dtype | None = torch.float64) -> bool:
        return self._key(name, dtype) in self.arrays

    def check(self, name: str, actual, dtype: torch.dtype | None = torch.float64, **tolerance: float) -> None:
        """Compare with the expected array in the precision `dtype`, or exactly (None), and note it.

        `rtol` and `atol` stand in for the manifest's.
        """
        key = self._key(name, dtype)
        expected, actual = self[key], torch.as_tensor(actual).detach()
        assert actual.shape == expected.shape, f"{self}/{key}: {tuple(actual.shape)} is not {tuple(expected.shape)}"
        allowed = self.tolerance(name, dtype) | tolerance
        if "relmax" in allowed:
            allowed = {"rtol": 0.0, "atol": allowed["relmax"] * float(expected.abs().max())}
        if expected.is_floating_point():
            expected, actual = expected.double(), actual.double()
        rtol, atol = allowed["rtol"], allowed["atol"]
        np.testing.assert_allclose(
            actual.numpy(), expected.numpy(), rtol, atol, equal_nan=True, err_msg=f"{self}/{key}"
        )

    def tolerance(self, name: str, dtype: torch.dtype | None = torch.float64) -> dict[str, float]:
        """`rtol` and `atol` (or `relmax`, of the largest value) of an array.

        Equal is the rule where none is given.
        """
        stated = self.record.tolerances.get(name, self.record.tolerance)
        if stated is None or stated == "exact" or dtype is None:
            return {"rtol": 0.0, "atol": 0.0}
        if PRECISIONS[dtype] in stated:
            return stated[PRECISIONS[dtype]]
        if dtype == torch.float32:
            return stated | stated.get("float32", {}) | in_words(stated.get("note", ""))
        return stated

    def exception(self, name: str) -> dict[str, float]:
        """`rtol` and `atol` of one of the exceptions that a file's tolerance spells as text."""
        return in_words(self.record.tolerance.get("exceptions", {}).get(name, ""))

    def assert_complete(self) -> None:
        """Every array of the case was used."""
        assert set(self.arrays) == self.seen, f"{self}: never used {sorted(set(self.arrays) - self.seen)}"

    def _key(self, name: str, dtype: torch.dtype | None) -> str:
        kind = "expected" if dtype is None else f"expected_{PRECISIONS[dtype]}"
        return name if name in self.arrays else f"{kind}__{name}"


def in_words(text: str) -> dict[str, float]:
    """Tolerances of a sentence such as "float64; use rtol 1e-4/atol 1e-5 for float32"."""
    return {kind: float(value) for kind, value in re.findall(r"(rtol|atol) (\d[0-9.e-]*)", text)}


def replay(record: Record, replays: dict[str, Callable[[Case], None]]) -> None:
    """Replay one case by its kind, completely; a kind that no replay knows is an error."""
    case = Case(record)
    if record.kind not in replays:
        raise AssertionError(f"{record} is of kind {record.kind!r}, which no replay knows; known: {sorted(replays)}")
    replays[record.kind](case)
    case.assert_complete()


def toy(formula: str):
    """A toy network of the manifest ("0.1*x + 0.01*sin(t)") as a function of tensors x, t, y, s."""
    names = {
        name: getattr(torch, name) for name in ("sin", "cos", "tan", "tanh", "exp", "log", "sqrt", "sigmoid", "abs")
    }
    code = compile(formula, "<toy function>", "eval")

    def evaluate(**variables):
        return eval(code, {"__builtins__": {}, "pi": math.pi, "e": math.e, **names}, variables)

    return evaluate
