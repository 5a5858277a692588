# %% [markdown]
# # 3 · Double quantisation: quantise the scales, too
#
# You will
# - see what the scales of a 4-bit weight cost, for each block size;
# - build the second level from scratch and get bitsandbytes' bytes, bit for bit;
# - compute what it saves: 0.373047 bits per parameter, not 0.34 and not 0.4 as articles say, and find their slips;
# - measure the error that it adds.
#
# Takes about {{seconds}} seconds and {{gigabytes}} GB of memory on two processor cores. No GPU is needed.

# %%
from qlora_helpers.course import plots
from qlora_helpers.course.checks import check, exercise
from qlora_helpers.hardware import detect
from qlora_helpers.memory import known_config
from qlora_helpers.models.loading import load_model
from qlora_helpers.models.meta import meta_model
from qlora_helpers.models.weights import linear_layers
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
for block_size in (32, 64, 128, 256, 1024, 4096):
    print(f"blocks of {block_size:4}: {32 / block_size:.5f} bits per parameter for the scales")

# %% [markdown]
# Small blocks make small errors (lesson 2), but at 64 the scales cost half a bit: an eighth of the weight itself. Larger
# blocks would be cheaper and worse. Double quantisation keeps the small blocks and makes their scales cheap.
#
# ## The second level
#
# The scales are positive and lie close together. Look at those of one matrix:

# %% tags=["nbval-check-output"]
model = load_model(quantization=None, hardware=detect("cpu"))
weight = dict(linear_layers(model))["model.layers.1.mlp.up_proj"].weight.detach()
single = quantize(weight, NF4, 64, double_quant=False)
print(f"{single.absmax.numel():,} scales, mean {single.absmax.mean():.4f}, standard deviation {single.absmax.std():.4f}")

# %% [markdown]
# So: subtract the mean (the *offset*), cut the scales into blocks of 256, divide each block by its absmax, and store an
# 8-bit code for each scale. The absmax of 256 scales is kept in float32. The paper says "FP8" for the codes;
# bitsandbytes uses an 8-bit table of its own, called dynamic, with most of its values near the ends and some very near
# zero.

# %% tags=["nbval-check-output"]
table = dynamic_map_values()
check("equal to bitsandbytes' table", table, bnb.create_dynamic_map(), exact=True)
print(f"{len(table)} values; the smallest above zero is {table[table > 0].min():.1e}")

# %%
def second_level(scales: torch.Tensor):
    offset = scales.mean()
    blocks = (scales - offset).view(-1, 256)
    absmax = blocks.abs().amax(dim=1, keepdim=True)
    nearest = (blocks / absmax).unsqueeze(-1) - table
    return nearest.abs().argmin(-1), absmax, offset


codes, absmax2, offset = second_level(single.absmax)
decoded_scales = (table[codes] * absmax2).flatten() + offset

# %% [markdown]
# How near is that to bitsandbytes? The offset and the second-level scales are equal. A few codes may be one step off: on
# a CPU bitsandbytes looks the nearest code up in a coarse table instead of searching. The helpers imitate the table, and
# agree in every byte.

# %% tags=["nbval-check-output"]
packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
check("offset", offset, state.offset, exact=True)
check("second-level scales", absmax2.flatten(), state.state2.absmax, exact=True)
off_by = (codes.flatten() - state.absmax.int()).abs()
check("codes of plain search: steps apart, at most", off_by.max().item(), at_most=1)

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
print(f"scales cost {without} bits, then {with_second_level:.6f}: {without - with_second_level:.6f} saved")
print(f"a parameter costs {4 + without} bits, then {4 + with_second_level:.6f}")

# %% [markdown]
# The helpers count the same from the bytes that they really store. A large matrix gives the number to the last digit:

# %% tags=["nbval-check-output"]
large = torch.randn(1024, 4096, generator=torch.Generator().manual_seed(0))
check("bits, single", quantize(large, NF4, 64, False).bits_per_parameter, 4.5, exact=True)
check("bits, double", quantize(large, NF4, 64, True).bits_per_parameter, 4.126953125, exact=True)

# %% [markdown]
# ### Where 0.34 and 0.4 come from
#
# One article computes `8/64 + 32/1024`, as if 16 blocks shared a second-level scale. It is 256 blocks. Another rounds
# the saving to 0.4 bits, multiplies by 70 billion and divides by 1024³, which gives GiB, and prints it as GB.

