# %% [markdown]
# # 6 · Adapters and merging
#
# You will
# - look into an adapter's files, and see that an adapter belongs to one base;
# - put two adapters on one 4-bit base, switch between them, and let both answer in one batch;
# - merge an adapter into the 4-bit base, the dequantised base and the original 16-bit base, and measure what each changes;
# - see why an adapter that is merged into 4 bits loses a part of itself, and sometimes all;
# - plan the memory of a merge for 8B and 70B, merge from file to file, and save without losing anything.
#
# Takes about {{seconds}} seconds and {{gigabytes}} GB of memory on two processor cores. No GPU is needed: what only a GPU
# can tell was measured on one, an H200, by `data/scripts/measure/merging.py`.

# %%
import json

from qlora_helpers import evaluation
from qlora_helpers.adapters.files import WrongBase, describe, load_adapter
from qlora_helpers.chats import read_chats, split_question
from qlora_helpers.course import plots
from qlora_helpers.course.checks import check, exercise
from qlora_helpers.hardware import detect
from qlora_helpers.memory import find_gpu, find_shape, predict_merge
from qlora_helpers.models.loading import load_model, load_tokenizer
from qlora_helpers.models.weights import bytes_by_part, linear_layers
from qlora_helpers.paths import data_path
from qlora_helpers.settings import Settings
from qlora_helpers.training.run import train
from qlora_helpers.training.run_folder import new_run_folder

import torch

import bitsandbytes as bnb
import peft
import transformers

GB, GIB = 10**9, 2**30
for library in (torch, transformers, peft, bnb):
    print(library.__name__, library.__version__.split("+")[0])

# %% [markdown]
# ## What an adapter is, on disk
#
# Lesson 4's run ended with a folder. One like it comes with the course, from the same run made in advance. It holds three
# files that matter: the weights of `A` and `B`, the layers that they belong to, and which base, by its name and a checksum.

# %% tags=["nbval-check-output"]
sentences = data_path("adapters", "sentences")
files = describe(sentences)
print(f"for {files.base}, rank {files.rank}, alpha {files.alpha}, on {', '.join(files.modules)}")
check("numbers in it", files.parameters, 262_144, exact=True)
check("bytes per number, header included", files.bytes / files.parameters, 4, rel=0.02)

# %% [markdown]
# For Llama-3.1-8B at rank 16 an adapter of bfloat16 numbers is small beside its base:

# %% tags=["nbval-check-output"]
shape = find_shape("meta-llama/Llama-3.1-8B")
print(f"adapter {2 * shape.lora_parameters(16) / 1e6:.0f} MB, 4-bit base {predict_merge(shape, '4bit').base_bytes / GB:.2f} GB")

# %% [markdown]
# ## Onto the 4-bit base
#
# This is how the run left it: the base in 4 bits, the adapter beside it. Nothing is lost.

# %% tags=["nbval-check-output"]
tokenizer = load_tokenizer()
test_chats = read_chats(data_path("chats", "test.jsonl"))[:150]
questions = [split_question(chat)[0] for chat in test_chats]
unmerged = load_adapter(load_model(quantization="nf4"), sentences, "sentences")
check("exact match on 150 questions", evaluation.exact_match(unmerged, tokenizer, test_chats), at_least=0.9)

# %% [markdown]
# ## A second adapter
#
# The same knowledge, another tone: answers of a single word. Fifty short steps are enough to hear it. We train on a fresh base
# and save nothing but the adapter.

# %%
def in_a_word(chats):
    return [[question, {"role": "assistant", "content": answer["content"].split()[-1]}] for question, answer in chats]


settings = Settings(steps=50, batch_size=8, learning_rate=2e-3, warmup_steps=3)
train_chats = in_a_word(read_chats(data_path("chats", "train.jsonl"))[: 50 * 8])
run = train(load_model(), tokenizer, train_chats, new_run_folder("lesson-06-words"), settings)

# %% tags=["nbval-check-output"]
print(f"trained {run.trainable_parameters:,} numbers more, in {run.saved_path.name}/")

# %% [markdown]
# Now both sit on one base. `set_adapter` switches; the base stays where it is.

# %%
both = load_adapter(unmerged, run.saved_path, "words")
for name in ("sentences", "words"):
    both.set_adapter(name)
    print(name, evaluation.answer(both, tokenizer, questions[:3]))

# %% [markdown]
# A server needs no switching. Each row of a batch can name its adapter: the product with the 4-bit weights is computed once
# for all rows, and each adapter's small products for its own rows. Each row's answer is the one that its adapter gives when it
# has the whole batch to itself.

# %% tags=["nbval-check-output"]
names = ["sentences", "words"] * 4
together = evaluation.answer(both, tokenizer, questions[:8], adapters=names)
alone = {}
for name in ("sentences", "words"):
    both.set_adapter(name)
    alone[name] = evaluation.answer(both, tokenizer, questions[:8])
