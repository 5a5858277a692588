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
import logging
import math
import statistics
from dataclasses import replace

from qlora_helpers import evaluation
from qlora_helpers.chats import ChatError, read_chats, split_question
from qlora_helpers.course import plots
from qlora_helpers.course.checks import check, exercise
from qlora_helpers.hardware import detect
from qlora_helpers.models.loading import load_model, load_tokenizer
from qlora_helpers.paths import data_path
from qlora_helpers.settings import Settings
from qlora_helpers.training.callbacks import TrainingDiverged
from qlora_helpers.training.faulty_runs import collator_run, sft_trainer
from qlora_helpers.training.run import train
from qlora_helpers.training.run_folder import new_run_folder
from qlora_helpers.training.trainer import build_trainer

# after the helpers, which keep harmless messages off the page
import torch
import transformers

print("gear:", detect().gear)

# %% [markdown]
# ## A healthy run
#
# First a run with nothing wrong. It is also a row of a table that `data/scripts/measure/stability.py` made, over several seeds.
# Each other row is the same run with one fault.

# %% tags=["nbval-check-output"]
measured = json.loads(data_path("measured", "stability.json").read_text())
rows = {row["name"]: row for row in measured["rows"]}
chats = read_chats(data_path("chats", "train.jsonl"))[: measured["chats"]]
test_chats = read_chats(data_path("chats", "test.jsonl"))[: measured["test_chats"]]
tokenizer = load_tokenizer()
right = Settings(**rows["as it should be"]["settings"])
print(f"{len(rows)} rows, measured on {measured['processor']} with trl {measured['versions']['trl']}")
print(f"a run: {right.steps} steps of {right.batch_size} chats, learning rate {right.learning_rate}, clipped at {right.max_grad_norm}")

# %%
healthy = train(load_model(), tokenizer, chats, new_run_folder("lesson-08"), right)
print(f"{healthy.seconds:.0f} s; loss {healthy.history[0][1]:.2f} at first, {healthy.history[-1][1]:.2f} at last")

# %%
fig, (left, middle) = plots.figure(1, 2)
for ax, curve, what in ((left, healthy.history, "loss (nats per answer token)"), (middle, healthy.gradient_norms, "gradient norm")):
    ax.plot(*zip(*curve))
    ax.set(xlabel="step", ylabel=what, ylim=(0, None))
left.set_title("The loss falls, then lies flat")
middle.set_title("Gradients grow, then shrink")
plots.show(fig, "Two curves over 60 steps. The loss falls from about 5 to about 0.3 within 25 steps and stays there. The gradient norm grows from 4 to almost 10 while the loss falls fastest, then goes up and down between 0 and 4.")

# %% [markdown]
# Keep this picture. Noise from batch to batch is normal, and so are gradients that grow while the loss falls. The table
# holds this very run, too:

# %% tags=["nbval-check-output"]
print("test loss, five seeds:", *(f"{loss:.3f}" for loss in rows["as it should be"]["loss"]))
loss = evaluation.loss(healthy.model, tokenizer, test_chats)
check("test loss of this run against the first", loss, rows["as it should be"]["loss"][0], rel=0.2)
check("loss spikes", len(healthy.spikes), 0, exact=True)

# %% [markdown]
# ## The learning rate is too high
#
# The same run at fifty times the rate. `train` watches the losses and names a spike with its step:

# %%
def losses_of(settings):
    """(step, loss) of a run, also of one that diverges."""
    seen, few = [], chats[: settings.steps * settings.batch_size]
    try:
        train(load_model(), tokenizer, few, new_run_folder("lesson-08"), settings, on_loss=lambda history: seen.append(history))
    except TrainingDiverged as error:
        print("TrainingDiverged:", error)
    return seen[-1]


too_high = losses_of(replace(right, steps=12, batch_size=4, warmup_steps=2, learning_rate=50 * right.learning_rate))

# %%
uniform = math.log(tokenizer.vocab_size)
fig, (left, other) = plots.figure(1, 2)
left.plot(*zip(*too_high), color=plots.RED, label="50 times the rate")
left.plot(*zip(*healthy.history[:12]), color=plots.BLUE, label="as it should be")
left.axhline(uniform, color="#555555", linestyle="--", label=f"knows nothing: ln {tokenizer.vocab_size:,}")
left.set_title("50 times: it leaps")
for name, colour in (("5 times the rate", plots.RED), ("2.5 times the rate", plots.ORANGE), ("as it should be", plots.BLUE)):
    other.plot(range(1, right.steps + 1), rows[name]["losses"], color=colour, label=name)
