# %% [markdown]
# # 1 · Memory maths: will it fit?
#
# You will
# - compute the bytes of weights, gradients and optimizer states for real models, and see why 8B and 70B do not fit;
# - tell GB from GiB, and a model's 4-bit size from the "half a byte per parameter" of the slogans;
# - count LoRA's trainable parameters by formula, and get the same number from PEFT;
# - find numbers in popular articles that are wrong, and see why.
#
# Takes about {{seconds}} seconds and {{gigabytes}} GB of memory on two processor cores. No GPU is needed. The large
# models are counted, not loaded.

# %%
import json

from qlora_helpers.course import plots
from qlora_helpers.course.checks import check, exercise
from qlora_helpers.memory import known_config
from qlora_helpers.models.loading import load_model
from qlora_helpers.models.meta import meta_model
from qlora_helpers.models.weights import bytes_by_part
from qlora_helpers.paths import data_path

import torch
import transformers

print("torch", torch.__version__.split("+")[0], "· transformers", transformers.__version__)

# %% [markdown]
# ## Two units with almost the same name
#
# A gigabyte (GB) is a power of ten. A gibibyte (GiB) is a power of two, and 7 % larger. Model files are sold in GB, GPU
# tools count in GiB. Mixing the two is an easy mistake; one of the articles behind this course makes it.

# %% tags=["nbval-check-output"]
GB = 10**9
GIB = 2**30
print(f"1 GiB is {GIB / GB:.4f} GB")
print(f"a card with 24 GiB holds {24 * GIB / GB:.2f} GB")

# %% [markdown]
# ## How many parameters?
#
# The name says "8B". The shape says it exactly. A Llama decoder layer has seven linear layers; around the layers stand
# the token embeddings and, at the end, the output head (`lm_head`). Here is the whole count, by hand.

# %%
KNOWN = {
    "Llama-3.2-1B": known_config("meta-llama/Llama-3.2-1B"),
    "Mistral-7B": known_config("mistralai/Mistral-7B-v0.1"),
    "Llama-3.1-8B": known_config("meta-llama/Llama-3.1-8B"),
    "Llama-2-70B": known_config("meta-llama/Llama-2-70b-hf"),
    "Llama-3.1-70B": known_config("meta-llama/Llama-3.1-70B"),
}
LLAMA_3_1_8B, LLAMA_3_1_70B, MISTRAL_7B = KNOWN["Llama-3.1-8B"], KNOWN["Llama-3.1-70B"], KNOWN["Mistral-7B"]

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
    """Embeddings, output head (unless it shares the embeddings' weights) and norms: they stay in 16 bits."""
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
    check(f"{name:14}", linear_parameters(shape) + other_parameters(shape), counted, exact=True)

# %% [markdown]
# ## Weights alone
#
# A parameter takes 4 bytes in float32, 2 in float16 or bfloat16, 1 in 8 bits, half a byte in 4 bits.

# %% tags=["nbval-check-output"]
bytes_each = {"float32": 4, "16 bit": 2, "8 bit": 1, "4 bit": 0.5}
for name in ("Llama-3.1-8B", "Llama-3.1-70B"):
    parameters = linear_parameters(KNOWN[name]) + other_parameters(KNOWN[name])
    for dtype, size in bytes_each.items():
        print(f"{name:14} {dtype:8} {parameters * size / GB:7.2f} GB {parameters * size / GIB:8.2f} GiB")

# %% [markdown]
# So 70B in 16 bits takes 141.11 GB: no single card that one can rent cheaply holds it. The last line, 35.28 GB, is the
# number of the slogans. It is too small, as you will see below, because not everything is stored in 4 bits.
#
# ## Training needs more than weights
#
# Full fine-tuning keeps, for each parameter, the weight, its gradient, and two numbers of the AdamW optimizer (a mean
# and a variance). How many bytes that is depends on the dtypes:

# %% tags=["nbval-check-output"]
recipes = {
    "all in bfloat16": 2 + 2 + 2 + 2,
    "bfloat16, optimizer in float32": 2 + 2 + 4 + 4,
    "mixed precision with float32 weights": 2 + 2 + 4 + 4 + 4,
}
total_70b = linear_parameters(LLAMA_3_1_70B) + other_parameters(LLAMA_3_1_70B)
for recipe, size in recipes.items():
    print(f"{recipe:37} {size:2} bytes   8B {total_8b * size / GB:6.1f} GB   70B {total_70b * size / GB:7.1f} GB")

