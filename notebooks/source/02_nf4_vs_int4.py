# %% [markdown]
# # 2 · NF4 against int4: which sixteen values?
#
# You will
# - see that the weights of a trained model are nearly normally distributed, and which ones are not;
# - build NF4 from scratch and get bitsandbytes' values and bytes, bit for bit;
# - compare NF4, INT4 and FP4: the codes they use, the error they make, and what an outlier does;
# - measure how much of what a real model knows survives each format.
#
# Takes about {{seconds}} seconds and {{gigabytes}} GB of memory on two processor cores. No GPU is needed.

# %%
import json
import statistics

from qlora_helpers.course import plots
from qlora_helpers.course.checks import check, exercise
from qlora_helpers.evaluation import read_facts, recall, standard_error
from qlora_helpers.hardware import detect
from qlora_helpers.models.loading import load_model, load_tokenizer
from qlora_helpers.models.weights import linear_layers, quantize_dequantize
from qlora_helpers.paths import data_path
from qlora_helpers.quantize import FP4, INT3, INT4, INT4_SYMMETRIC, NF4, dequantize, quantize
from qlora_helpers.statistics import excess_kurtosis, qq_correlation

import torch

# after the helpers, which keep one harmless message off the page
import bitsandbytes.functional as bnb

cpu = detect("cpu")  # in every gear this lesson compares tensors on the CPU
print("torch", torch.__version__.split("+")[0])

# %% [markdown]
# ## Weights are nearly normal
#
# Take the model that ships with the course: a Llama of 3 million parameters that was trained to know facts about invented
# people ([its card](../data/tiny-llama/README.md) tells how). Two numbers say how near each of its weight matrices is to
# a normal distribution. The *QQ correlation* compares sorted weights with normal quantiles; 1 is perfect. The *excess
# kurtosis* is 0 for a normal distribution and grows with heavy tails.

# %% tags=["nbval-check-output"]
model = load_model(quantization=None, hardware=cpu)
weights = {name.removeprefix("model."): layer.weight.detach() for name, layer in linear_layers(model)}
rows = sorted((excess_kurtosis(w), qq_correlation(w), name) for name, w in weights.items())
print(f"{len(rows)} matrices, median QQ correlation {statistics.median(q for _, q, _ in rows):.4f}")
for kurtosis, qq, name in rows[:2] + rows[-4:]:
    print(f"{name:28} QQ {qq:.4f}  excess kurtosis {kurtosis:5.2f}")

# %% [markdown]
# Most matrices are as normal as one could wish. The exception is the last layer's `down_proj` with an excess kurtosis of
# 9.78: a few large weights. Larger models have such matrices too. "Weights are normally distributed" is a good
# approximation, not a law.

# %%
fig, axes = plots.figure(1, 2, figsize=(7.2, 3))
for ax, name in zip(axes, (rows[0][2], rows[-1][2])):
    w = weights[name] / weights[name].std()
    ax.hist(w.flatten().numpy(), bins=100, range=(-12, 12), density=True, color="#BBBBBB", label="weights")
    x = torch.linspace(-5, 5, 200)
    ax.plot(x, torch.exp(-x * x / 2) / (2 * torch.pi) ** 0.5, color=plots.BLUE, label="normal")
    ax.set_yscale("log")
    ax.set_ylim(1e-6, 1)
    ax.set_title(name.removeprefix("layers."), fontsize=10)
    ax.set_xlabel("weight / standard deviation")
axes[0].legend()
fig.suptitle("The most and the least normal matrix of the model", fontweight="bold")
plots.show(fig, "Histograms of two weight matrices with the normal density, on a logarithmic axis: the first follows it closely, the second has tails that reach far beyond it on both sides.")

# %% [markdown]
# ## NF4 from scratch
#
# If weights are normal, then values placed at equal steps of *probability* suit them better than values at equal steps of
# *size*. NF4 takes eight quantiles on the positive side, seven on the negative side and an exact zero, and divides by the
# largest. (The constant 0.9677083 is the outermost probability that the authors chose.)

# %% tags=["nbval-check-output"]
def tail(count: int) -> list[float]:
    probabilities = torch.linspace(0.9677083, 0.5, count + 1)[:-1]
    return [statistics.NormalDist().inv_cdf(p) for p in probabilities.tolist()]


nf4 = torch.tensor([-v for v in tail(7)] + [0.0] + tail(8)).sort().values
nf4 = nf4 / nf4.max()
print([round(v, 4) for v in nf4.tolist()])
check("equal to bitsandbytes' NF4", nf4, bnb.get_4bit_type("nf4", device="cpu"), exact=True)

