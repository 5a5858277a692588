# %% [markdown]
# # 9 · Out of memory
#
# You will
# - see where memory goes within one training step, on this machine and on a large GPU;
# - read every number of an out-of-memory message, and tell from its traceback where a run died;
# - go from that place to the cheapest cure, with its price predicted and measured;
# - give a run a memory budget, which chooses for you, and see what it cannot cure;
# - find out what paged optimizers save, and test advice that is often given.
#
# Takes about {{seconds}} seconds and {{gigabytes}} GB of memory on two processor cores. No GPU is needed: runs were
# made to die on one, an H200, and `data/measured/oom.json` has what they said.

# %%
import json
import textwrap
from dataclasses import fields, replace

from qlora_helpers.chats import read_chats, tokenized
from qlora_helpers.course import plots
from qlora_helpers.course.checks import check
from qlora_helpers.course.cure_tree import branches_of_cures
from qlora_helpers.course.exercises import lesson_09 as exercises
from qlora_helpers.course.tables import show_table
from qlora_helpers.hardware import detect
from qlora_helpers.memory import cures, find_gpu, find_shape, predict, predict_merge
from qlora_helpers.memory.budget import plan_for
from qlora_helpers.memory.out_of_memory import place_of, read_message
from qlora_helpers.memory.phases import IN_A_STEP
from qlora_helpers.memory.saved_for_backward import most_saved
from qlora_helpers.memory.timeline import Timeline, record_step
from qlora_helpers.models.loading import load_model, load_tokenizer
from qlora_helpers.paths import data_path
from qlora_helpers.settings import GPU_RUN, Settings
from qlora_helpers.training.run_folder import new_run_folder
from qlora_helpers.training.trainer import build_trainer

# %%
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PrinterCallback

GIB, MIB = 2**30, 2**20
hardware, tokenizer = detect(), load_tokenizer()
print("torch", torch.__version__.split("+")[0])

# %% [markdown]
# ## One step, on this machine
#
# A training step has four phases. **Forward**: the chats go through the decoder layers. **Loss**: the output head makes
# [logits](../GLOSSARY.md#logits), a score for each word of the vocabulary. **Backward**: gradients are computed, from the
# last layer to the first. **Optimizer step**: the trained weights move. `record_step` trains, and notes during the last
# step how many bytes lie in tensors at each moment.
#
# We look at it twice: as it is, and with
# [gradient checkpointing](../GLOSSARY.md#gradient-checkpointing), which forgets what a layer has computed and computes it
# again when its gradients are due.

# %%
chats = read_chats(data_path("chats", "train.jsonl"))[:64]
live = {}
for name, checkpointing in (("with checkpointing", True), ("without", False)):
    settings = Settings(steps=2, gradient_checkpointing=checkpointing)
    folder = new_run_folder("lesson-09")
    trainer = build_trainer(load_model(), tokenizer, chats, folder, settings, hardware)
    trainer.remove_callback(PrinterCallback)
    live[name] = record_step(trainer)

# %%
fig, axes = plots.figure(1, 2, figsize=(7.2, 3.4), sharey=True)
for ax, (name, line) in zip(axes, live.items()):
    plots.memory_timeline(ax, line.thinned(300), MIB)
    ax.set_title(name, fontsize=10, fontweight="normal")
axes[0].set(ylabel="MiB in tensors", ylim=(0, None))
axes[0].legend(fontsize=9)
title = "One step of the shipped model: the output head is its mountain"
fig.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
plots.show(fig, "9.1")

# %% [markdown]
# Without checkpointing memory climbs through the forward pass: each layer keeps its
# [activations](../GLOSSARY.md#activations), which its gradients need. On the way back it falls again. With checkpointing
# the climb is gone, and each of the four layers is computed again on the way back: four humps, and a longer step. The
# tower in the middle is the output head. It works on tiles of 32,768 words, and this model is so small that one tile is
# larger than all the rest.

# %% tags=["nbval-check-output"]
most = {name: {phase: line.most_in(phase) for phase in IN_A_STEP} for name, line in live.items()}
saved = most["with checkpointing"]["forward"] / most["without"]["forward"]
if hardware.gear == "cpu":
    check("forward pass with checkpointing, as a share of without", saved, at_most=0.6)
else:  # the libraries' own workspace is in both
    print(f"forward pass with checkpointing, as a share of without: {saved:.0%}")
order = [name for name, _ in live["without"].marks][-4:]
check("phases in order", order, list(IN_A_STEP), exact=True)

