"""Every fault in a chat file is found and named; the files and the chat template that ship with the course are right."""

import json

import pytest

from qlora_helpers.chats import ChatError, count_tokens, fault_in, read_chats, split_question
from qlora_helpers.models.loading import load_tokenizer
from qlora_helpers.paths import data_path
from qlora_helpers.settings import Settings

GOOD = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."}]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture
def write(tmp_path):
    """Write lines, given as text or as chats, to a file; return its path."""

    def to_file(*lines):
        path = tmp_path / "chats.jsonl"
        texts = [line if isinstance(line, str) else json.dumps({"messages": line}) for line in lines]
        path.write_text("".join(text + "\n" for text in texts), encoding="utf-8")
        return path

    return to_file


def chat(*turns):
    return [dict(zip(("role", "content"), turn, strict=True)) for turn in turns]


# What is wrong with one chat


@pytest.mark.parametrize(
    "messages",
    [
        GOOD,
        GOOD + GOOD,
        chat(("system", "Be brief."), ("user", "Where?"), ("assistant", "Here.")),
    ],
    ids=["one turn", "two turns", "with a system message"],
)
def test_a_good_chat_has_no_fault(messages):
    assert fault_in({"messages": messages}) is None


@pytest.mark.parametrize("row", [None, 3, "text", [GOOD], {}, {"messages": []}, {"messages": "hello"}, {"text": "a"}])
def test_a_row_without_messages(row):
    assert fault_in(row) == 'no messages: expected {"messages": [...]} with at least one message'


@pytest.mark.parametrize(
    "message", ["hello", None, {}, {"role": "user"}, {"role": "user", "content": None}, {"role": "user", "content": []}]
)
def test_a_message_without_text(message):
    assert fault_in({"messages": [GOOD[0], message]}) == 'message 2 is not {"role": "…", "content": "…"}'


@pytest.mark.parametrize(
    ("messages", "fault"),
    [
        (
            chat(("user", "Where?"), ("bot", "Here.")),
            "message 2 has the unknown role 'bot': use one of system, user, assistant",
        ),
        ([{"content": "Where?"}], "message 1 has the unknown role None: use one of system, user, assistant"),
        (
            chat(("user", "Where?"), ("system", "Be brief."), ("assistant", "Here.")),
            "message 2 has the role 'system', which may only come first",
        ),
        (
            chat(("user", "Where?"), ("user", "When?"), ("assistant", "Here.")),
            "messages 1 and 2 both have the role 'user'",
        ),
        ([*GOOD, GOOD[1]], "messages 2 and 3 both have the role 'assistant'"),
        (chat(("user", " \n"), ("assistant", "Here.")), "message 1 (user) is an empty message"),
        (chat(("system", ""), *[tuple(m.values()) for m in GOOD]), "message 1 (system) is an empty message"),
        (chat(("user", "Where?"), ("assistant", "")), "message 2 (assistant) is an empty answer"),
        (chat(("assistant", "Here.")), "message 1 is an answer without a question"),
        (chat(("system", "Be brief."), ("assistant", "Here.")), "message 2 is an answer without a question"),
        (GOOD[:1], "the last message is not an answer: there is nothing to learn from this chat"),
        (GOOD + GOOD[:1], "the last message is not an answer: there is nothing to learn from this chat"),
    ],
)
def test_a_fault_in_the_messages_is_named(messages, fault):
    assert fault_in({"messages": messages}) == fault


# A whole file


def test_a_good_file_gives_its_chats_in_order(write):
    other = chat(("user", "Où ?"), ("assistant", "Là-bas."))
    assert read_chats(write(GOOD, other)) == [GOOD, other]


def test_empty_lines_are_allowed_and_still_counted(write):
    path = write("", GOOD, "   ", "{")
    with pytest.raises(ChatError, match=r"^\S*chats\.jsonl, line 4: "):
        read_chats(path)
    assert read_chats(write("", GOOD, "  ")) == [GOOD]


def test_a_line_that_is_not_json_is_named_with_file_line_and_column(write):
    path = write(GOOD, '{"messages": [}')
    with pytest.raises(ChatError) as caught:
        read_chats(path)
    assert str(caught.value) == f"{path}, line 2: not JSON: Expecting value at column 15"


def test_every_bad_line_of_a_file_is_reported(write):
    path = write(GOOD, "not json", GOOD[:1], GOOD, '{"messages": []}')
    with pytest.raises(ChatError) as caught:
        read_chats(path)
    assert str(caught.value).splitlines() == [
        f"{path}, line 2: not JSON: Expecting value at column 1",
        f"{path}, line 3: the last message is not an answer: there is nothing to learn from this chat",
        f'{path}, line 5: no messages: expected {{"messages": [...]}} with at least one message',
    ]


def test_after_twenty_bad_lines_the_others_are_counted(write):
    with pytest.raises(ChatError) as caught:
        read_chats(write(*["{"] * 23))
    lines = str(caught.value).splitlines()
    assert len(lines) == 21
    assert "line 20: " in lines[19] and lines[20] == "… and 3 more"


def test_twenty_bad_lines_are_all_named(write):
    with pytest.raises(ChatError) as caught:
        read_chats(write(*["{"] * 20))
    assert len(str(caught.value).splitlines()) == 20


