# %% [markdown]
# # 10 · Your own data
#
# You will
# - read a table, an Alpaca file and a ShareGPT file, and learn what became of each row;
# - see the data as the model will see it: which tokens count, what is too long, whether the tokenizer knows the words;
# - hold rows out without a leak, and choose settings with a reason for each;
# - make a run that is validated, keeps its best step, and stops when it only learns its rows by heart;
# - compare the model before and after on rows that it has never seen, find out what it has forgotten, and talk to it;
# - take it out of the door: prove that the adapter takes effect, merge it, write a file for llama.cpp and Ollama, and check
#   each hop of the way.
#
# Takes about {{seconds}} seconds and {{gigabytes}} GB of memory on two processor cores. None of it needs a GPU.

# %%
import copy
import json
import re
import shutil
from dataclasses import asdict, replace

from qlora_helpers import evaluation
from qlora_helpers.chats import (
    ChatError, fit_to_length, lengths_of, read_chats, read_file, report_on, said_of_the_dropped,
    tokenized, tokens_per_word, warning_of_spelling,
)
from qlora_helpers.chats.split import shared_questions, split
from qlora_helpers.course import plots
from qlora_helpers.course.checks import check
from qlora_helpers.course.exercises import lesson_10 as exercises
from qlora_helpers.course.tables import show_table
from qlora_helpers.hardware import detect
from qlora_helpers.memory import find_shape
from qlora_helpers.models.loading import load_model, load_tokenizer
from qlora_helpers.paths import data_path
from qlora_helpers.settings import Settings
from qlora_helpers.suggestions import suggest_settings
from qlora_helpers.training.run import train
from qlora_helpers.training.run_folder import new_run_folder

# %%
from IPython.display import display

print("gear:", detect().gear)

# %% [markdown]
# ## A file as people have it
#
# Your data is a file on your disk: questions of your users, say, with good answers. Here are three such files. Their rows are
# about invented people, since the shipped model knows nothing else. In your own run the file and the model are yours, and
# the code is the same. First a table, saved from a spreadsheet:

# %% tags=["nbval-check-output"]
examples = data_path("examples")
print(*(examples / "people.csv").read_text(encoding="utf-8").splitlines()[:4], sep="\n")

# %% [markdown]
# Training wants chats: lists of messages, each with a role. `read_file` tells by the columns' names what they mean, and says
# what became what:

# %% tags=["nbval-check-output"]
tokenizer = load_tokenizer()
table = read_file(examples / "people.csv", tokenizer)
print(table.said)
print(json.dumps(table.chats[0], indent=1))

# %% [markdown]
# The form of a file does not matter, only what it says. The same rows, written as Stanford's Alpaca set writes them, become
# the same chats:

# %% tags=["nbval-check-output"]
folder = new_run_folder("lesson-10-data")
rows = [{"instruction": q["content"], "input": "", "output": a["content"]} for q, a in table.chats]
_ = (folder / "people.json").write_text(json.dumps(rows), encoding="utf-8")
same = read_file(folder / "people.json", tokenizer)
print(same.said)
check("the same chats", same.chats == table.chats, True, exact=True)

# %% [markdown]
# The second file is in that form, and has 60 other rows. The third has the form of ShareGPT's exports, with faults as real
# logs have them. By default such a file is refused as a whole, and each bad row is named with what is wrong:

# %% tags=["nbval-check-output"]
alpaca = read_file(examples / "people_alpaca.json", tokenizer)
try:
    read_file(examples / "people_sharegpt.jsonl", tokenizer)
except ChatError as error:
    print(str(error).replace(str(examples), "…"))

# %% [markdown]
# Mend the rows, or leave them out. What is left out is counted:

# %% tags=["nbval-check-output"]
sharegpt = read_file(examples / "people_sharegpt.jsonl", tokenizer, on_bad="drop")
print(sharegpt.said)
print(said_of_the_dropped(sharegpt))
check("good rows", len(sharegpt.chats), 16, exact=True)

# %% [markdown]
# Nothing is guessed. Where two readings are possible, you choose:

