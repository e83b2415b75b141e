"""`altered_ddpm.py ALTERATION FLAGS`: train_ddpm.py with one thing altered, for several processes.

`poisoned`: in step 2 the last image of the last process has an infinite loss.
`sharded`: accelerate 1.15 shards by FSDP on anything but the CPU, though torch does so over gloo:
AcceleratorState.__init__ has a list of engines without MULTI_CPU. This machine is taken for one
with several devices; everything else is the real thing.
`deepspeed`: the same for DeepSpeed, which accelerate leaves out where it is told to use the CPU.
`limited`: from the third step to the first save, the process may take HEADROOM more bytes.
"""

import os
import re
import resource
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

from hf_diffusion.loop.trainer import Trainer
from hf_diffusion.losses.denoising import DenoisingObjective
from hf_diffusion.training import train_ddpm


def poisoned() -> None:
    values_of, calls = DenoisingObjective.values, []

    def poison(objective, *inputs):
        values = values_of(objective, *inputs)
        calls.append(None)
        if len(calls) == 3 and objective.accelerator.is_last_process:
            values["loss"] = values["loss"] * torch.tensor([1.0] * (len(values["loss"]) - 1) + [torch.inf])
        return values

    DenoisingObjective.values = poison


def sharded() -> None:
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def deepspeed() -> None:
    PartialState(cpu=True)
    del os.environ["ACCELERATE_USE_CPU"]
    os.environ["DS_ACCELERATOR"] = "cpu"


def limited() -> None:
    step, save = Trainer.optimizer_step, Trainer._save

    def limited_step(trainer, stream):
        if trainer.step == 3:
            used = 1024 * int(re.search(r"VmData:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])
            resource.setrlimit(resource.RLIMIT_DATA, (used + int(os.environ["HEADROOM"]), resource.RLIM_INFINITY))
        step(trainer, stream)

    def unlimited_save(trainer):
        try:
            kept = [bytes(10_000) for _ in range(int(os.environ["DATA"]) // 10_000)]  # all the data at once
            print(f"no limit: {len(kept)}")
        except MemoryError:
            print("the limit holds")
        resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        save(trainer)

    Trainer.optimizer_step, Trainer._save = limited_step, unlimited_save


if __name__ == "__main__":
    globals()[sys.argv[1]]()
    sys.exit(train_ddpm.main(sys.argv[2:]))
