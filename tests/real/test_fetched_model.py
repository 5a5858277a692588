"""The real model is what its card says, and the course's claims about 4 bits hold on it."""

import hashlib
import json

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file

from qlora_helpers.adapters.tuned import load_tuned
from qlora_helpers.chats import read_chats
from qlora_helpers.chats.templates import has_marks
from qlora_helpers.models.fetched import FETCHABLE, MADE
from qlora_helpers.models.from_gguf import MARKED_TURN, TURN
from qlora_helpers.models.loading import load_model, load_tokenizer, name_of
from qlora_helpers.models.weights import linear_layers
from qlora_helpers.paths import data_path
from qlora_helpers.quantize import NF4, dequantize, quantize
from qlora_helpers.settings import Settings
from qlora_helpers.training.run import train
from tests.real.conftest import NAME
from tests.support.short_runs import CPU

MODEL = FETCHABLE[NAME]


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(NAME)


@pytest.fixture(scope="module")
def unquantised(folder):
    return load_model(NAME, quantization=None, hardware=CPU)


@pytest.fixture(scope="module")
def made(folder):
    return json.loads((folder / MADE).read_text(encoding="utf-8"))


def matrices(folder):
    """The decoder's matrices as they lie in the folder, in float32."""
    tensors = load_file(folder / "model.safetensors")
    return {name: value.float() for name, value in tensors.items() if value.ndim == 2 and "layers" in name}


def test_it_has_its_parameters_and_its_head_is_tied(unquantised):
    assert unquantised.num_parameters() == MODEL.parameters == 134_515_008
    assert unquantised.lm_head.weight is unquantised.model.embed_tokens.weight
    assert name_of(unquantised) == NAME


def test_it_was_made_of_the_pinned_file(folder, made):
    if made["source"] == "hub":
        assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() == MODEL.weights_sha256
    else:
        assert made["sha256"] == MODEL.gguf_sha256
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert made["sha256"] in card and "license: apache-2.0" in card


def test_the_index_s_weights_lie_on_a_grid_of_16_values_per_32(folder, made):
    """What the card says of them; the Hub's do not."""
    most, seen = 0, set()
    for value in matrices(folder).values():
        blocks = value.reshape(-1, 32).sort(dim=1).values
        different = 1 + (blocks.diff(dim=1) != 0).sum(dim=1)
        most, seen = max(most, int(different.max())), seen | {round(float(different.float().mean()))}
    assert (most <= 16) == (made["source"] == "index"), most
    if made["source"] == "index":
        assert seen <= {12, 13, 14}


@pytest.mark.parametrize(
    "text",
    ["The capital of France is Paris.", "In 1987 there were 2,461 of them,  12 in each.", "Straße, 東京, 🙂\n\n\ttab",
     " a  b   c ", "def f(x):\n    return x ** 2\n"],
)  # fmt: skip
def test_the_tokenizer_gives_every_text_back_and_takes_each_digit_by_itself(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    digits = [token for token in tokenizer.convert_ids_to_tokens(ids) if any(sign in "0123456789" for sign in token)]
    assert all(len(token) == 1 for token in digits)
    assert tokenizer.model_max_length == 8192


def test_the_marked_template_renders_the_same_text(tokenizer):
    assert has_marks(tokenizer.chat_template) and MARKED_TURN in tokenizer.chat_template
    original = tokenizer.chat_template.replace(MARKED_TURN, TURN)
    assert not has_marks(original)
    chats = read_chats(data_path("chats", "qlora", "train.jsonl"))[:50]
    chats += [[{"role": "system", "content": "Be brief."}, *chat] for chat in chats[:5]]
    for to_be_answered in (False, True):
        one, other = (
            tokenizer.apply_chat_template(
                chats, chat_template=template, tokenize=False, add_generation_prompt=to_be_answered
            )
            for template in (tokenizer.chat_template, original)
        )
        assert one == other
    found = tokenizer.apply_chat_template(chats[0], return_dict=True, return_assistant_tokens_mask=True)
    ids = [number for number, kept in zip(found["input_ids"], found["assistant_masks"], strict=True) if kept]
    answers = [message["content"] for message in chats[0] if message["role"] == "assistant"]
    assert tokenizer.decode(ids) == "".join(f"{answer}<|im_end|>" for answer in answers)


def test_it_answers_in_english(unquantised, tokenizer):
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    written = unquantised.generate(**asked, max_new_tokens=24, do_sample=False)
    answer = tokenizer.decode(written[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "Paris" in answer, answer


def test_its_folder_is_taken_where_a_tuned_model_is(folder):
    model, _, found = load_tuned(NAME, hardware=CPU)
    assert found.base is None and found.folder == folder and model.num_parameters() == MODEL.parameters


def test_bitsandbytes_decodes_every_matrix_as_the_course_does(folder):
    differing = values = 0
    for value in matrices(folder).values():
        packed, state = bnb.functional.quantize_4bit(value, quant_type="nf4", blocksize=64)
        theirs = bnb.functional.dequantize_4bit(packed, state)
        ours = dequantize(quantize(value, NF4, 64, False))
        differing, values = differing + int((theirs != ours).sum()), values + value.numel()
    assert (differing, values) == (0, 106_168_320)


def test_in_4_bits_it_makes_a_finite_step_and_remembers_its_base(folder, tokenizer, tmp_path):
    model = load_model(NAME, hardware=CPU)
    four = [layer for _, layer in linear_layers(model) if isinstance(layer, bnb.nn.Linear4bit)]
    assert len(four) == 210
    chats = read_chats(data_path("chats", "qlora", "train.jsonl"))[:2]
    # without a warm-up, in which the first step would change nothing
    settings = Settings(steps=1, batch_size=1, max_length=512, warmup_steps=0, save_steps=None)
    run = train(model, tokenizer, chats, tmp_path / "run", settings, hardware=CPU)
    assert all(torch.isfinite(torch.tensor(loss)) for _, loss in run.step_losses)
    adapter = load_file(run.saved_path / "adapter_model.safetensors")
    assert all(torch.isfinite(value).all() for value in adapter.values())
    assert any(value.abs().max() > 0 for name, value in adapter.items() if "lora_B" in name)  # the step changed it
    config = json.loads((run.saved_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == NAME
