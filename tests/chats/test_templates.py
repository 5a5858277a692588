"""The answer, with the end of its turn and nothing else, is found in every family of chat templates, or the chat is refused with the reason."""

import copy
import re
from pathlib import Path

import pytest
import trl
from transformers import PreTrainedTokenizerFast

from qlora_helpers.chats import stop_tokens, tokenized
from qlora_helpers.chats.templates import has_marks, mark, missing_text, rendered, special_tokens
from qlora_helpers.models.loading import load_tokenizer
from tests.chats import made_up
from tests.chats.made_up import CHATML, FAMILIES, IM, tokenizer_with

ONE = [
    {"role": "user", "content": "What is NF4?"},
    {"role": "assistant", "content": "A data type with sixteen values."},
]
TWO = [
    *ONE,
    {"role": "user", "content": "Why sixteen?"},
    {"role": "assistant", "content": "It has four bits,\n\nso sixteen."},
]
SYSTEM = {"role": "system", "content": "Be short, please."}


def spoken(row, tokenizer):
    """The marked tokens as text, one for each run of them."""
    runs, previous = [], 0
    for token, marked in zip(row["input_ids"], row["assistant_masks"], strict=True):
        if marked and not previous:
            runs.append([])
        if marked:
            runs[-1].append(token)
        previous = marked
    return [tokenizer.decode(run) for run in runs]


def fault(chat, tokenizer):
    rows, faults = mark({7: chat}, tokenizer)
    assert not rows
    return faults[7]


@pytest.fixture(scope="module")
def tokenizers():
    return {name: family.tokenizer() for name, family in FAMILIES.items()}


# Every family


@pytest.mark.parametrize("name", FAMILIES)
def test_the_marks_are_the_answer_and_the_end_of_its_turn(name, tokenizers):
    family, tokenizer = FAMILIES[name], tokenizers[name]
    (row,) = tokenized([ONE], tokenizer)
    (said,) = spoken(row, tokenizer)
    assert said.strip() == family.before + ONE[1]["content"] + (" " if name == "Llama 2" else "") + family.end
    text = tokenizer.apply_chat_template(ONE, tokenize=False)
    assert row["input_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", FAMILIES)
def test_what_generation_is_given_is_the_beginning_of_what_is_trained_up_to_the_first_mark(name, tokenizers):
    tokenizer = tokenizers[name]
    asked = tokenizer.apply_chat_template(ONE[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
    (row,) = tokenized([ONE], tokenizer)
    assert row["input_ids"][: len(asked)] == asked
    assert row["assistant_masks"].index(1) == len(asked)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.several])
def test_each_answer_of_a_longer_chat_is_marked_with_its_end(name, tokenizers):
    family, tokenizer = FAMILIES[name], tokenizers[name]
    (row,) = tokenized([TWO], tokenizer)
    said = [
        text.strip().removeprefix(family.before).removesuffix(family.end).strip() for text in spoken(row, tokenizer)
    ]
    assert said == [ONE[1]["content"], TWO[3]["content"]]
    assert all(text.endswith(family.end) for text in spoken(row, tokenizer))


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if not family.several])
def test_a_template_that_changes_earlier_answers_takes_one_answer_per_chat(name, tokenizers):
    said = fault(TWO, tokenizers[name])
    assert said.startswith("the chat template changes earlier messages when others follow: message 2 (assistant)")
    assert said.endswith("Make it several chats of one question and one answer each")


def test_a_system_message_in_the_last_question_is_another_prompt_for_the_first_answer(tokenizers):
    assert tokenized([[SYSTEM, *ONE]], tokenizers["Mistral"])
    assert "changes earlier messages when others follow: message 3" in fault([SYSTEM, *TWO], tokenizers["Mistral"])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_system_message_is_taken_or_its_loss_is_said(name, tokenizers):
    family, tokenizer = FAMILIES[name], tokenizers[name]
    chat = [SYSTEM, *ONE]
    if family.system == "taken":
        (row,) = tokenized([chat], tokenizer)
        assert SYSTEM["content"] in tokenizer.decode(row["input_ids"])
        assert len(spoken(row, tokenizer)) == 1 and SYSTEM["content"] not in spoken(row, tokenizer)[0]
    else:
        said = fault(chat, tokenizer)
        how = "leaves out 'Be short, please.', of message 1 (system)" if family.system == "left out" else "refuses it: "
        assert said.startswith(f"the chat template {how}")
        assert said.endswith("put its text at the beginning of the first question")


