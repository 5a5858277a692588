"""The table of claims: each computed row agrees with its function, and each proof exists."""

import re
from dataclasses import replace

import pytest

from data.scripts.claims import page as claims
from data.scripts.claims.rules import COMPUTED, VERDICTS, Finding, by_setting, claim, number, parts, still_taken

ROWS = claims.read_table()
BY_COMPUTING = [row for row in ROWS if row.computed]

# What must be covered: the lines of each article that claim something checkable.
LINES = {
    "A": [2, 12, 13, 14, 15, 16, 20, 21, 30, 39, 40, 41, 43, 68, 86, 87, 91, 92, 93, 99, 100, 101, 114, 116, 117, 118, 130,
          133, 142, 146, 147, 148, 155, 158, 159, 164, 165, 166, 167, 172, 186, 189, 190, 191, 192, 195, 196, 199, 202, 204],
    "B": [1, 9, 13, 15, 37, 39, 41, 43, 52, 63, 65, 67, 73, 90, 137, 142, 147, 159, 170, 178, 180, 181, 186, 190, 191, 199,
          200, 201, 202, 210, 214, 216, 218, 220, 222, 224, 233, 234, 235, 236, 237, 242, 251, 253, 255, 257, 265, 283, 285,
          290, 293, 299, 305],
    "C": [31, 33, 37, 39, 47, 49, 51, 55, 57, 59, 61, 65, 78, 82, 86, 90],
}  # fmt: skip


@pytest.mark.parametrize("row", BY_COMPUTING, ids=lambda row: row.id)
def test_a_row_is_what_is_computed(row):
    assert row.computed == COMPUTED[row.id].__name__
    assert claims.disagreements(row, COMPUTED[row.id]()) == []


def test_every_function_has_its_row():
    assert {row.id for row in BY_COMPUTING} == COMPUTED.keys()


def other_digit(text: str) -> str:
    """The text with the last of its digits changed."""
    return re.sub(r"\d(?=\D*$)", lambda digit: str((int(digit[0]) + 1) % 10), text)


def test_every_changed_digit_and_verdict_of_a_computed_row_is_noticed():
    for row in BY_COMPUTING:
        finding = COMPUTED[row.id]()
        changes = [replace(row, verdict=verdict) for verdict in VERDICTS if verdict != row.verdict]
        changes += [
            replace(row, **{column: other_digit(getattr(row, column))})
            for column in ("value_claimed", "value")
            if re.search(r"\d", getattr(row, column))
        ]
        for text in claims.numbers_of(row.statement):
            changes.append(replace(row, statement=row.statement.replace(text, "7.654321")))
        unnoticed = [changed for changed in changes if not claims.disagreements(changed, finding)]
        assert not unnoticed, unnoticed


def test_a_statement_s_last_digit_counts():
    row = next(row for row in BY_COMPUTING if row.id == "A16.1")
    changed = replace(row, statement=row.statement.replace("36.80", "36.81"))
    assert "the statement says 36.81" in claims.disagreements(changed, COMPUTED["A16.1"]())[0]


def test_every_proof_exists():
    faults = {row.id: claims.fault_in_proof(proof) for row in ROWS for proof in row.proof.split(" | ")}
    assert not {key: fault for key, fault in faults.items() if fault}


@pytest.mark.parametrize(
    ("proof", "fault"),
    [
        ('lesson 01: bytes_each = {"float32": 5', "0 code cells of lesson 01"),
        ("lesson 01: You will", "0 code cells"),  # only in a text cell
        ("lesson 02: check(", "code cells of lesson 02 have 'check('; it must be one"),
        ("tests/data/test_claims.py::test_nothing", "has no test test_nothing"),
        ("tests/test_no_such_file.py::test_it", "has no test test_it"),
        ("by thought", "is neither"),
    ],
)
def test_a_proof_that_is_none_is_named(proof, fault):
    assert fault in claims.fault_in_proof(proof)


def test_a_proof_in_a_lesson_that_does_not_exist_is_an_error():
    with pytest.raises(FileNotFoundError, match="lesson 77: there are 0 files"):
        claims.fault_in_proof("lesson 77: anything")


def test_what_is_only_cited_is_called_so_and_what_is_computed_is_not():
    for row in ROWS:
        assert (row.proof == claims.CITED) == (not row.computed), row.id


def test_the_columns_are_filled():
    for row in ROWS:
        assert row.verdict in VERDICTS, row.id
        assert all((row.id, row.claim, row.statement, row.source, row.proof)), row.id
        assert re.fullmatch(rf"{row.article}{row.line}\.\d", row.id) and row.article in claims.ARTICLES, row.id
        assert row.statement.rstrip('"').endswith("."), row.id


def test_every_id_is_there_once_and_in_order():
    ids = [row.id for row in ROWS]
    assert len(set(ids)) == len(ids)
    assert ids == sorted(ids, key=lambda key: (key[0], *map(int, key[1:].split("."))))


def test_quotations_are_short():
    quotations = [(row.id, quoted) for row in ROWS for quoted in re.findall(r'"([^"]*)"', row.claim)]
    assert len(quotations) > 20
    assert [(key, quoted) for key, quoted in quotations if len(quoted.split()) > 12] == []


