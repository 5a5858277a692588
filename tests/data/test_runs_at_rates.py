"""Runs at several learning rates: who chooses, what is made again, and what a table keeps."""

import json

import pytest

from data.scripts.measure import runs_at_rates
from data.scripts.measure.held_out import exact_match
from data.scripts.measure.runs_at_rates import Job, best_rate, jobs_of, read, worth_making, write


def run(kind, rate, seed, validation, test=0.0, **more):
    return {
        "kind": kind,
        "learning_rate": rate,
        "seed": seed,
        "validation": {"exact_match": validation},
        "test": test,
    } | more


RUNS = [
    run("a", 1e-3, 0, 0.9, test=0.1), run("a", 1e-3, 1, 0.7, test=0.1),
    run("a", 2e-3, 0, 0.7, test=0.9), run("a", 2e-3, 1, 0.8, test=0.9),
    run("b", 3e-3, 0, 1.0),
]  # fmt: skip


def test_a_rate_is_chosen_by_the_mean_over_its_seeds_on_the_validation_questions_alone():
    assert best_rate(RUNS, "a", exact_match) == 1e-3  # 2e-3 is better on the test questions
    assert best_rate(reversed(RUNS), "a", exact_match) == 1e-3
    seen = []
    best_rate(RUNS, "a", lambda given: seen.append(given) or 0.0)
    assert seen == [one["validation"] for one in RUNS[:4]]


def test_of_equal_rates_the_lower_is_chosen():
    runs = [run("a", rate, 0, 0.5) for rate in (2e-3, 1e-3, 3e-3)]
    assert best_rate(runs, "a", exact_match) == 1e-3


def test_a_rate_that_was_given_up_early_is_not_chosen():
    assert best_rate([*RUNS[:2], run("a", 2e-3, 0, 1.0)], "a", exact_match) == 1e-3


def test_rates_that_are_worse_with_two_seeds_get_no_more_and_a_kind_with_two_rates_keeps_both():
    jobs = jobs_of({"a": (1e-3, 2e-3, 3e-3), "b": (1e-3, 2e-3)}, {"a": 4, "b": 3})
    first = [job for job in jobs if job.kind == "b" or job.seed < 2]
    assert worth_making(jobs, [], exact_match) == first
    runs = [run("a", rate, seed, 0.5) for rate in (1e-3, 2e-3) for seed in (0, 1)]
    assert worth_making(jobs, runs, exact_match) == first, "a rate is not tried yet"
    runs += [run("a", 3e-3, 0, 0.2), run("a", 3e-3, 1, 0.9)]
    runs += [run("a", 1e-3, seed, 0.0) for seed in (2, 3)]  # which do not count: others have no such seeds
    assert worth_making(jobs, runs, exact_match) == [job for job in jobs if job in first or job.rate != 2e-3]
    diverged = [one | {"validation": {"exact_match": 0.0}} if one["learning_rate"] == 3e-3 else one for one in runs]
    assert worth_making(jobs, diverged, exact_match) == [job for job in jobs if job in first or job.rate != 3e-3]


def test_a_kind_without_runs_is_named():
    with pytest.raises(ValueError, match=r"^kind='c': there are no runs of it"):
        best_rate(RUNS, "c", exact_match)


def test_a_plan_has_each_seed_at_each_rate():
    jobs = jobs_of({"a": (1e-3, 2e-3), "b": (3e-3,)}, {"a": 2, "b": 1})
    assert jobs == [Job(one["kind"], one["learning_rate"], one["seed"]) for one in RUNS]


