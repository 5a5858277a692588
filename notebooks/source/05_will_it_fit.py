# %% [markdown]
# # 5 · Will it fit?
#
# You will
# - add up the memory of a QLoRA run of Llama-3.1-8B by hand, term by term, and compare with what a GPU measured;
# - let the course's predictor do that sum, and see how far off it was in 100 measured runs;
# - see what each setting costs, and why the attention kernel decides how long a sequence may be;
# - choose batch size and accumulation for a card, and see which models fit which cards;
# - measure a run of your own;
# - meet a model that is called 4-bit and is not.
#
# Takes about {{seconds}} seconds and {{gigabytes}} GB of memory on two processor cores. No GPU is needed: what only a
# GPU can tell was measured on one, an H200, and lies in `data/measured/`.

# %%
import json
from dataclasses import fields, replace

from qlora_helpers.chats import read_chats
from qlora_helpers.course import diagrams, plots
from qlora_helpers.course.checks import check
from qlora_helpers.course.exercises import lesson_05 as exercises
from qlora_helpers.course.tables import show_table
from qlora_helpers.course.widgets import fit_explorer
from qlora_helpers.hardware import detect
from qlora_helpers.memory import find_gpu, find_shape, predict, suggest, what_fits
from qlora_helpers.memory.comparison import compare
from qlora_helpers.memory.live_run import settings_of, shape_of
from qlora_helpers.memory.measurement import Measurement, MemoryCallback
from qlora_helpers.models.in_4_bits import in_4_bits, planned_4_bits
from qlora_helpers.models.loading import load_model, load_tokenizer
from qlora_helpers.paths import data_path
from qlora_helpers.settings import GPU_RUN, Settings
from qlora_helpers.training.run_folder import new_run_folder
from qlora_helpers.training.trainer import build_trainer

# %%
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PrinterCallback, Qwen3MoeConfig
from transformers.utils import logging

GB, GIB = 10**9, 2**30
print("torch", torch.__version__.split("+")[0])

# %% [markdown]
# ## A run that was measured
#
# Each row of our table is a real training run on a GPU: TRL, PEFT and bitsandbytes as they are, four steps on full
# sequences. We take the row that many tutorials are about: 8B, four sequences of 2,048 tokens, rank 16.

# %% tags=["nbval-check-output"]
measured = json.loads(data_path("measured", "memory.json").read_text(encoding="utf-8"))
rows = {row["label"]: row for row in measured["rows"]}
row = rows["llama-3.1-8b qlora bf16 r16 4x2048 ckpt paged_adamw_8bit"]
print(f"{len({r['model'] for r in rows.values()})} models, on one {measured['gpu']}; this run:")
loaded, peak = row["loaded_bytes"], row["peak_allocated_bytes"]
print(f"after loading {loaded / GB:.2f} GB, at the peak {peak / GB:.2f} GB")

# %% [markdown]
# So training adds almost as much as the model itself. Where does it come from?
#
# ## Weights
#
# Lesson 1's formula in three lines: linear layers in 4 bits with their scales, the rest in 16 bits.

# %% tags=["nbval-check-output"]
shape = find_shape("meta-llama/Llama-3.1-8B")
rest = shape.parameters - shape.linear_parameters
weights = shape.linear_parameters * (4 + 8 / 64 + 32 / (64 * 256)) / 8 + rest * 2
check("weights by hand, in GB, against the measured ones", weights / GB, loaded / GB, rel=0.005)

# %% [markdown]
# ## What is trained
#
# Only the [adapters](../GLOSSARY.md#adapter) are trained. Plain TRL makes those of a 4-bit model bfloat16: 2 bytes for each
# number, and 2 for its gradient. The optimizer remembers two things about each number, the
# [optimizer states](../GLOSSARY.md#optimizer-states). In 8 bits they take one byte each, and a float32 scale per block of 256.

# %% tags=["nbval-check-output"]
sides = [side for linear in shape.linears for side in (linear.in_features, linear.out_features)]
sizes = [16 * side for side in sides]  # LoRA's A and B of each linear layer, at rank 16
trained = shape.num_hidden_layers * sum(sizes)
adapters, gradients = 2 * trained, 2 * trained
states, scales = 2 * trained, 2 * 4 * trained / 256
print(f"{trained:,} numbers: adapters {adapters / 1e6:.1f} MB, gradients the same")
print(f"states {states / 1e6:.1f} MB")

