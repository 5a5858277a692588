"""Talking to a model: in a terminal, where a key stops an answer, and through a pipe."""

import contextlib
import json
import os
import re
import select
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from qlora_helpers.__main__ import main
from qlora_helpers.adapters import tuned
from qlora_helpers.commands import answer_options, chat
from qlora_helpers.conversation import Conversation
from qlora_helpers.paths import data_path
from tests import ROOT
from tests.support.short_runs import CPU

ADAPTER = data_path("adapters", "sentences")
QUESTION, RIGHT = "What does Carl Kirkcroft play in a band?", "Carl Kirkcroft plays the harp."
# the adapter answers slowly, without an end, and with a command to the terminal in its answer
SLOW = """
import sys, time
import torch
from peft import PeftModelForCausalLM
from qlora_helpers.__main__ import main

def generate(self, streamer, **options):
    streamer.put(None)
    while True:
        for id in streamer.tokenizer("the harp \\x1b[31m", add_special_tokens=False)["input_ids"]:
            streamer.put(torch.tensor([id]))
            time.sleep(0.01)

PeftModelForCausalLM.generate = generate
sys.exit(main(sys.argv[1:]))
"""


class Terminal:
    """A program in a pseudo-terminal, as somebody at a keyboard sees it."""

    def __init__(self, *command, **environment):
        import pty  # not there on Windows

        self.process, self.fd = pty.fork()
        if self.process == 0:
            os.execve(sys.executable, [sys.executable, *map(str, command)], os.environ | environment)
        self.shown = ""

    def type(self, text):
        os.write(self.fd, text.encode())

    def until(self, words, seconds=300):
        """What has been shown since the last call, up to these words."""
        end = time.monotonic() + seconds
        while words not in self.shown:
            assert time.monotonic() < end, f"{words!r} is not in {self.shown[-500:]!r}"
            if select.select([self.fd], [], [], 1)[0]:
                with contextlib.suppress(OSError):  # it has ended
                    self.shown += os.read(self.fd, 4096).decode()
        found, words, self.shown = self.shown.partition(words)
        return (found + words).replace("\r\n", "\n")

    def end(self):
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pseudo-terminals of this kind")
class TestInATerminal:
    def test_a_conversation_with_its_commands(self):
        terminal = Terminal("-m", "qlora_helpers", "chat", ADAPTER, TERM="xterm", NO_COLOR="")
        assert f"This is the adapter in {ADAPTER} on tiny-llama" in terminal.until("\n> ")
        terminal.type(f"{QUESTION}\n")
        assert RIGHT in terminal.until("\n> ")
        terminal.type("/base\n")
        other = terminal.until("\n> ")
        assert re.search(r"\nbase: \w+", other) and RIGHT not in other
        terminal.type("/help\n")
        assert "/new               begin a new conversation" in terminal.until("\n> ")
        terminal.type("/new\n")
        assert "\x1b[2m(a new conversation)\x1b[0m" in terminal.until("\n> ")
        terminal.type("half a question")
        terminal.until("half a question")
        time.sleep(
            0.5
        )  # Python's readline misses a signal between the last key and its wait for the next until that comes
        terminal.type("\x03")  # Ctrl-C
        assert "(Ctrl-C stops an answer; /quit or Ctrl-D ends the chat)" in terminal.until("> ")
        terminal.type("/nothing\n")
        assert "error: there is no command /nothing; /help lists them" in terminal.until("\n> ")
        terminal.type("\x04")  # Ctrl-D
        assert terminal.end() == 0

    def test_ctrl_c_stops_an_answer_and_not_the_program(self):
        terminal = Terminal("-c", SLOW, "chat", ADAPTER, TERM="xterm", NO_COLOR="1", OMP_NUM_THREADS="1")
        terminal.until("\n> ")
        for _ in range(2):
            terminal.type("What?\n")
            said = terminal.until("harp \\x1b[31m the harp")
            terminal.type("\x03")
            said += terminal.until("(stopped)")
            assert "\x1b[31m" not in said and "\x1b[2m" not in said  # not the model's escapes, and no colour of ours
            terminal.until("\n> ")
        terminal.type("/quit\n")
        assert terminal.end() == 0


