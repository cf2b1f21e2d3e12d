"""The help pages of LibreOffice 7.4 in English and German, out of Debian's packages.

The same pages in both languages, in which a paragraph and its translation have the same id. The texts are under the
Mozilla Public License 2.0.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

from recipes.machinery.data import Download, fetch, read_deb

_PACKAGE = "libr/libreoffice/libreoffice-help-{}_7.4.7-1+deb12u14_all.deb"
PACKAGES = {
    "de": Download.debian(_PACKAGE.format("de"), "00490b63c509ac96f7f212d6a6e40452d3e0d1f97ccf4b824dd5ec4c01e8277f"),
    "en": Download.debian(_PACKAGE.format("en-us"), "8faa840285734d6cfe1ed25537b48f07e74bd6412e3917bf8e5f8a653f7b3712"),
}
_PAGE = re.compile(r"usr/share/libreoffice/help/[^/]+/text/(?P<page>.+)\.html")
_BLOCKS = frozenset({"h1", "h2", "h3", "h4", "h5", "h6", "p"})


@dataclass(frozen=True)
class Paragraph:
    """A paragraph or heading.

    Attributes:
        id: the same in all languages.
        tag: ``"p"``, or ``"h1"`` to ``"h6"`` for a heading.
        text: without markup; white space is single blanks.
    """

    id: str
    tag: str
    text: str


def read(language: str, folder: Path) -> dict[str, list[Paragraph]]:
    """The paragraphs of each page, in their order, by the page's path, such as ``"swriter/guide/anchor_object"``.

    Args:
        language: ``"de"`` or ``"en"``.
        folder: of all data sets; the package is downloaded there unless it is there.

    Raises:
        SystemExit: as :func:`recipes.machinery.data.fetch`.
    """
    pages = {}
    for name, content in read_deb(fetch(PACKAGES[language], folder), lambda name: bool(_PAGE.fullmatch(name))):
        match = _PAGE.fullmatch(name)
        if match:
            pages[match["page"]] = parse(content.decode())
    return pages


def parse(html: str) -> list[Paragraph]:
    """The paragraphs and headings of a page that have an id and a text."""
    reader = _Reader()
    reader.feed(html)
    reader.close()
    return reader.found


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[Paragraph] = []
        self._open: tuple[str, str] | None = None  # id and tag
        self._text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        id = dict(attrs).get("id")
        if tag in _BLOCKS:
            self._finish()
            self._open = (id, tag) if id else None
        elif tag == "br":
            self._text.append(" ")

    def handle_endtag(self, tag: str) -> None:
        if tag in _BLOCKS:
            self._finish()

    def handle_data(self, data: str) -> None:
        self._text.append(data)

    def _finish(self) -> None:
        text = " ".join("".join(self._text).split())
        if self._open and text:
            self.found.append(Paragraph(*self._open, text))
        self._open, self._text = None, []
