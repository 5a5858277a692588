# %% [markdown]
# # 8 · Stability: provoke it, see it, fix it
#
# You will
# - read a healthy run: its loss, and the length of its gradients;
# - break it by its settings: the learning rate, no warm-up, no clipping, float16;
# - break it by its data: empty and cut answers, an end that is never learnt, a doubled token, loss on the question;
# - see which faults do harm here and which do not, and cure each in one line.
#
# Takes about {{seconds}} seconds and {{gigabytes}} GB of memory on two processor cores. None of it needs a GPU.

# %%
import json
import math
import statistics
from dataclasses import replace

from qlora_helpers import evaluation
from qlora_helpers.chats import ChatError, marked_row, read_chats, split_question
from qlora_helpers.course import plots
from qlora_helpers.course.checks import check
from qlora_helpers.course.exercises import lesson_08 as exercises
from qlora_helpers.course.tables import show_table
from qlora_helpers.hardware import detect
from qlora_helpers.models.loading import load_model, load_tokenizer
from qlora_helpers.paths import data_path
from qlora_helpers.settings import Settings
from qlora_helpers.training.callbacks import TrainingDiverged
from qlora_helpers.training.faulty_runs import collator_run, sft_trainer
from qlora_helpers.training.run import train
from qlora_helpers.training.run_folder import new_run_folder

# after the helpers, which keep harmless messages off the page
import torch
import transformers
from IPython.display import display
print("gear:", detect().gear)

# %% [markdown]
# ## A healthy run
#
# First a run with nothing wrong. It is also the first row of a table that `data/scripts/measure/stability.py` made, over
# several seeds. Each other row of it is the same run with one fault. The [loss](../GLOSSARY.md#loss) is in nats, and is
# taken over the tokens of the answers alone.

# %% tags=["nbval-check-output"]
measured = json.loads(data_path("measured", "stability.json").read_text(encoding="utf-8"))
rows = {row["name"]: row for row in measured["rows"]}
chats = read_chats(data_path("chats", "train.jsonl"))[: measured["chats"]]
test_chats = read_chats(data_path("chats", "test.jsonl"))[: measured["test_chats"]]
tokenizer = load_tokenizer()
right = Settings(**rows["as it should be"]["settings"])
with_trl = measured["versions"]["trl"]
print(f"{len(rows)} rows, measured on {measured['processor']} with trl {with_trl}")
print(f"a run: {right.steps} steps of {right.batch_size} chats, "
      f"learning rate {right.learning_rate}, clipped at {right.max_grad_norm}")

# %%
healthy = train(load_model(), tokenizer, chats, new_run_folder("lesson-08"), right)
(_, first), *_, (_, last) = healthy.history
print(f"{healthy.seconds:.0f} s; loss {first:.2f} at first, {last:.2f} at last")

# %%
fig, (left, other) = plots.figure(1, 2)
left.plot(*zip(*healthy.history))
left.set(xlabel="step", ylabel="loss (nats per answer token)", ylim=(0, None))
left.set_title("The loss falls, then lies flat")
other.plot(*zip(*healthy.gradient_norms))
other.set(xlabel="step", ylabel="gradient norm", ylim=(0, None))
other.set_title("Gradients grow, then shrink")
plots.show(fig, "8.1")

# %% [markdown]
# The [gradient norm](../GLOSSARY.md#gradient-norm) is the length of the gradient: of all its numbers, taken as one long
# arrow. Keep this picture. Noise from batch to batch is normal, and so are gradients that grow while the loss falls. The
# table has this very run, too:

# %% tags=["nbval-check-output"]
print("test loss, five seeds:", *(f"{loss:.3f}" for loss in rows["as it should be"]["loss"]))
loss = evaluation.loss(healthy.model, tokenizer, test_chats)
check("test loss of this run against the first", loss, rows["as it should be"]["loss"][0], rel=0.2)
check("loss spikes", len(healthy.spikes), 0, exact=True)

# %% [markdown]
# ## The learning rate is too high
#
# The same run at fifty times the [learning rate](../GLOSSARY.md#learning-rate). `train` watches the losses, and names each
# sudden leap, a *spike*, with its step:

# %%
def losses_of(settings):
    """(step, loss) of a run, also of one that diverges."""
    seen, few = [[]], chats[: settings.steps * settings.batch_size]
    folder = new_run_folder("lesson-08")
    try:
        train(load_model(), tokenizer, few, folder, settings, on_loss=seen.append)
    except TrainingDiverged as error:
        print("TrainingDiverged:", error)
    return seen[-1]


