"""Every network of ../shared/golden/openai_models, driven by its manifest."""

import pytest
import torch

from tests.golden.replay import golden
from tests.golden.replays_openai_models import ModelCase, replay_model


FOLDER, MANIFEST = golden("openai_models")
NETWORKS = [(config, kind) for config, kinds in MANIFEST["configs"].items() for kind in kinds]


def network(config: str, kind: str) -> ModelCase:
    return ModelCase(FOLDER, MANIFEST["configs"][config][kind])


@pytest.mark.parametrize("config, kind", NETWORKS)
def test_converted_network_reproduces_every_array(config, kind):
    replay_model(network(config, kind))


@pytest.mark.parametrize("config, kind", NETWORKS)
def test_conversion_there_and_back_keeps_every_bit_and_flag(config, kind):
    case = network(config, kind)
    model = case.model()
    assert sum(p.numel() for p in model.parameters()) == MANIFEST["configs"][config][kind]["parameters"]
    weights, flags = case.exported(model)
    assert set(weights) == set(case.weights)
    assert all(torch.equal(weights[name], case.weights[name].float()) for name in weights)
    assert {name: flags[name] for name in case.flags} == case.flags
