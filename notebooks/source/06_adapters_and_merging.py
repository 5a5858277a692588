# %% [markdown]
# # 6 · Adapters and merging
#
# You will
# - look into an adapter's files, and see that an adapter belongs to one base;
# - put two adapters on one 4-bit base, switch between them, and let both answer in one batch;
# - merge an adapter in four ways, and measure what each of them changes;
# - see why an adapter that is merged into 4 bits loses part of itself, and sometimes all of it;
# - train for such a merge, so that its model is the one that was trained, and see when that pays;
# - plan the memory of a merge for 8B and 70B, merge file by file, and save without losing anything.
#
# Takes about {{seconds}} seconds and {{gigabytes}} GB of memory on two processor cores. No GPU is needed: what only a GPU
# can tell was measured on one, an H200, by `data/scripts/measure/merging.py`.

# %%
import json

from qlora_helpers import evaluation
from qlora_helpers.adapters.files import WrongBase, describe, load_adapter
from qlora_helpers.chats import read_chats, split_question
from qlora_helpers.course import plots
from qlora_helpers.course.checks import check
from qlora_helpers.course.exercises import lesson_06 as exercises
from qlora_helpers.course.tables import show_table
from qlora_helpers.hardware import detect
from qlora_helpers.memory import find_shape, predict_merge
from qlora_helpers.models.loading import load_model, load_tokenizer
from qlora_helpers.models.weights import bytes_by_part, linear_layers
from qlora_helpers.paths import data_path
from qlora_helpers.training.run_folder import new_run_folder

import torch

import bitsandbytes as bnb
import peft
import transformers

GB = 10**9
for library in (torch, transformers, peft, bnb):
    print(library.__name__, library.__version__.split("+")[0])

# %% [markdown]
# ## What an adapter is, on disk
#
# An [adapter](../GLOSSARY.md#adapter) is what a LoRA run trains: for each layer two small matrices, `A` and `B`, whose
# product is added to the layer's frozen weight. The model that it was trained on is its [base](../GLOSSARY.md#base).
#
# Lesson 4's run ended with an adapter in a folder. The course comes with one from the same run, made in advance. Three of
# its files matter. One holds the weights of all `A` and `B`. One names the layers that they belong to. One names the base,
# and has a checksum of its weights.

# %% tags=["nbval-check-output"]
sentences = data_path("adapters", "sentences")
files = describe(sentences)
print(f"for {files.base}, rank {files.rank}, alpha {files.alpha}, on {', '.join(files.modules)}")
check("numbers in it", files.parameters, 262_144, exact=True)
check("bytes per number, header included", files.bytes / files.parameters, 4, rel=0.02)

# %% [markdown]
# An adapter is small beside its base. This is one of rank 16 for Llama-3.1-8B, in bfloat16:

# %% tags=["nbval-check-output"]
shape = find_shape("meta-llama/Llama-3.1-8B")
base_gb = predict_merge(shape, "4bit").base_bytes / GB
print(f"adapter {2 * shape.lora_parameters(16) / 1e6:.0f} MB, 4-bit base {base_gb:.2f} GB")

# %% [markdown]
# ## Onto the 4-bit base
#
# This is how the run left it: the base in 4 bits, and the adapter beside it. Nothing has been rounded since.
# [Exact match](../GLOSSARY.md#exact-match) is the share of answers that are right word for word.

# %% tags=["nbval-check-output"]
tokenizer = load_tokenizer()
test_chats = read_chats(data_path("chats", "test.jsonl"))
questions = [split_question(chat)[0] for chat in test_chats]
unmerged = load_adapter(load_model(quantization="nf4"), sentences, "sentences")
right = evaluation.exact_match(unmerged, tokenizer, test_chats)
check("exact match on the test questions", right, at_least=0.9)

# %% [markdown]
# ## A second adapter
#
# The same knowledge in another tone: answers of a single word. Fifty short steps are enough to hear the difference. The
# run starts from a fresh base, and only its adapter is saved.

# %%
from qlora_helpers.settings import Settings
from qlora_helpers.training.run import train


def in_a_word(chats):
    """The same chats, with the last word of each answer alone."""
    last = [answer | {"content": answer["content"].split()[-1]} for _, answer in chats]
    return [[question, answer] for (question, _), answer in zip(chats, last)]