# %% [markdown]
# ## One step of 8B
#
# The same was recorded on an H200 for Llama-3.1-8B in its real shape: one sequence of 2,048 tokens with and without
# checkpointing, and one of 512 tokens at rank 256 with torch's own AdamW.

# %%
recorded = json.loads(data_path("measured", "oom.json").read_text(encoding="utf-8"))
rows = {row["label"]: row for row in recorded["rows"]}
shape = find_shape("meta-llama/Llama-3.1-8B")


def settings_of(row: dict) -> Settings:
    """The settings of a recorded run."""
    return Settings(**{f.name: row[f.name] for f in fields(Settings) if f.name in row})

# %%
names = ("checkpointing", "no checkpointing", "rank 256, adamw_torch")
steps = {name: rows[f"timeline: {name}"] for name in names}
fig, axes = plots.figure(3, 1, figsize=(7.2, 6.6))
for ax, (name, row) in zip(axes, steps.items()):
    plots.memory_timeline(ax, Timeline.from_json(row["timeline"]), GIB)
    ax.axhline(row["loaded_bytes"] / GIB, color="black", linewidth=0.8, linestyle=":")
    tokens = f"{row['batch_size']} x {row['max_length']:,} tokens"
    ax.set_title(f"{tokens}, {name}", fontsize=10, fontweight="normal")
    ax.set_ylabel("GiB")
axes[1].legend(fontsize=9)
axes[2].set_xlabel("seconds within the step")
title = "Three runs, three places for the peak"
fig.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
plots.show(fig, "9.2")

# %% [markdown]
# The dotted line is the loaded model. What stands above it decides where a run dies: where it *first* reaches the limit,
# which need not be at its top. The predictor of [lesson 5](05_will_it_fit.ipynb) knows these phases, too:

# %% tags=["nbval-check-output"]
compared, off = [], {}
for name, row in steps.items():
    phases, line = predict(shape, settings_of(row)).phases, Timeline.from_json(row["timeline"])
    backward = max(size for phase, size in phases.items() if "backward" in phase)
    to_the_loss = max(line.most_in("forward"), line.most_in("loss"))
    pairs = {
        "to the loss": (phases["loss"], to_the_loss),
        "backward": (backward, line.most_in("backward")),
        "optimizer step": (phases["optimizer step"], line.most_in("optimizer step")),
    }
    compared += [[name, phase, said / GIB, seen / GIB] for phase, (said, seen) in pairs.items()]
    off[name] = max(abs(said / seen - 1) for said, seen in pairs.values())
headings = ["run", "phase", "predicted, GiB", "measured, GiB"]
show_table(headings, compared, formats=["", "", ".2f", ".2f"])
for name in steps:
    check(f"largest error of a phase, {name}", off[name], at_most=0.02)

# %% [markdown]
# ## The message
#
# To make a large card small, torch can be given a **cap**, the most that it may hold
# (`torch.cuda.set_per_process_memory_fraction`). A run that reaches it fails as on a card of that size. Here are four
# sequences of 2,048 tokens without checkpointing, under a cap:

# %% tags=["nbval-check-output"]
death = rows["forward: death"]
print(textwrap.fill(death["message"], 100))

# %% [markdown]
# Each number means something else:
#
# | words | meaning |
# |---|---|
# | Tried to allocate | the one request that failed: the last straw, not the load |
# | total capacity | what the card has |
# | is free | what nobody has taken of the card; under a cap it may be plenty, and no use |
# | this process has | what it has taken, with its [CUDA context](../GLOSSARY.md#cuda-context) |
# | allowed | the cap; without one these words are not there |
# | allocated by PyTorch | what lies in tensors |
# | reserved but unallocated | what torch holds in holes too small for the request |
#
# How much was missing for this request?

# %% tags=["nbval-check-output"]
message = read_message(death["message"])
print(message)
missing, holes = message.missing_bytes, message.unallocated_bytes / message.reserved_bytes
check("held and asked for, less what torch may hold: more than nothing", missing, at_least=1)
check("holes, as a share of what torch holds", holes, at_most=0.1)

# %% [markdown]
# Only a few MiB, it seems. But the run was not at its peak yet. What it really needs, only a prediction tells, or the same
# run without a cap:

# %% tags=["nbval-check-output"]
needs = predict(shape, settings_of(death)).peak_reserved_bytes / GIB
without_cap = rows["forward: price"]["peak_reserved_bytes"] / GIB
print(f"cap {death['cap_bytes'] / GIB:.0f} GiB, needed {without_cap:.1f}, predicted {needs:.1f}")
check("predicted, in GiB", needs, without_cap, rel=0.03)

