# %% [markdown]
# # 3 · Double quantisation: quantise the scales, too
#
# In [lesson 2](02_nf4_vs_int4.ipynb) each block of 64 weights got a scale, its [absmax](../GLOSSARY.md#absmax). Scales
# take memory, too. So QLoRA quantises them once more.
#
# You will
# - see what the scales of a 4-bit weight cost, for each block size;
# - build the second level from scratch and get bitsandbytes' bytes, bit for bit;
# - compute what it saves: 0.373047 bits per parameter;
# - measure the error that it adds;
# - decode a weight from its bytes alone, and find out why a small model saves less.
#
# Takes about {{seconds}} seconds and {{gigabytes}} GB of memory on two processor cores. No GPU is needed.

# %%
from qlora_helpers.course import diagrams, plots
from qlora_helpers.course.checks import check
from qlora_helpers.course.exercises import lesson_03 as exercises
from qlora_helpers.course.tables import show_table
from qlora_helpers.hardware import detect
from qlora_helpers.memory import known_config
from qlora_helpers.models.loading import load_model
from qlora_helpers.models.meta import meta_model
from qlora_helpers.models.weights import constant_bytes, linear_layers
from qlora_helpers.quantize import NF4, dequantize, dynamic_map_values, quantize

import torch

GB, GIB = 10**9, 2**30
# after the helpers, which keep one harmless message off the page
import bitsandbytes.functional as bnb

print("torch", torch.__version__.split("+")[0])

# %% [markdown]
# ## What a scale costs
#
# Each block has one float32 scale. Spread over the weights of the block, that is 32 bits divided by the block size.

# %% tags=["nbval-check-output"]
rows = [(block_size, 32 / block_size) for block_size in (32, 64, 128, 256, 1024, 4096)]
show_table(["block size", "bits per parameter for scales"], rows, formats=["", ".5f"])

# %% [markdown]
# Small blocks make small errors (lesson 2), but at 64 the scales cost half a bit: an eighth of the weight itself.
# Larger blocks would be cheaper and worse. *Double quantisation* keeps the small blocks and makes their scales cheap:
# it treats the scales as weights, and quantises them to 8 bits, with a scale of their own for every 256 of them.

# %%
plots.show(diagrams.two_levels(), "3.1")

# %% [markdown]
# ## The second level
#
# All scales are positive, and most lie close together. Look at those of one matrix:

# %% tags=["nbval-check-output"]
model = load_model(quantization=None, hardware=detect("cpu"))
weight = dict(linear_layers(model))["model.layers.1.mlp.up_proj"].weight.detach()
single = quantize(weight, NF4, 64, double_quant=False)
scales = single.absmax
print(f"{scales.numel():,} scales, mean {scales.mean():.4f}, standard deviation {scales.std():.4f}")

# %% [markdown]
# So the mean is subtracted first; it is kept as the *offset*. What is left lies around zero. It is cut into blocks of
# 256, each block is divided by its absmax, and for each scale an 8-bit code is stored. The absmax of 256 scales is kept
# in float32.
#
# Which 256 values should the codes stand for? The paper says "FP8". bitsandbytes has a table of its own, called
# *dynamic*:

# %% tags=["nbval-check-output"]
table = dynamic_map_values()
check("equal to bitsandbytes' table", table, bnb.create_dynamic_map(), exact=True)
size = table.abs()
print(f"{len(table)} values; the smallest above zero is {table[table > 0].min():.1e}")
near_zero, near_one = (size < 0.1).float().mean(), (size > 0.9).float().mean()
print(f"{near_zero:.0%} are below 0.1 in size, {near_one:.0%} above 0.9")

# %% [markdown]
# Half of its values lie below 0.1, and they get denser and denser towards zero. The first exercise asks what that is
# good for.

# %%
def second_level(scales: torch.Tensor):
    offset = scales.mean()
    blocks = (scales - offset).view(-1, 256)
    absmax = blocks.abs().amax(dim=1, keepdim=True)
    nearest = (blocks / absmax).unsqueeze(-1) - table
    return nearest.abs().argmin(-1), absmax, offset


codes, absmax2, offset = second_level(scales)
decoded_scales = (table[codes] * absmax2).flatten() + offset

# %% [markdown]
# How near is that to bitsandbytes? The offset and the second-level scales are equal. A few codes may be one step off:
# on a CPU bitsandbytes looks the nearest code up in a coarse table instead of searching. The helpers do as it does, and
# agree in every byte.

# %% tags=["nbval-check-output"]
packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
check("offset", offset, state.offset, exact=True)
check("second-level scales", absmax2.flatten(), state.state2.absmax, exact=True)
off_by = (codes.flatten() - state.absmax.int()).abs()
check("steps between codes of plain search and theirs", off_by.max().item(), at_most=1)

