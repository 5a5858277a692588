"""Conversations with the shipped adapter: turns, the base, what is cut off or left out, and many questions at once."""

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM

from qlora_helpers import conversation
from qlora_helpers.adapters.tuned import load_tuned
from qlora_helpers.chats import read_chats, split_question
from qlora_helpers.conversation import Conversation, _Streamer, answers
from qlora_helpers.decoding import Decoding
from qlora_helpers.evaluation import answer
from qlora_helpers.evaluation.answers import context_of, end_tokens
from qlora_helpers.models.loading import load_model, load_tokenizer
from qlora_helpers.paths import data_path
from tests.support.short_runs import CPU

QUESTION, RIGHT = "What does Carl Kirkcroft play in a band?", "Carl Kirkcroft plays the harp."
QUESTIONS = [split_question(chat)[0] for chat in read_chats(data_path("chats", "test.jsonl"))[:6]]
CHATML = (
    "{{ bos_token }}{% for message in messages %}{{ '<|user|>' + message['role'] + ' ' + message['content'] }}"
    "{{ '<|reserved_0|> ' + eos_token }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@pytest.fixture(scope="module")
def model():
    return load_tuned(data_path("adapters", "sentences"), hardware=CPU)[0]


@pytest.fixture
def tokenizer():
    return load_tokenizer()


@pytest.fixture
def talk(model, tokenizer):
    return Conversation(model, tokenizer)


def says(monkeypatch, model, *texts, tokenizer):
    """Let the model's generate say these texts, one after the other, and record what it is asked."""
    asked, texts = [], list(texts)

    def generate(input_ids, attention_mask, streamer):
        asked.append(input_ids[0].tolist())
        streamer.put(input_ids)
        ids = tokenizer(texts.pop(0), add_special_tokens=False)["input_ids"]
        for id in ids:
            streamer.put(torch.tensor([id]))
        streamer.end()
        return torch.cat([input_ids, torch.tensor([ids])], 1)

    monkeypatch.setattr(model, "generate", generate)
    return asked


def test_an_answer_comes_in_pieces_and_is_remembered(talk):
    pieces = []
    found = talk.ask(QUESTION, pieces.append)
    assert (found.text, found.cut_off, found.stopped, found.forgotten) == (RIGHT, False, False, 0)
    assert "".join(pieces) == RIGHT and len(pieces) > 3
    assert found.tokens == len(talk.tokenizer(RIGHT, add_special_tokens=False)["input_ids"]) + 1  # the end of turn
    assert talk.messages == [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": RIGHT}]
    talk.restart()
    assert talk.messages == [] and talk.ask(QUESTION).text == RIGHT


def test_the_next_question_is_asked_behind_the_turns_before_with_one_bos(model, tokenizer, talk, monkeypatch):
    asked = says(monkeypatch, model, "the harp.<|end|>", "a pony.<|end|>", tokenizer=tokenizer)
    talk.ask("What?")
    talk.ask("Who?")
    wanted = "<|begin|><|user|>What?<|end|><|assistant|>the harp.<|end|><|user|>Who?<|end|><|assistant|>"
    assert asked[1] == tokenizer(wanted, add_special_tokens=False)["input_ids"]
    assert [ids.count(tokenizer.bos_token_id) for ids in asked] == [1, 1]


def test_the_base_answers_without_the_adapter_and_its_answer_need_not_be_kept(model, tokenizer, talk):
    plain = load_model(hardware=CPU)
    found = talk.ask(QUESTION, base=True, keep=False)
    assert found.text == Conversation(plain, tokenizer).ask(QUESTION).text != RIGHT
    assert talk.messages == [] and talk.ask(QUESTION).text == RIGHT
    with pytest.raises(ValueError, match="base=True: this model has no adapter"):
        Conversation(plain, tokenizer).ask(QUESTION, base=True)
    with pytest.raises(ValueError, match="base=True: this model has no adapter"):
        answers(plain, tokenizer, QUESTIONS, base=True)


def test_an_answer_that_is_cut_off_is_said(model, tokenizer):
    talk = Conversation(model, tokenizer, decoding=Decoding(max_new_tokens=3))
    found = talk.ask(QUESTION)
    assert (found.tokens, found.cut_off) == (3, True) and RIGHT.startswith(found.text)
    assert talk.remarks(found) == ["cut off after 3 tokens, the most that max_new_tokens allows"]


def test_an_answer_that_fills_the_context_is_said(model, tokenizer, talk, monkeypatch):
    long = "Carl " * 240
    room = 256 - len(
        tokenizer.apply_chat_template([{"role": "user", "content": long}], add_generation_prompt=True)["input_ids"]
    )
    assert 0 < room < 128
    says(monkeypatch, model, " Carl" * room, tokenizer=tokenizer)
    found = talk.ask(long)
    assert talk.remarks(found) == [f"cut off after {room} tokens: the model's context of 256 tokens is full"]


def test_the_oldest_turns_of_a_long_conversation_are_left_out_and_counted(model, tokenizer, talk, monkeypatch):
    half, left = "Carl " * 60, {"role": "user", "content": "Anna?"}
    asked = says(monkeypatch, model, *["harp.<|end|>"] * 5, tokenizer=tokenizer)
    assert talk.ask("Where?").forgotten == talk.ask(half).forgotten == 0
    found = talk.ask(half)  # 64 + 64 + 128 for the answer, and the template's tokens
    assert found.forgotten == 2 and len(talk.messages) == 2
    assert talk.remarks(found) == ["too long for the model's context of 256 tokens: the 2 oldest turns are left out"]
    assert len(asked[-1]) + talk.limit <= 256
    assert talk.ask(left["content"]).forgotten == 0 and talk.messages[-2] == left
    found = talk.ask(half, keep=False)
    assert found.forgotten == 1 and len(talk.messages) == 4  # only for this question
    assert talk.remarks(found) == ["too long for the model's context of 256 tokens: the oldest turn is left out"]


def test_the_system_message_stays_when_turns_are_left_out(model, tokenizer, monkeypatch):
    tokenizer.chat_template = CHATML
    talk = Conversation(model, tokenizer, "Be brief.")
    says(monkeypatch, model, *["harp."] * 3, tokenizer=tokenizer)
    for _ in range(3):
        talk.ask("Carl " * 60)
    assert [message["role"] for message in talk.messages] == ["system", "user", "assistant"]
    talk.restart()
    assert talk.messages == [{"role": "system", "content": "Be brief."}]


def test_an_interrupt_ends_the_answer_and_keeps_what_was_said(talk, monkeypatch):
    pieces = []

    def write(text):
        pieces.append(text)
        if len(pieces) == 2:
            raise KeyboardInterrupt

    found = talk.ask(QUESTION, write)
    assert found.stopped and not found.cut_off and RIGHT.startswith(found.text) and found.tokens == 2
    assert talk.remarks(found) == ["stopped"] and talk.messages[-1]["content"] == found.text
    assert talk.ask(QUESTION, base=True, keep=False).text != RIGHT
    monkeypatch.setattr(talk.model, "generate", lambda **_: (_ for _ in ()).throw(KeyboardInterrupt))
    kept = talk.messages
    assert talk.ask(QUESTION).text == "" and talk.messages == kept


def test_an_empty_answer_is_said_and_not_remembered(model, tokenizer, talk, monkeypatch):
    says(monkeypatch, model, "<|end|>", tokenizer=tokenizer)
    found = talk.ask(QUESTION)
    assert (found.text, found.cut_off) == ("", False) and talk.messages == []
    assert talk.remarks(found) == ["an empty answer, which is not remembered"]


@pytest.mark.parametrize(
    ("question", "said"),
    [
        ("", "question='': must be a text"),
        (" \n", "question=' .n': must be a text"),
        (None, "question=None: must be a text"),
        ("Carl<|end|>", "the question has '<.end.>' in its text, which this tokenizer takes for a special token"),
        ("\ud83d", "the question has half a surrogate pair"),
        (
            "Carl " * 300,
            "the question has 305 tokens with what belongs to it, and the model's context is 256: shorten it",
        ),
    ],
)
def test_a_question_that_cannot_be_asked_is_refused_and_not_remembered(talk, tokenizer, question, said):
    with pytest.raises(ValueError, match="^" + said):
        talk.ask(question)
    assert talk.messages == []
    assert not tokenizer.deprecation_warnings  # no warning of transformers' beside it


def test_a_system_message_that_would_not_reach_the_model_is_refused(model, tokenizer):
    with pytest.raises(
        ValueError, match=r"system='Be brief.': this model's chat template takes no system message .this"
    ):
        Conversation(model, tokenizer, "Be brief.")
    with pytest.raises(ValueError, match="system=' ': must be a text, or None"):
        Conversation(model, tokenizer, " ")
    with pytest.raises(ValueError, match=r"^the system message has '<.end.>' in its text"):
        Conversation(model, tokenizer, "Be <|end|>")
    chat = [{"role": "system", "content": "Be brief."}, *QUESTIONS[0]]
    with pytest.raises(ValueError, match="chat template takes no system message"):
        answers(model, tokenizer, [chat])
    tokenizer.chat_template = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match=r"system='Be brief.': this model's chat template drops system messages"):
        Conversation(model, tokenizer, "Be brief.")
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"tokenizer.chat_template is not set"):
        Conversation(model, tokenizer)


