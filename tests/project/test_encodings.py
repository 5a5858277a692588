"""Files are in UTF-8 whatever the machine's own encoding is: Windows' is another one."""

import ast

import pytest

from qlora_helpers.paths import COURSE

ROOMS = ("qlora_helpers", "data/scripts", "notebooks/scripts", "colab", "teaching/scripts", "website")
FILES = [path for room in ROOMS for path in sorted((COURSE / room).rglob("*.py"))]
FILES.remove(COURSE / "colab" / "setup_cell.py")  # its only text file has a checksum


def of_the_machine(call):
    """Whether a call opens a text file in the machine's own encoding."""
    given = {word.arg for word in call.keywords}
    if "encoding" in given or None in given:  # None: **options
        return False
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name in ("read_text", "write_text"):
        # importlib.metadata's takes the name of a file
        return name == "write_text" or not call.args
    if name in ("open", "fdopen", "NamedTemporaryFile", "TemporaryFile"):
        place = 0 if name.endswith("File") or (name == "open" and isinstance(call.func, ast.Attribute)) else 1
        modes = [word.value for word in call.keywords if word.arg == "mode"] or call.args[place : place + 1]
        mode = modes[0].value if modes and isinstance(modes[0], ast.Constant) else None
        if ast.unparse(call.func) == "os.open":
            return False
        binary = name.endswith("File") if mode is None else "b" in str(mode)
        return not binary
    return False


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(COURSE).as_posix())
def test_every_text_file_is_opened_in_a_named_encoding(path):
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    assert [call.lineno for call in calls if of_the_machine(call)] == []


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("path.read_text()", True),
        ("path.write_text('a')", True),
        ("path.open()", True),
        ("path.open('w')", True),
        ("open(path)", True),
        ("open(path, mode='a')", True),
        ("os.fdopen(1, 'w')", True),
        ("tempfile.NamedTemporaryFile('w')", True),
        ("path.read_text(encoding='utf-8')", False),
        ("path.open('rb')", False),
        ("open(path, 'r+b')", False),
        ("tempfile.TemporaryFile()", False),
        ("os.open(path, os.O_RDONLY)", False),
        ("distribution.read_text('direct_url.json')", False),
    ],
)
def test_the_rule_knows_which_calls_open_a_text_file(line, found):
    assert of_the_machine(ast.parse(line).body[0].value) is found