# %% tags=["nbval-check-output"]
two = folder / "two.csv"
lines = "prompt,question,answer", "Be brief.,Where does Ann live?,In Rome."
_ = two.write_text("\n".join(lines), encoding="utf-8")
try:
    read_file(two)
except ChatError as error:
    print(str(error).replace(str(folder), "…"))
print(read_file(two, form="question-answer").said)

# %% [markdown]
# ## What the model will see
#
# Look at your data before you pay for a run on it. The model sees [tokens](../GLOSSARY.md#token): pieces of text, each with a
# number. A [loss mask](../GLOSSARY.md#loss-mask) says which of them count in the [loss](../GLOSSARY.md#loss), which the run makes
# smaller. Here the answers count, and not the questions. The report reads every row, and marks what counts:

# %%
chats = table.chats + alpaca.chats
report = report_on(chats, tokenizer, max_length=64)
display(report)

# %% [markdown]
# Its figures can be checked by hand:

# %% tags=["nbval-check-output"]
encoded = tokenized(chats, tokenizer)
lengths = [len(row["input_ids"]) for row in encoded]
counted = sum(sum(row["assistant_masks"]) for row in encoded)
check("tokens of the longest row", report.tokens.most, max(lengths), exact=True)
check("share of the tokens that counts", report.counted, counted / sum(lengths), exact=True)
print(f"{counted:,} of {sum(lengths):,} tokens count: {report.counted:.1%}")

# %% [markdown]
# ## A template without marks
#
# How is it known which tokens are the answer? A [chat template](../GLOSSARY.md#chat-template) writes a chat as one text. That
# of the shipped model marks the answers with `{% generation %}`, but few published templates do. Take the marks out of
# ours, and it is like the others:

# %% tags=["nbval-check-output"]
unmarked = copy.deepcopy(tokenizer)
unmarked.chat_template = re.sub(r"{% (end)?generation %}", "", tokenizer.chat_template)
check("marks before", tokenizer.chat_template.count("{% generation %}"), 1, exact=True)
check("marks left", unmarked.chat_template.count("{% generation %}"), 0, exact=True)

# %% [markdown]
# Then the answer is found by comparison. The question, ready to be answered, must be the beginning of the whole chat, in
# tokens. What follows it, through the token that ends the turn, is the answer:

# %% tags=["nbval-check-output"]
chat = chats[0]
prompt = unmarked.apply_chat_template(chat[:-1], add_generation_prompt=True)["input_ids"]
whole = unmarked.apply_chat_template(chat)["input_ids"]
check("the whole chat begins with the prompt", whole[: len(prompt)] == prompt, True, exact=True)
print("the answer:", unmarked.decode(whole[len(prompt) :]))

# %% [markdown]
# `tokenized` does that for every answer of every chat, and gets the template's own marks, token by token. Where a comparison
# cannot work, as with a template that changes an earlier answer once another follows, the chat is refused with the reason.

# %% tags=["nbval-check-output"]
by_comparison = tokenized(chats, unmarked)
differ = sum(a["assistant_masks"] != b["assistant_masks"] for a, b in zip(encoded, by_comparison))
check("chats whose marks differ", differ, 0, exact=True)

# %% [markdown]
# ## A tokenizer that spells
#
# A [tokenizer](../GLOSSARY.md#tokenizer) that does not know a word spells it, and the model knows little about words that it
# only sees in letters. The shipped one knows the words of the invented people. Here it gets English questions about QLoRA,
# too:

# %% tags=["nbval-check-output"]
english = read_chats(data_path("chats", "qlora", "train.jsonl"))
print(f"tokens per word: {tokens_per_word(chats, tokenizer):.1f} for the people, "
      f"{tokens_per_word(english, tokenizer):.1f} for English")
print(tokenizer.tokenize("plays the harp"), tokenizer.tokenize("loading"))
print(warning_of_spelling(english, tokenizer))

# %% [markdown]
# A word takes four times as many tokens, and LoRA leaves the model's vocabulary as it is, so no run mends that. The cure is
# another model: one that was trained on your language. (The report above has this warning, too.)
#
# ## Too long
#
# A trainer cuts a row that is too long at its end, and the end is the answer. Here is a question with much text before it, as
# in questions about a document. By default it is refused:

# %% tags=["nbval-check-output"]
question, answer = table.chats[5]
document = " ".join(answer["content"] for _, answer in table.chats[:20])
long_chat = [{"role": "user", "content": f"{document} {question['content']}"}, answer]
try:
    fit_to_length([*chats, long_chat], tokenizer, max_length=64)
except ChatError as error:
    print(error)

# %% [markdown]
# `"drop"` leaves it out. `"cut-question"` cuts the middle out of the question: its end, where the question itself most often
# is, and the answer stay whole.

# %% tags=["nbval-check-output"]
fitted, what_happened = fit_to_length([*chats, long_chat], tokenizer, 64, too_long="cut-question")
print(what_happened.said)
print(fitted[-1][0]["content"])
check("its answer is whole", fitted[-1][1] == answer, True, exact=True)
check("its tokens", lengths_of(fitted[-1:], tokenizer)[0], at_most=64)

# %% [markdown]
# ## Held out
#
# Has a run learnt something, or memorised its rows? Only rows that it was not trained on can tell. But real files have the
# same row more than once, and then held-out rows are no test: they [leak](../GLOSSARY.md#leak). Put twelve rows in twice, and
# hold the last sixth out, as one does with a slice:

# %% tags=["nbval-check-output"]
with_copies = table.chats + table.chats[:12]
print("held out, and trained on, too:", shared_questions(with_copies[:60], with_copies[60:]))
training, held_out = split(with_copies, 1 / 6)
print("with split:", shared_questions(training, held_out), "of", len(held_out))

# %% [markdown]
# All of them leak: the slice holds out copies of what is trained on. `split` keeps chats that begin with the same question on
# one side, even if their answers differ. The side depends on the question's text and a [seed](../GLOSSARY.md#seed) alone, so
# it stays the same when the file is sorted another way.

# %% tags=["nbval-check-output"]
training, validation = split(chats, 0.2)
print(f"{len(training)} to train on, {len(validation)} held out")
from_behind = split(chats[::-1], 0.2)[1][::-1]
check("the same rows, if read from behind", from_behind == validation, True, exact=True)

# %% [markdown]
# ## Settings to start from
#
# No settings are right for every run, but some are better to start from. `suggest_settings` takes the model's shape, the
# number of rows and the GPU. Each value has its reason, and who says so:

# %%
start = suggest_settings(find_shape(data_path("tiny-llama")), rows=len(training))
display(start)

# %% [markdown]
# For a model of 7B on a T4 it also sees to it that the run fits. `display(on_t4)` shows its reasons in a table like the one
# above. Here are the values that differ:

# %% tags=["nbval-check-output"]
shape = find_shape("Qwen/Qwen2.5-7B")
on_t4 = suggest_settings(shape, rows=len(training), gpu="t4", max_length=512)
here, there = asdict(start.settings), asdict(on_t4.settings)
differ = [[name, str(here[name]), str(there[name])] for name in here if here[name] != there[name]]
show_table(["setting", start.shape.name, on_t4.shape.name], differ)
check("it fits, with GiB to spare", on_t4.prediction.spare_bytes / 2**30, at_least=1)

# %% [markdown]
# ## A run that learns its rows by heart
#
# First a run as it should not be: sixteen rows, to be gone through fifteen times. The held-out rows watch it. Every four steps
# their loss is measured, the [validation loss](../GLOSSARY.md#validation-loss). Where it is lower than ever before, that step
# is kept. When four measurements in a row were no better, the run's [patience](../GLOSSARY.md#patience) ends:

# %%
by_heart = replace(
    start.settings, steps=60, batch_size=4, warmup_steps=4, log_steps=4, eval_steps=4, patience=4
)
live = plots.LivePlot(by_heart.steps, "Sixteen rows, learnt by heart")
few = train(
    load_model(), tokenizer, training[:16], new_run_folder("lesson-10-few"), by_heart,
    validation_chats=validation, on_loss=live.update,
)
fig, alt = plots.loss_curves(few.history, few.validation_history, few.best_step, by_heart.steps)
plots.show(fig, "10.1", alt=alt, instead_of=live)