other.set_title("5 times: it falls, and climbs again")
for ax in (left, other):
    ax.set(xlabel="step", ylabel="loss (nats per answer token)", ylim=(0, None))
    ax.legend(loc="upper right")
left.set_ylim(0, 60)  # room for the legend
plots.show(fig, "Two plots of loss against step. Left, 12 steps: at fifty times the rate the loss leaps from 5 to about 30 within five steps and stays above 7, the loss of a model that knows nothing; at the normal rate it falls. Right, 60 steps from the table: at 5 times the rate the loss falls below 1 by step 7 and climbs back to between 1 and 4; at 2.5 times it falls to about 0.5, at the normal rate to 0.3.")

# %% [markdown]
# After the leap the loss is higher than that of a model which gives every token the same chance: the adapters drown what
# the base knows. At five times the rate there is no leap. The loss falls as it should, and climbs
# again. The rule for spikes does not see that; your eyes do.

# %% tags=["nbval-check-output"]
check("highest loss", max(loss for _, loss in too_high), at_least=10)
check("loss at the end", too_high[-1][1], at_least=4)

# %% [markdown]
# **Cure: start again in a new folder, with a third of the learning rate, until the loss falls.** What has been
# trained since the spike is worthless.
#
# What is a spike? The rule here (`qlora_helpers/training/spikes.py`) takes the median of the 20 losses before as usual, and their
# median distance from it, times 1.4826, as the spread. A spike lies above the usual loss by 8 spreads, by half of it, and
# by 0.5 nats. It costs nothing: the losses are read when they are logged.
#
# ### NaN
#
# Sillier still, and the loss is no number any more. Then `train` stops, before such weights are saved:

# %%
try:
    _ = train(load_model(), tokenizer, chats[:40], new_run_folder("lesson-08"), replace(right, steps=5, warmup_steps=1, learning_rate=1e20))
except TrainingDiverged as error:
    stopped = str(error).partition(".")[0]
    print(error)

# %% tags=["nbval-check-output"]
check("the run was stopped", stopped.endswith("the loss is nan"), True, exact=True)

# %% [markdown]
# The trainer alone would have gone on, and not even shown it. By default it logs the mean of the losses before in place
# of a NaN:

# %% tags=["nbval-check-output"]
print("logging_nan_inf_filter:", transformers.TrainingArguments("unused", use_cpu=True).logging_nan_inf_filter)

# %% [markdown]
# **Cure: `logging_nan_inf_filter=False`, and stop at the first NaN.**
#
# ## No warm-up
#
# "A cosine scheduler with a warmup period is crucial", says the second article. Here is what leaving it out costs, over
# five seeds, at three learning rates:

# %%
def table(*names):
    """Mean and standard deviation over the seeds."""
    print(f"{'':47}{'test loss':>15}{'exact match':>16}")
    for name in names:
        cells = [f"{statistics.mean(rows[name][key]):6.3f} ± {statistics.stdev(rows[name][key]):.3f}" for key in ("loss", "exact_match")]
        print(f"{name:47}{cells[0]:>15}{cells[1]:>16}")


def standard_errors(one, other):
    """How far the mean test losses of two rows lie apart, in standard errors of their difference."""
    a, b = rows[one]["loss"], rows[other]["loss"]
    return (statistics.mean(a) - statistics.mean(b)) / math.hypot(statistics.stdev(a) / len(a) ** 0.5, statistics.stdev(b) / len(b) ** 0.5)

# %% tags=["nbval-check-output"]
table("as it should be", "no warm-up", "2.5 times the rate", "2.5 times the rate, no warm-up",
      "5 times the rate", "5 times the rate, no warm-up")

# %% [markdown]
# Leaving it out costs nothing here: at no rate is the mean loss worse without. What counts is the rate itself. At 2.5 times
# the test loss is much higher, at 5 times the run is ruined, with warm-up or without. Whether a larger model needs it,
# this one cannot tell.
#
# The QLoRA paper's own script asks for `--lr_scheduler_type constant --warmup_ratio 0.03`. In transformers a *constant*
# schedule has no warm-up, whatever you ask for:

