"""The reader of golden vectors: every layout, every system of the full set, and what it refuses."""

import json

import numpy as np
import pytest
import torch

from tests.golden.manifests import FULL_SET, SMALL_SET, golden_root, read_weights, records, systems
from tests.golden.replay import Case, in_words, replay
from tests.golden.test_golden import REPLAYS


ROOT = FULL_SET if FULL_SET.is_dir() else golden_root()


@pytest.mark.parametrize("system", systems(ROOT))
def test_every_case_of_a_system_can_be_opened_and_compared_with_itself(system):
    for record in records(ROOT / system):
        case = Case(record)
        assert all(array.dtype != object for array in case.arrays.values())
        for name, array in case.arrays.items():
            if array.dtype.kind == "U":
                case.words(name)
            elif name.startswith(("expected_f32__", "expected__")):
                kind, short = name.split("__", 1)
                case.check(short, case[name], torch.float32 if kind == "expected_f32" else None)
            else:
                case.check(name.removeprefix("expected_f64__"), case[name])
        case.assert_complete()


@pytest.mark.parametrize("system", systems(ROOT))
def test_the_cases_of_a_system_are_all_that_its_archives_hold(system):
    cases = records(ROOT / system)
    for path in (ROOT / system).glob("*.npz"):
        with np.load(path) as arrays:
            own = [record for record in cases if record.file == path.name]
            assert sum(len(record.arrays) for record in own) == len(arrays.files), path.name


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("*/*.safetensors*")), ids=lambda path: f"{path.parent.name}/{path.name}"
)
def test_weights_of_every_form_are_read(path):
    assert all(tensor.float().isfinite().all() for tensor in read_weights(path).values())


@pytest.fixture
def system(tmp_path):
    """Two cases, with a tolerance of the file, one of an array, and one for float32 in words."""
    np.savez(tmp_path / "steps.npz", **{"euler/x": np.ones(3), "euler/next": np.full(3, 2.0), "heun/x": np.zeros(2)})
    keys = {"euler/x": {"meaning": "state"}, "euler/next": {"tolerance": {"rtol": 0.5, "atol": 0.0}}}
    cases = {"euler": {"settings": {"N": 3}, "keys": keys}, "heun": {"settings": {"N": 2}, "keys": {"heun/x": {}}}}
    tolerance = {"rtol": 1e-9, "atol": 1e-12, "note": "float64; use rtol 1e-4/atol 1e-5 for float32"}
    files = {"steps.npz": {"tolerance": tolerance, "cases": cases}, "network.safetensors": {"meaning": "weights"}}
    (tmp_path / "manifest.json").write_text(json.dumps({"files": files}))
    return tmp_path


def test_a_case_holds_its_own_arrays_settings_and_kind(system):
    euler, heun = records(system)
    assert (euler.kind, euler.settings, set(euler.arrays)) == ("steps", {"N": 3}, {"x", "next"})
    assert (heun.name, heun.settings, set(heun.arrays)) == ("heun", {"N": 2}, {"x"})


def test_the_tolerance_is_that_of_the_array_else_of_the_file_else_of_float32_in_words(system):
    case = Case(records(system)[0])
    case.check("next", torch.full((3,), 2.9))
    case.check("x", torch.ones(3) + 9e-5, torch.float32)
    for name, off, dtype in (("next", 1.1, torch.float64), ("x", 1e-8, torch.float64), ("x", 2e-4, torch.float32)):
        with pytest.raises(AssertionError, match=f"euler/{name}"):
            case.check(name, case[name] + off, dtype)


def test_a_result_of_another_shape_is_refused_even_if_it_broadcasts(system):
    with pytest.raises(AssertionError, match=r"\(1,\) is not \(3,\)"):
        Case(records(system)[0]).check("x", torch.ones(1))


def test_an_array_that_was_never_used_fails_the_replay(system):
    with pytest.raises(AssertionError, match=r"never used \['next'\]"):
        replay(records(system)[0], {"steps": lambda case: case.check("x", torch.ones(3))})


def test_a_kind_that_no_replay_knows_fails(system):
    with pytest.raises(AssertionError, match="of kind 'steps', which no replay knows"):
        replay(records(system)[0], REPLAYS["openai"])


def test_a_manifest_of_an_unknown_layout_is_refused(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({"vectors": {}}))
    with pytest.raises(ValueError, match=r"under one of \['files', 'models', 'configs'\], not \['vectors'\]"):
        records(tmp_path)


def test_tolerances_in_words_are_read():
    assert in_words("rtol 1e-5 atol 1e-6") == {"rtol": 1e-5, "atol": 1e-6}
    assert in_words("for a float32 implementation use rtol 1e-4, atol 1e-5") == {"rtol": 1e-4, "atol": 1e-5}
    assert in_words("entry 0 is log(1e-20)") == {}


@pytest.mark.parametrize("system", systems(SMALL_SET))
def test_the_small_set_holds_every_kind_of_case_that_is_replayed_once(system):
    assert {record.kind for record in records(SMALL_SET / system)} == set(REPLAYS[system])


@pytest.mark.skipif(not FULL_SET.is_dir(), reason="the full set of vectors is not in ../shared/golden")
@pytest.mark.parametrize("system", systems(SMALL_SET))
def test_the_small_set_is_a_part_of_the_full_one(system):
    full = {(record.kind, record.file.split(".")[0], record.name): record for record in records(FULL_SET / system)}
    for record in records(SMALL_SET / system):
        whole = full[record.kind, record.file.split(".")[0], record.name]
        assert (record.settings, record.tolerances, record.tolerance) == (
            whole.settings,
            whole.tolerances,
            whole.tolerance,
        )
        assert set(record.arrays) == set(whole.arrays)
        for name, array in whole.arrays.items():
            np.testing.assert_array_equal(record.arrays[name], array)
        if record.weights is not None:
            ours, theirs = record.read_weights(), whole.read_weights()
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