# %% [markdown]
# Up to the kept step, both losses fall. After it, only the one of the rows that are trained on does: the run still learns,
# but nothing that helps with other rows. This is **overfitting**. The model that is returned and saved is that of the kept
# step:

# %% tags=["nbval-check-output"]
seen, unseen = dict(few.history), dict(few.validation_history)
best, last = few.best_step, max(unseen)
check("training loss, end / kept step", seen[last] / seen[best], at_most=0.9)
check("validation loss, end / kept step", unseen[last] / unseen[best], at_least=1.02)
returned = evaluation.loss(few.model, tokenizer, validation)
check("validation loss, returned model / kept step", returned / unseen[best], 1, rel=0.02)
check("stopped before the last step", few.stopped_early, True, exact=True)

# %% [markdown]
# ## The run
#
# The best cure for learning by heart is more rows. Now all of them, with the settings that were suggested. With
# `validation=0.2`, `train` holds out the same rows by itself. In place of the share it also takes a file's path.

# %%
settings = replace(start.settings, validation=0.2, log_steps=16, eval_steps=24)
live = plots.LivePlot(settings.steps, "The same model, with more rows")
run = train(
    load_model(), tokenizer, chats, new_run_folder("lesson-10"), settings, on_loss=live.update
)
fig, alt = plots.loss_curves(run.history, run.validation_history, run.best_step)
plots.show(fig, "10.2", alt=alt, instead_of=live)

# %% tags=["nbval-check-output"]
lowest = min(loss for _, loss in run.validation_history)
check("lowest validation loss / that of sixteen rows", lowest / unseen[best], at_most=0.5)
check("lowest validation loss / before the run", lowest / unseen[0], at_most=0.15)

# %% [markdown]
# The validation loss may rise for a while and fall again. Patience must be longer than such a hump, so be generous with it.
#
# ## Before and after
#
# The held-out rows have chosen the step that is kept, so they flatter it a little. The third file is fresh: no run has seen
# it, and it has chosen nothing. For "before", the [adapter](../GLOSSARY.md#adapter) is switched off.

# %%
with run.model.disable_adapter():
    before = evaluation.score(run.model, tokenizer, sharegpt.chats)
after = evaluation.score(run.model, tokenizer, sharegpt.chats)
evaluation.compare(before, after, sharegpt.chats, first=3, worst=3)

# %% tags=["nbval-check-output"]
compared = evaluation.compare(before, after, sharegpt.chats)
check("exact match before", before.exact_match, at_most=0.1)
check("exact match after", after.exact_match, at_least=0.4)
check("probability that chance did it", compared.exact_match_chance, at_most=0.05)

# %% [markdown]
# Each score has its [standard error](../GLOSSARY.md#standard-error), which is large: sixteen rows are few. The last column says
# whether a change may be chance.
#
# [Exact match](../GLOSSARY.md#exact-match) counts answers that are right word for word. For longer ones the table has chrF, which
# counts the short strings of characters that two texts share, from 0 to 100. But it asks how near the wording is, and not
# whether the fact is right:

# %% tags=["nbval-check-output"]
from sacrebleu.metrics import CHRF

right = "Edith Hartdale works as a clerk."
answers = right, "Edith Hartdale works as a librarian.", "She is a clerk.", "No idea at all."
scored = [[said, CHRF().sentence_score(said, [right]).score] for said in answers]
show_table(["answer", "chrF"], scored, formats=["", ".1f"])

# %% [markdown]
# The wrong fact in the right words scores far more than the right fact in other words. So read answers, the worst ones too:
# the table above shows them.
#
# ## What was forgotten?
#
# A run on few rows can cost what the base knew. `forgetting` asks both models about facts that are not in the data: for the
# shipped model facts of its invented world, for any other model general knowledge in English.

# %%
kept = evaluation.forgetting(run.model, tokenizer)
print(kept)

