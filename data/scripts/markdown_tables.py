"""Generated tables in Markdown files: each has a place, which is filled again when its figures change."""


def fill(text: str, tables: dict[str, str]) -> str:
    """Put each table into its place `<!-- name -->` … `<!-- end of name -->` in a Markdown text.

    Raises:
        ValueError: one of the places is missing in the text.
    """
    for name, table in tables.items():
        before, begin, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- end of {name} -->")
        if not begin or not end:
            raise ValueError(f"no place <!-- {name} --> … <!-- end of {name} --> in the text: put it back")
        text = before + begin + table + "\n" + end + after
    return text
