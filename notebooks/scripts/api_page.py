"""Write API.md: every public name of `qlora_helpers` with its signature and docstring, room by room.

    python -m notebooks.scripts.api_page

The code is read, not imported, so it takes a second. What is public is what a module's `__all__` names.
"""

import ast
import re
import textwrap
from pathlib import Path

from notebooks.scripts import ROOT

PAGE = ROOT / "API.md"
PACKAGE = ROOT / "qlora_helpers"
SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises):$", re.MULTILINE)
ENTRY = re.compile(r"^(\*{0,2}[\w., ]+): (.*(?:\n .*)*)", re.MULTILINE)
BEGIN = """# What is in `qlora_helpers`

<!-- made by notebooks/scripts/api_page.py from the docstrings -->

Import each name from its module, such as `from qlora_helpers.training.run import train`. To use the package in a project of your
own, run `pip install .` in a copy of this repository.
"""


def public_names(tree: ast.Module) -> list[str]:
    """What the module's `__all__` names; nothing if it has none."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]:
            return ast.literal_eval(node.value)
    return []


def signature(node: ast.FunctionDef) -> str:
    result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    arguments = ast.unparse(node.args)
    return f"{node.name}({re.sub(r'^(self|cls)(, )?', '', arguments)}){result}"


def as_markdown(docstring: str) -> str:
    """A docstring with its sections as lists."""
    first, *sections = SECTION.split(docstring)
    lines = [first.strip()]
    for title, body in zip(sections[::2], sections[1::2], strict=True):
        # a section ends at the first line that is not indented
        listed, _, after = body.partition("\n\n")
        listed = textwrap.dedent(listed.strip("\n"))
        entries = ENTRY.findall(listed) if title not in ("Returns", "Yields") else []
        lines.append(f"**{title}**\n")
        if entries:
            lines[-1] += "".join(f"\n- `{name}`: {' '.join(text.split())}" for name, text in entries)
        else:
            lines[-1] += "\n" + " ".join(listed.split())
        if after.strip():
            lines.append(after.strip())
    return "\n\n".join(line for line in lines if line)


def described(node: ast.AST, level: str) -> list[str]:
    """A function or a class with its public methods; of a constant only that it is there."""
    docstring = ast.get_docstring(node)
    text = [as_markdown(docstring)] if docstring else []
    if isinstance(node, ast.FunctionDef):
        return [f"{level} `{node.name}`", f"```python\n{signature(node)}\n```", *text]
    lines = [f"{level} `class {node.name}`", *text]
    for member in node.body:
        if isinstance(member, ast.FunctionDef) and not member.name.startswith("_") and ast.get_docstring(member):
            kind = {ast.unparse(decorator) for decorator in member.decorator_list}
            is_value = kind & {"property", "cached_property"}
            head = member.name if is_value else signature(member)
            lines.append(f"- `{head}`: {' '.join(as_markdown(ast.get_docstring(member)).split())}")
    return lines


def of_module(path: Path) -> list[str]:
    """The part of the page about one module; nothing if it has no public names."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = public_names(tree)
    if not names:
        return []
    found = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    constants = [name for name in names if name not in found]
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    lines = [f"## `{module}`", as_markdown(ast.get_docstring(tree) or "")]
    if constants:
        lines.append("Constants: " + ", ".join(f"`{name}`" for name in sorted(constants)) + ".")
    for name in (name for name in found if name in names):  # in the order of the code
        lines += described(found[name], "###")
    return lines


def modules() -> list[Path]:
    """All modules of the package: first those that belong to no room."""
    paths = (path for path in PACKAGE.rglob("*.py") if not path.name.startswith("__"))
    return sorted(paths, key=lambda path: (path.parent != PACKAGE, path))


def contents(path: Path) -> str:
    """A line of the list at the top: the module, linked, and the first sentence about it."""
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    anchor = f"qlora_helpers.{name}".replace(".", "")
    docstring = " ".join((ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split())
    return f"- [{name}](#{anchor}): {docstring.partition('. ')[0].rstrip('.')}"


def page() -> str:
    """API.md."""
    lines = [BEGIN.strip(), "\n".join(map(contents, modules()))]
    for path in modules():
        lines += of_module(path)
    return "\n\n".join(lines) + "\n"


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
