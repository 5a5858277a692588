"""Kill training processes for real, resume them in fresh ones, and compare the adapter with an uninterrupted run's.

    make test-kills            # 20 runs, each killed one to three times; prints a table

A process is killed with SIGKILL, which it can neither notice nor prevent: at a random moment, or while it writes a
checkpoint (between its files, with the newest one half written).
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

from notebooks.scripts import forking

STEPS = 24
SAVES = (5, 10, 15, 20, 24)
PLACES = ("between steps", "inside a save", "inside the last save")


def work(folder: Path, kill_in_save: int, told: Connection) -> None:
    """One process: begin or resume the run in `folder`; die while the checkpoint of step `kill_in_save` is written."""
    import torch
    from transformers import Trainer

    from qlora_helpers.models.loading import load_model
    from qlora_helpers.settings import Settings
    from qlora_helpers.training.run import train
    from tests.support.short_runs import CHATS, TOKENIZER

    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what a resumed run says would stand in the table
    save = Trainer._save_rng_state

    def killed(self, output_dir):  # after the optimizer's state, before the trainer's
        if self.state.global_step == kill_in_save:
            (Path(output_dir) / "rng_state.pth").write_bytes(b"cut")
            os.kill(os.getpid(), signal.SIGKILL)
        save(self, output_dir)

    Trainer._save_rng_state = killed
    settings = Settings(
        steps=STEPS, batch_size=4, accumulation=2, warmup_steps=2, rank=4, dropout=0.1, save_steps=5,
        optimizer="adamw_8bit",
    )  # fmt: skip
    try:
        train(
            load_model(),
            TOKENIZER,
            CHATS,
            folder,
            settings,
            resume=True,
            on_loss=lambda history: told.send(history[-1][0]),
        )
    except BaseException:
        told.send(traceback.format_exc())
        raise


class Working:
    """A training process, and what it reports: a number for each step that it logs, a text for an error."""

    def __init__(self, folder: Path, kill_in_save: int = 0):
        self.tells, told = forking.context().Pipe(duplex=False)
        self.process = forking.start(work, folder, kill_in_save, told)
        told.close()  # only the worker has it now: reading ends when it dies

    def told(self) -> Iterator[int]:
        """The steps as they are logged, until the process ends.

        Raises:
            RuntimeError: the run has failed; the message is its traceback.
        """
        while True:
            try:
                said = self.tells.recv()
            except EOFError:
                return
            if isinstance(said, str):
                raise RuntimeError(said)
            yield said

    def end(self) -> int:
        """Wait for the process to end. Returns its exit code, which is negative after a signal."""
        for _ in self.told():
            pass
        self.process.join()
        return self.process.exitcode

    def finish(self) -> None:
        if code := self.end():
            raise RuntimeError(f"the run ended with {code}")

    def kill_at(self, step: int, delay: float) -> bool:
        """Kill it `delay` seconds after it has logged `step`. Returns whether that ended it."""
        for logged in self.told():
            if logged >= step:
                time.sleep(delay)
                break
        self.process.kill()
        self.process.join()
        return self.process.exitcode == -signal.SIGKILL


def uninterrupted(folder: Path) -> Path:
    Working(folder).finish()
    return folder / "adapter"


def trial(folder: Path, where: str, chance: random.Random, times: int = 1, reference: Path | None = None) -> dict:
    """Begin a run, kill it `times` times at the place that `where` names, let it finish, and compare."""
    from qlora_helpers.training.checkpoints import last_whole_checkpoint
    from qlora_helpers.training.run_folder import step_of
    from tests.support.short_runs import adapter, differing

    reference = reference or uninterrupted(folder / "reference")
    killed, at = 0, []
    for _ in range(times):
        if where == "between steps":
            step, delay = chance.randrange(1, STEPS), chance.random() * 0.3
            hit = Working(folder / "killed").kill_at(step, delay)
        else:
            last = last_whole_checkpoint(folder / "killed")
            saves = [step for step in SAVES if step > (step_of(last) if last else 0)]
            code = Working(folder / "killed", chance.choice(saves) if where == "inside a save" else STEPS).end()
            hit = code == -signal.SIGKILL
            if code not in (0, -signal.SIGKILL):
                raise RuntimeError(f"the run ended with {code}")
        at.append(max((int(p.name[11:]) for p in (folder / "killed").glob("checkpoint-*")), default=0))
        if (folder / "killed" / "adapter").exists():
            break  # the kill came too late and does not count
        killed += hit
    else:
        Working(folder / "killed").finish()
    differ = differing(adapter(folder / "killed" / "adapter"), adapter(reference))
    return {"where": where, "kills": killed, "newest folder then": at, "differing tensors": len(differ)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2, help="how many runs at a time, each on one thread")
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    # killed processes leave semaphores behind, about which the resource tracker would warn at the end
    os.environ["PYTHONWARNINGS"] = "ignore::UserWarning:multiprocessing.resource_tracker"
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        reference = uninterrupted(Path(scratch) / "reference")
        print(f"{STEPS} steps each, a checkpoint every 5, dropout, accumulation, 8-bit AdamW\n")
        print(f"{'run':4} {'killed':22} {'kills':>5}  {'newest checkpoint then':24} differing tensors")

        def numbered(number: int) -> dict:
            folder, chance = Path(scratch) / str(number), random.Random(number)
            return trial(folder, PLACES[number % 3], chance, times=1 + number // 3 % 3, reference=reference)

        with ThreadPoolExecutor(args.workers) as pool:  # the threads only wait for the processes that train
            for number, row in enumerate(pool.map(numbered, range(args.trials)), start=1):
                failed += row["differing tensors"] > 0 or row["kills"] == 0
                at = ", ".join(map(str, row["newest folder then"]))
                print(f"{number:<4} {row['where']:22} {row['kills']:5}  {at:24} {row['differing tensors']}", flush=True)
    print(f"\n{args.trials - failed} of {args.trials} runs ended bit-identical to the uninterrupted one")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
