"""Find the entry of TROUBLESHOOTING.md that fits a pasted error. Needs neither torch nor any other library.

An entry quotes the message as it is printed; `…` in it stands for anything. A pasted text is looked up in three steps,
and the first step that finds an entry decides:

1. *The message is in the text.* White space, quotation marks, colours, frames and the case of letters are ignored, so
   that a message is found in a long traceback, and wherever the terminal broke its lines. Of several messages the one
   that ends last counts, because a traceback ends with its error; of those that end there, the longest.
2. *Much of the message is in the text, or the text is a piece of one message.* A run of 24 characters counts if only one
   entry has it; there must be eight of them.
3. *Most of the text's words are in the entry*, weighted by how rare they are among the entries. Two of them must be in its
   heading or message, which tell what it is about, or the entry must share one name_like_this. This is for descriptions
   ("the model never stops") and for the last line of a traceback.

If no step finds one, the answer has no entry.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from qlora_helpers.paths import COURSE

__all__ = ["PAGE", "Answer", "Entry", "find", "page_path", "read_entries", "report", "search"]

PAGE = "TROUBLESHOOTING.md"
PARTS = ("What it means", "Cure", "Where")
ANYTHING = "…"
RUN = 24  # characters in a row that two texts do not share by chance
RUNS = 8  # how many are needed, 31 characters if they are one piece: fewer can be a phrase such as "Config.__init__() got an unexpected"
SHORTEST = 8  # a text with fewer characters says too little to be a piece of a message
ENOUGH = 0.65  # of a text's words, by weight, must be in an entry that it describes …
AHEAD = 0.1  # … and this much more than in the next best entry


@dataclass(frozen=True)
class Entry:
    """One problem.

    Attributes:
        heading: its heading on the page.
        group: where it occurs; the heading above.
        messages: what is printed, one or more wordings; `…` stands for anything. Empty if nothing is printed.
        symptom: what is seen if nothing is printed; else "".
        meaning, cure, where: the three parts, as Markdown.
    """

    heading: str
    group: str
    messages: tuple[str, ...]
    symptom: str
    meaning: str
    cure: str
    where: str

    @property
    def tests(self) -> tuple[str, ...]:
        """The tests that reproduce it: path::name."""
        return tuple(re.findall(r"`(tests/[\w/]+\.py::\w+)`", self.where))

    @property
    def reports(self) -> tuple[str, ...]:
        """Public reports of it: owner/repository #number."""
        return tuple(re.findall(r"[\w.-]+/[\w.-]+ #\d+", " ".join(self.where.split())))

    def occurs_in(self, text: str) -> bool:
        """Whether the text contains one of the messages, or the symptom in the page's words."""
        return _where_it_ends(self, _plain(text)) is not None


@dataclass(frozen=True)
class Answer:
    """What was found for a text.

    Attributes:
        entry: the entry, or None.
        others: further entries whose messages are in the text, or, without an entry, the nearest ones.
    """

    entry: Entry | None
    others: tuple[Entry, ...]


def page_path() -> Path:
    """Where TROUBLESHOOTING.md is: next to this package, else in or above the working folder.

    Raises:
        FileNotFoundError: it is in none of these.
    """
    here = Path.cwd()
    for folder in (COURSE, here, *here.parents):
        if (folder / PAGE).is_file():
            return folder / PAGE
    raise FileNotFoundError(
        f"{PAGE} is neither in {COURSE} nor in or above the working folder: "
        "run this from a copy of the course's repository"
    )


def read_entries(path: str | Path | None = None) -> tuple[Entry, ...]:
    """The entries of the page, in its order.

    Args:
        path: of another page of the same form.

    Raises:
        FileNotFoundError: there is no page.
        ValueError: the page has no entry, the same heading twice, or an entry that lacks a part; the message names it.
    """
    path = Path(path) if path else page_path()
    group, heading, body, entries = "", None, [], []
    fenced = False
    for line in [*path.read_text(encoding="utf-8").splitlines(), "# the end"]:
        fenced ^= line.lstrip().startswith("```")
        if not fenced and re.match("##? ", line):
            if heading:
                entries.append(_entry(heading, group, "\n".join(body)))
            body = []
            if line.startswith("## "):
                heading = line[3:].strip()
            else:
                group, heading = line[2:].strip(), None
        else:
            body.append(line)
    if not entries:
        raise ValueError(f"path={str(path)!r}: no entry: no heading begins with '## '")
    for name, times in Counter(entry.heading for entry in entries).items():
        if times > 1:
            raise ValueError(f"{path.name}: {times} entries have the heading {name!r}")
    return tuple(entries)


