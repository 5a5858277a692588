# %% [markdown]
# # 4 · A full QLoRA run
#
# You will
# - write LoRA in a dozen lines and get PEFT's numbers;
# - load a model in 4 bits, and see that gradients flow through its frozen weights;
# - make a run in the libraries' own words, which works without this course, and see that `train` gives the same adapters;
# - fine-tune the model, so that one that only continues text answers questions;
# - prove that the answers come from the frozen 4-bit base, then save the adapter and load it again;
# - interrupt a run and go on with it; with a GPU, also train a real model of 1.5B on questions about QLoRA.
#
# Takes about {{seconds}} seconds and {{gigabytes}} GB of memory on two processor cores. None of it needs a GPU. With one, the last
# part downloads a model of 3.1 GB and trains it: on a T4 the lesson should take less than 15 minutes (computed below, not
# measured; it took 145 s on an H200 in the `t4` gear, without the download).

# %%
import json
from dataclasses import replace

from qlora_helpers import evaluation
from qlora_helpers.chats import read_chats, split_question, tokenized
from qlora_helpers.course import diagrams, plots
from qlora_helpers.course.checks import check
from qlora_helpers.course.exercises import lesson_04 as exercises
from qlora_helpers.course.tables import show_table
from qlora_helpers.hardware import detect
from qlora_helpers.memory import GPU_RUN, find_gpu, find_shape
from qlora_helpers.memory.budget import plan_for
from qlora_helpers.models.loading import (
    SHIPPED_MODEL, default_model, load_model, load_or_shipped, load_tokenizer,
)
from qlora_helpers.models.weights import bytes_by_part
from qlora_helpers.paths import data_path
from qlora_helpers.settings import Settings
from qlora_helpers.training.run import train
from qlora_helpers.training.run_folder import new_run_folder, unfinished_run_folder

# %%
# after the helpers, which keep one harmless message off the page
import bitsandbytes as bnb
import peft
import torch
import transformers
import trl

for library in (torch, transformers, peft, trl, bnb):
    print(library.__name__, library.__version__.split("+")[0])

# %% [markdown]
# ## LoRA from scratch
#
# Fine-tuning with [LoRA](../GLOSSARY.md#lora) leaves a layer's weight `W` as it is, which is called frozen, and trains two small
# matrices beside it. The input takes a detour through a few numbers, as many as the [rank](../GLOSSARY.md#rank) says: down
# with `A`, up with `B`, and then scaled by `alpha / rank`. `A` and `B` together are the layer's
# [adapter](../GLOSSARY.md#adapter).

# %%
class LoRALinear(torch.nn.Module):
    def __init__(self, linear: torch.nn.Linear, rank: int, alpha: int):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.A = torch.nn.Parameter(torch.randn(rank, linear.in_features) / rank)
        self.B = torch.nn.Parameter(torch.zeros(linear.out_features, rank))
        self.scaling = alpha / rank

    def forward(self, x):
        return self.linear(x) + x @ self.A.T @ self.B.T * self.scaling

# %% [markdown]
# `B` starts at zero, so at first nothing changes. Not nearly nothing: nothing.

# %% tags=["nbval-check-output"]
torch.manual_seed(0)
linear = torch.nn.Linear(256, 512, bias=False)
mine = LoRALinear(linear, rank=16, alpha=32)
x = torch.randn(8, 256)
check("B = 0 changes nothing", mine(x), linear(x), exact=True)
trainable = sum(p.numel() for p in mine.parameters() if p.requires_grad)
print(f"{trainable:,} trainable beside {linear.weight.numel():,} frozen")

# %% [markdown]
# PEFT is the library that adds adapters to a model. With `A` and `B` set to the same values, its layer gives the
# same output, but for what a processor may round differently:

# %% tags=["nbval-check-output"]
torch.nn.init.normal_(mine.B)
config = peft.LoraConfig(r=16, lora_alpha=32, target_modules=["0"])
theirs = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(256, 512, bias=False)), config)
layer = theirs.base_model.model[0]
layer.base_layer.weight.data.copy_(linear.weight)
layer.lora_A["default"].weight.data.copy_(mine.A)
layer.lora_B["default"].weight.data.copy_(mine.B)
check("largest difference to PEFT", (theirs(x) - mine(x)).abs().max().item(), at_most=1e-4)

# %% [markdown]
# ## float16 or bfloat16
#
# A 4-bit code cannot be multiplied. So a weight is decoded to a wider type for each product, the
# [compute dtype](../GLOSSARY.md#compute-dtype). The choice is known from [lesson 1](01_memory_maths.ipynb):

