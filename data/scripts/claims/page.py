"""The claims of the three articles that started this course, each with a verdict and its proof.

    python -m data.scripts.claims            # compute every row that can be computed, name disagreements, write CLAIMS.md
    python -m data.scripts.claims --check    # the same, but write nothing

The table is `data/claims.csv`. For each row that can be computed, a function in `size.py`, `formats.py`,
`libraries.py`, `quality.py` or `runs.py` finds the value and the verdict without reading the row; the rules for
verdicts are in `rules.py`. If the two disagree, the row is wrong, or the world has changed.
"""

import argparse
import csv
import os
import re
import sys
from collections import Counter
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs the Hub
os.environ.setdefault("OMP_NUM_THREADS", "1")

from data.scripts import ROOT
from data.scripts.claims import formats as claims_of_formats
from data.scripts.claims import libraries as claims_of_libraries
from data.scripts.claims import quality as claims_of_quality
from data.scripts.claims import runs as claims_of_runs
from data.scripts.claims import size as claims_of_size
from data.scripts.claims.rules import COMPUTED, NEAR, VERDICTS, Finding
from data.scripts.make.qlora_numbers import numbers_in

# each registers its functions
JUDGES = (claims_of_size, claims_of_formats, claims_of_libraries, claims_of_runs, claims_of_quality)
TABLE = ROOT / "data" / "claims.csv"
PAGE = ROOT / "CLAIMS.md"
LESSONS = ROOT / "notebooks" / "source"
CITED = "cited only"

ARTICLES = {
    "A": (
        "The first article",
        "An article on QLoRA from a series on fine-tuning; our copy has no author and no date. It begins with \"The Problem: "
        "Big Models, Small GPUs\".",
        "It explains QLoRA's three ideas on one page and goes straight to code. Its table of cards is cautious: what it says "
        "fits does fit. Its printed outputs and its figures for training memory need the most care, and the code was written "
        "for libraries from 2023 and 2024.",
    ),
    "B": (
        "The second article",
        '"QLoRA Internals: Fine-Tuning 70B Models on a Single Consumer GPU" by Goh Ling Yong; no date.',
        "It goes deeper than most: it gives a reason for each option, and what it says about NF4, bfloat16, LoRA's scaling "
        "and adapters that share a base is mostly right. Its title is not.",
    ),
    "C": (
        "The third article",
        '"QLoRA: Fine-Tune a Large Language Model on Your GPU" by Benjamin Marie, The Kaitchup, 30 May 2023, updated 25 March '
        "2024. We have not read the part for subscribers.",
        "Written a week after the paper, it gets sizes right: which model fits which card, and how much disk space and main "
        "memory it needs. Its sentences about NF4 and paging follow the paper only loosely.",
    ),
}  # fmt: skip

