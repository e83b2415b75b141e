"""Steps whose gradient is not finite: what is said of them, and the bounds of fp16's loss scale."""

import pytest
import torch

from hf_diffusion.loop import nonfinite, start
from hf_diffusion.loop.nonfinite import bad_rows_in_words
from hf_diffusion.loop.update import Updater
from tests.training.interruptions import poison
from tests.training.test_train_ddpm import metrics, run


@pytest.fixture
def scaled(monkeypatch):
    """`scaled(first, interval)` trains in fp16 with a GradScaler, as accelerate does on a GPU."""

    def install(first: float, interval: int) -> list[torch.amp.GradScaler]:
        original, scalers = start.start, []

        def begin(config):
            accelerator = original(config)
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=first, growth_interval=interval)
            accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
            scalers.append(accelerator.scaler)
            return accelerator

        monkeypatch.setattr(start, "start", begin)
        return scalers

    return install


def test_a_skipped_step_is_described_by_its_norm_its_bad_rows_and_their_noise_levels(tmp_path, capsys, monkeypatch):
    seen, add = [], Updater._values
    monkeypatch.setattr(
        Updater,
        "_values",
        lambda self, player, step, micro, batch, draw, kept: (
            values := add(self, player, step, micro, batch, draw, kept),
            seen.append((batch["indices"].tolist(), values["level"].tolist())),
        )[0],
    )
    poison(monkeypatch, {2}, {1, 5})
    run(tmp_path, "--max_train_steps", "4")
    rows, level = seen[2]
    images = f"row {rows[1]} at noise level {level[1]:.3f} (inf), row {rows[5]} at noise level {level[5]:.3f} (inf)"
    sentence = (
        f"step 2: the gradient is not finite (norm nan); all processes skip the step; loss not finite: {images}\n"
    )
    assert sentence in capsys.readouterr().err
    assert [record["skipped"] for record in metrics(tmp_path)] == [0, 1]


def test_images_are_named_by_their_losses_where_all_of_these_are_finite():
    nan = float("nan")
    finite = torch.tensor([[7.0, 0.3, 0.5], [8.0, -1.0, 90.0], [9.0, 0.5, 2.0]])
    assert bad_rows_in_words(finite) == (
        "every loss is finite, the largest: "
        "row 8 (90), row 9 at noise level 0.500 (2), row 7 at noise level 0.300 (0.5)"
    )
    many = torch.tensor([[float(row), 0.1, nan] for row in range(20)])
    assert bad_rows_in_words(many).endswith("row 7 at noise level 0.100 (nan) and 12 more")


def test_the_loss_scale_is_in_the_log_and_does_not_grow_beyond_its_bound(tmp_path, scaled, monkeypatch):
    monkeypatch.setattr(nonfinite, "HIGHEST_LOSS_SCALE", 2.0**10)  # the real one overflows in these few steps
    scalers = scaled(2.0**6, 1)  # doubles at every step, and a report comes at every second
    folder = run(tmp_path, "--max_train_steps", "10")
    assert [record["loss_scale"] for record in metrics(folder)] == [2.0**8, 2.0**10, 2.0**10, 2.0**10, 2.0**10]
    assert scalers[-1].get_scale() == 2.0**10 and metrics(folder)[-1]["skipped"] == 0


def test_a_loss_scale_that_falls_without_end_stops_the_run(tmp_path, scaled, monkeypatch):
    """Every second step is fine, so no row of bad ones is ever long."""
    scaled(2.0**-8, 1000)
    poison(monkeypatch, range(1, 100, 2), {0})
    with pytest.raises(SystemExit, match="the loss scale of fp16 fell to .* by step 5, .* go on in bf16 or float32"):
        run(tmp_path, "--max_train_steps", "40", "--max_nonfinite_steps", "3")
    assert (tmp_path / "checkpoint-00000003").is_dir()
