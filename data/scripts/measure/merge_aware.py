"""What a merge into 4 bits costs after a plain run, and after one whose last steps trained with the merged weights.

    python -m data.scripts.measure.merge_aware --workers 16        # all runs; 0.7 hours of training on one core
    python -m data.scripts.measure.merge_aware --missing           # only runs that are not in the table yet
    python -m data.scripts.measure.merge_aware --row "200 steps, last 30 %" --rate 0.0015 --seed 0   # one run, printed

Every run trains adapters on the shipped model in NF4 with double quantisation, in float32 on one thread of a CPU. Its
result is scored in each way in which it can be used: as it was trained (for a merge-aware run: with the merged weights),
as an adapter beside its base, merged into the 4-bit base, merged into the original base, and that quantised again. Each
way has a learning rate of its own, chosen on the validation questions.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from data.scripts import ROOT
from data.scripts.measure.runs_at_rates import Job, best_rate, command_line, jobs_of

TABLE = ROOT / "data" / "measured" / "merge_aware.json"
# of each number of steps: the rates that are tried
RATES = {60: (2e-3, 3e-3, 4e-3), 100: (1.5e-3, 2e-3, 3e-3), 200: (1e-3, 1.5e-3, 2e-3), 300: (1e-3, 1.5e-3, 2e-3)}
SHARES = {0.0: 5, 0.3: 5}  # the last steps that are merge-aware, with the number of seeds
MORE_SHARES = {0.15: 3, 0.5: 3, 1.0: 3}  # at 200 steps alone
AS_TRAINED, BESIDE, INTO_4_BITS, INTO_16_BITS, ROUNDED_AGAIN = WAYS = (
    "as trained",
    "adapter beside its base",
    "4bit",
    "16bit",
    "16bit, then 4bit",
)
COMPARED = 100  # answers of the merged model and of the one that was trained


def name(steps: int, share: float) -> str:
    return f"{steps} steps, " + (f"last {share:.0%}".replace("%", " %") if share else "plain")


KINDS = {
    name(steps, share): (steps, share, seeds)
    for steps in RATES
    for share, seeds in {**SHARES, **(MORE_SHARES if steps == 200 else {})}.items()
}
JOBS = jobs_of({kind: RATES[steps] for kind, (steps, _, _) in KINDS.items()}, {k: v[2] for k, v in KINDS.items()})


def settings_of(job: Job):
    from qlora_helpers.settings import Settings

    steps, share, _ = KINDS[job.kind]
    return Settings(
        steps=steps,
        batch_size=8,
        learning_rate=job.rate,
        warmup_steps=steps // 20,
        merge_aware=share or None,
        seed=job.seed,
    )


def measure(job: Job) -> dict:
    """Make one run, and score it in each way."""
    from data.scripts.measure.held_out import score, training_validation_test
    from qlora_helpers import evaluation
    from qlora_helpers.adapters.drift import drift, logits
    from qlora_helpers.adapters.files import load_adapter
    from qlora_helpers.adapters.merge import load_base, merge_into
    from qlora_helpers.chats import split_question
    from qlora_helpers.hardware import detect
    from qlora_helpers.models.loading import load_model, load_tokenizer
    from qlora_helpers.models.saving import save_model
    from qlora_helpers.paths import data_path
    from qlora_helpers.training.merge_aware import MergeAware
    from qlora_helpers.training.run import train

    cpu, tokenizer, settings = detect("cpu"), load_tokenizer(), settings_of(job)
    training, validation, test = training_validation_test(tokenizer, settings.max_length)
    facts = evaluation.read_facts(data_path("recall.jsonl"))
    questions = [split_question(chat)[0] for chat in test[:COMPARED]]
    found: dict = {"kind": job.kind, "learning_rate": job.rate, "seed": job.seed, "validation": {}, "test": {}}
    found["recall"], found["drift"], found["same_answers"] = {}, {}, {}

    def scored(way: str, model) -> None:
        found["validation"][way] = score(model, tokenizer, validation)
        found["test"][way] = score(model, tokenizer, test)
        found["recall"][way] = evaluation.recall(model, tokenizer, facts)
        moved = drift(logits(model, tokenizer, test[:COMPARED]), trained_logits)
        found["drift"][way] = {"mean": moved.mean, "largest": moved.largest, "same_choice": moved.same_choice}
        answers = evaluation.answer(model, tokenizer, questions)
        found["same_answers"][way] = sum(a == b for a, b in zip(answers, trained_answers, strict=True)) / COMPARED

    with tempfile.TemporaryDirectory() as scratch:
        run = train(load_model(hardware=cpu), tokenizer, training, Path(scratch) / "run", settings, hardware=cpu)
        found["seconds_per_step"] = round(run.seconds / settings.steps, 4)
        if settings.merge_aware:
            with MergeAware(1).in_layers_of(run.model):
                trained_logits = logits(run.model, tokenizer, test[:COMPARED])
                trained_answers = evaluation.answer(run.model, tokenizer, questions)
                scored(AS_TRAINED, run.model)
        else:
            trained_logits = logits(run.model, tokenizer, test[:COMPARED])
            trained_answers = evaluation.answer(run.model, tokenizer, questions)
        scored(BESIDE, run.model)
        if not settings.merge_aware:
            for part in ("validation", "test", "recall", "drift", "same_answers"):
                found[part] = {AS_TRAINED: found[part][BESIDE], **found[part]}
        scored(INTO_4_BITS, merge_into(run.model))
        if not settings.merge_aware:  # a reference
            merged = merge_into(load_adapter(load_base("16bit", hardware=cpu), run.saved_path))
            scored(INTO_16_BITS, merged)
            folder = save_model(merged, tokenizer, Path(scratch) / "merged")
            scored(ROUNDED_AGAIN, load_model(str(folder), hardware=cpu))
    return found


def rate_of(runs: list[dict], kind: str, way: str) -> float:
    """The learning rate of a way to use the runs of a kind: that of the best exact match on the validation questions."""
    return best_rate(runs, kind, lambda validation: validation[way]["exact_match"])


if __name__ == "__main__":
    command_line(__doc__, JOBS, measure, TABLE, {"ways": WAYS, "steps": {kind: v[0] for kind, v in KINDS.items()}})
