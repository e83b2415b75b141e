"""One turn of one player: the whole batch's gradient, clipped, applied, averaged, or left out."""

import math
from dataclasses import dataclass

import pytest
import torch
from accelerate import Accelerator
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from hf_diffusion.config.run_options import TrainingConfig
from hf_diffusion.loop import update
from hf_diffusion.loop.averages import SharedNetwork
from hf_diffusion.loop.nonfinite import TrainingDiverged
from hf_diffusion.loop.reporting import Progress, RunningMeans
from hf_diffusion.loop.update import Updater, prepare_player
from hf_diffusion.losses.objective import Objective, Player


class Line(ModelMixin, ConfigMixin):
    """y = w x."""

    @register_to_config
    def __init__(self, start: float = 1.0):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([start, 2 * start]))

    def forward(self, x):
        return x * self.w


@dataclass(kw_only=True)
class Config(TrainingConfig):
    max_train_steps: int = 10
    lr_scheduler: str = "constant"
    lr_warmup_steps: int = 0


class Game(Objective):
    """A critic in every step, a painter in every second."""

    def __init__(self, *players):
        super().__init__(*players)
        self.updated = []

    def turns(self, step):
        yield self.players[1]
        if step % 2:
            yield self.players[0]

    def after_update(self, player, step):
        self.updated.append((player.name, step))


def squares(network, batch, draw):
    return {"loss": network(batch["x_0"]).square().sum(1), "level": torch.tensor([0.1, 0.9])}


def updater(objective: Objective, **settings) -> Updater:
    config, accelerator = Config(**settings), Accelerator(cpu=True)
    for player in objective.players:
        prepare_player(config, accelerator, player)
    shared = SharedNetwork(config, accelerator, objective.players[0].network)
    means, progress = RunningMeans(accelerator.device), Progress(accelerator)
    return Updater(config, accelerator, objective, shared, means, progress, config.max_train_steps)


def batch(*rows: tuple[float, float]) -> dict:
    return {"x_0": torch.tensor(rows), "indices": torch.arange(len(rows))}


MICROS = [(0, batch((1.0, 2.0), (3.0, -1.0)), None), (1, batch((0.5, 0.0), (-2.0, 1.0)), None)]


def gradient(w: torch.Tensor) -> torch.Tensor:
    """Of the mean of (w x)^2 over the four rows of both micro-batches."""
    x = torch.cat([batch["x_0"] for _, batch, _ in MICROS])
    return (2 * w * x.square()).mean(0)


def test_an_update_is_adams_step_along_the_mean_gradient_of_all_micro_batches():
    network, twin = Line(), Line()
    made = updater(Objective(Player(network, squares, 0.1)), gradient_accumulation_steps=2, max_grad_norm=None)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=0.1, betas=(0.9, 0.999), weight_decay=0.0)
    for step in range(3):
        made.step(step, MICROS)
        twin.w.grad = gradient(twin.w.detach())
        optimizer.step()
    torch.testing.assert_close(network.w, twin.w)


class Graphs:
    """Stands for captured CUDA graphs: what they leave in memory is lost when a step begins."""

    def __init__(self):
        self.memory, self.modes, self.begun = [], [], 0

    def compile(self, network, mode=None):
        self.modes.append(mode)
        network.register_forward_hook(lambda *given: self.memory.append(given[-1].detach()))
        for parameter in network.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: self.memory.append(p.grad))

    def begin(self):
        self.begun += 1
        while self.memory:
            self.memory.pop().fill_(math.nan)


@pytest.mark.parametrize("keeps", [True, False])
def test_gradients_of_captured_graphs_are_kept_from_micro_batch_to_micro_batch(monkeypatch, keeps):
    graphs, networks = Graphs(), (Line(), Line())
    monkeypatch.setattr(Line, "compile", lambda network, **options: graphs.compile(network, **options))
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", graphs.begin)
    if not keeps:
        monkeypatch.setattr(update, "_keep_gradients", lambda network: None)
    micros = [*MICROS, (2, batch((1.0, 1.0), (0.0, 2.0)), None)]
    for network, mode in zip(networks, ({}, {"torch_compile": True, "compile_mode": "reduce-overhead"})):
        made = updater(Objective(Player(network, squares, 0.1)), gradient_accumulation_steps=3, **mode)
        for step in range(2):
            made.step(step, micros)
    assert graphs.modes == ["reduce-overhead"] and graphs.begun == 6
    assert torch.equal(networks[1].w, networks[0].w) is keeps
    # what was lost is met as a gradient that is not finite
    made.settle()
    assert made.skips.count == (0 if keeps else 2)


