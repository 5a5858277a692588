# %% [markdown]
# # 12 · Past one GPU
#
# You will
# - see what a 70B model takes on one card, against what an article's title promises;
# - share a batch between two processes, and average their gradients so that nothing is learned differently;
# - split the weights of a layer over two GPUs by hand, and make the same step as one GPU, bit for bit;
# - see why 4-bit weights need another name before they can be split;
# - hold what is predicted for two GPUs against what two GPUs took;
# - compute what is sent in a step, and say when two GPUs help and when they do not;
# - find the GPUs that can train 70B, and the command that starts such a run.
#
# Takes about {{seconds}} seconds and {{gigabytes}} GB of memory on two processor cores. No GPU is needed. What two
# of them take and do is computed, and then held against what **two H200 took and did**, recorded beforehand. What was not
# measured is said where it matters.

# %%
import json
from dataclasses import replace

from qlora_helpers.chats import read_chats, tokenized
from qlora_helpers.course import plots
from qlora_helpers.course.checks import check
from qlora_helpers.course.exercises import lesson_12 as exercises
from qlora_helpers.course.tables import show_table
from qlora_helpers.hardware import detect
from qlora_helpers.memory import find_gpu, find_shape, predict
from qlora_helpers.memory.search import largest_batch
from qlora_helpers.memory.several import cheapest_sets, on_gpus
from qlora_helpers.models.loading import load_model, load_tokenizer
from qlora_helpers.paths import data_path
from qlora_helpers.settings import GPU_RUN

# %%
import bitsandbytes.functional as bnb
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from transformers import TrainingArguments

GIB = 2**30
cpu = detect("cpu")  # this lesson runs there in every gear
print("torch", torch.__version__.split("+")[0])

# %% [markdown]
# ## A title
#
# One of the three articles behind this course is called *Fine-Tuning 70B Models on a Single Consumer GPU*, and its first
# lines name the card: 24 GB, an RTX 3090 or 4090. Lesson 5 predicted that it cannot be. A run of this size was also measured:
# rank 64, one chat of 512 tokens, on an H200.

# %% tags=["nbval-check-output"]
measured = json.loads(data_path("measured", "memory.json").read_text(encoding="utf-8"))["rows"]
row = next(row for row in measured if row["model"] == "llama-3.1-70b")
loaded, peak = row["loaded_bytes"] / GIB, row["peak_allocated_bytes"] / GIB
room = find_gpu("4090").usable_bytes / GIB
print(f"after loading {loaded:.1f} GiB, at the peak {peak:.1f} GiB; an RTX 4090 has {room:.1f}")
check("GiB of 70B before anything is trained, for the room of the card", loaded, at_least=room)

# %% [markdown]
# The weights alone are half as large again as the card. No batch, rank or optimizer changes that. What can be?
#
# - **One larger card.** A step with one short chat takes little more than the weights.
# - **Several cards**, each of which holds a part of the weights. That is what this lesson is about.
# - **Main memory**, from which a card fetches each layer when its turn comes.
#
# And most runs on several GPUs are made for another reason: to go faster, each GPU with all of the model.
#
# ## Processes that talk
#
# On several GPUs a run is several processes, one for each GPU. All of them run the same program. Each knows its number, which
# is called its [rank](../GLOSSARY.md#rank-of-a-process): rank 0 is the first. (It has nothing to do with the rank of an adapter.)
# They exchange tensors through a library: [NCCL](../GLOSSARY.md#nccl) between GPUs from NVIDIA, [gloo](../GLOSSARY.md#gloo) between
# CPUs. Three exchanges are enough for this lesson. Each takes a list here, with what each rank gives:

# %%
def all_gather(shares: list[torch.Tensor]) -> torch.Tensor:
    """Each rank gives its share; each gets all of them."""
    return torch.cat(shares)


def reduce_scatter(values: list[torch.Tensor]) -> list[torch.Tensor]:
    """Each rank gives as many numbers as the others; each gets its share of their sums."""
    return list(sum(values).chunk(len(values)))


def all_reduce(values: list[torch.Tensor]) -> torch.Tensor:
    """Each rank gives as many numbers as the others; each gets all of their sums."""
    return all_gather(reduce_scatter(values))

# %% [markdown]
# The last line is not only short. It is how the libraries do it: an [all-reduce](../GLOSSARY.md#all-reduce) is a
# [reduce-scatter](../GLOSSARY.md#reduce-scatter) and an [all-gather](../GLOSSARY.md#all-gather). So it sends twice as much as each
# of them.
#
# ## Two halves of a batch
#
# The usual way is [data parallel](../GLOSSARY.md#data-parallel). Each rank has the whole model and takes its part of the batch.
# Then the gradients are averaged, and all ranks make the same step. Is that the step of one GPU with the whole batch?
#
# Eight chats, four for each of two ranks. Those of the first have one question, those of the second three:

# %% tags=["nbval-check-output"]
chats, tokenizer = read_chats(data_path("chats", "train.jsonl")), load_tokenizer()
short = chats[:4]
long = [[*chats[at], *chats[at + 1], *chats[at + 2]] for at in (4, 7, 10, 13)]


def padded(some: list) -> dict[str, torch.Tensor]:
    """Some chats as a batch; answers alone count in the loss."""
    rows = tokenized(some, tokenizer)
    width = max(len(row["input_ids"]) for row in rows)
    batch = torch.full((3, len(rows), width), 0)
    batch[2] = -100
    for number, row in enumerate(rows):
        ids, counts = torch.tensor(row["input_ids"]), torch.tensor(row["assistant_masks"])
        here = slice(len(ids))
        batch[0, number, here], batch[1, number, here] = ids, 1
        batch[2, number, here] = ids.masked_fill(counts == 0, -100)
    return dict(zip(("input_ids", "attention_mask", "labels"), batch, strict=True))


