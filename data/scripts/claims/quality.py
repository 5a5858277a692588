"""Claims about quality and stability: from runs of the shipped model with several seeds, and from the paper's tables."""

import json
import statistics
from functools import cache

from data.scripts.claims.rules import Finding, by_setting, claim
from data.scripts.claims.size import measured
from data.scripts.measure.held_out import exact_match
from data.scripts.measure.runs_at_rates import best_rate
from qlora_helpers.paths import data_path
from qlora_helpers.statistics import Interval, difference, smallest_difference

LORA_16, QLORA, FULL = "LoRA 16 bit", "QLoRA NF4 + double quant", "full fine-tuning"

# The QLoRA paper (arXiv 2305.14314), in tenths of a point: 16 bits and NF4 with double quantisation.
TABLE_3 = (
    (401, 404),
    (421, 427),
    (480, 477),
    (543, 553),
    (620, 609),
)  # T5 from 80M to 11B, full fine-tuning in 16 bits
TABLE_4 = (
    (384, 390),
    (456, 445),
    (472, 475),
    (506, 507),
    (577, 573),
    (605, 592),
    (618, 618),
    (625, 639),
)  # LLaMA, LoRA
MEANS_OF_TABLE_4 = ("53.0", "53.1")
RATE_OF_THE_AUTHORS = {"7B": 2e-4, "13B": 2e-4, "33B": 1e-4, "65B": 1e-4}  # artidoro/qlora, README
AUTHORS_RANK, AUTHORS_ALPHA = 64, 16  # artidoro/qlora, scripts/finetune_guanaco_65b.sh


Runs = str | tuple[str, float]  # a kind, whose runs are those at its own rate; or a kind and a rate


@cache
def test_results() -> dict[tuple[str, float], dict[int, dict[str, float]]]:
    """For each kind and learning rate: the share of right answers to the test questions and their loss, by seed."""
    found = {}
    for run in measured("comparisons")["runs"]:
        if "test" in run:
            found.setdefault((run["kind"], run["learning_rate"]), {})[run["seed"]] = run["test"]
    return found


@cache
def own_rate(kind: str) -> float:
    """The learning rate of a kind, chosen on the validation questions."""
    return best_rate(measured("comparisons")["runs"], kind, exact_match)


def of(runs: Runs, what: str = "exact_match") -> dict[int, float]:
    """A test result by seed."""
    results = test_results()[(runs, own_rate(runs)) if isinstance(runs, str) else runs]
    return {seed: result[what] for seed, result in results.items()}


def mean(runs: Runs) -> float:
    return statistics.fmean(of(runs).values())


def by_seed(one: Runs, other: Runs, what: str) -> Interval:
    """A paired comparison over the seeds that both kinds of run have."""
    a, b = of(one, what), of(other, what)
    seeds = sorted(a.keys() & b.keys())
    return difference([a[seed] for seed in seeds], [b[seed] for seed in seeds])


def more_right(one: Runs, other: Runs) -> Interval:
    """How many more answers of one kind of run are right."""
    return by_seed(one, other, "exact_match")


def higher_test_loss(one: Runs, other: Runs) -> Interval:
    return by_seed(one, other, "loss")


def is_ahead(one: Runs, other: Runs) -> bool:
    """Whether one kind of run has more right answers than another by more than noise."""
    found = more_right(one, other)
    return found.mean > found.half


def in_points(found: Interval) -> list[str]:
    """A difference without its sign, and half its interval."""
    return [points(abs(found.mean)), points(found.half)]


def points(share: float) -> str:
    return f"{100 * share:.1f}"


@cache
def stability() -> dict[str, dict]:
    return {row["name"]: row for row in measured("stability")["rows"]}


def loss(name: str) -> float:
    """The mean test loss of a row over its seeds."""
    return statistics.mean(stability()[name]["loss"])


def higher_loss(one: str, other: str) -> Interval:
    """How much higher one row's test loss is than another's: a paired comparison, seed by seed."""
    return difference(stability()[one]["loss"], stability()[other]["loss"])


def in_nats(found: Interval) -> list[str]:
    """A difference without its sign, and half its interval."""
    return [f"{abs(found.mean):.3f}", f"{found.half:.3f}"]


def is_worse(one: str, other: str) -> bool:
    """Whether one row's test loss is higher than another's by more than noise."""
    found = higher_loss(one, other)
    return found.mean > found.half


# ---- what 4 bits cost


@claim("A204.3", "B39.8")
def nf4_is_nearly_16_bit() -> Finding:
    recall = json.loads(data_path("tiny-llama", "scores.json").read_text(encoding="utf-8"))["recall"]
    known = 100 * (recall["16 bit"]["-"] - recall["NF4 + double quant"]["64"])
    cost = more_right(LORA_16, QLORA)
    nearly = 2  # points
    return by_setting(
        known <= nearly, cost.is_noise, value=f"{known:.1f} and {points(cost.mean)} points", shown=[points(cost.half)]
    )


