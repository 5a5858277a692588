"""Chats as tokens: the chat template, the marks of what the assistant says, and what a tokenizer cannot take."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jinja2

from qlora_helpers.chats.messages import Chat, half_a_pair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["check_texts", "count_tokens", "faults_for", "lengths_of", "tokenized"]


def faults_for(tokenizer, chats: dict[int, Chat], max_length: int | None) -> dict[int, str]:
    """What is wrong with chats for this tokenizer, by line number."""
    faults = _faults_of_texts(chats, tokenizer)
    good = {number: chat for number, chat in chats.items() if number not in faults}
    try:
        lengths = dict(zip(good, lengths_of(list(good.values()), tokenizer), strict=True))
    except _TemplateError:  # find out which chats it is
        refused = _refused(good, tokenizer)
        faults |= refused
        lengths = {number: count_tokens(chat, tokenizer) for number, chat in good.items() if number not in refused}
    for number, length in lengths.items():
        if max_length is not None and length > max_length:
            faults[number] = (
                f"{length} tokens, over max_length={max_length}: the answer would be cut. Raise max_length or shorten the chat"
            )
    return faults


def _faults_of_texts(chats: dict[int, Chat], tokenizer) -> dict[int, str]:
    """What is wrong with the texts of chats for this tokenizer, by the chat's number.

    A token that was added to a vocabulary without being special, such as Qwen's <think>, is text that a model writes.
    """
    places, texts, faults = [], [], {}
    for number, chat in chats.items():
        for place, message in enumerate(chat, start=1):
            if half := half_a_pair(message["content"]):
                faults.setdefault(number, f"message {place} ({message['role']}) {half}")
            else:
                places.append((number, f"message {place} ({message['role']})"))
                texts.append(message["content"])
    special = {id: str(token) for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    found = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    for (number, place), text, ids in zip(places, texts, found, strict=True):
        # any character may become the unknown token, which is no fault unless that itself is typed
        typed = [id for id in ids if id in special and (id != tokenizer.unk_token_id or special[id] in text)]
        if typed:
            fault = (
                f"{place} has {special[typed[0]]!r} in its text, which this tokenizer takes for a special token: leave it "
                "out, or put a space into it"
            )
            faults.setdefault(number, fault)
    return faults


def check_texts(chats: list[Chat], tokenizer: PreTrainedTokenizerBase) -> None:
    """Make sure that the tokenizer takes all that is written in the messages as plain text.

    Raises:
        ValueError: names the first chat in which a special token is typed, such as an end of turn, or half a surrogate
            pair.
    """
    if faults := _faults_of_texts(dict(enumerate(chats, start=1)), tokenizer):
        number = min(faults)
        raise ValueError(f"chat {number}: {faults[number]}")


class _TemplateError(ValueError):
    """The chat template refuses a chat."""


def _refused(chats: dict[int, Chat], tokenizer) -> dict[int, str]:
    """What the chat template says of the chats that it refuses, by their number."""
    refused = {}
    for number, chat in chats.items():
        try:
            tokenizer.apply_chat_template(chat, tokenize=False)
        except Exception as error:  # a template is a program, and may fail in any way
            said = str(error) if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"
            refused[number] = f"the chat template refuses it: {' '.join(said.split())}"
    return refused


def _encoded(chats: list[Chat], tokenizer, masks: bool = False):
    """Chats in the chat template; one call for all is twice as fast as one for each.

    Raises:
        ValueError: there is no template; or it refuses a chat, whose number is named.
    """
    if not tokenizer.chat_template:
        raise ValueError("tokenizer.chat_template is not set: take the tokenizer of a model that was made for chats")
    try:
        return tokenizer.apply_chat_template(chats, return_dict=True, return_assistant_tokens_mask=masks)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"tokenizer.chat_template is no Jinja template: {error} (line {error.lineno})") from error
    except Exception as error:  # as in `_refused`; where no chat is to blame, it is raised as it is
        refused = _refused(dict(enumerate(chats, start=1)), tokenizer)
        if not refused:
            raise
        raise _TemplateError(f"chat {min(refused)}: {refused[min(refused)]}") from error


def lengths_of(chats: list[Chat], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The number of tokens of each chat in the chat template.

    Raises:
        ValueError: there is no template, or it refuses a chat.
    """
    return [len(ids) for ids in _encoded(chats, tokenizer)["input_ids"]] if chats else []


def tokenized(chats: list[Chat], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, list[int]]]:
    """Each chat in the chat template: its "input_ids", and "assistant_masks" with a 1 for each token of an answer.

    Raises:
        ValueError: there is no template, or it refuses a chat.
    """
    if not chats:
        return []
    encoded = _encoded(chats, tokenizer, masks=True)
    pairs = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    return [{"input_ids": ids, "assistant_masks": masks} for ids, masks in pairs]


def count_tokens(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> int:
    """The number of tokens of a chat in the chat template."""
    return len(tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"])