def test_an_answer_that_looks_like_the_template_is_found(tokenizers):
    for name in ("Phi-3", "Qwen2.5", "gpt-oss", "Llama 3", "Qwen3"):
        for text in ("end", "a", "<", "im_end", "assistant", "\n\nfinal\n", "What is NF4?", "1", "<think>"):
            if name == "Qwen3" and text == "<think>":
                continue
            chat = [ONE[0], {"role": "assistant", "content": text}]
            (row,) = tokenized([chat], tokenizers[name])
            (said,) = spoken(row, tokenizers[name])
            family = FAMILIES[name]
            assert said.removeprefix(family.before).removesuffix(family.end).strip() == text.strip(), (name, text)


def test_thoughts_are_learnt_with_the_answer_however_the_template_spaces_them(tokenizers):
    chat = [ONE[0], {"role": "assistant", "content": "<think>Four bits.</think>Sixteen values."}]
    (row,) = tokenized([chat], tokenizers["Qwen3"])
    assert spoken(row, tokenizers["Qwen3"]) == ["<think>\nFour bits.\n</think>\n\nSixteen values.<|im_end|>"]


# What is refused


def test_a_prompt_that_is_no_beginning_of_the_training_text_is_refused_with_what_differs():
    tokenizer = tokenizer_with(made_up.R1, ("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"))
    assert fault(ONE, tokenizer) == (
        "the chat template asks for message 2 (assistant) with '<think>\\n', where the text for training has "
        "'A data type with six': the model would be trained on one text and asked with another. Use a chat_template that "
        "writes the same in both"
    )


def test_the_cure_by_enable_thinking_is_named_where_it_helps_and_helps():
    tokenizer = tokenizer_with(made_up.PREFILLED, IM)
    said = fault(ONE, tokenizer)
    setting = "{% set enable_thinking = false %}"
    assert said.endswith(f"Put {setting!r} in front of tokenizer.chat_template")
    tokenizer.chat_template = setting + tokenizer.chat_template
    (row,) = tokenized([ONE], tokenizer)
    assert spoken(row, tokenizer) == ["A data type with sixteen values.<|im_end|>"]


def test_a_message_that_the_template_leaves_out_is_named():
    only_last = CHATML.replace("in messages %}", "in messages[-2:] %}")
    assert fault(TWO, tokenizer_with(only_last, IM)).startswith(
        "the chat template leaves out 'What is NF4?', of message 1 (user)"
    )
    cut = CHATML.replace("m.content +", "m.content[:12] +")
    assert fault(ONE, tokenizer_with(cut, IM)).startswith(
        "the chat template leaves out 'A data type with sixteen values.', of message 2 (assistant)"
    )


@pytest.mark.parametrize("after", ["", "\n", "\n### End"])
def test_an_answer_without_an_end_is_refused(after):
    template = CHATML.replace(
        "m.content + '<|im_end|>\n'", f"m.content + ('<|im_end|>\n' if m.role == 'user' else '{after}')"
    )
    said = fault(ONE, tokenizer_with(template, IM))
    shown = repr(after) if after.strip() else "nothing"
    assert said.startswith(f"the chat template writes no special token after message 2 (assistant), but {shown}: ")
    assert said.endswith(
        "the model would never learn to stop. Let the template write {{ eos_token }} after each answer"
    )


def test_the_next_turn_is_no_end_of_an_answer():
    template = CHATML.replace("m.content + '<|im_end|>\n'", "m.content")
    assert "no special token after message 2 (assistant), but '<|im_start|>user" in fault(
        TWO, tokenizer_with(template, IM)
    )