@claim("A195.1", "C61.2")
def qlora_is_nearly_full_fine_tuning() -> Finding:
    by_paper = [statistics.mean(score / 10 for score in scores) for scores in zip(*TABLE_3, strict=True)]
    ours = more_right(FULL, QLORA)
    return by_setting(
        abs(by_paper[0] - by_paper[1]) < 1, ours.is_noise, value=f"{points(mean(FULL))} % and {points(mean(QLORA))} %",
        shown=[*(f"{score:.1f}" for score in by_paper), points(ours.mean), points(ours.half)],
    )  # fmt: skip


@claim("A195.2")
def difference_is_below_one_per_cent() -> Finding:
    pairs = TABLE_3 + TABLE_4
    by_points = sum(abs(a - b) < 10 for a, b in pairs)
    by_per_cent = sum(abs(a - b) < a / 100 for a, b in pairs)
    ours = more_right(LORA_16, QLORA)
    return by_setting(
        by_points > len(pairs) / 2, by_per_cent > len(pairs) / 2, ours.mean < 0.01,
        value=f"{by_points} of {len(pairs)} pairs", claimed="1 %",
        shown=[f"{by_per_cent}", *MEANS_OF_TABLE_4, *in_points(ours)],
    )  # fmt: skip


# ---- rank, layers, alpha, learning rate


@claim("B63.3")
def more_rank_is_not_always_better() -> Finding:
    high = "rank 64, all linear"
    shared = own_rate(QLORA)  # QLoRA's rank is 16
    compared = more_right((high, shared), QLORA), more_right(high, QLORA), more_right("rank 64, alpha 32", QLORA)
    return by_setting(
        not is_ahead((high, shared), QLORA), not is_ahead(high, QLORA),
        value=f"{points(mean((high, shared)))} % instead of {points(mean(QLORA))} %",
        shown=[
            points(mean(high)), *(number for found in compared for number in in_points(found)),
            points(smallest_difference(compared[1])), "32",
        ],
    )  # fmt: skip


@claim("B67.1")
def all_linear_layers_are_best() -> Finding:
    outcomes, shown = [], []
    for part in ("rank 16, attention", "rank 16, MLP"):
        lost, more = more_right(QLORA, part), higher_test_loss(part, QLORA)
        outcomes += [lost.mean > 0, more.mean > more.half]
        shown += [points(mean(part)), *in_points(lost), points(smallest_difference(lost)), *in_nats(more)]
    return by_setting(
        *outcomes, value=f"{points(mean(QLORA))} % instead of {points(mean('rank 16, attention'))} %", shown=shown
    )


@claim("B65.2")
def alpha_is_twice_the_rank() -> Finding:
    rate = own_rate(QLORA)  # chosen with alpha = 32, at rank 16
    others = [4, 8, 16, 64, 128]
    runs = {alpha: (f"alpha {alpha}", rate) for alpha in others} | {32: (QLORA, rate)}
    compared = [more_right(runs[32], runs[alpha]) for alpha in (16, 64)]
    return by_setting(
        all(mean(runs[32]) > mean(runs[alpha]) for alpha in others), AUTHORS_ALPHA == 2 * AUTHORS_RANK,
        value=f"r / {AUTHORS_RANK // AUTHORS_ALPHA}", claimed="2 r",
        shown=[
            f"{AUTHORS_RANK}", f"{AUTHORS_ALPHA}", *(points(mean(runs[alpha])) for alpha in (8, 32, 128)), *map(str, runs),
            *(number for found in compared for number in in_points(found)),
        ],
    )  # fmt: skip


@claim("B253.1")
def two_in_ten_thousand_is_a_good_start() -> Finding:
    at_it = mean((QLORA, 2e-4))
    ahead = more_right(QLORA, (QLORA, 2e-4))
    return by_setting(
        RATE_OF_THE_AUTHORS["7B"] == RATE_OF_THE_AUTHORS["13B"] == 2e-4, at_it > 0.9 * mean(QLORA),
        value=f"{points(at_it)} % and {points(mean(QLORA))} %",
        shown=[f"{own_rate(QLORA):.1e}".replace("e-0", "e-"), "2e-4", *in_points(ahead)],
    )  # fmt: skip


# ---- stability


@claim("B257.1")
def clipping_at_a_third_is_safe() -> Finding:
    name = "the paper's: constant, clipped at 0.3"
    row, usual = stability()[name], "as it should be"
    return by_setting(
        not any(row["spikes"]) and not is_worse(name, usual),
        value=f"{row['settings']['max_grad_norm']}", claimed="0.3",
        shown=[
            *(f"{loss(key):.3f}" for key in (name, usual, "no clipping")),
            *in_nats(higher_loss("no clipping", usual)), *in_nats(higher_loss(name, usual)),
        ],
    )  # fmt: skip


def losses_without_warm_up() -> tuple[list[bool], list[str]]:
    """At three learning rates: whether no warm-up is worse by more than noise, and the losses without and with it."""
    rates = {"as it should be": "no warm-up"}
    rates |= {f"{times} times the rate": f"{times} times the rate, no warm-up" for times in ("2.5", "5")}
    worse = [is_worse(without, with_it) for with_it, without in rates.items()]
    losses = [f"{loss(name):.3f}" for pair in rates.items() for name in reversed(pair)]
    return worse, losses + [number for pair in rates.items() for number in in_nats(higher_loss(*reversed(pair)))]
