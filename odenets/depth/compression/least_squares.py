"""Linear maps by least squares, their ridge chosen on rows that were held out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from odenets.modes import total_dtype

__all__ = ["RIDGES", "Fit", "NormalEquations"]

RIDGES = (0.0, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
"""Ridges that are tried, in units of the mean square of a feature."""


@dataclass(frozen=True)
class Fit:
    """A linear map that was fitted.

    Attributes:
        weight: ``(features, outputs)``.
        bias: ``(outputs,)``.
        error: mean square error of the rows that were held out, of one output.
        ridge: the one chosen.
    """

    weight: Tensor
    bias: Tensor
    error: float
    ridge: float


class NormalEquations:
    """Sums of products of rows, from which every ridge is solved and judged without the rows.

    Args:
        features, outputs: entries of a row and of its target.
        constant: whether a constant is fitted besides; else the bias is zero.

    >>> x = torch.randn(100, 3, dtype=torch.float64)
    >>> sums = NormalEquations(3, 1)
    >>> sums.add(x[:80], x[:80].sum(1, keepdim=True) + 2, held_out=False)
    >>> sums.add(x[80:], x[80:].sum(1, keepdim=True) + 2, held_out=True)
    >>> fit = sums.solve()
    >>> fit.weight.flatten().round(decimals=4), round(fit.bias.item(), 4)
    (tensor([1., 1., 1.], dtype=torch.float64), 2.0)
    """

    def __init__(self, features: int, outputs: int, constant: bool = True) -> None:
        self.features, self.constant = features, constant
        self._factors: dict[int, Tensor] = {}  # of the sums as they are
        self._means: tuple[Tensor, Tensor] | None = None  # of the first rows, about which sums lose few digits
        self.sums = {held: _Sums(features + 1, outputs) for held in (False, True)}

    def rows(self, *, held_out: bool) -> int:
        """How many rows there are to fit, or to judge."""
        return self.sums[held_out].rows

    def add(self, rows: Tensor, targets: Tensor, *, held_out: bool, weights: Tensor | None = None) -> None:
        """Count ``rows`` ``(N, features)`` with their ``targets`` ``(N, outputs)``, to fit or to judge.

        Errors of a row are multiplied with its entry of ``weights`` ``(N,)``.
        """
        if not len(rows):
            return  # of texts that are padding alone
        self._factors.clear()
        if self._means is None:
            means = rows.mean(0), targets.mean(0)
            self._means = means if self.constant else (means[0] * 0, means[1] * 0)  # which a constant makes good
        if not self.constant:
            rows, targets = (x.to(total_dtype(x.device)) for x in (rows, targets))
        rows, targets = (x - mean.to(x) for x, mean in zip((rows, targets), self._means, strict=True))
        rows = torch.cat([rows, rows.new_full((len(rows), 1), float(self.constant))], 1)
        if weights is not None:
            rows, targets = rows * weights[:, None], targets * weights[:, None]
        self.sums[held_out].add(rows, targets)

    def _error(self, weight: Tensor, columns: slice) -> float:
        """Mean square error on the held-out rows of a ``weight`` ``(features + 1, outputs)``, the bias in its last.

        It is of rows and targets less their means.
        """
        sums = self.sums[True]
        cross, square = sums.cross[:, columns], sums.square[columns].sum()
        total = square - 2 * (weight * cross).sum() + (weight * (sums.gram @ weight)).sum()
        return max(total.item(), 0.0) / (sums.rows * weight.shape[1])

    def solve(self, prior: Tensor | None = None, columns: slice = slice(None)) -> Fit:
        """The map of the ridge that does best on the held-out rows.

        Args:
            prior: weights ``(features + 1, outputs)`` to which the ridge pulls; zero if not given.
            columns: of the targets, those that are fitted.

        Raises:
            ValueError: there are no rows to fit, or none held out, or they are not finite.
        """
        sums = self.sums[False]
        if not (sums.rows and self.sums[True].rows):
            raise ValueError("a linear map needs rows to fit and rows held out, got none of one kind")
        if not (sums.gram.isfinite().all() and sums.cross.isfinite().all()):
            raise ValueError(
                "a linear map cannot be fitted to states that are not finite: the network diverges on the data"
            )
        gram, cross = sums.gram / sums.rows, sums.cross[:, columns] / sums.rows
        assert self._means is not None  # of the rows that there are
        mean, target = (x.cpu().double() for x in self._means)
        target = target[columns]
        squares = gram.diagonal()[:-1] + 2 * mean * gram[:-1, -1] + mean.square() * gram[-1, -1]  # means included
        scale = squares.mean().clamp_min(torch.finfo(torch.float64).tiny)
        fits: dict[int, tuple[float, Tensor]] = {}

        def error_of(n: int) -> float:
            """The error with the nth ridge, solved once."""
            if n not in fits:
                pull = gram.new_full((len(gram),), RIDGES[n]) * scale
                pull[-1] = 0 if self.constant else scale  # a constant is not pulled
                if n not in self._factors:
                    self._factors[n] = _factor(gram + torch.diag(pull))
                right = cross if prior is None else cross + pull[:, None] * prior
                weight = torch.cholesky_solve(right, self._factors[n])
                if not RIDGES[n]:  # what the factor's floor has changed is mended once
                    weight = weight + torch.cholesky_solve(right - gram @ weight, self._factors[n])
                fits[n] = self._error(weight, columns), weight
            return fits[n][0]

        best = len(RIDGES) // 2
        for step in (-1, 1):  # downhill from the middle
            while 0 <= best + step < len(RIDGES) and error_of(best + step) <= error_of(best):
                best += step
        error, weight = fits[best]
        return Fit(weight[:-1], weight[-1] + target - mean @ weight[:-1], error, RIDGES[best])


class _Sums:
    """Sums over rows: of their products, of those with the targets, and of the targets' squares."""

    def __init__(self, features: int, outputs: int) -> None:
        self.gram = torch.zeros(features, features, dtype=torch.float64, device="cpu")
        self.cross = torch.zeros(features, outputs, dtype=torch.float64, device="cpu")
        self.square = torch.zeros(outputs, dtype=torch.float64, device="cpu")
        self.rows = 0

    def add(self, rows: Tensor, targets: Tensor) -> None:
        dtype = _dtype_of_products(rows)
        rows, targets = rows.to(dtype), targets.to(dtype)
        self.gram += (rows.T @ rows).cpu().double()
        self.cross += (rows.T @ targets).cpu().double()
        self.square += targets.to(total_dtype(targets.device)).square().sum(0).cpu().double()
        self.rows += len(rows)


def _dtype_of_products(rows: Tensor) -> torch.dtype:
    """In which products of ``rows`` are added up: float32 where it is exact to its last digits, on a CPU; else float64.

    Elsewhere, and if torch is told so, products of float32 may have as few digits as those of float16; on a CPU they
    take half the time.
    """
    if rows.dtype != torch.float64 and rows.device.type == "cpu" and torch.get_float32_matmul_precision() == "highest":
        return torch.float32
    return total_dtype(rows.device)


def _factor(gram: Tensor) -> Tensor:
    """The Cholesky factor of a matrix that may be singular, a little above it then."""
    floor = 1e-10 * gram.diagonal().mean()
    while True:
        factor, failed = torch.linalg.cholesky_ex(
            gram + floor * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        )
        if not failed:
            return factor
        floor = 10 * floor
