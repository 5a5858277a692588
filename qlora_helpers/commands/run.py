"""`python -m qlora_helpers run`: tune a model on chats, with a report. Without options it is the course's own run."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_helpers.chats.lengths import TOO_LONG
from qlora_helpers.commands.command_line import command_line
from qlora_helpers.commands.reading_options import add_reading
from qlora_helpers.commands.run_request import Request, asked_for, refuse_another
from qlora_helpers.commands.run_settings import VARIED, length_and_seed, predicted_memory, settings_of, shape_of
from qlora_helpers.commands.settings_options import add_settings, given
from qlora_helpers.folder_locks import locked
from qlora_helpers.json_files import read_json_if_whole, write_json
from qlora_helpers.launch import Launch, launch_of_this_process
from qlora_helpers.settings import WARMUP_STEPS, Settings
from qlora_helpers.training.run_folder import (  # none needs torch
    RECORD,
    RESULT,
    check_movable,
    check_output,
    complete_checkpoints,
    gone_if_refused,
    is_finished,
    move_aside,
    read_record,
    step_of,
    steps_saved,
)
from qlora_helpers.validation import refuse

if TYPE_CHECKING:
    from qlora_helpers.commands.run_data import RunData
    from qlora_helpers.hardware import Hardware
    from qlora_helpers.training.together import Together

__all__ = ["add_arguments", "command"]

REPORT = "report.json"
_EXAMPLES = """\
examples:
  python -m qlora_helpers run
  python -m qlora_helpers run --data data/examples/people.csv --output runs/people
  python -m qlora_helpers run --model Qwen/Qwen2.5-1.5B-Instruct --data faq.csv --validation 0.1 --epochs 3
  python -m qlora_helpers run --resume --output runs/people"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, _EXAMPLES
    parser.usage = "%(prog)s [--model MODEL] [--data FILE] [--output FOLDER] [--resume] [more options]"
    parser.description = (
        "Tunes a model on chats and reports what came of it. Without --data it is the course's own run."
    )
    files = parser.add_argument_group("model and data")
    files.add_argument(
        "--model",
        help="a name on the Hub, such as Qwen/Qwen2.5-1.5B-Instruct, or a folder (default: tiny-llama, the shipped one, "
        "which knows only the words of its invented world)",
    )
    files.add_argument(
        "--data",
        metavar="FILE",
        help="chats, or questions and answers, in any form that the command data reads (default: the course's chats about the "
        "shipped model's world)",
    )
    files.add_argument(
        "--validation",
        type=_share_or_file,
        default=argparse.SUPPRESS,
        metavar="SHARE|FILE",
        help="the chats by which the model is watched and judged: the share that is held out, or a second file, or none "
        "(default with --data: a tenth of up to 500 chats, 50 of up to 1,000, then a twentieth, at most 1,000)",
    )
    add_reading(files)
    files.add_argument(
        "--too-long",
        choices=TOO_LONG,
        help="what to do with chats of more than --max-length tokens: stop with an error, drop them, or cut out the middle of "
        "their longest question; answers stay whole (default: stop)",
    )
    run = parser.add_argument_group("the run")
    run.add_argument(
        "--output",
        type=_folder,
        default=Path("runs/latest"),
        metavar="FOLDER",
        help="folder for what is trained and report.json (default: %(default)s)",
    )
    run.add_argument(
        "--resume", action="store_true", help="continue from the last complete checkpoint in the output folder"
    )
    run.add_argument(
        "--ignore-memory", action="store_true", help="train even if the run is predicted not to fit on the GPU"
    )
    settings = parser.add_argument_group(
        "settings",
        "The defaults are those of the course's own run. With --data, what is not named is suggested\n"
        "for the model's size, the number of rows and the GPU.",
    )
    add_settings(settings, VARIED, Settings())


def _share_or_file(text: str) -> float | str | None:
    """The value of --validation."""
    if text.lower() == "none":
        return None
    try:
        return float(text)
    except ValueError:
        return text


def _folder(text: str) -> Path:
    """The value of --output."""
    if not text:
        raise argparse.ArgumentTypeError("'' is not a folder: name one, such as runs/latest")
    return Path(text)


# ---- What is asked for, and where the run begins


