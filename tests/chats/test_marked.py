"""A row with its counted tokens marked: nothing is lost, and what counts can be seen without colour."""

import re

import pytest
import torch

from qlora_helpers.chats import marked_row, read_chats
from qlora_helpers.models.loading import load_tokenizer
from qlora_helpers.paths import data_path


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def row(tokenizer):
    chat = read_chats(data_path("chats", "train.jsonl"))[0]
    return tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)


@pytest.mark.parametrize("kind", [list, torch.tensor])
def test_as_text_the_answer_and_its_end_stand_in_brackets(row, tokenizer, kind):
    said = str(marked_row(kind(row["input_ids"]), kind(row["assistant_masks"]), tokenizer))
    answer = re.fullmatch(r"<\|begin\|><\|user\|>[^⟦]*<\|end\|><\|assistant\|>⟦ ?(.*)<\|end\|>⟧", said)
    assert answer and answer[1] == read_chats(data_path("chats", "train.jsonl"))[0][1]["content"]


def test_the_marks_follow_what_counts(row, tokenizer):
    ids = row["input_ids"]
    everything = str(marked_row(ids, [True] * len(ids), tokenizer))
    nothing = str(marked_row(ids, [False] * len(ids), tokenizer))
    assert everything == f"⟦{nothing}⟧" and nothing == tokenizer.decode(ids)
    without_end = str(marked_row(ids, [*row["assistant_masks"][:-1], 0], tokenizer))
    assert without_end.endswith("⟧<|end|>")


def test_on_a_page_each_token_is_one_piece_and_those_that_count_are_strong(row, tokenizer):
    page = marked_row(row["input_ids"], row["assistant_masks"], tokenizer)._repr_html_()
    assert page.count("<strong") == sum(row["assistant_masks"])
    assert page.count("<strong") + page.count("<span") == len(row["input_ids"])
    assert "&lt;|begin|&gt;" in page and "<|" not in page


def test_each_token_needs_its_mark(row, tokenizer):
    with pytest.raises(ValueError, match="counts has 1 entries for"):
        marked_row(row["input_ids"], [True], tokenizer)
