"""How a process was launched, and accelerate's configurations, which accelerate itself reads here."""

import os
import re
import subprocess
import sys

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.fsdp.fully_sharded_data_parallel import StateDictType
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from qlora_helpers.launch import Launch, launch_of_this_process, settings_in
from qlora_helpers.settings import OF_SEVERAL_GPUS, Settings
from tests import ROOT

CONFIGS = ROOT / "data" / "accelerate"
NAMES = ["fsdp", "fsdp_offload", "single_gpu", "two_gpus"]
RANK_1 = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}  # as torchrun sets them


def environment_of(name: str) -> dict[str, str]:
    """What `accelerate launch` with a configuration tells the processes, by its own code."""
    command = ["--config_file", str(CONFIGS / f"{name}.yaml"), "-m", "qlora_helpers", "run"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    if args.multi_gpu or args.use_fsdp:
        return prepare_multi_gpu_env(args)
    return prepare_simple_launcher_cmd_env(args)[1]


def test_the_configurations_are_those_that_are_tested():
    assert sorted(path.stem for path in CONFIGS.iterdir()) == NAMES


@pytest.mark.parametrize(
    ("name", "kind", "processes"),
    [
        ("single_gpu", DistributedType.NO, 1),
        ("two_gpus", DistributedType.MULTI_GPU, 2),
        ("fsdp", DistributedType.FSDP, 2),
        ("fsdp_offload", DistributedType.FSDP, 2),
    ],
)
def test_accelerate_reads_each_configuration_as_what_it_is(name, kind, processes):
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert DistributedType(config.distributed_type) == kind
    assert (config.num_processes, config.num_machines, config.use_cpu) == (processes, 1, False)
    assert config.mixed_precision == "no"  # the run decides
    assert bool(config.fsdp_config) is (kind == DistributedType.FSDP)


@pytest.mark.parametrize("offload", [False, True])
def test_accelerate_s_own_plugin_shards_as_qlora_needs_it(offload, monkeypatch):
    for variable, value in environment_of("fsdp_offload" if offload else "fsdp").items():
        if variable.startswith("FSDP_"):
            monkeypatch.setenv(variable, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.auto_wrap_policy is transformer_auto_wrap_policy
    assert plugin.transformer_cls_names_to_wrap is None  # so the model's own decoder layers
    assert plugin.reshard_after_forward is True
    assert isinstance(plugin.cpu_offload, CPUOffloadPolicy) is offload
    assert plugin.state_dict_type == StateDictType.FULL_STATE_DICT
    assert not plugin.cpu_ram_efficient_loading and not plugin.activation_checkpointing
    assert plugin.use_orig_params is None and plugin.sync_module_states is None  # FSDP 2 has neither


def test_the_decoder_layer_is_what_is_wrapped(monkeypatch):
    from qlora_helpers.models.decoder_layers import decoder_layers
    from tests.support.short_runs import CPU, load_model

    for variable, value in environment_of("fsdp").items():
        if variable.startswith("FSDP_"):
            monkeypatch.setenv(variable, value)
    model, plugin = load_model(hardware=CPU), FullyShardedDataParallelPlugin()
    plugin.set_auto_wrap_policy(model)
    wrapped = plugin.auto_wrap_policy.keywords["transformer_layer_cls"]
    assert wrapped == {type(layer) for layer in decoder_layers(model)[1]}


@pytest.mark.parametrize(
    ("name", "launch"),
    [
        ("single_gpu", Launch()),
        ("two_gpus", Launch(2, 1, 1)),
        ("fsdp", Launch(2, 1, 1, "fsdp", False, 2)),
        ("fsdp_offload", Launch(2, 1, 1, "fsdp", True, 2)),
    ],
)
def test_a_process_knows_how_it_was_launched(name, launch):
    environment = environment_of(name) | ({} if name == "single_gpu" else RANK_1)
    assert launch_of_this_process(environment) == launch


def test_without_a_launcher_a_process_is_alone(monkeypatch):
    for variable in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "ACCELERATE_USE_FSDP"):
        monkeypatch.delenv(variable, raising=False)
    assert launch_of_this_process() == launch_of_this_process({}) == Launch()
    assert Launch().leads and not Launch().is_shared
    assert not Launch(2, 1, 1).leads and Launch(2, 1, 1).is_shared
    assert Launch(1, 0, 0, "fsdp").is_shared


FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
MEANT_OTHERWISE = [
    # as accelerate 1.15 sets them for `accelerate launch --cpu --num_processes 2`
    ({"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
     "accelerate launch --cpu was asked for several processes, and has started one. On a CPU start them with torchrun "
     "--nproc-per-node 2 -m qlora_helpers run"),
    (FSDP, "ACCELERATE_USE_FSDP=true, and no launcher has started this process, so nothing would be sharded"),
    (FSDP | RANK_1 | {"ACCELERATE_USE_CPU": "True"}, "ACCELERATE_USE_FSDP=true on a CPU: accelerate shards on GPUs alone"),
    (RANK_1 | {"WORLD_SIZE": "4"}, "WORLD_SIZE=4: a launcher has started 2 of them on this machine, and the rest elsewhere"),
    ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two': must be a whole number, as torchrun sets it"),
]  # fmt: skip


@pytest.mark.parametrize(("environment", "said"), MEANT_OTHERWISE)
def test_a_launch_that_would_do_something_else_is_refused(environment, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        launch_of_this_process(environment)


def test_accelerate_s_launcher_for_several_processes_on_a_cpu_starts_one():
    """If it no longer does, the refusal above can go."""
    command = ["--cpu", "--num_processes", "2", "-m", "qlora_helpers", "run"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    environment = prepare_simple_launcher_cmd_env(args)[1]
    environment = {name: value for name, value in environment.items() if os.environ.get(name) != value}
    assert "WORLD_SIZE" not in environment and not args.multi_gpu
    with pytest.raises(ValueError, match="has started one"):
        launch_of_this_process(environment)


# ---- The settings of a launch

SHARDED = Launch(2, 0, 0, "fsdp", True, 2)


def test_the_settings_get_the_launch():
    found = settings_in(SHARDED, Settings())
    assert [getattr(found, name) for name in OF_SEVERAL_GPUS] == [2, "fsdp", True]
    assert found.batch_per_gpu == 8
    assert settings_in(SHARDED, found) == found
    assert settings_in(Launch(), Settings()) == Settings()


CONTRADICTIONS = [
    (Launch(), {"num_gpus": 2}, "num_gpus=2: 1 process was launched. Start it with torchrun --nproc-per-node 2"),
    (Launch(2), {"num_gpus": 4}, "num_gpus=4: 2 processes were launched. Start it with torchrun --nproc-per-node 4"),
    (Launch(2), {"sharding": "fsdp"}, "sharding='fsdp': the processes were launched without it. Start them with accelerate launch "
     "--config_file data/accelerate/fsdp.yaml"),
    (Launch(2, sharding="fsdp"), {"sharding": "fsdp", "cpu_offload": True}, "cpu_offload=True: the processes were launched without it. "
     "Start them with accelerate launch --config_file data/accelerate/fsdp_offload.yaml"),
    (Launch(3), {}, "batch_size=16: 3 processes were launched, and each takes as many of them: choose 18"),
    (Launch(2), {"memory_budget": "auto"}, "memory_budget='auto': it is planned for one GPU and one process"),
]  # fmt: skip


@pytest.mark.parametrize(("launch", "named", "said"), CONTRADICTIONS)
def test_settings_that_contradict_the_launch_are_refused(launch, named, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        settings_in(launch, Settings(**named))


def test_reading_it_needs_no_torch():
    code = (
        "import sys; from qlora_helpers.launch import launch_of_this_process as f; f(); print('torch' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert ended.stdout.strip() == "False"
