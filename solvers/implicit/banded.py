"""Jacobians of few diagonals, and their linear systems."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from solvers.field_calls import Field
from solvers.implicit.linear import pulled, rows

__all__ = ["Banded", "banded_jacobian"]


def banded_jacobian(field: Field, t: Any, x: Tensor, band: int, *, create_graph: bool = False) -> Tensor:
    """The diagonals of ``dv/dx`` of each sample, ``(2 band + 1, B, D)``: at ``[o, b, j]`` the entry of row
    ``j + o - band`` and column j.

    Rows that are ``2 band + 1`` apart have no column in common, so as many pulled vectors hold all rows (Curtis,
    Powell, Reid, J. Inst. Math. Appl. 13, 1974). What a field has beside its band is added to what is in it. One field
    call.
    """
    size, width = rows(x).shape[1], 2 * band + 1
    features = torch.arange(size, device=x.device)
    probes = (features % width == torch.arange(width, device=x.device)[:, None]).to(x.dtype)
    bands = pulled(field, t, x, probes, create_graph=create_graph)
    row = features + torch.arange(-band, band + 1, device=x.device)[:, None]
    bands = bands.gather(0, (row % width)[:, None].expand_as(bands))
    return bands.masked_fill(((row < 0) | (row >= size))[:, None], 0.0)


class Banded:
    """``I - h a J`` factorized by LAPACK on the host, the samples' matrices as one.

    Args:
        bands: as :func:`banded_jacobian` makes them.
        scale: ``h a``, a number or a tensor that broadcasts against states.
    """

    def __init__(self, bands: Tensor, scale: Any) -> None:
        band = len(bands) // 2
        diagonal = torch.arange(len(bands), device=bands.device).view(-1, 1, 1) == band
        system = bands * (-scale.reshape(1, -1, 1) if isinstance(scale, Tensor) else -scale) + diagonal
        self._system = system if system.requires_grad else None
        system = system.detach()
        matrix = torch.zeros(system[0].numel(), 3 * band + 1, dtype=system.dtype)
        matrix[:, band:] = system.flatten(1).T
        factors, pivots, _ = _lapack("trf", system.dtype)(matrix.numpy().T, band, band, overwrite_ab=True)
        norm = system.abs().sum(0).amax()
        self.tensors = (norm, torch.from_numpy(factors.T), torch.from_numpy(pivots))

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Banded:
        """The system that is made of tensors."""
        system = cls.__new__(cls)
        system.tensors, system._system = tuple(tensors), None
        return system

    @property
    def size(self) -> float:
        """The largest sum of a column's absolute values."""
        return self.tensors[0].item()

    def solve(self, r: Tensor) -> Tensor:
        """The solution for ``r``."""
        if self._system is not None or r.requires_grad:
            return _Solution.apply(self._system, r, self)  # type: ignore[return-value] - apply is untyped
        return self._solved(r, transposed=False)

    def solve_transposed(self, r: Tensor) -> Tensor:
        """The same with the transposed matrices."""
        return self._solved(r, transposed=True)

    def _solved(self, r: Tensor, *, transposed: bool) -> Tensor:
        _, factors, pivots = self.tensors
        band = (factors.shape[1] - 1) // 3
        d, _ = _lapack("trs", factors.dtype)(
            factors.numpy().T, band, band, r.detach().reshape(-1).cpu().numpy(), pivots.numpy(), trans=int(transposed)
        )
        return torch.from_numpy(d).to(r.device).view(r.shape)


class _Solution(torch.autograd.Function):
    """A solution as a function of the diagonals and of the right side."""

    @staticmethod
    def forward(ctx: Any, system: Tensor | None, r: Tensor, factorized: Banded) -> Tensor:
        d = factorized._solved(r, transposed=False)
        ctx.factorized, ctx.diagonals = factorized, None if system is None else len(system)
        ctx.save_for_backward(d)
        return d

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # type: ignore[override] - torch's has *grads
        if torch.is_grad_enabled():
            raise RuntimeError("banded solutions have no second derivatives (create_graph=True): leave out band=")
        (d,) = ctx.saved_tensors
        w = ctx.factorized._solved(grads[0], transposed=True)
        if ctx.diagonals is None:
            return None, w, None
        band, d = ctx.diagonals // 2, rows(d)
        padded = torch.nn.functional.pad(rows(w), (band, band))
        by_system = torch.stack([-padded[:, o : o + d.shape[1]] * d for o in range(ctx.diagonals)])
        return by_system, w, None


def _lapack(what: str, dtype: torch.dtype) -> Any:
    try:
        from scipy.linalg import lapack
    except ImportError as error:
        raise ImportError("RootFinder(band=...) solves by SciPy: pip install scipy") from error
    return getattr(lapack, f"{'d' if dtype == torch.float64 else 's'}gb{what}")
