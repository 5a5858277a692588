"""The exercises of lesson 4: a LoRA layer on a 4-bit weight, the first gradients, a question, and a run to mend."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from qlora_helpers.chats import Chat, tokenized
from qlora_helpers.course.exercises.asking import Exercise, choice, function
from qlora_helpers.course.exercises.reading import shown
from qlora_helpers.evaluation import read_facts
from qlora_helpers.paths import data_path

__all__ = ["adapted", "first_step", "learns_nothing", "own_question"]

# ---- 4.1


def _forward(x, weight, A, B, alpha):
    import bitsandbytes as bnb  # only when it is asked: it takes seconds to import

    W = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    return x @ W.to(x.dtype).T + alpha / A.shape[0] * (x @ A.T) @ B.T


def _layers() -> Mapping[str, tuple]:
    """Layers of several shapes, each with an input, its 4-bit weight, A, B and alpha."""
    import bitsandbytes as bnb
    import torch

    dice = torch.Generator().manual_seed(4)

    def layer(rows: tuple[int, ...], inputs: int, outputs: int, rank: int, alpha: float) -> tuple:
        def drawn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=dice)

        codes, state = bnb.functional.quantize_4bit(drawn(outputs, inputs), quant_type="nf4", compress_statistics=True)
        weight = bnb.nn.Params4bit(codes, requires_grad=False, quant_state=state, bnb_quantized=True)
        return drawn(*rows, inputs), weight, drawn(rank, inputs) / inputs, drawn(outputs, rank), alpha

    return {
        "8 tokens, 128 to 128, alpha = rank": layer((8,), 128, 128, 16, 16),
        "a wide layer, alpha = 2 rank": layer((8,), 64, 256, 8, 16),
        "two chats of 5 tokens, rank 4, alpha 32": layer((2, 5), 256, 64, 4, 32),
        "rank 1, alpha 0.5": layer((3,), 64, 64, 1, 0.5),
    }


adapted = Exercise(
    number="4.1",
    title="a LoRA layer on a 4-bit weight",
    kind="build",
    difficulty="medium",
    minutes=10,
    hints=(
        "Two ways lead from x to the output, and they are added: one through W, one through A and then B.",
        "W is outputs x inputs, A is rank x inputs and B is outputs x rank: which of them are transposed? And which number "
        "is the rank, by which alpha is divided?",
    ),
    fault=function(_forward, _layers, rel=1e-3),
)

# ---- 4.2

first_step = Exercise(
    number="4.2",
    title="the first step",
    kind="predict",
    difficulty="medium",
    minutes=5,
    hints=(
        "A gradient travels back along the arrows of figure 4.2. What is it multiplied by on its way to each of the four?",
        "One of the four is frozen. And through which matrix must the gradient go to reach another? What does that "
        "matrix hold at the first step? Count the ways that lead to x, too.",
    ),
    fault=choice({"B", "x"}, {"W": ["weight"], "A": [], "B": [], "x": ["input"]}),
)

# ---- 4.3

_NAME = re.compile(r"[A-Z][a-z]+ [A-Z][a-z]+")
_ASKS_FOR = {
    "town": {"live", "town", "home", "house"},
    "job": {"job", "work", "profession"},
    "instrument": {"play", "instrument"},
    "pet": {"pet", "keep", "feed", "animal"},
    "year": {"born", "year", "begin"},
}


@cache
def _records() -> Mapping[str, Mapping[str, str]]:
    """What `data/recall.jsonl` says of each person."""
    of_people: dict[str, dict[str, str]] = defaultdict(dict)
    for fact in read_facts(data_path("recall.jsonl")):
        of_people[_NAME.search(fact["prompt"])[0]][fact["attribute"]] = fact["answer"]
    return dict(of_people)


def _a_right_reply(answer: Any) -> str:
    """What is wrong with a question and the model's reply to it."""
    is_pair = isinstance(answer, Sequence) and not isinstance(answer, str) and len(answer) == 2
    if not is_pair or not all(isinstance(part, str) for part in answer):
        return f"your answer is {shown(answer)}, and not the pair of question and reply that ask_about gives back."
    question, reply = answer
    people = [name for name in _NAME.findall(question) if name in _records()]
    if not people:
        return f"“{question}” names nobody who is on record."
    words = set(re.findall(r"[a-z]+", question.lower()))
    asked = [kind for kind, of_it in _ASKS_FOR.items() if of_it & words]
    if len(asked) != 1:
        return f"what does “{question}” ask for? It should be a town, a job, an instrument, a pet or a year."
    known = _records()[people[0]]
    if asked[0] not in known:
        return f"the {asked[0]} of {people[0]} is not on record; on record: {', '.join(known)}."
    if known[asked[0]] in re.findall(r"\w+", reply):
        return ""
    return f"the model's reply, “{reply}”, is not what is on record."


own_question = Exercise(
    number="4.3",
    title="a question of your own",
    kind="run",
    difficulty="easy",
    minutes=5,
    hints=(
        "Take a person from the list above, and ask for what is on record of them.",
        "Ask in the very words of a training chat, with the person's first and last name. If the reply is wrong, take another "
        "person: the model does not know everything.",
    ),
    fault=_a_right_reply,
)

# ---- 4.4


def _learns_the_answers(trainer: Any, chats: Sequence[Chat], tokenizer: Any) -> str:
    """What is wrong with a run that has ended: its loss, or what it was trained on."""
    log = getattr(getattr(trainer, "state", None), "log_history", None)
    rows = getattr(trainer, "train_dataset", None)
    if log is None or rows is None:
        return f"your answer is {shown(trainer)}, and not the trainer that short_run gives back."
    losses = [entry["loss"] for entry in log if "loss" in entry]
    if len(losses) < 2:
        return "it has logged no losses: was it trained?"
    if not losses[-1] < losses[0] / 2:
        return f"the loss was {losses[0]:.2f} at first and {losses[-1]:.2f} at the end: hardly anything was learnt."
    learnt = sum(label != -100 for row in rows for label in row["labels"])
    answers = sum(sum(row["assistant_masks"]) for row in tokenized(list(chats), tokenizer))
    if learnt < answers:
        return (
            f"the loss falls from {losses[0]:.2f} to {losses[-1]:.2f}, but the run has learnt only {learnt:,} tokens of the "
            f"answers in {len(rows)} chats, and not all of them."
        )
    if learnt > answers:
        return f"the loss falls, but {learnt:,} tokens were learnt, more than the answers have."
    return ""


learns_nothing = Exercise(
    number="4.4",
    title="a run that learns nothing useful",
    kind="run",
    difficulty="hard",
    minutes=15,
    hints=(
        "Print the learning rates in trainer.state.log_history: a run that does not move has none to speak of.",
        "Decode the tokens of trainer.train_dataset[0] whose labels are not -100, and hold them against the chat. Which of "
        "the trainer's settings decides where a row ends?",
    ),
    fault=_learns_the_answers,
)
