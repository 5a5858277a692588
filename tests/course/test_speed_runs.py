"""The measured runs of lesson 11 in words."""

import json
import re

import pytest

from qlora_helpers.course.speed_runs import in_words
from qlora_helpers.paths import data_path

LABELS = [row["label"] for row in json.loads(data_path("measured", "speed.json").read_text(encoding="utf-8"))["rows"]]


@pytest.mark.parametrize(
    ("label", "chats", "way"),
    [
        ("4x2048 full ours", "4 of 2,048", "this course"),
        ("4x2048 full articles", "4 of 2,048", "the articles' recipe"),
        ("4x2048 full ours compiled 16-of-32", "4 of 2,048", "this course, compiled, 16 of 32 checkpointed"),
        ("4x2048 full ours compiled in-14.3GiB", "4 of 2,048", "this course, compiled, budget of 14.3 GiB"),
        ("4x2048 full ours compiled in-auto", "4 of 2,048", "this course, compiled, budget: what is free"),
        (
            "12x1024x8 mixed ours packed compiled none-checkpointed",
            "8 x 12 of up to 1,024",
            "this course, packed, compiled, none checkpointed",
        ),
    ],
)
def test_a_label_in_words(label, chats, way):
    assert in_words(label) == (chats, way)


def test_every_measured_run_has_words_of_its_own():
    said = [in_words(label.split(" ", 2)[2]) for label in LABELS if label.startswith("8b bf16 ")]
    assert len(set(said)) == len(said) > 10
    assert not any(re.search(r"\w-\w", way) for _, way in said)


@pytest.mark.parametrize("label", ["8b bf16 4x2048 full ours", "4x2048 ours", "4x2048 full somebody", "full ours trl"])
def test_a_label_of_another_form_is_refused(label):
    with pytest.raises(ValueError, match=f"^label='{label}'"):
        in_words(label)
