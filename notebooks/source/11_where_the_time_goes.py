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
from qlora_helpers.course.checks import check, exercise
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
# A linear layer multiplies each of its weights once for each token, and adds the product to a sum: two operations for each
# parameter. How many times is that done in a step?
#
# - **forward**: once;
# - **backward**: once for the gradient of the layer's input. A trained weight needs as much again for its own gradient, a
#   frozen one does not;
# - **forward again**, where a layer is checkpointed.
#
# The output head is not checkpointed, but TRL computes its logits again on the way back instead of keeping them. Attention
# compares each token with those before it, half of the sequence on average. It has no weights; both of its inputs need a
# gradient. So, for one token:

# %%
def operations(shape, length: int, rank: int = 16, checkpointed: float = 1) -> dict[str, float]:
    """Operations of a training step for one token, by kind. `checkpointed` is the share of the layers."""
    attention = shape.num_hidden_layers * 2 * length * shape.query_width  # two products, over half of the tokens
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
products = sum(count for kind, count in counted.items() if kind in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm))
parts = operations(tiny, 128, checkpointed=0)
by_hand = parts["frozen 4-bit layers"] + parts["LoRA"] + parts["output head"] * 2 / 3
check("million operations for a token of the shipped model", round(products / 128e6, 2), by_hand / 1e6, rel=1e-3)

# %% [markdown]
# Now 8B. Before you run the cell: of its 8.03 billion parameters 6.98 billion are in the decoder layers. How many billion
# operations will these need for a token, if all layers are checkpointed?

# %% tags=["nbval-check-output"]
shape = find_shape("meta-llama/Llama-3.1-8B")
print(f"{shape.parameters / 1e9:.2f} billion parameters, {shape.linear_parameters / 1e9:.2f} in the decoder layers")
for share, name in ((1, "all layers checkpointed"), (0, "none")):
    parts = operations(shape, 2048, checkpointed=share)
    print(f"{name}: {sum(parts.values()) / 1e9:.1f} billion operations for a token")
    for part, count in parts.items():
        print(f"    {part:22}{count / 1e9:6.1f}  {count / sum(parts.values()):6.1%}")

# %% [markdown]
# Without the head and attention it is the 42 billion that you may have predicted: three times two for each parameter. LoRA, the
# only part that is trained, is less than a hundredth of the work. Attention is small at this length, but it is the one part
# that grows with the length:

# %% tags=["nbval-check-output"]
for length in (2048, 8192, 32768):
    parts = operations(shape, length)
    print(f"{length:6,} tokens: attention {parts['attention'] / sum(parts.values()):5.1%} of the operations")

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


for share, name in ((1, "all layers checkpointed"), (0.5, "half of them"), (0, "none")):
    print(f"{name:26}{best_pace(shape, 2048, share):8,.0f} tokens/s at best")

# %% [markdown]
# But a GPU also has to fetch what it multiplies. The 4-bit weights are decoded to 16 bits in each pass through a layer: read
# in 4 bits, written in 16 bits. That takes as long for one token as for many. An H200's data sheet says 4.8 TB per second:

# %% tags=["nbval-check-output"]
bytes_of_a_pass = shape.linear_parameters * ((4 + 8 / 64 + 32 / (64 * 256)) / 8 + 2)
decoding = 3 * bytes_of_a_pass / 4.8e12  # forward, forward again, backward
print(f"{bytes_of_a_pass / 1e9:.1f} GB for each pass; three of them take at least {decoding * 1000:.0f} ms")
for tokens in (512, 2048, 8192):
    products = tokens / best_pace(shape, min(tokens, 2048))
    print(f"{tokens:6,} tokens at once: products {products * 1000:4.0f} ms, decoding {decoding / (decoding + products):6.1%} of the sum")

# %% [markdown]
# So few large passes are better than many small ones. That is a reason to use memory for a larger batch.
#
# ## One step, on this machine
#
# What is done beside products? Guess: of all the time of a step on a CPU, which share are they? torch's profiler times each operation. `profile_step` trains the shipped model for some
# steps and groups the operations by kind. What no group has is Python, and what the libraries do between operations.

