"""From the adapter to the file that a server loads, hop by hop: what each hop should leave as it is, and what it did.

The hops are: the adapter on its base → the merged model → the GGUF file, read back. At each one the tokens of the prompts, the
rendered prompts, the weights, the logits along the answers and the greedy answers are compared. What is expected stands
beside what was measured, and the first check that does not hold names the hop that breaks, and what breaks in it.

The file is read by other code than has written it: the weights by transformers (`gguf_file=`), which undoes the order of rows
itself, and the tokenizer by llama.cpp's rules (`gguf_tokenizer.read_tokenizer`).
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, modeling_gguf_pytorch_utils

from qlora_helpers.adapters.gguf_tokenizer import FileTokenizer, chat_text, file_tokenizer, read_tokenizer, with_blanks
from qlora_helpers.adapters.same_answers import Likeness, Said, compared, said
from qlora_helpers.chats import Chat
from qlora_helpers.evaluation.answers import prompts_of
from qlora_helpers.hardware import Hardware, given_or_detected
from qlora_helpers.library_messages import without_short_bars
from qlora_helpers.models.fingerprint import weight_files
from qlora_helpers.models.folder_config import read_config
from qlora_helpers.models.loading import load_model, load_tokenizer
from qlora_helpers.visible import shortened, visible

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Check", "Proof", "prove", "prove_tokenizer"]

MERGE, EXPORT = "adapter → merged", "merged → GGUF"
# the most that the divergence of the answers' tokens may be on average, in nats; the rounding of weights alone is far below
# it, and each fault in tests/adapters/test_hops.py far above
MOST_KL = {"merge": 0.01, "F32": 1e-6, "BF16": 0.01, "F16": 1e-4, "Q8_0": 0.02}
_SHOWN = 120
_TEXTS = (  # what tokenizers cut in different ways
    "Hello, world! It's 3:45 p.m., isn't it?",
    "In 1908 there were 12345678 of them; WE'LL see…",
    "def f(x):\n    return x**2  # two  blanks\n\n\n",
    "naïve café, Ünïcode, 日本語, и по-русски, 🙂",
)
# the part of a weight, or of the largest of its block, by which rounding may change it: half a unit in the last place
_ROUNDING = {"F32": 0.0, "F16": 2.0**-11, "BF16": 2.0**-8}
_Q8_0 = (0.5 + 127 * 2.0**-11) / 127  # half a step, and the rounding of the scale to float16
_SMALLEST = 2.0**-25  # half of float16's smallest number


@dataclass(frozen=True)
class Check:
    """One thing that a hop should leave as it is.

    Attributes:
        hop: "adapter → merged" or "merged → GGUF".
        what: "prompt", "tokens", "vocabulary", "weights", "logits" or "answers".
        expected, measured: in words.
        holds: whether what was measured is what is expected.
    """

    hop: str
    what: str
    expected: str
    measured: str
    holds: bool


@dataclass(frozen=True)
class Proof:
    """What was checked.

    Attributes:
        checks: in the order of the hops.
        export: how alike the merged model and the file are; None if their tokens differ, since nothing else is asked then.
    """

    checks: tuple[Check, ...]
    export: Likeness | None = None

    @property
    def broken(self) -> Check | None:
        """The first check that does not hold; None if all do."""
        return next((check for check in self.checks if not check.holds), None)

    def __str__(self) -> str:
        lines, hop = [], None
        for check in self.checks:
            if check.hop != hop:
                lines.append(hop := check.hop)
            lines.append(f"  {'ok' if check.holds else 'BREAKS':6}  {check.what}: {check.measured}")
            lines.append(f"          expected: {check.expected}")
        broken = self.broken
        end = "Every hop holds." if broken is None else f"The hop {broken.hop} breaks: {broken.what}."
        return "\n".join([*lines, end])


def prove(
    path: str | Path,
    folder: str | Path,
    chats: list[Chat],
    *,
    live: Callable[[], tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]] | None = None,
    tokenizer_folder: str | Path | None = None,
    max_new_tokens: int = 32,
    hardware: Hardware | None = None,
) -> Proof:
    """Ask the model at each hop the same, and hold what it says against what it said before.

    One model is in memory at a time.

    Args:
        path: of the GGUF file.
        folder: of the merged model.
        chats: each ends with a question.
        live: loads the adapter on the base that it was merged into, and its tokenizer; None if there is no adapter.
        tokenizer_folder: where the tokenizer of the merged model is; by default `folder`.
        max_new_tokens: an answer is cut off after so many.
        hardware: what to load for; by default what `detect()` finds.

    Raises:
        ValueError, OSError: something cannot be loaded, or a chat cannot be asked.
    """
    path, folder, hardware = Path(path), Path(folder), given_or_detected(hardware)
    tokenizer = load_tokenizer(str(tokenizer_folder or folder))
    checks: list[Check] = []
    before = None
    if live is not None:
        model, own = live()
        before = said(model, own, chats, max_new_tokens=max_new_tokens)
        checks += _prompts(MERGE, own, tokenizer, chats, before.prompts)
        del model
        gc.collect()
    merged = None
    if all(check.holds for check in checks):
        model = load_model(str(folder), quantization=None, hardware=hardware)
        merged = said(model, tokenizer, chats, max_new_tokens=max_new_tokens, along=before)
        if before is not None:
            checks += _likeness(MERGE, "merge", compared(before, merged), exactly=False)
            if merged.answers != before.answers:  # the file is asked along the merged model's own answers
                merged = said(model, tokenizer, chats, max_new_tokens=max_new_tokens)
        del model
        gc.collect()
    if merged is None:
        return Proof(tuple(checks))
    return _export_proved(path, folder, chats, tokenizer, merged, checks, max_new_tokens, hardware)


def _export_proved(
    path: Path,
    folder: Path,
    chats: list[Chat],
    tokenizer: PreTrainedTokenizerBase,
    merged: Said,
    checks: list[Check],
    max_new_tokens: int,
    hardware: Hardware,
) -> Proof:
    found = prove_tokenizer(path, tokenizer, chats)
    checks += found
    with without_short_bars(0), _without_the_readers_bar():
        model = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=hardware.compute_dtype,
            local_files_only=True,
            trust_remote_code=False,
        ).to(hardware.device)
    divided = divide_rope(model, path)
    weights, exact, kind = _weights(model, path, folder)
    checks.append(weights)
    likeness = None
    if all(check.holds for check in found[:2]):
        reread = read_tokenizer(path)
        likeness = compared(merged, said(model, reread, chats, max_new_tokens=max_new_tokens, along=merged))
        checks += _likeness(EXPORT, kind, likeness, exactly=exact and not divided)
    del model
    gc.collect()
    return Proof(tuple(checks), likeness)


@contextmanager
def _without_the_readers_bar() -> Iterator[None]:
    """Hide the bar of transformers' reader of GGUF files: it takes tqdm as it is, and asks no setting whether to show it."""
    own = modeling_gguf_pytorch_utils.tqdm
    modeling_gguf_pytorch_utils.tqdm = partial(own, disable=True)
    try:
        yield
    finally:
        modeling_gguf_pytorch_utils.tqdm = own


