"""What serves an exported model: the command lines for llama.cpp, Ollama and vLLM, and a Modelfile with the right template.

llama.cpp reads the chat template from the GGUF file. Ollama takes it from a Modelfile, in the language of Go's text/template,
which is not the language that models have theirs in (Jinja). So the template is written anew: what it puts before, between
and after the messages is read off what it renders, and the result must give the same text for every chat that is tried
here, or none is written.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_helpers.adapters.gguf_tokenizer import chat_text
from qlora_helpers.chats import Chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ChatFormat", "chat_format", "go_template", "modelfile", "serving_lines"]

_MARKS = ("Qqzuvoa", "Wwkyxoe", "Jjvqzui", "Zzxkwou")  # words that no template has


@dataclass(frozen=True)
class ChatFormat:
    """A chat template that only puts fixed texts around the messages.

    A chat is `begin`, or `before_system` + the system message + `after_system`; then each question and each answer in turn,
    with what comes after it. It ends with a question.

    Attributes:
        begin: before the first question, if there is no system message; a default system message is part of it.
        before_system, after_system: None if the template takes no system message.
        after_question: between a question and its answer.
        after_answer: between an answer and the next question.
        generation: after the last question, where the model's answer begins.
        ends_as_typed: whether white space at the ends of a message stays as it is. Some templates take it away, or put a
            blank only where there is none; a Modelfile can do neither.
    """

    begin: str
    before_system: str | None
    after_system: str | None
    after_question: str
    after_answer: str
    generation: str
    ends_as_typed: bool = True

    def text(self, chat: Chat) -> str:
        """A chat, which may begin with a system message, and whose questions and answers alternate."""
        parts, rest = [self.begin], list(chat)
        if rest[0]["role"] == "system":
            parts = [f"{self.before_system}{rest.pop(0)['content']}{self.after_system}"]
        for message in rest[:-1]:
            parts += [message["content"], self.after_question if message["role"] == "user" else self.after_answer]
        return "".join([*parts, rest[-1]["content"], self.generation])


def chat_format(tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
    """The format of a tokenizer's chat template, as read off what it renders.

    It is held against the template with several chats: one and several turns, with and without a system message, with line
    breaks, braces and signs of other scripts, and with white space at the ends of messages.

    Raises:
        ValueError: the template does more than put fixed texts around messages, or there is none.
    """
    template = tokenizer.chat_template
    if not template:
        raise ValueError("it has no chat template")
    one, two, three, system = _MARKS
    whole = _parts(chat_text(tokenizer, _chat(one, two, three)), (one, two, three))
    if whole is None:
        raise ValueError("its chat template leaves messages out or changes them")
    with_system = _parts(chat_text(tokenizer, [{"role": "system", "content": system}, *_chat(one)]), (system, one))
    before, after = (None, None) if with_system is None else with_system[:2]
    found = ChatFormat(whole[0], before, after, *whole[1:])
    for chat in _tried(_TYPED, before is not None):
        if found.text(chat) != chat_text(tokenizer, chat):
            kind = (
                "a system message" if chat[0]["role"] == "system" else "one turn" if len(chat) == 1 else "several turns"
            )
            raise ValueError(f"its chat template does more than put fixed texts around messages (with {kind})")
    if "strftime_now" in str(template):
        raise ValueError("its chat template writes the day's date")
    if any(
        part and any(sign in part for sign in ("{{", "}}", '"""')) for part in vars(found).values() if part is not True
    ):
        raise ValueError("its chat template writes signs that a Modelfile has another meaning for")
    as_typed = all(found.text(chat) == chat_text(tokenizer, chat) for chat in _tried(_AT_THE_ENDS, before is not None))
    return replace(found, ends_as_typed=as_typed)


def _chat(*texts: str) -> Chat:
    """Questions and answers in turn."""
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]


def _parts(text: str | None, marks: Sequence[str]) -> list[str] | None:
    """What is before, between and after the marks in a text; None if one is missing."""
    parts, rest = [], text
    for mark in marks:
        if rest is None or mark not in rest:
            return None
        part, _, rest = rest.partition(mark)
        parts.append(part)
    return [*parts, rest]


_TYPED = (
    ("Hello",),
    ("One\ntwo", "A  b", "Why?"),
    ("{{ a }} <b>", 'It\'s "so" & so', "第二", "🙂", "{% x %}"),
    ("a", "b", "a", "b", "a", "b", "a"),
)
_AT_THE_ENDS = ((" a \n",), (" a", "b\n", "\tc "))


def _tried(texts: Sequence[tuple[str, ...]], with_system: bool) -> list[Chat]:
    chats = [_chat(*turns) for turns in texts]
    systems = [
        [{"role": "system", "content": said}, *chat] for said in ("Be brief.", "Be\nbrief {{ . }}") for chat in chats
    ]
    return chats + systems * with_system


