"""Sizes of fields: what they must be."""

from __future__ import annotations

from odenets.errors import check_count

__all__ = ["check_divides", "check_odd", "check_sizes"]


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


def check_odd(kernel_size: int) -> None:
    """That a convolution of a ``kernel_size`` keeps the height and width of what it takes.

    Raises:
        TypeError: it is no whole number.
        ValueError: it is even or below 1.

    >>> check_odd(3)
    """
    check_sizes(kernel_size=kernel_size)
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd to keep the shape of x, got {kernel_size}")


def check_divides(**sizes: int) -> None:
    """That the first of two ``sizes`` divides the second.

    Raises:
        TypeError: one is no whole number.
        ValueError: one is below 1, or the first does not divide.

    >>> check_divides(heads=3, features=64)
    Traceback (most recent call last):
        ...
    ValueError: heads must divide features, got 3 and 64
    """
    check_sizes(**sizes)
    (part, number), (whole, total) = sizes.items()
    if total % number:
        raise ValueError(f"{part} must divide {whole}, got {number} and {total}")
