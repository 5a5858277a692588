"""What a short QLoRA run teaches a real language model, and what it does not: orders to JSON, and capitals of countries.

    python -m qlora_helpers fetch smollm2-135m             # the model, once
    python -m data.scripts.measure.real_task               # the rows missing from data/measured/real_task.json
    python -m data.scripts.measure.real_task --row "NF4, seed 0"  # one row, printed and not written
    python -m data.scripts.measure.real_task --list        # the names of the rows

The model is SmolLM2-135M-Instruct. A run of 48 steps of 4 chats takes four to six minutes of one core; a stopped script
continues with the next row. The orders (data/scripts/make/orders.py) are in three parts that share no name, item or
phrasing. The learning rate is the one of `RATES` with the lowest loss on the validation orders; the test orders are asked
afterwards, and greedily. `valid` is the share of answers that are a JSON object, with or without a Markdown fence around it,
`right` the share whose five fields are all right, and `fields` the share of each field; each with its standard error. `each`
has a 1 for each right answer.

For the capitals, `alone` is the share of answers of up to four words, as all training answers are, and `right` the share
that name the capital, alone or in a sentence. `kept` is what `qlora_helpers.evaluation.forgetting` finds with its set of
general knowledge.
"""

import argparse
import copy
import json
import os
import re
import shutil
import tempfile
import time
import unicodedata
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch

from data.scripts import ROOT
from data.scripts.make.orders import FIELDS
from data.scripts.measure.real_model import MODEL, TASK, fill, head_of
from qlora_helpers import evaluation
from qlora_helpers.adapters.files import load_adapter
from qlora_helpers.chats import Chat, read_chats, split_question
from qlora_helpers.evaluation.answers import end_tokens, prompts_of
from qlora_helpers.hardware import detect
from qlora_helpers.models.decoded_once import decoded_once
from qlora_helpers.models.loading import load_model, load_tokenizer
from qlora_helpers.models.weights import shuffle_linear_weights
from qlora_helpers.paths import data_path
from qlora_helpers.settings import Settings
from qlora_helpers.training.run import train

TABLE = TASK
KEPT = ROOT / "runs" / "real_task"
CPU = detect("cpu")
BUDGET = {"steps": 48, "batch_size": 4, "max_length": 160, "warmup_steps": 5, "rank": 16, "alpha": 32}
RATES = (1e-3, 2e-3)
SEEDS = 3
EXAMPLES = 3
LONGEST = 64  # new tokens of an answer; the longest right one has 38
AT_ONCE = 25  # questions
ALL_WEIGHTS = 2**30  # bytes: all weights are decoded once for a run, which changes no bit of it


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
    right = [
        all(of) and len(one) == len(FIELDS) for one, of in zip(found, zip(*fields.values(), strict=True), strict=True)
    ]
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


def asked(model, tokenizer, chats: list[Chat], examples: Sequence[Chat] = ()) -> list[str]:
    """The model's answers to the last questions of chats, greedily; with the turns of the examples before each.

    What all prompts begin with, the examples above all, goes through the model once: its keys and values are the same.
    """
    questions = [split_question(chat)[0] for chat in chats]
    turns = [message for chat in examples for message in chat if message["role"] != "system"]
    prompts = prompts_of([[*question[:-1], *turns, question[-1]] for question in questions], tokenizer)
    shared = next(place for place, tokens in enumerate(zip(*prompts, strict=False)) if len(set(tokens)) > 1)
    with evaluation.evaluating(model):
        first = model(torch.tensor([prompts[0][:shared]]), use_cache=True).past_key_values
    answers = []
    for start in range(0, len(prompts), AT_ONCE):
        some = prompts[start : start + AT_ONCE]
        cache = copy.deepcopy(first)
        cache.batch_repeat_interleave(len(some))
        longest = max(map(len, some))
        gaps = [longest - len(prompt) for prompt in some]
        ids = [
            prompt[:shared] + [tokenizer.pad_token_id] * gap + prompt[shared:]
            for prompt, gap in zip(some, gaps, strict=True)
        ]
        mask = [[1] * shared + [0] * gap + [1] * (longest - shared - gap) for gap in gaps]
        with evaluation.evaluating(model):
            output = model.generate(
                input_ids=torch.tensor(ids),
                attention_mask=torch.tensor(mask),
                past_key_values=cache,
                max_new_tokens=LONGEST,
                do_sample=False,
                eos_token_id=end_tokens(model, tokenizer),
                pad_token_id=tokenizer.pad_token_id,
            )
        answers += [text.strip() for text in tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)]
    return answers


# Runs


def load(base: str, model: str):
    """The model in 4 bits; or "16 bit", its weights as they are, or "shuffled", these in another order."""
    loaded = load_model(model, quantization="nf4" if base == "NF4" else None, hardware=CPU)
    if base == "shuffled":
        shuffle_linear_weights(loaded)
    return loaded


def trained(
    base: str,
    rate: float,
    seed: int,
    chats: list[Chat],
    model: str,
    then: Callable[..., dict],
    keep: Path | None = None,
) -> dict:
    """One run, and what `then` finds in the trained model; its adapter is copied to `keep`."""
    tokenizer, loaded = load_tokenizer(model), load(base, model)
    settings = Settings(**BUDGET, method="qlora" if base == "NF4" else "lora", learning_rate=rate, seed=seed)
    with tempfile.TemporaryDirectory() as folder, decoded_once(loaded, ALL_WEIGHTS):
        run = train(loaded, tokenizer, chats, Path(folder) / "run", settings, hardware=CPU)
        if keep:
            shutil.copytree(run.saved_path, keep, dirs_exist_ok=True)
        return {
            "base": base,
            "learning_rate": rate,
            "seed": seed,
            "training_seconds": round(run.seconds, 1),
            "trained_parameters": run.trainable_parameters,
            "losses": [round(loss, 4) for _, loss in run.history],
            **then(run.model, tokenizer),
        }


