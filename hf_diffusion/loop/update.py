"""One turn of one player: gradients over the micro-batches, clipped, and applied unless they are
not finite.
"""

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hf_diffusion.config.run_options import TrainingConfig
from hf_diffusion.loop.averages import SharedNetwork, is_of_transformers
from hf_diffusion.loop.engines import captures_graphs, compile_options, full_tensor, parallelism
from hf_diffusion.loop.learning_rate import lr_factor, rate_settings
from hf_diffusion.loop.muon import Muon
from hf_diffusion.loop.nonfinite import TrainingDiverged, bad_rows_in_words, check_loss_scale
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
    """The optimizer steps of a run; counts those that were left out."""

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
        self.means, self.progress, self.total_steps = means, progress, total_steps
        self.skipped, self.skipped_in_a_row = 0, 0
        self.captures_graphs = captures_graphs(config)

    def step(self, step: int, micros: Iterable[Micro]) -> None:
        """Every player's turn in optimizer step `step`.

        One whose gradient is not finite ends it.
        """
        if len(self.objective.players) > 1:
            micros = list(micros)
        for player in self.objective.turns(step):
            if not self._turn(player, step, micros):
                return
        self.skipped_in_a_row = 0

    def _turn(self, player: Player, step: int, micros: Iterable[Micro]) -> bool:
        """Whether the player was updated."""
        # First, since DeepSpeed updates within the last backward pass.
        self._set_learning_rate(player, step)
        seen: list[tuple[Tensor, Tensor, Tensor]] = []
        turn = self._engine_turn if parallelism(self.accelerator) == "DeepSpeed" else self._plain_turn
        for network in player.frozen:
            network.requires_grad_(False)
        try:
            grad_norm = turn(player, step, micros, seen)
        finally:
            for network in player.frozen:
                network.requires_grad_(True)
        if not math.isfinite(grad_norm):
            self._skip(player, step, grad_norm, seen)
            return False
        norm = torch.tensor([grad_norm], device=self.accelerator.device)
        self.means.add({f"grad_norm{player.suffix}": norm})
        if player.network is self.shared.network:
            self.shared.update()
        self.objective.after_update(player, step)
        return True

    def _plain_turn(self, player: Player, step: int, micros: Iterable[Micro], seen: list) -> float:
        """Backward over the micro-batches, then the optimizer.

        Returns the gradient's norm before clipping.
        """
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
        grad_norm = float(full_tensor(norm))
        if math.isfinite(grad_norm):
            player.optimizer.step()
            player.optimizer.zero_grad(set_to_none=True)
        return grad_norm

    def _engine_turn(self, player: Player, step: int, micros: Iterable[Micro], seen: list) -> float:
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
                    return math.nan
                # the other micro-batches count
                loss = 0 * sum(p.sum() for p in player.network.parameters())
            accelerator.gradient_state._set_sync_gradients(micro == count - 1)
            accelerator.backward(loss)
        # reads the norm, and clips nothing more
        grad_norm = float(accelerator.clip_grad_norm_(player.network.parameters(), math.inf) or 0.0)
        if finite and not math.isfinite(grad_norm) and accelerator.mixed_precision != "fp16":
            raise TrainingDiverged(
                f"the gradient of step {step} was not finite ({grad_norm}) and DeepSpeed has applied it; the "
                f"checkpoints in {self._output_dir} are untouched: go on from the latest with a lower learning_rate"
            )
        return grad_norm if finite else math.nan

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

    def _skip(self, player: Player, step: int, grad_norm: float, seen: list) -> None:
        """Leave out an update whose gradient, which is that of all processes, is not finite.

        Give up after too many.
        """
        accelerator = self.accelerator
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        if accelerator.scaler is not None:
            # the scaler skips the update and lowers the loss scale
            player.optimizer.step()
        player.optimizer.zero_grad(set_to_none=True)
        columns = [accelerator.gather(torch.cat(values)).cpu().double() for values in zip(*seen)]
        if accelerator.is_main_process:
            rows = bad_rows_in_words(torch.stack(columns, dim=1))
            self.progress.say(
                f"step {step}: the gradient is not finite (norm {grad_norm}); all processes skip the step; {rows}"
            )
        check_loss_scale(accelerator.scaler, step, self._output_dir)
        if self.skipped_in_a_row >= self.config.max_nonfinite_steps:
            raise TrainingDiverged(
                f"the gradient was not finite in {self.skipped_in_a_row} steps in a row, the last of them step "
                f"{step}; "
                f"the checkpoints in {self._output_dir} are untouched: resume from one with a lower learning_rate, or "
                "in bf16 instead of fp16"
            )

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

    @property
    def _output_dir(self) -> Path:
        return Path(self.config.output_dir)


def _keep_gradients(network: nn.Module) -> None:
    """Copy the gradients of a captured backward pass, which the next one would write over."""
    for parameter in network.parameters():
        if parameter.grad is not None:
            parameter.grad = parameter.grad.clone()


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
