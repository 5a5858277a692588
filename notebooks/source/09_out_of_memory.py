# %% [markdown]
# # 9 · Out of memory
#
# You will
# - see where memory goes within one training step, on this machine and as recorded on a large GPU;
# - read every number of an out-of-memory message, and find out from its traceback where a run died;
# - go from that place to the cheapest cure, with its price predicted and measured;
# - compute what paging can save, and what it cannot;
# - test advice that is often given: shorter sequences, `empty_cache()`, paged optimizers.
#
# Takes about {{seconds}} seconds and {{gigabytes}} GB of memory on two processor cores. No GPU is needed: runs were
# made to die on one, an H200, and `data/measured/oom.json` has what they said.

# %%
import json
import textwrap
from dataclasses import fields, replace

from qlora_helpers.chats import read_chats
from qlora_helpers.course import plots
from qlora_helpers.course.checks import check, exercise
from qlora_helpers.hardware import detect
from qlora_helpers.memory import cures, find_gpu, find_shape, predict, predict_merge
from qlora_helpers.memory.out_of_memory import place_of, read_message
from qlora_helpers.memory.phases import IN_A_STEP
from qlora_helpers.memory.timeline import Timeline, record_step
from qlora_helpers.models.loading import load_model, load_tokenizer
from qlora_helpers.paths import data_path
from qlora_helpers.settings import GPU_RUN, Settings
from qlora_helpers.training.run_folder import new_run_folder
from qlora_helpers.training.trainer import build_trainer

import torch
from transformers import PrinterCallback

GIB, MIB = 2**30, 2**20
hardware = detect()
print("torch", torch.__version__.split("+")[0])

# %% [markdown]
# ## One step, on this machine
#
# A step has four phases: **forward** through the decoder, the **loss** in the output head, **backward**, and the
# **optimizer step**. `record_step` trains, and notes during the last step how many bytes lie in tensors at each moment.
# On a GPU it asks the history that torch's allocator keeps. On a CPU torch keeps none; there every tensor is counted
# from the operation that makes it until it is freed.

# %%
chats = read_chats(data_path("chats", "train.jsonl"))[:64]
live = {}
for name, checkpointing in (("with checkpointing", True), ("without", False)):
    settings = Settings(steps=2, gradient_checkpointing=checkpointing)
    trainer = build_trainer(load_model(), load_tokenizer(), chats, new_run_folder("lesson-09"), settings, hardware)
    trainer.remove_callback(PrinterCallback)
    live[name] = record_step(trainer)

# %%
fig, axes = plots.figure(1, 2, figsize=(7.2, 3.4), sharey=True)
for ax, (name, line) in zip(axes, live.items()):
    plots.memory_timeline(ax, line.thinned(300), MIB)
    ax.set_title(name, fontsize=10, fontweight="normal")
axes[0].set(ylabel="MiB in tensors", ylim=(0, None))
axes[0].legend(fontsize=9)
fig.suptitle("One step of the shipped model: the output head is its mountain", x=0.01, ha="left", fontsize=12, fontweight="bold")
plots.show(fig, "Memory of one training step of the shipped model against time, in two panels. With gradient checkpointing the forward pass stays flat and the backward pass shows one hump for each of four layers; without it memory climbs through the forward pass and falls through the backward pass. In both a tower stands in the middle, the loss and the beginning of the backward pass.")

# %% [markdown]
# Without checkpointing memory climbs through the forward pass, since each layer keeps what its gradients need, and falls
# again on the way back. With it the climb is gone, and on the way back each of the four layers is computed again: four
# humps, and a longer step. The tower is the output head: it works on tiles of 32,768 words, and this model is so small
# that one tile is larger than all the rest.

# %% tags=["nbval-check-output"]
most = {name: {phase: line.most_in(phase) for phase in IN_A_STEP} for name, line in live.items()}
saved = most["with checkpointing"]["forward"] / most["without"]["forward"]
if hardware.gear == "cpu":
    check("forward pass with checkpointing, as a share of without", saved, at_most=0.6)
else:  # the libraries' own workspace is in both
    print(f"forward pass with checkpointing, as a share of without: {saved:.0%}")
check("phases in order", [name for name, _ in live["without"].marks][-4:], list(IN_A_STEP), exact=True)

# %% [markdown]
# ## One step of 8B
#
# The same was recorded for Llama-3.1-8B in its real shape, from the allocator's history: one sequence of 2,048 tokens with
# and without checkpointing, and one of 512 tokens at rank 256 with torch's own AdamW.