class _Begin(Enum):
    """What a run begins with."""

    NEW = "a folder that is free"
    ASIDE = "moving another run aside"
    RESUME = "the last checkpoint"
    REPORT = "what is trained already: only the report is missing"


@dataclass(frozen=True)
class _Plan:
    """What will be done: what was asked for, in which folder, where it begins; and, for a run begun before, its record."""

    request: Request
    folder: Path
    begin: _Begin
    record: dict[str, Any] = field(default_factory=dict)
    ignore_memory: bool = False


def command(args: argparse.Namespace) -> int:
    """Train and print the report, or say where it stopped and how to continue.

    Raises:
        ValueError, OSError: the run cannot go into the output folder, or not as it is asked for; the message names the
            argument.
    """
    _check_settings(args)
    if not args.resume:
        asked_for(args)
    launch, before = launch_of_this_process(), _begun_at(args.output)
    try:
        with ExitStack() as held:

            def begin() -> _Plan:
                held.enter_context(gone_if_refused(args.output))
                check_output(args.output)
                held.enter_context(locked(args.output, "--output"))
                return _where_to_begin(args)

            plan = begin() if launch.processes == 1 else _from_first(begin)
            return _load_and_run(plan, launch)
    except KeyboardInterrupt as stop:  # during training it is an Interrupted, which says where
        if not launch.leads:
            return 128 + getattr(stop, "signal", signal.SIGINT)
        # else the folder still holds an earlier run, which is not moved aside until all is checked
        begun = args.resume or _begun_at(args.output) != before
        where = "before the first step of training"
        if begun and is_finished(args.output):
            where = f"after the training; what was trained is in {args.output}"
        how = "" if begun and _has_report(args.output) else f" To continue:\n  {_how_to_continue(args, begun)}"
        print(f"\nStopped {getattr(stop, 'where', where)}.{how}", file=sys.stderr)
        return 128 + getattr(stop, "signal", signal.SIGINT)


def _from_first(begin: Callable[[], _Plan]) -> _Plan:
    """Where the run begins, which the first of several processes finds out for all of them; this needs torch."""
    from qlora_helpers.hardware import detect
    from qlora_helpers.training.together import begin_together

    return begin_together(detect()).from_first(begin)


def _check_settings(args: argparse.Namespace) -> None:
    """Refuse a bad setting before a folder is made.

    Raises:
        ValueError: names the setting.
    """
    named = given(args)
    if (args.data or args.resume) and not {"steps", "epochs"} & named.keys():
        named["epochs"] = 1  # how many steps there are is not known yet, and not what they would be without --data
    Settings(**named)


def _begun_at(folder: Path) -> int | None:
    """When the record of the run in a folder was written; None if there is none."""
    try:
        return (folder / RECORD).stat().st_mtime_ns
    except OSError:
        return None


def _how_to_continue(args: argparse.Namespace, begun: bool) -> str:
    """The command line that goes on where this one was stopped."""
    if args.resume or not (begun and read_record(args.output)):
        return command_line(*args.typed)
    # the record says what was asked for
    return command_line("run", "--resume", "--output", args.output, *["--ignore-memory"] * args.ignore_memory)


def _where_to_begin(args: argparse.Namespace) -> _Plan:
    """Look at the output folder and say what will happen there. Needs no torch.

    Raises:
        ValueError, OSError: the run cannot go there; the message names the argument.
    """
    folder, record = args.output, check_output(args.output)
    if record is None:
        if args.resume:  # not an error: a script may repeat `run --resume` until it is done
            print(f"There is nothing to resume in {folder}: this is a new run.")
        return _Plan(asked_for(args), folder, _Begin.NEW, ignore_memory=args.ignore_memory)
    if not args.resume:
        check_movable(folder)
        return _Plan(asked_for(args), folder, _Begin.ASIDE, ignore_memory=args.ignore_memory)
    if is_finished(folder) and _has_report(folder):
        raise ValueError(
            f"--resume: the run in --output={str(folder)!r} is finished. Leave out --resume to begin another; the finished one "
            "is moved aside"
        )
    plan = _Plan(refuse_another(args, folder, record), folder, _Begin.RESUME, record, args.ignore_memory)
    if is_finished(folder):
        print(f"The run in {folder} is trained, but was stopped before its report: only that is made now.")
        return replace(plan, begin=_Begin.REPORT)
    if saved := steps_saved(folder):
        print(f"Continuing the run in {folder} after step {saved} of {record['steps']}.")
    else:
        print(f"The run in {folder} was stopped before its first checkpoint: it starts again at step 1.")
    return plan


