"""Fields of a linear part and a network."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual

from solvers.field_calls import counting
from solvers.validation import called, check_call, is_transformed, mismatch, real_dtype

__all__ = ["SemiLinear", "phi"]

_SERIES, _TERMS = 0.5, 16
_MOST = 16
"""Sizes of steps of which the functions are kept."""


class SemiLinear(nn.Module):
    """The field ``dx/dt = A x + network(t, x)`` of states ``(B, D)``.

    Methods such as "exponential_euler" take its linear part exactly, by ``phi_k(hA)``; for every other method it is a
    field as any. These functions are computed once in a solve for each size of its steps, also where gradients flow to
    A (with ``gradient="checkpoint"`` once a step). Those of a matrix that gets no gradient are kept for further solves,
    as long as A is the same: a comparison a solve, which waits for a GPU. They are taken in float64, up to the rounding
    of A, which is ``eps |hA|``; those of a matrix take time and memory of ``(3 D)^3`` and ``(3 D)^2``.
    Reference: Hochbruck, Ostermann, Exponential integrators, Acta Numerica 19 (2010).

    Args:
        A: matrix ``(D, D)``, or the diagonal ``(D,)`` of one: a constant, then a buffer, or a parameter; or what makes
            it, a module or a function without arguments, which is called once a solve. It is real or complex, and a
            real one also goes with complex states.
        network: the rest, from time and state ``(B, D)`` to the same shape; a module's parameters train.

    Raises:
        TypeError: A is no dense floating or complex tensor nor makes one, or network no function of a time and a state.
        ValueError: A has another shape, or was computed from a tensor that gets a gradient.

    >>> from solvers import integrate
    >>> field = SemiLinear(torch.tensor([-1e6, -1.0]), lambda t, x: torch.ones_like(x))
    >>> x1 = integrate(field, torch.ones(1, 2), 0.0, 1.0, solver="exponential_euler", steps=4).x1
    >>> [round(value, 6) for value in x1[0].tolist()]
    [1e-06, 1.0]
    """

    structure = "semilinear"
    A: Tensor | Callable[[], Tensor]

    def __init__(self, A: Tensor | Callable[[], Tensor], network: Callable[..., Tensor]) -> None:
        super().__init__()
        if not callable(network):
            raise TypeError(f"network must be a function (t, x), got {type(network).__name__}")
        check_call(network, None, "network")
        if isinstance(A, Tensor):
            _checked(A)
            if A.grad_fn is not None and not is_transformed(A):
                raise ValueError(
                    f"A must be a constant or a parameter, got a tensor that was computed ({A.grad_fn.name()}), whose "
                    "graph serves one pass: hand over what computes it, a module without arguments, which an optimizer "
                    "sees, or a function, as lambda: nu.exp() * L"
                )
        elif not callable(A) or isinstance(A, type):
            raise TypeError(f"A must be a floating or complex tensor, or what makes it, got {type(A).__name__}")
        elif problem := mismatch(A.forward if isinstance(A, nn.Module) else A):
            raise TypeError(f"A must be a tensor, or a module or a function without arguments, got one of {problem}")
        if isinstance(A, Tensor) and not isinstance(A, nn.Parameter) and not A.requires_grad:
            self.register_buffer("A", A)
        else:
            self.A = A
        self.network = network
        self._kept: dict[Any, Tensor] = {}
        self._of: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without what is computed from A."""
        return {**self.__dict__, "_kept": {}, "_of": None}

    def forward(self, t: Any, x: Tensor, *args: Any) -> Tensor:
        """The velocity ``(B, D)`` at time ``t`` of states ``x``; ``args``: what the network takes besides.

        Raises:
            ValueError: x has another shape than ``(B, D)``, or another dtype or device than A.
        """
        return self.part(t, x, "whole", *args)

    def part(self, t: Any, x: Tensor, name: str, *args: Any) -> Tensor:
        """What a method reads of the field.

        Args:
            t: time; for "phi1" and "phi2" a step size, a number or a tensor ``(m, 1, 1)`` of several.
            x: state ``(B, D)``, or a velocity for "phi1" and "phi2".
            name: "network", "linear", "whole", or "phi1" and "phi2", which are ``phi_k(tA) x``.
            args: what the network takes besides.

        Returns:
            ``(B, D)``; of several step sizes ``(m, B, D)``.

        Raises:
            ValueError: x has another shape than ``(B, D)``, or another dtype or device than A.
        """
        return self.begun()(t, x, name, *args)

    def begun(self) -> Callable[..., Tensor]:
        """:meth:`part` for one solve: A is as it is now, and each function of it computed once.

        Raises:
            TypeError, ValueError: what A returns is no such matrix.
        """
        A = _checked(self.A) if isinstance(self.A, Tensor) else _checked(self.A(), "what A returns")
        return partial(self._part, _Functions(A, self))

    def _part(self, functions: _Functions, t: Any, x: Tensor, name: str, *args: Any) -> Tensor:
        A = functions.A
        _check_state(A, x)
        if name in ("network", "whole"):
            v = called(self.network, "network", t, x, *args)
            return v if name == "network" else _times(A, A, x) + v
        return _times(A, A if name == "linear" else functions(int(name[-1]), t), x)

    def _kept_of(self, A: Tensor) -> dict[Any, Tensor]:
        """The functions of a matrix that are kept over solves, as long as it is the same."""
        of = self._of
        if of is None or (of.dtype, of.device) != (A.dtype, A.device) or not torch.equal(of, A):
            with counting():
                self._kept, self._of = {}, A.clone()
        return self._kept


