"""The linear systems of Newton's iteration, ``(I - h a J) d = r`` for each sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from solvers.field_calls import Field, velocity
from solvers.saved_tensors import saved_uncounted

__all__ = ["Dense", "Identity", "LinearSystem", "conjugate_residuals", "jacobian", "pulled", "rows"]

_INVERTED = 48
"""Features up to which a product with the inverse is the faster, and as good for an iteration that mends itself."""


def rows(x: Tensor) -> Tensor:
    """A state, or a vector of one sample, as ``(B, D)``."""
    return x.reshape(len(x), -1) if x.ndim > 1 else x.reshape(1, -1)


def jacobian(field: Field, t: Any, x: Tensor, *, create_graph: bool = False) -> Tensor:
    """``dv/dx`` of each sample, ``(B, D, D)``, by reverse mode for all rows at once; zero where the field reads no x.

    Samples are taken to be independent. One field call.
    """
    size = rows(x).shape[1]
    ones = torch.eye(size, dtype=x.dtype, device=x.device)
    return pulled(field, t, x, ones, create_graph=create_graph).transpose(0, 1)


def pulled(field: Field, t: Any, x: Tensor, covectors: Tensor, *, create_graph: bool = False) -> Tensor:
    """Products of covectors ``(n, D)``, the same for each sample, with ``dv/dx``, ``(n, B, D)``. One field call.

    With ``create_graph`` they are functions of what x and the field depend on.
    """
    count, size = covectors.shape
    kept = nullcontext() if create_graph else saved_uncounted()
    with torch.enable_grad(), kept:
        y = x if create_graph and x.requires_grad else x.detach().clone().requires_grad_()
        v = velocity(field, t, y)
        samples = rows(x).shape[0]
        if not v.requires_grad:
            return x.new_zeros(count, samples, size)
        vs = covectors[:, None].expand(count, samples, size).reshape(count, *x.shape)
        how: Any = {"retain_graph": True, "allow_unused": True, "create_graph": create_graph}
        try:
            (grads,) = torch.autograd.grad(v, y, vs, is_grads_batched=True, **how)
        except RuntimeError:  # an operation that cannot be mapped: one by one
            parts = [torch.autograd.grad(v, y, one, **how)[0] for one in vs]
            grads = None if parts[0] is None else torch.stack(parts)
    if grads is None:
        return x.new_zeros(count, samples, size)
    return (grads if create_graph else grads.detach()).reshape(count, samples, size)


class LinearSystem(Protocol):
    """A matrix for each sample, near ``I - h a J``.

    Attributes:
        size: a norm of it, as far as it is known.
        tensors: what it is made of.
    """

    @property
    def size(self) -> float:
        """See above."""
        ...

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """See above."""
        ...

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> LinearSystem:
        """The system that is made of tensors."""
        ...

    def solve(self, r: Tensor) -> Tensor:
        """The solution for ``r``, of its shape; infinite or NaN where a matrix is singular."""
        ...

    def solve_transposed(self, r: Tensor) -> Tensor:
        """The solution with the transposed matrices."""
        ...


class Dense:
    """``I - h a J`` factorized, or inverted where it is small.

    Args:
        matrix: the Jacobians, ``(B, D, D)``.
        scale: ``h a``, a number or a tensor that broadcasts against states.
    """

    def __init__(self, matrix: Tensor, scale: Any) -> None:
        scale = scale.reshape(-1, 1, 1) if isinstance(scale, Tensor) else scale
        system = torch.eye(matrix.shape[1], dtype=matrix.dtype, device=matrix.device) - scale * matrix
        norm = system.detach().abs().sum(2).amax()
        if matrix.shape[1] <= _INVERTED:
            self.tensors: tuple[Tensor, ...] = (norm, torch.linalg.inv_ex(system)[0])
        else:
            self.tensors = (norm, *torch.linalg.lu_factor_ex(system)[:2])

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Dense:
        """The system that is made of tensors."""
        system = cls.__new__(cls)
        system.tensors = tuple(tensors)
        return system

    @property
    def size(self) -> float:
        """The largest sum of a row's absolute values."""
        return self.tensors[0].item()

    def solve(self, r: Tensor) -> Tensor:
        """The solution for ``r``."""
        return self._solved(r, transposed=False)

    def solve_transposed(self, r: Tensor) -> Tensor:
        """The same with the transposed matrices."""
        return self._solved(r, transposed=True)

    def _solved(self, r: Tensor, *, transposed: bool) -> Tensor:
        right = rows(r).unsqueeze(2)
        if len(self.tensors) == 2:
            inverse = self.tensors[1]
            return torch.bmm(inverse.transpose(1, 2) if transposed else inverse, right).view(r.shape)
        return torch.linalg.lu_solve(*self.tensors[1:], right, adjoint=transposed).view(r.shape)


