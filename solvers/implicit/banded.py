"""Jacobians of few diagonals, and their linear systems."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from solvers.field_calls import Field
from solvers.implicit.linear import pulled, rows

__all__ = ["Banded", "banded_jacobian"]


def banded_jacobian(field: Field, t: Any, x: Tensor, band: int) -> Tensor:
    """The diagonals of ``dv/dx`` of each sample, ``(2 band + 1, B, D)``: at ``[o, b, j]`` the entry of row
    ``j + o - band`` and column j.

    Rows that are ``2 band + 1`` apart have no column in common, so as many pulled vectors hold all rows (Curtis,
    Powell, Reid, J. Inst. Math. Appl. 13, 1974). What a field has beside its band is added to what is in it. One field
    call.
    """
    size, width = rows(x).shape[1], 2 * band + 1
    features = torch.arange(size, device=x.device)
    probes = (features % width == torch.arange(width, device=x.device)[:, None]).to(x.dtype)
    bands = pulled(field, t, x, probes)
    row = features + torch.arange(-band, band + 1, device=x.device)[:, None]
    bands = bands.gather(0, (row % width)[:, None].expand_as(bands))
    return bands.masked_fill_(((row < 0) | (row >= size))[:, None], 0.0)


class Banded:
    """``I - h a J`` factorized by LAPACK on the host, the samples' matrices as one.

    Args:
        bands: as :func:`banded_jacobian` makes them.
        scale: ``h a``, a number or a tensor that broadcasts against states.
    """

    def __init__(self, bands: Tensor, scale: Any) -> None:
        band = len(bands) // 2
        system = bands * (-scale.reshape(1, -1, 1) if isinstance(scale, Tensor) else -scale)
        system[band] += 1
        matrix = torch.zeros(system[0].numel(), 3 * band + 1, dtype=system.dtype)
        matrix[:, band:] = system.flatten(1).T
        factors, pivots, _ = _lapack("trf", system.dtype)(matrix.numpy().T, band, band, overwrite_ab=True)
        norm = system.abs().sum(0).amax()
        self.tensors = (norm, torch.from_numpy(factors.T), torch.from_numpy(pivots))

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Banded:
        """The system that is made of tensors."""
        system = cls.__new__(cls)
        system.tensors = tuple(tensors)
        return system

    @property
    def size(self) -> float:
        """The largest sum of a column's absolute values."""
        return self.tensors[0].item()

    def solve(self, r: Tensor) -> Tensor:
        """The solution for ``r``."""
        return self._solved(r, transposed=False)

    def solve_transposed(self, r: Tensor) -> Tensor:
        """The same with the transposed matrices."""
        return self._solved(r, transposed=True)

    def _solved(self, r: Tensor, *, transposed: bool) -> Tensor:
        _, factors, pivots = self.tensors
        band = (factors.shape[1] - 1) // 3
        d, _ = _lapack("trs", factors.dtype)(
            factors.numpy().T, band, band, r.reshape(-1).cpu().numpy(), pivots.numpy(), trans=int(transposed)
        )
        return torch.from_numpy(d).to(r.device).view(r.shape)


def _lapack(what: str, dtype: torch.dtype) -> Any:
    try:
        from scipy.linalg import lapack
    except ImportError as error:
        raise ImportError("RootFinder(band=...) solves by SciPy: pip install scipy") from error
    return getattr(lapack, f"{'d' if dtype == torch.float64 else 's'}gb{what}")