MEANING = {
    "right": "true as written; a number agrees to half a unit of its last digit",
    "rounded": f"close enough: a number within {100 * NEAR:.0f} %, or a sentence that is true but incomplete",
    "outdated": "written for an older version: today's library refuses it, warns that it will be removed, or can do more",
    "wrong": "not true",
    "depends": "true in one setting and not in another",
}


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        id: article and line, and a number if the line has several claims.
        article, line: where the claim is.
        claim: in our words, or a short quotation.
        verdict: one of `rules.VERDICTS`.
        value_claimed, value: the article's number and the true one, with units; empty if there is none.
        statement: what is right.
        source: where the statement comes from.
        proof: lesson cells and tests, joined by " | ", or "cited only".
        computed: the name of the function that computes value and verdict; empty if none can.
    """

    id: str
    article: str
    line: str
    claim: str
    verdict: str
    value_claimed: str
    value: str
    statement: str
    source: str
    proof: str
    computed: str


def read_table(path: Path = TABLE) -> list[Row]:
    """The rows of the table.

    Raises:
        ValueError: the columns are not those of `Row`, or a line has more or fewer columns.
    """
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        columns = [field.name for field in fields(Row)]
        if reader.fieldnames != columns:
            raise ValueError(f"{path.name} has the columns {reader.fieldnames}; they should be {columns}")
        rows = []
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(
                    f"{path.name}, line {reader.line_num}: not {len(columns)} columns; is a quotation mark missing?"
                )
            rows.append(Row(**row))
        return rows


# Numbers in a statement that describe the setting, not the result.
_SETTINGS = re.compile(
    r"`[^`]*`"
    r"|\brank \d+(?: and \d+| in place of \d+)?|\b[Bb]atch of \d+|\b\d+ x [\d,]+ tokens|\b[\d,]+ tokens\b|\bone sequence of \d+"
    r"|\b(?:A100|RTX) \d+(?: GB)?|\bTable \d|\bTables \d and \d|\bLlama[- ]\d|\btransformers [\d.]+|\b70 billion|\bLlama-\d\.\d"
    r"|\brank \d+ in place of \d+|\bbetween rank \d+ and \d+|\bfloat(?:16|32)|\bby line \d+"
)


def numbers_of(statement: str) -> set[str]:
    """The numbers in a statement, without those in settings and names."""
    return set(numbers_in(_SETTINGS.sub("", statement)))


def disagreements(row: Row, finding: Finding) -> list[str]:
    """How a row differs from what was computed; empty if it does not."""
    faults = []
    for column, computed in (
        ("verdict", finding.verdict),
        ("value_claimed", finding.claimed),
        ("value", finding.value),
    ):
        if getattr(row, column) != computed:
            faults.append(
                f"{row.id}: {column} is {getattr(row, column)!r} in the table, and {computed!r} by {row.computed}()"
            )
    known = set(numbers_in(" ; ".join((finding.value, finding.claimed, *finding.shown))))
    for number in sorted(numbers_of(row.statement) - known):
        faults.append(f"{row.id}: the statement says {number}, which {row.computed}() does not give: {sorted(known)}")
    return faults


@cache
def code_cells(lesson: str) -> tuple[str, ...]:
    """The code cells of a lesson's source.

    Raises:
        FileNotFoundError: there is no lesson with this number.
    """
    paths = list(LESSONS.glob(f"{lesson}_*.py"))
    if len(paths) != 1:
        raise FileNotFoundError(f"lesson {lesson}: there are {len(paths)} files {lesson}_*.py in {LESSONS.name}/")
    cells = re.split(r"^# %%", paths[0].read_text(encoding="utf-8"), flags=re.M)[1:]
    return tuple(cell for cell in cells if not cell.startswith(" [markdown]"))


def fault_in_proof(proof: str) -> str:
    """Why a proof is not valid: its lesson has no such cell, or there is no such test; empty if it is valid."""
    if proof == CITED:
        return ""
    if found := re.fullmatch(r"lesson (\d\d): (.+)", proof):
        lesson, snippet = found.groups()
        cells = [source for source in code_cells(lesson) if snippet in source]
        return "" if len(cells) == 1 else f"{len(cells)} code cells of lesson {lesson} have {snippet!r}; it must be one"
    if found := re.fullmatch(r"(tests/[\w/]+\.py)::(\w+)", proof):
        path, test = found.groups()
        text = (ROOT / path).read_text(encoding="utf-8") if (ROOT / path).exists() else ""
        return "" if re.search(rf"^def {test}\(", text, re.M) else f"{path} has no test {test}"
    return f"{proof!r} is neither 'lesson NN: code', nor 'tests/file.py::test', nor {CITED!r}"


def faults_in(rows: list[Row]) -> list[str]:
    """Compute every row that can be computed, and name everything that does not agree."""
    faults = []
    for row in rows:
        function = COMPUTED.get(row.id)
        if row.computed != (function.__name__ if function else ""):
            name = function.__name__ if function else "nothing"
            faults.append(f"{row.id}: computed is {row.computed!r} in the table, and {name} is registered")
        elif function:
            faults += disagreements(row, function())
        for proof in row.proof.split(" | "):
            if fault := fault_in_proof(proof):
                faults.append(f"{row.id}: {fault}")
    faults += [
        f"{key}: computed by {COMPUTED[key].__name__}(), and not in the table"
        for key in COMPUTED.keys() - {r.id for r in rows}
    ]
    return faults


# ---- the page


def how_proven(row: Row) -> str:
    """The kind of a row's proof: a lesson shows it, or else a test computes it, or else it is cited."""
    if row.proof == CITED:
        return CITED
    return "a lesson shows it" if "lesson" in row.proof else "a test computes it"