settings = Settings(steps=50, batch_size=8, learning_rate=2e-3, warmup_steps=3)
train_chats = in_a_word(read_chats(data_path("chats", "train.jsonl"))[: 50 * 8])
run = train(load_model(), tokenizer, train_chats, new_run_folder("lesson-06-words"), settings)

# %% tags=["nbval-check-output"]
print(f"trained {run.trainable_parameters:,} numbers more, in {run.saved_path.name}/")

# %% [markdown]
# Now both adapters go onto one base. `set_adapter` chooses the one that answers; the base stays where it is.

# %%
both = load_adapter(unmerged, run.saved_path, "words")
for name in ("sentences", "words"):
    both.set_adapter(name)
    print(name, evaluation.answer(both, tokenizer, questions[:3]))

# %% [markdown]
# A server does not even have to switch. Each row of a batch can name its adapter. The product with the 4-bit weights is
# computed once for all rows, and each adapter's small products for its own rows only. Every row gets the answer that its
# adapter gives when it has the whole batch to itself:

# %% tags=["nbval-check-output"]
names = ["sentences", "words"] * 4
together = evaluation.answer(both, tokenizer, questions[:8], adapters=names)
alone = {}
for name in ("sentences", "words"):
    both.set_adapter(name)
    alone[name] = evaluation.answer(both, tokenizer, questions[:8])
same = together == [alone[name][row] for row, name in enumerate(names)]
check("8 answers of a mixed batch, as from each adapter alone", same, True, exact=True)
one_word = [len(text.split()) == 1 for text in together]
check("words per answer", one_word, [False, True] * 4, exact=True)

# %% [markdown]
# This saves memory. Two fine-tuned models of 8B can be served as two 16-bit copies, or as one 4-bit base with two adapters:

# %% tags=["nbval-check-output"]
copies = 2 * predict_merge(shape, "16bit").merged_bytes
one_base = predict_merge(shape, "4bit").base_bytes + 2 * 2 * shape.lora_parameters(16)
print(f"two merged copies {copies / GB:.1f} GB, one base with two adapters {one_base / GB:.1f} GB")

# %% [markdown]
# ## Merging, by hand
#
# An adapter adds `x Aᵀ Bᵀ · alpha / rank` to a layer's output. Adding `B A · alpha / rank` to the layer's weight has the
# same effect. Then the adapter itself is no longer needed: it has been [merged](../GLOSSARY.md#merge).
#
# Here it is by hand, from the adapter's file, and by PEFT, on the 16-bit base. Both add on the CPU, since a GPU adds in
# another order, and the last bits would differ.

# %% tags=["nbval-check-output"]
from qlora_helpers.adapters.merge import load_base, merge
from safetensors.torch import load_file

cpu = detect("cpu")
stored = load_file(sentences / "adapter_model.safetensors")
deltas = {}
for key, A in stored.items():
    layer_name, is_A, _ = key.removeprefix("base_model.model.").partition(".lora_A.")
    if is_A:
        B = stored[key.replace("lora_A", "lora_B")]
        deltas[layer_name] = B @ A * (files.alpha / files.rank)
original = linear_layers(load_base("16bit", hardware=cpu))
weights = {name: layer.weight.detach().clone() for name, layer in original}
name = "model.layers.0.mlp.up_proj"
merged = merge(sentences, "16bit", hardware=cpu)
theirs = merged.get_submodule(name).weight.data
check("one merged layer, by hand and by PEFT", theirs, weights[name] + deltas[name], exact=True)

# %% [markdown]
# Into a 4-bit base it takes three steps: decode the weight, add the difference, and round the sum to 4 bits again. Lesson
# 3's `quantize`, written from scratch, gives what PEFT and bitsandbytes give, bit for bit:

# %% tags=["nbval-check-output"]
from qlora_helpers.quantize import NF4, dequantize, quantize


def rounded(weight):
    return dequantize(quantize(weight, NF4, 64, double_quant=True))


in_4_bits = linear_layers(load_base("dequantised", hardware=cpu))
decoded = {name: layer.weight.detach().clone() for name, layer in in_4_bits}
layer = merge(sentences, "4bit", hardware=cpu).get_submodule(name)
theirs = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
check("one layer merged into 4 bits", theirs, rounded(decoded[name] + deltas[name]), exact=True)

