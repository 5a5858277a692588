"""Kill training processes for real, resume them in fresh ones, and compare the adapter with an uninterrupted run's.

    make test-kills            # 20 runs, each killed one to three times; prints a table

A process is killed with SIGKILL, which it can neither notice nor prevent: at a random moment, while it evaluates, or
while it writes a checkpoint (between its files, with the newest one half written). Some of the runs are validated: they
keep the best of their steps and end when their patience does.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import threading
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
# With validation the loss is lowest at step 12, and patience ends at step 21. Saves are every 5 steps, at each new lowest
# loss, and at the end.
VALIDATED = {"validation": 0.25, "eval_steps": 3, "patience": 3, "learning_rate": 1e-2}
EVALUATIONS = (0, 3, 6, 9, 12, 15, 18, 21)
VALIDATED_SAVES = (3, 5, 6, 9, 10, 12, 15, 20, 21)
VALIDATED_PLACES = (*PLACES, "inside an evaluation", "inside the last evaluation")
CASES = [*((where, False) for where in PLACES), *((where, True) for where in VALIDATED_PLACES)]
Kill = tuple[str, int]  # "save" or "evaluation", and of which step
STARTING = threading.Lock()  # a start changes this process's environment for a moment


def work(folder: Path, kill: Kill | None, validated: bool, told: Connection) -> None:
    """One process: begin or resume the run in `folder`; die inside the save or the evaluation that `kill` names."""
    import torch
    from transformers import Trainer
    from trl import SFTTrainer

    from qlora_helpers.models.loading import load_model
    from qlora_helpers.settings import Settings
    from qlora_helpers.training.run import train
    from tests.support.short_runs import CHATS, TOKENIZER

    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what a resumed run says would stand in the table
    save, predict = Trainer._save_rng_state, SFTTrainer.prediction_step

    def saving(self, output_dir):  # after the optimizer's state, before the trainer's
        if kill == ("save", self.state.global_step):
            (Path(output_dir) / "rng_state.pth").write_bytes(b"cut")
            os.kill(os.getpid(), signal.SIGKILL)
        save(self, output_dir)

    def predicting(self, *args, **options):  # after the first batch of two
        loss = predict(self, *args, **options)
        if kill == ("evaluation", self.state.global_step):
            os.kill(os.getpid(), signal.SIGKILL)
        return loss

    Trainer._save_rng_state, SFTTrainer.prediction_step = saving, predicting
    settings = Settings(
        steps=STEPS, batch_size=4, accumulation=2, warmup_steps=2, rank=4, dropout=0.1, save_steps=5,
        optimizer="adamw_8bit", **(VALIDATED if validated else {}),
    )  # fmt: skip
    try:
        train(
            load_model(),
            TOKENIZER,
            CHATS,
            folder,
            settings,
            resume=True,
            on_loss=lambda history, *of_validation: told.send(history[-1][0] if history else 0),
        )
    except BaseException:
        told.send(traceback.format_exc())
        raise


class Working:
    """A training process, and what it reports: a number for each step that it logs, a text for an error."""

    def __init__(self, folder: Path, kill: Kill | None = None, validated: bool = False):
        with STARTING:
            self.tells, told = forking.context().Pipe(duplex=False)
            self.process = forking.start(work, folder, kill, validated, told)
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


def uninterrupted(folder: Path, validated: bool = False) -> Path:
    Working(folder, validated=validated).finish()
    return folder / "adapter"


def killed_once(folder: Path, where: str, chance: random.Random, validated: bool) -> bool:
    """Begin or resume the run in `folder` and kill it at the place that `where` names. Returns whether that ended it."""
    from qlora_helpers.training.run_folder import steps_saved

    saves = VALIDATED_SAVES if validated else SAVES
    if where == "between steps":
        return Working(folder, validated=validated).kill_at(chance.randrange(1, saves[-1]), chance.random() * 0.3)
    kind = where.rpartition(" ")[2]
    saved = steps_saved(folder) if folder.exists() else -1  # the evaluation of step 0 is made once
    to_come = [step for step in (saves if kind == "save" else EVALUATIONS) if step > saved]
    step = to_come[-1] if "last" in where else chance.choice(to_come)
    code = Working(folder, (kind, step), validated).end()
    if code not in (0, -signal.SIGKILL):
        raise RuntimeError(f"the run ended with {code}")
    return code == -signal.SIGKILL


def trial(
    folder: Path,
    where: str,
    chance: random.Random,
    times: int = 1,
    reference: Path | None = None,
    validated: bool = False,
) -> dict:
    """Begin a run, kill it `times` times at the place that `where` names, let it finish, and compare."""
    from tests.support.short_runs import adapter, differing

    reference = reference or uninterrupted(folder / "reference", validated)
    killed, at = 0, []
    for _ in range(times):
        hit = killed_once(folder / "killed", where, chance, validated)
        at.append(max((int(p.name[11:]) for p in (folder / "killed").glob("checkpoint-*")), default=0))
        if (folder / "killed" / "adapter").exists():
            break  # the kill came too late and does not count
        killed += hit
    else:
        Working(folder / "killed", validated=validated).finish()
    differ = differing(adapter(folder / "killed" / "adapter"), adapter(reference))
    return {
        "where": where,
        "validated": validated,
        "kills": killed,
        "newest folder then": at,
        "differing tensors": len(differ),
    }


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
        references = {
            validated: uninterrupted(Path(scratch) / f"reference-{validated}", validated) for validated in (False, True)
        }
        print(f"{STEPS} steps each, a checkpoint every 5, dropout, accumulation, 8-bit AdamW;")
        print("with validation: also one at each new lowest loss, the end at step 21 by patience, step 12 kept\n")
        print(
            f"{'run':4} {'validation':10} {'killed':26} {'kills':>5}  {'newest checkpoint then':24} differing tensors"
        )

        def numbered(number: int) -> dict:
            folder, chance = Path(scratch) / str(number), random.Random(number)
            where, validated = CASES[number % len(CASES)]
            times = 1 + number // len(CASES) % 3
            return trial(folder, where, chance, times, references[validated], validated)

        with ThreadPoolExecutor(args.workers) as pool:  # the threads only wait for the processes that train
            for number, row in enumerate(pool.map(numbered, range(args.trials)), start=1):
                failed += row["differing tensors"] > 0 or row["kills"] == 0
                at = ", ".join(map(str, row["newest folder then"]))
                print(
                    f"{number:<4} {'yes' if row['validated'] else 'no':10} {row['where']:26} {row['kills']:5}  {at:24} "
                    f"{row['differing tensors']}",
                    flush=True,
                )
    print(f"\n{args.trials - failed} of {args.trials} runs ended bit-identical to the uninterrupted one")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