for rank, half in enumerate((short, long)):
    print(f"rank {rank}: {(padded(half)['labels'] != -100).sum()} answer tokens")

# %% [markdown]
# Each rank computes the mean loss of its own answer tokens, and the gradient of that. Predict: the mean of the two gradients is
# taken. Which tokens count for more than they should?

# %%
torch.manual_seed(0)
model = load_model(hardware=cpu)
model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))

trained = [weight for weight in model.parameters() if weight.requires_grad]


def gradient_of(some: list) -> tuple[torch.Tensor, int]:
    """The gradient of the mean loss over the answer tokens of some chats, and how many they are."""
    batch = padded(some)
    model.zero_grad()
    model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]
    ).loss.backward()
    flat = torch.cat([weight.grad.flatten() for weight in trained])
    return flat, (batch["labels"] != -100).sum().item()

# %% tags=["nbval-check-output"]
wanted, total = gradient_of(short + long)  # one GPU, the whole batch
(first, few), (second, many) = gradient_of(short), gradient_of(long)
print(f"a token of rank 0 counts as {many / few:.2f} tokens of rank 1")


def off(got: torch.Tensor) -> float:
    """The length of the difference from the gradient of the whole batch, as a share of it."""
    return ((got - wanted).norm() / wanted.norm()).item()


check("off, averaged by halves", off((first + second) / 2), at_least=0.05)
check("off, by answer tokens", off((first * few + second * many) / total), at_most=1e-5)

# %% [markdown]
# Averaged by halves, a batch is not learned as on one GPU, and nothing says so: the loss falls all the same. The remedy is to
# divide the *sum* of the losses by the answer tokens of **all** ranks, which takes one more exchange, of one number. Today's
# trainer does that. Its option is on unless it is switched off, and what one GPU does with
# [accumulated](../GLOSSARY.md#gradient-accumulation) batches is the same question with the same answer.

# %% tags=["nbval-check-output"]
fields = TrainingArguments.__dataclass_fields__
print("average_tokens_across_devices:", fields["average_tokens_across_devices"].default)

# %% [markdown]
# A second thing changes without a word. `per_device_train_batch_size` is what *each* GPU takes. A second GPU doubles the batch,
# and there are half as many steps in an epoch. In this course `batch_size` is over all GPUs, so that a run learns the same on any
# number of them.
#
# ## A layer in two halves
#
# Data parallel saves no memory: each rank has all weights, all adapters, all optimizer states. But most of the time a rank
# needs only one layer. So let each keep a share of every layer, and collect a layer from all of them just before it is used:
# that is [sharding](../GLOSSARY.md#sharding). torch's way to do it is called [FSDP](../GLOSSARY.md#fsdp), fully sharded data parallel.
# It is still data parallel: each rank computes with whole layers, on its own part of the batch.
#
# By hand it is a few lines. One layer of the model, in 4 bits and frozen, with a new adapter of rank 8; two ranks, each with a
# half of both:

# %%
torch.manual_seed(0)
base = model.get_base_model().model.layers[0].mlp.up_proj.base_layer
packed, state = base.weight.data, base.weight.quant_state
RANK, INPUTS, OUTPUTS = 8, base.in_features, base.out_features
adapter = torch.cat([torch.randn(RANK * INPUTS) / 16, torch.zeros(OUTPUTS * RANK)])
inputs, targets = torch.randn(2, 32, INPUTS), torch.randn(2, 32, OUTPUTS)  # for two ranks


def loss_of(packed: torch.Tensor, adapter: torch.Tensor, x, y) -> torch.Tensor:
    """The summed loss of an adapted layer, over all tokens of all ranks."""
    a, b = adapter.split([RANK * INPUTS, OUTPUTS * RANK])
    weight = bnb.dequantize_4bit(packed, state)
    got = x @ weight.T + x @ a.view(RANK, INPUTS).T @ b.view(OUTPUTS, RANK).T
    return (got - y).square().sum() / targets.numel()

# %% [markdown]
# Gather, use, free; then each rank gets its share of the summed gradients, and the optimizer steps on that share alone. Its
# states are therefore split, too.

# %%
def sharded_run(steps: int) -> torch.Tensor:
    """The adapter after some steps on two ranks, each with a half of everything."""
    weights = packed.chunk(2)
    shares = [share.clone().requires_grad_() for share in adapter.chunk(2)]
    optimizers = [torch.optim.AdamW([share], lr=1e-2) for share in shares]
    for _ in range(steps):
        gradients = []
        for rank in (0, 1):  # both at the same time, on two GPUs
            whole = all_gather(list(weights))
            whole_adapter = all_gather([share.detach() for share in shares]).requires_grad_()
            loss_of(whole, whole_adapter, inputs[rank], targets[rank]).backward()
            gradients.append(whole_adapter.grad)
            del whole, whole_adapter
        for share, gradient, optimizer in zip(
            shares, reduce_scatter(gradients), optimizers, strict=True
        ):
            share.grad = gradient
            optimizer.step()
    return all_gather([share.detach() for share in shares])

# %% [markdown]
# Beside it two ranks with whole copies, and one GPU that has the whole batch. Will all three agree bit for bit?

