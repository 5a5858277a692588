"""`python -m qlora_helpers chat`: talk to what a run has trained, in a terminal."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
from typing import TYPE_CHECKING

from qlora_helpers.adapters.tuned import load_tuned
from qlora_helpers.commands.answer_options import add_answer_options, checked_decoding
from qlora_helpers.visible import harmless

if TYPE_CHECKING:
    from qlora_helpers.conversation import Answer, Conversation

__all__ = ["add_arguments", "command"]

PROMPT, MORE = "> ", "… "
HELP = """\
/new               begin a new conversation
/base [QUESTION]   ask the base, without the adapter: this question, or the last one again; it is not remembered
/help              show this
/quit              end; so does Ctrl-D (Ctrl-Z and Enter on Windows)
Ctrl-C stops an answer. A line that ends in \\ is continued in the next."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.description = "Talk to what a run has trained. Each answer appears as it is generated."
    parser.epilog = "In the chat, /help lists the commands."
    add_answer_options(parser)
    parser.add_argument(
        "--compare",
        action="store_true",
        help="let the base, without the adapter, answer each question first; the conversation goes on with the adapter's "
        "answers",
    )


def command(args: argparse.Namespace) -> int:
    """Answer until the input ends.

    Returns:
        0; or 2 if the questions came from a pipe or a file, and one of them was refused.

    Raises:
        ValueError, OSError: an option has a bad value, or there is nothing to load; the message says what.
    """
    decoding = checked_decoding(args, base=args.compare)
    print("Loading the libraries …", flush=True)
    from qlora_helpers.conversation import Conversation

    model, tokenizer, found = load_tuned(args.adapter, args.model)
    chat = _Chat(Conversation(model, tokenizer, args.system, decoding), args.compare)
    print(f"This is {harmless(str(found))}. /help lists the commands.", flush=True)
    return chat.talk()


def _is_terminal() -> bool:
    return sys.stdin.isatty()


def _note(text: str) -> None:
    """A remark of the program's own: dim, unless NO_COLOR is set or the output is no terminal that has colours."""
    plain = not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or os.name == "nt"
    print(f"({text})" if plain else f"\x1b[2m({text})\x1b[0m", flush=True)


def _read_line(prompt: str) -> str | None:
    """The next line of standard input, without its end; None if there is none. What a pipe gives is shown as if typed."""
    if _is_terminal() and sys.stdout.isatty():
        try:
            return input(prompt)
        except EOFError:
            print()
            return None
    if _is_terminal():  # the output goes elsewhere: the prompt must not
        print(prompt, end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    if line and not _is_terminal():
        print(f"{prompt}{harmless(line.rstrip())}", flush=True)
    return line.rstrip("\r\n") if line else None


def _read_question() -> str | None:
    """One question or command, which may have several lines; None at the end of the input."""
    line = _read_line(PROMPT)
    if line is None:
        return None
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        if (line := _read_line(MORE)) is None:
            break
        lines.append(line)
    return "\n".join(lines).strip()


class _Chat:
    """A conversation in a terminal."""

    def __init__(self, conversation: Conversation, compare: bool):
        self.conversation, self.compare, self.last_question = conversation, compare, ""

    def talk(self) -> int:
        if _is_terminal():
            with contextlib.suppress(ImportError):  # not there on Windows, whose console can edit a line itself
                import readline  # noqa: F401 (gives input() a history)
        refused = False
        while True:
            try:
                line = _read_question()
                if line is None or line == "/quit":
                    break
                self._respond(line)
            except KeyboardInterrupt:
                if not _is_terminal():
                    raise
                print()
                _note("Ctrl-C stops an answer; /quit or Ctrl-D ends the chat")
            except ValueError as error:
                sys.stdout.flush()
                print(f"error: {harmless(str(error))}", file=sys.stderr, flush=True)
                refused = True
        return 2 if refused and not _is_terminal() else 0

    def _respond(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        if line == "/new":
            self.conversation.restart()
            _note("a new conversation")
        elif line == "/help":
            print(HELP, flush=True)
        elif name == "/base":
            if not (question := rest.strip() or self.last_question):
                raise ValueError("/base: there is no question yet; put one behind it")
            self.last_question = question
            self._answer(question, "base", base=True, keep=False)
        elif re.fullmatch(r"/[a-z]*", line):
            raise ValueError(f"there is no command {line}; /help lists them")
        elif line:
            self.last_question = line
            if self.compare and self._answer(line, "base", base=True, keep=False).stopped:
                return
            self._answer(line, "adapter" if self.compare else "")

    def _answer(self, question: str, who: str, **options: bool) -> Answer:
        label = f"{who}: " if who else ""
        written = [label]  # the label waits for the first word, so that it does not stand before an error

        def write(text: str) -> None:
            print("".join(written) + harmless(text), end="", flush=True)
            written.clear()

        answer = self.conversation.ask(question, write, **options)
        print("".join(written), flush=True)
        for text in self.conversation.remarks(answer):
            _note(text)
        return answer
