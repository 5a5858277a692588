"""The command that looks into a file of chats."""

import json
import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest

from qlora_helpers.__main__ import main
from qlora_helpers.chats import read_chats, read_file
from qlora_helpers.commands.command_line import command_line
from qlora_helpers.models.fetched import FETCHABLE
from qlora_helpers.models.hub import DEFAULT_MODEL
from qlora_helpers.paths import data_path
from tests.support.chats import GOOD, chat

CSV = "Frage;Antwort;Quelle\nWo?;Hier.;1\nWann?;Jetzt.;2\nWo?;Hier.;3\nWo?;Dort.;4\n"
FOUND = """\
faq.csv: 4 rows of question-answer (CSV, semicolons): "Frage" became the user's message, "Antwort" the assistant's; not used: \
"Quelle" (4 rows)
  4 chats of 1 answer each.
  8 messages: 4 of the role user, 4 of the role assistant.
  1 chat repeats an earlier one: row 3 that of row 1.
  1 chat gives another answer to an earlier question: row 4 to that of row 1.
"""


@pytest.fixture
def call(tmp_path, capsys, monkeypatch):
    """Exit status, standard output and standard error of the command, for a file with this content, on a machine with a GPU."""
    on_a(monkeypatch, "cuda")

    def run(content, *options, name="faq.csv"):
        (tmp_path / name).write_text(content, encoding="utf-8")
        status = main(["data", str(tmp_path / name), *map(str, options)])
        return status, *capsys.readouterr()

    return run


def on_a(monkeypatch, device):
    monkeypatch.setattr("qlora_helpers.hardware.detect", lambda: SimpleNamespace(device=device))


def next_is(*words):
    """The last lines of the command: what trains on the file."""
    return f"\nnext: {command_line('run', *words)}\n"


@pytest.fixture
def reports(monkeypatch):
    """What the report in tokens is asked for; it answers with one line."""
    asked = []

    def report_on(chats, tokenizer, max_length, validation=(), numbers=None):
        assert len(numbers) == len(chats)
        asked.append((chats, tokenizer.name_or_path, max_length, validation))
        return SimpleNamespace(in_colour=lambda: "the report", warning="", too_long={}, validation_too_long=0)

    monkeypatch.setitem(sys.modules, "qlora_helpers.chats.report", SimpleNamespace(report_on=report_on))
    return asked


def test_it_says_what_is_in_a_file_without_a_tokenizer(call, tmp_path):
    end = next_is("--model", DEFAULT_MODEL, "--data", tmp_path / "faq.csv")
    assert call(CSV, "--model", "none") == (0, FOUND + end, "")


def test_with_a_tokenizer_there_is_a_report(call, reports, tmp_path):
    lines = "\n".join(json.dumps({"messages": GOOD}) for _ in range(2))
    (tmp_path / "held.jsonl").write_text(lines)
    status, said, errors = call(CSV, "--max-length", 99, "--validation", tmp_path / "held.jsonl")
    rest = ["--data", tmp_path / "faq.csv", "--validation", tmp_path / "held.jsonl", "--max-length", 99]
    assert (status, errors) == (0, "") and said.endswith("\n\nthe report\n" + next_is(*rest))
    assert said.startswith(FOUND.splitlines()[0]) and "held.jsonl: 2 rows of messages (JSONL)\n" in said
    ((chats, model, max_length, validation),) = reports
    assert (len(chats), max_length, validation) == (4, 99, [GOOD, GOOD]) and "tiny-llama" in model
    call(CSV)
    assert reports[1][2:] == (None, ())


def test_the_report_numbers_rows_as_the_file_does(call):
    rows = [chat(("user", f"Who{' is' * n}?"), ("assistant", "Carl.")) for n in (1, 2, 40)]
    lines = ["", "{}", *(json.dumps({"messages": row}) for row in rows)]
    status, said, _ = call("\n".join(lines), "--on-bad", "drop", "--max-length", 40, name="chats.jsonl")
    assert status == 0 and "line 2: no messages" in said and "(row 5 with" in " ".join(said.split())


def test_a_second_file_may_be_of_another_form(call, tmp_path):
    other = tmp_path / "held.csv"
    other.write_text("instruction,input,output\nWhere?,,Here.\nWhat is it?,It.,That.\n", encoding="utf-8")
    options = ("--model", "none", "--form", "question-answer", "--validation")
    status, said, errors = call("question,answer\nWhere?,Here.\n", *options, other)
    assert (status, errors) == (0, "") and "held.csv: 2 rows of alpaca" in said
    assert "  1 chat of 2 with a question that is in faq.csv, too.\n" in said
    other.write_text("question,answer,prompt,completion\na,b,c,d\n", encoding="utf-8")
    status, said, _ = call("question,answer\nWhere?,Here.\n", *options, other)
    assert status == 0 and 'not used: "prompt"' in said