def _entry(heading: str, group: str, body: str) -> Entry:
    """Take an entry's text apart: what is seen, then each part after its name in bold."""
    marks = [f"**{part}.**" for part in PARTS]
    for mark in marks:
        if body.count(mark) != 1:
            raise ValueError(f"{PAGE}, entry {heading!r}: {mark} occurs {body.count(mark)} times, not once")
    sight, meaning, cure, where = re.split("|".join(map(re.escape, marks)), body)
    messages = tuple(text.strip("\n") for text in re.findall(r"^```\w*\n(.*?)^```$", sight, re.M | re.S))
    symptom = " ".join(line[1:].strip() for line in sight.splitlines() if line.startswith(">"))
    if not messages and not symptom:
        raise ValueError(f"{PAGE}, entry {heading!r}: neither a message in a fenced block nor a symptom after '>'")
    return Entry(heading, group, messages, symptom, meaning.strip(), cure.strip(), where.strip())


def find(text: str, entries: tuple[Entry, ...] | None = None) -> Entry | None:
    """The entry that fits a pasted text, or None. See `search`."""
    return search(text, entries).entry


def search(text: str, entries: tuple[Entry, ...] | None = None) -> Answer:
    """Look up a pasted text, in the three steps that this module's docstring describes.

    Args:
        text: an error message, a whole traceback, a piece of one, or a description in the reader's own words.
        entries: where to look; by default the page's.

    Raises:
        ValueError: the text is empty.
        FileNotFoundError: there is no page.
    """
    plain = _plain(text)
    if not plain:
        raise ValueError(f"error={text!r}: empty. Paste the message, or '-' and the message on standard input")
    entries = entries or read_entries()

    ends = {entry: end for entry in entries if (end := _where_it_ends(entry, plain))}
    if ends:
        found = sorted(ends, key=ends.get, reverse=True)
        return Answer(found[0], tuple(found[1:]))

    runs = _shared_runs(plain, entries) or _pieces(text, plain, entries)
    ranked = [entry for entry, _ in runs.most_common()]
    if ranked and (len(ranked) == 1 or runs[ranked[0]] > runs[ranked[1]]):
        return Answer(ranked[0], ())

    scores = _shares_of_words(text, entries)
    by_words = [entry for entry, _ in scores.most_common(3)]
    second = scores[by_words[1]] if len(by_words) > 1 else 0
    if by_words and scores[by_words[0]] >= max(ENOUGH, second + AHEAD) and (not ranked or by_words[0] in ranked):
        return Answer(by_words[0], ())
    return Answer(None, tuple(dict.fromkeys([*ranked, *by_words]))[:3])


# ---- Step 1: the message is in the text


def _plain(text: str) -> str:
    """A text without what can differ when a message is printed again: white space, quotes, colours, frames, case."""
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text)
    text = re.sub(r"^(?:E {2,}|(?:> )+)", "", text, flags=re.M)  # the margin of pytest or of a quoted mail
    return re.sub(r"[\s\"'`´‘’“”│┃╭╮╰╯─━]+", "", text).lower()


@cache
def _literals(message: str) -> tuple[str, ...]:
    """The text between the `…` of a message, without the error's class if the rest says enough: the class may change."""
    rest = re.sub(r"^[\w.]*(?:Error|Exception|Warning): *", "", message)
    literals, short = (tuple(filter(None, map(_plain, part.split(ANYTHING)))) for part in (message, rest))
    return short if sum(map(len, short)) >= 2 * SHORTEST else literals


def _sights(entry: Entry) -> tuple[str, ...]:
    return (*entry.messages, entry.symptom) if entry.symptom else entry.messages


def _where_it_ends(entry: Entry, plain: str) -> tuple[int, int] | None:
    """Where in the text the last of the entry's messages ends, and how long it is without its `…`."""
    found = []
    for message in _sights(entry):
        literals, position = _literals(message), 0
        for literal in literals:
            position = plain.find(literal, position)
            if position < 0:
                break
            position += len(literal)
        else:
            found.append((plain.rfind(literals[-1]) + len(literals[-1]), sum(map(len, literals))))
    return max(found, default=None)


# ---- Step 2: a piece of the message


