"""Markdown of pages: paragraphs, tables in two directions, figures, and files that become a section."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from lab import evidence, tables

__all__ = ["figure", "filled", "pivot", "sections"]

WIDTH = 120
UNBROKEN = "\u00a0"
TOGETHER = "\0±\0"
"""An interval, of which no line ends within."""


def filled(text: str) -> str:
    """Markdown whose paragraphs and lists fill their lines; tables break no interval, and wide ones are not padded."""
    parts = re.split(r"(^```.*?^```$)", text, flags=re.MULTILINE | re.DOTALL)
    parts[::2] = ["\n\n".join(_block(block) for block in re.split(r"\n\s*\n", part.strip("\n"))) for part in parts[::2]]
    return re.sub(r"\n{3,}", "\n\n", "\n\n".join(parts)).strip() + "\n"


def _block(block: str) -> str:
    lines = [line.rstrip() for line in block.splitlines()]
    if block.startswith("|"):
        if max(map(len, lines)) > WIDTH:
            lines = [re.sub(r"-{3,}", "---", re.sub(r" {2,}", " ", line)) for line in lines]
        return "\n".join(lines).replace(" ± ", f"{UNBROKEN}±{UNBROKEN}")
    if re.match(r"#|!\[|<!--", block):
        return "\n".join(lines)
    items = re.split(r"\n(?=(?:-|\d+\.) )", block.replace(" ± ", TOGETHER))
    return "\n".join(
        textwrap.fill(
            " ".join(item.split()), WIDTH, break_long_words=False, break_on_hyphens=False,
            subsequent_indent=" " * len(m[0] if (m := re.match(r"(?:-|\d+\.) ", item)) else ""),
        )
        for item in items
    ).replace(TOGETHER, " ± ")  # fmt: skip


def pivot(rows: Iterable[Mapping[str, Any]], down: str, across: str, format: str, corner: str = "") -> str:
    """A table whose lines are the values of one field and whose columns are those of another."""
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        lines.setdefault(row[down], {corner: row[down]})[Path(str(row[across])).name.removesuffix(".npz")] = (
            format.format_map(row)
        )
    columns: dict[str, str | Callable[[Mapping[str, Any]], object]] = {}
    for name in dict.fromkeys(name for line in lines.values() for name in line):
        columns[name] = lambda line, name=name: line.get(name, "")
    return tables.table(lines.values(), columns)


def figure(result: str, name: str, alt: str) -> str:
    """A committed figure, with words that say what is seen; FileNotFoundError where there is none."""
    path = f"experiments/results/{result}/figures/{name}.png"
    if not (evidence.ROOT / path).exists():
        raise FileNotFoundError(f"figure must name a committed figure, got {path}")
    return f"![{' '.join(alt.split())}](../../{path})"


def sections(titles: Mapping[str, str]) -> str:
    """Files of ``benchmarks/results`` as sections: headings one level down, links from here or to each other."""
    return "\n\n".join(f"## {title}\n\n{_section(name, titles)}" for name, title in titles.items())


def _section(name: str, titles: Mapping[str, str]) -> str:
    def link(target: re.Match[str]) -> str:
        stem, ending = target[1].rsplit(".", 1)
        if ending == "md" and stem in titles:
            return "](#" + re.sub(r"[^\w -]", "", titles[stem].lower()).replace(" ", "-") + ")"
        return f"](../benchmarks/results/{target[1]})"

    text = (evidence.ROOT / f"benchmarks/results/{name}.md").read_text()
    text = re.sub(r"\A# .*\n", "", text)
    text = re.sub(r"^#", "##", text, flags=re.MULTILINE)
    text = re.sub(r"^\|[^|\n]*\|[^|\n]*\|", _unbroken, text, flags=re.MULTILINE)
    return re.sub(r"\]\(([\w.]+)\)", link, text).strip()


def _unbroken(cells: re.Match[str]) -> str:
    """The first two cells of a line of a table, which do not wrap."""
    return "|".join(f" {cell.strip().replace(' ', UNBROKEN)} " if cell else "" for cell in cells[0].split("|"))
