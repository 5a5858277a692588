"""The website is built and opened in a browser, as a reader would; and faults put into it are found."""

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import nbformat
import pytest

from notebooks.scripts import build as lessons
from tests import ROOT
from tests.support.images import alt_texts
from website import links, pages

PYTHON = ROOT / ".venv-site" / "bin" / "python"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

pytestmark = [
    pytest.mark.everything,
    pytest.mark.skipif(not PYTHON.exists(), reason="there is no .venv-site: make site sets it up"),
]


def in_its_environment(*arguments) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([PYTHON, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


def build(site: Path, course: Path = ROOT) -> subprocess.CompletedProcess:
    code = "import sys; from pathlib import Path; from website.build import build; build(*map(Path, sys.argv[1:]))"
    return in_its_environment("-c", code, site, course)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("website") / "site"
    done = in_its_environment("-m", "website.build", "--output", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.fullmatch(r"\d+ pages, [\d.]+ MB, in \d+ s: open \S+/index\.html\n", done.stdout), done.stdout
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A course with a front page and one lesson, built in seconds."""
    course = tmp_path_factory.mktemp("small")
    cells = [
        ("markdown", "# 1 · One lesson\n\nThe root of $x^2$ is\n\n$$x$$", ()),
        ("markdown", "## Exercise 1.1: add\n\nAdd them, then go [on](#you-have).", ()),
        ("code", "total = ...", ("exercise",)),
        ("markdown", "## You have", ()),
    ]
    for folder, left_out in (("notebooks", "solution"), ("notebooks/solutions", "exercise")):
        made = [cell for cell in cells if left_out not in cell[2]]
        if left_out == "exercise":
            made.insert(2, ("code", "total = 4", ("solution",)))
        given = [
            {"cell_type": kind, "source": source, "metadata": {"tags": list(tags)}}
            | ({"outputs": []} if kind == "code" else {})
            for kind, source, tags in made
        ]
        (course / folder).mkdir()
        (course / folder / "01_one.ipynb").write_text(json.dumps({"cells": given}), encoding="utf-8")
    (course / "colab").mkdir()
    (course / "colab" / "repository.json").write_text('{"github": ""}', encoding="utf-8")
    (course / "README.md").write_text(
        '# The course\n\nSee [it](notebooks/01_one.ipynb#you-have) and [that](#A1.2).\n\n| line |\n|---|\n| <a id="A1.2"></a>3 |\n\n![A dot](dot.svg)\n',
        encoding="utf-8",
    )
    (course / "dot.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"/>', encoding="utf-8")
    return course


def test_every_page_is_there_with_its_figures_and_their_texts(site):
    for name in pages.Links(ROOT).pages:
        assert (site / f"{pages.document(name)}.html").is_file(), name
    for name in lessons.lessons():
        notebook = nbformat.read(lessons.EDITIONS["learner"] / f"{name}.ipynb", as_version=4)
        shown = [
            output.get("data", {}).get("text/html", "") for cell in notebook.cells for output in cell.get("outputs", ())
        ]
        wanted = [html.unescape(alt) for alt in re.findall(r'<img[^>]*?alt="([^"]*)"', "".join(shown))]
        page = (site / "notebooks" / f"{name}.html").read_text(encoding="utf-8")
        assert wanted and alt_texts(page) == wanted


def test_nothing_is_wrong_with_its_links(site):
    assert links.faults(site) == []
    assert len([path for path in site.rglob("*.html")]) >= len(lessons.lessons()) + 5


def test_a_browser_finds_nothing_wrong(site):
    if not any(map(shutil.which, BROWSERS)):
        pytest.skip("no Chromium is installed: on Debian and Ubuntu, apt-get install chromium")
    done = in_its_environment("-m", "tests.website.browser", site)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"(\d+) pages seen in light and dark, (\d+) printed", done.stdout)


def test_each_fault_in_a_page_is_seen_in_the_browser(site, tmp_path):
    if not any(map(shutil.which, BROWSERS)):
        pytest.skip("no Chromium is installed: on Debian and Ubuntu, apt-get install chromium")
    shutil.copytree(site, tmp_path / "site")
    page = tmp_path / "site" / "LICENSE-CONTENT.html"
    broken = {
        '<img alt="a bar" src="gone.png">': ("an image was not loaded: a bar", "gone.png gave 404"),
        '<script src="http://localhost:9/a.js"></script>': ("asks another host", "could not be fetched"),
        "<script>console.error('oh')</script>": ("the console says oh",),
        "<script>nothing.there</script>": ("a script failed",),
        f'<pre style="overflow:hidden;white-space:pre">{"x" * 400}</pre>': ("code is cut off: xxx", "lost 'xxx"),
        '<p style="width:1200px">wide</p>': ("at 390 pixels: ",),
        '<p style="color:#777;background:#888">faint</p>': ("contrast of 1.3: faint", ", dark: contrast of 1.3"),
    }
    text = page.read_text(encoding="utf-8").replace("<title>", "<title>Another ")
    page.write_text(text.replace("</h1>", "x</h1>" + "".join(broken)), encoding="utf-8")
    done = in_its_environment("-m", "tests.website.browser", tmp_path / "site", page.name)
    assert done.returncode == 1, done.stderr
    for said in (*sum(broken.values(), ()), "the title is 'Another", ", light: ", ", dark: "):
        assert said in done.stdout, (said, done.stdout)


def test_a_small_course_is_built_with_its_formulas_and_folds(small, tmp_path):
    done = build(tmp_path / "site", small)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "notebooks" / "01_one.html").read_text(encoding="utf-8")
    assert re.search(r"<math[^>]*>\s*<msup>", page) and 'display="block"' in page and "mathjax.js" not in page.lower()
    opened, closed = page.index('<details class="exercise" open>'), page.index('<details class="solution">')
    assert page.index('id="exercise-1-1-add"') < opened < closed < page.index('id="you-have"')
    assert '<img alt="A dot" src="_images/dot.svg"' in (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert page[opened : page.index('id="you-have"')].count("</details>") == 2


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("\nSee [this](#nowhere).\n", "the link to '#nowhere' leads to no place on that page"),
        ("\nSee [this](notebooks/01_one.ipynb#nowhere).\n", "one.html#nowhere' leads to no place on that page"),
        ("\n```{nothing}\n```\n", "Unknown directive"),
        ("\n#### Too deep\n", "level"),
        (
            '\n<img src="https://example.org/a.png" alt="a bar">\n',
            "fetches https://example.org/a.png from another host",
        ),
        ('\n<img src="data:image/png;base64,AA">\n', "an image without alt text"),
        ("\nSee [this](gone.txt).\n", "leads to no file of the course"),
    ],
)
def test_a_fault_leaves_the_older_site_as_it_is(small, tmp_path, fault, said):
    course, site = tmp_path / "course", tmp_path / "site"
    shutil.copytree(small, course)
    site.mkdir()
    (site / ".nojekyll").write_text("older", encoding="utf-8")
    with (course / "README.md").open("a", encoding="utf-8") as file:
        file.write(fault)
    done = build(site, course)
    assert done.returncode and said in done.stderr, done.stderr
    assert [path.name for path in site.iterdir()] == [".nojekyll"]
    assert {path.name for path in tmp_path.iterdir()} == {"course", "site"}


def test_a_folder_that_is_no_site_is_not_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work", encoding="utf-8")
    done = in_its_environment("-m", "website.build", "--output", tmp_path)
    assert done.returncode == 1 and "has files that are no site" in done.stderr and "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
