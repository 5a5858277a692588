"""The images of a page, as a reader who cannot see them has them."""

import html.parser

__all__ = ["alt_texts"]


class _Images(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.alts = []

    def handle_starttag(self, tag, attributes):
        if tag == "img":
            self.alts.append(dict(attributes).get("alt") or "")


def alt_texts(page: str) -> list[str]:
    """The alt text of each image of a piece of HTML, in order; empty for one that has none."""
    images = _Images()
    images.feed(page)
    return images.alts