# %% [markdown]
# ## Block-wise absmax quantisation from scratch
#
# Cut the weights into blocks of 64. Divide each block by its largest absolute value (its *absmax*), so that everything
# lies between -1 and 1. Store for each weight the number (*code*) of the nearest of the 16 values.

# %%
def quantize_by_hand(weight: torch.Tensor, values: torch.Tensor, block_size: int = 64):
    blocks = weight.reshape(-1, block_size)
    absmax = blocks.abs().amax(dim=1, keepdim=True)
    midpoints = (values[:-1] + values[1:]) / 2
    codes = torch.bucketize(blocks * (1 / absmax), midpoints)
    return codes, absmax


def dequantize_by_hand(codes: torch.Tensor, absmax: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return values[codes] * absmax

# %% [markdown]
# Six lines. Are they what bitsandbytes does? Two codes go into one byte, the first into the high half. Every byte, every
# scale and every decoded value must be equal.

# %% tags=["nbval-check-output"]
weight = weights["layers.1.mlp.up_proj"]
codes, absmax = quantize_by_hand(weight, nf4)
packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
flat = codes.flatten().to(torch.uint8)
check("packed bytes", (flat[::2] << 4) | flat[1::2], packed.flatten(), exact=True)
check("scales", absmax.flatten(), state.absmax, exact=True)
by_hand = dequantize_by_hand(codes, absmax, nf4).view_as(weight)
check("decoded values", by_hand, bnb.dequantize_4bit(packed, state), exact=True)

# %% [markdown]
# The course's `qlora_helpers.quantize` is the same, with the cases that the six lines leave out: blocks of zeros, a last
# block that is not full, 16-bit input, other formats.

# %% tags=["nbval-check-output"]
q = quantize(weight, NF4, block_size=64, double_quant=False)
check("helpers and bitsandbytes", dequantize(q), bnb.dequantize_4bit(packed, state), exact=True)
print(f"{q.bits_per_parameter} bits per parameter: 4 for the code, 0.5 for its share of the scale")

# %% [markdown]
# ## Where the values lie
#
# bitsandbytes has NF4 and FP4 for 4-bit layers, and no INT4. So INT4 is built here by rounding to its values and back:
# `INT4` has 16 equal steps, `INT4 symmetric` has 15 from -7 to 7, with a zero.

# %%
gaussian = torch.randn(16384, 64, generator=torch.Generator().manual_seed(0))
scaled = gaussian / gaussian.abs().amax(dim=1, keepdim=True)
fig, axes = plots.figure(1, 3, figsize=(9, 3), sharey=True)
for ax, book in zip(axes, (NF4, INT4, FP4)):
    plots.weights_and_levels(ax, scaled, book.values, book.name)
for ax in axes[1:]:
    ax.set_ylabel("")
fig.suptitle("NF4 spends its values where the weights are", fontweight="bold")
plots.show(fig, "Histogram of Gaussian weights scaled by their block's absmax, with the values of each format as ticks below: NF4's crowd near zero, INT4's are evenly spaced, FP4's leave wide gaps at large values.")

# %% [markdown]
# ## Which codes are used
#
# Articles say that NF4 puts "an equal number of values in each bin". That would hold if weights were scaled by their
# standard deviation. They are scaled by the largest of 64 values, so they are not. Count:

# %% tags=["nbval-check-output"]
def code_shares(book, data: torch.Tensor) -> torch.Tensor:
    """How often each code is used, in the order of the codes' values."""
    codes = quantize(data, book, 64, double_quant=False).codes.flatten()
    counts = torch.bincount(codes.int(), minlength=len(book.values))
    return counts[torch.argsort(book.values)] / codes.numel()


for book in (NF4, INT4, FP4):
    share = code_shares(book, gaussian)
    used = share[share > 0]
    entropy = -(used * used.log2()).sum().item()
    print(f"{book.name:5} used {share.min():.1%} to {share.max():.1%} each, {entropy:.2f} bits of information of 4")

# %%
fig, axes = plots.figure(1, 3, figsize=(9, 3), sharey=True)
for ax, book in zip(axes, (NF4, INT4, FP4)):
    plots.code_histogram(ax, code_shares(book, gaussian), book.values.sort().values, book.name)
for ax in axes[1:]:
    ax.set_ylabel("")
fig.suptitle("NF4 uses its codes most evenly, but not equally", fontweight="bold")
plots.show(fig, "Share of use of each code for NF4, INT4 and FP4 on Gaussian weights. NF4 ranges from under 2 to 9 percent, INT4 from 1 to 13.5 percent, FP4 has codes near zero that are hardly used.")

# %% [markdown]
# NF4's codes are used between 1.7 % and 9.2 % of the time. They carry 3.88 bits of the possible 4: more than the
# others. FP4 wastes codes on values next to zero, and has two zeros.
#
# ## The error
#
# The relative error is the root mean square of what was lost, divided by that of the weights.

# %% tags=["nbval-check-output"]
def relative_error(data: torch.Tensor, book, block_size: int) -> float:
    decoded = dequantize(quantize(data, book, block_size, double_quant=False))
    return ((decoded - data).square().mean().sqrt() / data.square().mean().sqrt()).item()


block_sizes = (32, 64, 128, 256, 1024, 4096)
books = (NF4, INT4, INT4_SYMMETRIC, FP4, INT3)
errors = {book.name: [relative_error(gaussian, book, size) for size in block_sizes] for book in books}
print(f"{'block size':15}", *(f"{size:6}" for size in block_sizes))
for name, row in errors.items():
    print(f"{name:15}", *(f"{error:6.4f}" for error in row))

# %%
fig, ax = plots.figure()
for name, row in errors.items():
    ax.plot(block_sizes, row, marker="o", label=name, color=plots.FORMAT_COLOURS[name])
ax.set_xscale("log", base=2)
ax.set_xlabel("block size (weights that share a scale)")
ax.set_ylabel("relative error")
ax.set_title("NF4 errs least, and larger blocks hurt it least")
ax.set_ylim(0, 0.42)
ax.legend(ncols=3, loc="upper left")
plots.show(fig, "Relative error against block size for five formats: NF4 lowest and flattest, then INT4, INT4 symmetric, FP4; INT3 more than twice as high.")

# %% [markdown]
# At block size 64 NF4's relative error is 0.0920; that of symmetric INT4 is 0.1077. In squared error:

# %% tags=["nbval-check-output"]
ratio = (errors["INT4 symmetric"][1] / errors["NF4"][1]) ** 2
print(f"symmetric INT4 has {ratio:.2f} times the squared error of NF4")
check("NF4, block 64", errors["NF4"][1], 0.0920, rel=0.005)
check("FP4, block 64", errors["FP4"][1], 0.1219, rel=0.005)

# %% [markdown]
# An article calls NF4 "nearly identical to 16-bit". In weights it is not: 9 % of the signal is noise. What that does to
# a model is another question. You will measure it below.
#
# ## One outlier, one block
#
# The scale of a block is its largest value. Make one weight large and the other 63 of its block get coarse steps. The
# rest of the matrix notices nothing; that is what blocks are for.

# %% tags=["nbval-check-output"]
spoiled = gaussian[:64].clone()
spoiled[10, 20] = 12.0
after = (dequantize(quantize(spoiled, NF4, 64, False)) - spoiled).square().mean(dim=1).sqrt()
before = (dequantize(quantize(gaussian[:64], NF4, 64, False)) - gaussian[:64]).square().mean(dim=1).sqrt()
print(f"error in the outlier's block: {before[10]:.3f} before, {after[10]:.3f} after")
others = torch.arange(64) != 10
check("the 63 other blocks", after[others], before[others], exact=True)

# %% [markdown]
# So NF4 does not "avoid errors for outlier values", as an article has it. It limits the damage to one block. Run the
# next cell, then move the outlier and the block size:

# %%
from qlora_helpers.course.widgets import outlier_slider

outlier_slider()

# %% [markdown]
# ## What the model still knows
#
# Weight errors are a means. What counts is the model. The shipped one holds 0.36 bits of fact in each parameter of its
# linear layers, near what such a model can hold, so rounding has something to destroy. *Recall* is the share of 2,000
# facts ("You can visit Henry Coldford in …") whose right word is the model's first choice.

# %%
tokenizer = load_tokenizer()
facts = read_facts(data_path("recall.jsonl"))
originals = {name: layer.weight.detach().clone() for name, layer in linear_layers(model)}


def recall_in(book, block_size: int, double_quant: bool = False) -> float:
    """Recall with every linear weight rounded to a format and back."""
    quantize_dequantize(model, book, block_size, double_quant)
    score = recall(model, tokenizer, facts)
    for name, layer in linear_layers(model):
        layer.weight.data.copy_(originals[name])
    return score


full = recall(model, tokenizer, facts)
scores = {(book.name, 64): recall_in(book, 64) for book in books}
scores["NF4 + double quant", 64] = recall_in(NF4, 64, double_quant=True)

# %% [markdown]
# The same for blocks of 256 takes as long again. It was measured by `data/scripts/measure/tiny_llama.py`, which the tests repeat:

# %%
measured = json.loads(data_path("tiny-llama", "scores.json").read_text())["recall"]
scores |= {(name, 256): measured[name]["256"] for name, _ in list(scores)}
print(f"16 bit                       {full:7.1%}")
for (name, size), score in sorted(scores.items(), key=lambda item: -item[1]):
    print(f"{name:19}{f'block {size}':10}{score:7.1%}  ± {standard_error(score, len(facts)):.1%}")

# %%
fig, ax = plots.figure()
names = ["NF4", "INT4", "INT4 symmetric", "FP4", "INT3"]
for size, offset, strength in ((64, -0.2, 1), (256, 0.2, 0.5)):
    forgotten = [100 - 100 * scores[name, size] for name in names]
    bars = ax.bar([i + offset for i in range(len(names))], forgotten, width=0.38, alpha=strength,
                  color=[plots.FORMAT_COLOURS[name] for name in names])
    ax.bar_label(bars, fmt="%.1f")
ax.set_xticks(range(len(names)), names)
ax.set_ylabel("facts forgotten (%)")
ax.set_title("The better the format, the less the model forgets (pale: blocks of 256)")
plots.show(fig, "Share of facts forgotten per format at block 64 and, pale, at block 256: NF4 about 1 and 2 percent, INT4 2 and 5, INT4 symmetric 3 and 8, FP4 5 and 8, INT3 35 and 48.")

# %% [markdown]
# The checks state what holds on every machine:

# %% tags=["nbval-check-output"]
check("16 bit", full, at_least=0.98)
check("NF4 loses little", full - scores["NF4", 64], at_most=0.05)
check("NF4 over symmetric INT4", scores["NF4", 64] - scores["INT4 symmetric", 64], at_least=0.005)
check("NF4 over FP4", scores["NF4", 64] - scores["FP4", 64], at_least=0.01)
check("INT3 is far below", full - scores["INT3", 64], at_least=0.2)
check("double quantisation costs nothing here", scores["NF4", 64] - scores["NF4 + double quant", 64], at_most=0.005)

# %% [markdown]
# At blocks of 64 the order of the errors is the order of the recall. (At 256 symmetric INT4 and FP4 are level.) That
# is clear in this model because it is full of facts. In a model with room to spare, 4-bit formats hardly differ in what
# they know.
#
# ## Exercise 1
#
# Write `entropy(shares)`: the bits of information in a code, given how often each code is used (a tensor that sums to 1;
# some entries may be 0).

# %% tags=["exercise"]
def entropy(shares: torch.Tensor) -> float:
    return ...

# %% tags=["solution"]
def entropy(shares: torch.Tensor) -> float:
    used = shares[shares > 0]
    return -(used * used.log2()).sum().item()

# %% tags=["nbval-check-output"]
skewed = torch.tensor([0.5, 0.25, 0.25, 0.0])
exercise("entropy", entropy(skewed), 1.5, hint="minus the sum of p * log2(p), over the codes with p > 0.")

# %% [markdown]
# ## Exercise 2
#
# A format of your own. Find 16 values between -1 and 1, the largest exactly 1 in size, with a smaller relative error on
# `gaussian` at block size 64 than symmetric INT4. (Can you beat NF4?)

# %% tags=["exercise"]
my_values = ...

# %% tags=["solution"]
my_values = torch.linspace(-1, 1, 16)
my_values = my_values.sign() * my_values.abs() ** 1.25  # crowd the values near zero

# %% tags=["nbval-check-output"]
from qlora_helpers.quantize import Codebook


def judge(values) -> str:
    if not isinstance(values, torch.Tensor) or values.shape != (16,):
        return "expected a tensor of 16 values."
    if values.abs().max() != 1:
        return f"expected a largest size of 1, and got {values.abs().max():.4f}."
    error = relative_error(gaussian, Codebook("mine", 4, values.float().sort().values), 64)
    limit = errors["INT4 symmetric"][1]
    return "" if error < limit else f"expected an error under {limit:.4f}, and got {error:.4f}."


exercise("a format of your own", my_values, judge, hint="equal steps ignore that most weights are small.")

# %% [markdown]
# ## You have
# - seen that weights are nearly normal, and one matrix that is not;
# - built NF4 and block-wise quantisation in a few lines, equal to bitsandbytes bit for bit;
# - seen that NF4 uses its codes most evenly, though not equally, and errs least at every block size;
# - measured that its advantage reaches what the model knows.
#
# Next: [lesson 3](03_double_quantisation.ipynb) quantises the scales, too.
