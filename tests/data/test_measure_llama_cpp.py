"""What llama.cpp itself said to exported files, and that the README says the same."""

import json
import sys

from data.scripts.measure import llama_cpp
from qlora_helpers.adapters.gguf_export import KINDS
from qlora_helpers.paths import data_path
from tests import ROOT


def test_llama_cpp_gave_every_answer_and_the_readme_says_of_how_many_questions():
    record = json.loads(data_path("measured", "llama_cpp.json").read_text(encoding="utf-8"))
    assert [row["kind"] for row in record["rows"]] == list(KINDS)
    for row in record["rows"]:
        assert row["same_tokens"] == row["same_answers"] == row["questions"] == llama_cpp.QUESTIONS
    said = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"all {llama_cpp.QUESTIONS} questions" in said and f"xllamacpp {record['xllamacpp']}" in said


def test_the_script_compares_tokens_and_answers(tmp_path, monkeypatch):
    """With another program in llama.cpp's place, which gets one answer of two right, and no tokens."""
    monkeypatch.setattr(llama_cpp, "QUESTIONS", 2)
    monkeypatch.setattr(llama_cpp, "KINDS", ["f16"])
    right = {}
    said = llama_cpp.said
    monkeypatch.setattr(llama_cpp, "said", lambda *args, **options: right.setdefault("said", said(*args, **options)))
    program = (
        "import json, sys\n"
        "path, chats, tokens = json.load(sys.stdin)\n"
        "assert open(path, 'rb').read(4) == b'GGUF' and tokens == 40\n"
        "print(json.dumps({'version': '0', 'rows': [[[1], ANSWER], [[1], 'no']]}))\n"
    )

    def asked(python, path, chats):
        monkeypatch.setattr(llama_cpp, "_ASK", program.replace("ANSWER", repr(right["said"].texts[0])))
        return real(python, path, chats)

    real = llama_cpp.asked
    monkeypatch.setattr(llama_cpp, "asked", asked)
    found = llama_cpp.measure(sys.executable, tmp_path)
    assert found == {
        "xllamacpp": "0",
        "rows": [{"kind": "f16", "questions": 2, "same_tokens": 0, "same_answers": 1}],
    }