# %% [markdown]
# ## Where did it die?
#
# The traceback under the message is long, but a few functions in it tell the place: `from_pretrained`, `compute_loss`,
# `backward`, `step`, `evaluate`. The outermost of them decides, and `place_of` finds it. Here two runs of the shipped
# model ask for 2⁵⁰ bytes, which no machine has, one on its way forward and one on its way back:

# %% tags=["nbval-check-output"]
def ask_for_too_much(*_) -> None:
    torch.empty(2**50, dtype=torch.int8, device=hardware.device)


def killed_run(where: str):
    folder, settings = new_run_folder("lesson-09"), Settings(steps=1, gradient_checkpointing=True)
    trainer = build_trainer(load_model(), tokenizer, chats, folder, settings, hardware)
    layer = trainer.model.get_base_model().model.layers[0]
    hook = {"forward": layer.register_forward_hook, "backward": layer.register_full_backward_hook}
    hook[where](ask_for_too_much)
    try:
        trainer.train()
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        return place_of(error)


for where in ("forward", "backward"):
    place = killed_run(where)
    check(f"a run made to die on its way {where}, by its traceback", place, where, exact=True)

# %% [markdown]
# On the H200 runs of 8B were made to die under a cap in every place but one (saving, see below):

# %% tags=["nbval-check-output"]
deaths = {label: row for label, row in rows.items() if row["outcome"] == "out of memory"
          and row["role"] == "death"}
show_table(
    ["run", "cap, GiB", "asked for, MiB", "it died in"],
    [[label.removesuffix(": death"), row["cap_bytes"] / GIB,
      read_message(row["message"]).asked_bytes / MIB, row["place"]]
     for label, row in deaths.items()],
    formats=["", ".1f", ",.1f", ""],
)
same = sum(row["place"] == row["place_by_traceback"] for row in deaths.values())
check("places that the traceback tells right", same, len(deaths), exact=True)

# %% [markdown]
# One of them surprises. By its tensors, the run with float32 copies should have passed the loss. But what counts is what
# torch *holds*, and it held more than a GiB in holes:

# %% tags=["nbval-check-output"]
row = rows["float32 copies: death"]
copies = read_message(row["message"])
sizes = copies.allocated_bytes / GIB, copies.unallocated_bytes / GIB
print("{:.2f} GiB in tensors, {:.2f} in holes".format(*sizes))
said = predict(shape, settings_of(row)).phases["loss"] / GIB
check("GiB predicted until the loss, in tensors", said, at_most=row["cap_bytes"] / GIB)

# %% [markdown]
# ## From the place to the cure
#
# The place says what is too large, and so what to change first:
#
# - **load**: the weights. Load in 4 bits; there is no cure in the training settings.
# - **forward** or **loss**: what the layers keep. Checkpointing; an attention kernel that stores no matrix; no float32
#   copies.
# - **backward**: the layer at work. Fewer sequences at a time, with
#   [accumulation](../GLOSSARY.md#gradient-accumulation): several small passes make one step, and it learns the same.
# - **optimizer step**: states, gradients, adapters. States in 8 bits; a lower rank.
#
# Which of them is the cheapest that is *enough* depends on the limit, so `cures` of lesson 5 asks the predictor. The cap
# becomes a card of that size:

# %%
def card_of(row: dict):
    """The H200, as small as the row's cap made it."""
    h200 = find_gpu("h200")
    return replace(h200, usable_bytes=row["cap_bytes"] + h200.context_bytes)


groups = ["load", "forward", "eager attention", "float32 copies", "backward, batch", "optimizer"]

# %% tags=["nbval-check-output"]
chosen, the_same = {}, {}
for group in groups:
    death = rows[f"{group}: death"]
    cheapest = cures(shape, settings_of(death), card_of(death))[0]
    tried = [row for row in rows.values() if row.get("group") == group and row["role"] == "cure"]
    chosen[group] = tried[0]
    print(f"{group:18}{cheapest.what}\n{'':18}price: {cheapest.price}")
    the_same[group] = settings_of(chosen[group]) == cheapest.settings
check("cures of these that were tried on the GPU", sum(the_same.values()), len(groups), exact=True)

# %% [markdown]
# Each cure was tried under the cap under which the run had died. What it saves is the difference to the same run without
# a cap; what it costs shows in the tokens per second:

# %% tags=["nbval-check-output"]
def price_of(group: str) -> dict:
    """The run that died, as it is without a cap."""
    # the run that died in the backward pass is the one that cured the forward pass
    return rows.get(f"{group}: price") or rows["forward: cure, checkpointing"]


