"""Runs of several processes on a CPU, as torchrun starts them; and what each of them does.

    python -m torch.distributed.run --standalone --nproc-per-node 2 -m tests.support.launched FOLDER TASK...

A task is a name and, after a colon, the fields of `Settings` as JSON, such as `run:{"packing": true}`. Each writes what came of
it into `FOLDER/NAME-RANK.json`. Several tasks in one launch share the seconds that the libraries take to be imported.
"""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from tests import ROOT

STEPS = 6  # of 21 chats, four at a time: the last step of the first epoch has one chat, and so no share for the second process
SETTINGS = {"steps": STEPS, "batch_size": 4, "warmup_steps": 2, "rank": 4, "save_steps": 3, "log_steps": 1}


def launch(processes: int, *command: str, **options) -> subprocess.Popen:
    """Start `command`, a module and its arguments, in so many processes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return start(*torchrun, "-m", *command, **options)


def start(*command: str, environment: dict[str, str] | None = None) -> subprocess.Popen:
    """Start Python with `command` in a process of its own."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, *command],
        env=variables | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        cwd=ROOT,
    )


def work(processes: int, folder: Path, *tasks: str, environment: dict[str, str] | None = None) -> tuple[int, str, str]:
    """Do tasks in so many processes: the exit status, what was printed, and what was said to standard error."""
    process = launch(processes, "tests.support.launched", str(folder), *tasks, environment=environment)
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def found(folder: Path, name: str, rank: int = 0) -> dict:
    """What a task has written."""
    return json.loads((folder / f"{name}-{rank}.json").read_text(encoding="utf-8"))


# ---- In each of the processes


def settings_of(changed: dict):
    from qlora_helpers.settings import Settings

    return Settings(**(SETTINGS | changed))


def described(run) -> dict:
    """What came of a run, as JSON."""
    kept = ("history", "validation_history", "step_losses", "gradient_norms", "best_step", "stopped_early")
    counted = ("trainable_parameters", "all_parameters")
    return {name: getattr(run, name) for name in (*kept, *counted)} | {"saved": str(run.saved_path)}


def a_run(folder: Path, changed: dict, resume: bool = False) -> dict:
    from tests.support import short_runs

    chats = short_runs.read_chats(short_runs.data_path("chats", "train.jsonl"))[:21]
    held_out = chats[:5] if changed.pop("validated", True) else None
    return described(short_runs.run(folder, settings_of(changed), chats, validation_chats=held_out, resume=resume))


def dying(rank: int, step: int) -> None:
    """Let one process, or with -1 all, be killed in the middle of a step."""
    from trl import SFTTrainer

    usual = SFTTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step and rank in (-1, self.args.process_index):
            os.kill(os.getpid(), signal.SIGKILL)
        return usual(self, *args, **kwargs)

    SFTTrainer.training_step = training_step


def failing(rank: int) -> None:
    """Let loading the model fail in one process, or with -1 in all."""
    from qlora_helpers.models import loading

    usual = loading.load_model

    def load_model(*args, **kwargs):
        if rank in (-1, int(os.environ["RANK"])):
            raise ValueError(f"no model for {rank}")
        return usual(*args, **kwargs)

    loading.load_model = load_model


def asked_to_stop(step: int) -> None:
    """Let the second process alone get a SIGTERM in a step."""
    from trl import SFTTrainer

    usual = SFTTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step and self.args.process_index == 1:
            signal.raise_signal(signal.SIGTERM)
        return usual(self, *args, **kwargs)

    SFTTrainer.training_step = training_step


def shard_on_a_cpu() -> None:
    """Let accelerate shard CPU processes, which it leaves out without a word: FSDP itself works there, over gloo.

    All else is the libraries' own: `fully_shard`, bitsandbytes' weights, transformers' and accelerate's checkpoints. Page-locked
    memory is left out, which needs a GPU, and so is what decodes a tiny model's weights once on a CPU.
    """
    from contextlib import nullcontext

    from accelerate.state import PartialState
    from accelerate.utils import DistributedType
    from torch.distributed.fsdp import CPUOffloadPolicy

    from qlora_helpers.training import run, together, trainer

    begin, prepare = PartialState.__init__, trainer.prepare_sharding

    def as_on_gpus(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    def without_page_locks(trainer, dtype):
        prepare(trainer, dtype)
        plugin = trainer.accelerator.state.fsdp_plugin
        if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
            plugin.cpu_offload = CPUOffloadPolicy(pin_memory=False)

    PartialState.__init__ = as_on_gpus
    trainer.prepare_sharding = without_page_locks
    together.check_launch = lambda launch, hardware: None
    run.decoded_once = lambda model: nullcontext()


def heads_that_trl_gathers() -> list[None]:
    """One entry for each time that TRL's loss finds the output head in shards."""
    from torch.distributed.tensor import DTensor

    usual, seen = DTensor.full_tensor, []

    def full_tensor(self, *args, **kwargs):
        if sys._getframe(1).f_globals["__name__"] == "trl.trainer.utils":
            seen.append(None)
        return usual(self, *args, **kwargs)

    DTensor.full_tensor = full_tensor
    return seen


def compute_in(dtype: str) -> None:
    """Let the cpu gear compute in another dtype, as GPUs do."""
    import torch

    from qlora_helpers import hardware

    hardware.GEARS["cpu"] = getattr(torch, dtype)


def main(folder: Path, tasks: list[str]) -> None:
    if os.environ.get("ACCELERATE_USE_FSDP"):
        shard_on_a_cpu()
    from qlora_helpers.launch import launch_of_this_process
    from qlora_helpers.training.interrupts import Interrupted

    launch, gathered = launch_of_this_process(), heads_that_trl_gathers()
    for task in tasks:
        name, _, text = task.partition(":")
        changed = json.loads(text or "{}")
        before = {key: changed.pop(key) for key in ("dies", "stops", "resume", "dtype") if key in changed}
        if "dtype" in before:
            compute_in(before["dtype"])
        if "dies" in before:
            dying(*before["dies"])
        if "stops" in before:
            asked_to_stop(before["stops"])
        try:
            said = a_run(folder / name, changed, before.get("resume", False))
        except Interrupted as stop:
            said = {"interrupted": stop.where, "signal": stop.signal}
        except (ValueError, OSError) as error:
            said = {"error": f"{type(error).__name__}: {error}"}
        said["launch"], said["heads_that_trl_gathers"] = asdict(launch), len(gathered)
        (folder / f"{name}-{launch.rank}.json").write_text(json.dumps(said), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