def validated(rate: float, rows: dict[str, dict], model: str) -> dict:
    """A run with one of the rates, and its loss on the validation orders."""

    def then(tuned, tokenizer) -> dict:
        return {"validation_loss": round(evaluation.loss(tuned, tokenizer, orders("validation"), AT_ONCE), 5)}

    return trained("NF4", rate, 0, orders("train"), model, then, KEPT / f"{rate:g}")


def untrained(examples: int, rows: dict[str, dict], model: str) -> dict:
    """What the model in 4 bits does before any run, with some of the training orders in the prompt."""
    tokenizer, loaded = load_tokenizer(model), load("NF4", model)
    with decoded_once(loaded, ALL_WEIGHTS):
        answers = asked(loaded, tokenizer, orders("test"), orders("train")[:examples])
    return {"base": "NF4", "examples": examples, **score_orders(answers, orders("test"))}


def tuned(base: str, seed: int, rows: dict[str, dict], model: str) -> dict:
    """A run at the chosen rate, and the test orders; after the first in 4 bits, what is left of general knowledge."""
    rate = chosen_rate(rows)

    def then(model, tokenizer) -> dict:
        found = score_orders(asked(model, tokenizer, orders("test")), orders("test"))
        found |= {"test_loss": round(evaluation.loss(model, tokenizer, orders("test"), AT_ONCE), 5)}
        return found | ({"kept": kept(model, tokenizer)} if base == "NF4" and seed == 0 else {})

    adapter = KEPT / f"{rate:g}"
    if base != "NF4" or seed or not adapter.is_dir():
        return trained(base, rate, seed, orders("train"), model, then)
    # this run has been made to choose the rate
    before = {name: value for name, value in rows[f"learning rate {rate:g}"].items() if name != "validation_loss"}
    loaded = load(base, model)
    with decoded_once(loaded, ALL_WEIGHTS):
        return before | then(load_adapter(loaded, adapter), load_tokenizer(model))


def kept(model, tokenizer) -> dict:
    """What is left of general knowledge, without the list of its items."""
    found = evaluation.forgetting(model, tokenizer, batch_size=AT_ONCE).as_dict()
    changed = [one["text"] for one in found["by_item"] if one["right_before"] != one["right_after"]]
    return {name: value for name, value in found.items() if name != "by_item"} | {"changed": changed}


def of_capitals(rows: dict[str, dict], model: str) -> dict:
    """The test capitals before and after a run on the training ones, and what is left of general knowledge."""

    def then(model, tokenizer) -> dict:
        train, test = capitals("train"), capitals("test")
        with model.disable_adapter():
            before = score_capitals(asked(model, tokenizer, test), test)
        after = score_capitals(asked(model, tokenizer, test), test)
        seen = score_capitals(asked(model, tokenizer, train), train)
        return {"before": before, "after": after, "after_on_training": seen, "kept": kept(model, tokenizer)}

    return trained("NF4", chosen_rate(rows), 0, capitals("train"), model, then)


ROWS: dict[str, Callable[..., dict]] = {
    **{f"learning rate {rate:g}": partial(validated, rate) for rate in RATES},
    "NF4, seed 0": partial(tuned, "NF4", 0),
    "no example": partial(untrained, 0),
    "three examples": partial(untrained, EXAMPLES),
    "shuffled, seed 0": partial(tuned, "shuffled", 0),
    "capitals": of_capitals,
    "NF4, seed 1": partial(tuned, "NF4", 1),
    "NF4, seed 2": partial(tuned, "NF4", 2),
    "16 bit, seed 0": partial(tuned, "16 bit", 0),
    **{f"{base}, seed {seed}": partial(tuned, base, seed) for seed in (1, 2) for base in ("16 bit", "shuffled")},
}


def chosen_rate(rows: dict[str, dict]) -> float:
    """The rate with the lowest loss on the validation orders.

    Raises:
        SystemExit: one of them was not measured.
    """
    tried = {rate: rows.get(f"learning rate {rate:g}") for rate in RATES}
    if None in tried.values():
        raise SystemExit("the learning rates are not measured yet: run this without --row")
    return min(tried, key=lambda rate: tried[rate]["validation_loss"])


def measure(name: str, rows: dict[str, dict], model: str = MODEL) -> dict:
    """One row."""
    started, processor_time = time.perf_counter(), time.process_time()
    found = ROWS[name](rows, model) | {"name": name}
    took = {"seconds": time.perf_counter() - started, "processor_seconds": time.process_time() - processor_time}
    return {"name": name} | found | {what: round(value, 1) for what, value in took.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", choices=ROWS, metavar="NAME", help="only this row, printed and not written")
    parser.add_argument("--until", choices=ROWS, metavar="NAME", help="the rows up to this one")
    parser.add_argument("--model", default=MODEL, help="a name or a folder")
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--list", action="store_true", help="the names of the rows")
    args = parser.parse_args()
    if args.list:
        print("\n".join(ROWS))
    elif args.row:
        rows = json.loads(args.table.read_text(encoding="utf-8"))["rows"] if args.table.exists() else []
        print(json.dumps(measure(args.row, {row["name"]: row for row in rows}, args.model)))
    else:
        head = head_of("python -m data.scripts.measure.real_task", args.model) | {"budget": BUDGET}
        names = list(ROWS)
        names = names[: names.index(args.until) + 1] if args.until else names
        fill(args.table, head, names, lambda name, rows: measure(name, rows, args.model))


if __name__ == "__main__":
    main()