# %% [markdown]
# Lesson 1 counted the same numbers: they are 0.52 % of the model's, so all that is trained is small. A
# [paged optimizer](../GLOSSARY.md#paged-optimizer) may even move its states to main memory when the card is full. That cannot save
# much: nothing else is paged, and of the states only those of large tensors.

# %% tags=["nbval-check-output"]
share = sum(size for size in sizes if size >= 100_000) / sum(sizes)
on_gpu = (1 - share) * states + scales
print(f"paged: tensors of at least {100_000:,} numbers, {share:.1%} of the states")
print(f"that is {share * states / 1e6:.1f} MB of a run of {peak / 1e6:,.0f} MB")
check("share of the peak that paging could move", share * states / peak, at_most=0.01)

# %% [markdown]
# ## Activations
#
# The rest is [activations](../GLOSSARY.md#activations): what the forward pass computes and the backward pass will need. With
# [gradient checkpointing](../GLOSSARY.md#gradient-checkpointing) each layer keeps its input only. On the way back, one layer at
# a time is computed again.

# %%
plots.show(diagrams.checkpointing(), "5.1")

# %% [markdown]
# The inputs are `hidden_size` numbers of 2 bytes for every token, in each layer:

# %% tags=["nbval-check-output"]
tokens = row["batch_size"] * row["max_length"]
checkpoints = shape.num_hidden_layers * tokens * shape.hidden_size * 2
print(f"{tokens:,} tokens: {checkpoints / GB:.2f} GB")

# %% [markdown]
# And the layer that is computed again keeps everything that its gradients need. That follows from what a layer does, with
# dropout and 16-bit numbers. The 4-bit products themselves keep nothing: the backward pass decodes the weight once more.

# %% tags=["nbval-check-output"]
def kept_per_token(s, rank: int) -> int:
    """Bytes that one decoder layer keeps for one token."""
    h, i, kv = s.hidden_size, s.intermediate_size, s.key_value_width
    # before each adapter, the result and a mask of one byte: 6 adapters take h numbers, one takes i
    dropout = 3 * (6 * h + i)
    swiglu = 2 * 3 * i  # the MLP: the gate, its SiLU, the other branch
    norms = 2 * (4 * h + 4)  # both in float32
    # queries, result, keys, values; and a sum for each head
    attention = 2 * (2 * h + 2 * kv) + 4 * s.num_attention_heads
    return dropout + swiglu + norms + attention + 2 * 7 * rank


layer = tokens * kept_per_token(shape, 16)
print(f"{kept_per_token(shape, 16):,} bytes per token; for {tokens:,} tokens {layer / GB:.2f} GB")

# %% [markdown]
# So one layer at work takes as much as all the checkpoints. And what of the output? The [logits](../GLOSSARY.md#logits), a number
# for each token and each word of the vocabulary, would be the largest tensor of all. TRL does not make it: its output layer works
# on one piece after the other, a tile, and forgets each. Older guides and calculators still count it in full.

# %% tags=["nbval-check-output"]
tile = min(tokens, 4096) * 32_768 * 2
print(f"all logits in float32, once: {tokens * shape.vocab_size * 4 / GB:.2f} GB")
print(f"one tile of {min(tokens, 4096):,} tokens x {32_768:,} words in 16 bits: {tile / GB:.2f} GB")

# %% [markdown]
# ## The sum
#
# Two small terms are left: the one weight that is decoded to 16 bits at a time, and a workspace of cuBLAS, the library that
# multiplies. Then the point where hand sums go wrong: not everything is there at once. The peak is in the backward pass of the
# *last* layer. All checkpoints are there, the tile is gone, and no gradient of an adapter has come yet.

# %% tags=["nbval-check-output"]
decoded = max(linear.weights for linear in shape.linears) * 2
workspace = find_gpu("h200").workspace_bytes
fixed = weights + adapters + on_gpu + workspace
by_hand = fixed + checkpoints + max(layer + decoded, tile)
print(f"one decoded weight {decoded / GB:.2f} GB, workspace {workspace / GB:.2f} GB")
print(f"by hand {by_hand / GB:.2f} GB, measured {peak / GB:.2f} GB: {by_hand / peak - 1:+.1%}")
check("by hand, in GB", by_hand / GB, peak / GB, rel=0.06)

# %% [markdown]
# What the sum leaves out are the gradients that travel back through the layer, and the short-lived results of each operation.
#
# Without checkpointing all layers keep everything. Another row of the table did that, with a quarter of the tokens:

# %% tags=["nbval-check-output"]
without = rows["llama-3.1-8b qlora bf16 r16 2x1024 no-ckpt paged_adamw_8bit"]
all_layers = shape.num_hidden_layers * 2 * 1024 * kept_per_token(shape, 16)
total, its_peak = fixed + all_layers + 2 * 1024 * 32_768 * 2, without["peak_allocated_bytes"]
print(f"by hand {total / GB:.2f} GB, measured {its_peak / GB:.2f} GB")
check("without checkpointing, in GB", total / GB, its_peak / GB, rel=0.03)

# %% [markdown]
# ## Exercise 5.1: some layers checkpointed
#
# *Build · medium · about 10 minutes.* Between all layers and none lies a choice: checkpoint the first few, and let the others
# keep everything. How much do the activations of the layers take at most? Write it for `checkpointed` of `layers` layers,
# in bytes. `per_token` is what a layer keeps for a token, as above. Think about what is there at the same time: the backward
# pass begins with the last layer, and frees what it is done with.

# %% tags=["exercise"]
def activations(layers, checkpointed, tokens, hidden_size, per_token):
    return ...

# %% tags=["solution"]
def activations(layers, checkpointed, tokens, hidden_size, per_token):
    inputs = checkpointed * 2 * hidden_size
    # the others are there together; once a layer is computed again, they are gone
    in_full = max(layers - checkpointed, 1) * per_token
    return tokens * (inputs + in_full)

# %% tags=["nbval-check-output"]
exercises.activations.check(activations)

# %% [markdown]
# ## The predictor
#
# The course's predictor does this sum for you, with all that comes and goes in between (`qlora_helpers/memory`; the
# [README](../README.md) says how). Only what is alive at the peak counts. The paged states and the
# [CUDA context](../GLOSSARY.md#cuda-context), which the driver sets up for each process, lie outside of torch's memory and are
# not in its peak.

# %% tags=["nbval-check-output"]
# GPU_RUN: the settings with which a model of the Hub is usually trained on one GPU
settings = replace(
    GPU_RUN, batch_size=4, max_length=2048, rank=16, adapter_dtype="bfloat16",
    optimizer="paged_adamw_8bit",
)
prediction = predict(shape, settings, "h200")
parts = [[part, size / GB] for part, size in prediction.parts.items()]
show_table(["part", "GB"], parts, formats=["", ".2f"])
said = prediction.peak_allocated_bytes
print(f"peak at: {prediction.peak_phase}; {said / GB:.2f} GB, measured {peak / GB:.2f} GB")
check("peak, in GB", said / GB, peak / GB, rel=0.03)

# %% [markdown]
# One run proves little: it could be luck, or the predictor could have been fitted to it. So here are three groups of runs. By the
# first its few constants were chosen. The second was set aside for a test by a rule, before anything was measured. The third was
# measured after the predictor was finished, with other models and settings, and nothing was tuned since.

# %%
H200 = find_gpu("h200")


def predicted(measurement: dict):
    """The prediction for a measured run; some ran with the attention kernels of a T4."""
    names = [field.name for field in fields(Settings) if field.name in measurement]
    settings = Settings(**{name: measurement[name] for name in names})
    card = replace(H200, compute_capability=(7, 5)) if measurement.get("t4_kernels") else H200
    return predict(find_shape(measurement["config"]), settings, card)


fresh = json.loads(data_path("measured", "memory_fresh.json").read_text(encoding="utf-8"))
groups = {
    "constants chosen by these": [r for r in rows.values() if not r["held_out"]],
    "set aside": [r for r in rows.values() if r["held_out"]],
    "measured afterwards": fresh["rows"],
}
pairs = {name: [(r, predicted(r)) for r in group] for name, group in groups.items()}

# %%
fig, ax = plots.figure(figsize=(7.2, 4.4))
colours = {"qlora": plots.BLUE, "lora": plots.ORANGE, "full": plots.GREEN}
for name, marker in zip(pairs, "o^s"):
    for method, colour in colours.items():
        chosen = [(r, p) for r, p in pairs[name] if r["method"] == method]
        seen = [r["peak_allocated_bytes"] / GB for r, _ in chosen]
        said = [p.peak_allocated_bytes / GB for _, p in chosen]
        how = dict(marker=marker, edgecolors=colour, facecolors="none", linewidths=1.3, zorder=3)
        ax.scatter(seen, said, s=30, **how)
    ax.scatter([], [], marker=marker, edgecolors="#555555", facecolors="none", label=name)
