"""What a tokenizer cannot take is named; the chat template that ships with the course marks what the assistant says."""

import json

import pytest

from qlora_helpers.chats import ChatError, count_tokens, read_chats
from qlora_helpers.models.loading import load_tokenizer
from tests.support.chats import GOOD, chat


def with_template(template):
    tokenizer = load_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("message['content'] + 1", "TypeError: "),
        ("1 / (message['content'] | length - 4)", "ZeroDivisionError: division by zero"),
        ("message['content'][0:1].pop()", "'str object' has no attribute 'pop'"),
        ("message.tool.name", "'dict object' has no attribute 'tool'"),
        ("raise_exception('never\\nso')", "never so"),
        ("range(10 ** 30)", "OverflowError: "),
    ],
)
def test_a_template_that_fails_in_any_way_names_the_chats_it_fails_for(expression, said, write):
    template = (
        "{% for message in messages %}{% if message['content'] == 'Fail' %}{{ "
        + expression
        + " }}{% endif %}{{ message['content'] }}{% endfor %}"
    )
    bad = chat(("user", "Fail"), ("assistant", "x"))
    path = write(GOOD, bad, GOOD, bad)
    for max_length in (None, 64):
        with pytest.raises(ChatError) as caught:
            read_chats(path, with_template(template), max_length)
        lines = str(caught.value).splitlines()
        assert [line.partition(": ")[0] for line in lines] == [f"{path}, line {number}" for number in (2, 4)]
        assert all(f": the chat template refuses it: {said}" in line for line in lines)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "tokenizer.chat_template is not set: take the tokenizer of a model that was made for chats"),
        ("{% for %}", "tokenizer.chat_template is no Jinja template"),
    ],
)
def test_a_template_that_is_none_is_no_fault_of_a_line(template, said, write):
    with pytest.raises(ValueError, match=said) as caught:
        read_chats(write(GOOD), with_template(template))
    assert not isinstance(caught.value, ChatError)


TYPED = [
    chat(("user", "Where?"), ("assistant", "Here.<|end|><|user|>And?")),
    chat(("user", "What is <|reserved_3|>?"), ("assistant", "Nothing.")),
]


def test_a_special_token_that_is_typed_into_a_text_is_named(write, tokenizer):
    path = write(TYPED[0], GOOD, TYPED[1])
    with pytest.raises(ChatError) as caught:
        read_chats(path, tokenizer)
    cure = "which this tokenizer takes for a special token: leave it out, or put a space into it"
    assert str(caught.value).splitlines() == [
        f"{path}, line 1: message 2 (assistant) has '<|end|>' in its text, {cure}",
        f"{path}, line 3: message 1 (user) has '<|reserved_3|>' in its text, {cure}",
    ]
    assert read_chats(path) == [TYPED[0], GOOD, TYPED[1]]  # without a tokenizer no text is special


def test_a_text_that_looks_like_a_special_token_is_text(write):
    tokenizer = load_tokenizer()
    tokenizer.add_tokens(["<think>"])  # as Qwen's: one token, and yet text that a model is to write
    chats = [chat(("user", "< |end|> <|END|> <|im_end|> <s>"), ("assistant", "<think>\n</think> Here."))]
    assert read_chats(write(*chats), tokenizer) == chats


def test_an_unknown_character_is_no_special_token_unless_that_is_typed(write):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", chat_template=template)
    assert tokenizer("b")["input_ids"] == [0]
    assert len(read_chats(write(chat(("user", "a"), ("assistant", "b"))), tokenizer)) == 1
    with pytest.raises(ChatError, match=r"line 1: message 2 \(assistant\) has '<unk>' in its text"):
        read_chats(write(chat(("user", "a"), ("assistant", "<unk>"))), tokenizer)


def test_a_chat_of_more_tokens_than_allowed_is_named(write, tokenizer):
    length = count_tokens(GOOD, tokenizer)
    long = chat(("user", "Where? " * 20), ("assistant", "Here."))
    path = write(GOOD, long)
    with pytest.raises(ChatError) as caught:
        read_chats(path, tokenizer, max_length=length)
    fault = f"{count_tokens(long, tokenizer)} tokens, over max_length={length}: the answer would be cut. Raise max_length or shorten the chat"
    assert str(caught.value) == f"{path}, line 2: {fault}"


def test_a_chat_of_exactly_as_many_tokens_as_allowed_is_read(write, tokenizer):
    path = write(GOOD)
    length = count_tokens(GOOD, tokenizer)
    assert read_chats(path, tokenizer, max_length=length) == [GOOD]
    with pytest.raises(ChatError, match=f"{length} tokens, over max_length={length - 1}"):
        read_chats(path, tokenizer, max_length=length - 1)


def test_tokens_are_those_that_the_model_is_given(tokenizer):
    text = tokenizer.apply_chat_template(GOOD, tokenize=False)
    assert count_tokens(GOOD, tokenizer) == len(tokenizer(text, add_special_tokens=False)["input_ids"])


def spoken_tokens(messages, tokenizer):
    """The tokens that the template marks as the assistant's, as one text for each consecutive run of them."""
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    runs, previous = [], 0
    for token, spoken in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True):
        if spoken and not previous:
            runs.append([])
        if spoken:
            runs[-1].append(token)
        previous = spoken
    return [tokenizer.decode(run).strip() for run in runs]


def test_the_template_marks_exactly_the_answer_and_its_eos_token(tokenizer):
    messages = chat(("user", "Where does Carl Kirkcroft live?"), ("assistant", "Carl Kirkcroft lives in Easthaven."))
    assert spoken_tokens(messages, tokenizer) == ["Carl Kirkcroft lives in Easthaven.<|end|>"]


def test_the_template_marks_both_answers_of_two_turns(tokenizer):
    messages = chat(("user", "Where?"), ("assistant", "In Easthaven."), ("user", "When?"), ("assistant", "In 1950."))
    assert spoken_tokens(messages, tokenizer) == ["In Easthaven.<|end|>", "In 1950.<|end|>"]


def test_a_question_ready_to_be_answered_is_the_beginning_of_the_training_text(tokenizer):
    asked = tokenizer.apply_chat_template(GOOD[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
    trained = tokenizer.apply_chat_template(GOOD, return_dict=True, return_assistant_tokens_mask=True)
    assert trained["input_ids"][: len(asked)] == asked
    assert trained["assistant_masks"] == [0] * len(asked) + [1] * (len(trained["input_ids"]) - len(asked))


def test_a_chat_that_the_template_refuses_is_named(tmp_path):
    path = tmp_path / "chats.jsonl"
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path.write_text(json.dumps({"messages": chat}))
    with pytest.raises(ChatError, match="line 1: the chat template refuses it: this model knows the roles"):
        read_chats(path, load_tokenizer(), 64)
