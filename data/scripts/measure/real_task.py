"""What a short QLoRA run teaches a real language model, and what it does not: orders to JSON, and capitals of countries.

    python -m qlora_helpers fetch smollm2-135m             # the model, once
    python -m data.scripts.measure.real_task               # the rows missing from data/measured/real_task.json
    python -m data.scripts.measure.real_task --row "NF4, seed 0"  # one row, printed and not written
    python -m data.scripts.measure.real_task --list        # the names of the rows

The model is SmolLM2-135M-Instruct. A row takes five to ten minutes of one core; a stopped script continues with the next
row. The orders (data/scripts/make/orders.py) are in three parts that share no name, item or phrasing. The learning rate is
the one of `RATES` with the lowest loss on the validation orders; the test orders are asked afterwards. `valid` is the share
of answers that are a JSON object, with or without a Markdown fence around it, `right` the share whose five fields are all
right, `fields` of each field the share that is right, each with its standard error. `each` has a 1 for each right answer.

For the capitals, `alone` is the share of answers that are a text of up to four words, as all training answers are, and
`right` the share that name the capital, alone or in a sentence. `kept` is what `qlora_helpers.evaluation.forgetting` finds
with its set of general knowledge.
"""

import argparse
import importlib.metadata
import json
import os
import re
import sys
import tempfile
import time
import unicodedata
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch

from data.scripts import ROOT
from data.scripts.make.orders import FIELDS
from data.scripts.measure.commands import processor
from qlora_helpers import evaluation
from qlora_helpers.chats import Chat, read_chats, split_question
from qlora_helpers.hardware import detect
from qlora_helpers.json_files import write_json
from qlora_helpers.models.decoded_once import decoded_once
from qlora_helpers.models.loading import load_model, load_tokenizer
from qlora_helpers.models.weights import shuffle_linear_weights
from qlora_helpers.paths import data_path
from qlora_helpers.settings import Settings
from qlora_helpers.training.run import Run, train

TABLE = ROOT / "data" / "measured" / "real_task.json"
MODEL = "smollm2-135m"
CPU = detect("cpu")
BUDGET = {"steps": 48, "batch_size": 4, "max_length": 160, "warmup_steps": 5, "rank": 16, "alpha": 32}
RATES = (5e-4, 1e-3, 2e-3)
SEEDS = 3
EXAMPLES = 3
LONGEST = 96  # new tokens of an answer; the longest right one has less than half of it
AT_ONCE = 30  # questions
ALL_WEIGHTS = 2**30  # bytes: decoded once for a run, which changes no bit of it


def orders(part: str) -> list[Chat]:
    return read_chats(data_path("chats", "orders", f"{part}.jsonl"))


def capitals(part: str) -> list[Chat]:
    return read_chats(data_path("chats", "capitals", f"{part}.jsonl"))


# Answers


def fields_of(answer: str) -> dict | None:
    """The JSON object that an answer is, with or without a Markdown fence around it; None if it is none."""
    fence = re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", answer.strip(), re.DOTALL)
    try:
        found = json.loads(fence[1] if fence else answer)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def is_same(value: object, wanted: object) -> bool:
    """Whether a field is right: of the same kind, and equal but for capital letters."""
    if isinstance(value, str) and isinstance(wanted, str):
        return value.strip().casefold() == wanted.casefold()
    return type(value) is type(wanted) and value == wanted


def score_orders(answers: list[str], chats: list[Chat]) -> dict:
    """The shares of valid and right answers, with their standard errors."""
    found = [fields_of(answer) for answer in answers]
    wanted = [json.loads(chat[-1]["content"]) for chat in chats]
    fields = {
        name: [one is not None and name in one and is_same(one[name], want[name]) for one, want in zip(found, wanted, strict=True)]
        for name in FIELDS
    }  # fmt: skip
    right = [all(of) and len(one) == len(FIELDS) for one, of in zip(found, zip(*fields.values(), strict=True), strict=True) if True]
    wrong = [answer for answer, is_right in zip(answers, right, strict=True) if not is_right]
    return {
        "questions": len(chats),
        "valid": share([one is not None for one in found]),
        "right": share(right),
        "fields": {name: share(of) for name, of in fields.items()},
        "each": "".join(str(int(one)) for one in right),
        "some_wrong_answers": wrong[:5],
    }


def share(cases: list[bool]) -> list[float]:
    """A share and its standard error."""
    found = sum(cases) / len(cases)
    return [round(found, 4), round(evaluation.standard_error(found, len(cases)), 4)]


def plain(text: str) -> str:
    """Words in small letters without accents: Bogotá is also written Bogota."""
    letters = unicodedata.normalize("NFKD", text.casefold())
    return " ".join(re.findall(r"\w+", "".join(one for one in letters if not unicodedata.combining(one))))


def score_capitals(answers: list[str], chats: list[Chat]) -> dict:
    """The shares of answers that are as short as those of the training, and that name the capital."""
    right = [f" {plain(chat[-1]['content'])} " in f" {plain(said)} " for said, chat in zip(answers, chats, strict=True)]
    asked = [chat[0]["content"] for chat in chats]
    return {
        "questions": len(chats),
        "alone": share([len(answer.split()) <= 4 for answer in answers]),
        "right": share(right),
        "each": "".join(str(int(one)) for one in right),
        "some_answers": [f"{question} {answer}" for question, answer in zip(asked[:5], answers[:5], strict=True)],
    }


def asked(model, tokenizer, chats: list[Chat], examples: list[Chat] = ()) -> list[str]:
    """The model's answers to the last questions of chats, greedily; with the examples' turns before each."""
    questions = [split_question(chat)[0] for chat in chats]
    turns = [message for chat in examples for message in chat if message["role"] != "system"]
    questions = [[question[0], *turns, *question[1:]] for question in questions] if turns else questions
    return evaluation.answer(model, tokenizer, questions, max_new_tokens=LONGEST, batch_size=AT_ONCE)


