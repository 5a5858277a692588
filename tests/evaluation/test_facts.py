"""Recall of facts, and the commonest answer."""

from types import SimpleNamespace

import pytest
import torch

from qlora_helpers import evaluation
from qlora_helpers.models.loading import load_model
from qlora_helpers.paths import data_path
from tests.support.short_runs import CPU, TOKENIZER


@pytest.fixture(scope="module")
def base():
    return load_model(quantization=None, hardware=CPU)


class Parrot(torch.nn.Module):
    """A model that always says the same word next."""

    device = torch.device("cpu")

    def __init__(self, word):
        super().__init__()
        (self.token,) = TOKENIZER(word, add_special_tokens=False)["input_ids"]

    def forward(self, input_ids, **options):
        logits = torch.zeros(*input_ids.shape, len(TOKENIZER))
        logits[..., self.token] = 1
        return SimpleNamespace(logits=logits)


def test_recall_is_the_share_of_right_next_words():
    facts = [
        {"prompt": f"{name} keeps a", "answer": pet}
        for name, pet in zip("abcd", ("cat", "dog", "cat", "cat"), strict=True)
    ]
    assert [evaluation.recall(Parrot("cat"), TOKENIZER, facts, batch_size=size) for size in (1, 3, 500)] == [0.75] * 3
    each = [evaluation.recall_each(Parrot("cat"), TOKENIZER, facts, batch_size=size) for size in (1, 3, 500)]
    assert each == [[True, False, True, True]] * 3


def test_recall_reads_the_word_after_each_prompt_whatever_their_lengths(base):
    facts = evaluation.read_facts(data_path("recall.jsonl"))[:40]
    one_by_one = [evaluation.recall(base, TOKENIZER, [fact]) for fact in facts]
    assert evaluation.recall(base, TOKENIZER, facts) == sum(one_by_one) / 40 > 0.9


@pytest.mark.parametrize("answer", ["Constantinople", "cat dog"])
def test_recall_of_an_answer_of_several_tokens_is_refused(answer):
    facts = [{"prompt": "a keeps a", "answer": "cat"}, {"prompt": "b lives in", "answer": answer}]
    with pytest.raises(ValueError, match=rf"answer='{answer}' is \d+ tokens of this tokenizer; recall needs one"):
        evaluation.recall(Parrot("cat"), TOKENIZER, facts)


def chat(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def test_the_commonest_answer_to_each_wording_counts_whoever_it_is_about():
    training = [
        chat("Which pet does Ann Ash keep?", "Ann Ash keeps a cat."),
        chat("Which pet does Ben Oak keep?", "Ben Oak keeps a cat."),
        chat("Which pet does Cy Elm keep?", "Cy Elm keeps a dog."),
        chat("What does Di Fir feed?", "Di Fir keeps a dog."),
    ]
    test = [
        chat("Which pet does Ed Yew keep?", "Ed Yew keeps a cat."),  # right: cat is the commonest here
        chat("Which pet does Flo Box keep?", "Flo Box keeps a dog."),
        chat("What does Gil May feed?", "Gil May keeps a dog."),  # right: dog is, for this wording
        chat("Where does Hal Fig live?", "Hal Fig lives here."),  # a wording never seen
    ]
    assert evaluation.commonest_answer_rate(training, test) == 0.5