def test_a_mode_of_compilation_without_compiling_is_refused():
    with pytest.raises(ValueError, match="compile_mode max-autotune without compiling means nothing; add --torch_c"):
        updater(Objective(Player(Line(), squares, 0.1)), compile_mode="max-autotune")


def test_the_gradient_is_clipped_to_the_norm_and_the_log_has_the_norm_before():
    network = Line()
    made = updater(Objective(Player(network, squares, 0.1)), gradient_accumulation_steps=2, max_grad_norm=0.5)
    seen, player = [], made.objective.players[0]
    player.optimizer.step = lambda: seen.append(network.w.grad.clone())
    made.step(0, MICROS)
    whole = gradient(network.w.detach())
    torch.testing.assert_close(seen[0], whole * 0.5 / whole.norm(), rtol=1e-4, atol=0)
    assert made.means.report(made.accelerator)["grad_norm"] == pytest.approx(float(whole.norm()), rel=1e-5)


def test_each_player_has_its_own_learning_rate_by_the_step():
    critic = Player(Line(3.0), squares, 0.2, "critic", "_c", is_averaged=False)
    made = updater(Game(Player(Line(), squares, 0.1), critic), lr_warmup_steps=4)
    made.step(1, MICROS[:1])
    assert [player.optimizer.param_groups[0]["lr"] for player in made.objective.players] == [0.025, 0.05]


def test_the_average_moves_with_the_shared_network_only_and_after_its_updates_only():
    painter = Player(Line(), squares, 0.1, "painter", "_p")
    critic = Player(Line(3.0), squares, 0.1, "critic", "_c", is_averaged=False)
    made = updater(Game(painter, critic), ema_max_decay=0.5)
    for step in range(4):
        made.step(step, MICROS[:1])
        assert made.shared.average.optimization_step == (step + 1) // 2
    assert made.objective.updated == [
        ("critic", 0), ("critic", 1), ("painter", 1), ("critic", 2), ("critic", 3), ("painter", 3)
    ]  # fmt: skip
    assert not torch.equal(made.shared.copy().w, made.shared.raw_copy().w)


def test_frozen_networks_get_no_gradient_in_a_turn_and_learn_again_after_it():
    judge = Line(3.0)

    def judged(network, batch, draw):
        assert not judge.w.requires_grad
        return {"loss": judge(network(batch["x_0"])).sum(1)}

    made = updater(Objective(Player(Line(), judged, 0.1, frozen=(judge,))))
    made.step(0, MICROS[:1])
    assert judge.w.grad is None and judge.w.requires_grad


def spoilt(network, batch, draw):
    values = squares(network, batch, draw)
    return values | {"loss": values["loss"] * torch.tensor([1.0, math.inf])}


# RAdam of torch cannot leave out an update by itself, so its gradient is waited for.
@pytest.mark.parametrize("optimizer", ["adamw", "radam"])
def test_a_gradient_that_is_not_finite_changes_nothing_ends_the_step_and_is_counted(optimizer, capsys):
    painter = Player(Line(), squares, 0.1, "painter", "_p")
    critic = Player(Line(3.0), spoilt, 0.1, "critic", "_c", is_averaged=False)
    made = updater(Game(painter, critic), max_nonfinite_steps=3, optimizer=optimizer)
    assert made.runs_ahead is (optimizer == "adamw")
    made.step(1, MICROS[:1])
    made.settle()
    assert [player.network.w.tolist() for player in made.objective.players] == [[1.0, 2.0], [3.0, 6.0]]
    assert made.skips.count == 1 and not any("grad_norm" in name for name in made.means.report(made.accelerator))
    said = capsys.readouterr().err
    assert "step 1: the gradient is not finite" in said and "row 1 at noise level 0.900 (inf)" in said
    # a finite step begins the count anew
    critic.loss = squares
    made.step(2, MICROS[:1])
    critic.loss = spoilt
    made.step(3, MICROS[:1])
    made.step(4, MICROS[:1])
    made.settle()
    assert (made.skips.count, made.skips.in_a_row) == (3, 2)
    with pytest.raises(TrainingDiverged, match="not finite in 3 steps in a row, the last of them step 6"):
        made.step(6, MICROS[:1])
        made.settle()


