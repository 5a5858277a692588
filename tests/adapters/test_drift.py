"""How far a changed model's logits lie from the original's."""

import pytest
import torch

from qlora_helpers.adapters.drift import drift, logits
from qlora_helpers.chats import read_chats
from qlora_helpers.paths import data_path
from tests.support.merged_models import merged_models
from tests.support.short_runs import TOKENIZER

CHATS = read_chats(data_path("chats", "test.jsonl"))[:50]


@pytest.fixture(scope="module")
def models():
    return merged_models()


def test_drift_is_counted_over_tokens_and_not_over_padding(models):
    short = [CHATS[0], CHATS[1] + CHATS[2]]
    together, alone = logits(models["unmerged"], TOKENIZER, short), logits(models["unmerged"], TOKENIZER, short[:1])
    torch.testing.assert_close(together[: len(alone)], alone, atol=1e-3, rtol=1e-3)


def test_drift_of_known_numbers():
    found = drift(torch.tensor([[1.0, 2.0], [0.0, 4.0]]), torch.tensor([[1.0, 2.5], [1.0, 0.0]]))
    assert (found.largest, found.mean, found.same_choice) == (4.0, 1.375, 0.5)
    with pytest.raises(ValueError, match=r"found has the shape \(2, 2\), wanted \(1, 2\)"):
        drift(torch.zeros(2, 2), torch.zeros(1, 2))
