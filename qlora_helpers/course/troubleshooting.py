"""Find the entry of TROUBLESHOOTING.md that fits a pasted error. Needs neither torch nor any other library.

An entry quotes the message as it is printed; `…` in it stands for anything. First the text is taken apart: which lines are
exceptions, which of them is the last, and what else there is (`pasted_text`). Entries with a condition that the text does
not fulfil are put aside. Then there are four steps, and the first that finds an entry decides:

1. *The message is in the text.* White space, quotation marks, colours, frames, line numbers and the case of letters are
   ignored, so that a message is found in a long traceback, and wherever the terminal broke its lines. Of several messages
   one in the last exception counts most, then one in an exception before it, then any other; of equals the one that ends
   last, and then the longest. A message that is no cause (a "notice") answers only if nothing in the text is an error.
2. *Much of the message is in the text, or the text is a piece of one message.* A run of 24 characters counts if only one
   entry has it; there must be eight of them.
3. *A description has what the entry is seen as*: a pattern for each thing that must be said, "vllm" and "base" and "same".
4. *Most of the text's words are in the entry*, weighted by how rare they are among the entries. Two of them must be in its
   heading or message, which tell what it is about, or the entry must share one name_like_this. This is for descriptions
   ("the model never stops") and for the last line of a traceback.

If no step finds one, the answer has no entry. If the message is one that other programs print, too, and the text shows
other code without a sign of this stack, the entry is only offered: `Answer.perhaps`.

The page marks entries in comments below the heading: `<!-- if: pattern -->` is a condition on the text, `<!-- for example:
words -->` fulfils it, `<!-- seen as: pattern ; pattern -->` is for step 3, `<!-- generic -->` marks messages that other programs print, too, and `<!-- ask: … -->` says what
would tell this cause from others. After ```` ```text ```` a block of messages can say "notice", if they are no cause, and
"each", if every line is a message.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from qlora_helpers.course import pasted_text
from qlora_helpers.paths import COURSE

__all__ = ["PAGE", "Answer", "Entry", "find", "page_path", "read_entries", "report", "search"]

PAGE = "TROUBLESHOOTING.md"
TESTS = "tests/course/test_troubleshooting.py"
GPU_TESTS = "tests/gpu/test_troubleshooting_on_a_gpu.py"
PARTS = ("What it means", "Cure", "Where")
ANYTHING = "…"
RUN = 24  # characters in a row that two texts do not share by chance
RUNS = 8  # how many are needed, 31 characters if they are one piece: fewer can be a phrase such as "Config.__init__() got an unexpected"
SHORTEST = 8  # a text with fewer characters says too little to be a piece of a message
ENOUGH = 0.65  # of a text's words, by weight, must be in an entry that it describes …
AHEAD = 0.1  # … and this much more than in the next best entry
NEAR = 0.2  # of a text's words must be in an entry that is named as near …
RARE = 3  # … and one of them in at most so many entries


@dataclass(frozen=True)
class Entry:
    """One problem.

    Attributes:
        heading: its heading on the page.
        group: where it occurs; the heading above.
        messages: what is printed, one or more wordings; `…` stands for anything. Empty if nothing is printed.
        symptom: what is seen if nothing is printed; else "".
        meaning, cure, where: the three parts, as Markdown.
        notices: those messages that are no cause of an error.
        only_if: a pattern that the text must have, or "".
        example: words that the pattern finds.
        generic: whether other programs print these messages, too.
        asks: what would tell this cause from others with the same message, or "".
        seen_as: patterns that a description of it has, all of them; none if it is found by its words alone.
    """

    heading: str
    group: str
    messages: tuple[str, ...]
    symptom: str
    meaning: str
    cure: str
    where: str
    notices: tuple[str, ...] = ()
    only_if: str = ""
    example: str = ""
    generic: bool = False
    asks: str = ""
    seen_as: tuple[str, ...] = ()

    @property
    def tests(self) -> tuple[str, ...]:
        """The tests that reproduce it: path::name; the page leaves out TESTS, and says gpu for GPU_TESTS."""
        named = re.findall(r"`((?:tests/[\w/]+\.py::|gpu::)?test_\w+)`", self.where)
        return tuple(
            re.sub(r"^gpu(?=::)|^(?=test_)", lambda match: GPU_TESTS if match[0] else f"{TESTS}::", name)
            for name in named
        )

    @property
    def reports(self) -> tuple[str, ...]:
        """Public reports of it: owner/repository #number."""
        return tuple(re.findall(r"[\w.-]+/[\w.-]+ #\d+", " ".join(self.where.split())))

    def occurs_in(self, text: str) -> bool:
        """Whether the text contains one of the messages, or the symptom in the page's words."""
        return any(_span(message, _plain(text)) for message in _sights(self))


