"""What becomes a page of the website, where its links lead, and how a notebook becomes Markdown."""

import json
import re
import subprocess

import pytest

from notebooks.scripts import build as lessons
from tests import ROOT
from website import build, lesson_page, links, pages


def cell(source, *tags, outputs=(), kind="code"):
    made = {"cell_type": kind, "source": source, "metadata": {"tags": list(tags)}}
    return made | ({"outputs": list(outputs)} if kind == "code" else {})


def text(source):
    return cell(source, kind="markdown")


def printed(said):
    return {"output_type": "stream", "name": "stdout", "text": said}


@pytest.fixture
def course(tmp_path):
    """A course of two lessons and some files."""
    for name, content in {
        "colab/repository.json": '{"github": ""}',
        "README.md": "# The course\n",
        "GLOSSARY.md": "# Glossary\n\n## absmax\n",
        "notebooks/01_one.ipynb": "",
        "notebooks/02_two.ipynb": "",
        "notebooks/solutions/01_one.ipynb": "",
        "data/small/README.md": "# Card\n",
        "data/measured/kills.txt": "20 runs",
        "helpers/quantize.py": "# code",
        "teaching/README.md": "# Teach\n",
        "teaching/plan.md": "# Plan\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content, encoding="utf-8")
    (tmp_path / "data" / "small" / "weights.bin").write_bytes(b"\xff\xfe\x80")
    return tmp_path


# ---- Pages


def test_pages_are_found_and_have_their_place(course):
    assert pages.sections(course) == {
        "Lessons": ["notebooks/01_one.ipynb", "notebooks/02_two.ipynb"],
        "Look up": ["GLOSSARY.md"],
        "Teach": ["teaching/README.md", "teaching/plan.md"],
        "What ships with the course": ["data/small/README.md"],
    }
    assert [pages.document(page) for page in ("README.md", "teaching/README.md", "notebooks/01_one.ipynb")] == [
        "index", "teaching/README", "notebooks/01_one",
    ]  # fmt: skip


def test_every_markdown_file_and_every_lesson_of_this_course_is_a_page():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: git lists the project's files")
    files = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True)
    on_the_site = pages.Links(ROOT).pages
    of_others = {"teaching/reveal.js/README.md"}
    assert set(files.stdout.split()) - of_others <= on_the_site, "name it in website/pages.py"
    assert {f"notebooks/{name}.ipynb" for name in lessons.lessons()} <= on_the_site
    assert pages.NAMES.keys() - on_the_site <= {"GLOSSARY.md"}


def test_the_navigation_names_each_page_once(course):
    found = build.navigation(pages.sections(course))
    assert re.findall(r"^:caption: (.*)$", found, re.M) == list(pages.sections(course))
    assert re.findall(r"^(?!:|`).+$", found, re.M) == [
        "notebooks/01_one", "notebooks/02_two", "Glossary <GLOSSARY>", "teaching/README", "teaching/plan", "data/small/README",
    ]  # fmt: skip


# ---- Links


@pytest.mark.parametrize(
    ("page", "link", "leads_to"),
    [
        ("README.md", "notebooks/02_two.ipynb", "notebooks/02_two.md"),
        ("README.md", "GLOSSARY.md#absmax", "GLOSSARY.md#absmax"),
        ("README.md", "data/small/README.md", "data/small/README.md"),
        ("GLOSSARY.md", "README.md", "index.md"),
        ("notebooks/01_one.ipynb", "02_two.ipynb", "02_two.md"),
        ("notebooks/01_one.ipynb", "../GLOSSARY.md#absmax", "../GLOSSARY.md#absmax"),
        ("notebooks/01_one.ipynb", "../README.md#run-it", "../index.md#run-it"),
        ("notebooks/01_one.ipynb", "solutions/01_one.ipynb", "01_one.md"),
        ("teaching/README.md", "plan.md", "plan.md"),
        ("README.md", "#run-it", "#run-it"),
        ("README.md", "https://example.org/a.py", "https://example.org/a.py"),
        ("README.md", "mailto:a@example.org", "mailto:a@example.org"),
        ("README.md", "data/measured/kills.txt", "copy:files/data/measured/kills.txt"),
        ("notebooks/01_one.ipynb", "../helpers/quantize.py", "copy:files/helpers/quantize.py.txt"),
        ("data/small/README.md", "weights.bin", "copy:files/data/small/weights.bin"),
    ],
    ids=lambda value: value.replace(".ipynb", ""),  # the root conftest takes a name with it for a notebook
)
def test_a_link_leads_to_the_page_or_to_a_copy_of_the_file(course, page, link, leads_to):
    found = pages.Links(course)
    assert found.rewrite(f"See [this]({link}).", page) == f"See [this]({leads_to})."
    copied = [leads_to.removeprefix("copy:")] if leads_to.startswith("copy:") else []
    assert list(found.copies.values()) == copied and all((course / source).is_file() for source in found.copies)