def test_what_is_wrong_with_a_step_is_said_after_the_next_unless_somebody_asks(capsys):
    player = Player(Line(), spoilt, 0.1)
    made = updater(Objective(player))
    made.step(0, MICROS[:1])
    assert capsys.readouterr().err == "" and made.skips.count == 0
    player.loss = squares
    made.step(1, MICROS[:1])
    assert "step 0: the gradient is not finite" in capsys.readouterr().err
    assert (made.skips.count, made.skips.in_a_row) == (1, 1)
    made.settle()
    assert (made.skips.count, made.skips.in_a_row) == (1, 0)


class Layer(Line):
    """The same, with a matrix within a block."""

    def __init__(self, start: float = 1.0):
        super().__init__(start)
        self.block = nn.ModuleList([nn.Linear(24, 24, bias=False)])
        nn.init.eye_(self.block[0].weight)

    def forward(self, x):
        return super().forward(x) * self.block[0](torch.ones(24)).mean()


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "radam"])
def test_a_run_goes_on_from_a_spoilt_step_as_if_it_had_not_been(optimizer):
    networks = Layer(), Layer()
    for network, bad in zip(networks, (None, 2)):
        player = Player(network, squares, 0.01)
        made = updater(Objective(player), optimizer=optimizer, adam_weight_decay=0.1)
        for step in range(5):
            player.loss = squares
            made.step(step, MICROS[:1])
            if step == bad:
                player.loss = spoilt
                made.step(step, MICROS[:1])
        made.settle()
        assert made.skips.count == (0 if bad is None else 1)
    for one, other in zip(*(network.state_dict().values() for network in networks), strict=True):
        assert torch.equal(one, other) and not torch.equal(one, one.new_ones(one.shape))


def test_an_engine_that_updates_by_itself_is_told_of_a_bad_loss_before_and_a_bad_gradient_after(monkeypatch, capsys):
    """DeepSpeed is not here: what it would do is left out, what the loop does around it is not."""
    player = Player(Line(), squares, 0.1)
    made = updater(Objective(player), output_dir="runs/mine")
    monkeypatch.setattr(update, "parallelism", lambda accelerator: "DeepSpeed")
    made.runs_ahead = False
    made.step(0, MICROS[:1])
    assert made.skips.count == 0 and made.means.report(made.accelerator)["grad_norm"] > 0
    player.loss = spoilt
    made.step(1, MICROS[:1])
    assert made.skips.count == 1 and "step 1: the gradient is not finite" in capsys.readouterr().err
    player.loss = squares
    monkeypatch.setattr(made.accelerator, "clip_grad_norm_", lambda *_: math.inf)
    with pytest.raises(TrainingDiverged, match="step 2 was not finite .* the checkpoints in runs/mine, if any, are"):
        made.step(2, MICROS[:1])


def test_dropout_follows_from_the_place_in_the_run():
    drawn = {}

    def note(name):
        def loss(network, batch, draw):
            drawn.setdefault(name, []).append(torch.rand(1).item())
            return squares(network, batch, draw)

        return loss

    for _ in range(2):
        players = Player(Line(), note("painter"), 0.1, "painter"), Player(Line(), note("critic"), 0.1, "critic")
        made = updater(Game(*players), gradient_accumulation_steps=2)
        torch.manual_seed(len(drawn))
        made.step(1, MICROS)
        made.step(3, MICROS)
    # both runs draw alike, and every player, step and micro-batch differently
    assert drawn["painter"][:4] == drawn["painter"][4:] and drawn["critic"][:4] == drawn["critic"][4:]
    assert len({*drawn["painter"], *drawn["critic"]}) == 8


def test_the_log_has_the_means_of_each_player_and_the_loss_by_noise_level():
    critic = Player(Line(3.0), squares, 0.1, "critic", "_c", is_averaged=False)
    made = updater(Game(Player(Line(), squares, 0.1, "painter", "_p"), critic))
    made.step(0, MICROS[:1])
    losses = (MICROS[0][1]["x_0"] * torch.tensor([3.0, 6.0])).square().sum(1)
    report = made.means.report(made.accelerator)
    assert report["loss_c"] == pytest.approx(float(losses.mean()))
    assert report["loss_c_q0"] == pytest.approx(float(losses[0]))
    assert report["loss_c_q3"] == pytest.approx(float(losses[1]))
    assert not any(name.endswith("_p") or "_p_" in name for name in report)


def test_a_rehearsal_changes_no_weight_and_leaves_no_gradient():
    made = updater(Game(Player(Line(), squares, 0.1), Player(Line(3.0), squares, 0.1, "critic")))
    made.rehearse(MICROS[0][1], None)
    assert [player.network.w.tolist() for player in made.objective.players] == [[1.0, 2.0], [3.0, 6.0]]
    assert all(player.network.w.grad is None for player in made.objective.players)
