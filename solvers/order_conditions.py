"""The order that the coefficients of a Runge-Kutta or Rosenbrock method have: the order conditions up to 4."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["HIGHEST", "missed_condition"]

HIGHEST = 4
"""The highest order whose conditions are checked."""


def missed_condition(
    order: int,
    a: Sequence[Sequence[float]],
    b: Sequence[float],
    c: Sequence[float],
    gamma: Sequence[Sequence[float]] = (),
) -> tuple[int, str] | None:
    """The first condition of an ``order``, up to 4, that the solution with weights ``b`` misses; None without one.

    Reference: Hairer, Norsett, Wanner, *Solving Ordinary Differential Equations I*, II.2, Table 2.1.

    Args:
        order: the order that is claimed.
        a, b, c: the coefficients, whose rows sum to their nodes.
        gamma: of a Rosenbrock method, whose conditions have ``a + gamma``, with the sums d of its rows, in the place of
            a and c where v is differentiated once (Hairer, Wanner, II, IV.7, Table 7.1).

    Returns:
        The order that the solution has, one below that of the condition, and the condition in words.

    >>> missed_condition(2, ((), (0.5,)), (0.0, 1.0), (0.0, 0.5))
    >>> missed_condition(2, ((), (0.5,)), (0.5, 0.5), (0.0, 0.5))
    (1, 'sum_i b_i c_i is 0.25, not 1/2')
    """

    def inner(rows: Sequence[Sequence[float]], values: Sequence[float]) -> list[float]:
        return [sum(weight * value for weight, value in zip(row, values, strict=False)) for row in rows]

    ones, square = [1.0] * len(c), [node * node for node in c]
    own, d, letter = a, c, "c"
    if gamma:
        own = [[w + g for w, g in zip((*row, 0.0), more, strict=True)] for row, more in zip(a, gamma, strict=True)]
        d, letter = inner(own, ones), "d"
    ad = inner(a, d)
    conditions = (
        (1, "b_i", ones, 1),
        (2, f"b_i {letter}_i", d, 2),
        (3, "b_i c_i^2", square, 3),
        (3, f"b_i a_ij {letter}_j", inner(own, d), 6),
        (4, "b_i c_i^3", [node**3 for node in c], 4),
        (4, f"b_i c_i a_ij {letter}_j", [node * value for node, value in zip(c, ad, strict=True)], 8),
        (4, "b_i a_ij c_j^2", inner(own, square), 12),
        (4, f"b_i a_ij a_jk {letter}_k", inner(own, inner(own, d)), 24),
    )
    for needed, terms, values, share in conditions:
        total = sum(weight * value for weight, value in zip(b, values, strict=True))
        if needed <= order and not abs(total - 1 / share) <= 1e-9:
            indices = "".join(i for i in "ijk" if f"_{i}" in terms or f"{i} " in terms)
            return needed - 1, f"sum_{indices} {terms} is {total:.12g}, not 1/{share}"
    return None