# %%
recorded = json.loads(data_path("measured", "oom.json").read_text())
rows = {row["label"]: row for row in recorded["rows"]}
shape = find_shape("meta-llama/Llama-3.1-8B")


def settings_of(row: dict) -> Settings:
    """The settings of a recorded run."""
    return Settings(**{field.name: row[field.name] for field in fields(Settings) if field.name in row})

# %%
steps = {name: rows[f"timeline: {name}"] for name in ("checkpointing", "no checkpointing", "rank 256, adamw_torch")}
fig, axes = plots.figure(3, 1, figsize=(7.2, 6.6))
for ax, (name, row) in zip(axes, steps.items()):
    plots.memory_timeline(ax, Timeline.from_json(row["timeline"]), GIB)
    ax.axhline(row["loaded_bytes"] / GIB, color="black", linewidth=0.8, linestyle=":")
    ax.set_title(f"{row['batch_size']} x {row['max_length']:,} tokens, {name}", fontsize=10, fontweight="normal")
    ax.set_ylabel("GiB")
axes[1].legend(fontsize=9)
axes[2].set_xlabel("seconds within the step")
fig.suptitle("Three runs, three places for the peak", x=0.01, ha="left", fontsize=12, fontweight="bold")
plots.show(fig, "Memory of one step of Llama-3.1-8B against time for three runs, each above a dotted line at the 5.3 GiB of the loaded model. With checkpointing the peak is at the beginning of the backward pass; without it where forward ends and backward begins, at more than three times as much; at rank 256 with AdamW it is in the optimizer step.")

# %% [markdown]
# The dotted line is the loaded model. What stands above it decides where a run dies: a run dies where its mountain first
# reaches the limit, which need not be the top. The predictor of lesson 5 knows these phases, too:

# %% tags=["nbval-check-output"]
print(f"{'GiB, predicted / measured':26}{'to the loss':>16}{'backward':>16}{'optimizer step':>16}")
for name, row in steps.items():
    phases, line = predict(shape, settings_of(row)).phases, Timeline.from_json(row["timeline"])
    said = [phases["loss"], max(size for phase, size in phases.items() if "backward" in phase), phases["optimizer step"]]
    seen = [max(line.most_in("forward"), line.most_in("loss")), line.most_in("backward"), line.most_in("optimizer step")]
    print(f"{name:26}" + "".join(f"{p / GIB:9.2f} /{m / GIB:5.2f}" for p, m in zip(said, seen)))
    check("largest error of a phase", max(abs(p / m - 1) for p, m in zip(said, seen)), at_most=0.02)

# %% [markdown]
# ## The message
#
# A cap makes a large card small: `torch.cuda.set_per_process_memory_fraction` limits what torch may hold, and a run that
# reaches it fails as on a card of that size, with no harm to anybody else on the machine. Here are four sequences of 2,048
# tokens without checkpointing, under a cap. With a GPU you can provoke one yourself:

# %%
def provoke(limit: int) -> str:
    """The message of a harmless out-of-memory error: torch may hold `limit` bytes, and is asked for more."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + limit) / total)
    try:
        kept = [torch.empty(limit // 4, dtype=torch.int8, device="cuda") for _ in range(5)]
        return f"no error, {len(kept)} tensors"
    except torch.OutOfMemoryError as error:
        return str(error)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


if hardware.device == "cuda":
    print(read_message(provoke(GIB)))
else:
    print("No GPU here: the recorded message follows.")

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
# | is free | what nobody has taken of the card. Under a cap it may be plenty, and no use |
# | this process has | what it has taken of the card, with its CUDA context; other processes have lines of their own |
# | allowed | the cap; without one these words are not there |
# | allocated by PyTorch | what lies in tensors |
# | reserved but unallocated | what torch holds in holes too small for the request |
#
# `read_message` reads them, and says how much was missing for this request:

# %% tags=["nbval-check-output"]
message = read_message(death["message"])
print(message)
check("held and asked for, less what torch may hold: more than nothing", message.missing_bytes, at_least=1)
check("holes, as a share of what torch holds", message.unallocated_bytes / message.reserved_bytes, at_most=0.1)

# %% [markdown]
# Only a few MiB were missing, it seems. But the run was not at its peak yet. How much it really needs, only a prediction or
# the same run without a cap can tell:

# %% tags=["nbval-check-output"]
needs = predict(shape, settings_of(death)).peak_reserved_bytes
without_cap = rows["forward: price"]["peak_reserved_bytes"]
print(f"cap {death['cap_bytes'] / GIB:.0f} GiB; needed: predicted {needs / GIB:.1f} GiB, measured {without_cap / GIB:.1f} GiB")
check("predicted, in GiB", needs / GIB, without_cap / GIB, rel=0.03)

# %% [markdown]
# ## Where did it die?
#
# The traceback under the message is long, but a few functions in it tell the place: `from_pretrained`, `compute_loss`,
# `backward`, `step`, `evaluate`. The outermost of them decides, since a layer that is computed again for its gradients is
# part of the backward pass. `place_of` looks for them, in a caught error or in a pasted traceback.
#
# No machine has 2⁵⁰ bytes. So a layer that asks for as much gives a real out-of-memory error, on a CPU, too:

# %% tags=["nbval-check-output"]
def die(*_) -> None:
    torch.empty(2**50, dtype=torch.int8, device=hardware.device)


def killed_run(where: str):
    model = load_model()
    settings = Settings(steps=1, gradient_checkpointing=True)
    trainer = build_trainer(model, load_tokenizer(), chats, new_run_folder("lesson-09"), settings, hardware)
    layer = trainer.model.get_base_model().model.layers[0]
    layer.register_forward_hook(die) if where == "forward" else layer.register_full_backward_hook(die)
    try:
        trainer.train()
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        return place_of(error)


for where in ("forward", "backward"):
    check(f"a run made to die on its way {where}, by its traceback", killed_run(where), where, exact=True)

# %% [markdown]
# On the H200 runs were made to die under a cap in every place but one (saving, see below), and both the phase that the script was in and the
# traceback were kept.

# %% tags=["nbval-check-output"]
deaths = {label: row for label, row in rows.items() if row["outcome"] == "out of memory" and row["role"] == "death"}
for label, row in deaths.items():
    asked = read_message(row["message"]).asked_bytes
    print(f"{label:42}cap {row['cap_bytes'] / GIB:4.1f} GiB, asked for {asked / MIB:8,.1f} MiB in: {row['place']}")
same = sum(row["place"] == row["place_by_traceback"] for row in deaths.values())
check("places that the traceback tells right", same, len(deaths), exact=True)

# %% [markdown]
# Two of them are worth a second look. A load dies with its first request: transformers asks for all weights in one piece
# before it reads the first, so nothing is wasted on a load that cannot end well. And the run with `float32 copies` was
# meant to die in the backward pass, where its tensors pass the cap. It died before, in the forward pass: what counts is
# what torch *holds*, and there it held more than a GiB in holes.

# %% tags=["nbval-check-output"]
print("first request of the load:", f"{read_message(rows['load: death']['message']).asked_bytes / GIB:.2f} GiB")
copies = read_message(rows["float32 copies: death"]["message"])
print(f"float32 copies: {copies.allocated_bytes / GIB:.2f} GiB in tensors, {copies.unallocated_bytes / GIB:.2f} GiB in holes")
said = predict(shape, settings_of(rows["float32 copies: death"])).phases
check("GiB predicted until the loss, in tensors", said["loss"] / GIB, at_most=rows["float32 copies: death"]["cap_bytes"] / GIB)

# %% [markdown]
# ## From the place to the cure
#
# The place says what is too large, and so what to change first:
#
# - **load**: the weights. Load in 4 bits; there is no cure in the training settings.
# - **forward** or **loss**: what the layers keep. Checkpointing; an attention kernel that stores no matrix; no float32
#   copies.
# - **backward**: the layer at work. Fewer sequences at a time, with accumulation; fewer tokens.
# - **optimizer step**: states, gradients, adapters. States in 8 bits; a lower rank.
#
# Which of them is the cheapest that is *enough* depends on the limit. `cures` of lesson 5 asks the predictor. The cap
# becomes a card on which torch may hold as much:

# %%
def card_of(row: dict):
    """The H200, as small as the row's cap made it."""
    h200 = find_gpu("h200")
    return replace(h200, usable_bytes=row["cap_bytes"] + h200.context_bytes)


groups = ["load", "forward", "eager attention", "float32 copies", "backward, batch", "optimizer"]

# %% tags=["nbval-check-output"]
chosen = {}
for group in groups:
    death = rows[f"{group}: death"]
    cheapest = cures(shape, settings_of(death), card_of(death))[0]
    chosen[group] = next(row for row in rows.values() if row.get("group") == group and row["role"] == "cure")
    print(f"{group:26}{cheapest.what}\n{'':26}price: {cheapest.price}")
    check("the cure that was tried on the GPU is this one", settings_of(chosen[group]) == cheapest.settings, True, exact=True)