brief = replace(right, steps=12, batch_size=4, warmup_steps=2)
too_high = losses_of(replace(brief, learning_rate=50 * right.learning_rate))

# %%
uniform = math.log(tokenizer.vocab_size)
knows_nothing = f"knows nothing: ln {tokenizer.vocab_size:,}"
fig, (left, other) = plots.figure(1, 2, figsize=(7.2, 4.2))
left.plot(*zip(*too_high), color=plots.RED, label="50 times the rate")
left.plot(*zip(*healthy.history[:12]), color=plots.BLUE, label="as it should be")
left.axhline(uniform, color="#555555", linestyle="--", label=knows_nothing)
left.set_title("50 times: it leaps")
names = ("5 times the rate", "2.5 times the rate", "as it should be")
for name, colour in zip(names, (plots.RED, plots.ORANGE, plots.BLUE)):
    other.plot(range(1, right.steps + 1), rows[name]["losses"], color=colour, label=name)
other.set_title("5 times: it falls, and climbs again")
for ax in (left, other):
    ax.set(xlabel="step", ylabel="loss (nats per answer token)", ylim=(0, None))
    ax.legend(loc="upper left", bbox_to_anchor=(0, -0.2))  # below: a leap reaches the top
plots.show(fig, "8.2")

# %% [markdown]
# After the leap, the loss is higher than that of a model which gives every token the same chance: the adapters drown what
# the base knows. At five times the rate there is no leap. The loss falls as it should, and then climbs again. A rule for
# spikes does not see that; your eyes do.

# %% tags=["nbval-check-output"]
check("highest loss", max(loss for _, loss in too_high), at_least=10)
check("loss at the end", too_high[-1][1], at_least=4)

# %% [markdown]
# **Cure: start again in a new folder, with a third of the learning rate, until the loss falls.** What has been trained
# since the leap is worthless.
#
# ### NaN
#
# Raise it further, and the loss is no longer a number (NaN, "not a number"). Then `train` stops, before such weights are
# saved:

# %%
beyond = replace(right, steps=3, warmup_steps=1, learning_rate=1e20)
try:
    _ = train(load_model(), tokenizer, chats[:24], new_run_folder("lesson-08"), beyond)
except TrainingDiverged as error:
    stopped = str(error).partition(".")[0]
    print(error)

# %% tags=["nbval-check-output"]
check("the run was stopped", stopped.endswith("the loss is nan"), True, exact=True)

# %% [markdown]
# The trainer of transformers would have gone on, and not even shown it: by default it logs the mean of the losses before in
# place of a NaN. **Cure: `logging_nan_inf_filter=False`, and stop at the first NaN.**
#
# ## Exercise 8.1: the limit of a spike
#
# *Build · medium · about 10 minutes.* What is a spike, and what is noise? Write the rule that `train` uses. `before` has the
# losses of the last steps, 20 at most. Compute the limit from all of them; a loss above it is a spike. The usual loss is their median. The
# spread is 1.4826 times the median of their distances from it, which for normal noise is the standard deviation. The limit
# lies above the usual loss by the largest of three: 8 spreads, half of the usual loss, and 0.5.

# %% tags=["exercise"]
def limit(before: list[float]) -> float:
    return ...

# %% tags=["solution"]
def limit(before: list[float]) -> float:
    usual = statistics.median(before)
    spread = 1.4826 * statistics.median(abs(loss - usual) for loss in before)
    return usual + max(8 * spread, usual / 2, 0.5)

# %% tags=["nbval-check-output"]
exercises.limit.check(limit)

# %% [markdown]
# `qlora_helpers/training/spikes.py` has the rule with its reasons, and says what happens if a spike lasts.
#
# ## No warm-up
#
# In a [warm-up](../GLOSSARY.md#warm-up), the learning rate grows from zero to its full height over the first steps. Many
# tutorials call it crucial. Here is what leaving it out costs, at three learning rates. The loss of a row is compared with that
# of the row above it, seed by seed as in [lesson 7](07_does_it_cost_quality.ipynb), with a 95 % interval. The last column is
# the [power](../GLOSSARY.md#power) of this comparison, the smallest difference that it would show in 80 of 100 repeats:

# %% tags=["nbval-check-output"]
from qlora_helpers.statistics import difference, smallest_difference


def paired(usual, faulty, what="loss"):
    """How much higher the test loss is with a fault: a paired comparison, seed by seed."""
    return difference(rows[faulty][what], rows[usual][what])