def prove_tokenizer(path: str | Path, tokenizer: PreTrainedTokenizerBase, chats: list[Chat]) -> list[Check]:
    """The checks of a file's tokenizer and chat template, for which no model is loaded.

    Args:
        path: of the GGUF file.
        tokenizer: that of the merged model.
        chats: each ends with a question.

    Raises:
        ValueError: the tokenizer is one that cannot be written.
    """
    reread = read_tokenizer(path)
    written = file_tokenizer(tokenizer, len(reread))
    wanted = prompts_of(chats, tokenizer)
    found = _prompts(EXPORT, tokenizer, reread, chats, wanted, written.blanks, written.words)
    return [*found, _vocabulary(tokenizer, reread, written)]


def _prompts(
    hop: str,
    one: PreTrainedTokenizerBase,
    other: PreTrainedTokenizerBase,
    chats: Sequence[Chat],
    wanted: Sequence[Sequence[int]],
    blanks: bool = False,
    words: bool = False,
) -> list[Check]:
    """The rendered prompts, and the tokens of them and of texts that are hard to cut."""
    rows = [(chat_text(one, with_blanks(chat) if blanks else chat), chat_text(other, chat)) for chat in chats]
    bad = next((row for row in rows if row[0] != row[1]), None)
    also = ", with the blank before each message that the tokenizer puts there itself" if blanks else ""
    prompt = Check(
        hop,
        "prompt",
        f"the same bytes{also}",
        f"the same, {sum(len(text.encode()) for text, _ in rows):,} bytes of {_count(len(rows), 'prompt')}"
        if bad is None
        else _first_difference(*bad),
        bad is None,
    )
    texts = () if words else _TEXTS
    pairs = [(list(ids), _ids(other, chat_text(other, chat))) for ids, chat in zip(wanted, chats, strict=True)]
    pairs += [(_ids(one, text), _ids(other, f"{' ' * blanks}{text}")) for text in texts]
    differing = next((number for number, (a, b) in enumerate(pairs) if a != b), None)
    if differing is None:
        measured = f"the same, {sum(len(a) for a, _ in pairs):,} tokens"
    else:
        a, b = (
            tokenizer.convert_ids_to_tokens(ids) for tokenizer, ids in zip((one, other), pairs[differing], strict=True)
        )
        place = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        where = f"prompt {differing + 1}" if differing < len(chats) else f"the text {texts[differing - len(chats)]!r}"
        measured = f"in {where}, token {place + 1}: {a[place : place + 3]} became {b[place : place + 3]}"
    tokens = Check(
        hop,
        "tokens",
        "the same, of the prompts" + " and of texts that are hard to cut" * bool(texts),
        measured,
        differing is None,
    )
    return [prompt, tokens]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str | None) -> list[int]:
    return [] if text is None else tokenizer(text, add_special_tokens=False)["input_ids"]