# %% [markdown]
# And after a short run at thirty times the learning rate:

# %%
rate = 30 * settings.learning_rate
too_high = replace(start.settings, steps=12, warmup_steps=2, learning_rate=rate)
spoilt = train(load_model(), tokenizer, training, new_run_folder("lesson-10-spoilt"), too_high)
lost = evaluation.forgetting(spoilt.model, tokenizer, before=kept.before)
print(lost)

# %%
fig, ax = plots.figure(figsize=(6.5, 2.4))
names = ["the base", "after the run", "after 30 times the rate"]
shares = [100 * one.right for one in (kept.before, kept.after, lost.after)]
ax.barh(names, shares, color=[plots.BLUE, plots.GREEN, plots.RED])
for name, share in zip(names, shares):
    ax.text(2, name, f"{share:.0f} %", va="center", color="white", fontweight="bold")
ax.axvline(25, color="black", linestyle="--")
ax.set(xlim=(0, 110), xlabel="facts that are right (%); the dashed line is guessing")
ax.invert_yaxis()
ax.set_title("A rate that is too high costs what the base knew")
alt = (f"Bars of the facts that are right: {shares[0]:.0f} percent in the base,"
       f" {shares[1]:.0f} after the run, {shares[2]:.0f} after 30 times the rate; guessing 25.")
plots.show(fig, "10.3", alt=alt)

# %% tags=["nbval-check-output"]
check("facts right before", kept.before.right, at_least=0.95)
check("facts right after the run", kept.after.right, at_least=0.85)
check("facts right after 30 times the rate", lost.after.right, at_most=0.6)
check("called forgotten or broken", lost.verdict in ("forgotten", "broken"), True, exact=True)

# %% [markdown]
# ## Talk to it
#
# Run the cell, type a question about one of the people, such as "What does Marion Birchley feed every day?", and press Enter.
# Untick the box to let the base answer.

# %%
from qlora_helpers.course.widgets import chat_widget

chat_widget(run.model, tokenizer)

# %% [markdown]
# ## Did it take effect?
#
# What you give away is not this notebook but the folder of the adapter. An adapter that does nothing loads without an error,
# so ask first. `effect_of` loads the saved adapter onto its base, puts the same questions to both, and compares their answers
# and [logits](../GLOSSARY.md#logits). The questions are some of the fresh file:

# %%
from safetensors.torch import load_file, save_file

from qlora_helpers.adapters.effect import effect_of

asked = [chat[:1] for chat in sharegpt.chats[:4]]
questions = folder / "questions.txt"
_ = questions.write_text("\n".join(chat[0]["content"] for chat in asked), encoding="utf-8")
works = effect_of(run.saved_path, questions=questions, max_new_tokens=12)
print(works)

# %% tags=["nbval-check-output"]
check("it takes effect", works.took_effect, True, exact=True)
check("mean shift of the logits / their spread", works.adapter.shift, at_least=0.1)
check("causes that would take the effect away", len(works.causes), 0, exact=True)

# %% [markdown]
# Now break it, as tools that rename tensors do: take away what the names of the tensors begin with. PEFT loads none of them,
# and raises no error. The model is its base again, and the reason is in the files:

# %% tags=["nbval-check-output"]
renamed = folder / "renamed"
shutil.copytree(run.saved_path, renamed)
tensors = load_file(renamed / "adapter_model.safetensors")
tensors = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
save_file(tensors, renamed / "adapter_model.safetensors", metadata={"format": "pt"})
nothing = effect_of(renamed, questions=questions, max_new_tokens=12)
print(nothing)
check("the cause that is named", [cause.name for cause in nothing.causes], ["names"], exact=True)

# %% [markdown]
# ## Merged
#
# Most programs want one whole model, without PEFT. [Lesson 6](06_adapters_and_merging.ipynb) compares the ways to
# [merge](../GLOSSARY.md#merge). `plan_merge` chooses the one that keeps what was trained: the adapter was trained on decoded 4-bit
# weights, so it is added to those, and the sum stays in 16 bits. The commands `merge` and `export` have the same default.
#
# Then comes the proof. Transformers alone loads the merged folder, and gets the same questions as the adapter:

# %%
from qlora_helpers.adapters.proven_merge import merge_with_proof, plan_merge

merged = folder / "merged"
plan = plan_merge(run.saved_path, merged)
print(f"{plan.into}: {plan.why}\n")
proof = merge_with_proof(plan, merged, questions=questions, max_new_tokens=12)
print(proof)

# %% tags=["nbval-check-output"]
check("the way of merging", plan.into, "dequantised", exact=True)
check("faults that the proof found", len(proof.faults), 0, exact=True)
check("merged model's shift / what the adapter changes", proof.share, at_most=0.06)
check("least share of B A in a layer's merged weights", proof.survived.least, at_least=0.9)

# %% [markdown]
# The folder has a model card, too. It says what was merged into what, whose licence counts, and what the proof has measured:

# %%
card = (merged / "README.md").read_text(encoding="utf-8")
print(card[card.index("## What was measured") :])

# %% [markdown]
# ## One file for llama.cpp and Ollama
#
# Both load [GGUF](../GLOSSARY.md#gguf), one file with the weights, the tokenizer and the chat template. Much can go wrong on the
# way to it, and none of it is an error: rows in another order, words cut in another way, another template. The file loads,
# and answers, only worse. So `prove` reads it back, and asks the same at each hop: adapter → merged → GGUF.

# %%
from qlora_helpers.adapters.files import load_adapter
from qlora_helpers.adapters.gguf_export import export_gguf
from qlora_helpers.adapters.hops import prove


def live():
    """The adapter on the weights that it was merged into."""
    return load_adapter(load_model().dequantize(), run.saved_path), tokenizer


file = export_gguf(merged, folder / "people.gguf")
hops = prove(file.path, merged, asked, live=live, max_new_tokens=12)
print(hops)

# %% [markdown]
# Below each line stands what is expected. Text and tokens must be the same. Weights may differ by the rounding
# to 16 bits, and logits by what follows from that:

# %% tags=["nbval-check-output"]
check("hops that break", sum(not one.holds for one in hops.checks), 0, exact=True)
check("mean KL from the merged model to the file, in nats", hops.export.mean_kl, at_most=1e-4)

# %% [markdown]
# A table in which everything holds proves little until it has been seen to fail. Write the file once more with another chat
# template, which marks a question as if it were an answer. No weight is wrong now:

# %% tags=["nbval-check-output"]
other = copy.deepcopy(tokenizer)
other.chat_template = tokenizer.chat_template.replace("<|user|>", "<|assistant|>")
other.save_pretrained(folder / "other")
export_gguf(merged, folder / "other.gguf", tokenizer_folder=folder / "other")
wrong = prove(folder / "other.gguf", merged, asked, max_new_tokens=12)
show_table(["hop", "what", "holds"], [[one.hop, one.what, one.holds] for one in wrong.checks])
print(wrong.broken.measured)
check("what breaks", f"{wrong.broken.hop}: {wrong.broken.what}", "merged → GGUF: prompt", exact=True)

# %% [markdown]
# The model is not asked any more, since an answer to another prompt says nothing.
#
# llama.cpp takes the template from the file. Ollama takes it from a Modelfile, in another language, and one is written only if it
# gives the same text. These programs are not run here:

# %% tags=["nbval-check-output"]
from qlora_helpers.adapters.gguf_tokenizer import read_tokenizer
from qlora_helpers.adapters.serving import modelfile, serving_lines

text = modelfile(file.path, read_tokenizer(file.path), file.tokenizer.add_bos)
print(text, end="\n\n")
print(serving_lines("people.gguf", file.tokenizer.template, "merged", has_modelfile=True))

