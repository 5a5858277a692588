"""Asking from scripts: what is on standard output, what is written, and what an interrupt leaves."""

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_helpers import conversation
from qlora_helpers.__main__ import main
from qlora_helpers.adapters.tuned import load_tuned
from qlora_helpers.commands import ask
from qlora_helpers.conversation import Answer
from qlora_helpers.paths import data_path

ADAPTER = data_path("adapters", "sentences")
QUESTION, RIGHT = "What does Carl Kirkcroft play in a band?", "Carl Kirkcroft plays the harp."


@pytest.fixture(scope="module")
def loaded():
    return load_tuned(ADAPTER)


@pytest.fixture
def call(loaded, monkeypatch, capsys, tmp_path):
    """A function that calls `main` with the loaded adapter; returns exit code, standard output and standard error."""
    monkeypatch.setattr(ask, "load_tuned", lambda folder, model: loaded)
    monkeypatch.chdir(tmp_path)

    def main_with(*arguments):
        return main(["ask", str(ADAPTER), *arguments]), *capsys.readouterr()

    return main_with


def test_a_script_gets_the_answer_alone():
    command = [sys.executable, "-m", "qlora_helpers", "ask", str(ADAPTER), QUESTION]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env={**os.environ})
    assert (done.returncode, done.stdout) == (0, f"{RIGHT}\n")
    assert done.stderr.startswith("Loading the libraries …\nThis is the adapter in ") and done.stderr.count("\n") == 2


def test_the_words_of_a_question_may_stand_anywhere(call):
    words = QUESTION.split()
    for arguments in (words, [*words[:3], "--seed", "1", *words[3:]], ["--seed", "1", *words], [*words, "--seed", "1"]):
        assert call(*arguments)[:2] == (0, f"{RIGHT}\n")
    with pytest.raises(SystemExit):
        call(*words, "--sed", "1")
    with pytest.raises(SystemExit):
        main(["doctor", "words"])


def test_several_answers_are_kept_apart(call, tmp_path):
    (tmp_path / "q.txt").write_text(f"{QUESTION}\n\nWhat is the job of Michael Glenwell?\n", encoding="utf-8")
    code, out, _ = call("--file", "q.txt")
    wanted = (
        f"[1] {QUESTION}\n{RIGHT}\n\n[2] What is the job of Michael Glenwell?\nMichael Glenwell works as a dentist.\n"
    )
    assert (code, out) == (0, wanted)


