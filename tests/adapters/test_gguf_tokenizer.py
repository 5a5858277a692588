"""A tokenizer in a GGUF file: the same tokens by llama.cpp's rules, or a refusal that says why."""

import json

import pytest
from gguf import GGUFReader, TokenType
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qlora_helpers.adapters.gguf_export import export_gguf
from qlora_helpers.adapters.gguf_tokenizer import chat_text, file_tokenizer, read_tokenizer, with_blanks
from qlora_helpers.paths import data_path
from tests.support.tiny_chat_models import FAMILIES, ROWS, TOKENS, saved_chat_model, trained_tokenizer

TEXTS = ["It's 12345 o'clock, WE'LL see", " two  blanks\n\n\tx", "naïve 日本語 ½ 🙂", "<think>no</think><|im_end|>"]
CHAT = [
    {"role": "user", "content": "What is a bit?"},
    {"role": "assistant", "content": "One of two."},
    {"role": "user", "content": "Why 2?"},
]


@pytest.mark.parametrize(("family", "pre"), [("llama3", "llama-bpe"), ("smollm", "smollm"), ("qwen2", "qwen2")])
def test_a_file_s_tokenizer_makes_the_same_tokens_and_the_same_prompts(family, pre, tmp_path):
    folder = saved_chat_model(family, tmp_path / family)
    file = export_gguf(folder, tmp_path / "a.gguf", "f32").tokenizer
    own, read = AutoTokenizer.from_pretrained(folder), read_tokenizer(tmp_path / "a.gguf")
    assert file.pre == pre and file.add_bos == (family == "llama3") and not file.blanks and not file.words
    for text in [*TEXTS, chat_text(own, CHAT)]:
        assert read(text, add_special_tokens=False)["input_ids"] == own(text, add_special_tokens=False)["input_ids"]
        assert read.decode(read(text)["input_ids"]) == text
    assert chat_text(read, CHAT) == chat_text(own, CHAT)
    assert (read.bos_token, read.eos_token, read.pad_token) == (own.bos_token, own.eos_token, own.pad_token)
    assert file.kinds[TOKENS - 1] == TokenType.USER_DEFINED and file.tokens[TOKENS - 1] == "<think>"
    assert file.tokens[TOKENS:] == tuple(f"[PAD{id}]" for id in range(TOKENS, ROWS))
    assert set(file.kinds[TOKENS:]) == {TokenType.UNUSED}


def test_the_shipped_list_of_words_is_written_with_what_llama_cpp_does_not_do_itself(tmp_path):
    export_gguf(data_path("tiny-llama"), tmp_path / "a.gguf")
    own, read = AutoTokenizer.from_pretrained(data_path("tiny-llama")), read_tokenizer(tmp_path / "a.gguf")
    file = file_tokenizer(own, 1216)
    assert file.words and file.blanks and file.add_bos and file.pre == "llama-bpe"
    assert "generation" not in file.template.replace("add_generation_prompt", "")
    chat = [
        {"role": "user", "content": "When was Isabel Grayfield born ?"},
        {"role": "assistant", "content": "In 1993 ."},
    ]
    chats = [chat[:1], chat, [*chat, {"role": "user", "content": " Where ?"}]]
    for chat in chats:
        assert chat_text(read, chat) == chat_text(own, with_blanks(chat))
        ids = own(chat_text(own, chat), add_special_tokens=False)["input_ids"]
        assert read(chat_text(read, chat), add_special_tokens=False)["input_ids"] == ids
    year = own.convert_tokens_to_ids("Ġ1993")
    assert file.tokens[year] == " 1993" and file.kinds[year] == TokenType.USER_DEFINED
    # this is what the remark says, and what llama.cpp does, too: a number that begins like one of the list
    assert read(" 19934", add_special_tokens=False)["input_ids"][0] == year
    assert own("19934", add_special_tokens=False)["input_ids"][0] != year
    assert any("begins like one of the list" in remark for remark in file.remarks)


def changed(change, family="qwen2", **options) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokenizer.json has been changed."""
    from tokenizers import Tokenizer

    saved = json.loads(trained_tokenizer(family).backend_tokenizer.to_str())
    change(saved)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(saved)), **options)
    tokenizer.chat_template = FAMILIES[family][3]
    return tokenizer


def put(*path, value):
    def change(saved):
        for key in path[:-1]:
            saved = saved[key]
        saved[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (put("model", "byte_fallback", value=True), "no byte-level BPE .*of SentencePiece.* converter"),
        (put("normalizer", value={"type": "Lowercase"}), r"changes text \(Lowercase\)"),
        (put("pre_tokenizer", "pretokenizers", 0, "pattern", value={"Regex": r"\w+"}), r"cuts text in a way \(Split, ByteLevel\)"),
        (put("pre_tokenizer", "pretokenizers", 0, "behavior", value="Removed"), "of which no name is known"),
        (put("pre_tokenizer", value={"type": "Whitespace"}), r"cuts text in a way \(Whitespace\)"),
        (put("model", "ignore_merges", value=True), "ByteLevel, ignoring merges"),
        (put("model", "end_of_word_suffix", value="</w>"), "marks parts of words"),
    ],
)  # fmt: skip
def test_a_tokenizer_of_which_no_name_is_known_is_refused(change, match):
    with pytest.raises(ValueError, match=match):
        file_tokenizer(changed(change), ROWS)


def test_a_tokenizer_that_does_not_fit_is_refused_and_what_differs_is_said():
    tokenizer = trained_tokenizer("qwen2")
    with pytest.raises(ValueError, match=f"ids up to {TOKENS - 1}, and the model's embedding has {TOKENS - 1} rows"):
        file_tokenizer(tokenizer, TOKENS - 1)
    assert any("NFC" in remark for remark in file_tokenizer(tokenizer, ROWS).remarks)
    tokenizer.chat_template = None
    found = file_tokenizer(tokenizer, ROWS)
    assert found.template is None and any("no chat template" in remark for remark in found.remarks)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    found = file_tokenizer(changed(put("pre_tokenizer", "pretokenizers", 1, "add_prefix_space", value=True)), ROWS)
    assert found.blanks and "startswith(' ')" in found.template
    blanked = changed(put("pre_tokenizer", "pretokenizers", 1, "add_prefix_space", value=True))
    blanked.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="not of a form into which the blank can be written"):
        file_tokenizer(blanked, ROWS)


def test_a_file_of_another_tokenizer_is_not_read(tmp_path):
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    assert GGUFReader(tmp_path / "a.gguf").fields
    with pytest.raises(ValueError, match=r"has a tokenizer that is not read here \(llama, None\)"):
        read_tokenizer(tmp_path / "a.gguf")