# %% tags=["nbval-check-output"]
for name in ("constant", "constant_with_warmup", "linear"):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=2e-4)
    schedule = transformers.get_scheduler(name, optimizer, num_warmup_steps=3, num_training_steps=100)
    rates = []
    for _ in range(5):
        rates.append(f"{schedule.get_last_lr()[0]:.1e}")
        optimizer.step()
        schedule.step()
    print(f"{name:21}", *rates)

# %% [markdown]
# So the paper's models, trained with that script and today's rule, saw no warm-up at all. **Cure, where it is needed:
# `warmup_steps` of about 3 to 5 % of the run; with a constant rate, `constant_with_warmup`.** Our `Settings(schedule="constant")`
# means the latter.
#
# ## No clipping
#
# Clipping shortens a gradient that is longer than `max_grad_norm`: 1.0 by default, 0.3 in the paper. To see what it is
# for, take plain gradient descent (SGD), which steps as far as the gradient is long:

# %%
sgd = replace(right, steps=8, batch_size=4, warmup_steps=2, optimizer="sgd", learning_rate=1.0)
clipped, unclipped = losses_of(sgd), losses_of(replace(sgd, max_grad_norm=None))

# %%
fig, ax = plots.figure()
ax.plot(*zip(*unclipped), color=plots.RED, label="not clipped")
ax.plot(*zip(*clipped), color=plots.BLUE, label="clipped at 1.0")
ax.set(xlabel="step", ylabel="loss (nats per answer token)", ylim=(0, None))
ax.set_title("With SGD, clipping decides between learning and ruin")
ax.legend()
plots.show(fig, "Loss over 8 steps of gradient descent at rate 1. Clipped at 1.0 it falls from 5 to less than 4. Not clipped it leaps from the fourth step on, to more than 20.")

# %% tags=["nbval-check-output"]
check("loss at the end, clipped", clipped[-1][1], at_most=4)
check("loss at the end, not clipped", unclipped[-1][1], at_least=5)

# %% [markdown]
# With AdamW, which all QLoRA runs use, it is another matter. Adam divides each gradient by its own usual size. A gradient
# a hundred times as long gives the same first step:

# %% tags=["nbval-check-output"]
def first_step(times):
    weight = torch.zeros(3, requires_grad=True)
    weight.grad = times * torch.tensor([0.3, -2.0, 0.01])
    torch.optim.AdamW([weight], lr=1e-3).step()
    return weight.detach()


print("first step:", [f"{value:.6f}" for value in first_step(1)])
check("largest difference to the step of a gradient 100 times as long", (first_step(1) - first_step(100)).abs().max().item(), at_most=1e-8)

# %% tags=["nbval-check-output"]
table("as it should be", "no clipping", "no warm-up, no clipping", "the paper's: constant, clipped at 0.3",
      "2.5 times the rate", "2.5 times the rate, no clipping", "2.5 times the rate, neither")

# %% tags=["nbval-check-output"]
check("standard errors between clipped and not", standard_errors("no clipping", "as it should be"), at_least=2)
check("at 2.5 times the rate", standard_errors("2.5 times the rate, no clipping", "2.5 times the rate"), at_most=1)

# %% [markdown]
# So clipping helps a little here, and at the higher rate the seeds make more of a difference than it does. The
# paper's settings, without warm-up and with a constant rate, do as well as ours. **Cure: leave `max_grad_norm` on: 1.0 or
# 0.3.** It is insurance against the odd batch, and free.
#
# ## float16 overflows
#
# A T4 computes in float16, whose largest number is 65,504. bfloat16 has the range of float32, and fewer digits. The next
# cells are real float16 arithmetic, on the CPU of any machine; only a GPU's speed is missing.

# %% tags=["nbval-check-output"]
for dtype in (torch.float16, torch.bfloat16, torch.float32):
    info = torch.finfo(dtype)
    print(f"{dtype!s:15} largest {info.max:10.4g}   smallest normal {info.tiny:9.2g}   next to 1: 1 + {info.eps:.2g}")
check("largest float16", torch.finfo(torch.float16).max, 65_504.0, exact=True)

# %% [markdown]
# ### In the model
#
# How near does the shipped model come? Its loudest number is in the last layer:

# %%
cpu = detect("cpu")
loud = {}
model = load_model(quantization=None, hardware=cpu)
parts = {name: part for name, part in model.named_modules() if name.endswith(("embed_tokens", "o_proj", "down_proj"))}
for name, part in parts.items():
    part.register_forward_hook(lambda part, args, output, name=name: loud.update({name: output.abs().max().item()}))