# %% [markdown]
# One article gives "~60 GB" for full fine-tuning of 8B and "~500 GB" for 70B. Even the smallest recipe needs 64.2 GB and
# 564.4 GB, before a single activation is stored. The paper's "more than 780 GB" for 65B is the recipe of 12 bytes:

# %% tags=["nbval-check-output"]
print(f"65 billion parameters at 12 bytes: {65e9 * 12 / GB:.0f} GB")

# %% [markdown]
# ## LoRA: train little
#
# LoRA freezes a weight matrix `W` of shape (out, in) and adds the product of two thin matrices, `B` (out, r) and
# `A` (r, in). That is `r * (in + out)` trainable parameters for each linear layer, `r` being the rank.

# %% tags=["nbval-check-output"]
def lora_parameters(s: dict, rank: int) -> int:
    """Trainable parameters of LoRA on all seven linear layers."""
    h, i = s["hidden_size"], s["intermediate_size"]
    kv = h // s["num_attention_heads"] * s["num_key_value_heads"]
    sides = 2 * (h + h) + 2 * (h + kv) + 3 * (h + i)  # in + out of q, o; k, v; gate, up, down
    return s["num_hidden_layers"] * rank * sides


print(f"8B,  rank 16: {lora_parameters(LLAMA_3_1_8B, 16):,}")
print(f"70B, rank 64: {lora_parameters(LLAMA_3_1_70B, 64):,}")

# %% [markdown]
# PEFT counts the same. It has a count of its own for the whole model, too:

# %% tags=["nbval-check-output"]
from peft import LoraConfig, get_peft_model

lora = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
trainable, everything = get_peft_model(meta_model(LLAMA_3_1_8B), lora).get_nb_trainable_parameters()
check("trainable, by PEFT", trainable, lora_parameters(LLAMA_3_1_8B, 16), exact=True)
check("all, by PEFT", everything, total_8b + trainable, exact=True)
print(f"share: {trainable / everything:.4%}")

# %% [markdown]
# ### Two printed outputs that no program printed
#
# The first article shows, for this very setting, "trainable params: 41,943,040 || all params: 4,579,280,896 || 0.9160%".
# The first number is right. The second is neither PEFT's count nor what a plain count of a 4-bit model gives. A 4-bit
# layer stores two parameters in each byte, so `numel()` sees half of them; PEFT knows that and doubles.

# %% tags=["nbval-check-output"]
naive = linear_parameters(LLAMA_3_1_8B) // 2 + other_parameters(LLAMA_3_1_8B) + trainable
print(f"as PEFT counts:       {everything:,}, {trainable / everything:.4%}")
print(f"as numel() counts:    {naive:,}, {trainable / naive:.4%}")
print(f"the article's own two numbers: {41_943_040 / 4_579_280_896:.4%}")

# %% [markdown]
# The second article expects 272,629,760 trainable parameters for Llama-2-70B at rank 64. The formula gives 828,375,040,
# three times as many:

# %% tags=["nbval-check-output"]
check("Llama-2-70B, rank 64", lora_parameters(KNOWN["Llama-2-70B"], 64), 828_375_040, exact=True)
print(f"too low by a factor of {828_375_040 / 272_629_760:.2f}")

# %% [markdown]
# ## What "4 bit" really costs
#
# QLoRA stores the linear layers in 4 bits. Three things come on top:
# - each block of 64 weights has a scale; with double quantisation that is 8 bits per block, and 32 bits per 256 blocks
#   (lesson 3 takes this apart);
# - the embeddings and the output head stay in 16 bits;
# - so do the norms, which are small.

# %% tags=["nbval-check-output"]
bits = 4 + 8 / 64 + 32 / (64 * 256)


def qlora_weight_bytes(s: dict) -> float:
    return linear_parameters(s) * bits / 8 + other_parameters(s) * 2


print(f"{bits} bits per quantised parameter")
for name in ("Llama-3.1-8B", "Llama-2-70B", "Llama-3.1-70B"):
    size = qlora_weight_bytes(KNOWN[name])
    print(f"{name:14} {size / GB:6.2f} GB {size / GIB:6.2f} GiB")