same = together == [alone[name][row] for row, name in enumerate(names)]
check("8 answers of a mixed batch, as from each adapter alone", same, True, exact=True)
check("words per answer", [len(text.split()) == 1 for text in together], [False, True] * 4, exact=True)

# %% [markdown]
# What this saves: two fine-tuned models of 8B as two 16-bit copies, against one 4-bit base with two adapters.

# %% tags=["nbval-check-output"]
copies = 2 * predict_merge(shape, "16bit").merged_bytes
one_base = predict_merge(shape, "4bit").base_bytes + 2 * 2 * shape.lora_parameters(16)
print(f"two merged copies {copies / GB:.1f} GB, one base with two adapters {one_base / GB:.1f} GB")

# %% [markdown]
# ## Merging, by hand
#
# An adapter adds `x Aᵀ Bᵀ · alpha / rank` to a layer's output. So it can be added to the weight itself:
# `W + B A · alpha / rank`. By hand, from the adapter's file, and by PEFT, on the 16-bit base. Both add on the CPU: a GPU adds
# up in another order, and the last bits would differ.

# %% tags=["nbval-check-output"]
from qlora_helpers.adapters.merge import load_base, merge
from safetensors.torch import load_file

cpu = detect("cpu")
stored = load_file(sentences / "adapter_model.safetensors")
deltas = {}
for key, A in stored.items():
    layer_name, is_A, _ = key.removeprefix("base_model.model.").partition(".lora_A.")
    if is_A:
        B = stored[key.replace("lora_A", "lora_B")]
        deltas[layer_name] = B @ A * (files.alpha / files.rank)
weights = {name: layer.weight.detach().clone() for name, layer in linear_layers(load_base("16bit", hardware=cpu))}
name = "model.layers.0.mlp.up_proj"
merged = merge(sentences, "16bit", hardware=cpu)
check("one merged layer, by hand and by PEFT", merged.get_submodule(name).weight.data, weights[name] + deltas[name], exact=True)

# %% [markdown]
# Into a 4-bit base: decode the weight, add the difference, and round the sum to 4 bits again. Lesson 3's `quantize`, written
# from scratch, gives what PEFT and bitsandbytes give, bit for bit:

# %% tags=["nbval-check-output"]
from qlora_helpers.quantize import NF4, dequantize, quantize


def rounded(weight):
    return dequantize(quantize(weight, NF4, 64, double_quant=True))


decoded = {name: layer.weight.detach().clone() for name, layer in linear_layers(load_base("dequantised", hardware=cpu))}
layer = merge(sentences, "4bit", hardware=cpu).get_submodule(name)
theirs = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
check("one layer merged into 4 bits", theirs, rounded(decoded[name] + deltas[name]), exact=True)

# %% [markdown]
# ## Merging, measured
#
# One article says that a 4-bit model "can't be merged directly"; PEFT does it, with a warning that generations may change.
# Another says that one de-quantises and merges, and its code then loads the original 16-bit base, which the run has never
# seen. So there are three bases to merge into. A fourth way quantises the third once more. What does each change?

# %%
from qlora_helpers.adapters.drift import drift, logits
from qlora_helpers.models.saving import save_model


def row(model):
    scores = evaluation.exact_match(model, tokenizer, test_chats), evaluation.loss(model, tokenizer, test_chats[:100])
    speed = evaluation.seconds_per_token(model, tokenizer, questions[0], tokens=8) * 1000
    return *scores, drift(logits(model, tokenizer, test_chats[:100]), wanted), sum(bytes_by_part(model).values()), speed


both.set_adapter("sentences")
wanted = logits(both, tokenizer, test_chats[:100])
results = {"unmerged": row(both)}
for into in ("4bit", "dequantised", "16bit"):
    results[into] = row(merge(sentences, into))
folder = save_model(merged, tokenizer, new_run_folder("lesson-06") / "merged", dtype=torch.bfloat16)
results["16bit, then 4bit"] = row(load_model(str(folder)))

print("                     match   loss   logits: largest, mean, same choice      MB   ms per token")
for way, (match, loss, moved, size, speed) in results.items():
    print(f"{way:20}{match:6.1%}{loss:8.4f}{moved.largest:13.5f}{moved.mean:9.5f}{moved.same_choice:10.1%}{size / 1e6:10.2f}{speed:10.1f}")

# %% tags=["nbval-check-output"]
match = {way: result[0] for way, result in results.items()}
moved = {way: result[2] for way, result in results.items()}
check("dequantised: tokens with the same choice", moved["dequantised"].same_choice, at_least=0.98)
check("into 4 bits: exact match lost", match["unmerged"] - match["4bit"], at_least=0.005)
check("16 bit: mean difference of logits over that of dequantised", moved["16bit"].mean / moved["dequantised"].mean, at_least=5)
check("16 bit, then 4 bit: exact match against unmerged", match["16bit, then 4bit"] - match["unmerged"], at_least=-0.05)

