"""The plan of the fair comparisons: what is tried, and what is trained."""

from collections import Counter

import pytest

from data.scripts.measure import comparisons
from data.scripts.measure.held_out import training_validation_test
from qlora_helpers.models.loading import load_tokenizer
from qlora_helpers.training.trainer import check_settings
from tests.support.short_runs import CPU

KINDS = comparisons.KINDS.values()


def test_each_kind_is_tried_at_several_rates_but_where_the_rate_is_the_point():
    assert len(comparisons.kinds()) == len(KINDS), "a label of two kinds"
    for kind in KINDS:
        assert len(kind.rates) >= (1 if kind.group == "alpha" else 2) and list(kind.rates) == sorted(set(kind.rates))
        assert kind.seeds >= 3, "no interval of less"


@pytest.mark.parametrize("base", sorted({kind.base for kind in KINDS}))
def test_every_setting_can_be_trained(base):
    model = comparisons.load(base)
    for kind in KINDS:
        if kind.base == base:
            for rate in kind.rates:
                check_settings(model, comparisons.settings_of(kind, rate, 0), CPU)


def test_a_comparison_of_batches_sees_as_many_chats_in_each():
    assert {comparisons.chats_seen(job) for job in comparisons.JOBS if comparisons.GROUPS[job.kind] == "batch"} == {
        6400
    }


def test_answers_dealt_anew_are_the_same_answers_to_the_same_questions():
    training, _, _ = training_validation_test(load_tokenizer(), 64)
    dealt, bits = comparisons.dealt_anew(training, 400)

    def forms(chats, place):
        return Counter(comparisons.NAME.sub("…", chat[place]["content"]) for chat in chats)

    assert forms(dealt, 0) == forms(training[:400], 0) and forms(dealt, 1) == forms(training[:400], 1)
    for question, answer in dealt:
        assert comparisons.NAME.search(question["content"])[0] == comparisons.NAME.search(answer["content"])[0]
    right = {chat[0]["content"]: chat[1]["content"] for chat in training[:400]}
    assert sum(right[q["content"]] == a["content"] for q, a in dealt) < 100, "few are dealt what is true"
    assert 1 < bits / 400 < 8
    assert comparisons.dealt_anew(training, 400) == (dealt, bits)
