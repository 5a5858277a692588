"""A page as a browser reads it: its visible text, its images, what it loads and what it links to."""

import html.parser
import re
from dataclasses import dataclass, field

VOID = {"img", "meta", "br", "hr", "link", "input"}


@dataclass
class Read:
    """What is on a page; `sections` has the text of each innermost `section`, without notes for the speaker."""

    text: str = ""
    notes: str = ""
    alts: list[str] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    sections: list[str] = field(default_factory=list)


class _Reader(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.read, self.open, self.styles = Read(), [], ""

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag not in VOID:
            self.open.append(tag)
        if given.get("id"):
            self.read.places.append(given["id"])
        if tag == "a" and given.get("href"):
            self.read.links.append(given["href"])
        if tag == "img":
            self.read.alts.append(given.get("alt") or "")
        if tag == "section":
            self.read.sections.append("")
        for name in ("src", "href" if tag == "link" else "src", "data", "poster"):
            if given.get(name) and not given[name].startswith("data:"):
                self.read.loaded.append(given[name])
        self.styles += given.get("style") or ""

    def handle_endtag(self, tag):
        if tag in self.open:
            while self.open.pop() != tag:
                pass

    def handle_data(self, data):
        if "style" in self.open:
            self.styles += data
        elif "script" not in self.open and "title" not in self.open:
            if "aside" in self.open:
                self.read.notes += data
            else:
                self.read.text += data
                if self.read.sections:
                    self.read.sections[-1] += data


def read(page: str) -> Read:
    """What is on a page of HTML."""
    reader = _Reader()
    reader.feed(page)
    reader.read.loaded += re.findall(r"""(?:@import\s+["']|url\(\s*["']?)(?!data:)([^"')]+)""", reader.styles)
    reader.read.sections = [text for text in reader.read.sections if text.strip()]
    return reader.read


def squeezed(text: str) -> str:
    """A text without blanks and line ends, which a browser and a printer set anew."""
    return re.sub(r"\s", "", text)
