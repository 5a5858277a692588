# %% [markdown]
# # 1 · Memory maths: will it fit?
#
# To *fine-tune* a language model is to train it further on data of one's own. For a model of 8 billion numbers that
# takes more memory than any graphics card for consumers has. QLoRA does it on one: it stores the model in 4 bits per
# number, leaves it as it is, and trains a small addition. This lesson counts every byte of that.
#
# You will
# - compute the bytes of weights, gradients and optimizer states for real models, and see why 8B and 70B do not fit;
# - tell GB from GiB, float16 from bfloat16, and a model's size in 4 bits from "half a byte per parameter";
# - count LoRA's trainable parameters by formula, and get the same number from PEFT;
# - see how activations grow with the length of a text, and on what that depends;
# - find out why a run takes more than it should.
#
# Takes about {{seconds}} seconds and {{gigabytes}} GB of memory on two processor cores. No GPU is needed. The large
# models are counted, not loaded.

# %%
import json

from qlora_helpers.course import diagrams, plots
from qlora_helpers.course.checks import check
from qlora_helpers.course.exercises import lesson_01 as exercises
from qlora_helpers.course.tables import show_table
from qlora_helpers.memory import known_config
from qlora_helpers.models.loading import load_model
from qlora_helpers.models.meta import meta_model
from qlora_helpers.models.weights import bytes_by_part
from qlora_helpers.paths import data_path

import torch
import transformers

print("torch", torch.__version__.split("+")[0], "· transformers", transformers.__version__)

# %% [markdown]
# ## The way through the course
#
# Begin with the first four lessons. From there, go where you like.

# %%
plots.show(diagrams.course_map(), "1.1")

# %% [markdown]
# Every lesson runs on a laptop. Where there is a GPU, it uses it: the course has three *[gears](../GLOSSARY.md#gear)*,
# named `cpu`, `t4` and `ampere`, and takes the one that suits your machine. This lesson does the same in all three.
#
# ## Two units with almost the same name
#
# A gigabyte (GB) is a power of 10. A gibibyte (GiB) is a power of 2, and 7 % larger. Model files are sold in GB, GPU
# tools count in GiB. A card "with 24 GB" has 24 GiB:

# %% tags=["nbval-check-output"]
GB = 10**9
GIB = 2**30
print(f"1 GiB is {GIB / GB:.4f} GB")
print(f"a card with 24 GiB holds {24 * GIB / GB:.2f} GB")

# %% [markdown]
# ## How many parameters?
#
# The numbers that a model learns are its *parameters*; most of them are the *weights* of matrices. The name says "8B",
# 8 billion. The shape says it exactly. A Llama is a stack of *decoder layers*, each with seven matrices, called linear
# layers: four for attention (q, k, v, o) and three for the part behind it, the MLP (gate, up, down). The model reads
# text as *[tokens](../GLOSSARY.md#token)*, words or pieces of words. Before the stack stand the *embeddings*, a row of
# numbers for each token that it knows; after it the *output head* (`lm_head`), which scores each of them as the next
# one. In between, small *norms* keep the numbers in a steady range. Here is the whole count, by hand.

# %%
KNOWN = {
    "Llama-3.2-1B": known_config("meta-llama/Llama-3.2-1B"),
    "Mistral-7B": known_config("mistralai/Mistral-7B-v0.1"),
    "Llama-3.1-8B": known_config("meta-llama/Llama-3.1-8B"),
    "Llama-2-70B": known_config("meta-llama/Llama-2-70b-hf"),
    "Llama-3.1-70B": known_config("meta-llama/Llama-3.1-70B"),
}
LLAMA_3_1_8B, LLAMA_3_1_70B = KNOWN["Llama-3.1-8B"], KNOWN["Llama-3.1-70B"]

# %% tags=["nbval-check-output"]
def linear_parameters(s: dict) -> int:
    """Parameters of the linear layers of all decoder layers: what QLoRA stores in 4 bits."""
    h, i = s["hidden_size"], s["intermediate_size"]
    kv = h // s["num_attention_heads"] * s["num_key_value_heads"]  # width of keys and values
    attention = h * h + h * kv + h * kv + h * h  # q, k, v, o
    mlp = 3 * h * i  # gate, up, down
    return s["num_hidden_layers"] * (attention + mlp)


print(f"linear layers of Llama-3.1-8B: {linear_parameters(LLAMA_3_1_8B):,}")