_ = evaluation.loss(model, tokenizer, test_chats[:8])
print("loudest:", max(loud, key=loud.get), f"{max(loud.values()):.0f}")

# %% [markdown]
# That is far from the limit. But nothing in training keeps such numbers small. All parts that write into the residual
# stream can be made louder by the same factor, and the model computes the same, since each layer normalises what it reads.
# So let us make it louder:

# %%
now, louder = 1, {}
print(" " * 21 + "loss in float32, bfloat16, float16   loudest in float16")
for factor in (1, 64, 128, 1024):
    model.float()
    with torch.no_grad():
        for part in parts.values():
            part.weight *= factor / now
    now, losses = factor, []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        losses.append(evaluation.loss(model.to(dtype), tokenizer, test_chats[:8]))
    louder[factor] = losses
    print(f"{factor:5} times as loud {losses[0]:15.2f} {losses[1]:9.2f} {losses[2]:8.2f} {max(loud.values()):20,.0f}")

# %% tags=["nbval-check-output"]
check("loss in float32, 1,024 times as loud / once", louder[1024][0] / louder[1][0], 1.0, rel=0.01)
check("bfloat16, 1,024 times as loud", louder[1024][1], at_most=10)
check("float16, 64 times", louder[64][2], at_most=10)
check("float16, 1,024 times, is NaN", math.isnan(louder[1024][2]), True, exact=True)

# %% [markdown]
# At 128 times the loudest number is infinite already, and the loss does not show it: the number belongs to a token whose
# loss is not counted, in the last layer, where no other token looks at it any more. In an earlier layer one infinity
# suffices. The next normalisation makes it NaN, and the attention spreads it. It happens in real models. Gemma 3's activations exceed float16's range (unslothai/unsloth-zoo #174). No learning rate helps
# here. **Cure: bfloat16, on a GPU that has it; else another model.**
#
# ### In the gradients
#
# Gradients can be too small for float16, and vanish. So with `fp16=True` the loss is multiplied by a scale before
# the backward pass, and the gradients are divided by it afterwards. Too large a scale overflows. Where is the window?

# %%
trainer = build_trainer(load_model(hardware=cpu), tokenizer, chats, new_run_folder("lesson-08"), right, cpu)
batches = [batch for _, batch in zip(range(8), trainer.get_train_dataloader())]


def scaled_gradients(batch, scale):
    """The gradients of all `B` of the adapters, times the scale; the products are computed in float16."""
    trainer.model.zero_grad()
    with torch.autocast("cpu", dtype=torch.float16):
        loss = trainer.model(**batch).loss
    (loss * scale).backward()
    return torch.cat([p.grad.flatten() for name, p in trainer.model.named_parameters() if "lora_B" in name])

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
plots.show(fig, "Share of gradients lost against the loss scale from 2 to the power -16 to 24. At -16 about a third vanish, from -8 on almost none. None overflow up to 16, a tenth at 18, all at 24. The trainer begins at 16.")

# %% tags=["nbval-check-output"]
at = dict(zip(exponents, zip(vanished, overflowed)))
check("vanished at 2^-16", at[-16][0], at_least=0.2)
check("vanished without a scale, 2^0", at[0][0], at_most=0.01)
check("overflowed at 2^16", at[16][1], exact=True, want=0.0)
check("overflowed at 2^24", at[24][1], at_least=0.5)

# %% [markdown]
# So this model needs no loss scaling: even at a scale of 1 nothing vanishes. Deeper models and smaller losses do. Where the
# scale is too large, torch skips the step and halves it. Here torch's own `GradScaler` begins far too high:

# %%
scaler = torch.amp.GradScaler("cpu", init_scale=2.0**21)
optimizer = torch.optim.AdamW([p for p in trainer.model.parameters() if p.requires_grad], lr=1e-3)
scales = []
for number, batch in enumerate(batches, start=1):
    optimizer.zero_grad()
    with torch.autocast("cpu", dtype=torch.float16):
        loss = trainer.model(**batch).loss
    scales.append(scaler.get_scale())
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    print(f"step {number}: scale 2^{math.log2(scales[-1]):.0f}", "skipped" if scaler.get_scale() < scales[-1] else "made")

# %% tags=["nbval-check-output"]
check("scale at the last step, as a power of 2", math.log2(scales[-1]), at_least=14, at_most=19)

