# %% [markdown]
# # 7 · Does it cost quality?
#
# You will
# - compare full fine-tuning, 16-bit LoRA and QLoRA in five 4-bit formats, with five seeds each and error bars;
# - repeat one of these runs yourself;
# - tell a difference from noise;
# - choose a learning rate for each method, and see why a shared one says nothing;
# - see whether longer runs pay back what 4 bits cost, and what rank, layers and alpha change;
# - set all this beside the QLoRA paper, and beside later work that disagrees;
# - look at a real language model: what each format costs it, and what a short run teaches it.
#
# Takes about {{seconds}} seconds and {{gigabytes}} GB of memory on two processor cores. The runs of the tables were made by
# `data/scripts/measure/comparisons.py`.

# %%
import json
import statistics
from collections import defaultdict

from qlora_helpers import evaluation
from qlora_helpers.chats import read_chats
from qlora_helpers.course import plots
from qlora_helpers.course.checks import check
from qlora_helpers.course.exercises import lesson_07 as exercises
from qlora_helpers.course.tables import show_table
from qlora_helpers.memory import find_shape
from qlora_helpers.memory.methods import memory_of_methods
from qlora_helpers.models.loading import load_model, load_tokenizer
from qlora_helpers.paths import data_path
from qlora_helpers.settings import Settings
from qlora_helpers.statistics import difference, interval, mcnemar, smallest_difference
from qlora_helpers.training.run import train
from qlora_helpers.training.run_folder import new_run_folder

import torch

GB = 10**9
print("torch", torch.__version__.split("+")[0])

# %% [markdown]
# ## The question
#
# "Nearly identical to 16 bits", "less than 1 % behind full fine-tuning": this is how articles sum up QLoRA. Equal on which
# task, after which run? And how sure is that?
#
# We can ask our small model, with everything else held equal: 200 steps of 8 chats. Everything but the
# [learning rate](../GLOSSARY.md#learning-rate): each kind of run needs one of its own, as we will see. So each was tried at
# several rates, with several [seeds](../GLOSSARY.md#seed). A seed decides the order of the chats and the first values of the
# adapters.
#
# The rate is chosen on one set of questions, and the result reported on another: a rate that was chosen on the questions
# of the report would look better than it is. So there are three sets of chats, and no two share a person: 4,300 to train on,
# 500 validation questions to choose by, and 500 test questions to report on.

# %% tags=["nbval-check-output"]
measured = json.loads(data_path("measured", "comparisons.json").read_text(encoding="utf-8"))
elsewhere = ("batch", "by heart")  # groups of runs that lesson 13 looks at
tries = defaultdict(lambda: defaultdict(dict))  # runs by kind, learning rate and seed
for run in measured["runs"]:
    if measured["groups"][run["kind"]] not in elsewhere:
        tries[run["kind"]][run["learning_rate"]][run["seed"]] = run
made = [run for rates in tries.values() for seeds in rates.values() for run in seeds.values()]
hours = sum(run.get("seconds", 0) for run in measured["runs"]) / 3600
print(measured["budget"])
print(f"{len(made)} runs of {len(tries)} kinds")
print(f"with the runs of lesson 13, {hours:.1f} hours of training on one core, made on")
for here in measured["made_on"]:
    print(f"- {here['machine']}, torch {here['versions']['torch']}")
check("runs that broke off", sum(run["outcome"] != "ran" for run in made), 0, exact=True)

# %% [markdown]
# Every rate was tried with two seeds, and only the best two rates of a kind got the other
# seeds. This is one round of *successive halving* (Jamieson and Talwalkar, arXiv 1502.07943), which spends the time where it
# counts. Among rates with all seeds, the one with the best mean [exact match](../GLOSSARY.md#exact-match) on the validation
# questions is a kind's own rate. Exact match is the share of questions that are answered right, word for word:

# %%
def mean_of(kind: str, rate: float, part: str = "validation") -> float:
    return statistics.fmean(run[part]["exact_match"] for run in tries[kind][rate].values())


def own_rate(kind: str) -> float:
    most = max(len(seeds) for seeds in tries[kind].values())
    kept = [rate for rate, seeds in tries[kind].items() if len(seeds) == most]
    return max(kept, key=lambda rate: mean_of(kind, rate))


def column(kind: str, what: str = "exact_match", rate: float | None = None) -> list[float]:
    """The test results at a rate, or at the kind's own, seed by seed."""
    seeds = tries[kind][rate or own_rate(kind)]
    return [(seeds[seed] | seeds[seed]["test"])[what] for seed in sorted(seeds)]


def with_error(values) -> str:
    found = interval(values)
    return f"{found.mean:.1%} ± {found.half:.1%}"

# %% [markdown]
# Here are the methods, each at its own rate, on the test questions. bitsandbytes has no INT4: those runs have weights that
# were rounded to that format and then kept in 16 bits. Recall is the share of 2,000 facts that the model still knows in the
# words of its own corpus: it shows what a run forgets.

# %% tags=["nbval-check-output"]
FULL, LORA, QLORA = "full fine-tuning", "LoRA 16 bit", "QLoRA NF4 + double quant"
methods = [FULL, LORA, "QLoRA NF4", QLORA, "QLoRA INT4", "QLoRA INT4 symmetric", "QLoRA FP4"]
table = []
for kind in methods:
    loss, recall = (interval(column(kind, what)).mean for what in ("loss", "recall"))
    trained = column(kind, "trained_parameters")[0]
    table.append([kind, own_rate(kind), with_error(column(kind)), loss, recall, trained])
