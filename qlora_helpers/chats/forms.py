"""The forms in which people write chats, and how each becomes messages.

A form is told by the names of its columns, once for a file. Where two readings are possible, none is chosen: the user
names one. Sources of the forms: messages and prompt-completion are TRL's ("Dataset formats and types" in its
documentation), with OpenAI's additions to a message; Alpaca's is that of Stanford's data set, without its English frame
around the instruction; ShareGPT's is that of FastChat and Axolotl.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from qlora_helpers import validation
from qlora_helpers.chats.messages import ROLES, Chat, ChatError, FormLeftOpen, fault_in
from qlora_helpers.chats.strict_json import NotJson, decode, quoted

__all__ = ["FORMS", "Reading", "columns_of", "convert", "detect", "known", "read_json_cells"]

FORMS = ("messages", "alpaca", "sharegpt", "prompt-completion", "question-answer")

# Names of columns, written as by `_plain`, with the usual one of each part first. These hold a list of messages; the
# first two do so whatever is in them.
_TURNS = ("messages", "conversations", "conversation", "chat", "dialog", "dialogue", "turns")
_ANSWERS = ("completion", "response", "answer", "output")
_PARTS = {
    "alpaca": {"instruction": ("instruction",), "input": ("input", "context"), "output": ("output", *_ANSWERS)},
    "prompt-completion": {"prompt": ("prompt",), "completion": ("completion", *_ANSWERS)},
    "question-answer": {
        "question": (
            "question", "query", "q", "input", "user", "human", "frage", "pregunta", "domanda", "pergunta", "vraag",
        ),
        "answer": (
            "answer", *_ANSWERS, "a", "reply", "assistant", "gpt", "antwort", "respuesta", "réponse", "reponse", "risposta",
            "resposta", "antwoord",
        ),
    },
}  # fmt: skip
_OPTIONAL = ("input", "system")
_SYSTEM = ("system", "systemprompt", "systemmessage")
_REFUSED = {
    **dict.fromkeys(("tools", "functions"), "calls of tools are not learnt here"),
    **dict.fromkeys(("image", "images", "audio", "audios", "video", "videos"), "only text is learnt here"),
}
_PAIRS = {"chosen", "rejected"}
_KNOWN = {
    *_TURNS, *_SYSTEM, *_REFUSED, *_PAIRS, *(name for parts in _PARTS.values() for names in parts.values() for name in names)
}  # fmt: skip
_FORMS_IN_WORDS = (
    "messages (a list of role and content), alpaca (instruction, input, output), sharegpt (conversations, a list of from "
    "and value), prompt-completion (prompt, completion), question-answer (question, answer)"
)

# other names of the three roles; ShareGPT has the first two by itself
_ROLES_OF_SHAREGPT = {"human": "user", "gpt": "assistant"}
_OTHER_ROLES = {
    **_ROLES_OF_SHAREGPT, "prompter": "user", "developer": "system", "model": "assistant", "bot": "assistant",
    "chatgpt": "assistant", "ai": "assistant",
}  # fmt: skip
_ROLES_OF_TOOLS = ("tool", "function", "tool_call", "function_call", "tool_response", "observation", "ipython")
_CALLS = ("tool_calls", "function_call", "tool_call_id")
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).casefold()


def known(name: str) -> bool:
    """Whether a form has a column of this name, in any spelling of capitals, spaces and underscores."""
    return _plain(name) in _KNOWN


@dataclass(frozen=True)
class Columns:
    """The columns of all rows together.

    Attributes:
        filled: how many rows have something in each; one that is null in every row is left out.
        styles: for each that holds lists of messages, how many rows write them as "messages" and as "sharegpt" does.
    """

    filled: Counter[str] = field(default_factory=Counter)
    styles: dict[str, Counter[str]] = field(default_factory=dict)


def _style(value: object) -> str | None:
    """How a list of messages is written; None if it is none."""
    if not (isinstance(value, list) and value and isinstance(value[0], dict)):
        return None
    keys = value[0].keys()
    return "messages" if "role" in keys else "sharegpt" if keys >= {"from", "value"} else None


def columns_of(rows: Iterable[object], header: Iterable[str] = ()) -> Columns:
    """What columns there are, also those of a header, and what they hold."""
    columns = Columns(Counter(dict.fromkeys(header, 0)))
    for row in rows:
        if isinstance(row, dict):
            for name, value in row.items():
                if value is not None:
                    columns.filled[name] += value != ""
                    if style := _style(value):
                        columns.styles.setdefault(name, Counter())[style] += 1
    return columns


def read_json_cells(rows: dict[int, object], faults: dict[int, str]) -> int:
    """Take lists of messages that were written into a text cell as JSON out of it, in place.

    Returns:
        In how many cells there was one. A row whose cell begins like a list and is no JSON goes to `faults`.
    """
    read = 0
    for number, row in list(rows.items()):
        for name, value in row.items() if isinstance(row, dict) else ():
            if isinstance(value, str) and value.lstrip().startswith("[") and _plain(name) in _TURNS:
                try:
                    row[name] = decode(value)
                    read += 1
                except NotJson as error:
                    faults[number] = f"{quoted(name)} is {error}"
    for number in faults.keys() & rows.keys():
        del rows[number]
    return read


@dataclass(frozen=True)
class Reading:
    """How the rows of a file are read.

    Attributes:
        form: one of `FORMS`.
        columns: the name of the column for each part of the form: "messages"; "instruction", "input" and "output";
            "prompt" and "completion"; "question" and "answer"; and "system", where there is one.
        refused: columns with what cannot be learnt here, and why.
        of_lists: whether prompt and completion are lists of messages.
    """

    form: str
    columns: dict[str, str]
    refused: dict[str, str]
    of_lists: bool = False

    def said(self) -> str:
        """What became what; "" if the rows are messages already."""
        named = {part: quoted(column) for part, column in self.columns.items()}
        if self.form == "messages":
            said = "" if named["messages"] == '"messages"' else f"{named['messages']} holds the messages"
        elif self.form == "sharegpt":
            said = f'{named["messages"]} became messages: "from" the role (human: user, gpt: assistant), "value" the content'
        elif self.of_lists:
            said = f"the messages of {named['prompt']} and {named['completion']} were put together"
        else:
            question, *extra, answer = (named[part] for part in _PARTS[self.form] if part in named)
            extra = f", with {extra[0]} after an empty line where there is any," if extra else ""
            said = f"{question}{extra} became the user's message, {answer} the assistant's"
        system = f"{named['system']} the system's message where there is any" if "system" in named else ""
        return ", ".join(filter(None, (said, system)))


def detect(columns: Columns, form: str | None = None, unread: Iterable[str] = ()) -> Reading:
    """How to read rows with these columns.

    Args:
        form: one of `FORMS`, to choose where several are possible.
        unread: names of further columns, for the message.

    Raises:
        FormLeftOpen: several are possible, or two columns can be the same part.
        ChatError: none is possible. Both messages say what to do.
    """
    possible = _possible(columns)
    chosen = {name: parts for name, parts in possible.items() if form in (None, name)}
    if form is None:
        used = {name: {column for names in parts.values() for column in names} for name, parts in possible.items()}
        chosen = {name: parts for name, parts in chosen.items() if not any(used[name] < more for more in used.values())}
    if not chosen:
        raise ChatError(_nothing_fits(columns, form, unread))
    if len(chosen) > 1:
        readings = (
            f"{name} ({', '.join(quoted(column) for names in _usual(parts).values() for column in names)})"
            for name, parts in chosen.items()
        )
        choice = " or ".join(f"form={name!r}" for name in chosen)
        raise FormLeftOpen(
            f"it can be read as {' or as '.join(readings)}: choose {choice} (--form on the command line)"
        )
    ((name, parts),) = chosen.items()
    parts = _usual(parts) if form else parts
    system = [name for name in columns.filled if _plain(name) in _SYSTEM]
    parts |= {"system": system} if system else {}
    for part, names in parts.items():
        if len(names) > 1:
            raise FormLeftOpen(
                f"the columns {' and '.join(map(quoted, names))} can each be the {part} of the form {name}: rename or remove "
                f"all but one{_choice(name, parts)}"
            )
    found = {part: names[0] for part, names in parts.items()}
    refused = {name: _REFUSED[_plain(name)] for name in columns.filled if _plain(name) in _REFUSED}
    return Reading(name, found, refused, name == "prompt-completion" and found["prompt"] in columns.styles)


def _usual(parts: dict[str, list[str]]) -> dict[str, list[str]]:
    """Of several columns that can be a part, the one that has its usual name, which is that of the part."""
    return {part: [name for name in names if _plain(name) == part] or names for part, names in parts.items()}


def _choice(form: str, parts: dict[str, list[str]]) -> str:
    usual = _usual(parts)
    if any(len(names) > 1 for names in usual.values()):
        return ""
    taken = ", ".join(quoted(names[0]) for names in usual.values())
    return f", or choose form={form!r} (--form on the command line) to take {taken}"


def _possible(columns: Columns) -> dict[str, dict[str, list[str]]]:
    """Each form that the columns can have, with the columns for each of its parts."""
    plain = {name: _plain(name) for name in columns.filled}
    possible: dict[str, dict[str, list[str]]] = {}
    for name in columns.filled:
        of_another_form = plain[name] in _KNOWN and plain[name] not in _TURNS
        if not of_another_form and (name in columns.styles or plain[name] in _TURNS[:2]):
            by_name = "sharegpt" if plain[name] == "conversations" else "messages"
            for form in columns.styles.get(name, (by_name,)):
                possible.setdefault(form, {"messages": []})["messages"].append(name)
    for form, parts in _PARTS.items():
        found = {part: [name for name in columns.filled if plain[name] in names] for part, names in parts.items()}
        if all(names or part in _OPTIONAL for part, names in found.items()):
            possible[form] = {part: names for part, names in found.items() if names}
    return possible


def _nothing_fits(columns: Columns, form: str | None, unread: Iterable[str]) -> str:
    names = [*columns.filled, *unread]
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    found = f"its columns are {', '.join(map(quoted, names[:20]))}{more}" if names else "its rows have no columns"
    if form is not None:
        return f"form={form!r} does not fit: {found}. The forms are {_FORMS_IN_WORDS}"
    if set(map(_plain, names)) >= _PAIRS:
        found += ", which is data of preferences, and not of chats"
    elif {"role", "content"} <= set(names):
        found += ", so each row is one message: put all messages of a chat into one list"
    return f"no form of chats fits: {found}. Name the columns as one of these forms does: {_FORMS_IN_WORDS}"


def convert(row: object, reading: Reading, changed: list[str]) -> Chat:
    """One row as a chat.

    Args:
        changed: gets a line for each thing that was changed in the row.

    Raises:
        ChatError: says what is wrong with the row.
    """
    columns = reading.columns
    if not isinstance(row, dict):
        nothing = f"it is no object: expected one with {', '.join(map(quoted, columns.values()))}"
        raise ChatError(fault_in(row) if columns.get("messages") == "messages" else nothing)
    for name, why in reading.refused.items():
        if row.get(name) not in (None, "", [], {}, "[]"):
            raise ChatError(f"it has {quoted(name)}: {why}")
    if "messages" in columns:
        chat = _chat_of(row, columns["messages"], reading.form, changed)
    elif reading.form == "prompt-completion" and any(isinstance(row.get(name), list) for name in columns.values()):
        chat = []
        for part, role in (("prompt", "user"), ("completion", "assistant")):
            name = columns[part]
            if isinstance(row.get(name), list):
                chat += _messages(row[name], "messages", changed)
            else:
                changed.append(f"{name} was a text and became a message")
                chat.append({"role": role, "content": _filled(row, name, changed)})
    else:
        question, *extra, answer = (columns[part] for part in _PARTS[reading.form] if part in columns)
        asked = _filled(row, question, changed)
        if extra and (more := _text(row, extra[0], changed)).strip():
            asked += f"\n\n{more}"
        answer = _filled(row, answer, changed)
        chat = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    if "system" in columns and (system := _text(row, columns["system"], changed)).strip():
        if chat[:1] and chat[0]["role"] == "system":
            raise ChatError(f"it has {quoted(columns['system'])} and a system message: leave out one of them")
        chat = [{"role": "system", "content": system}, *chat]
    if fault := fault_in({"messages": chat}):
        raise ChatError(fault)
    return chat


def _text(row: dict, name: str, changed: list[str]) -> str:
    """The text in a column; "" if there is none. A number is written as Python does; nothing else is taken for a text."""
    value = row.get(name)
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        changed.append(f"number in {quoted(name)} became text")
        return str(value)
    raise ChatError(f"{quoted(name)} is {validation.shown(value)}: write it as a text")


def _filled(row: dict, name: str, changed: list[str]) -> str:
    if name not in row:
        raise ChatError(f"it has no {quoted(name)}")
    text = _text(row, name, changed)
    if not text.strip():
        raise ChatError(f"{quoted(name)} is empty")
    return text


def _chat_of(row: dict, name: str, form: str, changed: list[str]) -> Chat:
    turns = row.get(name)
    if not isinstance(turns, list) or not turns:
        said = fault_in({}) if (name, form) == ("messages", "messages") else None
        raise ChatError(said or f"{quoted(name)} is no list with at least one message")
    return _messages(turns, form, changed)


def _messages(turns: list, form: str, changed: list[str]) -> Chat:
    """Messages with a role and a content alone."""
    return [
        turn
        if isinstance(turn, dict)
        and turn.keys() == {"role", "content"}
        and _is_role(turn["role"])
        and isinstance(turn["content"], str)
        else _message(turn, place, form, changed)
        for place, turn in enumerate(turns, start=1)
    ]


def _is_role(role: object) -> bool:
    return isinstance(role, str) and role in ROLES


def _message(turn: object, place: int, form: str, changed: list[str]) -> dict[str, str]:
    role_key, content_key = ("from", "value") if form == "sharegpt" else ("role", "content")
    wanted = f'{{"{role_key}": "…", "{content_key}": "…"}}'
    if not isinstance(turn, dict):
        raise ChatError(f"message {place} is not {wanted}")
    role = _role(turn.get(role_key), place, form, changed)
    named = f"message {place} ({role})" if _is_role(role) else f"message {place}"
    for key in _CALLS:
        if turn.get(key):
            raise ChatError(f"{named} has {quoted(key)}: calls of tools are not learnt here")
    for key in _THOUGHTS:
        if turn.get(key):
            raise ChatError(f"{named} has {quoted(key)}, which would be lost: write it into the content, or remove it")
    if "weight" in turn and turn["weight"] not in (None, 1):
        raise ChatError(
            f"{named} has the weight {validation.shown(turn['weight'])}: every answer is learnt here in the same way. Remove "
            "the weight, or the chat"
        )
    if content_key not in turn:
        raise ChatError(f"message {place} is not {wanted}")
    content = _content(turn[content_key], named, content_key, changed)
    left_out = turn.keys() - {role_key, content_key, "weight", *_CALLS, *_THOUGHTS}
    changed += (f"{quoted(key)} of a message was left out" for key in sorted(left_out) if turn[key] is not None)
    return {"role": role, "content": content}


def _role(role: object, place: int, form: str, changed: list[str]) -> object:
    """The role by its usual name; what is none, for `fault_in` to refuse."""
    if not isinstance(role, str) or role in ROLES:
        return role
    name = role.strip().lower()
    if name in _ROLES_OF_TOOLS:
        raise ChatError(f"message {place} has the role {validation.shown(role)}: calls of tools are not learnt here")
    usual = name if name in ROLES else _OTHER_ROLES.get(name)
    if usual is None:
        return role
    if form != "sharegpt" or role not in _ROLES_OF_SHAREGPT:
        changed.append(f"{role.strip()} became {usual}")
    return usual


def _content(content: object, named: str, key: str, changed: list[str]) -> str:
    """The text of a message; a list of texts alone is joined, with a line break between two."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ChatError(
            f'{named} has "{key}": {"null" if content is None else validation.shown(content)}, which is no text'
        )
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ChatError(
                f"{named} has a part of the type {validation.shown(kind)} in its {key}: only text is learnt here"
            )
        texts.append(part["text"])
    changed.append("content in parts of text was joined")
    return "\n".join(texts)
