# %% [markdown]
# # 11 · Where the time goes
#
# You will
# - count the operations of a training step from the shape of a model, and how fast a GPU could be at best;
# - profile a step on this machine, and see what is done beside matrix products;
# - read from runs on an H200 what each piece of advice buys, in time and in memory, and when it buys nothing;
# - name a budget of memory, and get the fastest run that fits;
# - see that packing is exact, and how it fails in silence;
# - know when to take another trainer.
#
# Takes about {{seconds}} seconds and {{gigabytes}} GB of memory on two processor cores. No GPU is needed: what only a GPU
# can tell was measured on one, an H200, and lies in `data/measured/`.

# %%
import json
from dataclasses import replace

from qlora_helpers.chats import read_chats, tokenized
from qlora_helpers.course import plots
from qlora_helpers.course.checks import check
from qlora_helpers.course.exercises import lesson_11 as exercises
from qlora_helpers.course.speed_runs import in_words
from qlora_helpers.course.tables import show_table
from qlora_helpers.hardware import detect
from qlora_helpers.memory import find_gpu, find_shape
from qlora_helpers.memory.budget import plan_for
from qlora_helpers.models.loading import load_model, load_tokenizer
from qlora_helpers.paths import data_path
from qlora_helpers.settings import GPU_RUN, Settings
from qlora_helpers.training.packing import PackingCollator
from qlora_helpers.training.run_folder import new_run_folder
from qlora_helpers.training.step_profile import profile_step
from qlora_helpers.training.trainer import build_trainer

# %%
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import PrinterCallback

GIB = 2**30
cpu = detect("cpu")  # this lesson runs there in every gear
print("torch", torch.__version__.split("+")[0])

# %% [markdown]
# ## Operations
#
# A linear layer multiplies each of its weights once for each [token](../GLOSSARY.md#token), and adds the product to a sum:
# two operations for each parameter. How many times is that done in a step?
#
# - **forward**: once;
# - **backward**: once for the gradient of the layer's input. A trained weight needs as much again for its own gradient, a
#   frozen one does not;
# - **forward again**, where a layer is [checkpointed](../GLOSSARY.md#gradient-checkpointing): it forgets what it has
#   computed, and computes it again for the gradients.
#
# The output head is not checkpointed, but TRL computes its [logits](../GLOSSARY.md#logits) again on the way back instead of
# keeping them. Attention compares each token with those before it, half of the sequence on average. It has no weights; both
# of its inputs need a gradient. So, for one token:

# %%
def operations(shape, length: int, rank: int = 16, checkpointed: float = 1) -> dict[str, float]:
    """Operations of a step for one token, by kind; a share of the layers is checkpointed."""
    # two products, over half of the tokens
    attention = shape.num_hidden_layers * 2 * length * shape.query_width
    return {
        "frozen 4-bit layers": 2 * shape.linear_parameters * (2 + checkpointed),
        "output head": 2 * shape.vocab_size * shape.hidden_size * 3,
        "attention": attention * (3 + checkpointed),
        "LoRA": 2 * shape.lora_parameters(rank) * (3 + checkpointed),
    }

# %% [markdown]
# torch can count the operations while they are done. Does the formula hold? Here is one forward and backward pass of the
# shipped model with adapters, without checkpointing. Its weights are not in 4 bits here, so that torch sees each product,
# and its logits are made once.

# %% tags=["nbval-check-output"]
model = load_model(quantization=None, hardware=cpu)
model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
tiny, ids = find_shape(model.config), torch.arange(128)[None]
inputs = model.get_input_embeddings()(ids).detach().requires_grad_()
with FlopCounterMode(display=False) as counter:
    model(inputs_embeds=inputs, labels=ids).loss.backward()
counted = counter.get_flop_counts()["Global"]
kinds = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)
products = sum(count for kind, count in counted.items() if kind in kinds) / 128e6
parts = operations(tiny, 128, checkpointed=0)
by_hand = parts["frozen 4-bit layers"] + parts["LoRA"] + parts["output head"] * 2 / 3
name = "million operations for a token of the shipped model"
check(name, round(products, 2), by_hand / 1e6, rel=1e-3)