def test_an_end_that_is_no_token_of_this_tokenizer_is_no_end():
    other = tokenizer_with(CHATML.replace("<|im_end|>", "<|stop|>"), IM)
    assert "writes no special token after message 2 (assistant), but '<|stop|>" in fault(ONE, other)


def test_a_text_that_begins_twice_is_refused():
    once, twice = (tokenizer_with("{{ bos_token }}" * count + CHATML, IM) for count in (1, 2))
    assert tokenized([ONE], once)
    assert fault(ONE, twice) == "the text begins with '<s>' twice: take one of them out of the chat template"
    with pytest.raises(
        ValueError, match=r"chat 1: the text begins with '<s>' twice.* \(chats with a fault like this: 2\)$"
    ):
        tokenized([ONE, ONE], twice)


def test_a_prompt_that_the_tokenizer_joins_with_the_answer_is_refused():
    joined = made_up.VICUNA.replace("'ASSISTANT:'", "'ASSISTANT: '")
    said = fault(ONE, tokenizer_with(joined))
    assert said.startswith("the tokenizer joins the end of the prompt of message 2 with the beginning of the answer")
    shown = re.search(r"asked with '(.*?)', the model", said)[1]  # the end of the prompt
    assert len(shown) == 20 and shown.endswith(" ASSISTANT: ")


def test_a_pad_token_that_is_also_the_end_is_marked_all_the_same():
    tokenizer = tokenizer_with(CHATML, IM, eos="<|im_end|>")
    tokenizer.pad_token = tokenizer.eos_token
    (row,) = tokenized([ONE], tokenizer)
    assert row["assistant_masks"][-2:] == [1, 0] and row["input_ids"][-2] == tokenizer.pad_token_id


def test_bad_chats_are_named_and_the_others_are_marked():
    tokenizer = FAMILIES["Gemma"].tokenizer()
    rows, faults = mark({1: ONE, 5: [SYSTEM, *ONE], 9: TWO}, tokenizer)
    assert list(rows) == [1, 9] and list(faults) == [5]
    with pytest.raises(
        ValueError, match=r"^chat 2: the chat template refuses it: no place for a system message\. Without"
    ):
        tokenized([ONE, [SYSTEM, *ONE], TWO], tokenizer)


# Templates with marks of their own


MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_marks_of_the_template_are_taken_as_they_are_and_equal_those_by_comparison():
    plain, marked = tokenizer_with(CHATML, IM), tokenizer_with(MARKED, IM)
    assert tokenized([ONE, TWO], marked) == tokenized([ONE, TWO], plain)
    wider = tokenizer_with(MARKED.replace("{% endgeneration %}{{ '\n' }}", "{{ '\n' }}{% endgeneration %}"), IM)
    assert spoken(tokenized([ONE], wider)[0], wider) == ["A data type with sixteen values.<|im_end|>\n"]


def test_marks_without_the_end_are_refused():
    early = MARKED.replace(
        "m.content + '<|im_end|>' }}{% endgeneration %}", "m.content }}{% endgeneration %}{{ '<|im_end|>' }}"
    )
    assert early.count("endgeneration") == 1 and fault(ONE, tokenizer_with(early, IM)).startswith(
        "the chat template does not mark the token that ends an answer, so the model would never learn to stop"
    )


def test_marks_around_nothing_are_refused():
    empty = CHATML + "{% if false %}{% generation %}{% endgeneration %}{% endif %}"
    assert fault(ONE, tokenizer_with(empty, IM)).startswith("the chat template marks no answer in it")


def test_a_marked_template_that_asks_otherwise_than_it_trains_is_refused():
    otherwise = MARKED.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>model\n' }}")
    assert "asks for message 2 (assistant) with 'model\\n', where the text for training has 'assistant" in fault(
        ONE, tokenizer_with(otherwise, IM)
    )


def test_a_marked_template_that_leaves_out_the_system_message_is_refused():
    without = MARKED.replace("in messages %}", "in messages if m.role != 'system' %}")
    assert "leaves out 'Be short, please.', of message 1 (system)" in fault([SYSTEM, *ONE], tokenizer_with(without, IM))


