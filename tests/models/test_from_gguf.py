"""A GGUF file becomes a folder of a model: the same values, the same tokens, the same text."""

import logging
from contextlib import nullcontext

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_helpers.chats.templates import has_marks
from qlora_helpers.models import from_gguf
from qlora_helpers.models.from_gguf import MARKED_TURN, TURN, marked, read_gguf, write_from_gguf
from tests.support import tiny_gguf

CHAT = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris, with {{ braces }} and 'quotes'.\n"},
    {"role": "user", "content": "And in 1987?"},
    {"role": "assistant", "content": "Paris."},
]
SYSTEM = [{"role": "system", "content": "Be brief."}]


@pytest.fixture(scope="module", params=["F32", "F16", "Q8_0", "Q4_1"])
def made(request, tmp_path_factory):
    """The type, the model that was written, its tokenizer, and the folder that was made from the file."""
    folder = tmp_path_factory.mktemp(request.param)
    file = folder / f"tiny.{request.param}.gguf"
    model, tokenizer = tiny_gguf.write(file, request.param)
    (folder / "model").mkdir()
    write_from_gguf(file, folder / "model")
    return request.param, model, tokenizer, folder / "model"


def test_the_weights_are_those_that_the_file_holds_rounded_to_float16(made):
    kind, model, _, folder = made
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.dtype == torch.float16
    as_kind = gguf.GGMLQuantizationType[kind]
    for name, value in model.state_dict().items():
        # the types have blocks of 32 along a row, so the order of the rows changes nothing
        held = value.numpy()
        held = gguf.quants.dequantize(gguf.quants.quantize(held, as_kind), as_kind) if value.ndim == 2 else held
        assert torch.equal(loaded.state_dict()[name], torch.tensor(held).to(torch.float16)), name


def test_nothing_is_lost_on_the_way_and_the_head_is_tied(made):
    kind, model, _, folder = made
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.num_parameters() == model.num_parameters()
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        far = (loaded(tokens).logits - model(tokens).logits).norm() / model(tokens).logits.norm()
    assert far < {"F32": 2e-3, "F16": 2e-3, "Q8_0": 2e-2, "Q4_1": 0.3}[kind]
    assert (kind == "Q4_1") == (far > 0.03)
    config = loaded.config
    assert (config.max_position_embeddings, config.rope_parameters["rope_theta"]) == (128, 10000.0)
    assert not hasattr(config, "quantization_config") and (folder / "config.json").read_text().count("Tiny 1B") == 0


def test_text_becomes_the_tokens_of_the_file_s_own_tokenizer_and_comes_back(made):
    _, _, words, folder = made
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.model_max_length == 128
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    for text in (*tiny_gguf.TEXT, "x  7   89\n\n 3", "ein Fluß, 東京 🙂", " leading and trailing "):
        ids = tokenizer(text)["input_ids"]
        assert ids == words.encode(text, add_special_tokens=False).ids, text
        assert tokenizer.decode(ids) == text


def test_what_transformers_alone_reads_parts_no_digits(tmp_path):
    """The reason why the tokenizer is completed by hand; if this fails, that may no longer be needed."""
    _, words = tiny_gguf.write(tmp_path / "tiny.gguf")
    plain = AutoTokenizer.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    text = "x  7"
    assert plain(text)["input_ids"] != words.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("to_be_answered", [False, True])
@pytest.mark.parametrize("chat", [CHAT, SYSTEM + CHAT, CHAT[:1]])
def test_the_marked_template_renders_the_same_text(made, chat, to_be_answered):
    tokenizer = AutoTokenizer.from_pretrained(made[3])
    assert has_marks(tokenizer.chat_template)
    options = {"tokenize": False, "add_generation_prompt": to_be_answered}
    text = tokenizer.apply_chat_template(chat, **options)
    assert text == tokenizer.apply_chat_template(chat, chat_template=tiny_gguf.TEMPLATE, **options)


def test_the_marks_cover_each_answer_and_the_token_that_ends_it(made):
    tokenizer = AutoTokenizer.from_pretrained(made[3])
    found = tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    ids = [number for number, kept in zip(found["input_ids"], found["assistant_masks"], strict=True) if kept]
    assert tokenizer.decode(ids) == "Paris, with {{ braces }} and 'quotes'.\n<|im_end|>Paris.<|im_end|>"


def test_another_template_stays_as_it_is():
    assert marked("{{ messages[0]['content'] }}") == "{{ messages[0]['content'] }}"
    assert marked(TURN + TURN) == TURN + TURN  # which of them is in a loop is not known
    assert marked(f"a{TURN}b") == f"a{MARKED_TURN}b"


def test_a_head_of_its_own_and_a_file_without_a_template_are_read(tmp_path):
    model, _ = tiny_gguf.write(tmp_path / "tiny.gguf", "F16", template=None, tied=False)
    loaded, tokenizer = read_gguf(tmp_path / "tiny.gguf")
    assert tokenizer.chat_template is None and not loaded.config.tie_word_embeddings
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.to(torch.float16))
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)


def test_a_way_of_parting_text_that_is_not_known_is_refused(tmp_path):
    tiny_gguf.write(tmp_path / "tiny.gguf", pre="deepseek-llm")
    with pytest.raises(
        ValueError, match=r"^file='.*tiny\.gguf': its tokenizer parts text as 'deepseek-llm' does, which is"
    ):
        read_gguf(tmp_path / "tiny.gguf")


def test_nothing_is_said_that_is_meant_for_a_model_that_is_to_answer(tmp_path, monkeypatch, capfd):
    file, heard = tmp_path / "tiny.gguf", []
    tiny_gguf.write(file, "Q4_1")
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    logging.getLogger("transformers").addHandler(handler)

    def told(folder):
        heard.clear()
        capfd.readouterr()
        (tmp_path / folder).mkdir()
        write_from_gguf(file, tmp_path / folder)
        return any("weights packed" in line for line in heard), "Loading weights" in capfd.readouterr().err

    try:
        assert told("a") == (False, False)
        for name in ("silenced", "without_short_bars"):
            monkeypatch.setattr(from_gguf, name, lambda *_: nullcontext())
        assert told("b") == (True, True)
    finally:
        logging.getLogger("transformers").removeHandler(handler)