def compare(*pairs):
    table = []
    for pair in pairs:
        found = paired(*pair)
        shown = f"{found.mean:+.3f} ± {found.half:.3f}, {found.verdict}"
        for name, said in zip(pair, (["", ""], [shown, smallest_difference(found)])):
            means = (statistics.mean(rows[name][key]) for key in ("loss", "exact_match"))
            table.append([name, *means, *said])
    columns = ["", "test loss", "exact match", "loss against the row above", "would show"]
    show_table(columns, table, formats=["", ".3f", ".1%", "", ".3f"])


compare(("as it should be", "no warm-up"), ("as it should be", "2.5 times the rate"),
        ("2.5 times the rate", "2.5 times the rate, no warm-up"),
        ("5 times the rate", "5 times the rate, no warm-up"))

# %% [markdown]
# It costs nothing here that five seeds can see. At the usual rate they would have shown 0.044; at 5 times it, where each seed
# is ruined in its own way, hardly anything. What counts is the rate itself: at 2.5 times the test loss is much higher,
# and at 5 times the run is ruined, with a warm-up or without. Whether a larger model needs one, this model cannot tell.
#
# One trap: in transformers, the schedule `constant` has no warm-up, whatever you ask for. **Cure, where a warm-up is needed:
# `warmup_steps` of about 3 to 5 % of the run; with a constant rate, the schedule `constant_with_warmup`.**
#
# ## No clipping
#
# [Clipping](../GLOSSARY.md#clipping) shortens a gradient that is longer than `max_grad_norm`: 1.0 by default, 0.3 in the
# QLoRA paper. To see what it is for, take plain gradient descent (SGD), which steps as far as the gradient is long:

# %%
sgd = replace(brief, steps=8, optimizer="sgd", learning_rate=1.0)
clipped, unclipped = losses_of(sgd), losses_of(replace(sgd, max_grad_norm=None))

# %%
fig, ax = plots.figure()
ax.plot(*zip(*unclipped), color=plots.RED, label="not clipped")
ax.plot(*zip(*clipped), color=plots.BLUE, label="clipped at 1.0")
ax.set(xlabel="step", ylabel="loss (nats per answer token)", ylim=(0, None))
ax.set_title("With SGD, clipping decides between learning and ruin")
ax.legend(loc="upper left")
plots.show(fig, "8.3")

# %% tags=["nbval-check-output"]
check("loss at the end, clipped", clipped[-1][1], at_most=4)
check("loss at the end, not clipped", unclipped[-1][1], at_least=5)

# %% [markdown]
# With AdamW, which all QLoRA runs use, it is another matter. Adam divides each gradient by its own usual size. A gradient
# that is 100 times as long gives the same first step:

# %% tags=["nbval-check-output"]
def first_step(times):
    weight = torch.zeros(3, requires_grad=True)
    weight.grad = times * torch.tensor([0.3, -2.0, 0.01])
    torch.optim.AdamW([weight], lr=1e-3).step()
    return weight.detach()


print("first step:", [f"{value:.6f}" for value in first_step(1)])
off = (first_step(1) - first_step(100)).abs().max().item()
check("largest difference to the step of a gradient 100 times as long", off, at_most=1e-8)

# %% tags=["nbval-check-output"]
compare(("as it should be", "no clipping"),
        ("2.5 times the rate", "2.5 times the rate, no clipping"),
        ("as it should be", "the paper's: constant, clipped at 0.3"))

# %% tags=["nbval-check-output"]
costs = paired("as it should be", "no clipping")
check("no clipping: a difference", not costs.is_noise and costs.mean > 0, True, exact=True)
at_2_5 = paired("2.5 times the rate", "2.5 times the rate, no clipping")
check("at 2.5 times the rate: within noise", at_2_5.is_noise, True, exact=True)

# %% [markdown]
# So clipping helps a little here. At the higher rate the seeds make more of a difference than it does: one of less than 0.092
# may be there. The paper's settings, with a constant rate, do as well as ours, as far as five seeds can see. **Cure: leave `max_grad_norm` on, at 1.0 or 0.3.** It is insurance
# against the odd batch, and free.
#
# ## Exercise 8.2: a run to be cured
#
# *Run · medium · about 10 minutes.* The run `sick` diverges: `losses_of(sick)` makes it, in two seconds, and returns its
# losses. It has no warm-up, no clipping, and a high learning rate. Which of these settings must change? Cure it with
# `replace(sick, …)`: at the end of its 12 steps, the mean of the last three losses is to be 2.5 or less. Optimizer, steps
# and batch size stay as they are. Try things out with `losses_of`. You learn most if you change one setting at a time.

# %%
sick = replace(brief, learning_rate=0.05, warmup_steps=0, max_grad_norm=None)

# %% tags=["exercise"]
cured = ...