for method, colour in colours.items():
    ax.plot([], [], color=colour, linewidth=5, label=method)
ax.plot([0.8, 60], [0.8, 60], color="#888888", linewidth=1)
ax.set(xscale="log", yscale="log", xlabel="measured peak (GB)", ylabel="predicted peak (GB)")
ticks = [1, 2, 5, 10, 20, 50]
ax.set_xticks(ticks, labels=ticks)
ax.set_yticks(ticks, labels=ticks)
ax.set_title("From 1 to 44 GB, the predictions lie on the diagonal")
ax.legend(fontsize=9)
plots.show(fig, "5.2")

# %% [markdown]
# The card must hold more than torch's tensors: memory that torch has reserved and cannot fill, the CUDA context, paged states.
# All of it together, what the process takes on the card, is harder to predict:

# %% tags=["nbval-check-output"]
def errors(group, part: str, of_the_run: str) -> list[float]:
    """How far off each prediction is; runs without this figure are left out."""
    return [abs(getattr(p, part) / r[of_the_run] - 1) for r, p in group if r[of_the_run]]


tensors, card = "peak_allocated_bytes", ("device_bytes", "device_used_bytes")
for what, names, most in (("tensors", (tensors, tensors), 0.03), ("on the card", card, 0.06)):
    off = {name: errors(group, *names) for name, group in pairs.items()}
    table = [[name, len(some), sum(some) / len(some), max(some)] for name, some in off.items()]
    show_table([what, "runs", "off by", "at worst"], table, formats=["", "d", ".1%", ".1%"])
    check("largest mean error", max(mean for _, _, mean, _ in table), at_most=most)

# %% [markdown]
# Where it is wrong, it is more often too low than too high. So leave a GiB or a tenth free, whichever is more.
#
# Eight families of models are written out in the predictor. For any other that the installed transformers can build, it lets the
# libraries run a training step on tensors that have a shape and no values, and notes what they take. That takes seconds instead
# of milliseconds:

# %% tags=["nbval-check-output"]
others = json.loads(data_path("measured", "memory_families.json").read_text(encoding="utf-8"))
for model in ("gemma-3-4b-text", "qwen3-30b-a3b"):
    run = next(r for r in others["rows"] if r["model"] == model and r["method"] == "qlora")
    p = predicted(run)
    said, seen = p.peak_allocated_bytes / GB, run["peak_allocated_bytes"] / GB
    print(f"{model}, by the {p.road}: {said:.1f} GB")
    check("peak, in GB, against the measured one", said, seen, rel=0.02)

# %% [markdown]
# ## What each setting costs
#
# Now change one setting of the run at a time, on a card of 24 GiB. Guess first: which three of these cost the most?

# %%
knobs = {
    "rank 64": {"rank": 64},
    "float32 adapters": {"adapter_dtype": "float32"},
    "states not paged": {"optimizer": "adamw_8bit"},
    "states in 32 bits": {"optimizer": "paged_adamw_32bit"},
    "no double quantisation": {"double_quant": False},
    "float32 copies": {"upcast_fp32": True},
    "8 sequences": {"batch_size": 8},
    "4,096 tokens": {"max_length": 4096},
    "math attention": {"attention": "math"},
    "16-bit base (LoRA)": {"method": "lora"},
    "no checkpointing": {"gradient_checkpointing": False},
}

# %% tags=["nbval-check-output"]
base = predict(shape, settings, "4090")
runs = {name: replace(settings, **knob) for name, knob in knobs.items()}
changed = {name: predict(shape, run, "4090").device_bytes for name, run in runs.items()}
table = [["the run as it is", base.device_bytes / GIB, 0.0]]
table += [[name, size / GIB, (size - base.device_bytes) / GIB] for name, size in changed.items()]
show_table(["change", "GiB on the card", "more"], table, formats=["", ".2f", "+.2f"])