def _first_difference(one: str | None, other: str | None) -> str:
    if one is None or other is None:
        return f"the template of the {'second' if other is None else 'first'} takes no such chat"
    place = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    a, b = (shortened(visible(text[max(place - 10, 0) :]), 60) for text in (one, other))
    return f"from character {place + 1}, {a!r} became {b!r}"


def _vocabulary(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, written: FileTokenizer) -> Check:
    """The tokens by their ids, the order of merges, and how texts are cut before any merge."""
    cuts = []
    for text in () if written.words else _TEXTS:
        blanked = f"{' ' * written.blanks}{text}"
        pieces = [
            [piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(typed)]
            for tokenizer, typed in ((one, text), (other, blanked))
        ]
        cuts += [(text, *pieces)] * (pieces[0] != pieces[1])
    (own, own_merges), (read, read_merges) = (
        (
            {id: token.replace("Ġ", " ") for token, id in tokenizer.get_vocab().items()},
            [tuple(merge) for merge in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]],
        )
        for tokenizer in (one, other)
    )
    wrong = next((id for id, token in own.items() if read.get(id) != token), None)
    merge = next((n for n, pair in enumerate(own_merges) if read_merges[n : n + 1] != [pair]), None)
    if merge is None and len(read_merges) > len(own_merges):
        merge = len(own_merges)
    if wrong is not None:
        measured = f"token {wrong}, {own[wrong]!r}, became {read.get(wrong)!r}"
    elif merge is not None:
        a, b = ([" + ".join(pair) for pair in merges[merge : merge + 1]] for merges in (own_merges, read_merges))
        measured = f"merge {merge + 1}, {a or 'none'}, became {b or 'none'}"
    elif cuts:
        text, a, b = cuts[0]
        place = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        measured = f"{text!r} is cut into {b[place : place + 3]} instead of {a[place : place + 3]}"
    else:
        measured = f"the same, {len(own):,} tokens and {len(own_merges):,} merges"
    return Check(
        EXPORT,
        "vocabulary",
        "the same tokens, merges in the same order, and cuts between words",
        measured,
        wrong is None and merge is None and not cuts,
    )


def divide_rope(model: PreTrainedModel, path: str | Path) -> bool:
    """Divide a model's rotary frequencies as the file says, as llama.cpp does; transformers passes over that tensor.

    Returns:
        Whether the file says so.
    """
    found = [tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == "rope_freqs.weight"]
    if found:
        rotary, divisors = model.model.rotary_emb, torch.from_numpy(found[0].data.copy())
        rotary.inv_freq = rotary.inv_freq / divisors.to(rotary.inv_freq.device)
        rotary.original_inv_freq = rotary.inv_freq
    return bool(found)


