"""Settings of an experiment in a TOML file."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, TypeVar

__all__ = ["read_settings"]

T = TypeVar("T")


def read_settings(cls: type[T], path: Path) -> dict[str, T]:
    """The tables of a TOML file as objects of a class, by name; arrays are tuples."""
    tables: dict[str, dict[str, Any]] = tomllib.loads(path.read_text())
    return {
        name: cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in table.items()})
        for name, table in tables.items()
    }
