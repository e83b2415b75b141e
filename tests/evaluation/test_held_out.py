"""The loss on held-out data: fixed noise for each sample, levels of every quarter, exact sums."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from hf_diffusion.data.loading import load_data
from hf_diffusion.evaluation import held_out, in_training
from hf_diffusion.evaluation.held_out import HeldOutLoss
from hf_diffusion.losses.objective import Player


DATA = load_data("digits", max_train_samples=120)
NETWORK = nn.Linear(1, 1)


def never() -> bool:
    return False


def evaluator(loss, batch_size=16, seed=0, **options) -> HeldOutLoss:
    return HeldOutLoss(Accelerator(cpu=True), DATA, Player(NETWORK, loss, 0.1, **options), batch_size, seed)


def noise_and_level(network, batch, draw):
    """Values that show what a sample was looked at with."""
    level, noise = draw.level(), draw.normal(*batch["x_0"].shape[1:])
    return {"loss": level, "noise": noise.flatten(1).sum(1) * batch["labels"], "level": level}


def test_noise_and_levels_belong_to_the_sample_and_cover_every_quarter():
    seen = []

    def note(network, batch, draw):
        values = noise_and_level(network, batch, draw)
        seen.append(values["level"])
        return values

    first, again, other = (evaluator(note, size, seed)(NETWORK, never) for size, seed in ((16, 0), (50, 0), (16, 1)))
    for key, measure in first.measures.items():
        assert again.measures[key].value == pytest.approx(measure.value, rel=1e-5), key
    assert other.measures["eval_noise"].value != pytest.approx(first.measures["eval_noise"].value, rel=1e-3)
    for quarter in range(4):
        # the first call was the trial
        levels = torch.cat(seen[1 + quarter : 33 : 4])
        assert quarter / 4 <= levels.min() and levels.max() < (quarter + 1) / 4 and levels.unique().numel() > 100
        assert first.measures[f"eval_loss_q{quarter}"].value == pytest.approx(quarter / 4 + 0.125, abs=0.025)
    assert first.measures["eval_loss"].value == pytest.approx(0.5, abs=0.015)
    assert first.protocol["count"] == 120 and first.protocol["held_out"]["name"] == DATA.name


def test_the_share_of_each_of_three_processes_makes_up_the_whole(monkeypatch):
    class Processes:
        num_processes = 3

        def __init__(self, index: int):
            self.process_index = index

    evaluate = evaluator(noise_and_level)
    whole, sums = evaluate(NETWORK, never), []
    monkeypatch.setattr(held_out, "gather_object", lambda parts: sums.extend(parts) or parts)
    for index in range(3):
        monkeypatch.setattr(in_training, "PartialState", lambda index=index: Processes(index))
        evaluate(NETWORK, never)
    for key in (key for key in sums[0] if "_q" in key):
        total = sum(part[key] for part in sums) / len(DATA)
        assert total == pytest.approx(whole.measures[key].value, rel=1e-6), key


def test_the_keys_and_the_direction_of_every_value_are_known_before_any_training():
    def answers(network, batch, draw):
        assert not network.training
        right = (batch["labels"] == 3).float()
        return {"loss": draw.level(), "top1": right, "of_some": (right, right)}

    evaluate = evaluator(answers, higher_is_better=("top1",))
    assert NETWORK.training
    NETWORK.eval()
    evaluation = evaluate(NETWORK, never)
    NETWORK.train()
    assert sorted(evaluation.measures) == sorted(evaluate.keys)
    assert {key for key, m in evaluation.measures.items() if m.better == "higher"} == {
        "eval_top1", *(f"eval_top1_q{quarter}" for quarter in range(4))
    }  # fmt: skip
    assert evaluation.measures["eval_top1_q2"].value == pytest.approx(np.mean(DATA.labels == 3))