# %% tags=["nbval-check-output"]
def other_parameters(s: dict) -> int:
    """What stays in 16 bits: embeddings, output head (unless it shares their weights) and norms."""
    h, layers = s["hidden_size"], s["num_hidden_layers"]
    tables = 1 if s["tie_word_embeddings"] else 2
    return tables * s["vocab_size"] * h + (2 * layers + 1) * h


total_8b = linear_parameters(LLAMA_3_1_8B) + other_parameters(LLAMA_3_1_8B)
print(f"Llama-3.1-8B: {total_8b:,} parameters")

# %% [markdown]
# Does the formula hold? transformers can build a model on the "meta" device: every layer is there, no memory is taken.
# It must have the same count, for every model.

# %% tags=["nbval-check-output"]
for name, shape in KNOWN.items():
    counted = meta_model(shape).num_parameters()
    check(name, linear_parameters(shape) + other_parameters(shape), counted, exact=True)

# %% [markdown]
# ## Weights alone
#
# A parameter takes 4 bytes in float32, 2 in float16 or bfloat16, 1 in 8 bits, half a byte in 4 bits.

# %% tags=["nbval-check-output"]
bytes_each = {"float32": 4, "16 bit": 2, "8 bit": 1, "4 bit": 0.5}
rows = []
for name in ("Llama-3.1-8B", "Llama-3.1-70B"):
    parameters = linear_parameters(KNOWN[name]) + other_parameters(KNOWN[name])
    for dtype, size in bytes_each.items():
        rows.append((name, dtype, parameters * size / GB, parameters * size / GIB))
show_table(["model", "stored in", "GB", "GiB"], rows, formats=["", "", ".2f", ".2f"])

# %% [markdown]
# So 70B in 16 bits takes 141.11 GB: no single card that one can rent cheaply holds it. The last line, 35.28 GB, is the
# number that one reads everywhere. It is too small, as you will see below, because not everything is stored in 4 bits.
#
# ### Two kinds of 16 bits
#
# float16 and bfloat16 both take 2 bytes, and spend them differently:

# %% tags=["nbval-check-output"]
rows = []
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    about = torch.finfo(dtype)
    rows.append((str(dtype).removeprefix("torch."), about.bits, about.max, about.eps))
headings = ["dtype", "bits", "largest number", "step above 1"]
show_table(headings, rows, formats=["", "", ",.6g", ".2g"])

# %% [markdown]
# float16 is finer. bfloat16 is coarser, and reaches as far as float32. In training, range matters more: a number that
# is too large becomes infinite, and a small gradient becomes zero.

# %% tags=["nbval-check-output"]
for dtype in (torch.float16, torch.bfloat16):
    large, small = torch.tensor([1e5, 1e-8]).to(dtype).tolist()
    print(f"{dtype}: 100,000 becomes {large:g}, and 0.00000001 becomes {small:.1g}")

# %% [markdown]
# So bfloat16 is the choice where the GPU has it, which NVIDIA's cards do since Ampere (2020). A T4 is older: there it
# must be float16, with some care ([lesson 8](08_stability.ipynb)). That is the main difference between the `t4` and
# `ampere` gears.
#
# ## Training needs more than weights
#
# Full fine-tuning, in which all weights are trained, keeps for each of them its gradient (in which direction to change
# it), and two numbers of the [optimizer](../GLOSSARY.md#optimizer-states) AdamW: running means of the gradient and of
# its square. How many bytes that is depends on the dtypes:

# %% tags=["nbval-check-output"]
recipes = {  # weight + gradient + the two means of AdamW
    "all in bfloat16": 2 + 2 + 2 + 2,
    "bfloat16, optimizer in float32": 2 + 2 + 4 + 4,
    "mixed precision with float32 weights": 2 + 2 + 4 + 4 + 4,  # a copy of each weight in float32
}
total_70b = linear_parameters(LLAMA_3_1_70B) + other_parameters(LLAMA_3_1_70B)
rows = [(name, size, total_8b * size / GB, total_70b * size / GB) for name, size in recipes.items()]
show_table(["recipe", "bytes each", "8B, GB", "70B, GB"], rows, formats=["", "", ".1f", ".1f"])