def test_with_a_repository_links_to_files_lead_there_and_nothing_is_copied(course):
    (course / "colab" / "repository.json").write_text('{"github": "someone/course"}', encoding="utf-8")
    found = pages.Links(course)
    at = "https://github.com/someone/course"
    said = "[a](../helpers/quantize.py#L3) [b](../helpers) [c](../GLOSSARY.md)"
    assert found.rewrite(said, "notebooks/01_one.ipynb") == (
        f"[a]({at}/blob/main/helpers/quantize.py#L3) [b]({at}/tree/main/helpers) [c](../GLOSSARY.md)"
    )
    assert found.copies == {}
    assert build.places_to_run("notebooks/01_one.ipynb", "someone/course") == (
        "[Open in Colab](https://colab.research.google.com/github/someone/course/blob/main/colab/01_one.ipynb) · "
        f"[the notebook]({at}/blob/main/notebooks/01_one.ipynb)"
    )


@pytest.mark.parametrize(
    ("link", "why"),
    [("gone.md", "leads to no file"), ("../above.md", "leads to no file"), ("helpers", "leads to a folder")],
)
def test_a_link_that_leads_nowhere_is_refused_with_its_page(course, link, why):
    (course.parent / "above.md").write_text("outside of the course", encoding="utf-8")
    with pytest.raises(ValueError, match=f"README.md: the link to '{re.escape(link)}' {why}"):
        pages.Links(course).rewrite(f"[x]({link})", "README.md")


@pytest.mark.parametrize(
    "code",
    [
        "```\n[x](gone.md)\n```",
        "````text\n```\n[x](gone.md)\n```\n````",
        "- a list\n\n  ```\n  [x](gone.md)\n  ```",
        "`[x](gone.md)`",
        "``a ` and [x](gone.md)``",
        "~~~\n[x](gone.md)\n~~~",
    ],
)
def test_code_is_left_as_it_is(course, code):
    whole = f"[a](GLOSSARY.md)\n\n{code}\n\n[b](notebooks/01_one.ipynb)"
    assert pages.Links(course).rewrite(whole, "README.md") == whole.replace("ipynb", "md")


def test_a_link_around_code_is_a_link(course):
    assert pages.Links(course).rewrite("[`one`](notebooks/01_one.ipynb)", "README.md") == "[`one`](notebooks/01_one.md)"


def test_images_keep_their_place(course):
    found = pages.Links(course)
    (course / "data" / "map.svg").write_text("<svg/>", encoding="utf-8")
    (course / "data" / "dark.svg").write_text("<svg/>", encoding="utf-8")
    said = '![a map](../data/map.svg) [![badge](https://example.org/b.svg)](README.md)\n<picture><source srcset="../data/dark.svg">'
    said += '<img alt="a map" src="../data/map.svg"></picture> <img src="data:image/png;base64,AA">'
    assert found.rewrite(said, "teaching/README.md") == said
    assert found.images == {"data/map.svg"}
    assert found.copies == {"data/dark.svg": "data/dark.svg", "data/map.svg": "data/map.svg"}
    for gone in ("![x](gone.png)", '<img src="gone.png">'):
        with pytest.raises(ValueError, match="leads to no file"):
            found.rewrite(gone, "README.md")


def test_a_page_has_one_title():
    one = "# A\n\n## B\n\n```\n# no heading\n```\n"
    assert pages.one_title(one) == one
    assert pages.one_title("# A\n\n# B\n\n## C\n\n```\n# no heading\n```\n") == (
        "# A\n\n## B\n\n### C\n\n```\n# no heading\n```\n"
    )


# ---- Lessons


def test_a_solution_is_folded_below_its_exercise_with_what_the_check_says_then():
    head, task, end = text("# 1 · One"), text("## Exercise 1\n\nHow many?"), text("## You have")
    asked, solved = cell("answer = ...", "exercise"), cell("answer = 4", "solution")
    unsolved, right = (cell("check(answer)", outputs=[printed(said)]) for said in ("○ not solved yet\n", "✓ right!\n"))
    made = lesson_page.page([head, task, asked, unsolved, end], [head, task, solved, right, end])
    assert (
        made.index("How many?")
        < made.index("answer = ...")
        < made.index("○ not solved yet")
        < made.index("```{solution}")
    )
    assert made.index("```{solution}") < made.index("answer = 4") < made.index("✓ right!") < made.index("## You have")
    assert made.count("check(answer)") == 1


def test_two_exercises_below_one_heading_have_their_own_solutions():
    cells = [text("## Exercise 1"), *(cell(f"{name} = ...", "exercise") for name in "ab")]
    learner = [cells[0], cells[1], cell("check(a)"), cells[2], cell("check(b)")]
    solved = [cells[0], cell("a = 1", "solution"), cell("check(a)"), cell("b = 2", "solution"), cell("check(b)")]
    made = lesson_page.page(learner, solved)
    places = [made.index(part) for part in ("a = ...", "check(a)", "a = 1", "b = ...", "check(b)", "b = 2")]
    assert places == sorted(places) and made.count("{solution}") == 2


