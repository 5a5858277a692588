r"""A tokenizer as a GGUF file states it: from transformers into the file's entries, and back by llama.cpp's rules.

A GGUF file has the tokens, their kinds and the merges of a byte-level BPE tokenizer, but not how text is cut into words
before that: for this, `tokenizer.ggml.pre` has one of the names that llama.cpp knows, and llama.cpp cuts as it is written
there under the name (src/llama-vocab.cpp, `llm_tokenizer_bpe` for the patterns, `llama_vocab::impl::load` for the names and
for which of them a word that is a token as a whole is taken before any merge). A wrong name is no error anywhere: the model
gets other tokens than it was trained on. So a tokenizer whose way of cutting is none of those below is refused.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from gguf import GGUFReader, TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qlora_helpers.chats import Chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["CONVERTER", "FileTokenizer", "chat_text", "file_tokenizer", "read_tokenizer", "with_blanks"]

CONVERTER = "llama.cpp's own converter, convert_hf_to_gguf.py, knows more: take that one"
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# for each name that is written here: where llama.cpp cuts, one pattern after the other, and whether it ignores merges
_CUTS = {
    "llama-bpe": ((_LLAMA3,), True),
    "dbrx": ((_LLAMA3,), False),
    "qwen2": ((_QWEN2,), False),
    "smollm": ((r"\p{N}", _GPT2), False),
    "gpt-2": ((_GPT2,), False),
}
_WORD = re.compile(r"Ġ(?:[^\W\d_]+|[^\w\s])")  # what "llama-bpe" leaves whole, as the GPT-2 pattern does
_YEAR = re.compile(r"Ġ\d+")  # and what it cuts
_CONTENT = re.compile(r"""message(?:\[(['"])content\1\]|\.content\b)""")
_MARKER = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")
_PROBES: list[Chat] = [
    [{"role": "user", "content": "Hello"}],
    [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Why?"},
    ],
]


@dataclass(frozen=True)
class FileTokenizer:
    """What a GGUF file says of a tokenizer.

    Attributes:
        pre: the name of the way in which text is cut, for `tokenizer.ggml.pre`.
        tokens: by their ids; ordinary ones in GPT-2's alphabet for bytes, special ones as they are typed.
        kinds: of each, as `gguf.TokenType`.
        merges: "left right", the first to be made first.
        bos, eos, pad: ids; None where there is none.
        add_bos: whether the tokenizer itself puts the BOS token before a text.
        template: the chat template, without marks for training; None if there is none.
        blanks: whether the template puts a blank before each message, since this tokenizer does so itself and llama.cpp does
            not.
        words: whether it is a list of words without merges, as the shipped model's.
        remarks: what llama.cpp does in another way, in sentences.
    """

    pre: str
    tokens: tuple[str, ...]
    kinds: tuple[int, ...]
    merges: tuple[str, ...]
    bos: int | None
    eos: int | None
    pad: int | None
    add_bos: bool
    template: str | None
    blanks: bool = False
    words: bool = False
    remarks: tuple[str, ...] = ()


def file_tokenizer(tokenizer: PreTrainedTokenizerBase, rows: int) -> FileTokenizer:
    """What a GGUF file has to say of a tokenizer, so that llama.cpp makes the same tokens.

    Args:
        tokenizer: as transformers loads it.
        rows: of the model's embedding. Ids without a token get names such as "[PAD151665]", as llama.cpp's converter gives.

    Raises:
        ValueError: the tokenizer is no byte-level BPE, cuts text in a way that is not known here, changes text in a way that
            llama.cpp does not, or has more tokens than the embedding has rows.
    """
    backend = tokenizer.backend_tokenizer
    saved = json.loads(backend.to_str())
    model, remarks = saved["model"], []
    _check_bpe(saved)
    vocab = backend.get_vocab()
    if max(vocab.values()) >= rows:
        raise ValueError(
            f"tokenizer has ids up to {max(vocab.values())}, and the model's embedding has {rows} rows: take the tokenizer "
            "of this model"
        )
    merges = tuple(merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])
    pre, blanks = _pre(saved, list(model["vocab"]), bool(merges))
    if saved["normalizer"]:
        remarks.append(
            "The tokenizer composes accents (NFC), and llama.cpp does not: they are other tokens if typed apart."
        )
    names = {id: token for token, id in vocab.items()}
    tokens = [names.get(id, f"[PAD{id}]") for id in range(rows)]
    kinds = [TokenType.NORMAL if id in names else TokenType.UNUSED for id in range(rows)]
    for id, added in tokenizer.added_tokens_decoder.items():
        kinds[id] = TokenType.CONTROL if added.special else TokenType.USER_DEFINED
        if added.lstrip or added.rstrip:
            remarks.append(f"The tokenizer takes the blanks beside {added.content} away, and llama.cpp may not.")
    words = not merges
    if words:
        merges = (_never_made(set(vocab)),)
        remarks.append(
            "The tokenizer is a list of words and has no merges: llama.cpp cuts as for Llama 3. The same tokens come of the "
            "words of the list. Others may become other bytes' tokens, such as a number that begins like one of the list, or a "
            "sign right before a line break."
        )
        for id, token in enumerate(tokens):
            if _YEAR.fullmatch(token):  # found before text is cut
                tokens[id], kinds[id] = token.replace("Ġ", " "), TokenType.USER_DEFINED
    template, blanked = _template(tokenizer, blanks)
    if blanks:
        remarks.append(
            "The tokenizer puts a blank before a text, and llama.cpp does not: "
            + ("the chat template does it. " if blanked else "")
            + "Without a chat template, begin the text with a blank."
        )
    if template is None:
        remarks.append(
            "There is no chat template: llama.cpp would take one of its own, which this model was not trained on."
        )
    plain = tokenizer("a")["input_ids"]
    if len(plain) > 1 and plain[-1] == tokenizer.eos_token_id:
        raise ValueError(f"tokenizer ends each text with {tokenizer.eos_token}, which is not written here. {CONVERTER}")
    return FileTokenizer(
        pre,
        tuple(tokens),
        tuple(map(int, kinds)),
        merges,
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
        add_bos=bool(plain) and plain[0] == tokenizer.bos_token_id,
        template=template,
        blanks=blanked,
        words=words,
        remarks=tuple(remarks),
    )


def _check_bpe(saved: dict[str, Any]) -> None:
    model, normalizer = saved["model"], saved["normalizer"]
    if model["type"] != "BPE" or model.get("byte_fallback") or model.get("unk_token") or not saved["pre_tokenizer"]:
        raise ValueError(
            f"tokenizer is no byte-level BPE ({model['type']}{', of SentencePiece' * bool(model.get('byte_fallback'))}): only "
            f"those are written here. {CONVERTER}"
        )
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise ValueError(f"tokenizer marks parts of words, which GGUF has no entry for. {CONVERTER}")
    if normalizer and normalizer["type"] != "NFC":
        raise ValueError(f"tokenizer changes text ({normalizer['type']}) as llama.cpp does not. {CONVERTER}")


def _pre(saved: dict[str, Any], vocab: list[str], has_merges: bool) -> tuple[str, bool]:
    """The name for `tokenizer.ggml.pre`, and whether the tokenizer puts a blank before a text.

    Raises:
        ValueError: none of the names is known to mean the same.
    """
    pre = saved["pre_tokenizer"]
    parts = pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    ignores, last = bool(saved["model"].get("ignore_merges")), parts[-1]
    cuts = [_cut(part) for part in parts[:-1]]
    name = None
    if last["type"] == "ByteLevel" and None not in cuts:
        cuts += [_GPT2] if last["use_regex"] else []
        name = next((name for name, rule in _CUTS.items() if rule == (tuple(cuts), ignores)), None)
        if cuts == [_GPT2] and ignores and not has_merges:
            long = [token for token in vocab if len(token) > 1 and token not in _added(saved)]
            name = "llama-bpe" if all(_WORD.fullmatch(token) or _YEAR.fullmatch(token) for token in long) else None
    if name is None:
        shown = ", ".join(part["type"] for part in parts)
        raise ValueError(
            f"tokenizer cuts text in a way ({shown}{', ignoring merges' * ignores}) of which no name is known here, and with "
            f"another name llama.cpp would make other tokens. {CONVERTER}"
        )
    return name, bool(last["add_prefix_space"])


def _cut(part: dict[str, Any]) -> str | None:
    """The pattern at which a part of a pre-tokenizer cuts, each match by itself; None for any other part."""
    if part["type"] == "Digits" and part["individual_digits"]:
        return r"\p{N}"
    if part["type"] == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
        return part["pattern"].get("Regex")
    return None


def _added(saved: dict[str, Any]) -> set[str]:
    return {token["content"] for token in saved["added_tokens"]}


def _never_made(vocab: set[str]) -> str:
    """A merge that no text can lead to: llama.cpp wants one at least, and letters and digits are cut apart."""
    return next(f"{letter} 0" for letter in "abcdefghijklmnopqrstuvwxyz" if f"{letter}0" not in vocab)


def chat_text(tokenizer: PreTrainedTokenizerBase, chat: Chat, template: str | None = None) -> str | None:
    """A chat as text, up to where the answer begins if it ends with a question; None if the template takes no such chat.

    Args:
        template: instead of the tokenizer's own.
    """
    try:
        return tokenizer.apply_chat_template(
            chat,
            tokenize=False,
            chat_template=template,
            add_generation_prompt=chat[-1]["role"] != "assistant",
        )
    except (jinja2.TemplateError, TypeError, ValueError):
        return None


def with_blanks(chat: Chat) -> Chat:
    """The chat with a blank before each message that does not begin with one."""
    return [
        message
        | {
            "content": message["content"]
            if message["content"].startswith(" ")
            else f"{' ' * bool(message['content'])}{message['content']}"
        }
        for message in chat
    ]


def _template(tokenizer: PreTrainedTokenizerBase, blanks: bool) -> tuple[str | None, bool]:
    """The chat template for the file, and whether it puts a blank before each message.

    Raises:
        ValueError: blanks are needed, and the template is not of a form into which they can be put.
    """
    own = tokenizer.chat_template
    if isinstance(own, dict):  # several, of which transformers takes the one named default
        own = own.get("default")
    if not own:
        return None, False
    template = _MARKER.sub("", own)  # they are for training, and no other reader knows them
    if [chat_text(tokenizer, chat, template) for chat in _PROBES] != [chat_text(tokenizer, chat) for chat in _PROBES]:
        template = own
    if not blanks:
        return template, False
    content = "message['content']"
    put = f"((' ' if {content} and not {content}.startswith(' ') else '') + {content})"
    blanked = _CONTENT.sub(put.replace("\\", r"\\"), template)
    wanted = [chat_text(tokenizer, with_blanks(chat)) for chat in _PROBES]
    if [chat_text(tokenizer, chat, blanked) for chat in _PROBES] != wanted:
        raise ValueError(
            "tokenizer puts a blank before a text (add_prefix_space), llama.cpp does not, and its chat template is not of a "
            "form into which the blank can be written: train with a tokenizer without add_prefix_space"
        )
    return blanked, True


def read_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a GGUF file, by llama.cpp's rules, with the chat template of the file.

    transformers reads one, too (`AutoTokenizer.from_pretrained(…, gguf_file=…)`), but knows fewer names of ways to cut, and
    never that merges are ignored: for SmolLM2, it cuts numbers otherwise than llama.cpp does.

    Raises:
        ValueError: the file's tokenizer is none of those that are written here.
    """
    fields = GGUFReader(path).fields

    def entry(name: str) -> Any:
        field = fields.get(f"tokenizer.{name}")
        return None if field is None else field.contents()

    pre = entry("ggml.pre")
    if entry("ggml.model") != "gpt2" or pre not in _CUTS:
        raise ValueError(f"path={str(path)!r} has a tokenizer that is not read here ({entry('ggml.model')}, {pre})")
    patterns, ignores = _CUTS[pre]
    tokens, kinds = entry("ggml.tokens"), entry("ggml.token_type")
    vocab = {token: id for id, token in enumerate(tokens) if kinds[id] != TokenType.UNUSED}
    merges = [tuple(merge.split(" ")) for merge in entry("ggml.merges")]
    merges = [merge for merge in merges if "".join(merge) in vocab]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=ignores))
    cuts = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    by_kind = {kind: [token for token, of in zip(tokens, kinds, strict=True) if of == kind] for kind in set(kinds)}
    control, typed = by_kind.get(TokenType.CONTROL, []), by_kind.get(TokenType.USER_DEFINED, [])
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    backend.add_tokens([AddedToken(token, normalized=False) for token in typed])

    def special(name: str) -> str | None:
        id = entry(f"ggml.{name}_token_id")
        return None if id is None else tokens[id]

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        padding_side="left",
        bos_token=special("bos"),
        eos_token=special("eos"),
        pad_token=special("padding"),
    )
    tokenizer.chat_template = entry("chat_template")
    return tokenizer
