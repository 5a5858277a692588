"""Rows of the tables of the real model, measured again with the model itself."""

import pytest

from data.scripts.measure import real_formats, real_model, real_task
from qlora_helpers.json_files import read_json
from qlora_helpers.models.loading import load_tokenizer

PIECES, ORDERS = 2, 5


@pytest.fixture(scope="module")
def tables():
    found = {script: read_json(script.TABLE) for script in (real_formats, real_task)}
    here = real_model.source_of(real_model.MODEL)["sha256"]
    for script, table in found.items():
        if table["source"]["sha256"] != here:
            pytest.skip(f"{script.TABLE.name} was measured with other weights: {table['source']['weights']}")
    return {script: {row["name"]: row for row in table["rows"]} for script, table in found.items()}


def test_a_format_costs_on_the_first_pieces_what_the_table_says(tables):
    reference = real_formats.Reference(real_model.MODEL, PIECES)
    for name in ("NF4", "INT4, 16 levels without a zero"):
        again = real_formats.measure(name, reference)["costs"]
        assert again == pytest.approx(tables[real_formats][name]["costs"][:PIECES], abs=5e-3)


def test_three_examples_in_the_prompt_give_the_answers_that_were_counted(tables):
    tokenizer, model = load_tokenizer(real_model.MODEL), real_task.load("NF4", real_model.MODEL)
    chats = real_task.orders("test")[:ORDERS]
    answers = real_task.asked(model, tokenizer, chats, real_task.orders("train")[: real_task.EXAMPLES])
    counted = tables[real_task]["three examples"]["each"][:ORDERS]
    same = sum(one == other for one, other in zip(real_task.score_orders(answers, chats)["each"], counted, strict=True))
    assert same >= ORDERS - 1  # another processor rounds sums in another order


def test_what_all_prompts_begin_with_goes_through_the_model_once_and_changes_no_answer():
    from qlora_helpers import evaluation

    tokenizer, model = load_tokenizer(real_model.MODEL), real_task.load("16 bit", real_model.MODEL)
    chats, examples = real_task.orders("test")[:3], real_task.orders("train")[:1]
    turns = examples[0][1:]
    whole = [[chat[0], *turns, chat[1]] for chat in chats]
    wanted = evaluation.answer(model, tokenizer, whole, max_new_tokens=real_task.LONGEST)
    assert real_task.asked(model, tokenizer, chats, examples) == wanted
