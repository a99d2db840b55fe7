"""What an adaptive solve accepts: the error of a step over its tolerance, and the limits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from solvers.reductions import SMALL, error_ratios
from solvers.step import Step
from solvers.validation import is_mapped, is_transformed

__all__ = ["Tolerance", "to_host", "too_small"]


@dataclass(frozen=True, eq=False)
class Tolerance:
    """What an adaptive solve accepts and how far it goes.

    Attributes:
        rtol: relative tolerance, a number or a tensor that broadcasts against the state: ``(D,)`` is one per feature of
            the last dimension, ``(B, 1, ..., 1)`` one per sample. The error of each feature is divided by
            ``atol + rtol * max(|x0|, |x1|)``; a step is good if the root mean square of these ratios, over the batch
            and the features, is at most 1. [K24, appendix A.3] has ``eps * (1 + max(|order3|, |order2|))``, the two
            solutions at the end of the step, for one sample: here ``rtol = atol = eps``, the states at the two ends of
            the step as in Hairer, Norsett and Wanner (II.4), and the mean also over the batch, unless
            ``control="sample"``. An error of 0 is within any tolerance.
        atol: absolute tolerance, in the unit of the state, likewise a number or a tensor; not 0 together with rtol.
        norm: what takes the place of the root mean square, ``Tensor -> scalar``.
        first_step: size of the first attempted step; None derives it from two field evaluations
            (Hairer, Norsett, Wanner, II.4).
        min_step: a step that asks for this size or less takes it and is accepted whatever its error, if finite.
        max_step: largest step.
        max_steps: largest number of attempted steps, which bounds every solve.

    Raises:
        TypeError: a tolerance that is neither a number nor a tensor.
        ValueError: a limit or tolerance is out of range.

    >>> from solvers import integrate
    >>> tolerances = Tolerance(rtol=1e-2, atol=1e-2), Tolerance(rtol=1e-5, atol=1e-5)
    >>> loose, tight = (
    ...     integrate(lambda t, x: -x, torch.ones(1, 1), 0.0, 1.0, tolerance=one) for one in tolerances
    ... )
    >>> loose.stats.accepted < tight.stats.accepted
    True
    """

    rtol: float | Tensor = 1e-3
    atol: float | Tensor = 1e-6
    norm: Callable[[Tensor], Tensor] | None = None
    first_step: float | None = None
    min_step: float = 0.0
    max_step: float = math.inf
    max_steps: int = 10_000
    _exact: bool = field(init=False, repr=False, default=False)  # whether atol holds a 0: 0 / 0 may occur

    def __post_init__(self) -> None:
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            _check_number(name, value)
            tensor = isinstance(value, Tensor)
            if tensor and value.requires_grad:
                raise ValueError(f"{name} must not require a gradient")
            good = bool((value.isfinite() & (value >= 0)).all()) if tensor else math.isfinite(value) and value >= 0
            if not good:
                raise ValueError(f"{name} must be finite and not negative, got {value}")
        if not any(bool(value.any()) if isinstance(value, Tensor) else value for value in (self.rtol, self.atol)):
            raise ValueError("rtol and atol must not both be 0")
        if self.first_step is not None and not (math.isfinite(self.first_step) and self.first_step > 0):
            raise ValueError(f"first_step must be positive and finite, got {self.first_step}")
        if not 0 <= self.min_step < math.inf:
            raise ValueError(f"min_step must be finite and not negative, got {self.min_step}")
        if not self.max_step > 0 or self.max_step < self.min_step:
            raise ValueError(f"max_step must be positive and not below min_step, got {self.max_step}")
        if isinstance(self.max_steps, bool) or not 1 <= self.max_steps < math.inf or self.max_steps % 1:
            raise ValueError(f"max_steps must be at least 1 and finite, a whole number, got {self.max_steps}")
        exact = bool((self.atol == 0).any()) if isinstance(self.atol, Tensor) else self.atol == 0
        object.__setattr__(self, "_exact", exact)

    def check_per_sample(self, x0: Tensor) -> None:
        """Reject tolerances that look as if there were one per sample of ``x0`` and would be one per feature.

        Raises:
            ValueError: rtol or atol has the shape ``(B,)`` of several samples.
        """
        for name in ("rtol", "atol"):
            value, batch = getattr(self, name), x0.shape[0]
            if isinstance(value, Tensor) and value.shape == (batch,) and batch > 1:
                one_each = (batch, *[1] * (x0.ndim - 1))
                raise ValueError(
                    f"{name} of shape ({batch},) is one per feature of the last dimension, and there are as many "
                    f"samples: give shape {one_each} for one per sample, (1, {batch}) for one per feature"
                )

    def scaled(self, error: Tensor, x0: Tensor, x1: Tensor) -> Tensor:
        """The error over its tolerance, ``error / (atol + rtol * max(|x0|, |x1|))``, in float32 or wider."""
        if error.dtype in (torch.float16, torch.bfloat16):
            error, x0, x1 = error.float(), x0.float(), x1.float()
        return self._over(error, torch.maximum(x0.abs(), x1.abs()).mul_(self.rtol).add_(self.atol))

    def _over(self, value: Tensor, scale: Tensor) -> Tensor:
        quotient = value / scale
        return torch.where(value == 0, 0, quotient) if self._exact else quotient

    def size(self, scaled: Tensor, *, each: bool = False) -> Tensor:
        """The norm of ``scaled`` errors, a scalar tensor, or with ``each`` that of each sample, ``(B,)``.

        It never waits for the device.
        """
        if self.norm is not None:
            norms = torch.vmap(self.norm)(scaled) if each else torch.as_tensor(self.norm(scaled), device=scaled.device)
            return norms.abs()
        if each:
            return torch.linalg.vector_norm(scaled.flatten(1), dim=1) / math.sqrt(scaled[0].numel())
        return torch.linalg.vector_norm(scaled) / scaled.numel() ** 0.5  # of any batch size in a graph

    def size_over(self, value: Tensor, scale: Tensor, *, each: bool = False) -> Any:
        """The norm of ``value / scale`` as a number, or with ``each`` as an array ``(B,)``; waits for the device."""
        size = to_host(self.size(self._over(value, scale), each=each))
        return np.array(size) if each else size

    def size_in_graph(self, value: Tensor, scale: Tensor, *, each: bool = False) -> Tensor:
        """The norm of ``value / scale`` as a tensor, float64, a scalar or with ``each`` ``(B,)``, in a graph."""
        return self.size(self._over(value, scale), each=each).to(torch.float64)

    def ratio(self, step: Step) -> float:
        """Norm of the embedded error of a ``step`` over its tolerance; waits for the device, once."""
        if (rows := self._in_one_pass(step)) is not None:
            return to_host(torch.linalg.vector_norm(rows)) / math.sqrt(len(rows))
        scaled = self.scaled(step.error(), step.x0, step.x1)
        if self.norm is None:  # the root of the count as a number: a tensor operation less
            return to_host(torch.linalg.vector_norm(scaled)) / math.sqrt(scaled.numel())
        return to_host(self.size(scaled))

    def ratios(self, step: Step) -> np.ndarray:
        """:meth:`ratio` for each sample of a ``step``, ``(B,)``."""
        if (rows := self._in_one_pass(step)) is None:
            rows = self.size(self.scaled(step.error(), step.x0, step.x1), each=True)
        return np.array(to_host(rows))

    def _in_one_pass(self, step: Step) -> Tensor | None:
        """:meth:`ratios` of large states, if tolerances and norm are the usual ones."""
        x = step.x0
        if x.numel() <= SMALL or x.ndim < 2 or self.norm is not None:
            return None
        if isinstance(self.rtol, Tensor) or isinstance(self.atol, Tensor) or self._exact:
            return None
        step.error_weights()  # which raises where there is none
        return error_ratios(x, step.x1, step.stages, step.tableau, step.h, self.rtol, self.atol)


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (Tensor, Real)):
        raise TypeError(f"{name} must be a number or a tensor, got {value!r}")


def too_small(tolerance: Tolerance, x: Tensor) -> str:
    """That a state and its velocity, both finite, have no norm over the tolerance in their precision."""
    kind = str(torch.promote_types(x.dtype, torch.float32).to_real()).removeprefix("torch.")
    rtol, atol = (
        f"of shape {tuple(v.shape)}" if isinstance(v, Tensor) else v for v in (tolerance.rtol, tolerance.atol)
    )
    return (
        f"tolerance is too small for {kind}, got rtol={rtol} and atol={atol}: state and velocity over it have no "
        "finite norm; take larger ones, float64, or Tolerance(first_step=...)"
    )


def to_host(x: Tensor) -> Any:
    """The values of a tensor, as a number or a list; waits for the device.

    Raises:
        RuntimeError: under ``torch.vmap`` and ``torch.export``, where a tensor has no values.
    """
    if torch.compiler.is_exporting():
        raise RuntimeError(
            "an adaptive solve chooses its steps by numbers and cannot be exported: graph=True, or fixed steps, steps=n"
        )
    try:
        return x.tolist() if x.ndim else x.item()
    except RuntimeError:
        if not is_mapped(x):
            if not is_transformed(x):
                raise
            return [to_host(row) for row in x]  # torch 2.8 lists no numbers of what grad and jvp wrap
    raise RuntimeError(
        "an adaptive solve chooses its steps by numbers and cannot be mapped by torch.vmap: give the samples as "
        "one batch to integrate(..., control='sample'), where each has its own steps, or take fixed steps"
    )