# %% [markdown]
# Now 8B. Before you run the cell: of its 8.03 billion parameters 6.98 billion are in the decoder layers. How many billion
# operations will these need for a token, if all layers are checkpointed?

# %% tags=["nbval-check-output"]
shape = find_shape("meta-llama/Llama-3.1-8B")
every, linear = shape.parameters / 1e9, shape.linear_parameters / 1e9
print(f"{every:.2f} billion parameters, {linear:.2f} in the decoder layers")
for share, name in ((1, "all layers checkpointed"), (0, "none")):
    parts = operations(shape, 2048, checkpointed=share)
    total = sum(parts.values())
    print(f"{name}: {total / 1e9:.1f} billion operations for a token")
    show_table(["part", "billion", "share"],
               [[part, count / 1e9, count / total] for part, count in parts.items()],
               formats=["", ".1f", ".1%"])

# %% [markdown]
# The decoder layers need the 42 billion that you may have predicted: three times two for each parameter. LoRA, the only
# part that is trained, is less than a hundredth of the work. Attention is small at this length, but it is the one part
# that grows with the length:

# %% tags=["nbval-check-output"]
table = []
for length in (2048, 8192, 32768):
    parts = operations(shape, length)
    table.append([f"{length:,}", parts["attention"] / sum(parts.values())])
show_table(["tokens", "attention's share"], table, formats=["", ".1%"])

# %% [markdown]
# ## The best pace
#
# In large bfloat16 products an H200 did 790 trillion operations per second (measured by hand; that script is not in this
# repository). If a step were nothing else, it would be as fast as this, and it cannot be faster:

# %% tags=["nbval-check-output"]
RATE = 790e12


def best_pace(shape, length: int, checkpointed: float = 1) -> float:
    """Tokens per second, if every operation ran at the full rate."""
    return RATE / sum(operations(shape, length, checkpointed=checkpointed).values())


shares = {"all": 1, "half of them": 0.5, "none": 0}
paces = [[name, best_pace(shape, 2048, share)] for name, share in shares.items()]
show_table(["layers checkpointed", "tokens/s at best"], paces, formats=["", ",.0f"])

# %% [markdown]
# But a GPU also has to fetch what it multiplies. The 4-bit weights are decoded to 16 bits in each pass through a layer: read
# in 4 bits, written in 16 bits. That takes as long for one token as for many. An H200's data sheet says 4.8 TB per second:

# %% tags=["nbval-check-output"]
bytes_of_a_pass = shape.linear_parameters * ((4 + 8 / 64 + 32 / (64 * 256)) / 8 + 2)
decoding = 3 * bytes_of_a_pass / 4.8e12  # forward, forward again, backward
print(f"{bytes_of_a_pass / 1e9:.1f} GB for each pass; three of them take {decoding * 1000:.0f} ms")
table = []
for tokens in (512, 2048, 8192):
    products = tokens / best_pace(shape, min(tokens, 2048))
    table.append([f"{tokens:,}", products * 1000, decoding / (decoding + products)])
headings = ["tokens at once", "products, ms", "share of decoding"]
show_table(headings, table, formats=["", ".0f", ".1%"])

# %% [markdown]
# So few large passes are better than many small ones. That is a reason to use memory for a larger batch.
#
# ## One step, on this machine
#
# Guess: of all the time of a step on a CPU, which share are matrix products? torch's profiler times each operation.
# `profile_step` trains the shipped model for some steps and groups the operations by kind. What no group has is Python, and
# what the libraries do between operations.

# %%
del model, inputs, counter
chats = read_chats(data_path("chats", "train.jsonl"))[:500]
tokenizer, folder = load_tokenizer(), new_run_folder("lesson-11")
trainer = build_trainer(load_model(hardware=cpu), tokenizer, chats, folder, Settings(steps=14), cpu)
trainer.remove_callback(PrinterCallback)
profile = profile_step(trainer, warm_up=11, profiled=3)
del trainer
print(f"a step takes {profile['step_seconds'] * 1000:.0f} ms")
found = profile["groups"] | profile["parts"]
table = [[name, part["share"]] for name, part in found.items()]
show_table(["part", "share"], table, formats=["", ".1%"])