prices, table = {}, []
for group, cure in chosen.items():
    before, speed = price_of(group), cure["tokens_per_second"]
    sizes = [row["peak_allocated_bytes"] / GIB for row in (before, cure)]
    prices[group] = *sizes, speed / before["tokens_per_second"]
    after = predict(shape, settings_of(cure)).peak_allocated_bytes / GIB
    sizes += [sizes[0] - sizes[1], after]
    table.append([group, cure["cap_bytes"] / GIB, *sizes, before["tokens_per_second"], speed])
headings = ["GiB", "cap", "needed", "cured", "saved", "predicted", "tokens/s before", "after"]
show_table(headings, table, formats=["", ".1f", ".2f", ".2f", ".2f", ".2f", ",.0f", ",.0f"])

# %% [markdown]
# Checkpointing is often said to take a third more time. On this GPU it took more. Four bits are not free either: the
# weights are decoded in every product. The other cures cost little time, or even save it. (Speeds are of one run each,
# two steps; another card has others.)
#
# Do not generalise from the pace of the cure for `load`. It is of one sequence at a time, and such a run is bound by the CPU:
# the GPU waits for it. By this pair 4 bits take 1.68 times as long as 16-bit LoRA, by another pair, with almost the same QLoRA
# run, 1.24 times. With four sequences at a time and compiled layers it is 1.03 times
# ([lesson 7](07_does_it_cost_quality.ipynb)).

# %% tags=["nbval-check-output"]
for group in ("forward", "load"):
    print(f"{group}: {1 / prices[group][2]:.2f} times as long for each token")
for group, cure in chosen.items():
    assert cure["outcome"] == "ran", f"{group} died all the same"
    pair = [settings_of(row) for row in (price_of(group), cure)]
    said, saved = (predict(shape, settings).peak_allocated_bytes for settings in pair)
    measured = price_of(group)["peak_allocated_bytes"] - cure["peak_allocated_bytes"]
    check(f"GiB saved by the cure of: {group}", (said - saved) / GIB, measured / GIB, rel=0.03)

# %%
evaluated = [rows[f"evaluation: {what}"]["peak_allocated_bytes"] / GIB
             for what in ("price", "cure, best words")]
merged = json.loads(data_path("measured", "merging.json").read_text(encoding="utf-8"))["rows"][-1]
decoded = rows["merging: price"]["peak_allocated_bytes"] / GIB
branches = branches_of_cures(prices, evaluated, (decoded, merged["host_peak_bytes"] / GIB))
fig, ax = plots.figure(figsize=(7.2, 6))
plots.decision_tree(ax, "Where did\nit die?", branches)
ax.set_title("From the place to the cheapest cure, measured with 8B")
plots.show(fig, "9.3")

# %% [markdown]
# ## A budget chooses for you
#
# You need not look for a cure if you say how much memory there is. With a **memory budget** the trainer keeps the chats of
# a step, and chooses how many go through the model at once, how many layers are checkpointed, and whether their inputs
# wait in main memory. `plan_for` shows the choice without a run. Here are two of the runs that died, under the same limits:

# %%
plans = {}
for group in ("forward", "backward, batch"):
    death, card = rows[f"{group}: death"], card_of(rows[f"{group}: death"])
    plans[group] = plan_for(shape, settings_of(death), card, card.usable_bytes)
    print(f"died in: {death['place']}\n{plans[group]}\n")

# %% [markdown]
# The first plan is finer than the cure above, which checkpointed all layers and left much room. The plan leaves some
# layers as they are and fills the room, so the run is faster. A part of the budget stays free, since predictions are a few
# per cent off.

# %% tags=["nbval-check-output"]
for group, plan in plans.items():
    settings, taken = plan.chosen.settings, plan.chosen.prediction.device_bytes
    in_a_step, used = settings.batch_size * settings.accumulation, taken / plan.budget
    check(f"{group}: chats in a step", in_a_step, 4, exact=True)
    check(f"{group}: share of the budget that is used", used, at_least=0.9, at_most=0.96)
layers = plans["forward"].chosen.settings.checkpointed_layers
check("forward: layers of 32 that are checkpointed", layers, at_least=24, at_most=28)

# %% [markdown]
# In a run of your own it is one setting: `Settings(memory_budget="auto")` takes what is free, `"16GiB"` so much. Should a
# step need more all the same, it is made again with the next safer choice. A budget leaves alone what it was not asked to
# change: precision, optimizer, attention kernel, rank, length. A run that is too large because of these is refused:

# %%
death = rows["optimizer: death"]
card = card_of(death)
try:
    plan_for(shape, settings_of(death), card, card.usable_bytes)
except ValueError as error:
    refused = str(error)
print(textwrap.fill(refused, 100))