# %% tags=["solution"]
cured = replace(sick, learning_rate=0.005)  # neither warm-up nor clipping would have been enough

# %% tags=["nbval-check-output"]
exercises.cured.check(cured, sick=sick, losses_of=losses_of)

# %% [markdown]
# ## float16 overflows
#
# A T4 computes in [float16](../GLOSSARY.md#float16), whose largest number is 65,504.
# [bfloat16](../GLOSSARY.md#bfloat16) has the range of float32, and fewer digits. The next cells are real float16
# arithmetic, on the CPU of any machine; only a GPU's speed is missing.

# %% tags=["nbval-check-output"]
table = []
for dtype in (torch.float16, torch.bfloat16, torch.float32):
    info = torch.finfo(dtype)
    table.append([str(dtype), info.max, info.tiny, info.eps])
columns = ["", "largest", "smallest normal", "from 1 to the next number"]
show_table(columns, table, formats=["", ",.6g", ".2g", ".2g"])
check("largest float16", torch.finfo(torch.float16).max, 65_504.0, exact=True)

# %% [markdown]
# ### In the model
#
# Nothing in training keeps the numbers within a model small. Each layer adds its result to one stream of numbers, and
# normalises what it reads from there. So all parts that write into the stream can be made louder by the same factor, and
# the model computes the same. Let us turn up the volume of the shipped model, and compute its loss in each format:

# %%
cpu = detect("cpu")
loud = {}
model = load_model(quantization=None, hardware=cpu)
writers = ("embed_tokens", "o_proj", "down_proj")
parts = {name: part for name, part in model.named_modules() if name.endswith(writers)}


def listen(name):
    def hook(part, args, output):
        loud[name] = output.abs().max().item()
    return hook


for name, part in parts.items():
    part.register_forward_hook(listen(name))

# %%
now, louder, table = 1, {}, []
for factor in (1, 64, 128, 1024):
    model.float()
    with torch.no_grad():
        for part in parts.values():
            part.weight *= factor / now
    now, losses = factor, []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        losses.append(evaluation.loss(model.to(dtype), tokenizer, test_chats[:8]))
    louder[factor] = losses
    table.append([f"{factor:,} times", *losses, max(loud.values())])
columns = ["as loud", "loss in float32", "bfloat16", "float16", "loudest number in float16"]
show_table(columns, table, formats=["", ".2f", ".2f", ".2f", ",.0f"])

# %% tags=["nbval-check-output"]
check("loss in float32, 1,024 times as loud / once", louder[1024][0] / louder[1][0], 1.0, rel=0.01)
check("bfloat16, 1,024 times as loud", louder[1024][1], at_most=10)
check("float16, 64 times", louder[64][2], at_most=10)
check("float16, 1,024 times, is NaN", math.isnan(louder[1024][2]), True, exact=True)

# %% [markdown]
# At 128 times the loudest number is infinite already, and the loss does not show it yet: that number belongs to a token
# whose loss is not counted. A little louder, and the normalisation turns infinity into NaN, which the attention spreads to
# all tokens. It happens in real models: Gemma 3's activations exceed float16's range (unslothai/unsloth-zoo #174). No
# learning rate helps here. **Cure: bfloat16, on a GPU that has it; else another model.**
#
# ### In the gradients
#
# Gradients can also be too *small* for float16, and vanish. So with `fp16=True` the loss is multiplied by a
# [loss scale](../GLOSSARY.md#loss-scale) before the backward pass, and the gradients are divided by it afterwards. Too
# large a scale overflows. Where is the window?

# %%
from qlora_helpers.training.trainer import build_trainer

folder = new_run_folder("lesson-08")
trainer = build_trainer(load_model(hardware=cpu), tokenizer, chats, folder, right, cpu)
batches = [batch for _, batch in zip(range(6), trainer.get_train_dataloader())]


def loss_in_float16(batch):
    with torch.autocast("cpu", dtype=torch.float16):
        return trainer.model(**batch).loss


def scaled_gradients(batch, scale):
    """The gradients of all `B` of the adapters, times the scale."""
    trainer.model.zero_grad()
    (loss_in_float16(batch) * scale).backward()
    of_B = [p for name, p in trainer.model.named_parameters() if "lora_B" in name]
    return torch.cat([p.grad.flatten() for p in of_B])