# %%
fig, ax = plots.figure()
plots.shares_of_a_step(ax, profile["groups"])
ax.set_title("A small model's step is far more than its matrix products")
plots.show(fig, "11.1")

# %% [markdown]
# The last three lines of the table are parts of a step that are made of several kinds. The optimizer is small, since only
# adapters are trained. Norms, the MLPs' activation and the loss are element by element, in many small operations. On a GPU
# it is alike: each of them reads and writes all of its numbers. [torch.compile](../GLOSSARY.md#torchcompile) and
# liger-kernel join several into one.
#
# With the shipped model the 4-bit weights are so few that the course decodes them once, and keeps them. Over rounds on one
# machine that gave, bit for bit with the same result:

# %% tags=["nbval-check-output"]
recorded = json.loads(data_path("measured", "cpu_profile.json").read_text(encoding="utf-8"))
table = []
for row in recorded["rows"]:
    groups = recorded["profiles"].get(row["way"], {"groups": {}})["groups"]
    decoding = groups.get("decoding 4-bit weights", {})
    table.append([row["way"], row["of_plain"], decoding.get("share")])
show_table(["way", "time, of plain", "of it decoding"], table, formats=["", ".1%", ".1%"])

# %% [markdown]
# ## What each piece buys
#
# The same run on an H200, made in many ways: Llama-3.1-8B in its real shape, rank 16, bfloat16. Each row is a process of its
# own, alone on the GPU. "4 of 2,048" are four chats of 2,048 tokens at once; "8 x" stands before them where eight such passes
# make a step. "Compiled" is `compile_layers=True`, "16 of 32 checkpointed" is `checkpointed_layers=16`, and "budget of 24 GiB"
# is `memory_budget="24GiB"`. The rows with "16 bits" have a base that is not quantised, and belong to those beside them
# ([lesson 7](07_does_it_cost_quality.ipynb)). "Bound by" says which of the two the other waits for, the GPU or the CPU. The
# last column says in which session on the machine a row was measured: a small difference between two sessions may be one of
# the machines.

# %% tags=["nbval-check-output"]
measured = json.loads(data_path("measured", "speed.json").read_text(encoding="utf-8"))["rows"]
eight = "8b bf16 "
rows = {row["label"].removeprefix(eight): row for row in measured if row["label"].startswith(eight)}
table = [[*in_words(name), row["tokens_per_second"], row["peak_allocated_bytes"] / GIB,
          row["bound_by"], row["call"]] for name, row in rows.items()]
headings = ["chats", "run", "tokens/s", "GiB", "bound by", "session"]
show_table(headings, table, formats=["", "", ",.0f", ".1f", "", ""])

# %%
compiled = {"compiled: 32 of 32": "ours compiled", "21 of 32": "ours compiled in-24GiB",
            "16 of 32": "ours compiled 16-of-32",
            "none checkpointed": "ours compiled none-checkpointed"}
others = {"the articles' recipe": "articles", "TRL": "trl", "this course as it is": "ours",
          "liger": "ours liger", "Unsloth": "unsloth"}
sides = {"compiled: 32 of 32": "above", "21 of 32": "above", "16 of 32": "below",
         "none checkpointed": "above", "TRL": "left", "Unsloth": "left"}
shown = {words: rows[f"4x2048 full {name}"] for words, name in (compiled | others).items()}
fig, ax = plots.figure(figsize=(7.2, 4.2))
plots.pace_against_memory(ax, shown, joined=list(compiled), sides=sides)
ax.set_title("Compile first; then memory buys pace, layer by layer")
plots.show(fig, "11.2")