# %% tags=["nbval-check-output"]
check("refused", "is too little: the least that the run can do with" in refused, True, exact=True)

# %% [markdown]
# That one needs states in 8 bits, as the tree says. [Lesson 11](11_where_the_time_goes.ipynb) shows how a budget weighs
# memory against time.
#
# ## Knobs that are turned first
#
# Shorter sequences and a lower rank are usual advice. Half the tokens save as much as half the batch with accumulation,
# but they cut off what is longer, while accumulation changes nothing in the result. The rank hardly matters, unless it is
# very high and its states are in 32 bits:

# %% tags=["nbval-check-output"]
for group in ("backward, batch", "optimizer"):
    tried = [[label.partition("cure, ")[2], row["peak_allocated_bytes"] / GIB]
             for label, row in rows.items() if row.get("group") == group and row["role"] == "cure"]
    tried.insert(0, ["as it was", price_of(group)["peak_allocated_bytes"] / GIB])
    show_table([f"died in: {rows[f'{group}: death']['place']}", "GiB"], tried, formats=["", ".2f"])
usual = replace(GPU_RUN, batch_size=4, adapter_dtype="bfloat16")
ranks = {rank: predict(shape, replace(usual, rank=rank)).peak_allocated_bytes / GIB
         for rank in (8, 16, 64, 256)}
table = [[str(rank), size] for rank, size in ranks.items()]
show_table(["rank, with 4 x 2,048 tokens", "GiB"], table, formats=["", ".2f"])
check("GiB that rank 8 saves where it was 64", ranks[64] - ranks[8], at_most=0.5)

# %% [markdown]
# And is it true that memory grows with the square of the length? Only where attention stores its matrix of scores: in
# `eager` attention, and in torch's math kernel.

# %%
lengths = range(1024, 8193, 1024)
one = replace(GPU_RUN, adapter_dtype="bfloat16")
curves = {}
for kernel in ("eager", "math", "sdpa"):
    each = [predict(shape, replace(one, max_length=n, attention=kernel)) for n in lengths]
    curves[kernel] = [prediction.peak_allocated_bytes / GIB for prediction in each]
styles = {"eager": {"color": plots.RED}, "math": {"color": "black", "linestyle": ":"},
          "sdpa": {"color": plots.BLUE}}
fig, ax = plots.figure()
for kernel, sizes in curves.items():
    ax.plot(lengths, sizes, label=f"{kernel}, predicted", **styles[kernel])
for label, colour in (("price", plots.RED), ("cure, sdpa", plots.BLUE)):
    row = rows[f"eager attention: {label}"]
    ax.plot(row["max_length"], row["peak_allocated_bytes"] / GIB, "o", color=colour)
ax.set_xticks(lengths, labels=[f"{n:,}" for n in lengths])
ax.set(xlabel="tokens in the sequence", ylabel="peak (GiB)", ylim=(0, None))
ax.set_title("Quadratic only where the scores are stored (8B, points measured)")
ax.legend()
plots.show(fig, "9.4")

# %% tags=["nbval-check-output"]
table = []
for kernel, sizes in curves.items():
    doubled = [sizes[lengths.index(n)] for n in (1024, 2048, 4096, 8192)]
    table.append([kernel, *doubled])
show_table(["GiB", "1,024", "2,048", "4,096", "8,192"], table, formats=["", *[".2f"] * 4])
for kernel, label in (("eager", "price"), ("sdpa", "cure, sdpa")):
    measured = rows[f"eager attention: {label}"]["peak_allocated_bytes"] / GIB
    check(f"{kernel} at 8,192 tokens, in GiB", curves[kernel][-1], measured, rel=0.02)

# %% [markdown]
# What of `torch.cuda.empty_cache()`? torch does the same by itself before it raises the error, and counts it as a retry. So
# the run that died in the backward pass dies with the call in every step, too. Against holes segments of memory that can
# grow do help: with `PYTORCH_ALLOC_CONF=expandable_segments:True` a run lives under a cap under which it dies without.

# %% tags=["nbval-check-output"]
for label in ("backward, batch: death", "backward, batch: still dead, empty_cache"):
    check(f"{label}, retries of torch itself", rows[label]["allocator_retries"], at_least=1)
table = []
for label in ("holes: as it is", "holes: expandable segments"):
    row = rows[label]
    sizes = (row["cap_bytes"], row["peak_allocated_bytes"], row["peak_reserved_bytes"])
    table.append([label.removeprefix("holes: "), row["outcome"], *(size / GIB for size in sizes)])
headings = ["", "outcome", "cap, GiB", "tensors, GiB", "held, GiB"]
show_table(headings, table, formats=["", "", ".2f", ".2f", ".2f"])