# %%
exponents = [-16, -8, 0, 16, 18, 24]
gradients = [scaled_gradients(batches[0], 2.0**exponent) for exponent in exponents]
vanished = [(g == 0).float().mean().item() for g in gradients]
overflowed = [(~g.isfinite()).float().mean().item() for g in gradients]
fig, ax = plots.figure()
ax.plot(exponents, vanished, "o-", color=plots.BLUE, label="vanished (0)")
ax.plot(exponents, overflowed, "o-", color=plots.RED, label="overflowed (infinite or NaN)")
ax.axvline(16, color="#555555", linestyle="--", label="where the trainer begins")
ax.set(xlabel="loss scale, as a power of 2", ylabel="share of the gradients", ylim=(-0.03, 1.03))
ax.set_title("float16 leaves a window for the loss scale")
ax.legend(loc="center left")
plots.show(fig, "8.4")

# %% tags=["nbval-check-output"]
at = dict(zip(exponents, zip(vanished, overflowed)))
check("vanished at 2^-16", at[-16][0], at_least=0.2)
check("vanished without a scale, 2^0", at[0][0], at_most=0.01)
check("overflowed at 2^16", at[16][1], exact=True, want=0.0)
check("overflowed at 2^24", at[24][1], at_least=0.5)

# %% [markdown]
# This model needs no loss scale: even at a scale of 1 nothing vanishes. Deeper models and smaller losses do need one. Where
# the scale is too large, torch skips the step and halves it. Here torch's own `GradScaler` begins far too high:

# %%
scaler = torch.amp.GradScaler("cpu", init_scale=2.0**21)
optimizer = torch.optim.AdamW([p for p in trainer.model.parameters() if p.requires_grad], lr=1e-3)
scales = []
for number, batch in enumerate(batches, start=1):
    optimizer.zero_grad()
    scales.append(scaler.get_scale())
    scaler.scale(loss_in_float16(batch)).backward()
    scaler.step(optimizer)
    scaler.update()
    outcome = "skipped" if scaler.get_scale() < scales[-1] else "made"
    print(f"step {number}: scale 2^{math.log2(scales[-1]):.0f}", outcome)

# %% tags=["nbval-check-output"]
check("scale at the last step, as a power of 2", math.log2(scales[-1]), at_least=14, at_most=19)

# %% [markdown]
# A few skipped steps at the start are normal. `train` counts them in `run.skipped_steps`, and stops after 17 in a row, when
# the scale has fallen below 1. **Cure: let the scaler skip; if it goes on, lower the learning rate; and keep the adapters in
# float32** ([lesson 4](04_qlora_run.ipynb) has the errors that other adapters give).
#
# ## Empty answers
#
# Now the data. The loss of these runs looks healthy, and the model is broken. So look at what is learnt. Here the tokens
# that count in the loss are bold, on green (where there is no colour, they stand between ⟦ and ⟧):

# %%
def show(ids, labels):
    display(marked_row(ids, [label != -100 for label in labels], tokenizer))


def first_row(row, template=None, **options):
    """What TRL's trainer makes of one row; nothing is trained."""
    its_own, folder = load_tokenizer(), new_run_folder("lesson-08")
    its_own.chat_template = template or its_own.chat_template
    made = sft_trainer(load_model(), its_own, [row], folder, right, **options).train_dataset[0]
    show(made["input_ids"], made["labels"])
    return made

# %% tags=["nbval-check-output"]
question, reply = chats[0]
good = first_row({"messages": [question, reply]}, assistant_only_loss=True)
nothing = {"role": "assistant", "content": ""}
empty = first_row({"messages": [question, nothing]}, assistant_only_loss=True)

# %% [markdown]
# TRL accepts the empty answer without a word, and the model learns that nothing is an answer. The course's reader does not:

# %% tags=["nbval-check-output"]
file = new_run_folder("lesson-08") / "chats.jsonl"
lines = [{"messages": chats[0]}, {"messages": [question, nothing | {"content": " "}]}]
_ = file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
try:
    read_chats(file)
except ChatError as error:
    print(str(error).replace(str(file), file.name))

# %% [markdown]
# **Cure: check every chat before training, and refuse what is empty.**
#
# ## Cut answers
#
# TRL cuts what is longer than `max_length`, without a word. The end is gone, and with it the token that says *stop*, the
# [EOS token](../GLOSSARY.md#eos):

# %% tags=["nbval-check-output"]
cut = first_row({"messages": chats[0]}, assistant_only_loss=True, max_length=16)
check("is the end learnt?", tokenizer.eos_token_id in cut["labels"], False, exact=True)