def test_a_stopped_script_keeps_what_is_done(tmp_path):
    """Finished runs are lines beside the table; a line that was cut is made again, and the table has each run once."""
    jobs, table = jobs_of({"a": (1e-3, 2e-3)}, {"a": 2}), tmp_path / "t.json"
    lines = [json.dumps(one | {"made_on": {"machine": "x"}}) for one in RUNS[:2]]
    table.with_suffix(".jsonl").write_text("\n".join([*lines, lines[0][:20]]), encoding="utf-8")
    assert [one["seed"] for one in read(table)] == [0, 1]
    assert write(table, jobs, jobs, {"what": "it is"}) == 2
    found = json.loads(table.read_text(encoding="utf-8"))
    assert found == {"made_on": [{"machine": "x"}], "what": "it is", "runs": RUNS[:2]}
    again = RUNS[0] | {"test": 0.5, "made_on": {"machine": "y"}}
    rest = [one | {"made_on": {"machine": "y"}} for one in RUNS[2:4]]
    table.with_suffix(".jsonl").write_text("\n".join(map(json.dumps, [again, *rest])), encoding="utf-8")
    assert write(table, jobs, jobs, {}) == 0
    found = json.loads(table.read_text(encoding="utf-8"))
    assert found["runs"] == [RUNS[0] | {"test": 0.5}, *RUNS[1:4]]
    assert found["made_on"] == [{"machine": "x"}, {"machine": "y"}]


def measured_here(job):
    return {"kind": job.kind, "learning_rate": job.rate, "seed": job.seed, "validation": {"exact_match": 0.0}}


def test_the_command_makes_what_is_missing(tmp_path, monkeypatch, capsys):
    jobs, table = jobs_of({"a": (1e-3, 2e-3)}, {"a": 2}), tmp_path / "t.json"
    table.write_text(json.dumps({"made_on": [], "runs": RUNS[:2]}), encoding="utf-8")
    made = []

    def make(jobs, measure, workers, table):
        made.extend(jobs)
        table.with_suffix(".jsonl").write_text("\n".join(json.dumps(measure(job)) for job in jobs), encoding="utf-8")

    monkeypatch.setattr(runs_at_rates, "make", make)

    def command(*options):
        made.clear()
        monkeypatch.setattr("sys.argv", ["x", "--table", str(table), *options])
        runs_at_rates.command_line("", jobs, measured_here, table, {})
        return made

    assert command("--missing", "--list") == []
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [["a", "0.002", "0"], ["a", "0.002", "1"]]
    assert command("--row", "a", "--rate", "0.002", "--seed", "1") == []
    assert json.loads(capsys.readouterr().out) == [measured_here(jobs[3])]
    assert command("--missing") == jobs[2:]
    assert command("--missing") == []
    assert command("--seed", "1") == [jobs[1], jobs[3]]
    with pytest.raises(SystemExit, match="no row 'z': there are a"):
        command("--row", "z")


def test_the_command_goes_on_with_the_best_rates_until_all_is_made(tmp_path, monkeypatch, capsys):
    jobs, table = jobs_of({"a": (1e-3, 2e-3, 3e-3)}, {"a": 3}), tmp_path / "t.json"
    made = []

    def make(jobs, measure, workers, table):
        made.append(jobs)
        with table.with_suffix(".jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(run("a", job.rate, job.seed, job.rate, made_on={})) + "\n" for job in jobs)

    monkeypatch.setattr(runs_at_rates, "make", make)
    monkeypatch.setattr("sys.argv", ["x", "--table", str(table)])
    runs_at_rates.command_line("", jobs, measured_here, table, {}, score=exact_match)
    assert made == [[job for job in jobs if job.seed < 2], [Job("a", 2e-3, 2), Job("a", 3e-3, 2)]]
    assert len(read(table)) == 8 and "\n0 runs are missing" in "\n" + capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["x", "--table", str(table), "--missing"])
    runs_at_rates.command_line("", jobs, measured_here, table, {}, score=exact_match)
    assert len(made) == 2


def test_a_group_is_made_alone_and_the_longest_runs_first(tmp_path, monkeypatch):
    jobs, made = jobs_of({"a": (1e-3,), "b": (1e-3, 2e-3), "c": (1e-3,)}, {"a": 1, "b": 1, "c": 1}), []
    monkeypatch.setattr(runs_at_rates, "make", lambda asked, *how: made.extend(asked))
    monkeypatch.setattr("sys.argv", ["x", "--group", "two", "--table", str(tmp_path / "t.json")])
    groups = {"a": "one", "b": "two", "c": "two"}
    costs = {jobs[1]: 1, jobs[2]: 3, jobs[3]: 2}
    runs_at_rates.command_line("", jobs, measured_here, tmp_path / "t.json", {}, groups, costs.__getitem__)
    assert made == [jobs[2], jobs[3], jobs[1]]
