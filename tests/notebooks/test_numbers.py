"""The numbers in the texts are those that were computed: each is bound to its evidence, and altering one fails."""

import ast
import json
import math
import random
import re
from itertools import pairwise

import pytest

from data.scripts.make import invented_world as world
from notebooks.scripts import build
from tests.notebooks import number_bindings as bindings

every_text = pytest.mark.parametrize("name", bindings.all_texts())
every_lesson = pytest.mark.parametrize("name", bindings.lesson_names())


def test_every_lesson_has_its_bindings():
    assert bindings.lesson_names() == build.lessons() != []
    assert {path.stem for path in bindings.BINDINGS.glob("*.txt")} == {*bindings.all_texts(), "names"}


@every_text
def test_every_number_of_a_text_is_what_it_is_bound_to(name):
    wrong = bindings.problems_of(bindings.text_of(name))
    assert not wrong, "\n".join([*wrong, bindings.cure(name)])


# ------------------------------------------------------------------------------------------------ altered numbers

NEXT_WORD = dict(pairwise([*bindings.CARDINALS, "two"])) | {"hundred": "dozen"}
NEXT_FRACTION = dict(pairwise([*bindings.FRACTIONS, "third"]))


def altered(match: re.Match) -> list[str]:
    """Variants of a matched number or name, with one of its digits, or its word, changed."""
    text = match[0]
    if match["word"]:
        last = text.split()[-1]
        if last.lower() in bindings.HALVES:
            return ["a third"]
        if last.lower() in NEXT_FRACTION:
            return [text.removesuffix(last) + NEXT_FRACTION[last.lower()]]
        if last.lower().removesuffix("s") in bindings.SCALES:
            return ["thousands" if last.lower().startswith("m") else "millions"]
        return [NEXT_WORD[last.lower()]]
    others = [f"{text[:at]}{(int(c) + 1) % 10}{text[at + 1 :]}" for at, c in enumerate(text) if c in "0123456789"]
    if match["power"]:
        others.append(text.replace(match["power"], "⁷"))
    if match["scale"]:
        others.append(text.replace(match["scale"], "million" if match["scale"] != "million" else "billion"))
    return others


def mutants(markdown: str):
    """The text with one number altered, or exchanged with the next one; a description of the change comes first."""
    places = [m for m in bindings.TOKEN.finditer(markdown) if not in_a_link(markdown, m.start())]
    for match in places:
        for other in altered(match):
            yield f"{match[0]} -> {other}", markdown[: match.start()] + other + markdown[match.end() :]
    numbers = [m for m in places if not m["name"]]
    for one, two in pairwise(numbers):
        # "half" and 0.5 exchanged are the same to a reader
        if bindings.number_of(one).value != bindings.number_of(two).value:
            between = markdown[one.end() : two.start()]
            swapped = markdown[: one.start()] + two[0] + between + one[0] + markdown[two.end() :]
            yield f"{one[0]} <-> {two[0]}", swapped


def in_a_link(markdown: str, at: int) -> bool:
    return any(link.start() <= at < link.end() for link in re.finditer(r"\]\([^)]*\)", markdown))


def survivors(text: bindings.Text) -> tuple[int, list[str]]:
    """How many altered texts there are, and which of them go unnoticed."""
    used = {place: bindings.problems_in_part(text, place, markdown)[1] for place, markdown in text.parts}
    tried, alive = 0, []
    for place, markdown in text.parts:
        elsewhere = set().union(*(lines for other, lines in used.items() if other != place))
        for what, mutant in mutants(markdown):
            wrong, lines = bindings.problems_in_part(text, place, mutant, hints=False)
            tried += 1
            if not wrong and used[place] <= lines | elsewhere:
                alive.append(f"{text.name}, {place}: {what}")
    return tried, alive


@every_text
def test_altering_any_number_or_exchanging_two_goes_red(name):
    tried, alive = survivors(bindings.text_of(name))
    assert tried > 10
    assert not alive, alive