double = quantize(weight, NF4, 64, double_quant=True)
check("8-bit codes of the helpers", double.absmax, state.absmax, exact=True)
check("packed weights", double.packed, packed.flatten(), exact=True)
check("decoded weights", dequantize(double), bnb.dequantize_4bit(packed, state), exact=True)

# %% [markdown]
# ## The bill
#
# After the second level each block of 64 weights pays 8 bits for its scale, and 256 such blocks share 32 bits more.

# %% tags=["nbval-check-output"]
without = 32 / 64
with_second_level = 8 / 64 + 32 / (64 * 256)
saved = without - with_second_level
print(f"scales cost {without} bits, then {with_second_level:.6f}: {saved:.6f} saved")
print(f"a parameter costs {4 + without} bits, then {4 + with_second_level:.6f}")

# %% [markdown]
# The helpers count the same from the bytes that they really store. A large matrix gives the number to the last digit:

# %% tags=["nbval-check-output"]
large = torch.randn(1024, 4096, generator=torch.Generator().manual_seed(0))
check("bits, single", quantize(large, NF4, 64, False).bits_per_parameter, 4.5, exact=True)
check("bits, double", quantize(large, NF4, 64, True).bits_per_parameter, 4.126953125, exact=True)

# %% [markdown]
# You may read of 0.34 or 0.4 bits instead. One comes from a second level of 16 blocks, the other from rounding;
# [CLAIMS.md](../CLAIMS.md#A40.1) has both. What does it save in a real model? Only the linear layers are quantised, so
# only they count:

# %% tags=["nbval-check-output"]
rows = []
for name in ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-2-70b-hf"):
    model = meta_model(known_config(name))
    linear = sum(layer.weight.numel() for _, layer in linear_layers(model))
    saved_bytes = linear * saved / 8
    rows.append((name, linear, saved_bytes / GB, saved_bytes / GIB))
headings = ["model", "4-bit parameters", "GB saved", "GiB saved"]
show_table(headings, rows, formats=["", ",d", ".2f", ".2f"])

# %%
block_sizes = (32, 64, 128, 256, 512, 1024)
two_levels = [8 / b + 32 / (256 * b) for b in block_sizes]
fig, ax = plots.figure()
one_level = [32 / b for b in block_sizes]
ax.plot(block_sizes, one_level, marker="o", color=plots.ORANGE, label="float32 scales")
ax.plot(block_sizes, two_levels, marker="s", color=plots.BLUE, label="double quantisation")
ax.set_xscale("log", base=2)
ax.set_xticks(block_sizes, map(str, block_sizes))
ax.set_xlabel("block size")
ax.set_ylabel("bits per parameter for scales")
ax.set_title("Double quantisation makes small blocks affordable")
ax.legend()
plots.show(fig, "3.2")

# %% [markdown]
# ## What it costs in accuracy
#
# The scales are a little wrong now. How much does that add to the error of the weights?

# %% tags=["nbval-check-output"]
def relative_error(decoded: torch.Tensor, original: torch.Tensor) -> float:
    return ((decoded - original).square().mean().sqrt() / original.square().mean().sqrt()).item()


scale_error = relative_error(double.scales(), single.absmax)
one, two = relative_error(dequantize(single), weight), relative_error(dequantize(double), weight)
print(f"scales are off by {scale_error:.2%}")
print(f"relative error of the weights: {one:.4f} with float32 scales, {two:.4f} with 8-bit scales")
check("added by double quantisation, as a share", two / one - 1, at_most=0.005)

# %% [markdown]
# The error of the weights hardly moves: an error of the scale and the much larger rounding error are independent, so
# their squares add. Compare with the other way to save the same bits, blocks four times as large:

# %% tags=["nbval-check-output"]
cheap = quantize(weight, NF4, 256, double_quant=False)
of_cheap = relative_error(dequantize(cheap), weight)
rows = [
    ("blocks of 256, float32 scales", cheap.bits_per_parameter, of_cheap),
    ("blocks of 64, 8-bit scales", double.bits_per_parameter, two),
]
show_table(["scales", "bits", "relative error"], rows, formats=["", ".3f", ".4f"])

# %% [markdown]
# Almost the same bits, and a clearly smaller error. That is what double quantisation is for.
#
# ## What is really stored
#
# Bits per parameter leave out what each matrix needs whatever its size: two tables of values, and the offset. In a
# small matrix they show.

# %% tags=["nbval-check-output"]
tiny = quantize(weight[:1], NF4, 64, double_quant=True)
rows = []
for q in (tiny, double, quantize(large)):
    count = q.codes.numel()
    rows.append((f"{count:,}", q.nbytes, 8 * q.nbytes / count))
show_table(["weights", "bytes", "bits each, tables included"], rows, formats=["", ",d", ".3f"])

