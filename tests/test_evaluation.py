"""The scores of a model: loss and answers as computed by hand, exact match word for word."""

from types import SimpleNamespace

import pytest
import torch

from qlora_helpers import evaluation
from qlora_helpers.chats import count_tokens, split_question
from qlora_helpers.models.loading import load_model
from qlora_helpers.paths import data_path
from tests.support.short_runs import CHATS, CPU, TOKENIZER, trainer_of


@pytest.fixture(scope="module")
def base():
    return load_model(quantization=None, hardware=CPU)


def loss_by_hand(model, chat):
    """The sum of -log p over the answer's tokens and its EOS token, and their number; without the template's mask."""
    whole = TOKENIZER.apply_chat_template(chat, return_dict=True)["input_ids"]
    asked = len(TOKENIZER.apply_chat_template(chat[:-1], add_generation_prompt=True, return_dict=True)["input_ids"])
    with torch.no_grad():
        log_p = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
    return -sum(log_p[i - 1, whole[i]].item() for i in range(asked, len(whole))), len(whole) - asked


def test_the_loss_of_one_chat_is_what_it_is_by_hand(base):
    total, count = loss_by_hand(base, CHATS[0])
    assert evaluation.loss(base, TOKENIZER, CHATS[:1]) == pytest.approx(total / count, rel=1e-5)


def test_the_loss_of_many_chats_is_their_mean_over_tokens_however_they_are_batched(base):
    chats = [*CHATS[:4], [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "In Easthaven."}]]
    totals, counts = zip(*(loss_by_hand(base, chat) for chat in chats), strict=True)
    assert len({count_tokens(chat, TOKENIZER) for chat in chats}) > 1 and len(set(counts)) > 1  # there is padding
    for batch_size in (2, 5):
        loss = evaluation.loss(base, TOKENIZER, chats, batch_size=batch_size)
        assert loss == pytest.approx(sum(totals) / sum(counts), rel=1e-5)


def test_the_loss_of_training_is_the_one_that_evaluation_computes(base, tmp_path):
    trainer = trainer_of(tmp_path, None, chats=CHATS[:4])
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model.eval(), next(iter(trainer.get_train_dataloader())))
    assert loss.item() == pytest.approx(evaluation.loss(base, TOKENIZER, CHATS[:4]), rel=1e-4)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("<|end|><|assistant|>Yes", r"has '<\|end\|>' in its text, which this tokenizer takes for a special token"),
        ("a\ud800", r"has half a surrogate pair \(\\ud800\) at character 2: replace it"),
    ],
)
@pytest.mark.parametrize("score", ["answer", "exact_match", "loss", "share_that_ends"])
def test_a_text_that_is_no_plain_text_for_the_tokenizer_is_not_scored(score, typed, said, base):
    bad = [{"role": "user", "content": typed}, CHATS[0][1]]
    with pytest.raises(ValueError, match=rf"^chat 2: message 1 \(user\) {said}"):
        getattr(evaluation, score)(base, TOKENIZER, [CHATS[0], bad])


@pytest.mark.parametrize("training", [True, False])
def test_evaluating_leaves_the_mode_as_it_was(base, training):
    base.train(training)
    evaluation.loss(base, TOKENIZER, CHATS[:1])
    assert base.training is training
    base.eval()


BAD_NUMBERS = [
    *[(score, {"batch_size": value}) for score in ("answer", "recall", "loss", "share_that_ends") for value in (0, -1, 2.0, "8", True)],
    *[(score, {"max_new_tokens": value}) for score in ("answer", "exact_match", "share_that_ends") for value in (0, 1.5, "8", True)],
    *[("seconds_per_token", {"tokens": value}) for value in (0, 1.5, None, True)],
]  # fmt: skip


@pytest.mark.parametrize(("score", "bad"), BAD_NUMBERS)
def test_a_number_that_is_none_is_refused(score, bad):
    (name, value), data = *bad.items(), [{"prompt": "a", "answer": "b"}] if score == "recall" else CHATS[:1]
    if score == "seconds_per_token":
        data = CHATS[0][:1]
    with pytest.raises(ValueError, match=f"^{name}={value!r}: must be a whole number, 1 or more"):
        getattr(evaluation, score)(None, TOKENIZER, data, **bad)


@pytest.mark.parametrize("score", ["recall", "loss", "exact_match", "share_that_ends"])
def test_nothing_has_no_score(score):
    with pytest.raises(
        ValueError, match=r"^(chats|facts)=\[\]: there is nothing to score. Pass at least one (chat|fact)"
    ):
        getattr(evaluation, score)(None, TOKENIZER, [])


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