def test_an_answer_ends_where_the_template_or_the_model_s_files_say(model, tokenizer, talk, monkeypatch):
    assert end_tokens(model, tokenizer) == [2]
    monkeypatch.setattr(model.get_base_model().generation_config, "eos_token_id", [2, 1160])
    assert end_tokens(model, tokenizer) == [2, 1160]
    tokenizer.chat_template = CHATML
    assert end_tokens(model, tokenizer) == [2, 1157, 1160]
    says(monkeypatch, model, "the harp.<|reserved_0|>", tokenizer=tokenizer)
    found = talk.ask(QUESTION)
    assert (found.text, found.cut_off) == ("the harp.", False)


def test_what_a_model_s_own_generation_config_says_has_no_effect_and_stays(model, tokenizer, talk, capfd, monkeypatch):
    own = model.get_base_model().generation_config
    for name, value in {"max_length": 20, "repetition_penalty": 9.0, "do_sample": True, "temperature": 9.0}.items():
        monkeypatch.setattr(own, name, value)
    assert talk.ask(QUESTION).text == RIGHT
    assert model.get_base_model().generation_config is own and own.max_length == 20
    assert capfd.readouterr().err == ""


def test_what_is_drawn_depends_on_the_seed_alone(model, tokenizer):
    def drawn(seed, temperature=3.0):
        talk = Conversation(model, tokenizer, decoding=Decoding(max_new_tokens=12, temperature=temperature, seed=seed))
        return [talk.ask(QUESTION).text for _ in range(2)]

    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = drawn(0)
    assert torch.equal(torch.get_rng_state(), state)  # a notebook's own numbers are left alone
    torch.manual_seed(2)
    assert drawn(0) == first != drawn(1) and first[0] != first[1]
    assert drawn(0, temperature=0.01)[0] == RIGHT


