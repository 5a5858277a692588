"""The report of chat data: each figure against a count by hand, in a terminal, in a notebook and as JSON."""

import html
import html.parser
import io
import json
import sys

import pytest
from IPython.lib.pretty import pretty

from qlora_helpers.chats import lengths_of, read_chats, report_on, tokenized
from qlora_helpers.chats.report import MARKED, Bar
from qlora_helpers.models.loading import load_tokenizer
from qlora_helpers.paths import data_path
from tests.chats.made_up import CHATML, FAMILIES, IM, tokenizer_with

TOKENIZER = tokenizer_with(CHATML, IM)


def chat(*texts, system=""):
    messages = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant") * 4
    return messages + [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


NF4 = chat("What is NF4?", "A data type with sixteen values.")
LONG = chat("What is LoRA? " * 30, "Small matrices, " * 30, "Why?", "To save memory.")
CHATS = [
    NF4,
    chat("Is it exact?", "No."),
    chat("What is NF4?", "Four bits per weight."),
    NF4,
    LONG,
    chat("Who?", "Tim Dettmers.", system="Be short."),
]
LATER = [NF4, chat("What is NF4?", "Something else."), chat("Where?", "Here.")]


@pytest.fixture(scope="module")
def report():
    return report_on(CHATS, TOKENIZER, 60, LATER)


def test_rows_roles_and_turns_are_counted(report):
    assert (report.rows, report.validation_rows) == (6, 3)
    assert report.messages == {"user": 7, "assistant": 7, "system": 1}
    assert report.answers == {1: 5, 2: 1}
    assert "7 user, 7 assistant, 1 system" in str(report) and "5 rows with 1, 1 row with 2" in str(report)


def test_tokens_are_those_of_the_chat_template(report):
    lengths = sorted(lengths_of(CHATS, TOKENIZER))
    tokens = report.tokens
    assert (tokens.least, tokens.median, tokens.most) == (lengths[0], lengths[2], lengths[-1])
    assert tokens.most_of_95_percent == lengths[-1]
    for bar in tokens.bars:
        assert bar.rows == sum(bar.low <= length <= bar.high for length in lengths)
    assert sum(bar.rows for bar in tokens.bars) == 6 and 1 < len(tokens.bars) <= 11


def test_95_percent_of_the_rows_have_at_most_so_many_tokens():
    chats = [chat("a " * count, "b") for count in range(1, 101)]
    lengths = sorted(lengths_of(chats, TOKENIZER))
    tokens = report_on(chats, TOKENIZER).tokens
    assert (tokens.median, tokens.most_of_95_percent) == (lengths[49], lengths[94])
    assert [bar.high - bar.low + 1 for bar in tokens.bars] == [tokens.bars[0].high - tokens.bars[0].low + 1] * len(
        tokens.bars
    )


def test_rows_that_are_too_long_are_named_with_the_message_in_which_they_would_be_cut(report):
    (length,) = lengths_of([LONG], TOKENIZER)
    assert report.too_long == {5: length} and report.cut_in == {"what comes before answer 1": 1}
    said = f"1 row with more tokens than max_length=60 (row 5 with {length}); they would be cut in: what comes before answer 1 (1)"
    assert said in " ".join(str(report).split())
    assert f"1 row with more tokens than max_length=60 (row 5 with {length:,})" in " ".join(str(report).split())
    assert report.validation_too_long == 0
    assert report_on(CHATS, TOKENIZER, 60, [LONG]).validation_too_long == 1
    assert "no row has more tokens than max_length=999" in str(report_on(CHATS, TOKENIZER, 999))
    assert "max_length" not in str(report_on(CHATS, TOKENIZER))


def test_a_cut_at_any_place_is_in_the_message_to_which_the_token_belongs():
    (row,) = tokenized([LONG], TOKENIZER)
    seen, parts = [], ["what comes before answer 1", "answer 1", "what comes before answer 2", "answer 2"]
    for limit in range(1, len(row["input_ids"])):
        (place,) = report_on([LONG], TOKENIZER, limit).cut_in
        seen.append(place)
        assert ("before" not in place and "after" not in place) == bool(row["assistant_masks"][limit])
    assert list(dict.fromkeys(seen)) == [*parts, "what the template writes after the last answer"]


def test_repeated_rows_contradictions_and_rows_of_both_splits(report):
    assert report.repeated == 1
    assert report.contradicting == 3  # both that are equal, and the one that says something else
    assert (report.overlap.rows, report.overlap.questions) == (1, 2)
    said = " ".join(str(report).split())
    assert (
        "of the validation data, 1 row equal to a training row, and 2 rows with a question of the training data: "
        in said
    )
    clean = report_on(CHATS[:2], TOKENIZER, validation=LATER[2:])
    assert (clean.repeated, clean.contradicting, clean.overlap.questions) == (0, 0, 0)
    assert "no row is there twice" in str(clean)
    assert "no row of the validation data has a question of the training data" in " ".join(str(clean).split())
    assert report_on(CHATS, TOKENIZER).overlap is None


def test_another_system_message_makes_another_question():
    chats = [chat("Who?", "A.", system="x"), chat("Who?", "B.", system="y"), chat("Who?", "C.")]
    assert report_on(chats, TOKENIZER).contradicting == 0


def test_empty_and_one_word_answers_are_counted():
    made = report_on([*CHATS, chat("Why?", " "), chat("Where?", "Here.")], TOKENIZER)
    assert (made.empty_answers, made.one_word_answers) == (1, 2)


def test_the_share_that_counts_is_that_of_the_marks(report):
    rows = tokenized(CHATS, TOKENIZER)
    counted = sum(sum(row["assistant_masks"]) for row in rows)
    assert report.counted == counted / sum(len(row["input_ids"]) for row in rows) and report.marked_rows == 6
    assert f"{100 * report.counted:.0f} % of the tokens count in the loss" in str(report)


def test_of_many_rows_a_part_is_marked_and_that_is_said():
    many = [chat("Why?", "Because.")] * (2 * MARKED + 10)
    made = report_on(many, TOKENIZER)
    assert made.rows == len(many) and MARKED <= made.marked_rows <= MARKED + 5
    assert sum(bar.rows for bar in made.tokens.bars) == len(many)  # lengths are of all
    assert f"(measured on {made.marked_rows:,} rows)" in " ".join(str(made).split())


def test_rows_that_the_template_does_not_take_are_counted_and_the_first_is_named():
    gemma = FAMILIES["Gemma"].tokenizer()
    made = report_on(CHATS, gemma)
    assert list(made.refused) == [6] and made.tokens and made.marked_rows == 5
    assert "1 row; the first is row 6: the chat template refuses it: no place for a system message" in " ".join(
        str(made).split()
    )
    nothing = report_on(CHATS[5:], gemma)
    assert nothing.tokens is None and not nothing.examples and str(nothing) and nothing._repr_html_()


def test_the_shipped_data_and_the_warning_for_other_data():
    shipped = load_tokenizer()
    own = report_on(read_chats(data_path("chats", "train.jsonl"))[:500], shipped, 64)
    assert not own.warning and "Warning" not in str(own)
    other = report_on(read_chats(data_path("chats", "qlora", "train.jsonl"))[:50], shipped, 64)
    assert other.warning.startswith("5.") and "Warning: 5." in str(other) and "Warning" in other._repr_html_()


# How it is shown


def test_the_first_rows_show_what_counts_between_brackets(report):
    lines = str(report).splitlines()
    first = next(line for line in lines if line.startswith("  1: "))
    assert first == (
        "  1: <|im_start|>user⏎What is NF4?<|im_end|>⏎<|im_start|>assistant⏎⟦A data type with sixteen values.<|im_end|>⟧⏎"
    )
    assert "".join(text for text, _ in report.examples[0]) == first.removeprefix("  1: ").replace("⟦", "").replace(
        "⟧", ""
    )
    assert len(report.examples) == 3
    assert len(report.examples[0]) == lengths_of([NF4], TOKENIZER)[0]  # token by token


def test_a_long_row_is_shown_in_part_and_the_rest_is_counted():
    (pieces,) = report_on([LONG], TOKENIZER).examples
    assert pieces[-1] == (f" … ({lengths_of([LONG], TOKENIZER)[0] - 160:,} more tokens)", False)


def test_a_character_of_several_tokens_is_one_piece():
    (pieces,) = report_on([chat("热泵 é?", "Да 🙂.")], TOKENIZER).examples
    text = "".join(text for text, _ in pieces)
    assert "热泵 é?" in text and "Да 🙂." in text and "\ufffd" not in text


ATTACK = "\x1b[31mred\x1b]0;title\x07 \x9b2J \u202eabc\u2066 \u200b ⟦x⟧ a\rb\tc \x00\x7f \u2028"


def test_control_characters_are_seen_and_do_not_act():
    made = report_on([chat("Why " + ATTACK, ATTACK + "!")], TOKENIZER)
    for text in (str(made), made._repr_html_()):
        assert not any(sign in text for sign in "\x1b\x9b\x07\u202e\u2066\u200b\r\x00\x7f\u2028")
        assert all(sign in text for sign in (r"\x1b", r"\x07", r"\u202e", r"\u2066", r"\u27e6"))
    assert str(made).count("⟦") == 2  # of the sentence, and of the one answer


def test_what_a_template_says_cannot_act_either():
    template = CHATML.replace(
        "{% for m in messages %}",
        "{% for m in messages %}{% if m.content == 'x' %}{{ raise_exception(m.content + '\x1b[31m<b>') }}{% endif %}",
    )
    made = report_on([NF4, chat("x", "y")], tokenizer_with(template, IM))
    assert (
        "\x1b" not in str(made)
        and r"\x1b[31m<b>" in str(made)
        and "<b>" not in made._repr_html_().replace("<b>Warning", "").replace("<p><b>", "")
    )


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_colour_is_for_terminals_alone_and_for_those_who_want_it(report, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert report.in_colour() == str(report) and "\x1b" not in str(report)
    monkeypatch.setattr(sys, "stdout", Terminal())
    coloured = report.in_colour()
    assert "\x1b[1;4;32mA data type with sixteen values.<|im_end|>\x1b[0m⏎" in coloured and "⟦" not in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    assert report.in_colour() == str(report)


def test_bars_are_as_long_as_their_rows_and_the_limit_is_drawn(report):
    lines = str(report).splitlines()
    bars = [line for line in lines if "█" in line]
    fullest = max(report.tokens.bars, key=lambda bar: bar.rows)
    assert any("█" * 30 in line and f"{fullest.low:,} to {fullest.high:,}" in line for line in bars)
    limit = next(number for number, line in enumerate(lines) if "---- max_length=60" in line)
    (holds,) = (bar for bar in report.tokens.bars if bar.low <= 60 <= bar.high)
    assert holds.name in lines[limit - 1]
    assert Bar(3, 3, 1).name == "3" and Bar(1_001, 2_000, 1).name == "1,001 to 2,000"


def test_lines_fit_a_terminal(report):
    facts = str(report).partition("Tokens per row:")[0].splitlines()
    assert max(map(len, facts)) <= 100


class Page(html.parser.HTMLParser):
    """Whether all that is opened is closed, and the text in bold."""

    def __init__(self, source):
        super().__init__()
        self.open, self.bold, self.tags = [], "", []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "strong" in self.open:
            self.bold += data


def test_a_notebook_shows_it_with_the_texts_escaped_and_what_counts_in_bold(report):
    page = Page(report._repr_html_())
    assert not page.open and pretty(report) == str(report)
    assert page.bold.startswith("A data type with sixteen values.<|im_end|>")
    styles = " ".join(attrs.get("style", "") for tag, attrs in page.tags if tag == "strong")
    assert "font-weight:bold" in styles and "border-bottom" in styles  # not by colour alone
    (bars,) = (attrs["aria-label"] for _, attrs in page.tags if attrs.get("role") == "img")
    assert bars.startswith("Tokens per row: ") and f"{report.tokens.bars[-1].name}: 1 row" in bars
    evil = report_on([chat("<script>alert(1)</script>", "</li><img src=x onerror=alert(1)>&amp;")], TOKENIZER)
    page = Page(evil._repr_html_())
    assert not page.open and not {"script", "img"} & {tag for tag, _ in page.tags}
    assert page.bold.startswith("</li><img src=x onerror=alert(1)>&amp;")


def test_the_page_sets_no_colour_of_text_or_ground_that_hides_the_other(report):
    for _, attrs in Page(report._repr_html_()).tags:
        assert "color:" not in attrs.get("style", "").replace("background-color", "")


def test_as_a_dictionary_it_is_json(report):
    made = json.loads(json.dumps(report.as_dict()))
    assert made == report.as_dict() | {"examples": made["examples"]} | {"tokens": made["tokens"]}  # with texts as keys
    assert made["rows"] == 6 and made["answers"] == {"1": 5, "2": 1} and made["overlap"] == {"rows": 1, "questions": 2}
    assert made["tokens"]["bars"][0]["low"] == report.tokens.bars[0].low and list(made["too_long"]) == ["5"]


@pytest.mark.parametrize(
    ("chats", "limit", "said"),
    [
        ([], None, r"chats=\[\]: there is nothing to report on"),
        (CHATS, 0, "max_length=0: must be a whole number, 1 or more"),
    ],
)
def test_other_arguments_are_refused(chats, limit, said):
    with pytest.raises(ValueError, match=said):
        report_on(chats, TOKENIZER, limit)