# %% tags=["nbval-check-output"]
def unsplit_run(steps: int, batches: list) -> torch.Tensor:
    """The adapter after some steps of data parallel ranks, one for each batch."""
    mine = adapter.clone().requires_grad_()
    optimizer = torch.optim.AdamW([mine], lr=1e-2)
    for _ in range(steps):
        found = [torch.autograd.grad(loss_of(packed, mine, *batch), mine)[0] for batch in batches]
        mine.grad = all_reduce(found) if len(found) > 1 else found[0]
        optimizer.step()
    return mine.detach()


sharded = sharded_run(20)
copies = unsplit_run(20, list(zip(inputs, targets, strict=True)))
alone = unsplit_run(20, [(inputs.flatten(0, 1), targets.flatten(0, 1))])
moved = (alone - adapter).abs().max().item()
check("how far the adapter moved", moved, at_least=0.05)
check("20 steps, sharded, against two copies", sharded, copies, exact=True)
difference = (sharded - alone).abs().max().item() / moved
check("against one GPU, as a share of that", difference, at_most=0.02)

# %% [markdown]
# Sharded and copied agree in every bit: where a number lies changes nothing about it. One GPU differs by rounding, since it adds
# up the tokens in another order. So two GPUs never repeat a run of one to the last bit, and need not.
#
# ## The same bits under another name
#
# Here the packed weights were cut like any tensor. torch's first FSDP lays all weights of a layer into one long parameter of a
# floating-point dtype. But bitsandbytes keeps two 4-bit codes in a byte, as `uint8`. One process is enough to see what it says:

# %% tags=["nbval-check-output"]
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
layer = torch.nn.Module()
layer.weight = torch.nn.Parameter(packed, requires_grad=False)
try:
    FullyShardedDataParallel(
        layer, device_id=torch.device("cpu"), sharding_strategy=ShardingStrategy.NO_SHARD
    )
except ValueError as error:
    print(f"{packed.dtype}: {error}")
dist.destroy_process_group()

# %% [markdown]
# Today's trainer uses torch's second FSDP, which splits each weight for itself. There accelerate leaves integers out: no error,
# but each GPU holds all 4-bit weights, and nothing is saved.
#
# `bnb_4bit_quant_storage=torch.bfloat16` helps with both. It changes no bit. It only says that two bytes in a row are to be called one bfloat16
# number:

# %% tags=["nbval-check-output"]
some = torch.randn(OUTPUTS, INPUTS)
usual, _ = bnb.quantize_4bit(some, quant_type="nf4")
other, _ = bnb.quantize_4bit(some, quant_type="nf4", quant_storage=torch.bfloat16)
same = other.view(torch.uint8).flatten()
check("bytes, stored as bfloat16 and as uint8", same, usual.flatten(), exact=True)
renamed = packed.view(-1, 2).view(torch.bfloat16)
decoded = bnb.dequantize_4bit(renamed, state)
check("decoded", decoded, bnb.dequantize_4bit(packed, state), exact=True)
print("as numbers:", *(f"{value:.1e}" for value in renamed.flatten()[:4].tolist()), "…")
print(f"{renamed.numel():,} of them, {renamed.isnan().sum()} not a number")

# %% [markdown]
# As numbers they are nonsense, and nobody computes with them: they are cut, sent and put together again. Only a cast would
# take them for numbers, and FSDP casts what it gathers to the dtype in which the run computes. If that is another one, the codes
# are gone:

# %% tags=["nbval-check-output"]
for dtype in (torch.float16, torch.float32):
    back = renamed.to(dtype).to(torch.bfloat16).view(torch.uint8)
    spoilt = (back.flatten() != packed.flatten()).float().mean().item()
    check(f"share of bytes that a cast to {dtype} and back changes", spoilt, at_least=1e-4)

# %% [markdown]
# Even float32, which has room for every bfloat16 number, does not give back all that are *not a number*. So the storage must be
# the dtype that the run computes in. When this course's processes shard a model, it loads it so.
#
# ## What is split, and what is not
#
# The predictor of lesson 5 knows both ways. Predict, before you run the cell: 70B with its adapters takes about 40 GiB on one
# GPU. How much will it take on each of two that shard it, for one chat of 512 tokens each?

# %% tags=["nbval-check-output"]
large = find_shape("meta-llama/Llama-3.1-70B")
run = replace(GPU_RUN, batch_size=2, max_length=512)
ways = {
    "one GPU": replace(run, batch_size=1),
    "copies": replace(run, num_gpus=2),
    "shards": on_gpus(run, 2),
    "offloaded": on_gpus(run, 2, cpu_offload=True),
}
on_each = {name: predict(large, settings, "4090") for name, settings in ways.items()}
parts = dict.fromkeys(part for prediction in on_each.values() for part in prediction.parts)
table = [[part, *(p.parts.get(part, 0) / GIB for p in on_each.values())] for part in parts]
table.append(["on the card", *(p.device_bytes / GIB for p in on_each.values())])
show_table(["GiB on each GPU", *ways], table, formats=["", *[".2f"] * len(ways)])

# %%
groups = {
    "4-bit weights": ("4-bit weights",),
    "their scales": ("quantisation constants",),
    "16-bit weights": ("16-bit weights",),
    "trained": ("adapters", "gradients", "optimizer (GPU)", "optimizer (paged)", "DDP's buckets"),
    "gathered": ("gathered weights",),
}
shown = {part for some in groups.values() for part in some}
groups["all else"] = [part for part in parts if part not in shown]
stacked = {name: [sum(p.parts.get(part, 0) for part in some) / GIB for p in on_each.values()]
           for name, some in groups.items()}
