"""What objects that hold tensors show of themselves: shapes and kinds, not every number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

__all__ = ["in_short", "shown", "table"]


def in_short(value: object) -> str:
    """A tensor or an array as kind and shape, also within a mapping; anything else as it shows itself.

    >>> import torch
    >>> in_short(torch.zeros(3, 2)), in_short({"y": torch.arange(3)}), in_short("name")
    ('float32 (3, 2)', "{'y': int64 (3,)}", "'name'")
    """
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {in_short(one)}" for key, one in value.items()) + "}"
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape is None or dtype is None:
        return repr(value)
    return f"{str(dtype).removeprefix('torch.')} {tuple(shape)}"


def shown(self: Any) -> str:
    """A dataclass with its fields in short, as its ``__repr__``."""
    parts = [f"{field.name}={in_short(getattr(self, field.name))}" for field in fields(self) if field.repr]
    return f"{type(self).__name__}({', '.join(parts)})"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table of ``columns`` but those that are empty in all ``rows``; numbers stand to the right.

    >>> table(("step", "name", "shape"), [("0", "layer", ""), ("10", "head", "")])
    ['  step  name', '     0  layer', '    10  head']
    """
    shown = [column for column in zip(columns, *rows, strict=True) if any(column[1:])]
    padded = []
    for head, *cells in shown:
        width = max(map(len, (head, *cells)))
        right = all(cell.isdigit() for cell in cells)
        padded.append([cell.rjust(width) if right else cell.ljust(width) for cell in (head, *cells)])
    return [("  " + "  ".join(line)).rstrip() for line in zip(*padded, strict=True)]
