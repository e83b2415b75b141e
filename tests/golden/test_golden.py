"""Every golden case of every system that the package implements.

A kind of case that no replay knows fails.
"""

import pytest

from tests.golden import (
    replays_autoencoder,
    replays_consistency,
    replays_d3pm,
    replays_ddgan,
    replays_ddgan_models,
    replays_ddgan_training,
    replays_ect,
    replays_edm,
    replays_flow,
    replays_glide,
    replays_mdlm,
    replays_openai_guidance,
    replays_openai_losses,
    replays_openai_models,
    replays_openai_schedulers,
    replays_score_sde,
)
from tests.golden.manifests import golden_root, records, systems
from tests.golden.replay import replay


# A new family adds its replays here; the systems that no row names are read (test_cases), not
# replayed.
REPLAYS = {
    "autoencoder": replays_autoencoder.REPLAYS,
    "consistency": replays_consistency.REPLAYS,
    "ect": replays_ect.REPLAYS,
    "d3pm": replays_d3pm.REPLAYS,
    "mdlm": replays_mdlm.REPLAYS,
    "openai": replays_openai_schedulers.REPLAYS
    | replays_openai_losses.REPLAYS
    | replays_openai_models.REPLAYS
    | replays_openai_guidance.REPLAYS,
    "openai_models": replays_openai_models.MODEL_REPLAYS,
    "ddgan": replays_ddgan.REPLAYS | replays_ddgan_training.REPLAYS,
    "ddgan_models": replays_ddgan_models.REPLAYS,
    "edm": replays_edm.REPLAYS,
    "flow": replays_flow.REPLAYS,
    "glide": replays_glide.REPLAYS,
    "score_sde": replays_score_sde.REPLAYS,
}
CONVERSIONS = {
    "openai_models": replays_openai_models.assert_converted_there_and_back,
    "ddgan_models": replays_ddgan_models.assert_converted_there_and_back,
}
ROOT = golden_root()
CASES = {system: records(ROOT / system) for system in systems(ROOT)}


def cases_of(known: dict) -> list:
    """Every case of these systems; a system without vectors is skipped, and says so."""
    found = [pytest.param(case, id=str(case)) for system in known for case in CASES.get(system, [])]
    reason = f"{ROOT} holds no vectors of this system; name the full set by HF_DIFFUSION_GOLDEN"
    absent = [system for system in known if not CASES.get(system)]
    return found + [pytest.param(None, id=system, marks=pytest.mark.skip(reason=reason)) for system in absent]


def test_there_are_vectors():
    assert any(CASES.values()), f"{ROOT} holds no golden vectors; name a folder by HF_DIFFUSION_GOLDEN"


@pytest.mark.parametrize("record", cases_of(REPLAYS))
def test_a_case_of_the_reference_is_reproduced(record):
    replay(record, REPLAYS[record.folder.name])


@pytest.mark.parametrize("record", cases_of(CONVERSIONS))
def test_weights_and_flags_of_the_reference_survive_both_conversions_bit_for_bit(record):
    CONVERSIONS[record.folder.name](record)