# Runs


def load(base: str, model: str):
    loaded = load_model(model, quantization="nf4" if base == "NF4" else None, hardware=CPU)
    if base == "shuffled":
        shuffle_linear_weights(loaded)
    return loaded


def settings_of(base: str, rate: float, seed: int, **other) -> Settings:
    return Settings(**BUDGET | other, method="qlora" if base == "NF4" else "lora", learning_rate=rate, seed=seed)


def trained(base: str, rate: float, seed: int, chats: list[Chat], model: str, then: Callable[[Run], dict], **other) -> dict:
    """One run, and what `then` finds in the trained model."""
    tokenizer, loaded = load_tokenizer(model), load(base, model)
    settings = settings_of(base, rate, seed, **other)
    with tempfile.TemporaryDirectory() as folder, decoded_once(loaded, ALL_WEIGHTS):
        run = train(loaded, tokenizer, chats, Path(folder) / "run", settings, hardware=CPU)
        return {
            "base": base,
            "learning_rate": rate,
            "seed": seed,
            "training_seconds": round(run.seconds, 1),
            "trained_parameters": run.trainable_parameters,
            "losses": [round(loss, 4) for _, loss in run.history],
            **then(run.model, tokenizer),
        }


def validated(rate: float, *, model: str) -> dict:
    """A run with one of the rates, and its loss on the validation orders."""

    def then(tuned, tokenizer) -> dict:
        return {"validation_loss": round(evaluation.loss(tuned, tokenizer, orders("validation")), 5)}

    return trained("NF4", rate, 0, orders("train"), model, then)


def untrained(examples: int, base: str, *, model: str) -> dict:
    """What the model does before any run, with some of the training orders in the prompt."""
    tokenizer, loaded = load_tokenizer(model), load(base, model)
    with decoded_once(loaded, ALL_WEIGHTS):
        answers = asked(loaded, tokenizer, orders("test"), orders("train")[:examples])
    return {"base": base, "examples": examples, **score_orders(answers, orders("test"))}


def tuned(base: str, seed: int, *, model: str, rate: float) -> dict:
    """A run at the chosen rate, and the test orders; after the first of each base, what is left of general knowledge."""

    def then(model, tokenizer) -> dict:
        found = score_orders(asked(model, tokenizer, orders("test")), orders("test"))
        found |= {"test_loss": round(evaluation.loss(model, tokenizer, orders("test")), 5)}
        return found | ({"kept": kept(model, tokenizer)} if base == "NF4" and seed == 0 else {})

    return trained(base, rate, seed, orders("train"), model, then)


def kept(model, tokenizer) -> dict:
    """What is left of general knowledge, without the list of its items."""
    found = evaluation.forgetting(model, tokenizer).as_dict()
    return {name: value for name, value in found.items() if name != "by_item"}


def capitals_row(*, model: str, rate: float) -> dict:
    """The test capitals before and after a run on the training ones, and what is left of general knowledge."""
    before = {}

    def then(model, tokenizer) -> dict:
        with model.disable_adapter():
            before["before"] = score_capitals(asked(model, tokenizer, capitals("test")), capitals("test"))
        after = score_capitals(asked(model, tokenizer, capitals("test")), capitals("test"))
        seen = score_capitals(asked(model, tokenizer, capitals("train")), capitals("train"))
        return {**before, "after": after, "after_on_training_questions": seen, "kept": kept(model, tokenizer)}

    return trained("NF4", rate, 0, capitals("train"), model, then)


def plan() -> dict[str, Callable[..., dict]]:
    """All rows in the order in which they are made: name and function. Those that need the rate have it as an argument."""
    rows = {f"learning rate {rate:g}": partial(validated, rate) for rate in RATES}
    rows |= {
        "NF4, seed 0": partial(tuned, "NF4", 0),
        "base, no example": partial(untrained, 0, "NF4"),
        "shuffled, seed 0": partial(tuned, "shuffled", 0),
        "base, three examples": partial(untrained, EXAMPLES, "NF4"),
        "16 bit, seed 0": partial(tuned, "16 bit", 0),
        "NF4, seed 1": partial(tuned, "NF4", 1),
        "capitals": capitals_row,
        "NF4, seed 2": partial(tuned, "NF4", 2),
    }
    for seed in range(1, SEEDS):
        rows |= {f"16 bit, seed {seed}": partial(tuned, "16 bit", seed), f"shuffled, seed {seed}": partial(tuned, "shuffled", seed)}
    return rows


def chosen_rate(rows: dict[str, dict]) -> float:
    """The rate with the lowest loss on the validation orders.

    Raises:
        SystemExit: one of them was not measured.
    """
    tried = {rate: rows.get(f"learning rate {rate:g}") for rate in RATES}
    if missing := [rate for rate, row in tried.items() if row is None]:
        sys.exit(f"the learning rates {', '.join(f'{rate:g}' for rate in missing)} are not measured yet: run without --row")
    return min(tried, key=lambda rate: tried[rate]["validation_loss"])


def measure(name: str, model: str, rows: dict[str, dict]) -> dict:
    """One row."""
    needed = {} if name.startswith(("learning rate", "base")) else {"rate": chosen_rate(rows)}
    started, processor_time = time.perf_counter(), time.process_time()
    torch.manual_seed(0)
    found = plan()[name](model=model, **needed)
    return {
        "name": name,
        **found,
        "seconds": round(time.perf_counter() - started),
        "processor_seconds": round(time.process_time() - processor_time),
    }