# %% [markdown]
# ## Exercise 3.1: two tables for the scales
#
# *Predict · medium · about 5 minutes.* The 8-bit codes of the scales could also stand for 256 values at equal steps
# from -1 to 1. Which table makes the smaller error in the scales, "dynamic" or "equal steps"? Predict it for two
# matrices: first for the scales above, then for the same scales after the weights of the first block were made 100
# times as large (count the other scales only). Then measure, if you like.

# %% tags=["exercise"]
predicted = [..., ...]  # for the scales above; with one huge block among them

# %% tags=["solution"]
def error_with(values: torch.Tensor, first_block: float) -> float:
    changed = scales.clone()
    changed[0] *= first_block
    offset = changed.mean()
    blocks = (changed - offset).view(-1, 256)
    absmax = blocks.abs().amax(dim=1, keepdim=True)
    codes = torch.bucketize(blocks / absmax, (values[:-1] + values[1:]) / 2)
    decoded = (values[codes] * absmax).flatten() + offset
    return relative_error(decoded[1:], changed[1:])


tables = {"dynamic": table, "equal steps": torch.linspace(-1, 1, 256)}
predicted = []
for factor in (1, 100):  # a huge scale leaves the others near zero, where "dynamic" is dense
    found = {name: error_with(values, factor) for name, values in tables.items()}
    predicted.append(min(found, key=found.get))

# %% tags=["nbval-check-output"]
exercises.tables.check(predicted)

# %% [markdown]
# ## Exercise 3.2: a weight from its bytes
#
# *Build · hard · about 20 minutes.* Write `decode(packed, state)`: the weight in float32, from bitsandbytes' bytes and
# numbers alone. `packed` has two codes in each byte, the first in the high half. `state` has:
#
# - `code`: the 16 values, `blocksize`, and the `shape` of the weight;
# - `absmax`: an 8-bit code for each block's scale; `offset`: the mean of all scales;
# - `state2`: the second level, with its own `code` (256 values), `absmax` and `blocksize`.
#
# The last group of scales need not be full. Do not call bitsandbytes.

# %% tags=["exercise"]
def decode(packed: torch.Tensor, state) -> torch.Tensor:
    return ...

# %% tags=["solution"]
def decode(packed: torch.Tensor, state) -> torch.Tensor:
    level2 = state.state2
    groups = torch.arange(state.absmax.numel()) // level2.blocksize
    scales = level2.code[state.absmax.long()] * level2.absmax[groups] + state.offset
    flat = packed.flatten()
    codes = torch.stack([flat >> 4, flat & 15], dim=1).flatten().long()
    return (state.code[codes].view(-1, state.blocksize) * scales.unsqueeze(1)).view(state.shape)

# %% tags=["nbval-check-output"]
exercises.from_bytes.check(decode)

# %% [markdown]
# ## Exercise 3.3: where did the saving go?
#
# *Run · medium · about 15 minutes.* Here is the shipped model, loaded without and with double quantisation, and the
# bytes of the constants in its linear layers. Per parameter that saves less than the 0.373 bits of the bill:

# %% tags=["nbval-check-output"]
cpu = detect("cpu")
plain = load_model(double_quant=False, hardware=cpu)
nested = load_model(double_quant=True, hardware=cpu)
single_bytes, double_bytes = (
    sum(constant_bytes(layer.weight.quant_state) for _, layer in linear_layers(model))
    for model in (plain, nested)
)
fewer = single_bytes - double_bytes
print(f"{fewer:,} bytes saved: {8 * fewer / 2_359_296:.3f} bits per parameter")

# %% [markdown]
# Some bytes are added to every matrix, however large it is. How many are they? And how many weights must a matrix have
# at least, in full blocks of 64, so that double quantisation saves anything at all? Work with the layers of `plain` and
# `nested` (`layer.weight.quant_state`), or with `quantize` and `nbytes`.

# %% tags=["exercise"]
bytes_added = ...
fewest_weights = ...

# %% tags=["solution"]
quant_state = dict(linear_layers(nested))["model.layers.0.mlp.up_proj"].weight.quant_state
# a table of 256 values, and the mean of the scales
bytes_added = quant_state.state2.code.nbytes + quant_state.offset.nbytes


def saves(count: int) -> bool:
    single, double = (quantize(torch.ones(count), double_quant=way).nbytes for way in (False, True))
    return double < single


fewest_weights = next(count for count in range(64, 10**6, 64) if saves(count))

# %% tags=["nbval-check-output"]
exercises.fixed_cost.check([bytes_added, fewest_weights])

# %% [markdown]
# ## You have
# - seen that scales cost half a bit per parameter at block size 64, and 0.126953 bits after the second level;
# - built that second level, equal to bitsandbytes;
# - computed the saving: 0.373047 bits, which is 3.19 GB for Llama-2-70B;
# - measured that the weights' error hardly grows;
# - decoded a weight from its bytes, and found what makes a small matrix save less.
#
# Next: [lesson 4](04_qlora_run.ipynb) puts everything together and trains.
