"""The shipped configurations for `accelerate launch`: each is read, and says when and how."""

import re
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType


REPO = Path(__file__).resolve().parents[2]
CONFIGS = sorted((REPO / "training" / "accelerate_configs").glob("*.yaml"))
ENGINES = {"fsdp2": DistributedType.FSDP, "deepspeed_zero2": DistributedType.DEEPSPEED}


def test_every_kind_of_machine_has_a_configuration():
    names = ["cpu_two_processes", "deepspeed_zero2", "fsdp2", "multi_gpu", "multi_node"]
    assert [path.stem for path in CONFIGS] == names
    assert '"accelerate_configs/*.yaml"' in (REPO / "setup.py").read_text()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_a_configuration_and_starts_what_it_promises(path):
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig)
    assert config.distributed_type == ENGINES.get(path.stem, DistributedType.MULTI_GPU) and config.num_processes >= 2
    args = launch_command_parser().parse_args(["--config_file", str(path), "training/train_ddpm.py"])
    for section in (config.fsdp_config, config.deepspeed_config):
        assert all(hasattr(args, key) for key in section), section  # accelerate takes a misspelt key without a word
    args, _, _ = _validate_launch_command(args)
    assert (args.multi_gpu, args.use_fsdp, args.use_deepspeed) == (
        path.stem not in ENGINES, path.stem == "fsdp2", path.stem == "deepspeed_zero2"
    )  # fmt: skip
    assert not args.cpu and args.num_processes == config.num_processes and args.mixed_precision == "no"
    if path.stem == "fsdp2":
        assert (args.fsdp_version, args.fsdp_state_dict_type) == (2, "FULL_STATE_DICT")
    if path.stem == "deepspeed_zero2":
        assert args.zero_stage == 2
    if path.stem == "multi_node":
        assert (args.num_machines, args.main_process_port, args.rdzv_backend) == (2, 29500, "static")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_says_when_to_use_it_and_with_what_command(path):
    comment = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert comment[0].startswith("# When: ")
    command = next(line for line in comment if "accelerate launch " in line)
    assert f"--config_file training/accelerate_configs/{path.name} " in command
    script, recipe = re.search(r"(training/\w+\.py) --config (\S+)", command).groups()
    assert (REPO / script).is_file() and (REPO / recipe).is_file()