@pytest.mark.parametrize("lines", [(), ("", "  ")], ids=["empty file", "empty lines"])
def test_a_file_without_a_chat_is_refused(write, lines):
    path = write(*lines)
    with pytest.raises(ChatError) as caught:
        read_chats(path)
    assert str(caught.value).startswith(f"path={str(path)!r}: there is no chat in this file. Each line must be one: {{")


@pytest.mark.parametrize("name", ["nowhere.jsonl", "."])
def test_a_file_that_cannot_be_read_names_the_argument_and_the_cure(name, tmp_path):
    with pytest.raises(OSError, match=r"path='.*' cannot be read \(.+\): name a JSONL file, one chat per line"):
        read_chats(tmp_path / name)


NOT_A_CHAT = [
    ('{"messages": [], "messages": []}', "not JSON that can be trusted: the key 'messages' is there twice"),
    ('{"messages": NaN}', "not JSON: NaN is no value of JSON"),
    ('{"messages": [], "weight": -Infinity}', "not JSON: -Infinity is no value of JSON"),
    ('{"messages": ' + "9" * 5_000 + "}", "not JSON that Python reads: Exceeds the limit (4300 digits)"),
    ("[" * 100_000, "not JSON that Python reads: it is nested too deeply"),
    ('{"messages": [{"role": "user", "content": "a\\ud83d b"}]}', 'message 1 (user) has half a surrogate pair (\\ud83d) at'),
    ('{"messages": [{"role": "\\ud83d", "content": "a"}]}', "message 1 has the unknown role '\\ud83d'"),
    ('{"messages": [{"role": ' + "[" * 500 + "]" * 500 + ', "content": "a"}]}', "message 1 has the unknown role [[["),
    ("\0", "not JSON: Expecting value at column 1"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "fault"), NOT_A_CHAT, ids=[line[:40] for line, _ in NOT_A_CHAT])
def test_whatever_a_line_is_it_is_named_and_the_lines_after_it_are_read(line, fault, write):
    path = write(GOOD, line, GOOD, "{")
    with pytest.raises(ChatError) as caught:
        read_chats(path)
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"{path}, line 2: {fault}") and len(first) < 400 + len(str(path))
    assert second.startswith(f"{path}, line 4: not JSON: ")


def test_a_byte_order_mark_is_no_fault_and_utf_16_is_named(tmp_path):
    path = tmp_path / "chats.jsonl"
    line = json.dumps({"messages": GOOD}) + "\r\n"
    path.write_bytes(line.encode("utf-8-sig"))  # as Windows' Notepad may save it
    assert read_chats(path) == [GOOD]
    path.write_bytes(line.encode("utf-16"))
    with pytest.raises(ChatError, match=r"^path='.*': this file is in UTF-16: save it in UTF-8$"):
        read_chats(path)


# With a tokenizer


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


def test_a_limit_without_a_tokenizer_is_refused(write):
    with pytest.raises(ValueError, match="max_length=64 is counted in tokens: pass the tokenizer too"):
        read_chats(write(GOOD), max_length=64)


@pytest.mark.parametrize("length", [0, -1, 1.5, "64"])
def test_a_limit_that_is_not_a_number_of_tokens_is_refused(write, tokenizer, length):
    with pytest.raises(
        ValueError, match=f"max_length={length!r}: must be a whole number, 1 or more, or None for any length"
    ):
        read_chats(write(GOOD), tokenizer, max_length=length)


def test_the_question_is_all_before_the_last_answer():
    assert split_question(GOOD) == (GOOD[:1], "Here.")
    assert split_question(GOOD + GOOD) == (GOOD + GOOD[:1], "Here.")


# What ships with the course


@pytest.mark.parametrize(("name", "count"), [("train", 4800), ("test", 500)])
def test_the_shipped_files_read_cleanly_within_the_default_length(name, count, tokenizer):
    chats = read_chats(data_path("chats", f"{name}.jsonl"), tokenizer, Settings().max_length)
    assert len(chats) == count


def people_in(name):
    """The full names in a shipped file: an answer begins with its person's two names."""
    chats = read_chats(data_path("chats", f"{name}.jsonl"))
    names = {" ".join(messages[-1]["content"].split()[:2]) for messages in chats}
    assert len(names) == len(chats)  # one question each
    return names


def test_no_person_of_the_test_file_occurs_anywhere_in_the_training_file():
    training_text = data_path("chats", "train.jsonl").read_text(encoding="utf-8")
    assert not [name for name in people_in("test") if name in training_text]


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


WITH_LINE_SEPARATORS = [{"role": "user", "content": "a\u2028b\x85c"}, {"role": "assistant", "content": "x"}]


def test_characters_that_python_takes_for_line_ends_may_be_in_a_text(tmp_path):
    path = tmp_path / "chats.jsonl"
    line = json.dumps({"messages": WITH_LINE_SEPARATORS}, ensure_ascii=False)
    path.write_bytes(f"{line}\r\n\r\n".encode())
    assert read_chats(path) == [WITH_LINE_SEPARATORS]


def test_a_line_that_is_not_utf_8_is_named(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_bytes(b'{}\n{"messages": "\xff"}\n')
    with pytest.raises(ChatError, match="line 2: not UTF-8 at byte 15"):
        read_chats(path)


def test_a_chat_that_the_template_refuses_is_named(tmp_path):
    path = tmp_path / "chats.jsonl"
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path.write_text(json.dumps({"messages": chat}))
    with pytest.raises(ChatError, match="line 1: the chat template refuses it: this model knows the roles"):
        read_chats(path, load_tokenizer(), 64)
