"""The glossary: in order, every link to it and from it leads somewhere, and its lessons show its terms."""

import math
import re
from types import SimpleNamespace

import bitsandbytes
import jupytext
import pytest
import torch
import transformers

from notebooks.scripts import build
from qlora_helpers.hardware import GEARS, detect
from qlora_helpers.quantize import NF4, quantize
from qlora_helpers.statistics import excess_kurtosis, interval
from qlora_helpers.units import GB, GIB
from tests import ROOT

TEXT = (ROOT / "GLOSSARY.md").read_text(encoding="utf-8")
LAST = re.compile(r"^\*Shown in (?P<lessons>.+?)\.(?: Also: (?P<also>[^.]+)\.)?\*$")
LINK = re.compile(r"\[lesson (\d+)\]\((notebooks/(\d\d)_\w+\.ipynb)\)")


def slug(heading: str) -> str:
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def entries() -> dict[str, str]:
    """The body of each entry, by its term."""
    parts = re.split(r"^## (.+)$", TEXT, flags=re.M)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


ENTRIES = entries()
ANCHORS = {slug(term) for term in ENTRIES}
every_term = pytest.mark.parametrize("term", ENTRIES)


def explanation(term: str) -> str:
    """An entry without its last line, on one line."""
    return " ".join(ENTRIES[term].strip().splitlines()[:-1]).strip()


def last_line(term: str) -> re.Match:
    found = LAST.match(ENTRIES[term].strip().splitlines()[-1])
    assert found, f"{term}: the last line names the lessons that show it"
    return found


def words_of(source: str) -> str:
    """A text in a form in which hyphens, underscores, capitals, line ends and comment signs do not matter."""
    return re.sub(r"[\s#*_-]+", " ", source.lower())


def lesson_text(name: str) -> str:
    """All that a learner reads in a lesson: its text and its code."""
    return words_of("\n".join(cell.source for cell in jupytext.read(build.SOURCES / f"{name}.py").cells))


LESSONS = {name[:2]: lesson_text(name) for name in build.lessons()}


def occurs(term: str, text: str) -> bool:
    """Whether a text has a term, in any of the forms that English gives it."""
    stem = words_of(term).strip().removesuffix("s")
    stem = re.sub(r"(e|ion)$", "", stem)  # dequantise, dequantises, dequantisation
    return re.search(rf"\b{re.escape(stem)}", text) is not None


def test_the_terms_are_in_alphabetical_order_and_have_anchors_of_their_own():
    terms = list(ENTRIES)
    assert terms == sorted(terms, key=str.casefold)
    assert len(ANCHORS) == len(terms) == len(re.findall("^## ", TEXT, re.M))
    assert 40 <= len(terms) <= 90


@every_term
def test_an_entry_is_a_few_sentences(term):
    text = explanation(term)
    sentences = re.findall(r"[.)](?= |$)", re.sub(r"\[([^]]+)\]\([^)]+\)", r"\1", text))
    assert 1 <= len(sentences) <= 5 and len(text) < 700
    assert max(map(len, TEXT.splitlines())) <= 200


@every_term
def test_the_lessons_of_an_entry_exist_and_have_its_term(term):
    line = last_line(term)
    links = LINK.findall(line["lessons"])
    assert links and " and ".join(f"[lesson {n}]({path})" for n, path, _ in links) == line["lessons"]
    names = [term, *((line["also"] or "").replace("`", "").split(" or "))]
    for number, path, prefix in links:
        assert (ROOT / path).exists() and number == str(int(prefix))
        assert any(occurs(name, LESSONS[prefix]) for name in names if name), f"lesson {number} does not have {names}"


@every_term
def test_links_between_entries_lead_to_entries(term):
    linked = re.findall(r"\]\(#([^)]*)\)", ENTRIES[term])
    assert set(linked) <= ANCHORS and slug(term) not in linked


def linking_texts() -> dict[str, str]:
    paths = [*build.SOURCES.glob("*.py"), *ROOT.glob("*.md"), *(ROOT / "qlora_helpers").rglob("*.json")]
    paths += [path for folder in build.EDITIONS.values() for path in folder.glob("*.ipynb")]
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in paths}


def test_every_link_to_the_glossary_has_its_entry():
    missing = {}
    for name, text in linking_texts().items():
        wrong = set(re.findall(r"GLOSSARY\.md#([^)\s\"]*)", text)) - ANCHORS
        if wrong:
            missing[name] = sorted(wrong)
    assert missing == {}
    assert "](GLOSSARY.md)" in linking_texts()["README.md"]