fig, ax = plots.figure()
plots.stacked_bars(ax, list(ways), stacked, "GiB on each GPU")
ax.axvline(room, color=plots.RED, linestyle="--", linewidth=1.2)
ax.text(room, 3, " the room of an RTX 4090", color=plots.RED, va="center", fontsize=9)
ax.set_title("Copies save nothing; shards save half of what is split")
plots.show(fig, "12.1")

# %% [markdown]
# - **Split**: weights, adapters, their gradients, optimizer states. Each GPU has a half, or an eighth of eight.
# - **Not split**: activations, which belong to a GPU's own chats; the scales of the 4-bit weights, which bitsandbytes keeps beside
#   the parameter and not in it; the CUDA context.
# - **New**: what is gathered at the moment. It is most when the embeddings or the output head are whole: 128,256 words of 16-bit
#   weights, and the buffer that they come in. And NCCL's own memory, which was not measured and is assumed.
#
# Copies take *more* than one GPU, since they keep their gradients once more to exchange them. And bitsandbytes' optimizers take
# no shards, so a sharded run has torch's AdamW. The line *on the card* is more than the sum of the parts: gathers have a CUDA
# stream of their own, and torch's allocator keeps separate memory for it. Two cards of 24 GB are too small for shards. They are
# large enough if the shards wait in main memory (*offloaded*). There each process loads the model, and has it whole until all
# its shards are made:

# %% tags=["nbval-check-output"]
for name, p in on_each.items():
    fits, host = "fits" if p.fits else "does not fit", p.host_bytes_of_run / GIB
    print(f"{name}: {fits}, {p.spare_bytes / GIB:+.1f} GiB; {host:.0f} GiB of main memory")

# %% [markdown]
# ## What two GPUs took
#
# All of this follows from the libraries' code. Is it true? Two H200 made six such runs, with random weights in the two shapes
# and one chat on each GPU. How much torch could take was limited, to 24 GiB at first. Predict: under that limit, which of the runs
# of 70B will start and then fail?

# %% tags=["nbval-check-output"]
runs = json.loads(data_path("measured", "several_gpus.json").read_text(encoding="utf-8"))["rows"]
two = [r for r in runs if r["made_on"]["gpus"] == 2]
WAYS = {"ddp": "copies", "fsdp": "shards", "fsdp_offload": "offloaded"}
table = []
for r in two:
    before, took = r["predicted"], r["outcome"] == "ran"
    table.append([
        r["model"], WAYS[r["way"]], r["cap_bytes"] / GIB,
        r["peak_allocated_bytes"][0] / GIB if took else r["outcome"],
        before["peak_allocated_bytes"] / GIB,
        sum(r["host_bytes"]) / GIB if took else "", before["host_bytes"] / GIB,
    ])
header = ["", "", "limit", "tensors, GiB", "predicted", "main memory, GiB", "predicted"]
show_table(header, table, formats=["", "", ".0f", ".2f", ".2f", ".1f", ".1f"])

# %% [markdown]
# 70B in shards ran out of memory under 24 GiB, as predicted, and ran under 27. Offloaded it takes a quarter of that. The tensors
# were as predicted but for 8B offloaded, which took 5 % more. Main memory was not: offloaded runs and copies took half as much
# again. (*Predicted* is what was predicted **before** the measurement.) That told us what to look for:
#
# - accelerate keeps a list of all weights while they are split (`original_sd`), so the copies that were loaded are still there when
#   the shards have been made, in memory that is locked for the GPU and rounded up to powers of two;
# - offloaded, the peak is at another moment than we had thought: between the decoder and the loss. Why, you will see below.
#
# With both in it, the predictor says:

# %% tags=["nbval-check-output"]
def now(r: dict):
    """What is predicted today for a measured run."""
    each = replace(GPU_RUN, batch_size=2, max_length=r["tokens"], dropout=0.0)
    sharding = None if r["way"] == "ddp" else "fsdp"
    several = on_gpus(each, 2, sharding, cpu_offload=r["way"] == "fsdp_offload")
    return predict(find_shape(f"Llama-3.1-{r['model']}"), several, "h200")


ran = [(r, now(r)) for r in two if r["outcome"] == "ran"]
tensors = [abs(p.peak_allocated_bytes / r["peak_allocated_bytes"][0] - 1) for r, p in ran]
main = [abs(p.host_bytes_of_run / sum(r["host_bytes"]) - 1) for r, p in ran]
reserve = [p.peak_reserved_bytes / r["peak_reserved_bytes"][0] - 1 for r, p in ran]
check("tensors, off by at most", max(tensors), at_most=0.02)
check("main memory, off by at most", max(main), at_most=0.03)
print(f"reserve, off by {min(reserve):+.0%} to {max(reserve):+.0%}")

# %% [markdown]
# That is no test of it: it was mended to agree with these six runs. (What a process of copies takes of main memory is even one of
# these measurements.) The third line is about what torch's allocator *holds*, which the driver counts as taken:

# %%
fig, ax = plots.figure(figsize=(7.2, 3.4))
names = [f"{r['model']} {WAYS[r['way']]}" for r, _ in ran]
kinds = (("reserved", plots.SKY, 0.62), ("allocated", plots.BLUE, 0.34))
for kind, colour, height in kinds:
    held = [r[f"peak_{kind}_bytes"][0] / GIB for r, _ in ran]
    ax.barh(names, held, height=height, color=colour, label=f"{kind}, measured")
    foreseen = [getattr(p, f"peak_{kind}_bytes") / GIB for _, p in ran]
    ax.plot(foreseen, names, "|", color=plots.ORANGE, markersize=30 * height, markeredgewidth=3)
