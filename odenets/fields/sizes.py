"""Sizes of fields: what they must be."""

from __future__ import annotations

from odenets.errors import check_count

__all__ = ["check_sizes"]


def check_sizes(**sizes: int | None) -> None:
    """That ``sizes`` are whole numbers, at least 1; None is the size that a field chooses.

    Raises:
        TypeError: one is no whole number.
        ValueError: one is below 1.

    >>> check_sizes(channels=8, hidden=None)
    """
    for name, size in sizes.items():
        if size is not None:
            check_count(name, size, 1)
