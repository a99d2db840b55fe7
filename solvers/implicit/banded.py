"""Jacobians of few diagonals, and their linear systems."""

from __future__ import annotations

from typing import Any

import numpy as np
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
        self._lapack = _lapack()
        self._band = len(bands) // 2
        scale = scale.detach().reshape(1, -1, 1) if isinstance(scale, Tensor) else scale
        scaled = bands * scale
        self.size = 1 + scaled.abs().sum(0).max().item()
        """The largest sum of a column's absolute values."""
        matrix = np.zeros((scaled[0].numel(), 3 * self._band + 1), dtype=scaled.cpu().numpy().dtype)
        matrix[:, self._band :] = -scaled.flatten(1).T.cpu().numpy()
        matrix[:, 2 * self._band] += 1
        kind = "d" if matrix.dtype == np.float64 else "s"
        factorize, self._solve = (getattr(self._lapack, f"{kind}gb{what}") for what in ("trf", "trs"))
        self._factors, self._pivots, self._singular = factorize(matrix.T, self._band, self._band, overwrite_ab=True)

    def solve(self, r: Tensor) -> Tensor:
        """The solution for ``r``; NaN where a matrix is singular, which no iteration survives."""
        return self._solved(r, transposed=False)

    def solve_transposed(self, r: Tensor) -> Tensor:
        """The same with the transposed matrices."""
        return self._solved(r, transposed=True)

    def _solved(self, r: Tensor, *, transposed: bool) -> Tensor:
        right = r.detach().reshape(-1).cpu().numpy()
        d, _ = self._solve(self._factors, self._band, self._band, right, self._pivots, trans=int(transposed))
        return torch.from_numpy(d).to(r.device).view(r.shape)


def _lapack() -> Any:
    try:
        from scipy.linalg import lapack  # noqa: PLC0415 - of this method alone
    except ImportError as error:
        raise ImportError("RootFinder(band=...) solves by SciPy: pip install scipy") from error
    return lapack
