"""The chat template: chats as text, and which of their tokens an answer is made of.

Training on the answers alone needs a mark on every token of an answer. A template with `{% generation %}` sets the marks
itself. Few published ones have it. For the others the answer is found by comparison: the text up to a question, ready to
be answered (`add_generation_prompt=True`), must be the beginning of the whole text, in tokens; what follows, through the
special token that ends the turn, is the answer. So a model is trained on exactly the text that it is asked to continue.

Where this does not hold, the chat is refused with the reason: a template that writes other text before an answer than
in front of a question, one that changes an earlier answer when messages follow, one that leaves a message out, and one
that ends no turn, after which a model would never stop.

The marks of TRL's training templates cover the same answers, and often some text of the template's own as well: the line
break before an answer (Qwen2.5), the assistant's header (DeepSeek), and what follows the end of the turn (Gemma, Phi-3,
Qwen). A model need not learn these: they are part of the next prompt, or generation has stopped. They do no harm.
"""

from __future__ import annotations

import re
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from qlora_helpers import validation
from qlora_helpers.chats.messages import Chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TemplateError", "has_marks", "ids_of", "mark", "missing_text", "rendered", "special_tokens", "stop_tokens"]

CHUNK = 1_000  # chats at once: one call for many is twice as fast as one for each, and all at once need much memory
_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_THOUGHT = "<think>\n\n</think>\n\n"


class TemplateError(ValueError):
    """The chat template refuses a chat, or its answers cannot be told from the rest."""


class _Trouble(Exception):
    """What is wrong with one chat in this template."""


def has_marks(template: str | None) -> bool:
    """Whether a chat template marks the assistant's answers by itself."""
    return _MARK.search(template or "") is not None


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """The special tokens of a tokenizer, by their id. An added token that is not special, as Qwen's <think>, is text."""
    special = {id: str(token) for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return special | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))


# Chats as text


def rendered(
    chats: dict[int, Chat], tokenizer: PreTrainedTokenizerBase, to_be_answered: bool = False
) -> tuple[dict[int, str], dict[int, str]]:
    """Chats as the template writes them.

    Args:
        chats: by their number.
        to_be_answered: with what the template adds to ask for an answer (`add_generation_prompt`).

    Returns:
        The text of each chat; and for those that the template refuses, what it says. Both by number.

    Raises:
        ValueError: there is no template, or it is no Jinja template.
    """
    import jinja2  # not above: the command line's doctor must start where no package is installed

    if not tokenizer.chat_template:
        raise ValueError("tokenizer.chat_template is not set: take the tokenizer of a model that was made for chats")
    try:
        texts = (
            tokenizer.apply_chat_template(list(chats.values()), tokenize=False, add_generation_prompt=to_be_answered)
            if chats
            else []
        )
        return dict(zip(chats, texts, strict=True)), {}
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"tokenizer.chat_template is no Jinja template: {error} (line {error.lineno})") from error
    except Exception:  # a template is a program, and may fail in any way
        texts, refused = {}, {}
        for number, chat in chats.items():
            try:
                texts[number] = tokenizer.apply_chat_template(
                    chat, tokenize=False, add_generation_prompt=to_be_answered
                )
            except Exception as error:
                said = str(error) if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"
                refused[number] = (
                    f"the chat template refuses it: {' '.join(said.split())}{_cure(chat, tokenizer, to_be_answered)}"
                )
        if not refused:  # no chat is to blame
            raise
        return texts, refused