def _shared_runs(plain: str, entries: tuple[Entry, ...]) -> Counter:
    """For each entry, how many runs of RUN characters its messages share with the text and no other entry has."""
    owners: dict[str, set[Entry]] = {}
    for entry in entries:
        for message in _sights(entry):
            for literal in _literals(message):
                for start in range(len(literal) - RUN + 1):
                    owners.setdefault(literal[start : start + RUN], set()).add(entry)
    text_runs = {plain[start : start + RUN] for start in range(len(plain) - RUN + 1)}
    shared = Counter(next(iter(owners[run])) for run in text_runs if len(owners.get(run, ())) == 1)
    return Counter({entry: count for entry, count in shared.items() if count >= RUNS})


def _pieces(text: str, plain: str, entries: tuple[Entry, ...]) -> Counter:
    """The entries that a short text is a piece of; a single short word does not count."""
    if len(plain) < SHORTEST or (len(re.findall(r"\w+", text)) < 2 and len(plain) < RUN):
        return Counter()
    return Counter(
        entry
        for entry in entries
        if any(plain in literal for sight in (*_sights(entry), entry.heading) for literal in _literals(sight))
    )


# ---- Step 3: words

_COMMON = set(
    "about after all also and any are because been before but can could did does doing done for from get gets got had "
    "has have help her his how into its just like more most not now only other our out over please shall should some "
    "such than that the their them then there these they this those too under until was were what when where which "
    "while who why will with would you your pip install is it in on of to as at by be do if an or no so up we my me he us am very again always during error errors exception fails failed line file last "
    "call recent traceback run runs running try trying using use used happens problem wrong says said see "
    "command found module named qlora_helpers".split()  # the last is in many cures, and in every traceback of the course
)


def _words(text: str) -> set[str]:
    """The telling words of a text, cut to their first letters, so that "stops" and "stopping" are one."""
    words = re.findall(r"[a-z_][a-z0-9_]+", re.sub(r"https?://\S+", " ", text.lower()))
    return {
        _stem(word) for word in words if word not in _COMMON and not word.endswith(("error", "warning", "exception"))
    }


def _stem(word: str) -> str:
    return word if "_" in word else word.removesuffix("s")[:4]


@cache
def _seen_words(entry: Entry) -> set[str]:
    """The words of an entry's heading and of what is seen."""
    return _words(" ".join((entry.heading, *_sights(entry))))


@cache
def _vocabulary(entry: Entry) -> dict[str, float]:
    """How much each word of an entry counts: 1 for names_like_this, and in its heading or in what is seen; else 0.5."""
    explanation = {word: 1.0 if "_" in word else 0.5 for word in _words(f"{entry.meaning} {entry.cure}")}
    return explanation | dict.fromkeys(_seen_words(entry), 1.0)


def _shares_of_words(text: str, entries: tuple[Entry, ...]) -> Counter:
    """For each entry, the share of the text's words that it has; a word weighs more the fewer entries have it.

    Of a long text only the lines that name an error or a warning count, and the last line. One word is not enough, unless it
    is a name_like_this.
    """
    lines = text.strip().splitlines()
    if len(text.split()) > 60:
        lines = [line for line in lines if re.search(r"\b\w+(Error|Warning|Exception)\b", line)][-3:] + lines[-1:]
    words = _words(" ".join(lines))
    count = Counter(word for entry in entries for word in _vocabulary(entry))
    weights = {word: math.log((len(entries) + 1) / max(1, count[word])) for word in words}
    total = sum(weights.values())
    scores = Counter()
    for entry in entries:
        shared = {word: _vocabulary(entry)[word] for word in words if word in _vocabulary(entry)}
        if total and (len(words & _seen_words(entry)) > 1 or any("_" in word for word in shared)):
            scores[entry] = sum(weights[word] * share for word, share in shared.items()) / total
    return scores


# ---- What the doctor prints


def report(answer: Answer) -> str:
    """An answer as the doctor prints it."""
    if answer.entry is None:
        lines = [f"No entry of {PAGE} fits this text."]
        if answer.others:
            lines += ["", "The nearest entries, which may be about something else:"]
            lines += [f"- {entry.heading}" for entry in answer.others]
        lines += ["", "Paste more of it: the last line of a traceback, with the lines above it."]
        return "\n".join(lines)
    entry = answer.entry
    parts = zip(PARTS, (entry.meaning, entry.cure, entry.where), strict=True)
    blocks = [entry.heading, *(f"{name}\n{text}" for name, text in parts)]
    if answer.others:
        blocks.append(
            "The text also contains messages of other entries:\n" + "\n".join(f"- {e.heading}" for e in answer.others)
        )
    blocks.append(f"From {PAGE}, under “{entry.group}”.")
    return "\n\n".join(blocks)