# %%
chats = read_chats(data_path("chats", "train.jsonl"))[:500]
trainer = build_trainer(load_model(hardware=cpu), load_tokenizer(), chats, new_run_folder("lesson-11"), Settings(steps=20), cpu)
trainer.remove_callback(PrinterCallback)
profile = profile_step(trainer, warm_up=15, profiled=5)
print(f"a step takes {profile['step_seconds'] * 1000:.0f} ms")
for name, part in (profile["groups"] | profile["parts"]).items():
    print(f"{name:34}{part['share']:6.1%}")

# %%
fig, ax = plots.figure()
plots.shares_of_a_step(ax, profile["groups"])
ax.set_title("A small model's step is far more than its matrix products")
plots.show(fig, "Bars with the share of each kind of operation in one training step of the shipped model on this machine, the largest first. Matrix products take a part of the step; operations element by element, and Python and the rest, take much of it.")

# %% [markdown]
# The last three lines above are parts of a step that are made of several kinds: the optimizer is small, since only adapters
# are trained. Norms, SwiGLU and the loss are element by element, in many small operations. On a GPU it is alike:
# each of them reads and writes all of its numbers. `torch.compile` and liger-kernel join several into one.
#
# With the shipped model the 4-bit weights are so few that the course decodes them once, and keeps them. Over rounds on one
# machine that gave, bit for bit with the same result:

# %% tags=["nbval-check-output"]
recorded = json.loads(data_path("measured", "cpu_profile.json").read_text())
for row in recorded["rows"]:
    decoding = recorded["profiles"].get(row["way"], {"groups": {}})["groups"].get("decoding 4-bit weights")
    print(f"{row['way']:26}{row['of_plain']:6.1%} of the time" + (f", decoding {decoding['share']:.1%} of it" if decoding else ""))

# %% [markdown]
# ## What each piece buys
#
# The same run on an H200, made in many ways: Llama-3.1-8B in its real shape, rank 16, bfloat16. Each row is a process of its
# own, alone on the GPU. `4x2048` is four chats of 2,048 tokens at once. "compiled" is `compile_layers=True`, "16-of-32" is
# `checkpointed_layers=16`, and "in-24GiB" is `memory_budget="24GiB"`. The last column says in which of two calls of
# the machine a row was measured: a small difference between two calls may be one of the machines.

# %% tags=["nbval-check-output"]
measured = json.loads(data_path("measured", "speed.json").read_text())["rows"]
rows = {row["label"].removeprefix("8b bf16 "): row for row in measured}
print(f"{'tokens/s':>57}{'GiB':>7}   bound by   call")
for name, row in rows.items():
    print(f"{name:48}{row['tokens_per_second']:9,.0f}{row['peak_allocated_bytes'] / GIB:7.1f}   {row['bound_by']}{row['call']:5}")

# %%
fig, ax = plots.figure(figsize=(7.2, 4.2))
compiled = {"compiled: 32 of 32": "ours compiled", "21 of 32": "ours compiled in-24GiB", "16 of 32": "ours compiled 16-of-32",
            "none checkpointed": "ours compiled none-checkpointed"}
others = {"the articles' recipe": "articles", "TRL": "trl", "this course as it is": "ours", "liger": "ours liger", "Unsloth": "unsloth"}
shown = {words: rows[f"4x2048 full {name}"] for words, name in (compiled | others).items()}
sides = {"compiled: 32 of 32": "above", "21 of 32": "above", "16 of 32": "below", "none checkpointed": "above", "TRL": "left", "Unsloth": "left"}
plots.pace_against_memory(ax, shown, joined=list(compiled), sides=sides)
ax.set_title("Compile first; then memory buys pace, layer by layer")
plots.show(fig, "Tokens per second against peak memory of Llama-3.1-8B on an H200. The articles' recipe is slowest. TRL and this course as it is stand together above it, with less memory; above them liger, then compiled, and Unsloth at the same pace with the least memory of all. From compiled a line rises with fewer checkpointed layers, to the fastest run, which takes four times the memory.")

