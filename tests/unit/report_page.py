"""report.html taken apart by the standard library's parser."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "link", "br", "img", "input", "hr"}


@dataclass
class Figure:
    key: str
    title: str = ""
    caption: str = ""
    label: str = ""
    texts: list[str] = field(default_factory=list)


class Page(HTMLParser):
    """Tags, ids, references and text of a page; every opened element must be closed by its own end tag."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.figures: dict[str, Figure] = {}
        self.text: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    @classmethod
    def of(cls, path: Path) -> Page:
        return cls(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(tag, attrs)
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self._open:
            return
        self.text.setdefault(self._open[-1], []).append(data)
        if "figure" in self._open:
            figure = list(self.figures.values())[-1]
            match self._open[-1]:
                case "h3":
                    figure.title += data
                case "figcaption":
                    figure.caption += data
                case "text":
                    figure.texts.append(data)

    def _note(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            value = value or ""
            self.attributes.append((tag, name, value))
            if name == "id":
                self.ids.append(value)
            if name == "href":
                self.references.append(value)
            self.references += re.findall(r"url\(([^)]*)\)", value)
        if tag == "figure":
            key = dict(attrs)["id"] or ""
            self.figures[key] = Figure(key)
        if tag == "svg":
            last = list(self.figures.values())[-1]
            last.label = dict(attrs)["aria-label"] or ""

    def cells(self) -> list[str]:
        return [text.strip() for text in self.text.get("td", []) if text.strip()]
