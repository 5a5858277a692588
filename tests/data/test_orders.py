"""The orders and the capitals: the files are what their scripts make, and their parts share what they may and no more."""

import itertools
import json
import random
import re

import pytest

from data.scripts import DATA
from data.scripts.make import capitals, orders
from qlora_helpers.chats import read_chats

PARTS = list(orders.WORDS)
PAIRS = list(itertools.combinations(PARTS, 2))


def words_of(texts):
    return {word for text in texts for word in re.findall(r"\w+", text.lower())}


@pytest.mark.parametrize(("script", "folder"), [(orders, "orders"), (capitals, "capitals")])
def test_the_shipped_files_are_what_the_script_makes(script, folder, tmp_path):
    script.main(tmp_path)
    shipped = {path.name: path.read_bytes() for path in (DATA / "chats" / folder).iterdir()}
    assert shipped == {path.name: path.read_bytes() for path in tmp_path.iterdir()} and len(shipped) > 1


def test_there_are_as_many_orders_as_a_run_takes_and_a_test_needs():
    chats = {part: read_chats(DATA / "chats" / "orders" / f"{part}.jsonl") for part in PARTS}
    assert {part: len(of) for part, of in chats.items()} == orders.SIZES
    texts = [chat[1]["content"] for of in chats.values() for chat in of]
    assert len(set(texts)) == len(texts) and orders.SIZES["test"] >= 100


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_no_two_parts_share_a_name_or_a_word_of_an_item(one, other):
    for names in ("first", "last", "kinds", "things"):
        assert not words_of(getattr(orders.WORDS[one], names)) & words_of(getattr(orders.WORDS[other], names))


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_no_two_parts_share_a_phrasing(one, other):
    def phrasings(part):
        words = orders.WORDS[part]
        said = itertools.chain(words.who, words.wants, words.fetched, words.brought, words.corrected, words.beside)
        return {" ".join(re.findall(r"\w+", text.lower())) for text in said}

    assert not phrasings(one) & phrasings(other)


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_no_sentence_of_one_part_is_in_another(one, other):
    def sentences(part):
        chats = read_chats(DATA / "chats" / "orders" / f"{part}.jsonl")
        return {sentence for chat in chats for sentence in re.split(r"(?<=[.?!])\s", chat[1]["content"])}

    assert not sentences(one) & sentences(other)


@pytest.mark.parametrize("part", PARTS)
def test_an_orders_fields_are_what_its_text_says(part):
    for text, fields in itertools.islice(orders.orders(part, seed=7), 300):
        assert fields["name"] in text and fields["day"] in text
        number = orders.NUMBERS[fields["quantity"] - 1]
        count = (
            rf"(?:{fields['quantity']}|{number}|an?)"
            if fields["quantity"] == 1
            else rf"(?:{fields['quantity']}|{number})"
        )
        plural = "" if fields["quantity"] == 1 else r"(?:s|es)"
        assert re.search(rf"\b{count} {fields['item']}{plural}\b", text), (text, fields)
        words = orders.WORDS[part]
        said = [
            way.format(day=fields["day"]) in text for way in (words.brought if fields["delivery"] else words.fetched)
        ]
        assert sum(said) == 1, text


def test_both_ways_and_a_day_that_is_not_meant_are_common():
    some = list(itertools.islice(orders.orders("test"), 400))
    assert 0.4 < sum(fields["delivery"] for _, fields in some) / len(some) < 0.6
    two_days = sum(len({day for day in orders.DAYS if day in text}) > 1 for text, _ in some) / len(some)
    assert 0.1 < two_days < 0.3


def test_another_seed_draws_other_orders():
    assert orders.order(orders.WORDS["test"], random.Random(1)) != orders.order(orders.WORDS["test"], random.Random(2))


def test_the_answer_is_the_json_of_the_fields():
    chat = read_chats(DATA / "chats" / "orders" / "test.jsonl")[0]
    assert tuple(json.loads(chat[-1]["content"])) == orders.FIELDS and chat[0]["content"] == orders.INSTRUCTION


def test_no_country_is_asked_in_training_and_in_the_test():
    asked = [
        {chat[0]["content"] for chat in read_chats(DATA / "chats" / "capitals" / f"{part}.jsonl")}
        for part in ("train", "test")
    ]
    assert not asked[0] & asked[1] and len(asked[0] | asked[1]) == len(capitals.CAPITALS) >= 100