@pytest.mark.parametrize(
    ("learner", "solved"),
    [
        ([cell("a")], [cell("b")]),
        ([cell("a"), cell("b")], [cell("a")]),
        ([cell("a")], [cell("a"), cell("b")]),
        ([cell("a")], [text("a")]),
    ],
)
def test_editions_that_do_not_belong_together_are_refused(learner, solved):
    with pytest.raises(ValueError, match="run make notebooks"):
        lesson_page.page(learner, solved)


def test_outputs_keep_their_order_and_texts_their_backticks():
    shown = {"output_type": "display_data", "data": {"text/html": ["<img alt='a bar'", ">"], "text/plain": "Figure"}}
    plain = {"output_type": "execute_result", "data": {"text/plain": "'```'"}}
    given = [printed("one"), printed("\n"), printed("\x1b[31mtwo\x1b[0m\n"), shown, plain, printed("\n")]
    assert lesson_page.outputs(cell("x", outputs=given)) == [
        "```{code-block} text\n:class: cell-output\n\none\ntwo\n```",
        "```{raw} html\n\n<div class=\"cell-shown\">\n<img alt='a bar'>\n</div>\n```",
        "````{code-block} text\n:class: cell-output\n\n'```'\n````",
    ]


@pytest.mark.parametrize("data", [{"image/png": "…", "text/plain": "Figure"}, {"application/json": {}}])
def test_an_output_that_a_page_cannot_show_is_named(data):
    with pytest.raises(ValueError, match=rf"{next(iter(data))}.*in the cell that begins with 'draw\(\)'.*plots.show"):
        lesson_page.outputs(cell("draw()", outputs=[{"output_type": "display_data", "data": data}]))


def test_a_command_of_the_shell_is_not_read_as_python():
    assert lesson_page.code(cell("!pip list")).startswith("```{code-block} text")
    assert lesson_page.code(cell("a = 5 % 3")).startswith("```{code-block} python")


@pytest.mark.parametrize("name", lessons.lessons())
def test_a_lesson_s_page_has_all_its_code_its_figures_and_its_solutions(name):
    learner, solved = (
        json.loads((folder / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
        for folder in (lessons.EDITIONS["learner"], lessons.EDITIONS["solutions"])
    )
    made = lesson_page.page(learner, solved)
    exercises = [one for one in learner if "exercise" in one["metadata"].get("tags", [])]
    assert made.count("{solution}") == len(exercises) >= 2
    for one in (*learner, *solved):
        if one["cell_type"] == "code":
            assert "".join(one["source"]).rstrip("\n") in made
    alts = re.findall(r'<img[^>]* alt="([^"]*)"|<img alt="([^"]*)"', json.dumps(learner).replace('\\"', '"'))
    assert alts and all("".join(alt) in json.dumps(made, ensure_ascii=True) for alt in alts)
    assert len(re.findall(r"^✓ .*: right[!.]", made, re.M)) >= len(exercises)


# ---- The checks of what was built


def test_the_checks_find_each_fault_and_nothing_in_a_sound_site(tmp_path):
    (tmp_path / "style.css").write_text("", encoding="utf-8")
    other = '<a href="index.html#here">x</a> <a href="https://example.org">y</a> <a href="#">top</a>'
    (tmp_path / "other page.html").write_text(other, encoding="utf-8")
    sound = (
        '<link rel="stylesheet" href="style.css"><link rel="next" href="#"><p id="here"></p><a name="there"></a>'
        '<a href="other%20page.html">x</a><a href="#there">y</a><img alt="a bar" src="data:image/png;base64,AA">'
    )
    (tmp_path / "index.html").write_text(sound, encoding="utf-8")
    assert links.faults(tmp_path) == []
    for fault, said in {
        '<img src="data:image/png;base64,AA">': "an image without alt text",
        '<img alt=" " src="style.css">': "an image without alt text",
        '<img alt="a bar" src="gone.png">': "fetches 'gone.png', which is not there",
        '<script src="https://example.org/a.js"></script>': "fetches https://example.org/a.js from another host",
        '<link rel="stylesheet" href="//example.org/a.css">': "fetches //example.org/a.css from another host",
        '<a href="gone.html">x</a>': "the link to 'gone.html' leads to no file",
        '<a href="other%20page.html#gone">x</a>': "leads to no place on that page",
        '<a href="#gone">x</a>': "the link to '#gone' leads to no place on that page",
        '<p id="here"></p>': "two places are called #here",
    }.items():
        (tmp_path / "index.html").write_text(sound + fault, encoding="utf-8")
        assert [fault for fault in links.faults(tmp_path) if fault.startswith("index.html: ") and said in fault], said
        assert len(links.faults(tmp_path)) == 1


def test_the_site_s_packages_are_pinned_and_not_the_course_s():
    pin = re.compile(r"^([\w.-]+)==\S+$")
    for path in (ROOT / "website" / "requirements.txt", ROOT / "tests" / "website" / "browser.requirements.txt"):
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
        names = {pin.match(line)[1].lower() for line in lines}
        course = (ROOT / "requirements.txt").read_text(encoding="utf-8").lower()
        assert names and not {name for name in names if re.search(rf"^{re.escape(name)}\b", course, re.M)}