def _has_report(folder: Path) -> bool:
    """Whether the report is there and whole."""
    return read_json_if_whole(folder / REPORT) is not None


def _make_room(folder: Path) -> None:
    """Move the run in a folder aside, and say where it is now."""
    kept = move_aside(folder)
    check_output(folder)
    print(f"The run that was in {folder} is now in {kept}.")


# ---- The run


def _load_and_run(plan: _Plan, launch: Launch) -> int:
    """Load what the run needs, and run it. Several processes do so together, each with a model of its own.

    The first one asks the questions and writes the report, while the others wait.
    """
    started = time.perf_counter()
    print("Loading the libraries …", flush=True)
    from qlora_helpers import evaluation
    from qlora_helpers.commands.run_data import read_run_data
    from qlora_helpers.commands.run_report import ask
    from qlora_helpers.hardware import detect
    from qlora_helpers.models.loading import load_model, load_tokenizer
    from qlora_helpers.training.together import begin_together

    request, hardware = plan.request, detect()
    together = begin_together(hardware)
    if launch.is_shared:
        how = ", which share the model" if launch.sharding else ""
        print(
            f"{launch.processes} process{'es' if launch.processes > 1 else ''}{how}; each takes a part of every step."
        )
    tokenizer = load_tokenizer(request.model)
    if not tokenizer.chat_template:
        raise refuse(
            "--model", request.model, "it has no chat template. Name one that was made for chats, often -Instruct"
        )
    shape = shape_of(request.model)
    length, seed = length_and_seed(request, plan.record, shape)
    data = read_run_data(request, tokenizer, length, seed)
    settings = settings_of(request, plan.record, data, shape, hardware, plan.ignore_memory, launch)
    prediction = predicted_memory(shape, settings, hardware, plan.ignore_memory)
    model = load_model(request.model, quantization="nf4" if settings.method == "qlora" else None, hardware=hardware)
    _refuse_before_anything_is_asked(plan, model, data, settings, hardware, together)
    parts = _print_bytes(request.model, model, hardware)
    # a model that is in shards would answer one token at a time, with all its weights sent around for each
    asks = launch.leads and not launch.sharding
    known = before = after = kept = None
    if asks:
        known, before = evaluation.measure_knowledge(model, tokenizer), ask(model, tokenizer, data, "before training")
    together.wait()
    if plan.begin is _Begin.REPORT:
        model, facts = _trained_before(model, plan.folder, settings)
    else:
        model, facts = _trained_now(model, tokenizer, data, plan, settings, hardware)
    if asks:
        after = ask(model, tokenizer, data, "after training")
        kept = evaluation.forgetting(model, tokenizer, known)
    if launch.leads:
        scores = evaluation.compare(before, after, data.asked, first=3, worst=3) if before and after else None
        _write_report(plan, data, settings, hardware, prediction, scores, kept, parts, facts, started)
    together.wait()
    return 0


def _write_report(
    plan: _Plan,
    data: RunData,
    settings: Settings,
    hardware: Hardware,
    prediction,
    scores,
    kept,
    parts,
    facts,
    started: float,
) -> None:
    from qlora_helpers.commands.run_report import print_report, put_together, what_to_change, write_card

    request = plan.request
    report = put_together(request, data, settings, hardware, prediction, scores, kept)
    report |= {"bytes_by_part": parts, **facts, "total_seconds": time.perf_counter() - started}
    report["first_changes"] = [change._asdict() for change in what_to_change(report, scores, kept)]
    write_card(report)
    write_json(plan.folder / REPORT, report)  # comes last, since it says that the run is finished
    print_report(report, plan.folder / REPORT, scores, kept)


def _said_of_the_warm_up(plan: _Plan, settings: Settings) -> str:
    """That the warm-up is shorter than by default, if nobody has asked for that."""
    shortened = plan.request.data is None and "warmup_steps" not in plan.request.settings
    shortened = shortened and settings.warmup_steps < WARMUP_STEPS and plan.begin is not _Begin.RESUME
    return f", all of them warm-up ({WARMUP_STEPS} in a longer run)" if shortened else ""


