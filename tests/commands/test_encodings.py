"""Every command prints, whatever the encoding of its output is: Windows' pipes are in cp1252, LC_ALL=C is ASCII."""

import io
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from qlora_helpers import evaluation
from qlora_helpers.__main__ import main
from qlora_helpers.commands import doctor, preflight, run_data

ENCODINGS = ["ascii", "cp1252", "latin-1", "utf-8"]
QUESTION = "a – “b” ✓ 語 \ud800"  # the last is half a surrogate pair, which no encoding has


@pytest.fixture(params=ENCODINGS)
def printed(request, tmp_path, monkeypatch):
    """A function that calls `main`, and returns its exit code and what it wrote to standard output and error."""

    def call(*arguments, typed=""):
        paths = [tmp_path / "stdout", tmp_path / "stderr"]
        with paths[0].open("w", encoding=request.param) as out, paths[1].open("w", encoding=request.param) as err:
            monkeypatch.setattr(sys, "stdout", out)
            monkeypatch.setattr(sys, "stderr", err)
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed.encode()), encoding=request.param))
            code = main(list(arguments))
        return code, *[path.read_bytes().decode(request.param) for path in paths]

    call.plain = request.param != "utf-8"
    return call


def test_the_doctor_prints_its_findings(printed, monkeypatch):
    found = doctor.Report([("Python", QUESTION)])
    found.notice("no GPU")
    monkeypatch.setattr(doctor, "examine", lambda: found)
    code, out, err = printed("doctor")
    assert (code, err) == (0, "")
    assert ("[ok] nothing stands" if printed.plain else "✓ nothing stands") in out
    assert ("- no GPU" if "\n- no GPU" in out else "· no GPU") in out and "\\ud800" in out
    found.problem("no disk", "buy one")
    code, out, err = printed("doctor")
    assert code == 1 and ("[!] no disk: buy one" if printed.plain else "✗ no disk: buy one") in out


def test_the_doctor_reads_an_error_in_any_encoding(printed):
    text = "“Où ?” ✓ RuntimeError: CUDA error: no kernel image is available for execution on the device"
    code, out, err = printed("doctor", "--error", "-", typed=text)
    assert (code, err) == (0, "") and "no kernel image" in out.lower()


def test_memory_prints_text_and_json(printed):
    code, out, err = printed("memory", "meta-llama/Llama-3.1-8B", "--gpu", "l4")
    assert (code, err) == (0, "") and "on the card" in out
    code, out, err = printed("memory", "meta-llama/Llama-3.1-8B", "--gpu", "l4", "--json")
    assert (code, err) == (0, "") and json.loads(out)["fits"] is True


def test_an_error_names_the_value_as_well_as_the_encoding_can(printed):
    code, out, err = printed("memory", "où ✓ 語", "--gpu", "l4")
    assert (code, out) == (2, "")
    assert "error: model" in err and ("où ✓ 語" in err or "[ok] \\u8a9e" in err)


def test_a_run_prints_its_questions_and_answers(printed, tmp_path, monkeypatch):
    read, score = run_data.read_run_data, evaluation.score

    def scored(*args):
        found = score(*args)
        return replace(found, rows=[replace(row, text=QUESTION) for row in found.rows])

    monkeypatch.setattr(run_data, "read_run_data", lambda *args: replace(data := read(*args), asked=data.asked[:3]))
    monkeypatch.setattr(evaluation, "score", scored)
    folder = tmp_path / "où"
    code, out, err = printed("run", "--steps", "1", "--output", str(folder))
    assert code == 0, err
    assert ("Loading the libraries ..." if "libraries ..." in out else "Loading the libraries …") in out
    assert out.count("before  a") == 3 and out.count("\\ud800") >= 3
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert report["scores"]["first"][0]["before"] == QUESTION


def test_preflight_prints_its_table(printed, monkeypatch):
    monkeypatch.setattr(doctor, "examine", lambda: doctor.Report([("Python", QUESTION)]))
    monkeypatch.setattr(preflight, "differences", lambda name: [QUESTION])
    monkeypatch.setattr(pytest, "main", lambda *args, **options: 0)
    code, out, err = printed("preflight", "1")
    assert (code, err) == (1, "")
    assert ("[!] 01_memory_maths" if printed.plain else "✗ 01_memory_maths") in out and "not ready" in out


@pytest.mark.parametrize("encoding", ["ascii", "cp1252:strict", "latin-1"])
def test_it_holds_for_a_process_with_that_encoding(encoding):
    command = [sys.executable, "-m", "qlora_helpers", "doctor", "--error", "CUDA out of memory"]
    done = subprocess.run(command, env=os.environ | {"PYTHONIOENCODING": encoding}, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert "out of memory" in done.stdout.decode(encoding.partition(":")[0])


def test_what_a_user_has_chosen_for_other_characters_is_kept(monkeypatch, tmp_path):
    with (tmp_path / "out").open("w", encoding="ascii", errors="replace") as out:
        monkeypatch.setattr(sys, "stdout", out)
        main(["doctor", "--error", "✓ CUDA out of memory"])
        assert out.errors == "replace"
