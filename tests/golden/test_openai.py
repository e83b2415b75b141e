"""Every case of ../shared/golden/openai, driven by its manifest: a kind of case that no replay knows fails."""

import pytest

from tests.golden import (
    replays_openai_guidance,
    replays_openai_losses,
    replays_openai_models,
    replays_openai_schedulers,
)
from tests.golden.replay import Case, file_cases, golden


FOLDER, MANIFEST = golden("openai")
REPLAYS = {
    **replays_openai_schedulers.REPLAYS,
    **replays_openai_losses.REPLAYS,
    **replays_openai_models.REPLAYS,
    **replays_openai_guidance.REPLAYS,
}


@pytest.mark.parametrize("file, name", file_cases(MANIFEST))
def test_golden_case_is_reproduced(file, name):
    case = Case(FOLDER, MANIFEST, file, name)
    if case.feature not in REPLAYS:
        pytest.fail(f"{file} holds {case.feature!r}, which no replay knows; known: {sorted(REPLAYS)}")
    REPLAYS[case.feature](case)
    case.assert_everything_was_checked()
