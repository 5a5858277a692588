"""The table of what a real model learns, and how its answers are judged."""

import json

import pytest

from data.scripts.make import orders
from data.scripts.measure import real_task
from qlora_helpers.paths import data_path
from qlora_helpers.statistics import standard_error

TABLE = json.loads(data_path("measured", "real_task.json").read_text(encoding="utf-8"))
ROWS = {row["name"]: row for row in TABLE["rows"]}
ASKED = {name: row for name, row in ROWS.items() if "each" in row}
RIGHT = {"name": "Nora Hale", "item": "blue bowl", "quantity": 2, "day": "Friday", "delivery": False}


# The table


def test_the_table_says_how_it_was_made():
    assert set(ROWS) <= set(real_task.ROWS) and {"no example", "three examples", "NF4, seed 0"} <= set(ROWS)
    assert TABLE["command"] == "python -m data.scripts.measure.real_task" and TABLE["processor"]
    assert TABLE["threads"] == 1 and TABLE["budget"] == real_task.BUDGET
    assert "Q4_1" in TABLE["source"]["weights"] and len(TABLE["source"]["sha256"]) == 64
    assert all(row["seconds"] > 0 and row["processor_seconds"] > 0 for row in TABLE["rows"])


def test_the_rate_is_the_one_with_the_lowest_loss_on_the_validation_orders_and_all_runs_have_it():
    rate = real_task.chosen_rate(ROWS)
    tried = {row["learning_rate"]: row["validation_loss"] for row in ROWS.values() if "validation_loss" in row}
    assert set(tried) == set(real_task.RATES) and min(tried.values()) == tried[rate]
    assert {row["learning_rate"] for row in ROWS.values() if "seed" in row and "validation_loss" not in row} == {rate}


@pytest.mark.parametrize("name", ASKED)
def test_shares_and_errors_follow_from_the_answers(name):
    row = ASKED[name]
    right = row["each"].count("1") / len(row["each"])
    assert len(row["each"]) == row["questions"] == orders.SIZES["test"] >= 100
    assert row["right"] == pytest.approx([right, standard_error(right, row["questions"])], abs=1e-4)
    assert row["right"][0] <= min(share for share, _ in row["fields"].values()) <= row["valid"][0]


def test_no_rate_no_rows():
    with pytest.raises(SystemExit, match="not measured yet"):
        real_task.chosen_rate({name: ROWS[name] for name in ROWS if not name.startswith("learning rate")})


# How answers are judged


@pytest.mark.parametrize(
    ("answer", "valid", "right"),
    [
        (json.dumps(RIGHT), True, True),
        (json.dumps(RIGHT, indent=2), True, True),
        (f"```json\n{json.dumps(RIGHT)}\n```", True, True),
        (json.dumps(dict(reversed(RIGHT.items()))), True, True),
        (json.dumps(RIGHT | {"day": "friday"}), True, True),
        (json.dumps(RIGHT | {"quantity": "2"}), True, False),
        (json.dumps(RIGHT | {"quantity": True}), True, False),
        (json.dumps(RIGHT | {"delivery": 0}), True, False),
        (json.dumps(RIGHT | {"item": "blue bowls"}), True, False),
        (json.dumps(RIGHT | {"price": 3}), True, False),
        (json.dumps({"name": "Nora Hale"}), True, False),
        (f"Here it is: {json.dumps(RIGHT)}", False, False),
        (json.dumps(RIGHT)[:-1], False, False),
        (json.dumps([RIGHT]), False, False),
        ("", False, False),
    ],
)
def test_an_order_is_right_if_all_its_fields_are(answer, valid, right):
    found = real_task.score_orders([answer], [orders.as_chat("", RIGHT)])
    assert (found["valid"][0], found["right"][0], found["each"]) == (valid, right, str(int(right)))
    assert found["some_wrong_answers"] == [answer] * (not right)


def test_each_field_is_counted_by_itself():
    answers = [json.dumps(RIGHT | {"item": "bowl"}), json.dumps(RIGHT), "no JSON"]
    found = real_task.score_orders(answers, [orders.as_chat("", RIGHT)] * 3)
    assert [found["fields"][name][0] for name in ("name", "item")] == [0.6667, 0.3333]


@pytest.mark.parametrize(
    ("answer", "alone", "right"),
    [
        ("Bogotá", 1, 1), ("bogota.", 1, 1), ("The capital of Colombia is Bogotá.", 0, 1), ("Medellín", 1, 0),
        ("Bogotanos", 1, 0), ("", 1, 0),
    ],
)  # fmt: skip
def test_a_capital_is_right_alone_or_in_a_sentence(answer, alone, right):
    chat = [{"role": "user", "content": "What is the capital of Colombia?"}, {"role": "assistant", "content": "Bogotá"}]
    found = real_task.score_capitals([answer], [chat])
    assert (found["alone"][0], found["right"][0]) == (alone, right)