# %% [markdown]
# Each cure was tried under the cap under which the run before had died. What it saves is the difference to the same run
# without a cap, and what it costs in time is seen in the tokens per second:

# %% tags=["nbval-check-output"]
def price_of(group: str) -> dict:
    """The run that died, as it is without a cap."""
    return rows.get(f"{group}: price") or rows["forward: cure, checkpointing"]  # the same run as that of "backward, batch"


prices = {}
print(f"{'GiB':18}{'cap':>5}{'needed':>9}{'cured':>8}{'predicted':>11}{'saved':>8}   tokens/s before and after")
for group, cure in chosen.items():
    before, after = price_of(group), predict(shape, settings_of(cure)).peak_allocated_bytes
    sizes = [cure["cap_bytes"], before["peak_allocated_bytes"], cure["peak_allocated_bytes"], after]
    sizes.append(sizes[1] - sizes[2])
    speeds = before["tokens_per_second"], cure["tokens_per_second"]
    prices[group] = sizes[1] / GIB, sizes[2] / GIB, speeds[1] / speeds[0]
    print(f"{group:18}" + "{:5.1f}{:9.2f}{:8.2f}{:11.2f}{:8.2f}".format(*(size / GIB for size in sizes)), "  {:6,} →{:6,}".format(*speeds))

# %% [markdown]
# Checkpointing is often said to take a third more time. It took more, on this GPU at least. And four bits are not free: the
# weights are decoded in every product, which LoRA on 16-bit weights need not do. The other cures cost little time, or even
# save it. (Speeds are of one run each, two steps on an H200 with random weights; another card has others.)

# %% tags=["nbval-check-output"]
for group in ("forward", "load"):
    print(f"{group}: {1 / prices[group][2]:.2f} times as long for each token")
for group, cure in chosen.items():
    assert cure["outcome"] == "ran", f"{group} died all the same"
    said, saved = (predict(shape, settings_of(row)).peak_allocated_bytes for row in (price_of(group), cure))
    measured = price_of(group)["peak_allocated_bytes"] - cure["peak_allocated_bytes"]
    check(f"GiB saved by the cure of: {group}", (said - saved) / GIB, measured / GIB, rel=0.03)

# %%
words = {"load": ("load", "load in 4 bits"), "forward": ("forward", "gradient checkpointing"),
         "eager attention": ("forward,\neager attention", "attention by sdpa"),
         "float32 copies": ("forward,\nfloat32 copies", "no prepare_model_for_kbit_training"),
         "backward, batch": ("backward", "half the batch, 2 steps of accumulation"),
         "optimizer": ("optimizer step", "states in 8 bits")}
branches = [
    (place, f"{cure}\n{prices[group][0]:.1f} → {prices[group][1]:.1f} GiB, {prices[group][2]:.2f} times the tokens/s")
    for group, (place, cure) in words.items()
]
sizes = [rows[f"evaluation: {what}"]["peak_allocated_bytes"] / GIB for what in ("price", "cure, best words")]
branches.append(("evaluation", f"keep the best words, not the logits\n{sizes[0]:.1f} → {sizes[1]:.1f} GiB"))
branches.append(("saving", "not the GPU: main memory or disk"))
files = json.loads(data_path("measured", "merging.json").read_text())["rows"][-1]["host_peak_bytes"] / GIB
decoded = rows["merging: price"]["peak_allocated_bytes"] / GIB
branches.append(("merging", f"from file to file (lesson 6)\n{decoded:.1f} → 0 GiB, and {files:.1f} GiB of main memory"))
fig, ax = plots.figure(figsize=(7.2, 6))
plots.decision_tree(ax, "Where did\nit die?", branches)
ax.set_title("From the place to the cheapest cure, measured with 8B")
plots.show(fig, "A tree from the question where a run died to nine places and the cheapest cure of each: at load 4 bits, in the forward pass gradient checkpointing, with eager attention sdpa, with float32 copies none of them, in the backward pass half the batch with accumulation, in the optimizer step states in 8 bits, in an evaluation keeping the best words instead of logits, when saving more main memory or disk, when merging from file to file. Beside each the measured GiB before and after, and the change in speed.")

# %% [markdown]
# ## Knobs that are turned first
#
# "Reduce the sequence length", "decrease the rank": the second article names both among its first cures. Half the tokens
# save as much as half the batch with accumulation, and cut off what is longer, while accumulation changes nothing in the
# result. The rank hardly matters, unless it is very high and its states are in 32 bits. All cures of two deaths, and one
# run at several ranks:

# %% tags=["nbval-check-output"]
for group in ("backward, batch", "optimizer"):
    print(f"{group}: needed {price_of(group)['peak_allocated_bytes'] / GIB:.2f} GiB")
    for label, row in rows.items():
        if row.get("group") == group and row["role"] == "cure":
            print(f"    {label.partition('cure, ')[2]:22}{row['peak_allocated_bytes'] / GIB:7.2f} GiB")
usual = replace(GPU_RUN, batch_size=4, adapter_dtype="bfloat16")
ranks = {rank: predict(shape, replace(usual, rank=rank)).peak_allocated_bytes / GIB for rank in (8, 16, 64, 256)}
print("4 x 2,048 tokens, by rank:", ", ".join(f"r={rank} {size:.2f} GiB" for rank, size in ranks.items()))
check("GiB that rank 8 saves where it was 64", ranks[64] - ranks[8], at_most=0.5)

# %% [markdown]
# ## Paging: what it can save
#
# A paged optimizer keeps its states in managed memory, which the driver may move to main memory when the card is full.
# "This way the GPU never throws an out-of-memory error", writes the first article, and the third calls it "error-free".
# But weights, activations, gradients and logits are not paged, and of the states only tensors with at least 100,000
# numbers (bitsandbytes, `optim/optimizer.py`). LoRA's tensors are small. The share that can be paged, from their exact
# shapes:

# %% tags=["nbval-check-output"]
def paged_share(model: str, rank: int) -> float:
    """Share of LoRA's numbers, on all linear layers, that lie in tensors large enough to be paged."""
    sizes = [rank * side for linear in find_shape(model).linears for side in (linear.in_features, linear.out_features)]
    return sum(size for size in sizes if size >= 100_000) / sum(sizes)


names = ["meta-llama/Llama-3.2-1B", "Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-7B", "meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-70B"]
print(f"{'rank':28}" + "".join(f"{rank:>8}" for rank in (4, 8, 16, 32, 64)))
for name in names:
    print(f"{name:28}" + "".join(f"{paged_share(name, rank):8.1%}" for rank in (4, 8, 16, 32, 64)))

# %% [markdown]
# And how much is that of a run? In bytes, for the settings of the second article (70B, rank 64, states in 32 bits) and for
# the usual ones:

# %% tags=["nbval-check-output"]
for name, rank, optimizer in (("70B", 64, "paged_adamw_32bit"), ("8B", 64, "paged_adamw_32bit"), ("8B", 16, "paged_adamw_8bit")):
    settings = replace(GPU_RUN, rank=rank, optimizer=optimizer, max_length=512, adapter_dtype="bfloat16")
    p = predict(find_shape(f"meta-llama/Llama-3.1-{name}"), settings)
    paged = p.parts["optimizer (paged)"]
    print(f"{name}, rank {rank}, {optimizer:18}{paged / GIB:6.2f} GiB can be paged, {paged / p.device_bytes:6.1%} of what the card holds")

# %% [markdown]
# torch does not see managed memory. It counts neither as allocated nor against a cap. The card sees it: below is what the
# card has in use beside torch's memory (`cudaMemGetInfo`), after four steps, less the same of a run whose optimizer is not
# paged. The driver gives it out in pieces of 128 MiB.