ax.plot([], [], "|", color=plots.ORANGE, markersize=10, markeredgewidth=3, label="predicted")
ax.set(xlabel="GiB on each GPU")
ax.invert_yaxis()
ax.grid(axis="y", visible=False)
ax.set_title("Offloaded, torch holds far more than its tensors need")
ax.legend(fontsize=9, loc="lower right")
plots.show(fig, "12.2")

# %% [markdown]
# Streams share nothing, and a large tensor finds no place between small ones. So an offloaded run holds much more than it needs:
# how much more, depends on all that was there before. There the predictor says rather too much, so that what it calls fitting does fit.
#
# Must a card have room for all that is held? Before it gives up, the allocator gives back what no tensor needs: 70B in shards
# held all 27 GiB that it was allowed, for 24.49 GiB of tensors. **Predict: is the smallest limit nearer to the tensors, or to the
# predicted reserve?** To find it, two *processes* shared one GPU, each with its own limit and its own shards, and talked through
# main memory. That is slow, but the memory should be the same:

# %% tags=["nbval-check-output"]
first, *others = [r for r in runs if r.get("share_a_gpu")]
(own,) = [r for r in two if r["label"] == first["label"]]
for kind in ("allocated", "reserved"):
    on_two, on_one = (r[f"peak_{kind}_bytes"][0] for r in (own, first))
    print(f"8B in shards, {kind}: {on_two:,} bytes on two GPUs, {on_one:,} on one")
for r in others:
    print(f"70B in shards, limit {r['cap_bytes'] / GIB} GiB: {r['outcome']}")
print(f"predicted reserve {now(others[0]).peak_reserved_bytes / GIB:.2f} GiB")

# %% [markdown]
# It is the same. The smallest limit, between 25.5 and 26.25 GiB, is where the reserve was predicted: a block of memory goes back
# whole or not at all. So compare the reserve with your card. (`data/scripts/measure/shared_gpu.py` lets several processes run on
# one GPU.)
#
# ## What is sent
#
# What crosses the wire follows from the shape of the model, as in lesson 5. First data parallel. Weights that are not trained have
# no gradient, so once a step the gradients of the *adapters* are exchanged, and nothing else. That is QLoRA's good fortune; full
# fine-tuning sends a gradient for every weight:

# %% tags=["nbval-check-output"]
def received(size: float, ranks: int) -> float:
    """Bytes that each rank receives in an all-gather or a reduce-scatter of `size` bytes."""
    return size * (ranks - 1) / ranks


shape = find_shape("meta-llama/Llama-3.1-8B")
gradients = {
    "QLoRA, rank 16": 4 * shape.lora_parameters(16),
    "full fine-tuning": 2 * shape.parameters,
}
sent = {name: 2 * received(size, 2) for name, size in gradients.items()}  # there and back
for name, size in sent.items():
    print(f"{name}: {size / 1e6:,.0f} MB for each of two GPUs, once a step")

# %% [markdown]
# How long does that take? By the data sheets, one way at a time:
#
# - NVLink, from one H200 to another: 900 GB/s in both directions together, says NVIDIA. (On H100, which has the same, a user
#   [measured](https://github.com/NVIDIA/nccl/issues/1264) 380 of the 450 GB/s of one direction.)
# - PCIe 4.0, the slot of an RTX 4090, which has no NVLink: 16 billion transfers of a bit per second on each of 16 lanes, of
#   which 128 in 130 are data. Cards that cannot write to each other go through main memory, and are slower.
# - Ethernet between machines: by its name, in bits.
#
# All are the most that can be. And a step with 8,192 tokens of 8B takes an H200 as long as lesson 11's table says. If two of them
# share it, each computes half as long, and waits for the exchange:

# %% tags=["nbval-check-output"]
LINKS = {  # bytes per second, one way
    "NVLink": 900e9 / 2,
    "PCIe 4.0": 16e9 * 16 * 128 / 130 / 8,
    "Ethernet 100": 100e9 / 8,
    "Ethernet 10": 10e9 / 8,
}
timings = json.loads(data_path("measured", "speed.json").read_text(encoding="utf-8"))["rows"]
(timed,) = [row for row in timings if row["label"] == "8b bf16 4x2048 full ours compiled"]
step = 8192 / timed["tokens_per_second"]
table = [[link, speed / 1e9, *(step / (step / 2 + size / speed) for size in sent.values())]
         for link, speed in LINKS.items()]
print(f"{step:.2f} s on one H200; two of them are so many times as fast:")
show_table(["link", "GB/s", *sent], table, formats=["", ".1f", ".2f", ".2f"])

# %% [markdown]
# With QLoRA a second GPU pays even over a slow network, and the more so with accumulated batches, since the exchange comes once in
# a step. (The numbers of full fine-tuning are those of a QLoRA step with another exchange: its own step is different.)
#
# Sharding is another matter. Each layer is gathered once on the way forward and, since it was freed, once more on the way
# back, in *every* pass. What is gathered are packed 4-bit codes, a quarter of 16-bit weights, and adapters, which are small. While
# one layer computes, the next can be gathered. So ask of a layer: do its products take longer than its gather? Forward, for the
# tokens of one GPU:

