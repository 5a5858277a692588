"""What was forgotten: the sets, the measure by hand, and runs that keep and that destroy what the base knows."""

import json
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from qlora_helpers import evaluation
from qlora_helpers.evaluation import knowledge
from qlora_helpers.evaluation.knowledge import Item, Knowledge, KnownItem
from qlora_helpers.models.loading import load_model
from qlora_helpers.settings import Settings
from tests.support.short_runs import CHATS, CPU, TOKENIZER, run


@pytest.fixture(scope="module")
def base():
    return load_model(quantization=None, hardware=CPU)


def test_the_general_set_is_whole():
    items = knowledge.general_items()
    facts, texts = [item for item in items if item.wrong], [item for item in items if not item.wrong]
    assert (len(facts), len(texts)) == (45, 15)
    assert all(item.prompt and len({item.answer, *item.wrong}) == 4 for item in facts)
    assert len({item.prompt for item in facts}) == 45 and len({item.answer for item in texts}) == 15
    assert all(text == text.strip() for item in items for text in (item.prompt, item.answer, *item.wrong))
    assert all(not item.prompt and 80 < len(item.answer) < 160 for item in texts)
    # a model that prefers long or short words has no advantage
    longest = sum(len(item.answer) > max(map(len, item.wrong)) for item in facts)
    shortest = sum(len(item.answer) < min(map(len, item.wrong)) for item in facts)
    assert longest <= 20 and shortest <= 20


def test_the_shipped_set_has_wrong_answers_of_the_same_kind():
    items = knowledge.shipped_items()
    assert len(items) == 500 and all(len({item.answer, *item.wrong}) == 4 for item in items)
    years = [item for item in items if item.answer.isdigit()]
    assert years and all(word.isdigit() for item in years for word in item.wrong)
    assert not any(word.isdigit() for item in items if item not in years for word in item.wrong)
    assert max(Counter(item.wrong for item in items).values()) < 10


def test_the_set_is_chosen_by_the_tokenizer(monkeypatch):
    assert knowledge._items_for(TOKENIZER)[1] is knowledge.shipped_items()
    pieces = lambda texts, **options: {"input_ids": [list(range(len(text))) for text in texts]}  # noqa: E731
    pieces.unk_token_id = None
    assert knowledge._items_for(pieces) == ("facts of general knowledge", knowledge.general_items())
    monkeypatch.setattr(knowledge, "shipped_items", lambda: (_ for _ in ()).throw(FileNotFoundError("no data")))
    assert knowledge._items_for(TOKENIZER)[0] == "facts of general knowledge"  # the package without the course