@every_text
def test_another_number_that_the_text_or_its_lesson_has_goes_red(name):
    """A sample: a number is replaced by one that is true elsewhere, or one that is printed."""
    text, draw = bindings.text_of(name), random.Random(name)
    used = {place: bindings.problems_in_part(text, place, markdown)[1] for place, markdown in text.parts}
    lines = [
        line
        for lesson in ([text.lesson] if text.lesson else bindings.lesson_names())
        for line in bindings.printed(lesson)
    ]
    printed = [m for line in lines for m in bindings.TOKEN.finditer(line) if m["digits"]]
    written = [
        (place, markdown, m)
        for place, markdown in text.parts
        for m in bindings.TOKEN.finditer(markdown)
        if not m["name"] and not in_a_link(markdown, m.start())
    ]
    alive, tried = [], 0
    for place, markdown, match in draw.choices(written, k=60):
        other = draw.choice((draw.choice(printed), draw.choice(written)[2]))
        if bindings.number_of(other).value == bindings.number_of(match).value:
            continue
        mutant = markdown[: match.start()] + other[0] + markdown[match.end() :]
        wrong, found = bindings.problems_in_part(text, place, mutant, hints=False)
        elsewhere = set().union(*(blocks for where, blocks in used.items() if where != place))
        if not wrong and used[place] <= found | elsewhere:
            alive.append(f"{place}: {match[0]} -> {other[0]}")
        tried += 1
    assert tried > 40 and not alive, alive


def with_other_outputs(monkeypatch, lesson, old, new):
    real, lines = bindings.printed, tuple(new if line == old else line for line in bindings.printed(lesson))
    monkeypatch.setattr(bindings, "printed", lambda name: lines if name == lesson else real(name))
    monkeypatch.setattr(bindings, "evaluated", bindings.evaluate)  # no cache


@every_lesson
def test_changing_what_is_printed_goes_red(name, monkeypatch):
    """The first digit of every printed value that a text of this lesson is bound to."""
    text, changed = bindings.text_of(name), 0
    for sentence in {one for _, markdown in text.parts for one in bindings.sentences(markdown)}:
        wrong, block = bindings.problems_of_sentence(text, sentence)
        assert not wrong
        for evidence in block.evidence.values() if block else ():
            for source in re.split(r" && | => ", evidence):
                if not source.startswith("printed "):
                    continue
                match = bindings.matches("printed", source.removeprefix("printed "), name)[0]
                start, end = match.span("value")
                at = next((i for i in range(start, end) if match.string[i] in "123456789"), start)
                digit = int(match.string[at]) if match.string[at].isdigit() else None
                # by four, since "half" is so coarse that the next digit may still be about a half
                other = "seventeen times " if digit is None else str(digit + 4 if digit <= 5 else digit - 4)
                other = match.string[:at] + other + match.string[at + 1 :]
                with monkeypatch.context() as patch:
                    with_other_outputs(patch, name, match.string, other)
                    assert bindings.problems_of_sentence(text, sentence)[0], f"{match.string} -> {other}: {sentence}"
                changed += 1
    assert changed >= 3


# ---------------------------------------------------------------------------------------------------- the rules


@pytest.mark.parametrize(
    ("said", "value", "unit", "holds"),
    [
        ("95 %", 0.9516, "", True), ("96 %", 0.9516, "", False), ("95.2 %", 95.16, "%", True), ("95 %", 95.16, "", False),
        ("0.0920", 0.092, "", True), ("0.0921", 0.092, "", False), ("2,000", 2000, "", True), ("2,000", 2048, "", False),
        ("1.5 GiB", 1536, "MiB", True), ("1.5 GB", 1536, "MiB", False), ("24 GiB", 24, "GB", False),
        ("65 billion", 65e9, "", True), ("3 million", 2_984_192, "", True), ("70 billion", 65e9, "", False),
        ("8B", 8.03e9, "", True), ("2⁵⁰", 2**50, "", True), ("1024³", 2**30, "", True), ("1024²", 2**30, "", False),
        ("sixteen", 16, "", True), ("twice", 2.03, "", True), ("half", 0.494, "", True), ("half", 0.3, "", False),
        ("a third", 0.31, "", True), ("a third", 0.25, "", False), ("a fifteenth", 1 / 15.1, "", True),
        ("2e-4", 0.0002, "", True), ("-7", -7, "", True), ("-7", 7, "", False), ("3.11", 3.1, "", False), ("0", 2e-4, "", False),
        ("0 %", 0.0, "", True),
    ],
)  # fmt: skip
def test_a_number_holds_if_it_is_the_value_as_rounded(said, value, unit, holds):
    (number,) = bindings.numbers_in(f"It is {said} here")
    assert number.is_value_of(value, unit) is holds