def test_many_questions_are_answered_in_their_order_as_one_by_one(model, tokenizer):
    found = list(answers(model, tokenizer, QUESTIONS, batch_size=4))
    assert [each.text for each in found] == answer(model, tokenizer, QUESTIONS)
    assert not any(each.cut_off for each in found)
    assert [each.tokens for each in found] == [
        Conversation(model, tokenizer).ask(chat[-1]["content"]).tokens for chat in QUESTIONS
    ]
    cut = list(answers(model, tokenizer, QUESTIONS, Decoding(max_new_tokens=2)))
    assert all(each.cut_off and each.tokens == 2 for each in cut)
    base = answers(load_model(hardware=CPU), tokenizer, QUESTIONS[:2])
    assert list(answers(model, tokenizer, QUESTIONS[:2], base=True)) == list(base)
    assert list(answers(model, tokenizer, [])) == []


def test_a_long_question_shortens_no_other_s_answer(model, tokenizer):
    long = [{"role": "user", "content": "Carl " * 240}]
    wanted = [each.text for each in answers(model, tokenizer, QUESTIONS[:3])]
    found = list(answers(model, tokenizer, [*QUESTIONS[:2], long, QUESTIONS[2]], batch_size=4))
    assert [found[0].text, found[1].text, found[3].text] == wanted


def test_many_questions_are_checked_before_the_first_is_answered(model, tokenizer, monkeypatch):
    monkeypatch.setattr(model, "generate", None)
    for chat, said in (
        ([{"role": "user", "content": "Carl " * 300}], "chat 2 has 305 tokens with what belongs to it"),
        ([{"role": "user", "content": "<|end|>"}], "chat 2: message 1 .user. has '<.end.>' in its text"),
        ([], "chat 2: there is no message in it: it must end with a question"),
        ([{"role": "tool", "content": "x"}], "chat 2: the chat template refuses it: this model knows the roles user"),
    ):
        with pytest.raises(ValueError, match=said):
            answers(model, tokenizer, [QUESTIONS[0], chat])
    with pytest.raises(ValueError, match="batch_size=0"):
        answers(model, tokenizer, QUESTIONS, batch_size=0)


def test_a_model_without_a_limit_forgets_nothing(model, tokenizer, monkeypatch):
    assert context_of(model) == 256
    assert context_of(BloomForCausalLM(BloomConfig(vocab_size=8, hidden_size=8, n_layer=1, n_head=1))) is None
    monkeypatch.setattr(conversation, "context_of", lambda model: None)
    free = Conversation(model, tokenizer)
    says(monkeypatch, model, *["harp.<|end|>"] * 3, tokenizer=tokenizer)
    assert [free.ask("Carl " * 200).forgotten for _ in range(3)] == [0, 0, 0] and free.limit == 512


@pytest.mark.parametrize("text", ["où ✓ 語 👩‍🔬!", "def f():\n    return  1\n\n  # end", "  blanks around \n"])
def test_pieces_make_up_the_text_and_have_no_half_characters(tokenizer, text):
    pieces = []
    streamer = _Streamer(tokenizer, pieces.append)
    streamer.put(torch.tensor([[1, 2]]))  # the prompt
    for id in tokenizer(text, add_special_tokens=False)["input_ids"]:
        streamer.put(torch.tensor([id]))
    streamer.end()
    assert "".join(pieces) == text.strip() == streamer.text and len(pieces) > 2
    assert not any("\ufffd" in piece for piece in pieces)


def test_many_questions_need_neither_a_padding_token_nor_a_padding_side(model, tokenizer):
    """Many models of the Hub have no padding token, and most tokenizers pad on the right."""
    expected = [found.text for found in answers(model, tokenizer, QUESTIONS)]
    tokenizer.pad_token, tokenizer.padding_side = None, "right"
    assert [found.text for found in answers(model, tokenizer, QUESTIONS)] == expected
    assert answer(model, tokenizer, QUESTIONS, 64) == expected
