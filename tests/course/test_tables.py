"""A table's words stand at the left of their column and its numbers at the right, each written as its format says."""

import fractions

import numpy as np
import pytest
import torch

from qlora_helpers.course.tables import as_table, show_table


def test_words_stand_left_and_numbers_right(capsys):
    rows = [("NF4", 0.09201, 0.983, 64), ("INT4 symmetric", 0.1, 1, 1024)]
    show_table(["format", "error", "recall", "block"], rows, ["", ".4f", ".1%", ",d"])
    assert capsys.readouterr().out == (
        "format           error  recall  block\n"
        "--------------  ------  ------  -----\n"
        "NF4             0.0920   98.3%     64\n"
        "INT4 symmetric  0.1000  100.0%  1,024\n\n"
    )  # fmt: skip


def test_no_line_ends_in_blanks_and_headings_may_be_wider():
    assert as_table(["a number", "who"], [(1, "x"), (22, "long")]) == (
        "a number  who\n--------  ----\n       1  x\n      22  long"
    )


def test_without_formats_values_are_shown_as_they_are():
    values = [
        0.5,
        12,
        fractions.Fraction(1, 3),
        "text",
        None,
        True,
        np.float64(0.25),
        np.int64(7),
        torch.tensor(3),
        torch.tensor([2.5]),
    ]
    written = [line.strip() for line in as_table(["v"], [[value] for value in values]).splitlines()]
    assert written == ["v", "----", "0.5", "12", "1/3", "text", "–", "True", "0.25", "7", "3", "2.5"]


def test_texts_and_nothing_stand_in_a_column_of_numbers():
    rows = [("T4", 5.25), ("V100", "does not fit"), ("L4", None)]
    assert as_table(["GPU", "GiB"], rows, ["", ".1f"]).splitlines() == [
        "GPU            GiB",
        "----  ------------",
        "T4             5.2",
        "V100  does not fit",
        "L4               –",
    ]


def test_rows_may_come_one_by_one_and_be_none():
    assert as_table(["n"], ([n] for n in range(2))) == "n\n-\n0\n1"
    assert as_table(["n", "square"], []) == "n  square\n-  ------"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((["a", "b"], [(1, 2), (1,)]), r"rows\[1\]=\[1\]: must have one value for each of 2 columns"),
        ((["a"], [(1, 2)]), r"rows\[0\]=\[1, 2\]: must have one value"),
        (([], []), r"headings=\[\]: must be a list with a name for each column"),
        (("ab", []), "headings='ab': must be a list"),
        ((["a"], [(1,)], ["", ""]), r"formats=\['', ''\]: must have one entry for each of 1 columns"),
        ((["a"], [(1,)], "d"), "formats='d': must have one entry"),
        ((["error"], [(0.5,)], [",d"]), "column 'error': 0.5 cannot be written as ',d'"),
        ((["error"], [(fractions.Fraction(1, 2),)], ["x"]), "column 'error': .* cannot be written as 'x'"),
        ((["a"], [(torch.ones(2),)]), r"a value has the shape \(2,\): a table takes one number in each place"),
        ((["a"], [(np.ones((2, 1)),)]), r"a value has the shape \(2, 1\)"),
    ],
)
def test_what_gives_no_table_is_refused(arguments, told):
    with pytest.raises(ValueError, match=f"^{told}"):
        as_table(*arguments)
