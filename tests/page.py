"""Reads a page back."""

import base64
import io
from html.parser import HTMLParser

import numpy as np
from PIL import Image

VOID = {"meta", "img", "link", "br", "hr", "input"}


class Page(HTMLParser):
    """Checks that tags balance and gathers attributes and the text of every element by class."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[tuple[str, str]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(source)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(attrs) == len(dict(attrs)), f"an attribute is given twice: {attrs}"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, dict(attrs).get("class") or ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1][1] if self.open else "", data.strip()))

    def of_class(self, name: str) -> list[str]:
        return [text for classes, text in self.texts if name in classes.split()]

    def pictures(self) -> list[tuple[str, np.ndarray]]:
        """The alternative text and the pixels, (h, w) or (h, w, c), of every image."""
        found = []
        for tag, attributes in self.tags:
            if tag == "img":
                head, content = (attributes["src"] or "").split(",")
                assert head == "data:image/png;base64"
                pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(content, validate=True))))
                found.append((attributes["alt"] or "", pixels))
        return found
