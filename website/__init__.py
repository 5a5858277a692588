"""The course as a website: `make site` builds it into `dist/site/`, from the notebooks' stored outputs.

`pages` says what is a page and where each link leads, `lesson_page` turns a notebook into Markdown, `conf` and `folding`
are Sphinx's part, `links` checks what came out, and `build` does all of it in order. Nothing is executed, nothing is
fetched, and a reader's browser fetches nothing from another host.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # of the repository