# %% [markdown]
# A few skipped steps at the start are normal. `train` counts them in `run.skipped_steps`, and stops after 17 in a
# row, when the scale has fallen below 1. In the `t4` gear you can see it for real:

# %%
if detect().gear == "t4":
    _ = losses_of(replace(right, steps=12, batch_size=4, warmup_steps=2, learning_rate=50 * right.learning_rate))
else:
    print(f"not run: the {detect().gear} gear computes in {detect().compute_dtype}, and scales no loss")

# %% [markdown]
# **Cure: let the scaler skip; if it goes on, lower the learning rate; adapters in float32.** Adapters in float16 stop with
# "Attempting to unscale FP16 gradients", those in bfloat16 with a missing kernel ([lesson 4](04_qlora_run.ipynb)).
#
# ## Empty answers
#
# Now the data. The loss of these runs looks healthy, and the model is broken. So look at what is learnt. Here the tokens
# on which the loss is are in square brackets:

# %%
def show(ids, labels):
    words = [tokenizer.decode([token]).strip() for token in map(int, ids)]
    print(" ".join(word if label == -100 else f"[{word}]" for word, label in zip(words, map(int, labels))))


def first_row(row, template=None, **options):
    """What TRL's trainer makes of one row; nothing is trained."""
    with_template = load_tokenizer()
    with_template.chat_template = template or with_template.chat_template
    made = sft_trainer(load_model(), with_template, [row], new_run_folder("lesson-08"), right, **options).train_dataset[0]
    show(made["input_ids"], made["labels"])
    return made

# %% tags=["nbval-check-output"]
question, reply = chats[0]
good = first_row({"messages": [question, reply]}, assistant_only_loss=True)
empty = first_row({"messages": [question, {"role": "assistant", "content": ""}]}, assistant_only_loss=True)

# %% [markdown]
# TRL takes the empty answer without a word, and the model learns that nothing is an answer. The course's reader does not:

# %% tags=["nbval-check-output"]
file = new_run_folder("lesson-08") / "chats.jsonl"
lines = [{"messages": chats[0]}, {"messages": [question, {"role": "assistant", "content": " "}]}]
_ = file.write_text("\n".join(map(json.dumps, lines)))
try:
    read_chats(file)
except ChatError as error:
    print(str(error).replace(str(file), file.name))

# %% [markdown]
# **Cure: check every chat before training, and refuse what is empty.**
#
# ## Cut answers
#
# TRL cuts what is longer than `max_length`, without a word. The end is gone, and with it the token that says *stop*:

# %% tags=["nbval-check-output"]
cut = first_row({"messages": chats[0]}, assistant_only_loss=True, max_length=16)
check("is the end learnt?", tokenizer.eos_token_id in cut["labels"], False, exact=True)

# %% [markdown]
# It also happens unasked. Many tutorials pass `TrainingArguments`, which has no `max_length`. TRL makes an `SFTConfig` of
# them, with its own 1,024. Here is a long answer:

# %% tags=["nbval-check-output"]
roomy = load_tokenizer()
roomy.model_max_length = 4096  # as of a larger model
long = {"messages": [question, {"role": "assistant", "content": "piano " * 1500}]}
trainer = sft_trainer(load_model(), roomy, [long], new_run_folder("lesson-08"), right, plain_arguments=True)
print(f"{type(trainer.args).__name__} with max_length {trainer.args.max_length:,}")
before, after = (len(row["input_ids"]) for row in (roomy.apply_chat_template(long["messages"], return_dict=True), trainer.train_dataset[0]))
print(f"{before:,} tokens before, {after:,} after")

# %% [markdown]
# **Cure: set `max_length`, and count: `read_chats(file, tokenizer, max_length)` names each chat that would be cut.**
#
# ## Pad = end: the model that never stops
#
# Two of the three articles have this line: `tokenizer.pad_token = tokenizer.eos_token`. It is harmless with TRL's
# collator. But transformers' own collator for language models takes every pad token out of the loss. If the
# end is the pad, it takes out the end:

# %% tags=["nbval-check-output"]
two_roles = load_tokenizer()
two_roles.pad_token = two_roles.eos_token
for of in (tokenizer, two_roles):
    collate = transformers.DataCollatorForLanguageModeling(of, mlm=False)
    ids = [of.apply_chat_template(chat, return_dict=True)["input_ids"] for chat in chats[:2]]
    batch = collate([{"input_ids": row} for row in ids])
    show(batch["input_ids"][1], batch["labels"][1])

