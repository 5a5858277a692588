"""Each numbered figure has its alt text in a file of its lesson, and a missing one is an error that says where."""

import json

import pytest

from qlora_helpers.course import figure_texts
from tests import ROOT

FILES = sorted(path for path in figure_texts.FOLDER.glob("*.json") if path.stem.isdigit())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(figure_texts, "FOLDER", tmp_path)
    (tmp_path / "03.json").write_text(
        json.dumps({"3.1": {"diagram": "two_levels"}, "3.2": "Bars – of bits."}), encoding="utf-8"
    )
    (tmp_path / "diagrams.json").write_text(json.dumps({"two_levels": "Three rows."}), encoding="utf-8")
    return tmp_path


def test_a_number_is_a_lesson_and_a_place_in_it():
    assert all(map(figure_texts.is_number, ("2.1", "11.12")))
    assert not any(map(figure_texts.is_number, ("2", "2.0", "02.1", "2.1 ", "NF4 2.1", "2.1.1", "", "2.123")))


def test_the_alt_text_of_a_figure_and_of_a_diagram(folder):
    assert figure_texts.texts_of_lesson(3) == {"3.1": "Three rows.", "3.2": "Bars – of bits."}
    assert figure_texts.alt_text("3.1") == "Three rows." and figure_texts.alt_text("3.2") == "Bars – of bits."
    assert figure_texts.texts_of_lesson(4) == {}


def test_a_figure_without_alt_text_is_an_error_that_says_where_it_belongs(folder):
    with pytest.raises(
        ValueError, match=r"^figure 3.3: it has no alt text in .*alt_texts/03.json, which has 3.1, 3.2. Say"
    ):
        figure_texts.alt_text("3.3")
    with pytest.raises(ValueError, match=r"^figure 4.1: .*alt_texts/04.json, which has none"):
        figure_texts.alt_text("4.1")


@pytest.mark.parametrize("entry", ["", " ", 7, None, {"diagram": "none"}, {"other": "two_levels"}, ["text"]], ids=repr)
def test_what_is_no_text_is_an_error(folder, entry):
    (folder / "05.json").write_text(json.dumps({"5.1": entry}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"^alt_texts/05.json: '5.1' is .*, and must be a text or a diagram's name"):
        figure_texts.alt_text("5.1")


def test_the_files_are_those_of_lessons_and_list_their_figures_in_order():
    lessons = {path.name[:2] for path in (ROOT / "notebooks" / "source").glob("[0-9][0-9]_*.py")}
    assert {path.stem for path in FILES} <= lessons
    for path in FILES:
        texts = figure_texts.texts_of_lesson(int(path.stem))
        places = [int(number.removeprefix(f"{int(path.stem)}.")) for number in texts]
        assert places == sorted(set(places)), path
        assert all(len(text) >= 10 for text in texts.values()), path