def test_numbers_are_found_in_digits_and_in_words_and_names_are_none():
    sentence = (
        "NF4 and Llama-3.1-8B: 41,943,040 of two, -7 to 7, 2.776, half a byte, a third, 8B, 2⁵⁰, 70 billion, 0.3.1"
    )
    found = [number.text for number in bindings.numbers_in(sentence)]
    assert found == ["41,943,040", "two", "-7", "7", "2.776", "half", "a third", "8B", "2⁵⁰", "70 billion", "0.3.1"]
    assert bindings.names_in(sentence) == ["NF4", "Llama-3.1-8B"]


@pytest.mark.parametrize(
    ("evidence", "why"),
    [
        ("printed 1 GiB is <#> MB", "there is no"),
        ("printed Llama-3.1-70B # bit <#> #", "several values"),
        ("printed 1 GiB is # GB", "which number is meant"),
        ("code no_such_name(<#>)", "there is no"),
        ("guessed 7", "not a kind of evidence"),
        ("json data/tiny-llama/scores.json: recall / NF5", "has no"),
        ("constant qlora_helpers/training/spikes.py: WIDTH", "has no"),
        ("printed 1 GiB is <#> GB => y", "cannot be computed"),
    ],
)
def test_evidence_that_is_not_there_or_is_ambiguous_is_refused(evidence, why):
    with pytest.raises(bindings.NoEvidence, match=why):
        bindings.evaluate(evidence, "01_memory_maths")


# ------------------------------------------------------------------------------------- texts made for these tests


@pytest.fixture
def of_lesson_3(monkeypatch):
    """Makes a text of one sentence that belongs to lesson 3, with blocks that replace that lesson's."""

    def make(sentence: str, blocks: str = "") -> bindings.Text:
        read = tuple(bindings.read_blocks(blocks))
        monkeypatch.setattr(bindings, "blocks_of", lambda _: read)
        monkeypatch.setattr(bindings, "_by_skeleton", lambda _: {block.skeleton: [block] for block in read})
        return bindings.Text("03_double_quantisation", [("cell 5", sentence)], "03_double_quantisation")

    return make


SAVES = "> It saves {a.6} bits.\n  a: printed scales cost # bits, then #: <#> saved"


def test_a_binding_whose_evidence_does_not_hold_the_number_is_red(of_lesson_3):
    assert bindings.problems_of(of_lesson_3("It saves 0.373047 bits.", SAVES)) == []
    other = SAVES.replace("then #: <#> saved", "then <#>: # saved")
    (wrong,) = bindings.problems_of(of_lesson_3("It saves 0.373047 bits.", other))
    assert "0.373047 is bound to `printed scales cost # bits, then <#>: # saved`, which gives 0.126953" in wrong


@pytest.mark.parametrize("coarser", ["0.4", "0.37", "0.3730470", "0", "a third"])
def test_a_number_rounded_otherwise_must_be_confirmed(coarser, of_lesson_3):
    (wrong,) = bindings.problems_of(of_lesson_3(f"It saves {coarser} bits.", SAVES))
    assert f"{coarser} is not written as its block says: 6 decimals" in wrong


def test_a_number_without_a_block_a_block_without_a_sentence_and_a_strange_name_are_named(of_lesson_3):
    wrong = bindings.problems_of(of_lesson_3("It saves 0.373047 bits in NF5.", SAVES))
    assert "NF5 is not a name" in wrong[0]
    assert (
        "no block matches this sentence and its numbers 0.373047\n    nearest block: It saves {a.6} bits." in wrong[1]
    )
    assert ":1: its sentence is no longer in the text" in wrong[2] and len(wrong) == 3


def test_a_number_that_stands_in_the_block_needs_a_reason(of_lesson_3):
    (wrong,) = bindings.problems_of(of_lesson_3("It saves 7 bits.", "> It saves 7 bits."))
    assert "7 is neither bound nor marked as not a claim" in wrong
    (wrong,) = bindings.problems_of(of_lesson_3("It saves 8 things.", "> It saves 7 things.\n  - 7: counted"))
    assert "8 is where line 1 of its block has 7" in wrong
    assert bindings.problems_of(of_lesson_3("4 bits, lesson 2.", "> 4 bits, lesson 2.")) == []


def test_no_proposal_is_taken_unread(of_lesson_3):
    proposed = bindings.propose(of_lesson_3("It saves 0.373047 bits in 7 ways."))
    assert "> It saves {a.6} bits in {b} ways." in proposed
    assert "  a: ? printed scales cost # bits, then #: <#> saved    (the text says 0.373047)" in proposed
    with pytest.raises(ValueError, match="undecided"):
        bindings.read_blocks(proposed)


