"""Which files of the repository are pages of the site, and where a link between them leads there.

A page keeps its place: `notebooks/01_memory_maths.ipynb` becomes `notebooks/01_memory_maths.html`. README.md is the
front page. All other files that a page links to are no pages: their links lead to the repository, if
`colab/repository.json` names one, and otherwise to a copy on the site, under `files/`.
"""

import json
import posixpath
import re
from collections.abc import Callable
from pathlib import Path

FRONT = "README.md"
# The navigation: headings with the pages below each. Patterns may find nothing.
SECTIONS = {
    "Lessons": ("notebooks/[0-9][0-9]_*.ipynb",),
    "Look up": ("GLOSSARY.md", "TROUBLESHOOTING.md", "API.md", "CLAIMS.md"),
    "Teach": ("teaching/README.md", "teaching/*.md"),
    "What ships with the course": ("data/*/README.md", "LICENSE-CONTENT.md"),
}
# What the navigation calls a page whose title is a sentence; the others have their titles.
NAMES = {
    "GLOSSARY.md": "Glossary",
    "TROUBLESHOOTING.md": "Troubleshooting",
    "API.md": "The package's functions",
    "CLAIMS.md": "The articles' claims",
    "data/adapters/README.md": "The adapter",
    "data/tiny-llama/README.md": "The model",
    "LICENSE-CONTENT.md": "Licence",
}
# A browser shows text of these kinds itself; other text is copied with `.txt` at its end, so that it is shown, too.
SHOWN = {".txt", ".html", ".png", ".svg", ".pdf"}

_FENCE = re.compile(r"^( *)(`{3,}|~{3,}).*?^\1\2[`~]*[ ]*$", re.M | re.S)
_CODE_SPAN = re.compile(r"(?<!`)(`+)(?!`)(?:(?!\n\n).)+?(?<!`)\1(?!`)", re.S)
_IMAGE = re.compile(r"!\[[^\]]*\]\(([^()\s]+)\)")
_IMAGE_OR_LINK = re.compile(rf"{_IMAGE.pattern}|\]\(([^()\s]+)\)")  # of a link its end: its text may have code in it
_HTML_IMAGE = re.compile(r"<(?:img|source)\b[^>]*?\s(?:src|srcset)=[\"']([^\"'\s]+)")
_TITLE = re.compile(r"^# .*$", re.M)
_SCHEME = re.compile(r"[a-z][a-z+.-]*:", re.I)


def sections(root: Path) -> dict[str, list[str]]:
    """The pages below each heading of the navigation, as paths from `root`; the front page is in none."""
    found: dict[str, list[str]] = {}
    for heading, patterns in SECTIONS.items():
        paths = [path.relative_to(root).as_posix() for pattern in patterns for path in sorted(root.glob(pattern))]
        if paths:
            found[heading] = list(dict.fromkeys(paths))
    return found


def document(page: str) -> str:
    """The name under which Sphinx knows a page, such as `notebooks/01_memory_maths`; README.md is `index`."""
    return "index" if page == FRONT else page.rpartition(".")[0]


def repository(root: Path) -> str:
    """The GitHub repository, as OWNER/NAME, or an empty text."""
    return json.loads((root / "colab" / "repository.json").read_text(encoding="utf-8"))["github"]


def outside_code(text: str, change: Callable[[str], str]) -> str:
    """Apply `change` to the parts of a Markdown text that are not code."""
    done, at = [], 0
    spans = [match.span() for match in _FENCE.finditer(text)]
    for match in _CODE_SPAN.finditer(text):
        if not any(start < match.end() and match.start() < end for start, end in spans):
            spans.append(match.span())
    for start, end in sorted(spans):
        done += [change(text[at:start]), text[start:end]]
        at = end
    return "".join([*done, change(text[at:])])


def one_title(text: str) -> str:
    """A page whose parts have headings of the first level, as its title has: these headings, one level lower."""
    titles = []
    outside_code(text, lambda part: titles.extend(_TITLE.findall(part)) or part)
    if len(titles) < 2:
        return text
    before, title, after = text.partition(titles[0])
    return before + title + outside_code(after, lambda part: re.sub(r"^(#{1,5} )", r"#\1", part, flags=re.M))


class Links:
    """Rewrites the links of pages, and remembers which files have to be copied for them."""

    def __init__(self, root: Path):
        self.root = root
        self.pages = {FRONT, *(page for below in sections(root).values() for page in below)}
        self.repository = repository(root)
        self.copies: dict[str, str] = {}  # a file of the repository -> its copy, from the top of the site
        self.images: set[str] = set()  # files that Sphinx needs beside the pages

    def rewrite(self, text: str, page: str) -> str:
        """The Markdown text of `page`, its links made for the site.

        Raises:
            ValueError: a link leads to no file of the repository.
        """

        def link(found: re.Match) -> str:
            return f"]({self.target(found[2], page)})" if found[2] else found[0]

        def change(part: str) -> str:
            # an image keeps its place beside its page, and with that its link
            self.images |= {self._file(path, page) for path in _IMAGE.findall(part) if not _elsewhere(path)}
            shown = [self._file(path, page) for path in _HTML_IMAGE.findall(part) if not _elsewhere(path)]
            self.copies |= dict(zip(shown, shown, strict=True))
            return _IMAGE_OR_LINK.sub(link, part)

        return outside_code(text, change)

    def _file(self, path: str, page: str) -> str:
        file = posixpath.normpath(posixpath.join(posixpath.dirname(page), path))
        if file.startswith("..") or not (self.root / file).exists():
            raise ValueError(f"{page}: the link to {path!r} leads to no file of the course: correct it")
        return file

    def target(self, link: str, page: str) -> str:
        """Where a link of `page` leads on the site."""
        if _elsewhere(link):
            return link
        path, _, anchor = link.partition("#")
        file = self._file(path, page)
        if file.startswith("notebooks/solutions/"):  # a lesson's page has its solutions
            file = file.replace("solutions/", "", 1)
        here = posixpath.dirname(document(page)) or "."
        if file in self.pages:
            to = posixpath.relpath(f"{document(file)}.md", here)
            return f"{to}#{anchor}" if anchor else to
        found = self.root / file
        if self.repository:
            kind = "tree" if found.is_dir() else "blob"
            return f"https://github.com/{self.repository}/{kind}/main/{file}" + (f"#{anchor}" if anchor else "")
        if found.is_dir():
            raise ValueError(
                f"{page}: the link to {link!r} leads to a folder, which a site cannot show: name a file in it"
            )
        self.copies[file] = f"files/{file}" + ("" if found.suffix in SHOWN or not _is_text(found) else ".txt")
        return f"copy:{self.copies[file]}"  # `folding` makes it relative to the page


def _elsewhere(link: str) -> bool:
    """Whether a link leads to the same page or to another site."""
    return link.startswith("#") or bool(_SCHEME.match(link))


def _is_text(path: Path) -> bool:
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return False
    return True