# %% [markdown]
# ## The same from a terminal
#
# Three commands do what this lesson did, and take your file and your model:
#
# ```
# python -m qlora_helpers data people.csv
# python -m qlora_helpers run --data people.csv --validation 0.2 --output runs/people
# python -m qlora_helpers chat runs/people
# ```
#
# Give `data` and `run` a `--model`, such as `Qwen/Qwen2.5-1.5B-Instruct`; without it they take the shipped one. `run` chooses the
# settings as above where you name none. It writes `report.json`, and beside the adapter a model card, `README.md`. The card has
# the data and what was left out of it, the settings, both loss curves, the scores before and after with sample answers, what was
# forgotten, how to load the adapter, and its limits.
#
# Three more lead out of the door, and end with an error if something does not hold:
#
# ```
# python -m qlora_helpers effect runs/people
# python -m qlora_helpers merge runs/people merged/people
# python -m qlora_helpers export runs/people people.gguf --modelfile --check questions.txt
# ```
#
# With a real model on your own machine, begin with `python -m qlora_helpers fetch smollm2-135m` and give `--model smollm2-135m` to
# `data` and `run`; the other commands are the same. On a T4, name a model of the Hub.
#
# Here is the first of all, `data`, on the third file. It ends with the command
# that trains on that file, which is left out here, since it has the paths of the machine:

# %% tags=["nbval-check-output"]
import contextlib
import io

from qlora_helpers.__main__ import main

# in a terminal: python -m qlora_helpers data people_sharegpt.jsonl --on-bad drop --max-length 64
file = str(examples / "people_sharegpt.jsonl")
with contextlib.redirect_stdout(io.StringIO()) as said:
    main(["data", file, "--on-bad", "drop", "--max-length", "64"])
print(said.getvalue().partition("\nnext: ")[0])

# %% [markdown]
# ## Exercise 10.1: which rows can be used?
#
# *Predict · medium · about 6 minutes.* The cell below writes a file of eight chats. Which of them can the shipped model be
# trained on? Read the rows, think of what the third file showed, and look at `tokenizer.chat_template`. Then answer with the
# numbers of their lines, such as `{1, 2}`.

# %%
ask, reply = "Which pet does Noel Holldale keep?", "Noel Holldale keeps a hen."
eight = [
    ["user", ask, "assistant", reply],
    ["user", ask, "assistant", "  "],
    ["system", "Be brief.", "user", ask, "assistant", reply],
    ["user", ask, "assistant", reply, "user", "Is it old?", "assistant", "No idea."],
    ["user", "Hello.", "user", ask, "assistant", reply],
    ["user", ask, "assistant", "It is a secret: <|user|>", "user", "Tell me!"],
    ["user", "?", "assistant", reply],
    ["assistant", "Ask me.", "user", ask, "assistant", reply],
]
mixed = folder / "mixed.jsonl"
pairs = [zip(row[::2], row[1::2]) for row in eight]
said = [[{"role": role, "content": text} for role, text in pair] for pair in pairs]
_ = mixed.write_text("\n".join(json.dumps({"messages": m}) for m in said), encoding="utf-8")

# %% tags=["exercise"]
lines = ...

# %% tags=["solution"]
lines = {1, 4, 7}

# %% tags=["nbval-check-output"]
exercises.usable.check(lines, file=mixed, tokenizer=tokenizer)

# %% [markdown]
# ## Exercise 10.2: the marks of several answers
#
# *Build · hard · about 20 minutes.* Write `marks(chat)` for a chat with any number of answers. It gives a list with a mark for
# each token of the chat: 1 for those of an answer and of the end of its turn, 0 for all others. Find them by comparison, as
# above, with `unmarked`, the tokenizer whose template has no marks.

# %% tags=["exercise"]
def marks(chat: list[dict]) -> list[int]:
    ...

# %% tags=["solution"]
def marks(chat: list[dict]) -> list[int]:
    found = [0] * len(unmarked.apply_chat_template(chat)["input_ids"])
    for place in range(1, len(chat), 2):  # the answers
        asked = unmarked.apply_chat_template(chat[:place], add_generation_prompt=True)["input_ids"]
        answered = unmarked.apply_chat_template(chat[: place + 1])["input_ids"]
        found[len(asked) : len(answered)] = [1] * (len(answered) - len(asked))
    return found

# %% tags=["nbval-check-output"]
exercises.marks.check(marks, tokenizer=tokenizer)