def test_an_item_is_measured_as_by_hand(base, monkeypatch):
    prompt, right, wrong = "Elena Hartfield keeps a", "goose", ("cat", "dog", "horse")
    text = "Elena Hartfield keeps a goose."
    monkeypatch.setattr(
        knowledge, "_items_for", lambda tokenizer: ("facts", [Item(prompt, right, wrong), Item("", text)])
    )
    found = evaluation.measure_knowledge(base, TOKENIZER)
    with torch.no_grad():
        ids = TOKENIZER(prompt)["input_ids"]
        log_p = base(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        whole = TOKENIZER(text)["input_ids"]
        each = base(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
    words = {word: log_p[TOKENIZER(word, add_special_tokens=False)["input_ids"][0]].item() for word in (right, *wrong)}
    fact, plain = found.items
    assert (fact.tokens, fact.loss) == (1, pytest.approx(-words[right], rel=1e-4, abs=1e-5))
    assert fact.right is (max(words, key=words.get) == right) is True
    by_hand = -sum(each[place - 1, whole[place]].item() for place in range(1, len(whole)))
    assert (plain.tokens, plain.right, plain.loss) == (len(whole) - 1, None, pytest.approx(by_hand, rel=1e-4))
    swapped = [Item(prompt, "cat", ("goose", "dog", "horse"))]
    monkeypatch.setattr(knowledge, "_items_for", lambda tokenizer: ("facts", [*swapped, Item("", text)]))
    assert evaluation.measure_knowledge(base, TOKENIZER).right == 0


def test_a_continuation_is_what_differs_from_the_prompt_even_if_its_last_token_does():
    ids = {"ab": [1, 7], "ab c": [1, 8, 9], "": [1], "text": [1, 4, 5]}
    tokenizer = lambda texts: {"input_ids": [ids[text] for text in texts]}  # noqa: E731
    rows = knowledge._rows([("ab", "c"), ("", "text")], tokenizer)
    assert rows == [
        {"input_ids": [1, 8, 9], "assistant_masks": [0, 1, 1]}, {"input_ids": [1, 4, 5], "assistant_masks": [0, 1, 1]},
    ]  # fmt: skip


def test_a_short_run_keeps_and_a_learning_rate_far_too_high_destroys(tmp_path):
    kept = evaluation.forgetting(run(tmp_path / "kept", Settings(steps=6, batch_size=4)).model, TOKENIZER)
    assert kept.before.right == kept.after.right == 1 and kept.verdict in ("kept", "less sure")
    assert kept.after.loss < 0.5 and kept.chance == 1

    from qlora_helpers.training.run import train

    model = load_model(quantization=None, hardware=CPU)
    before = evaluation.measure_knowledge(model, TOKENIZER)
    too_high = Settings(method="full", steps=6, batch_size=4, learning_rate=1e-2, warmup_steps=0)
    trained = train(model, TOKENIZER, CHATS, tmp_path / "lost", too_high, hardware=CPU).model
    with pytest.raises(ValueError, match=r"^before=None: this model has no adapter to switch off"):
        evaluation.forgetting(trained, TOKENIZER)
    lost = evaluation.forgetting(trained, TOKENIZER, before)
    assert lost.verdict == "forgotten" and lost.after.right < 0.6 and lost.after.loss > 3 and lost.chance < 1e-9
    assert "more than chance" in str(lost) and str(lost).endswith("It has forgotten some of what its base knew.")
    assert len(lost.as_dict()["by_item"]) == 500


def known(losses, right, text_loss=20.0):
    items = [
        KnownItem(Item(f"p{n}", "a", ("b",)), loss, 1, ok)
        for n, (loss, ok) in enumerate(zip(losses, right, strict=True))
    ]
    return Knowledge("facts", [*items, KnownItem(Item("", "text"), text_loss, 10, None)])


def kept_of(before, after, monkeypatch):
    monkeypatch.setattr(knowledge, "measure_knowledge", lambda *args: after)
    return evaluation.forgetting(None, None, before)


@pytest.mark.parametrize(
    ("losses", "right", "verdict", "said"),
    [
        ([1.0] * 20, [True] * 20, "kept", "none has changed"),
        ([1.0] * 20, [True] * 20, "kept", "no more than noise"),
        ([1.0, 1.2] * 10, [True] * 18 + [False] * 2, "less sure", "no more than chance (p = 0.5)"),
        ([0.5] * 20, [True] * 20, "kept", "more than noise"),
        ([2.0] * 20, [True] * 12 + [False] * 8, "forgotten", "more than chance (p = 0.0078)"),
        ([math.nan] * 20, [False] * 20, "broken", "no longer a finite number"),
    ],
)
def test_the_verdict_is_by_what_is_more_than_chance(losses, right, verdict, said, monkeypatch):
    before = known([1.0] * 20, [True] * 20)
    found = kept_of(before, known(losses, right), monkeypatch)
    assert found.verdict == verdict and said in str(found)
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["verdict"] == verdict
    assert "on these and 1 short texts" in str(found)


def test_a_set_without_texts_says_nothing_of_plain_text(monkeypatch):
    def facts_of(knowledge):
        return replace(knowledge, items=knowledge.items[:-1])

    before, after = known([1.0] * 20, [True] * 20), known([1.0, 1.2] * 10, [True] * 20)
    assert "texts" in str(kept_of(before, after, monkeypatch))
    said = str(kept_of(facts_of(before), facts_of(after), monkeypatch))
    assert said.endswith("is less sure than that was.") and "text" not in said


def test_other_items_are_refused(monkeypatch):
    before = known([1.0] * 3, [True] * 3)
    other = replace(before, items=before.items[:-1])
    with pytest.raises(ValueError, match=r"^before is of other items"):
        kept_of(before, other, monkeypatch)


def test_figures_and_their_errors():
    found = known([1.0, 2.0, 3.0, 4.0], [True, True, True, False])
    assert known([1.0] * 4, [True] * 4).right_error is None  # not 0, as the formula says: four facts are no certainty
    assert found.right == 0.75 and found.right_error == evaluation.standard_error(0.75, 4)
    assert found.loss == pytest.approx(30 / 14) and found.loss_error > 0
