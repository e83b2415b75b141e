"""Every case of ../shared/golden/ddgan, driven by its manifest: a kind of file that no replay knows fails."""

import pytest

from tests.golden.replay import golden
from tests.golden.replays_ddgan import REPLAYS, Case
from tests.golden.replays_ddgan_training import TrainReplay


FOLDER, MANIFEST = golden("ddgan")
CASES = [(file, settings) for file, entry in MANIFEST["files"].items() for settings in entry["cases"]]
NAMES = [f"{file}-{settings['id'] if isinstance(settings, dict) else settings}" for file, settings in CASES]


@pytest.mark.parametrize(("file", "settings"), CASES, ids=NAMES)
def test_a_case_of_the_reference_is_replayed(file, settings):
    case = Case(FOLDER, MANIFEST, file, settings)
    kind = file.removesuffix(".npz")
    if kind in REPLAYS:
        REPLAYS[kind](case)
    elif kind.startswith("train_"):
        TrainReplay(case).run()
    else:
        pytest.fail(f"no replay for {file}; known: {sorted(REPLAYS)} and train_*")
    case.assert_complete()
