"""Many short runs of a few kinds, each at several learning rates with several seeds: made, kept, and chosen among.

Each finished run is written at once as a line beside the table, so that a stopped script goes on where it was. A rate is
chosen by a score on the validation questions alone; what it does on the test questions is only reported.

Not every rate is worth all seeds: each is tried with `FIRST` of them, and only the `BEST` of a kind go on to the others. (This is
one round of successive halving, Jamieson and Talwalkar, arXiv 1502.07943.)
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import mean

__all__ = ["Job", "best_rate", "command_line", "jobs_of", "make", "read", "worth_making", "write"]

PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes")
FIRST, BEST = 2, 2  # seeds of every rate; rates of a kind that go on to the other seeds


@dataclass(frozen=True)
class Job:
    """One run: its kind, its learning rate, its seed."""

    kind: str
    rate: float
    seed: int


def jobs_of(rates: dict[str, tuple[float, ...]], seeds: dict[str, int]) -> list[Job]:
    """All runs of a plan.

    Args:
        rates: of each kind, those that are tried.
        seeds: of each kind, how many.
    """
    return [Job(kind, rate, seed) for kind, tried in rates.items() for rate in tried for seed in range(seeds[kind])]


def _means(runs: Iterable[dict], kind: str, score: Callable[[dict], float], seeds: int | None) -> dict[float, float]:
    """The mean score of each rate of a kind that has so many seeds, the first ones; None: as many as any rate has."""
    by_rate: dict[float, list[float]] = {}
    for run in sorted((run for run in runs if run["kind"] == kind), key=lambda run: run["seed"]):
        by_rate.setdefault(run["learning_rate"], []).append(score(run["validation"]))
    seeds = seeds or max(map(len, by_rate.values()), default=0)
    return {rate: mean(scores[:seeds]) for rate, scores in by_rate.items() if len(scores) >= seeds}


def best_rate(runs: Iterable[dict], kind: str, score: Callable[[dict], float]) -> float:
    """The learning rate of a kind whose runs have the best mean score over their seeds.

    Rates that were given up after fewer seeds than others are not chosen.

    Args:
        score: of a run, the larger the better; given nothing but what the run found on the validation questions, its
            "validation".

    Raises:
        ValueError: there is no run of this kind.
    """
    if not (means := _means(runs, kind, score, None)):
        raise ValueError(f"kind={kind!r}: there are no runs of it")
    return max(means, key=lambda rate: (means[rate], -rate))  # of equals the lower


def worth_making(jobs: list[Job], runs: Iterable[dict], score: Callable[[dict], float]) -> list[Job]:
    """The runs of a plan that are worth making, as far as the finished ones tell.

    Those of every rate with the `FIRST` seeds; and once a kind has these, all seeds of its `BEST` rates by the mean over them.

    Args:
        score: as for `best_rate`.
    """
    found, runs = [], list(runs)
    for kind in dict.fromkeys(job.kind for job in jobs):
        mine = [job for job in jobs if job.kind == kind]
        if len(go_on := {job.rate for job in mine}) > BEST:
            means = _means(runs, kind, score, FIRST)
            ranked = sorted(means, key=lambda rate: (-means[rate], rate))  # of equals the lower
            go_on = set(ranked[:BEST]) if means.keys() == go_on else set()
        found += [job for job in mine if job.seed < FIRST or job.rate in go_on]
    return found


def _job_of(run: dict) -> Job:
    return Job(run["kind"], run["learning_rate"], run["seed"])


def read(table: Path) -> list[dict]:
    """The finished runs of a table, and those on the lines beside it."""
    runs = json.loads(table.read_text(encoding="utf-8"))["runs"] if table.exists() else []
    lines = table.with_suffix(".jsonl")
    for line in lines.read_text(encoding="utf-8").splitlines() if lines.exists() else []:
        with suppress(json.JSONDecodeError):  # one that a kill has cut: it is made again
            runs.append(json.loads(line))
    return list({_job_of(run): run for run in runs}.values())


def _here(workers: int) -> dict:
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {workers} runs at a time, one thread each",
        "versions": {name: importlib.metadata.version(name).partition("+")[0] for name in PACKAGES},
    }


def make(jobs: list[Job], measure: Callable[[Job], dict], workers: int, table: Path) -> None:
    """Make the runs, `workers` at a time, each on one thread; each is written as a line when it ends."""
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    made_on, started, lines = _here(workers), time.perf_counter(), table.with_suffix(".jsonl")
    with (
        ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool,
        lines.open("a", encoding="utf-8") as file,
    ):
        file.write("\n" * (lines.stat().st_size > 0))  # the last line may have been cut
        for done, job in enumerate(as_completed([pool.submit(measure, job) for job in jobs]), start=1):
            run = job.result()
            file.write(json.dumps(run | {"made_on": made_on}) + "\n")
            file.flush()
            took = time.perf_counter() - started
            print(
                f"{done:4}/{len(jobs)} {took:5.0f} s  {run['kind']:28} {run['learning_rate']:g} {run['seed']}",
                flush=True,
            )


def write(table: Path, jobs: list[Job], wanted: list[Job], more: dict) -> int:
    """Put all finished runs into the table, in the order of the plan, with `more` about them.

    Returns how many of the wanted ones are missing.
    """
    found = {_job_of(run): run for run in read(table)}
    runs = [dict(found[job]) for job in jobs if job in found]
    kept = any("made_on" not in run for run in runs)  # of the table as it was
    before = json.loads(table.read_text(encoding="utf-8"))["made_on"] if kept else []
    made_on = before + [made for run in runs if (made := run.pop("made_on", None))]
    text = json.dumps(
        {
            "made_on": [made for place, made in enumerate(made_on) if made not in made_on[:place]],
            **more,
            "runs": runs,
        },
        indent=1,
    )
    table.write_text(text + "\n", encoding="utf-8")
    table.with_suffix(".jsonl").unlink(missing_ok=True)
    return sum(job not in found for job in wanted)


def command_line(
    doc: str,
    jobs: list[Job],
    measure: Callable[[Job], dict],
    table: Path,
    more: dict,
    groups: Mapping[str, str] | None = None,
    cost: Callable[[Job], float] = lambda job: 0,
    score: Callable[[dict], float] | None = None,
) -> None:
    """The command of a script that makes such runs.

    Args:
        groups: of each kind, its group, for scripts that have many kinds: `--group` makes those of one.
        cost: how long a run takes, in any unit: the longest are begun first, so that none is left alone at the end.
        score: by which `worth_making` gives up rates after their first seeds; None: all runs are made.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", help="one kind of run")
    if groups:
        parser.add_argument("--group", choices=dict.fromkeys(groups.values()), help="the kinds of one group")
    parser.add_argument("--rate", type=float, help="one learning rate; by default all of a kind's")
    parser.add_argument("--seed", type=int, help="one seed; by default all of a kind's")
    parser.add_argument("--missing", action="store_true", help="keep what is done already, and make the rest")
    parser.add_argument("--list", action="store_true", help="only say which runs these are")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, each on one thread")
    parser.add_argument("--table", type=Path, default=table)
    args = parser.parse_args()
    if args.row and args.row not in (kinds := dict.fromkeys(job.kind for job in jobs)):
        sys.exit(f"no row {args.row!r}: there are {', '.join(kinds)}")
    made = [_job_of(run) for run in read(args.table)] if args.missing else []
    named = [
        job
        for job in jobs
        if args.row in (None, job.kind)
        and args.rate in (None, job.rate)
        and args.seed in (None, job.seed)
        and (not groups or args.group in (None, groups[job.kind]))
    ]

    def missing() -> list[Job]:
        runs = [run for run in read(args.table) if _job_of(run) in made]
        return [job for job in (worth_making(named, runs, score) if score else named) if job not in made]

    asked = missing()
    if args.list:
        for job in asked:
            print(f"{job.kind:28} {job.rate:g} {job.seed}")
    elif args.row and args.rate and args.seed is not None:
        print(json.dumps([measure(job) for job in asked], indent=1))
    else:
        while asked:
            make(sorted(asked, key=lambda job: -cost(job)), measure, args.workers, args.table)
            made += asked
            asked = missing()
        runs = read(args.table)
        print(f"{write(args.table, jobs, worth_making(jobs, runs, score) if score else jobs, more)} runs are missing")