def test_json_has_the_line_and_the_right_answer(call, tmp_path):
    chat = {"messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "où"}]}
    (tmp_path / "q.jsonl").write_text(f'\n{json.dumps(chat)}\n"Who?"\n', encoding="utf-8")
    code, out, err = call("--file", "q.jsonl", "--json", "--max-new-tokens", "3")
    first, second = map(json.loads, out.splitlines())
    assert first == {
        "line": 2,
        "question": QUESTION,
        "answer": "Carl Kirkcroft plays",
        "cut_off": True,
        "expected": "où",
    }
    assert second.keys() == {"line", "question", "answer", "cut_off"} and second["line"] == 3
    assert code == 0 and out.isascii()
    assert err.endswith(" of 2 answers cut off; --max-new-tokens sets how long they may be.\n")
    assert json.loads(call(QUESTION, "--json")[1]) == {"question": QUESTION, "answer": RIGHT, "cut_off": False}


def test_answers_are_written_to_a_new_file_and_never_over_another(call, tmp_path):
    (tmp_path / "q.csv").write_text(f"question\n{QUESTION}\n", encoding="utf-8")
    code, out, err = call("--file", "q.csv", "--to", "a.jsonl")
    assert (code, out) == (0, "") and err.endswith("1 answer is in a.jsonl.\n")
    written = (tmp_path / "a.jsonl").read_bytes()
    assert json.loads(written) == {"line": 2, "question": QUESTION, "answer": RIGHT, "cut_off": False}
    code, _, err = call("--file", "q.csv", "--to", "a.jsonl")
    assert code == 2 and "error: --to='a.jsonl': a.jsonl is there already: name a new file, or move it away" in err
    (tmp_path / "b.jsonl.part").touch()
    code, _, err = call("--file", "q.csv", "--to", "b.jsonl")
    assert code == 2 and "error: --to='b.jsonl': b.jsonl.part is there already" in err
    code, _, err = call("--file", "q.csv", "--to", "no/c.jsonl")
    assert code == 2 and "error: --to='no/c.jsonl': there is no folder no: make it first" in err
    assert (tmp_path / "a.jsonl").read_bytes() == written
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl.part", "q.csv"]


def interrupted_after(count, with_what=KeyboardInterrupt):
    def answers(*args):
        for number in range(count):
            yield Answer(f"où {number}", 2)
        raise with_what

    return answers


def test_what_was_answered_before_an_interrupt_is_kept(call, tmp_path, monkeypatch):
    (tmp_path / "q.txt").write_text("a\nb\nc\n", encoding="utf-8")
    monkeypatch.setattr(conversation, "answers", interrupted_after(2))
    code, _, err = call("--file", "q.txt", "--to", "a.jsonl")
    assert code == 130 and "The first 2 answers are in a.jsonl.part.\n" in err and err.endswith("Stopped by Ctrl-C.\n")
    text = (tmp_path / "a.jsonl.part").read_text(encoding="utf-8")
    assert "où 1" in text and [json.loads(line)["line"] for line in text.splitlines()] == [1, 2]
    monkeypatch.setattr(conversation, "answers", interrupted_after(0))
    assert call("--file", "q.txt", "--to", "b.jsonl")[0] == 130
    assert not (tmp_path / "a.jsonl").exists() and not list(tmp_path.glob("b.jsonl*"))


class Full(io.StringIO):
    """A file on a disk that has room for one answer."""

    def write(self, text):
        if self.tell():
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(text)


def test_a_disk_that_fills_up_is_named(call, tmp_path, monkeypatch):
    (tmp_path / "q.txt").write_text("a\nb\nc\n", encoding="utf-8")
    monkeypatch.setattr(conversation, "answers", lambda *args: iter([Answer("yes", 1)] * 3))
    real = Path.open
    monkeypatch.setattr(Path, "open", lambda *args, **how: Full() if "x" in args else real(*args, **how))
    code, _, err = call("--file", "q.txt", "--to", "a.jsonl")
    assert code == 2 and "The first answer is in a.jsonl.part." in err
    assert "error: --to='a.jsonl' cannot be written (No space left on device): free some space" in err


def test_a_file_that_appears_meanwhile_is_not_written_over(call, tmp_path, monkeypatch):
    (tmp_path / "q.txt").write_text("a\n", encoding="utf-8")

    def answers(*args):
        (tmp_path / "a.jsonl").write_text("another's", encoding="utf-8")
        yield Answer("mine", 1)

    monkeypatch.setattr(conversation, "answers", answers)
    code, _, err = call("--file", "q.txt", "--to", "a.jsonl")
    assert code == 2 and "error: --to='a.jsonl': it has appeared meanwhile; the answers are not written over it" in err
    assert (tmp_path / "a.jsonl").read_text(encoding="utf-8") == "another's"
    assert "mine" in (tmp_path / "a.jsonl.part").read_text(encoding="utf-8")


def test_no_command_to_a_terminal_is_printed(call, monkeypatch):
    monkeypatch.setattr(conversation, "answers", lambda *args: iter([Answer("\x1b[31mred", 1)]))
    assert call("Who?")[1] == "\\x1b[31mred\n"
    assert "\x1b" not in call("Who?", "--json")[1]


def test_the_base_answers_otherwise(call):
    code, out, _ = call(QUESTION, "--base")
    assert code == 0 and out.strip() and out != f"{RIGHT}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "there is no question: put one behind the folder, or name a file with --file"),
        ([""], "question='': must be a text"),
        (["--file", "q.json"], "q.json: its name must end in one of .txt, .jsonl, .csv"),
        (["Who?", "--file", "q.txt"], "--file: pass a question or a file of questions, not both"),
        (["--file", "none.txt"], "none.txt cannot be read (No such file or directory): name a file of questions"),
        (["--file", "q.pdf"], "q.pdf: its name must end in one of .txt, .jsonl, .csv"),
        (["Who?", "--batch-size", "0"], "--batch-size=0: must be a whole number, 1 or more"),
        (["Who?", "--batch-size", "x"], "--batch-size='x': must be a whole number, 1 or more"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is_loaded(call, arguments, said, monkeypatch):
    monkeypatch.delattr(ask, "load_tuned")
    code, out, err = call(*arguments)
    assert (code, out) == (2, "") and err.startswith(f"error: {said}")


def test_a_question_that_the_model_cannot_take_is_named_by_its_line(call, tmp_path):
    (tmp_path / "q.txt").write_text("Who?\n\nWhat<|end|>\n", encoding="utf-8")
    code, _, err = call("--file", "q.txt")
    assert code == 2 and "error: q.txt, line 3: message 1 (user) has '<|end|>' in its text" in err
    (tmp_path / "q.txt").write_text("Who?\n\n" + "Carl " * 300, encoding="utf-8")
    code, _, err = call("--file", "q.txt")
    assert code == 2 and "error: q.txt, line 3 has 304 tokens with what belongs to it" in err
    assert err.count("\n") == 3  # none of the libraries' words
    code, _, err = call("What<|end|>")
    assert code == 2 and "error: the question: message 1 (user) has '<|end|>' in its text" in err
    code, _, err = call("Who?", "--system", "Be brief.")
    assert code == 2 and "error: --system='Be brief.': this model's chat template takes no system message" in err


def test_without_a_folder_the_latest_run_is_asked(call, loaded, monkeypatch, capsys, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "latest").symlink_to(ADAPTER)
    assert main(["ask", QUESTION]) == 0
    assert capsys.readouterr().out == f"{RIGHT}\n"
    (tmp_path / "q.txt").write_text(f"{QUESTION}\n", encoding="utf-8")
    assert main(["ask", "--file", "q.txt"]) == 0
    assert capsys.readouterr().out == f"{RIGHT}\n"
    assert main(["ask", "runs/tlaest"]) == 2  # a single word may be a folder that is mistyped
    assert "there is no question" in capsys.readouterr().err