columns = ["method", "own rate", "exact match", "loss", "recall", "trained numbers"]
show_table(columns, table, formats=["", "g", "", ".3f", ".1%", ","])
at_an_edge = sum(own_rate(kind) in (min(tries[kind]), max(tries[kind])) for kind in methods)
check("own rates that are the lowest or the highest tried", at_an_edge, 0, exact=True)

# %%
fig, ax = plots.figure()
for y, kind in enumerate(methods):
    match = interval(column(kind))
    seeds = [100 * value for value in column(kind)]
    below = [y + 0.16 + 0.07 * seed for seed in range(match.count)]  # so that none covers another
    ax.plot(seeds, below, "o", markersize=4, color="#999999")
    ax.errorbar(100 * match.mean, y, xerr=100 * match.half, fmt="s", color=plots.BLUE, capsize=4)
ax.set_yticks(range(len(methods)), methods)
ax.invert_yaxis()
ax.set_xlabel("exact match (%): mean and 95 % interval, and below them the five seeds")
ax.set_title("Here all 4-bit formats cost something")
plots.show(fig, "7.1")

# %% [markdown]
# The [95 % interval](../GLOSSARY.md#confidence-interval) behind each "±" tells how sure the mean is: if everything were
# repeated many times, 95 of 100 such intervals would contain the true mean.
#
# ## Repeat one run
#
# Here is one of the table's runs once more: LoRA on the 16-bit base, at its own rate, with seed 0. Same code, same settings,
# your machine:

# %%
tokenizer = load_tokenizer()
chat_files = [data_path("chats", f"{part}.jsonl") for part in ("train", "test")]
all_chats, test_chats = map(read_chats, chat_files)
train_chats, validation_chats = all_chats[:-500], all_chats[-500:]
settings = Settings(**measured["budget"], learning_rate=own_rate(LORA), method="lora", seed=0)
base = load_model(quantization=None)
again = train(base, tokenizer, train_chats, new_run_folder("lesson-07"), settings)
match_again = evaluation.exact_match(again.model, tokenizer, test_chats)
loss_again = evaluation.loss(again.model, tokenizer, test_chats)
print(f"{match_again:.1%} and loss {loss_again:.3f} in {again.seconds:.0f} s")

# %% [markdown]
# The digits differ a little between processors: sums are added up in another order, and a run carries such differences
# along. A larger question is how much the five seeds differ, at this rate and at the next higher one:

# %% tags=["nbval-check-output"]
own = own_rate(LORA)
for rate in (own, 1.5e-3):
    shown = ", ".join(f"{share:.1%}" for share in column(LORA, rate=rate))
    print(f"{LORA} at {rate:g}, seeds 0 to 4: {shown}")
table_loss = tries[LORA][own][0]["test"]["loss"]
check("the loss of this run over the table's", loss_again / table_loss, at_least=0.7, at_most=1.4)

# %% [markdown]
# One run is no measurement. At 1.5e-3 four seeds say that this rate is as good as the other; the fifth ends at 78 %.
#
# ## Difference or noise?
#
# Two means always differ. When is a difference more than noise? Runs with the same seed share the order of their chats and
# the first values of their adapters. Part of their luck is therefore the same, and it cancels out if we subtract seed by
# seed. This is a [paired comparison](../GLOSSARY.md#paired-comparison). We take the five differences, and look whether the
# 95 % interval of their mean contains zero. If it does, the difference may be noise. With five seeds the interval is 2.776
# [standard errors](../GLOSSARY.md#standard-error) wide on either side (Student's t).
#
# ## Exercise 7.1: difference or noise, by eye
#
# *Predict · medium · about 5 minutes.* Here are two pairs from the table of runs, seed by seed, under other names. Judge
# them before you compute anything: for which of the two is the difference more than noise? Answer `"A and B"`,
# `"C and D"`, `"both"` or `"neither"`.

# %% tags=["nbval-check-output"]
hidden = {"A": (LORA, 1.5e-3), "B": ("QLoRA NF4", 1.5e-3),
          "C": (FULL, 4e-4), "D": ("QLoRA INT4 symmetric", 1.5e-3)}
pairs = {letter: column(kind, rate=rate) for letter, (kind, rate) in hidden.items()}
by_seed = [[seed, *scores] for seed, scores in enumerate(zip(*pairs.values()))]
show_table(["seed", *pairs], by_seed, formats=["", *[".1%"] * 4])
for one, other in ("AB", "CD"):
    ahead = interval(pairs[one]).mean - interval(pairs[other]).mean
    print(f"mean difference {one} - {other}: {100 * ahead:+.1f} points")

# %% tags=["exercise"]
more_than_noise = ...

# %% tags=["solution"]
more_than_noise = "A and B"  # A is ahead at every seed; most of C's lead is from seed 4

# %% tags=["nbval-check-output"]
exercises.noise.check(more_than_noise, pairs=pairs)

# %% [markdown]
# ## Exercise 7.2: the error of a paired difference
#
# *Build · medium · about 10 minutes.* Write `paired`: it takes the results of two kinds of runs, in the order of their
# seeds, and returns the mean of the differences (`one` minus `other`) and the standard error of this mean. It works for any
# number of seeds from two on.

# %% tags=["exercise"]
def paired(one: list[float], other: list[float]) -> tuple[float, float]:
    return ...

# %% tags=["solution"]
def paired(one: list[float], other: list[float]) -> tuple[float, float]:
    differences = [a - b for a, b in zip(one, other)]
    mean = sum(differences) / len(differences)
    variance = sum((d - mean) ** 2 for d in differences) / (len(differences) - 1)
    return mean, (variance / len(differences)) ** 0.5

# %% tags=["nbval-check-output"]
exercises.paired.check(paired)

