"""A base and what was trained on it, side by side."""

import json
import math
from html.parser import HTMLParser

import pytest
from IPython.lib.pretty import pretty

from qlora_helpers.evaluation import Scores, compare
from qlora_helpers.evaluation.scores import ScoredAnswer


def chats_of(*pairs):
    return [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in pairs]


def row(text="x", short=True, exact=False, overlap=0.0, loss=10.0, tokens=5, ended=True):
    return ScoredAnswer(text, ended, short, exact, overlap, loss, tokens)


CHATS = chats_of(*((f"question {n}", f"right {n}") for n in range(1, 9)))
BEFORE = Scores([row(f"base {n}", loss=10.0 + n % 3, ended=False) for n in range(8)], 1.0)
AFTER = Scores(
    [
        row(f"tuned {n}", exact=n < 6, overlap=100.0 if n < 6 else 30.0 + n, loss=2.0 + n % 3)
        for n in range(8)
    ],
    1.0,
)  # fmt: skip


def test_the_changes_are_paired_row_by_row():
    found = compare(BEFORE, AFTER, CHATS)
    assert found.loss_change.mean == pytest.approx(-8 / 5) and found.loss_change.half == pytest.approx(0, abs=1e-9)
    assert found.exact_match_chance == pytest.approx(2 / 2**6)  # six of six changes are gains
    assert found.overlap_change is None
    lines = {line[0]: line[1:] for line in found.lines()}
    assert (
        lines["exact match"][:2] == ("0.0%", "75.0% ± 15.3%")
        and "more than chance (p = 0.031)" in lines["exact match"][2]
    )
    assert lines["cut off"][:2] == ("8", "0") and lines["loss"][0].startswith("2.175 ± ")
    same = {line[0]: line[1:] for line in compare(BEFORE, BEFORE, CHATS).lines()}
    assert "may be chance" in same["loss"][2] and same["exact match"][2].endswith("none became right or wrong")


def test_long_answers_have_an_overlap_instead():
    before = Scores([row(short=False, overlap=20.0 + n) for n in range(4)], 1.0)
    after = Scores([row(short=False, overlap=50.0 + 2 * n) for n in range(4)], 1.0)
    found = compare(before, after, CHATS[:4])
    assert found.exact_match_chance is None and [line[0] for line in found.lines()] == [
        "loss",
        "overlap (chrF)",
        "cut off",
    ]
    assert found.overlap_change.mean == pytest.approx(31.5)
    assert "31.5 ± 2.1 (95 % interval)" in str(found).replace("\n", " ")


def test_the_first_and_of_the_others_the_worst_are_shown():
    found = compare(BEFORE, AFTER, CHATS, first=2, worst=5)
    assert [example.number for example in found.first] == [1, 2]
    assert [example.number for example in found.worst] == [7, 8]  # the others are right
    assert compare(BEFORE, AFTER, CHATS, first=7, worst=5).worst[0].number == 8
    assert compare(BEFORE, AFTER, CHATS, first=0, worst=1).worst[0].number == 7
    same = Scores([row(loss=n) for n in (1.0, 3.0, 2.0)], 1.0)
    assert [example.number for example in compare(same, same, CHATS[:3], 0, 3).worst] == [2, 3, 1]  # then by the loss
    text = str(found)
    for said in ("asked   question 1", "right   right 1", "before  base 0", "after   tuned 0", "after   tuned 7"):
        assert said in text
    assert "question 3" not in text


class Cells(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.texts = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.texts.append(data)


def test_texts_of_others_break_neither_the_terminal_nor_the_notebook():
    text = "<script>x</script> \x1b[2J\u202e $a$ & " + "word " * 300
    chats = chats_of((text, text))
    scores = Scores([row(text)], 1.0)
    found = compare(scores, scores, chats)
    assert all(len(line) <= 100 for line in str(found).splitlines())
    assert "\x1b" not in str(found) and "\\x1b[2J\\u202e" in str(found) and "(1,5" in str(found)
    cells = Cells()
    cells.feed(found._repr_html_())
    assert "script" not in cells.tags and set(cells.tags) == {"div", "table", "tr", "th", "td", "p"}
    shown = [one for one in cells.texts if one.startswith("<script>")]
    assert len(shown) == 4 and len(set(shown)) == 1 and "\x1b" not in shown[0] and len(shown[0]) < 650
    assert "class='mathjax_ignore" in found._repr_html_()
    assert found._repr_html_().count("text-align:left") == sum(cells.tags.count(kind) for kind in ("td", "th"))
    assert pretty(found) == str(found)


def test_a_single_chat_has_no_interval_and_a_broken_model_is_json():
    one = Scores([row(loss=math.nan)], 1.0)
    found = compare(one, one, CHATS[:1])
    assert found.loss_change is None and "no interval from one alone" in str(found).replace("\n", " ").replace("  ", "")
    two = Scores([row(loss=math.nan), row()], 1.0)
    found = json.loads(json.dumps(compare(two, two, CHATS[:2]).as_dict(), allow_nan=False))
    assert found["after"]["loss"] is None and found["loss_change"] == [None, None]
    assert found["first"][0]["question"] == "question 1" and found["before"]["rows"] == 2


def test_scores_of_other_chats_are_refused():
    with pytest.raises(ValueError, match=r"^after has 7 rows for 8 chats"):
        compare(BEFORE, Scores(AFTER.rows[:7], 1.0), CHATS)
    with pytest.raises(ValueError, match=r"^before and after count other tokens"):
        compare(BEFORE, Scores([row(tokens=6)] * 8, 1.0), CHATS)
    with pytest.raises(ValueError, match=r"^worst=-1: must be a whole number, 0 or more"):
        compare(BEFORE, AFTER, CHATS, worst=-1)