# %% [markdown]
# Even the smallest recipe needs 64.2 GB for 8B, before a single text has gone through the model. (Articles that give
# less are listed in [CLAIMS.md](../CLAIMS.md#A91.1).) The QLoRA paper says "more than 780 GB" for a model of 65B. That
# is the recipe of 12 bytes:

# %% tags=["nbval-check-output"]
print(f"65 billion parameters at 12 bytes: {65e9 * 12 / GB:.0f} GB")

# %% [markdown]
# ## LoRA: train little
#
# [LoRA](../GLOSSARY.md#lora) freezes a weight matrix `W` of shape (out, in) and adds the product of two thin matrices,
# `B` (out, r) and `A` (r, in). Together these are an *[adapter](../GLOSSARY.md#adapter)*, and `r` is its
# *[rank](../GLOSSARY.md#rank)*. So each linear layer has `r * (in + out)` trainable parameters.

# %% tags=["nbval-check-output"]
def lora_parameters(s: dict, rank: int) -> int:
    """Trainable parameters of LoRA on all seven linear layers."""
    h, i = s["hidden_size"], s["intermediate_size"]
    kv = h // s["num_attention_heads"] * s["num_key_value_heads"]
    sides = 2 * (h + h) + 2 * (h + kv) + 3 * (h + i)  # in + out of q, o; k, v; gate, up, down
    return s["num_hidden_layers"] * rank * sides


print(f"8B,  rank 16: {lora_parameters(LLAMA_3_1_8B, 16):,}")
print(f"70B, rank 64: {lora_parameters(LLAMA_3_1_70B, 64):,}")
check("Llama-2-70B, rank 64", lora_parameters(KNOWN["Llama-2-70B"], 64), 828_375_040, exact=True)

# %% [markdown]
# PEFT, the library that adds adapters to a model, counts the same. It has a count of its own for the whole model, too:

# %% tags=["nbval-check-output"]
from peft import LoraConfig, get_peft_model

lora = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
trainable, everything = get_peft_model(meta_model(LLAMA_3_1_8B), lora).get_nb_trainable_parameters()
check("trainable, by PEFT", trainable, lora_parameters(LLAMA_3_1_8B, 16), exact=True)
check("all, by PEFT", everything, total_8b + trainable, exact=True)
print(f"share: {trainable / everything:.4%}")

# %% [markdown]
# Do not count a 4-bit model with `numel()`. A byte holds two of its weights, so `numel()` sees half of them. PEFT knows
# that, and doubles:

# %% tags=["nbval-check-output"]
naive = linear_parameters(LLAMA_3_1_8B) // 2 + other_parameters(LLAMA_3_1_8B) + trainable
print(f"as PEFT counts:    {everything:,}, {trainable / everything:.4%}")
print(f"as numel() counts: {naive:,}, {trainable / naive:.4%}")

# %% [markdown]
# ## What "4 bit" really costs
#
# QLoRA stores the linear layers in 4 bits. Three things come on top:
# - a scale for each block of 64 weights. QLoRA stores it in 8 bits, plus 32 bits for every 256 blocks; that is *double
#   quantisation*, and [lesson 3](03_double_quantisation.ipynb) takes it apart;
# - the embeddings and the output head stay in 16 bits;
# - so do the norms, which are small.

# %% tags=["nbval-check-output"]
bits = 4 + 8 / 64 + 32 / (64 * 256)


def qlora_weight_bytes(s: dict) -> float:
    """Bytes of the weights under QLoRA with double quantisation."""
    return linear_parameters(s) * bits / 8 + other_parameters(s) * 2


print(f"{bits} bits per quantised parameter")
rows = []
for name in ("Llama-3.1-8B", "Llama-2-70B", "Llama-3.1-70B"):
    size = qlora_weight_bytes(KNOWN[name])
    rows.append((name, size / GB, size / GIB))
show_table(["model", "GB", "GiB"], rows, formats=["", ".2f", ".2f"])

# %% [markdown]
# So Llama-3.1-70B takes 39.52 GB rather than 35, and does not fit a card of 24 GiB (25.77 GB), whatever the title of an
# article may promise.
#
# A formula is a claim until something is measured. Below are the bytes that an H200 GPU held after loading these models
# with bitsandbytes, the library that stores them in 4 bits (`data/measured/h200_peaks.json`).