# %% [markdown]
# The slowest in the figure is the recipe of the articles from which this course grew. It takes 1.6 times the memory of plain TRL, since it
# makes the weights that are not in 4 bits float32, and has dropout. TRL and this course as it is are alike.
#
# ### Compiling
#
# `torch.compile` makes one [kernel](../GLOSSARY.md#kernel) of many small operations. It has to be made first, so the first
# step is long. After how many steps does it pay?

# %% tags=["nbval-check-output"]
def first_and_usual(name: str) -> tuple[float, float]:
    """Seconds of a row's first step, and of one of the timed ones."""
    return rows[name]["first_step_seconds"], 8192 / rows[name]["tokens_per_second"]


plain_first, plain = first_and_usual("4x2048 full ours")
first, compiled = first_and_usual("4x2048 full ours compiled")
more, less = first - plain_first, plain - compiled
print(f"{plain / compiled:.2f} times the pace; the first step takes {more:.1f} s longer")
print(f"it saves {less:.3f} s per step: paid after {1 + more / less:.0f} steps")

# %% [markdown]
# So a run of hundreds of steps gains, and a short trial loses. (The two rows are of different sessions.) Compilers keep their
# work, so a run whose layers are like those of an earlier one begins sooner. Where lengths change from step to step, more
# has to be compiled. liger-kernel needs no compiling: its kernels for norms, rotary embeddings and MLPs are written by hand.
# It gives a part of the gain, and saves a little memory.
#
# ### Checkpointing fewer layers
#
# Each layer that is not checkpointed keeps its [activations](../GLOSSARY.md#activations), and saves a forward pass through
# it. How much faster should a run be that checkpoints none? Three passes become two, but not for the head:

# %% tags=["nbval-check-output"]
every = rows["4x2048 full ours compiled"]
none = rows["4x2048 full ours compiled none-checkpointed"]
foretold = best_pace(shape, 2048, 0) / best_pace(shape, 2048, 1)
gained = none["tokens_per_second"] / every["tokens_per_second"]
print(f"by the operations {foretold:.2f} times the pace, measured {gained:.2f}")
table = []
for name, row, share in (("every layer", every, 1), ("none", none, 0)):
    reached = row["tokens_per_second"] / best_pace(shape, 2048, share)
    table.append([name, row["peak_allocated_bytes"] / GIB, reached])
show_table(["checkpointed", "GiB", "of the best pace"], table, formats=["", ".1f", ".0%"])

# %% [markdown]
# ### Few large passes
#
# Half of the tokens should take half of the time. They take more:

# %% tags=["nbval-check-output"]
two, four = rows["2x2048 full ours compiled none-checkpointed"], none
seconds = [tokens / row["tokens_per_second"] for tokens, row in ((4096, two), (8192, four))]
per_token = (seconds[1] - seconds[0]) / 4096
per_pass = seconds[0] - 4096 * per_token
table = [["2 x 2,048", seconds[0], two["busy_share"]],
         ["4 x 2,048", seconds[1], four["busy_share"]]]
show_table(["tokens", "seconds", "the GPU is at work"], table, formats=["", ".3f", ".0%"])
as_long_as = per_pass / per_token
print(f"{per_pass:.3f} s for a pass, whatever is in it: as long as {as_long_as:,.0f} tokens")

# %% [markdown]
# A part of that is decoding. Another is the CPU, which launches each kernel: with little in a pass, the GPU waits for it.
# "The CPU" stands in the table where the GPU was idle for more than a tenth of the time. Such a row says little about
# a slower GPU, which the same work keeps busy. (These two rows are of different sessions, too.)
#
# ### Packing
#
# Chats differ in length. In a [padded](../GLOSSARY.md#padding) batch all rows are as long as the longest, and the GPU
# computes the padding, too. [Packing](../GLOSSARY.md#packing) puts several chats into a row instead. A pace that counts
# padding looks fine, so count tokens of chats only:

# %% tags=["nbval-check-output"]
table = []
for name in ("32x1024 mixed ours", "12x1024x8 mixed ours packed compiled"):
    row = rows[name]
    used = sum(row["step_tokens"]) / sum(row["step_places"])
    table.append([*in_words(name), used, row["tokens_per_second_overall"]])
