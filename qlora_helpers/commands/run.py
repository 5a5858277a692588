"""`python -m qlora_helpers run`: the full QLoRA run of the shipped model, with a report."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from enum import Enum
from pathlib import Path

from qlora_helpers.commands.settings_options import add_settings, as_words, given, option_of
from qlora_helpers.folder_locks import locked
from qlora_helpers.json_files import read_json_if_whole, write_json
from qlora_helpers.settings import WARMUP_STEPS, Settings
from qlora_helpers.training.run_folder import (  # none needs torch
    RESULT,
    check_movable,
    check_output,
    complete_checkpoints,
    gone_if_refused,
    is_finished,
    move_aside,
    step_of,
    steps_saved,
)
from qlora_helpers.units import GIB

__all__ = ["SAVE_STEPS", "VARIED", "add_arguments", "command"]

SAVE_STEPS = 100
REPORT = "report.json"
# what a run of the shipped model can vary; how often it saves does not change what it learns
VARIED = (
    "method", "steps", "batch_size", "accumulation", "max_length", "learning_rate", "warmup_steps", "schedule",
    "max_grad_norm", "rank", "alpha", "dropout", "target_modules", "gradient_checkpointing", "optimizer", "seed",
)  # fmt: skip


def _how_to_resume(args: argparse.Namespace) -> str:
    """The command line that continues a run, quoted for the shell."""
    python = Path(sys.executable)
    if python.is_relative_to(Path.cwd()):
        python = python.relative_to(Path.cwd())
    words = [str(python), "-m", "qlora_helpers", "run", "--resume", "--output", str(args.output)]
    words += as_words(given(args))
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


class _Begin(Enum):
    """What a run begins with."""

    NEW = "a folder that is free"
    ASIDE = "moving another run aside"
    RESUME = "the last checkpoint"
    REPORT = "what is trained already: only the report is missing"


def _where_to_begin(args: argparse.Namespace) -> tuple[Settings, _Begin]:
    """Look at the output folder and say what will happen there. Needs no torch.

    Raises:
        ValueError, OSError: the run cannot go there; the message names the argument.
    """
    folder, changed = args.output, given(args)
    new = Settings(save_steps=SAVE_STEPS, **changed)
    record = check_output(folder)
    if record is None:
        if args.resume:  # not an error: a script may repeat `run --resume` until it is done
            print(f"There is nothing to resume in {folder}: this is a new run.")
        return new, _Begin.NEW
    if not args.resume:
        check_movable(folder)
        return new, _Begin.ASIDE
    if is_finished(folder) and _has_report(folder):
        raise ValueError(
            f"--resume: the run in --output={str(folder)!r} is finished. Leave out --resume to begin another; the finished one "
            "is moved aside"
        )
    begun = {name: record[name] for name in VARIED if name in record}
    for name, value in changed.items():
        if name in begun and begun[name] != value:
            option = option_of(name)
            raise ValueError(
                f"{option}={value}: the run in --output={str(folder)!r} was begun with {begun[name]}. Leave out {option} to "
                "continue it, or leave out --resume to begin another"
            )
    settings = Settings(save_steps=SAVE_STEPS, **changed | begun)
    if is_finished(folder):
        print(f"The run in {folder} is trained, but was stopped before its report: only that is made now.")
        return settings, _Begin.REPORT
    if saved := steps_saved(folder):
        print(f"Continuing the run in {folder} after step {saved} of {record['steps']}.")
    else:
        print(f"The run in {folder} was stopped before its first checkpoint: it starts again at step 1.")
    return settings, _Begin.RESUME


def _has_report(folder: Path) -> bool:
    """Whether the report is there and whole."""
    return read_json_if_whole(folder / REPORT) is not None


def _make_room(folder: Path) -> None:
    """Move the run in a folder aside, and say where it is now."""
    kept = move_aside(folder)
    check_output(folder)
    print(f"The run that was in {folder} is now in {kept}.")


def _folder(text: str) -> Path:
    """The value of --output."""
    if not text:
        raise argparse.ArgumentTypeError("'' is not a folder: name one, such as runs/latest")
    return Path(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument(
        "--output",
        type=_folder,
        default=Path("runs/latest"),
        help="folder for what is trained and report.json (default: %(default)s)",
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue from the last complete checkpoint in the output folder"
    )
    add_settings(parser, VARIED, Settings())


def command(args: argparse.Namespace) -> int:
    """Train and print the report, or say where it stopped and how to continue.

    Raises:
        ValueError, OSError: the run cannot go into the output folder; the message names the argument.
    """
    Settings(**given(args))  # a bad setting is refused before a folder is made
    try:
        with gone_if_refused(args.output):
            check_output(args.output)
            with locked(args.output, "--output"):
                settings, begin = _where_to_begin(args)
                return _load_and_run(args, settings, begin)
    except KeyboardInterrupt as stop:  # during training it is an Interrupted, which says where
        where = (
            f"after the training; what was trained is in {args.output}"
            if is_finished(args.output)
            else "before the first step of training"
        )
        how = "" if _has_report(args.output) else f" To continue:\n  {_how_to_resume(args)}"
        print(f"\nStopped {getattr(stop, 'where', where)}.{how}", file=sys.stderr)
        return 128 + getattr(stop, "signal", signal.SIGINT)


def _load_and_run(args: argparse.Namespace, settings: Settings, begin: _Begin) -> int:
    started = time.perf_counter()
    print("Loading the libraries …", flush=True)
    from qlora_helpers import evaluation
    from qlora_helpers.chats import read_chats
    from qlora_helpers.hardware import detect
    from qlora_helpers.models.loading import SHIPPED_MODEL, load_model, load_tokenizer
    from qlora_helpers.paths import data_path

    hardware, tokenizer = detect(), load_tokenizer()
    model = load_model(quantization="nf4" if settings.method == "qlora" else None, hardware=hardware)
    training_chats, test_chats = (read_chats(data_path("chats", f"{part}.jsonl")) for part in ("train", "test"))
    if begin is not _Begin.REPORT:
        aside = begin is _Begin.ASIDE
        _refuse_before_anything_is_asked(args, model, tokenizer, training_chats, settings, hardware, aside)
    parts = _print_bytes(model, hardware)

    print(f"\nAsking {len(test_chats)} questions about people that no training chat mentions …", flush=True)
    before = _scores(model, tokenizer, test_chats)
    if begin is _Begin.REPORT:
        model, facts = _trained_before(model, args.output, settings)
    else:
        model, facts = _trained_now(model, tokenizer, training_chats, args, settings, hardware)
    print("Asking the same questions again …", flush=True)
    after = _scores(model, tokenizer, test_chats)

    report = {
        "gear": hardware.gear,
        "model": SHIPPED_MODEL,
        "settings": asdict(settings),
        "bytes_by_part": parts,
        "test_chats": len(test_chats),
        "commonest_answer_rate": evaluation.commonest_answer_rate(training_chats, test_chats),
        **_before_and_after(before, after, test_chats),
        **facts,
        "steps": settings.steps,
        "versions": {
            name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "trl", "bitsandbytes")
        },
        "total_seconds": time.perf_counter() - started,
    }
    write_json(args.output / REPORT, report)
    _print_report(report, args.output / REPORT)
    return 0


def _said_of_the_warm_up(args: argparse.Namespace, settings: Settings) -> str:
    """That the warm-up is shorter than by default, if nobody has asked for that."""
    shortened = given(args).get("warmup_steps") is None and settings.warmup_steps < WARMUP_STEPS
    return f", all of them warm-up ({WARMUP_STEPS} in a longer run)" if shortened and not args.resume else ""


def _refuse_before_anything_is_asked(
    args: argparse.Namespace, model, tokenizer, chats: list, settings: Settings, hardware, aside: bool
) -> None:
    """Refuse what `train` would refuse, before a run is moved aside and minutes are spent on questions."""
    import torch

    from qlora_helpers.chats import lengths_of
    from qlora_helpers.training.checkpoints import record_of, where_to_start
    from qlora_helpers.training.trainer import check_settings

    check_settings(model, settings, hardware)
    if (
        settings.max_length < Settings.max_length
        and (longest := max(lengths_of(chats, tokenizer))) > settings.max_length
    ):
        raise ValueError(f"max_length={settings.max_length}: the longest training chat has {longest} tokens. Raise it")
    if aside:
        _make_room(args.output)
    record = record_of(model, chats, settings, hardware)
    where_to_start(args.output, record, args.resume, float16=hardware.compute_dtype == torch.float16)


def _print_bytes(model, hardware) -> dict[str, int]:
    from qlora_helpers.models.loading import SHIPPED_MODEL
    from qlora_helpers.models.weights import bytes_by_part

    parts = bytes_by_part(model)
    print(f"\nLoaded {SHIPPED_MODEL} in the {hardware.gear} gear: {sum(parts.values()):,} bytes")
    for part, count in parts.items():
        print(f"  {part:24}{count:12,}")
    return parts


def _scores(model, tokenizer, chats: list) -> dict:
    """How a model does on the test chats, and its answers to the first three."""
    from qlora_helpers import evaluation
    from qlora_helpers.chats import split_question

    return {
        "exact_match": evaluation.exact_match(model, tokenizer, chats),
        "loss": evaluation.loss(model, tokenizer, chats),
        "answers": evaluation.answer(model, tokenizer, [split_question(chat)[0] for chat in chats[:3]]),
    }


def _before_and_after(before: dict, after: dict, chats: list) -> dict:
    return {
        **{f"{name}_before": before[name] for name in ("exact_match", "loss")},
        **{f"{name}_after": after[name] for name in ("exact_match", "loss")},
        "examples": [
            {"question": chat[-2]["content"], "before": one, "after": other, "right": chat[-1]["content"]}
            for chat, one, other in zip(chats, before["answers"], after["answers"], strict=False)
        ],
    }


def _trained_now(model, tokenizer, chats: list, args: argparse.Namespace, settings: Settings, hardware) -> tuple:
    """The trained model, and what the report says about the run."""
    from qlora_helpers.hardware import peak_memory_bytes
    from qlora_helpers.training.run import train

    print(f"Training for {settings.steps} steps{_said_of_the_warm_up(args, settings)} …", flush=True)
    run = train(
        model, tokenizer, chats, args.output, settings, hardware=hardware, resume=args.resume, progress_bar=True
    )
    return run.model, {
        "trainable_parameters": run.trainable_parameters,
        "all_parameters": run.all_parameters,
        "loss_history": run.history,
        "train_seconds": run.seconds,
        "peak_memory_bytes": peak_memory_bytes(),
        "adapter_path": run.saved_path.as_posix(),
    }


def _trained_before(model, folder: Path, settings: Settings) -> tuple:
    """The model as a run has left it in its folder, and what the report can still say about that run.

    How long it took, and its peak of memory, went with its process.
    """
    from qlora_helpers.adapters.files import describe, load_adapter
    from qlora_helpers.models.loading import load_model
    from qlora_helpers.training.checkpoints import log_history, logged

    saved = folder / RESULT[settings.method]
    if settings.method == "full":
        model = load_model(str(saved), quantization=None)
        trainable = count = model.num_parameters()
    else:
        model, trainable = load_adapter(model, saved), describe(saved).parameters
        count = model.get_nb_trainable_parameters()[1]
    last = next(iter(complete_checkpoints(folder)), None)
    return model, {
        "trainable_parameters": trainable,
        "all_parameters": count,
        "loss_history": logged(log_history(last)) if last and step_of(last) == settings.steps else [],
        "train_seconds": None,
        "peak_memory_bytes": None,
        "adapter_path": saved.as_posix(),
    }


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
    seconds, peak = report["train_seconds"], report["peak_memory_bytes"]
    gone = "not known: the run was stopped before its report"
    print(f"""
training              {gone if seconds is None else f"{seconds:.0f} s of {report['total_seconds']:.0f} s in all"}
peak memory           {gone if peak is None else f"{peak / GIB:.2f} GiB of main memory"}
trained weights       {report["adapter_path"]}
report                {path.as_posix()}""")
