"""Rows of different lengths in batches: which go together, and how they are padded."""

from types import SimpleNamespace

import pytest
import torch

from qlora_helpers.evaluation.batches import evaluating, grouped, padded, padding_token


@pytest.mark.parametrize(
    ("rows", "tokens", "batches"),
    [
        (2, None, [[1, 3], [4, 2], [0]]),
        (9, None, [[1, 3, 4, 2, 0]]),
        (9, 20, [[1, 3], [4, 2, 0]]),  # 2 x 10 tokens are just as many as are allowed
        (9, 19, [[1], [3, 4], [2, 0]]),  # the padding counts: 3 x 8 would be too many
        (9, 3, [[1], [3], [4], [2], [0]]),  # a row that alone has more is a batch
        (1, 100, [[1], [3], [4], [2], [0]]),
    ],
)
def test_rows_of_similar_length_go_together_the_longest_first(rows, tokens, batches):
    assert list(grouped([2, 10, 5, 8, 6], rows, tokens)) == batches
    assert list(grouped([], rows, tokens)) == []


@pytest.mark.parametrize(
    ("side", "ids", "mask"),
    [
        ("left", [[1, 2, 3], [9, 9, 4]], [[1, 1, 1], [0, 0, 1]]),
        ("right", [[1, 2, 3], [4, 9, 9]], [[1, 1, 1], [1, 0, 0]]),
    ],
)
def test_shorter_rows_are_padded_on_the_side_that_is_asked_for(side, ids, mask):
    made = padded([[1, 2, 3], [4]], SimpleNamespace(pad_token_id=9, eos_token_id=7), side)
    assert (made["input_ids"].tolist(), made["attention_mask"].tolist()) == (ids, mask)


@pytest.mark.parametrize(("pad", "end", "token"), [(9, 7, 9), (0, 7, 0), (None, 7, 7), (None, None, 0)])
def test_where_no_token_is_for_padding_any_will_do(pad, end, token):
    assert padding_token(SimpleNamespace(pad_token_id=pad, eos_token_id=end)) == token


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_before_is_restored_also_after_an_error(training):
    model = torch.nn.Linear(2, 2).train(training)
    with pytest.raises(KeyError), evaluating(model):
        assert not model.training and not torch.is_grad_enabled()
        raise KeyError
    assert model.training is training and torch.is_grad_enabled()
