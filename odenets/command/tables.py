"""A table in a terminal, or plain columns where the output is read by something else."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["print_table"]

WIDE = 1 << 16
"""Columns of what is no terminal."""


def print_table(heads: Sequence[str], rows: Sequence[Sequence[str]], sections: Collection[int] = ()) -> None:
    """Print rows under their heads; the first two columns are names, the others numbers.

    Args:
        heads: of the columns.
        rows: of texts.
        sections: rows before which a line is drawn, in a terminal.
    """
    console = Console(highlight=False)
    shown = console.is_terminal
    if not shown:
        console.width = WIDE
    table = Table(box=box.SIMPLE_HEAD if shown else None, pad_edge=False, show_edge=False)
    for i, head in enumerate(heads):
        name = i == 1
        table.add_column(head, justify="left" if name else "right", style="bold" if name else "", no_wrap=not name)
    for m, row in enumerate(rows):
        if m in sections and shown:
            table.add_section()
        table.add_row(*map(Text, row))  # names are no markup
    console.print(table)
