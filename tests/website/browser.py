"""Open each page of a built site in Chromium, as a reader would, and say what is wrong with it.

    .venv-site/bin/python -m tests.website.browser dist/site
    .venv-site/bin/python -m tests.website.browser dist/site index.html     # some pages only

It runs in the site's own environment, with `tests/website/browser.requirements.txt`; `test_site.py` calls it.
"""

import functools
import http.server
import os
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pypdfium2
from playwright.sync_api import Browser, Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDE, NARROW = 1400, 390  # pixels: a laptop's window and a phone

# What does not fit: the page itself is wider than its window, or code ends outside of what can be scrolled to.
TOO_WIDE = """() => {
  const found = [];
  for (const box of [document.documentElement, document.querySelector('.content')])
    if (box.scrollWidth > box.clientWidth + 1) found.push(`${box.scrollWidth - box.clientWidth} pixels too wide`);
  for (const pre of document.querySelectorAll('pre')) {
    const cut = pre.scrollWidth > pre.clientWidth + 1 && !['auto', 'scroll'].includes(getComputedStyle(pre).overflowX);
    if (cut || pre.getBoundingClientRect().right > innerWidth)
      found.push(`code is cut off: ${pre.textContent.slice(0, 60)}`);
  }
  return found;
}"""

NOT_LOADED = """() => [...document.images].filter(image => !image.complete || !image.naturalWidth)
  .map(image => `an image was not loaded: ${image.alt.slice(0, 60)}`)"""

# Text that stands out too little from its ground: WCAG 2's ratio of luminances, 4.5 for text.
TOO_FAINT = """() => {
  const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
  const light = colour => numbers(colour).slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = element => {
    for (let at = element; at; at = at.parentElement) {
      const colour = getComputedStyle(at).backgroundColor, alpha = numbers(colour)[3];
      if (alpha === undefined || alpha > 0.5) return colour;
    }
    return 'rgb(255, 255, 255)';
  };
  const found = new Map();
  const walker = document.createTreeWalker(document.querySelector('article'), NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode.textContent.trim(), element = walker.currentNode.parentElement;
    if (!text || !element.checkVisibility({visibilityProperty: true, opacityProperty: true})) continue;
    const [one, other] = [light(getComputedStyle(element).color), light(ground(element))].sort((a, b) => b - a);
    const ratio = (one + 0.05) / (other + 0.05);
    if (ratio < 4.5) found.set(getComputedStyle(element).color, `contrast of ${ratio.toFixed(1)}: ${text.slice(0, 40)}`);
  }
  return [...found.values()];
}"""


def chromium() -> str | None:
    """The path of an installed Chromium or Chrome."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@contextmanager
def served(site: Path) -> Iterator[str]:
    """The site on a port of this machine; gives its address."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def opened(browser: Browser, faults: list[str], host: str, scheme: str) -> Iterator[Page]:
    """A new page whose errors and requests are added to `faults`."""
    page = browser.new_page(viewport={"width": WIDE, "height": 900}, color_scheme=scheme)
    where = lambda: page.url.removeprefix(host)  # noqa: E731
    page.on(
        "console", lambda m: m.type in ("error", "warning") and faults.append(f"{where()}: the console says {m.text}")
    )
    page.on("pageerror", lambda error: faults.append(f"{where()}: a script failed: {error}"))
    page.on("requestfailed", lambda r: faults.append(f"{where()}: {r.url[:80]} could not be fetched"))
    page.on("response", lambda r: r.status >= 400 and faults.append(f"{where()}: {r.url} gave {r.status}"))

    def ask(request) -> None:
        if not request.url.startswith((host, "data:")):
            faults.append(f"{where()}: asks another host, {request.url[:80]}")

    page.on("request", ask)
    yield page
    page.close()


def look(page: Page, address: str, name: str, scheme: str) -> list[str]:
    """What is wrong with one page in one colour scheme, at both widths."""
    page.set_viewport_size({"width": WIDE, "height": 900})
    page.goto(address + name)
    found = []
    heading = "Search" if name == "search.html" else page.locator("article h1").inner_text().rstrip("#")
    if heading not in page.title():
        found.append(f"the title is {page.title()!r} and the heading {heading!r}")
    page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).every(v => v < 60)")
    if dark != (scheme == "dark"):
        found.append(f"the ground is {'dark' if dark else 'light'}")
    found += page.evaluate(NOT_LOADED) + page.evaluate(TOO_FAINT) + page.evaluate(TOO_WIDE)
    page.set_viewport_size({"width": NARROW, "height": 900})
    found += [f"at {NARROW} pixels: {fault}" for fault in page.evaluate(TOO_WIDE)]
    return [f"{name}, {scheme}: {fault}" for fault in found]


