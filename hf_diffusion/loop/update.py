"""Turns of players: gradients over the micro-batches, clipped, and applied unless they are not
finite.
"""

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from hf_diffusion.config.run_options import TrainingConfig
from hf_diffusion.loop.averages import SharedNetwork, is_of_transformers
from hf_diffusion.loop.engines import DATA_PARALLEL, captures_graphs, compile_options, full_tensor, parallelism
from hf_diffusion.loop.later import Later
from hf_diffusion.loop.learning_rate import lr_factor, rate_settings
from hf_diffusion.loop.muon import Muon
from hf_diffusion.loop.nonfinite import Skips, TrainingDiverged, Turn
from hf_diffusion.loop.reporting import Progress, RunningMeans
from hf_diffusion.losses.objective import Objective, Player, Values
from hf_diffusion.randomness import Draw, derive_seed


Micro = tuple[int, dict[str, Tensor], Draw]
# Called with the network, and lr, betas, eps and weight_decay by name.
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda network, **options: torch.optim.AdamW(network.parameters(), fused=True, **options),
    "radam": lambda network, **options: torch.optim.RAdam(
        network.parameters(), decoupled_weight_decay=True, **options
    ),
    "muon": Muon.of,
}


class Updater:
    """The optimizer steps of a run; `skips` counts those that were left out.

    Where the optimizers themselves leave out an update that is not finite, nothing waits for the
    device: what there is to say of a step is said after the next, or by `settle`.
    """

    def __init__(
        self,
        config: TrainingConfig,
        accelerator: Accelerator,
        objective: Objective,
        shared: SharedNetwork,
        means: RunningMeans,
        progress: Progress,
        total_steps: int,
    ):
        self.config, self.accelerator, self.objective, self.shared = config, accelerator, objective, shared
        self.means, self.total_steps = means, total_steps
        self.skips = Skips(config, accelerator, progress)
        self.captures_graphs = captures_graphs(config)
        # fp16 and FSDP wait within accelerate and torch
        self.runs_ahead = (
            accelerator.scaler is None
            and parallelism(accelerator) == DATA_PARALLEL
            and all(leaves_out(player.optimizer) for player in objective.players)
        )
        # those of the last step, until they are judged
        self.turns: list[Turn] = []

    def step(self, step: int, micros: Iterable[Micro]) -> None:
        """Every player's turn in optimizer step `step`.

        One whose gradient is not finite ends it: neither it nor what follows changes a weight.
        TrainingDiverged.
        """
        if len(self.objective.players) > 1:
            micros = list(micros)
        earlier, self.turns = self.turns, []
        spoiled = torch.zeros((), device=self.accelerator.device)
        for player in self.objective.turns(step):
            self.turns.append(self._turn(player, step, micros, spoiled))
            if not self.runs_ahead and not self.turns[-1].is_finite():
                break
        if earlier:
            self.skips.judge(earlier)
        if not self.runs_ahead:
            self.settle()

    def settle(self) -> None:
        """Judge the last step, for which this waits; TrainingDiverged."""
        turns, self.turns = self.turns, []
        if turns:
            self.skips.judge(turns)

    def _turn(self, player: Player, step: int, micros: Iterable[Micro], spoiled: Tensor) -> Turn:
        """A turn; `spoiled` () becomes 1 where it, or an earlier one of the step, is not finite."""
        # First, since DeepSpeed updates within the last backward pass.
        self._set_learning_rate(player, step)
        seen: list[tuple[Tensor, Tensor, Tensor]] = []
        by_engine = parallelism(self.accelerator) == "DeepSpeed"
        for network in player.frozen:
            network.requires_grad_(False)
        try:
            norm = (self._engine_turn if by_engine else self._gradients)(player, step, micros, seen)
        finally:
            for network in player.frozen:
                network.requires_grad_(True)
        turn = Turn(step, Later(norm), seen)
        spoiled.copy_(torch.maximum(spoiled, (~norm.isfinite()).float()))
        if not by_engine:
            self._apply(player, turn, spoiled)
        if self.runs_ahead or turn.is_finite():
            # of a spoiled step an average takes the weights, which are as before, once more
            kept = 1 - spoiled
            self.means.add({f"grad_norm{player.suffix}": (torch.where(kept > 0, norm, 0)[None], kept[None])})
            if player.network is self.shared.network:
                self.shared.update()
            self.objective.after_update(player, step)
        return turn

    def _apply(self, player: Player, turn: Turn, spoiled: Tensor) -> None:
        """The optimizer's step, which leaves a spoiled one out."""
        if self.runs_ahead:
            # by the name that GradScaler gives it
            player.optimizer.optimizer.found_inf = spoiled
        # a scaler leaves it out by itself, and lowers the loss scale
        if self.runs_ahead or turn.is_finite() or self.accelerator.scaler is not None:
            player.optimizer.step()
        player.optimizer.zero_grad(set_to_none=True)

    def _gradients(self, player: Player, step: int, micros: Iterable[Micro], seen: list) -> Tensor:
        """Backward over the micro-batches; the gradient's norm () before it was clipped."""
        accelerator, count = self.accelerator, self.config.gradient_accumulation_steps
        for micro, batch, draw in micros:
            last = micro == count - 1
            with nullcontext() if last else accelerator.no_sync(player.network):
                values = self._values(player, step, micro, batch, draw, seen)
                accelerator.backward(values["loss"].mean() / count)
            self._log(player, values)
            if self.captures_graphs and not last:
                _keep_gradients(player.network)
        accelerator.unscale_gradients(player.optimizer)
        norm = nn.utils.clip_grad_norm_(player.network.parameters(), self.config.max_grad_norm or math.inf)
        return full_tensor(norm)

    def _engine_turn(self, player: Player, step: int, micros: Iterable[Micro], seen: list) -> Tensor:
        """The same by DeepSpeed, whose engine divides by the micro steps, clips and updates in the
        last backward pass.

        Nobody can look before that. So a loss that is not finite on some process is met before: it
        becomes 0 on all.
        """
        accelerator, count, finite = self.accelerator, self.config.gradient_accumulation_steps, True
        for micro, batch, draw in micros:
            values = self._values(player, step, micro, batch, draw, seen)
            self._log(player, values)
            loss = values["loss"].mean()
            if accelerator.reduce((~loss.detach().isfinite()).float(), "sum").item():
                finite = False
                if count == 1:
                    # and nothing changes
                    return torch.tensor(math.nan)
                # the other micro-batches count
                loss = 0 * sum(p.sum() for p in player.network.parameters())
            accelerator.gradient_state._set_sync_gradients(micro == count - 1)
            accelerator.backward(loss)
        # reads the norm, and clips nothing more
        grad_norm = float(accelerator.clip_grad_norm_(player.network.parameters(), math.inf) or 0.0)
        if finite and not math.isfinite(grad_norm) and accelerator.mixed_precision != "fp16":
            raise TrainingDiverged(
                f"the gradient of step {step} was not finite ({grad_norm}) and DeepSpeed has applied it; the "
                f"checkpoints in {self.config.output_dir}, if any, are untouched: go on from the latest with a lower "
                "learning_rate"
            )
        return torch.tensor(grad_norm if finite else math.nan)

    def _values(self, player: Player, step: int, micro: int, batch: dict, draw: Draw, seen: list) -> Values:
        """The player's losses; `seen` keeps which rows they are of."""
        if self.captures_graphs:
            # nothing that a network gave before is looked at again
            torch.compiler.cudagraph_mark_step_begin()
        # Dropout draws from the global generator: tie it to the place in the run, too.
        place = [*filter(None, [player.name]), micro, self.accelerator.process_index]
        torch.manual_seed(derive_seed(self.config.seed, "dropout", step, *place))
        with self.accelerator.autocast():
            values = player.loss(player.network, batch, draw)
        loss = values["loss"].detach()
        seen.append((batch["indices"], values.get("level", torch.full_like(loss, -1)), loss))
        return values

    def _log(self, player: Player, values: Values) -> None:
        named = {f"loss{player.suffix}" if name == "loss" else name: value for name, value in values.items()}
        level = named.pop("level", None)
        self.means.add(named)
        if level is not None:
            self.means.add_by_level(f"loss{player.suffix}", values["loss"], level)

    def _set_learning_rate(self, player: Player, step: int) -> None:
        config = self.config
        factor = lr_factor(step, self.total_steps, *rate_settings(config))
        for group in player.optimizer.param_groups:
            group["lr"] = player.learning_rate * factor

    def rehearse(self, batch: dict[str, Tensor], draw: Draw) -> None:
        """One micro step of every player, whose gradients are thrown away."""
        for player in self.objective.players:
            if self.captures_graphs:
                torch.compiler.cudagraph_mark_step_begin()
            with self.accelerator.autocast():
                loss = player.loss(player.network, batch, draw)["loss"].mean()
            self.accelerator.backward(loss)
        for player in self.objective.players:
            player.optimizer.zero_grad()