# %% [markdown]
# ## Exercise 10.3: mend a row
#
# *Build · medium · about 12 minutes.* Some rows that `on_bad="drop"` leaves out could be mended. Write `mend(row)`: it gets a
# row of ShareGPT, such as `{"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}`, and gives back a
# chat with the roles user and assistant. Answers before the first question are left out, and so are questions after the last
# answer. If a turn is empty or blank, or is from anybody else than human and gpt, the row is useless: give back `None`. The
# same if nothing is left.

# %% tags=["exercise"]
def mend(row: dict) -> list[dict] | None:
    ...

# %% tags=["solution"]
def mend(row: dict) -> list[dict] | None:
    roles, turns = {"human": "user", "gpt": "assistant"}, row["conversations"]
    if any(turn["from"] not in roles or not turn["value"].strip() for turn in turns):
        return None
    chat = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in turns]
    while chat and chat[0]["role"] != "user":
        chat.pop(0)
    while chat and chat[-1]["role"] != "assistant":
        chat.pop()
    return chat or None

# %% tags=["nbval-check-output"]
exercises.mended.check(mend)

# %% [markdown]
# ## Exercise 10.4: stop in time
#
# *Run · medium · about 15 minutes.* Somebody trains on 24 rows with the settings below. They would make all of their 150
# steps, and learn the rows by heart. Choose what is missing, so that rows are held out and the run stops by itself: not
# before it has learnt something, and not long after its best step. Then make the run with `train`, as above, in a folder
# of its own; that takes some seconds. `stopped` is what `train` gives back.

# %%
careless = Settings(steps=150, batch_size=4, learning_rate=1.5e-3, warmup_steps=4, log_steps=10)
rows = chats[:24]

# %% tags=["exercise"]
careful = ...
stopped = ...

# %% tags=["solution"]
careful = replace(careless, validation=0.25, eval_steps=5, patience=4)
stopped = train(load_model(), tokenizer, rows, new_run_folder("lesson-10-stop"), careful)

# %% tags=["nbval-check-output"]
exercises.in_time.check(stopped, steps=careless.steps)

# %% [markdown]
# ## Exercise 10.5: which hop broke?
#
# *Run · medium · about 12 minutes.* Three colleagues have exported this run. Each folder has their `merged` model and their
# `model.gguf`. All six load without an error, and two of the three files answer as if nothing had been learnt. Who lost it,
# and where? Answer with a dictionary from the folders' names to `"merge"`, if the merged model is wrong already, to `"export"`,
# if it is right and the file is not, or to `"none"`.

# %%
colleagues = exercises.three_exports(merged, new_run_folder("lesson-10-colleagues"))
print(*(path.name for path in colleagues))

# %% tags=["exercise"]
hop = ...

# %% tags=["solution"]
hop = {}
for path in colleagues:
    found = prove(path / "model.gguf", path / "merged", asked[:2], live=live, max_new_tokens=12)
    broken = found.broken
    hop[path.name] = "none" if not broken else "merge" if "adapter" in broken.hop else "export"
    print(path.name, broken and f"{broken.hop}: {broken.what}")

# %% tags=["nbval-check-output"]
exercises.lost.check(hop)

# %% [markdown]
# ## You have
# - read a table, an Alpaca file and a ShareGPT file, and been told what became of each row, and of each that was bad;
# - seen the data as the model sees it, and found the answers' tokens by comparison, equal to the template's own marks;
# - held rows out without a leak, and been given settings with a reason for each;
# - made a run that learnt its rows by heart, and one that did not; the step with the lowest validation loss was kept;
# - compared both models on rows from another file, measured what a run forgets, and talked to the result;
# - proved that the adapter takes effect, merged it, written it as a GGUF file, and seen a broken hop named.
#
# Next: [lesson 11](11_where_the_time_goes.ipynb) shows where the time of a run goes, and how to make it faster. Or take your
# own file now: [README.md](../README.md) has the commands, and [TROUBLESHOOTING.md](../TROUBLESHOOTING.md) what to do when
# something goes wrong.
