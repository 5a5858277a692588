"""Fair comparisons of methods, formats, ranks, batches and sizes: each at its own learning rate, chosen on validation questions.

    python -m data.scripts.measure.comparisons --workers 16 --missing   # all runs; 4.5 hours of training on one core
    python -m data.scripts.measure.comparisons --group method --missing # one group of them
    python -m data.scripts.measure.comparisons --list --missing         # those that are not made yet
    python -m data.scripts.measure.comparisons --row "QLoRA NF4" --rate 0.002 --seed 3   # one run, printed

`data.scripts.measure.runs_at_rates` makes and keeps them, and gives up rates that two seeds show to be worse. Every run is the
shipped model in float32 on one thread of a CPU, with `BUDGET` and what its kind changes.

A learning rate is chosen by the exact match on 500 validation questions, and reported on 500 test questions. The people of the
training chats, of the validation and of the test questions are others (`data.scripts.measure.held_out`). Where a run is to
learn by heart what it is trained on, there is nothing to hold out: one seed chooses, the others report.
"""

import math
import random
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from data.scripts import ROOT
from data.scripts.measure.bases import IN_4_BITS, load
from data.scripts.measure.held_out import exact_match
from data.scripts.measure.runs_at_rates import Job, command_line

TABLE = ROOT / "data" / "measured" / "comparisons.json"
BUDGET = {"steps": 200, "batch_size": 8, "warmup_steps": 10}
LAYERS = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "MLP": ("gate_proj", "up_proj", "down_proj"),
}
FULL_RATES = (5e-5, 1e-4, 2e-4, 4e-4, 8e-4)
LORA_RATES = (5e-4, 1e-3, 1.5e-3, 2e-3, 3e-3)
NAME = re.compile(r"[A-Z][a-z]+ [A-Z][a-z]+")  # of a person of the invented world


@dataclass(frozen=True)
class Kind:
    """A kind of run, made at several learning rates with several seeds each.

    Attributes:
        label: its name in the table.
        group: what it belongs to.
        rates: the learning rates that are tried.
        base: the format of the frozen weights, or of those that are trained.
        settings: what differs from `BUDGET` and the defaults of `Settings`.
        seeds: how many.
        by_heart: the number of chats with answers dealt out anew, which are to be learnt by heart; None for the usual task.
    """

    label: str
    group: str
    rates: tuple[float, ...]
    base: str = "NF4 + double quant"
    settings: dict = field(default_factory=dict)
    seeds: int = 5
    by_heart: int | None = None


def kinds() -> list[Kind]:
    """All kinds of runs, group by group; those that answer a question first."""
    return [*_methods(), *_by_steps(), *_by_rank(), *_by_alpha(), *_by_batch(), *_by_heart()]


def _methods() -> Iterable[Kind]:
    yield Kind("full fine-tuning", "method", FULL_RATES, "16 bit", {"method": "full"})
    yield Kind("LoRA 16 bit", "method", LORA_RATES, "16 bit")
    for base in ("NF4", "NF4 + double quant", "FP4", "INT4", "INT4 symmetric"):
        more = (2e-4, 6e-3) if base == "NF4 + double quant" else ()  # for the figure of the learning rate
        yield Kind(f"QLoRA {base}", "method", tuple(sorted(LORA_RATES + more)), base)