def piped(*arguments, typed, cwd=None):
    command = [sys.executable, "-m", "qlora_helpers", "chat", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(
        command, input=typed, capture_output=True, encoding="utf-8", cwd=cwd, env=environment, check=False
    )


def test_questions_from_a_pipe_are_shown_with_their_answers():
    done = piped(ADAPTER, typed=f"{QUESTION}\n\x1b[31m<|end|>\n/quit\nnever asked\n")
    assert done.returncode == 2, done.stderr
    assert f"\n> {QUESTION}\n{RIGHT}\n> \\x1b[31m<|end|>\n> /quit\n" in done.stdout
    assert done.stderr.startswith("error: the question has '<|end|>' in its text")
    assert "never" not in done.stdout and "\x1b" not in done.stdout + done.stderr


@pytest.fixture
def talk(monkeypatch, capsys):
    """A function that talks to a stand-in for a model, which repeats the question; returns what was shown."""

    class Repeats(Conversation):
        def __init__(self):
            self.asked, self.messages, self.context, self.limit = [], [], 256, 128

        def ask(self, question, write, base=False, keep=True):
            self.asked.append((question, base, keep))
            if question == "bad":
                raise ValueError("the question is bad")
            if question == "stop":
                return answer(stopped=True)
            write(question.upper())
            return answer(text=question, cut_off=question == "long")

        def restart(self):
            self.asked.append("restarted")

    def answer(text="", **options):
        return SimpleNamespace(
            **({"text": text, "tokens": 128, "cut_off": False, "stopped": False, "forgotten": 0} | options)
        )

    def run(*lines, compare=False):
        typed = iter([f"{line}\n" for line in lines])
        stdin = SimpleNamespace(isatty=lambda: False, readline=lambda: next(typed, ""))
        monkeypatch.setattr(sys, "stdin", stdin)
        repeats = Repeats()
        code = chat._Chat(repeats, compare).talk()
        return code, repeats.asked, *capsys.readouterr()

    return run


def test_a_question_may_have_several_lines_and_begin_with_a_slash(talk):
    code, asked, out, _ = talk("one \\", "two\\", "three", "", "/etc/passwd is what?", " /quit is a word", "/a b")
    assert [question for question, _, _ in asked] == [
        "one \ntwo\nthree",
        "/etc/passwd is what?",
        "/quit is a word",
        "/a b",
    ]
    assert "> one \\\n… two\\\n… three\nONE \nTWO\nTHREE\n> \n> /etc" in out and code == 0
    assert talk("last\\")[1] == [("last", False, True)]


def test_the_base_is_asked_aside(talk):
    code, asked, out, err = talk("/base", "one", "/base", "/base two", "/base", "/new")
    assert err == "error: /base: there is no question yet; put one behind it\n" and code == 2
    assert asked == [
        ("one", False, True), ("one", True, False), ("two", True, False), ("two", True, False), "restarted",
    ]  # fmt: skip
    assert "> one\nONE\n> /base\nbase: ONE\n> /base two\nbase: TWO\n" in out


def test_both_answer_side_by_side(talk):
    _, asked, out, _ = talk("one", "stop", compare=True)
    assert asked == [("one", True, False), ("one", False, True), ("stop", True, False)]  # a stop ends both
    assert "> one\nbase: ONE\nadapter: ONE\n" in out


def test_what_an_answer_lacks_is_said_and_an_error_does_not_end_the_chat(talk):
    code, asked, out, err = talk("bad", "long", "/new")
    assert (code, err) == (2, "error: the question is bad\n") and len(asked) == 3
    assert (
        "LONG\n(cut off after 128 tokens, the most that max_new_tokens allows)\n> /new\n(a new conversation)\n" in out
    )


def test_ctrl_c_ends_a_chat_that_nobody_types_in(talk, monkeypatch):
    monkeypatch.setattr(chat._Chat, "_respond", lambda self, line: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        talk("one")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "there is no folder nowhere: make a run with  python -m qlora_helpers run  or name"),
        ([], "there is no folder runs/latest: make a run with"),
        (["--max-new-tokens", "0"], "--max-new-tokens=0: must be a whole number, 1 or more, or None for 512"),
        (["--max-new-tokens", "many"], "--max-new-tokens='many': must be a whole number"),
        (["--temperature", "-1"], "--temperature=-1: must be a number, 0.01 to 10, or 0 for greedy decoding"),
        (["--temperature", ""], "--temperature='': must be a number, 0.01 to 10"),
        (["--seed", "0.5"], "--seed=0.5: must be a whole number"),
        (["--system", " "], "--system=' ': must not be empty; leave it out for none"),
        (["--model", ""], "--model='': must not be empty"),
        ([str(ADAPTER), "--model", "./nowhere"], "--model='./nowhere': there is no such folder"),
        (
            [str(data_path("tiny-llama")), "--compare"],
            f"{data_path('tiny-llama')} is a whole model, without an adapter",
        ),
        ([str(data_path("tiny-llama")), "--model", "x"], f"--model='x': {data_path('tiny-llama')} is a whole model"),
    ],
)
@pytest.mark.parametrize("name", ["chat", "ask"])
def test_a_bad_argument_is_refused_before_anything_is_loaded(arguments, said, name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delattr(f"qlora_helpers.commands.{name}.load_tuned")
    if name == "ask":
        if not arguments or arguments[0].startswith("--"):
            arguments = ["runs/latest", *arguments]
        arguments = ["--base" if word == "--compare" else word for word in [*arguments, "Who?"]]
    assert main([name, *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"error: {said}")


def test_a_system_message_that_the_model_would_not_see_is_refused(capsys):
    assert main(["chat", str(ADAPTER), "--system", "Be brief."]) == 2
    assert "error: --system='Be brief.': this model's chat template takes no system message" in capsys.readouterr().err


def test_a_limit_without_room_for_a_question_is_refused(capsys):
    assert main(["chat", str(ADAPTER), "--max-new-tokens", "256"]) == 2
    assert "error: --max-new-tokens=256: must be less than the model's context of 256 tokens" in capsys.readouterr().err


def test_no_library_is_loaded_for_the_help():
    code = "import sys\nfrom qlora_helpers import __main__\nprint({'torch', 'transformers', 'peft', 'jinja2'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
    assert answer_options.LATEST == tuned.LATEST


def test_the_result_of_a_run_is_what_is_talked_to(tmp_path, monkeypatch, capsys):
    """Right after `run --model mine`: the report names the folder, and nothing else need be said."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(data_path("tiny-llama"), "mine")
    shutil.copytree(ADAPTER, "runs/latest/adapter")
    record = {"method": "qlora", "steps": 6, "chats": "0", "model": "mine", "compute_dtype": "x"}
    (tmp_path / "runs" / "latest" / "run.json").write_text(json.dumps(record), encoding="utf-8")
    (tmp_path / "runs" / "latest" / "report.json").write_text('{"model": "mine"}', encoding="utf-8")
    typed = iter([f"{QUESTION}\n"])
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: False, readline=lambda: next(typed, "")))
    monkeypatch.setattr("qlora_helpers.hardware.detect", lambda: CPU)
    assert main(["chat"]) == 0
    out = capsys.readouterr().out
    assert "This is the adapter in runs/latest/adapter on mine, in 4 bits (nf4). /help" in out and f"\n{RIGHT}\n" in out