# %% tags=["nbval-check-output"]
measured = json.loads(data_path("measured", "h200_peaks.json").read_text(encoding="utf-8"))
loaded = {run["model"]: run["loaded_bytes"] for run in measured if run["method"] == "qlora"}
for name in ("Llama-3.1-8B", "Llama-3.1-70B"):
    formula = qlora_weight_bytes(KNOWN[name])
    print(f"{name:14} formula {formula:,.0f}  measured {loaded[name.lower()]:,}")
    check(f"{name} in GB", loaded[name.lower()] / GB, formula / GB, rel=0.005)

# %% [markdown]
# With the course comes a small model, a Llama of 3 million parameters. It has the same parts. It is small, so its
# embeddings weigh far more than in a large model. On a CPU the parts that are not in 4 bits are float32.

# %% tags=["nbval-check-output"]
from qlora_helpers.hardware import detect

cpu = detect("cpu")
parts = bytes_by_part(load_model(quantization="nf4", hardware=cpu))
show_table(["part", "bytes"], list(parts.items()), formats=["", ",d"])
check("half a byte per linear parameter", parts["4-bit weights"], 2_359_296 // 2, exact=True)

# %% [markdown]
# ## The whole picture for 8B
#
# Full fine-tuning with the recipe of 12 bytes, LoRA on 16-bit weights, and QLoRA. The latter two have adapters of rank
# 16, with adapters, gradients and AdamW's states in float32. Counted are weights, gradients and optimizer states, wherever
# they lie, and no activations.

# %%
adapters = lora_parameters(LLAMA_3_1_8B, 16)
methods = ["full fine-tuning", "LoRA, 16 bit", "QLoRA"]
parts = {
    "weights": [total_8b * 2, total_8b * 2, qlora_weight_bytes(LLAMA_3_1_8B)],
    "adapters": [0, adapters * 4, adapters * 4],
    "gradients": [total_8b * 2, adapters * 4, adapters * 4],
    "optimizer": [total_8b * 8, adapters * 8, adapters * 8],
}
fig, ax = plots.figure(figsize=(7.2, 2.8))
in_gb = {part: [v / GB for v in sizes] for part, sizes in parts.items()}
plots.stacked_bars(ax, methods, in_gb, "GB")
ax.set_title("8B without activations: QLoRA needs a fifteenth")
plots.show(fig, "1.2")

# %% tags=["nbval-check-output"]
totals = [sum(column) / GB for column in zip(*parts.values())]
show_table(["method", "GB"], list(zip(methods, totals)), formats=["", ".1f"])
print(f"full / QLoRA: {totals[0] / totals[2]:.1f}")

# %% [markdown]
# ## Activations: it depends on the attention kernel
#
# What is still missing are the *[activations](../GLOSSARY.md#activations)*: the intermediate results of the forward
# pass that the backward pass will need. The longer the text, the more there are. PyTorch can tell us every tensor that
# it keeps:

# %%
from torch.autograd.graph import saved_tensors_hooks


def saved_bytes(model, length: int) -> int:
    """Bytes of distinct tensors that autograd keeps for the backward pass, without the weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so no address comes twice
        return tensor

    tokens = torch.ones(1, length, dtype=torch.long, device=model.device)
    with saved_tensors_hooks(note, lambda tensor: tensor):
        model(input_ids=tokens, use_cache=False)
    return sum(size for size, _ in kept.values())

# %% [markdown]
# Attention compares every token with every other: that makes a score for each pair, a matrix of tokens × tokens in each
# head. Must it be kept? That depends on the code that computes it, the *kernel*. A *fused* kernel, such as
# FlashAttention, works on small pieces of the matrix and forgets them. PyTorch's plain one, called *math*, makes the
# whole matrix and keeps it. The shipped model with both:

# %% tags=["nbval-check-output"]
from torch.nn.attention import SDPBackend, sdpa_kernel

small = load_model(quantization=None, hardware=cpu)
lengths = [64, 128, 256, 512, 1024]
fused = [saved_bytes(small, length) for length in lengths]
with sdpa_kernel(SDPBackend.MATH):
    plain = [saved_bytes(small, length) for length in lengths]
for length, doubled in zip(lengths[1:], [b / a for a, b in zip(fused, fused[1:])]):
    check(f"{length} tokens keep twice as much as {length // 2}", doubled, 2, rel=0.02)
check("with the math kernel, 1024 tokens over 512", plain[-1] / plain[-2], at_least=2.4)
print(f"at 1024 tokens the math kernel keeps {plain[-1] / fused[-1]:.1f} times as much")

# %%
fig, ax = plots.figure()
ax.plot(lengths, [b / 1e6 for b in plain], marker="s", color=plots.RED, label="math kernel")
ax.plot(lengths, [b / 1e6 for b in fused], marker="o", label="fused kernel")
ax.set_ylim(bottom=0)
ax.set_xlabel("tokens in the sequence")
ax.set_ylabel("kept for the backward pass (MB)")
ax.set_title("A fused kernel keeps activations linear in the tokens")
ax.legend()
plots.show(fig, "1.3")

# %% [markdown]
# So "memory grows with the square of the length" is true of one kernel and false of the other. On newer GPUs you get a
# fused one. A T4 has no FlashAttention, and newer models save memory by letting several query heads share their keys
# and values ([grouped-query attention](../GLOSSARY.md#grouped-query-attention)). With such a model, plain transformers
# falls back to math on a T4. The `t4` gear of this course avoids that; [lesson 5](05_will_it_fit.ipynb) shows both,
# measured.
#
# *[Gradient checkpointing](../GLOSSARY.md#gradient-checkpointing)* goes further. It keeps only the input of each layer,
# and computes the rest again in the backward pass. That takes less memory and more time.
#
# ## The whole run
#
# So what does a training run take, all in all? The course has a predictor. Here is its answer for QLoRA on
# Llama-3.1-8B, one sequence of 2,048 tokens at rank 16, on an RTX 4090. [Lesson 5](05_will_it_fit.ipynb) builds it from
# the terms of this lesson, explains the lines that are new here, and holds it against measured runs.

# %% tags=["nbval-check-output"]
from qlora_helpers.memory import find_shape, predict
from qlora_helpers.memory.methods import memory_of_methods
from qlora_helpers.settings import Settings

settings = Settings(
    batch_size=1, max_length=2048, rank=16, dropout=0.05, gradient_checkpointing=True
)
whole = predict(find_shape("meta-llama/Llama-3.1-8B"), settings, "4090")
rows = [(part, size / GB) for part, size in whole.parts.items()]
show_table(["part", "GB"], rows, formats=["", ".2f"])
print(f"at the peak, in torch's tensors: {whole.peak_allocated_bytes / GB:.2f} GB")

# %% [markdown]
# The peak comes on the way back through the last layer. Only what is there at that moment counts: no adapter has a
# gradient yet. Two parts of the table are not in the peak, since they lie outside of what torch allocates: *paged*
# optimizer states, which may move to the computer's main memory, and the CUDA context, which every program on an NVIDIA
# GPU takes.
#
# ## What is counted
#
# How much is that for full fine-tuning? The answer depends on what is counted, and on the optimizer. Here is the predictor's
# answer for the three methods, for one sequence of 2,048 tokens on a card with room for all of it:

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

# %% tags=["nbval-check-output"]
kept = [run.kept / GB for run in methods_of_8b if run.settings.optimizer == "paged_adamw_32bit"]
for name, ours, theirs in zip(methods, totals, kept):
    check(f"{name}: GB kept, by the predictor and by the picture", theirs, ours, rel=0.005)

# %% [markdown]
# ## Move the bits yourself
#
# Run the cell, then move the slider. It shows what the weights alone would take if all of them were stored in the same
# number of bits. 4.127 is the number that QLoRA spends on each weight of a linear layer.

# %%
from qlora_helpers.course.widgets import memory_slider

memory_slider({name: meta_model(config).num_parameters() for name, config in KNOWN.items()})

# %% [markdown]
# ## Exercise 1.1: which shrinks most?
#
# *Predict · easy · about 5 minutes.* QLoRA makes the weights of Llama-3.1-8B 2.8 times smaller than 16 bits do.
# Mistral-7B has linear layers of exactly the same shape. Llama-3.2-1B is much smaller. Put the three in order,
# beginning with the one that shrinks by the largest factor. Think first; the functions of this lesson may then check
# you.

# %% tags=["exercise"]
shrinks_most_first = [..., ..., ...]  # their names, such as "Mistral-7B", in your order

# %% tags=["solution"]
def shrinks(name: str) -> float:
    s = KNOWN[name]
    return 2 * (linear_parameters(s) + other_parameters(s)) / qlora_weight_bytes(s)


# the larger the share of a model that stays in 16 bits, the less it shrinks
three = ["Llama-3.2-1B", "Llama-3.1-8B", "Mistral-7B"]
shrinks_most_first = sorted(three, key=shrinks, reverse=True)

# %% tags=["nbval-check-output"]
exercises.shrinking.check(shrinks_most_first)

# %% [markdown]
# ## Exercise 1.2: LoRA on some layers
#
# *Build · medium · about 10 minutes.* The first LoRA paper adapted only the query and the value projections. Write
# `lora_parameters_of(s, rank, targets)`: the trainable parameters if only the linear layers named in `targets` are
# adapted, such as `["q_proj", "v_proj"]`. The seven names are q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj and
# down_proj.

# %% tags=["exercise"]
def lora_parameters_of(s: dict, rank: int, targets: list[str]) -> int:
    return ...

# %% tags=["solution"]
def lora_parameters_of(s: dict, rank: int, targets: list[str]) -> int:
    h, i = s["hidden_size"], s["intermediate_size"]
    kv = h // s["num_attention_heads"] * s["num_key_value_heads"]
    sides = {"q_proj": h + h, "k_proj": h + kv, "v_proj": h + kv, "o_proj": h + h}
    sides |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), h + i)
    return s["num_hidden_layers"] * rank * sum(sides[name] for name in targets)

# %% tags=["nbval-check-output"]
exercises.some_layers.check(lora_parameters_of)

# %% [markdown]
# ## Exercise 1.3: room on the card
#
# *Build · easy · about 5 minutes.* Write `leaves_room(s, card_gib)`: whether a card of `card_gib` GiB has at least 2
# GiB left once it holds the weights of a model under QLoRA.

# %% tags=["exercise"]
def leaves_room(s: dict, card_gib: float) -> bool:
    return ...

# %% tags=["solution"]
def leaves_room(s: dict, card_gib: float) -> bool:
    return qlora_weight_bytes(s) / GIB + 2 <= card_gib

# %% tags=["nbval-check-output"]
exercises.room.check(leaves_room)

# %% [markdown]
# ## Exercise 1.4: a run that takes too much
#
# *Run · medium · about 15 minutes.* A colleague trains the shipped model with LoRA of rank 16 on all linear layers. The
# function below makes one step of a real run, and counts what training adds to the frozen model. By the formula that is
# 4.2 MB. Their run takes more than three times as much:

# %% tags=["nbval-check-output"]
def bytes_of_a_step(config: LoraConfig) -> dict[str, int]:
    model = get_peft_model(load_model(hardware=cpu), config)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    tokens = torch.arange(3, 131).view(4, 32)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    states = [t for state in optimizer.state.values() for t in state.values()]
    groups = {"adapters": trained, "gradients": [p.grad for p in trained], "optimizer": states}
    return {part: sum(t.nbytes for t in tensors) for part, tensors in groups.items()}


shipped = small.config.to_dict()
print(f"by the formula {lora_parameters(shipped, 16) * 16 / 1e6:.1f} MB")
their_config = exercises.config_of_a_colleague()
print(f"their run     {sum(bytes_of_a_step(their_config).values()) / 1e6:.1f} MB")

# %% [markdown]
# Find out what is trained that should not be, and why. Then write a `LoraConfig` that takes what the formula says, with
# the same rank and on the same layers.

# %% tags=["exercise"]
repaired = ...

# %% tags=["solution"]
model = get_peft_model(load_model(hardware=cpu), exercises.config_of_a_colleague())
for name, p in model.named_parameters():
    if p.requires_grad and "lora_" not in name:
        print(f"{name}: {p.numel():,}")  # modules_to_save trains whole matrices, not adapters
repaired = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
print(bytes_of_a_step(repaired))

# %% tags=["nbval-check-output"]
exercises.too_much.check(repaired)

# %% [markdown]
# ## You have
# - computed weights, gradients and optimizer states, and seen why full fine-tuning of 8B keeps 96.4 GB of them and QLoRA 6.4
#   GB, with states in float32 and before activations;
# - told GB from GiB, float16 from bfloat16, and found 39.52 GB for 70B where half a byte per parameter gives 35;
# - counted LoRA's parameters by formula and by PEFT, 41,943,040 both times;
# - seen that activations grow linearly with the length of a text if the attention kernel is a fused one;
# - found what made a run take more than it should.
#
# Next: [lesson 2](02_nf4_vs_int4.ipynb) looks at which 16 values those 4 bits should stand for.