@dataclass(frozen=True)
class Answer:
    """What was found for a text.

    Attributes:
        entry: the entry, or None.
        others: further entries whose messages are in the text, or, without an entry, the nearest ones.
        perhaps: without an entry, the one that fits if the text comes from this stack.
        also: without an entry, entries whose messages are in the text and are no cause.
        named: rows of the tables in the entry's cure whose first cell is a name that the text's errors have: (name, cure).
    """

    entry: Entry | None
    others: tuple[Entry, ...]
    perhaps: Entry | None = None
    also: tuple[Entry, ...] = ()
    named: tuple[tuple[str, str], ...] = ()


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
    blocks = [
        (kinds.split(), message)
        for kinds, text in re.findall(r"^```\w*((?: \w+)*)\n(.*?)^```$", sight, re.M | re.S)
        for message in (text.strip("\n").splitlines() if "each" in kinds.split() else [text.strip("\n")])
    ]
    messages = tuple(message for _, message in blocks)
    notices = tuple(message for kinds, message in blocks if "notice" in kinds)
    marks = dict(re.findall(r"^<!-- ([a-z ]+?)(?:: (.*?))? -->$", sight, re.M | re.S))
    if unknown := set(marks) - {"if", "for example", "generic", "ask", "seen as"}:
        raise ValueError(f"{PAGE}, entry {heading!r}: a comment begins with {sorted(unknown)}, which is no mark")
    if marks.get("if") and not re.search(marks["if"], marks.get("for example", "")):
        raise ValueError(f"{PAGE}, entry {heading!r}: its example does not fulfil its condition, {marks['if']}")
    symptom = " ".join(line[1:].strip() for line in sight.splitlines() if line.startswith(">"))
    if not messages and not symptom:
        raise ValueError(f"{PAGE}, entry {heading!r}: neither a message in a fenced block nor a symptom after '>'")
    parts = (meaning.strip(), cure.strip(), where.strip())
    return Entry(
        heading, group, messages, symptom, *parts, notices, marks.get("if", ""), marks.get("for example", ""),
        "generic" in marks, " ".join(marks.get("ask", "").split()), tuple(marks.get("seen as", "").split(" ; ")) if "seen as" in marks else (),
    )  # fmt: skip


def find(text: str, entries: tuple[Entry, ...] | None = None) -> Entry | None:
    """The entry that fits a pasted text, or None. See `search`."""
    return search(text, entries).entry