# %% [markdown]
# ## Exercise 6.1: one adapter from two
#
# *Build · medium · about 15 minutes.* You have two adapters for the same layer. You want the sum of their differences in
# *one* adapter, which any server can load. Write `one_of_two`: it takes `A`, `B` and the scale (`alpha / rank`) of each,
# and returns an `A` and a `B` for which `B @ A` is the sum of the two scaled differences. The ranks of the two may differ.
# The result must be exact, and its rank no larger than the two ranks together.

# %% tags=["exercise"]
def one_of_two(A_1, B_1, scale_1, A_2, B_2, scale_2):
    return ...

# %% tags=["solution"]
def one_of_two(A_1, B_1, scale_1, A_2, B_2, scale_2):
    return torch.cat([A_1, A_2]), torch.cat([scale_1 * B_1, scale_2 * B_2], dim=1)

# %% tags=["nbval-check-output"]
exercises.one_of_two.check(one_of_two)

# %% [markdown]
# ## Merging, measured
#
# After a QLoRA run there are three bases to merge into. The first is the 4-bit base that the run was trained on. The second
# is the same base [dequantised](../GLOSSARY.md#dequantisation): its weights are decoded once and kept in 16 bits. The third
# is the original 16-bit base, which the run has never seen. A fourth way is to quantise the third result again.
#
# (One of the articles behind this course says that a 4-bit model "can't be merged directly". PEFT does it, and warns that
# answers may change. Another article says that one dequantises first, and its code then loads the original base.)
#
# What does each way change? [Logits](../GLOSSARY.md#logits) are the scores that a model gives to all possible next tokens.
# The table shows how far they have shifted from those of the unmerged model, at most ("max shift") and on average ("mean
# shift"), and how often the token with the best score is still the same ("same choice").

# %%
from qlora_helpers.adapters.drift import drift, logits
from qlora_helpers.models.saving import save_model


def row(way, model):
    answered[way] = evaluation.exact_match_each(model, tokenizer, test_chats)
    match = sum(answered[way]) / len(test_chats)
    loss = evaluation.loss(model, tokenizer, test_chats[:100])
    moved = drift(logits(model, tokenizer, test_chats[:100]), wanted)
    size = sum(bytes_by_part(model).values()) / 1e6
    speed = evaluation.seconds_per_token(model, tokenizer, questions[0], tokens=8) * 1000
    return match, loss, moved.largest, moved.mean, moved.same_choice, size, speed


both.set_adapter("sentences")
wanted = logits(both, tokenizer, test_chats[:100])
answered = {}
results = {"unmerged": row("unmerged", both)}
for into in ("4bit", "dequantised", "16bit"):
    results[into] = row(into, merge(sentences, into))
folder = save_model(merged, tokenizer, new_run_folder("lesson-06") / "merged", dtype=torch.bfloat16)
way = "16bit, then 4bit"
results[way] = row(way, load_model(str(folder)))

# %%
columns = ["", "match", "loss", "max shift", "mean shift", "same choice", "MB", "ms/token"]
formats = ["", ".1%", ".4f", ".3f", ".5f", ".1%", ".2f", ".1f"]
show_table(columns, [[way, *values] for way, values in results.items()], formats=formats)

# %% [markdown]
# All five answered the same questions, so the shares of right answers are compared question by question, with a 95 % interval
# ([lesson 7](07_does_it_cost_quality.ipynb)). The last column is the [power](../GLOSSARY.md#power) of a comparison, the
# smallest difference that so many questions would show in 80 of 100 repeats:

# %%
from qlora_helpers.statistics import difference, smallest_difference

pairs = [(way, "unmerged") for way in list(results)[1:]] + [("16bit, then 4bit", "4bit")]
compared, table = {}, []
for one, other in pairs:
    compared[one, other] = found = difference(answered[one], answered[other])
    shown = f"{100 * found.mean:+.1f} ± {100 * found.half:.1f}"
    table.append([one, other, shown, found.verdict, 100 * smallest_difference(found)])
columns = ["one", "other", "points", "verdict", "would show"]
show_table(columns, table, formats=["", "", "", "", ".1f"])