# %% tags=["nbval-check-output"]
RATES = {"H200": 790e12, "RTX 4090": 165.2e12}  # operations per second
layer_weights = large.linear_parameters / large.num_hidden_layers
gather = received(layer_weights / 2, 2)  # two codes to a byte
print(f"{gather / 1e6:.0f} MB for each layer and gather, {layer_weights / 1e6:.0f} million weights")
pairs = [
    ("H200", "NVLink"), ("H200", "Ethernet 100"),
    ("RTX 4090", "PCIe 4.0"), ("RTX 4090", "Ethernet 10"),
]
hidden = {
    (gpu, link): gather / LINKS[link] * RATES[gpu] / (2 * layer_weights) for gpu, link in pairs
}
table = [[*pair, gather / LINKS[pair[1]] * 1e3, tokens] for pair, tokens in hidden.items()]
headings = ["GPU", "link", "gather, ms", "hidden from … tokens"]
show_table(headings, table, formats=["", "", ".2f", ",.0f"])

# %% [markdown]
# The rate of the H200 is lesson 11's; that of the RTX 4090 is the one in NVIDIA's paper on its architecture (bfloat16 with
# float32 sums), which no run will reach. A slower product hides more, so these are the worst cases. On the way back each gather
# has twice the products: half of the tokens are enough.

# %%
tokens = [2**power for power in range(4, 16)]
fig, ax = plots.figure(figsize=(7.2, 4.2))
for (name, rate), colour in zip(RATES.items(), (plots.BLUE, plots.ORANGE), strict=True):
    took = [2 * layer_weights * n / rate * 1e3 for n in tokens]
    ax.plot(tokens, took, color=colour, label=f"products, {name}")
for link, speed in LINKS.items():
    ax.axhline(gather / speed * 1e3, color="#777777", linewidth=1, linestyle="--")
    x, side = (tokens[-1], "right") if link == "NVLink" else (tokens[0], "left")
    ax.text(x, gather / speed * 1e3, f"gather over {link}", ha=side, va="bottom", fontsize=9)
for gpu, link in pairs:
    ax.plot(hidden[gpu, link], gather / LINKS[link] * 1e3, "o", color="#333333", markersize=5)
ax.set(xscale="log", yscale="log")
ax.set(xlabel="tokens on one GPU in a pass", ylabel="ms for one layer, forward")
ax.set_xticks([100, 1000, 10_000], labels=["100", "1,000", "10,000"])
ax.set_yticks([0.1, 1, 10, 100], labels=["0.1", "1", "10", "100"])
ax.set_title("NVLink and PCIe are hidden by a chat or two, a network is not")
ax.legend(fontsize=9, loc="lower right")
plots.show(fig, "12.3")

# %% [markdown]
# With an offload the link is that to main memory, and each card fetches all of a layer, not half of it. So even a single card
# can train 70B, says the prediction, if its owner has the main memory and the time:

# %% tags=["nbval-check-output"]
fetched = large.linear_parameters / 2
seconds = 2 * fetched / LINKS["PCIe 4.0"]  # forward, backward
one_chat = replace(run, batch_size=1, max_length=2048)
alone = predict(large, on_gpus(one_chat, 1, cpu_offload=True), "4090")
print(f"{fetched / 1e9:.1f} GB come twice in each pass, {seconds:.1f} s at best")
for length in (512, 2048):
    products = length * 3 * 2 * large.linear_parameters / RATES["RTX 4090"]
    pace = length / max(seconds, products)
    print(f"{length:,} tokens: products {products:.1f} s; {pace:,.0f} tokens/s at best")
on_card, host = alone.device_bytes / GIB, alone.host_bytes_of_run / GIB
print(f"on the card {on_card:.1f} GiB, in main memory {host:.0f} GiB")

# %% [markdown]
# So the title could be made true: with 96 GB of main memory beside the card, and FSDP's offload. The article has neither. We have
# not run it on one card, either: this is a prediction.
#
# ### How fast were two?
#
# The five runs that did not run out of memory, and one GPU, each step with one chat on each:

# %% tags=["nbval-check-output"]
(single,) = [r for r in runs if r["label"] == "8B one x1 2048"]
paces = {(r["model"], WAYS[r["way"]]): r for r, _ in ran} | {("8B", "one GPU"): single}
table = []
for (name, way), r in paces.items():
    pace = r["tokens_per_second"]
    table.append([name, way, r["tokens"], pace, r["processes"] * r["tokens"] / pace])
header = ["", "", "tokens of a chat", "tokens/s", "s a step"]
show_table(header, table, formats=["", "", ",d", ",d", ".2f"])
share = {way: paces["8B", way]["tokens_per_second"] / single["tokens_per_second"]
         for way in ("copies", "shards", "offloaded")}
print("8B, times the pace of one GPU:", ", ".join(f"{way} {x:.2f}" for way, x in share.items()))
(four,) = [row for row in timings if row["label"] == "8b bf16 4x2048 full ours"]
pace = four["tokens_per_second"]
print(f"one GPU with four chats in a step: {pace:,.0f} tokens/s, {4 * 2048 / pace:.2f} s a step")
print(f"8B at 200 tokens/s: {2 * 2048 / 200:.0f} s a step")