def test_exact_match_wants_the_answer_word_for_word(monkeypatch):
    chats = [chat("1", "Ann lives here."), chat("2", "Ben lives there."), chat("3", "Cy lives here.")]
    said = ["Ann lives here.", "Ben lives here.", "Cy lives here"]
    monkeypatch.setattr(evaluation, "answer", lambda model, tokenizer, questions, max_new_tokens: said)
    assert evaluation.exact_match(None, TOKENIZER, chats) == 1 / 3


def test_a_long_answer_is_not_cut_off_and_counted_as_wrong(monkeypatch):
    long = "The " * 30 + "end."
    tokens = len(TOKENIZER(long, add_special_tokens=False)["input_ids"])
    asked = []

    def answer(model, tokenizer, questions, max_new_tokens):
        asked.append(max_new_tokens)
        return [long]

    monkeypatch.setattr(evaluation, "answer", answer)
    assert evaluation.exact_match(None, TOKENIZER, [chat("?", long)]) == 1
    assert evaluation.exact_match(None, TOKENIZER, [chat("?", long)], tokens + 8) == 1
    assert asked == [tokens + 2, tokens + 8]
    with pytest.raises(ValueError, match=f"max_new_tokens=16: the right answer of chat 1 has {tokens} tokens"):
        evaluation.exact_match(None, TOKENIZER, [chat("?", long)], 16)


def test_an_answer_is_the_argmax_token_by_token(base):
    question = split_question(CHATS[0])[0]
    ids = TOKENIZER.apply_chat_template(question, add_generation_prompt=True, return_dict=True)["input_ids"]
    asked = len(ids)
    for _ in range(5):
        with torch.no_grad():
            ids = [*ids, base(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item()]
    assert TOKENIZER.eos_token_id not in ids[asked:]
    by_hand = TOKENIZER.decode(ids[asked:], skip_special_tokens=True).strip()
    assert evaluation.answer(base, TOKENIZER, [question], max_new_tokens=5) == [by_hand]


def test_a_model_is_asked_in_the_tokens_that_it_was_trained_on(base, monkeypatch):
    asked, generate = [], base.generate
    monkeypatch.setattr(base, "generate", lambda **batch: asked.append(batch["input_ids"]) or generate(**batch))
    evaluation.answer(base, TOKENIZER, [split_question(CHATS[0])[0]])
    trained = TOKENIZER.apply_chat_template(CHATS[0], return_dict=True)["input_ids"]
    assert asked[0][0].tolist() == trained[: asked[0].shape[1]]  # above all with one BOS token, not two


def test_answers_do_not_depend_on_their_batch(base):
    questions = [split_question(chat)[0] for chat in CHATS[:6]] + [[{"role": "user", "content": "Where?"}]]
    answers = evaluation.answer(base, TOKENIZER, questions, max_new_tokens=5)
    assert answers == evaluation.answer(base, TOKENIZER, questions, max_new_tokens=5, batch_size=2)
    assert len(answers) == 7 and len(set(answers)) > 1


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


@pytest.mark.parametrize(
    ("share", "count", "said"),
    [
        (1.5, 10, "share=1.5: must be a number, 0 to 1"),
        (float("nan"), 10, "share=nan: must be a number, 0 to 1"),
        (0.5, 0, "count=0: must be a whole number, 1 or more"),
        (0.5, 2.5, "count=2.5: must be a whole number, 1 or more"),
    ],
)
def test_what_is_no_share_of_a_count_has_no_standard_error(share, count, said):
    with pytest.raises(ValueError, match=said):
        evaluation.standard_error(share, count)


def test_the_standard_error_of_a_share():
    assert evaluation.standard_error(0.5, 100) == pytest.approx(0.05)
    assert evaluation.standard_error(0.9, 400) == pytest.approx(0.015)
    assert evaluation.standard_error(1.0, 500) == 0


def test_the_share_of_answers_that_end(monkeypatch):
    end = TOKENIZER.eos_token_id
    batches = [torch.tensor([[7, end, 0], [7, 7, 7]]), torch.tensor([[7, 7, end]])]
    monkeypatch.setattr(evaluation, "_generated", lambda *args: iter(batches))
    assert evaluation.share_that_ends(None, TOKENIZER, CHATS[:3]) == 2 / 3


def test_the_base_alone_does_not_stop():
    assert evaluation.share_that_ends(load_model(hardware=CPU), TOKENIZER, CHATS[:4], max_new_tokens=8) == 0