# %% tags=["nbval-check-output"]
print(f"8/64 + 32/1024  = {8 / 64 + 32 / 1024:.5f} bits, a saving of {0.5 - (8 / 64 + 32 / 1024):.5f}")
print(f"0.4 bits x 70e9 = {0.4 * 70e9 / 8 / GB:.2f} GB = {0.4 * 70e9 / 8 / GIB:.2f} GiB")
print(f"the true saving = {(without - with_second_level) * 70e9 / 8 / GB:.2f} GB for 70e9 parameters")

# %% [markdown]
# The printed "3.26 GB" is right by luck: two errors cancel. But not all 70 billion parameters are quantised. The real
# saving counts the linear layers only:

# %% tags=["nbval-check-output"]
saved = {}
for name, model in {"Llama-3.1-8B": "meta-llama/Llama-3.1-8B", "Llama-2-70B": "meta-llama/Llama-2-70b-hf"}.items():
    linear = sum(layer.weight.numel() for _, layer in linear_layers(meta_model(known_config(model))))
    saved[name] = linear * (without - with_second_level) / 8
    print(f"{name:13} {linear:,} parameters: {saved[name] / GB:.2f} GB = {saved[name] / GIB:.2f} GiB saved")

# %%
block_sizes = (32, 64, 128, 256, 512, 1024)
fig, ax = plots.figure()
ax.plot(block_sizes, [32 / b for b in block_sizes], marker="o", color=plots.ORANGE, label="float32 scales")
ax.plot(block_sizes, [8 / b + 32 / (256 * b) for b in block_sizes], marker="o", color=plots.BLUE, label="double quantisation")
ax.set_xscale("log", base=2)
ax.set_xlabel("block size")
ax.set_ylabel("bits per parameter for scales")
ax.set_title("Double quantisation makes small blocks affordable")
ax.legend()
plots.show(fig, "Bits per parameter spent on scales against block size: with float32 scales one bit at block 32 and half a bit at 64; with double quantisation about a quarter of that everywhere.")

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
print(f"blocks of 256, float32 scales: {cheap.bits_per_parameter} bits, error {relative_error(dequantize(cheap), weight):.4f}")
print(f"blocks of 64, 8-bit scales:    {double.bits_per_parameter:.3f} bits, error {two:.4f}")

# %% [markdown]
# Almost the same bits, and a clearly smaller error. That is what double quantisation is for.
#
# ## What is really stored
#
# bits per parameter leave out what is constant per matrix: two tables and the offset. For a small matrix they show.

# %% tags=["nbval-check-output"]
tiny = quantize(weight[:1], NF4, 64, double_quant=True)
for name, q in (("256 weights", tiny), (f"{weight.numel():,} weights", double), ("4,194,304 weights", quantize(large))):
    count = q.codes.numel()
    print(f"{name:18} {q.nbytes:10,} bytes = {8 * q.nbytes / count:.3f} bits each, tables included")

# %% [markdown]
# ## Exercise 1
#
# How many bits per parameter would double quantisation cost with blocks of 32 weights (and 256 scales per second-level
# scale)? Count code, scale and second-level scale.

# %% tags=["exercise"]
bits_at_32 = ...

# %% tags=["solution"]
bits_at_32 = 4 + 8 / 32 + 32 / (32 * 256)

# %% tags=["nbval-check-output"]
exercise("bits at block size 32", bits_at_32, 4.25390625, hint="the same three terms as above, with 32 in place of 64.")

# %% [markdown]
# ## Exercise 2
#
# Decode the scales yourself. You have `double.absmax` (8-bit codes) and `double.nested` with `.absmax`, `.offset` and
# `.values`. The result is a float32 scale for each block.

# %% tags=["exercise"]
my_scales = ...

# %% tags=["solution"]
blocks = double.nested.values[double.absmax.long()].view(-1, 256)
my_scales = (blocks * double.nested.absmax.unsqueeze(1)).flatten() + double.nested.offset

# %% tags=["nbval-check-output"]
exercise("the scales", my_scales, double.scales(), hint="table[code] * absmax of its 256 scales + offset.")

# %% [markdown]
# ## You have
# - seen that scales cost half a bit per parameter at block size 64, and 0.126953 bits after the second level;
# - built that second level, equal to bitsandbytes;
# - computed the saving: 0.373047 bits, which is 3.19 GB for Llama-2-70B;
# - measured that the weights' error hardly grows.
#
# Next: [lesson 4](04_qlora_run.ipynb) puts everything together and trains.