def search(text: str, entries: tuple[Entry, ...] | None = None) -> Answer:
    """Look up a pasted text, in the four steps that this module's docstring describes.

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
    entries = _applicable(text, entries or read_entries())
    pasted = pasted_text.take_apart(text)

    matches = _without_quoted({entry: match for entry in entries if (match := _match(entry, pasted))})
    causes = {entry: match for entry, match in matches.items() if match[0] > NOTICE or not pasted.tells_of_an_error}
    found = sorted(matches, key=matches.get, reverse=True)
    if causes:
        best = max(causes, key=causes.get)
        if causes[best][0] >= EARLIER or not pasted.exceptions:
            return _unless_foreign(best, found, pasted)
    errors = pasted.errors or text
    plain_errors = _plain(errors)
    runs = _shared_runs(plain_errors, entries, notices=not pasted.tells_of_an_error)
    runs = runs or _pieces(errors, plain_errors, entries)
    ranked = [entry for entry, _ in runs.most_common()]
    if ranked and (len(ranked) == 1 or runs[ranked[0]] > runs[ranked[1]]):
        return _unless_foreign(ranked[0], [entry for entry in found if entry is not ranked[0]], pasted)
    if causes:
        return _unless_foreign(best, found, pasted)

    if (described := _described(text, entries)) and not pasted.tells_of_an_error:
        return Answer(described, ())

    scores = _shares_of_words(errors, entries)
    by_words = [entry for entry, _ in scores.most_common(3)]
    second = scores[by_words[1]] if len(by_words) > 1 else 0
    enough = by_words and scores[by_words[0]] >= max(ENOUGH, second + AHEAD) and (not ranked or by_words[0] in ranked)
    if (
        pasted.exceptions
    ):  # an error whose message is no entry's is another error, unless it has a name that only one knows
        enough = enough and _shares_a_name(errors, by_words[0], entries)
    if enough and not by_words[0].seen_as:  # else it was not described as step 3 wants it
        return _unless_foreign(by_words[0], [entry for entry in found if entry is not by_words[0]], pasted)
    near = [entry for entry in by_words if scores[entry] >= NEAR and _shares_a_rare_word(errors, entry, entries)]
    others = tuple(entry for entry in dict.fromkeys([*ranked, *near]) if entry not in found)
    return Answer(None, others[:3], also=tuple(found))


def _applicable(text: str, entries: tuple[Entry, ...]) -> tuple[Entry, ...]:
    """Without entries whose condition the text does not fulfil, and without those that give way to one that it fulfils."""
    fulfilled = [entry for entry in entries if entry.only_if and re.search(entry.only_if, text)]
    taken = {message for entry in fulfilled for message in entry.messages}
    return tuple(
        entry for entry in entries if (entry in fulfilled if entry.only_if else not taken.intersection(entry.messages))
    )


def _unless_foreign(entry: Entry, found: list[Entry], pasted: pasted_text.Pasted) -> Answer:
    """The entry as an answer, or as an offer if the message is not only this stack's and the text shows other code."""
    others = tuple(other for other in found if other is not entry)
    if entry.generic and pasted.foreign:
        return Answer(None, (), entry, others)
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", entry.cure, re.M)
    named = tuple(
        (name, cure)
        for names, cure in rows
        for name in re.findall(r"`(\w+)`", names)
        if re.search(rf"\b{name}\b", pasted.errors or pasted.text)
    )
    return Answer(entry, others, named=named)


# ---- Step 1: the message is in the text

NOTICE, ELSEWHERE, EARLIER, LAST = range(4)  # how much a message counts by what it is and where it is
_plain = pasted_text.plain


def _match(entry: Entry, pasted: pasted_text.Pasted) -> tuple[int, int, int, int] | None:
    """How much the entry's best message in the text counts: its kind, where it ends, how long it is without its `…`, and
    where it begins.
    """
    found = []
    for message in _sights(entry):
        if span := _span(message, pasted.plain):
            kind = NOTICE if message in entry.notices else (ELSEWHERE, EARLIER, LAST)[pasted.rank(span[1])]
            found.append((kind, span[1], sum(map(len, _literals(message))), span[0]))
    return max(found, default=None)


def _without_quoted(matches: dict[Entry, tuple[int, int, int, int]]) -> dict[Entry, tuple[int, int, int, int]]:
    """Without messages that are only quoted inside a notice, as in "memory ran out (CUDA out of memory …), tried again"."""
    notices = [(begin, end) for kind, end, _, begin in matches.values() if kind == NOTICE]
    return {
        entry: match
        for entry, match in matches.items()
        if match[0] != ELSEWHERE or not any(begin <= match[3] and match[1] <= end for begin, end in notices)
    }


@cache
def _literals(message: str) -> tuple[str, ...]:
    """The text between the `…` of a message, without the error's class if the rest says enough: the class may change."""
    rest = re.sub(r"^[\w.]*(?:Error|Exception|Warning): *", "", message)
    literals, short = (tuple(filter(None, map(_plain, part.split(ANYTHING)))) for part in (message, rest))
    return short if sum(map(len, short)) >= 2 * SHORTEST else literals


def _sights(entry: Entry) -> tuple[str, ...]:
    return (*entry.messages, entry.symptom) if entry.symptom else entry.messages