# %% [markdown]
# ## Paging: what it can save
#
# A [paged optimizer](../GLOSSARY.md#paged-optimizer) keeps its states in memory that the driver may move to main memory
# when the card is full. "This way the GPU never throws an out-of-memory error", writes the first article. But most runs
# above had one, and died. Weights, activations, gradients and logits are not paged, and of the states only tensors with
# at least 100,000 numbers (bitsandbytes, `optim/optimizer.py`). LoRA's tensors are small:

# %% tags=["nbval-check-output"]
def paged_share(model: str, rank: int) -> float:
    """Share of LoRA's numbers, on all linear layers, in tensors large enough to be paged."""
    sizes = []
    for linear in find_shape(model).linears:
        sizes += [rank * linear.in_features, rank * linear.out_features]
    return sum(size for size in sizes if size >= 100_000) / sum(sizes)


names = ["Llama-3.2-1B", "Llama-3.1-8B", "Llama-3.1-70B"]
of_rank = (4, 8, 16, 32, 64)
table = [[name, *(paged_share(f"meta-llama/{name}", rank) for rank in of_rank)] for name in names]
show_table(["can be paged, at rank", *map(str, of_rank)], table, formats=["", *[".1%"] * 5])

# %% [markdown]
# And how much is that of a run?

# %% tags=["nbval-check-output"]
table = []
for name, rank, optimizer in (("70B", 64, "paged_adamw_32bit"), ("8B", 64, "paged_adamw_32bit"),
                              ("8B", 16, "paged_adamw_8bit")):
    settings = replace(one, rank=rank, optimizer=optimizer, max_length=512)
    p = predict(find_shape(f"meta-llama/Llama-3.1-{name}"), settings)
    paged = p.parts["optimizer (paged)"]
    table.append([f"{name}, rank {rank}", optimizer, paged / GIB, paged / p.device_bytes])
headings = ["run", "optimizer", "can be paged, GiB", "of what the card holds"]
show_table(headings, table, formats=["", "", ".2f", ".1%"])

# %% [markdown]
# There is a trap in it. torch does not count paged memory, nor does a cap. The card does, in pieces of 128 MiB:

# %% tags=["nbval-check-output"]
for rank in (16, 64):
    plain = rows[f"paging: rank {rank}, adamw_8bit"]["outside"]["after step 4"]
    for optimizer in ("paged_adamw_8bit", "paged_adamw_32bit"):
        row = rows[f"paging: rank {rank}, {optimizer}"]
        exact = predict(shape, settings_of(row)).parts["optimizer (paged)"]
        print(f"rank {rank}, {optimizer}: {exact / MIB:,.1f} MiB of states")
        counted, pieces = row["paged_bytes"], -(-exact // (128 * MIB))
        check("bytes in managed memory, predicted and counted", exact, counted, exact=True)
        outside = (row["outside"]["after step 4"] - plain) / MIB
        check("MiB on the card outside of torch", outside, pieces * 128, abs=32)

# %% [markdown]
# So a paged optimizer can hide what it does not save. The run that died in the optimizer step survives with
# `paged_adamw_32bit`, and the card then holds more than the cap. States in 8 bits really save:

# %% tags=["nbval-check-output"]
print(f"cap {rows['optimizer: death']['cap_bytes'] / GIB:.2f} GiB")
table = []
for name in ("price", "cure, paged, 32 bits", "cure, 8 bits"):
    row = rows[f"optimizer: {name}"]
    card = row["peak_reserved_bytes"] + row["outside"]["after step 4"]
    table.append([row["optimizer"], row["peak_reserved_bytes"] / GIB, card / GIB])
headings = ["optimizer", "torch holds, GiB", "the card holds, GiB"]
show_table(headings, table, formats=["", ".2f", ".2f"])

# %% [markdown]
# For the same reason `torch.cuda.memory_allocated()` shows less than `nvidia-smi`. It counts tensors only, and not what
# torch keeps in reserve, the CUDA context, and paged states:

# %% tags=["nbval-check-output"]
row = rows["paging: rank 64, paged_adamw_32bit"]
tensors, held = row["peak_allocated_bytes"], row["peak_reserved_bytes"]
parts = {"in tensors": tensors, "held beside them": held - tensors,
         "outside of torch": row["outside"]["after step 4"]}
show_table(["", "MiB"], [[name, size / MIB] for name, size in parts.items()], formats=["", ",.0f"])
hidden = 1 - tensors / sum(parts.values())
check("share of the card that memory_allocated does not show", hidden, at_least=0.1)

# %% [markdown]
# ## Evaluation, saving, merging
#
# A run can also die after hours of good steps. **Evaluation** keeps the logits of all batches on the GPU if metrics are
# computed from them: one number of 4 bytes for each token and each word of the vocabulary.

# %% tags=["nbval-check-output"]
logits = 2048 * shape.vocab_size * 4
print(f"logits of 2,048 tokens: {logits / GIB:.2f} GiB; eight times that: {8 * logits / GIB:.2f}")
table = []
for label, row in rows.items():
    if row["what"] == "evaluation":
        cap = f"{row['cap_bytes'] / GIB:.0f} GiB" if row["cap_bytes"] else "none"
        ran = row["outcome"] == "ran"
        peak = f"{row['peak_allocated_bytes'] / GIB:.2f} GiB" if ran else "died"
        seconds = f"{row['work_seconds']:.1f} s" if ran else ""
        table.append([label.removeprefix("evaluation: "), cap, peak, seconds])
show_table(["evaluation", "cap", "peak", "took"], table)

# %% [markdown]
# Eight is the default of `per_device_eval_batch_size`, whatever the training batch. A batch of 1 alone does not help: all
# eight are kept, and while they are joined they are there twice. What helps: no `compute_metrics` (the loss alone);
# `preprocess_logits_for_metrics` that keeps the best word of each token; or `eval_accumulation_steps=1`, which moves
# the logits to main memory, and takes many times as long.

# %% tags=["nbval-check-output"]
price, best = rows["evaluation: price"], rows["evaluation: cure, best words"]
kept = (price["peak_allocated_bytes"] - price["before_bytes"]) / logits
check("peak above the model, in logits of one sequence: eight, twice", kept, 16, rel=0.02)
kept = (best["peak_allocated_bytes"] - best["before_bytes"]) / logits
check("best words only: those of one batch in 4 bytes, and in 2", kept, 1.5, rel=0.05)

# %% [markdown]
# **Saving** a checkpoint goes tensor by tensor. With a cap at what torch held already, it was written all the same. A death
# while saving is one of main memory or of disk.

# %% tags=["nbval-check-output"]
saving = rows["saving: a checkpoint"]
more = saving["peak_allocated_bytes"] - saving["before_bytes"]
check("MiB of the GPU that saving took", more / MIB, at_most=1)

# %% [markdown]
# **Merging** into 16 bits needs the model in 16 bits: 2 bytes for each parameter. If it is made from the 4-bit one on the
# GPU, both are there until the end. Merging into the 4-bit layers goes layer by layer and fits, but it takes a part of the
# adapter away, or all of it. `merge_files` of [lesson 6](06_adapters_and_merging.ipynb) needs no GPU.

# %% tags=["nbval-check-output"]
ways = {"decoded as a whole": ("dequantised", "price"),
        "into 4 bits": ("4bit", "cure, into 4 bits")}
table = []
for way, (name, _) in ways.items():
    models = [find_shape(f"meta-llama/Llama-3.1-{size}") for size in ("8B", "70B")]
    table.append([way, *(predict_merge(model, name).peak_bytes / GIB for model in models)])
show_table(["GiB to merge", "8B", "70B"], table, formats=["", ".2f", ".2f"])
for name, label in ways.values():
    said, seen = predict_merge(shape, name), rows[f"merging: {label}"]["peak_allocated_bytes"]
    check(f"GiB to merge 8B, {name}", said.peak_bytes / GIB, seen / GIB, rel=0.02)

# %% [markdown]
# ## Exercise 9.1: where will it die?
#
# *Predict · medium · about 8 minutes.* Four runs of Llama-3.1-8B, and a card on which tensors may take 11 GiB. Each of
# them needs more. Look at figure 9.2 again, and say for each where it dies: in `"forward"` (the loss
# included), in `"backward"`, or in the `"optimizer step"`. Adapters and states are in bfloat16 here, half as large as in the
# figure. Do not compute it yet.

# %%
runs = {
    # 8 x 2,048 tokens, checkpointing, rank 16, paged AdamW in 8 bits
    "A": replace(one, batch_size=8),
    "B": replace(one, batch_size=8, gradient_checkpointing=False),
    # rank 256 with one sequence of 512 tokens, and with eight of 2,048; adapters in bfloat16
    "C": replace(one, max_length=512, rank=256, optimizer="adamw_torch"),
    "D": replace(one, batch_size=8, rank=256, optimizer="adamw_torch"),
}

# %% tags=["exercise"]
places = {"A": ..., "B": ..., "C": ..., "D": ...}

# %% tags=["solution"]
places = {"A": "backward", "B": "forward", "C": "optimizer step", "D": "forward"}

# %% tags=["nbval-check-output"]
exercises.places.check(places, shape=shape, runs=runs, room=11 * GIB)

# %% [markdown]
# ## Exercise 9.2: a step in parts
#
# *Build · medium · about 15 minutes.* Write the cure that changes nothing in what is learnt. `split_step` gets settings
# and gives back settings with the largest `batch_size` that fits on the GPU, and with as many chats in a step as before,
# `batch_size * accumulation`. If not even one chat at a time fits, it gives back `None`. Other settings stay.
# `predict(shape, settings, gpu).fits` says whether a run fits.

# %% tags=["exercise"]
def split_step(shape, settings: Settings, gpu: str) -> Settings | None:
    ...

# %% tags=["solution"]
def split_step(shape, settings: Settings, gpu: str) -> Settings | None:
    in_a_step = settings.batch_size * settings.accumulation
    for batch in range(in_a_step, 0, -1):
        if in_a_step % batch == 0:
            changed = replace(settings, batch_size=batch, accumulation=in_a_step // batch)
            if predict(shape, changed, gpu).fits:
                return changed
    return None

# %% tags=["nbval-check-output"]
exercises.in_parts.check(split_step)

# %% [markdown]
# ## Exercise 9.3: an evaluation that grows
#
# *Run · medium · about 10 minutes.* Somebody wrote the evaluation below. Its losses are right, but on a long file it runs
# out of memory. `most_saved` measures how much is kept for a backward pass that never comes. Run the cell, find the
# cause, and write the function so that memory does not grow with the number of batches.

# %%
ids = [torch.tensor(row["input_ids"]) for row in tokenized(chats, tokenizer)]
model, padding = load_model(), tokenizer.pad_token_id
eights = [ids[start : start + 8] for start in range(0, 64, 8)]
batches = [pad_sequence(eight, batch_first=True, padding_value=padding).to(model.device)
           for eight in eights]


def evaluation(model, batches) -> float:
    """The mean of the batches' losses."""
    total = 0
    for ids in batches:
        total = total + model(input_ids=ids, labels=ids).loss
    return total / len(batches)


kept = [most_saved(evaluation, model, batches[:count]).most_bytes / MIB for count in (1, 2, 4, 8)]
show_table(["batches", "1", "2", "4", "8"], [["kept, MiB", *kept]], formats=["", *[".0f"] * 4])

# %% tags=["exercise"]
def mended(model, batches) -> float:
    ...

# %% tags=["solution"]
@torch.no_grad()
def mended(model, batches) -> float:
    losses = [model(input_ids=ids, labels=ids).loss.item() for ids in batches]
    return sum(losses) / len(losses)

# %% tags=["nbval-check-output"]
exercises.evaluation.check(mended, model=model, batches=batches)

# %% [markdown]
# ## Exercise 9.4: make it fit
#
# *Run · hard · about 15 minutes.* A run dies on a T4 before its first step. Choose settings with which it fits, leaves
# half a GiB free, and learns the same: 8 chats in a step, 2,048 tokens, rank 64 on all layers. Change the rest as you
# like. Answer with `replace(run, …)`.

# %%
seven = find_shape("Qwen/Qwen2.5-7B")
run = replace(GPU_RUN, compute_dtype="float16", batch_size=8, rank=64, optimizer="adamw_torch",
              upcast_fp32=True, gradient_checkpointing=False)
needed = predict(seven, run, "t4")
print(f"needs {needed.device_bytes / GIB:.0f} GiB, {-needed.spare_bytes / GIB:.0f} too much")

# %% tags=["exercise"]
fitted = ...

# %% tags=["solution"]
fitted = replace(run, upcast_fp32=False, gradient_checkpointing=True, batch_size=4, accumulation=2)

# %% tags=["nbval-check-output"]
exercises.fitted.check(fitted, shape=seven, run=run, gpu="t4")

# %% [markdown]
# ## You have
# - seen where memory goes within one training step, on this machine and on a large GPU;
# - read every number of an out-of-memory message, and told from its traceback where a run died;
# - gone from that place to the cheapest cure, with its price predicted and measured;
# - given a run a memory budget, and seen what it cannot cure;
# - found out what paged optimizers save (little, with LoRA), and that some common advice is costly or does nothing.
#
# Next: [lesson 10](10_your_own_data.ipynb) goes from a file of yours to a tuned model. Another error?
# [TROUBLESHOOTING.md](../TROUBLESHOOTING.md) has the common ones with their cures, and `python -m qlora_helpers doctor
# --error "…"` finds the entry from a pasted message.
