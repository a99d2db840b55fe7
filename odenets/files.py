"""Files written atomically: under its name a file is whole, or it is the one before."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path

__all__ = ["write_atomically"]


def write_atomically(path: str | Path, content: bytes | Callable[[Path], object]) -> Path:
    """Write a file beside its place and move it there; folders are made.

    Several threads, processes and machines may write the same file at once: the last one's stays.

    Args:
        path: of the file.
        content: its bytes, or a function that writes them to the path it is called with.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{secrets.token_hex(8)}.partial")
    try:
        if callable(content):
            content(partial)
        else:
            partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path
