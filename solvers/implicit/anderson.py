"""Anderson's acceleration of a fixed point's iteration, by the least residual of what it has seen."""

from __future__ import annotations

import torch
from torch import Tensor

from solvers.implicit.linear import rows

__all__ = ["Anderson"]

_REMEMBERED = 6


class Anderson:
    """Corrections of ``p = g(p)`` from the last residuals ``r_k = g(p_k) - p_k``, each sample in a space of its own.

    With the differences ``dp`` and ``dr`` of the last iterates as columns, ``d = r - (dp + dr) w`` where w minimizes
    ``|r - dr w|``: for linear g what GMRES does. One call of g an iteration.
    Reference: Walker, Ni. Anderson acceleration for fixed-point iterations. SIAM J. Numer. Anal. 49 (2011).

    >>> g = lambda p: torch.tensor([[-2.0, 0.5]]) * p + 1  # from which plain iterates run away
    >>> p, anderson = torch.zeros(1, 2), Anderson()
    >>> for _ in range(5):
    ...     p = p + anderson.correction(p, g(p) - p)
    >>> torch.allclose(p, torch.tensor([[1 / 3, 2.0]]))
    True
    """

    def __init__(self) -> None:
        self._last: tuple[Tensor, Tensor] | None = None
        self._moves: list[Tensor] = []
        self._falls: list[Tensor] = []

    def correction(self, p: Tensor, r: Tensor) -> Tensor:
        """The next correction of ``p``, with the residual ``r`` there, of their shape ``(B, *S)``."""
        shape, p, r = r.shape, rows(p), rows(r)
        if self._last is not None:
            self._moves = [*self._moves, p - self._last[0]][-_REMEMBERED:]
            self._falls = [*self._falls, r - self._last[1]][-_REMEMBERED:]
        self._last = p, r
        if not self._moves:
            return r.view(shape)
        moves, falls = torch.stack(self._moves, 1), torch.stack(self._falls, 1)
        lengths = torch.linalg.vector_norm(falls, dim=2, keepdim=True)
        units = falls / torch.where(lengths > 0, lengths, 1.0)
        gram, right = units @ units.mT, units @ r[:, :, None]
        small = 10 * torch.finfo(r.dtype).eps
        gram = gram.double() + small * torch.eye(gram.shape[1], dtype=torch.float64, device=r.device)
        weights = torch.linalg.solve_ex(gram, right.double())[0].to(r.dtype)
        moved = (moves / torch.where(lengths > 0, lengths, 1.0) + units).mT @ weights
        return (r - moved[:, :, 0]).view(shape)