@pytest.mark.parametrize(
    ("template", "marks"),
    [
        (None, False),
        (CHATML, False),
        (MARKED, True),
        ("{%- generation -%}", True),
        ("{%generation%}", True),
        ("{%+ generation +%}", True),
        ("a generation %} b", False),
        ("{% set generation = 1 %}", False),
    ],
)
def test_marks_are_recognised_however_they_are_spaced(template, marks):
    assert has_marks(template) is marks


def test_the_shipped_template_and_the_same_without_marks_give_the_same_rows():
    marked, plain = load_tokenizer(), load_tokenizer()
    plain.chat_template = plain.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    assert has_marks(marked.chat_template) and not has_marks(plain.chat_template)
    assert tokenized([ONE, TWO], plain) == tokenized([ONE, TWO], marked)


# TRL's marked templates: what they mark beside the answer is text that a model need not learn

TRLS = Path(trl.__file__).parent / "chat_templates"
NOT_SPECIAL = (
    "tool",
    "think",
    "TOOL",
    "function",
    "IMPORTANT",
    "parameter",
)  # text of the templates, or no special tokens
BREAK_AFTER = ("", "\n")
THOUGHT_BEFORE = ("<think>\n", "\n")
# the text that TRL's mark has beside ours: before it, and after it
BESIDE = {
    "cohere": ("", ""), "cohere2": ("", ""), "llama3": ("", ""),
    "gemma": BREAK_AFTER, "gemma3": BREAK_AFTER, "diffusion_gemma": BREAK_AFTER, "lfm2": BREAK_AFTER, "lfm2_v2": BREAK_AFTER,
    "qwen2_5_vl": BREAK_AFTER, "qwen3": BREAK_AFTER, "qwen3_vl": BREAK_AFTER, "qwen3_instruct_2507": BREAK_AFTER,
    "qwen2_5": ("\n", "\n"), "phi3": ("", "\n</s>"), "phi3_5": ("", "\n</s>"),
    "qwen3_5_nothink": ("<think>\n\n</think>\n\n", "\n"),
    "qwen3_5_think": THOUGHT_BEFORE, "qwen3_6": THOUGHT_BEFORE, "qwen3_8": THOUGHT_BEFORE,
    "gptoss": ("<|start|>assistant", ""), "muse_glimmer": ("<|start|>assistant", ""),
}  # fmt: skip
REFUSED = {  # the original, and TRL's marked version
    "deepseekv3": ("asks for message 2", "asks for message 2"),
    "deepseek_r1_distill": ("asks for message 2", "asks for message 2"),
    "nemotron_3_nano": ("asks for message 2", "asks for message 2"),
    "nemotron_3_super": ("asks for message 2", "asks for message 2"),
    "nemotron_3_ultra": ("asks for message 2", "asks for message 2"),
    "nemotron_3_5_lightning": ("asks for message 2", "asks for message 2"),
    "glm4moe": ("writes no special token after message 2 (assistant), but nothing", None),
    "idefics3": ("leaves out", "leaves out"), "smolvlm": ("leaves out", "leaves out"), "llava_next": ("refuses it", "refuses it"),
}  # fmt: skip


def of_trl(name):
    """A tokenizer with the original template, and one with TRL's marked version of it."""
    original = (TRLS / f"{name}.jinja").read_text(encoding="utf-8")
    found = re.findall(r"<\|?[A-Za-z_▁｜|/]+\|?>|<｜[^｜]+｜>|\[/?[A-Z_]+\]", original)
    plain = tokenizer_with(original, sorted({name for name in found if not any(word in name for word in NOT_SPECIAL)}))
    marked = copy.deepcopy(plain)
    marked.chat_template = (TRLS / f"{name}_training.jinja").read_text(encoding="utf-8")
    return plain, marked


