"""The mutants of `make mutants`: how they are drawn and run, and the list that was kept."""

import re
from collections import Counter

import pytest

from tests import ROOT
from tests.support import mutants

SOURCE = """
LIMIT: int | None = 3


def double(x: int | None = 2 | 1, *rest: int | str) -> int | None:
    return x * LIMIT
"""


def test_the_list_has_its_command_its_seed_and_a_word_on_each_survivor():
    head = [line for line in mutants.LIST.read_text(encoding="utf-8").splitlines() if line.startswith("# ")]
    assert re.fullmatch(rf"# make mutants: cosmic-ray \S+, seed {mutants.SEED}, {mutants.COUNT} mutants", head[0])
    rows = mutants.read_list()
    assert len(rows) == mutants.COUNT and len({mutants.identity(row) for row in rows}) == mutants.COUNT
    survived = [row for row in rows if row["outcome"] == "survived"]
    assert [mutants.identity(row) for row in survived if not row["note"]] == []
    assert len(survived) <= mutants.COUNT // 10
    assert f"killed: {1 - len(survived) / len(rows):.1%};" in head[1]


def test_the_readme_says_how_many_were_noticed():
    count = Counter(row["outcome"] == "survived" for row in mutants.read_list())
    said = f"Of {count.total()} small changes of the helpers their tests notice {count[False]}"
    assert said in " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())


def test_the_tests_of_a_module_lie_in_the_same_room():
    assert mutants.own_test("qlora_helpers/memory/step.py") == "tests/memory/test_step.py"
    assert mutants.own_test("qlora_helpers/units.py") == "tests/test_units.py"
    assert mutants.own_test("qlora_helpers/__main__.py") == "tests/test_main.py"


def test_every_place_but_types_can_be_changed_and_other_lines_do_not_matter():
    pytest.importorskip("cosmic_ray", reason="make mutants installs it")
    from cosmic_ray.operators.provider import OperatorProvider

    names = ("NumberReplacer", "ReplaceBinaryOperator_BitOr_Add", "ReplaceBinaryOperator_Mul_Add")
    operators = {name: OperatorProvider()[name]() for name in names}
    found = list(mutants.places(SOURCE, operators))
    assert [(line, family, [name for name, _ in variants]) for (line, _), family, variants in found] == [
        (2, "NumberReplacer", ["NumberReplacer"] * 2),
        (5, "NumberReplacer", ["NumberReplacer"] * 2),
        (5, "ReplaceBinaryOperator", ["ReplaceBinaryOperator_BitOr_Add"]),
        (5, "NumberReplacer", ["NumberReplacer"] * 2),
        (6, "ReplaceBinaryOperator", ["ReplaceBinaryOperator_Mul_Add"]),
    ]


@pytest.mark.parametrize(
    ("body", "outcome"),
    [
        ("from qlora_helpers.one import ONE; assert ONE == 1", {"code": 0, "failed": ""}),
        ("from qlora_helpers.one import ONE; assert ONE == 2", {"code": 1, "failed": "tests/test_one.py::test_it"}),
        ("import time; time.sleep(60)", None),
    ],
)
def test_tests_run_in_a_fork_with_the_copy_s_own_package(body, outcome, tmp_path):
    copy = tmp_path / "copy"
    for name, text in {
        "qlora_helpers/__init__.py": "", "qlora_helpers/one.py": "ONE = 1\n", "conftest.py": "",
        "tests/__init__.py": "", "tests/test_one.py": f"def test_it():\n    {body}\n",
    }.items():  # fmt: skip
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text(text)
    ran = mutants.run_tests(copy, ["tests/test_one.py"], 30 if outcome else 1)
    assert {key: ran.get(key) for key in outcome or ("code",)} == (outcome or {"code": None})
    assert "qlora_helpers.one" in ran.get("imported", []) or body.startswith("import time")


def test_which_tests_are_quick_does_not_depend_on_other_work(tmp_path):
    (tmp_path / "tests").mkdir()
    usual = {}
    for name, seconds, processor in (("one", 1, 1), ("waits", 60, 2), ("works", 60, 60)):
        (tmp_path / "tests" / f"test_{name}.py").write_text("def test_it(): pass\n")
        row = {"imported": ["qlora_helpers.one"], "seconds": seconds, "processor": processor}
        usual[f"tests/test_{name}.py"] = row
    assert mutants.others("qlora_helpers/one.py", tmp_path, usual) == ["tests/test_waits.py"]


def test_the_processor_time_of_tests_is_theirs(tmp_path):
    (tmp_path / "conftest.py").write_text("")
    (tmp_path / "test_it.py").write_text("import time\ndef test_it(): time.sleep(3)\n")
    ran = mutants.run_tests(tmp_path, ["test_it.py"], 60)
    assert ran["code"] == 0 and 0 < ran["processor"] < ran["seconds"] - 2