# %% [markdown]
# ## Which differences are real?
#
# `difference` does the same, and adds the interval. `smallest_difference` tells the [power](../GLOSSARY.md#power) of a
# comparison: how large a true difference would have to be for such seeds and questions to show it in 80 of 100 repeats. It
# stands in the last column. "Within noise" does not mean that two methods are equal. It means that nothing was found, and that
# a difference of less than this may well be there. (`NF4 + DQ` is NF4 with double quantisation.)

# %% tags=["nbval-check-output"]
def compare(*pairs):
    """Pairs of kinds, each at its own rate; or of (kind, rate)."""
    found, table = [], []
    for pair in pairs:
        runs = [run if isinstance(run, tuple) else (run, own_rate(run)) for run in pair]
        a, b = (column(kind, rate=rate) for kind, rate in runs)
        shared = min(len(a), len(b))  # seeds that both have: the first ones
        found.append(one := difference(a[:shared], b[:shared]))
        names = [f"{kind} at {rate:g}" for kind, rate in runs]
        names = [name.replace(QLORA, "NF4 + DQ").replace(LORA, "16 bit") for name in names]
        shown = f"{100 * one.mean:+.1f} ± {100 * one.half:.1f}"
        table.append([*names, one.count, shown, one.verdict, 100 * smallest_difference(one)])
    columns = ["one", "other", "seeds", "points", "verdict", "would show"]
    show_table(columns, table, formats=["", "", "", "", "", ".1f"])
    return found


_, nf4_cost, _, _, at_one, *_ = compare(
    (FULL, LORA), (LORA, QLORA), (LORA, (QLORA, 2e-3)), (QLORA, "QLoRA NF4"),
    ((QLORA, 2e-3), ("QLoRA NF4", 2e-3)), (QLORA, "QLoRA INT4"), (QLORA, "QLoRA FP4"),
)
check("double quantisation makes a difference", not at_one.is_noise, False, exact=True)
check("4 bits make a difference", not nf4_cost.is_noise, True, exact=True)

# %% [markdown]
# So, for this model and this task:
# - NF4 with double quantisation costs 8.6 points against 16 bits. The interval is wide, since one seed of five came out badly; at
#   the next rate, where none did, it is 10.4 ± 1.2. That is a lot, and it has a reason: the model is small and full of facts,
#   0.36 bits per weight (lesson 2). Large models have room to spare, and the paper found no loss there;
# - [double quantisation](../GLOSSARY.md#double-quantisation) costs nothing that five seeds can see, as the paper says. At
#   one rate they differ in nothing else, and 0.7 points would have shown;
# - NF4 against INT4 is within noise: a difference of 1.6 points would have shown. Against FP4 it is a difference;
# - full fine-tuning against 16-bit LoRA is within noise, too, with 11 times as many trained numbers. A difference of 2.2
#   points would have shown.
#
# ## The learning rate
#
# The largest effect of all does not come from the format. Here are three methods at all rates that were tried, in the mean over
# the seeds:

# %% tags=["nbval-check-output"]
three = (FULL, LORA, QLORA)
table = [[kind, rate, len(seeds), mean_of(kind, rate), mean_of(kind, rate, "test")]
         for kind in three for rate, seeds in tries[kind].items()]
columns = ["method", "learning rate", "seeds", "validation", "test"]
show_table(columns, table, formats=["", "g", "", ".1%", ".1%"])
for kind, factor in ((LORA, 5), (QLORA, 7.5)):
    found = own_rate(kind) / own_rate(FULL)
    check(f"own rate of {kind} over that of full fine-tuning", found, factor, exact=True)

# %%
fig, ax = plots.figure()
for kind, marker in zip(three, "s^o"):
    means = {rate: 100 * mean_of(kind, rate) for rate in tries[kind]}
    (line,) = ax.plot(list(means), list(means.values()), marker=marker, markersize=4, label=kind)
    ax.plot(own_rate(kind), means[own_rate(kind)], marker, markersize=11, color=line.get_color())
ax.set_xscale("log")
ax.set_xlabel("learning rate; a large mark is a method's own")
ax.set_ylabel("exact match, validation (%)")
ax.set_ylim(0, 122)
ax.legend(loc="upper center", ncol=3)
ax.set_title("LoRA wants a learning rate several times higher")
plots.show(fig, "7.2")

# %% [markdown]
# At a learning rate four times too high QLoRA falls to 4.7 %. No choice of format does that. "LoRA Without Regret"
# (Schulman and others, 2025) reports a factor of about 10 between the best rates of LoRA and of full fine-tuning. Here it
# is 5, on a grid whose steps are about two.
#
# What would one shared rate for LoRA in 16 bits and in 4 have told us? Here is the price of 4 bits
# at each rate that both were tried at:

# %% tags=["nbval-check-output"]
at_shared = compare(*[((LORA, rate), (QLORA, rate)) for rate in tries[LORA]])
prices = [one.mean for one in at_shared]
check("largest price over the smallest", max(prices) / min(prices), at_least=3)

# %% [markdown]
# At 5e-4 the price looks like 21 points, at 1.5e-3 like 4.6. (Two seeds make wide intervals; look at the means.)
# **So a comparison of methods at one shared learning rate says nothing.**
#
# ## Is it what is learnt, or how fast?
#
# 200 steps are few. If 4 bits only slow a run down, more steps pay the price back. If they limit what can be learnt, it
# stays. So here are runs of half to four times as many steps, each at a rate of its own:

# %% tags=["nbval-check-output"]
def edge_of(kind: str) -> str:
    ends = {min(tries[kind]): "the lowest", max(tries[kind]): "the highest"}
    return ends.get(own_rate(kind), "")


names_at = {count: [kind + f", {count} steps" * (count != 200) for kind in (LORA, QLORA)]
            for count in (100, 200, 400, 800)}