def test_a_reworded_sentence_keeps_its_bindings_and_a_wrong_number_does_not(of_lesson_3):
    said = "So in all it saves {} bits."
    assert "a: ? printed scales cost # bits, then #: <#> saved" in bindings.propose(
        of_lesson_3(said.format("0.373047"), SAVES)
    )
    assert "a: ? nothing found" in bindings.propose(of_lesson_3(said.format("0.373048"), SAVES))


def test_a_file_of_bindings_with_a_slip_is_refused():
    for slip in ("> It is {a}.\n", "> It is 7.\n  - 8: no\n", "> It is 7.\n  a: code 7\n", "It is 7.\n"):
        with pytest.raises(ValueError, match=r"\d"):
            bindings.read_blocks(slip)


@every_text
def test_a_number_that_a_test_is_said_to_hold_has_that_test(name):
    for block in bindings.blocks_of(name):
        for reason in block.reasons.values():
            assert len(reason) > 5, reason
            if found := re.fullmatch(r"held by (\S+)::(\w+)", reason):
                tree = ast.parse((bindings.ROOT / found[1]).read_text(encoding="utf-8"))
                assert found[2] in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, reason


def test_the_card_counts_what_the_facts_are_drawn_from():
    card = " ".join((bindings.ROOT / "data" / "tiny-llama" / "README.md").read_text(encoding="utf-8").split())
    counts = [len(attribute.values) for attribute in world.ATTRIBUTES]
    words = {5: "five"}[len(counts)]
    said = "have {} facts each: a town (of {}), a job (of {}), an instrument (of {}), a pet (of {}) and a year of birth (of {})"
    assert said.format(words, *counts) in card
    assert f"state the {words} facts of one person" in card
    bits = sum(map(math.log2, counts))
    training = json.loads((bindings.ROOT / "data" / "tiny-llama" / "training.json").read_text(encoding="utf-8"))
    assert f"{bits:.2f} bits per person and {bits * training['people'] / 2_359_296:.3f} bits per parameter" in card


def command(monkeypatch, *arguments) -> int:
    monkeypatch.setattr("sys.argv", ["number_bindings.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        bindings.main()
    return ended.value.code


def test_the_command_says_what_is_wrong_and_its_status_too(of_lesson_3, monkeypatch, capsys):
    assert command(monkeypatch, "03") == 0
    assert re.search(r"^03_double_quantisation: \d+ sentences, 0 wrong$", capsys.readouterr().out, re.M)
    assert command(monkeypatch, "no such text") == 2
    assert "no text is called no such text: there are 01_memory_maths" in capsys.readouterr().err
    text = of_lesson_3("It saves 0.126953 bits.", SAVES)
    monkeypatch.setattr(bindings, "text_of", lambda _: text)
    assert command(monkeypatch, "03") == 1
    said = capsys.readouterr().out
    assert f"{text.name}, cell 5: “It saves 0.126953 bits.”\n    0.126953 is bound to `printed" in said
    assert "which gives 0.373047\nCure: correct the number in the text" in said


# ---------------------------------------------------------------------------------------- alt texts in their files


def test_numbers_in_alt_texts_are_bound_but_not_to_themselves(tmp_path, monkeypatch):
    monkeypatch.setattr(bindings.figure_texts, "FOLDER", tmp_path)
    texts = {"3.1": {"diagram": "two_levels"}, "3.2": "Bars of 0.7654 bits.", "3.3": "Lines."}
    (tmp_path / "03.json").write_text(json.dumps(texts), encoding="utf-8")
    (lesson,) = (name for name in bindings.lesson_names() if name.startswith("03"))
    wrong = [problem for problem in bindings.problems_of(bindings.text_of(lesson)) if "0.7654" in problem]
    assert len(wrong) == 1 and wrong[0].startswith(f"{lesson}, alt text of figure 3.2: “Bars of 0.7654 bits.”")
    monkeypatch.setattr(bindings, "ROOT", tmp_path)
    for evidence in ("text 03.json: Bars of <#> bits", "json 03.json: 3.2"):
        with pytest.raises(bindings.NoEvidence, match="bound to its own words"):
            bindings.evaluate(evidence, lesson)


def test_the_number_of_a_figure_is_no_word_of_it_and_its_words_are_found():
    source = (
        "plots.show(fig, '2.1')\nplots.show(fig, '2.2', alt='Bars')\nplots.show(fig, 'Lines')\nax.set_title('7 bars')"
    )
    assert sorted(bindings.words_of_figures(source)) == ["7 bars", "Bars", "Lines"]