class Identity:
    """No matrix: what is left of Newton's iteration is that of a fixed point."""

    size = 1.0
    tensors: tuple[Tensor, ...] = ()

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Identity:
        """The same."""
        return cls()

    def solve(self, r: Tensor) -> Tensor:
        """``r`` as it is."""
        return r

    def solve_transposed(self, r: Tensor) -> Tensor:
        """``r`` as it is."""
        return r


def conjugate_residuals(
    product: Callable[[Tensor], Tensor], r: Tensor, precondition: Callable[[Tensor], Tensor], *, tolerance: float,
    iterations: int, together: bool = False
) -> tuple[Tensor, float]:  # fmt: skip
    """The solution d of ``product(d) = r`` for each sample, and the largest residual over that of ``d = 0``.

    The generalized conjugate residuals, which minimize what GMRES minimizes (Eisenstat, Elman, Schultz, SIAM J. Numer.
    Anal. 20, 1983), each sample in a space of its own; one product an iteration. The residual is right only where
    products of samples depend on no others.

    Args:
        product: with the matrices, of a tensor of the shape of ``r``.
        r: the right side.
        precondition: near the inverse of ``product``.
        tolerance: on the residual.
        iterations: at most.
        together: whether all samples have one space, as where they depend on each other.
    """
    if together:
        shape = r.shape
        d, residual = conjugate_residuals(
            lambda d: product(d.view(shape)).reshape(1, -1), r.reshape(1, -1),
            lambda r: precondition(r.view(shape)).reshape(1, -1), tolerance=tolerance, iterations=iterations,
        )  # fmt: skip
        return d.view(shape), residual
    shape, r = r.shape, rows(r)
    start = torch.linalg.vector_norm(r, dim=1)
    start = torch.where(start > 0, start, 1.0)
    images = r.new_empty(len(r), 0, r.shape[1])  # of the directions, orthonormal, and what made them so
    directions: list[Tensor] = []
    columns: list[Tensor] = []
    shares: list[Tensor] = []
    residual = math.inf
    for k in range(iterations):
        directions.append(precondition(r.view(shape)))
        q = rows(product(directions[-1]))[:, None]
        column = q.new_zeros(len(q), 1, k)
        for _ in range(2 if k else 0):  # twice is enough
            share = q @ images[:, :k].mT
            q, column = torch.baddbmm(q, share, images[:, :k], alpha=-1), column + share
        length = torch.linalg.vector_norm(q, dim=2, keepdim=True)
        length = torch.where(length > 0, length, 1.0)
        q = q / length
        if k == images.shape[1]:
            images = torch.cat([images, images.new_empty(len(q), max(k, 8), q.shape[2])], 1)
        images[:, k] = q[:, 0]
        shares.append((q[:, 0] * r).sum(1))
        columns.append(pad(torch.cat([column, length], 2), (0, iterations - k - 1)))
        r = r - shares[-1][:, None] * q[:, 0]
        residual = (torch.linalg.vector_norm(r, dim=1) / start).max().item()
        if not residual > tolerance:
            break
    n = len(directions)
    triangle = torch.cat(columns, 1).mT[:, :n]
    weights = torch.linalg.solve_triangular(triangle, torch.stack(shares, 1)[..., None], upper=True)
    d = torch.stack([rows(p) for p in directions], 2) @ weights
    return d.view(shape), residual