def ids_of(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The tokens of texts in which all special tokens are written already, as the template has done."""
    if not texts:
        return []
    # verbose: without a warning about texts longer than the model takes, which are counted here and not run
    encoded = tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )
    return encoded["input_ids"]


FOLD = "put its text at the beginning of the first question"


def _cure(chat: Chat, tokenizer, to_be_answered: bool) -> str:
    """What to do with a chat that is refused because of its system message; "" if that is not the reason."""
    if len(chat) < 2 or chat[0]["role"] != "system":
        return ""
    try:
        tokenizer.apply_chat_template(chat[1:], tokenize=False, add_generation_prompt=to_be_answered)
    except Exception:
        return ""
    return f". Without its system message it would be taken: {FOLD}"


def _end_of(content: str, text: str, start: int = 0, end: int | None = None, last: bool = False) -> int:
    """Where a message's text ends in the template's; -1 if it is not there. A template may change white space."""
    end = len(text) if end is None else end
    plain = content.strip()
    at = text.rfind(plain, start, end) if last else text.find(plain, start, end)
    if at >= 0:
        return at + len(plain)
    places = [place for place in range(start, end) if not text[place].isspace()]
    bare, wanted = "".join(text[place] for place in places), "".join(content.split())
    at = bare.rfind(wanted) if last else bare.find(wanted)
    return places[at + len(wanted) - 1] + 1 if at >= 0 else -1


def missing_text(chat: Chat, text: str) -> str:
    """Which message of a chat is not in what the template wrote, as a sentence; "" if all are.

    The questions and answers must be there in their order; a system message may be anywhere, since some templates put it
    into a question.
    """
    place = 0
    for number, message in enumerate(chat, start=1):
        system = message["role"] == "system"
        end = _end_of(message["content"], text, 0 if system else place)
        if end < 0:
            cure = FOLD if system else "write it so that the template keeps it, or use another chat_template"
            return f"the chat template leaves out {validation.shown(message['content'][:60])}, of message {number} ({message['role']}): {cure}"  # fmt: skip
        place = place if system else end
    return ""


# The marks


def mark(
    chats: dict[int, Chat], tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[int, dict[str, list[int]]], dict[int, str]]:
    """Chats as tokens, with a mark on each token of an answer.

    Args:
        chats: by their number. That no special token is typed into them was checked, by `check_texts`.

    Returns:
        The rows: "input_ids", and "assistant_masks" with 1 for each token of an answer and of the end of its turn, else 0;
        and for chats that cannot be marked, the reason. Both by number.

    Raises:
        ValueError: there is no template, or it is no Jinja template.
    """
    rows, faults = {}, {}
    numbers = list(chats)
    for start in range(0, len(numbers), CHUNK):
        chunk = {number: chats[number] for number in numbers[start : start + CHUNK]}
        texts, refused = rendered(chunk, tokenizer)
        faults |= refused
        for number, text in list(texts.items()):
            if fault := missing_text(chunk[number], text):
                faults[number] = fault
                del texts[number]
        chunk = {number: chunk[number] for number in texts}
        if chunk:
            marked = _marked_by_template if has_marks(tokenizer.get_chat_template()) else _marked_by_comparison
            new_rows, new_faults = marked(chunk, texts, tokenizer)
            rows |= new_rows
            faults |= new_faults
    for number in [number for number, row in rows.items() if _begins_twice(row["input_ids"], tokenizer)]:
        del rows[number]
        begin = tokenizer.bos_token
        faults[number] = f"the text begins with {begin!r} twice: take one of them out of the chat template"
    return rows, faults


def _begins_twice(ids: list[int], tokenizer) -> bool:
    return tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2


def _marked_by_template(chats: dict[int, Chat], texts: dict[int, str], tokenizer) -> tuple[dict, dict]:
    encoded = tokenizer.apply_chat_template(
        list(chats.values()), return_dict=True, return_assistant_tokens_mask=True, tokenizer_kwargs={"verbose": False}
    )
    prompts, refused = rendered({number: chat[:-1] for number, chat in chats.items()}, tokenizer, to_be_answered=True)
    rows, faults, special, blank = {}, dict(refused), special_tokens(tokenizer), {}

    def is_blank(id: int) -> bool:
        if id not in blank:
            blank[id] = id not in special and not tokenizer.decode([id]).strip()
        return blank[id]

    for number, ids, marks in zip(chats, encoded["input_ids"], encoded["assistant_masks"], strict=True):
        row = {"input_ids": ids, "assistant_masks": marks}
        try:
            if 1 not in marks:
                raise _Trouble(NO_MARK)
            if number in prompts and not texts[number].startswith(prompts[number]):
                raise _Trouble(
                    _asked_otherwise(chats[number], len(chats[number]) - 1, texts[number], prompts[number], tokenizer)
                )
            place = 0
            for marked, run in groupby(marks):
                place, start = place + len(list(run)), place
                end = place
                while marked and end > start and is_blank(ids[end - 1]):  # a line break after the end of the turn
                    end -= 1
                if marked and ids[end - 1] not in special:
                    raise _Trouble(NO_END_IN_MARKS)
        except _Trouble as trouble:
            faults[number] = str(trouble)
        else:
            if number not in refused:
                rows[number] = row
    return rows, faults


NO_MARK = (
    "the chat template marks no answer in it, so there is nothing to learn: put {% generation %} and {% endgeneration %} "
    "around what the assistant says, or take both out of the template; then the answers are found without them"
)
NO_END_IN_MARKS = (
    "the chat template does not mark the token that ends an answer, so the model would never learn to stop: put "
    "{% endgeneration %} after that token"
)


def _marked_by_comparison(chats: dict[int, Chat], texts: dict[int, str], tokenizer) -> tuple[dict, dict]:
    asked, answered = {}, {}
    for number, chat in chats.items():
        for place, message in enumerate(chat):
            if message["role"] == "assistant":
                asked[number, place] = chat[:place]
                if place < len(chat) - 1:
                    answered[number, place] = chat[: place + 1]
    prompts, faults = rendered(asked, tokenizer, to_be_answered=True)
    throughs, more = rendered(answered, tokenizer)
    refused = {number: fault for (number, _), fault in (faults | more).items()}
    ids = dict(zip(texts, ids_of(list(texts.values()), tokenizer), strict=True))
    prompt_ids = dict(zip(prompts, ids_of(list(prompts.values()), tokenizer), strict=True))
    # what stands for unknown characters is in no text
    special = {id: name for id, name in special_tokens(tokenizer).items() if id != tokenizer.unk_token_id}
    any_special = re.compile("|".join(map(re.escape, sorted(special.values(), key=len, reverse=True))) or "(?!)")
    rows, faults = {}, dict(refused)
    for number, chat in chats.items():
        if number in refused:
            continue
        text, tokens = texts[number], ids[number]
        ends = _SpecialTokens(text, tokens, special, any_special)
        marks = [0] * len(tokens)
        try:
            for place, message in enumerate(chat):
                if message["role"] == "assistant":
                    prompt, through = prompts[number, place], throughs.get((number, place), text)
                    if not text.startswith(prompt):
                        raise _Trouble(_asked_otherwise(chat, place, text, prompt, tokenizer, through))
                    last = _end_of_turn(place, message["content"], text, len(prompt), through, ends)
                    first = len(prompt_ids[number, place])
                    if tokens[:first] != prompt_ids[number, place]:
                        raise _Trouble(MERGED.format(place + 1, validation.shown(prompt[-20:])))
                    marks[first : last + 1] = [1] * (last + 1 - first)
        except _Trouble as trouble:
            faults[number] = str(trouble)
        else:
            rows[number] = {"input_ids": tokens, "assistant_masks": marks}
    return rows, faults


MERGED = (
    "the tokenizer joins the end of the prompt of message {} with the beginning of the answer: asked with {}, the model would "
    "see other tokens than in training. Take the white space from the end of the template's generation prompt"
)


class _Span(NamedTuple):
    """A special token: where it starts and ends in the text, and its place among the tokens."""

    start: int
    end: int
    token: int


class _SpecialTokens:
    """Where the special tokens of a text are, in characters and in tokens."""

    def __init__(self, text: str, tokens: list[int], special: dict[int, str], pattern: re.Pattern) -> None:
        found = list(pattern.finditer(text))
        places = [place for place, id in enumerate(tokens) if id in special]
        self.agree = [match[0] for match in found] == [special[tokens[place]] for place in places]
        self.spans = [_Span(*match.span(), place) for match, place in zip(found, places, strict=False)]
        # without them, of the same length: an answer such as "end" is not to be found in <|end|>
        self.text = pattern.sub(lambda match: "\0" * len(match[0]), text)


def _end_of_turn(place: int, content: str, text: str, start: int, through: str, special: _SpecialTokens) -> int:
    """The place of the token with which an answer ends; the answer begins at the character `start` of the text.

    Args:
        through: the chat through this answer, as text. What comes later than where it differs from `text` is no part of
            this turn.
    """
    if not special.agree:
        raise _Trouble("the tokenizer does not read the special tokens that the chat template writes as such")
    limit = len(text) if through is text else _same(text, through)
    end = _end_of(content, special.text, start, limit, last=True)
    after = [span for span in special.spans if span.start >= end]
    if end < 0 or (after and after[0].start < limit < after[0].end):
        raise _Trouble(CHANGED.format(place + 1))
    if not after or after[0].start >= limit:
        said = validation.shown(text[end : end + 20]) if text[end:].strip() else "nothing"
        raise _Trouble(NO_END.format(place + 1, said))
    last = after[0]
    for span in after[1:]:  # Command R ends an answer, and then the turn
        if span.start > last.end or span.end > limit:
            break
        last = span
    return last.token


CHANGED = (
    "the chat template changes earlier messages when others follow: message {} (assistant), or what leads to it, is not as "
    "it is when it comes last. Make it several chats of one question and one answer each"
)
NO_END = (
    "the chat template writes no special token after message {} (assistant), but {}: the model would never learn to stop. Let "
    "the template write {{{{ eos_token }}}} after each answer"
)


def _same(text: str, other: str) -> int:
    """How many characters two texts have in common at their beginning."""
    pairs = zip(text, other, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(text), len(other)))


def _asked_otherwise(chat: Chat, place: int, text: str, prompt: str, tokenizer, through: str = "") -> str:
    """Why the prompt for an answer is not the beginning of the text that is trained, and what to do."""
    if through is not text and through.startswith(prompt):
        return CHANGED.format(place + 1)
    same = _same(text, prompt)
    rest, instead = prompt[same:], text[same : same + 20]
    fault = (
        f"the chat template asks for message {place + 1} (assistant) with {validation.shown(rest[:60])}, where the text for training has "
        f"{validation.shown(instead)}: the model would be trained on one text and asked with another"
    )
    for setting in ("{% set enable_thinking = false %}", "{% set enable_thinking = true %}"):
        template = setting + tokenizer.get_chat_template()
        try:
            whole = tokenizer.apply_chat_template(chat, tokenize=False, chat_template=template)
            asked = tokenizer.apply_chat_template(
                chat[:place], tokenize=False, chat_template=template, add_generation_prompt=True
            )
        except Exception:  # then it is no cure
            continue
        if whole.startswith(asked):
            return f"{fault}. Put {setting!r} in front of tokenizer.chat_template"
    if rest.strip() == "<think>":
        thinking = [*chat[:place], {**chat[place], "content": _THOUGHT + chat[place]["content"]}]
        if tokenizer.apply_chat_template(thinking, tokenize=False).startswith(prompt):
            return f"{fault}. Begin each answer with its thoughts, such as {_THOUGHT!r} for none"
    return f"{fault}. Use a chat_template that writes the same in both"


def stop_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids with which answers end: the tokenizer's EOS token and the end of a turn in its chat template.

    They differ for some models: Gemma's EOS token is <eos>, and its answers end with <end_of_turn>.
    """
    stops = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    texts, _ = rendered(
        {1: [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]}, tokenizer
    )
    if texts:
        special = special_tokens(tokenizer)
        after = ids_of([texts[1].rpartition("answer")[2]], tokenizer)[0]
        stops += [id for id in after if id in special][:1]
    return list(dict.fromkeys(stops))