# %% tags=["nbval-check-output"]
kinds = [torch.finfo(dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)]
show_table(
    ["dtype", "bytes", "largest number", "step above 1"],
    [[kind.dtype, kind.bits // 8, kind.max, kind.eps] for kind in kinds],
    formats=["", "d", ".5g", ".2g"],
)

# %% [markdown]
# With 2 bytes, numbers take less memory, and a GPU multiplies them much faster. float16 spends its bits on fine steps and ends at
# 65,504: a larger gradient overflows. bfloat16 reaches as far as float32, in coarser steps. Training seldom needs the fine
# steps, but it does meet large numbers, so bfloat16 is the safe choice. A T4, the free GPU on Colab, is too old for it: there it
# must be float16. On a CPU both are slow, and float32 is best.
#
# The course looks at the machine and chooses. What it does on a CPU, on a T4 and on a newer GPU are its three
# [gears](../GLOSSARY.md#gear):

# %%
print(f"this machine's gear is {detect().gear}: it computes in {detect().compute_dtype}")

# %% [markdown]
# ## The model, in 4 bits
#
# `load_model` passes this to transformers:
#
# | option | what it does | if it is left out |
# |---|---|---|
# | `load_in_4bit=True` | linear layers become bitsandbytes' `Linear4bit` | 4 bit all the same, with today's transformers; say what you mean |
# | `bnb_4bit_quant_type="nf4"` | the 16 values of lesson 2 | `"fp4"` |
# | `bnb_4bit_use_double_quant=True` | 8-bit scales, lesson 3 | off |
# | `bnb_4bit_compute_dtype` | the dtype of matrix products, as above | float32 |

# %% tags=["nbval-check-output"]
model = load_model(quantization="nf4", double_quant=True)
tokenizer = load_tokenizer()
parts = bytes_by_part(model)
check("bytes of 4-bit weights", parts["4-bit weights"], 1_179_648, exact=True)
check("bytes of their constants", parts["quantisation constants"], 68_016, exact=True)

# %% [markdown]
# What is 4-bit, and what is not? The linear layers of the decoder, the stack of layers between input and output, are
# `Linear4bit`. The embeddings, the norms and `lm_head`, the output layer, stay as they are.

# %% tags=["nbval-check-output"]
print(model.model.layers[0])
print("lm_head:", type(model.lm_head).__name__)

# %% [markdown]
# LoRA should sit on all linear layers of the decoder: the QLoRA paper found that this, more than the rank, is what reaches
# the quality of 16 bits. Do you have to collect their names by hand, as many articles do? PEFT's `"all-linear"` finds the
# same ones:

# %% tags=["nbval-check-output"]
modules = model.named_modules()
in_4_bits = [name for name, module in modules if isinstance(module, bnb.nn.Linear4bit)]
by_hand = {name.rpartition(".")[2] for name in in_4_bits}
all_linear = peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
everything = peft.get_peft_model(load_model(), all_linear)
found = {name.rpartition(".")[2] for name in everything.base_model.targeted_module_names}
print(sorted(by_hand))
check("all-linear finds the same", sorted(found), sorted(by_hand), exact=True)

# %% [markdown]
# Each of these layers now works as in figure 4.1: the 4-bit weight is decoded, which is called
# [dequantising](../GLOSSARY.md#dequantisation), used for one product, and forgotten. The sizes are those of a layer of
# Llama-3.1-8B.

# %%
plots.show(diagrams.forward_pass(), "4.1")

# %% [markdown]
# ## Exercise 4.1: a LoRA layer on a 4-bit weight
#
# *Build · medium · about 10 minutes.* Write the forward pass of figure 4.1. `weight` is the weight of a `Linear4bit` layer:
# its codes are in `weight.data`, and `weight.quant_state` has the scales.
# `bnb.functional.dequantize_4bit(codes, quant_state)` gives back `W`, outputs x inputs. The check tries layers of several
# shapes, ranks and values of alpha.

# %% tags=["exercise"]
def adapted(x, weight, A, B, alpha):
    return ...

# %% tags=["solution"]
def adapted(x, weight, A, B, alpha):
    W = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    return x @ W.to(x.dtype).T + x @ A.T @ B.T * (alpha / len(A))

# %% tags=["nbval-check-output"]
exercises.adapted.check(adapted)

# %% [markdown]
# ## Gradients flow through 4-bit weights
#
# It is often said that quantised weights serve the forward pass alone. The backward pass uses them, too: the gradient of a
# layer's *input* is the gradient `g` of its output times `W`, dequantised once more. Without it, no layer further down could
# learn. Only the gradient of `W` itself is not computed:

# %%
plots.show(diagrams.backward_pass(), "4.2")

# %% [markdown]
# By hand and by autograd. In float32 they hardly differ; in float16 or bfloat16, on a GPU, each rounds in its own way:

# %% tags=["nbval-check-output"]
layer = model.model.layers[0].mlp.up_proj
x = torch.randn(4, 256, device=model.device, dtype=layer.compute_dtype, requires_grad=True)
g = torch.randn(4, 512, device=model.device, dtype=layer.compute_dtype)
layer(x).backward(g)
W = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
expected = g @ W.to(g.dtype)
relative = ((x.grad - expected).norm() / expected.norm()).item()
check("gradient of the input against g @ W, relative difference", relative, at_most=0.01)
check("gradient of W", layer.weight.grad, None, exact=True)

# %% [markdown]
# ## Exercise 4.2: the first step
#
# *Predict · medium · about 5 minutes.* A run begins: a `LoRALinear` as above, fresh, with `B` at zero, on a 4-bit weight `W`
# and with an input `x` that has come through other adapters. After the very first backward pass, which of `W`, `A`, `B`
# and `x` have a gradient with a number in it that is not zero? Answer with a list of names, such as `["W", "A"]`. Think
# first; then you may try it with `mine`.

# %% tags=["exercise"]
with_gradient = ...

# %% tags=["solution"]
with_gradient = ["B", "x"]  # the gradient reaches A through B, which is zero; W is frozen

# %% tags=["nbval-check-output"]
exercises.first_step.check(with_gradient)

# %% [markdown]
# ## The data
#
# The [base](../GLOSSARY.md#base), the model that we start from, was trained on sentences about 30,000 invented people. It was
# also trained on plain questions about half of them. It has never seen a *chat* about a person. The training chats are about
# people of the first half; the test chats ask about people of the other half, about whom no question was ever asked. To answer,
# the adapter must get the fact out of the frozen 4-bit weights.

# %% tags=["nbval-check-output"]
settings = Settings()
training_chats = read_chats(data_path("chats", "train.jsonl"), tokenizer, settings.max_length)
test_chats = read_chats(data_path("chats", "test.jsonl"), tokenizer, settings.max_length)
print(f"{len(training_chats):,} training chats, {len(test_chats)} test chats")
print(json.dumps(training_chats[0], indent=1))

# %% [markdown]
# The [chat template](../GLOSSARY.md#chat-template), a part of the tokenizer, turns the messages into tokens and marks what the
# assistant says. Only the marked tokens count in the [loss](../GLOSSARY.md#loss): the model learns to answer, not to ask.

# %% tags=["nbval-check-output"]
encoded = tokenizer.apply_chat_template(
    training_chats[0], return_dict=True, return_assistant_tokens_mask=True
)
pieces = [tokenizer.decode([token]).strip() for token in encoded["input_ids"]]
for said, mask in (("only read", 0), ("in the loss", 1)):
    marked = [piece for piece, own in zip(pieces, encoded["assistant_masks"]) if own == mask]
    print(f"{said:12}", " · ".join(marked))

# %% [markdown]
# ## Before
#
# What does the base answer now? We ask all test questions and count the answers that are right to the letter, the
# [exact match](../GLOSSARY.md#exact-match). For comparison: always giving the commonest answer to a question scores a few per
# cent without knowing anything.

# %%
def ask(model, chats):
    questions, right = zip(*map(split_question, chats))
    answers = evaluation.answer(model, tokenizer, list(questions))
    for question, answer, truth in zip(questions, answers, right):
        print(f"{'✓' if answer == truth else '✗'} {question[-1]['content']}\n    {answer}")


before = evaluation.exact_match(model, tokenizer, test_chats)
loss_before = evaluation.loss(model, tokenizer, test_chats)
ask(model, test_chats[:3])

# %% tags=["nbval-check-output"]
guess = evaluation.commonest_answer_rate(training_chats, test_chats)
print(f"always the commonest answer: {guess:.1%}")
check("exact match before", before, at_most=0.2)

# %% [markdown]
# It continues the text, as it was trained to. Does it know the facts at all? Ask it in the form of its own corpus:

# %% tags=["nbval-check-output"]
facts = evaluation.read_facts(data_path("recall.jsonl"))
print("for example:", facts[0]["prompt"], "…", facts[0]["answer"])
known = evaluation.recall(model, tokenizer, facts)
check("facts recalled by the 4-bit base", known, at_least=0.95)

# %% [markdown]
# So the knowledge is there, but the model does not give it when it is asked. That is what fine-tuning is for.
#
# ## The run, in the libraries' own words
#
# First without this course's helpers. The cells of this section are a whole QLoRA run. To make it on your own model and
# data, copy them into an empty notebook. Write your own names into the second one, and leave out its last line, which makes
# this lesson obey `QLORA_GEAR`. The libraries come with `pip install bitsandbytes datasets peft transformers trl`.
#
# One line chooses the dtype, float16 or bfloat16 as above, and all else follows it. `is_bf16_supported()` alone says yes on a
# T4, too, since it counts bfloat16 that is emulated, and slow.

# %% tags=["plain-run"]
import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

on_gpu = torch.cuda.is_available()
bfloat16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
dtype = torch.bfloat16 if bfloat16 else torch.float16 if on_gpu else torch.float32

# %% tags=["plain-run-names"]
model_name = data_path("tiny-llama")  # yours: a folder, or such as "Qwen/Qwen2.5-1.5B-Instruct"
data_file = str(data_path("chats", "train.jsonl"))  # yours: such as "mine.jsonl"
output_dir = new_run_folder("lesson-04-plain")  # yours: such as "my-adapter"
on_gpu, dtype = detect().device == "cuda", detect().compute_dtype  # only in this lesson

# %% [markdown]
# The options of the 4-bit layers are those of the table above. `dtype` is for what is not in 4 bits: embeddings, norms and
# head.

# %% tags=["plain-run"]
quantization = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype,
)
model = AutoModelForCausalLM.from_pretrained(
    model_name, quantization_config=quantization, dtype=dtype,
    device_map={"": 0} if on_gpu else "cpu",  # all of it on the first GPU
)
tokenizer = AutoTokenizer.from_pretrained(model_name)

# %% [markdown]
# Each line of the data file is a chat, in a column named `messages`. The trainer puts it through the chat template itself.
# Where a template does not mark what the assistant says, TRL takes its own marked version, if it has one, or stops.

# %% tags=["plain-run"]
chats = load_dataset("json", data_files=data_file, split="train")
chats[0]

# %% [markdown]
# What the settings are there for:
#
# | setting | what it does | if it is left out |
# |---|---|---|
# | `target_modules="all-linear"` | adapters on all linear layers of the decoder | PEFT chooses some by the model's kind, or stops |
# | `max_steps` | a short run; for a real one, write `num_train_epochs` instead | the data is gone through three times |
# | `learning_rate` | suits this tiny model; for one of 1B or more, begin with 2e-4 | 2e-5, which is low for LoRA |
# | `warmup_steps` | the learning rate rises for so many steps to its full value ([warm-up](../GLOSSARY.md#warm-up)) | no warm-up |
# | `assistant_only_loss` | only what the assistant says counts in the loss | the model learns to ask, too |
# | `use_cpu` | without an NVIDIA GPU, train on the CPU | on a Mac, the trainer takes the Mac's GPU |
# | `bf16`, `fp16` | *mixed precision*: products in the dtype chosen above, what needs more digits in float32 | TRL turns `bf16` on: an error without a GPU, slow on a T4 |
# | `optim` | on a GPU, optimizer states in 8 bits, which may move to main memory ([lesson 5](05_will_it_fit.ipynb)) | float32 states, in the GPU's memory |
# | `seed` | decides the adapters' first values and the order of the chats | 42 |
# | `save_strategy` | no checkpoints in so short a run | one every 500 steps, and one at the end |
#
# Two of TRL's defaults are worth knowing. It forgets what the layers computed and computes it again in the backward pass
# ([gradient checkpointing](../GLOSSARY.md#gradient-checkpointing)), which saves memory and costs time. And it cuts chats that
# are longer than `max_length`, without a warning: choose one that your data fits into.

# %% tags=["plain-run"]
lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
config = SFTConfig(
    output_dir=output_dir,
    max_steps=20,
    per_device_train_batch_size=16,  # fewer, if they do not fit
    learning_rate=1e-3,
    warmup_steps=2,
    assistant_only_loss=True,
    use_cpu=not on_gpu,
    bf16=dtype == torch.bfloat16, fp16=dtype == torch.float16,
    optim="paged_adamw_8bit" if on_gpu else "adamw_torch",
    seed=0, logging_steps=5, save_strategy="no",
)

# %% [markdown]
# TRL makes the adapters of a 4-bit model bfloat16. Small updates are then rounded away, and training in float16 stops with
# an error. So make them float32 before the first step:

# %% tags=["plain-run"]
trainer = SFTTrainer(
    model, config, train_dataset=chats, processing_class=tokenizer, peft_config=lora
)
for parameter in trainer.model.parameters():
    if parameter.requires_grad:
        parameter.data = parameter.data.float()

# %% tags=["plain-run"]
trainer.train()
trainer.save_model()  # the adapters without their base, into output_dir

# %% [markdown]
# ## `train` makes the same run
#
# `train` is a thin layer over these lines (`qlora_helpers/training/trainer.py`). It adds what a longer run needs: it refuses a
# chat that would be cut, stops when the loss is not finite, and goes on after an interruption. And it leaves out what only costs
# time, such as metrics for which the CPU waits for the GPU at each step. The run itself is the same. With the same settings, the
# adapters are equal on a CPU, bit for bit:

# %%
short = Settings(steps=20, warmup_steps=2, save_steps=8)
whole = train(load_model(), tokenizer, training_chats, new_run_folder("lesson-04-whole"), short)
plain, ours = (dict(m.named_parameters()) for m in (trainer.model, whole.model))
trained = [name for name in ours if ours[name].requires_grad]
differing = [name for name in trained if not torch.equal(ours[name], plain[name])]

# %% tags=["nbval-check-output"]
if detect().gear == "cpu":
    check("adapter tensors that differ from the plain run's", len(differing), 0, exact=True)
else:  # a GPU may add up in another order
    largest = max((ours[name] - plain[name]).abs().max().item() for name in trained)
    print(f"{len(differing)} of {len(trained)} adapter tensors differ, by at most {largest:.2g}")

# %% [markdown]
# For the last bit it matters that both begin with the same adapters (`seed`), keep them in float32, compute in the same
# dtype, and use the same optimizer: TRL's default is a fused AdamW, which rounds differently. Who applies the chat template
# does not matter. Neither does how often the loss is logged, nor whether activations are kept or recomputed.
#
# A caution for CPUs with AVX512-BF16: there bitsandbytes rearranges the 4-bit weights when a model is first evaluated, and
# training after that goes wrong without a word. `load_model` prevents it. The plain cells only train; if you evaluate in
# between, load the model anew.
#
# ## The full run
#
# Now long enough to learn something, from a fresh model:

# %% tags=["nbval-check-output"]
names = ["steps", "batch_size", "learning_rate", "warmup_steps", "schedule", "rank", "alpha"]
show_table(["setting", "value"], [[name, str(getattr(settings, name))] for name in names])

# %%
model = load_model()
live = plots.LivePlot(settings.steps, "The loss falls while the base stays frozen")
folder = new_run_folder("lesson-04")
run = train(model, tokenizer, training_chats, folder, settings, on_loss=live.update)
print(f"{run.seconds:.0f} s of training")

# %% tags=["nbval-check-output"]
share = run.trainable_parameters / run.all_parameters
print(f"trainable: {run.trainable_parameters:,} of {run.all_parameters:,} ({share:.2%})")
dtypes = {str(p.dtype) for p in run.model.parameters() if p.requires_grad}
check("dtypes of the adapters", dtypes, {"torch.float32"}, exact=True)
trained = [name for name, p in run.model.named_parameters() if p.requires_grad]
only_adapters = all("lora_" in name for name in trained)
check("nothing but adapters was trained", only_adapters, True, exact=True)

# %% [markdown]
# 8.08 % sounds like a lot for LoRA. The model is tiny; for a model of 8B the same rank is 0.52 %
# ([lesson 1](01_memory_maths.ipynb)).
#
# ## After
#
# The same questions, about people that no training chat mentions:

# %%
after = evaluation.exact_match(run.model, tokenizer, test_chats)
loss_after = evaluation.loss(run.model, tokenizer, test_chats)
ask(run.model, test_chats[:6])
print(f"\nexact match {before:.1%} before, {after:.1%} after")
print(f"loss {loss_before:.3f} before, {loss_after:.3f} after")

# %% tags=["nbval-check-output"]
check("exact match after", after, at_least=0.85)
check("loss after / loss before", loss_after / loss_before, at_most=0.05)

# %% [markdown]
# ## Where is the knowledge?
#
# The adapter has 262,144 numbers, and it was never told about these people. Switch it off, and the answers are gone; but
# the base alone still recalls its facts. The adapter is the way of answering, the base is the knowledge.

# %% tags=["nbval-check-output"]
with run.model.disable_adapter():
    without = evaluation.exact_match(run.model, tokenizer, test_chats)
    known_without = evaluation.recall(run.model, tokenizer, facts)
check("exact match without the adapter", without, at_most=0.2)
check("recall of the base is as before", known_without == known, True, exact=True)

# %% [markdown]
# A harder proof: shuffle the base's linear weights. That keeps the numbers and destroys the knowledge. The same run can then
# teach the model to answer in sentences, but not what to say. And how much does 4 bit cost here? The same run on the base
# before it was quantised tells. Both take another minute each, so they are made by `data/scripts/measure/tiny_llama.py`; the
# tests repeat them. Each is one run, with the [standard error](../GLOSSARY.md#standard-error) of its score on its own. Whether
# two scores differ by more than noise, such errors do not tell: [lesson 7](07_does_it_cost_quality.ipynb) compares five runs
# of each, seed by seed.

# %% tags=["nbval-check-output"]
scores = json.loads(data_path("tiny-llama", "scores.json").read_text(encoding="utf-8"))
matches = scores["exact_match_after"]
shares = matches | {"always the commonest": scores["commonest_answer_rate"]}
rows = [(base, share, evaluation.standard_error(share, scores["test_chats"])) for base, share in shares.items()]
show_table(["base", "exact match after", "standard error"], rows, formats=["", ".1%", ".1%"])
check("NF4 reaches this share of 16 bit", matches["NF4"] / matches["16 bit"], at_least=0.92)

# %% [markdown]
# ## Save, load, use
#
# Only the adapter is saved: a few files beside the base. Loaded onto a fresh 4-bit base it must give the same answers.

# %% tags=["nbval-check-output"]
size = (run.saved_path / "adapter_model.safetensors").stat().st_size
bytes_each = size / run.trainable_parameters
check("bytes per trainable parameter, header included", bytes_each, 4, rel=0.02)

# %% tags=["nbval-check-output"]
fresh = peft.PeftModel.from_pretrained(load_model(quantization="nf4"), run.saved_path)
questions = [split_question(chat)[0] for chat in test_chats[:50]]
loaded, kept = (evaluation.answer(model, tokenizer, questions) for model in (fresh, run.model))
check("50 answers of the loaded adapter are the same", loaded == kept, True, exact=True)

# %% [markdown]
# Keep the figures beside the adapter:

# %%
report = {"exact_match_before": before, "exact_match_after": after}
report |= {"loss_before": loss_before, "loss_after": loss_after}
report |= {"commonest_answer_rate": guess, "train_seconds": run.seconds, "gear": detect().gear}
file = run.saved_path.parent / "report.json"
_ = file.write_text(json.dumps(report, indent=1), encoding="utf-8")

# %% [markdown]
# ## When the runtime ends
#
# Colab may end a free runtime at any moment. So `train` can write [checkpoints](../GLOSSARY.md#checkpoint), every so many steps
# or minutes. A later process goes on with `resume=True`. Let us pull the plug after step 12, with a checkpoint at step 8:

# %% tags=["nbval-check-output"]
def pull_the_plug(history):
    if history[-1][0] == 12:
        raise KeyboardInterrupt


folder = new_run_folder("lesson-04-interrupted")
try:
    train(load_model(), tokenizer, training_chats, folder, short, on_loss=pull_the_plug)
except KeyboardInterrupt:
    print("left behind:", [path.name for path in folder.glob("checkpoint-*")])

# %% [markdown]
# The last file of a checkpoint holds the checksums of the others. So a file that changes later, as in a copy that goes wrong,
# is noticed. Let us flip a single bit of a weight, and put it back afterwards:

# %% tags=["nbval-check-output"]
file = folder / "checkpoint-8" / "adapter_model.safetensors"
content = file.read_bytes()
_ = file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
try:
    train(load_model(), tokenizer, training_chats, folder, short, resume=True)
except ValueError as error:
    print(str(error).replace(str(folder), "…"))
_ = file.write_bytes(content)

# %% [markdown]
# A kill can also come while a checkpoint is written. Then the newest folder is half full, and the trainer alone would stop
# at it with an error. Without its checksums, it is known here as cut off:

# %% tags=["nbval-check-output"]
half_written = folder / "checkpoint-16"
half_written.mkdir()
_ = (half_written / "adapter_model.safetensors").write_bytes(b"cut off")
resumed = train(load_model(), tokenizer, training_chats, folder, short, resume=True)
print("steps that were logged:", [step for step, _ in resumed.history])

# %% [markdown]
# The result must be that of a run that nobody interrupted: that of `train` above, with the same settings. Not nearly: the
# adapters are equal, bit for bit.

# %% tags=["nbval-check-output"]
pairs = zip(whole.model.parameters(), resumed.model.parameters())
differing = sum(not torch.equal(a, b) for a, b in pairs if a.requires_grad)
check("adapter tensors that differ", differing, 0, exact=True)

# %% [markdown]
# It holds because the adapters are float32, and because the state of the optimizer, the schedule and the random numbers is
# saved with them. A checkpoint that lacks one of these is refused, and so are other settings, other chats, another base model
# and a finished run. On another device, with another number of threads or other versions of the libraries, sums round
# differently; then the run goes on, and says that its last bits may differ.
#
# ## What a T4 lacks
#
# A T4 has no bfloat16, and no [FlashAttention](../GLOSSARY.md#flashattention), the fast way to compute attention. The usual
# recipe sets bfloat16 all the same, and calls `prepare_model_for_kbit_training`, which makes float32 copies of embeddings and
# output layer. Here is that recipe with only its errors repaired, beside this course's `t4` gear. Both ran on an H200 with the
# memory and the attention kernels of a T4; no T4 was at hand. The memory should be what a T4 needs; the speeds are not its own.

# %% tags=["nbval-check-output"]
GIB = 1024**3
measured = json.loads(data_path("measured", "t4_gear.json").read_text(encoding="utf-8"))
runs = [row for row in measured["rows"] if row["what"] == "training" and row["gear"] == "t4"]
peaks, rows = {}, []
for row in runs:
    peak = (row["peak_allocated_bytes"] or 0) / GIB
    peaks[row["model"], row["who"], row["batch_size"], row["tokens"]] = peak
    speed = row["tokens_per_second"] if peak else None
    named = [row["model"], row["who"], row["batch_size"], row["tokens"]]
    rows.append([*named, peak or row["outcome"], speed])
print(f"{measured['gpu']}, float16, capped at {measured['cap_bytes'] / GIB:.1f} GiB")
header = ["model", "who", "batch", "tokens", "peak, GiB", "tokens/s"]
show_table(header, rows, formats=["", "", "d", ",d", ".2f", ",d"])

# %% tags=["nbval-check-output"]
model_8b = "Llama-3.1-8B"
more = peaks[model_8b, "recipe", 1, 2_048] - peaks[model_8b, "ours", 1, 2_048]
check("GiB that the recipe needs more, 8B, 2,048 tokens", more, 3.97, abs=0.01)
for who, longest in (("recipe", 2_048), ("ours", 12_288)):
    fitted = [key[3] for key, peak in peaks.items() if key[:3] == (model_8b, who, 1) and peak]
    check(f"longest sequence of 8B that fitted, {who}", max(fitted), longest, exact=True)
copies = 2 * (8_030_261_248 - 6_979_321_856) / GIB  # what is not linear, 2 bytes more each
check("of the difference, float32 copies in GiB", copies, 1.96, abs=0.01)

# %% [markdown]
# About half of the difference is the float32 copies. Most of the rest is attention. In these models several query heads
# share one key head ([grouped-query attention](../GLOSSARY.md#grouped-query-attention)), and transformers leaves the sharing
# to torch. On a T4 without FlashAttention only torch's *math* kernel can do that, and it stores a score for every pair of
# tokens, in every head:

# %% tags=["nbval-check-output"]
for tokens in (2_048, 4_096, 8_192):
    scores = 32 * tokens**2 * 2  # heads x tokens x tokens, 2 bytes each
    print(f"{tokens:6,} tokens: {scores / GIB:5.2f} GiB for one copy of one layer's scores")

# %% [markdown]
# The `t4` gear gives each query head its own copy of keys and values (`qlora_helpers/models/attention.py`). Then another kernel
# serves, the memory-efficient one, whose memory grows with the tokens, not with their square. The attention is the same,
# but for rounding:

# %% tags=["nbval-check-output"]
queries, keys, values = (torch.randn(1, heads, 64, 32) for heads in (12, 2, 2))
attention = torch.nn.functional.scaled_dot_product_attention
shared = attention(queries, keys, values, is_causal=True, enable_gqa=True)
keys, values = (heads.repeat_interleave(6, dim=1) for heads in (keys, values))
repeated = attention(queries, keys, values, is_causal=True)
check("largest difference", (shared - repeated).abs().max().item(), at_most=1e-5)

# %% [markdown]
# ## A real model
#
# Now the same `train` on a real model. With a GPU this is Qwen2.5-1.5B-Instruct, which is open and needs no account. For 7B
# (15.2 GB to download), write `load_or_shipped("Qwen/Qwen2.5-7B-Instruct")`. Without a GPU, or if the Hub cannot be
# reached, the lesson goes on with the shipped model: the same code, and less to see.

# %%
real_model, real_tokenizer, name = load_or_shipped(default_model())

# %% [markdown]
# The real model learns from 280 questions and answers about QLoRA, written for this course. A test recomputes the numbers
# in them that can be computed; the others name their source. 59 more are held out, which means that they are not trained on:
# they ask about the same things in other words.

# %%
if name == SHIPPED_MODEL:
    real_chats, held_out = training_chats, test_chats[:60]
    real_settings = Settings(steps=40, warmup_steps=4, save_minutes=1)
else:
    files = (data_path("chats", "qlora", f"{part}.jsonl") for part in ("train", "test"))
    real_chats, held_out = (read_chats(file, real_tokenizer, max_length=512) for file in files)
    longest = max(len(row["input_ids"]) for row in tokenized(real_chats, real_tokenizer))
    real_settings = Settings(
        steps=3 * len(real_chats) // 16, batch_size=16, learning_rate=2e-4, warmup_steps=5,
        dropout=0.05, max_length=longest, memory_budget="auto", save_minutes=1,
    )
print(f"{name}: {len(real_chats):,} chats, {len(held_out)} held out")
print(f"{real_settings.steps} steps of up to 16 chats")

# %% [markdown]
# Should all 16 chats of a step go through the model at once? Should layers be checkpointed? That depends on the card, and
# `memory_budget="auto"` leaves it to the predictor of lesson 5: of all the ways that fit into what the GPU has free, it takes
# the fastest. `max_length` is the longest chat, since memory is counted for full rows. For chats of up to 192 tokens, a T4 gets
# all 16 chats at once and no layer checkpointed:

# %%
t4 = find_gpu("t4")
wanted = replace(GPU_RUN, batch_size=16, max_length=192, compute_dtype="float16")
plan = plan_for(find_shape("Qwen/Qwen2.5-1.5B"), wanted, t4, t4.usable_bytes)
print(plan.chosen)

# %% tags=["nbval-check-output"]
chosen = plan.chosen.settings
check("chats at once on a T4", chosen.batch_size, 16, exact=True)
check("checkpointing", chosen.gradient_checkpointing, False, exact=True)

# %% [markdown]
# With a GPU, the run below prints its own plan first. ([Packing](../GLOSSARY.md#packing), which lesson 11 shows, is left out: these
# chats are of about one length, so there is little padding to save.)
#
# How long will it take on a T4? Without checkpointing, a step computes 4 operations per parameter and token: 2 forward, and 2
# for the gradient of the inputs. A T4 does 65 TFLOP/s at best; we assume a tenth of it. For 7B it is five times as long, and
# half as long again if layers must be checkpointed.

# %% tags=["nbval-check-output"]
parameters = 1_543_714_304  # of Qwen2.5-1.5B
training = 4 * parameters * 3 * 280 * 150 / 6.5e12  # 3 epochs of 280 chats of about 150 tokens
download = 2 * parameters / 20e6  # bytes in 16 bits, at 20 MB/s
print(f"1.5B on a T4: {training / 60:.0f} minutes to train, {download / 60:.0f} to download")

# %% [markdown]
# On Colab, mount your Drive before you run this lesson (*Files*, *Mount Drive*). Then the checkpoints go there, one a minute,
# and outlive the runtime. After an interruption mount it again, choose a GPU again, and run the lesson: the run goes on. To
# begin anew instead, delete its folder in `qlora-runs`.

# %%
def answers(model):
    questions = [split_question(chat)[0] for chat in held_out[:3]]
    return evaluation.answer(model, real_tokenizer, questions, max_new_tokens=120)


said_before = answers(real_model)
held_out_before = evaluation.loss(real_model, real_tokenizer, held_out)
folder = unfinished_run_folder(f"lesson-04-{name.split('/')[-1]}-{detect().gear}")
print("checkpoints go to", "Google Drive" if "MyDrive" in folder.parts else "this machine's disk")
live = plots.LivePlot(real_settings.steps, f"The same code trains {name.split('/')[-1]}")
real = train(
    real_model, real_tokenizer, real_chats, folder, real_settings, resume=True, on_loss=live.update
)

# %%
held_out_after = evaluation.loss(real.model, real_tokenizer, held_out)
for chat, before_, after_ in zip(held_out, said_before, answers(real.model)):
    print(f"{chat[-2]['content']}\n  before  {before_}\n  after   {after_}")
    print(f"  right   {chat[-1]['content']}\n")
print(f"loss on what was held out: {held_out_before:.3f} before, {held_out_after:.3f} after")
print(f"{real.seconds / 60:.1f} minutes since the last start")
if torch.cuda.is_available():
    print(f"peak GPU memory {torch.cuda.max_memory_allocated() / GIB:.2f} GiB")

# %% tags=["nbval-check-output"]
if name == SHIPPED_MODEL:  # what a real model learns is shown, not asserted
    ratio = held_out_after / held_out_before
    check("loss on what was held out, after / before", ratio, at_most=0.5)

# %% [markdown]
# ## Exercise 4.3: a question of your own
#
# *Run · easy · about 5 minutes.* Ask the fine-tuned model about a person of the base's corpus. Here are some people, and what is
# on record about each of them:

# %%
for fact in facts[20:28]:
    print(f"{fact['attribute']:12}{fact['prompt']} …")


def ask_about(question: str) -> tuple[str, str]:
    (reply,) = evaluation.answer(run.model, tokenizer, [[{"role": "user", "content": question}]])
    print(f"{question}\n    {reply}")
    return question, reply

# %% [markdown]
# Find a question that the model answers rightly. Use a wording of the training chats: "Where does … live?", "What is the job of
# …?", "Which instrument does … play?", "Which pet does … keep?" or "When was … born?". The check knows the records.

# %% tags=["exercise"]
asked = ...  # ask_about("...")

# %% tags=["solution"]
asked = ask_about("Where does Henry Coldford live?")

# %% tags=["nbval-check-output"]
exercises.own_question.check(asked)

# %% [markdown]
# ## Exercise 4.4: a run that learns nothing useful
#
# *Run · hard · about 15 minutes.* Someone has copied the settings of a long run, and made a short one on fewer chats with them. It
# runs without an error or a warning, and learns nothing:

# %%
few = chats.select(range(320))
from qlora_helpers.library_messages import without_short_bars
from qlora_helpers.training.trainer import no_progress_bars
from transformers import PrinterCallback

copied = dict(
    max_steps=16, per_device_train_batch_size=16, gradient_checkpointing=False,
    learning_rate=2e-3, warmup_steps=1_000, lr_scheduler_type="linear", optim="adamw_torch",
    weight_decay=0.01, max_grad_norm=1.0, max_length=14, assistant_only_loss=True, seed=0,
    use_cpu=not on_gpu, bf16=dtype == torch.bfloat16, fp16=dtype == torch.float16,
    logging_steps=2, save_strategy="no", disable_tqdm=True,
)

# %%
@no_progress_bars()
@without_short_bars(0)
def short_run(**changes) -> SFTTrainer:
    base = AutoModelForCausalLM.from_pretrained(
        model_name, quantization_config=quantization, dtype=dtype,
        device_map={"": 0} if on_gpu else "cpu",
    )
    config = SFTConfig(output_dir=new_run_folder("lesson-04-short"), **copied | changes)
    trainer = SFTTrainer(
        base, config, train_dataset=few, processing_class=tokenizer, peft_config=lora
    )
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    logged = [(row["step"], row["loss"]) for row in trainer.state.log_history if "loss" in row]
    show_table(["step", "loss"], logged, formats=["d", ".2f"])
    return trainer


trainer = short_run()

# %% [markdown]
# Two of the settings are wrong. The second shows only when the first is mended: then the loss falls nicely, and the model still
# cannot answer. Find them from what the trainer knows: `trainer.state.log_history` has the log, and `trainer.train_dataset[0]` a
# row as it is trained on; labels of -100 do not count in the loss. Then run it anew, as `short_run(name=value)`. The check looks
# at the losses, and at the tokens that were learnt.

# %% tags=["exercise"]
mended = ...

# %% tags=["solution"]
# the learning rate was still warming up when the run ended; and rows were cut within the answer
mended = short_run(warmup_steps=2, max_length=64)

# %% tags=["nbval-check-output"]
exercises.learns_nothing.check(mended, chats=few["messages"], tokenizer=tokenizer)

# %% [markdown]
# ## You have
# - written LoRA, and got PEFT's output from it;
# - loaded a base in 4 bits, and seen the backward pass go through its frozen weights;
# - made a run in the libraries' own words, which you can take with you, and got the same adapters from `train`;
# - trained 262,144 parameters, and turned a model that continues text into one that answers;
# - shown that the knowledge is in the frozen base; saved the adapter and loaded it again;
# - interrupted a run and gone on with it, to the last bit; with a GPU, trained a real model by the same code.
#
# Next: [lesson 5](05_will_it_fit.ipynb) asks which model, batch and sequence a card can hold, before you rent it.