class _Functions:
    """The functions of A in one solve, each computed once for each size of its steps."""

    def __init__(self, A: Tensor, field: SemiLinear) -> None:
        self.A, self.field = A, field
        self.own: dict[Any, Tensor] = {}
        self.shared: dict[Any, Tensor] | None = None

    def __call__(self, k: int, h: Any) -> Tensor:
        """``phi_k(hA)``, of a number h or a tensor of several."""
        A = self.A
        if isinstance(h, Tensor) or torch.compiler.is_compiling():
            return phi(k, h, A)
        flows = torch.is_grad_enabled() and A.requires_grad
        single = flows or A.ndim == 1 or is_transformed(A) or unpack_dual(A).tangent is not None
        if not single and self.shared is None:
            self.shared = self.field._kept_of(A)
        kept = self.own if single or self.shared is None else self.shared
        if (k, h, flows) not in kept:
            if len(kept) >= _MOST:
                kept.pop(next(iter(kept)))
            with nullcontext() if single else counting():
                kept[k, h, flows] = phi(k, h, A)
        return kept[k, h, flows]


def _checked(A: Any, name: str = "A") -> Tensor:
    """A matrix, or its diagonal.

    Raises:
        TypeError, ValueError: another tensor.
    """
    if not isinstance(A, Tensor) or not (A.is_floating_point() or A.is_complex()) or A.layout != torch.strided:
        dense = not isinstance(A, Tensor) or A.layout == torch.strided
        kind = getattr(A, "dtype", type(A).__name__) if dense else "a sparse one: take A.to_dense(), or its diagonal"
        raise TypeError(f"{name} must be a floating or complex tensor, got {kind}")
    if not (A.ndim == 1 or (A.ndim == 2 and A.shape[0] == A.shape[1])) or not len(A):
        raise ValueError(f"{name} must have shape (D, D), or (D,) of a diagonal, got {tuple(A.shape)}")
    return A


def _check_state(A: Tensor, x: Tensor) -> None:
    if x.ndim != 2 or x.shape[1] != len(A):
        flat = f": flatten it, x0.flatten(1), {x[0].numel()} features" if x.ndim > 2 else ""
        raise ValueError(f"x0 must have shape (B, {len(A)}), as A {tuple(A.shape)}, got {tuple(x.shape)}{flat}")
    if A.dtype not in (x.dtype, real_dtype(x)) or x.device != A.device:
        remedy = "field.to(x0)" if not (A.is_complex() or x.is_complex()) else "SemiLinear(A.to(x0), network)"
        remedy = "a complex x0" if A.is_complex() and not x.is_complex() else remedy
        raise ValueError(
            f"A must have the dtype and device of the state, {x.dtype} on {x.device}, got {A.dtype} on {A.device}: "
            f"take {remedy}"
        )


def _times(A: Tensor, function: Tensor, x: Tensor) -> Tensor:
    """A function of A, or several, times states."""
    return x * function if A.ndim == 1 else x @ function.mT.to(x.dtype)


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