def use(page: Page, address: str, lessons: list[str]) -> list[str]:
    """What does not work for a reader who searches, folds, switches the colours and turns the pages."""
    found = []
    page.set_viewport_size({"width": WIDE, "height": 900})
    page.goto(address + lessons[0])
    for place, name in (("a.next-page", lessons[1]), ("a.prev-page", lessons[0])):
        page.locator(place).click()
        if not page.url.endswith(name):
            found.append(f"{place} leads to {page.url}")
    exercise = page.locator("details.exercise").first
    solution = exercise.locator("details.solution").first
    if exercise.get_attribute("open") is None or solution.get_attribute("open") is not None:
        found.append("an exercise should be open at first, and its solution closed")
    solution.locator("summary").first.click()
    if not solution.locator("pre").first.is_visible():
        found.append("a solution does not open")
    exercise.locator("summary").first.click()
    if solution.is_visible():
        found.append("an exercise does not fold")
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    grounds = {before}
    for _ in range(3):  # by itself, light, dark
        page.locator(".theme-toggle-content button, .content-icon-container button.theme-toggle").first.click()
        grounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    if len(grounds) != 2:
        found.append(f"the button for the colours gives {len(grounds)} grounds")
    found += search(page, "absmax")
    return found


def search(page: Page, word: str) -> list[str]:
    """Search for a word from the page that is open, and open the first lesson that is found."""
    field = page.locator(".sidebar-search")
    field.fill(word)
    field.press("Enter")
    results = page.locator("#search-results ul.search a[href*='notebooks/']")
    results.first.wait_for(timeout=10_000)
    page.wait_for_load_state("networkidle")
    results.first.click()
    page.wait_for_load_state()
    said = page.locator("article").inner_text()
    return [] if word in said.lower() else [f"the search for {word!r} leads to {page.url}, which does not have it"]


def printed(page: Page, address: str, name: str) -> list[str]:
    """What a page loses when it is printed on A4: characters beyond the right margin, or lines of code."""
    page.set_viewport_size({"width": WIDE, "height": 900})
    page.goto(address + name)
    code = page.evaluate(
        "[...document.querySelectorAll('pre')].filter(p => p.checkVisibility()).map(p => p.textContent)"
    )
    margin = 72 / 2.54  # points in a centimetre
    pdf = pypdfium2.PdfDocument(page.pdf(format="A4", margin=dict.fromkeys(("top", "bottom", "left", "right"), "1cm")))
    found, text = [], ""
    for number, sheet in enumerate(pdf, start=1):
        characters = sheet.get_textpage()
        text += characters.get_text_range()
        limit = sheet.get_width() - margin + 2  # a letter may stick out a little
        marks = (i for i in range(characters.count_chars()) if characters.get_text_range(i, 1).strip())
        beyond = [i for i in marks if characters.get_charbox(i)[2] > limit]
        if beyond:
            cut = characters.get_text_range(max(0, beyond[0] - 40), 41)
            found.append(f"{name}, printed, sheet {number}: {len(beyond)} characters beyond the margin after {cut!r}")
    there = essence(text)
    lines = {line: essence(line) for block in code for line in block.splitlines()}
    # a wrapped line may go on on the next sheet, whose text need not begin with it
    lost = [
        line
        for line, marks in lines.items()
        if not any(marks[:at] in there and marks[at:] in there for at in range(len(marks), -1, -1))
    ]
    return [*found, *(f"{name}, printed: lost {line[:80]!r}" for line in lost)]


def essence(text: str) -> str:
    """Text without what a PDF's lines and sheets change: blanks, and hyphens, which may end a line."""
    return re.sub(r"[\s\-\x00-\x1f\ufffe\u00ad]", "", text)


def faults(site: Path, only: list[str]) -> list[str]:
    """All that is wrong with the site, or with a few of its pages, which then are only looked at and printed."""
    names = sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html") if "files" not in path.parts)
    lessons = [name for name in names if name.startswith("notebooks/")]
    names, to_print = (only, only) if only else (names, [*lessons, "index.html"])
    found: list[str] = []
    with sync_playwright() as tool, served(site) as address:
        sandbox = [] if os.getuid() else ["--no-sandbox"]  # Chromium refuses root without it
        browser = tool.chromium.launch(executable_path=chromium(), args=[*sandbox, "--disable-gpu"])
        for scheme in ("light", "dark"):
            with opened(browser, found, address, scheme) as page:
                for name in names:
                    found += look(page, address, name, scheme)
        with opened(browser, found, address, "light") as page:
            for name in to_print:
                found += printed(page, address, name)
            found += [] if only else use(page, address, lessons)
        if not only:
            with browser.new_context(offline=True) as context:  # a site that was copied to a disk
                page = context.new_page()
                page.goto((site / "index.html").as_uri())
                found += search(page, "absmax")
        browser.close()
    print(f"{len(names)} pages seen in light and dark, {len(to_print)} printed")
    return found


if __name__ == "__main__":
    wrong = faults(Path(sys.argv[1]).resolve(), sys.argv[2:])
    print("\n".join(wrong))
    sys.exit(bool(wrong))