# %% [markdown]
# How these two are joined was not recorded; usually it is NVLink. Over PCIe alone shards should lose more, and offloaded ones most.
#
# Two GPUs with copies are only 1.34 times as fast as one. The wire is not to blame: 168 MB take NVLink less than a millisecond. But
# one chat is too little for such a GPU. Four take *one* GPU only twice as long, so that it makes more than these two (lesson 11).
# Fill each GPU before you add another. (One was measured on another machine, and the CPU of the two had other work: two can be
# faster than this.)
#
# What is the last line about? **When it was first measured, 8B offloaded made 200 tokens/s**, a step in 20 seconds. Nothing failed.
# But even the weights of 70B can come in 2.2 seconds, by the sum above, and those of 8B in less. So we looked at a
# profile of a step, which lists the operations and how long each took: the time went into the loss, *on the CPU*.
#
# FSDP gathers a layer when the layer is run. TRL's loss does not run the output head. It takes the head's weight, and computes piece by
# piece with it. So it has to gather the weight itself, and does that where the shard lies: with an offload, in main memory. There it
# also computed. The course now asks FSDP to gather the head when the decoder ends (`HeadOnTheGPU` in
# `qlora_helpers/training/sharded.py`), and the pace is 16 times as high. The memory that it takes there is the peak that had not been predicted.
# Without the rough sum, 200 tokens/s would have seemed to be what offloading costs.
#
# ## Which GPUs?
#
# Now turn the question round: on which sets of equal GPUs does the run fit? The course has no prices, so the sets are
# in the order of their memory, and what lies in main memory costs nothing here:

# %% tags=["nbval-check-output"]
for length in (512, 2048):
    print(f"70B, rank {run.rank}, chats of {length:,} tokens:")
    wanted = replace(run, batch_size=1, max_length=length)
    table = []
    for one in cheapest_sets(large, wanted):
        p = one.prediction
        table.append([str(one), one.gpus[0], p.device_bytes / GIB, p.host_bytes_of_run / GIB])
    header = ["GPUs", "such as", "GiB on each", "GiB in main memory"]
    show_table(header, table, formats=["", "", ".1f", ".0f"])

# %% [markdown]
# A set without *FSDP* has the whole model on each card. Those with an offload are small in memory and slow: all that is not on the
# card comes over the bus, twice in each pass. For the fewest cards that keep their shards the table says two of 32 GB, or
# four of 20 or 24 GB. One card of 48 GB has less memory than all of these, and nothing to exchange: if you can choose, choose that.
#
# With the GPUs given, how many chats can each take? The more, the better their exchange is hidden. The most chats of 2,048 tokens
# on each GPU, by kind, way and number:

# %% tags=["nbval-check-output"]
def chats_on_each(gpu: str, way: str, number: int) -> int:
    """The most chats of 2,048 tokens that each of these GPUs can take; 0 if it does not fit."""
    several = replace(run, batch_size=number, max_length=2048, num_gpus=number)
    if way != "copies":
        several = on_gpus(several, number, cpu_offload=way == "offloaded")
    return largest_batch(large, several, gpu) // number


numbers = (2, 4, 8)
table = [[gpu, way, *(chats_on_each(gpu, way, number) for number in numbers)]
         for gpu in ("4090", "a6000", "a100-80") for way in ("copies", "shards", "offloaded")]
header = ["GPU", "", *(f"on {number}" for number in numbers)]
show_table(header, table, formats=["", "", *["d"] * 3])

# %% [markdown]
# Copies take on each GPU what fits on one, however many there are. Shards give room, up to what is not split. An offload gives
# more room still, and needs it: each layer takes longer to come.
#
# ### Several machines
#
# Between machines is a network. Should the shards be spread over all machines, or should each machine have all of them, split over
# its own GPUs, and exchange only adapter gradients with the others? (The latter is called hybrid sharding.) For two machines of four
# RTX 4090 each, with a network card of 10 or 100 gigabits that the four share:

# %% tags=["nbval-check-output"]
layers = large.linear_parameters / 2
adapters = 4 * large.lora_parameters(run.rank)
table = []
for link in ("Ethernet 10", "Ethernet 100"):
    # at the least: each machine gets the other's half of each layer once, forward and backward
    spread = 2 * received(layers, 2) / LINKS[link]
    within = 2 * received(adapters, 2) / LINKS[link]
    table.append([link, spread, within])
header = ["link", "spread over both, s a pass", "split within each, s a step"]
show_table(header, table, formats=["", ".1f", ".2f"])
products = 2 * 2048 * 3 * 2 * large.linear_parameters / RATES["RTX 4090"]
print(f"products of 2 chats of 2,048 tokens on each GPU: {products:.1f} s a pass")

# %% [markdown]
# Over the slower network a pass would wait longer for weights than it computes. So split within a machine, and copy between
# machines. What a GPU holds is then what the predictor says for the GPUs of one machine. This course's own commands run on one
# machine.
#
# ## The command
#
# `torchrun` starts one program several times, and tells each process its rank. Nothing else in the command changes:
#
# ```
# torchrun --nproc-per-node 2 -m qlora_helpers run --model MODEL --data FILE
# ```
#
# That is data parallel. Shards need a few settings more, which `accelerate launch` reads from a file that comes with the course
# (`fsdp_offload.yaml` beside it keeps the shards in main memory):
#
# ```
# accelerate launch --config_file data/accelerate/fsdp.yaml -m qlora_helpers run --model MODEL --data FILE
# ```
#
# (For one card with its weights in main memory: `fsdp_offload.yaml` and `--num_processes 1`.)
#
# Two processes also run on a CPU, with gloo. Here are three runs of the shipped model, made beforehand, since they take longer
# than the rest of this lesson (`data/measured/two_processes.json`): one process; two that share its batch;
# and two that take a batch of that size *each*. Half of the chats have one question and half three, so that the two have different
# numbers of answer tokens. Predict: will the second run learn what the first learns? And the third?

# %% tags=["nbval-check-output"]
made = json.loads(data_path("measured", "two_processes.json").read_text(encoding="utf-8"))
table = [[r["row"], r["chats_of_a_step"], r["loss_history"][-1][1], r["test_loss"], r["distance"]]
         for r in made["rows"]]
header = ["run", "chats of a step", "last loss", "test loss", "adapter off by"]
print(f"{made['steps']} steps")
show_table(header, table, formats=["", "", ".3f", ".3f", ".1e"])