table = [[count, base, own_rate(kind), edge_of(kind), with_error(column(kind))]
         for count, names in names_at.items() for base, kind in zip(("16 bit", "NF4"), names)]
columns = ["steps", "base", "own rate", "of those tried", "exact match"]
show_table(columns, table, formats=["", "", "g", "", ""])
_ = compare(*names_at.values())
early, late = ([a - b for a, b in zip(*map(column, names_at[count]))] for count in (200, 800))
fall = difference(early[: len(late)], late)
print(f"price after 200 steps minus price after 800: {100 * fall.mean:.1f} ± {100 * fall.half:.1f}"
      f" points, {fall.verdict}; {100 * smallest_difference(fall):.1f} would have shown")
check("the price falls", not fall.is_noise, True, exact=True)

# %%
fig, ax = plots.figure()
for which, (kind, marker) in enumerate(zip((LORA, QLORA), "so")):
    found = [interval(column(names[which])) for names in names_at.values()]
    means, halves = [100 * one.mean for one in found], [100 * one.half for one in found]
    ax.errorbar(list(names_at), means, yerr=halves, marker=marker, capsize=3, label=kind)
ax.set_xscale("log", base=2)
ax.set_xticks(list(names_at), [str(count) for count in names_at])
ax.set_xlabel("steps of 8 chats")
ax.set_ylabel("exact match (%), each at its own rate")
ax.set_ylim(40, 106)
ax.legend(loc="lower right")
ax.set_title("More steps pay most of the price of 4 bits back")
plots.show(fig, "7.3")

# %% [markdown]
# The price falls with the number of steps, from 17.6 points after 100 to 1.9 after 800, which is within noise; 3.8 would have
# shown. After 800 steps, QLoRA answers about as many questions right as LoRA on 16 bits does after 200. So here 4 bits mostly
# slow a run down: they limit how fast it learns much more than what it can learn. (The longer the run, the lower its own rate.
# Where this is the lowest that was tried, a lower one may do better still.) Whether a large model shows the same, these runs do
# not tell.
#
# ## Rank, and which layers
#
# The paper says that the [rank](../GLOSSARY.md#rank) hardly matters once *all* linear layers are adapted; others call a
# rank of 32 to 128 the sweet spot. Where this course compares ranks, alpha is twice the rank unless it says otherwise, so
# that the factor `alpha / rank` stays the same. With a fixed alpha this factor falls as the rank grows, so that at one
# learning rate the step of an adapter changes with its rank.

# %% tags=["nbval-check-output"]
ranks = {(rank, "all linear", 2 * rank): f"rank {rank}, all linear" for rank in (1, 4, 16, 64)}
ranks |= {(64, "all linear", 32): "rank 64, alpha 32", (16, "attention", 32): "rank 16, attention",
          (16, "MLP", 32): "rank 16, MLP"}
ranks[16, "all linear", 32] = QLORA
table = []
for key, kind in ranks.items():
    numbers = column(kind, "trained_parameters")[0]
    table.append([*key, numbers, own_rate(kind), edge_of(kind), with_error(column(kind))])
columns = ["rank", "layers", "alpha", "numbers", "own rate", "of those tried", "exact match"]
show_table(columns, table, formats=["", "", "", ",", "g", "", ""])

# %% [markdown]
# What counts is again the difference, over the seeds that both have:

# %% tags=["nbval-check-output"]
others = [kind for kind in ranks.values() if kind != QLORA]
found = dict(zip(others, compare(*[(QLORA, other) for other in others])))
one_rate, *_ = compare(((QLORA, 1.5e-3), ("rank 64, all linear", 1.5e-3)))
at_own = found["rank 64, all linear"]
check("rank 64 and rank 16, each at its own rate, differ", not at_own.is_noise, False, exact=True)
check("rank 16 minus rank 64, all layers, at one rate", one_rate.mean, at_least=0.1)

# %% [markdown]
# With alpha at twice the rank, the own rate falls as the rank grows, from 6e-3 at rank 1 to 7e-4 at rank 64. With alpha fixed
# at 32, rank 64 keeps the rate of rank 16, 1.5e-3. Most reports say this of a fixed alpha: the best rate hardly moves with the
# rank. But with alpha at twice the rank and one rate for all, rank 64 looks 24.1 points worse than
# rank 16. With a rate of its own it is within noise of it, and 6.1 points would have shown; with alpha = 32 it is ahead by
# 1.9 ± 0.6.
#
# Rank 1, rank 4 and attention alone are behind in the mean, but their three seeds differ so much that exact match does not
# tell. The loss on the same questions varies less:

# %% tags=["nbval-check-output"]
for other in ("rank 1, all linear", "rank 4, all linear", "rank 16, attention", "rank 16, MLP"):
    more = difference(column(other, "loss"), column(QLORA, "loss")[:3])
    shown = f"{more.mean:+.3f} ± {more.half:.3f} nats, {more.verdict}"
    print(f"{other} minus rank 16, all linear: {shown}; {smallest_difference(more):.3f} would show")

# %% [markdown]
# Rank 1 is worse, and so are attention alone and the MLP alone. (The MLP's own rate is the highest that was tried, so a higher
# one may do better.) So the paper's advice holds: adapt all linear layers. That the rank does not matter holds from some rank
# on. Which one depends on how much there is to learn.
#
# ## Exercise 7.3: a fair comparison
#
# *Build · hard · about 15 minutes.* A blog post says: "Rank 64 is worse than rank 16, we tried both with the same settings."
# Write the comparison that they should have made. `fair_difference` takes what was tried of two methods: for each learning
# rate, by seed, a pair of results, on the validation and on the test questions, such as
# `{0.001: {0: (0.91, 0.89), 1: (0.70, 0.67)}, 0.002: {0: (0.95, 0.93)}}`. Each method is judged at its own rate, the one with
# the highest mean on the validation questions over all its seeds there. Return the mean difference on the test questions,
# `one` minus `other`, over the seeds that both have at these rates.

