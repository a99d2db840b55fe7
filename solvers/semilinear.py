"""Fields of a linear part and a network."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from solvers.field_calls import counting, versions_of
from solvers.validation import check_call, is_transformed

__all__ = ["SemiLinear", "phi"]

_SERIES, _TERMS = 0.5, 16
_MOST = 16
"""Sizes of steps of which the functions are kept."""


class SemiLinear(nn.Module):
    """The field ``dx/dt = A x + network(t, x)`` of states ``(B, D)``.

    Methods such as "exponential_euler" take its linear part exactly, by ``phi_k(hA)``; for every other method it is a
    field as any. These functions are computed once for each size of the steps, and kept as long as A stays; where
    gradients flow to A they are computed, and differentiated, at each step. Writes into A that pass torch by
    (``A.data``, NumPy) are not noticed. The functions of a matrix are taken in float64, up to the rounding of A, which
    is ``eps |hA|``.
    Reference: Hochbruck, Ostermann, Exponential integrators, Acta Numerica 19 (2010).

    Args:
        A: matrix ``(D, D)``, or the diagonal ``(D,)`` of one: a constant, then a buffer, a parameter, or a tensor that
            requires a gradient.
        network: the rest, from time and state ``(B, D)`` to the same shape; a module's parameters train.

    Raises:
        TypeError: A is no floating or complex tensor, or network no function of a time and a state.
        ValueError: A has another shape.

    >>> from solvers import integrate
    >>> field = SemiLinear(torch.tensor([-1e6, -1.0]), lambda t, x: torch.ones_like(x))
    >>> x1 = integrate(field, torch.ones(1, 2), 0.0, 1.0, solver="exponential_euler", steps=4).x1
    >>> [round(value, 6) for value in x1[0].tolist()]
    [1e-06, 1.0]
    """

    structure = "semilinear"
    A: Tensor

    def __init__(self, A: Tensor, network: Callable[..., Tensor]) -> None:
        super().__init__()
        if not isinstance(A, Tensor) or not (A.is_floating_point() or A.is_complex()):
            kind = A.dtype if isinstance(A, Tensor) else type(A).__name__
            raise TypeError(f"A must be a floating or complex tensor, got {kind}")
        if not (A.ndim == 1 or (A.ndim == 2 and A.shape[0] == A.shape[1])) or not len(A):
            raise ValueError(f"A must have shape (D, D), or (D,) of a diagonal, got {tuple(A.shape)}")
        if not callable(network):
            raise TypeError(f"network must be a function (t, x), got {type(network).__name__}")
        check_call(network, None, "network")
        if isinstance(A, nn.Parameter) or A.requires_grad:
            self.A = A
        else:
            self.register_buffer("A", A)
        self.network = network
        self._kept: dict[Any, Tensor] = {}
        self._of: tuple[Tensor | None, Any] = None, None

    def __getstate__(self) -> dict[str, Any]:
        """Without what is computed from A."""
        return {**self.__dict__, "_kept": {}, "_of": (None, None)}

    def forward(self, t: Any, x: Tensor, *args: Any) -> Tensor:
        """The velocity ``(B, D)`` at time ``t`` of states ``x``; ``args``: what the network takes besides.

        Raises:
            ValueError: x has another shape than ``(B, D)``, or another dtype or device than A.
        """
        return self.linear(x) + self.network(t, x, *args)

    def linear(self, x: Tensor) -> Tensor:
        """``A x`` of states ``x``, ``(B, D)``.

        Raises:
            ValueError: x has another shape than ``(B, D)``, or another dtype or device than A.
        """
        if x.ndim != 2 or x.shape[1] != len(self.A):
            raise ValueError(f"x0 must have shape (B, {len(self.A)}), as A {tuple(self.A.shape)}, got {tuple(x.shape)}")
        if x.dtype != self.A.dtype or x.device != self.A.device:
            raise ValueError(
                f"A must have the dtype and device of the state, {x.dtype} on {x.device}, got {self.A.dtype} on "
                f"{self.A.device}: take field.to(x0)"
            )
        return x * self.A if self.A.ndim == 1 else x @ self.A.mT

    def part(self, t: Any, x: Tensor, name: str, *args: Any) -> Tensor:
        """What a method reads of the field.

        Args:
            t: time; for "phi1" and "phi2" a step size, a number or a tensor ``(m, 1, 1)`` of several.
            x: state ``(B, D)``, or a velocity for "phi1" and "phi2".
            name: "network", "linear", "whole", or "phi1" and "phi2", which are ``phi_k(tA) x``.
            args: what the network takes besides.

        Returns:
            ``(B, D)``; of several step sizes ``(m, B, D)``.
        """
        if name == "network":
            return self.network(t, x, *args)
        if name == "linear":
            return self.linear(x)
        if name == "whole":
            return self(t, x, *args)
        function = self._phi(int(name[-1]), t)
        return x * function if self.A.ndim == 1 else x @ function.mT

    def _phi(self, k: int, h: Any) -> Tensor:
        A = self.A
        flows = A.requires_grad and torch.is_grad_enabled()
        if flows or isinstance(h, Tensor) or torch.compiler.is_compiling() or is_transformed(A):
            return phi(k, h, A)
        of, now = self._of, (A.data_ptr(), A.dtype, versions_of([A]))
        if of[0] is not A or of[1] != now or now[-1] is None:
            self._kept, self._of = {}, (A, now)
        if (k, h) not in self._kept:
            if len(self._kept) >= _MOST:
                self._kept.pop(next(iter(self._kept)))
            with counting():
                self._kept[k, h] = phi(k, h, A)
        return self._kept[k, h]


def phi(k: int, h: Any, A: Tensor) -> Tensor:
    """``phi_k(hA)``, k = 1 or 2, of a diagonal ``(D,)`` or a matrix ``(D, D)``.

    ``phi_1(z) = (e^z - 1) / z`` and ``phi_2(z) = (phi_1(z) - 1) / z``, 1 and 1/2 at z = 0. Of a matrix they are the
    last block in the first row of the exponential of ``[[hA, I, 0], [0, 0, I], [0, 0, 0]]``, without its last row and
    column for phi_1 (Saad 1992, Analysis of some Krylov subspace approximations to the matrix exponential
    operator, SIAM J. Numer. Anal. 29); of a diagonal by expm1, and near 0 by their series.

    Args:
        k: which.
        h: a number, or a tensor of several, ``(m, 1, 1)``.
        A: the diagonal or matrix.

    Returns:
        ``(D,)`` or ``(D, D)``; of several ``(m, 1, D)`` or ``(m, D, D)``.
    """
    if A.ndim == 1:
        z = h * A
        small = z.abs() < _SERIES
        near, far = torch.where(small, z, 0.0), torch.where(small, 1.0, z)
        series = torch.zeros_like(z)
        for j in reversed(range(_TERMS)):
            series = series * near + 1 / math.factorial(j + k)
        value = torch.expm1(far) / far
        return torch.where(small, series, (value - 1) / far if k == 2 else value)
    wide = A if A.device.type == "mps" else A.to(torch.promote_types(A.dtype, torch.float64))
    z, size = (h.to(wide.real.dtype) if isinstance(h, Tensor) else h) * wide, len(A)
    identity = torch.eye(size, dtype=wide.dtype, device=A.device).expand(z.shape)
    blocks = torch.nn.functional.pad(z, (0, k * size, 0, k * size))
    for j in range(k):
        rest = (k - 1 - j) * size
        blocks = blocks + torch.nn.functional.pad(identity, ((j + 1) * size, rest, j * size, (k - j) * size))
    return torch.matrix_exp(blocks)[..., :size, k * size :].to(A.dtype)