# %% [markdown]
# Two processes learn what one learns: their adapters differ by rounding, which the steps have carried on. With twice the chats in
# each step something else is learned, and each step costs twice as much.
#
# On two H200 these commands ran, too (`tests/gpu/test_several_gpus.py`): with copies the shipped model reached the score of one
# GPU within its noise. With shards, offloaded or not, the losses were those of one in their first digits. Not tried on two GPUs are the
# longest chats, a run that is killed and resumed (on CPUs the tests do that), and cards without NVLink.
#
# ## Exercise 12.1: an average that changes nothing
#
# *Build · easy · about 8 minutes.* Write `averaged(gradients, tokens)`. It gets what some ranks have found: for each the gradient
# of the mean loss over its own answer tokens, and how many these are. It gives back the gradient of the mean loss over the
# answer tokens of all ranks, as one GPU would have found it. A rank may have no answer tokens; its gradient is then zero.

# %% tags=["exercise"]
def averaged(gradients: list[torch.Tensor], tokens: list[int]) -> torch.Tensor:
    ...

# %% tags=["solution"]
def averaged(gradients: list[torch.Tensor], tokens: list[int]) -> torch.Tensor:
    sums = [gradient * count for gradient, count in zip(gradients, tokens, strict=True)]
    return sum(sums) / sum(tokens)

# %% tags=["nbval-check-output"]
exercises.averaged.check(averaged)

# %% [markdown]
# ## Exercise 12.2: bytes in a step
#
# *Build · medium · about 15 minutes.* How many bytes does each rank *receive* in one step? Write it for `adapters` bytes of adapters,
# with as many bytes of gradients; `packed` bytes of 4-bit weights; so many `ranks`; and so many `passes` that make a step, by
# accumulation.
#
# - Copies (`sharded=False`) exchange the gradients once a step, with an all-reduce.
# - Shards (`sharded=True`) gather weights and adapters before they are used, forward and backward. Gradients are reduce-scattered
#   once a step.

# %% tags=["exercise"]
def received_in_a_step(adapters, packed, ranks, passes, sharded):
    return ...

# %% tags=["solution"]
def received_in_a_step(adapters, packed, ranks, passes, sharded):
    if not sharded:
        return 2 * received(adapters, ranks)
    gathered = 2 * passes * received(packed + adapters, ranks)
    return gathered + received(adapters, ranks)

# %% tags=["nbval-check-output"]
exercises.received_in_a_step.check(received_in_a_step)

# %% [markdown]
# ## Exercise 12.3: which way?
#
# *Predict · medium · about 10 minutes.* Four QLoRA runs with `GPU_RUN`'s settings on the GPUs of one machine. For each choose the first
# way that fits, in this order: `"copies"`, `"shards"`, `"offloaded"`, or `"none"` of these. Answer from what you have seen; then
# ask the predictor.
#
# - **A**: Llama-3.1-8B on two RTX 4090, 4 chats of 2,048 tokens in a step;
# - **B**: Llama-3.1-70B on two RTX 4090, 2 chats of 512 tokens;
# - **C**: Llama-3.1-70B on four RTX 4090, 4 chats of 2,048 tokens;
# - **D**: Llama-3.1-70B on two A100 80GB, 4 chats of 2,048 tokens.

# %% tags=["exercise"]
chosen = {"A": ..., "B": ..., "C": ..., "D": ...}

# %% tags=["solution"]
chosen = {"A": "copies", "B": "offloaded", "C": "shards", "D": "copies"}

# %% tags=["nbval-check-output"]
exercises.way.check(chosen)

# %% [markdown]
# ## Exercise 12.4: why does it learn differently?
#
# *Run · hard · about 20 minutes.* Two ranks shared seven chats, dealt out by torch's own sampler. They averaged by answer tokens, as
# they should. Still their gradient is not that of the seven chats:

# %%
seven = [*chats[20:24], *long[:3]]
strange = exercises.a_strange_gradient(gradient_of, seven)
wanted, _ = gradient_of(seven)
print(f"off by {off(strange):.1%}")

# %% [markdown]
# How often does each of the chats count? Write it as a list of seven numbers, and find it by computing. Then you know what the
# sampler does with a number of chats that two ranks cannot share evenly.

# %% tags=["exercise"]
counts = ...

# %% tags=["solution"]
# the sampler gives each rank as many chats as the other, so it takes one twice. So does
# accelerate at the end of an epoch, if it is not told otherwise; this course's trainer deals out the
# chats of a step itself
found = [gradient_of([chat]) for chat in seven]
columns = torch.stack([gradient * tokens for gradient, tokens in found], dim=1)
factors = torch.linalg.lstsq(columns, strange[:, None]).solution.flatten()
counts = (factors / factors.min()).tolist()

# %% tags=["nbval-check-output"]
exercises.counts.check(counts)

# %% [markdown]
# ## You have
# - seen what a 70B model takes on one card, and that an article's title promises what its code cannot do;
# - shared a batch between two processes, and averaged their gradients by answer tokens;
# - split the weights of a layer over two GPUs by hand, and made the same step as with copies, bit for bit;
# - seen why 4-bit weights need another name before they can be split;
# - held what is predicted for two GPUs against what two GPUs took;
# - computed what is sent in a step, and when two GPUs help and when they do not;
# - found the GPUs that can train 70B, and the command that starts such a run.
#
# Next: [lesson 13](13_which_adapter.ipynb) asks which of LoRA's variants is worth its trouble on a 4-bit base.