headings = ["chats", "run", "places with a token", "tokens/s"]
show_table(headings, table, formats=["", "", ".1%", ",.0f"])

# %% [markdown]
# Here most chats are short and a few are long: usual, and the best case for packing. Chats of one length gain nothing. The
# second row is also compiled and has more chats in a step, so not all of the difference is packing. And packed chats do not
# reach the pace of full ones: to keep them apart takes a mask, and the fastest attention kernel takes none.
#
# ## A budget of memory
#
# Which of all that should you choose? Say how much memory the run may take, as in
# [lesson 9](09_out_of_memory.ipynb). The planner keeps the chats of a step, and chooses how many go through at once, how many
# layers are checkpointed, and whether their inputs go to main memory. It predicts memory as in lesson 5, and time by the
# costs that you have just seen: each pass, each token, each forward pass again.

# %%
run = replace(GPU_RUN, batch_size=4, dropout=0, compile_layers=True, compute_dtype="bfloat16")
for budget in (14.3, 24, 48):
    plan = plan_for(shape, run, find_gpu("h200"), int(budget * GIB))
    print(plan)
    row = rows[f"4x2048 full ours compiled in-{budget}GiB"]
    chosen, layers = plan.chosen.settings.checkpointed_layers, row["at_work"]["checkpointed_layers"]
    check("checkpointed layers, as in the measured run", chosen, layers, exact=True)
    peak = row["peak_allocated_bytes"] / GIB
    print(f"measured: {peak:.1f} GiB in tensors, {row['tokens_per_second']:,.0f} tokens/s\n")

# %% [markdown]
# Beside the choice it prints what else was tried, faster and slower. Now your budget: change it, and first guess how many
# layers will be checkpointed. In a run, it is all that you have to say: `Settings(memory_budget="16GiB")`, or `"auto"` for
# what is free.

# %%
budget = "16GiB"
print(plan_for(shape, run, find_gpu("h200"), Settings(memory_budget=budget).memory_budget))

# %% [markdown]
# Can it be relied upon? Thirty runs were drawn by lot before anything was measured: models from 0.5B to 8B, lengths,
# options, and budgets. Each ran under a cap at its budget.

# %% tags=["nbval-check-output"]
drawn = json.loads(data_path("measured", "budgets.json").read_text(encoding="utf-8"))["rows"]
ran = [row for row in drawn if row["outcome"] == "ran"]
out = sum("memory" in row.get("error", "") for row in drawn)
held = sum(row["peak_reserved"] > row["budget"] * GIB for row in ran)
print(f"{len(ran)} of {len(drawn)} ran; out of memory: {out}; held more than the budget: {held}")
off = {row["label"]: row["peak_allocated"] / row["predicted_peak_allocated"] - 1 for row in ran}
table = []
for way, packing in (("padded", False), ("packed", True)):
    some = [off[row["label"]] for row in ran if row["options"]["packing"] == packing]
    table.append([way, len(some), min(some), max(some)])
headings = ["runs", "how many", "peak off by", "to"]
show_table(headings, table, formats=["", "", "+.1%", "+.1%"])

# %%
fig, ax = plots.figure(figsize=(7.2, 4.2))
for packing, marker, colour in ((False, "o", plots.BLUE), (True, "s", plots.ORANGE)):
    some = [row for row in ran if row["options"]["packing"] == packing]
    ax.scatter(
        [row["predicted_peak_allocated"] / GIB for row in some],
        [off[row["label"]] * 100 for row in some],
        marker=marker, color=colour, label="packed" if packing else "padded",
    )
ax.axhline(0, color="#777777", linewidth=1)
ax.axhline(4, color=plots.RED, linewidth=1, linestyle="--", label="what a budget leaves free")
ax.set(xlabel="predicted peak (GiB)", ylabel="measured above predicted peak (%)")
ax.set_title("Tensors stayed within the margin in each of the runs")
ax.legend(fontsize=9)
plots.show(fig, "11.3")

