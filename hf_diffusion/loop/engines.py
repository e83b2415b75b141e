"""What holds the weights: every process all of them, or an engine of accelerate that divides them
(FSDP2, DeepSpeed)."""

import os
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend, TorchDynamoPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from hf_diffusion.config.run_options import CAPTURING, TrainingConfig
from hf_diffusion.losses.objective import Objective


DATA_PARALLEL = "data parallel"  # every process holds everything; the files are the same for any number of processes
SHARDED = {DistributedType.FSDP: "FSDP", DistributedType.DEEPSPEED: "DeepSpeed"}


def parallelism(accelerator: Accelerator) -> str:
    """What holds the state, and so what its files look like; only the same can read them."""
    return SHARDED.get(accelerator.distributed_type, DATA_PARALLEL)


def full_tensor(tensor: Tensor) -> Tensor:
    """The tensor itself, or all of a sharded one, which its processes must ask for together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def written_class(network: nn.Module) -> type[nn.Module]:
    """The class as it was written: sharding puts one of its own before it."""
    return next(cls for cls in type(network).__mro__ if not issubclass(cls, FSDPModule))


def take_launch_settings(config: TrainingConfig, accelerator: Accelerator) -> None:
    """Put what `accelerate launch` was told into the settings that leave it open; name those that
    say otherwise.

    ValueError for a precision that no setting has.
    """
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if config.mixed_precision is None:
        if accelerator.mixed_precision not in ("no", "fp16", "bf16"):
            raise ValueError(
                f"accelerate launch asks for mixed_precision {accelerator.mixed_precision}; give no, fp16 or bf16"
            )
        config.mixed_precision = accelerator.mixed_precision
    elif asked not in ("no", config.mixed_precision):
        _say_otherwise(accelerator, "mixed_precision", config.mixed_precision, asked)
    plugin = accelerator.state.dynamo_plugin
    backend = plugin.backend
    # The network is compiled in place: accelerate would wrap it, and its class would no longer be
    # the one to export.
    plugin.backend = DynamoBackend.NO
    if config.torch_compile is None:
        config.torch_compile = backend != DynamoBackend.NO
    elif not config.torch_compile and backend != DynamoBackend.NO:
        _say_otherwise(accelerator, "torch_compile", "no", f"dynamo_backend {backend.value.lower()}")
    steps = int(os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1"))
    if steps > 1 and config.gradient_accumulation_steps == 1:
        config.gradient_accumulation_steps = steps
    elif steps not in (1, config.gradient_accumulation_steps):
        _say_otherwise(accelerator, "gradient_accumulation_steps", config.gradient_accumulation_steps, steps)


def compile_options(config: TrainingConfig) -> dict[str, Any]:
    """The arguments of torch.compile: those that `accelerate launch` was given, if it was asked to
    compile, and above them the mode of the settings."""
    plugin = TorchDynamoPlugin()
    options = {} if plugin.backend == DynamoBackend.NO else plugin.to_kwargs()
    options |= {"mode": config.compile_mode} if config.compile_mode else {}
    return {
        name: options[name] for name in ("backend", "mode", "fullgraph", "dynamic") if options.get(name) is not None
    }


def captures_graphs(config: TrainingConfig) -> bool:
    """Whether the networks' results lie in memory that the next step writes over."""
    return bool(config.torch_compile) and compile_options(config).get("mode") in CAPTURING


def _say_otherwise(accelerator: Accelerator, name: str, ours: Any, theirs: Any) -> None:
    accelerator.print(f"{name} {ours} of this run stands above {theirs} of accelerate launch")


def check_engine(accelerator: Accelerator, config: TrainingConfig) -> None:
    """ValueError for an engine that accelerate has passed over, or that cannot do what is asked.

    On the CPU accelerate passes over an engine without a word.
    """
    for name, variable in (("FSDP", "ACCELERATE_USE_FSDP"), ("DeepSpeed", "ACCELERATE_USE_DEEPSPEED")):
        asked = os.environ.get(variable, "false").lower() == "true"
        if asked and parallelism(accelerator) != name:
            raise ValueError(
                f"{name} needs several GPUs: accelerate would train on this {accelerator.device.type} without it, "
                "every process with a whole copy; leave it out, or take "
                "training/accelerate_configs/cpu_two_processes.yaml on the CPU"
            )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if "LOCAL_RANK" in os.environ and started != accelerator.num_processes:
        raise ValueError(
            f"{started} processes were started, but accelerate joins them on GPUs only, and each would train alone "
            "into the same output_dir; on the CPU set ACCELERATE_USE_CPU=true before the command"
        )
    asked = {
        "dry_run": config.dry_run,
        "max_train_minutes": config.max_train_minutes is not None,
        "preset auto": config.preset == "auto" and config.resume_from_checkpoint is None,
    }
    for name in (name for name in asked if asked[name] and parallelism(accelerator) != DATA_PARALLEL):
        raise ValueError(
            f"{name} measures a whole network on every process; run it without {parallelism(accelerator)}"
        )
    if captures_graphs(config) and parallelism(accelerator) != DATA_PARALLEL:
        raise ValueError(
            f"compile_mode {compile_options(config)['mode']} captures CUDA graphs, whose memory must stay where it "
            f"is, and {parallelism(accelerator)} moves it; give default, or train without it"
        )
    if config.optimizer == "muon" and parallelism(accelerator) != DATA_PARALLEL:
        raise ValueError(
            f"optimizer muon needs whole matrices on every process, and {parallelism(accelerator)} divides them; give "
            "adamw, or train without it"
        )
    if parallelism(accelerator) == "FSDP" and config.push_to_hub and config.hub_strategy != "end":
        raise ValueError(
            f"hub_strategy {config.hub_strategy} needs the whole network on one process in the middle of the run, "
            "where FSDP has it divided; give --hub_strategy end"
        )


def check_players(accelerator: Accelerator, objective: Objective) -> None:
    """ValueError for an engine that trains one network where there are several."""
    engine, count = parallelism(accelerator), len(objective.players)
    if engine != DATA_PARALLEL and count > 1:
        raise ValueError(
            f"{engine} takes one network with its optimizer, and this method trains {count}; leave it out, as "
            "training/accelerate_configs/multi_gpu.yaml does"
        )


def describe_to_deepspeed(accelerator: Accelerator, config: TrainingConfig) -> None:
    """Tell DeepSpeed what it would read from a DataLoader and what its file leaves open as "auto";
    before `prepare`."""
    if parallelism(accelerator) != "DeepSpeed":
        return
    settings = accelerator.state.deepspeed_plugin.deepspeed_config
    accelerator.gradient_accumulation_steps = config.gradient_accumulation_steps
    settings["train_micro_batch_size_per_gpu"] = config.train_batch_size
    settings["gradient_accumulation_steps"] = config.gradient_accumulation_steps
    # 0 does not clip
    settings["gradient_clipping"] = config.max_grad_norm or 0.0
