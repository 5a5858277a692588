"""Build the course's website.

    python -m website.build                      # into dist/site/
    python -m website.build --output FOLDER      # an empty or missing folder, or an older site, which is replaced

The pages are written as Markdown into a temporary folder, made into HTML by Sphinx, with each of its warnings as an
error, and checked. Only a site without a fault replaces the one that is there.
"""

import argparse
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

from website import ROOT, lesson_page, links, pages

FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.S)  # a model card's, for the Hub


def write_sources(folder: Path, root: Path = ROOT) -> pages.Links:
    """Write the Markdown of all pages into `folder`; returns the links with what has to be copied for them."""
    found = pages.Links(root)
    for page in sorted(found.pages):
        if page.endswith(".ipynb"):
            solved = root / "notebooks" / "solutions" / Path(page).name
            text = lesson_page.page(lesson_page.read(root / page), lesson_page.read(solved))
        else:
            text = FRONT_MATTER.sub("", (root / page).read_text(encoding="utf-8"))
        text = pages.one_title(found.rewrite(text, page))
        if page.endswith(".ipynb") and found.repository:
            title, _, rest = text.partition("\n")
            text = f"{title}\n\n{places_to_run(page, found.repository)}\n{rest}"
        if page == pages.FRONT:
            text += navigation(pages.sections(root))
        path = folder / f"{pages.document(page)}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    for image in found.images:
        _copy(root / image, folder / image)
    return found


def _copy(source: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, to)


def places_to_run(page: str, repository: str) -> str:
    """A line under a lesson's title: where it can be run."""
    at, name = f"github.com/{repository}/blob/main", Path(page).name
    colab = f"https://colab.research.google.com/{at.replace('.com', '', 1)}/colab/{name}"
    return f"[Open in Colab]({colab}) · [the notebook](https://{at}/{page})"


def navigation(sections: dict[str, list[str]]) -> str:
    """Sphinx's tables of contents; the theme shows them at the side of each page."""
    blocks = []
    for heading, below in sections.items():
        names = [
            f"{pages.NAMES[page]} <{pages.document(page)}>" if page in pages.NAMES else pages.document(page)
            for page in below
        ]
        blocks.append("\n".join(["", "```{toctree}", ":hidden:", f":caption: {heading}", "", *names, "```", ""]))
    return "".join(blocks)


def build(site: Path, root: Path = ROOT) -> None:
    """Build the site of the course in `root` into `site`, and replace an older one if all is well.

    Raises:
        ValueError: `site` is a folder with something else in it.
        SystemExit: a warning of Sphinx, or a fault that the checks found; they are printed.
    """
    from sphinx.cmd.build import main as sphinx

    if site.exists() and any(site.iterdir()) and not (site / ".nojekyll").exists():
        raise ValueError(f"output={str(site)!r} has files that are no site: name an empty or a new folder")
    site.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=site.parent, prefix=".site-") as name:
        work = Path(name)
        copied = write_sources(work / "pages", root).copies
        made = work / "site"
        jobs = str(min(2, os.cpu_count() or 1))
        command = ["--fail-on-warning", "--keep-going", "--quiet", "--jobs", jobs, "--conf-dir", str(ROOT / "website")]
        if sphinx([*command, "--doctree-dir", str(work / "doctrees"), str(work / "pages"), str(made)]):
            sys.exit("The site was not built: see the warnings above.")
        (made / ".buildinfo").unlink()
        for source, copy in copied.items():
            _copy(root / source, made / copy)
        if wrong := links.faults(made):
            sys.exit("\n".join(["The site was not built:", *wrong]))
        if site.exists():
            shutil.rmtree(site)
        made.rename(site)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "dist" / "site", metavar="FOLDER")
    site = parser.parse_args().output.resolve()
    started = time.perf_counter()
    try:
        build(site)
    except ValueError as error:
        sys.exit(str(error))
    files = [path for path in site.rglob("*") if path.is_file()]
    size, count = sum(path.stat().st_size for path in files), len(list(site.rglob("*.html")))
    print(f"{count} pages, {size / 1e6:.1f} MB, in {time.perf_counter() - started:.0f} s: open {site / 'index.html'}")


if __name__ == "__main__":
    main()
