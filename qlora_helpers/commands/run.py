"""`python -m qlora_helpers run`: the full QLoRA run of the shipped model, with a report."""

import argparse
import importlib.metadata
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from qlora_helpers.training.run_folder import check_output, is_finished, move_aside, steps_saved  # none needs torch

GIB = 1024**3
STEPS = 300  # of `run`


def _steps(text: str) -> int:
    """The value of --steps."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of steps: name a whole number, 1 or more")
    return int(text)


def _how_to_resume(args: argparse.Namespace) -> str:
    """The command line that goes on with a run, for the shell that began it."""
    python = Path(sys.executable)
    if python.is_relative_to(Path.cwd()):
        python = python.relative_to(Path.cwd())
    words = [str(python), "-m", "qlora_helpers", "run", "--resume", "--output", str(args.output)]
    words += ["--steps", str(args.steps)] if args.steps else []
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def _where_to_begin(args: argparse.Namespace) -> int:
    """Look at the output folder, say what will happen there, and give the steps of the run. Needs no library.

    Raises:
        ValueError, OSError: the run cannot be there; the message names the argument.
    """
    folder = args.output
    record = check_output(folder)
    if record is None:
        if args.resume:  # no error: a script may repeat `run --resume` until it is done
            print(f"There is nothing to resume in {folder}: this is a new run.")
        return args.steps or STEPS
    if not args.resume:
        kept = move_aside(folder)
        check_output(folder)
        print(f"The run that was in {folder} is now in {kept}.")
        return args.steps or STEPS
    if is_finished(folder):
        raise ValueError(
            f"--resume: the run in --output={str(folder)!r} is finished. Leave out --resume to begin another; the finished one "
            "is moved aside"
        )
    if args.steps not in (None, record["steps"]):
        raise ValueError(
            f"--steps={args.steps}: the run in --output={str(folder)!r} was begun with {record['steps']}. Leave out --steps to go "
            "on with it, or leave out --resume to begin another"
        )
    if saved := steps_saved(folder):
        print(f"Going on with the run in {folder} after step {saved} of {record['steps']}.")
    else:
        print(f"The run in {folder} was stopped before its first checkpoint: it begins again at step 1.")
    return record["steps"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", type=Path, default=Path("runs/latest"), help="folder for the adapter and report.json"
    )
    parser.add_argument("--steps", type=_steps, help=f"optimizer steps: {STEPS}, or those of the run that is resumed")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last whole checkpoint in the output folder"
    )


def command(args: argparse.Namespace) -> int:
    """Train and print the report, or say where it stopped and how to go on.

    Raises:
        ValueError, OSError: the run cannot be in the output folder; the message names the argument.
    """
    steps = _where_to_begin(args)
    try:
        return _load_and_run(args, steps)
    except KeyboardInterrupt as stop:  # while it trains an Interrupted, which says where
        trained = is_finished(args.output)
        where = (
            f"after the training; what was trained is in {args.output}"
            if trained
            else "before the first step of training"
        )
        how = "" if trained else f" To go on:\n  {_how_to_resume(args)}"
        print(f"\nStopped {getattr(stop, 'where', where)}.{how}", file=sys.stderr)
        return 128 + getattr(stop, "signal", signal.SIGINT)


def _load_and_run(args: argparse.Namespace, steps: int) -> int:
    started = time.perf_counter()
    print("Loading the libraries …", flush=True)
    from qlora_helpers import evaluation
    from qlora_helpers.chats import read_chats, split_question
    from qlora_helpers.hardware import detect, peak_memory_bytes
    from qlora_helpers.models.loading import SHIPPED_MODEL, load_model, load_tokenizer
    from qlora_helpers.models.weights import bytes_by_part
    from qlora_helpers.paths import data_path
    from qlora_helpers.settings import Settings
    from qlora_helpers.training.checkpoints import record_of, where_to_start
    from qlora_helpers.training.run import train

    hardware = detect()
    settings = Settings(steps=steps, save_steps=100)
    folder = args.output

    tokenizer = load_tokenizer()
    model = load_model(quantization="nf4", hardware=hardware)
    training_chats = read_chats(data_path("chats", "train.jsonl"), tokenizer, settings.max_length)
    test_chats = read_chats(data_path("chats", "test.jsonl"), tokenizer, settings.max_length)
    record = record_of(model, training_chats, settings, hardware.compute_dtype)
    where_to_start(folder, record, args.resume, float16=hardware.gear == "t4")  # refuses before anything is asked
    parts = bytes_by_part(model)
    print(f"\nLoaded {SHIPPED_MODEL} in the {hardware.gear} gear: {sum(parts.values()):,} bytes")
    for part, count in parts.items():
        print(f"  {part:24}{count:12,}")

    questions = [split_question(chat)[0] for chat in test_chats[:3]]

    def measure(model):
        return (
            evaluation.exact_match(model, tokenizer, test_chats),
            evaluation.loss(model, tokenizer, test_chats),
            evaluation.answer(model, tokenizer, questions),
        )

    print(f"\nAsking {len(test_chats)} questions about people that no training chat mentions …", flush=True)
    match_before, loss_before, answers_before = measure(model)
    print(f"Training for {settings.steps} steps …", flush=True)
    run = train(
        model, tokenizer, training_chats, folder, settings, hardware=hardware, resume=args.resume, progress_bar=True
    )
    print("Asking the same questions again …", flush=True)
    match_after, loss_after, answers_after = measure(run.model)

    report = {
        "gear": hardware.gear,
        "model": SHIPPED_MODEL,
        "bytes_by_part": parts,
        "trainable_parameters": run.trainable_parameters,
        "all_parameters": run.all_parameters,
        "test_chats": len(test_chats),
        "commonest_answer_rate": evaluation.commonest_answer_rate(training_chats, test_chats),
        "exact_match_before": match_before,
        "exact_match_after": match_after,
        "loss_before": loss_before,
        "loss_after": loss_after,
        "loss_history": run.history,
        "steps": settings.steps,
        "train_seconds": run.seconds,
        "total_seconds": time.perf_counter() - started,
        "peak_memory_bytes": peak_memory_bytes(),
        "adapter_path": run.saved_path.as_posix(),
        "examples": [
            {"question": question[-1]["content"], "before": before, "after": after, "right": split_question(chat)[1]}
            for question, before, after, chat in zip(questions, answers_before, answers_after, test_chats, strict=False)
        ],
        "versions": {
            name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "trl", "bitsandbytes")
        },
    }
    path = folder / "report.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    _print_report(report, path)
    return 0


def _print_report(report: dict, path: Path) -> None:
    share = report["trainable_parameters"] / report["all_parameters"]
    print(f"""
trainable parameters  {report["trainable_parameters"]:,} of {report["all_parameters"]:,} ({share:.2%})
                          before     after
exact match           {report["exact_match_before"]:10.1%}{report["exact_match_after"]:10.1%}   \
({report["test_chats"]} questions; always the commonest answer: {report["commonest_answer_rate"]:.1%})
loss                  {report["loss_before"]:10.3f}{report["loss_after"]:10.3f}   (nats per answer token)
""")
    for example in report["examples"]:
        print(f"Q  {example['question']}\n   before  {example['before']}\n   after   {example['after']}")
        print(f"   {'right' if example['after'] == example['right'] else 'wrong: ' + example['right']}")
    print(f"""
training              {report["train_seconds"]:.0f} s of {report["total_seconds"]:.0f} s in all
peak memory           {report["peak_memory_bytes"] / GIB:.2f} GiB of main memory
adapter               {report["adapter_path"]}
report                {path.as_posix()}""")