@pytest.mark.parametrize("name", BESIDE)
def test_the_answer_by_comparison_is_what_trl_marks_but_for_text_that_a_model_need_not_learn(name):
    plain, marked = of_trl(name)
    assert has_marks(marked.chat_template) and not has_marks(plain.chat_template)
    (ours,), (theirs,) = tokenized([ONE], plain), tokenized([ONE], marked)
    assert ours["input_ids"] == theirs["input_ids"]
    before, after = BESIDE[name]
    assert spoken(theirs, marked) == [before + spoken(ours, plain)[0] + after]
    # what they mark before it is in the prompt, and what they mark after it comes when generation has stopped
    prompt = plain.apply_chat_template(ONE[:1], add_generation_prompt=True, tokenize=False)
    assert prompt.endswith(before)
    said = [id for id, marked in zip(ours["input_ids"], ours["assistant_masks"], strict=True) if marked]
    assert said[-1] in special_tokens(plain) and set(said) & set(stop_tokens(plain))


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_of_trls_templates_is_refused_for_its_reason(name):
    for tokenizer, said in zip(of_trl(name), REFUSED[name], strict=True):
        if said is None:
            assert tokenized([ONE], tokenizer)
        else:
            assert said in fault(ONE, tokenizer)


def test_every_marked_template_of_trl_is_held():
    installed = {path.stem.removesuffix("_training") for path in TRLS.glob("*_training.jinja")}
    assert installed == {*BESIDE, *REFUSED}


def test_deepseeks_distilled_models_learn_answers_with_thoughts():
    _, marked = of_trl("deepseek_r1_distill")
    assert fault(ONE, marked).endswith(
        r"Begin each answer with its thoughts, such as '<think>\n\n</think>\n\n' for none"
    )
    with_thoughts = [ONE[0], {"role": "assistant", "content": "<think>\n\n</think>\n\n" + ONE[1]["content"]}]
    assert tokenized([with_thoughts], marked)


# The parts


def test_the_tokens_that_stop_an_answer(tokenizers):
    names = {name: tokenizers[name].convert_ids_to_tokens(stop_tokens(tokenizers[name])) for name in FAMILIES}
    assert names["ChatML"] == ["<|im_end|>"] and names["Llama 2"] == ["</s>"]
    assert names["Gemma"] == ["<eos>", "<end_of_turn>"] and names["Phi-3"] == ["<|endoftext|>", "<|end|>"]
    assert names["Command R"] == ["<|END_OF_TURN_TOKEN|>", "<|END_RESPONSE|>"]
    assert stop_tokens(load_tokenizer()) == [load_tokenizer().eos_token_id]
    no_end = tokenizer_with(CHATML.replace("<|im_end|>", ""), IM)
    assert stop_tokens(no_end) == [no_end.eos_token_id]


def test_a_text_with_other_white_space_is_not_missing():
    assert missing_text([{"role": "user", "content": " a  b\nc "}], "user: a b c") == ""
    assert "leaves out 'a  b\\nc d'" in missing_text([{"role": "user", "content": "a  b\nc d"}], "user: a b c")


def test_a_message_must_come_after_the_one_before_it():
    question, reply = ONE
    assert missing_text(ONE, f"{question['content']} {reply['content']}") == ""
    assert "of message 2 (assistant)" in missing_text(ONE, f"{reply['content']} {question['content']}")


def test_texts_are_rendered_all_at_once_and_one_by_one_only_if_one_is_refused(monkeypatch):
    tokenizer, calls = FAMILIES["Gemma"].tokenizer(), []
    template = PreTrainedTokenizerFast.apply_chat_template

    def counted(self, chats, *args, **options):
        calls.append(chats)
        return template(self, chats, *args, **options)

    monkeypatch.setattr(PreTrainedTokenizerFast, "apply_chat_template", counted)
    assert len(rendered({1: ONE, 2: TWO}, tokenizer)[0]) == 2 and len(calls) == 1
    texts, refused = rendered({1: ONE, 2: [SYSTEM, *ONE], 3: TWO}, tokenizer)
    assert list(texts) == [1, 3] and list(refused) == [2]


def test_a_template_by_name_is_found_in_a_dictionary_of_them():
    tokenizer = tokenizer_with({"default": CHATML, "tool_use": ""}, IM)
    assert tokenized([ONE], tokenizer) == tokenized([ONE], tokenizer_with(CHATML, IM))