# %% [markdown]
# In the second line the last token has no brackets. Train that way for 10 steps, and ask:

# %%
brief = replace(right, steps=10, batch_size=4, warmup_steps=2)
trained = collator_run(load_model(), two_roles, chats[: 10 * 4], new_run_folder("lesson-08"), brief).model
ends = evaluation.share_that_ends(trained, tokenizer, test_chats[:40])
(said,) = evaluation.answer(trained, tokenizer, [split_question(test_chats[1])[0]], max_new_tokens=24)
print(f"{ends:.0%} of the answers end\n    {test_chats[1][0]['content']}\n    {said}")

# %% tags=["nbval-check-output"]
check("answers that end, with pad = end", ends, at_most=0.4)
for name in ("collator, a pad of its own", "collator, pad = end"):
    print(f"{name:28}{statistics.mean(rows[name]['ends']):6.1%} of the answers end, by the table")

# %% [markdown]
# **Cure: a pad token of its own; or a collator that pads labels with -100, as TRL's does.** With today's TRL the
# transformers collator stops at the first uneven batch instead ("Unable to create tensor"), since TRL's rows have labels
# already, which it cannot pad.
#
# ## A doubled first token
#
# The first article renders each chat to text, and gives TRL the text. The text has its first token already; the tokenizer
# adds it again:

# %% tags=["nbval-check-output"]
text = tokenizer.apply_chat_template(chats[0], tokenize=False)
doubled = first_row({"text": text})
check("first tokens", doubled["input_ids"].count(tokenizer.bos_token_id), 2, exact=True)

# %% tags=["nbval-check-output"]
table("loss on the question, too", "loss on the question, too; two first tokens")

# %% tags=["nbval-check-output"]
check("standard errors between one first token and two", standard_errors("loss on the question, too; two first tokens", "loss on the question, too"), at_most=2)

# %% [markdown]
# A little worse, and too little to be sure of with five seeds. Still, training and asking now differ: the model is asked
# with one first token. **Cure: give TRL the `messages`, or tokenise a rendered text with `add_special_tokens=False`.**
#
# ## Loss on the question
#
# The line above shows another fault: every token is in brackets. TRL's default is to learn the question, too. With
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
plots.show(fig, "Logged loss over 60 steps. With the loss on answers alone it falls from 5 to 0.3. With the loss on the question, too, it stays at about 1, since nobody can guess whom a question is about.")

# %% tags=["nbval-check-output"]
table("as it should be", "loss on the question, too")

# %% [markdown]
# Here it does harm: the test loss on the answers rises, and half of the right answers are gone. The run spends itself on
# questions that nobody needs from it. **Cure: `assistant_only_loss=True`, with `messages`.**
#
# ## A template without marks
#
# `assistant_only_loss` needs a chat template that marks what the assistant says, by `{% generation %}`. Most published
# templates do not. For those it knows, TRL takes a marked version of its own. Any other one it refuses:

# %% tags=["nbval-check-output"]
unmarked = tokenizer.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
try:
    first_row({"messages": chats[0]}, unmarked, assistant_only_loss=True)
except ValueError as error:
    print(error)

# %% [markdown]
# A refusal is good. What is not noticed is a mark that ends too early, before the closing token. TRL only warns, and the
# run looks healthy:

# %% tags=["nbval-check-output"]
class OnThePage(logging.Handler):
    def emit(self, record):
        print("TRL warns:", record.getMessage(), "\n")


log = logging.getLogger("trl.trainer.sft_trainer")
log.addHandler(OnThePage())
log.propagate = False  # else it goes to the terminal, too
whole, early = "{{ message['content'] + eos_token }}{% endgeneration %}", "{{ message['content'] }}{% endgeneration %}{{ eos_token }}"
too_early = first_row({"messages": chats[0]}, tokenizer.chat_template.replace(whole, early), assistant_only_loss=True)

# %% [markdown]
# **Cure: put the marks around answer and closing token, and look at one row, as here, before every run.**
#
# ## The broken data in one picture
# Each bar is a run of the table, the mean over its seeds: how many answers stop by themselves, and how many are right.

# %%
names = ["as it should be", "loss on the question, too", "loss on the question, too; two first tokens", "a quarter of the answers empty",
         "cut at 16 tokens", "the end outside of the mark", "collator, pad = end", "collator, a pad of its own"]
