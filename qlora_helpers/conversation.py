"""Talk to a model: questions and answers in turn, each answer as it is generated, and many questions at once.

What leaves its place is said: an answer that is cut off, and turns that no longer fit into the model's context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from peft import PeftModel
from transformers.generation.streamers import BaseStreamer

from qlora_helpers import validation
from qlora_helpers.chats import Chat, check_texts
from qlora_helpers.decoding import Decoding
from qlora_helpers.evaluation.answers import context_of, continued, end_tokens, prompts_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Answer", "Conversation", "answers"]

_HALF_A_CHARACTER = "\ufffd"  # what the bytes of a character decode to before the last of them is there


@dataclass(frozen=True)
class Answer:
    """What a model said.

    Attributes:
        text: the answer, without special tokens and without blanks at its ends.
        tokens: how many were generated, the one that ends the answer included.
        cut_off: whether it had to end before the model ended it.
        stopped: whether an interrupt ended it.
        forgotten: the turns (a question and its answer) that were dropped before this one, to make room.
    """

    text: str
    tokens: int
    cut_off: bool = False
    stopped: bool = False
    forgotten: int = 0


class _Streamer(BaseStreamer):
    """Hands on the text of an answer as its tokens come.

    All tokens are decoded each time: transformers' TextStreamer forgets them at a line's end, and a SentencePiece
    tokenizer then drops a blank from the next line's indentation.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], object]):
        self.tokenizer, self.write = tokenizer, write
        self.ids: list[int] = []
        self.written, self.is_prompt = "", True

    @property
    def text(self) -> str:
        return self.tokenizer.decode(self.ids, skip_special_tokens=True).strip()

    def put(self, value: torch.Tensor) -> None:
        if self.is_prompt:  # generate hands that over first
            self.is_prompt = False
            return
        self.ids += value.flatten().tolist()
        if not self.text.endswith(_HALF_A_CHARACTER):
            self.flush()

    def end(self) -> None:
        self.flush()

    def flush(self) -> None:
        text = self.text
        if text.startswith(self.written) and text != self.written:
            self.write(text[len(self.written) :])
            self.written = text


def _check_template(tokenizer: PreTrainedTokenizerBase, system: str | None) -> None:
    """Make sure that there is a chat template, and that a system message reaches the model."""
    if not tokenizer.chat_template:
        raise ValueError("tokenizer.chat_template is not set: take the tokenizer of a model that was made for chats")
    if system is None:
        return
    if not isinstance(system, str) or not system.strip():
        raise validation.refuse("system", system, "must be a text, or None for no system message")
    cure = "leave it out, or begin the question with it"
    chat = [{"role": "system", "content": system}, {"role": "user", "content": "question"}]
    _check_texts(chat[:1], tokenizer, {1: "the system message"})
    try:
        rendered = tokenizer.apply_chat_template(chat, tokenize=False)
    except Exception as error:  # a template is a program, and may fail in any way
        raise validation.refuse(
            "system", system, f"this model's chat template takes no system message ({error}): {cure}"
        ) from error
    if system.strip() not in rendered:
        raise validation.refuse("system", system, f"this model's chat template drops system messages: {cure}")


def _check_texts(chat: Chat, tokenizer: PreTrainedTokenizerBase, called: dict[int, str]) -> None:
    """`check_texts` of one chat; `called` says what the message calls the chat's messages, by their number."""
    try:
        check_texts([chat], tokenizer)
    except ValueError as error:
        said = str(error).removeprefix("chat 1: ")
        for number, name in called.items():
            said = said.replace(f"message {number} ({chat[number - 1]['role']})", name, 1)
        raise ValueError(said) from error


def _check_base(model, base: bool) -> None:
    if base and not isinstance(model, PeftModel):
        raise ValueError("base=True: this model has no adapter, and so no base that would answer otherwise")


def _length(chat: Chat, tokenizer) -> int:
    """The number of tokens that come before the answer to a chat's last question."""
    return len(prompts_of([chat], tokenizer)[0])