def _refuse_before_anything_is_asked(
    plan: _Plan, model, data: RunData, settings: Settings, hardware: Hardware, together: Together
) -> None:
    """Refuse what `train` would refuse, before a run is moved aside and minutes are spent on questions."""
    import torch

    from qlora_helpers.training.checkpoints import (
        record_of,
        refuse_other_data,
        refuse_other_sharding,
        where_to_start,
    )
    from qlora_helpers.training.trainer import check_settings

    record = record_of(model, data.training, settings, hardware, data.validation)
    if plan.begin is _Begin.REPORT:
        refuse_other_data(plan.folder, plan.record, record)
        return
    check_settings(model, settings, hardware)

    def make_room() -> None:
        if plan.begin is _Begin.ASIDE:
            _make_room(plan.folder)
        resume = plan.begin is _Begin.RESUME
        checkpoint = where_to_start(plan.folder, record, resume, float16=hardware.compute_dtype == torch.float16)
        refuse_other_sharding(checkpoint, settings)

    together.from_first(make_room)


def _print_bytes(name: str, model, hardware: Hardware) -> dict[str, int]:
    from qlora_helpers.models.weights import bytes_by_part

    parts = bytes_by_part(model)
    print(f"\nLoaded {name} in the {hardware.gear} gear: {sum(parts.values()):,} bytes")
    for part, count in parts.items():
        print(f"  {part:24}{count:12,}")
    return parts


def _trained_now(model, tokenizer, data: RunData, plan: _Plan, settings: Settings, hardware: Hardware) -> tuple:
    """The trained model, and what the report says about the run."""
    from qlora_helpers.commands.run_report import peak_memory, reset_peak_memory
    from qlora_helpers.training.run import train

    print(f"\nTraining for {settings.steps} steps{_said_of_the_warm_up(plan, settings)} …", flush=True)
    reset_peak_memory()
    run = train(
        model,
        tokenizer,
        data.training,
        plan.folder,
        settings,
        validation_chats=data.validation or None,
        hardware=hardware,
        resume=plan.begin is _Begin.RESUME,
        progress_bar=True,
        request=asdict(plan.request),
    )
    return run.model, {
        "trainable_parameters": run.trainable_parameters,
        "all_parameters": run.all_parameters,
        "loss_history": run.history,
        "validation_history": run.validation_history,
        "best_step": run.best_step,
        "stopped_early": run.stopped_early,
        "train_seconds": run.seconds,
        "peak_memory_bytes": peak_memory(hardware),
        "adapter_path": run.saved_path.as_posix(),
    }


def _trained_before(model, folder: Path, settings: Settings) -> tuple:
    """The model as a run has left it in its folder, and what the report can still say about that run.

    How long it took, and its peak of memory, went with its process.
    """
    from qlora_helpers.adapters.files import describe, load_adapter
    from qlora_helpers.models.loading import load_model
    from qlora_helpers.training.best import best_of, patience_ended
    from qlora_helpers.training.checkpoints import VALIDATION_LOSS, log_history, logged

    saved = folder / RESULT[settings.method]
    if settings.method == "full":
        model = load_model(str(saved), quantization=None)
        trainable = count = model.num_parameters()
    else:
        model, trainable = load_adapter(model, saved), describe(saved).parameters
        count = model.get_nb_trainable_parameters()[1]
    last = next(iter(complete_checkpoints(folder)), None)
    log = log_history(last) if last else []
    validation_history = logged(log, VALIDATION_LOSS)
    stopped_early = patience_ended(validation_history, settings.patience) and step_of(last) < settings.steps
    at_its_end = bool(last) and (step_of(last) == settings.steps or stopped_early)
    best = best_of(validation_history)
    return model, {
        "trainable_parameters": trainable,
        "all_parameters": count,
        "loss_history": logged(log) if at_its_end else [],
        "validation_history": validation_history,
        "best_step": best[0] if best else None,
        "stopped_early": stopped_early,
        "train_seconds": None,
        "peak_memory_bytes": None,
        "adapter_path": saved.as_posix(),
    }