KINDS = ("a lesson shows it", "a test computes it", CITED)


def _linked(proof: str) -> str:
    if proof == CITED:
        return "*cited only*"
    if proof.startswith("lesson"):
        lesson, snippet = proof.removeprefix("lesson ").split(": ", 1)
        (path,) = LESSONS.glob(f"{lesson}_*.py")
        return f"[lesson {int(lesson)}](notebooks/{path.stem}.ipynb), cell with ``{snippet}``"
    return f"[test]({proof.partition('::')[0]})"


def _proofs(row: Row) -> str:
    """A row's proofs with their links, and the function that computes it."""
    proofs = "; ".join(map(_linked, row.proof.split(" | ")))
    if row.computed:
        proofs += f"; [`{row.computed}`]({COMPUTED[row.id].__module__.replace('.', '/')}.py)"
    return proofs


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _values(row: Row) -> str:
    if row.value_claimed and row.value and row.value_claimed != row.value:
        return f"{row.value_claimed} → **{row.value}**"
    return f"**{row.value}**" if row.value else row.value_claimed


def _counts(rows: list[Row], columns: tuple[str, ...], key) -> list[str]:
    """A table of counts: one line for each article, and one for all."""
    lines = ["| | claims | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    groups = {ARTICLES[letter][0].lower(): [row for row in rows if row.article == letter] for letter in ARTICLES}
    for name, group in (groups | {"all": rows}).items():
        counts = Counter(map(key, group))
        lines.append(f"| {name} | {len(group)} | " + " | ".join(str(counts[column]) for column in columns) + " |")
    return lines


def page(rows: list[Row]) -> str:
    """CLAIMS.md."""
    computed = sum(bool(row.computed) for row in rows)
    lines = [
        "# What the articles say, and what is right",
        "",
        "<!-- made by data/scripts/claims/page.py from data/claims.csv: edit these, and run it again -->",
        "",
        "This course began with three articles about QLoRA. They got many readers started, and most of what they say is right. "
        f"Here is each of their claims that can be checked, {len(rows)} in all, with a verdict and its proof.",
        "",
        *(f"- **{verdict}**: {meaning}." for verdict, meaning in MEANING.items()),
        "",
        *_counts(rows, VERDICTS, lambda row: row.verdict),
        "",
        f"{computed} of the {len(rows)} rows are computed by a function that does not read the row: from the shapes of models, "
        "from runs measured on a GPU, from the installed libraries, or by running the article's own code. A test compares each "
        "verdict and its numbers with the table. Many are also shown in a lesson. What we could only look up is marked *cited "
        "only*.",
        "",
        *_counts(rows, KINDS, how_proven),
        "",
        "\"Predicted\" means by the course's memory predictor; [lesson 5](notebooks/05_will_it_fit.ipynb) shows its errors. "
        "The versions are those in `requirements.txt`. GB are powers of ten, GiB powers of two.",
        "",
    ]  # fmt: skip
    for letter, (name, reference, fairness) in ARTICLES.items():
        lines += [f"## {name}", "", reference, "", fairness, ""]
        lines += [
            "| line | claim | verdict | value | what is right | source | proof |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in (row for row in rows if row.article == letter):
            texts = (row.claim, row.verdict, _values(row), row.statement, row.source, _proofs(row))
            lines.append(f'| <a id="{row.id}"></a>{row.line} | ' + " | ".join(map(_cell, texts)) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="report only, write nothing")
    check_only = parser.parse_args().check
    rows = read_table()
    faults = faults_in(rows)
    text = page(rows)
    stale = not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text
    if stale and check_only:
        faults.append(f"{PAGE.name} is not what the table gives: run python -m data.scripts.claims")
    elif stale:
        PAGE.write_text(text, encoding="utf-8")
    print(*faults, sep="\n", end="\n" if faults else "")
    print(
        f"{len(rows)} claims, {sum(bool(row.computed) for row in rows)} of them computed, {len(faults)} disagreements"
    )
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