# %% tags=["nbval-check-output"]
match = {way: values[0] for way, values in results.items()}
mean = {way: values[3] for way, values in results.items()}
further = mean["16bit"] / mean["dequantised"]
check("dequantised: tokens with the same choice", results["dequantised"][4], at_least=0.98)
check("into 4 bits: exact match lost", match["unmerged"] - match["4bit"], at_least=0.005)
worse, better = compared["4bit", "unmerged"], compared["16bit", "unmerged"]
check("into 4 bits: the interval's upper end", worse.mean + worse.half, at_most=0.01)
check("into 16 bits: the interval's lower end", better.mean - better.half, at_least=-0.01)
check("16 bit: mean difference of logits over that of dequantised", further, at_least=5)
lost = match["16bit, then 4bit"] - match["unmerged"]
check("16 bit, then 4 bit: exact match against unmerged", lost, at_least=-0.05)

# %% [markdown]
# - **Dequantised** is the model that was trained, apart from rounding: almost none in the CPU's float32, more in a GPU's 16
#   bits. It takes 16 bits for each weight, and it is faster, since nothing has to be decoded. The commands `merge` and `export`
#   do this by default: only then does the result answer as the model that the run has scored.
# - **16bit** is a different model. Its logits move far. Here its answers get *better*: this base knows its facts best in 16
#   bits, and the adapter asks for them just as well. That is no law. For some models the same step produces nonsense
#   (Falcon-H1 is one on record, unslothai/unsloth-zoo #810). Measure it on test questions of your own.
# - **16bit, then 4bit** is within noise of the unmerged model, as far as these questions can see.
# - **4bit** keeps the size and loses answers. Why?
#
# ## Where the adapter goes
#
# A decoded 4-bit weight lies exactly on one of its block's 16 values. Add a small difference, and the nearest value is most
# often the one that the weight had before: the difference is rounded away. A 16-bit weight lies anywhere between the
# values. There a small difference pushes some weights over the border to the next value, and on average it is kept.
#
# How much of the difference survives? We project what has really changed onto what should have changed: 100 % means all of
# it, 0 % nothing. We do this for our adapter and for smaller ones, as a shorter run or a lower learning rate makes them:

# %%
def surviving(start: dict, scale: float) -> float:
    kept = wished = 0.0
    for name, weight in start.items():
        delta = scale * deltas[name]
        kept += ((rounded(weight + delta) - rounded(weight)) * delta).sum().item()
        wished += (delta * delta).sum().item()
    return kept / wished


scales = [1, 0.25, 1 / 16]
survives = {"decoded 4-bit weights": [surviving(decoded, scale) for scale in scales],
            "16-bit weights": [surviving(weights, scale) for scale in scales]}

# %%
fig, ax = plots.figure()
for (base, shares), marker in zip(survives.items(), "os"):
    label = f"added to {base}, then rounded"
    ax.plot(scales, [share * 100 for share in shares], marker=marker, label=label)
ax.set_xscale("log", base=2)
ax.set_xticks(scales, ["1", "1/4", "1/16"])
ax.set_xlabel("size of the adapter's difference (1: as trained)")
ax.set_ylabel("share of the difference\nthat survives (%)")
ax.set_ylim(0, 115)
ax.legend(loc="center left")
ax.set_title("Merged into 4 bits, a small adapter is rounded away")
plots.show(fig, "6.1")

# %% tags=["nbval-check-output"]
kept = survives["decoded 4-bit weights"]
check("of the adapter, into 4 bits", kept[0], at_least=0.6, at_most=0.8)
check("of one a sixteenth as large, into 4 bits", kept[2], at_most=0.1)
into_16 = survives["16-bit weights"][2]
check("of one a sixteenth as large, into 16 bits, then rounded", into_16, at_least=0.9)

# %% [markdown]
# ## Exercise 6.2: merged in two halves
#
# *Predict · medium · about 5 minutes.* Somebody fears that merging the whole difference at once is too coarse for 4 bits.
# So they merge half of it into the 4-bit base, round, then merge the other half and round again. How much of our adapter
# survives, compared with merging it at once: `"more"`, `"less"`, or about `"the same"`? Think about a single weight first. The check then
# merges every layer both ways and measures it, which takes a second or two.

# %% tags=["exercise"]
in_two_halves = ...

# %% tags=["solution"]
in_two_halves = "less"  # each half is smaller than the whole, so more of it is rounded away

# %% tags=["nbval-check-output"]
exercises.two_halves.check(in_two_halves, decoded=decoded, deltas=deltas)

# %% [markdown]
# ## The same at full size
#
# On an H200, with the shape of Llama-3.1-8B: 40 steps at a learning rate of 2e-4, then each of the four ways. The row `no
# adapter` is the bare base, for comparison. The weights are random, since the machine had no real ones. So the logits stand
# for no real model's; memory and time do.