def go_template(found: ChatFormat, bos: str = "") -> str:
    """The format in the language of Go's text/template, with the variables that Ollama sets.

    Args:
        bos: what the server itself puts before each text, and the template must therefore leave out.
    """
    begin = found.begin.removeprefix(bos)
    if found.before_system is not None:
        begin = (
            f"{{{{ if .System }}}}{found.before_system.removeprefix(bos)}{{{{ .System }}}}{found.after_system}"
            f"{{{{ else }}}}{begin}{{{{ end }}}}"
        )
    after = found.after_question
    if found.generation != after:
        last = "{{ if eq (len (slice $.Messages $i)) 1 }}"
        after = f"{last}{found.generation}{{{{ else }}}}{after}{{{{ end }}}}"
    question = f'{{{{ if eq $m.Role "user" }}}}{{{{ $m.Content }}}}{after}'
    answer = f'{{{{ else if eq $m.Role "assistant" }}}}{{{{ $m.Content }}}}{found.after_answer}{{{{ end }}}}'
    return f"{begin}{{{{ range $i, $m := .Messages }}}}{question}{answer}{{{{ end }}}}"


def modelfile(path: str | Path, tokenizer: PreTrainedTokenizerBase, adds_bos: bool) -> str:
    """The text of a Modelfile, from which `ollama create` makes a model that is asked as it was trained.

    Args:
        path: of the GGUF file, which is named relative to the Modelfile beside it.
        tokenizer: the file's (`gguf_tokenizer.read_tokenizer`).
        adds_bos: whether the file tells the server to put the BOS token before a text.

    Raises:
        ValueError: the chat template cannot be written so that it gives the same text.
    """
    found = chat_format(tokenizer)
    template = go_template(found, (tokenizer.bos_token or "") if adds_bos else "")
    note = "# White space at the ends of a message reaches the model as it is typed; the model's own template changes it.\n"
    lines = [f"{'' if found.ends_as_typed else note}FROM ./{Path(path).name}", f'TEMPLATE """{template}"""']
    if tokenizer.eos_token:
        lines.append(f'PARAMETER stop "{tokenizer.eos_token}"')
    lines.append("PARAMETER temperature 0")
    return "\n".join(lines) + "\n"


def serving_lines(
    path: str | Path,
    template: str | None,
    merged: str | None = None,
    adapter: str | None = None,
    base: str | None = None,
    rank: int | None = None,
    has_modelfile: bool = False,
    reason: str = "",
) -> str:
    """The commands that serve the exported model, for a person to read and to copy.

    Args:
        path: of the GGUF file.
        template: the chat template in the file, if there is one.
        merged: the folder of the merged model, if it was kept.
        adapter, base, rank: of an adapter that vLLM can put on its base.
        has_modelfile: whether a Modelfile stands beside the file.
        reason: why there is none that says the same.
    """
    path = Path(path)
    name = path.stem.lower().replace(" ", "-")
    jinja = " --jinja" if template else ""
    lines = [
        "To serve it (not run here):",
        "",
        "llama.cpp, which reads the chat template from the file:",
        f"  {_line('llama-cli', '-m', path)}{jinja} --temp 0",
        f"  {_line('llama-server', '-m', path)}{jinja} --port 8080",
        "",
    ]
    if has_modelfile:
        lines += [
            "Ollama, with the Modelfile beside it:",
            f"  {_line('ollama', 'create', name, '-f', path.parent / 'Modelfile')}",
            f"  ollama run {name}",
        ]
    elif reason:
        lines += [
            f"Ollama: no Modelfile can be written that asks the model as it was trained, since {reason}. Serve it with "
            "llama.cpp.",
        ]
    else:
        lines += ["Ollama: --modelfile writes a Modelfile with the chat template in Ollama's own language."]
    lines += ["", "vLLM:"]
    if merged:
        lines.append(f"  {_line('vllm', 'serve', merged, '--served-model-name', name)}")
    if adapter and base:
        ranks = (8, 16, 32, 64, 128, 256, 320, 512)
        most = next((value for value in ranks if value >= (rank or 8)), rank)
        served = _line("vllm", "serve", base, "--enable-lora", "--max-lora-rank", most)
        lines += [
            f"  {served} --lora-modules {shlex.quote(f'{name}={adapter}')}",
            f"  Ask it for the model {name}. It serves the bare base under the base's own name, too, and answers a request for "
            "that without the adapter and without an error.",
        ]
    if len(lines) and lines[-1] == "vLLM:":
        lines.append("  it loads the folder of a merged model: --merged FOLDER keeps it.")
    return "\n".join(lines)


def _line(*words: object) -> str:
    words = [str(word) for word in words]
    return shlex.join(words) if os.name != "nt" else " ".join(f'"{word}"' if " " in word else word for word in words)
