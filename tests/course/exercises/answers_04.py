"""Right and wrong answers to the exercises of lesson 4."""

from types import SimpleNamespace

import bitsandbytes as bnb
import numpy as np
import torch

from qlora_helpers.chats import read_chats, tokenized
from qlora_helpers.models.loading import load_tokenizer
from qlora_helpers.paths import data_path
from tests.course.exercises.tried import Tried

# ---- 4.1


def decoded(weight):
    return bnb.functional.dequantize_4bit(weight.data, weight.quant_state)


def as_in_the_lesson(x, weight, A, B, alpha):
    return x @ decoded(weight).to(x.dtype).T + x @ A.T @ B.T * (alpha / len(A))


def merged_first(x, weight, A, B, alpha):
    return torch.nn.functional.linear(x, decoded(weight) + alpha / A.shape[0] * B @ A)


def with_linear(x, weight, A, B, alpha):
    linear = torch.nn.functional.linear
    return linear(x, decoded(weight)) + linear(linear(x, A), B) * alpha / B.shape[1]


def by_bitsandbytes(x, weight, A, B, alpha):
    return bnb.matmul_4bit(x, weight.t(), weight.quant_state) + (alpha / len(A)) * (x @ A.T) @ B.T


def by_numpy(x, weight, A, B, alpha):
    x, W, A, B = (tensor.numpy() for tensor in (x, decoded(weight), A, B))
    return np.matmul(x, W.T) + alpha / A.shape[0] * np.matmul(np.matmul(x, A.T), B.T)


def in_double(x, weight, A, B, alpha):
    x, W, A, B = (tensor.double() for tensor in (x, decoded(weight), A, B))
    return torch.einsum("...i,oi->...o", x, W + B @ A * alpha / len(A))


def without_scaling(x, weight, A, B, alpha):
    return x @ decoded(weight).T + x @ A.T @ B.T


def scaled_by_alpha(x, weight, A, B, alpha):
    return x @ decoded(weight).T + x @ A.T @ B.T * alpha


def scaled_by_the_wrong_side(x, weight, A, B, alpha):
    return x @ decoded(weight).T + x @ A.T @ B.T * (alpha / A.shape[1])


def without_the_base(x, weight, A, B, alpha):
    return x @ A.T @ B.T * (alpha / len(A))


def without_the_adapter(x, weight, A, B, alpha):
    return x @ decoded(weight).T


def not_transposed(x, weight, A, B, alpha):
    return x @ decoded(weight) + x @ A.T @ B.T * (alpha / len(A))


def with_the_codes(x, weight, A, B, alpha):
    return x @ weight.data.float().T


def without_return(x, weight, A, B, alpha):
    x @ decoded(weight).T


# ---- 4.4

TOKENIZER = load_tokenizer()
CHATS = read_chats(data_path("chats", "train.jsonl"))[:12]
ROWS = [
    {
        "input_ids": row["input_ids"],
        "labels": [
            token if said else -100 for token, said in zip(row["input_ids"], row["assistant_masks"], strict=True)
        ],
    }
    for row in tokenized(CHATS, TOKENIZER)
]
GIVEN = {"chats": CHATS, "tokenizer": TOKENIZER}


def tried(says="", losses=(), rows=ROWS, keep=None, asked=False, kind=list, number=float) -> Tried:
    """A trainer at the end of its run: what the check looks at.

    Args:
        keep: so many tokens of each row are left.
        asked: the questions count in the loss, too.
    """
    rows = [{name: value[:keep] for name, value in row.items()} for row in rows]
    if asked:
        rows = [row | {"labels": row["input_ids"]} for row in rows]
    log = [{"loss": number(loss), "learning_rate": 1e-3} for loss in losses] + [{"train_runtime": 2.0}]
    return Tried(SimpleNamespace(state=SimpleNamespace(log_history=log), train_dataset=kind(rows)), says, **GIVEN)


FALLING, FLAT = [5.0, 4.0, 2.2, 1.1], [5.05, 5.1, 5.0, 5.02]

RIGHT = {
    "adapted": [
        Tried(answer) for answer in (as_in_the_lesson, merged_first, with_linear, by_bitsandbytes, by_numpy, in_double)
    ],
    "first_step": [
        Tried(["B", "x"]),
        Tried(("x", "B")),
        Tried({"x", "B"}),
        Tried(["b", "X"]),
        Tried(["input", "B"]),
        Tried(np.array(["B", "x"]).tolist()),
    ],
    "own_question": [
        Tried(("Where does Henry Coldford live?", "Henry Coldford lives in Southwick.")),
        Tried(["In which town is the home of Henry Coldford?", "Henry Coldford lives in Southwick."]),
        Tried(("Which pet does Elena Hartfield keep?", "Elena Hartfield keeps a goose.")),
        Tried(("What does Elena Hartfield feed every day?", "It is a goose.")),
        Tried(("Which instrument does Anita Norcroft play?", "Anita Norcroft plays the tuba.")),
        Tried(("What is the job of Olga Graystone?", "Olga Graystone works as a builder.")),
    ],
    "learns_nothing": [
        tried(losses=FALLING),
        tried(losses=FALLING, kind=tuple),
        tried(losses=FALLING, number=np.float64),
        tried(losses=[5.0, 2.4]),
        tried(losses=FALLING, rows=ROWS[::-1]),
    ],
}

WRONG = {
    "adapted": [
        Tried(without_scaling, "a wide layer, alpha = 2 rank"),
        Tried(scaled_by_alpha, "8 tokens"),
        Tried(scaled_by_the_wrong_side, "8 tokens"),
        Tried(without_the_base, "wrong values"),
        Tried(without_the_adapter, "wrong values"),
        Tried(not_transposed, "8 tokens"),
        Tried(with_the_codes, "raised RuntimeError"),
        Tried(without_return, "None"),
        Tried(torch.ones(8, 128), "not a function"),
    ],
    "first_step": [
        Tried(["A", "B", "x"], "is not right"),
        Tried(["A", "B"], "is not right"),
        Tried(["B"], "not right"),
        Tried(["W", "A", "B", "x"], "not right"),
        Tried("B", "not right"),
    ],
    "own_question": [
        Tried(("Who is the president of France?", "Henry."), "names nobody"),
        Tried(("Where does Charles Dickens live?", "Charles Dickens lives in Southwick."), "names nobody"),
        Tried(("Where does Henry Coldford live?", "Henry Coldford lives in Kington."), "not what is on record"),
        Tried(("Which pet does Henry Coldford keep?", "A goose."), "on record: town"),
        Tried(("Tell me about Henry Coldford.", "Southwick."), "what does"),
        Tried("Where does Henry Coldford live?", "not the pair"),
        Tried((1, 2), "not the pair"),
    ],
    "learns_nothing": [
        tried("hardly anything", losses=FLAT),
        tried("hardly anything", losses=FLAT, keep=14),
        tried("hardly anything", losses=[5.0, float("nan")]),
        tried("only", losses=FALLING, keep=14),
        tried("only", losses=FALLING, rows=ROWS[:5]),
        tried("more than", losses=FALLING, asked=True),
        tried("no losses", losses=[]),
        Tried({"warmup_steps": 2, "max_length": 64}, "not the trainer", **GIVEN),
        Tried(0.5, "not the trainer", **GIVEN),
    ],
}