def _keep_gradients(network: nn.Module) -> None:
    """Copy the gradients of a captured backward pass, which the next one would write over."""
    for parameter in network.parameters():
        if parameter.grad is not None:
            parameter.grad = parameter.grad.clone()


def leaves_out(optimizer: AcceleratedOptimizer) -> bool:
    """Whether it leaves out an update where its `found_inf` is 1, without a wait for the device."""
    return getattr(optimizer.optimizer, "_step_supports_amp_scaling", False)


def build_optimizer(config: TrainingConfig, player: Player) -> torch.optim.Optimizer:
    """The player's optimizer; AdamW with adam_weight_decay 0 is plain Adam.

    What is trained beside the network that users get has AdamW in the place of Muon.
    """
    name = "adamw" if config.optimizer == "muon" and not player.is_averaged else config.optimizer
    return OPTIMIZERS[name](
        player.network,
        lr=player.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
    )


def prepare_player(config: TrainingConfig, accelerator: Accelerator, player: Player) -> None:
    """Put the network, in the form that the settings ask for, and its optimizer into the hands of
    accelerate.
    """
    network = player.network
    if config.channels_last:
        network = network.to(memory_format=torch.channels_last)
    if config.gradient_checkpointing:
        name = "gradient_checkpointing_enable" if is_of_transformers(network) else "enable_gradient_checkpointing"
        getattr(network, name)()
    if config.compile_mode and not config.torch_compile:
        raise ValueError(f"compile_mode {config.compile_mode} without compiling means nothing; add --torch_compile")
    if config.torch_compile and player.compilable:
        # in place, so that the names in the state dict stay as they are
        network.compile(**compile_options(config))
    player.network = network
    player.network, player.optimizer = accelerator.prepare(network, build_optimizer(config, player))
