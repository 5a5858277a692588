"""A tokenizer that spells out the words of the data is recognised, in any language, and one that knows them is not blamed."""

import copy
import json
import logging

import pytest

from qlora_helpers.chats import read_chats, tokenized
from qlora_helpers.chats.words import tokens_per_word, warning_of_spelling, words_in
from qlora_helpers.models.loading import load_tokenizer
from qlora_helpers.paths import data_path
from tests.chats.made_up import CHATML, IM, tokenizer_with

ENGLISH = read_chats(data_path("chats", "qlora", "train.jsonl"))
OWN = read_chats(data_path("chats", "train.jsonl"))


def chats(text):
    return [[{"role": "user", "content": text}, {"role": "assistant", "content": text}]]


@pytest.fixture(scope="module")
def shipped():
    return load_tokenizer()


@pytest.fixture(scope="module")
def bpe():
    return tokenizer_with(CHATML, IM)


def test_the_shipped_tokenizer_knows_its_own_words_and_spells_all_others(shipped):
    assert tokens_per_word(OWN, shipped) < 1.3 and warning_of_spelling(OWN, shipped) == ""
    said = warning_of_spelling(ENGLISH, shipped)
    assert said == (
        f"{tokens_per_word(ENGLISH, shipped):.1f} tokens per word: the shipped model knows only the words of its invented world. "
        "It spells yours letter by letter, so it cannot learn from this data. Take another model (--model): on a GPU such as "
        "Qwen/Qwen2.5-1.5B-Instruct, and without one smollm2-135m, which the command fetch puts on this disk"
    )
    other = copy.copy(shipped)
    other.name_or_path = "some/model"
    assert warning_of_spelling(ENGLISH, other).endswith("take a model that was trained on this language")
    assert tokens_per_word(ENGLISH, shipped) > 5


def test_a_tokenizer_of_english_knows_english_and_gets_along_with_names(bpe):
    assert 1 < tokens_per_word(ENGLISH, bpe) < 1.6
    assert warning_of_spelling(ENGLISH, bpe) == warning_of_spelling(OWN, bpe) == ""


@pytest.mark.parametrize(
    ("text", "spelled"),
    [
        ("Der Lehrer erklärte den Schülern die Funktionsweise der Wärmepumpe.", False),
        ("Hallituksen esitys lähetettiin eduskunnan käsiteltäväksi viime viikolla.", False),
        ("Учитель объяснил ученикам, как работает тепловой насос.", True),
        ("老师在参观发电站之前向学生解释了热泵的工作原理。", True),
        ("先生は生徒たちにヒートポンプの仕組みを説明しました。", True),
        ("ครูอธิบายหลักการทำงานของปั๊มความร้อนให้นักเรียนฟัง", True),
    ],
    ids=["German", "Finnish", "Russian", "Chinese", "Japanese", "Thai"],
)
def test_other_languages_are_judged_by_their_characters(text, spelled, bpe):
    said = warning_of_spelling(chats(text), bpe)
    assert bool(said) is spelled
    assert "shipped model" not in said


def test_one_token_for_each_chinese_character_is_no_spelling(bpe):
    text = "老师向学生解释了热泵的工作原理"
    knows = tokenizer_with(CHATML, IM)
    knows.add_tokens(sorted(set(text)))
    assert tokens_per_word(chats(text), knows) == 1 and warning_of_spelling(chats(text), knows) == ""
    assert tokens_per_word(chats(text), bpe) == 3 and warning_of_spelling(chats(text), bpe)


def test_numbers_do_not_count_as_words(bpe):
    assert (
        tokens_per_word(chats("12345 6.78 90"), bpe) == 0.0 and warning_of_spelling(chats("12345 6.78 90"), bpe) == ""
    )
    assert tokens_per_word(chats("the 1234567"), bpe) == tokens_per_word(chats("the"), bpe)


def test_words_stand_between_spaces_or_are_single_characters():
    assert words_in("a  bc\n(de) 热泵x ") == ["a", "bc", "(de)", "热", "泵", "x"]
    assert words_in(" \n") == []


def test_of_many_chats_a_part_is_measured_from_the_first_to_the_last(bpe):
    many = chats("the") * 5_000 + chats("Wärmepumpe") * 5_000
    mean = (tokens_per_word(chats("the"), bpe) + tokens_per_word(chats("Wärmepumpe"), bpe)) / 2
    assert tokens_per_word(many, bpe) == pytest.approx(mean, rel=0.02)


def test_the_figures_of_the_module_are_those_measured(shipped, bpe):
    def per_character(chats, tokenizer):
        texts = [message["content"] for chat in chats for message in chat]
        tokens = sum(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"]))
        return round(tokens / sum(map(len, texts)), 2)

    assert (per_character(OWN, shipped), per_character(ENGLISH, shipped)) == (0.20, 0.91)
    assert (per_character(ENGLISH, bpe), per_character(OWN, bpe)) == (0.25, 0.45)
    assert json.loads(json.dumps(tokens_per_word(OWN, shipped)))  # a plain number


def test_texts_longer_than_the_model_takes_are_counted_without_a_warning(caplog):
    """transformers would warn of errors in running them, which nobody does."""
    tokenizer = load_tokenizer()
    library = logging.getLogger("transformers")
    library.addHandler(caplog.handler)
    try:
        long = [[{"role": "user", "content": "Where? " * 300}, {"role": "assistant", "content": "There."}]]
        assert tokens_per_word(long, tokenizer) > 1
        assert len(tokenized(long, tokenizer)[0]["input_ids"]) > tokenizer.model_max_length
        assert caplog.messages == []
        tokenizer("Where? " * 300)
        assert "longer than the specified maximum" in caplog.text
    finally:
        library.removeHandler(caplog.handler)