def test_it_writes_messages_that_are_read_again(call, tmp_path):
    out = tmp_path / "out.jsonl"
    status, said, _ = call(CSV, "--model", "none", "--to", out)
    end = next_is("--model", DEFAULT_MODEL, "--data", out)
    assert status == 0 and said.endswith(f"\nWritten as messages to {out}: 4 chats.\n{end}")
    assert read_chats(out) == read_file(tmp_path / "faq.csv").chats
    status, said, errors = call(CSV, "--model", "none", "--to", out)
    assert (status, said, errors) == (2, "", f"error: --to={str(out)!r} is there already: name a new file\n")


# ---- The command that comes next


def next_words(said):
    """The words of the command that comes next, from `run` on."""
    before, _, after = said.rpartition("\nnext: ")
    assert before and after.count("\n") == 1
    return shlex.split(after)[3:]


def test_the_next_command_trains_on_the_file_as_it_was_read_here(tmp_path, capsys, monkeypatch):
    rows = data_path("examples", "people.csv").read_text(encoding="utf-8").splitlines()
    path = tmp_path / "my people.csv"
    path.write_text(
        "\n".join([f"{rows[0]},completion", *(f"{row},x" for row in rows[1:9]), "Who?,,x"]), encoding="utf-8"
    )
    options = ["--on-bad", "drop", "--form", "question-answer", "--max-length", "24"]
    assert main(["data", str(path), *options]) == 0
    words = next_words(capsys.readouterr().out)
    assert words == ["run", "--data", str(path), "--form", "question-answer", "--on-bad", "drop", "--max-length", "24"]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("qlora_helpers.models.loading.load_model", None)  # it ends where the model would be loaded
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        main(words)
    assert "1 row of my people.csv cannot be used" in capsys.readouterr().out


def test_the_next_command_names_a_model_that_knows_the_words(call, tmp_path):
    rows = "\n".join(f"Could you explain topic number {n}?,Certainly; it concerns quarterly budgets." for n in range(9))
    status, said, _ = call(f"question,answer\n{rows}")
    assert status == 0 and next_words(said) == ["run", "--model", DEFAULT_MODEL, "--data", str(tmp_path / "faq.csv")]
    folder = str(data_path("tiny-llama"))  # named, so it is meant
    assert next_words(call(f"question,answer\n{rows}", "--model", folder)[1])[1:3] == ["--model", folder]


@pytest.mark.parametrize("options", [[], ["--model", "none"]])
def test_without_a_gpu_the_next_command_fetches_a_model_that_learns_here(options, call, tmp_path, monkeypatch):
    on_a(monkeypatch, "cpu")
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    rows = "\n".join(f"Could you explain topic number {n}?,Certainly; it concerns quarterly budgets." for n in range(9))
    name = next(iter(FETCHABLE))
    train = command_line("run", "--model", name, "--data", tmp_path / "faq.csv")
    _, said, _ = call(f"question,answer\n{rows}", *options)
    assert said.partition("\nnext: ")[2].splitlines() == [
        command_line("fetch", name),
        "      a model of 135 million parameters, which also learns without a GPU; 93 or 271 MB to download, once",
        f"then: {train}",
    ]
    assert DEFAULT_MODEL not in said.partition("\nnext: ")[2]
    folder = tmp_path / "cache" / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}", encoding="utf-8")
    made = {"source": "hub", "files": {"config.json": 2}}
    (folder / "fetched.json").write_text(json.dumps(made), encoding="utf-8")
    assert call(f"question,answer\n{rows}", *options)[1].endswith(f"\nnext: {train}\n")
    (folder / "config.json").unlink()  # what is damaged is not there
    assert command_line("fetch", name) in call(f"question,answer\n{rows}", *options)[1]
    on_a(monkeypatch, "cuda")
    assert DEFAULT_MODEL in call(f"question,answer\n{rows}", *options)[1].partition("\nnext: ")[2]