@pytest.mark.parametrize("article", LINES)
def test_every_line_that_claims_something_is_covered(article):
    covered = {int(row.line) for row in ROWS if row.article == article}
    assert not set(LINES[article]) - covered


def test_most_rows_are_computed():
    assert len(ROWS) >= 239
    assert len(BY_COMPUTING) >= 0.92 * len(ROWS)


def test_every_lesson_proves_a_claim():
    proving = {proof.partition(":")[0] for row in ROWS for proof in row.proof.split(" | ")}
    lessons = {f"lesson {path.name[:2]}" for path in claims.LESSONS.glob("[0-9][0-9]_*.py")}
    # none says how to train on data of one's own, or shows it; none compares variants of LoRA
    of_no_article = {"lesson 10", "lesson 13"}
    assert of_no_article < lessons and lessons - proving == of_no_article


def test_the_page_is_up_to_date_and_the_readme_links_to_it():
    assert claims.PAGE.read_text(encoding="utf-8") == claims.page(ROWS), "run: python -m data.scripts.claims"
    readme = " ".join((claims.ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"make {len(ROWS)} claims that can be checked; [CLAIMS.md](CLAIMS.md)" in readme


def test_a_table_with_other_columns_is_refused(tmp_path):
    (tmp_path / "claims.csv").write_text("id,claim\nA1.1,x\n")
    with pytest.raises(ValueError, match=r"has the columns \['id', 'claim'\]; they should be"):
        claims.read_table(tmp_path / "claims.csv")


@pytest.mark.parametrize("change", [("It is", "It, is"), (",s,p,", ",s,")])
def test_a_line_with_more_or_fewer_columns_is_named(tmp_path, change):
    header = claims.TABLE.read_text(encoding="utf-8").partition("\n")[0]
    line = "A1.1,A,1,c,right,,3 GB,It is.,s,p,f"
    (tmp_path / "claims.csv").write_text(f"{header}\n{line.replace(*change)}\n")
    with pytest.raises(ValueError, match=r"claims\.csv, line 2: not 11 columns"):
        claims.read_table(tmp_path / "claims.csv")


def test_faults_are_found_in_a_table(monkeypatch):
    monkeypatch.setattr(
        claims, "COMPUTED", {"A1.1": lambda: Finding("right", "3 GB"), "A3.1": lambda: Finding("right")}
    )
    row = claims.Row("A1.1", "A", "1", "c", "wrong", "", "3 GB", "It is 4.5 GB.", "s", "by thought", "<lambda>")
    found = "\n".join(claims.faults_in([row, replace(row, id="A2.1", computed="f", proof=claims.CITED)]))
    for fault in (
        "A1.1: verdict is 'wrong' in the table, and 'right' by <lambda>()",
        "A1.1: the statement says 4.5",
        "A1.1: 'by thought' is neither",
        "A2.1: computed is 'f' in the table, and nothing is registered",
        "A3.1: computed by <lambda>(), and not in the table",
    ):
        assert fault in found
    assert "value is" not in found


@pytest.mark.parametrize(
    ("claimed", "value", "verdict"),
    [
        ("35", 35.49, "right"),
        ("35", 36.7, "rounded"),
        ("35", 39.52, "wrong"),
        ("0.34", 0.3449, "right"),
        ("0.34", 0.373047, "wrong"),
        ("41,943,040", 41_943_040, "right"),
        ("41,943,040", 41_943_041, "rounded"),
        ("780", 819.0, "rounded"),
        ("780", 822.0, "wrong"),
    ],
)
def test_the_rule_for_numbers(claimed, value, verdict):
    assert number(claimed, value).verdict == verdict


def test_the_rules_for_sentences():
    assert [by_setting(*outcomes).verdict for outcomes in ((True, True), (True, False), (False, False))] == [
        "right", "depends", "wrong",
    ]  # fmt: skip
    assert [parts("ab", true).verdict for true in ("ab", "abc", "a")] == ["right", "rounded", "wrong"]
    with pytest.raises(ValueError, match="at least one setting"):
        by_setting()


def test_a_refusal_for_another_reason_is_no_finding():
    def needs_more(keyword=None):
        raise ValueError("something else")

    assert still_taken(lambda keyword=None: None, "keyword", keyword=1).verdict == "right"
    assert still_taken(lambda: None, "keyword", keyword=1).verdict == "outdated"
    with pytest.raises(RuntimeError, match="expected a TypeError about it, and got ValueError: something else"):
        still_taken(needs_more, "keyword", keyword=1)


def test_a_claim_has_one_judge():
    with pytest.raises(ValueError, match=r"claim A16\.1 is judged by four_bit_llama_3_70b and by another"):

        @claim("A16.1")
        def another():
            return Finding("right")


def test_the_command_only_reports_with_check(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(claims, "PAGE", tmp_path / "CLAIMS.md")
    for arguments, code, written in ((["--check"], 1, False), ([], 0, True), (["--check"], 0, True)):
        monkeypatch.setattr("sys.argv", ["claims", *arguments])
        with pytest.raises(SystemExit) as ended:
            claims.main()
        assert (ended.value.code, (tmp_path / "CLAIMS.md").exists()) == (code, written)
    assert f"{len(ROWS)} claims, {len(BY_COMPUTING)} of them computed, 0 disagreements" in capsys.readouterr().out
