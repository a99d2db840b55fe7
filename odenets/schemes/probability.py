"""Probabilities among the arguments of schemes."""

from __future__ import annotations

from odenets.errors import check_number

__all__ = ["check_probability"]


def check_probability(name: str, value: object, *, loses: bool = True) -> float:
    """That the argument called ``name`` is a probability at which something is left.

    Args:
        name, value: of the argument.
        loses: whether it is that of losing something, and so below 1; otherwise of keeping it, and so above 0.

    Returns:
        The number.

    Raises:
        TypeError: it is no number.
        ValueError: it is out of range.

    >>> check_probability("drop", 0.5)
    0.5
    """
    number = check_number(name, value)
    if not (0 <= number < 1 if loses else 0 < number <= 1):
        span, end = ("[0, 1)", 1) if loses else ("(0, 1]", 0)
        raise ValueError(f"{name} must be a probability in {span}, for at {end} nothing is left, got {number}")
    return number