def _span(message: str, plain: str) -> tuple[int, int] | None:
    """Where in the text the message begins and ends, the last time if it is there several times."""
    literals, position = _literals(message), 0
    for literal in literals:
        position = plain.find(literal, position)
        if position < 0:
            return None
        position += len(literal)
    last = plain.rfind(literals[-1])
    return plain.rfind(literals[0], 0, last + len(literals[0])), last + len(literals[-1])


# ---- Step 2: a piece of the message


def _shared_runs(plain: str, entries: tuple[Entry, ...], notices: bool = True) -> Counter:
    """For each entry, how many runs of RUN characters its messages share with the text and no other entry has.

    Without `notices` only those messages count that can be the cause of an error.
    """
    owners: dict[str, set[Entry]] = {}
    for entry in entries:
        for message in _sights(entry):
            for literal in _literals(message) if notices or message not in entry.notices else ():
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


# ---- Steps 3 and 4: descriptions and words


def _described(text: str, entries: tuple[Entry, ...]) -> Entry | None:
    """The entry whose `seen_as` patterns a description has, all of them; of several the one with the most, if one has."""
    found = [e for e in entries if e.seen_as and all(re.search(p, text, re.I | re.S) for p in e.seen_as)]
    most = max((len(entry.seen_as) for entry in found), default=0)
    best = [entry for entry in found if len(entry.seen_as) == most]
    return best[0] if len(best) == 1 else None


_COMMON = set(
    "about after all also and any are because been before but can could did does doing done for from get gets got had "
    "has have help her his how into its just like more most not now only other our out over please shall should some "
    "such than that the their them then there these they this those too under until was were what when where which "
    "while who why will with would you your pip install is it in on of to as at by be do if an or no so up we my me he us am very again always during error errors exception fails failed line file last "
    "call recent traceback run runs running try trying using use used happens problem wrong says said see "
    "everything something right thing things well good still though although however make made give given really "
    "seems seem exactly simply command found module named object attribute nonetype cannot qlora_helpers".split()  # the last is in many cures, and in every traceback of the course
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


def _shares_a_rare_word(text: str, entry: Entry, entries: tuple[Entry, ...]) -> bool:
    """Whether a word of the text is in what is seen of this entry, and in few others."""
    shared = _words(text) & _seen_words(entry)
    return any(sum(1 for other in entries if word in _vocabulary(other)) <= RARE for word in shared)


def _shares_a_name(text: str, entry: Entry, entries: tuple[Entry, ...]) -> bool:
    """Whether a name_like_this of the text is in what is seen of this entry, and of no other."""
    names = {word for word in _words(text) & _seen_words(entry) if "_" in word}
    return any(sum(1 for other in entries if name in _seen_words(other)) == 1 for name in names)


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
        if answer.perhaps:
            entry = answer.perhaps
            lines = [
                f"No entry of {PAGE} fits this text for certain: other programs print the same, and nothing in the text",
                "is from the libraries of this course (transformers, TRL, PEFT, bitsandbytes).",
                "",
                f"If this comes from fine-tuning with them, then: {entry.heading}",
                "",
                "What it means",
                entry.meaning,
                "",
                "Cure",
                entry.cure,
            ]
        for title, entries in (
            ("The nearest entries, which may be about something else:", answer.others),
            ("Also in the text, but no cause of an error:", answer.also),
        ):
            if entries:
                lines += ["", title, *(f"- {entry.heading}" for entry in entries)]
        lines += ["", "Paste more of it: the last line of a traceback, with the lines above it."]
        return "\n".join(lines)
    entry = answer.entry
    parts = zip(PARTS, (entry.meaning, entry.cure, entry.where), strict=True)
    blocks = [entry.heading, *(f"{name}\n{text}" for name, text in parts)]
    blocks[1:1] = [f"For `{name}`: {cure}" for name, cure in answer.named]
    if entry.asks:
        blocks.append(f"To be sure\n{entry.asks}")
    if answer.others:
        blocks.append(
            "The text also contains messages of other entries:\n" + "\n".join(f"- {e.heading}" for e in answer.others)
        )
    blocks.append(f"From {PAGE}, under “{entry.group}”.")
    return "\n\n".join(blocks)