# %% [markdown]
# It also happens unasked: whoever passes `TrainingArguments`, which has no `max_length`, gets TRL's own limit of 1,024
# tokens. **Cure: set `max_length`, and count: `read_chats(file, tokenizer, max_length)` names each chat that would be cut.**
#
# ## Pad = end: the model that never stops
#
# Many tutorials have this line: `tokenizer.pad_token = tokenizer.eos_token`. [Padding](../GLOSSARY.md#padding) fills the
# short rows of a batch, and must not count in the loss. TRL takes it out by its place, so there the line is harmless. But
# transformers' own [collator](../GLOSSARY.md#collator) for language models takes out every token that looks like the pad.
# If the end is the pad, it takes out the end:

# %% tags=["nbval-check-output"]
two_roles = load_tokenizer()
two_roles.pad_token = two_roles.eos_token
for of in (tokenizer, two_roles):
    collate = transformers.DataCollatorForLanguageModeling(of, mlm=False)
    ids = [of.apply_chat_template(chat, return_dict=True)["input_ids"] for chat in chats[:2]]
    batch = collate([{"input_ids": row} for row in ids])
    show(batch["input_ids"][1], batch["labels"][1])

# %% [markdown]
# In the second row the last token does not count. Train that way for 10 steps, and ask:

# %%
short = replace(brief, steps=10)
folder = new_run_folder("lesson-08")
trained = collator_run(load_model(), two_roles, chats[: 10 * 4], folder, short).model
ends = evaluation.share_that_ends(trained, tokenizer, test_chats[:20])
asked = [split_question(test_chats[1])[0]]
(said,) = evaluation.answer(trained, tokenizer, asked, max_new_tokens=24)
print(f"{ends:.0%} of the answers end\n    {test_chats[1][0]['content']}\n    {said}")

# %% tags=["nbval-check-output"]
check("answers that end, with pad = end", ends, at_most=0.4)
for name in ("collator, a pad of its own", "collator, pad = end"):
    print(f"{name:28}{statistics.mean(rows[name]['ends']):6.1%} of the answers end, by the table")

# %% [markdown]
# **Cure: a pad token of its own; or a collator that pads labels with -100, as TRL's does.**
#
# ## A doubled first token
#
# Many tutorials render each chat to text, and give TRL the text. The text begins with its first token, the
# [BOS token](../GLOSSARY.md#bos), already; the tokenizer adds it again. (Such a run also learns the question, which is the
# next fault. So the table compares it with a run that has only that one.)

# %% tags=["nbval-check-output"]
text = tokenizer.apply_chat_template(chats[0], tokenize=False)
doubled = first_row({"text": text})
check("first tokens", doubled["input_ids"].count(tokenizer.bos_token_id), 2, exact=True)

# %% tags=["nbval-check-output"]
compare(("loss on the question, too", "loss on the question, too; two first tokens"))

# %% tags=["nbval-check-output"]
costs = paired("loss on the question, too", "loss on the question, too; two first tokens")
check("two first tokens: a difference", not costs.is_noise and costs.mean > 0, True, exact=True)

# %% [markdown]
# The harm is small, but it is there: seed by seed, the test loss is higher by 0.022 ± 0.013. Training and asking differ now,
# since the model is asked with one first token. **Cure: give TRL the `messages`, or tokenise a rendered text with
# `add_special_tokens=False`.**
#
# ## Loss on the question
#
# The row above shows another fault: every token counts. TRL's default is to learn the question, too. With
# `messages` it is the same:

# %% tags=["nbval-check-output"]
_ = first_row({"messages": chats[0]})

# %%
fig, ax = plots.figure()
for name, colour in (("loss on the question, too", plots.ORANGE), ("as it should be", plots.BLUE)):
    ax.plot(range(1, 61), rows[name]["losses"], color=colour, label=name)
ax.set(xlabel="step", ylabel="loss as logged (nats per token)", ylim=(0, None))
ax.set_title("Questions cannot be guessed: their loss stays high")
ax.legend()
plots.show(fig, "8.5")

# %% tags=["nbval-check-output"]
compare(("as it should be", "loss on the question, too"))
lost = paired("as it should be", "loss on the question, too", "exact_match")
print(f"exact match: {100 * lost.mean:+.1f} ± {100 * lost.half:.1f} points, {lost.verdict};"
      f" {lost.count} seeds would show {100 * smallest_difference(lost):.1f}")

# %% [markdown]
# Here it does harm: the test loss on the answers rises, and half of the right answers are gone. Both are more than noise: the
# answers differ by 17.4 ± 13.7 points. The run spends itself on
# questions that nobody needs from it. **Cure: `assistant_only_loss=True`, with `messages`.**
#
# ## A template without marks
#
# `assistant_only_loss` needs a [chat template](../GLOSSARY.md#chat-template) that marks what the assistant says, by
# `{% generation %}`. Most published templates do not. For those it knows, TRL takes a marked version of its own. Any other
# one it refuses:

# %% tags=["nbval-check-output"]
unmarked = tokenizer.chat_template
for mark in ("{% generation %}", "{% endgeneration %}"):
    unmarked = unmarked.replace(mark, "")
try:
    first_row({"messages": chats[0]}, unmarked, assistant_only_loss=True)
except ValueError as error:
    print(error)

# %% [markdown]
# A refusal is good. A mark that ends too early, before the closing token, is worse. TRL only warns, and the run looks
# healthy:

# %% tags=["nbval-check-output"]
from qlora_helpers.library_messages import printed

whole = "{{ message['content'] + eos_token }}{% endgeneration %}"
early = "{{ message['content'] }}{% endgeneration %}{{ eos_token }}"
template = tokenizer.chat_template.replace(whole, early)
with printed("trl.trainer.sft_trainer", "TRL warns:"):
    too_early = first_row({"messages": chats[0]}, template, assistant_only_loss=True)

# %% [markdown]
# **Cure: put the marks around answer and closing token, and look at one row, as here, before every run.**
#
# ## Exercise 8.3: a look at one row, by code
#
# *Build · medium · about 10 minutes.* Write the check that would have found these faults. `fault` gets the token ids of a
# row, its labels, and the ids of the first token and of the closing one. It returns `"two first tokens"`, `"the end is not
# learnt"`, `"the question is learnt"` or `""`, whichever holds first. The end is learnt if the *last* label is the closing
# token. The question is learnt if the first label is not -100. The rows `good`, `empty`, `cut`, `doubled` and `too_early`
# are there to try it on: each has `["input_ids"]` and `["labels"]`.

# %% tags=["exercise"]
def fault(ids: list[int], labels: list[int], first: int, closing: int) -> str:
    return ...

# %% tags=["solution"]
def fault(ids: list[int], labels: list[int], first: int, closing: int) -> str:
    if ids.count(first) > 1:
        return "two first tokens"
    if labels[-1] != closing:
        return "the end is not learnt"
    return "the question is learnt" if labels[0] != -100 else ""

# %% tags=["nbval-check-output"]
exercises.fault_in_a_row.check(fault)

# %% [markdown]
# ## The broken data in one picture
#
# Each group of bars is a row of the table, the mean over its seeds: how many answers stop by themselves, how many are right,
# and how many are empty. The two runs with the collator learn the question, too: hold them against the second row.

# %%
names = ["as it should be", "loss on the question, too",
         "loss on the question, too; two first tokens", "a quarter of the answers empty",
         "cut at 16 tokens", "the end outside of the mark",
         "collator, pad = end", "collator, a pad of its own"]
bars = {"ends": ("stop by themselves", plots.SKY), "exact_match": ("are right", plots.BLUE),
        "empty": ("are empty", plots.RED)}
fig, ax = plots.figure(figsize=(7.2, 5.4))
for shift, (key, (label, colour)) in enumerate(bars.items()):
    means = [100 * statistics.mean(rows[name][key]) for name in names]
    places = [y + 0.27 * shift for y in range(len(names))]
    drawn = ax.barh(places, means, height=0.25, color=colour, label=label)
    ax.bar_label(drawn, fmt="%.0f", padding=2, fontsize=8)  # a bar of 0 is not a missing one
ax.set_yticks([y + 0.27 for y in range(len(names))], labels=names)
ax.invert_yaxis()
ax.grid(axis="y", visible=False)
ax.set_xlabel("answers to test questions that … (%)")
ax.set_title("In three runs no answer is right, though every loss fell", x=-0.6)
ax.legend(loc="upper left", bbox_to_anchor=(-0.6, -0.12), ncols=3)
plots.show(fig, "8.6")

# %% tags=["nbval-check-output"]
table = []
for name in names:
    shares = [statistics.mean(rows[name][key]) for key in ("ends", "exact_match", "empty")]
    table.append([name, statistics.mean(rows[name]["losses"][-10:]), *shares])
columns = ["", "logged loss", "stop", "right", "empty"]
show_table(columns, table, formats=["", ".2f", ".0%", ".0%", ".0%"])

# %% [markdown]
# The logged loss shows none of this. In three rows no answer is right, and one of these has a logged loss close to the
# healthy one's. So look at generated answers, and at one row of tokens, before you look at a loss.
#
# ## Exercise 8.4: three curves
#
# *Predict · medium · about 5 minutes.* Here are the losses of three real runs, each beside the healthy one. What do you say
# about each? Choose one of `"rate too high"`, `"rate too low"`, `"question learnt"` and `"looks healthy"`. The last one is
# not an all-clear: it means that this curve tells you nothing, and that you must look at answers.