# %% tags=["exercise"]
def fair_difference(one: dict, other: dict) -> float:
    return ...

# %% tags=["solution"]
def fair_difference(one: dict, other: dict) -> float:
    def mean(values):
        return sum(values) / len(values)

    def at_own_rate(tried):
        return max(tried.values(), key=lambda seeds: mean([found[0] for found in seeds.values()]))

    a, b = at_own_rate(one), at_own_rate(other)
    return mean([a[seed][1] - b[seed][1] for seed in a.keys() & b.keys()])

# %% tags=["nbval-check-output"]
exercises.fair_difference.check(fair_difference)

# %% [markdown]
# ## Alpha
#
# LoRA's output is scaled by `alpha / rank`, so [alpha](../GLOSSARY.md#alpha) acts much as the learning rate does. A common
# rule of thumb is `alpha = 2 r`, twice the rank. The paper used 16 with rank 64, a quarter. Here are six alphas at rank 16, all
# at the rate that was chosen with alpha = 32:

# %% tags=["nbval-check-output"]
of_alpha = {alpha: QLORA if alpha == 32 else f"alpha {alpha}" for alpha in (4, 8, 16, 32, 64, 128)}
alphas = {alpha: interval(column(kind, rate=1.5e-3)).mean for alpha, kind in of_alpha.items()}
table = [[alpha, alpha / 16, mean] for alpha, mean in alphas.items()]
show_table(["alpha", "alpha / rank", "exact match"], table, formats=["", "g", ".1%"])
_ = compare((QLORA, "alpha 16"), (QLORA, "alpha 64"))
check("the best alpha at rank 16, this learning rate", max(alphas, key=alphas.get), 32, exact=True)

# %% [markdown]
# 32 is best because the learning rate was chosen with it; 64 is within noise of it. With alpha = 8, a quarter, runs do about as
# well as with 32 at a third of the rate (41.7 % in the table of rates). Neither number means anything without the other: keep to
# one convention for alpha, and tune the learning rate.
#
# ## Exercise 7.4: an alpha that is far too large
#
# *Run · medium · about 10 minutes.* Somebody insists on alpha = 512 at rank 16. At the usual learning rate of 2e-3 such a
# run does not learn, as the next cell shows. You may not touch alpha. Find a learning rate at which the same 30 steps end
# with a validation loss of 0.9 or less. `loss_after(rate)` makes the run (a few seconds), so try as many as you like. But think
# first about what alpha does.

# %%
def loss_after(rate: float) -> float:
    tried = Settings(steps=30, batch_size=8, warmup_steps=3, alpha=512, learning_rate=rate)
    run = train(load_model(), tokenizer, train_chats[: 30 * 8], new_run_folder("lesson-07"), tried)
    return evaluation.loss(run.model, tokenizer, validation_chats[:100])


print(f"validation loss at 2e-3: {loss_after(2e-3):.2f}")

# %% tags=["exercise"]
rate_for_alpha_512 = ...

# %% tags=["solution"]
rate_for_alpha_512 = 2e-3 * 32 / 512  # the usual rate was chosen with alpha = 32

# %% tags=["nbval-check-output"]
exercises.rate_for_alpha.check(rate_for_alpha_512, loss_after=loss_after)

# %% [markdown]
# ## What a run forgets
#
# Before any run, the base in NF4 recalled 98.9 % of its own facts (lesson 2). A high learning rate wipes them out:

# %% tags=["nbval-check-output"]
some = [(FULL, 1e-4), (FULL, 8e-4), (LORA, 1e-3), (LORA, 3e-3), (QLORA, 1e-3), (QLORA, 3e-3)]
table = [[kind, rate, interval(column(kind, "recall", rate)).mean] for kind, rate in some]
show_table(["method", "learning rate", "recall"], table, formats=["", "g", ".1%"])

# %% [markdown]
# ## What it saves
#
# This is predicted for an 8B model that is trained with 1 x 2,048 tokens, as in [lesson 1](01_memory_maths.ipynb):

# %% tags=["nbval-check-output"]
methods_of_8b, table = memory_of_methods(find_shape("meta-llama/Llama-3.1-8B"), gpu="h200"), []
for run in methods_of_8b:
    sizes = run.weights, run.gradients, run.states, run.kept, run.paged, run.peak, run.on_the_card
    table.append([run.settings.method, run.settings.optimizer, *(size / GB for size in sizes)])
columns = ["weights", "gradients", "states", "kept", "paged", "peak", "on the card"]
show_table(["GB", "optimizer", *columns], table, formats=["", "", *[".1f"] * 7])

# %% [markdown]
# *Kept* are the three before it: weights, gradients and optimizer states, wherever they lie. *Paged* is the part of the states
# that is not in torch's tensors: it lies on the card as long as there is room, else in main memory. The *peak* is the most in
# torch's tensors, with activations and without paged states. *On the card* is all of it, with paged states and the CUDA
# context.
#
# So full fine-tuning of 8B keeps 96.4 GB with states in float32, 64.2 GB with states in bfloat16 (`adamw_torch`), and 51.6 GB
# with states in 8 bits. The peak says 32.4 GB for the last of these, since it leaves out 19.2 GB of paged states; on the card
# it is 52.6 GB. For `adamw_torch` it says 80.4 GB: nothing is paged, and the step makes one more copy of every number.

# %% [markdown]
# QLoRA's lower memory has a price in time. Three runs of 8B on an H200, one sequence of 2,048 tokens at a time:

# %% tags=["nbval-check-output"]
def measured_in(name: str) -> list[dict]:
    return json.loads(data_path("measured", f"{name}.json").read_text(encoding="utf-8"))["rows"]


of_8b = {row["label"]: row for row in measured_in("oom")}
again = {"model": "Llama-3.1-8B", "who": "ours", "gear": "ampere", "batch_size": 1, "tokens": 2048}
(other_day,) = [row for row in measured_in("t4_gear") if row.items() >= again.items()]
lora, qlora = of_8b["load: price"], of_8b["load: cure, 4 bits"]
of_series = {"16-bit LoRA": lora, "QLoRA": qlora, "QLoRA, measured in another series": other_day}
table = []
for label, row in of_series.items():
    longer = lora["tokens_per_second"] / row["tokens_per_second"]
    table.append([label, row["peak_allocated_bytes"] / GB, row["tokens_per_second"], longer])
columns = ["8B on an H200", "peak, GB", "tokens/s", "times as long as LoRA"]
show_table(columns, table, formats=["", ".2f", ",", ".2f"])

# %% [markdown]
# Each product decodes its 4-bit weights first, and that takes time. How much, these rows do not tell. With one sequence at a
# time they are bound by the CPU: the GPU waits for it ([lesson 11](11_where_the_time_goes.ipynb)), and this waiting is part of
# what is measured. One pair makes it 1.68 times as long for each token, the other 1.24, of almost the same QLoRA run (its adapters
# are in float32).
#
# Four sequences at a time give the GPU far more to do. These runs are of one card, one after the other:

# %% tags=["nbval-check-output"]
of_speed, full = {row["label"]: row for row in measured_in("speed")}, "8b bf16 4x2048 full ours"
pairs, table, busy = {}, [], []
for layers in ("", " compiled"):
    in_16, in_4 = (of_speed[f"{full}{layers} {which}"] for which in ("16-bit", "beside-16-bit"))
    pairs[layers] = in_16["tokens_per_second"] / in_4["tokens_per_second"]
    peaks = [row["peak_allocated_bytes"] / GB for row in (in_16, in_4)]
    paces = [row["tokens_per_second"] for row in (in_16, in_4)]
    busy += [in_16["busy_share"], in_4["busy_share"]]
    table.append([layers.strip() or "as they are", *peaks, *paces, pairs[layers]])
columns = ["layers", "16 bits, GB", "4 bits, GB", "16 bits, tokens/s", "4 bits", "times as long"]
show_table(columns, table, formats=["", ".2f", ".2f", ",.0f", ",.0f", ".2f"])
print(f"the GPU is at work for {min(busy):.0%} to {max(busy):.0%} of a step")
check("times as long in 4 bits, layers compiled", pairs[" compiled"], at_most=1.1)

# %% [markdown]
# With compiled layers 4 bits take 1.03 times as long: a product of so many tokens takes far longer than the decoding of its
# weights. Without compiling, QLoRA is even faster, 0.94 times as long. That is no merit of its 4 bits: TRL makes the adapters
# of a 4-bit model bfloat16, while those of a 16-bit one stay float32 and are cast in each product. So the price in time is
# large for few tokens at a time, as when a model answers, and small for a full batch.
#
# ## What the paper found, and what came later
#
# From the paper (arXiv 2305.14314), with large models:
#
# | | 16 bit | NF4 + DQ | FP4 | INT4 |
# |---|---|---|---|---|
# | perplexity, mean of 125M to 13B models (Table 2) | – | 27.41 | 31.07 (E2M1) | 34.34 |
# | MMLU, mean of LLaMA 7B to 65B, LoRA (Table 4) | 53.0 | 53.1 | 52.2 | – |
#
# (Perplexity is e to the power of the loss, so lower is better. MMLU is a test of multiple-choice questions.) On MMLU,
# 16-bit LoRA and NF4 are level, and FP4 is a point behind. The order, NF4 before INT4 and FP4, is the one that we see. The
# size of the loss is not: a small model full of facts loses more. The paper's comparison with *full* fine-tuning is on
# RoBERTa and T5 (Table 3); at 7B to 65B it compares with 16-bit LoRA.
#
# Later work is less even:
# - "LoRA Learns Less and Forgets Less" (Biderman and others, arXiv 2405.09673): on code and mathematics LoRA stays clearly
#   behind full fine-tuning, and forgets less of the rest;
# - LoftQ (arXiv 2310.08659) reports that QLoRA falls behind 16-bit LoRA, more so at 3 and 2 bits, and closes part of the
#   gap by starting the adapters from other values;
# - "LoRA Without Regret" finds LoRA level with full fine-tuning if all layers are adapted, the rank is large enough for the
#   data, the batch is not too large and the learning rate is tuned for each.
#
# We tried none of these at their size. What is shown here is a mechanism, on a model of 3 million weights. On the same model,
# [lesson 13](13_which_adapter.ipynb) tries LoftQ and other variants, and claims of "LoRA Without Regret".

# %% [markdown]
# ## On a real model
#
# All of this is a model of 3 million weights in an invented world. SmolLM2-135M-Instruct has 135 million, learned from the
# web, and runs on any laptop. One command fetches it, without an account: `python -m qlora_helpers fetch smollm2-135m`. The
# tables below were measured with it beforehand, on one processor core, by `data/scripts/measure/real_formats.py` and
# `real_task.py`.
#
# First the formats. The text is this course's own questions and answers about QLoRA, which are younger than the model. What
# a format costs is the loss with the decoded weights minus the loss with the weights as they came, on the same tokens. The
# errors are shares: of the weights; of what the query layers (q) and the value layers (v) of attention put out on that text;
# and of those weights in the value layers that the loudest input is multiplied with.