def _weights(model: PreTrainedModel, path: Path, folder: Path) -> tuple[Check, bool, str]:
    """The weights as transformers has read them against those of the folder: the check, whether all are equal, and the kind."""
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    names = gguf.get_tensor_name_map(
        {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}[model.config.model_type],
        model.config.num_hidden_layers,
    )
    read = model.state_dict()
    kind, faults, equal, count = "F32", [], True, 0
    tied = read_config(folder, str(folder), argument="folder").get("tie_word_embeddings", False)
    for key, value in _tensors(folder):
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if name is None or key not in read:
            continue
        count += 1
        if name not in kinds:
            if key == "lm_head.weight" and tied and torch.equal(value, _embedding(folder)):
                continue
            faults.append(f"{key} is not in the file ({name})")
            continue
        stored = kinds[name]
        kind = stored if stored != "F32" and value.ndim == 2 and kind != "Q8_0" else kind
        worst = _beyond_rounding(value.float(), read[key].cpu(), stored)
        equal = equal and torch.equal(value.to(read[key].dtype), read[key].cpu())
        if worst:
            faults.append(f"{key} ({name}, {stored}) {worst}")
    if tied and "output.weight" in kinds:
        faults.append("the output head, which is the embedding, is a tensor of its own")
    expected = {
        "F32": "equal",
        "F16": "each within half a unit in the last place of float16",
        "BF16": "each within half a unit in the last place of bfloat16",
        "Q8_0": "each within half a step of its block of 32",
    }[kind]
    said = (
        f"{count} tensors, {'all equal' if equal else 'within that'}"
        if not faults
        else shortened(faults[0], _SHOWN * 2)
    )
    if len(faults) > 1:
        said += f"; and {len(faults) - 1} more"
    return Check(EXPORT, "weights", expected, said, not faults), equal and not faults, kind


def _tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - the file cannot be iterated over
                yield key, file.get_tensor(key)


def _embedding(folder: Path) -> torch.Tensor:
    return next(value for key, value in _tensors(folder) if key.endswith("embed_tokens.weight"))


def _beyond_rounding(value: torch.Tensor, read: torch.Tensor, stored: str) -> str:
    """By how much a weight is further off than rounding can make it; nothing if none is."""
    if value.shape != read.shape:
        return f"has the shape {tuple(read.shape)} instead of {tuple(value.shape)}"
    difference = (value - read.float()).abs()
    if stored == "Q8_0":
        largest = value.reshape(-1, 32).abs().amax(-1, keepdim=True).expand(-1, 32).reshape(value.shape)
        allowed = largest * _Q8_0 + 127 * _SMALLEST
    else:
        allowed = value.abs() * _ROUNDING[stored] + (_SMALLEST if stored == "F16" else 0.0)
    if read.dtype != torch.float32:  # a model in 16 bits has rounded once more
        allowed = allowed + (value.abs() + allowed) * torch.finfo(read.dtype).eps / 2
    beyond = ~(difference <= allowed)  # so that what is no number counts
    if not beyond.any():
        return ""
    return f"differs at {int(beyond.sum()):,} of {value.numel():,} places, by up to {difference.max():.3g}"


def _likeness(hop: str, kind: str, found: Likeness, exactly: bool) -> list[Check]:
    most = MOST_KL[kind]
    if exactly:
        expected, holds = "equal, since the weights are", found.largest_logit_difference == 0.0
    else:
        rounding = {"merge": "the rounding of the sum to 16 bits", "F32": "the rounding of the rotary divisors"}
        rounding = rounding.get(kind, f"the rounding of {kind}")
        expected, holds = f"{rounding}: KL at most {most:g} nats on average", found.mean_kl <= most
    measured = f"largest difference {found.largest_logit_difference:.3g}, KL {found.mean_kl:.2g}"
    measured += f", the same choice at {found.same_choice:.1%} of {found.places:,} places"
    return [
        Check(hop, "logits", expected, measured, holds),
        Check(
            hop,
            "answers",
            "the same"
            if exactly or kind != "Q8_0"
            else "the same; some may differ where two tokens are nearly as likely",
            f"{found.same_answers} of {found.prompts} the same"
            + (f"; {found.first_difference}" if found.first_difference else ""),
            found.same_answers == found.prompts or (not exactly and holds),
        ),
    ]


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'s' * (number != 1)}"