# %% [markdown]
# So a 70B model takes 39.52 GB rather than 35 GB, and no trick gets it onto a card of 24 GiB (25.77 GB). The title
# "Fine-Tuning 70B Models on a Single Consumer GPU" is false.
#
# A formula is a claim until something is measured. Below are the bytes that an H200 GPU held after loading these models
# with bitsandbytes (`data/measured/h200_peaks.json`).

# %% tags=["nbval-check-output"]
measured = json.loads(data_path("measured", "h200_peaks.json").read_text())
loaded = {run["model"]: run["loaded_bytes"] for run in measured if run["method"] == "qlora"}
for name in ("Llama-3.1-8B", "Llama-3.1-70B"):
    got = qlora_weight_bytes(KNOWN[name])
    print(f"{name:14} formula {got:,.0f}  measured {loaded[name.lower()]:,}")
    check(f"{name:14}", got, loaded[name.lower()], rel=0.005)

# %% [markdown]
# The shipped model shows the same parts. It is small, so the embeddings weigh far more here than in a large model. On a
# CPU the parts that are not 4-bit are float32.

# %% tags=["nbval-check-output"]
from qlora_helpers.hardware import detect

cpu = detect("cpu")
parts = bytes_by_part(load_model(quantization="nf4", hardware=cpu))
for part, count in parts.items():
    print(f"{part:24}{count:10,}")