def test_terms_are_found_in_their_forms_and_not_inside_of_other_words():
    assert occurs("dequantise", "it is dequantised") and occurs("activations", "each activation")
    assert occurs("block size", words_of("block_size=64")) and occurs("warm-up", words_of("Warm-up"))
    assert not occurs("rank", "frankly") and not occurs("leak", "nothing of the kind")


# ---- The numbers of the glossary, each computed


def _double_quantisation() -> list:
    large = torch.ones(1024, 4096)
    single, double = (quantize(large, NF4, 64, nested) for nested in (False, True))
    saved = single.bits_per_parameter - double.bits_per_parameter
    return [double.absmax.numel() // double.nested.absmax.numel(), f"{saved:.6f}", single.block_size]


def _interval() -> list:
    """The share of intervals that have the true mean, 0, in them."""
    found = [interval(sample).is_noise for sample in torch.randn(4000, 5, generator=SEED).tolist()]
    return [round(100 * sum(found) / len(found))]


def _norm() -> list:
    return [round(excess_kurtosis(torch.randn(2**20, generator=SEED)))]


def _optimizer_states() -> list:
    number = torch.nn.Parameter(torch.ones(8192))
    sizes = []
    for kind in (torch.optim.AdamW, bitsandbytes.optim.AdamW8bit):
        optimizer = kind([number])
        number.grad = torch.ones_like(number)
        optimizer.step()
        states = [state for state in optimizer.state[number].values() if torch.is_tensor(state)]
        sizes.append(round(sum(s.nbytes for s in states if s.numel() == number.numel()) / number.numel()))
    return sizes


def _warm_up() -> list:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.5)
    transformers.get_linear_schedule_with_warmup(optimizer, 5, 50)
    return [int(optimizer.param_groups[0]["lr"])]


SEED = torch.Generator().manual_seed(0)
BITS = {dtype: 8 * dtype.itemsize for dtype in (torch.float16, torch.bfloat16, torch.float32)}
LARGEST = f"{torch.finfo(torch.float16).max:,.0f}"
TINY = int(torch.tensor(1e-9).half())  # what becomes of very small numbers in float16
NUMBERS = {
    "absmax": lambda: [round(end) for end in NF4.values[[0, -1]].tolist()],
    "base": lambda: [NF4.bits],
    "bfloat16": lambda: [BITS[torch.bfloat16], "8.0"],
    "codebook": lambda: [round(end) for end in NF4.values[[0, -1]].tolist()],
    "confidence interval": _interval,
    "double quantisation": _double_quantisation,
    "excess kurtosis": _norm,
    "float16": lambda: [BITS[torch.float16], LARGEST, TINY, BITS[torch.float16]],
    "GiB": lambda: [f"{GIB:,}", f"{GB:,}"],
    "loss": lambda: [round(-math.log(1.0))],
    "loss scale": lambda: [TINY],
    "mixture of experts": lambda: [NF4.bits, BITS[torch.bfloat16]],
    "NF4": lambda: [len(NF4.values)],
    "optimizer states": _optimizer_states,
    "perplexity": lambda: [round(math.exp(-math.log(1 / 10)))] * 2,
    "QLoRA": lambda: [NF4.bits, BITS[torch.bfloat16], BITS[torch.float32]],
    "warm-up": _warm_up,
}
NAMES = re.compile(r"\b(4-bit|8-bit|\w*[A-Za-z]\w*)\b|`[^`]*`")  # NF4 and float16 are names


def numbers_of(term: str) -> list[str]:
    text = NAMES.sub("", re.sub(r"\]\([^)]*\)", "]", explanation(term)))
    return re.findall(r"-?\d+(?:,\d{3})*(?:\.\d+)?", text)


def test_no_entry_has_numbers_that_nothing_computes():
    assert {term for term in ENTRIES if numbers_of(term)} == set(NUMBERS)


@pytest.mark.parametrize("term", NUMBERS)
def test_the_numbers_of_an_entry_are_computed(term):
    assert numbers_of(term) == [str(number) for number in NUMBERS[term]()]


@pytest.mark.parametrize(("major", "minor"), [(7, 0), (7, 5), (8, 0), (8, 6), (9, 0)])
def test_the_gear_in_bfloat16_begins_where_the_entry_says(major, minor, monkeypatch):
    """By torch's own rule, which looks at the card that it is given here."""
    card = SimpleNamespace(name="a card", total_memory=GIB, major=major, minor=minor)
    monkeypatch.delenv("QLORA_GEAR", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: card)
    said = float(numbers_of("bfloat16")[1])
    assert detect().gear == ("ampere" if float(f"{major}.{minor}") >= said else "t4")


def test_the_gears_are_those_of_the_course():
    assert set(re.findall(r"`(\w+)`", explanation("gear"))) == set(GEARS)
