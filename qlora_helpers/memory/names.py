"""Names of models as people type them: which known model is meant, what was assumed, and which others are close."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import takewhile

__all__ = ["Found", "Name", "address", "hints", "is_address", "look_up", "unknown"]

# A repository of one of these is a copy of a model with its weights in fewer bits or another file format.
_QUANTISED = {
    "2bit", "3bit", "4bit", "5bit", "6bit", "8bit", "awq", "bf16", "bitsandbytes", "bnb", "dynamic", "exl2", "exl3", "fp16",
    "fp4", "fp8", "ggml", "gguf", "gptq", "hqq", "imatrix", "int4", "int8", "marlin", "mlx", "mxfp4", "nf4", "nvfp4",
    "onnx", "qat", "quantised", "quantized", "unsloth",
}  # fmt: skip
_QUANTISED_LIKE = re.compile(r"w\d+a\d+|i?q\d|[234568]bits?|g(32|64|128)|quanti[sz]ed\..*")
_VARIANTS = {
    "base", "chat", "dpo", "instruct", "it", "preview", "pt", "reasoning", "sft", "think", "thinking",
}  # fmt: skip
_NOISE = {"ai21", "c4ai", "hf", "meta"}  # parts of some names that say nothing about the model
_VERSION = re.compile(r"v\d+(\.\d+)*")
_DATE = re.compile(r"(0\d|1[0-2]|2\d)\d\d")  # 2507 is July 2025, 1124 is November 2024
_LENGTH = re.compile(r"\d+k|1m")  # tokens, as in Phi-3-mini-128k-instruct
_SIZE = re.compile(r"[ae]?\d+(\.\d+)?[bm]|\d+x\d+b|\d+e")
_ENDS_IN_A_NUMBER = re.compile(r"([a-z]{2,})(\d.*)")  # llama3.1 means llama-3.1, and phi4 means phi-4
_KEPT_WHOLE = _QUANTISED | _NOISE
_SITE = re.compile(r"(https?://)?(www\.)?(huggingface\.co|hf\.co)/+", re.IGNORECASE)


@dataclass(frozen=True)
class Found:
    """A known model, by the name that the Hub has for it, and what was assumed to find it: one sentence each."""

    name: str
    assumed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Name:
    """The parts of a model's name.

    `stem` is what decides the layers: family, generation and size. `variants` are kinds of training (instruct, base) and
    `marks` are dates, versions and lengths; both leave the layers as they are, as far as the name has a size.
    """

    owner: str
    stem: tuple[str, ...]
    variants: frozenset[str]
    marks: tuple[str, ...]
    quantised: tuple[str, ...] = ()

    @classmethod
    @cache
    def of(cls, name: str) -> Name:
        """The parts of a name such as "unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit", in any case."""
        owner, _, short = name.strip().lower().rpartition("/")
        words = [word for word in re.split(r"[-_:\s]+", short.replace(".gguf", "-gguf")) if word]
        rest, quantised = _without_quantisation(words)
        parts = [part for word in rest for part in _split(word) if part not in _NOISE]
        # Without a size, a version is all that tells DeepSeek-V2 from V3.
        kinds = (_DATE, _LENGTH, _VERSION) if any(map(_SIZE.fullmatch, parts)) else (_DATE, _LENGTH)
        stem, variants, marks = [], set(), []
        for place, part in enumerate(parts):
            if part in _VARIANTS and place:
                variants.add("base" if part == "pt" else "instruct" if part in ("it", "chat") else part)
            elif place and any(kind.fullmatch(part) for kind in kinds):
                marks.append(part)
            else:
                stem.append(part)
        return cls(owner, tuple(stem), frozenset(variants), tuple(marks), tuple(quantised))

    @property
    def family(self) -> str:
        """What hints stay within: the first word, or the first two of gpt-oss, gpt-neox and gpt-j."""
        return "-".join(self.stem[: 2 if self.stem[:1] == ("gpt",) else 1])

    @property
    def sized(self) -> bool:
        """Whether the name says how large the model is."""
        return any(map(_SIZE.fullmatch, self.stem))

    @property
    def newest_last(self) -> tuple:
        """Sorts names of one stem by version and date."""
        return tuple(sorted(mark for mark in self.marks if _VERSION.fullmatch(mark) or _DATE.fullmatch(mark)))

    def is_the_same_as(self, other: Name) -> bool:
        """Whether both name one model, whoever has a copy of it and however it is written."""
        return (self.stem, self.variants, self.marks) == (other.stem, other.variants, other.marks)


def _without_quantisation(words: list[str]) -> tuple[list[str], list[str]]:
    kept = list(words)
    while len(kept) > 1 and _is_quantised(kept[-1], kept):
        kept.pop()
    return kept, words[len(kept) :]


def _is_quantised(word: str, words: list[str]) -> bool:
    # The k and m of Q4_K_M were split off it.
    after_q = word in ("k", "m", "s", "l", "0", "1", "xs", "xl") and any(re.fullmatch(r"i?q\d", w) for w in words)
    return word in _QUANTISED or _QUANTISED_LIKE.fullmatch(word) is not None or after_q


def _split(word: str) -> tuple[str, ...]:
    split = None if word in _KEPT_WHOLE else _ENDS_IN_A_NUMBER.fullmatch(word)
    return split.groups() if split else (word,)


def is_address(text: str) -> bool:
    """Whether this is an address on the Hub, such as "https://huggingface.co/Qwen/Qwen3-8B/tree/main"."""
    return _SITE.match(text.strip()) is not None


def address(text: str) -> str:
    """The "owner/name" of an address on the Hub; any other text as it is, without spaces around it.

    Raises:
        ValueError: the address is not that of a model.
    """
    text = text.strip()
    if cached := re.fullmatch(r"models--([\w.-]+?)--([\w.-]+)", text):  # as the Hub's cache names its folders
        return "/".join(cached.groups())
    if not is_address(text):
        return text
    path = re.split(r"[?#]", _SITE.sub("", text, count=1))[0].strip("/").split("/")
    if path[0] in ("api", "models") and len(path) > 2:
        path = path[2 if path[0] == "api" else 1 :]
    if len(path) < 2 or path[0] in ("datasets", "spaces", "collections", "papers", "docs"):
        raise ValueError(
            f"model is {text!r}, which is not the address of a model: one reads https://huggingface.co/OWNER/NAME"
        )
    return "/".join(path[:2])


def look_up(asked: str, known: Collection[str], finetunes: Mapping[str, str]) -> Found | None:
    """The known model that is meant.

    Args:
        asked: a name as people type it: with or without its owner, in any case, with spaces, with what an
            instruction-tuned or a quantised copy adds.
        known: names as the Hub spells them; of several that fit equally well the first is taken.
        finetunes: for those of them whose config was not published where we could read it, what each was trained from.

    Returns:
        None if nothing known has this family, generation and size.
    """
    exact = {name.lower(): name for name in reversed(list(known))}
    exact = {name.rpartition("/")[2]: full for name, full in exact.items()} | exact
    name = exact.get(asked.strip().lower())
    wanted = Name.of(asked)
    if name is None:
        name = _closest(wanted, known)
    if name is None:
        return None
    return Found(name, tuple(_assumed(asked.strip(), wanted, name, known, finetunes)))


def _closest(wanted: Name, known: Collection[str]) -> str | None:
    """Of the known models with the same stem, the one that differs least."""
    candidates = [name for name in known if Name.of(name).stem == wanted.stem]
    same = [name for name in candidates if Name.of(name).is_the_same_as(wanted)]
    if same:
        return min(same, key=lambda name: Name.of(name).owner != wanted.owner)
    if not wanted.sized:  # without a size, a date may be that of a larger model
        candidates = [name for name in candidates if set(wanted.marks) <= set(Name.of(name).marks)]
    if not candidates:
        return None
    with_marks = [name for name in candidates if Name.of(name).marks == wanted.marks]
    with_variants = [name for name in with_marks or candidates if Name.of(name).variants == wanted.variants]
    left = with_variants or with_marks or candidates
    return max(left, key=lambda name: (Name.of(name).newest_last, -left.index(name)))


def _assumed(
    asked: str, wanted: Name, name: str, known: Collection[str], finetunes: Mapping[str, str]
) -> Iterable[str]:
    have = Name.of(name)
    other_owner = wanted.owner and wanted.owner != have.owner
    others = [
        other
        for other in known
        if other != name and Name.of(other).stem == have.stem and set(wanted.marks) < set(Name.of(other).marks)
    ]
    copy = f"{asked} is the name of a quantised copy: the model that it was made from is taken"
    if not have.is_the_same_as(wanted):
        if not wanted.marks and have.newest_last and [o for o in others if Name.of(o).variants == have.variants]:
            several = (
                f"{copy}; several have that name" if wanted.quantised else f"{asked} is the name of several models"
            )
            yield f"{several}: {name} is taken"
        elif wanted.quantised:
            yield f"{copy}, and for that the layers of {name}; the longest sequence may differ"
        else:
            yield (
                f"{asked} is not in the table: the layers of {name} are taken for it; the longest sequence may differ"
            )
    elif wanted.quantised:
        yield f"{copy}, {name}"
    elif other_owner:
        yield f"{asked} is not in the table: it is taken for a copy of {name}"
    if name in finetunes:
        yield (
            f"{name} was trained from {finetunes[name]}, whose layers are taken for it; the longest sequence may differ"
        )


def hints(asked: str, known: Collection[str], count: int = 3) -> list[str]:
    """The known names that are closest to an unknown one, of its own family alone.

    Args:
        asked: the name that is not known.
        known: names as the Hub spells them.
        count: how many at most.
    """
    wanted = Name.of(asked)
    families = {Name.of(name).family for name in known}
    family = wanted.family
    if family not in families:
        family = _misspelt(family, families)
    parts = (*family.split("-"), *wanted.stem[len(family.split("-")) :])
    near: dict[str, tuple] = {}
    for name in known:
        have = Name.of(name)
        if have.family == family:
            alike = list(takewhile(lambda pair: pair[0] == pair[1], zip(parts, have.stem, strict=False)))
            near[name] = (len(alike), _likeness(parts, wanted, have.stem, have))
    return sorted(near, key=near.__getitem__, reverse=True)[:count]


def _likeness(parts: tuple[str, ...], wanted: Name, stem: tuple[str, ...], have: Name) -> float:
    one, other = (
        "-".join((*words, *sorted(name.variants), *name.marks)) for words, name in ((parts, wanted), (stem, have))
    )
    return difflib.SequenceMatcher(None, one, other).ratio()


def _misspelt(family: str, families: Collection[str]) -> str:
    """The family that is meant by a word such as lama or qwem; "" if none is.

    A longer word is more often a family of its own, such as olmoe, and so is a neighbour of gpt-neox.
    """
    single = [name for name in families if "-" not in name and len(name) >= len(family)]
    close = difflib.get_close_matches(family, single, n=1, cutoff=0.75) if family and "-" not in family else []
    return close[0] if close else ""


def _within(asked: str, known: Collection[str]) -> str | None:
    """The known model whose whole name, size included, is part of this one, as fine-tuned models are often named."""
    whole = Name.of(asked).stem
    found = [
        name
        for name in known
        if (stem := Name.of(name).stem)
        and Name.of(name).sized
        and any(whole[at : at + len(stem)] == stem for at in range(len(whole)))
    ]
    return min(found, key=lambda name: (-len(Name.of(name).stem), len(Name.of(name).variants)), default=None)


def unknown(asked: str, known: Collection[str]) -> ValueError:
    """The error for a name that is not known: what is close, and how to get the config of any other model.

    Args:
        asked: the name.
        known: names as the Hub spells them.
    """
    close, within = hints(asked, known), _within(asked, known)
    hint = f"; the closest known names are {', '.join(close)}" if close else ""
    trained = f". If it was trained from {within}, ask for that" if within else ""
    owner, _, short = asked.strip().rpartition("/")
    plain = re.fullmatch(r"[\w.-]+/[\w.-]+", asked.strip()) is not None
    of, name = (f"{owner}/{short}", short) if plain else ("OWNER/NAME", "NAME")
    return ValueError(
        f"model is {asked!r}, which is not known{hint}{trained}. For any other model give its folder or its config.json: "
        f"hf download {of} config.json --local-dir {name} gets it, and {name} is then its folder "
        f"(or save https://huggingface.co/{of}/raw/main/config.json)"
    )