# %% [markdown]
# Padded batches took up to 3.9 % more than predicted: the margin of 4 % is just enough. So a budget can be relied upon, but
# for one thing. The cap does not count segments of memory that can grow (`expandable_segments`). With these a budget is kept
# by the prediction alone, so do not use both on a card that you share.
#
# ## Packing is exact
#
# A packed row has several chats one after the other, and each must see only itself. transformers tells where one ends by
# the positions, which begin anew with each chat:

# %% tags=["nbval-check-output"]
model = load_model(hardware=cpu).eval()
few = [{"input_ids": row["input_ids"]} for row in tokenized(chats[:3], tokenizer)]
batch = PackingCollator(tokenizer.pad_token_id, most=64)(few)
row, positions = batch["input_ids"], batch["position_ids"]
print(*positions[0].tolist())
_, begin, end = (positions[0] == 0).nonzero().flatten().tolist()
print(tokenizer.decode(row[0, begin:end]))

# %% [markdown]
# Take the chat in the middle. Its loss must be the same alone and in the row:

# %% tags=["nbval-check-output"]
def loss_of(logits: torch.Tensor, ids: torch.Tensor) -> float:
    """The mean loss of a chat's tokens."""
    return torch.nn.functional.cross_entropy(logits[:-1], ids[1:]).item()


chat = row[0, begin:end]
ones = torch.ones_like(row)
with torch.no_grad():
    alone = loss_of(model(input_ids=chat[None]).logits[0], chat)
    ways = {
        "as the course does it": model(input_ids=row, position_ids=positions, use_cache=False),
        "with the default cache": model(input_ids=row, position_ids=positions),
        "with a mask": model(
            input_ids=row, position_ids=positions, attention_mask=ones, use_cache=False
        ),
    }
off = {name: abs(loss_of(out.logits[0, begin:end], chat) - alone) for name, out in ways.items()}
exact = off.pop("as the course does it")
check("difference of the loss, packed as the course does it", exact, at_most=1e-4)
for name, difference in off.items():
    check(f"difference of the loss, {name}", difference, at_least=0.01)

# %% [markdown]
# The other two give no error and no warning: the chat has seen the one before it. With a cache, transformers does not look
# for new beginnings; nor does it if it is given the usual mask, with one entry for each token. So before a packed run `train`
# compares a packed row with its chats alone, and refuses the model if they differ.
#
# ## When to take another trainer
#
# [Unsloth](https://github.com/unslothai/unsloth) has the smallest peak of the table at the pace of the compiled row: take it
# where memory is short, or chats are very long. It has code of its own for the models that it supports, so look first whether
# yours is one of them. Stay with TRL, PEFT and bitsandbytes where a model is new or unusual, where you want to see and change
# what is done, or where the GPU has memory to spare, which a budget turns into pace:

# %% tags=["nbval-check-output"]
table = [[in_words(name)[1], rows[name]["peak_allocated_bytes"] / GIB,
          rows[name]["tokens_per_second"]]
         for name in ("4x2048 full unsloth", "4x2048 full ours compiled",
                      "4x2048 full ours compiled in-24GiB")]
show_table(["run", "GiB", "tokens/s"], table, formats=["", ".1f", ",.0f"])

# %% [markdown]
# ## Exercise 11.1: what makes it faster?
#
# *Predict · medium · about 8 minutes.* Four runs of 8B on a large GPU. For each choose the change that makes it faster, in all
# and within its memory: `"larger passes"`, `"packing"`, `"compiling"`, `"fewer checkpointed layers"`, or `"nothing"` of
# these.
#
# - **A**: 16 chats of 512 tokens in a step, one chat at a time, so that the GPU is at work for 60 % of the time; compiled, no
#   layer checkpointed, much memory free.
# - **B**: 32 chats of very different lengths in a padded batch, compiled, all layers checkpointed; the card is full.
# - **C**: a trial of five steps, not compiled, all layers checkpointed, chats of one length, four at a time; the card is full.
# - **D**: chats of one length, all chats of a step at once, compiled, all layers checkpointed; the GPU is always at work, and
#   half of the card is free.