# %%
fig, ax = plots.figure(figsize=(7.2, 3.8))
needs = {name: need for name, need, _ in table}
room = find_gpu("4090").usable_bytes / GIB
colours = [plots.RED if need > room else plots.BLUE for need in needs.values()]
ax.barh(list(needs), list(needs.values()), color=colours)
ax.axvline(room, color="black", linestyle="--")
ax.text(room, 0, f" RTX 4090: {room:.2f} GiB", va="center")
ax.invert_yaxis()
ax.grid(axis="y", visible=False)
ax.set_xlabel("GiB on the card")
ax.set_title("What the run computes on costs more than what it trains")
plots.show(fig, "5.3")

# %% [markdown]
# Rank and optimizer, which tutorials discuss at length, are among the cheapest. (Paging even costs a little: the driver gives
# out such memory in pieces of 128 MiB, and counts a started piece in full.) The float32 copies are what
# `prepare_model_for_kbit_training` makes, a line of many tutorials: norms, embeddings and output layer in float32, and with them
# everything that flows between the layers. This course trains without them (lesson 4). Twice the sequences and twice the tokens
# cost the same, since only their product counts, unless the attention is "math".
#
# ## The sequence: a straight line or a parabola
#
# Attention compares each token with all before it. Does memory grow with the square of the sequence? That depends on the
# [kernel](../GLOSSARY.md#kernel), the program that computes it on the GPU. Lesson 1 measured a straight line: FlashAttention and
# the memory-efficient kernel, called fused, never store the matrix of scores. Torch's math kernel does, for every head. On a T4
# without FlashAttention, plain transformers has only that one for a model with
# [grouped-query attention](../GLOSSARY.md#grouped-query-attention); this course's `t4` gear makes do with a fused one (lesson 4).
# Both were measured on Llama-3.2-1B:

# %% tags=["nbval-check-output"]
lengths = (512, 1024, 2048, 4096)
label = "llama-3.2-1b qlora bf16 r16 1x{} ckpt adamw_torch_fused float32-adapters{}"
one_billion = find_shape("meta-llama/Llama-3.2-1B")
table = []
for length in lengths:
    both = [rows[label.format(length, kernel)] for kernel in ("", " math")]
    pair = [(r["peak_allocated_bytes"] / GB, predicted(r).peak_allocated_bytes / GB) for r in both]
    table.append([length, *pair[0], *pair[1]])
print("Llama-3.2-1B, peak in GB")
header = ["tokens", "fused kernel", "predicted", "math kernel", "predicted"]
show_table(header, table, formats=[",d", ".2f", ".2f", ".2f", ".2f"])

# %%
fig, ax = plots.figure()
grid = range(256, 4097, 128)
kernels = (("", "sdpa", plots.BLUE, "fused"), (" math", "math", plots.RED, "math"))
for kernel, attention, colour, name in kernels:
    peaks = [rows[label.format(length, kernel)]["peak_allocated_bytes"] / GB for length in lengths]
    run = replace(GPU_RUN, optimizer="adamw_torch_fused", attention=attention)
    curve = [predict(one_billion, replace(run, max_length=n)) for n in grid]
    line = [p.peak_allocated_bytes / GB for p in curve]
    ax.plot(grid, line, color=colour, label=f"{name} kernel, predicted")
    ax.plot(lengths, peaks, "o", color=colour, label=f"{name} kernel, measured")
ax.set_xticks(lengths, labels=[f"{length:,}" for length in lengths])
ax.set(xlabel="tokens in the sequence", ylabel="peak (GB)", ylim=(0, None))
ax.set_title("Linear with a fused kernel, quadratic with math")
ax.legend()
plots.show(fig, "5.4")

# %% [markdown]
# ## Exercise 5.2: a cheap gibibyte
#
# *Predict · medium · about 5 minutes.* The run of Llama-3.1-8B above, four chats of 2,048 tokens, just misses your card. Which of
# these saves the most? `"rank 4"`, `"no dropout"`, `"8 chats of 1,024 tokens"` or `"states not paged"`. Decide with the terms of
# the sum; then you may ask the predictor.

# %% tags=["exercise"]
saves_most = ...

# %% tags=["solution"]
saves_most = "no dropout"  # it keeps a result and a mask before each adapter, for every token

# %% tags=["nbval-check-output"]
exercises.saves_most.check(saves_most)

# %% [markdown]
# ## Batch size and accumulation
#
# A step learns from several chats. They need not go through the model at once: with
# [gradient accumulation](../GLOSSARY.md#gradient-accumulation) they go in parts, and their gradients are added up. So the memory
# is that of a part, and what is learnt is that of the step. `suggest` asks the predictor for the largest part that fits:

# %% tags=["nbval-check-output"]
table = []
for gpu, dtype in (("4090", "bfloat16"), ("t4", "float16")):
    for max_length in (512, 1024, 2048, 4096, 8192):
        run = replace(GPU_RUN, max_length=max_length, compute_dtype=dtype)
        found = suggest(shape, gpu, run, effective_batch=16)
        need = found.prediction.device_bytes / GIB
        table.append([gpu, max_length, found.batch_size, found.accumulation, need])
header = ["GPU", "tokens", "batch", "accumulation", "GiB"]
show_table(header, table, formats=["", ",d", "d", "d", ".1f"])

# %% [markdown]
# The product stays 16, so training sees the same batches. A larger batch is faster, until the GPU is busy all the time. Rules
# that suggest a batch from the card and the model alone cannot be right: the length of the chats decides.
#
# ## What fits where
#
# QLoRA at rank 16, one sequence of 512 tokens: the least that still trains. ✓ fits, ✗ does not, and ? means within 1
# GiB of the limit, too close to promise.

# %% tags=["nbval-check-output"]
def verdict(p) -> str:
    return "?" if abs(p.spare_bytes) < GIB else "✓" if p.fits else "✗"


names = [
    "Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-1.5B", "EleutherAI/gpt-j-6b", "Qwen/Qwen2.5-7B",
    "meta-llama/Llama-3.1-8B", "meta-llama/Llama-2-13b-hf", "Qwen/Qwen2.5-14B",
    "EleutherAI/gpt-neox-20b", "huggyllama/llama-30b", "Qwen/Qwen2.5-32B", "huggyllama/llama-65b",
    "meta-llama/Llama-3.1-70B",
]
gpus = ["3060-12", "t4", "4090", "a100-40", "l40s", "a100-80", "h200"]
least = replace(GPU_RUN, max_length=512)
table = [["usable", "", *(find_gpu(gpu).usable_bytes / GIB for gpu in gpus)]]
for model, predictions in what_fits(names, gpus, least):
    need = predictions[gpus.index("l40s")].device_bytes / GIB
    table.append([model.name, need, *map(verdict, predictions)])
show_table(["model", "GiB", *gpus], table, formats=["", *[".1f"] * (1 + len(gpus))])

# %% [markdown]
# So 8B on a free T4 is true, and so is 20B on 24 GB. 70B on one consumer GPU, as an article's title promises, is not: its 4-bit
# weights alone are larger than the card. (Main memory and several cards are another matter: [lesson 12](12_past_one_gpu.ipynb).)
# And this is the least. With four sequences of 2,048 tokens and float32 copies, as in
# many recipes, 8B took 17.17 GiB above, which is more than a T4 has. What else the articles behind this course say about sizes
# is judged in [CLAIMS.md](../CLAIMS.md).
#
# Does the T4 keep that promise? Nobody here had one, but an H200 was limited to 14.3 GiB and to the kernels of a T4
# (`data/measured/t4_gear.json`). These runs are not in the table of runs above.

# %% tags=["nbval-check-output"]
gear = json.loads(data_path("measured", "t4_gear.json").read_text(encoding="utf-8"))
wanted = {"what": "training", "model": "Llama-3.1-8B", "who": "ours", "gear": "t4", "batch_size": 1}
table = []
for r in (r for r in gear["rows"] if wanted.items() <= r.items()):
    p = predict(shape, replace(GPU_RUN, max_length=r["tokens"], compute_dtype="float16"), "t4")
    result = r["peak_allocated_bytes"] / GIB if r["outcome"] == "ran" else r["outcome"]
    table.append([r["tokens"], result, p.peak_allocated_bytes / GIB, verdict(p)])
print(f"Llama-3.1-8B, batch 1, under a cap of {gear['cap_bytes'] / GIB:.1f} GiB")
header = ["tokens", "measured, GiB", "predicted", "fits"]
show_table(header, table, formats=[",d", ".2f", ".2f", ""])

# %% [markdown]
# ### Main memory and disk
#
# A model must also be loaded. Today's files (safetensors) are read tensor by tensor, and each goes to the GPU and is quantised
# there: main memory must hold one tensor at a time, the disk all of them. An older file of pickled tensors is read as a whole,
# often 10 GB in one piece, and has crashed free Colabs.