# %% tags=["nbval-check-output"]
measured = json.loads(data_path("measured", "merging.json").read_text(encoding="utf-8"))
rows = {r["way"]: r for r in measured["rows"]}


def peak(r):
    most = max(r.get("base_peak_bytes", 0), r.get("merge_peak_bytes", 0))
    return most / GB if most else None


table = [[way, r["same_choice"], r["mean"], peak(r), r["ms_per_token"]]
         for way, r in rows.items() if "mean" in r]
columns = ["", "same choice", "mean shift", "peak GB", "ms/token"]
show_table(columns, table, formats=["", ".1%", ".3f", ".2f", ".1f"])
none = rows["no adapter"]["mean"]
check("into 4 bits: mean over that of no adapter at all", rows["4bit"]["mean"] / none, at_least=0.9)
check("16 bit, then 4 bit: the same", rows["16bit, then 4bit"]["mean"] / none, at_most=0.1)

# %% [markdown]
# After this short run, merging into 4 bits gave back the base as it had been: the whole run was rounded away. The same
# adapter, merged into the 16-bit base and then quantised to the same 4 bits, is nearly all there.
#
# **If you must serve 4 bits: keep the adapter beside the base, or merge into the 16-bit base and quantise again. Do not
# merge a plain run into the 4-bit base.** Better still, hold each against your own test questions, as above.
#
# ## A merge that was trained for
#
# The run never knew that its adapter would be rounded. It can know. Then its steps compute with the weights that the merge
# will give: the sum of base and adapter, rounded to 4 bits.
#
# There is one obstacle. Rounding is a staircase. On a step of a staircase nothing changes, so its slope, the
# [gradient](../GLOSSARY.md#gradient), is zero, and nothing would be learned. The way out is a simple one: round on the way
# forward, and on the way back act as if nothing had been rounded. The gradient goes straight through the rounding, hence
# the name [straight-through estimator](../GLOSSARY.md#straight-through-estimator) (Bengio and others, arXiv 1308.3432).
# `A` and `B` themselves are not rounded. Their small changes add up from step to step, until a weight reaches the border to
# the next value. Only then does the model change, and the loss shows whether that was good.
#
# `Settings.merge_aware` says which share of the steps, the last ones, is trained so. Here is the run of the single words
# once more, with the same chats and seed. Its first 35 steps are the same, and its last 15 are merge-aware:

# %%
from dataclasses import replace

from qlora_helpers.training.merge_aware import MergeAware

for_a_merge = replace(settings, merge_aware=0.3)
aware = train(load_model(), tokenizer, train_chats, new_run_folder("lesson-06-aware"), for_a_merge)

# %% [markdown]
# What is trained is now the merged model. `MergeAware(1).in_layers_of(model)` lets a model with an adapter compute as it did
# in those steps. So we can ask whether a real merge answers the same:

# %%
def same_answers(model, answers):
    return sum(a == b for a, b in zip(evaluation.answer(model, tokenizer, asked), answers))


asked = questions[:100]
plain_answers = evaluation.answer(run.model, tokenizer, asked)
with MergeAware(1).in_layers_of(aware.model):
    aware_answers = evaluation.answer(aware.model, tokenizer, asked)
same = {"plain run, merged into 4 bits": same_answers(merge(run.saved_path, "4bit"), plain_answers),
        "merge-aware run, merged": same_answers(merge(aware.saved_path, "4bit"), aware_answers),
        "merge-aware run, beside its base": same_answers(aware.model, aware_answers)}

# %% tags=["nbval-check-output"]
plain, merged_aware, beside = same.values()
check("plain run, merged: the same answers as before, of 100", plain, at_most=85)
check("merge-aware run, merged: the same answers as trained", merged_aware, at_least=90)
check("merge-aware run, beside its base: the same", beside, at_most=85)

# %% [markdown]
# So the merge changes nothing any more. The price is in the last line: such an adapter *must* be merged into 4 bits, which is
# what the command `merge` does with it by default. Beside its base it is another model than the one that was trained.
#
# But "as it was trained" is not "as good". In its last steps this run could only choose among the 16 values of each block. It
# takes more runs to tell what came of that. In the next table each kind of run has 5 seeds, and the last 30 % of the steps, or none,
# are merge-aware. Each way to use a run has a learning rate of its own, the one of three with the best exact match on
# validation questions. The table shows the test questions:

# %%
runs = json.loads(data_path("measured", "merge_aware.json").read_text(encoding="utf-8"))["runs"]


def scores(kind, rate, way, part="test"):
    """Exact match of the runs of a kind at one learning rate, by seed."""
    found = [r for r in runs if (r["kind"], r["learning_rate"]) == (kind, rate)]
    return [r[part][way]["exact_match"] for r in sorted(found, key=lambda r: r["seed"])]


def rates_of(kind):
    return sorted({r["learning_rate"] for r in runs if r["kind"] == kind})


def at_best_rate(kind, way):
    rate = max(rates_of(kind), key=lambda rate: sum(scores(kind, rate, way, "validation")))
    return scores(kind, rate, way)

# %% tags=["nbval-check-output"]
ways = {"unmerged": ("plain", "as trained"), "4bit": ("plain", "4bit"),
        "merge-aware, 4bit": ("last 30 %", "4bit"),
        "16bit, then 4bit": ("plain", "16bit, then 4bit"), "16bit": ("plain", "16bit")}
lengths = (60, 100, 200, 300)
test = {(steps, name): at_best_rate(f"{steps} steps, {kind}", way)
        for steps in lengths for name, (kind, way) in ways.items()}
table = [[steps, *(sum(test[steps, name]) / 5 for name in ways)] for steps in lengths]
show_table(["steps", *ways], table, formats=["", *[".1%"] * len(ways)])

# %% [markdown]
# And the merge-aware runs against each of the others, compared seed by seed, in points of exact match:

# %% tags=["nbval-check-output"]
against, table = {}, []
for other in ("unmerged", "4bit", "16bit, then 4bit", "16bit"):
    for steps in lengths:
        found = difference(test[steps, "merge-aware, 4bit"], test[steps, other])
        against[other, steps] = found
        shown = f"{100 * found.mean:+.1f} ± {100 * found.half:.1f}"
        table.append([other, steps, shown, found.verdict, 100 * smallest_difference(found)])
columns = ["merge-aware, 4bit, against", "steps", "points", "verdict", "would show"]
show_table(columns, table, formats=["", "", "", "", ".1f"])
gained = 100 * against["4bit", 300].mean
check("merge-aware against 4bit, 300 steps: points", gained, 5.12, rel=0.01)

# %% [markdown]
# - **Against the plain run, merged into 4 bits**, it is better by 5.1 ± 2.2 points after 300 steps. After 60, 100 and 200
#   steps the two are within noise. Small gains may be there: what would have shown is 4 to 9 points.
# - **Against the plain run, unmerged**, no loss is found at any length. After 300 steps one of 1.6 points would have shown,
#   after 60 steps none below 12.
# - **Against a merge into 16 bits, quantised again**, it is better by 1.9 ± 1.5 points after 300 steps, and within noise
#   before.
# - **Against a merge into 16 bits that stays there**, it is worse after 100 and after 300 steps. That base has lost nothing to
#   begin with, as you have seen above.
#
# Of 16 such comparisons about one is "a difference" by chance alone. With 99 % intervals, which are wider, the gain of 5.1
# points would still be one, and that of 1.9 would not.
#
# Why does it help after 300 steps, and hardly before? Look at the same runs at one learning rate at a time. Here are all of
# them, each against the plain run that is unmerged, has the same rate and the same seed:

# %%
pairs = [(steps, rate) for steps in lengths for rate in rates_of(f"{steps} steps, plain")]
places = [n + n // 3 for n in range(len(pairs))]  # a gap after each number of steps
fig, ax = plots.figure()
for kind, shift, colour, marker, label in (
        ("plain", -0.12, plots.RED, "o", "plain, merged into 4 bits"),
        ("last 30 %", 0.12, plots.BLUE, "s", "last 30 % merge-aware, merged")):
    points = [difference(scores(f"{steps} steps, {kind}", rate, "4bit"),
                         scores(f"{steps} steps, plain", rate, "as trained"))
              for steps, rate in pairs]
    means, halves = [100 * p.mean for p in points], [100 * p.half for p in points]
    at = [place + shift for place in places]
    ax.errorbar(at, means, halves, fmt=marker, color=colour, capsize=3, label=label)
ax.axhline(0, color="#555555", linewidth=1)
ax.set_xticks(places, [f"{1000 * rate:g}" for _, rate in pairs])
for steps, place in zip(lengths, places[1::3]):
    ax.text(place, 8, f"{steps} steps", ha="center")
ax.set_xlabel("learning rate (in thousandths)")
ax.set_ylabel("points of exact match against\nthe plain run, unmerged")
ax.set_ylim(-36, 12)
ax.legend(loc="lower left")
ax.set_title("Where a plain merge loses most, merge-aware saves most of it")
plots.show(fig, "6.2")

# %% tags=["nbval-check-output"]
merged_plain = scores("200 steps, plain", 1e-3, "4bit")
lost = difference(merged_plain, scores("200 steps, plain", 1e-3, "as trained"))
saved = difference(scores("200 steps, last 30 %", 1e-3, "4bit"), merged_plain)
check("200 steps at 1e-3: points that the plain merge loses", -100 * lost.mean, 22.6, rel=0.01)
check("points that merge-aware steps save", 100 * saved.mean, 17.2, rel=0.01)
check("half the first's interval, in points", 100 * lost.half, 10.2, rel=0.01)
check("half the second's", 100 * saved.half, 6.1, rel=0.02)

# %% [markdown]
# The bars are 95 % intervals. A low rate makes a small adapter, and that is what rounding takes: 22.6 ± 10.2 points after 200
# steps at 1e-3, of which merge-aware steps save 17.2 ± 6.1. At twice the rate there is nothing to save. So a higher rate is a
# cure, too, and a free one as long as the run can bear it. After 300 steps it cannot: there the lowest of the three rates is
# the best one. A plain merge has to choose between a rate that is too high and an adapter that is too small. (Where the best
# rate is the lowest or the highest that was tried, as it is there, a better one may lie beyond.)
#
# How many steps should it be? Of 200 steps, with three seeds each:

# %% tags=["nbval-check-output"]
table = []
for share in ("plain", "last 15 %", "last 30 %", "last 50 %", "last 100 %"):
    found = at_best_rate(f"200 steps, {share}", "4bit")[:3]
    costs = [r["seconds_per_step"] for r in runs if r["kind"] == f"200 steps, {share}"]
    change = difference(found, at_best_rate("200 steps, last 30 %", "4bit")[:3])
    shown = power = None
    if share != "last 30 %":
        shown = f"{100 * change.mean:+.1f} ± {100 * change.half:.1f}"
        power = 100 * smallest_difference(change)
    table.append([share, sum(found) / 3, shown, power, sum(costs) / len(costs)])
columns = ["200 steps", "4bit", "against 30 %", "would show", "s/step"]
show_table(columns, table, formats=["", ".1%", "", ".1f", ".2f"])

# %% [markdown]
# All of these are within noise of 30 %. That is no proof that they are the same: with three seeds, 15 and 50 % would have
# shown a difference of 6 or 7 points, and 100 % only one of 14. What is sure is the time. Each merge-aware step rounds all
# adapted weights anew, and a run that does so from the start takes more than twice as long. (All cores of the machine were at
# work, so take these times as ratios.)
#
# **Train for the merge if you need one 4-bit model without an adapter beside it,** above all if there is no 16-bit base to
# merge into, or if the model that you validate must be the model that you serve. **Do not, if you can serve 16 bits or keep
# the adapter:** both are simpler, and here 16 bits were as good or better. All of this was measured on the shipped model; at
# 8B it was not tried.
#
# ## The memory that a merge needs
#
# `predict_merge` tells it in advance. Here are its predictions for 8B, each with the peak that was measured:

# %% tags=["nbval-check-output"]
for into in ("4bit", "dequantised", "16bit"):
    at_peak = max(rows[into]["base_peak_bytes"], rows[into]["merge_peak_bytes"]) / GB
    predicted = predict_merge(shape, into).peak_bytes / GB
    check(f"8B, {into}: peak in GB, as predicted", at_peak, predicted, rel=0.01)

# %% [markdown]
# Dequantising needs the most: transformers keeps the 4-bit weights until the last layer has been decoded. And for 70B:

# %% tags=["nbval-check-output"]
plans = []
for model in ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-2-70b-hf"):
    for into in ("4bit", "dequantised", "16bit"):
        plan = predict_merge(find_shape(model), into)
        plans.append([model, into, plan.peak_bytes / GB, plan.merged_bytes / GB])
show_table(["model", "merged into", "peak GB", "result GB"], plans, formats=["", "", ".2f", ".2f"])

# %% [markdown]
# So a merge of 70B seems to need a machine with more than 140 GB of memory. It does not. Only one weight at a time has to be
# in memory: `merge_files` copies the base's files, and overwrites in the copy what the adapter changes.

# %% tags=["nbval-check-output"]
from qlora_helpers.adapters.file_merge import merge_files

transformers.utils.logging.disable_progress_bar()
by_file = merge_files(data_path("tiny-llama"), sentences, new_run_folder("lesson-06") / "by-file")
plain = transformers.AutoModelForCausalLM.from_pretrained(by_file, dtype=torch.float32)
saved = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
differ = sum(not torch.equal(a, b) for a, b in zip(plain.parameters(), saved.parameters()))
check("tensors that differ, merged from file to file and in memory", differ, 0, exact=True)
by_files = rows["16bit, from file to file"]
host, largest = by_files["host_peak_bytes"] / GB, by_files["largest_file_bytes"] / GB
print(f"8B: {host:.2f} GB of main memory, {by_files['merge_seconds']} s; the largest file has {largest:.2f} GB")

# %% [markdown]
# Even of these 3.68 GB more than half are not needed: 1.98 GB are pages of the file that is being read, and the system
# takes them back when memory is short.
#
# ## Saved, and not lost
#
# Plain transformers has just loaded both folders, without PEFT or bitsandbytes. Two things can still go wrong. First, a
# folder could be overwritten by mistake:

# %% tags=["nbval-check-output"]
try:
    save_model(merged, tokenizer, folder)
except FileExistsError as error:
    print(str(error).replace(str(folder), "…/merged"))

# %% [markdown]
# With `overwrite=True` the old folder stays until the new one is complete, so a crash in between loses nothing. Second, an
# adapter could land on a base that it was not trained on, such as the model into which it has been merged already. PEFT
# would add it a second time and say nothing. The name and the checksum in the
# adapter's folder prevent that:

# %% tags=["nbval-check-output"]
try:
    load_adapter(load_model(str(folder)), sentences)
except WrongBase as error:
    print(str(error).replace(str(sentences), "…/sentences"))

# %% [markdown]
# ## Exercise 6.3: adapters that do nothing
#
# *Run · medium · about 15 minutes.* Two colleagues have sent you an adapter each. Both are meant to be the adapter
# `sentences`. Both load without a complaint, and with either the model answers as if it had no adapter. One of the two was
# saved before its run had begun, so there is nothing in it. In the other one, one line of `adapter_config.json` is wrong.
# Find out which is which: `describe(folder)` and `load_file(folder / "adapter_model.safetensors")` show what is in them.
# Then mend the one that can be mended, load it onto a fresh 4-bit base, and put the model into `rescued`.

# %%
first, second = exercises.adapters_without_effect(new_run_folder("lesson-06-colleagues"))
for path in (first, second):
    print(path.name, evaluation.answer(load_adapter(load_model(), path), tokenizer, questions[:2]))

# %% tags=["exercise"]
rescued = ...

# %% tags=["solution"]
for path in (first, second):
    tensors = load_file(path / "adapter_model.safetensors")
    largest = max(B.abs().max().item() for key, B in tensors.items() if "lora_B" in key)
    print(path.name, "alpha", describe(path).alpha, "largest number in B", round(largest, 3))
config = json.loads((second / "adapter_config.json").read_text(encoding="utf-8"))
text = json.dumps(config | {"lora_alpha": files.alpha})
(second / "adapter_config.json").write_text(text, encoding="utf-8")
rescued = load_adapter(load_model(), second)

# %% tags=["nbval-check-output"]
exercises.without_effect.check(rescued, tokenizer=tokenizer, chats=test_chats[:40])

# %% [markdown]
# ## You have
# - looked into an adapter's files, and seen that it cannot be loaded onto a base that is not its own;
# - put two adapters on one 4-bit base, switched between them, and let both answer in one batch;
# - merged an adapter in four ways, and measured answers, loss, logits, size and speed;
# - seen that rounding to 4 bits takes away part of an adapter, and at 8B took away all of a short run;
# - trained for such a merge, so that its model was the one that was trained, and seen when that pays;
# - planned the memory of a merge for 8B and 70B, merged file by file, and saved without losing anything.
#
# Next: [lesson 7](07_does_it_cost_quality.ipynb) asks what 4 bits cost in quality, with five seeds and error bars.
