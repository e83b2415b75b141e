"""Weights that an engine of Accelerate has divided among processes (FSDP2): whole copies of them, and their average."""

import os
from collections.abc import Iterable

from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from hf_diffusion.checkpoints import DATA_PARALLEL, engine
from hf_diffusion.config.training import TrainingConfig


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or all of a sharded one, which its processes must ask for together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_class(network: nn.Module) -> type[nn.Module]:
    """The class as it was written: sharding puts one of its own before it."""
    return next(cls for cls in type(network).__mro__ if not issubclass(cls, FSDPModule))


class AveragedWeights(EMAModel):
    """The exponential moving average of diffusers; of sharded weights a process averages its own shards, which needs no communication.

    The state holds whole tensors, so it does not depend on how many processes wrote it.
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
    """The parts of the parameters that this process holds; views of them, marked as trainable like the whole."""
    return [p.to_local().detach().requires_grad_(p.requires_grad) if isinstance(p, DTensor) else p for p in parameters]


def check_engine(accelerator: Accelerator, config: TrainingConfig) -> None:
    """ValueError where an engine was asked for that accelerate has passed over, as it does on the CPU without a word, or that cannot do what is asked."""
    for name, variable in (("FSDP", "ACCELERATE_USE_FSDP"), ("DeepSpeed", "ACCELERATE_USE_DEEPSPEED")):
        asked = os.environ.get(variable, "false").lower() == "true"
        if asked and engine(accelerator) != name:
            raise ValueError(
                f"{name} needs several GPUs: accelerate would train on this {accelerator.device.type} without it, every process with a whole "
                "copy; leave it out, or take training/accelerate_configs/cpu_two_processes.yaml on the CPU"
            )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if "LOCAL_RANK" in os.environ and started != accelerator.num_processes:
        raise ValueError(
            f"{started} processes were started, but accelerate joins them on GPUs only, and each would train alone into the same output_dir; "
            "on the CPU set ACCELERATE_USE_CPU=true before the command"
        )
    if engine(accelerator) != DATA_PARALLEL and config.dry_run:
        raise ValueError(f"dry_run measures a whole network on every process; run it without {engine(accelerator)}")
    if engine(accelerator) == "FSDP" and config.push_to_hub and config.hub_strategy != "end":
        raise ValueError(
            f"hub_strategy {config.hub_strategy} needs the whole network on one process in the middle of the run, where FSDP has it divided; "
            "give --hub_strategy end"
        )


def describe_to_deepspeed(accelerator: Accelerator, config: TrainingConfig) -> None:
    """Tell DeepSpeed what it would read from a DataLoader and what its file leaves open as "auto"; before `prepare`."""
    if engine(accelerator) != "DeepSpeed":
        return
    settings = accelerator.state.deepspeed_plugin.deepspeed_config
    settings["train_micro_batch_size_per_gpu"] = config.train_batch_size
    settings["gradient_accumulation_steps"] = accelerator.gradient_accumulation_steps = (
        config.gradient_accumulation_steps
    )
    settings["gradient_clipping"] = config.max_grad_norm or 0.0  # 0 does not clip
