"""English texts as one string: files of plain text or HTML, in a folder or in an installed package."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

from lab.pretrained.wheels import file_in

__all__ = ["read_text"]

SUFFIXES = {".txt", ".cor", ".html"}
SKIPPED = {"script", "style", "head", "nav", "pre", "table"}
"""Elements of HTML that hold no prose."""
BLOCKS = {"p", "div", "li", "h1", "h2", "h3", "h4", "h5", "h6", "dt", "dd", "br"}


def read_text(source: str | Path) -> str:
    """The text of a source.

    Args:
        source: a file; a folder, all files in it in the order of their names; or ``package:pattern``, a file in an
            installed package. Of HTML, the prose.

    Raises:
        FileNotFoundError: there is no such file, or none in the folder that is text.

    >>> read_text("sklearn:datasets/descr/california_housing.rst")[:29]
    '.. _california_housing_datase'
    """
    package, colon, pattern = str(source).partition(":")
    path = file_in(package, pattern) if colon else Path(source)
    files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES) if path.is_dir() else [path]
    if not files or not path.exists():
        raise FileNotFoundError(f"{source} must be a text file or a folder of some ({', '.join(sorted(SUFFIXES))})")
    texts = [file.read_text(errors="replace") for file in files]
    return "\n\n".join(prose(text) if file.suffix == ".html" else text for file, text in zip(files, texts, strict=True))


def prose(html: str) -> str:
    """The words of a page, a line for each paragraph that holds a sentence.

    >>> prose("<head>no</head><p>One <b>sentence</b>, as long\\n as it need be.</p><li>no</li>")
    'One sentence, as long as it need be.'
    """
    reader = _Prose()
    reader.feed(html)
    lines = (re.sub(r"\s+", " ", line).strip() for line in "".join(reader.parts).split("\0"))
    return "\n".join(line for line in lines if line.count(" ") > 5)


class _Prose(HTMLParser):
    """Text outside of the elements that are skipped, with a mark where a block begins or ends."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.skipped = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.skipped += tag in SKIPPED
        if tag in BLOCKS:
            self.parts.append("\0")

    def handle_endtag(self, tag: str) -> None:
        self.skipped = max(0, self.skipped - (tag in SKIPPED))
        if tag in BLOCKS:
            self.parts.append("\0")

    def handle_data(self, data: str) -> None:
        if not self.skipped:
            self.parts.append(data)