def _by_steps() -> Iterable[Kind]:
    """Whether the price of 4 bits is what is learnt in the end, or how fast. 200 steps are in the group "method"."""
    rates = {100: (1.5e-3, 2e-3, 3e-3, 4e-3), 400: (7e-4, 1e-3, 1.5e-3), 800: (5e-4, 7e-4, 1e-3)}
    for steps, tried in rates.items():
        settings = {"steps": steps, "warmup_steps": steps // 20}
        for label, base in (("LoRA 16 bit", "16 bit"), ("QLoRA NF4 + double quant", "NF4 + double quant")):
            yield Kind(f"{label}, {steps} steps", "steps", tried, base, settings, seeds=3 if steps == 800 else 5)


def _by_rank() -> Iterable[Kind]:
    """With alpha = 2 r, as in the rest of the course; and rank 64 with the alpha of rank 16. Rank 16 on all linear layers is in
    the group "method".
    """
    rates = {1: (3e-3, 6e-3, 1.2e-2), 4: (1.5e-3, 3e-3, 6e-3), 64: (3e-4, 7e-4, 1.5e-3)}
    for rank, tried in rates.items():
        settings = {"rank": rank, "alpha": 2 * rank}
        yield Kind(f"rank {rank}, all linear", "rank", tried, settings=settings, seeds=3)
    for layers, tried in (("attention", (1e-3, 1.5e-3, 3e-3, 6e-3)), ("MLP", (1e-3, 1.5e-3, 3e-3))):
        yield Kind(f"rank 16, {layers}", "rank", tried, settings={"target_modules": LAYERS[layers]}, seeds=3)
    settings = {"rank": 64, "alpha": 32}
    yield Kind("rank 64, alpha 32", "rank", (5e-4, 1e-3, 1.5e-3, 3e-3), settings=settings, seeds=3)


def _by_alpha() -> Iterable[Kind]:
    """At the one rate that suits alpha = 32: alpha acts as the rate does."""
    for alpha in (4, 8, 16, 64, 128):
        yield Kind(f"alpha {alpha}", "alpha", (1.5e-3,), settings={"alpha": alpha})


def _by_batch() -> Iterable[Kind]:
    """As many chats in each: 6,400. "LoRA Without Regret" reports that LoRA loses more at large batches."""
    for batch, lora, full in (
        (8, (5e-4, 7e-4, 1e-3, 1.5e-3), (2.5e-5, 5e-5, 1e-4, 2e-4)),
        (32, (1e-3, 1.5e-3, 2e-3, 3e-3), (1e-4, 2e-4, 4e-4, 8e-4)),
        (128, (2e-3, 3e-3, 6e-3, 1e-2), (2e-4, 4e-4, 8e-4, 1.6e-3)),
    ):
        steps = 6400 // batch
        settings = {"batch_size": batch, "steps": steps, "warmup_steps": steps // 20}
        yield Kind(f"LoRA 16 bit, batch {batch}", "batch", lora, "16 bit", settings, seeds=3)
        yield Kind(f"full, batch {batch}", "batch", full, "16 bit", settings | {"method": "full"}, seeds=3)


def _by_heart() -> Iterable[Kind]:
    """Facts that the base does not know, 20 times each: is an adapter too small for what it is to learn?"""
    rates = {1: (6e-3, 1.2e-2), 4: (3e-3, 6e-3), 16: (1e-3, 2e-3), 64: (4e-4, 7e-4)}
    for chats in (400, 1600):
        steps = 20 * chats // 16
        for rank, tried in rates.items():
            settings = {"rank": rank, "alpha": 2 * rank, "batch_size": 16, "steps": steps, "warmup_steps": steps // 20}
            yield Kind(f"rank {rank}, {chats} facts", "by heart", tried, "16 bit", settings, seeds=3, by_heart=chats)


def settings_of(kind: Kind, rate: float, seed: int):
    """The settings of a run. Its base says whether LoRA is QLoRA."""
    from qlora_helpers.settings import Settings

    settings = {**BUDGET, **kind.settings, "learning_rate": rate, "seed": seed}
    settings.setdefault("method", "qlora" if kind.base in IN_4_BITS else "lora")
    return Settings(**settings)


def dealt_anew(chats: list, count: int, seed: int = 0) -> tuple[list, float]:
    """Chats with the answers of others to the same question, and the bits that it takes to know all of them.

    Among the chats that ask the same but for the person's name, the answers are shuffled. So a model that knows the world has
    no use for what it knows. The bits are the logarithm of the number of ways to deal the answers out, by question.
    """
    by_question = defaultdict(list)
    for chat in chats[:count]:
        name = NAME.search(chat[0]["content"])[0]
        by_question[chat[0]["content"].replace(name, "…")].append((name, chat))
    drawn, found, bits = random.Random(seed), [], 0.0
    for question, group in sorted(by_question.items()):
        answers = [chat[1]["content"].replace(name, "…") for name, chat in group]
        ways = math.lgamma(len(answers) + 1) - sum(math.lgamma(n + 1) for n in Counter(answers).values())
        bits += ways / math.log(2)
        drawn.shuffle(answers)
        for (name, chat), answer in zip(group, answers, strict=True):
            asked = chat[0] | {"content": question.replace("…", name)}
            found.append([asked, chat[1] | {"content": answer.replace("…", name)}])
    drawn.shuffle(found)
    return found, bits


def measure(job: Job) -> dict:
    """Make one run and score it."""
    from data.scripts.measure.held_out import score, training_validation_test
    from qlora_helpers import evaluation
    from qlora_helpers.hardware import detect
    from qlora_helpers.models.loading import load_tokenizer
    from qlora_helpers.models.weights import bytes_by_part
    from qlora_helpers.paths import data_path
    from qlora_helpers.training.callbacks import TrainingDiverged
    from qlora_helpers.training.run import train

    kind = KINDS[job.kind]
    tokenizer, model = load_tokenizer(), load(kind.base)
    settings = settings_of(kind, job.rate, job.seed)
    training, validation, test = training_validation_test(tokenizer, settings.max_length)
    result = {"kind": job.kind, "learning_rate": job.rate, "seed": job.seed}
    result["base_bytes"] = sum(bytes_by_part(model).values())
    scored = {"validation": validation, "test": test}
    if kind.by_heart:
        training, bits = dealt_anew(training, kind.by_heart)
        scored = {"learnt": training}
        result["bits"] = round(bits)
    with tempfile.TemporaryDirectory() as folder:
        try:
            run = train(model, tokenizer, training, Path(folder) / "run", settings, hardware=detect("cpu"))
        except TrainingDiverged as error:
            lost = {"exact_match": 0.0, "loss": None}  # a rate that diverges is not chosen
            return result | {"outcome": f"diverged: {error}"} | dict.fromkeys(scored, lost)
        return result | {
            "outcome": "ran",
            "trained_parameters": run.trainable_parameters,
            **{part: score(run.model, tokenizer, chats) for part, chats in scored.items()},
            "recall": evaluation.recall(run.model, tokenizer, evaluation.read_facts(data_path("recall.jsonl"))),
            "seconds": round(run.seconds, 1),
        }


def chats_seen(job: Job) -> int:
    """How many chats a run is trained on, which decides how long it takes."""
    settings = {**BUDGET, **KINDS[job.kind].settings}
    return settings["steps"] * settings["batch_size"]


KINDS = {kind.label: kind for kind in kinds()}
JOBS = [Job(kind.label, rate, seed) for kind in KINDS.values() for rate in kind.rates for seed in range(kind.seeds)]
GROUPS = {label: kind.group for label, kind in KINDS.items()}


if __name__ == "__main__":
    more = {"budget": BUDGET, "groups": GROUPS}
    command_line(__doc__, JOBS, measure, TABLE, more, GROUPS, chats_seen, score=exact_match)