# %% tags=["nbval-check-output"]
COLAB = 12.7  # GB of main memory on a free Colab, as its users report
print(f"a free Colab has {COLAB} GB of main memory")
table = []
for name in ("gpt-j-6b", "Llama-3.1-8B", "gpt-neox-20b", "Llama-3.1-70B"):
    p = predict(find_shape(name), least)
    table.append([name, p.host_bytes_to_load / GB, p.disk_bytes / GB])
show_table(["model", "GB to load it", "GB of disk"], table, formats=["", ".2f", ".2f"])
loading = next(r for r in gear["rows"] if r["what"] == "loading")
own, disk = loading["host_own_bytes"] / GB, loading["disk_bytes"] / GB
print(f"measured, 8B: {own:.2f} GB with Python and its libraries, {disk:.2f} GB of disk")

# %% [markdown]
# ## Try it
#
# Run the cell, then move the sliders. Settings that a model does not allow are refused with the reason.

# %%
fit_explorer()

# %% [markdown]
# The same in a terminal, for any model by its name or its `config.json`. It also says what would help a run that does
# not fit:

# %% tags=["nbval-check-output"]
from qlora_helpers.__main__ import main

# in a terminal: python -m qlora_helpers memory Qwen/Qwen2.5-7B --gpu t4 --max-length 2048
code = main("memory Qwen/Qwen2.5-7B --gpu t4 --max-length 2048".split())

# %% [markdown]
# ## Measure your own run
#
# Trust, but check. A callback watches a run phase by phase, and `settings_of` reads the settings for the predictor off the trainer.
# Here it watches three steps of the shipped model. Without a GPU only main memory is measured; with one, each predicted figure
# has the measured one beside it, and a difference over 10 % is marked.

# %%
measurement = Measurement()
with measurement.phase("load"):
    model = load_model()
chats = read_chats(data_path("chats", "train.jsonl"))
folder = new_run_folder("lesson-05")
trainer = build_trainer(model, load_tokenizer(), chats, folder, Settings(steps=3), detect())
trainer.remove_callback(PrinterCallback)
trainer.add_callback(MemoryCallback(measurement))
_ = trainer.train()
print(compare(predict(shape_of(trainer), settings_of(trainer), "t4"), measurement))

# %% [markdown]
# ## "4-bit" that is not
#
# All of this takes for granted that the weights are in 4 bits. But `load_in_4bit=True` is a request: each layer that is an
# `nn.Linear` is replaced, and not a word is said about the rest. In a
# [mixture of experts](../GLOSSARY.md#mixture-of-experts) nearly all weights are those of the experts, and transformers keeps
# them as one parameter with a dimension for the expert, which is no `nn.Linear`. Here is a tiny mixture, built on the spot and
# loaded as tutorials do it:

# %% tags=["nbval-check-output"]
logging.disable_progress_bar()
config = Qwen3MoeConfig(
    vocab_size=1000, hidden_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, num_experts=16, moe_intermediate_size=128,
    bos_token_id=0, eos_token_id=1,
)
folder = new_run_folder("lesson-05-mixture")
AutoModelForCausalLM.from_config(config).save_pretrained(folder)
four_bit = BitsAndBytesConfig(load_in_4bit=True)
mixture = AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.bfloat16, device_map="cpu", quantization_config=four_bit
)
print(in_4_bits(mixture, "the tiny mixture"))

# %% [markdown]
# Which layers come in 4 bits follows from the model's config, so it can be known before anything is downloaded:

# %% tags=["nbval-check-output"]
plan = planned_4_bits(config, double_quant=False)
planned, loaded = plan.total_bytes, in_4_bits(mixture).total_bytes
check("bytes of the tiny mixture, planned and loaded", planned, loaded, exact=True)

qwen3_30b_a3b = dict(
    model_type="qwen3_moe", vocab_size=151_936, hidden_size=2048, num_hidden_layers=48,
    num_attention_heads=32, num_key_value_heads=4, head_dim=128,
    num_experts=128, moe_intermediate_size=768,
)
plan = planned_4_bits(qwen3_30b_a3b)
size, promised = plan.total_bytes / GIB, plan.bytes_if_in_4_bits / GIB
check('Qwen3-30B-A3B "in 4 bits", in GiB, against the measured size', size, 55.6, rel=0.005)
print(f"in 4 bits: {plan.bytes_in_4_bits / GIB:.2f} GiB of it")
print(f"with all its matrices in 4 bits it would take {promised:.1f} GiB")

