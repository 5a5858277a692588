"""python -m qlora_helpers run | data | chat | ask | fetch | memory | doctor | preflight | progress"""

from __future__ import annotations

import argparse
import os
import signal
import sys

from qlora_helpers.commands import ask, chat, data, doctor, fetch, memory, preflight, progress, run
from qlora_helpers.commands.typed_options import as_typed, typed_options
from qlora_helpers.streams import take_any_character

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "run": (run, "tune a model on chats, the shipped ones or yours, with a report"),
    "data": (data, "what is in a file of chats, in any common form, and whether a run can learn from it"),
    "chat": (chat, "talk to what a run has trained"),
    "ask": (ask, "ask it one question, or a file of them; for scripts"),
    "fetch": (fetch, "put a real language model on this disk, of 135 million parameters"),
    "memory": (memory, "will a run fit on a GPU, what takes the memory, and what helps"),
    "doctor": (doctor, "what this machine has, and what is wrong with it; or what an error means"),
    "preflight": (preflight, "before class: is this machine ready, and do the lessons hold here"),
    "progress": (progress, "which exercises are solved, by what notebooks store: of one person, or of a class"),
}


def main(argv: list[str] | None = None) -> int:
    take_any_character()
    parser = argparse.ArgumentParser(
        prog="python -m qlora_helpers",
        description="Tune a language model with QLoRA, the course's or on your own data, and find out what came of it.",
        epilog="Your own data, in this order: data FILE, run --data FILE, chat. Each command has its own --help.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module, does) in COMMANDS.items():
        command = commands.add_parser(name, help=does)
        module.add_arguments(command)
        command.set_defaults(function=module.command)
    args, left = parser.parse_known_args(argv)
    if "question" in args and not any(word.startswith("-") for word in left):
        args.question += left  # argparse does not take the words that an option parts from the other arguments
    elif left:
        commands.choices[args.command].error(f"unrecognized arguments: {' '.join(left)}")
    args.typed = sys.argv[1:] if argv is None else list(argv)
    try:
        code = args.function(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read the output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        sys.stdout.flush()
        print("\nStopped by Ctrl-C.", file=sys.stderr)
        return 128 + signal.SIGINT
    except ModuleNotFoundError as error:
        if not error.name or error.name.startswith("qlora_helpers"):
            raise
        print(
            f"error: {sys.executable} has no package {error.name}: use the Python that `make run` has set up, "
            ".venv/bin/python, or install requirements.txt. `doctor`, in the place of this command, says what is missing",
            file=sys.stderr,
        )
        return 2
    except (ValueError, OSError) as error:
        options = typed_options(commands.choices[args.command], args)
        print(f"error: {as_typed(str(error), options)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