# %% tags=["nbval-check-output"]
stored = json.loads(data_path("measured", "real_formats.json").read_text(encoding="utf-8"))
print(stored["source"]["weights"])
print(f"{stored['tokens']:,} tokens, a loss of {stored['loss']:.2f} nats per token")
formats = {row["name"]: row for row in stored["rows"]}
table = []
for name, row in formats.items():
    cost, outputs = interval(row["costs"]), row["output_errors"]
    shown = f"{cost.mean:+.3f} ± {cost.half:.3f}"
    loudest = row["loudest_errors"]["v_proj"]
    table.append([name, shown, row["weight_error"], outputs["q_proj"], outputs["v_proj"], loudest])
columns = ["format", "cost (nats)", "weights", "q outputs", "v outputs", "v, loudest"]
show_table(columns, table, formats=["", "", ".3f", ".3f", ".3f", ".2f"])

# %% tags=["nbval-check-output"]
costs = {name: row["costs"] for name, row in formats.items()}
zero, no_zero = "INT4, 15 levels with a zero", "INT4, 16 levels without a zero"
given_back = "16 levels, a zero in v_proj"
pairs = [("NF4, double quantisation", "NF4"), ("NF4, blocks of 32", "NF4"), ("FP4", "NF4"),
         (zero, "NF4"), (no_zero, zero), (given_back, no_zero), (given_back, zero)]
table = []
for one, other in pairs:
    found = difference(costs[one], costs[other])
    shown = f"{found.mean:+.3f} ± {found.half:.3f}"
    table.append([one, other, shown, found.verdict, smallest_difference(found)])
columns = ["one", "other", "nats", "verdict", "would show"]
show_table(columns, table, formats=["", "", "", "", ".3f"])
worse = [kind for kind, error in formats[no_zero]["output_errors"].items()
         if error > formats[zero]["output_errors"][kind]]
print("16 levels put out more error than 15 in:", ", ".join(worse))
check("NF4's cost on real weights", interval(costs["NF4"]).mean, at_least=0.1, at_most=0.3)

# %% [markdown]
# The order is the paper's: NF4, then FP4, then INT4. Double quantisation costs 0.003 nats, which only a paired comparison can
# see, and smaller blocks gain nothing. Shuffled weights show what a model without
# knowledge would have. These weights had been rounded to Q4_1 before we got them (another 4-bit format, in blocks of 32), so
# the costs are those of rounding a second time.
#
# **Something does not fit.** With 16 levels the weights are closer to what they were than with 15, and the loss is much
# higher. So the error of the weights is not what counts. What the layers put out is: with 16 levels it is closer, too, in six
# kinds of layers, and further away in one, the value layers. There, the weights for the loudest input are next to zero, as
# their large errors show: the model has learned not to listen to it. The 16 levels have no zero, so each of these weights
# becomes at least a fifteenth of the largest one of its block.
#
# That is a guess until it is tested. The last line of the first table gives a zero to the value layers alone. They are few, and
# the mean error of all weights hardly moves. The cost falls from 0.589 to 0.353, back to that of 15 levels.
#
# If the model is on this disk, here is a row once more, on the first pieces of the text:

# %%
from qlora_helpers.evaluation.losses import losses_of
from qlora_helpers.models.fetched import is_fetched
from qlora_helpers.models.weights import quantize_dequantize
from qlora_helpers.quantize import NF4

REAL = "smollm2-135m"
if is_fetched(REAL):
    real, its_tokenizer = load_model(REAL, quantization=None), load_tokenizer(REAL)
    chats = read_chats(data_path("chats", "qlora", "test.jsonl"))
    text = "\n\n".join("\n".join(message["content"] for message in chat) for chat in chats)
    ids = its_tokenizer(text)["input_ids"]
    pieces = [{"input_ids": ids[at : at + 256], "assistant_masks": [1] * 256} for at in (0, 256)]
    before = losses_of(real, its_tokenizer, pieces)
    quantize_dequantize(real, NF4)
    after = losses_of(real, its_tokenizer, pieces)
    here = sum(b - a for (a, _), (b, _) in zip(before, after)) / sum(count for _, count in before)
    print(f"NF4 costs {here:+.3f} nats here, {sum(costs['NF4'][:2]) / 2:+.3f} in the table")
else:
    print(f"It is not: python -m qlora_helpers fetch {REAL}  gets it, and this cell measures a row.")

# %% [markdown]
# ## One task that it learns
#
# Now a run on it. The task is one that people do fine-tune small models for: an order in free text becomes JSON. Training,
# validation and test orders share no name, no word of an item and no phrasing. Here is one of the test:

# %% tags=["nbval-check-output"]
orders = read_chats(data_path("chats", "orders", "test.jsonl"))
for message in orders[0]:
    print(f"{message['role']:10}{message['content']}")

# %% [markdown]
# The run is short: rank 16, 48 steps of 4 orders. Its learning rate is the one with the lower loss on the validation orders.
# Then the test orders are asked, once. No run should stand alone, so two things stand beside it: the same model with three of
# the training orders as examples in its prompt, which costs no training at all, and the same run on shuffled weights. "Valid"
# is the share of answers that are a JSON object, "right" that of orders with all five fields right, and then come the fields
# one by one. Where there are several seeds, they are taken together:

# %% tags=["nbval-check-output"]
stored = json.loads(data_path("measured", "real_task.json").read_text(encoding="utf-8"))
tasks = defaultdict(list)
for row in stored["rows"]:
    if "right" in row:
        tasks[row["name"].partition(", seed")[0]].append(row)