# %% tags=["nbval-check-output"]
for rank in (16, 64):
    plain = rows[f"paging: rank {rank}, adamw_8bit"]["outside"]["after step 4"]
    for optimizer in ("paged_adamw_8bit", "paged_adamw_32bit"):
        row = rows[f"paging: rank {rank}, {optimizer}"]
        exact = predict(shape, settings_of(row)).parts["optimizer (paged)"]
        pieces = -(-exact // (128 * MIB))
        print(f"rank {rank}, {optimizer:18}{exact / MIB:7.1f} MiB of states, {pieces} pieces")
        check("bytes in managed memory, predicted and counted", exact, row["paged_bytes"], exact=True)
        check("MiB on the card outside of torch", (row["outside"]["after step 4"] - plain) / MIB, pieces * 128, abs=32)

# %% [markdown]
# So under a cap a paged optimizer hides what it does not save. The run that died in the optimizer step survives with
# `paged_adamw_32bit`, and the card then holds more than the cap that it was to stay below:

# %% tags=["nbval-check-output"]
print(f"cap {rows['optimizer: death']['cap_bytes'] / GIB:.2f} GiB")
for name in ("price", "cure, paged, 32 bits", "cure, 8 bits"):
    row = rows[f"optimizer: {name}"]
    card = row["peak_reserved_bytes"] + row["outside"]["after step 4"]
    print(f"{row['optimizer']:20}torch holds {row['peak_reserved_bytes'] / GIB:5.2f} GiB, the card {card / GIB:5.2f} GiB")

# %% [markdown]
# What would moving them cost? All paged states must be on the card once per step. Bytes and the bandwidth of the slot
# tell the least that takes, there and back. A T4 has 16 lanes of PCIe 3.0, an RTX 4090 of PCIe 4.0: 8 and 16 billion
# transfers per second and lane, 128 of 130 bits of use.

# %% tags=["nbval-check-output"]
def bandwidth(transfers_per_second: float, lanes: int = 16) -> float:
    """Bytes per second in one direction."""
    return transfers_per_second * 128 / 130 * lanes / 8


for name, speed in (("PCIe 3.0 x16", bandwidth(8e9)), ("PCIe 4.0 x16", bandwidth(16e9))):
    print(f"{name}: {speed / 1e9:.2f} GB/s")
    for model, rank, optimizer in (("8B", 16, "paged_adamw_8bit"), ("70B", 64, "paged_adamw_32bit")):
        settings = replace(GPU_RUN, rank=rank, optimizer=optimizer, adapter_dtype="bfloat16")
        states = predict(find_shape(f"meta-llama/Llama-3.1-{model}"), settings).parts["optimizer (paged)"]
        print(f"    {model} r={rank} {optimizer}: {2 * states / speed * 1000:7.1f} ms per step, there and back")

# %% [markdown]
# That is the best case: the driver moves pages when a kernel stumbles over them, in small pieces. Here nothing was moved:
# the card was never full, and eviction itself was **not provoked** for these figures. Paging is a net for the states, no
# more: tens of MiB at rank 16. Where they are GiB, at high rank and in 32 bits, states in 8 bits save most of them without
# any moving.
#
# ## Evaluation, saving, merging
#
# A run can also die after hours of good steps. **Evaluation** keeps the logits of all batches on the GPU if metrics are
# computed from them: one number of 4 bytes for each token and each word of the vocabulary.

# %% tags=["nbval-check-output"]
logits = 2048 * shape.vocab_size * 4
print(f"logits of one sequence of 2,048 tokens: {logits / GIB:.2f} GiB, of eight: {8 * logits / GIB:.2f} GiB")
for label, row in rows.items():
    if row["what"] == "evaluation":
        ended = f"{row['peak_allocated_bytes'] / GIB:6.2f} GiB in {row['work_seconds']:4.1f} s" if row["outcome"] == "ran" else "  died"
        limit = f"cap {row['cap_bytes'] / GIB:.0f} GiB" if row["cap_bytes"] else "no cap"
        print(f"{label:40}{limit:>11}{ended}")

# %% [markdown]
# Eight is the default of `per_device_eval_batch_size`, whatever the training batch. A batch of 1 alone does not help: all
# eight are kept, and while they are joined they are there twice. What helps: no `compute_metrics` (the loss alone);
# `preprocess_logits_for_metrics` that keeps the best word of each token; or `eval_accumulation_steps=1`, which moves
# the logits to main memory, and takes many times as long.

# %% tags=["nbval-check-output"]
price = rows["evaluation: price"]
kept = price["peak_allocated_bytes"] - price["before_bytes"]
check("peak above the model, in logits of one sequence: eight, twice", kept / logits, 16, rel=0.02)
best = rows["evaluation: cure, best words"]
check("best words only: those of one batch in 4 bytes, and in 2", (best["peak_allocated_bytes"] - best["before_bytes"]) / logits, 1.5, rel=0.05)

# %% [markdown]
# **Saving** a checkpoint writes adapter and optimizer states tensor by tensor. On the GPU torch's budget was closed at what
# it held already, and the checkpoint was written all the same: a death while saving is one of main memory or of disk.

# %% tags=["nbval-check-output"]
saving = rows["saving: a checkpoint"]
more = saving["peak_allocated_bytes"] - saving["before_bytes"]
check("MiB of the GPU that saving took", more / MIB, at_most=1)
for name, size in sorted(saving["files"].items(), key=lambda file: -file[1])[:2]:
    print(f"{name:30}{size / 1e6:8,.1f} MB")

# %% [markdown]
# **Merging** into 16 bits needs the model in 16 bits: 2 bytes for each parameter, on the GPU or in main memory. If it is
# made from the 4-bit one on the GPU (`model.dequantize()`), both are there until the end. Merging into the 4-bit layers
# goes layer by layer and fits, but it takes a part of the adapter away, or all of it ([lesson 6](06_adapters_and_merging.ipynb)).
# `merge_files` needs no GPU and one weight at a time.

# %% tags=["nbval-check-output"]
for name in ("8B", "70B"):
    model = find_shape(f"meta-llama/Llama-3.1-{name}")
    print(f"{name}: decoded as a whole {predict_merge(model, 'dequantised').peak_bytes / GIB:7.2f} GiB, "
          f"into 4 bits {predict_merge(model, '4bit').peak_bytes / GIB:6.2f} GiB")
decoded, merged = rows["merging: price"], rows["merging: cure, into 4 bits"]
check("GiB to decode the whole of 8B", predict_merge(shape, "dequantised").peak_bytes / GIB, decoded["peak_allocated_bytes"] / GIB, rel=0.02)
check("GiB to merge it into 4 bits", predict_merge(shape, "4bit").peak_bytes / GIB, merged["peak_allocated_bytes"] / GIB, rel=0.02)
print(f"decoded in {decoded['work_seconds']:.1f} s, merged into 4 bits in {merged['work_seconds']:.1f} s")

# %% [markdown]
# ## Advice that is often given
#
# **"VRAM consumption scales quadratically with sequence length"** (second article). Only where the matrix of scores is
# stored: `eager` attention, and torch's math kernel. Twice the tokens:

# %%
lengths = range(1024, 8193, 1024)
one = replace(GPU_RUN, adapter_dtype="bfloat16")
curves = {
    kernel: [predict(shape, replace(one, max_length=n, attention=kernel)).peak_allocated_bytes / GIB for n in lengths]
    for kernel in ("eager", "math", "sdpa")
}
fig, ax = plots.figure()
for (kernel, sizes), style in zip(curves.items(), ({"color": plots.RED}, {"color": plots.YELLOW, "linestyle": "--"}, {"color": plots.BLUE})):
    ax.plot(lengths, sizes, label=f"{kernel}, predicted", **style)
for label, colour in (("eager attention: price", plots.RED), ("eager attention: cure, sdpa", plots.BLUE)):
    ax.plot(rows[label]["max_length"], rows[label]["peak_allocated_bytes"] / GIB, "o", color=colour)
ax.set_xticks(lengths, labels=[f"{n:,}" for n in lengths])
ax.set(xlabel="tokens in the sequence", ylabel="peak (GiB)", ylim=(0, None))
ax.set_title("Quadratic only where the scores are stored (8B, points measured)")
ax.legend()
plots.show(fig, "Predicted peak memory of Llama-3.1-8B at batch 1 against 1,024 to 8,192 tokens. With eager attention and the math kernel the curves bend upwards to about 40 GiB, with sdpa a straight line reaches 10 GiB; a measured point at 8,192 tokens lies on the eager and on the sdpa curve each.")

# %% tags=["nbval-check-output"]
for kernel, sizes in curves.items():
    doubled = [sizes[lengths.index(n)] for n in (1024, 2048, 4096, 8192)]
    growth = ", ".join(f"{after - before:+.2f}" for before, after in zip(doubled, doubled[1:]))
    print(f"{kernel:6}" + "".join(f"{size:8.2f}" for size in doubled), f"GiB; each doubling: {growth}")
eager, sdpa = rows["eager attention: price"], rows["eager attention: cure, sdpa"]
check("eager at 8,192 tokens, in GiB", curves["eager"][-1], eager["peak_allocated_bytes"] / GIB, rel=0.02)
check("sdpa at 8,192 tokens, in GiB", curves["sdpa"][-1], sdpa["peak_allocated_bytes"] / GIB, rel=0.02)

# %% [markdown]
# **`torch.cuda.empty_cache()` "can sometimes help"** (the same article). It gives back what torch holds and does not use. torch does that by
# itself before it raises the error: a retry, which it counts. The run that died in the backward pass dies with
# `empty_cache()` called in every step, too. What helps against holes are segments that can grow: with
# `PYTORCH_ALLOC_CONF=expandable_segments:True` (the message has an older name for it) the same run lives under a cap under
# which it dies without.

# %% tags=["nbval-check-output"]
for label in ("backward, batch: death", "backward, batch: still dead, empty_cache"):
    print(f"{label:44}{rows[label]['outcome']}, torch had tried again {rows[label]['allocator_retries']} times")
    check("retries of torch itself", rows[label]["allocator_retries"], at_least=1)
for label in ("holes: as it is", "holes: expandable segments"):
    row = rows[label]
    sizes = [row[name] / GIB for name in ("cap_bytes", "peak_allocated_bytes", "peak_reserved_bytes")]
    print(f"{label:30}{row['outcome']:15}" + "cap {:.2f}, tensors {:.2f}, held {:.2f} GiB".format(*sizes))

# %% [markdown]
# **"Initial Memory Allocated: … MB"** is what the second article prints of `memory_allocated()`, divided by 1024². That
# makes MiB, and of tensors only: the card also holds what torch keeps in reserve, the CUDA context, and paged states.

# %% tags=["nbval-check-output"]
row = rows["paging: rank 64, paged_adamw_32bit"]
parts = {"in tensors": row["peak_allocated_bytes"], "held beside them": row["peak_reserved_bytes"] - row["peak_allocated_bytes"],
         "outside of torch": row["outside"]["after step 4"]}
for name, size in parts.items():
    print(f"{name:20}{size / MIB:9,.0f} MiB = {size / 1e6:9,.0f} MB")
check("share of the card that memory_allocated does not show", 1 - parts["in tensors"] / sum(parts.values()), at_least=0.1)

# %% [markdown]
# ## Exercise 1
#
# Somebody pastes the message below. How many MiB are missing for this one request? And would more room in one piece be
# enough, since torch holds memory that it does not use? Answer with a pair, such as `(12, True)`.

# %%
pasted = """torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1002.00 MiB. GPU 0 has a total capacity of
22.03 GiB of which 88.00 MiB is free. Process 3211 has 21.94 GiB memory in use. Of the allocated memory 18.75 GiB is
allocated by PyTorch, and 2.50 GiB is reserved by PyTorch but unallocated."""

# %% tags=["exercise"]
answer = ...

# %% tags=["solution"]
asked, free, holes = 1002.0, 88.0, 2.5 * 1024  # MiB
answer = (asked - free, holes >= asked)

# %% tags=["nbval-check-output"]
exercise("a pasted message", answer, (914.0, True), hint="what is asked for less what is free; the holes together are 2,560 MiB.")

# %% [markdown]
# So here holes are the trouble: `PYTORCH_ALLOC_CONF=expandable_segments:True` is worth a try before any setting is changed.
#
# ## Exercise 2
#
# At which rank does the first tensor of Llama-3.2-1B become large enough to be paged? Find the smallest rank with
# `paged_share`.

# %% tags=["exercise"]
first_rank = ...

# %% tags=["solution"]
first_rank = next(rank for rank in range(1, 257) if paged_share("meta-llama/Llama-3.2-1B", rank) > 0)

# %% tags=["nbval-check-output"]
exercise("the first paged rank", first_rank, 13, hint="the widest side of a layer is 8,192: rank times 8,192 must reach 100,000.")

# %% [markdown]
# ## Exercise 3
#
# A run dies on a T4: Qwen2.5-7B, four sequences of 2,048 tokens, float16, `upcast_fp32=True` and rank 64. Which is
# the cheapest cure? Answer with the changed `Settings`.

# %%
on_t4 = replace(GPU_RUN, compute_dtype="float16", batch_size=4, upcast_fp32=True, rank=64)
print("fits as it is:", predict(find_shape("Qwen/Qwen2.5-7B"), on_t4, "t4").fits)

# %% tags=["exercise"]
cured = ...

# %% tags=["solution"]
cured = cures(find_shape("Qwen/Qwen2.5-7B"), on_t4, "t4")[0].settings

# %% tags=["nbval-check-output"]
exercise("the cheapest cure", cured, replace(on_t4, upcast_fp32=False), hint="cures(shape, run, gpu) lists them, the cheapest first; each has a run.")

# %% [markdown]
# ## You have
# - seen where memory goes within one training step, on this machine and as recorded on a large GPU;
# - read every number of an out-of-memory message, and found out from its traceback where a run died;
# - gone from that place to the cheapest cure, with its price predicted and measured;
# - computed what paging can save, and what it cannot: it moves a small part of a run, and prevents no error elsewhere;
# - tested advice that is often given, and found some of it costly and some of it without effect.
#
# A run can also be told how much memory there is (`memory_budget`), and then chooses among these cures by itself:
# [lesson 11](11_where_the_time_goes.ipynb) shows how.
#
# Next: [lesson 10](10_your_own_data.ipynb) goes from a file of yours to a tuned model. Another error?
# [TROUBLESHOOTING.md](../TROUBLESHOOTING.md) has the common ones with their cures, and `python -m qlora_helpers doctor
# --error "…"` finds the entry from a pasted message.