# %% [markdown]
# The articles' recipe is the slowest, and takes 1.6 times the memory of plain TRL: it makes the weights that are not in 4 bits
# float32, and has dropout. TRL and this course as it is are alike.
#
# ### Compiling
#
# `torch.compile` makes one kernel of many small operations. It has to be made first, so the first step is long. After how
# many steps does it pay?

# %% tags=["nbval-check-output"]
def first_and_usual(name: str) -> tuple[float, float]:
    """Seconds of a row's first step, and of one of the timed ones."""
    return rows[name]["first_step_seconds"], 8192 / rows[name]["tokens_per_second"]


plain_first, plain = first_and_usual("4x2048 full ours")
first, compiled = first_and_usual("4x2048 full ours compiled")
print(f"{plain / compiled:.2f} times the pace; the first step takes {first - plain_first:.1f} s longer")
print(f"it saves {plain - compiled:.3f} s per step: paid after {1 + (first - plain_first) / (plain - compiled):.0f} steps")

# %% [markdown]
# So a run of hundreds of steps gains, and a short trial loses. The two rows are of different calls. Compilers keep their work,
# so a run whose layers are like those of an earlier one begins sooner. Where lengths change from step to step, more has to be
# compiled. liger-kernel needs no compiling: its kernels for norms, rotary embeddings and MLPs are written by hand. It gives
# a part of the gain, and a little memory.
#
# ### Checkpointing fewer layers
#
# Each layer that is not checkpointed keeps its activations, and saves a forward pass through it. How much faster should a run
# be that checkpoints none? Three passes become two, but not for the head:

# %% tags=["nbval-check-output"]
every, none = rows["4x2048 full ours compiled"], rows["4x2048 full ours compiled none-checkpointed"]
foretold = best_pace(shape, 2048, 0) / best_pace(shape, 2048, 1)
print(f"by the operations {foretold:.2f} times the pace, measured {none['tokens_per_second'] / every['tokens_per_second']:.2f}")
print(f"memory: {every['peak_allocated_bytes'] / GIB:.1f} GiB and {none['peak_allocated_bytes'] / GIB:.1f} GiB")
for row, share in ((every, 1), (none, 0)):
    print(f"reached of the best pace: {row['tokens_per_second'] / best_pace(shape, 2048, share):.0%}")

# %% [markdown]
# ### Few large passes
#
# Half of the tokens should take half of the time. They take more:

# %% tags=["nbval-check-output"]
two, four = rows["2x2048 full ours compiled none-checkpointed"], none
seconds = [tokens / row["tokens_per_second"] for tokens, row in ((4096, two), (8192, four))]
per_token = (seconds[1] - seconds[0]) / 4096
per_pass = seconds[0] - 4096 * per_token
print(f"{seconds[0]:.3f} s and {seconds[1]:.3f} s: {per_pass:.3f} s for a pass, whatever is in it, as long as {per_pass / per_token:,.0f} tokens")
print(f"the GPU was at work for {two['busy_share']:.0%} and {four['busy_share']:.0%} of the time")

# %% [markdown]
# A part of that is decoding. Another is the CPU, which launches each kernel: with little in a pass, the GPU waits for it.
# "The CPU" stands in the table where the GPU was idle for more than a tenth of the time. Such a row says little about
# a slower GPU, which the same work keeps busy. (These two rows are of different calls, too.)
#
# ### Packing
#
# Chats differ in length. In a padded batch all rows are as long as the longest, and the GPU computes the padding, too. A
# pace that counts padding looks fine, so count tokens of chats only:

# %% tags=["nbval-check-output"]
for name in ("32x1024 mixed ours", "12x1024x8 mixed ours packed compiled"):
    row = rows[name]
    used = sum(row["step_tokens"]) / sum(row["step_places"])
    print(f"{name:40}{used:6.1%} of the places are tokens: {row['tokens_per_second_overall']:6,.0f} tokens/s")