def test_the_next_command_leaves_out_what_is_too_long(call, tmp_path):
    both = f"{FEW}{'Who is it? ' * 20},Carl.\n"
    assert next_words(call(FEW, "--max-length", 40)[1])[-2:] == ["--max-length", "40"]
    assert next_words(call(both, "--max-length", 40)[1])[-2:] == ["--too-long", "drop"]
    (tmp_path / "held.csv").write_text(both, encoding="utf-8")
    held = next_words(call(FEW, "--max-length", 40, "--validation", tmp_path / "held.csv")[1])
    assert held[-2:] == ["--too-long", "drop"]


def test_the_next_command_reads_what_was_written(call, tmp_path):
    both = "question,answer,prompt,completion\na,b,c,d\n"
    _, said, _ = call(both, "--model", "none", "--form", "question-answer", "--to", tmp_path / "out.jsonl")
    assert next_words(said)[-2:] == ["--data", str(tmp_path / "out.jsonl")]


FEW = "question,answer\nWho is it?,Carl.\n"
BAD = "question,answer\nWhere?,Here.\nWhen?,\nWho?,\n"


def test_bad_rows_stop_it_and_the_error_says_how_to_leave_them_out(call, tmp_path):
    status, said, errors = call(BAD, "--model", "none", "--to", tmp_path / "out.jsonl")
    assert status == 2 and said.count("\n") == 1
    assert errors.splitlines() == [
        f'error: {tmp_path / "faq.csv"}, row 2: "answer" is empty',
        f'{tmp_path / "faq.csv"}, row 3: "answer" is empty',
        "Rows are counted without the header. To leave such rows out: --on-bad drop",
    ]
    assert not (tmp_path / "out.jsonl").exists()


def test_bad_rows_are_left_out_with_a_count(call, tmp_path):
    status, said, errors = call(BAD, "--model", "none", "--on-bad", "drop", "--to", tmp_path / "out.jsonl")
    assert (status, errors) == (0, "")
    assert (
        '2 rows of faq.csv cannot be used, and are left out (rows are counted without the header):\n  2 rows, such as row 2: "answer" is empty\n'
        in said
    )
    assert read_chats(tmp_path / "out.jsonl") == [GOOD]


def test_what_the_tokenizer_refuses_names_the_model(call, reports):
    lines = "\n".join(json.dumps({"messages": one}) for one in (GOOD, chat(("user", "<|end|>"), ("assistant", "x"))))
    status, _, errors = call(lines, name="chats.jsonl")
    assert status == 2 and "line 2: message 1 (user) has '<|end|>' in its text" in errors and not reports
    assert errors.endswith("the tokenizer of tiny-llama: name the model to be trained with --model, or none\n")
    status, said, _ = call(lines, "--on-bad", "drop", name="chats.jsonl")
    assert status == 0 and "1 row of chats.jsonl cannot be used" in said and reports[0][0] == [GOOD]


def test_the_form_can_be_chosen(call):
    both = "question,answer,prompt,completion\na,b,c,d\n"
    status, _, errors = call(both, "--model", "none")
    assert status == 2 and "(--form on the command line)" in errors
    status, said, _ = call(both, "--model", "none", "--form", "question-answer")
    assert status == 0 and 'not used: "prompt" (1 row), "completion" (1 row)' in said
    assert call(both, "--model", "none", "--format", "question-answer")[1] == said  # its earlier name


def test_a_form_that_does_not_fit_is_called_by_its_option(call):
    for option in ("--form", "--format"):
        status, _, errors = call(CSV, "--model", "none", option, "alpaca")
        assert status == 2 and "faq.csv': --form='alpaca' does not fit: its columns are" in errors


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--max-length", "0"], "error: --max-length=0: must be a whole number"),
        (["--max-length", "abc"], "error: --max-length='abc': must be a whole number"),
        (["--validation", "0.1"], "error: --validation=0.1: there is no such file. Only `run` takes a share"),
        (["--validation", "nowhere.csv"], "error: path='nowhere.csv' cannot be read (No such file or directory)"),
    ],
)
def test_bad_options_are_refused(options, said, call):
    status, _, errors = call(CSV, "--model", "none", *options)
    assert status == 2 and errors.startswith(said)


def test_help_is_quick_and_loads_none_of_the_libraries():
    code = (
        "import sys\nfrom qlora_helpers.__main__ import main\ntry: main(['data', '--help'])\nexcept SystemExit: pass\n"
        "print([name for name in ('torch', 'transformers', 'pandas', 'pyarrow', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--on-bad {stop,drop}" in done.stdout and done.stdout.endswith("[]\n")