class Conversation:
    """A conversation with a model, which remembers the turns before.

    Attributes:
        messages: the system message, if there is one, and the turns so far.
        turns: how many questions were asked since the beginning.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        system: str | None = None,
        decoding: Decoding | None = None,
    ):
        """Begin a conversation.

        Args:
            system: a system message.
            decoding: how answers are decoded; by default greedily.

        Raises:
            ValueError: the tokenizer has no chat template, or the template takes no system message; a special token is
                typed into it; or `decoding.max_new_tokens` leaves no room for a question.
        """
        _check_template(tokenizer, system)
        self.model, self.tokenizer = model, tokenizer
        self.decoding = decoding or Decoding()
        self.context = context_of(model)
        self.limit = self.decoding.limit(self.context)
        self._start: Chat = [] if system is None else [{"role": "system", "content": system}]
        self.restart()

    def restart(self) -> None:
        """Forget all turns, and keep the system message."""
        self.messages, self.turns = [*self._start], 0

    def ask(
        self,
        question: str,
        write: Callable[[str], object] = lambda text: None,
        base: bool = False,
        keep: bool = True,
    ) -> Answer:
        """Ask the next question.

        Args:
            write: is called with each piece of the answer as soon as it is there. The pieces make up the text.
            base: ask the model without its adapter.
            keep: remember the question and its answer for the next question. An empty answer is not remembered.

        Returns:
            The answer. An interrupt (Ctrl-C, or the kernel's) ends it early, and is not raised.

        Raises:
            ValueError: the question is empty or too long for the model, or a special token is typed into it; or `base` is
                set and the model has no adapter.
        """
        if not isinstance(question, str) or not question.strip():
            raise validation.refuse("question", question, "must be a text")
        _check_base(self.model, base)
        messages, forgotten, limit = self._fitted([*self.messages, {"role": "user", "content": question}])
        streamer, stopped = _Streamer(self.tokenizer, write), False
        prompts, seed = prompts_of([messages], self.tokenizer), self.decoding.seed + self.turns
        try:
            with self.model.disable_adapter() if base else nullcontext():
                continued(self.model, self.tokenizer, prompts, limit, self.decoding, seed=seed, streamer=streamer)
        except KeyboardInterrupt:
            stopped = True
            streamer.flush()
        text = streamer.text
        if keep:
            self.turns += 1
            self.messages = [*messages, {"role": "assistant", "content": text}] if text else messages[:-1]
        ended = bool(streamer.ids) and streamer.ids[-1] in end_tokens(self.model, self.tokenizer)
        return Answer(text, len(streamer.ids), not (ended or stopped), stopped, forgotten)

    def remarks(self, answer: Answer) -> list[str]:
        """What the reader of an answer of this conversation should know: that it is cut off, or what was left out for it."""
        said = []
        if answer.forgotten:
            turns = "oldest turn is" if answer.forgotten == 1 else f"{answer.forgotten} oldest turns are"
            said.append(f"too long for the model's context of {self.context} tokens: the {turns} left out")
        if answer.stopped:
            said.append("stopped")
        elif answer.cut_off and answer.tokens < self.limit:
            said.append(f"cut off after {answer.tokens} tokens: the model's context of {self.context} tokens is full")
        elif answer.cut_off:
            said.append(f"cut off after {answer.tokens} tokens, the most that max_new_tokens allows")
        if not answer.text and not answer.stopped:
            said.append("an empty answer, which is not remembered")
        return said

    def _fitted(self, messages: Chat) -> tuple[Chat, int, int]:
        """The messages that fit into the context, how many turns were dropped, and the most tokens of the answer."""
        _check_texts(messages, self.tokenizer, {len(messages): "the question"})
        forgotten, first = 0, len(self._start)
        length = _length(messages, self.tokenizer)
        if self.context is None:
            return messages, 0, self.limit
        while length + self.limit > self.context and len(messages) > first + 1:
            messages = messages[:first] + messages[first + 2 :]
            forgotten, length = forgotten + 1, _length(messages, self.tokenizer)
        return messages, forgotten, _room("the question", length, self.context, self.limit)


def _room(what: str, length: int, context: int, limit: int) -> int:
    """The most tokens of the answer to a question of this length."""
    if length >= context:
        raise ValueError(
            f"{what} has {length} tokens with what belongs to it, and the model's context is {context}: shorten it"
        )
    return min(limit, context - length)


def answers(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    chats: list[Chat],
    decoding: Decoding | None = None,
    batch_size: int = 8,
    base: bool = False,
) -> Iterator[Answer]:
    """Answer the last question of each chat, several at a time, in their order.

    Everything is checked before the first answer is generated.

    Args:
        batch_size: how many are generated together.
        base: ask the model without its adapter.

    Raises:
        ValueError: a chat is too long for the model; the template refuses it; a special token is typed into it; there is
            no chat template; `base` is set and the model has no adapter; or a number is out of its bounds.
    """
    decoding, batch_size = decoding or Decoding(), validation.whole("batch_size", batch_size)
    context = context_of(model)
    limit = decoding.limit(context)
    _check_base(model, base)
    if [] in chats:
        raise ValueError(f"chat {chats.index([]) + 1}: there is no message in it: it must end with a question")
    for system in {chat[0]["content"] if chat[0]["role"] == "system" else None for chat in chats}:
        _check_template(tokenizer, system)
    check_texts(chats, tokenizer)
    prompts, limits = [], []
    for number, chat in enumerate(chats, start=1):
        try:
            prompts += prompts_of([chat], tokenizer)
        except Exception as error:  # a template is a program, and may fail in any way
            raise ValueError(f"chat {number}: the chat template refuses it: {error}") from error
        limits.append(limit if context is None else _room(f"chat {number}", len(prompts[-1]), context, limit))
    return _answers(model, tokenizer, prompts, limits, decoding, batch_size, base)


def _answers(model, tokenizer, prompts, limits, decoding, batch_size, base) -> Iterator[Answer]:
    ends, start = set(end_tokens(model, tokenizer)), 0
    # a long question shortens the answers to its own batch alone
    for limit, group in groupby(limits):
        stop = start + len(list(group))
        for first in range(start, stop, batch_size):
            batch, seed = prompts[first : min(first + batch_size, stop)], decoding.seed + first
            with model.disable_adapter() if base else nullcontext():
                output = continued(model, tokenizer, batch, limit, decoding, seed=seed)
            for ids in output.tolist():
                end = next((place for place, id in enumerate(ids, start=1) if id in ends), None)
                text = tokenizer.decode(ids[:end], skip_special_tokens=True).strip()
                yield Answer(text, end or len(ids), cut_off=end is None)
        start = stop
