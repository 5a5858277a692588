"""API.md, and what it promises: every module says what is public, and everything public has types and a docstring."""

import ast

import pytest

from notebooks.scripts import api_page

MODULES = {path.relative_to(api_page.PACKAGE).as_posix(): path for path in api_page.modules()}


def test_the_page_is_up_to_date():
    assert api_page.PAGE.read_text(encoding="utf-8") == api_page.page(), "run: python -m notebooks.scripts.api_page"


def public(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = api_page.public_names(tree)
    return names, [node for node in tree.body if getattr(node, "name", None) in names]


def untyped(function: ast.FunctionDef) -> list[str]:
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    missing = [
        argument.arg for argument in every if argument.annotation is None and argument.arg not in ("self", "cls")
    ]
    return missing + ["the result"] * (function.returns is None and function.name != "__init__")


def test_all_modules_are_looked_at():
    assert len(MODULES) > 45 and {"settings.py", "memory/prediction.py", "training/run.py"} <= MODULES.keys()


@pytest.mark.parametrize("name", MODULES)
def test_a_module_says_what_is_public_and_that_is_described_and_typed(name):
    names, nodes = public(MODULES[name])
    assert names
    for node in nodes:
        assert ast.get_docstring(node), node.name
        functions = [node] if isinstance(node, ast.FunctionDef) else [
            member for member in node.body
            if isinstance(member, ast.FunctionDef) and (not member.name.startswith("_") or member.name == "__init__")
        ]  # fmt: skip
        assert {f"{node.name}.{f.name}": untyped(f) for f in functions if untyped(f)} == {}


def test_a_docstring_becomes_lists():
    text = "What it does.\n\nArgs:\n    one: the first,\n        and more.\n    two, three: others.\n\nReturns:\n    It all.\n\nAfter."
    assert api_page.as_markdown(text) == (
        "What it does.\n\n**Args**\n\n- `one`: the first, and more.\n- `two, three`: others.\n\n**Returns**\n\nIt all.\n\nAfter."
    )


def test_a_function_without_types_would_be_seen():
    (function,) = ast.parse("def f(self, a, b: int):\n    pass").body
    assert untyped(function) == ["a", "the result"]