names_of = {"no example": "no run, no example", "three examples": "no run, three examples",
            "NF4": "QLoRA, NF4", "16 bit": "LoRA, 16 bit", "shuffled": "LoRA, shuffled weights"}
table = []
for label in filter(tasks.get, names_of):
    asked = [list(map(int, row["each"])) for row in tasks[label]]
    right = interval([sum(of) / len(of) for of in zip(*asked)])  # the seeds answer the same orders
    shares = [{"valid": row["valid"]} | row["fields"] for row in tasks[label]]
    means = [sum(share[name][0] for share in shares) / len(shares) for name in shares[0]]
    shown = f"{right.mean:.0%} ± {right.half:.0%}" if right.half else f"{right.mean:.0%}"
    table.append([names_of[label], len(asked), shown, *means])
columns = ["", "seeds", "right", *shares[0]]
show_table(columns, table, formats=["", "", "", *[".0%"] * len(shares[0])])

# %% [markdown]
# Both answer the same orders, so the runs are compared with the examples order by order. For each order it counts how many of the
# seeds got it right:

# %% tags=["nbval-check-output"]
by_order = {label: [sum(map(int, of)) / len(of) for of in zip(*(row["each"] for row in rows))]
            for label, rows in tasks.items()}
ahead = difference(by_order["NF4"], by_order["three examples"])
print(f"QLoRA minus three examples: {100 * ahead.mean:+.0f} ± {100 * ahead.half:.0f} points,"
      f" {ahead.verdict}; {ahead.count} orders would show {100 * smallest_difference(ahead):.0f}")
of_seed_0 = ([one == "1" for one in tasks[label][0]["each"]] for label in ("three examples", "NF4"))
chance = mcnemar(*of_seed_0)
check("how likely chance alone would tell seed 0 from the examples", chance, at_most=0.001)

# %% [markdown]
# Before the run, the model chats about orders. Three examples teach it the form. The run teaches it more of the task, and its
# prompts need no examples. On shuffled weights the same run teaches no valid answer: what it uses is in the weights.
#
# Look at the fields, too. Names, items, numbers and days stand in the text, and words of no training order are copied from it.
# Whether an order is to be delivered must be understood: "leave it on my porch" is in no training order. There, both do no
# better than tossing a coin. So many orders teach a model of this size to copy and to count, not to understand.
#
# ## Is that luck?
#
# The intervals come from the orders. Other seeds are another kind of luck. Here are the three runs of each kind one by one, and
# what 4 bits cost this task, order by order:

# %% tags=["nbval-check-output"]
kinds = ("NF4", "16 bit", "shuffled")
table = [[names_of[kind], *(row["right"][0] for row in tasks[kind])] for kind in kinds]
show_table(["right", "seed 0", "seed 1", "seed 2"], table, formats=["", ".0%", ".0%", ".0%"])
price = difference(by_order["16 bit"], by_order["NF4"])
print(f"16 bits minus 4 bits: {100 * price.mean:+.1f} ± {100 * price.half:.1f} points,"
      f" {price.verdict}; {price.count} orders would show {100 * smallest_difference(price):.0f}")

# %% [markdown]
# Seeds differ by several points, as the orders do. Four bits cost this task nothing that three seeds and 100 orders can show. That
# is not the price per token of the table of formats: there, nothing was trained after the rounding. Here the adapters were trained
# on the rounded weights, and can make up for what the task needs.
#
# ## What it does not learn
#
# Form is one thing, facts are another. The same run, with questions for the capitals of 50 countries, each answered by the
# capital alone. The test asks for those of 50 other countries. The run cannot teach them; the model must know them by itself:

# %% tags=["nbval-check-output"]
(capitals,) = [row for row in stored["rows"] if row["name"] == "capitals"]
tries = {"before": "before the run", "after": "after it",
         "after_on_training": "after it, on the training questions"}
table = [[words, (found := capitals[key])["questions"], found["alone"][0], found["right"][0]]
         for key, words in tries.items()]
show_table(["", "countries", "up to four words", "right"], table, formats=["", "", ".0%", ".0%"])
of_test = [[one == "1" for one in capitals[when]["each"]] for when in ("before", "after")]
chance = mcnemar(*of_test)
check("how likely chance alone would make the answers so much worse", chance, at_most=0.01)
for answer in capitals["after"]["some_answers"]:
    print(answer)

# %% [markdown]
# The form is learned at once: every answer is short. The training capitals are learned by heart, most of them. But of the 50
# others the model now gets 12 % right, where it had 44 % before. What it has learned is that a short answer is wanted, even
# where it does not know one. So do not teach facts by a short run in the hope that more of them follow. Give the model what it
# should know in its prompt, and train it to use that.
#
# Has it forgotten anything else? The set of general knowledge that [lesson 10](10_your_own_data.ipynb) uses says what is left
# of the facts that the model knew before, after the run on orders and after the one on capitals:

# %% tags=["nbval-check-output"]
for row in (tasks["NF4"][0], capitals):
    print(f"{row['name']}: {row['kept']['said']}\n")

# %% [markdown]
# ## You have
# - compared full fine-tuning, 16-bit LoRA and QLoRA in five formats, with five seeds each and error bars;
# - repeated one of these runs;
# - told differences from noise: double quantisation costs nothing, 4 bits cost something here;
# - chosen a learning rate for each method on validation questions, and seen that a shared one says nothing;
# - seen what more steps pay back, and that the learning rate, the adapted layers and alpha matter more than the format;
# - set it beside the paper, which found less loss on larger models, and beside later work;
# - looked at a real model: what formats cost it, why a level at zero matters, what a short run teaches it, and what it does not.
#
# Next: [lesson 8](08_stability.ipynb) breaks runs on purpose, and mends them.