# %% tags=["exercise"]
changes = {"A": ..., "B": ..., "C": ..., "D": ...}

# %% tags=["solution"]
changes = {"A": "larger passes", "B": "packing", "C": "nothing", "D": "fewer checkpointed layers"}

# %% tags=["nbval-check-output"]
exercises.faster.check(changes)

# %% [markdown]
# ## Exercise 11.2: a packer
#
# *Build · hard · about 20 minutes.* Write `pack(lengths, most)`. It gets the lengths of chats in tokens and the most tokens
# of a row, and gives back rows: lists of places in `lengths`. Each chat is in one row, no row is too long, and there are few
# rows: as few as a careful packer needs. For `[5, 3, 4]` and 8 that is `[[0, 1], [2]]`, in any order.

# %% tags=["exercise"]
def pack(lengths: list[int], most: int) -> list[list[int]]:
    ...

# %% tags=["solution"]
def pack(lengths: list[int], most: int) -> list[list[int]]:
    rows, left = [], []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        fitting = [row for row, room in enumerate(left) if room >= lengths[place]]
        if not fitting:
            rows.append([])
            left.append(most)
        row = min(fitting, key=lambda row: left[row], default=len(rows) - 1)  # the fullest
        rows[row].append(place)
        left[row] -= lengths[place]
    return rows

# %% tags=["nbval-check-output"]
exercises.packer.check(pack)

# %% [markdown]
# ## Exercise 11.3: chats that see each other
#
# *Run · hard · about 20 minutes.* Somebody wrote the collator below, which makes a batch of one row. It trains without an
# error, but each chat learns from the one before it: see how much its loss is off. Find what is wrong, and write `repacked`,
# which gives the same three tensors for a row in which each chat is alone. Every token but a chat's first counts in the loss.

# %%
def leaking(chats: list[list[int]]) -> dict[str, torch.Tensor]:
    """Some chats as a row: input_ids, labels and position_ids, each 1 x tokens."""
    ids = torch.tensor([token for chat in chats for token in chat])
    positions = torch.arange(len(ids))
    return {"input_ids": ids[None], "labels": ids[None], "position_ids": positions[None]}


five = [row["input_ids"] for row in tokenized(chats[10:15], tokenizer)]
batch = leaking(five)
begin = len(five[0])
second = torch.tensor(five[1])
with torch.no_grad():
    row = model(
        input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
    ).logits[0]
    apart = model(input_ids=second[None]).logits[0]
together = row[begin : begin + len(second)]
losses = loss_of(together, second), loss_of(apart, second)
print("loss of the second chat: {:.2f} in the row, {:.2f} alone".format(*losses))

# %% tags=["exercise"]
def repacked(chats: list[list[int]]) -> dict[str, torch.Tensor]:
    ...

# %% tags=["solution"]
def repacked(chats: list[list[int]]) -> dict[str, torch.Tensor]:
    ids = torch.tensor([token for chat in chats for token in chat])
    positions = torch.cat([torch.arange(len(chat)) for chat in chats])
    labels = ids.masked_fill(positions == 0, -100)
    return {"input_ids": ids[None], "labels": labels[None], "position_ids": positions[None]}

# %% tags=["nbval-check-output"]
exercises.repacked.check(repacked, model=model, chats=five)

# %% [markdown]
# ## You have
# - counted the operations of a training step from the shape of a model, and how fast a GPU could be at best;
# - profiled a step on this machine, and seen what is done beside matrix products;
# - read from runs on an H200 what each piece of advice buys, in time and in memory, and when it buys nothing;
# - named a budget of memory, and got the fastest run that fits;
# - seen that packing is exact, and how it fails in silence;
# - seen when to take another trainer.
#
# Next: [lesson 12](12_past_one_gpu.ipynb) takes more than one GPU: for runs that should be faster, and for models that no card
# holds alone.
