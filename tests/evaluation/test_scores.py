"""Scores on one's own rows: which count for what, errors, answers that are cut off."""

import json
import math

import pytest

from qlora_helpers import evaluation
from qlora_helpers.chats import split_question
from qlora_helpers.evaluation import scores
from qlora_helpers.evaluation.answers import Answer
from qlora_helpers.models.loading import load_model
from qlora_helpers.paths import data_path
from tests.support.short_runs import CHATS, CPU, TOKENIZER

LONG = "The town of Easthaven is old. " * 4


@pytest.fixture(scope="module")
def base():
    return load_model(quantization=None, hardware=CPU)


def chat(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.fixture
def told(monkeypatch):
    """Answers that a test decides on, instead of the model's."""
    given, limits = [], []

    def answers_up_to(model, tokenizer, questions, most, batch_size):
        limits.extend(most)
        return [Answer(*one) for one in given]

    monkeypatch.setattr(scores, "answers_up_to", answers_up_to)
    return given, limits


def test_short_answers_are_matched_and_long_ones_overlap(base, told):
    given, _ = told
    chats = [chat("Who?", "Ann."), chat("Where?", " In Easthaven. "), chat("When?", LONG), chat("How?", LONG[:-20])]
    given += [("Ann.", True), ("In Westhaven.", True), (LONG.strip(), True), ("cat", False)]
    found = evaluation.score(base, TOKENIZER, chats)
    assert [row.short for row in found.rows] == [True, True, False, False]
    assert [row.exact for row in found.rows] == [True, False, True, False]
    assert (found.exact_match, found.short_rows, found.long_rows, found.cut_off) == (0.5, 2, 2, 1)
    assert found.exact_match_error == pytest.approx(evaluation.standard_error(0.5, 2))
    assert evaluation.Scores(found.rows[:1] * 2, 1.0).exact_match_error is None  # two of two are no certainty
    assert found.rows[2].overlap == 100 and 0 < found.rows[3].overlap < 20 < found.rows[1].overlap < 100
    assert found.overlap == pytest.approx((100 + found.rows[3].overlap) / 2)
    assert found.overlap_error == pytest.approx((100 - found.rows[3].overlap) / 2)
    assert found.answers == [text for text, _ in given]
    assert found.loss == pytest.approx(evaluation.loss(base, TOKENIZER, chats), rel=1e-6)


def test_a_right_answer_may_be_given_the_length_that_it_needs(base, told):
    given, limits = told
    given += [("", False)] * 2
    evaluation.score(base, TOKENIZER, [chat("Who?", "Ann."), chat("Where?", LONG)])
    assert limits == [len(TOKENIZER(text, add_special_tokens=False)["input_ids"]) + 2 for text in ("Ann.", LONG)]


@pytest.mark.parametrize(
    ("right", "short"),
    [("a" * 80, True), ("a" * 81, False), ("a\nb", False), (f"\n {'a' * 80} \n", True)],
)
def test_an_answer_is_short_up_to_one_line_of_80_characters(right, short):
    assert scores.is_short(right) is short


def test_overlap_is_chrf_of_characters_in_any_language():
    """By hand: of the bigrams of 日本 and 日本語, one of one is right, and one of two is found."""
    from sacrebleu.metrics import CHRF

    parts = [(1, 2 / 3), (1, 1 / 2)]  # precision and recall of one character and of two
    precision, recall = (sum(part[place] for part in parts) / 2 for place in (0, 1))
    wanted = 100 * 5 * precision * recall / (4 * precision + recall)
    assert CHRF().sentence_score("日本", ["日本語"]).score == pytest.approx(wanted)


def test_what_does_not_exist_is_none_and_json_takes_all_of_it(base, told):
    given, _ = told
    given += [("", False)]
    found = evaluation.score(base, TOKENIZER, [chat("Who?", "Ann.")]).as_dict()
    assert found["overlap"] is found["overlap_error"] is found["loss_error"] is found["exact_match_error"] is None
    assert (found["rows"], found["short_rows"], found["long_rows"], found["cut_off"]) == (1, 1, 0, 1)
    given[:] = [("x", True)]
    found = evaluation.score(base, TOKENIZER, [chat("Who?", LONG)]).as_dict()
    assert found["exact_match"] is None and found["overlap"] is not None
    broken = evaluation.Scores([scores.ScoredAnswer("", True, True, False, 0.0, math.nan, 3)] * 2, 1.0)
    assert json.loads(json.dumps(broken.as_dict(), allow_nan=False))["loss"] is None


def test_the_last_answer_of_a_chat_is_asked_for_with_all_that_came_before(base, monkeypatch):
    asked, generate = [], base.generate
    monkeypatch.setattr(base, "generate", lambda **batch: asked.append(batch["input_ids"][0]) or generate(**batch))
    chats = [chat("Who?", "Ann.") + chat("Where?", "In Easthaven.")]
    found = evaluation.score(base, TOKENIZER, chats)
    wanted = TOKENIZER.apply_chat_template(split_question(chats[0])[0], add_generation_prompt=True, return_dict=True)
    assert asked[0].tolist() == wanted["input_ids"]
    both = [len(TOKENIZER(text, add_special_tokens=False)["input_ids"]) + 1 for text in ("Ann.", "In Easthaven.")]
    assert found.tokens == sum(both)  # the loss is of all answers, as in training


def test_a_trained_model_is_scored_as_by_the_single_functions():
    from qlora_helpers.adapters.files import load_adapter

    model = load_adapter(load_model(hardware=CPU), data_path("adapters", "sentences"))
    chats = CHATS[:8]
    found = evaluation.score(model, TOKENIZER, chats)
    assert found.exact_match == evaluation.exact_match(model, TOKENIZER, chats)
    assert found.loss == pytest.approx(evaluation.loss(model, TOKENIZER, chats))
    assert found.cut_off == 8 * (1 - evaluation.share_that_ends(model, TOKENIZER, chats))
    with model.disable_adapter():
        before = evaluation.score(model, TOKENIZER, chats)
    assert before.loss > found.loss and before.cut_off == 8


@pytest.mark.parametrize(
    ("chats", "options", "said"),
    [
        ([], {}, r"chats=\[\]: there is nothing to score"),
        ([chat("Who?", "Ann."), chat("Who?", "Ann. " * 130)], {}, r"chat 2 has \d+ tokens, and the model takes 256"),
        ([chat("<|end|>", "Ann.")], {}, r"chat 1: message 1 \(user\) has '<\|end\|>' in its text"),
        ([chat("Who?", "Ann.")], {"batch_size": 0}, "batch_size=0: must be a whole number, 1 or more, or None"),
    ],
)
def test_what_has_no_score_is_refused(chats, options, said, base):
    with pytest.raises(ValueError, match=f"^{said}"):
        evaluation.score(base, TOKENIZER, chats, **options)
