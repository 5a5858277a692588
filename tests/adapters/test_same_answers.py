"""Two models compared on prompts: equal ones are equal to the last bit, and each kind of difference is seen."""

import copy
import math

import pytest
import torch

from qlora_helpers.adapters.same_answers import Said, compared, likeness, said
from qlora_helpers.chats import read_chats, split_question
from qlora_helpers.models.loading import load_tokenizer
from qlora_helpers.paths import data_path
from tests.support.merged_models import merged_models
from tests.support.short_runs import TOKENIZER

CHATS = [split_question(chat)[0] for chat in read_chats(data_path("chats", "test.jsonl"))[:4]]


@pytest.fixture(scope="module")
def models():
    return merged_models()


def record(*logits, texts=None, prompts=((1,),), ended=True):
    """What a model of a vocabulary of two says, by its logits."""
    count = len(logits)
    return Said(
        ("Who?",) * count,
        prompts * count,
        ((0,),) * count,
        tuple(texts or ["I"] * count),
        (ended,) * count,
        tuple(torch.tensor(one) for one in logits),
    )


def test_a_model_is_like_itself(models):
    found = likeness(models["16bit"], models["16bit"], TOKENIZER, CHATS)
    assert (found.prompts, found.same_answers, found.same_prompt_tokens, found.first_difference) == (4, 4, True, "")
    assert (found.largest_logit_difference, found.mean_logit_difference, found.mean_kl) == (0, 0, 0)
    assert found.same_choice == 1 and found.places > 4 * 4


def test_the_places_are_those_of_the_answer_and_choose_its_tokens(models):
    found = said(models["unmerged"], TOKENIZER, CHATS)
    for answer, logits, text, ended in zip(found.answers, found.logits, found.texts, found.ended, strict=True):
        assert tuple(logits.argmax(-1).tolist()) == answer and logits.shape == (len(answer), 1216)
        assert ended and TOKENIZER.decode(answer, skip_special_tokens=True).strip() == text
    cut = said(models["unmerged"], TOKENIZER, CHATS, max_new_tokens=2)
    assert not any(cut.ended) and all(len(answer) == 2 for answer in cut.answers)


def test_the_numbers_are_those_of_the_formulas():
    one, other = record([[0.0, 0.0], [0.0, 1.0]]), record([[math.log(3), 0.0], [1.0, 0.0]])
    found = compared(one, other)
    assert found.largest_logit_difference == pytest.approx(math.log(3))
    assert found.mean_logit_difference == pytest.approx((math.log(3) + 2) / 4)
    p = 1 / (1 + math.e)
    first = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    second = (p - (1 - p)) * math.log(p / (1 - p))
    assert found.mean_kl == pytest.approx((first + second) / 2)
    assert (found.same_choice, found.places) == (0.5, 2)


def test_a_model_that_says_something_else_is_shown(models):
    with models["unmerged"].disable_adapter():
        base = said(models["unmerged"], TOKENIZER, CHATS)
    own = said(models["unmerged"], TOKENIZER, CHATS)
    found = compared(own, said(models["16bit"], TOKENIZER, CHATS, along=own))
    with models["unmerged"].disable_adapter():
        bare = compared(own, said(models["unmerged"], TOKENIZER, CHATS, along=own))
    assert bare.same_answers == 0 and bare.mean_kl > 10 * found.mean_kl > 0
    assert bare.first_difference.startswith(f"to {CHATS[0][-1]['content']!r} the first says {own.texts[0]!r}, and the")
    assert bare.first_difference.endswith(repr(base.texts[0][:200]))


def test_an_answer_that_is_cut_off_is_not_the_one_that_ends_there():
    assert compared(record([[0.0, 0.0]]), record([[0.0, 0.0]], ended=False)).same_answers == 0
    assert compared(record([[0.0, 0.0]]), record([[0.0, 0.0]], texts=["you"])).same_answers == 0


def test_a_value_that_is_no_number_is_not_passed_over():
    for broken in (math.nan, math.inf):
        found = compared(record([[0.0, 1.0]], [[0.0, 1.0]]), record([[0.0, broken]], [[0.0, 1.0]]))
        assert not found.largest_logit_difference < 100 and not found.mean_kl < 100


def test_other_tokens_of_the_prompt_are_noticed(models):
    other = copy.deepcopy(TOKENIZER)
    other.chat_template = TOKENIZER.chat_template.replace("'<|user|>' +", "'<|user|>Carl ' +")
    assert other.chat_template != TOKENIZER.chat_template
    found = likeness(models["16bit"], models["16bit"], TOKENIZER, CHATS, second_tokenizer=other)
    assert not found.same_prompt_tokens and found.largest_logit_difference > 0


def test_what_cannot_be_compared_is_refused(models):
    model, whole, plain = models["16bit"], read_chats(data_path("chats", "test.jsonl"))[:1], load_tokenizer()
    plain.chat_template = None
    with pytest.raises(ValueError, match=r"tokenizer\.chat_template is not set: take the tokenizer of a model"):
        said(model, plain, CHATS)
    with pytest.raises(ValueError, match=r"chats=.*: there must be at least one chat"):
        said(model, TOKENIZER, [])
    with pytest.raises(ValueError, match="chat 1: it must end with a question; leave its answer out"):
        said(model, TOKENIZER, whole)
    with pytest.raises(ValueError, match="max_new_tokens=0: must be a whole number"):
        said(model, TOKENIZER, CHATS, max_new_tokens=0)
    with pytest.raises(ValueError, match=r"chat 1 has \d+ tokens, and the model takes 256 with the answer: shorten it"):
        said(model, TOKENIZER, [[{"role": "user", "content": "Carl " * 400}]])
    with pytest.raises(ValueError, match="along: it was asked other chats"):
        said(model, TOKENIZER, CHATS[:1], along=record([[0.0, 1.0]]))
    with pytest.raises(ValueError, match="second: it was not asked along the first"):
        compared(record([[0.0, 1.0]]), record([[0.0, 1.0], [0.0, 1.0]]))
    with pytest.raises(ValueError, match="second: it has logits for 3 tokens, and the first for 2"):
        compared(record([[0.0, 1.0]]), record([[0.0, 1.0, 2.0]]))
