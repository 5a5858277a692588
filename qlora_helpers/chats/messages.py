"""A chat: messages of a user and an assistant in turn, and what can be wrong with one."""

from __future__ import annotations

from qlora_helpers import validation

__all__ = ["Chat", "ChatError", "FormLeftOpen", "check_chats", "fault_in", "split_question"]

ROLES = ("system", "user", "assistant")
Chat = list[dict[str, str]]
FORM = '{"messages": [...]}'


class ChatError(ValueError):
    """A chat file with bad lines; the message names them."""


class FormLeftOpen(ChatError):
    """The columns of a file can be read in more than one way; the message says in which."""


def fault_in(chat: object) -> str | None:
    """The first thing that is wrong with one decoded line of a chat file; None if nothing is."""
    if not isinstance(chat, dict) or not isinstance(chat.get("messages"), list) or not chat["messages"]:
        return f"no messages: expected {FORM} with at least one message"
    previous = None
    for number, message in enumerate(chat["messages"], start=1):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            return f'message {number} is not {{"role": "…", "content": "…"}}'
        role, content = message.get("role"), message["content"]
        if role not in ROLES:
            return f"message {number} has the unknown role {validation.shown(role)}: use one of {', '.join(ROLES)}"
        if role == "system" and number > 1:
            return f"message {number} has the role 'system', which may only come first"
        if role == previous:
            return f"messages {number - 1} and {number} both have the role {role!r}"
        if not content.strip():
            return f"message {number} ({role}) is an empty {'answer' if role == 'assistant' else 'message'}"
        if role == "assistant" and previous != "user":
            return f"message {number} is an answer without a question"
        if half := half_a_pair(content):
            return f"message {number} ({role}) {half}"
        previous = role
    if previous != "assistant":
        return "the last message is not an answer: there is nothing to learn from this chat"
    return None


def half_a_pair(text: str) -> str:
    """What is wrong with a text that no tokenizer takes; "" if nothing is. JSON allows it, as \\ud83d without its other half."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = ascii(text[error.start]).strip("'")
        return f"has half a surrogate pair ({half}) at character {error.start + 1}: replace it by the character that was meant"
    return ""


def check_chats(chats: list[Chat], name: str = "chat") -> None:
    """Make sure that chats, which need not come from a file, are chats.

    Args:
        name: of one of them, for the error.

    Raises:
        ValueError: names the first that is none by its number, and what is wrong with it.
    """
    for number, chat in enumerate(chats, start=1):
        if fault := fault_in({"messages": chat}):
            raise ValueError(f"{name} {number}: {fault}")


def split_question(chat: Chat) -> tuple[Chat, str]:
    """The messages before the last answer, and that answer."""
    return chat[:-1], chat[-1]["content"]
