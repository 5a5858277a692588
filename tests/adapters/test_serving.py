"""The Modelfile asks a model as its own chat template does, or is not written; and the command lines."""

import re

import jinja2
import pytest
from transformers import PreTrainedTokenizerFast

from qlora_helpers.adapters.gguf_export import export_gguf
from qlora_helpers.adapters.gguf_tokenizer import chat_text, read_tokenizer
from qlora_helpers.adapters.serving import chat_format, go_template, modelfile, serving_lines
from qlora_helpers.paths import data_path
from tests.support.tiny_chat_models import CHATML, HEADERS, trained_tokenizer

# each action of Go's text/template that is written here, in the language of Jinja
_ACTIONS = {
    "if .System": "{% if system %}",
    ".System": "{{ system }}",
    "range $i, $m := .Messages": "{% for m in messages %}",
    'if eq $m.Role "user"': "{% if m.role == 'user' %}",
    'else if eq $m.Role "assistant"': "{% elif m.role == 'assistant' %}",
    "if eq (len (slice $.Messages $i)) 1": "{% if loop.last %}",
    "$m.Content": "{{ m.content }}",
    "else": "{% else %}",
}


def by_go(template, chat):
    """What Go's text/template makes of the template, with the variables that Ollama sets.

    Ollama collects system messages in .System, and has them among .Messages, too.
    """
    opened, parts = [], []
    for place, part in enumerate(re.split(r"\{\{(.*?)\}\}", template, flags=re.DOTALL)):
        if place % 2 == 0:
            parts.append("{% raw %}" + part + "{% endraw %}" if part else "")
        elif part.strip() == "end":
            parts.append("{% endfor %}" if opened.pop() == "range" else "{% endif %}")
        else:
            parts.append(_ACTIONS[part.strip()])
            if (word := part.split()[0]) in ("if", "range"):
                opened.append(word)
    assert not opened
    system = "\n\n".join(message["content"] for message in chat if message["role"] == "system")
    environment = jinja2.Environment(keep_trailing_newline=True)
    return environment.from_string("".join(parts)).render(system=system, messages=chat)


QUESTION = {"role": "user", "content": "What is {{ a }} bit,\nand why?"}
ANSWER = {"role": "assistant", "content": 'One of two; it\'s "0" or 1. 🙂'}
SYSTEM = {"role": "system", "content": "Be brief.\nBe kind."}
CHATS = [
    [QUESTION],
    [QUESTION, ANSWER, {"role": "user", "content": "Why?"}],
    [QUESTION, ANSWER, QUESTION, ANSWER, QUESTION],
]
QWEN = (  # as Qwen2.5 has it, without the part for tools
    "{%- if messages[0]['role'] == 'system' %}\n{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}\n"
    "{%- else %}\n{{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}"
    "\n{%- endif %}\n{%- for message in messages %}\n    {%- if (message.role == 'user') or (message.role == 'system' and not "
    "loop.first) or (message.role == 'assistant') %}\n        {{- '<|im_start|>' + message.role + '\\n' + message.content + "
    "'<|im_end|>' + '\\n' }}\n    {%- endif %}\n{%- endfor %}\n{%- if add_generation_prompt %}\n"
    "    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n"
)
ZEPHYR = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def with_template(template, family="smollm"):
    tokenizer: PreTrainedTokenizerFast = trained_tokenizer(family)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("template", "family", "bos", "as_typed"),
    [
        (CHATML, "smollm", "", True),
        (QWEN, "qwen2", "", True),
        (HEADERS, "llama3", "<|begin_of_text|>", False),  # it trims
        (ZEPHYR, "smollm", "", True),
    ],
)
def test_the_template_of_a_modelfile_renders_the_same_bytes(template, family, bos, as_typed):
    tokenizer = with_template(template, family)
    found = chat_format(tokenizer)
    assert found.ends_as_typed == as_typed
    for chat in [*CHATS, *([SYSTEM, *chat] for chat in CHATS)]:
        assert bos + by_go(go_template(found, bos), chat) == chat_text(tokenizer, chat)


def test_the_shipped_model_s_modelfile_asks_as_its_template_does(tmp_path):
    file = export_gguf(data_path("tiny-llama"), tmp_path / "a.gguf")
    tokenizer = read_tokenizer(file.path)
    text = modelfile(file.path, tokenizer, file.tokenizer.add_bos)
    template = re.search(r'TEMPLATE """(.*?)"""', text, re.DOTALL)[1]
    for chat in CHATS:
        assert "<|begin|>" + by_go(template, chat) == chat_text(tokenizer, chat)
    assert text.startswith("# White space at the ends of a message") and "\nFROM ./a.gguf\n" in text
    assert 'PARAMETER stop "<|end|>"' in text


@pytest.mark.parametrize(
    ("template", "match"),
    [
        (None, "it has no chat template"),
        (CHATML.replace("message['content']", "message['content'] | upper"), "leaves messages out or changes them"),
        (CHATML.replace("message['content']", "message['content'] | replace('b', 'B')"), "does more than put fixed texts"),
        (CHATML.replace("{% if loop.first and", "{{ loop.index }}{% if loop.first and"), "does more than .*several turns"),
        (CHATML + "{{ messages | length }}", "does more than put fixed texts"),
        (CHATML.replace("{{ '<|im_start|>system\n", "{{ strftime_now('%Y') + '<|im_start|>system\n"), "the day's date"),
        (CHATML.replace("helpful.", "helpful, {{ '{{' }}").replace("'{{'", "x"), "signs that a Modelfile"),
    ],
)  # fmt: skip
def test_a_template_that_cannot_be_written_exactly_is_not_written(template, match):
    with pytest.raises(ValueError, match=match):
        chat_format(with_template(template))


def test_the_lines_name_the_files_and_warn_of_the_bare_base():
    said = serving_lines(
        "runs/a b.gguf", "x", "runs/merged", "runs/people/adapter", "some/Base", 20, has_modelfile=True
    )
    for line in (
        "llama-cli -m 'runs/a b.gguf' --jinja --temp 0",
        "llama-server -m 'runs/a b.gguf' --jinja --port 8080",
        "ollama create a-b -f runs/Modelfile",
        "vllm serve runs/merged --served-model-name a-b",
        "vllm serve some/Base --enable-lora --max-lora-rank 32 --lora-modules a-b=runs/people/adapter",
    ):
        assert f"  {line}" in said.splitlines()
    assert "not run here" in said and "serves the bare base under the base's own name, too" in said
    other = serving_lines("a.gguf", None, reason="it writes the day's date")
    assert (
        "no Modelfile can be written" in other and "since it writes the day's date" in other and "--jinja" not in other
    )
    assert "--merged FOLDER keeps it" in other and "--modelfile writes" in serving_lines("a.gguf", "x")