check("half a byte per linear parameter", parts["4-bit weights"], 2_359_296 // 2, exact=True)

# %% [markdown]
# ## The whole picture for 8B
#
# Full fine-tuning with the recipe of 12 bytes, LoRA on 16-bit weights, and QLoRA, the latter two at rank 16 with float32
# adapters and gradients and AdamW. Activations are not in it yet.

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
plots.stacked_bars(ax, methods, {part: [v / GB for v in values] for part, values in parts.items()}, "GB")
ax.set_title("Llama-3.1-8B: QLoRA needs a fifteenth of the memory, before activations")
plots.show(fig, "Bars of memory for Llama-3.1-8B: full fine-tuning 96.4 GB, LoRA 16.7 GB, QLoRA 6.4 GB. Weights are most of LoRA and QLoRA; the optimizer is most of full fine-tuning.")

# %% tags=["nbval-check-output"]
for method, column in zip(methods, zip(*parts.values())):
    print(f"{method:17} {sum(column) / GB:6.1f} GB")
print(f"full / QLoRA: {sum(v[0] for v in parts.values()) / sum(v[2] for v in parts.values()):.1f}")

# %% [markdown]
# ## Activations: linear, not quadratic
#
# The forward pass keeps what the backward pass will need. One article says that this memory "scales quadratically with
# sequence length". With today's attention kernels it does not. PyTorch can tell us every tensor that autograd keeps:

# %%
from torch.autograd.graph import saved_tensors_hooks


def saved_bytes(model, length: int) -> int:
    """Bytes of distinct tensors that autograd keeps for the backward pass, without the weights themselves."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor is held, so no address comes twice
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        model(input_ids=torch.ones(1, length, dtype=torch.long, device=model.device), use_cache=False)
    return sum(size for size, _ in kept.values())

# %% tags=["nbval-check-output"]
small = load_model(quantization=None, hardware=cpu)
lengths = [32, 64, 128, 256]
saved = [saved_bytes(small, length) for length in lengths]
for length, doubled in zip(lengths[1:], [b / a for a, b in zip(saved, saved[1:])]):
    check(f"{length} tokens keep twice as much as {length // 2}", doubled, 2, rel=0.02)

# %%
fig, ax = plots.figure()
ax.plot(lengths, [b / 1e6 for b in saved], marker="o", label="measured, SDPA attention")
grid = range(32, 257)
ax.plot(grid, [saved[0] / 1e6 * (n / 32) ** 2 for n in grid], linestyle="--", label="if it were quadratic")
ax.set_ylim(0, saved[-1] / 1e6 * 2.2)
ax.set_xlabel("tokens in the sequence")
ax.set_ylabel("kept for the backward pass (MB)")
ax.set_title("Activation memory grows linearly with the sequence")
ax.legend()
plots.show(fig, "Memory kept for the backward pass against sequence length, 32 to 256 tokens: the measured line is straight; a dashed quadratic curve leaves it far below.")

# %% [markdown]
# Gradient checkpointing goes further: it keeps only the input of each layer and computes the rest again in the backward
# pass. Less memory, more time.
#
# ## The whole run
#
# So what does a training run take, all in all? The course has a predictor. Here is its answer for QLoRA on Llama-3.1-8B, one
# sequence of 2,048 tokens at rank 16, on an RTX 4090. [Lesson 5](05_will_it_fit.ipynb) builds it from the terms of this
# lesson, and holds it against measured runs.

# %% tags=["nbval-check-output"]
from qlora_helpers.memory import find_shape, predict
from qlora_helpers.settings import Settings

settings = Settings(batch_size=1, max_length=2048, rank=16, dropout=0.05, gradient_checkpointing=True)
whole = predict(find_shape("meta-llama/Llama-3.1-8B"), settings, "4090")
for part, size in whole.parts.items():
    print(f"{part:26}{size / GB:6.2f} GB")
print(f"peak of torch's tensors in a run of {settings.max_length:,} tokens: {whole.peak_allocated_bytes / GB:.2f} GB")

# %% [markdown]
# The parts are those that are alive at the peak: on the way back through the last layer, no adapter has a gradient yet. Paged
# optimizer states and the CUDA context lie outside of what torch allocates, and are not in that peak.
#
# ## Move the bits yourself
#
# Run the cell, then move the slider. It shows what the weights alone would take. 4.127 is QLoRA's true number of bits, for a model without embeddings.

# %%
from qlora_helpers.course.widgets import memory_slider

memory_slider({name: meta_model(config).num_parameters() for name, config in KNOWN.items()})

# %% [markdown]
# ## Exercise 1
#
# How many GB do the weights of Mistral-7B take under QLoRA with double quantisation? Use the functions of this lesson.

# %% tags=["exercise"]
mistral_gigabytes = ...

# %% tags=["solution"]
mistral_gigabytes = qlora_weight_bytes(MISTRAL_7B) / GB

# %% tags=["nbval-check-output"]
exercise("Mistral-7B in GB", mistral_gigabytes, 4.125237248, hint="qlora_weight_bytes gives bytes; 1 GB is 10**9 of them.")

# %% [markdown]
# ## Exercise 2
#
# The first LoRA paper adapted only the query and the value projections. How many trainable parameters is that for
# Llama-3.1-8B at rank 8? The query layer is 4096 x 4096, the value layer 4096 x 1024, and there are 32 decoder layers.

# %% tags=["exercise"]
query_value_parameters = ...

# %% tags=["solution"]
query_value_parameters = 32 * 8 * ((4096 + 4096) + (4096 + 1024))

# %% tags=["nbval-check-output"]
exercise("q and v only, rank 8", query_value_parameters, 3_407_872, hint="rank * (in + out) for each adapted layer.")

# %% [markdown]
# ## Exercise 3
#
# Write a function that says whether the weights of a model, under QLoRA, leave room for at least 2 GiB of other things
# on a card of `card_gib` GiB.

# %% tags=["exercise"]
def leaves_room(shape: dict, card_gib: float) -> bool:
    return ...

# %% tags=["solution"]
def leaves_room(shape: dict, card_gib: float) -> bool:
    return qlora_weight_bytes(shape) / GIB + 2 <= card_gib

# %% tags=["nbval-check-output"]
cases = [("Llama-3.1-8B", 14.7), ("Llama-3.1-8B", 6), ("Llama-2-70B", 24), ("Llama-2-70B", 48)]
answers = [leaves_room(KNOWN[name], card) for name, card in cases]
exercise("room on the card", ... if ... in answers else answers, [True, False, False, True], hint="compare GiB with GiB.")

# %% [markdown]
# ## You have
# - computed weights, gradients and optimizer states, and seen why full fine-tuning of 8B needs 96.4 GB and QLoRA 6.4 GB,
#   before activations;
# - told GB from GiB, and found 39.52 GB where the slogan says 35;
# - counted LoRA's parameters by formula and by PEFT, 41,943,040 both times;
# - corrected published numbers, and seen that activations grow linearly with the sequence.
#
# Next: [lesson 2](02_nf4_vs_int4.ipynb) looks at which 16 values those 4 bits should stand for.
