"""The plan of the fair comparisons: what is tried, what is trained, and who chooses a learning rate."""

import json
import statistics
from collections import Counter, defaultdict

import jupytext
import pytest

from data.scripts.measure import comparisons, held_out, merge_aware, variants
from data.scripts.measure.held_out import exact_match, training_validation_test
from data.scripts.measure.runs_at_rates import Job, best_rate, worth_making
from qlora_helpers import evaluation
from qlora_helpers.models.loading import load_tokenizer
from qlora_helpers.training import run as running
from qlora_helpers.training.trainer import check_settings
from tests import ROOT
from tests.support.short_runs import CPU

KINDS = comparisons.KINDS.values()


def test_each_kind_is_tried_at_several_rates_but_where_the_rate_is_the_point():
    assert len(comparisons.kinds()) == len(KINDS), "a label of two kinds"
    for kind in KINDS:
        assert len(kind.rates) >= (1 if kind.group == "alpha" else 2) and list(kind.rates) == sorted(set(kind.rates))
        assert kind.seeds >= 3, "no interval of less"


@pytest.mark.parametrize("base", sorted({kind.base for kind in KINDS}))
def test_every_setting_can_be_trained(base):
    model = comparisons.load(base)
    for kind in KINDS:
        if kind.base == base:
            for rate in kind.rates:
                check_settings(model, comparisons.settings_of(kind, rate, 0), CPU)


def test_a_comparison_of_batches_sees_as_many_chats_in_each():
    assert {comparisons.chats_seen(job) for job in comparisons.JOBS if comparisons.GROUPS[job.kind] == "batch"} == {
        6400
    }


def test_answers_dealt_anew_are_the_same_answers_to_the_same_questions():
    training, _, _ = training_validation_test(load_tokenizer(), 64)
    dealt, bits = comparisons.dealt_anew(training, 400)

    def forms(chats, place):
        return Counter(comparisons.NAME.sub("…", chat[place]["content"]) for chat in chats)

    assert forms(dealt, 0) == forms(training[:400], 0) and forms(dealt, 1) == forms(training[:400], 1)
    for question, answer in dealt:
        assert comparisons.NAME.search(question["content"])[0] == comparisons.NAME.search(answer["content"])[0]
    right = {chat[0]["content"]: chat[1]["content"] for chat in training[:400]}
    assert sum(right[q["content"]] == a["content"] for q, a in dealt) < 100, "few are dealt what is true"
    assert 1 < bits / 400 < 8
    assert comparisons.dealt_anew(training, 400) == (dealt, bits)


def test_each_kind_has_the_method_of_its_base():
    methods = defaultdict(set)
    for kind in KINDS:
        methods[kind.base].add(comparisons.settings_of(kind, kind.rates[0], 0).method)
    assert methods == {
        "16 bit": {"full", "lora"}, "NF4": {"qlora"}, "NF4 + double quant": {"qlora"}, "FP4": {"qlora"}, "INT4": {"lora"},
        "INT4 symmetric": {"lora"},
    }  # fmt: skip


# ---- who chooses a learning rate

TABLES = (comparisons, variants, merge_aware)


def runs_of(script):
    """The finished runs of a script's table that have something to choose by: not those that learn by heart."""
    runs = json.loads(script.TABLE.read_text(encoding="utf-8"))["runs"]
    return [run for run in runs if "validation" in run]


def chosen(script, runs):
    """The rate of each kind, as the script chooses it; for merge-aware runs, of each way to use them, too."""
    ways = {}
    for kind in dict.fromkeys(run["kind"] for run in runs):
        if script is merge_aware:
            mine = next(run for run in runs if run["kind"] == kind)["validation"]
            ways |= {(kind, way): script.rate_of(runs, kind, way) for way in mine}
        else:
            ways[kind] = best_rate(runs, kind, exact_match)
    return ways


@pytest.mark.parametrize("script", TABLES)
def test_the_rates_of_a_table_are_chosen_without_its_test_results(script):
    runs = runs_of(script)
    without = [{key: value for key, value in run.items() if key != "test"} for run in runs]
    assert chosen(script, without) == chosen(script, runs)
    if script is not variants:  # there, the test questions would have chosen the same rates
        assert chosen(script, [run | {"validation": run["test"]} for run in runs]) != chosen(script, runs)


def test_rates_are_given_up_without_test_results():
    """So the table has all seeds of the rates that are best on validation; those best on test are not the same everywhere."""
    runs = runs_of(comparisons)
    jobs = [job for job in comparisons.JOBS if not comparisons.KINDS[job.kind].by_heart]
    without = [{key: value for key, value in run.items() if key != "test"} for run in runs]
    wanted = worth_making(jobs, without, exact_match)
    assert {(job.kind, job.rate, job.seed) for job in wanted} <= {
        (run["kind"], run["learning_rate"], run["seed"]) for run in runs
    }
    assert wanted != worth_making(jobs, [run | {"validation": run["test"]} for run in runs], exact_match)


def test_lesson_7_chooses_the_rates_that_the_scripts_choose():
    lesson = jupytext.read(ROOT / "notebooks" / "source" / "07_does_it_cost_quality.py")
    (cell,) = [cell.source for cell in lesson.cells if "def own_rate" in cell.source]
    runs, tries = runs_of(comparisons), defaultdict(lambda: defaultdict(dict))
    for run in runs:
        without = {key: value for key, value in run.items() if key != "test"}
        tries[run["kind"]][run["learning_rate"]][run["seed"]] = without
    names = {"tries": tries, "statistics": statistics}
    exec(cell, names)
    assert {kind: names["own_rate"](kind) for kind in tries} == chosen(comparisons, runs)


def test_a_run_trains_on_the_training_chats_alone_and_is_scored_on_each_of_the_others(monkeypatch):
    whole, train, trained_on = training_validation_test(load_tokenizer(), 64), running.train, []
    sets = [chats[:size] for chats, size in zip(whole, (8, 3, 5), strict=True)]
    monkeypatch.setattr(held_out, "training_validation_test", lambda *args: sets)
    monkeypatch.setattr(comparisons, "BUDGET", {"steps": 2, "batch_size": 2, "warmup_steps": 0})
    monkeypatch.setattr(evaluation, "exact_match", lambda model, tokenizer, chats: chats)  # its answers take seconds
    monkeypatch.setattr(running, "train", lambda *args, **more: trained_on.append(args[2]) or train(*args, **more))
    found = comparisons.measure(Job("full fine-tuning", 2e-4, 0))
    assert trained_on == [sets[0]] and [found[part]["exact_match"] for part in ("validation", "test")] == sets[1:]
    assert found["outcome"] == "ran" and found["trained_parameters"] == 2_984_192 and found["recall"] > 0.9
