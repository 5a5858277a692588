"""The course's question set about QLoRA: it is large enough, uses no templates, and every number is right."""

import difflib
import json
import re
from collections import Counter

import pytest

from data.scripts.make import qlora_numbers
from qlora_helpers.chats import read_chats
from qlora_helpers.paths import data_path

FILES = {split: data_path("chats", "qlora", f"{split}.jsonl") for split in ("train", "test")}
PAIRS = [
    (split, line, json.loads(text))
    for split, path in FILES.items()
    for line, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
]


def words(text):
    return re.findall(r"\w+", text.lower())


def test_there_are_enough_and_a_part_is_held_out():
    chats = {split: read_chats(path) for split, path in FILES.items()}
    assert len(chats["train"]) + len(chats["test"]) >= 300
    assert len(chats["test"]) >= 50
    assert all([m["role"] for m in chat] == ["user", "assistant"] for part in chats.values() for chat in part)


def test_every_number_comes_out_as_it_is_stated():
    faults = [
        f"{split}, line {line}: {fault}" for split, line, pair in PAIRS for fault in qlora_numbers.faults_in(pair)
    ]
    assert not faults, "\n".join(faults)


def test_no_two_pairs_are_from_one_template():
    begun = Counter(" ".join(words(pair["messages"][0]["content"])[:4]) for _, _, pair in PAIRS)
    assert begun.most_common(1)[0][1] <= 4, begun.most_common(3)
    texts = [(split, [words(m["content"]) for m in pair["messages"]]) for split, _, pair in PAIRS]
    for number, (split, one) in enumerate(texts):
        for other_split, other in texts[:number]:
            for mine, theirs in zip(one, other, strict=True):
                shared = len(set(mine) & set(theirs)) / min(len(set(mine)), len(set(theirs)))
                if shared > 0.6:  # a cheap check; the exact one only where it can matter
                    alike = difflib.SequenceMatcher(None, mine, theirs).ratio()
                    assert alike <= (0.7 if split == other_split else 0.8), (" ".join(mine), " ".join(theirs))


def test_answers_are_short():
    assert all(8 <= len(words(pair["messages"][1]["content"])) <= 110 for _, _, pair in PAIRS)


# The checker itself


def pair(answer, **numbers):
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "numbers": numbers}


def test_a_right_number_passes():
    right = {
        "0.373": "nf4_bits(False) - nf4_bits()",
        "8,030,261,248": "parameters('Llama-3.1-8B')",
        "-0.70": "code('NF4', 1)",
    }
    text = "It saves 0.373 bits on 4-bit NF4; 8,030,261,248 of an 8B model; a code is -0.70."
    assert qlora_numbers.faults_in({**pair(text), "numbers": right}) == []


@pytest.mark.parametrize(
    ("text", "numbers", "fault"),
    [
        ("It saves 0.374 bits.", {"0.374": "nf4_bits(False) - nf4_bits()"}, "0.374: 'nf4_bits(False) - nf4_bits()' gives 0.373"),
        ("It saves 0.373 bits.", {}, "0.373 is stated without an expression"),
        ("It saves 0.4 bits.", {}, "0.4 is stated without an expression"),
        ("A range of 16-32 ranks.", {"16": "16"}, "32 is stated without an expression"),
        ("Nothing.", {"7": "7"}, "7 has an expression and is not in the text"),
        ("It is 7.", {"7": "parameters('none')"}, "raises ValueError"),
        ("It is 7.", {"7": "sourced(7, 'somewhere')"}, "raises ValueError"),
        ("It is 7.", {"7": "__import__('os').getpid()"}, "raises NameError"),
    ],
)  # fmt: skip
def test_a_wrong_one_is_named(text, numbers, fault):
    found = qlora_numbers.faults_in({**pair(text), "numbers": numbers})
    assert len(found) == 1 and fault in found[0]


def test_names_are_no_numbers():
    assert qlora_numbers.numbers_in(
        "NF4 in 4-bit, a 7B model on a T4 in 16 bits; Llama-3.1-8B with lora_B; see 2305.14314."
    ) == ["2305.14314"]