# %%
curves = exercises.three_curves(rows)
fig, all_axes = plots.figure(1, 3, sharey=True)
for ax, (letter, losses) in zip(all_axes, curves.items()):
    ax.plot(range(1, 61), rows["as it should be"]["losses"], color="#BBBBBB", label="healthy")
    ax.plot(range(1, 61), losses, color=plots.BLUE, label="this run")
    ax.set(xlabel="step", title=letter, ylim=(0, 6.5))
all_axes[0].set_ylabel("loss as logged (nats per token)")
all_axes[0].legend()
fig.suptitle("Which of these runs would you stop?")
plots.show(fig, "8.7")

# %% tags=["exercise"]
causes = {"A": ..., "B": ..., "C": ...}

# %% tags=["solution"]
causes = {"A": "rate too high", "B": "looks healthy", "C": "question learnt"}

# %% tags=["nbval-check-output"]
exercises.causes.check(causes)

# %% [markdown]
# ## Another release
#
# The course fixes the versions of all packages. Yours may be others, and the same lines of code can then make another run. Here is
# the plain run of [lesson 4](04_qlora_run.ipynb), made longer, under other releases of TRL and transformers, with all other
# packages as they are here (`data/scripts/measure/drift.py`). Each learning rate was tried with two seeds, and the best one was
# chosen on validation questions. The last column says with which adapters a repeated run with the same seed began:

# %% tags=["nbval-check-output"]
drift = json.loads(data_path("measured", "drift.json").read_text(encoding="utf-8"))
ran = [row for row in drift["rows"] if row["outcome"] == "ran"]
table = [[row["name"], *row["validation"].values(), row["best_rate"], *row["test"],
          "the same" if len(set(row["begins"])) == 1 else "others"] for row in ran]
columns = ["release", *map("{:g}".format, drift["rates"]), "best", "test, seed 0", "seed 1", "repeated"]
show_table(columns, table, formats=["", *[".1%"] * 3, "g", ".1%", ".1%", ""])
for row in drift["rows"]:
    if row["outcome"] != "ran":
        print(f"{row['name']} breaks: {row['outcome']}")

# %% tags=["nbval-check-output"]
for row in ran[1:]:
    for name, (there, here) in row["settings"].items():
        print(f"{row['name']}: {name} is {there!r} there, {here!r} here")
of_transformers = [row for row in ran if "transformers" in row["name"]]
check("releases of transformers with other losses than here",
      sum(row["losses"] != ran[0]["losses"] for row in of_transformers), 0, exact=True)
moved = sum(row["best_rate"] != ran[0]["best_rate"] for row in ran)
check("releases with another best rate", moved, 0, exact=True)

# %% [markdown]
# From release to release of transformers not one digit of the losses moves. TRL is another matter. Up to 1.14 it made the adapters
# before it set the seed, so **the same seed began with other adapters each time**, and no run could be repeated. With 1.15 the run
# breaks where there is no Triton, as on a machine without a GPU. The best of the three rates is the same everywhere. And what
# transformers 5 has saved cannot always be read by what came before: here it is the tokenizer.
#
# **So note the versions beside every result, as the report of `run` does. After an update, make one known run again.**
#
# ## What to do when
#
# | what you see | likely cause | cure |
# |---|---|---|
# | the loss leaps within the first steps, and stays high | learning rate too high | a third of it, from the start |
# | the loss is NaN | the same; in float16 also an overflow in the model | the same; bfloat16 |
# | one spike, and the loss comes back | an odd batch | look at that batch; go on |
# | "gradients overflowed" at the first steps | the loss scale settles | nothing |
# | it goes on | gradients too large for float16 | lower rate, clipping, bfloat16 |
# | the loss is fine, answers never stop | the end is not learnt: pad = end, cut answers, wrong marks | look at one row of labels |
# | the loss is fine, answers are empty | empty answers in the data | refuse them |
# | the loss stays high, answers are fine | loss on the question | `assistant_only_loss=True` |
# | answers are worse than the loss promises | training and asking differ, such as two first tokens | compare the tokens of both |
#
# ## You have
# - read a healthy run: a loss that falls and lies flat, gradients that grow and shrink;
# - broken it by its settings, and seen that the rate matters most, that clipping saves SGD, and what float16 can hold;
# - broken it by its data, with a loss that looked healthy each time;
# - seen which faults do harm here and which do not, and cured each in one line;
# - compared releases of the libraries: what another one changes, and what not.
#
# Next: [lesson 9](09_out_of_memory.ipynb) does the same for memory.