# %% [markdown]
# - **Dequantised** is the model that was trained, but for rounding: next to none in the CPU's float32, more in a GPU's 16 bits.
#   It takes 16 bits for each weight, and it is faster: nothing is decoded.
# - **16 bit** is another model. Its logits move far. Here its answers become *better*: this base knows its facts best in
#   16 bits, and the adapter asks for them just the same. That is no law: for some models (Falcon-H1 is one on record,
#   unslothai/unsloth-zoo #810) the same step makes nonsense. Measure it on your own test questions.
# - **4 bit** keeps the size and loses answers. Why?
#
# ## Where the adapter goes
#
# A decoded 4-bit weight lies exactly on one of its block's 16 values. Add a small difference, and the nearest value is most
# often the one that it came from: the difference is rounded away. A 16-bit weight lies anywhere between the values, so a small
# difference pushes some weights over the border, and on average it is kept.
#
# How much of the difference survives? We project what really changed onto what should have changed, for this adapter and for
# smaller ones, as a shorter run or a lower learning rate makes them:

# %%
def surviving(start: dict, scale: float) -> float:
    kept = wished = 0.0
    for name, weight in start.items():
        delta = scale * deltas[name]
        kept += ((rounded(weight + delta) - rounded(weight)) * delta).sum().item()
        wished += (delta * delta).sum().item()
    return kept / wished


scales = [1, 0.25, 1 / 16]
survives = {"decoded 4-bit weights": [surviving(decoded, s) for s in scales],
            "16-bit weights": [surviving(weights, s) for s in scales]}

# %%
fig, ax = plots.figure()
for (base, shares), marker in zip(survives.items(), "os"):
    ax.plot(scales, [share * 100 for share in shares], marker=marker, label=f"added to {base}, then rounded")
ax.set_xscale("log", base=2)
ax.set_xticks(scales, ["1", "1/4", "1/16"])
ax.set_xlabel("size of the adapter's difference (1: as trained)")
ax.set_ylabel("of it survives (%)")
ax.set_ylim(0, 115)
ax.legend(loc="center left")
ax.set_title("Merged into 4 bits, a small adapter is rounded away")
plots.show(fig, "Share of the adapter's difference that survives rounding to 4 bits, against its size. From 16-bit weights "
           f"about 100 percent at each size; from decoded 4-bit weights {survives['decoded 4-bit weights'][0]:.0%} at full size, "
           f"{survives['decoded 4-bit weights'][1]:.0%} at a quarter and {survives['decoded 4-bit weights'][2]:.0%} at a sixteenth.")

# %% tags=["nbval-check-output"]
check("of the adapter, into 4 bits", survives["decoded 4-bit weights"][0], at_least=0.6, at_most=0.8)
check("of one a sixteenth as large, into 4 bits", survives["decoded 4-bit weights"][2], at_most=0.1)
check("of one a sixteenth as large, into 16 bits, then rounded", survives["16-bit weights"][2], at_least=0.9)

# %% [markdown]
# ## The same at full size
#
# On an H200, with the shape of Llama-3.1-8B: 40 steps at 2e-4, then each way. "Same choice" is the share of tokens for which
# the most likely next token is the unmerged model's. The weights are random, since no real ones could be had offline. So the
# logits stand for no real model's; memory and time do.

# %% tags=["nbval-check-output"]
measured = json.loads(data_path("measured", "merging.json").read_text())
rows = {r["way"]: r for r in measured["rows"]}
print("                   same choice   mean    peak GB   ms per token")
for way, r in rows.items():
    if "mean" in r:
        peak = max(r.get("base_peak_bytes", 0), r.get("merge_peak_bytes", 0)) / GB
        print(f"{way:20}{r['same_choice']:9.1%}{r['mean']:9.3f}{f'{peak:9.2f}' if peak else '        –'}{r['ms_per_token']:11.1f}")
check("into 4 bits: mean over that of no adapter at all", rows["4bit"]["mean"] / rows["no adapter"]["mean"], at_least=0.9)
check("16 bit, then 4 bit: the same", rows["16bit, then 4bit"]["mean"] / rows["no adapter"]["mean"], at_most=0.1)

# %% [markdown]
# After this short run, merging into 4 bits gave back the base as it was before: the whole run was rounded away. Merged into
# the 16-bit base and quantised again, the same adapter in the same 4 bits is nearly all there.
#
# **If you must serve 4 bits: keep the adapter beside the base, or merge into the 16-bit base and quantise again. Do not merge
# into the 4-bit base.** Better still, hold each against your own test questions, as above.
#
# ## The memory that a merge needs
#
# `merging` predicts it. Held against the measured peaks of 8B:

# %% tags=["nbval-check-output"]
for into in ("4bit", "dequantised", "16bit"):
    peak = max(rows[into]["base_peak_bytes"], rows[into]["merge_peak_bytes"])
    check(f"8B, {into}: predicted peak in GB against measured", predict_merge(shape, into).peak_bytes / GB, peak / GB, rel=0.01)

# %% [markdown]
# Dequantising needs the most: transformers keeps the 4-bit weights until the last layer is decoded. For 70B:

# %% tags=["nbval-check-output"]
for model in ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-2-70b-hf"):
    for into in ("4bit", "dequantised", "16bit"):
        plan = predict_merge(find_shape(model), into)
        print(f"{model:27}{into:13}peak {plan.peak_bytes / GB:7.2f} GB, result {plan.merged_bytes / GB:7.2f} GB")

# %% [markdown]
# An article says "more than 140 GB" of main memory for 70B. The weights alone are 137.95 GB. But a merge needs one weight at a
# time: `merge_files` copies the base's files, and overwrites in the copy what the adapter changes.

# %% tags=["nbval-check-output"]
from qlora_helpers.adapters.file_merge import merge_files

transformers.utils.logging.disable_progress_bar()
by_file = merge_files(data_path("tiny-llama"), sentences, new_run_folder("lesson-06") / "by-file")
plain = transformers.AutoModelForCausalLM.from_pretrained(by_file, dtype=torch.float32)
saved = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
differ = sum(not torch.equal(a, b) for a, b in zip(plain.parameters(), saved.parameters()))
check("tensors that differ, merged from file to file and in memory", differ, 0, exact=True)
files_row = rows["16bit, from file to file"]
print(f"8B: {files_row['host_peak_bytes'] / GB:.2f} GB of main memory, {files_row['merge_seconds']} s; the largest file has {files_row['largest_file_bytes'] / GB:.2f} GB")

# %% [markdown]
# Most of that is not needed: of the 3.68 GB, one file's 1.98 GB are pages of the file being read, which the system takes back
# when memory is short.
#
# ## Saved, and not lost
#
# Plain transformers has just loaded both folders: no PEFT, no bitsandbytes. Two things can still go wrong. A folder could be
# overwritten by mistake:

# %% tags=["nbval-check-output"]
try:
    save_model(merged, tokenizer, folder)
except FileExistsError as error:
    print(str(error).replace(str(folder), "…/merged"))

# %% [markdown]
# With `overwrite=True` the old folder stays until the new one is whole, so a crash in between loses nothing. And an adapter
# could land on a base that it was not trained on, such as the model it was merged into already. PEFT would add it a second
# time and say nothing:

# %% tags=["nbval-check-output"]
try:
    load_adapter(load_model(str(folder)), sentences)
except WrongBase as error:
    print(str(error).replace(str(sentences), "…/sentences"))

# %% [markdown]
# ## Exercise 1
#
# How many bytes is an adapter of rank 64 for Llama-3.1-8B, in bfloat16? `shape.lora_parameters` counts its numbers.

# %% tags=["exercise"]
adapter_bytes = ...

# %% tags=["solution"]
adapter_bytes = 2 * shape.lora_parameters(64)

# %% tags=["nbval-check-output"]
exercise("an adapter of rank 64", adapter_bytes, 2 * 167_772_160, hint="Two bytes for each number.")

# %% [markdown]
# ## Exercise 2
#
# You want to merge an adapter of an 8B model on a T4, on the GPU. Which of the three ways fit? Make a list of their names. The
# memory that a card leaves to you is `find_gpu("t4").usable_bytes`.

# %% tags=["exercise"]
ways = ...

# %% tags=["solution"]
ways = [into for into in ("4bit", "dequantised", "16bit") if predict_merge(shape, into).peak_bytes < find_gpu("t4").usable_bytes]

# %% tags=["nbval-check-output"]
exercise("merges that fit a T4", ways, ["4bit"], hint="Compare predict_merge(shape, into).peak_bytes for each.")

# %% [markdown]
# ## You have
# - looked into an adapter's files, and seen it refused by a base that is not its own;
# - put two adapters on one 4-bit base, switched between them, and let both answer in one batch;
# - merged an adapter into three bases, and measured answers, loss, logits, size and speed;
# - seen that rounding to 4 bits takes a part of an adapter away, and at 8B took all of a short run;
# - planned the memory of a merge for 8B and 70B, merged from file to file, and saved without losing anything.
#
# Next: [lesson 7](07_does_it_cost_quality.ipynb) asks what 4 bits cost in quality, with five seeds and error bars.
