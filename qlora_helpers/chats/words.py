"""How many tokens a tokenizer needs for a word, and the warning where it knows few words of the data.

A tokenizer that does not know a word spells it, letter by letter or byte by byte. The model has then learnt little about
the word, a chat takes four times as many tokens, and LoRA, which leaves the embeddings as they are, does not mend that.

A word is what stands between white space. Chinese, Japanese, Thai, Lao, Burmese and Khmer put none between words: each of
their characters counts as one. What has a digit in it is left out, since many tokenizers take digits one by one on purpose.

The limit was chosen from these tokens per character, white space included:

    shipped tokenizer       0.20 on its own chats   0.91 on plain English, 1.03 German
    BPE of 4,000 tokens     0.25 on English         0.45 on names it does not know, 0.59 German, 0.67 Finnish
    BPE of 16,000 tokens    0.26 on English         0.48 German, 0.56 Finnish
    single bytes            1.00 on English         1.85 Russian, 3.0 Chinese, Japanese and Thai

(both BPEs were trained on English). Words are spelled out from 0.8 tokens per character on; in scripts without spaces,
where one token per character is common, from 2 on.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_helpers.chats.messages import Chat
from qlora_helpers.chats.templates import ids_of
from qlora_helpers.paths import data_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["tokens_per_word", "warning_of_spelling", "words_in"]

# Thai, Lao, Burmese, Khmer, kana, Han
UNSPACED = (
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
SPELLED, SPELLED_UNSPACED = 0.8, 2.0  # tokens per character
SAMPLE = 1_000  # chats
_WORD = re.compile(rf"[{UNSPACED}]|[^\s{UNSPACED}]+")
_UNSPACED = re.compile(rf"[{UNSPACED}]")
_WITH_A_DIGIT = re.compile(rf"[^\s{UNSPACED}]*\d[^\s{UNSPACED}]*")


def words_in(text: str) -> list[str]:
    """The words of a text: what stands between white space, and each character of a script that is written without it."""
    return _WORD.findall(text)


def _texts(chats: list[Chat]) -> list[str]:
    step = max(1, len(chats) // SAMPLE)
    contents = [message["content"] for chat in chats[::step] for message in chat]
    return [" ".join(_WITH_A_DIGIT.sub("", content).split()) for content in contents]


def _tokens(texts: list[str], tokenizer) -> int:
    return sum(map(len, ids_of(texts, tokenizer)))


def tokens_per_word(chats: list[Chat], tokenizer: PreTrainedTokenizerBase) -> float:
    """The mean number of tokens of a word in the messages, over about 1,000 chats evenly spread; 0.0 if there is no word.

    English takes about 1.3 in the tokenizers of large models.
    """
    texts = _texts(chats)
    words = sum(len(words_in(text)) for text in texts)
    return _tokens(texts, tokenizer) / words if words else 0.0


def warning_of_spelling(chats: list[Chat], tokenizer: PreTrainedTokenizerBase) -> str:
    """What to do about a tokenizer that spells out the words of the data, as a sentence; "" if it knows them."""
    texts = _texts(chats)
    unspaced = sum(len(_UNSPACED.findall(text)) for text in texts)
    spaced = sum(map(len, texts)) - unspaced
    tokens = _tokens(texts, tokenizer)
    if not tokens or tokens < SPELLED * spaced + SPELLED_UNSPACED * unspaced:
        return ""
    shipped = Path(tokenizer.name_or_path or ".").resolve() == data_path("tiny-llama").resolve()
    count = f"{tokens_per_word(chats, tokenizer):.1f} tokens per word"
    if shipped:
        return (
            f"{count}: the shipped model knows only the words of its invented world. It spells yours letter by letter, so it "
            "cannot learn from this data. Take another model (--model): on a GPU such as Qwen/Qwen2.5-1.5B-Instruct, and without "
            "one smollm2-135m, which the command fetch puts on this disk"
        )
    return (
        f"{count}: this tokenizer knows few words of your data and spells them out, so the model can hardly learn them: take "
        "a model that was trained on this language"
    )
