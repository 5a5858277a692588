"""Checks of the built site: each link and anchor leads somewhere, each image has a text, and nothing is fetched."""

import html.parser
import posixpath
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

# Attributes that make a browser fetch something. A link that the reader clicks, `a href`, is not among them.
FETCHES = {
    ("audio", "src"), ("embed", "src"), ("iframe", "src"), ("img", "src"), ("img", "srcset"), ("input", "src"),
    ("link", "href"), ("object", "data"), ("script", "src"), ("source", "src"), ("source", "srcset"), ("track", "src"),
    ("video", "poster"), ("video", "src"),
}  # fmt: skip
POINTERS = ("author", "canonical", "copyright", "index", "next", "prev", "search")  # kinds of <link> that fetch nothing


@dataclass
class Page(html.parser.HTMLParser):
    """What a page has that can be wrong."""

    anchors: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)
    images_without_text: list[str] = field(default_factory=list)

    def __post_init__(self):
        super().__init__()

    def handle_starttag(self, tag, attributes):
        given = {name: value or "" for name, value in attributes}
        if "id" in given:
            self.anchors.append(given["id"])
        if tag == "a" and "name" in given:
            self.anchors.append(given["name"])
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        for name, value in given.items():
            if (tag, name) in FETCHES and not (tag == "link" and given.get("rel") in POINTERS):
                self.fetched.append(value)
        if tag == "img" and not given.get("alt", "").strip():
            self.images_without_text.append(given.get("src", "")[:60])

    handle_startendtag = handle_starttag


def read(path: Path) -> Page:
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    page.close()
    return page


def faults(site: Path) -> list[str]:
    """What is wrong with the pages of a built site, one line each; none if all is well."""
    pages = {path.relative_to(site).as_posix(): read(path) for path in sorted(site.rglob("*.html"))}
    pages = {name: page for name, page in pages.items() if not name.startswith("files/")}
    found = []
    for name, page in pages.items():
        found += [f"{name}: an image without alt text: {image}" for image in page.images_without_text]
        twice = sorted({anchor for anchor in page.anchors if page.anchors.count(anchor) > 1})
        found += [f"{name}: two places are called #{anchor}" for anchor in twice]
        for target in page.fetched:
            parts = urlsplit(target)
            if parts.scheme == "data":
                continue
            if parts.scheme or parts.netloc:
                found.append(f"{name}: fetches {target[:80]} from another host")
            elif not (site / posixpath.join(posixpath.dirname(name), unquote(parts.path))).is_file():
                found.append(f"{name}: fetches {target!r}, which is not there")
        for target in page.links:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            to = (
                posixpath.normpath(posixpath.join(posixpath.dirname(name), unquote(parts.path))) if parts.path else name
            )
            if not (site / to).is_file():
                found.append(f"{name}: the link to {target!r} leads to no file")
            elif parts.fragment and to in pages and unquote(parts.fragment) not in pages[to].anchors:
                found.append(f"{name}: the link to {target!r} leads to no place on that page")
    return found