# %% [markdown]
# So a long download would end in a model of several times the size that its name promises. `load_model` asks the config
# first, and refuses. On a CPU, where what is not in 4 bits is float32, it would be larger still:

# %% tags=["nbval-check-output"]
try:
    load_model(str(folder), hardware=detect("cpu"))
except ValueError as error:
    print(str(error).replace(str(folder), "the tiny mixture").replace(". ", ".\n"))

# %% [markdown]
# In a terminal, `python -m qlora_helpers doctor --model` prints this table for a folder, a `config.json` or a known name.
#
# ## What the predictor does not know
#
# - Its few constants were measured on one H200 with one version of each library. The CUDA context of other cards was
#   not measured; it is taken to be as large.
# - It predicts full sequences. A batch of shorter ones needs less.
# - A model whose code is not in transformers but beside its weights (`trust_remote_code`) cannot be predicted.
# - Other libraries, such as Unsloth or Liger, need less. It knows TRL, PEFT and bitsandbytes only.
# - A desktop that draws on the same card takes its share, too.
#
# So try the real run for a few steps before you go to bed.
#
# ## Exercise 5.3: make it fit
#
# *Run · medium · about 10 minutes.* You want to fine-tune Qwen2.5-14B on an RTX 4090: 16 chats a step of up to 4,096 tokens, at
# rank 64 with a dropout of 0.05. These settings come from a tutorial:

# %%
target = find_shape("Qwen/Qwen2.5-14B")
tutorial = Settings(
    batch_size=8, accumulation=2, max_length=4096, rank=64, alpha=128, dropout=0.05,
    gradient_checkpointing=True, upcast_fp32=True, optimizer="adamw_torch",
    compute_dtype="bfloat16",
)
p = predict(target, tutorial, "4090")
print(f"{p.device_bytes / GIB:,.0f} GiB, and the card has {p.gpu.usable_bytes / GIB:.1f}")

# %% [markdown]
# Write settings that fit with at least 1 GiB to spare, and learn the same: chats, tokens, rank, alpha and dropout stay. A step may
# take at most 8 passes through the model.

# %% tags=["exercise"]
mine = ...

# %% tags=["solution"]
mine = replace(
    tutorial, batch_size=2, accumulation=8, upcast_fp32=False, optimizer="paged_adamw_8bit"
)

# %% tags=["nbval-check-output"]
exercises.make_it_fit.check(mine, tutorial=tutorial)

# %% [markdown]
# ## Exercise 5.4: which setting was it?
#
# *Run · hard · about 15 minutes.* A run of Qwen2.5-1.5B, meant for a T4, took half as much again as was predicted from what its
# owner said of it:

# %%
claimed, its_peak = exercises.a_strange_run()
small = find_shape("Qwen/Qwen2.5-1.5B")
expected = predict(small, claimed, "h200").peak_allocated_bytes
print(f"{claimed.batch_size} x {claimed.max_length:,} tokens, rank {claimed.rank}")
print(f"predicted {expected / GIB:.2f} GiB, measured {its_peak / GIB:.2f} GiB")

# %% [markdown]
# The owner is sure of model, chats, tokens and rank. One other setting was not as in `claimed`. It may be
# `gradient_checkpointing`, `dropout`, `attention`, `upcast_fp32`, `adapter_dtype`, `optimizer` or `double_quant`;
# `help(Settings)` says what each can be. Find the change that explains the measured peak to within 3 %, and write it as a
# dictionary, such as `{"dropout": 0.1}`.

# %% tags=["exercise"]
cause = ...

# %% tags=["solution"]
# the extra is too much for an optimizer and too little for all activations: what flows between layers was wider
cause = {"upcast_fp32": True}

# %% tags=["nbval-check-output"]
exercises.which_setting.check(cause)

# %% [markdown]
# ## You have
# - added up a run of Llama-3.1-8B by hand, and missed the measured peak by a few per cent;
# - let a predictor do the sum, and seen it hold for 100 measured runs, also for those measured afterwards;
# - seen that tokens, checkpointing, float32 copies and the attention kernel decide, and rank and optimizer hardly matter;
# - chosen batch size and accumulation by sequence length and card, and seen that 8B fits a T4, and 70B no single consumer GPU;
# - measured a run of your own;
# - met a model that is called 4-bit and is not, and seen why.
#
# Next: [lesson 6](06_adapters_and_merging.ipynb) looks at the file that a run leaves behind, and at what can be done with it.