# %% [markdown]
# Here most chats are short and a few are long: usual, and the best case for packing. Chats of one length gain nothing. The
# second row is also compiled and has more chats in a step, so not all of the difference is packing.
#
# ## A budget of memory
#
# Which of all that should you choose? Say how much memory the run may take. The planner keeps the chats of a step, and
# chooses how many go through at once, how many layers are checkpointed, and whether their inputs go to main memory. It
# predicts memory as in lesson 5, and time by the three costs that you have just seen: each pass, each token, each forward
# pass again.

# %%
run = replace(GPU_RUN, batch_size=4, dropout=0, compile_layers=True, compute_dtype="bfloat16")
for budget in (14.3, 24, 48):
    plan = plan_for(shape, run, find_gpu("h200"), int(budget * GIB))
    print(plan)
    row = rows[f"4x2048 full ours compiled in-{budget}GiB"]
    chosen = plan.chosen.settings
    check("checkpointed layers, as in the measured run", chosen.checkpointed_layers, row["at_work"]["checkpointed_layers"], exact=True)
    print(f"measured: {row['peak_allocated_bytes'] / GIB:.1f} GiB in tensors, {row['tokens_per_second']:,.0f} tokens/s\n")

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
drawn = json.loads(data_path("measured", "budgets.json").read_text())["rows"]
ran = [row for row in drawn if row["outcome"] == "ran"]
print(f"{len(ran)} of {len(drawn)} ran; out of memory: {sum('memory' in row.get('error', '') for row in drawn)}")
print("refused:", *(row["error"] for row in drawn if row["outcome"] == "died"))
off = {row["label"]: row["peak_allocated"] / row["predicted_peak_allocated"] - 1 for row in ran}
for packing in (False, True):
    some = [off[row["label"]] for row in ran if row["options"]["packing"] == packing]
    print(f"{'packed' if packing else 'padded'}: {len(some):2} runs, peak from {min(some):+.1%} to {max(some):+.1%} of the prediction")
for growing in (False, True):
    some = [row for row in ran if row["options"]["expandable_segments"] == growing]
    over = [row for row in some if row["peak_reserved"] > row["budget"] * GIB]
    print(f"{'segments that grow' if growing else 'usual segments'}: {len(some)} runs, {len(over)} held more than the budget")
    for row in over:
        sizes = [size / GIB for size in (row["peak_allocated"], row["peak_reserved"])]
        print(f"    budget {row['budget']} GiB: {sizes[0]:.1f} GiB in tensors, {sizes[1]:.1f} GiB held")

# %%
fig, ax = plots.figure(figsize=(7.2, 4.2))
for packing, marker, colour in ((False, "o", plots.BLUE), (True, "s", plots.ORANGE)):
    some = [row for row in ran if row["options"]["packing"] == packing]
    ax.scatter(
        [row["predicted_peak_allocated"] / GIB for row in some], [off[row["label"]] * 100 for row in some],
        marker=marker, color=colour, label="packed" if packing else "padded",
    )
ax.axhline(0, color="#777777", linewidth=1)
ax.axhline(4, color=plots.RED, linewidth=1, linestyle="--", label="what a budget leaves free")
ax.set(xlabel="predicted peak (GiB)", ylabel="measured peak above it (%)")
ax.set_title("Tensors stayed within the margin in each of the runs")
ax.legend(fontsize=9)
plots.show(fig, "How far the measured peak of each drawn run lies above its predicted peak, in per cent, against the predicted peak. Nearly all padded runs lie above the prediction, most packed ones below it, some far below. All are under a dashed line, the share of a budget that is left free.")

# %% [markdown]
# No run ran out of memory. The refused one is a mistake of the measuring script: it had built the model with a shorter window
# than the length that was drawn. Padded batches took up to 3.8 % more than predicted: a batch with padding has a mask, and
# with a mask attention cannot take its best kernel. Since then the rows of a step run without one. That was not measured
# again.
#
# One run held more than its budget. Its tensors took what was predicted, but torch had reserved more than twice as much. The
# cap did not stop it: torch counts no segments that grow against it (`alloc_block` in its `CUDACachingAllocator.cpp`). So
# with `expandable_segments` a budget is kept by the prediction alone. Do not use both on a card that you share.
#
# ## Packing is exact
#
# A packed row has several chats one after the other, and each must see only itself. transformers tells where one ends by
# the positions, which begin anew with each chat:

# %% tags=["nbval-check-output"]
tokenizer, model = load_tokenizer(), load_model(hardware=cpu).eval()
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
        "with a mask": model(input_ids=row, position_ids=positions, attention_mask=ones, use_cache=False),
    }
off = {name: abs(loss_of(output.logits[0, begin:end], chat) - alone) for name, output in ways.items()}
check("difference of the loss, packed as the course does it", off["as the course does it"], at_most=1e-4)
for name in ("with the default cache", "with a mask"):
    check(f"difference of the loss, {name}", off[name], at_least=0.01)

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
# what is done, or where the GPU has memory to spare, which can be turned into pace.

# %% tags=["nbval-check-output"]
for name in ("4x2048 full unsloth", "4x2048 full ours compiled"):
    print(f"{name:28}{rows[name]['peak_allocated_bytes'] / GIB:5.1f} GiB {rows[name]['tokens_per_second']:8,.0f} tokens/s")

# %% [markdown]
# ## Exercise 1
#
# What is the best pace of Qwen2.5-7B on the same GPU, at 4,096 tokens with half of the layers checkpointed?

# %% tags=["exercise"]
pace = ...

# %% tags=["solution"]
pace = best_pace(find_shape("Qwen/Qwen2.5-7B"), 4096, 0.5)

# %% tags=["nbval-check-output"]
exercise("the best pace", pace, 20_227, hint="best_pace(find_shape(name), length, share)", rel=1e-3)

# %% [markdown]
# ## Exercise 2
#
# You want to train for 200 steps of 4 x 2,048 tokens. How many seconds does compiling save in all? The first step is one of
# the 200. Use `plain_first`, `plain`, `first` and `compiled`.

# %% tags=["exercise"]
saved = ...

# %% tags=["solution"]
saved = (plain_first + 199 * plain) - (first + 199 * compiled)

# %% tags=["nbval-check-output"]
exercise("seconds saved", saved, 39.06, hint="a run takes its first step and 199 usual ones.", rel=1e-3)

# %% [markdown]
# ## Exercise 3
#
# How many layers have to be checkpointed, if torch's tensors may take 20 GiB? Assume that each layer that is checkpointed
# saves the same, and take that from the compiled rows with none and with 16 of 32 checkpointed.

# %%
peaks = {count: rows[f"4x2048 full ours compiled {name}"]["peak_allocated_bytes"] / GIB
         for count, name in ((0, "none-checkpointed"), (16, "16-of-32"))}

# %% tags=["exercise"]
layers = ...

# %% tags=["solution"]
each = (peaks[0] - peaks[16]) / 16
layers = next(count for count in range(33) if peaks[0] - count * each <= 20)

# %% tags=["nbval-check-output"]
exercise("checkpointed layers", layers, 21, hint="a layer saves about a GiB; round up.")

# %% [markdown]
# The planner chose as many for a budget of 24 GiB, with room for the CUDA context, for what torch holds in reserve, and for
# its margin. That run was measured:

# %% tags=["nbval-check-output"]
row = rows["4x2048 full ours compiled in-24GiB"]
print(f"{row['at_work']['checkpointed_layers']} layers: {row['peak_allocated_bytes'] / GIB:.2f} GiB in tensors")

# %% [markdown]
# ## You have
# - counted the operations of a training step from the shape of a model, and how fast a GPU could be at best;
# - profiled a step on this machine, and seen what is done beside matrix products;
# - read from runs on an H200 what each piece of advice buys, in time and in memory, and when it buys nothing;
# - named a budget of memory, and got the fastest run that fits;
# - seen that packing is exact, and how it fails in silence;
# - seen when to take another trainer.
#
# This was the last lesson. Now take your own file: [README.md](../README.md) has the commands, and
# [TROUBLESHOOTING.md](../TROUBLESHOOTING.md) what to do when something goes wrong. What the articles claim, and what is true, is
# listed in [CLAIMS.md](../CLAIMS.md).
