"""The average of the weights, and copies of the network that users get."""

from collections.abc import Iterable
from typing import Any

from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from hf_diffusion.config.run_options import TrainingConfig
from hf_diffusion.hub.checkpoint_files import AVERAGE
from hf_diffusion.loop.engines import full_tensor, parallelism, written_class


class AveragedWeights(EMAModel):
    """The exponential moving average of diffusers; of sharded weights a process averages its own
    shards.

    That needs no communication. The state holds whole tensors, so it does not depend on how many
    processes wrote it.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], **options):
        self.layout = list(parameters)
        super().__init__(_own_shards(self.layout), **options)

    def step(self, parameters: Iterable[nn.Parameter]) -> None:
        """Take the weights of now into the average."""
        super().step(_own_shards(parameters))

    def whole(self) -> list[Tensor]:
        """The averaged weights; all processes must ask for them together."""
        return [
            DTensor.from_local(shard, p.device_mesh, p.placements, shape=p.shape, stride=p.stride()).full_tensor()
            if isinstance(p, DTensor)
            else shard
            for shard, p in zip(self.shadow_params, self.layout, strict=True)
        ]

    def copy_to(self, parameters: Iterable[nn.Parameter]) -> None:
        """Put the average into the parameters of a whole network."""
        for parameter, average in zip(parameters, self.whole(), strict=True):
            parameter.data.copy_(average)

    def state_dict(self) -> dict:
        """The state, with whole tensors."""
        return super().state_dict() | {"shadow_params": self.whole()}

    def load_state_dict(self, state_dict: dict) -> None:
        """Take the average and its age from a state; decay and warm-up stay as they were set."""
        set_now = {
            name: getattr(self, name) for name in ("decay", "min_decay", "inv_gamma", "power", "use_ema_warmup")
        }
        super().load_state_dict(state_dict)
        for name, value in set_now.items():
            setattr(self, name, value)
        self.shadow_params = [
            # each process has read the whole tensor and takes its part: nothing is sent
            distribute_tensor(average.to(p.device), p.device_mesh, p.placements, src_data_rank=None).to_local().clone()
            if isinstance(p, DTensor)
            else average.to(p.device)
            for average, p in zip(self.shadow_params, self.layout, strict=True)
        ]


def _own_shards(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """The parts of the parameters that this process holds.

    Views of them, marked as trainable like the whole.
    """
    return [p.to_local().detach().requires_grad_(p.requires_grad) if isinstance(p, DTensor) else p for p in parameters]


def is_of_transformers(network: nn.Module) -> bool:
    """Whether a network is one of transformers, whose config is no dictionary."""
    return hasattr(getattr(network, "config", None), "to_dict")


class SharedNetwork:
    """The network that users get, as copies: the weights in training are never swapped, so they
    cannot be mixed up.
    """

    def __init__(self, config: TrainingConfig, accelerator: Accelerator, network: nn.Module):
        self.accelerator, self.network = accelerator, network
        # Of `averages`, by their highest decays, the one that users get.
        self.decay = config.ema_max_decay
        self.averages = {
            decay: AveragedWeights(
                network.parameters(),
                decay=decay,
                use_ema_warmup=True,
                inv_gamma=config.ema_inv_gamma,
                power=config.ema_power,
                foreach=True,
            )
            for decay in ((config.ema_max_decay, *config.ema_max_decays) if config.use_ema else ())
        }
        named = {f"{AVERAGE}_{decay}": self.averages[decay] for decay in config.ema_max_decays}
        # What of it joins the checkpoints, by name.
        self.states = ({} if self.average is None else {AVERAGE: self.average}) | named

    @property
    def average(self) -> AveragedWeights | None:
        """The average that users get; None where none is kept."""
        return self.averages.get(self.decay)

    @property
    def parameters(self) -> int:
        """How many parameters it has."""
        return sum(p.numel() for p in self.network.parameters())

    def description(self) -> dict[str, Any]:
        """Class and settings of the network, with which others can build it again."""
        source = self.accelerator.unwrap_model(self.network)
        settings = source.config.to_dict() if is_of_transformers(source) else source.config
        config = {name: value for name, value in settings.items() if not name.startswith("_")}
        return {"class": written_class(source).__name__, "config": config}

    @property
    def is_sharded(self) -> bool:
        """Whether a whole network comes about only where all processes ask for it together."""
        return parallelism(self.accelerator) == "FSDP"

    def update(self) -> None:
        """Take the weights of now into the averages."""
        for average in self.averages.values():
            average.step(self.network.parameters())

    def copy(self, decay: float | None = None) -> nn.Module:
        """What users get: the averaged weights, or the raw ones where no average is kept.

        `decay` asks for another average.
        """
        network = self.raw_copy()
        if self.averages:
            self.averages[self.decay if decay is None else decay].copy_to(network.parameters())
        return network

    def raw_copy(self) -> nn.Module:
        """A copy with the weights of now, in evaluation mode."""
        source = self.accelerator.unwrap_model(self.network)
        cls = written_class(source)
        network = cls(source.config) if is_of_transformers(source) else cls.from_config(source.config)
        network = network.to(self.accelerator.device)
        network.load_state_dict({name: full_tensor(tensor) for name, tensor in source.state_dict().items()})
        return network.eval().requires_grad_(False)

    def copies(self) -> dict[str, nn.Module]:
        """Both copies by name, on the main process.

        On others, too, where they must ask for them together.
        """
        if not self.accelerator.is_main_process and not self.is_sharded:
            return {}
        return {"raw": self.raw_copy()} | ({"ema": self.copy()} if self.average is not None else {})