fig, ax = plots.figure(figsize=(7.2, 4.2))
for shift, (key, label, colour) in enumerate((("ends", "stop by themselves", plots.SKY), ("exact_match", "are right", plots.BLUE), ("empty", "are empty", plots.RED))):
    means = [100 * statistics.mean(rows[name][key]) for name in names]
    ax.barh([y + 0.27 * shift for y in range(len(names))], means, height=0.25, color=colour, label=label)
ax.set_yticks([y + 0.27 for y in range(len(names))], labels=names)
ax.invert_yaxis()
ax.grid(axis="y", visible=False)
ax.set_xlabel("answers to test questions that … (%)")
ax.set_title("The loss fell in every one of these runs")
ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
plots.show(fig, "Horizontal bars for eight runs. As it should be: all answers stop, a third are right. Loss on the question, with one first token or two: all stop, less than a fifth are right. A quarter empty: about a tenth of the answers are empty. Cut at 16 tokens, the end outside of the mark, and collator with pad = end: hardly any answer stops, none is right. The collator with a pad of its own: all stop.")

# %% tags=["nbval-check-output"]
print(f"{'':47}{'logged loss':>11}{'stop':>8}{'right':>8}{'empty':>8}")
for name in names:
    shares = [f"{statistics.mean(rows[name][key]):8.0%}" for key in ("ends", "exact_match", "empty")]
    print(f"{name:47}{statistics.mean(rows[name]['losses'][-10:]):11.2f}", *shares, sep="")

# %% [markdown]
# The logged loss tells nothing of it. In three rows no answer is right, and one of these has a logged loss like the healthy
# one. So look at generated answers, and at one row of tokens, before you look at a loss.
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
# ## Exercise 1
#
# Write the rule for a spike. From the losses before (no more than 20, all of them given) compute the limit above which the
# next one is a spike: the median, plus the largest of 8 spreads, half of the median, and 0.5. The spread is 1.4826 times the
# median of the distances from the median.

# %% tags=["exercise"]
def limit(before: list[float]) -> float:
    return ...

# %% tags=["solution"]
def limit(before: list[float]) -> float:
    usual = statistics.median(before)
    spread = 1.4826 * statistics.median(abs(loss - usual) for loss in before)
    return usual + max(8 * spread, usual / 2, 0.5)

# %% tags=["nbval-check-output"]
answer = limit([2.0, 2.2, 1.9, 2.1, 2.4])
exercise("limit of a spike", answer, 3.28608, hint="statistics.median, twice; then max of three.")

# %% [markdown]
# ## Exercise 2
#
# Write the check that would have found the faults in the data. Given the token ids of a row, its labels, and the ids of the
# first token and of the closing one, return `"two first tokens"`, `"the end is not learnt"`, `"the question is learnt"` or
# `""`, whichever holds first. The end is learnt if the last label is the closing token. The question is learnt if the
# first label is not -100.

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
whole_question = {"input_ids": good["input_ids"], "labels": good["input_ids"]}
cases = [(good, ""), (doubled, "two first tokens"), (cut, "the end is not learnt"), (too_early, "the end is not learnt"), (whole_question, "the question is learnt")]
found = [fault(row["input_ids"], row["labels"], tokenizer.bos_token_id, tokenizer.eos_token_id) for row, _ in cases]
found = ... if ... in found else " | ".join(found)
exercise("faults in five rows", found, " | ".join(name for _, name in cases), hint="ids.count(first), labels[-1], labels[0], in this order.")

# %% [markdown]
# ## Exercise 3
#
# The largest gradient of a model is 0.3. Which power of two is the largest loss scale at which it still fits float16? Give
# the exponent.

# %% tags=["exercise"]
exponent = ...

# %% tags=["solution"]
exponent = math.floor(math.log2(torch.finfo(torch.float16).max / 0.3))

# %% tags=["nbval-check-output"]
exercise("largest loss scale", exponent, 17, hint="0.3 times 2 to the power of it must not be more than 65504.")

# %% [markdown]
# ## You have
# - read a healthy run: a loss that falls and lies flat, gradients that grow and shrink;
# - broken it by its settings, and seen that the rate matters most, that clipping saves SGD, and what float16 can hold;
# - broken it by its data, with a loss that looked healthy each time;
# - seen which faults do harm here and which do not, and cured each in one line.
#
# Next: [lesson 9](09_out_of_memory.ipynb) does the same for memory.
